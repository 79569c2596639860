"""The SPADE generator: pictures from label maps, and the patch discriminators that it is trained against.

Park, Liu, Wang, Zhu. "Semantic Image Synthesis with Spatially-Adaptive Normalization". CVPR 2019.
https://arxiv.org/abs/1903.07291

Labels modulate what batch normalisation leaves of each map: scale and shift of every pixel are a convolution of a
hidden map, which is a convolution of the one-hot labels, here looked up (`jaxad.ops.labels`). Kernels under spectral
normalisation are divided by an estimate of their largest singular value, of which one power iteration is done for
each training step; its vectors are the collection "spectral".
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
from jaxad.nn.inpainting import double
from jaxad.ops.labels import halve_by_mean, label_conv, one_hot_pooled, resize_labels

_GAIN = 0.02  # of Xavier's initialisation, as the authors have it


def leaky(x: Array) -> Array:
    """Leaky ReLU of slope 0.2."""
    return jax.nn.leaky_relu(x, 0.2)


def xavier(taps: int, inputs: int, outputs: int):
    """Xavier's normal initialiser with the authors' gain."""
    return init.normal(_GAIN * math.sqrt(2 / (taps**2 * (inputs + outputs))))


def _unit(x: Array) -> Array:
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x**2)), 1e-12)


def apply_conv(x: Array, kernel: Array, *, stride: int = 1, padding: int = 1, impl: str = "auto") -> Array:
    """The convolution with square padding; products where the kernel has one tap."""
    kernel = kernel.astype(x.dtype)
    if kernel.shape[0] == 1:
        return x @ kernel[0, 0]
    return correlate(x, kernel, strides=(stride,) * 2, padding=((padding, padding),) * 2, impl=impl)


class SpectralKernel(nn.Module):
    """A kernel (taps, taps, C, O) over the estimate of its largest singular value as a matrix (taps^2 C, O)."""

    taps: int
    features: int

    @nn.compact
    def __call__(self, inputs: int, *, train: bool) -> Array:
        shape = (self.taps, self.taps, inputs, self.features)
        kernel = self.param("kernel", xavier(self.taps, inputs, self.features), shape)
        matrix = kernel.reshape(-1, self.features)
        right = self.variable("spectral", "right", lambda: self._draw(self.features))
        left = self.variable("spectral", "left", lambda: self._draw(matrix.shape[0]))
        if train and not self.is_initializing():
            fixed = lax.stop_gradient(matrix)
            left.value = _unit(_times(fixed, right.value))
            right.value = _unit(_times(left.value, fixed))
        return kernel / jnp.dot(left.value, _times(matrix, right.value), precision=lax.Precision.HIGHEST)

    def _draw(self, size: int) -> Array:
        return _unit(init.normal(1.0)(self.make_rng("params"), (size,)))


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


class Modulation(nn.Module):
    """A normalised map (B, H, W, C) scaled and shifted by labels: y (1 + gamma) + beta.

    `hidden` is relu(convolution of the labels); gamma and beta come from one convolution of it.
    """

    impl: str = "auto"

    @nn.compact
    def __call__(self, normalised: Array, hidden: Array) -> Array:
        channels, inputs = normalised.shape[-1], hidden.shape[-1]
        kernel = self.param("kernel", xavier(3, inputs, channels), (3, 3, inputs, 2 * channels))
        bias = self.param("bias", nn.initializers.zeros, (2 * channels,)).astype(hidden.dtype)
        gamma, beta = jnp.split(apply_conv(hidden, kernel, impl=self.impl) + bias, 2, axis=-1)
        return normalised * (1 + gamma) + beta


class SpadeBlock(nn.Module):
    """A residual block of two modulated convolutions; where widths differ, a modulated 1x1 convolution beside them."""

    features: int
    num_labels: int
    hidden: int
    is_last: bool = False  # otherwise a normalisation follows, and its bias has no effect
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, labels: Array, *, train: bool) -> Array:
        inputs = x.shape[-1]
        middle, is_wide = min(inputs, self.features), inputs != self.features
        count = 3 if is_wide else 2
        hidden = self._hidden(labels, count)

        def normalise(x):
            norm = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, epsilon=1e-5, use_bias=False, use_scale=False
            )
            return norm(x).astype(self.dtype)

        # The first modulation and the shortcut's are of the same map, normalised once.
        first = normalise(x)
        y = leaky(Modulation(self.impl, name="modulate_0")(first, hidden[0]))
        y = self._conv("conv_0", y, middle, train=train)
        y = leaky(Modulation(self.impl, name="modulate_1")(normalise(y), hidden[1]))
        y = self._conv("conv_1", y, self.features, train=train, counts=self.is_last)
        if is_wide:
            x = Modulation(self.impl, name="modulate_s")(first, hidden[2])
            x = apply_conv(x, SpectralKernel(1, self.features, name="conv_s")(inputs, train=train))
        return x + y

    def _hidden(self, labels: Array, count: int) -> list[Array]:
        """relu(convolution of the labels) for each modulation, looked up together."""
        shape = (3, 3, self.num_labels, self.hidden)
        names = ("0", "1", "s")[:count]
        kernels = [self.param(f"labels_{n}", xavier(3, self.num_labels, self.hidden), shape) for n in names]
        biases = [self.param(f"labels_{n}_bias", nn.initializers.zeros, (self.hidden,)) for n in names]
        together = label_conv(labels, jnp.concatenate(kernels, axis=-1).astype(self.dtype))
        together = jax.nn.relu(together + jnp.concatenate(biases).astype(self.dtype))
        return jnp.split(together, count, axis=-1)

    def _conv(self, name: str, x: Array, features: int, *, train: bool, counts: bool = False) -> Array:
        kernel = SpectralKernel(3, features, name=name)(x.shape[-1], train=train)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (features,))
        # A true gradient of zero would be noise that Adam turns into steps.
        bias = bias if counts else lax.stop_gradient(bias)
        return apply_conv(x, kernel, impl=self.impl) + bias.astype(x.dtype)


class SpadeGenerator(nn.Module):
    """Labels (B, h, w) int32 -> pictures (B, H, W, channels) float32 in [-1, 1].

    The first block works at (H, W) / 2^upsamplings. Every other block doubles its input first; with one upsampling
    fewer than that, the third block does not.
    """

    size: tuple[int, int]
    channels: int
    num_labels: int
    widths: Sequence[int] = (1024, 1024, 1024, 512, 256, 128, 64)
    upsamplings: int = 6
    hidden: int = 128
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, labels: Array, *, train: bool) -> Array:
        start = tuple(n // 2**self.upsamplings for n in self.size)
        kind: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        first = self.widths[0]
        kernel = self.param("start", xavier(3, self.num_labels, first), (3, 3, self.num_labels, first))
        bias = lax.stop_gradient(self.param("start_bias", nn.initializers.zeros, (first,)))
        x = label_conv(resize_labels(labels, start), kernel.astype(self.dtype)) + bias.astype(self.dtype)
        for place, width in enumerate(self.widths):
            if doubles(place, len(self.widths), self.upsamplings):
                x = double(x)
            block = SpadeBlock(
                width, self.num_labels, self.hidden, place == len(self.widths) - 1, name=f"block_{place}", **kind
            )
            x = block(x, resize_labels(labels, x.shape[1:3]), train=train)
        kernel = self.param("last", xavier(3, x.shape[-1], self.channels), (3, 3, x.shape[-1], self.channels))
        bias = self.param("last_bias", nn.initializers.zeros, (self.channels,))
        return jnp.tanh((apply_conv(leaky(x), kernel, impl=self.impl) + bias.astype(x.dtype)).astype(jnp.float32))


def doubles(place: int, blocks: int, upsamplings: int) -> bool:
    """Whether the block at a place doubles its input."""
    return place > 0 and not (place == 2 and upsamplings == blocks - 2)


def fits(blocks: int, upsamplings: int) -> bool:
    """Whether so many blocks can have so many upsamplings."""
    return upsamplings == blocks - 1 or (blocks > 2 and upsamplings == blocks - 2)


class PatchDiscriminator(nn.Module):
    """One scale: 4x4 convolutions, the first of stride 2, then stride 2 until the last two; instance normalisation.

    (What `by_label` gives, pictures (B, H, W, C)) -> the maps of every layer; the last, of one channel, are verdicts on
    overlapping patches.
    """

    num_labels: int
    widths: Sequence[int] = (64, 128, 256, 512)
    impl: str = "auto"
    dtype: Any = jnp.float32

    def setup(self):
        fan = self.num_labels + 3
        self.label_kernel = self.param(
            "labels", xavier(4, fan, self.widths[0]), (4, 4, self.num_labels, self.widths[0])
        )
        self.middle = [SpectralKernel(4, width) for width in self.widths[1:]]

    def by_label(self, labels: Array, *, pooled: bool) -> Array:
        """The first layer's part that comes from labels, int32, or from their one-hot maps where they are pooled."""
        kernel = self.label_kernel.astype(self.dtype)
        if pooled:
            return apply_conv(labels.astype(self.dtype), kernel, stride=2, padding=2, impl=self.impl)
        return label_conv(labels, kernel, stride=2, padding=2)

    @nn.compact
    def __call__(self, given: Array, images: Array, *, train: bool) -> list[Array]:
        channels, first = images.shape[-1], self.widths[0]
        kernel = self.param("image", xavier(4, self.num_labels + channels, first), (4, 4, channels, first))
        bias = self.param("image_bias", nn.initializers.zeros, (first,)).astype(self.dtype)
        x = apply_conv(images.astype(self.dtype), kernel, stride=2, padding=2, impl=self.impl)
        maps = [leaky(x + given + bias)]
        for place, layer in enumerate(self.middle, 2):
            stride = 2 if place < len(self.widths) else 1
            kernel = layer(maps[-1].shape[-1], train=train)
            maps.append(leaky(_instance_norm(apply_conv(maps[-1], kernel, stride=stride, padding=2, impl=self.impl))))
        last = self.param("last", xavier(4, self.widths[-1], 1), (4, 4, self.widths[-1], 1))
        bias = self.param("last_bias", nn.initializers.zeros, (1,))
        verdict = apply_conv(maps[-1], last, padding=2, impl=self.impl).astype(jnp.float32) + bias
        return [*maps, verdict]


def _instance_norm(x: Array) -> Array:
    mean = x.mean(axis=(1, 2), keepdims=True, dtype=jnp.float32)
    centred = x.astype(jnp.float32) - mean
    return (centred * lax.rsqrt(jnp.mean(centred**2, axis=(1, 2), keepdims=True) + 1e-5)).astype(x.dtype)


class PatchDiscriminators(nn.Module):
    """Discriminators at several scales, each half the one before: (labels, pictures of several kinds) -> their maps.

    What labels contribute is computed once for all kinds of pictures.
    """

    num_labels: int
    widths: Sequence[int] = (64, 128, 256, 512)
    scales: int = 2
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, labels: Array, *kinds: Array, train: bool) -> list[list[list[Array]]]:
        """labels (B, h, w) int32, `kinds` (B, H, W, C) in [-1, 1] -> [kind][scale][layer]."""
        found: list[list[list[Array]]] = [[] for _ in kinds]
        maps, images = resize_labels(labels, kinds[0].shape[1:3]), list(kinds)
        for scale in range(self.scales):
            judge = PatchDiscriminator(self.num_labels, self.widths, self.impl, self.dtype, name=f"scale_{scale}")
            given = judge.by_label(maps, pooled=scale > 0)
            for kind, picture in enumerate(images):  # one power iteration a step
                found[kind].append(judge(given, picture, train=train and kind == 0))
            if scale + 1 < self.scales:
                maps = halve_by_mean(maps) if scale else one_hot_pooled(maps, self.num_labels)
                images = [halve_by_mean(picture) for picture in images]
        return found


Judged = list[list[Array]]  # of one kind of picture: [scale][layer]


def hinge_discriminator(real: Judged, fake: Judged) -> Array:
    """mean relu(1 - D(real)) + mean relu(1 + D(fake)), averaged over scales."""
    losses = [
        jnp.mean(jax.nn.relu(1 - r[-1])) + jnp.mean(jax.nn.relu(1 + f[-1])) for r, f in zip(real, fake, strict=True)
    ]
    return sum(losses) / len(losses)


def hinge_generator(fake: Judged) -> Array:
    """-mean D(fake), averaged over scales."""
    return -sum(jnp.mean(f[-1]) for f in fake) / len(fake)


def feature_matching(real: Judged, fake: Judged) -> Array:
    """L1 distance of all maps but the verdicts, summed over layers, averaged over scales; constant in the real side."""
    total = jnp.zeros(())
    for r, f in zip(real, fake, strict=True):
        for a, b in zip(r[:-1], f[:-1], strict=True):
            total += jnp.mean(jnp.abs(b.astype(jnp.float32) - lax.stop_gradient(a).astype(jnp.float32)))
    return total / len(real)
