"""Convolutional encoders and decoders that halve and double, for pictures (2 spatial axes) and clips (3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import Conv, ConvTranspose
from jaxad.nn.norm import BatchNorm

SLOPES = {"relu": 0.0, "leaky_relu": 0.2}  # of activations, for negative values


class NormActivate(nn.Module):
    """Batch normalisation (scale from N(1, 0.02**2), eps 1e-5, running weight 0.1), then an activation."""

    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        if self.activation not in SLOPES:
            raise ValueError(
                f"activation={self.activation!r} is unknown; expected one of {tuple(SLOPES)}. Pass activation='relu'."
            )
        scale_init = init.normal(0.02, mean=1.0)
        return BatchNorm(SLOPES[self.activation], scale_init=scale_init, dtype=self.dtype)(x, train=train)


class Encoder(nn.Module):
    """Strided convolutions, each normalised and activated: (B, *spatial, C) -> (B, *small, features[-1])."""

    features: Sequence[int]
    strides: Sequence[Sequence[int]]  # per layer, per spatial axis
    first_kernel: int = 3
    activation: str = "leaky_relu"
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        for layer, (features, strides) in enumerate(zip(self.features, self.strides, strict=True)):
            taps = self.first_kernel if layer == 0 else 3
            shape, padding = [taps] * len(strides), [taps // 2] * len(strides)
            x = Conv(features, shape, strides, padding, impl=self.impl, normalised=True, dtype=self.dtype)(x)
            x = NormActivate(self.activation, self.dtype)(x, train=train)
        return x


class Decoder(nn.Module):
    """Mirrors `Encoder`: transposed convolutions up to `sizes[0]`, the last one bare of norm and activation."""

    features: Sequence[int]  # of every layer, the last being the picture's channels
    strides: Sequence[Sequence[int]]  # of the encoder's layers, in the encoder's order
    sizes: Sequence[Sequence[int]]  # spatial sizes before each of the encoder's layers
    activation: str = "leaky_relu"
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        last = len(self.features) - 1
        for layer, features in enumerate(self.features):
            strides, size = self.strides[last - layer], self.sizes[last - layer]
            ends = [(n - 1) * s + 1 for n, s in zip(x.shape[1:-1], strides, strict=True)]
            extra = [n - end for n, end in zip(size, ends, strict=True)]
            x = ConvTranspose(
                features, strides, extra, impl=self.impl, normalised=layer < last, dtype=self.dtype
            )(x)  # fmt: skip
            if layer < last:
                x = NormActivate(self.activation, self.dtype)(x, train=train)
        return x.astype(jnp.float32)


def halved_sizes(size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Spatial sizes before each layer of `Encoder`, and after the last."""
    sizes = [tuple(size)]
    for layer in strides:
        sizes.append(tuple(-(-n // s) for n, s in zip(sizes[-1], layer, strict=True)))
    return sizes
