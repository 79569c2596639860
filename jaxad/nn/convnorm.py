"""Convolutions followed by batch normalisation, as pretrained classifiers have them, and their import from torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array
from jaxad.importers import take
from jaxad.nn import init
from jaxad.nn.conv import correlate, target_platform


def same_padding(size: int, *, taps: int, stride: int) -> tuple[int, int]:
    """TensorFlow's "SAME" along an axis: as many outputs as strides; what is odd goes to the end."""
    total = max((math.ceil(size / stride) - 1) * stride + taps - size, 0)
    return total // 2, total - total // 2


def depthwise(x: Array, kernel: Array, *, stride: int, padding: tuple[tuple[int, int], ...]) -> Array:
    """Each channel convolved by itself: x (B, H, W, C), kernel (taps, taps, C) -> (B, h, w, C).

    On CPU as a sum of shifted pictures: there XLA's grouped convolution is 9-64 times slower in the eight shapes of
    EfficientNet-Lite0 that were tried (jax 0.10.2, 2 cores).
    """
    if target_platform() != "cpu":
        channels = kernel.shape[-1]
        numbers = ("NHWC", "HWIO", "NHWC")
        options: dict[str, Any] = {"dimension_numbers": numbers, "feature_group_count": channels}
        return lax.conv_general_dilated(x, kernel[:, :, None], (stride, stride), padding, **options)
    taps, padded = kernel.shape[0], jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((n - taps) // stride + 1 for n in padded.shape[1:3])
    total = jnp.zeros((x.shape[0], height, width, x.shape[-1]), x.dtype)
    for row in range(taps):
        rows = lax.slice_in_dim(padded, row, row + (height - 1) * stride + 1, stride, 1)
        for column in range(taps):
            part = lax.slice_in_dim(rows, column, column + (width - 1) * stride + 1, stride, 2)
            total = total + part * kernel[row, column]
    return total


class ConvNorm(nn.Module):
    """A convolution without bias, then batch normalisation; `taps` a side.

    `padding` is in pixels, or None for TensorFlow's "SAME". With `is_depthwise` each channel is convolved by itself.
    """

    features: int
    taps: int = 3
    stride: int = 1
    padding: int | None = None
    epsilon: float = 1e-5
    is_depthwise: bool = False

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        inputs = () if self.is_depthwise else (x.shape[-1],)
        fan_in = self.taps**2 * math.prod(inputs)
        shape = (self.taps, self.taps, *inputs, self.features)
        kernel = self.param("kernel", init.normal(math.sqrt(2 / fan_in)), shape).astype(x.dtype)
        sides = {"taps": self.taps, "stride": self.stride}
        same = tuple(same_padding(n, **sides) for n in x.shape[1:3])
        padding = same if self.padding is None else ((self.padding, self.padding),) * 2
        if self.is_depthwise:
            x = depthwise(x, kernel, stride=self.stride, padding=padding)
        elif self.taps == 1:
            x = x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
        else:
            x = correlate(x, kernel, strides=(self.stride,) * 2, padding=padding, impl="conv")
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=self.epsilon, name="norm")
        return norm(x).astype(x.dtype)


Arrays = Mapping[str, np.ndarray]


def from_torch(arrays: Arrays, conv: str, norm: str, shape: tuple[int, ...], *, origin: str) -> tuple[dict, dict]:
    """(params, batch_stats) of a `ConvNorm` from the arrays of torch's layers `conv` and `norm`.

    Args:
      arrays: by torch's names, "LAYER.weight" and so on.
      conv, norm: names of the layers.
      shape: of the convolution's weight in torch: (O, C, taps, taps), of a depthwise one (O, 1, taps, taps).
      origin: the file, for messages.

    Raises:
      WeightsError: an array is missing or has another shape.
    """
    weight = take(arrays, f"{conv}.weight", shape, origin=origin)
    kernel = np.transpose(weight, (2, 3, 1, 0))
    if shape[1] == 1:
        kernel = kernel[:, :, 0]
    parts = {name: take(arrays, f"{norm}.{name}", shape[:1], origin=origin) for name in _NORM}
    params = {"kernel": kernel, "norm": {"scale": parts["weight"], "bias": parts["bias"]}}
    return params, {"norm": {"mean": parts["running_mean"], "var": parts["running_var"]}}


_NORM = ("weight", "bias", "running_mean", "running_var")


def dense_from_torch(arrays: Arrays, name: str, shape: tuple[int, int], *, origin: str) -> dict[str, np.ndarray]:
    """Params of a Linen `Dense` from torch's Linear layer with a weight of this shape."""
    kernel = take(arrays, f"{name}.weight", shape, origin=origin).T
    return {"kernel": kernel, "bias": take(arrays, f"{name}.bias", shape[:1], origin=origin)}


def gather(parts: Mapping[str, tuple[dict, dict]]) -> dict[str, dict]:
    """Variables of a network from those of its parts; a name with a slash is of a part in a part."""
    params: dict[str, Any] = {}
    stats: dict[str, Any] = {}
    for name, pair in parts.items():
        for tree, own in zip((params, stats), pair, strict=True):
            *outer, last = name.split("/")
            for level in outer:
                tree = tree.setdefault(level, {})
            tree[last] = own
    return {"params": params, "batch_stats": stats}
