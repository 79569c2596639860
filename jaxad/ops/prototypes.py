"""A memory of few prototypes, moved by the queries themselves: read, update and losses from one K x M matrix.

Queries q_k and items p_m are unit vectors, s_km = <q_k, p_m>. All that follows needs s alone:

    read          w_km = softmax over m of s_km,   phat_k = sum_m w_km p_m
    assignment    a_k = argmax_m s_km; the first of equal items
    update        p_m <- unit(p_m + sum_{k: a_k = m} v_km q_k),   v_km = exp(s_km - max_k' s_k'm)
    distances     ||q_k - p_m||^2 = 2 - 2 s_km

The update's weight is a softmax over queries divided by its largest value; its denominator cancels. Nothing is gathered
and no loop goes over items: reading and updating are matrix products, in float32 whatever the network computes in.

Sizes in docstrings: K queries, M items, C features, B pictures.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array

UPDATE_NORMS = ("all", "assigned")
DISTANCES = ("mse", "l2")
_TINY = 1e-12  # under square roots, whose gradient is infinite at 0


class Matches(NamedTuple):
    """What K queries have to do with M items."""

    similarity: Array  # (K, M) float32 in [-1, 1]
    is_nearest: Array  # (K, M) bool, one True a row
    nearest: Array  # (K,) similarity to the nearest item
    second: Array  # (K,) similarity to the second nearest; that of the nearest where M = 1


def unit(x: Array) -> Array:
    """Vectors on the last axis divided by their length, in float32; a zero vector stays zero."""
    wide = x.astype(jnp.float32)
    squares = jnp.sum(wide * wide, axis=-1, keepdims=True)
    return wide * lax.rsqrt(jnp.maximum(squares, _TINY**2))


def match(queries: Array, items: Array) -> Matches:
    """Compares queries (K, C) with items (M, C), all of unit length."""
    similarity = _product(queries, items, 1, 1)
    columns = lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
    is_nearest = columns == jnp.argmax(similarity, axis=1)[:, None]
    # A sum of one term rather than a maximum: its gradient goes to the first of equal items, as the assignment does.
    nearest = jnp.sum(jnp.where(is_nearest, similarity, 0.0), axis=1)
    others = jnp.where(is_nearest, -jnp.inf, similarity)
    is_second = columns == jnp.argmax(others, axis=1)[:, None]
    second = jnp.sum(jnp.where(is_second, similarity, 0.0), axis=1)
    return Matches(similarity, is_nearest, nearest, second)


def read(matches: Matches, items: Array, *, grad_weights: bool = False) -> Array:
    """What each query reads: a convex combination of items.

    Args:
      matches: of K queries with `items`.
      items: (M, C).
      grad_weights: whether gradients reach the queries through the weights.

    Returns:
      (K, C) float32.
    """
    weights = jax.nn.softmax(matches.similarity, axis=1)
    return _product(weights if grad_weights else lax.stop_gradient(weights), items, 1, 0)


def update(items: Array, queries: Array, matches: Matches, *, norm: str = "all") -> Array:
    """Moves every item towards the queries assigned to it; one with none stays where it is. No gradient passes.

    Args:
      items: (M, C) of unit length.
      queries: (K, C) of unit length.
      matches: of `queries` with `items`.
      norm: what the largest weight of an item is 1 over: "all" queries, or those "assigned" to it.

    Returns:
      (M, C) of unit length.

    Raises:
      ValueError: an unknown norm.
    """
    if norm not in UPDATE_NORMS:
        raise ValueError(f"update_norm={norm!r} is unknown; expected one of {UPDATE_NORMS}. Pass update_norm='all'.")
    similarity, is_nearest = lax.stop_gradient((matches.similarity, matches.is_nearest))
    own = jnp.where(is_nearest, similarity, -jnp.inf)
    top = jnp.max(similarity if norm == "all" else own, axis=0, keepdims=True)
    weights = jnp.where(is_nearest, jnp.exp(jnp.minimum(similarity - top, 0.0)), 0.0)
    moved = unit(items + _product(weights, lax.stop_gradient(queries), 0, 0))
    return lax.stop_gradient(jnp.where(jnp.any(is_nearest, axis=0)[:, None], moved, items))


def update_in_order(items: Array, queries: Array, *, allowed: Array | None = None, norm: str = "all") -> Array:
    """Updates the items by one picture after the other, each compared with the items as the one before left them.

    Args:
      items: (M, C) of unit length.
      queries: (B, K, C) of unit length.
      allowed: (B,) bool, pictures that may move items; None: all of them.
      norm: as for `update`.

    Returns:
      (M, C) of unit length.
    """
    allowed = jnp.ones(queries.shape[0], bool) if allowed is None else allowed

    def step(items, picture):
        queries, is_allowed = picture
        return jnp.where(is_allowed, update(items, queries, match(queries, items), norm=norm), items), None

    return lax.scan(step, items, (queries, allowed))[0]


def compactness(matches: Matches, *, features: int, distance: str = "mse") -> Array:
    """Distance of each query to its nearest item.

    Args:
      matches: of K queries.
      features: C.
      distance: "l2" Euclidean, or "mse", its square divided by C.

    Returns:
      (K,) float32.

    Raises:
      ValueError: an unknown distance.
    """
    if distance not in DISTANCES:
        raise ValueError(f"feature_dist={distance!r} is unknown; expected one of {DISTANCES}. Pass feature_dist='mse'.")
    squares = _squared_distance(matches.nearest)
    return squares / features if distance == "mse" else jnp.sqrt(squares + _TINY)


def separateness(matches: Matches, *, margin: float = 1.0) -> Array:
    """Triplet loss of each query: max(distance to its nearest item - distance to the second + margin, 0). (K,)."""
    near, far = (jnp.sqrt(_squared_distance(s) + _TINY) for s in (matches.nearest, matches.second))
    return jax.nn.relu(near - far + margin)


def assigned(matches: Matches) -> Array:
    """The histogram of assignments: how many of the K queries have each item as their nearest, (M,) float32."""
    return jnp.sum(matches.is_nearest, axis=0, dtype=jnp.float32)


def entropy(counts: Array) -> Array:
    """Entropy in nats of a histogram (M,); ln M where all items are used alike, 0 where one is used for everything."""
    shares = counts / jnp.maximum(counts.sum(), 1.0)
    return -jnp.sum(shares * jnp.log(jnp.where(shares > 0, shares, 1.0)))


def _squared_distance(similarity: Array) -> Array:
    return jnp.maximum(2 - 2 * similarity, 0.0)  # rounding can make a similarity exceed 1


def _product(x: Array, y: Array, over_x: int, over_y: int) -> Array:
    """Matrix product over one axis of each, in true float32 on every device."""
    axes = (((over_x,), (over_y,)), ((), ()))
    precision = lax.Precision.HIGHEST
    return lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)
