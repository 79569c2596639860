"""What a few pixels look like, without any training: colours, contrast and directions of gradients."""

from __future__ import annotations

import jax.numpy as jnp

from jaxad.core import Array
from jaxad.ops.smooth import box_smooth
from jaxad.ops.superpixels import to_lab

STRIDE = 4  # pixels between features
FEATURES = 16
_FLAT = 1e-6  # under a root


def cell_means(maps: Array, cell: int = STRIDE) -> Array:
    """Means over cells of (B, H, W, ...): (B, H / cell, W / cell, ...); H and W multiples of it."""
    batch, height, width = maps.shape[:3]
    split = maps.reshape(batch, height // cell, cell, width // cell, cell, *maps.shape[3:])
    return split.mean(axis=(2, 4))


def texture_features(images: Array) -> Array:
    """Features of every fourth pixel's surroundings.

    Means of L, a and b over cells of 4x4 pixels and over 3x3 of them; standard deviation of L in both; mean size of the
    differences of L to the pixels below, to the right and along both diagonals, one and two pixels apart.

    Args:
      images: (B, H, W, 1 or 3) sRGB in [0, 1]; H and W multiples of 4.

    Returns:
      (B, H / 4, W / 4, 16) float32, L, a and b in units of 100.
    """
    channels = [images[..., c] for c in range(images.shape[-1])]
    lab = jnp.stack(to_lab(*(channels * 3)[:3]), axis=-1) / 100
    light = lab[..., 0]
    means, squares = cell_means(lab), cell_means(light**2)
    around = [box_smooth(means[..., c], size=3) for c in range(3)]
    deviations = [
        jnp.sqrt(jnp.maximum(s - m**2, 0.0) + _FLAT)
        for s, m in ((squares, means[..., 0]), (box_smooth(squares, size=3), around[0]))
    ]
    slopes = [cell_means(jnp.abs(_difference(light, *step))) for step in _STEPS]
    return jnp.concatenate([means, jnp.stack([*around, *deviations, *slopes], axis=-1)], axis=-1)


_STEPS = tuple((down * n, right * n) for n in (1, 2) for down, right in ((1, 0), (0, 1), (1, 1), (1, -1)))


def _difference(maps: Array, down: int, right: int) -> Array:
    """To the pixel so many rows below and columns to the right; pixels at the border are repeated."""
    height, width = maps.shape[1:]
    edge = abs(right)
    padded = jnp.pad(maps, ((0, 0), (0, down), (edge, edge)), mode="edge")
    return padded[:, down : down + height, edge + right : edge + right + width] - maps
