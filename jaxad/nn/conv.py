"""Convolutions, and the Linen layers that own their kernels.

Three operations make up the training of a convolution: `correlate`, its transpose (`correlate_transposed`, also the
gradient of the image), and the gradient of the kernel. Each has several lowerings, XLA's convolution and matrix
products; `impl` names a choice for the three, `choose_impl` makes it:

  * "conv": XLA's convolution throughout, with XLA's gradients. What accelerators want.
  * "mixed": XLA's convolution for images, products for the gradient of the kernel. What XLA-CPU wants of a program that
    is one training step: its convolution of images is as fast as oneDNN's, strided and dilated too, its gradient of the
    kernel 1.5-2x slower.
  * "gemm": products throughout. What XLA-CPU wants inside loops, where its convolution is 24-57x slower than outside,
    and of kernels that are vmapped over members, a grouped convolution there.
  * "winograd": products throughout, and 25 of them for 36 where windows are 3x3 with stride 2 (`jaxad.ops.winograd`).
    What XLA-CPU wants of such layers wherever they are, unless they have few channels.

`benchmarks/conv.py` measures them and the forms that lost. Layouts: images (B, *spatial, C), kernels (*taps, C, O); any
number of spatial axes.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array
from jaxad.cores import usable_cores
from jaxad.nn import init
from jaxad.ops import winograd
from jaxad.ops.blocks import devices_of_rows
from jaxad.ops.contract import contract_rows

IMPLS = ("auto", "conv", "mixed", "gemm", "winograd")
_NARROW = 32  # outputs (phases x channels) under which a GEMM of windows loses to XLA-CPU's convolution
_MIN_COLUMNS = 32  # a product of fewer columns does not pay for its reading
_FOLDED_CHANNELS, _FOLDED_OUTPUTS = 128, 48  # inputs x outputs, and outputs, up to which XLA-CPU likes pixels folded
_PAIRED_CHANNELS = 256  # inputs x outputs up to which a product of windows had better make two outputs at a time
_NARROWING = 4  # times fewer outputs than inputs, from which on multiplying first and adding windows copies less
_JOINED_COLUMNS = 256  # a product of more columns gains nothing from being joined with another
_WINOGRAD_CHANNELS, _WINOGRAD_KERNELS = 32, 64  # from which on fewer products outweigh their sums; of kernel gradients
# Of a picture and a tap, from which on Winograd's form is chosen: with 2**20 it also made layers a quarter of that size
# faster, but a step of three such layers took 13 s longer to compile and 2 s to load from the cache.
_WINOGRAD_PRODUCTS = 2**22


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
    inside the function that is traced: a program that jit has cached is not traced again. Adds to what is said around.

    Args:
      platform: "cpu", "gpu" or "tpu"; None: as around it, else the default backend. Needed where one compiles for a
        device that is not here.
      members: the kernels are vmapped over the members of a sweep.
      looped: the step is the body of a `scan`, `while_loop` or `map`.
    """
    around = _target.get()
    token = _target.set(_Target(platform or around.platform, members or around.members, looped or around.looped))
    try:
        yield
    finally:
        _target.reset(token)


def target_platform() -> str:
    """What `lowering_for` says that is traced for: "cpu", "gpu" or "tpu"."""
    return _target.get().platform or jax.default_backend()


def choose_impl(impl: str, outputs: int, *, mixed: bool = False) -> str:
    """Resolves "auto" at trace time, by the target that `lowering_for` names; the one place where this is decided.

    Args:
      impl: "auto" or another of `IMPLS`.
      outputs: output channels, with those of all phases of a transposed convolution.
      mixed: whether the caller has the forms "mixed" and "winograd".

    Returns:
      "conv", "gemm" or, if there is one, "mixed"; "winograd" only if that is `impl`.

    Raises:
      ValueError: an unknown name.
    """
    if impl not in IMPLS:
        raise ValueError(f"conv_impl={impl!r} is unknown; expected one of {IMPLS}. Pass conv_impl='auto'.")
    if impl != "auto":
        return impl if mixed else {"mixed": "conv", "winograd": "gemm"}.get(impl, impl)
    target = _target.get()
    if target_platform() != "cpu":
        return "conv"
    if target.members or target.looped:
        return "gemm"
    if mixed:
        return "mixed"
    return "gemm" if outputs >= _NARROW else "conv"


def _choose(impl: str, kernel: Array, window: _Window, *, phases: int = 1) -> str:
    """`choose_impl` of a convolution whose geometry is known."""
    chosen = choose_impl(impl, phases * kernel.shape[-1], mixed=True)
    fits = window.taps == (3, 3) and window.strides == (2, 2)
    if impl == "winograd" and not fits:
        return "gemm"
    inputs, outputs = kernel.shape[-2:]
    pays = (
        kernel.dtype == jnp.float32
        and min(inputs, outputs) >= _WINOGRAD_CHANNELS
        and math.prod(window.counts) * inputs * outputs >= _WINOGRAD_PRODUCTS
    )
    return "winograd" if impl == "auto" and chosen != "conv" and fits and pays else chosen


class _Window(NamedTuple):
    """How windows lie on the larger image of a convolution and its transpose."""

    size: tuple[int, ...]  # of the larger image, per spatial axis
    taps: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows per axis: the size of the smaller image."""
        axes = zip(self.size, self.taps, self.strides, self.padding, strict=True)
        return tuple((n + sum(padding) - t) // s + 1 for n, t, s, padding in axes)

    @property
    def before(self) -> tuple[int, ...]:
        """Zeros before the larger image per axis."""
        return tuple(before for before, _ in self.padding)


def correlate(
    image: Array, kernel: Array, *, strides: Sequence[int], padding: Sequence[tuple[int, int]], impl: str = "conv"
) -> Array:
    """Cross-correlation, what neural networks call convolution.

    Forms other than "conv" have their own gradient: reverse mode of any order, no forward mode.

    Args:
      image: (B, *spatial, C).
      kernel: (*taps, C, O).
      strides, padding: per spatial axis; padding is (before, after), of zeros.
      impl: one of `IMPLS`.

    Returns:
      (B, *outputs, O).
    """
    window = _Window(image.shape[1:-1], kernel.shape[:-2], tuple(strides), tuple((a, b) for a, b in padding))
    impl = _choose(impl, kernel, window)
    return _convolve(image, kernel, window) if impl == "conv" else _correlate(image, kernel, window, impl)


def correlate_transposed(
    image: Array, kernel: Array, *, strides: Sequence[int], output_padding: Sequence[int], impl: str = "conv"
) -> Array:
    """Transposed convolution with padding 1 per axis.

    Equals the correlation of `kernel` with the image dilated by `strides` and padded so that it transposes a
    convolution of padding 1; torch's ConvTranspose holds the same kernel spatially flipped. Forms other than "conv"
    have their own gradient: reverse mode of any order, no forward mode.

    Args:
      image: (B, *spatial, C).
      kernel: (*taps, C, O).
      strides: per axis.
      output_padding: below the stride, per axis; an axis of n gives (n - 1) * stride + taps - 2 + output_padding.
      impl: one of `IMPLS`.

    Returns:
      (B, *outputs, O).
    """
    taps, axes = kernel.shape[:-2], zip(image.shape[1:-1], kernel.shape[:-2], strides, output_padding, strict=True)
    size = tuple((n - 1) * s + t - 2 + extra for n, t, s, extra in axes)
    window = _Window(size, taps, tuple(strides), ((1, 1),) * len(taps))
    flipped = jnp.flip(kernel, range(len(taps))).swapaxes(-1, -2)  # the kernel of the convolution that this transposes
    impl = _choose(impl, kernel, window, phases=math.prod(strides))
    return _spread(image, flipped, window) if impl == "conv" else _transpose(image, flipped, window, impl)


# --- the three operations, each the gradient of the others --------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _correlate(image: Array, kernel: Array, window: _Window, impl: str) -> Array:
    if impl == "winograd":
        return winograd.correlate(image, kernel, before=window.before, counts=window.counts)
    return _convolve(image, kernel, window) if impl == "mixed" else _by_products(image, kernel, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _transpose(image: Array, kernel: Array, window: _Window, impl: str) -> Array:
    if impl == "winograd":
        return winograd.transpose(image, kernel, before=window.before, size=window.size)
    return _spread(image, kernel, window) if impl == "mixed" else _spread_by_products(image, kernel, window)


def _correlate_forward(image, kernel, window, impl):
    return _correlate(image, kernel, window, impl), (image, kernel)


def _correlate_backward(window, impl, saved, grad):
    image, kernel = saved
    return _transpose(grad, kernel, window, impl), _kernel_gradient(image, grad, window, impl).astype(kernel.dtype)


def _transpose_forward(image, kernel, window, impl):
    return _transpose(image, kernel, window, impl), (image, kernel)


def _transpose_backward(window, impl, saved, grad):
    image, kernel = saved
    return _correlate(grad, kernel, window, impl), _kernel_gradient(grad, image, window, impl).astype(kernel.dtype)


_correlate.defvjp(_correlate_forward, _correlate_backward)
_transpose.defvjp(_transpose_forward, _transpose_backward)


def _kernel_gradient(large: Array, small: Array, window: _Window, impl: str) -> Array:
    """The sum over windows of (values in the window) x (value of the smaller image): (*taps, C, O) float32.

    Args:
      large: (B, *size, C).
      small: (B, *counts, O).
    """
    if impl == "winograd" and min(large.shape[-1], small.shape[-1]) >= _WINOGRAD_KERNELS:
        return winograd.kernel_gradient(large, small, before=window.before)
    return _by_taps(large, small, window)


def _row_groups() -> int:
    """Products that the rows of a kernel's gradient are shared among: one for each core, unless members or devices
    share the cores already."""
    shared = target_platform() != "cpu" or _target.get().members or devices_of_rows() > 1
    return 1 if shared else usable_cores()


def _by_taps(large: Array, small: Array, window: _Window) -> Array:
    """The gradient of the kernel by products of one or more taps each.

    Windows are gathered along the inner axes only, as many as it takes to fill a product. Along an outer axis of
    stride s the rows are split into s phases, and a tap meets one of the phases with the smaller image shifted: the
    products read both images little more than once, where gathering whole windows would copy the larger one taps / s
    times an axis. Three taps and more that meet the same phase share products of up to `_JOINED_COLUMNS` columns.
    """
    rank, channels = len(window.taps), large.shape[-1]
    outer = rank - 1
    while outer and math.prod(window.taps[outer:]) * channels < _MIN_COLUMNS:
        outer -= 1
    strides, counts = window.strides[:outer], window.counts[:outer]
    split, blocks = large, []
    for axis, stride in enumerate(strides):
        split = _split(split, 1 + 2 * axis, stride)
        blocks.append(split.shape[1 + 2 * axis])
    products: dict[tuple[int, ...], Array] = {}
    for phase, shifts in _taps_by_phase(window, outer).items():
        part = split[(slice(None), *itertools.chain(*((slice(None), p) for p in phase)))]
        seen = _runs(part, window) if outer == rank - 1 else _inner_columns(part, window, outer)
        taps = list(shifts)
        together = max(1, _JOINED_COLUMNS // small.shape[-1]) if len(taps) > 2 else 1
        for some in (taps[i : i + together] for i in range(0, len(taps), together)):
            edges = [[(at, b - n - at) for at, b, n in zip(shifts[tap], blocks, counts, strict=True)] for tap in some]
            shifted = jnp.concatenate([_pad(small, e) for e in edges], axis=-1)
            product = contract_rows(seen, shifted, groups=_row_groups())
            products |= zip(some, jnp.moveaxis(product.reshape(-1, len(some), small.shape[-1]), 1, 0), strict=True)
    return jnp.stack([products[tap] for tap in sorted(products)]).reshape(*window.taps, channels, small.shape[-1])


def _taps_by_phase(window: _Window, outer: int) -> dict[tuple[int, ...], dict[tuple[int, ...], tuple[int, ...]]]:
    """The taps along the first `outer` axes by the phase of the larger image that they meet: {phase: {tap: shifts of
    the smaller image}}."""
    found: dict[tuple[int, ...], dict[tuple[int, ...], tuple[int, ...]]] = {}
    for tap in itertools.product(*map(range, window.taps[:outer])):
        places = [divmod(t - before, s) for t, s, (before, _) in zip(tap, window.strides, window.padding, strict=False)]
        found.setdefault(tuple(p for _, p in places), {})[tap] = tuple(shift for shift, _ in places)
    return found


def _runs(part: Array, window: _Window) -> Array:
    """Windows along the last axis, of parts that lie together in memory: (..., counts, taps x C).

    A window is cut where the blocks of `stride` pixels end; every piece is then one slice of all blocks.
    """
    taps, stride, before, count = window.taps[-1], window.strides[-1], window.padding[-1][0], window.counts[-1]
    channels, around = part.shape[-1], [(0, 0)] * (part.ndim - 3)
    whole = _split(part, part.ndim - 2, stride)
    blocks = whole.shape[-3]
    whole = whole.reshape(*whole.shape[:-2], stride * channels)
    pieces, at = [], -before
    while at < taps - before:
        shift, first = divmod(at, stride)
        end = min(stride, first + taps - before - at)
        piece = whole[..., first * channels : end * channels]
        pieces.append(_pad(piece, [*around, (-shift, count - blocks + shift)]))
        at += end - first
    return jnp.concatenate(pieces, axis=-1)


def _split(image: Array, axis: int, stride: int) -> Array:
    """Splits an axis into (blocks, stride), filled up with zeros at its end."""
    blocks = -(-image.shape[axis] // stride)
    filled = _pad(image, [(0, 0)] * (axis - 1) + [(0, blocks * stride - image.shape[axis])])
    return filled.reshape(*image.shape[:axis], blocks, stride, *image.shape[axis + 1 :])


def _inner_columns(part: Array, window: _Window, first: int) -> Array:
    return _columns(_pad(part, [(0, 0)] * first + list(window.padding[first:])), window, first)


# --- by XLA's convolution -----------------------------------------------------------------------------------------


def _convolve(image: Array, kernel: Array, window: _Window) -> Array:
    fold = _fold(kernel.shape, window)
    if fold > 1:
        return _convolve_folded(image, kernel, window, fold)
    return _xla(image, kernel, window.strides, window.padding, last=window.counts[-1])


def _xla(image: Array, kernel: Array, strides, padding, *, last: int, dilation: Sequence[int] | None = None) -> Array:
    """XLA's convolution; `last` is the outputs along the last axis."""
    if target_platform() == "cpu" and not any(map(any, padding)) and math.prod(kernel.shape[:-2]) > 1:
        # Without any padding XLA-CPU takes a path 3-5 times slower; so pad by one and drop what that adds.
        padding = [*padding[:-1], (0, 1)]
    numbers = _dimension_numbers(len(padding))
    out = lax.conv_general_dilated(image, kernel, strides, padding, lhs_dilation=dilation, dimension_numbers=numbers)
    return out[..., :last, :]


def _fold(shape: Sequence[int], window: _Window) -> int:
    """Neighbouring outputs along the last axis that XLA-CPU better computes as channels: 1 where it does not pay.

    Its convolution of few channels to few is up to 6 times slower than that to more channels, which costs 1.2 to 1.7
    times the arithmetic.
    """
    channels, outputs = shape[-2:]
    if target_platform() != "cpu" or window.strides[-1] > 1 or shape[-3] == 1:
        return 1
    if channels * outputs > _FOLDED_CHANNELS or outputs > _FOLDED_OUTPUTS:
        return 1
    return 4 if outputs <= 8 else 2


def _convolve_folded(image: Array, kernel: Array, window: _Window, fold: int) -> Array:
    """`_convolve` of an image whose last axis is (blocks, `fold`), the latter among its channels."""
    taps, count, (before, _) = window.taps[-1], window.counts[-1], window.padding[-1]
    blocks, reach = -(-count // fold), -(-(taps - 1 + fold) // fold)  # of the outputs; of a block's taps
    pixels = (blocks + reach - 1) * fold
    edges = [(0, 0)] * (len(window.taps) - 1) + [(before, pixels - before - image.shape[-2])]
    folded = _pad(image, edges).reshape(*image.shape[:-2], -1, fold * image.shape[-1])
    shifted = [_pad(kernel[None], [*edges[:-1], (at, reach * fold - taps - at)])[0] for at in range(fold)]
    wide = jnp.stack(shifted, axis=-2).reshape(*kernel.shape[:-3], reach, fold * kernel.shape[-2], -1)
    out = _xla(folded, wide, window.strides, (*window.padding[:-1], (0, 0)), last=blocks)
    return out.reshape(*out.shape[:-2], blocks * fold, kernel.shape[-1])[..., :count, :]


def _spread(image: Array, kernel: Array, window: _Window) -> Array:
    """The transpose of `_convolve` in the image: a convolution of the image dilated by the strides."""
    padding = []
    for size, count, taps, stride, (before, _) in zip(window.size, window.counts, *window[1:], strict=True):
        start = taps - 1 - before
        padding.append((start, size + taps - 1 - ((count - 1) * stride + 1) - start))
    flipped = jnp.flip(kernel, range(len(padding))).swapaxes(-1, -2)
    return _xla(image, flipped, (1,) * len(padding), padding, last=window.size[-1], dilation=window.strides)


def _dimension_numbers(rank: int) -> tuple[str, str, str]:
    axes = "DHW"[-rank:]
    return f"N{axes}C", f"{axes}IO", f"N{axes}C"


# --- by matrix products -------------------------------------------------------------------------------------------


def _pad(image: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """Pads the first spatial axes with zeros; negative numbers cut."""
    edges = [(0, 0, 0), *((*ends, 0) for ends in padding)]
    return lax.pad(image, jnp.zeros((), image.dtype), edges + [(0, 0, 0)] * (image.ndim - len(edges)))


def _columns(padded: Array, window: _Window, first: int) -> Array:
    """Windows along the spatial axes from `first` on: (..., *counts of these axes, their taps x C)."""
    taps, strides, counts = window.taps[first:], window.strides[first:], window.counts[first:]
    parts = []
    for offset in itertools.product(*map(range, taps)):
        ends = (o + (n - 1) * s + 1 for o, n, s in zip(offset, counts, strides, strict=True))
        cuts = (slice(o, end, s) for o, end, s in zip(offset, ends, strides, strict=True))
        parts.append(padded[(slice(None),) * (1 + first) + tuple(cuts)])
    return jnp.concatenate(parts, axis=-1)


def _by_products(image: Array, kernel: Array, window: _Window) -> Array:
    """A correlation in whichever of three forms copies least on CPU; elsewhere that is not measured."""
    if target_platform() != "cpu":
        return _multiply_columns(image, kernel, window)
    inputs, outputs = kernel.shape[-2:]
    if inputs >= _NARROWING * outputs and all(stride == 1 for stride in window.strides):
        return _overlap_add(image, *_turn(kernel, window))
    multiply = _multiply_pairs if _pairs_pay(kernel.shape, window) else _multiply_columns
    return multiply(image, kernel, window)


def _spread_by_products(image: Array, kernel: Array, window: _Window) -> Array:
    """The transpose of `_by_products` in the image. At stride 1 it is a correlation itself."""
    if target_platform() == "cpu" and all(stride == 1 for stride in window.strides):
        return _by_products(image, *_turn(kernel, window))
    return _overlap_add(image, kernel, window)


def _turn(kernel: Array, window: _Window) -> tuple[Array, _Window]:
    """The kernel and windows of the correlation of stride 1 that transposes one of stride 1."""
    axes = zip(window.size, window.counts, window.taps, window.padding, strict=True)
    padding = tuple((taps - 1 - before, size - count + before) for size, count, taps, (before, _) in axes)
    turned = jnp.flip(kernel, range(len(padding))).swapaxes(-1, -2)
    return turned, window._replace(size=window.counts, padding=padding)


def _multiply_columns(image: Array, kernel: Array, window: _Window) -> Array:
    columns = _columns(_pad(image, window.padding), window, 0)
    return columns @ kernel.reshape(-1, kernel.shape[-1])


def _pairs_pay(shape: Sequence[int], window: _Window) -> bool:
    """Whether neighbouring outputs along the last axis had better share their columns."""
    taps, stride, count = window.taps[-1], window.strides[-1], window.counts[-1]
    return taps == 3 and stride == 1 and count % 2 == 0 and count >= 8 and math.prod(shape[-2:]) <= _PAIRED_CHANNELS


def _multiply_pairs(image: Array, kernel: Array, window: _Window) -> Array:
    """`_multiply_columns`, two outputs along the last axis at a time, which share two of their three taps: for a third
    more arithmetic two thirds of the columns, whose copying takes the time where channels are few."""
    (before, _), (inputs, outputs), count = window.padding[-1], kernel.shape[-2:], window.counts[-1]
    blocks = count // 2 + 1  # of two pixels; a pair of outputs sees two of them
    padded = _pad(image, [*window.padding[:-1], (before, 2 * blocks - before - image.shape[-2])])
    padded = padded.reshape(*padded.shape[:-2], blocks, 2 * inputs)
    size, taps = (*window.size[:-1], blocks), (*window.taps[:-1], 2)
    columns = _columns(padded, _Window(size, taps, window.strides, (*window.padding[:-1], (0, 0))), 0)
    around = [(0, 0)] * (kernel.ndim - 3)
    shifted = [jnp.pad(kernel, [*around, (at, 1 - at), (0, 0), (0, 0)]) for at in (0, 1)]
    out = columns @ jnp.stack(shifted, axis=-2).reshape(-1, 2 * outputs)
    return out.reshape(*out.shape[:-2], count, outputs)


def _overlap_add(image: Array, kernel: Array, window: _Window) -> Array:
    """The transpose of `_multiply_columns` in the image: one product gives every value of every window, then windows
    are added where they overlap, axis by axis."""
    rank = len(window.taps)
    values = image @ kernel.reshape(-1, kernel.shape[-1]).T
    values = values.reshape(*image.shape[:-1], *kernel.shape[:-1])
    for axis, (size, taps, stride, (before, _)) in enumerate(zip(*window, strict=True)):
        at, shift = 1 + axis, (taps - 1) // stride
        by_tap = jnp.moveaxis(values, 1 + rank, 0)  # the first tap axis left
        phases = [jnp.zeros((), values.dtype)] * stride
        for tap in range(taps):
            edges = [(0, 0, 0)] * (by_tap.ndim - 1)
            edges[at] = (tap // stride, shift - tap // stride, 0)
            phases[tap % stride] += lax.pad(by_tap[tap], jnp.zeros((), values.dtype), edges)
        shape = by_tap.shape[1 : 1 + at] + ((by_tap.shape[1 + at] + shift) * stride,) + by_tap.shape[2 + at :]
        whole = jnp.stack(jnp.broadcast_arrays(*phases), axis=at + 1).reshape(shape)
        edges = [(0, 0, 0)] * whole.ndim
        edges[at] = (-before, size + before - shape[at], 0)
        values = lax.pad(whole, jnp.zeros((), values.dtype), edges)
    return values


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
