"""A network for patches, evaluated at every position of a picture at once.

A patch network turns a patch of p x p pixels into one vector by convolutions and pooling without padding. Applied to
each patch of a picture in turn it computes most values many times over. Here one description of the network (`layers`)
is evaluated in three ways that give the same numbers:

  * "patch": patch by patch, as the network is meant; the slow truth.
  * "dilated": the whole picture at once. After pooling or striding by s, the values of one patch lie s pixels apart in
    the map of all patches, so what follows becomes a convolution with dilation s, and a pool with stride 1.
  * "phase": the same arithmetic, with the s x s interleaved grids of such a map side by side on the batch axis, where
    a dilated convolution is an ordinary one (Bailer et al., "Fast Dense Feature Extraction with CNNs that have Pooling
    or Striding Layers", BMVC 2017).

`out_stride` asks for every s-th patch only: an exact part of the whole map, of which nothing is computed in vain.

Layouts: images (B, H, W, C), kernels (taps, taps, C, O).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array
from jaxad.nn import init
from jaxad.nn.conv import choose_impl, correlate, target_platform

BACKENDS = ("auto", "phase", "dilated", "patch")
_PATCHES = 256  # that the backend "patch" sees at a time


def linear(x: Array) -> Array:
    """No activation."""
    return x


class Conv(NamedTuple):
    """A convolution with bias, without padding."""

    features: int
    taps: int  # a side
    stride: int = 1
    dilation: int = 1
    activation: Callable = linear


class Pool(NamedTuple):
    """The largest of taps x taps values, without padding."""

    taps: int = 2
    stride: int = 2
    dilation: int = 1


Layers = tuple[Conv | Pool, ...]


def field_of(layers: Layers) -> int:
    """Pixels a side that the output depends on; where sizes do not divide, fewer than the patch has."""
    field, spacing = 1, 1
    for layer in layers:
        field += (layer.taps - 1) * layer.dilation * spacing
        spacing *= layer.stride
    return field


def patches_along(size: int, *, patch: int, out_stride: int = 1) -> int:
    """Patches that fit along an axis of `size` pixels."""
    return (size - patch) // out_stride + 1


class _Step(NamedTuple):
    """A layer on the map of all patches."""

    layer: Conv | Pool
    dilation: int
    stride: int


def plan(layers: Layers, *, out_stride: int = 1) -> tuple[int, list[_Step]]:
    """How to evaluate a network at every `out_stride`-th patch.

    Layer by layer backwards, it notes at which offsets from a patch's corner values are needed. The map of a layer is
    kept on the coarsest grid that has all of them, for all corners.

    Returns:
      (grid of the picture, the steps).
    """
    spacing = [1]
    for layer in layers:
        spacing.append(spacing[-1] * layer.stride)
    offsets, grids = {0}, [out_stride]
    for layer, apart in zip(layers[::-1], spacing[-2::-1], strict=True):
        offsets = {o + t * apart * layer.dilation for o in offsets for t in range(layer.taps)}
        grids.append(math.gcd(out_stride, *offsets))
    grids.reverse()
    steps = []
    for layer, apart, before, after in zip(layers, spacing, grids, grids[1:], strict=False):
        dilation = apart * layer.dilation // before if layer.taps > 1 else 1
        steps.append(_Step(layer, dilation, after // before))
    return grids[0], steps


def evaluate(
    params: Sequence[Any],
    images: Array,
    layers: Layers,
    *,
    patch: int,
    out_stride: int = 1,
    backend: str = "auto",
    impl: str = "auto",
) -> Array:
    """The network's vector for each patch of pictures.

    Args:
      params: {"kernel", "bias"} of each convolution in order.
      images: (B, H, W, C), at least a patch large.
      layers: the network; it must reduce a patch to one value a channel.
      patch: p, pixels a side; only patches that lie in the picture count.
      out_stride: pixels between neighbouring patches.
      backend: one of `BACKENDS`; "auto" is the fast one here.
      impl: of convolutions, see `jaxad.nn.conv`; those with a dilation are always XLA's.

    Returns:
      (B, h, w, features): of the patch whose corner is at (i * out_stride, j * out_stride).

    Raises:
      ValueError: an unknown backend, a picture smaller than a patch, or a network that is larger than the patch or
        leaves more than one value of it.
    """
    _check(images.shape, layers, patch, out_stride, backend)
    counts = [patches_along(n, patch=patch, out_stride=out_stride) for n in images.shape[1:3]]
    if backend == "patch":
        return _patch_by_patch(params, images, layers, patch, out_stride, counts)
    impl = _impl(impl)
    backend = _fast_backend(impl) if backend == "auto" else backend
    field = field_of(layers)
    rows, columns = ((n - 1) * out_stride + field for n in counts)
    grid, steps = plan(layers, out_stride=out_stride)
    map_ = _Map(images[:, :rows:grid, :columns:grid])
    weights = iter(params)
    for step in steps:
        own = next(weights) if isinstance(step.layer, Conv) else None
        if step.layer.taps > 1 or step.stride > 1:
            map_ = map_.phases(step.dilation if backend == "phase" and step.stride == 1 else 1)
        map_ = map_.apply(step, own, impl)
    return map_.phases(1).values[:, : counts[0], : counts[1]]


def _fast_backend(impl: str) -> str:
    """Dilated convolutions, which copy nothing, save where matrix products shall be used or the target is a GPU.

    On CPU the two are equal within noise, forward and backward, at 1/2 of the width of networks for patches of 17, 33
    and 65 pixels (benchmarks/dense.py). For GPUs it is not measured: all of cuDNN's algorithms take plain convolutions.
    """
    return "phase" if impl == "gemm" or target_platform() == "gpu" else "dilated"


def _impl(impl: str) -> str:
    """XLA's gradient of the kernel is the fast one of channels as many as here: 1.2-1.8 times the products' speed."""
    chosen = choose_impl(impl, 0, mixed=True)
    return "conv" if impl == "auto" and chosen == "mixed" else chosen


def _check(shape: tuple[int, ...], layers: Layers, patch: int, out_stride: int, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; expected one of {BACKENDS}. Pass backend='auto'.")
    if min(shape[1:3]) < patch or out_stride < 1:
        raise ValueError(
            f"pictures of {shape[1]}x{shape[2]}, patches of {patch}x{patch} every {out_stride} pixels; expected "
            f"pictures no smaller than a patch and a step of at least 1. Pad the pictures to {patch}x{patch} or more."
        )
    left = patch
    for layer in layers:
        left = (left - (layer.taps - 1) * layer.dilation - 1) // layer.stride + 1
    if left != 1:
        raise ValueError(
            f"the network leaves {left} values a side of a patch of {patch}x{patch}; expected 1. It sees "
            f"{field_of(layers)}x{field_of(layers)} pixels: pass that as patch, or mend its layers."
        )


class _Map:
    """The values of a layer for all patches: `factor` x `factor` interleaved grids, one after another in the batch."""

    def __init__(self, values: Array, size: tuple[int, int] | None = None, factor: int = 1):
        self.values, self.factor = values, factor
        self.size: tuple[int, int] = size or values.shape[1:3]  # of the whole; the grids may have more, to be dropped

    def phases(self, factor: int) -> _Map:
        """The same map as another number of grids."""
        if factor == self.factor:
            return self
        whole = self._whole()
        return _Map(whole if factor == 1 else _split(whole, factor), self.size, factor)

    def _whole(self) -> Array:
        x, f = self.values, self.factor
        if f == 1:
            return x
        grids = x.reshape(f, f, -1, *x.shape[1:]).transpose(2, 3, 0, 4, 1, 5)
        joined = grids.reshape(grids.shape[0], grids.shape[1] * f, grids.shape[3] * f, -1)
        return joined[:, : self.size[0], : self.size[1]]

    def apply(self, step: _Step, own: Any, impl: str) -> _Map:
        """The map of the next layer."""
        reach = step.dilation * (step.layer.taps - 1)
        dilation = step.dilation // self.factor or 1
        if isinstance(step.layer, Pool):
            values = _largest(self.values, step.layer.taps, dilation, step.stride)
        else:
            values = _convolve(self.values, own["kernel"], dilation, step.stride, impl)
            values = step.layer.activation(values + own["bias"].astype(values.dtype))
        height, width = ((n - reach - 1) // step.stride + 1 for n in self.size)
        return _Map(values, (height, width), self.factor)


def _split(whole: Array, factor: int) -> Array:
    """Every factor-th row and column from each start: (factor * factor * B, h, w, C)."""
    batch, height, width, channels = whole.shape
    rows, columns = -(-height // factor), -(-width // factor)
    padding = ((0, 0), (0, rows * factor - height), (0, columns * factor - width), (0, 0))
    grids = jnp.pad(whole, padding).reshape(batch, rows, factor, columns, factor, channels)
    return grids.transpose(2, 4, 0, 1, 3, 5).reshape(-1, rows, columns, channels)


def _largest(x: Array, taps: int, dilation: int, stride: int) -> Array:
    """Pooling by slices, along one axis and then the other: a window with dilation has no gradient in jax."""
    for axis in (1, 2):
        count = (x.shape[axis] - dilation * (taps - 1) - 1) // stride + 1
        parts = []
        for tap in range(taps):
            first = tap * dilation
            parts.append(lax.slice_in_dim(x, first, first + (count - 1) * stride + 1, stride, axis))
        x = parts[0]
        for part in parts[1:]:
            x = jnp.maximum(x, part)
    return x


def _convolve(x: Array, kernel: Array, dilation: int, stride: int, impl: str) -> Array:
    """A convolution without padding."""
    kernel = kernel.astype(x.dtype)
    taps = kernel.shape[0]
    if taps == 1:
        return x[:, ::stride, ::stride] @ kernel[0, 0]
    if dilation == 1:
        return correlate(x, kernel, strides=(stride, stride), padding=((0, 0), (0, 0)), impl=impl)
    height, width = ((n - dilation * (taps - 1) - 1) // stride + 1 for n in x.shape[1:3])
    # Without any padding XLA-CPU takes a path 3-4 times slower; so pad by one and drop what that adds.
    padding = ((0, 0), (0, 1 if target_platform() == "cpu" else 0))
    numbers = ("NHWC", "HWIO", "NHWC")
    out = lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, rhs_dilation=(dilation, dilation), dimension_numbers=numbers
    )
    return out[:, :height, :width]


def _patch_by_patch(params, images, layers, patch, out_stride, counts) -> Array:
    """Cuts out every patch and gives it to the network as it is described, some at a time."""
    batch, _, _, channels = images.shape
    height, width = counts

    def network(corners):
        def cut(corner):
            start = (corner[0], corner[1] * out_stride, corner[2] * out_stride, 0)
            return lax.dynamic_slice(images, start, (1, patch, patch, channels))[0]

        x, weights = jax.vmap(cut)(corners), iter(params)
        for layer in layers:
            if isinstance(layer, Pool):
                x = _largest(x, layer.taps, layer.dilation, layer.stride)
                continue
            own = next(weights)
            x = _plain(x, own["kernel"].astype(x.dtype), layer) + own["bias"].astype(x.dtype)
            x = layer.activation(x)
        return x[:, 0, 0]

    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, (batch, height, width)), indexing="ij"), axis=-1).reshape(-1, 3)
    found = lax.map(network, jnp.pad(grid, ((0, -len(grid) % _PATCHES), (0, 0))).reshape(-1, _PATCHES, 3))
    return found.reshape(-1, found.shape[-1])[: len(grid)].reshape(batch, height, width, -1)


def _plain(x: Array, kernel: Array, layer: Conv) -> Array:
    numbers = ("NHWC", "HWIO", "NHWC")
    strides, dilation = (layer.stride,) * 2, (layer.dilation,) * 2
    return lax.conv_general_dilated(x, kernel, strides, "VALID", rhs_dilation=dilation, dimension_numbers=numbers)


class _Weights(nn.Module):
    """Kernel and bias of a convolution, drawn from U(+-1/sqrt(fan_in)), torch's default."""

    layer: Conv

    @nn.compact
    def __call__(self, channels: int) -> dict[str, Array]:
        taps, features = self.layer.taps, self.layer.features
        draw = init.uniform(1 / math.sqrt(taps**2 * channels))
        kernel = self.param("kernel", draw, (taps, taps, channels, features))
        return {"kernel": kernel, "bias": self.param("bias", draw, (features,))}


class PatchNetwork(nn.Module):
    """A patch network that owns its weights: images (B, H, W, C) -> vectors of their patches, see `evaluate`."""

    layers: Layers
    patch: int
    impl: str = "auto"

    @nn.compact
    def __call__(self, images: Array, *, out_stride: int = 1, backend: str = "auto") -> Array:
        params: list[Any] = []
        channels = images.shape[-1]
        for layer in self.layers:
            if isinstance(layer, Conv):
                params.append(_Weights(layer, name=f"conv{len(params) + 1}")(channels))
                channels = layer.features
        where: dict[str, Any] = {"patch": self.patch, "out_stride": out_stride, "backend": backend, "impl": self.impl}
        return evaluate(params, images, self.layers, **where)
