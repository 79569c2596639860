"""Walkers: moves by hand, borders, crops and visits against slow loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops import walkers

NUMBERS = np.random.default_rng(0)


def test_moves_are_the_compass_in_its_order():
    first, last = walkers.centres((20, 20), 4)
    centre = jnp.full((9, 2), 10)
    moved = walkers.move(centre, jnp.arange(9), step=3, first=first, last=last) - centre
    left, right, up, down = (0, -3), (0, 3), (-3, 0), (3, 0)
    both = [tuple(np.add(a, b)) for a, b in ((up, left), (down, left), (up, right), (down, right))]
    assert [tuple(map(int, m)) for m in moved] == [(0, 0), left, right, up, down, *both]


def test_centres_stay_where_their_crop_lies_inside():
    """A picture of 256 with crops of 128 on a grid of 8: centres in [64, 192] pixels."""
    first, last = walkers.centres((32, 32), 16)
    assert list(first * 8) == [64, 64] and list(last * 8) == [192, 192]
    centre = jnp.array([[8, 8]])
    assert walkers.move(centre, jnp.array([1]), step=3, first=first, last=last).tolist() == [[8, 8]]
    for count in range(1, 7):
        centre = walkers.move(centre, jnp.array([2]), step=3, first=first, last=last)
        assert centre.tolist() == [[8, min(8 + 3 * count, 24)]]
    first, last = walkers.centres((4, 6), 4)
    assert (list(first), list(last)) == ([2, 2], [2, 4])


@pytest.mark.parametrize(("grid", "channels"), [(1, None), (4, 3)])
def test_crops_are_cut_around_centres(grid, channels):
    images = NUMBERS.random((3, 8 * grid, 10 * grid, *([channels] if channels else []))).astype(np.float32)
    image, centre = np.array([2, 0, 2, 1]), np.array([[2, 2], [6, 8], [4, 5], [3, 7]])
    if channels is None:
        found = jax.jit(lambda maps: walkers.crop(maps, image, centre, size=4))(images)
    else:
        cut = jax.jit(lambda flat: walkers.crop_pixels(flat, image, centre, size=4, grid=grid, channels=channels))
        found = cut(images.reshape(3, 8 * grid, -1))
    for one, i, (y, x) in zip(found, image, centre, strict=True):
        expected = images[i, (y - 2) * grid : (y + 2) * grid, (x - 2) * grid : (x + 2) * grid]
        np.testing.assert_array_equal(one, expected)


def test_visits_are_counted_once_a_walker():
    image, centre = jnp.array([1, 0, 1]), jnp.array([[2, 3], [1, 1], [3, 3]])
    found = walkers.visit(jnp.ones((2, 5, 6)), image, centre, size=2)
    expected = np.ones((2, 5, 6))
    for i, (y, x) in zip(image, centre, strict=True):
        expected[i, y - 1 : y + 1, x - 1 : x + 1] += 1
    np.testing.assert_array_equal(found, expected)
    assert float(found.sum()) == 60 + 3 * 4


def test_means_of_cells():
    maps = NUMBERS.random((2, 6, 9)).astype(np.float32)
    found = walkers.cell_means(maps, grid=3)
    assert found.shape == (2, 2, 3)
    np.testing.assert_allclose(found[1, 1, 2], maps[1, 3:6, 6:9].mean(), rtol=1e-6)
