"""Superpixels on the device: SLIC with static shapes, without gathers or scatters, and what is read off its labels.

Pixels are laid out cell by cell with the cells along the last axis, (pixels of a cell, cells): a centre is then one
value for each cell, the centre of a neighbouring cell is the same array shifted, and all work is elementwise along
cells. Sums over segments are sums over the pixels of a cell, one for each neighbour that they may belong to.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxad.core import Array

CONNECTIVITIES = ("none", "largest")
_OFFSETS = tuple(
    (down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)
)  # of the cells that a pixel may belong to, in raster order
_HOME = _OFFSETS.index((0, 0))
_TERMS = 16  # sums of so many pixels are one elementwise loop; XLA-CPU's masked reduction is 20x slower
_FAR = 1e9  # where a centre is missing: no pixel is nearer to it than to its own
# sRGB to XYZ (IEC 61966-2-1), each row over the white point of D65.
_WHITE = (0.95047, 1.0, 1.08883)
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))


class _Cells(NamedTuple):
    """The regular grid of home cells on a picture."""

    rows: int
    columns: int
    height: int  # of a cell, in pixels
    width: int

    @property
    def total(self) -> int:
        return self.rows * self.columns

    @property
    def size(self) -> int:
        return self.height * self.width


def _cells(shape: tuple[int, int], grid: int | tuple[int, int]) -> _Cells:
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    height, width = shape
    if min(rows, columns) < 1 or height % rows or width % columns:
        raise ValueError(
            f"superpixels: a grid of {rows}x{columns} does not divide pictures of {height}x{width}; expected whole "
            f"cells. Pass a grid that divides both sides, or pictures of "
            f"{-(-height // max(rows, 1)) * max(rows, 1)}x{-(-width // max(columns, 1)) * max(columns, 1)}."
        )
    return _Cells(rows, columns, height // rows, width // columns)


def to_lab(red: Array, green: Array, blue: Array) -> tuple[Array, Array, Array]:
    """sRGB in [0, 1] to CIELAB under D65: L in [0, 100], a and b about -100 to 100."""
    linear = [jnp.where(c > 0.04045, _power((c + 0.055) / 1.055, 2.4), c / 12.92) for c in (red, green, blue)]

    def root(weights, white):
        t = sum(w / white * c for w, c in zip(weights, linear, strict=True))
        return jnp.where(t > (6 / 29) ** 3, _power(t, 1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29)

    x, y, z = (root(weights, white) for weights, white in zip(_XYZ, _WHITE, strict=True))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def _power(x: Array, exponent: float) -> Array:
    return jnp.exp(exponent * jnp.log(jnp.maximum(x, 1e-9)))  # XLA-CPU has vector forms of these, of pow it has none


@functools.partial(jax.jit, static_argnames=("grid", "iterations", "connectivity"))  # traced once for each shape
def slic(
    images: Array,
    *,
    grid: int | tuple[int, int],
    compactness: Array | float = 10.0,
    iterations: int = 10,
    connectivity: str = "none",
) -> Array:
    """SLIC superpixels (Achanta et al., 2012), K = rows x columns of a regular grid of home cells.

    The distance of a pixel to a centre is dL^2 + da^2 + db^2 + (compactness / S)^2 (dx^2 + dy^2) in CIELAB and pixels,
    S = sqrt(HW / K). A pixel may belong to the superpixels that began in its home cell or in the eight around it; the
    first in raster order of equally near ones. Centres begin as means over home cells. A superpixel may lose all its
    pixels; its centre then stays where it was.

    Args:
      images: (B, H, W, 3) sRGB, or (B, H, W, 1) grey, in [0, 1]; H and W divisible by the grid.
      grid: rows and columns of home cells, or one number for both.
      compactness: weight of distance in the picture against distance in colour; may be traced.
      iterations: assignments, each to the means that the one before left.
      connectivity: "none": superpixels may have several parts | "largest": all but the largest part of each are given
        to superpixels that they touch, which may then be farther off than the next cell.

    Returns:
      (B, H, W) int32 labels in [0, K), in raster order of home cells.

    Raises:
      ValueError: a grid that does not divide the picture, channels other than 1 or 3, unknown connectivity.
    """
    cells = _cells(images.shape[1:3], grid)
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"superpixels: images have {images.shape[-1]} channels; expected 3 (sRGB) or 1 (grey). "
            "Pass images[..., :3] or images.mean(-1, keepdims=True)."
        )
    if connectivity not in CONNECTIVITIES:
        raise ValueError(
            f"superpixels: connectivity={connectivity!r} is unknown; expected one of {CONNECTIVITIES}. "
            "Pass connectivity='none'."
        )
    labels = jax.vmap(lambda image: _slic(image, cells, compactness, iterations))(images)
    return labels if connectivity == "none" else jax.vmap(lambda own: keep_largest(own, count=cells.total))(labels)


def _slic(image: Array, cells: _Cells, compactness: Array | float, iterations: int) -> Array:
    planes = [_by_cell(image[..., c], cells) for c in range(image.shape[-1])]
    scale = compactness / math.sqrt(cells.size)
    step = jnp.stack([scale * cells.height, scale * cells.width])
    down, right = (scale * i.reshape(-1, 1) for i in jnp.indices((cells.height, cells.width)))
    # Place within the home cell, weighted, and a one to count by: the same for all cells, so that less is read.
    pixels = _Pixels(jnp.stack(to_lab(*(planes * 3)[:3])), jnp.stack([down, right, jnp.ones_like(down)]))

    def turn(_, carry):
        centres, which = carry
        centres = _means(pixels, step, centres, which, cells)
        return centres, _nearest(pixels, step, centres, cells)

    # Both centres and assignment are carried, so that neither is computed again within what reads it.
    home = jnp.full((cells.size, cells.total), _HOME, jnp.int32)
    _, which = lax.fori_loop(0, iterations, turn, (jnp.zeros((5, cells.total)), home))
    labels = jnp.arange(cells.total) + (which // 3 - 1) * cells.columns + which % 3 - 1
    by_pixel = labels.reshape(cells.height, cells.width, cells.rows, cells.columns)
    return by_pixel.transpose(2, 0, 3, 1).reshape(image.shape[:2])


class _Pixels(NamedTuple):
    lab: Array  # (3, pixels of a cell, cells)
    place: Array  # (3, pixels of a cell, 1): down, right, 1


def _by_cell(plane: Array, cells: _Cells) -> Array:
    """(H, W) -> (pixels of a cell, cells)."""
    split = plane.reshape(cells.rows, cells.height, cells.columns, cells.width)
    return split.transpose(1, 3, 0, 2).reshape(cells.size, cells.total)


def _neighbours(values: Array, offset: tuple[int, int], cells: _Cells, fill: float) -> Array:
    """For each cell the values (n, K) of the cell at an offset, `fill` where there is none."""
    (down, right), grids = offset, values.reshape(-1, cells.rows, cells.columns)
    edges = [(0, 0, 0), (-down, down, 0), (-right, right, 0)]
    return lax.pad(grids, jnp.float32(fill), edges).reshape(values.shape)


def _shifts(step: Array, *, terms: int) -> Array:
    """What places gain (terms 3 and 4) by being told from the cell at each offset: (9, terms, 1)."""
    return jnp.pad(jnp.array(_OFFSETS) * step, [(0, 0), (3, terms - 5)])[..., None]


def _nearest(pixels: _Pixels, step: Array, centres: Array, cells: _Cells) -> Array:
    """Which of the nine centres is nearest to each pixel: (pixels of a cell, cells) int32, an index of `_OFFSETS`."""
    beside = jnp.stack([_neighbours(centres, offset, cells, _FAR) for offset in _OFFSETS])
    # In memory, or the loop over pixels would read each centre through the arithmetic of the shift.
    around = lax.optimization_barrier(beside + _shifts(step, terms=5))
    best = jnp.full(pixels.lab.shape[1:], jnp.inf)
    which = jnp.zeros(pixels.lab.shape[1:], jnp.int32)
    for index in range(len(_OFFSETS)):
        colour = sum((pixels.lab[i] - around[index, i]) ** 2 for i in range(3))
        distance = colour + sum((pixels.place[i] - around[index, 3 + i]) ** 2 for i in range(2))
        is_nearer = distance < best
        best, which = jnp.where(is_nearer, distance, best), jnp.where(is_nearer, index, which)
    return which


def _means(pixels: _Pixels, step: Array, centres: Array, which: Array, cells: _Cells) -> Array:
    """Mean colour and place of each superpixel, (5, K); places are relative to its own home cell. Empty ones stay."""
    terms = min(_TERMS, cells.size)
    length = -(-cells.size // terms)
    spare = [(0, terms * length - cells.size), (0, 0)]  # counted as nothing: their one is a zero
    lab, place = (jnp.pad(part, [(0, 0), *spare]) for part in pixels)
    which, each = jnp.pad(which, spare), jnp.arange(len(_OFFSETS))[:, None, None]
    colours = places = jnp.zeros((len(_OFFSETS), 3, length, cells.total))
    for start in range(0, terms * length, length):
        rows = slice(start, start + length)
        is_mine = (which[rows] == each)[:, None]
        colours += jnp.where(is_mine, lab[:, rows], 0.0)
        places += jnp.where(is_mine, place[:, rows], 0.0)
    by_offset = lax.optimization_barrier(jnp.concatenate([colours, places], axis=1)).sum(axis=2)  # (9, 6, K)
    moved = by_offset - _shifts(step, terms=6) * by_offset[:, 5:]
    totals = sum(
        _neighbours(found, (-down, -right), cells, 0.0) for found, (down, right) in zip(moved, _OFFSETS, strict=True)
    )
    return jnp.where(totals[5] > 0, totals[:5] / jnp.maximum(totals[5], 1.0), centres)


# --- parts of superpixels -----------------------------------------------------------------------------------------


def keep_largest(labels: Array, *, count: int) -> Array:
    """Leaves each superpixel its largest part (the first of equals); the other parts go to what they touch.

    Args:
      labels: (H, W) int32 in [0, count).
      count: K.

    Returns:
      (H, W) int32: every superpixel is one part, connected by edges.
    """
    parts = _spread(jnp.arange(labels.size, dtype=jnp.int32).reshape(labels.shape), labels)
    flat_parts, flat = parts.reshape(-1), labels.reshape(-1)
    sizes = jnp.zeros(labels.size, jnp.int32).at[flat_parts].add(1)[flat_parts]
    largest = jnp.zeros(count, jnp.int32).at[flat].max(sizes)
    is_largest = sizes == largest[flat]
    first = jnp.full(count, labels.size, jnp.int32).at[flat].min(jnp.where(is_largest, flat_parts, labels.size))
    kept = jnp.where(flat_parts == first[flat], flat, -1).reshape(labels.shape)
    return lax.while_loop(lambda own: (own < 0).any(), _grow, kept)


def _beside(values: Array, fill: int) -> list[Array]:
    """The values (H, W) above, left, right and below each pixel."""
    padded = jnp.pad(values, 1, constant_values=fill)
    height, width = values.shape
    places = ((0, 1), (1, 0), (1, 2), (2, 1))
    return [padded[y : y + height, x : x + width] for y, x in places]


def _spread(parts: Array, labels: Array) -> Array:
    """The least number among all pixels of the same label that can be reached over edges."""

    def turn(carry):
        parts, _ = carry
        new = parts
        for other, label in zip(_beside(parts, 0), _beside(labels, -1), strict=True):
            new = jnp.where(label == labels, jnp.minimum(new, other), new)
        return new, (new != parts).any()

    return lax.while_loop(lambda carry: carry[1], turn, (parts, jnp.bool_(True)))[0]


def _grow(labels: Array) -> Array:
    """Pixels without a label (-1) get that of the first pixel beside them that has one."""
    new = labels
    for other in _beside(labels, -1):
        new = jnp.where(new < 0, other, new)
    return new


# --- what is read off labels --------------------------------------------------------------------------------------


def colour_classes(labels: Array, *, grid: int | tuple[int, int], colours: int) -> Array:
    """Classes of superpixels whose home cells are `colours` cells apart: labels (...) int32 -> (...) in [0, colours^2).

    All superpixels of one class can be hidden at once: their centres began `colours` cells apart.
    """
    columns = grid if isinstance(grid, int) else grid[1]
    return labels // columns % colours * colours + labels % columns % colours


def segment_means(values: Array, labels: Array, *, grid: int | tuple[int, int]) -> tuple[Array, Array]:
    """Means over superpixels, as a product of the pixels' one-hot rows and columns of the grid: no scatter.

    Args:
      values: (B, H, W).
      labels: (B, H, W) int32 in [0, rows * columns).
      grid: rows and columns, or one number for both.

    Returns:
      (means (B, K), sizes (B, K) in pixels); the mean of an empty superpixel is 0.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    batch, height, width = values.shape
    values, labels = (x.reshape(batch, height * width) for x in (values, labels))
    row = (labels // columns)[..., None] == jnp.arange(rows)
    column = ((labels % columns)[..., None] == jnp.arange(columns)).astype(jnp.float32)
    both = jnp.concatenate([jnp.where(row, values[..., None], 0.0), row], axis=-1)
    sums = jnp.einsum("bpr,bpc->brc", both, column, precision=lax.Precision.HIGHEST)
    sums, sizes = (x.reshape(batch, rows * columns) for x in (sums[:, :rows], sums[:, rows:]))
    return sums / jnp.maximum(sizes, 1.0), sizes


def paint(values: Array, labels: Array) -> Array:
    """Gives every pixel the value of its superpixel: values (B, K), labels (B, H, W) -> (B, H, W)."""
    batch, height, width = labels.shape
    flat = labels.reshape(batch, height * width)
    return jnp.take_along_axis(values, flat, axis=1).reshape(labels.shape)


def dilate(mask: Array, *, pixels: int) -> Array:
    """Widens masks (B, H, W) bool by a square: true within `pixels` of a true pixel along both axes."""
    for axis in (1, 2):
        edges = [(0, 0)] * mask.ndim
        edges[axis] = (pixels, pixels)
        padded, size = jnp.pad(mask, edges), mask.shape[axis]
        shifted = [lax.slice_in_dim(padded, s, s + size, axis=axis) for s in range(2 * pixels + 1)]
        mask = functools.reduce(jnp.logical_or, shifted)
    return mask
