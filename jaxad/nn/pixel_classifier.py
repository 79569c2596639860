"""A small network that classifies every pixel from its channels and its neighbours', by dilated 3x3 convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import target_platform
from jaxad.nn.segmenter import dilated


def dilated3(image: Array, kernel: Array, *, dilation: int, impl: str) -> Array:
    """A 3x3 correlation of the same size, zeros around the picture.

    Args:
      image: (B, H, W, C).
      kernel: (3, 3, C, O).
      dilation: pixels between neighbouring taps.
      impl: "auto", "conv" or "gemm". On CPU "auto" lays pixels `dilation` apart out as pictures of their own: 1.4
        times as fast at 256x256, and as fast at 64x64.

    Returns:
      (B, H, W, O).
    """
    if impl == "conv" or (impl == "auto" and target_platform() != "cpu"):
        numbers = ("NHWC", "HWIO", "NHWC")
        around = [(dilation, dilation)] * 2
        return lax.conv_general_dilated(
            image, kernel, (1, 1), around, rhs_dilation=(dilation,) * 2, dimension_numbers=numbers
        )
    return dilated(image, kernel, dilation=dilation, impl=impl)


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
