"""Running count, mean, variance and range of values that come in batches, in any number of them."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from jaxad.core import Array


class Moments(NamedTuple):
    """What is known of the values seen so far; float32 scalars."""

    count: Array
    mean: Array
    squares: Array  # sum of squared deviations from the mean
    low: Array  # inf where nothing was seen
    high: Array  # -inf where nothing was seen


def empty() -> Moments:
    """Nothing seen."""
    zero = jnp.zeros(())
    return Moments(zero, zero, zero, jnp.full((), jnp.inf), jnp.full((), -jnp.inf))


def add(moments: Moments, values: Array, valid: Array) -> Moments:
    """Folds in a batch, by the pairwise update of Chan, Golub and LeVeque: no cancellation, the order is free.

    Args:
      moments: so far.
      values: (B, ...).
      valid: (B,) bool; rows without it count for nothing.
    """
    keep = jnp.broadcast_to(valid.reshape(valid.shape + (1,) * (values.ndim - 1)), values.shape)
    added = jnp.sum(keep, dtype=jnp.float32)
    count = moments.count + added
    own_mean = jnp.sum(jnp.where(keep, values, 0.0)) / jnp.maximum(added, 1.0)
    own_squares = jnp.sum(jnp.where(keep, (values - own_mean) ** 2, 0.0))
    apart, share = own_mean - moments.mean, added / jnp.maximum(count, 1.0)
    return Moments(
        count=count,
        mean=moments.mean + apart * share,
        squares=moments.squares + own_squares + apart**2 * moments.count * share,
        low=jnp.minimum(moments.low, jnp.min(jnp.where(keep, values, jnp.inf))),
        high=jnp.maximum(moments.high, jnp.max(jnp.where(keep, values, -jnp.inf))),
    )


def standardise(values: Array, moments: Moments) -> Array:
    """Values in standard deviations from the mean; less the mean alone where all values seen were equal or none was."""
    variance = moments.squares / jnp.maximum(moments.count, 1.0)
    return (values - moments.mean) / jnp.sqrt(jnp.where(variance > 0, variance, 1.0))


def stretch(values: Array, moments: Moments) -> Array:
    """Values with the range seen mapped to [0, 1]; as they are where all values seen were equal or none was."""
    is_range = moments.high > moments.low
    low = jnp.where(is_range, moments.low, 0.0)
    return (values - low) / jnp.where(is_range, moments.high - low, 1.0)
