"""4x4 convolutions of stride 2 and their transposes, as XLA convolutions or as matrix products.

Cut into 2x2 blocks (space to depth), a picture needs only 2x2 neighbouring blocks for each output of a 4x4 kernel with
stride 2; those four, side by side, are the rows of one matrix product. The transpose runs the same way backwards.

A convolution, its transpose and its kernel's gradient are the three derivatives of one trilinear form, so each one's
gradient consists of the other two. They are written so here: derivatives of every order use the same three programs,
each in the lowering that suits it. Forward-mode differentiation is not provided.

`impl` is "conv" (XLA's convolutions), "gemm", or "mixed": convolutions, but products for pictures of fewer than 8
channels going in and for transposes of pictures of up to 4 pixels a side. Measured on XLA-CPU (jax 0.10.2, 2 quiet
cores, float32, batch 64, 28x28x3, turns taken), the time of a second-order training step over that of torch 2.13: 1.78
with products and XLA's own derivatives of them, 2.21 with convolutions and theirs; with the derivatives as here 1.34
"gemm", 1.10 "conv", 0.83 "mixed". Inside loops and with members of a sweep only "gemm" stays fast.
Layouts: pictures (B, H, W, C), kernels (4, 4, C, O). A matrix of taps is ordered (block row, block column, row in the
block, column in the block).
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array

TAPS = 16  # of a 4x4 kernel
_NUMBERS = ("NHWC", "HWIO", "NHWC")
_THIN = 8  # channels of a picture under which XLA-CPU's convolutions lose
_SMALL = 4  # pixels a side up to which its transposed convolutions lose


def halved(size: int, padding: int) -> int:
    """Pixels a side after a 4x4 convolution of stride 2."""
    return (size + 2 * padding - 4) // 2 + 1


def doubled(size: int, padding: int) -> int:
    """Pixels a side after the transposed convolution."""
    return 2 * size + 2 - 2 * padding


def conv4(image: Array, kernel: Array, *, padding: int, impl: str) -> Array:
    """Correlates at stride 2.

    Args:
      image: (B, H, W, C).
      kernel: (4, 4, C, O).
      padding: zeros around the picture, at least 1; the last row or column of an odd padded size falls away.
      impl: "conv", "gemm" or "mixed".

    Returns:
      (B, halved(H, padding), halved(W, padding), O).
    """
    return _conv(image, kernel, padding, impl)


def conv4_transposed(image: Array, kernel: Array, *, padding: int, impl: str) -> Array:
    """Transposed convolution, y[2h + r - padding, 2w + s - padding] += image[h, w] @ kernel[r, s].

    Args:
      image: (B, H, W, C).
      kernel: (4, 4, C, O).
      padding: rows and columns cut off at each border.
      impl: "conv", "gemm" or "mixed".

    Returns:
      (B, doubled(H, padding), doubled(W, padding), O).
    """
    height, width = (doubled(n, padding) for n in image.shape[1:3])
    return _transposed(image, kernel.swapaxes(2, 3), padding, (height, width), impl)


def patches(image: Array, *, padding: int) -> Array:
    """The 4x4 windows of stride 2 of zero-padded pictures.

    Args:
      image: (B, H, W, C).
      padding: zeros around the picture, at least 1.

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


# --- the three derivatives of one form; kernels are (4, 4, wide, narrow) ------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(wide: Array, kernel: Array, padding: int, impl: str) -> Array:
    """Wide pictures to narrow ones, of half the size."""
    if impl == "gemm" or (impl == "mixed" and wide.shape[-1] < _THIN):
        return patches(wide, padding=padding) @ unfold_kernel(kernel).reshape(-1, kernel.shape[-1])
    return lax.conv_general_dilated(wide, kernel, (2, 2), [(padding, padding)] * 2, dimension_numbers=_NUMBERS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _transposed(narrow: Array, kernel: Array, padding: int, size: tuple[int, int], impl: str) -> Array:
    """Narrow pictures to wide ones of a size whose half they have."""
    if impl != "gemm" and not (impl == "mixed" and max(narrow.shape[1:3]) <= _SMALL):
        extra = [n - doubled(m, padding) for n, m in zip(size, narrow.shape[1:3], strict=True)]
        around = [(3 - padding, 3 - padding + more) for more in extra]
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        return lax.conv_general_dilated(narrow, turned, (1, 1), around, (2, 2), dimension_numbers=_NUMBERS)
    count, height, width, _ = narrow.shape
    features = kernel.shape[2]
    taps = unfold_kernel(kernel).reshape(TAPS * features, -1)
    spread = jnp.einsum("bhwn,kn->bhwk", narrow, taps).reshape(count, height, width, 4, 4 * features)
    blocks = jnp.zeros((count, height + 1, width + 1, 4 * features), spread.dtype)
    for i, (a, b) in enumerate(itertools.product((0, 1), (0, 1))):
        blocks = blocks + jnp.pad(spread[..., i, :], ((0, 0), (a, 1 - a), (b, 1 - b), (0, 0)))
    full = blocks.reshape(count, height + 1, width + 1, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    full = full.reshape(count, 2 * height + 2, 2 * width + 2, features)
    return full[:, padding : padding + size[0], padding : padding + size[1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _kernel_gradient(wide: Array, narrow: Array, padding: int, impl: str) -> Array:
    """The kernel's gradient, from pictures that went in and derivatives that came back, in either direction."""
    shape = (4, 4, wide.shape[-1], narrow.shape[-1])
    if impl != "gemm":
        spec = jax.ShapeDtypeStruct(shape, wide.dtype)
        return jax.linear_transpose(lambda k: _conv.fun(wide, k, padding, "conv"), spec)(narrow)[0]
    rows = patches(wide, padding=padding)
    product = jnp.einsum("bhwn,bhwk->nk", narrow, rows)  # XLA-CPU is twice as slow with the factors exchanged
    taps = product.reshape(narrow.shape[-1], 2, 2, 2, 2, wide.shape[-1]).transpose(1, 3, 2, 4, 5, 0)
    return taps.reshape(shape)


def _conv_backward(padding, impl, saved, narrow):
    wide, kernel = saved
    back = _transposed(narrow, kernel, padding, wide.shape[1:3], impl)
    return back, _kernel_gradient(wide, narrow, padding, impl)


def _transposed_backward(padding, size, impl, saved, wide):
    del size
    narrow, kernel = saved
    return _conv(wide, kernel, padding, impl), _kernel_gradient(wide, narrow, padding, impl)


def _kernel_gradient_backward(padding, impl, saved, kernel):
    wide, narrow = saved
    back = _transposed(narrow, kernel, padding, wide.shape[1:3], impl)
    return back, _conv(wide, kernel, padding, impl)


_conv.defvjp(lambda wide, kernel, padding, impl: (_conv(wide, kernel, padding, impl), (wide, kernel)), _conv_backward)
_transposed.defvjp(
    lambda narrow, kernel, padding, size, impl: (_transposed(narrow, kernel, padding, size, impl), (narrow, kernel)),
    _transposed_backward,
)
_kernel_gradient.defvjp(
    lambda wide, narrow, padding, impl: (_kernel_gradient(wide, narrow, padding, impl), (wide, narrow)),
    _kernel_gradient_backward,
)
