"""EfficientNet-Lite0, the classifier: EfficientNet without squeeze-and-excitation, with ReLU6.

Tan, Le. "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks". ICML 2019.
https://arxiv.org/abs/1905.11946; the Lite variant: Google's TPU model repository, Apache 2.0.

`from_torch` takes the names of the package efficientnet-lite-pytorch; weights come from the user's file. Pictures are
RGB in [0, 1], (x - MEAN) / STD; that is (x - 127) / 128 in counts.
"""

from __future__ import annotations

import itertools

import flax.linen as nn
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.convnorm import Arrays, ConvNorm, dense_from_torch, gather
from jaxad.nn.convnorm import from_torch as conv_norm

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
FEATURES = 1280  # of `__call__`
CLASSES = 1000
# Of each stage: blocks, taps, stride of the first block, expansion, channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EPSILON = 1e-3


class Block(nn.Module):
    """Widen, convolve each channel by itself, narrow; added to the input where nothing changes size."""

    features: int
    taps: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y, wide = x, x.shape[-1] * self.expansion
        if self.expansion != 1:
            y = nn.relu6(ConvNorm(wide, 1, epsilon=_EPSILON, name="expand")(y))
        middle = ConvNorm(wide, self.taps, self.stride, epsilon=_EPSILON, is_depthwise=True, name="depthwise")
        y = ConvNorm(self.features, 1, epsilon=_EPSILON, name="project")(nn.relu6(middle(y)))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """Pictures (B, H, W, 3) -> averaged features (B, 1280). Batch normalisation uses the statistics that it has."""

    def setup(self):
        self.stem = ConvNorm(32, 3, 2, epsilon=_EPSILON)
        number = itertools.count()
        self.stages = [
            [Block(width, taps, 1 if i else stride, wide, name=f"block{next(number)}") for i in range(blocks)]
            for blocks, taps, stride, wide, width in STAGES
        ]
        self.head = ConvNorm(FEATURES, 1, epsilon=_EPSILON)
        self.fc = nn.Dense(CLASSES, kernel_init=init.normal(0.01))

    def features(self, x: Array, stage: int = 7) -> Array:
        """The map after a stage: 0 is the stem, 1 to 7 are the stages of blocks."""
        x = nn.relu6(self.stem(x))
        for blocks in self.stages[:stage]:
            for block in blocks:
                x = block(x)
        return x

    def __call__(self, x: Array) -> Array:
        return nn.relu6(self.head(self.features(x))).mean(axis=(1, 2))

    def logits(self, x: Array) -> Array:
        """Scores of the 1,000 ImageNet classes, (B, 1000)."""
        return self.fc(self(x))


def from_torch(arrays: Arrays, *, origin: str = "weights") -> dict:
    """Variables of `EfficientNetLite0`; the classifier `_fc` may be missing. Raises WeightsError."""
    parts = {"stem": conv_norm(arrays, "_conv_stem", "_bn0", (32, 3, 3, 3), origin=origin)}
    inputs, number = 32, 0
    for blocks, taps, _, expansion, width in STAGES:
        for _ in range(blocks):
            wide, theirs = inputs * expansion, f"_blocks.{number}"
            layers = {
                "expand": (f"{theirs}._expand_conv", f"{theirs}._bn0", (wide, inputs, 1, 1)),
                "depthwise": (f"{theirs}._depthwise_conv", f"{theirs}._bn1", (wide, 1, taps, taps)),
                "project": (f"{theirs}._project_conv", f"{theirs}._bn2", (width, wide, 1, 1)),
            }
            for ours, (conv, norm, shape) in layers.items():
                if ours != "expand" or expansion != 1:
                    parts[f"block{number}/{ours}"] = conv_norm(arrays, conv, norm, shape, origin=origin)
            inputs, number = width, number + 1
    parts["head"] = conv_norm(arrays, "_conv_head", "_bn1", (FEATURES, inputs, 1, 1), origin=origin)
    variables = gather(parts)
    if "_fc.weight" in arrays:
        variables["params"]["fc"] = dense_from_torch(arrays, "_fc", (CLASSES, FEATURES), origin=origin)
    return variables


def normalise(images: Array) -> Array:
    """Pictures in [0, 1] as the network wants them."""
    return (images - jnp.asarray(MEAN)) / jnp.asarray(STD)
