"""A small network that classifies every pixel from its channels and its neighbours', by dilated 3x3 convolutions.

The lowering of the convolutions follows `jaxad.nn.conv.choose_impl`. As products, a layer that narrows multiplies first
and adds shifted results, one that widens gathers shifted inputs first: either way the smaller array is moved.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import choose_impl

_OFFSETS = tuple(itertools.product((-1, 0, 1), repeat=2))


def dilated3(image: Array, kernel: Array, *, dilation: int, impl: str) -> Array:
    """A 3x3 correlation of the same size, zeros around the picture.

    Args:
      image: (B, H, W, C).
      kernel: (3, 3, C, O).
      dilation: pixels between neighbouring taps.
      impl: "auto", "conv" or "gemm".

    Returns:
      (B, H, W, O).
    """
    inputs, outputs = kernel.shape[2:]
    if choose_impl(impl, outputs) == "conv":
        numbers = ("NHWC", "HWIO", "NHWC")
        around = [(dilation, dilation)] * 2
        return lax.conv_general_dilated(
            image, kernel, (1, 1), around, rhs_dilation=(dilation,) * 2, dimension_numbers=numbers
        )
    if outputs < inputs:
        spread = image @ jnp.moveaxis(kernel, 2, 0).reshape(inputs, -1)
        parts = jnp.split(spread, len(_OFFSETS), axis=-1)
        return sum(_shift(part, y * dilation, x * dilation) for part, (y, x) in zip(parts, _OFFSETS, strict=True))
    columns = jnp.concatenate([_shift(image, y * dilation, x * dilation) for y, x in _OFFSETS], axis=-1)
    return columns @ kernel.reshape(-1, outputs)


def _shift(image: Array, down: int, right: int) -> Array:
    """result[i, j] = image[i + down, j + right], zero outside."""
    edges = [(0, 0, 0), (-down, down, 0), (-right, right, 0), (0, 0, 0)]
    return lax.pad(image, jnp.zeros((), image.dtype), edges)


class PixelClassifier(nn.Module):
    """Channels (B, H, W, T) -> logits (B, H, W) float32.

    Channels are standardised first. Layer i has dilation 2**i, then batch normalisation and a leaky unit of slope 0.2;
    a 1x1 layer ends it.
    """

    features: Sequence[int] = (32, 16, 8, 4)
    momentum: float = 0.9  # of running statistics
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        steady: dict[str, Any] = {"momentum": self.momentum, "dtype": jnp.float32}
        norm = nn.BatchNorm(use_running_average=not train, use_scale=False, use_bias=False, name="inputs", **steady)
        x = norm(x).astype(self.dtype)
        for i, width in enumerate(self.features):
            bound = 1 / math.sqrt(9 * x.shape[-1])
            kernel = self.param(f"kernel_{i}", init.uniform(bound), (3, 3, x.shape[-1], width))
            bias = lax.stop_gradient(self.param(f"bias_{i}", init.uniform(bound), (width,)))  # normalised away
            x = dilated3(x, kernel.astype(self.dtype), dilation=2**i, impl=self.impl) + bias.astype(self.dtype)
            norm = nn.BatchNorm(use_running_average=not train, name=f"norm_{i}", **steady)
            x = jax.nn.leaky_relu(norm(x), 0.2).astype(self.dtype)
        bound = 1 / math.sqrt(x.shape[-1])
        kernel = self.param("last_kernel", init.uniform(bound), (x.shape[-1], 1))
        bias = self.param("last_bias", init.uniform(bound), (1,))
        return (x.astype(jnp.float32) @ kernel + bias)[..., 0]
