"""4x4 convolutions of stride 2 and their transposes, as XLA convolutions or as matrix products.

Cut into 2x2 blocks (space to depth), a picture needs only 2x2 neighbouring blocks for each output of a 4x4 kernel with
stride 2; those four, side by side, are the rows of one matrix product. The transpose runs the same way backwards. Every
derivative of any order is again a matrix product, and kernels with a leading axis of members make it a batched one.
Layouts: pictures (B, H, W, C), kernels (4, 4, C, O). A matrix of taps is ordered (block row, block column, row in the
block, column in the block).
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from jax import lax

from jaxad.core import Array

TAPS = 16  # of a 4x4 kernel
_NUMBERS = ("NHWC", "HWIO", "NHWC")


def halved(size: int, padding: int) -> int:
    """Pixels a side after a 4x4 convolution of stride 2."""
    return (size + 2 * padding - 4) // 2 + 1


def doubled(size: int, padding: int) -> int:
    """Pixels a side after the transposed convolution."""
    return 2 * size + 2 - 2 * padding


def patches(image: Array, *, padding: int) -> Array:
    """The 4x4 windows of stride 2 of zero-padded pictures.

    Args:
      image: (B, H, W, C).
      padding: zeros around the picture, at least 1; the last row or column of an odd padded size falls away.

    Returns:
      (B, H', W', 16 C) with H' = halved(H, padding), in the order of a matrix of taps.
    """
    height, width = (halved(n, padding) for n in image.shape[1:3])
    ends = [2 * m + 2 - padding - n for m, n in zip((height, width), image.shape[1:3], strict=True)]
    padded = jnp.pad(image, ((0, 0), (padding, ends[0]), (padding, ends[1]), (0, 0)))
    blocks = padded.reshape(image.shape[0], height + 1, 2, width + 1, 2, image.shape[-1]).transpose(0, 1, 3, 2, 4, 5)
    blocks = blocks.reshape(image.shape[0], height + 1, width + 1, 4 * image.shape[-1])
    corners = itertools.product((0, 1), (0, 1))
    return jnp.concatenate([blocks[:, a : a + height, b : b + width] for a, b in corners], axis=-1)


def unfold_kernel(kernel: Array) -> Array:
    """(4, 4, C, O) -> (16, C, O), in the order of a matrix of taps."""
    inner = kernel.shape[2:]
    return kernel.reshape(2, 2, 2, 2, *inner).transpose(0, 2, 1, 3, 4, 5).reshape(TAPS, *inner)


def conv4(image: Array, kernel: Array, *, padding: int, impl: str) -> Array:
    """Correlates (B, H, W, C) with a (4, 4, C, O) kernel at stride 2: (B, H', W', O). `impl`: "conv" or "gemm"."""
    if impl == "conv":
        return lax.conv_general_dilated(image, kernel, (2, 2), [(padding, padding)] * 2, dimension_numbers=_NUMBERS)
    rows = patches(image, padding=padding)
    return rows @ unfold_kernel(kernel).reshape(-1, kernel.shape[-1])


def conv4_transposed(image: Array, kernel: Array, *, padding: int, impl: str) -> Array:
    """Transposed convolution, y[2h + r - padding, 2w + s - padding] += image[h, w] @ kernel[r, s].

    Args:
      image: (B, H, W, C).
      kernel: (4, 4, C, O).
      padding: rows and columns cut off at each border.
      impl: "conv" or "gemm".

    Returns:
      (B, doubled(H, padding), doubled(W, padding), O).
    """
    if impl == "conv":
        around = [(3 - padding, 3 - padding)] * 2
        flipped = kernel[::-1, ::-1]
        return lax.conv_general_dilated(image, flipped, (1, 1), around, (2, 2), dimension_numbers=_NUMBERS)
    (size, height, width), features = image.shape[:3], kernel.shape[-1]
    taps = unfold_kernel(kernel).transpose(1, 0, 2).reshape(image.shape[-1], -1)
    spread = (image @ taps).reshape(size, height, width, 4, 4 * features)
    blocks = jnp.zeros((size, height + 1, width + 1, 4 * features), spread.dtype)
    for i, (a, b) in enumerate(itertools.product((0, 1), (0, 1))):
        blocks = blocks + jnp.pad(spread[..., i, :], ((0, 0), (a, 1 - a), (b, 1 - b), (0, 0)))
    full = blocks.reshape(size, height + 1, width + 1, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    full = full.reshape(size, 2 * height + 2, 2 * width + 2, features)
    return full[:, padding : full.shape[1] - padding, padding : full.shape[2] - padding]
