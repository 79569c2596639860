"""Maps of how alike two pictures are: SSIM, and the similarity of gradient magnitudes (GMS) on one or several scales.

Filters are products with banded matrices, channels before rows. Sums of shifted pictures are 3-5 times as fast forward
on XLA-CPU, but their gradients 10-15 times slower, and these maps are losses.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array

_FLAT = 1e-12  # under a root, so that its gradient is finite where a picture is flat


def ssim_map(predicted: Array, target: Array, *, sigma: float = 1.5, radius: int = 5, peak: float = 1.0) -> Array:
    """Structural similarity (Wang et al., 2004) around each pixel, averaged over channels.

    Gaussian windows of 2 * radius + 1 pixels, pictures mirrored at their borders, variances not corrected for the
    number of samples, K1 = 0.01, K2 = 0.03.

    Args:
      predicted, target: (B, H, W, C).
      sigma: of the window, in pixels.
      radius: of the window, in pixels.
      peak: range of the values.

    Returns:
      (B, H, W), at most 1; 1 where the windows are equal.
    """
    a, b = jnp.moveaxis(predicted, -1, 1), jnp.moveaxis(target, -1, 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    lines = [_banded(n, weights / weights.sum(), "symmetric") for n in a.shape[-2:]]
    mean_a, mean_b, square_a, square_b, product = (
        _filter(x, *lines) for x in (a, b, a * a, b * b, a * b)
    )  # fmt: skip
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    both = mean_a * mean_b
    squares = mean_a**2 + mean_b**2
    alike = (2 * both + c1) * (2 * (product - both) + c2)
    return jnp.mean(alike / ((squares + c1) * (square_a + square_b - squares + c2)), axis=1)


def gms_map(predicted: Array, target: Array, *, constant: float = 0.0026) -> Array:
    """Similarity of gradient magnitudes (Xue et al., 2014): (2 g h + c) / (g^2 + h^2 + c) of Prewitt's magnitudes g, h.

    Args:
      predicted, target: (B, H, W, C) in [0, 1]; averaged over channels first, repeated at their borders.
      constant: c; the paper's 170 for values up to 255 is 0.0026 here.

    Returns:
      (B, H, W) in (0, 1].
    """
    g, h = (_magnitude(x.mean(axis=-1)) for x in (predicted, target))
    return (2 * g * h + constant) / (g**2 + h**2 + constant)


def ms_gms_map(predicted: Array, target: Array, *, scales: int = 4, constant: float = 0.0026) -> Array:
    """GMS at several scales, each half the one before by averaging; their maps enlarged to the first and averaged.

    Args:
      predicted, target: (B, H, W, C) in [0, 1]; H and W multiples of 2 ** (scales - 1).
      scales: how many, the full size included.
      constant: see `gms_map`.

    Returns:
      (B, H, W) in (0, 1].

    Raises:
      ValueError: sizes that cannot be halved so often.
    """
    height, width = target.shape[1:3]
    if height % 2 ** (scales - 1) or width % 2 ** (scales - 1):
        raise ValueError(
            f"ms_gms_map: pictures of {height}x{width} cannot be halved {scales - 1} times; expected multiples of "
            f"{2 ** (scales - 1)}. Resize them, or pass fewer scales."
        )
    a, b = predicted.mean(axis=-1, keepdims=True), target.mean(axis=-1, keepdims=True)
    total = jnp.zeros(target.shape[:3])
    for scale in range(scales):
        total += _enlarge(gms_map(a, b, constant=constant), 2**scale)
        a, b = (_halve(x) if scale + 1 < scales else x for x in (a, b))
    return total / scales


def _magnitude(image: Array) -> Array:
    rise, mean = np.array([-1.0, 0, 1]), np.full(3, 1 / 3)
    height, width = image.shape[-2:]
    down = _filter(image, _banded(height, rise, "edge"), _banded(width, mean, "edge"))
    right = _filter(image, _banded(height, mean, "edge"), _banded(width, rise, "edge"))
    return jnp.sqrt(down**2 + right**2 + _FLAT)


def _banded(size: int, weights: np.ndarray, border: str) -> np.ndarray:
    """The (size, size) matrix that correlates a line with `weights`, the line continued as `np.pad` calls it."""
    from_pixel = np.pad(np.arange(size), len(weights) // 2, mode=border)  # type: ignore[call-overload]
    matrix = np.zeros((size, size), np.float32)
    for tap, weight in enumerate(weights):
        np.add.at(matrix, (np.arange(size), from_pixel[tap : tap + size]), weight)
    return matrix


def _filter(images: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
    # Variances are small differences of what comes out: products of shortened numbers would drown them.
    return jnp.einsum("hi,...ij,wj->...hw", rows, images, columns, precision=lax.Precision.HIGHEST)


def _halve(image: Array) -> Array:
    batch, height, width, channels = image.shape
    return image.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def _enlarge(maps: Array, times: int) -> Array:
    batch, height, width = maps.shape
    shape = (batch, height, times, width, times)
    return jnp.broadcast_to(maps[:, :, None, :, None], shape).reshape(batch, height * times, width * times)
