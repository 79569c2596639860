"""k-means on the device: k-means++ seeds, then Lloyd's iterations as matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array


def squared_distances(rows: Array, centres: Array) -> Array:
    """Squared Euclidean distances: rows (..., D), centres (L, D) -> (..., L), at least 0."""
    product = jnp.einsum("...d,ld->...l", rows, centres, precision=lax.Precision.HIGHEST)
    squares = jnp.sum(rows**2, axis=-1, keepdims=True) + jnp.sum(centres**2, axis=-1)
    return jnp.maximum(squares - 2 * product, 0.0)


def seed(key: Array, rows: Array, *, count: int, valid: Array) -> Array:
    """k-means++ (Arthur and Vassilvitskii, 2007): every centre is a row drawn by its squared distance to those before.

    Args:
      key: a PRNG key.
      rows: (R, D).
      count: L.
      valid: (R,) bool, rows that count.

    Returns:
      (L, D) rows; they repeat where fewer valid rows differ.
    """
    uniform = jax.random.uniform(key, (count,))

    def choose(turn, carry):
        nearest, centres = carry
        total = jnp.cumsum(jnp.where(valid, nearest, 0.0))
        # Where nothing is left to choose, the last valid row.
        place = jnp.minimum(jnp.searchsorted(total, uniform[turn] * total[-1], side="right"), last)
        centre = rows[place]
        nearest = jnp.minimum(nearest, jnp.sum((rows - centre) ** 2, axis=1))
        return nearest, centres.at[turn].set(centre)

    last = rows.shape[0] - 1 - jnp.argmax(valid[::-1])
    start = jnp.ones(rows.shape[0]), jnp.zeros((count, rows.shape[1]), rows.dtype)
    first, centres = choose(0, start)
    del first
    apart = jnp.sum((rows - centres[0]) ** 2, axis=1)
    return lax.fori_loop(1, count, choose, (apart, centres))[1]


def fit(key: Array, rows: Array, *, count: int, valid: Array, iterations: int = 20) -> Array:
    """Centres of k-means.

    Args:
      key: for the seeds.
      rows: (R, D).
      count: L.
      valid: (R,) bool, rows that count.
      iterations: of Lloyd's; a centre without rows stays where it is.

    Returns:
      (L, D).
    """

    def turn(_, centres):
        nearest = jnp.argmin(squared_distances(rows, centres), axis=1)
        mine = ((nearest[:, None] == jnp.arange(count)) & valid[:, None]).astype(rows.dtype)
        sums = jnp.einsum("rl,rd->ld", mine, rows, precision=lax.Precision.HIGHEST)
        sizes = mine.sum(axis=0)[:, None]
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1.0), centres)

    return lax.fori_loop(0, iterations, turn, seed(key, rows, count=count, valid=valid))


def inertia(rows: Array, centres: Array, valid: Array) -> Array:
    """Mean squared distance of the valid rows (R, D) to their nearest of the centres (L, D)."""
    nearest = squared_distances(rows, centres).min(axis=1)
    return jnp.sum(jnp.where(valid, nearest, 0.0)) / jnp.maximum(valid.sum(), 1)


def spread_places(index: Array, *, per_picture: int, pixels: int) -> Array:
    """Places in pictures that are spread evenly over all pictures: no random numbers, the same whatever the batch.

    Args:
      index: (B,) int32 picture.
      per_picture: P.
      pixels: of a picture, at most 2^16.

    Returns:
      (B, P) int32 in [0, pixels).
    """
    number = index[:, None].astype(jnp.uint32) * per_picture + jnp.arange(per_picture, dtype=jnp.uint32)
    turned = number * jnp.uint32(2654435769) >> 16  # steps of the golden ratio around the circle
    return (turned * jnp.uint32(pixels) >> 16).astype(jnp.int32)
