"""Maps of pretrained classifiers at several sizes, from weights in a file of the user's."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxad import importers
from jaxad.core import Array
from jaxad.nn import efficientnet, resnet


class Backbone(NamedTuple):
    """A classifier and which of its maps are used."""

    network: Any
    normalise: Callable  # pictures in [0, 1] -> as the network wants them
    from_torch: Callable  # arrays by torch's names -> variables
    stages: tuple[int, ...]  # fine to coarse, halved from one to the next


BACKBONES: Mapping[str, Backbone] = {
    "resnet18": Backbone(resnet.ResNet18(), resnet.normalise, resnet.from_torch, (1, 2, 3, 4)),
    "efficientnet_lite0": Backbone(
        efficientnet.EfficientNetLite0(), efficientnet.normalise, efficientnet.from_torch, (1, 2, 3, 5)
    ),
}


def read(name: str, path: str | os.PathLike) -> Any:
    """The variables of a backbone from a file of torch's names. Raises WeightsError."""
    arrays = {name: array for name, array in importers.read(path).items() if not name.startswith(("fc.", "_fc."))}
    return BACKBONES[name].from_torch(arrays, origin=str(path))


def load_later(name: str, path: str | os.PathLike) -> Any:
    """The variables, read when the program runs: shapes alone, as for a restored detector, need no file."""
    backbone = BACKBONES[name]
    start = jnp.zeros((1, 32, 32, 3))
    shapes = jax.eval_shape(lambda key: backbone.network.init(key, start), jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), shapes)
    return jax.pure_callback(functools.partial(read, name, path), like, vmap_method="sequential")


def maps_of(name: str, variables: Any, images: Array) -> list[Array]:
    """The maps of pictures (B, H, W, 1 or 3) in [0, 1], fine to coarse, float32."""
    backbone = BACKBONES[name]
    given = backbone.normalise(jnp.broadcast_to(images, (*images.shape[:-1], 3)))
    return [backbone.network.apply(variables, given, stage, method="features") for stage in backbone.stages]
