"""From patches on a grid to pixels of the picture: the mean over all patches that cover a pixel."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array


def coverage_operator(size: int, *, patch: int, stride: int, every: int = 1) -> np.ndarray:
    """The matrix that takes scores of patches along a line to the mean over the patches that cover a pixel.

    Patches that cover a pixel in the plane are all pairs of those that cover its row and its column, so one such matrix
    for each axis spreads a grid.

    Args:
      size: pixels of the line.
      patch, stride: the patches begin at 0, stride, ... and have `patch` pixels, as many as fit.
      every: gives pixels 0, every, ... only; where it divides patch and stride the others repeat these.

    Returns:
      (ceil(size / every), patches) float32, rows sum to 1; pixels behind the last patch have the last covered's row.
    """
    first = np.arange(0, size - patch + 1, stride)
    pixels = np.minimum(np.arange(0, size, every), first[-1] + patch - 1)[:, None]
    covers = (first <= pixels) & (pixels < first + patch)
    return (covers / covers.sum(axis=1, keepdims=True)).astype(np.float32)


def spread(scores: Array, *, size: tuple[int, int], patch: int, stride: int, every: int = 1) -> Array:
    """Spreads scores of patches (B, h, w) over a picture of `size` pixels: (B, ceil(H / every), ceil(W / every)).

    Arguments as for `coverage_operator`.
    """
    rows, columns = (jnp.asarray(coverage_operator(n, patch=patch, stride=stride, every=every)) for n in size)
    return jnp.einsum("hi,bij,wj->bhw", rows, scores, columns, precision=lax.Precision.HIGHEST)


def overlay(maps: Array, *, size: tuple[int, int], stride: int) -> Array:
    """Lays maps of patches over a picture of `size` pixels: the mean where they overlap.

    Args:
      maps: (B, h, w, patch, patch), of patches that begin at 0, stride, ... along either axis, as many as fit.
      size: (H, W).
      stride: pixels between patches.

    Returns:
      (B, H, W); pixels behind the last patch repeat the last that is covered.
    """
    rows, columns = (jnp.asarray(_overlay_operator(n, patch=maps.shape[-1], stride=stride)) for n in size)
    bands = jnp.einsum("hip,bijpq->bhjq", rows, maps, precision=lax.Precision.HIGHEST)
    return jnp.einsum("wjq,bhjq->bhw", columns, bands, precision=lax.Precision.HIGHEST)


def _overlay_operator(size: int, *, patch: int, stride: int) -> np.ndarray:
    """(size, patches, patch) float32: what each pixel of each patch adds to a pixel of the line."""
    covered = coverage_operator(size, patch=patch, stride=stride)
    last = (covered.shape[1] - 1) * stride + patch - 1
    inside = np.minimum(np.arange(size), last)[:, None] - np.arange(covered.shape[1]) * stride
    return covered[..., None] * (inside[..., None] == np.arange(patch))
