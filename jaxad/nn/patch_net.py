"""The three patch networks of Uninformed Students, for patches of 17, 33 and 65 pixels, in one description each.

The paper's table cannot be built literally (a pool that doubles channels, a 3x3 kernel on a single value); the layers
here are those that its sizes allow, and the other readings are fields of `Shape`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn.dense import Conv, Layers, PatchNetwork, Pool, field_of, linear

PATCHES = (17, 33, 65)
PADDINGS = ("reflect", "zero")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pictures
leaky = functools.partial(nn.leaky_relu, negative_slope=0.005)


class Shape(NamedTuple):
    """What determines the networks besides the size of the patch."""

    width: float = 1.0  # of all layers but the last, relative to the paper's
    descriptor: int = 128  # d
    conv3_features: int = 128  # of the network for 65: 128 | 256, as some read it
    final_activation: str = "none"  # "none" | "leaky"
    p33_conv1: int = 5  # taps of the first layer of the network for 33: 5 | 3, as printed
    p17_taps: tuple[int, ...] = (6, 5, 5, 4)  # or (5, 5, 5, 5)


def shape_of(cfg) -> Shape:
    """The fields of a config that make up a `Shape`."""
    given = {field: getattr(cfg, field) for field in Shape._fields}
    return Shape(**{**given, "p17_taps": tuple(given["p17_taps"])})


def check(shape: Shape, patches: tuple[int, ...], *, who: str) -> None:
    """Refuses networks that do not exist. Raises ValueError."""
    allowed = {
        "conv3_features": (128, 256),
        "final_activation": ("none", "leaky"),
        "p33_conv1": (5, 3),
        "p17_taps": ((6, 5, 5, 4), (5, 5, 5, 5)),
    }
    for field, values in allowed.items():
        if getattr(shape, field) not in values:
            raise ValueError(
                f"{who}: {field}={getattr(shape, field)!r} is unknown; expected one of {values}. "
                f"Pass --set {field}={str(values[0]).replace(' ', '')}."
            )
    if not patches or len(set(patches)) < len(patches) or not set(patches) <= set(PATCHES):
        raise ValueError(f"{who}: patches={patches}; expected some of {PATCHES}, each once. Pass --set patches=33.")
    if shape.width <= 0 or shape.descriptor < 1:
        raise ValueError(
            f"{who}: width={shape.width}, descriptor={shape.descriptor}; expected more than 0. "
            "Pass --set width=1 --set descriptor=128."
        )


def layers_of(patch: int, shape: Shape) -> Layers:
    """The layers of the network for patches of this size."""

    def conv(features: int, taps: int) -> Conv:
        return Conv(max(1, round(features * shape.width)), taps, activation=leaky)

    if patch == 17:
        one, two, three, taps = shape.p17_taps
        layers: Layers = (conv(128, one), conv(256, two), conv(256, three))
    elif patch == 33:
        layers, taps = (conv(128, shape.p33_conv1), Pool(), conv(256, 5), Pool(), conv(256, 2)), 4
    else:
        wide = shape.conv3_features
        layers = (conv(128, 5), Pool(), conv(128, 5), Pool(), conv(wide, 5), Pool(), conv(256, 4))
        taps = 1
    return *layers, Conv(shape.descriptor, taps, activation=leaky if shape.final_activation == "leaky" else linear)


def network_of(patch: int, shape: Shape, *, impl: str = "auto") -> PatchNetwork:
    """The network for patches of this size: pictures (B, H, W, 3) -> descriptors of their patches."""
    return PatchNetwork(layers_of(patch, shape), patch, impl)


def normalise(images: Array) -> Array:
    """Pictures in [0, 1] as the networks want them, grey ones tripled."""
    images = jnp.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    return (images - jnp.asarray(MEAN)) / jnp.asarray(STD)


def pad(images: Array, patch: int, layers: Layers, *, mode: str = "reflect", centre: bool = False) -> Array:
    """Pads pictures so that there is a patch for every pixel, (patch - 1) / 2 above and left of which it starts.

    Args:
      images: (B, H, W, C), normalised.
      patch: p.
      layers: the network.
      mode: "reflect" or "zero".
      centre: the pixels that the network reads lie evenly around its pixel, rather than those of the patch. It reads
        32 of 33 and 60 of 65 pixels, the upper left ones: without, the map of 65 is shifted by 2.5 pixels.
    """
    before = (field_of(layers) - 1) // 2 if centre else (patch - 1) // 2
    edges = ((0, 0), (before, patch - 1 - before), (before, patch - 1 - before), (0, 0))
    return jnp.pad(images, edges, "reflect") if mode == "reflect" else jnp.pad(images, edges)


def enlarge(maps: Array, size: tuple[int, int], *, out_stride: int) -> Array:
    """Maps known at every `out_stride`-th pixel from the first: linear between these, constant after the last.

    Args:
      maps: (B, h, w).
      size: (H, W) wanted.
      out_stride: pixels between neighbours.
    """
    if out_stride == 1:
        return maps
    rows, columns = (_between(n, known, out_stride) for n, known in zip(size, maps.shape[1:], strict=True))
    return jnp.einsum("hi,bij,wj->bhw", rows, maps, columns)


def _between(size: int, known: int, stride: int) -> Array:
    places = jnp.minimum(jnp.arange(size) / stride, known - 1)
    return jnp.maximum(1 - jnp.abs(places[:, None] - jnp.arange(known)), 0.0)


def as_text(shape: Shape) -> dict:
    """Plain values, for a file's notes; `from_text` reads them."""
    return {**shape._asdict(), "p17_taps": list(shape.p17_taps)}


def from_text(values: dict) -> Shape:
    """The inverse of `as_text`. Raises TypeError for fields that do not exist."""
    return Shape(**{**values, "p17_taps": tuple(values["p17_taps"])})
