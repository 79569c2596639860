"""A state to disk and back, through Orbax: arrays and JSON, no pickle, written atomically."""

from __future__ import annotations

import pathlib
from typing import Any, NamedTuple

import jax

FORMAT = 1  # raised when an older jaxad could not read a checkpoint


class Saved(NamedTuple):
    """A restored checkpoint."""

    step: int  # its number: steps of all phases done
    state: Any
    meta: dict  # what `save` was given


def _open(folder: pathlib.Path):
    from orbax.checkpoint import v1 as ocp

    return ocp.training.Checkpointer(
        folder.resolve(),
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
    )


def save(folder: pathlib.Path, step: int, state: Any, meta: dict) -> None:
    """Writes a checkpoint; the one before it stays until this one is whole. Returns when it is on disk.

    Of several processes every one calls it, with a folder that all of them see.

    Args:
      folder: of all checkpoints of a run.
      step: the checkpoint's number, rising.
      state: a pytree of arrays.
      meta: JSON-able facts to find beside it.
    """
    with _open(folder) as checkpointer:
        checkpointer.save(
            step, jax.block_until_ready(state), custom_metadata={"format": FORMAT, **meta}, overwrite=True
        )


def latest(folder: pathlib.Path) -> int | None:
    """The number of the newest whole checkpoint, or None."""
    if not folder.is_dir():
        return None
    with _open(folder) as checkpointer:
        return checkpointer.latest.step if checkpointer.latest else None


def restore(folder: pathlib.Path, template: Any, *, sharding: jax.sharding.Sharding | None = None) -> Saved:
    """Reads the newest whole checkpoint, written by any number of devices and processes.

    Args:
      folder: of all checkpoints of a run.
      template: the state's shapes and dtypes, from `jax.eval_shape` of the method's init.
      sharding: where to put it; None: the first device.

    Raises:
      FileNotFoundError: no whole checkpoint.
      ValueError: written by a newer format.
    """
    step = latest(folder)
    if step is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint; expected one written by `jaxad train`. Train first.")
    with _open(folder) as checkpointer:
        meta = dict(checkpointer.metadata(step).custom_metadata or {})
        if meta.get("format", 0) > FORMAT:
            raise ValueError(
                f"{folder} has checkpoint format {meta['format']}; this jaxad reads up to {FORMAT}. Upgrade jaxad."
            )
        # restored for the devices given here, whichever it was saved on
        here = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), template)
        return Saved(step, checkpointer.load(step, placed), meta)
