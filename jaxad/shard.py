"""Meshes and shardings: axis "data" splits a batch over devices, axis "run" the members of a sweep.

Methods know nothing of either: they are written for the whole batch and for one run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxad.core import Batch

AXES = ("run", "data")


def make_mesh(*, run: int = 1, data: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `run` x `data` devices with the axes "run" and "data".

    Args:
      run: devices over which the members of a sweep are spread.
      data: devices over which a batch is split.
      devices: to take them from; all by default.

    Raises:
      ValueError: sizes below 1, or more devices than there are.
    """
    devices = jax.devices() if devices is None else devices
    count = run * data
    if min(run, data) < 1 or count > len(devices):
        raise ValueError(
            f"mesh run={run}, data={data} needs {count} devices; expected sizes of at least 1 and no more than the "
            f"{len(devices)} devices here. Pass --mesh data={len(devices)}."
        )
    # Explicit axes, jax's default, refuse constraints on values that were not sharded from the start.
    return jax.make_mesh((run, data), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:count])


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in a text such as "data=4,run=2"; axes left out are 1.

    Raises:
      ValueError: an unknown axis, or a size that is no whole number.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in text.split(","):
        axis, _, size = (piece.strip() for piece in part.partition("="))
        if axis not in AXES or not size.isdigit() or not int(size):
            raise ValueError(f"--mesh {text!r}; expected axes {AXES} with sizes of at least 1, such as data=4,run=2.")
        sizes[axis] = int(size)
    return sizes


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh that splits batches over the given devices, all by default."""
    devices = jax.devices() if devices is None else devices
    return make_mesh(data=len(devices), devices=devices)


def over_data(mesh: Mesh) -> Callable[[Batch], Batch]:
    """A `place` for `fit` and `drive`: splits a batch over the axis "data"; one it does not divide stays whole."""

    def place(batch: Batch) -> Batch:
        if batch.label.shape[0] % mesh.shape["data"]:
            return batch
        split = NamedSharding(mesh, PartitionSpec("data"))
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, split), batch)

    return place


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def over_runs(tree: Any, mesh: Mesh) -> Any:
    """Splits the leading axis of every leaf, the members of a sweep, over the axis "run"."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("run")))


_COLLECTIVE = re.compile(
    r" = (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all"
    r"|collective-permute|collective-broadcast)(?P<end>-done)?\("
)
_SHAPE = re.compile(r"\b(?P<dtype>pred|[a-z]+(?P<bits>\d+)\w*)\[(?P<sizes>[\d,]*)\]")


def collectives(compiled: Any) -> dict[str, tuple[int, int]]:
    """What a compiled program exchanges between devices, read from its HLO.

    Args:
      compiled: as from `jax.jit(...).lower(...).compile()`, for any platform.

    Returns:
      By kind, such as "all-reduce": (how many operations, bytes of their results on one device). An operation inside a
      loop counts once.
    """
    found: dict[str, tuple[int, int]] = {}
    for match in _COLLECTIVE.finditer(compiled.as_text()):
        size = sum(_bytes(shape) for shape in _SHAPE.finditer(match["result"]))
        count, before = found.get(match["kind"], (0, 0))
        found[match["kind"]] = count + 1, before + size
    return found


def _bytes(shape: re.Match) -> int:
    """Of a shape as HLO writes it, such as bf16[8,128]."""
    return math.prod(map(int, filter(None, shape["sizes"].split(",")))) * int(shape["bits"] or 8) // 8
