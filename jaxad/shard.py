"""Meshes and shardings: axis "data" splits a batch over devices, axis "run" the members of a sweep.

Methods know nothing of either: they are written for the whole batch and for one run.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxad.core import Batch, Phase

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
    return _OverData(mesh)


@dataclasses.dataclass(frozen=True)
class _OverData:
    mesh: Mesh

    @property
    def devices(self) -> int:
        """Over how many devices it splits."""
        return self.mesh.shape["data"]

    def __call__(self, batch: Batch) -> Batch:
        if batch.label.shape[0] % self.devices:
            return batch
        around = jax.sharding.get_abstract_mesh()  # not empty among the members of a sweep, where "run" is manual
        where = split(self.mesh if around.empty else around)
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, where), batch)


def check_one_run(mesh: Mesh) -> None:
    """Refuses a mesh that spreads members where there is one run. Raises ValueError."""
    if mesh.shape["run"] > 1:
        raise ValueError(
            f"--mesh run={mesh.shape['run']} spreads the members of a sweep; expected data only, this is one run. "
            f"Pass --mesh data={mesh.size}."
        )


def check_batches(phases: Sequence[Phase], mesh: Mesh) -> None:
    """Refuses a mesh that cannot split the batches of the phases. Raises ValueError."""
    devices, run = mesh.shape["data"], mesh.shape["run"]
    for phase in phases:
        if phase.batch_size % devices:
            fitting = max(n for n in range(1, devices + 1) if phase.batch_size % n == 0)
            raise ValueError(
                f"--mesh data={devices}: phase '{phase.name}' has batches of {phase.batch_size}, which {devices} "
                "devices do not divide; expected a divisor. "
                f"Pass --mesh {f'run={run},' if run > 1 else ''}data={fitting}, or another batch size."
            )


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """How a batch of this size lies on the mesh: split over "data", or whole where that does not divide it."""
    return replicated(mesh) if batch_size % mesh.shape["data"] else split(mesh)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a batch that the devices of this process hold, ascending."""
    where = batch_sharding(mesh, batch_size).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in where.values()]))


def split(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """The leading axis over "data"."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree on every device of the mesh."""
    return put(tree, replicated(mesh))


def over_runs(tree: Any, mesh: Mesh) -> Any:
    """Splits the leading axis of every leaf, the members of a sweep, over the axis "run"."""
    return put(tree, NamedSharding(mesh, PartitionSpec("run")))


def put(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """Puts a tree that every process holds whole on the devices of a sharding."""
    return jax.tree.map(lambda leaf: _put(leaf, sharding), tree)


def _put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)  # device_put would send it through the network to compare it between processes
    return jax.make_array_from_callback(whole.shape, sharding, lambda rows: whole[rows])


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays lies on; None: one device."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if isinstance(mesh, Mesh) and set(AXES) <= set(mesh.axis_names):
            return mesh
    return None


def local(tree: Any) -> Any:
    """What this process's first device holds of a replicated tree, as arrays of that device."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


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
