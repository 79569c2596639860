"""A generator that denoises pictures and a discriminator that judges several versions of each, as of one-class GANs.

A discriminator is called once for real pictures and once for generated ones: batch normalisation then normalises each
call by itself. Here the calls are groups along an axis behind the batch's. They share every convolution, and give the
numbers, running statistics too, of calls one after the other.
"""

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
from jaxad.nn.conv import correlate

_EPSILON = 1e-5
_RUNNING_WEIGHT = 0.1  # of a new call's statistics


class Norm(nn.Module):
    """Batch normalisation as torch has it: (B x groups, ..., C), groups fastest, each normalised by itself in training.

    Running statistics take in the groups in their order, and variances as unbiased estimates.
    """

    groups: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
        variance = self.variable("batch_stats", "var", jnp.ones, (channels,))
        if not train:
            factor = scale * lax.rsqrt(variance.value + _EPSILON)
            return (x.astype(jnp.float32) * factor + (bias - mean.value * factor)).astype(x.dtype)
        values = x.astype(jnp.float32).reshape(-1, self.groups, math.prod(x.shape[1:-1]), channels)
        own_mean = values.mean(axis=(0, 2))
        own_variance = jnp.maximum((values**2).mean(axis=(0, 2)) - own_mean**2, 0.0)  # rounding may bring it below 0
        factor = scale * lax.rsqrt(own_variance + _EPSILON)
        shift = bias - own_mean * factor
        if not self.is_initializing():
            count = values.shape[0] * values.shape[2]
            unbiased = own_variance * count / max(count - 1, 1)
            mean.value, variance.value = _fold(mean.value, own_mean), _fold(variance.value, unbiased)
        return (values * factor[:, None] + shift[:, None]).reshape(x.shape).astype(x.dtype)


def _fold(running: Array, seen: Array) -> Array:
    """Running statistics (C,) after calls with statistics (groups, C)."""
    for group in seen:
        running = (1 - _RUNNING_WEIGHT) * running + _RUNNING_WEIGHT * group
    return running


class Layer(nn.Module):
    """A convolution with bias, drawn from U(+-1/sqrt(fan-in)), torch's default; transposed ones have stride 1.

    A transposed convolution without padding is a correlation with taps - 1 zeros around the picture; torch holds its
    kernel spatially flipped. `is_normalised` says that batch normalisation follows at once: the bias, which then has no
    effect and no gradient but rounding, is kept as drawn.
    """

    features: int
    taps: int
    stride: int = 1
    padding: int = 0
    is_transposed: bool = False
    is_normalised: bool = False
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.taps, self.taps, x.shape[-1], self.features)
        fans = self.features if self.is_transposed else x.shape[-1]  # torch takes a transposed one's from its outputs
        drawn = init.uniform(1 / math.sqrt(self.taps**2 * fans))
        kernel, bias = self.param("kernel", drawn, shape), self.param("bias", drawn, (self.features,))
        bias = lax.stop_gradient(bias) if self.is_normalised else bias
        padding = self.taps - 1 if self.is_transposed else self.padding
        around = ((padding, padding),) * 2
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        return correlate(x, kernel, strides=(self.stride,) * 2, padding=around, impl=self.impl) + bias.astype(x.dtype)


class Generator(nn.Module):
    """Pictures (B, H, W, C) in [-1, 1] to pictures of the same size, through maps that are larger than the picture.

    Convolutions without padding, then transposed ones. The first half of the convolutions is normalised before its
    ReLU, the second half after it.
    """

    widths: Sequence[int]
    taps: int = 5
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels, early = x.shape[-1], len(self.widths) // 2
        options: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        for i, width in enumerate(self.widths):
            x = Layer(width, self.taps, is_normalised=i < early, name=f"down_{i}", **options)(x)
            norm = Norm(name=f"down_norm_{i}")
            x = jax.nn.relu(norm(x, train=train)) if i < early else norm(jax.nn.relu(x), train=train)
        for i, width in enumerate(self.widths[-2::-1]):
            x = Layer(width, self.taps, is_transposed=True, is_normalised=True, name=f"up_{i}", **options)(x)
            x = jax.nn.relu(Norm(name=f"up_norm_{i}")(x, train=train))
        x = Layer(channels, self.taps, is_transposed=True, name="last", **options)(x)
        return jnp.tanh(x.astype(jnp.float32))


class Discriminator(nn.Module):
    """Groups of pictures (B, groups, H, W, C) to logits (B, groups), by convolutions of stride 2.

    Each is normalised and then goes through a ReLU, the last one through the ReLU only.
    """

    widths: Sequence[int]
    taps: int = 5
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pictures: Array, *, train: bool) -> Array:
        batch, groups = pictures.shape[:2]
        x, last = pictures.reshape(batch * groups, *pictures.shape[2:]), len(self.widths) - 1
        options: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        for i, width in enumerate(self.widths):
            padding = self.taps // 2
            x = Layer(width, self.taps, 2, padding, is_normalised=i < last, name=f"conv_{i}", **options)(x)
            x = Norm(groups, name=f"norm_{i}")(x, train=train) if i < last else x
            x = jax.nn.relu(x)
        x = x.reshape(batch * groups, -1).astype(jnp.float32)
        drawn = init.uniform(1 / math.sqrt(x.shape[1]))
        kernel, bias = self.param("kernel", drawn, (x.shape[1], 1)), self.param("bias", drawn, (1,))
        return (x @ kernel + bias).reshape(batch, groups)
