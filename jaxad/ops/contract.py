"""Products of tall matrices that are summed over their rows: gradients of kernels."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jaxad.core import Array

_LEAST = 512  # rows of a group; fewer are not worth a product of their own
_NARROW = 24  # columns, up to which one product is slow


def contract_rows(left: Array, right: Array, *, groups: int = 1) -> Array:
    """The sum over all rows of the products of their entries.

    As matrices, since XLA would transpose arrays of higher rank in memory, and from the narrower side: on CPU up to a
    fifth faster.

    Args:
      left: (..., M).
      right: (..., N), as many rows.
      groups: products that the rows are shared among, if there are enough of them and they divide. XLA-CPU gives each
        product of a batch to a thread of its own, and one product of few columns to hardly more than one.

    Returns:
      (M, N) float32.
    """
    if left.shape[-1] > right.shape[-1]:
        return contract_rows(right, left, groups=groups).T
    left, right = (x.reshape(-1, x.shape[-1]) for x in (left, right))
    rows, columns = left.shape
    if groups == 1 or columns > _NARROW or rows % groups or rows < groups * _LEAST:
        return lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    left, right = (x.reshape(groups, rows // groups, -1) for x in (left, right))
    return lax.dot_general(left, right, (((1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32).sum(axis=0)
