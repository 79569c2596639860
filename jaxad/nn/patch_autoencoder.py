"""An autoencoder of square patches with one code vector each, for training from scratch within a few steps.

Many of them are trained side by side, each with weights of its own, so every layer is a matrix product under
`impl="gemm"`: vmapped over weights it stays one batched product, where a convolution would become a grouped one. The
layers around the code see the whole patch and are matrix products in any case.

Layouts: patches (B, P, P, C), kernels (taps, taps, C, O).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import correlate
from jaxad.nn.strided import lowering
from jaxad.ops.space_to_depth import conv4, conv4_transposed

_TAPS = {"same": (3, 3), "down": (4, 4), "up": (4, 4)}


class Layer(nn.Module):
    """A linear layer with bias, both drawn from U(+-1/sqrt(fan-in)) as in torch.

    `kind` is "same" (3x3), "down" (4x4, half the size), "up" (its transpose), "close" (a whole picture to one vector)
    or "open" (a vector to a picture of `size` pixels a side). With `is_transposed` the fan-in is taken from the
    outputs, as torch does of transposed convolutions. `is_normalised` says that batch normalisation follows: the bias
    then has no effect and a gradient of zero but for rounding, which Adam would enlarge; it is cut.
    """

    kind: str
    features: int
    size: int = 1
    is_transposed: bool = False
    is_normalised: bool = True
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.reshape(x.shape[0], -1) if self.kind == "close" else x
        taps, outputs = _TAPS.get(self.kind, ()), self.size**2 * self.features
        fan_in = math.prod(taps) * (outputs if self.is_transposed else x.shape[-1])
        draw = init.uniform(1 / math.sqrt(fan_in))
        kernel = self.param("kernel", draw, (*taps, x.shape[-1], outputs))
        bias = self.param("bias", draw, (self.features,))
        bias = jax.lax.stop_gradient(bias) if self.is_normalised else bias
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        if self.kind == "close":
            return x @ kernel + bias
        if self.kind == "open":
            return (x @ kernel).reshape(-1, self.size, self.size, self.features) + bias
        if self.kind == "same":
            return correlate(x, kernel, strides=(1, 1), padding=((1, 1), (1, 1)), impl=self.impl) + bias
        apply = conv4 if self.kind == "down" else conv4_transposed
        return apply(x, kernel, padding=1, impl=lowering(self.impl)) + bias


class PatchAutoencoder(nn.Module):
    """Patches (B, P, P, C) -> reconstructions of the same shape, float32.

    Stage i halves the size and has `features[i]` channels; then channels narrow to `features[0]`, and a dense layer
    makes the code. The decoder is the mirror image. Batch normalisation without scale and shift follows every layer but
    the code and the last; then a leaky unit of slope 0.2. With `skip` the last stage of the encoder is put beside what
    the decoder's first doubling reads. The statistics kept are those of the last batch: within a few steps weights move
    so much that a running mean belongs to no network.
    """

    features: Sequence[int]
    code: int
    skip: bool = False
    impl: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        channels, widths = x.shape[-1], tuple(self.features)
        options: dict[str, Any] = {"impl": self.impl, "dtype": self.dtype}
        steady: dict[str, Any] = {"use_scale": False, "use_bias": False, "dtype": jnp.float32}

        def activate(x: Array, name: str) -> Array:
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.0, name=name, **steady)
            return jax.nn.leaky_relu(norm(x), 0.2).astype(self.dtype)

        def layer(x: Array, kind: str, features: int, name: str, **more: Any) -> Array:
            return activate(Layer(kind, features, name=name, **more, **options)(x), f"{name}_norm")

        back: dict[str, Any] = {"is_transposed": True}
        deepest = x
        for i, width in enumerate(widths):
            x = deepest = layer(x, "down", width, f"down_{i}")
            if i + 1 < len(widths):
                x = layer(x, "same", width, f"keep_{i}")
        for i in reversed(range(len(widths) - 1)):
            x = layer(x, "same", widths[i], f"narrow_{i}")
        code = Layer("close", self.code, is_normalised=False, name="code", **options)(x)
        x = layer(code, "open", x.shape[-1], "open", size=x.shape[1], **back)
        for i in range(1, len(widths)):
            x = layer(x, "same", widths[i], f"widen_{i}", **back)
        x = jnp.concatenate([x, deepest], axis=-1) if self.skip else x
        for i in reversed(range(1, len(widths))):
            x = layer(x, "up", widths[i], f"up_{i}", **back)
            x = layer(x, "same", widths[i - 1], f"mirror_{i}", **back)
        last = Layer("up", channels, is_normalised=False, name="last", **back, **options)
        return last(x).astype(jnp.float32)
