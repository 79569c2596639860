"""Walkers on pictures: where they stand, what they see, where they have been.

Positions are (row, column) of a centre in cells of `grid` pixels, so that a map of visits has a number a cell, not a
pixel. Crops and patches are whole numbers of cells around the centre. Sizes: N pictures, W walkers, S cells a side.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array

# leave the picture; left, right, up, down, up left, down left, up right, down right
MOVES = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (1, -1), (-1, 1), (1, 1)], np.int32)
LEAVE = 0


def centres(cells: tuple[int, int], crop: int) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last centre (row, column) whose crop of `crop` cells a side lies inside the picture."""
    return np.full(2, crop // 2, np.int32), np.asarray(cells, np.int32) - crop // 2


def move(centre: Array, action: Array, *, step: int, first: np.ndarray, last: np.ndarray) -> Array:
    """Centres after their actions; at the border they stay inside.

    Args:
      centre: (W, 2) int32.
      action: (W,) int32 row in `MOVES`.
      step: cells.
      first, last: of `centres`.
    """
    return jnp.clip(centre + step * jnp.asarray(MOVES)[action], first, last)


def crop(maps: Array, image: Array, centre: Array, *, size: int) -> Array:
    """Squares around centres, cut out of maps of the walkers' pictures that have a number a cell.

    Args:
      maps: (N, H, W).
      image: (W,) int32 row of each walker's picture.
      centre: (W, 2) int32, in cells.
      size: cells a side, even.

    Returns:
      (W, size, size).
    """
    return crop_pixels(maps, image, centre, size=size, grid=1, channels=1)[..., 0]


def crop_pixels(images: Array, image: Array, centre: Array, *, size: int, grid: int, channels: int) -> Array:
    """Squares around centres, cut out of the walkers' pictures.

    Args:
      images: (N, H, W * channels) with `grid` pixels a cell along H and W: a pixel's channels side by side, since TPUs
        would fill up an axis of 3 to 128.
      image: (W,) int32 row of each walker's picture.
      centre: (W, 2) int32, in cells.
      size: cells a side, even.
      grid: pixels a cell.
      channels: of a pixel.

    Returns:
      (W, size * grid, size * grid, channels).
    """
    side = size * grid

    def one(image, centre):
        row, column = (centre[0] - size // 2) * grid, (centre[1] - size // 2) * grid * channels
        found = lax.dynamic_slice(images, (image, row, column), (1, side, side * channels))
        return found.reshape(side, side, channels)

    return jax.vmap(one)(image, centre)


def visit(visits: Array, image: Array, centre: Array, *, size: int) -> Array:
    """Counts a visit of each walker to every cell of its patch.

    Args:
      visits: (N, S, S) counts so far.
      image: (W,) int32.
      centre: (W, 2) int32.
      size: of a patch in cells, even.
    """
    reach = jnp.arange(size, dtype=jnp.int32) - size // 2
    rows, columns = centre[:, 0, None] + reach, centre[:, 1, None] + reach
    return visits.at[image[:, None, None], rows[:, :, None], columns[:, None, :]].add(1.0)


def cell_means(maps: Array, *, grid: int) -> Array:
    """Means over cells: (N, H, W) -> (N, H / grid, W / grid)."""
    count, height, width = maps.shape
    return maps.reshape(count, height // grid, grid, width // grid, grid).mean(axis=(2, 4))
