"""How many devices share the rows of what is being traced, for ops that go through their rows in blocks.

An op is written for all rows and does not see how they are split over devices. A block that suits one device is then a
sliver on each of many: 4,096 rows over 256 chips are 16 for each, and the loop has 256 times the turns. So drivers say
over how many devices they split a batch, and the ops make their blocks that much larger.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

_devices: contextvars.ContextVar[int] = contextvars.ContextVar("jaxad_devices_of_rows", default=1)


@contextlib.contextmanager
def rows_over(devices: int) -> Iterator[None]:
    """Says, while tracing, that the rows of a batch are split over this many devices."""
    token = _devices.set(devices)
    try:
        yield
    finally:
        _devices.reset(token)


def devices_of_rows() -> int:
    """Over how many devices the rows of a batch are split; 1 unless `rows_over` says otherwise."""
    return _devices.get()


def map_blocks(function: Callable, xs: Any, *, rows: int) -> Any:
    """`function` of blocks of xs, one after the other: as `fold_blocks` without a carry.

    Args:
      function: maps a block of xs to outputs with the same rows.
      xs: pytree of (T, ...) arrays.
      rows: largest block, over all devices; static.

    Returns:
      The outputs as (T, ...) arrays in the order of xs.
    """
    return fold_blocks(lambda carry, block: (carry, function(block)), (), xs, rows=rows)[1]


def fold_blocks(step: Callable, carry: Any, xs: Any, *, rows: int) -> tuple[Any, Any]:
    """Folds `step(carry, block) -> (carry, outputs)` over equal blocks of at most `rows` rows.

    Args:
      step: maps a block of xs to outputs with the same rows.
      carry: any pytree.
      xs: pytree of (T, ...) arrays; filled up with zeros to equal blocks.
      rows: largest block, over all devices; static.

    Returns:
      The last carry, and the outputs as (T, ...) arrays in the order of xs.
    """
    num_rows = jax.tree.leaves(xs)[0].shape[0]
    if not isinstance(num_rows, int) or num_rows <= rows:  # jax.export with any batch: no blocks to count
        return step(carry, xs)
    devices = devices_of_rows() if num_rows % devices_of_rows() == 0 else 1
    own = num_rows // devices  # rows of a device
    least = -(-num_rows // rows)
    # Somewhat smaller blocks without padding save copies of all rows, before and after.
    num_blocks = next((n for n in range(least, 2 * least) if own % n == 0), least)
    size = -(-own // num_blocks)

    # Block i holds rows i, i + num_blocks, ... of each device: where the rows are sharded, all have a share of a block.
    # Slicing inside the loop costs no copy of the whole; transposing first took up to half as long again.
    def interleave(x):
        x = x.reshape(devices, own, *x.shape[1:])
        x = jnp.pad(x, [(0, 0), (0, num_blocks * size - own)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(devices * size, num_blocks, *x.shape[2:])

    def restore(x):
        return x.reshape(devices, num_blocks * size, *x.shape[2:])[:, :own].reshape(num_rows, *x.shape[2:])

    def body(carry_and_outputs, i):
        carry, outputs = carry_and_outputs
        carry, y = step(carry, block_of(i))
        return (carry, jax.tree.map(lambda out, new: lax.dynamic_update_index_in_dim(out, new, i, 1), outputs, y)), None

    xs = jax.tree.map(interleave, xs)
    block_of = lambda i: jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, 1, keepdims=False), xs)  # noqa: E731
    _, shapes = jax.eval_shape(step, carry, block_of(0))
    outputs = jax.tree.map(lambda s: jnp.zeros((devices * size, num_blocks, *s.shape[1:]), s.dtype), shapes)
    (carry, outputs), _ = lax.scan(body, (carry, outputs), jnp.arange(num_blocks))
    return carry, jax.tree.map(restore, outputs)
