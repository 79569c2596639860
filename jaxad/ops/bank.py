"""Banks of vectors of fixed capacity: filled by passes, thinned by k-centre selection."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from jaxad.core import Array


def write(bank: Array, vectors: Array, index: Array, valid: Array) -> Array:
    """Writes the vectors of a batch of pictures to their places; padding rows fall off the end.

    Args:
      bank: (N, P, D), P vectors of each of N pictures.
      vectors: (B, P, D).
      index: (B,) int32 picture.
      valid: (B,) bool.
    """
    places = jnp.where(valid, index, bank.shape[0])
    return bank.at[places].set(vectors.astype(bank.dtype), mode="drop")


def k_centre(rows: Array, *, count: int, valid: Array | None = None) -> Array:
    """Greedy k-centre: each chosen row is the one farthest from those chosen before; the first valid row begins.

    The largest distance of a row to its nearest chosen one is at most twice the best that so many rows can reach
    (Gonzalez, 1985). One pass over the rows for each chosen one, all on the device, no more memory than (N,).

    Args:
      rows: (N, D).
      count: how many to choose, in [1, N].
      valid: (N,) bool, rows that may be chosen; None: all.

    Returns:
      (count,) int32, in the order of choosing. Where fewer rows are valid, or differ, rows repeat.

    Raises:
      ValueError: a count out of range.
    """
    if not 1 <= count <= rows.shape[0]:
        raise ValueError(f"k_centre: count={count} of {rows.shape[0]} rows; expected 1 to that many. Pass fewer.")
    valid = jnp.ones(rows.shape[0], bool) if valid is None else valid
    first = jnp.argmax(valid).astype(jnp.int32)

    def choose(turn, carry):
        nearest, chosen = carry
        latest = rows[chosen[turn - 1]].astype(jnp.float32)
        nearest = jnp.minimum(nearest, jnp.sum((rows.astype(jnp.float32) - latest) ** 2, axis=1))
        farthest = jnp.argmax(jnp.where(valid, nearest, -1.0)).astype(jnp.int32)
        return nearest, chosen.at[turn].set(farthest)

    start = jnp.full(rows.shape[0], jnp.inf), jnp.full(count, first)
    return lax.fori_loop(1, count, choose, start)[1]
