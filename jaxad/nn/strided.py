"""Autoencoders of 4x4 kernels with stride 2, plain or variational, whose layers show what goes in and comes back.

Per-sample weight gradients need each layer's input and the derivative of the loss with respect to its output. `inputs`
returns the former; the latter is the derivative with respect to `shifts`, zeros added to the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import choose_impl
from jaxad.ops.space_to_depth import conv4, conv4_transposed, doubled, halved


class Layer(NamedTuple):
    """A linear layer: its name among the parameters, its kind and its geometry."""

    name: str
    kind: str  # "conv" | "transposed" | "dense"
    features: int
    padding: int = 0


class Pass(NamedTuple):
    """What a forward pass gives."""

    logits: Array  # (B, H, W, C); their sigmoid is the reconstruction
    mean: Array  # of the latents: (B, h, w, c), or (B, L) of the variational network
    log_variance: Array | None  # (B, L), of the variational network
    inputs: Mapping[str, Array]  # by layer
    shapes: Mapping[str, tuple[int, ...]]  # of the outputs by layer


class Linear4(nn.Module):
    """A `Layer` with bias; both drawn from U(+-1/sqrt(fan-in)), where torch takes the fan-in of a transposed
    convolution from its output channels."""

    layer: Layer
    impl: str = "auto"
    dtype: Any = None  # None: that of the parameters

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layer, inputs = self.layer, x.shape[-1]
        taps = (4, 4) if layer.kind != "dense" else ()
        fan_in = math.prod(taps) * (layer.features if layer.kind == "transposed" else inputs)
        bound = init.uniform(1 / math.sqrt(fan_in))
        kernel = self.param("kernel", bound, (*taps, inputs, layer.features))
        bias = self.param("bias", bound, (layer.features,))
        if self.dtype is not None:
            x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return apply_layer(layer, x, kernel, impl=self.impl) + bias


def apply_layer(layer: Layer, x: Array, kernel: Array, *, impl: str = "auto") -> Array:
    """The layer without its bias."""
    if layer.kind == "dense":
        return x @ kernel
    apply = conv4_transposed if layer.kind == "transposed" else conv4
    return apply(x, kernel, padding=layer.padding, impl=lowering(impl))


def lowering(impl: str) -> str:
    """Resolves "auto" for `jaxad.ops.space_to_depth`: "mixed" where narrow and wide outputs want different forms."""
    narrow, wide = choose_impl(impl, 1), choose_impl(impl, 2**20)
    return wide if narrow == wide else "mixed"


class StridedAutoencoder(nn.Module):
    """Pictures (B, H, W, C) -> `Pass`. ReLU follows every layer but the last and those of mean and log variance."""

    encoder: Sequence[Layer]
    decoder: Sequence[Layer]
    is_variational: bool = False
    impl: str = "auto"
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array, *, shifts: Mapping[str, Array] | None = None, noise: Array | None = None) -> Pass:
        """Encodes and decodes.

        Args:
          x: (B, H, W, C) in [0, 1].
          shifts: added to the outputs of the layers named.
          noise: (B, L) normal numbers to draw latents with; None decodes their mean. Variational network only.
        """
        inputs, shapes, shifts = {}, {}, shifts or {}

        def run(layer: Layer, x: Array) -> Array:
            inputs[layer.name] = x
            y = Linear4(layer, impl=self.impl, dtype=self.dtype, name=layer.name)(x)
            shapes[layer.name] = y.shape
            return y + shifts[layer.name].astype(y.dtype) if layer.name in shifts else y

        for layer in self.encoder:
            x = jax.nn.relu(run(layer, x))
        mean, log_variance = x, None
        if self.is_variational:
            flat = x.reshape(x.shape[0], -1)
            dense = [Layer(name, "dense", flat.shape[1]) for name in ("mean", "log_variance", "code")]
            mean, log_variance = run(dense[0], flat), run(dense[1], flat)
            drawn = mean if noise is None else mean + jnp.exp(log_variance / 2) * noise
            x = jax.nn.relu(run(dense[2], drawn)).reshape(x.shape)
        for layer in self.decoder[:-1]:
            x = jax.nn.relu(run(layer, x))
        return Pass(run(self.decoder[-1], x), mean, log_variance, inputs, shapes)


def sizes(size: int, encoder: Sequence[Layer], decoder: Sequence[Layer]) -> list[int]:
    """Pixels a side of a square picture before the first layer and after each."""
    found = [size]
    for layer in (*encoder, *decoder):
        found.append((doubled if layer.kind == "transposed" else halved)(found[-1], layer.padding))
    return found
