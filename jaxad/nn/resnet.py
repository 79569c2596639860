"""ResNet-18, the classifier, as torchvision defines it.

He, Zhang, Ren, Sun. "Deep Residual Learning for Image Recognition". CVPR 2016. https://arxiv.org/abs/1512.03385

`from_torch` takes the names of torchvision's `resnet18` (IMAGENET1K_V1) and timm's `resnet18.tv_in1k`; weights come
from the user's file. Pictures are RGB in [0, 1], (x - MEAN) / STD.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.convnorm import Arrays, ConvNorm, dense_from_torch, gather
from jaxad.nn.convnorm import from_torch as conv_norm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTHS = (64, 128, 256, 512)  # channels of stages 1 to 4
FEATURES = 512  # of `__call__`
CLASSES = 1000


class Block(nn.Module):
    """Two convolutions, added to the input; where sizes differ, to a projection of it."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.relu(ConvNorm(self.features, 3, self.stride, padding=1, name="conv1")(x))
        y = ConvNorm(self.features, 3, padding=1, name="conv2")(y)
        if self.stride != 1 or x.shape[-1] != self.features:
            x = ConvNorm(self.features, 1, self.stride, padding=0, name="downsample")(x)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """Pictures (B, H, W, 3) -> averaged features (B, 512). Batch normalisation uses the statistics that it has."""

    def setup(self):
        self.stem = ConvNorm(64, 7, 2, padding=3)
        self.stages = [
            [Block(width, 2 if number and not place else 1, name=f"layer{number + 1}_{place}") for place in (0, 1)]
            for number, width in enumerate(WIDTHS)
        ]
        self.fc = nn.Dense(CLASSES, kernel_init=init.normal(0.01))

    def features(self, x: Array, stage: int = 4) -> Array:
        """The map after a stage: 0 is the stem with its pooling, 1 to 4 are torchvision's layer1 to layer4."""
        x = nn.relu(self.stem(x))
        edges = ((0, 0), (1, 1), (1, 1), (0, 0))
        x = lax.reduce_window(x, jnp.array(-jnp.inf, x.dtype), lax.max, (1, 3, 3, 1), (1, 2, 2, 1), edges)
        for blocks in self.stages[:stage]:
            for block in blocks:
                x = block(x)
        return x

    def __call__(self, x: Array) -> Array:
        return self.features(x).mean(axis=(1, 2))

    def logits(self, x: Array) -> Array:
        """Scores of the 1,000 ImageNet classes, (B, 1000)."""
        return self.fc(self(x))


def from_torch(arrays: Arrays, *, origin: str = "weights") -> dict:
    """Variables of `ResNet18` from torchvision's names; the classifier `fc` may be missing. Raises WeightsError."""
    parts = {"stem": conv_norm(arrays, "conv1", "bn1", (64, 3, 7, 7), origin=origin)}
    inputs = 64
    for number, width in enumerate(WIDTHS, 1):
        for place in (0, 1):
            ours, theirs = f"layer{number}_{place}", f"layer{number}.{place}"
            for conv in (1, 2):
                shape = (width, inputs if conv == 1 else width, 3, 3)
                names = f"{theirs}.conv{conv}", f"{theirs}.bn{conv}"
                parts[f"{ours}/conv{conv}"] = conv_norm(arrays, *names, shape, origin=origin)
            if inputs != width:
                names = f"{theirs}.downsample.0", f"{theirs}.downsample.1"
                parts[f"{ours}/downsample"] = conv_norm(arrays, *names, (width, inputs, 1, 1), origin=origin)
            inputs = width
    variables = gather(parts)
    if "fc.weight" in arrays:
        variables["params"]["fc"] = dense_from_torch(arrays, "fc", (CLASSES, FEATURES), origin=origin)
    return variables


def normalise(images: Array) -> Array:
    """Pictures in [0, 1] as the network wants them."""
    return (images - jnp.asarray(MEAN)) / jnp.asarray(STD)
