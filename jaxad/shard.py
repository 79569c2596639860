"""Meshes and shardings: axis "data" splits a batch over devices; methods know nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxad.core import Batch


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis "data" over the given devices, all by default."""
    devices = jax.devices() if devices is None else devices
    # Explicit axes, jax's default, refuse constraints on values that were not sharded from the start.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def over_data(mesh: Mesh) -> Callable[[Batch], Batch]:
    """A `place` for `fit` and `drive`: splits a batch over the axis "data"; one it does not divide stays whole."""

    def place(batch: Batch) -> Batch:
        if batch.label.shape[0] % mesh.shape["data"]:
            return batch
        split = NamedSharding(mesh, PartitionSpec("data"))
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, split), batch)

    return place


def replicate(tree, mesh: Mesh):
    """Puts a tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
