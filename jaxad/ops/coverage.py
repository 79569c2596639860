"""From scores of patches on a grid to scores of pixels: the mean over all patches that cover a pixel."""

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
