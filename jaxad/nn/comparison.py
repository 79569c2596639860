"""Networks that learn to compare pictures with their syntheses: failure detection, and discrepancies.

`FailureNet` follows "Synthesize then Compare" (Xia et al., ECCV 2020): from class probabilities, picture and synthesis
it predicts where the segmentation is right and the intersection over union of each class. `DiscrepancyNet` follows
"Detecting the Unexpected via Image Resynthesis" (Lis et al., ICCV 2019): it predicts where the synthesis differs from
the picture in meaning, from features of both and the labels.
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
from jaxad.nn.segmenter import max_pool
from jaxad.ops.compare import resize
from jaxad.ops.labels import label_conv


class Conv(nn.Module):
    """A convolution with or without bias, drawn by He's rule; padded to keep the size."""

    features: int
    taps: int = 3
    stride: int = 1
    bias: bool = True
    normalised: bool = False  # batch normalisation follows: the bias has no effect and is not trained
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.taps, self.taps, x.shape[-1], self.features)
        std = math.sqrt(2 / (self.taps**2 * x.shape[-1]))
        kernel, edge = self.param("kernel", init.normal(std), shape).astype(self.dtype), self.taps // 2
        x = x.astype(self.dtype)
        y = (
            x[:, :: self.stride, :: self.stride] @ kernel[0, 0]
            if self.taps == 1
            else correlate(x, kernel, strides=(self.stride,) * 2, padding=((edge, edge),) * 2, impl=self.impl)
        )
        if not self.bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return y + (lax.stop_gradient(bias) if self.normalised else bias).astype(self.dtype)


def _norm(x: Array, train: bool) -> Array:
    norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
    return norm(x).astype(x.dtype)


class Residual(nn.Module):
    """ResNet-18's block."""

    features: int
    stride: int = 1
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        kind: dict[str, Any] = {"bias": False, "impl": self.impl, "dtype": self.dtype}
        y = jax.nn.relu(_norm(Conv(self.features, 3, self.stride, **kind)(x), train))
        y = _norm(Conv(self.features, 3, **kind)(y), train)
        if self.stride > 1 or x.shape[-1] != self.features:
            x = _norm(Conv(self.features, 1, self.stride, **kind)(x), train)
        return jax.nn.relu(x + y)


class Trunk(nn.Module):
    """ResNet-18 without its classifier: (B, H, W, C) -> the maps after each of its four stages."""

    width: int = 64
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> list[Array]:
        kind: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        x = jax.nn.relu(_norm(Conv(self.width, 7, 2, bias=False, **kind)(x), train))
        x = max_pool(x)
        maps = []
        for stage in range(4):
            for place in range(2):
                stride = 2 if stage and not place else 1
                x = Residual(self.width * 2**stage, stride, **kind)(x, train=train)
            maps.append(x)
        return maps


class FailureNet(nn.Module):
    """(probabilities (B, H, W, L), picture, synthesis (B, H, W, C)) -> (logits of "right" (B, H, W), IoU (B, L))."""

    width: int = 64
    shared: bool = False  # whether picture and synthesis go through the same trunk
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, probabilities: Array, picture: Array, synthesis: Array, *, train: bool) -> tuple[Array, Array]:
        kind: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        squeezed = jax.nn.relu(_norm(Conv(1, 1, normalised=True, **kind)(probabilities), train))
        trunk = Trunk(self.width, **kind)
        trunks = (trunk, trunk if self.shared else Trunk(self.width, **kind))
        ours, theirs = (
            t(jnp.concatenate([x.astype(self.dtype), squeezed], axis=-1), train=train)
            for t, x in zip(trunks, (picture, synthesis), strict=True)
        )
        size, parts = picture.shape[1:3], []
        for a, b in zip(ours, theirs, strict=True):
            joined = Conv(self.width, 1, normalised=True, **kind)(jnp.concatenate([a, b], axis=-1))
            parts.append(resize(jax.nn.relu(_norm(joined, train)).astype(jnp.float32), size))
        right = Conv(1, 1, impl=self.impl)(jnp.concatenate(parts, axis=-1))[..., 0]
        both = jnp.concatenate([m[-1].astype(jnp.float32).mean(axis=(1, 2)) for m in (ours, theirs)], axis=-1)
        bound = init.uniform(1 / math.sqrt(both.shape[-1]))
        return right, nn.Dense(probabilities.shape[-1], kernel_init=bound, bias_init=bound)(both)


class Pyramid(nn.Module):
    """Maps at the full size and three halvings: a convolution, then three of stride 2, SELU after each."""

    widths: Sequence[int]
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        maps = []
        for place, width in enumerate(self.widths):
            x = jax.nn.selu(Conv(width, 3, 2 if place else 1, impl=self.impl, dtype=self.dtype)(x))
            maps.append(x)
        return maps


class DiscrepancyNet(nn.Module):
    """(labels, picture, synthesis, maps of both) -> logits (B, H, W, 2); the second says that they differ in meaning.

    Given maps of a pretrained network, fine to coarse, each half the one before; without, a pyramid of its own reads
    picture and synthesis alike.
    """

    num_labels: int
    label_widths: Sequence[int] = (32, 64, 128, 256)
    widths: Sequence[int] = (64, 128, 256, 256)  # of what is decoded, fine to coarse
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, labels: Array, picture: Array, synthesis: Array, maps: tuple[list[Array], list[Array]] | None = None
    ) -> Array:
        kind: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        if maps is None:
            pyramid = Pyramid(self.label_widths, **kind)
            maps = pyramid(picture), pyramid(synthesis)
        first = self.label_widths[0]
        std = math.sqrt(2 / 49)
        kernel = self.param("labels", init.normal(std), (7, 7, self.num_labels, first)).astype(self.dtype)
        bias = self.param("labels_bias", nn.initializers.zeros, (first,)).astype(self.dtype)
        seen = [jax.nn.selu(label_conv(labels, kernel, padding=3) + bias)]
        for width in self.label_widths[1:]:
            seen.append(jax.nn.selu(Conv(width, 3, 2, **kind)(seen[-1])))
        above: Array | None = None
        for level in reversed(range(len(seen))):
            size = (seen[level].shape[1], seen[level].shape[2])
            a, b = (resize(m[level].astype(self.dtype), size) for m in maps)
            width = self.widths[level]
            mixed = Conv(width, 1, **kind)(jnp.concatenate([a, b, seen[level]], axis=-1))
            alike = jnp.sum(a * b, axis=-1, keepdims=True)
            parts = [mixed, alike] if above is None else [mixed, alike, above]
            x = jnp.concatenate(parts, axis=-1)
            for _ in range(2):
                x = jax.nn.selu(Conv(width, 3, **kind)(x))
            above = self._doubled(x, self.widths[level - 1]) if level else x
        return Conv(2, 1, impl=self.impl)(jnp.asarray(above, jnp.float32))

    def _doubled(self, x: Array, width: int) -> Array:
        """A transposed convolution of 2x2 taps and stride 2: every pixel becomes four, each by its own product."""
        batch, height, columns, channels = x.shape
        bound = init.normal(math.sqrt(2 / channels))
        kernel = self.param(f"doubled_{height}", bound, (channels, 2, 2, width)).astype(self.dtype)
        four = jnp.einsum("bhwc,cyxo->bhywxo", x, kernel)
        return four.reshape(batch, 2 * height, 2 * columns, width)
