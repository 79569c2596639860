"""How much memory programs may use on each device."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

_HEADROOM = 0.85  # of the free memory: programs are not all that lives there
_LIMITS = {"memory.max": "memory.current", "memory.limit_in_bytes": "memory.usage_in_bytes"}  # cgroups v2, v1


def free_bytes(mesh: Mesh | None) -> int | None:
    """Memory that programs may use on each device; None if the device does not tell."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform == "cpu":
        total = available_bytes()
        return None if total is None else int(total * _HEADROOM / (1 if mesh is None else mesh.size))
    facts = device.memory_stats() or {}
    if "bytes_limit" not in facts:
        return None
    return int((facts["bytes_limit"] - facts.get("bytes_in_use", 0)) * _HEADROOM)


def available_bytes(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Memory of the host that this process may still take; None if the system does not tell.

    The least of what the machine has and what each control group around the process leaves: in a container or a batch
    job the machine has more than the process may take.

    Args:
      root: of the file system.
    """
    return min([*_of_machine(root), *_of_groups(root)], default=None)


def _of_machine(root: pathlib.Path) -> Iterator[int]:
    with contextlib.suppress(OSError, KeyError, ValueError):
        facts = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        yield int(facts["MemAvailable"].split()[0]) * 1024


def _of_groups(root: pathlib.Path) -> Iterator[int]:
    for folder in _groups(root):
        for limit, usage in _LIMITS.items():
            # Without a limit version 2 says "max", and version 1 a number beyond all memory.
            with contextlib.suppress(OSError, ValueError):
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                yield max(most - used + _file_cache(folder), 0)


def _groups(root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Folders of the groups that the process is in, from its own outwards.

    A container sees its own group as the outermost and not those that the path names: these do not exist there.
    """
    mounts = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            for top in [mounts / "memory"] if kinds else [mounts, mounts / "unified"]:  # version 1, version 2
                own = top / path.lstrip("/")
                yield from (own, *own.parents)


def _file_cache(folder: pathlib.Path) -> int:
    """Bytes of files read long ago: they count as used, and make room when memory is asked for."""
    with contextlib.suppress(OSError, ValueError):
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))  # version 1, version 2
    return 0
