"""Convolutions over label maps: a label picks a row of the kernel, so that nothing is multiplied by zeros.

A convolution over one-hot maps with L channels is, at each pixel, the sum over the window's taps of the kernel's row
for the label there. Labels outside [0, L), as outside the picture, contribute nothing.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array


def label_conv(labels: Array, kernel: Array, *, stride: int = 1, padding: int = 1) -> Array:
    """The convolution over the one-hot maps of labels, without them: rows of the kernel are looked up and added.

    On two cores it takes a fifth of the time of a convolution over one-hot maps (13 labels, 128 outputs, 64x64). The
    kernel's gradient is one product with the window's comparisons: a scatter into so few rows would serialise. TPUs
    take that product forwards too: they look rows up one by one, and the compiler keeps every tap's rows at once.

    Args:
      labels: (B, H, W) int32; those outside [0, L) count as no label.
      kernel: (taps, taps, L, O).
      stride, padding: along both axes; padding is of no label.

    Returns:
      (B, h, w, O) in the kernel's dtype.
    """
    return _label_conv(windows(labels, taps=kernel.shape[0], stride=stride, padding=padding), kernel)


def windows(labels: Array, *, taps: int, stride: int, padding: int) -> Array:
    """The labels in each window: (B, H, W) -> (B, h, w, taps^2), -1 outside the picture."""
    padded = jnp.pad(labels, ((0, 0), (padding, padding), (padding, padding)), constant_values=-1)
    height, width = ((n + 2 * padding - taps) // stride + 1 for n in labels.shape[1:])
    parts = []
    for down, right in itertools.product(range(taps), repeat=2):
        rows = lax.slice_in_dim(padded, down, down + (height - 1) * stride + 1, stride, 1)
        parts.append(lax.slice_in_dim(rows, right, right + (width - 1) * stride + 1, stride, 2))
    return jnp.stack(parts, axis=-1)


@jax.custom_vjp
def _label_conv(seen: Array, kernel: Array) -> Array:
    count, outputs = kernel.shape[-2:]
    taps = seen.shape[-1]
    if jax.default_backend() == "tpu":
        return _one_hot(seen, count, kernel.dtype) @ kernel.reshape(-1, outputs)
    rows = jnp.pad(kernel.reshape(taps, count, outputs), ((0, 0), (0, 1), (0, 0)))  # the last row is for no label
    index = jnp.where((seen < 0) | (seen >= count), count, seen)
    # Tap by tap: all in one gather is 50 times slower on CPU, where it is not fused with the sum.
    picked = (jnp.take(rows[tap], index[..., tap], axis=0, mode="clip") for tap in range(taps))
    return functools.reduce(jnp.add, picked)


def _forward(seen, kernel):
    return _label_conv(seen, kernel), (seen, kernel)


def _backward(saved, grad):
    seen, kernel = saved
    count, outputs = kernel.shape[-2:]
    columns = _one_hot(seen, count, grad.dtype).reshape(-1, seen.shape[-1] * count)
    by_row = (((0,), (0,)), ((), ()))
    product = lax.dot_general(columns, grad.reshape(-1, outputs), by_row, preferred_element_type=jnp.float32)
    return np.zeros(seen.shape, jax.dtypes.float0), product.reshape(kernel.shape).astype(kernel.dtype)


def _one_hot(seen, count, dtype):
    """(B, h, w, taps) -> (B, h, w, taps * count)."""
    return (seen[..., None] == jnp.arange(count)).astype(dtype).reshape(*seen.shape[:-1], -1)


_label_conv.defvjp(_forward, _backward)


def resize_labels(labels: Array, size: tuple[int, int]) -> Array:
    """Labels (B, H, W) at another size by the nearest pixel, (floor(i * H / h), floor(j * W / w)): (B, h, w)."""
    for axis, (old, new) in enumerate(zip(labels.shape[1:], size, strict=True), 1):
        if old % new == 0:
            labels = lax.slice_in_dim(labels, 0, old, old // new, axis)
        elif new % old == 0:
            labels = jnp.repeat(labels, new // old, axis=axis)
        else:
            labels = jnp.take(labels, np.arange(new) * old // new, axis=axis)
    return labels


def nearest_labels(labels: Array, size: tuple[int, int]) -> Array:
    """Labels (B, H, W) at the centres of the cells of another size, floor((i + 1/2) H / h) along each axis: (B, h, w).

    As linear resizing without aligned corners has it: what is learnt at the smaller size is not shifted by half a cell
    where it is resized back.
    """
    for axis, (old, new) in enumerate(zip(labels.shape[1:], size, strict=True), 1):
        labels = jnp.take(labels, (2 * np.arange(new) + 1) * old // (2 * new), axis=axis)
    return labels


def one_hot_pooled(labels: Array, count: int) -> Array:
    """One-hot maps averaged over 3x3 windows of stride 2, the picture's pixels counted alone.

    labels (B, H, W) -> (B, ceil(H / 2), ceil(W / 2), count) float32.
    """
    return halve_by_mean(jax.nn.one_hot(labels, count))


def halve_by_mean(maps: Array) -> Array:
    """Means over 3x3 windows of stride 2, over what of them is on the map: (B, H, W, C) -> (B, h, w, C)."""
    for axis in (1, 2):
        size = maps.shape[axis]
        half = -(-size // 2)
        edges = [(0, 0)] * maps.ndim
        edges[axis] = (1, 1 + 2 * half - size)
        padded = jnp.pad(maps, edges)
        total = sum(lax.slice_in_dim(padded, s, s + 2 * half - 1, 2, axis) for s in range(3))
        counts = np.array([sum(0 <= 2 * i + d < size for d in (-1, 0, 1)) for i in range(half)], np.float32)
        shape = [1] * maps.ndim
        shape[axis] = half
        maps = total / counts.reshape(shape)
    return maps


def majority(labels: Array, segments: Array, *, count: int, num_segments: int) -> Array:
    """Gives all pixels of a segment the label that most of them have, the least of equals.

    Args:
      labels, segments: (B, H, W) int32, in [0, count) and [0, num_segments).
      count: L.
      num_segments: S.

    Returns:
      (B, H, W) int32.
    """
    batch = labels.shape[0]
    flat = (segments * count + labels).reshape(batch, -1)
    votes = jax.vmap(lambda i: jnp.zeros(num_segments * count, jnp.int32).at[i].add(1))(flat)
    winners = votes.reshape(batch, num_segments, count).argmax(axis=-1).astype(jnp.int32)
    own = jnp.take_along_axis(winners, segments.reshape(batch, -1), axis=1)
    return own.reshape(labels.shape)


def mean_iou(predicted: Array, expected: Array, *, count: int) -> tuple[Array, Array]:
    """Intersection over union of each class in each picture.

    Args:
      predicted, expected: (B, H, W) int32; expected labels outside [0, count) are left out.
      count: L.

    Returns:
      (IoU (B, L), is_there (B, L) bool: the class is in what is expected).
    """
    known = (expected >= 0) & (expected < count)
    ours, theirs = (
        (jnp.where(known, x, -1)[..., None] == jnp.arange(count)).reshape(x.shape[0], math.prod(x.shape[1:]), count)
        for x in (predicted, expected)
    )
    both, either = (ours & theirs).sum(1), (ours | theirs).sum(1)
    return both / jnp.maximum(either, 1), theirs.any(axis=1)
