"""A semantic segmenter: a dilated residual network under a pyramid of pooled maps, as PSPNet has it.

Zhao, Shi, Qi, Wang, Jia. "Pyramid Scene Parsing Network". CVPR 2017. https://arxiv.org/abs/1612.01105

The encoder is ResNet-50 with three 3x3 convolutions in front and its last two stages dilated, so that maps keep an
eighth of the picture's size. The map that the last 3x3 convolution reads, the encoder's joined by its pooled versions,
is what pictures are compared by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import correlate
from jaxad.ops.compare import resize

POOLS = (1, 2, 3, 6)  # cells a side that maps are averaged over
_DROPOUT = 0.1


class Parsed(NamedTuple):
    """What the segmenter says of B pictures, at an eighth of their size."""

    logits: Array  # (B, h, w, L)
    auxiliary: Array  # (B, h, w, L) of the third stage, for training alone
    features: Array  # (B, h, w, D)


def dilated(x: Array, kernel: Array, *, dilation: int, impl: str = "auto") -> Array:
    """A 3x3 convolution whose taps are `dilation` pixels apart, zeros outside.

    Pixels `dilation` apart are laid out as pictures of their own, so that it is a plain convolution in whichever form
    suits the platform: (B, H, W, C) -> the same.
    """
    batch, height, width, channels = x.shape
    rows, columns = (-(-n // dilation) for n in (height, width))
    filled = jnp.pad(x, ((0, 0), (0, rows * dilation - height), (0, columns * dilation - width), (0, 0)))
    split = filled.reshape(batch, rows, dilation, columns, dilation, channels).transpose(0, 2, 4, 1, 3, 5)
    flat = split.reshape(batch * dilation**2, rows, columns, channels)
    y = correlate(flat, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), impl=impl)
    y = y.reshape(batch, dilation, dilation, rows, columns, -1).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(batch, rows * dilation, columns * dilation, -1)[:, :height, :width]


class Layer(nn.Module):
    """A convolution without bias, batch normalisation, ReLU unless it is `bare`."""

    features: int
    taps: int = 3
    stride: int = 1
    dilation: int = 1
    bare: bool = False
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        shape = (self.taps, self.taps, x.shape[-1], self.features)
        std = math.sqrt(2 / (self.taps**2 * self.features))  # He's, by outputs, as the authors have it
        kernel = self.param("kernel", init.normal(std), shape).astype(self.dtype)
        x = x.astype(self.dtype)
        if self.taps == 1:
            x = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        elif self.dilation > 1:
            x = dilated(x, kernel, dilation=self.dilation, impl=self.impl)
        else:
            x = correlate(x, kernel, strides=(self.stride,) * 2, padding=((1, 1), (1, 1)), impl=self.impl)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name="norm")
        x = norm(x).astype(self.dtype)
        return x if self.bare else jax.nn.relu(x)


class Bottleneck(nn.Module):
    """Narrow, 3x3, four times as wide; added to the input, or to a projection of it where sizes differ."""

    features: int
    stride: int = 1
    dilation: int = 1
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        kind: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        y = Layer(self.features, 1, **kind)(x, train=train)
        y = Layer(self.features, 3, self.stride, self.dilation, **kind)(y, train=train)
        y = Layer(4 * self.features, 1, bare=True, **kind)(y, train=train)
        if x.shape[-1] != y.shape[-1] or self.stride > 1:
            x = Layer(4 * self.features, 1, self.stride, bare=True, **kind)(x, train=train)
        return jax.nn.relu(x + y)


class Segmenter(nn.Module):
    """Pictures (B, H, W, C) in [-1, 1] -> `Parsed`, h = H / 8 rounded up."""

    num_labels: int
    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    head: int = 512
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Parsed:
        kind: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        for features, stride in ((self.width, 2), (self.width, 1), (2 * self.width, 1)):
            x = Layer(features, 3, stride, **kind)(x, train=train)
        x = max_pool(x)
        stages: list[Array] = []
        for number, blocks in enumerate(self.blocks):
            for place in range(blocks):
                stride = 2 if number == 1 and place == 0 else 1
                # Of the third stage dilation 2, of the fourth 4; the first block of each has half of it.
                dilation = max(1, (1, 1, 2, 4)[number] // (2 if place == 0 else 1))
                x = Bottleneck(self.width * 2**number, stride, dilation, **kind)(x, train=train)
            stages.append(x)
        pooled = [Layer(self.head, 1, **kind)(pool(x, cells), train=train) for cells in POOLS]
        size = (x.shape[1], x.shape[2])
        joined = jnp.concatenate([x, *(resize(p, size).astype(x.dtype) for p in pooled)], axis=-1)
        main, auxiliary = (self._classify(m, train=train) for m in (joined, stages[2]))
        return Parsed(main, auxiliary, joined)

    def _classify(self, x: Array, *, train: bool) -> Array:
        x = Layer(self.head, 3, impl=self.impl, dtype=self.dtype)(x, train=train)
        x = nn.Dropout(_DROPOUT, broadcast_dims=(1, 2), deterministic=not train)(x)
        bound = init.uniform(1 / math.sqrt(self.head))
        return nn.Dense(self.num_labels, kernel_init=bound, bias_init=bound)(x.astype(jnp.float32))


def max_pool(x: Array) -> Array:
    """Maxima over 3x3 windows of stride 2, padded by one pixel: (B, H, W, C) -> half the size, rounded up.

    By slices: the gradient of XLA's pooling window is many times slower on CPU.
    """
    for axis in (1, 2):
        half = -(-x.shape[axis] // 2)
        edges = [(0, 0)] * x.ndim
        edges[axis] = (1, 2 * half - x.shape[axis])
        padded = jnp.pad(x, edges, constant_values=-jnp.inf)
        parts = [lax.slice_in_dim(padded, s, s + 2 * half - 1, 2, axis) for s in range(3)]
        x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
    return x


def pool(x: Array, cells: int) -> Array:
    """Means over `cells` x `cells` nearly equal parts, which overlap where they do not divide: (B, H, W, C)."""
    rows, columns = (jnp.asarray(_pooling(n, cells), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("ph,bhwc,qw->bpqc", rows, x, columns)


def _pooling(size: int, cells: int) -> np.ndarray:
    matrix = np.zeros((cells, size), np.float32)
    for cell in range(cells):
        low, high = cell * size // cells, -(-(cell + 1) * size // cells)
        matrix[cell, low:high] = 1 / (high - low)
    return matrix
