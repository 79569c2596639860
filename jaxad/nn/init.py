"""Parameter initialisation by one flat draw.

On CPU every new shape of `jax.random` costs seconds of compile time, and a network has dozens. The initialisers here
cut their numbers from one pool when they run inside `init_flat`; outside it they draw from their key as usual.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxad.core import Array

_pool: contextvars.ContextVar[_Pool | None] = contextvars.ContextVar("jaxad_init_pool", default=None)


class _Pool:
    """Uniform numbers in (-1, 1), handed out in the order of asking; without numbers it only counts."""

    def __init__(self, numbers: Array | None = None):
        self.numbers, self.used = numbers, 0

    def take(self, shape: tuple[int, ...]) -> Array:
        size = 1
        for n in shape:
            size *= n
        begin, self.used = self.used, self.used + size
        return jnp.zeros(shape) if self.numbers is None else self.numbers[begin : self.used].reshape(shape)


@contextlib.contextmanager
def _pooled(pool: _Pool):
    token = _pool.set(pool)
    try:
        yield pool
    finally:
        _pool.reset(token)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    pool = _pool.get()
    if pool is not None:
        return pool.take(shape)
    return jax.random.uniform(key, shape, minval=-1 + 1e-7, maxval=1.0)


def normal(std: float, *, mean: float = 0.0) -> Callable:
    """N(mean, std**2), as a Linen initialiser."""

    def initialise(key, shape, dtype=jnp.float32):
        return (mean + std * jnp.sqrt(2.0) * jax.lax.erf_inv(_uniform(key, shape))).astype(dtype)

    return initialise


def uniform(bound: float) -> Callable:
    """U(-bound, bound), as a Linen initialiser."""

    def initialise(key, shape, dtype=jnp.float32):
        return (bound * _uniform(key, shape)).astype(dtype)

    return initialise


def init_flat(key: Array, module: Any, *args, **kwargs) -> Mapping[str, Any]:
    """`module.init`, with all random numbers drawn at once.

    Args:
      key: a PRNG key; vmapping over it equals a loop bit for bit.
      module: a Linen module whose random initialisers are those of this file.
      *args, **kwargs: what `module.init` takes after the key.

    Returns:
      The variables: {"params": ..., and other collections}.
    """
    with _pooled(_Pool()) as counter:
        jax.eval_shape(lambda k: module.init(k, *args, **kwargs), key)
    bits = jax.random.bits(key, (counter.used,), jnp.uint32)
    numbers = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1.0  # 23 bits; never exactly -1 or 1
    with _pooled(_Pool(numbers)):
        return module.init(key, *args, **kwargs)
