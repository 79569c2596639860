"""Cosines of feature maps that are resized and averaged over scales, without ever holding the resized maps."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array

_TINY = 1e-12  # added to squared lengths: a vector of zeros is like nothing, and no division is by zero


def bilinear_operator(size: int, out: int) -> np.ndarray:
    """The (out, size) matrix of linear resizing along a line, corners not aligned, no antialiasing; rows sum to 1."""
    at = np.clip((np.arange(out) + 0.5) * size / out - 0.5, 0, size - 1)
    low = np.minimum(np.floor(at).astype(int), size - 1)
    high, share = np.minimum(low + 1, size - 1), at - np.floor(at)
    matrix = np.zeros((out, size), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - share)
    np.add.at(matrix, (np.arange(out), high), share)
    return matrix


def resize(maps: Array, size: tuple[int, int]) -> Array:
    """Maps (B, H, W) or (B, H, W, C) resized linearly to `size`, corners not aligned."""
    if maps.shape[1:3] == tuple(size):
        return maps
    rows, columns = (jnp.asarray(bilinear_operator(n, out)) for n, out in zip(maps.shape[1:3], size, strict=True))
    return jnp.einsum("hi,bij...,wj->bhw...", rows, maps, columns, precision=lax.Precision.HIGHEST)


def cosine_map(
    first: Sequence[Array], second: Sequence[Array], size: tuple[int, int], *, rows: int = 0, offset: float = 0.0
) -> Array:
    """Cosine of two feature maps, each the mean over scales of maps resized to `size`.

    Only three sums over channels are kept of a position: of products, and of the squares of each side. With `rows` the
    resized maps exist for so many rows at a time.

    Args:
      first, second: of each scale (B, h, w, C).
      size: (H, W) of the result.
      rows: of a tile; 0: all at once.
      offset: squared length of a component that both sides share, so that two vectors near zero are alike.

    Returns:
      (B, H, W) in [-1, 1]; 1 where both are the same and not zero.
    """
    height, width = size
    tile = min(rows or height, height)
    tiles = -(-height // tile)
    downs = [bilinear_operator(f.shape[1], height) for f in first]
    rights = [jnp.asarray(bilinear_operator(f.shape[2], width)) for f in first]
    spare = tiles * tile - height
    by_tile = [jnp.asarray(np.pad(d, ((0, spare), (0, 0))).reshape(tiles, tile, -1)) for d in downs]

    def one(parts):
        def resized(maps):
            scaled = (
                jnp.einsum("hi,bijc,wj->bhwc", down, f.astype(jnp.float32), right, precision=lax.Precision.HIGHEST)
                for down, f, right in zip(parts, maps, rights, strict=True)
            )
            return sum(scaled) / len(maps)

        a, b = resized(first), resized(second)
        return jnp.stack([jnp.sum(x * y, axis=-1) for x, y in ((a, b), (a, a), (b, b))])

    if tiles == 1:
        sums = one([part[0] for part in by_tile])
    else:
        found = lax.map(one, by_tile)  # (tiles, 3, B, tile, W)
        sums = jnp.moveaxis(found, 0, 2).reshape(3, found.shape[2], tiles * tile, width)[:, :, :height]
    both, squares, others = sums + offset
    return jnp.clip(both / jnp.sqrt((squares + _TINY) * (others + _TINY)), -1.0, 1.0)


def gated(confidence: Array, alike: Array, threshold: Array | float) -> Array:
    """`confidence` where it is above the threshold, else how alike the features are; arrays of one shape."""
    return jnp.where(confidence > threshold, confidence, alike)


def top_share(maps: Array, share: float) -> Array:
    """Mean of the largest values of each map, a share of its pixels, at least one: (B, H, W) -> (B,)."""
    flat = maps.reshape(maps.shape[0], -1)
    count = max(1, round(share * flat.shape[1]))
    return jax.lax.top_k(flat, count)[0].mean(axis=1)
