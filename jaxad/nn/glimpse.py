"""A policy network that reads a crop of a picture and chooses what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import Conv


class GlimpsePolicy(nn.Module):
    """Crops (B, C, C, channels) -> logits of actions (B, A) float32.

    Layers of 3x3 with stride 2, group normalisation and ReLU, then two dense layers. The last starts small, so that the
    first policy is nearly uniform. Groups, not the batch, are normalised: an action depends on its own crop only.
    """

    features: Sequence[int]
    actions: int
    hidden: int = 256
    group: int = 8  # channels, at most
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i, width in enumerate(self.features):
            x = Conv(width, (3, 3), (2, 2), (1, 1), None, self.impl, dtype=self.dtype, name=f"conv_{i}")(x)
            norm = nn.GroupNorm(num_groups=None, group_size=math.gcd(self.group, width), name=f"norm_{i}")
            x = jax.nn.relu(norm(x.astype(jnp.float32)))
        x = x.reshape(x.shape[0], -1)
        bound = init.uniform(1 / math.sqrt(x.shape[-1]))
        x = jax.nn.relu(nn.Dense(self.hidden, kernel_init=bound, bias_init=bound, name="hidden")(x))
        small = init.uniform(0.01 / math.sqrt(self.hidden))
        return nn.Dense(self.actions, kernel_init=small, name="actions")(x)
