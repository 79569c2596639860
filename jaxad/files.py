"""Files of run folders: written in one move, read back after a crash; and facts about the machine."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxad import __version__

SCORE_COLUMNS = ("file", "label", "score", "score_normalised", "predicted", "defect")


def environment() -> dict[str, Any]:
    """Versions, device and commit."""
    from importlib import metadata

    versions: dict[str, str | None] = {"jaxad": __version__}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(),
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cores": os.cpu_count(),
        "commit": _commit(),
        "command": sys.argv,
    }


def device_name() -> str:
    """The kind of device that runs are on, such as "cpu" or "NVIDIA H100"."""
    return jax.devices()[0].device_kind


def _commit() -> str | None:
    here = pathlib.Path(__file__).resolve().parent
    if not (here.parent / ".git").exists():
        return None
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces a file in one move, so that no reader and no crash sees half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes JSON; numbers that JSON has not (NaN, infinity) become null."""
    write_text(path, json.dumps(plain(values), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of scores.csv; None becomes an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=SCORE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that a crash cut short is left out."""
    return list(_whole_lines(path))


def _whole_lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def plain(value: Any) -> Any:
    """The value in what JSON has: arrays become lists, NaN and infinity None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return plain(np.asarray(value).tolist())
    return number(value) if isinstance(value, float) else value


def number(value: Any) -> float | None:
    """A finite float, or None."""
    return float(value) if np.isfinite(value) else None


def free_folder(parent: pathlib.Path, name: str) -> pathlib.Path:
    """`parent/name`, or the first of `parent/name-2`, ... that does not exist."""
    number, folder = 1, parent / name
    while folder.exists():
        number += 1
        folder = parent / f"{name}-{number}"
    return folder
