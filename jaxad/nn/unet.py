"""A U-shaped encoder and decoder of 3x3 convolutions: halved by max pooling, doubled by transposed convolutions.

The encoder's last convolution is bare, so that its features may be negative: they are queries into a memory. The
decoder takes them, alone or joined by what was read, and either joins the encoder's maps of each size or does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn.conv import Conv, ConvTranspose


class ConvNormRelu(nn.Module):
    """Convolution, or transposed convolution with stride 2, then batch normalisation and ReLU; torch's defaults."""

    features: int
    doubles: bool = False
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        kind: dict[str, Any] = {"kernel_std": None, "impl": self.impl, "normalised": True, "dtype": self.dtype}
        if self.doubles:
            x = ConvTranspose(self.features, (2, 2), (1, 1), **kind)(x)
        else:
            x = Conv(self.features, (3, 3), (1, 1), (1, 1), **kind)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)(x)
        return jax.nn.relu(x)


class UNetEncoder(nn.Module):
    """Pictures (B, H, W, C) -> (features (B, H/2^n, W/2^n, widths[-1]), the n maps before each halving, largest first).

    Two convolutions at each of the n + 1 sizes; `widths` are their channels.
    """

    widths: Sequence[int]
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, list[Array]]:
        *widths, last = self.widths
        maps = []
        for width in widths:
            for _ in range(2):
                x = ConvNormRelu(width, impl=self.impl, dtype=self.dtype)(x, train=train)
            maps.append(x)
            x = halve(x)
        x = ConvNormRelu(last, impl=self.impl, dtype=self.dtype)(x, train=train)
        bare = Conv(last, (3, 3), (1, 1), (1, 1), kernel_std=None, impl=self.impl, dtype=self.dtype)
        return bare(x).astype(jnp.float32), maps


class UNetDecoder(nn.Module):
    """Features (B, h, w, *) and the encoder's maps -> pictures (B, H, W, channels) in [-1, 1], float32."""

    channels: int
    widths: Sequence[int]  # the encoder's
    skips: bool  # whether the encoder's maps are joined
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, maps: Sequence[Array], *, train: bool) -> Array:
        def layer(x, features, doubles=False):
            return ConvNormRelu(features, doubles, impl=self.impl, dtype=self.dtype)(x, train=train)

        deepest = self.widths[-1]
        x = layer(layer(x, deepest), deepest)
        for (width, smaller), skip in zip(itertools.pairwise(self.widths[::-1]), maps[::-1], strict=True):
            x = layer(x, smaller if self.skips else width, doubles=True)
            if self.skips:
                x = jnp.concatenate([skip, x], axis=-1)
            x = layer(layer(x, smaller), smaller)
        last = Conv(self.channels, (3, 3), (1, 1), (1, 1), kernel_std=None, impl=self.impl, dtype=self.dtype)
        return jnp.tanh(last(x).astype(jnp.float32))


def halve(x: Array) -> Array:
    """Maximum over blocks of 2x2: (B, H, W, C) -> (B, H/2, W/2, C), H and W even.

    Four slices: the gradient of XLA's pooling window is many times slower on CPU.
    """
    rows = jnp.maximum(x[:, 0::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])
