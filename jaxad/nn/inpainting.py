"""A U-shaped network that fills in what is hidden, of plain or of partial convolutions (Liu et al., 2018).

What is hidden is zeroed before the first layer, so that nothing of it can pass, through skips either. A plain network
is told where: the mask is a fourth channel. Partial convolutions count only what is seen, scaled to a full window, and
what a window saw anything of counts as seen from then on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import Conv, correlate
from jaxad.nn.unet import halve

CONVS = ("plain", "partial")


class PartialConv(nn.Module):
    """A 3x3 convolution of what is seen, times 9 over the seen part of its window, plus bias; 0 where that is nothing.

    Maps are zero where they are unseen. `seen` (B, H, W, 1) is in [0, 1]: the share of the channels, where maps that
    see different places were joined.
    """

    features: int
    impl: str = "auto"
    normalised: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, seen: Array) -> tuple[Array, Array]:
        shape = (3, 3, x.shape[-1], self.features)
        bound = init.uniform(1 / math.sqrt(math.prod(shape[:-1])))
        kernel, bias = self.param("kernel", bound, shape), self.param("bias", bound, (self.features,))
        bias = jax.lax.stop_gradient(bias) if self.normalised else bias
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        outputs = correlate(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), impl=self.impl)
        window = _window_sums(seen)
        is_seen = window > 0
        scale = jnp.where(is_seen, 9 / jnp.where(is_seen, window, 1.0), 0.0)
        outputs = outputs * scale.astype(self.dtype) + (bias * is_seen).astype(self.dtype)
        return outputs, is_seen.astype(seen.dtype)


def _window_sums(maps: Array) -> Array:
    """Sums over 3x3 windows, zeros outside: (B, H, W, 1) -> the same."""
    height, width = maps.shape[1:3]
    padded = jnp.pad(maps, [(0, 0), (1, 1), (1, 1), (0, 0)])
    rows = padded[:, :height] + padded[:, 1 : height + 1] + padded[:, 2:]
    return rows[:, :, :width] + rows[:, :, 1 : width + 1] + rows[:, :, 2:]


class Layer(nn.Module):
    """Convolution, batch normalisation, ReLU; the last layer of a network is the convolution alone."""

    features: int
    conv: str
    is_last: bool = False
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, seen: Array, *, train: bool) -> tuple[Array, Array]:
        kind: dict[str, Any] = {"impl": self.impl, "normalised": not self.is_last, "dtype": self.dtype}
        if self.conv == "partial":
            x, seen = PartialConv(self.features, **kind)(x, seen)
        else:
            x = Conv(self.features, (3, 3), (1, 1), (1, 1), kernel_std=None, **kind)(x)
        if self.is_last:
            return x, seen
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype)(x)
        x = jax.nn.relu(x)
        return (x * seen.astype(x.dtype) if self.conv == "partial" else x), seen


class InpaintingUNet(nn.Module):
    """Pictures (B, H, W, C) and what is hidden (B, H, W) bool -> pictures (B, H, W, C) float32, of all pixels.

    Two layers at each of len(widths) sizes, halved by maximum, doubled by repetition. `x` is wanted in [-1, 1], where 0
    is the colour that hidden pixels are given; outputs have no bounds.
    """

    widths: Sequence[int]
    conv: str = "plain"
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, hidden: Array, *, train: bool) -> Array:
        def layers(x, seen, width):
            for _ in range(2):
                x, seen = Layer(width, self.conv, impl=self.impl, dtype=self.dtype)(x, seen, train=train)
            return x, seen

        channels = x.shape[-1]
        hidden = hidden[..., None]
        seen = 1 - hidden.astype(self.dtype)
        x = jnp.where(hidden, 0.0, x).astype(self.dtype)
        if self.conv == "plain":
            x = jnp.concatenate([x, 1 - seen], axis=-1)
        maps = []
        for width in self.widths[:-1]:
            x, seen = layers(x, seen, width)
            maps.append((x, seen))
            x, seen = halve(x), halve(seen)
        x, seen = layers(x, seen, self.widths[-1])
        for skip, skip_seen in maps[::-1]:
            width, share = skip.shape[-1], skip.shape[-1] / (skip.shape[-1] + x.shape[-1])
            seen = share * skip_seen + (1 - share) * double(seen)
            x, seen = layers(jnp.concatenate([skip, double(x)], axis=-1), seen, width)
        last = Layer(channels, self.conv, is_last=True, impl=self.impl, dtype=self.dtype)
        return last(x, seen, train=train)[0].astype(jnp.float32)


def double(x: Array) -> Array:
    """Repeats every pixel along both axes: (B, H, W, C) -> (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    shape = (batch, height, 2, width, 2, channels)
    return jnp.broadcast_to(x[:, :, None, :, None], shape).reshape(batch, 2 * height, 2 * width, channels)
