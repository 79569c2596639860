"""How strong the edges of a picture are."""

from __future__ import annotations

import jax.numpy as jnp

from jaxad.core import Array

_GREY = (0.2989, 0.5870, 0.1140)
_BINOMIAL = (1, 4, 6, 4, 1)  # over 16


def edge_strength(images: Array) -> Array:
    """Sobel magnitude of the grey picture, smoothed by a 5x5 binomial kernel before; borders continue outwards.

    Args:
      images: (B, H, W, 1 or 3) in [0, 1].

    Returns:
      (B, H, W), at least 1e-4.
    """
    grey = images[..., 0] if images.shape[-1] == 1 else images @ jnp.asarray(_GREY)
    smooth = _along(_along(grey, _BINOMIAL, 1), _BINOMIAL, 2) / 256
    down = _along(_along(smooth, (1, 2, 1), 2), (-1, 0, 1), 1)
    right = _along(_along(smooth, (1, 2, 1), 1), (-1, 0, 1), 2)
    return jnp.sqrt(down**2 + right**2 + 1e-8)


def _along(x: Array, weights: tuple[int, ...], axis: int) -> Array:
    """Correlates along an axis; the outermost values are repeated outwards."""
    half, size = len(weights) // 2, x.shape[axis]
    padded = jnp.pad(x, [(half, half) if a == axis else (0, 0) for a in range(x.ndim)], mode="edge")
    cut = [slice(None)] * x.ndim
    total = jnp.zeros_like(x)
    for i, weight in enumerate(weights):
        cut[axis] = slice(i, i + size)
        total = total + weight * padded[tuple(cut)]
    return total
