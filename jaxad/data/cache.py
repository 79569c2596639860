"""Decoded pictures kept on disk, so that a data set is decoded once for each size."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import numpy as np

from jaxad.cache import folder

_LIMIT = 20 * 2**30  # bytes; beyond it the entries unused for longest are removed


def key_of(*parts: Any) -> str:
    """A hash of anything JSON can write."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read(key: str) -> tuple[dict[str, np.ndarray], Any] | None:
    """The arrays and facts stored under a key; None where there are none, or no whole ones."""
    root = folder("data")
    if root is None:
        return None
    entry = root / key
    try:
        facts = json.loads((entry / "facts.json").read_text("utf-8"))
        arrays = {name: np.load(entry / f"{name}.npy", mmap_mode="r") for name in facts["arrays"]}
        os.utime(entry)
    except (OSError, ValueError, KeyError):
        return None
    return arrays, facts["facts"]


def write(key: str, arrays: dict[str, np.ndarray], facts: Any) -> None:
    """Stores arrays and facts: whole or not at all. A cache that cannot be written to is no error."""
    root = folder("data")
    if root is None:
        return
    building = None
    with contextlib.suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
        building = pathlib.Path(tempfile.mkdtemp(dir=root, prefix="tmp-"))
        for name, array in arrays.items():
            np.save(building / f"{name}.npy", array)
        (building / "facts.json").write_text(json.dumps({"arrays": list(arrays), "facts": facts}), "utf-8")
        _replace(building, root / key)
        _prune(root, keep=root / key)
    if building is not None:
        shutil.rmtree(building, ignore_errors=True)


def _replace(building: pathlib.Path, entry: pathlib.Path) -> None:
    try:
        building.rename(entry)
    except OSError:  # a damaged entry lies there, or another process was first
        shutil.rmtree(entry, ignore_errors=True)
        building.rename(entry)


def _prune(root: pathlib.Path, keep: pathlib.Path) -> None:
    entries = [(entry.stat().st_mtime, _size(entry), entry) for entry in root.iterdir() if entry.is_dir()]
    total = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if total > _LIMIT and entry != keep:
            shutil.rmtree(entry, ignore_errors=True)
            total -= size


def _size(entry: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir())
