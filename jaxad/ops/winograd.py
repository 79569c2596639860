"""3x3 convolutions of stride 2, their transposes and kernel gradients, by 25 products where taps would take 36.

Winograd's minimal filtering (Lavin and Gray. "Fast Algorithms for Convolutional Neural Networks". CVPR 2016.
https://arxiv.org/abs/1509.09308) is for stride 1. At stride 2 the outer taps of an axis meet every other pixel and make
a convolution of two taps and stride 1, of which F(2, 2) makes two outputs by three products; the middle tap meets the
pixels between. So along an axis, with p the five pixels that a pair of outputs sees,

    y0 = (p0 - p2) w0 + p1 w1 + p2 (w0 + w2)
    y1 = p2 (w0 + w2) + p3 w1 + (p4 - p2) w2

takes five products for six, and 25 for 36 along both axes. No sum has more than two terms an axis, so that rounding
errors stay within a few times those of the taps.

The three functions are the three derivatives of one trilinear form, so that each one's gradient consists of the other
two. Products that go to the same outputs are one product of matrices with their factors side by side: nine of 1, 2 or
4 times C columns. Layouts: pictures (B, H, W, C), kernels (3, 3, C, O).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax

from jaxad.core import Array
from jaxad.ops.contract import contract_rows

Pair = tuple[int, int]  # of groups, or of products, along both axes

_TILE = 4  # pixels a side from tile to tile; 2 outputs
_PIXELS = ((1, 0, -1, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, -1, 0, 1))  # of the products
_TAPS = ((1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 0), (0, 0, 1))  # which they are multiplied by
_GROUPS = ((0, 1), (2,), (3, 4))  # products that go to the same outputs
_OUTPUTS = ((1, 1, 0), (0, 1, 1))  # the groups that each output sums
_PAIRS = tuple(itertools.product(range(3), range(3)))  # of groups, along both axes


def correlate(image: Array, kernel: Array, *, before: Sequence[int], counts: Sequence[int]) -> Array:
    """Correlates at stride 2.

    Args:
      image: (B, H, W, C).
      kernel: (3, 3, C, O).
      before: zeros before the picture, per axis.
      counts: outputs per axis; beyond the picture they see zeros.

    Returns:
      (B, *counts, O).
    """
    seen, kernels = _pixels_of(image, before, counts), _kernels_of(kernel)
    products = {g: seen[g] @ kernels[g] for g in _PAIRS}
    outputs = [[_combine(row, column, lambda *g: products[g]) for column in _OUTPUTS] for row in _OUTPUTS]
    return _join(outputs, counts)


def transpose(small: Array, kernel: Array, *, before: Sequence[int], size: Sequence[int]) -> Array:
    """The transpose of `correlate` in the picture.

    Args:
      small: (B, h, w, O).
      kernel: (3, 3, C, O).
      before: as of `correlate`.
      size: (H, W) of the picture.

    Returns:
      (B, H, W, C).
    """
    given, kernels, channels = _outputs_of(small), _kernels_of(kernel), kernel.shape[2]
    products: dict[Pair, Array] = {}
    for g in _PAIRS:
        values = given[g] @ kernels[g].T
        parts = values.reshape(*values.shape[:-1], -1, channels)
        products |= {pair: parts[..., i, :] for i, pair in enumerate(_factors(g))}
    tiles = [-(-n // _TILE) for n in size]

    def pixel(row: int, column: int) -> Array:
        """Of all tiles of the picture: the sum of what tiles of outputs give it, of which neighbours share a pixel."""
        parts = []
        for (i, down), (j, right) in itertools.product(_places(row + before[0]), _places(column + before[1])):
            value = _combine(_column(_PIXELS, i), _column(_PIXELS, j), lambda *pair: products[pair])
            parts.append(_shift(value, (down, right), tiles))
        return sum(parts[1:], parts[0])

    return _join([[pixel(i, j) for j in range(_TILE)] for i in range(_TILE)], size)


def kernel_gradient(image: Array, small: Array, *, before: Sequence[int]) -> Array:
    """The gradient of `correlate` in the kernel.

    Args:
      image: (B, H, W, C).
      small: (B, h, w, O), derivatives in the outputs.
      before: as of `correlate`.

    Returns:
      (3, 3, C, O) float32.
    """
    seen, given = _pixels_of(image, before, small.shape[1:3]), _outputs_of(small)
    products: dict[Pair, Array] = {}
    for g in _PAIRS:
        product = contract_rows(seen[g], given[g])
        products |= zip(_factors(g), product.reshape(-1, image.shape[-1], small.shape[-1]), strict=True)
    columns = [_column(_TAPS, tap) for tap in range(3)]
    taps = [_combine(row, column, lambda *pair: products[pair]) for row in columns for column in columns]
    return jnp.stack(taps).reshape(3, 3, image.shape[-1], small.shape[-1])


# --- factors of the products, by pairs of groups --------------------------------------------------------------------


def _pixels_of(image: Array, before: Sequence[int], counts: Sequence[int]) -> dict[Pair, Array]:
    """{groups: (B, T, U, factors x C)}; T and U are tiles, of two outputs."""
    tiles = [-(-n // 2) for n in counts]
    blocks = _cut(image, _TILE)

    def pixel(row: int, column: int) -> Array:
        places = [divmod(i - b, _TILE) for i, b in zip((row, column), before, strict=True)]
        (down, i), (right, j) = places
        return _shift(blocks[:, :, i, :, j], (-down, -right), tiles)

    def seen(pair: Pair) -> Array:
        parts = [_combine(_PIXELS[m], _PIXELS[n], pixel) for m, n in _factors(pair)]
        stacked = jnp.stack(parts, axis=-2)
        return stacked.reshape(*stacked.shape[:-2], -1)

    return {g: seen(g) for g in _PAIRS}


def _outputs_of(small: Array) -> dict[Pair, Array]:
    """{groups: (B, T, U, O)}."""
    blocks = _cut(small, 2)
    columns = [_column(_OUTPUTS, group) for group in range(3)]
    return {(r, c): _combine(columns[r], columns[c], lambda i, j: blocks[:, :, i, :, j]) for r, c in _PAIRS}


def _kernels_of(kernel: Array) -> dict[Pair, Array]:
    """{groups: (factors x C, O)}."""
    tap = lambda i, j: kernel[i, j]  # noqa: E731
    return {g: jnp.concatenate([_combine(_TAPS[m], _TAPS[n], tap) for m, n in _factors(g)]) for g in _PAIRS}


def _factors(pair: Pair) -> list[Pair]:
    """The products along both axes of a pair of groups."""
    return list(itertools.product(_GROUPS[pair[0]], _GROUPS[pair[1]]))


# --- sums and tiles -------------------------------------------------------------------------------------------------


def _combine(row: Sequence[int], column: Sequence[int], term: Callable[[int, int], Array]) -> Array:
    """The sum of row[i] column[j] term(i, j), all of 1, 0 and -1."""
    total = None
    for (i, a), (j, b) in itertools.product(enumerate(row), enumerate(column)):
        if a * b:
            value = term(i, j)
            total = a * b * value if total is None else total + value if a * b > 0 else total - value
    assert total is not None
    return total


def _column(matrix: Sequence[Sequence[int]], at: int) -> tuple[int, ...]:
    return tuple(row[at] for row in matrix)


def _places(at: int) -> list[tuple[int, int]]:
    """What gives a pixel, `at` pixels after the first that outputs see: [(pixel of a tile, tiles to move it by)]."""
    tile, pixel = divmod(at, _TILE)
    return [(pixel, -tile)] if pixel else [(0, -tile), (_TILE, 1 - tile)]


def _cut(image: Array, side: int) -> Array:
    """(B, H, W, C) -> (B, T, side, U, side, C), filled up with zeros."""
    batch, height, width, channels = image.shape
    ends = [-n % side for n in (height, width)]
    filled = jnp.pad(image, ((0, 0), (0, ends[0]), (0, ends[1]), (0, 0))) if any(ends) else image
    return filled.reshape(batch, (height + ends[0]) // side, side, (width + ends[1]) // side, side, channels)


def _shift(tiles: Array, by: Sequence[int], counts: Sequence[int]) -> Array:
    """Moves (B, T, U, C) along T and U; what comes in is zero, and `counts` of tiles stay."""
    edges = [(b, count - n - b, 0) for b, count, n in zip(by, counts, tiles.shape[1:3], strict=True)]
    return lax.pad(tiles, jnp.zeros((), tiles.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def _join(parts: Sequence[Sequence[Array]], size: Sequence[int]) -> Array:
    """The inverse of `_cut`, from parts [row][column] (B, T, U, C)."""
    tiled = jnp.stack([jnp.stack(row, axis=3) for row in parts], axis=2)
    batch, down, side, right, _, channels = tiled.shape
    return tiled.reshape(batch, down * side, right * side, channels)[:, : size[0], : size[1]]
