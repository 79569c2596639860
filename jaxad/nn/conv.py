"""Convolutions with one or two lowerings each, and the Linen layers that own their kernels.

`impl="conv"` is XLA's convolution, `impl="gemm"` gathers shifted windows and multiplies matrices. Measured on XLA-CPU
(jax 0.10.2, 2 cores, forward and backward, 3x3, stride 2):
  * XLA's gradient of a transposed convolution (`lhs_dilation`) is 2-20x slower than the sub-pixel form used here, in
    which every output phase is its own set of taps and a depth-to-space puts the phases in place.
  * Called step by step, GEMM is up to 1.5x faster for wide outputs and up to 3x slower for narrow ones.
  * Inside `scan` XLA's convolution is 24-57x slower than outside, and with vmapped kernels (4 members, a grouped
    convolution) 7-12x slower than GEMM, which does not mind either: on CPU, vmapped or scanned runs want "gemm".
Layouts: images (B, *spatial, C), kernels (*taps, C, O); any number of spatial axes.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array
from jaxad.nn import init

IMPLS = ("auto", "conv", "gemm")
_NARROW = 32  # outputs (phases x channels) under which a GEMM of windows loses to XLA-CPU's convolution


class _Target(NamedTuple):
    platform: str | None = None
    members: bool = False
    looped: bool = False


_HERE = _Target()
_target: contextvars.ContextVar[_Target] = contextvars.ContextVar("jaxad_conv_target", default=_HERE)


@contextlib.contextmanager
def lowering_for(*, platform: str | None = None, members: bool = False, looped: bool = False) -> Iterator[None]:
    """Says what a program is traced for; "auto" chooses accordingly.

    It is read while tracing, so put it around the tracing (`jit(...).lower(...)`, the first call, `jax.export`), best
    inside the function that is traced: a program that jit has cached is not traced again. The innermost one counts.

    Args:
      platform: "cpu", "gpu" or "tpu"; None: the default backend. Needed where one compiles for a device that is not
        here.
      members: the kernels are vmapped over the members of a sweep.
      looped: the step is the body of a `scan`, `while_loop` or `map`.
    """
    token = _target.set(_Target(platform, members, looped))
    try:
        yield
    finally:
        _target.reset(token)


def choose_impl(impl: str, outputs: int) -> str:
    """Resolves "auto" at trace time, by the target that `lowering_for` names; the one place where this is decided.

    Args:
      impl: "auto", "conv" or "gemm".
      outputs: output channels, with those of all phases of a transposed convolution.

    Returns:
      "conv" or "gemm".

    Raises:
      ValueError: an unknown name.
    """
    if impl not in IMPLS:
        raise ValueError(f"conv_impl={impl!r} is unknown; expected one of {IMPLS}. Pass conv_impl='auto'.")
    if impl != "auto":
        return impl
    target = _target.get()
    if (target.platform or jax.default_backend()) != "cpu":
        return "conv"
    return "gemm" if target.members or target.looped or outputs >= _NARROW else "conv"


def correlate(
    image: Array, kernel: Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], impl: str = "conv"
) -> Array:
    """Cross-correlation, what neural networks call convolution.

    Args:
      image: (B, *spatial, C).
      kernel: (*taps, C, O).
      strides, padding: per spatial axis; padding is (before, after), of zeros.
      impl: "conv", "gemm" or "auto".

    Returns:
      (B, *outputs, O).
    """
    if choose_impl(impl, kernel.shape[-1]) == "conv":
        axes = "DHW"[-len(strides) :]
        numbers = (f"N{axes}C", f"{axes}IO", f"N{axes}C")
        return lax.conv_general_dilated(image, kernel, tuple(strides), tuple(padding), dimension_numbers=numbers)
    padded = jnp.pad(image, ((0, 0), *padding, (0, 0)))
    taps = kernel.shape[:-2]
    sizes = [(n - t) // s + 1 for n, t, s in zip(padded.shape[1:-1], taps, strides, strict=True)]
    windows = [
        padded[
            (slice(None), *(slice(o, o + (n - 1) * s + 1, s) for o, n, s in zip(offset, sizes, strides, strict=True)))
        ]
        for offset in itertools.product(*map(range, taps))
    ]
    columns = jnp.concatenate(windows, axis=-1).reshape(-1, math.prod(taps) * image.shape[-1])
    return (columns @ kernel.reshape(-1, kernel.shape[-1])).reshape(image.shape[0], *sizes, kernel.shape[-1])


def _phase_taps(stride: int) -> np.ndarray:
    """Which tap of a 3-tap kernel meets which input neighbour, per output phase: (phases, neighbours, taps) 0/1."""
    if stride == 1:
        return np.eye(3, dtype=np.float32)[None]
    table = np.zeros((2, 2, 3), np.float32)
    table[0, 0, 1] = table[1, 0, 0] = table[1, 1, 2] = 1  # even outputs see the centre tap, odd ones both neighbours
    return table


def correlate_transposed(
    image: Array, kernel: Array, *, strides: Sequence[int], output_padding: Sequence[int], impl: str = "conv"
) -> Array:
    """Transposed convolution with 3 taps and padding 1 per axis, in sub-pixel form.

    Equals the correlation of `kernel` with the image dilated by `strides` and padded (1, 1 + output_padding); torch's
    ConvTranspose holds the same kernel spatially flipped.

    Args:
      image: (B, *spatial, C).
      kernel: (3, ..., 3, C, O).
      strides: 1 or 2 per axis.
      output_padding: 0 or 1 per axis; an axis of n gives (n - 1) * stride + 1 + output_padding.
      impl: "conv", "gemm" or "auto".

    Returns:
      (B, *outputs, O).
    """
    rank, features = len(strides), kernel.shape[-1]
    tables = [_phase_taps(s) for s in strides]
    phases = [t.shape[0] for t in tables]
    # kernel'[neighbours..., C, phases..., O] = sum over taps of the tables times the kernel
    letters = [("abc"[i], "def"[i], "ghi"[i]) for i in range(rank)]
    terms = ["".join(ls) for ls in letters] + ["".join(ls[2] for ls in letters) + "xy"]
    result = "".join(ls[1] for ls in letters) + "x" + "".join(ls[0] for ls in letters) + "y"
    small = jnp.einsum(f"{','.join(terms)}->{result}", *(jnp.asarray(t, kernel.dtype) for t in tables), kernel)
    small = small.reshape(*(t.shape[1] for t in tables), kernel.shape[-2], math.prod(phases) * features)
    padding = [(1, 1) if s == 1 else (0, 1) for s in strides]
    outputs = correlate(image, small, strides=[1] * rank, padding=padding, impl=impl)
    spatial = image.shape[1:-1]
    split = outputs.reshape(image.shape[0], *spatial, *phases, features)
    order = [0, *itertools.chain(*((1 + i, 1 + rank + i) for i in range(rank))), 1 + 2 * rank]
    whole = [n * p for n, p in zip(spatial, phases, strict=True)]
    full = split.transpose(order).reshape(image.shape[0], *whole, features)
    ends = [(n - 1) * s + 1 + o for n, s, o in zip(spatial, strides, output_padding, strict=True)]
    return full[(slice(None), *(slice(0, end) for end in ends))]


def _kernel_init(std: float | None, bound: float) -> Callable:
    return init.uniform(bound) if std is None else init.normal(std)


class Conv(nn.Module):
    """A convolution with bias; kernel drawn from N(0, kernel_std**2), bias from U(+-1/sqrt(fan_in)).

    `kernel_std=None` draws the kernel like the bias, torch's default.

    `normalised` says that batch normalisation follows: the bias then has no effect and a true gradient of zero, which
    Adam would turn from rounding noise into steps of the size of the learning rate; so it is cut.
    """

    features: int
    taps: Sequence[int]
    strides: Sequence[int]
    padding: Sequence[int]
    kernel_std: float | None = 0.02
    impl: str = "auto"
    normalised: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array) -> Array:
        shape = (*self.taps, image.shape[-1], self.features)
        bound = 1 / math.sqrt(math.prod(shape[:-1]))
        kernel = self.param("kernel", _kernel_init(self.kernel_std, bound), shape)
        bias = self.param("bias", init.uniform(bound), (self.features,))
        bias = lax.stop_gradient(bias) if self.normalised else bias
        image, kernel = image.astype(self.dtype), kernel.astype(self.dtype)
        padding = [(p, p) for p in self.padding]
        return correlate(image, kernel, strides=self.strides, padding=padding, impl=self.impl) + bias.astype(self.dtype)


class ConvTranspose(nn.Module):
    """A transposed convolution with bias, 3 taps, padding 1; initialised like `Conv`, with torch's fan-in."""

    features: int
    strides: Sequence[int]
    output_padding: Sequence[int]
    kernel_std: float | None = 0.02
    impl: str = "auto"
    normalised: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: Array) -> Array:
        rank = len(self.strides)
        bound = 1 / math.sqrt(3**rank * self.features)  # torch takes a transposed kernel's fan-in from its outputs
        shape = (3,) * rank + (image.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init(self.kernel_std, bound), shape)
        bias = self.param("bias", init.uniform(bound), (self.features,))
        bias = lax.stop_gradient(bias) if self.normalised else bias
        image, kernel = image.astype(self.dtype), kernel.astype(self.dtype)
        outputs = correlate_transposed(
            image, kernel, strides=self.strides, output_padding=self.output_padding, impl=self.impl
        )
        return outputs + bias.astype(self.dtype)
