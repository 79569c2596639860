"""How well pictures are predicted: PSNR, and a mean error that weighs large errors more."""

from __future__ import annotations

import jax.numpy as jnp

from jaxad.core import Array

_LEAST_MSE = 1e-10  # a perfect prediction has 100 dB rather than infinitely many


def psnr(predicted: Array, target: Array) -> Array:
    """Peak signal-to-noise ratio, 10 log10(1 / mean squared error), at most 100.

    Args:
      predicted, target: (B, ...) in [0, 1].

    Returns:
      (B,) in dB.
    """
    mse = jnp.mean((predicted - target) ** 2, axis=tuple(range(1, target.ndim)))
    return -10 * jnp.log10(jnp.maximum(mse, _LEAST_MSE))


def regular_score(predicted: Array, target: Array) -> Array:
    """Squared errors e averaged with weights 1 - exp(-e): low for a normal picture, high if a part is badly predicted.

    Args:
      predicted, target: (B, ...) in [0, 1].

    Returns:
      (B,); 0 where the prediction is perfect.
    """
    errors = (predicted - target) ** 2
    weights = -jnp.expm1(-errors)
    over = tuple(range(1, target.ndim))
    total = jnp.sum(weights, axis=over)
    return jnp.sum(weights * errors, axis=over) / jnp.where(total > 0, total, 1.0)
