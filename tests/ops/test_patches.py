"""Patches of a grid, and maps of patches laid over the picture, against loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops.coverage import overlay, spread
from jaxad.ops.patches import cut_grid, cut_patches, grid_shape

SIZES = [((11, 14), 5, 3), ((8, 8), 8, 2), ((9, 13), 4, 4), ((10, 7), 3, 5)]


@pytest.mark.parametrize(("size", "patch", "stride"), SIZES)
def test_a_grid_of_patches_is_every_patch_that_fits(size, patch, stride):
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    rows, columns = range(0, size[0] - patch + 1, stride), range(0, size[1] - patch + 1, stride)
    found = cut_grid(jnp.asarray(images), patch=patch, stride=stride)
    assert found.shape[1:3] == grid_shape(size, patch=patch, stride=stride) == (len(rows), len(columns))
    corners = [(i, j) for i in rows for j in columns]
    expected = np.stack([images[:, i : i + patch, j : j + patch] for i, j in corners], axis=1)
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)
    places = jnp.broadcast_to(jnp.asarray(corners), (2, len(corners), 2))
    np.testing.assert_array_equal(cut_patches(jnp.asarray(images), places, patch=patch), expected)


@pytest.mark.parametrize(("size", "patch", "stride"), SIZES[:3])
def test_maps_of_patches_lie_over_the_picture_as_their_mean(size, patch, stride):
    rows, columns = grid_shape(size, patch=patch, stride=stride)
    maps = np.random.default_rng(1).normal(size=(2, rows, columns, patch, patch)).astype(np.float32)
    total, count = np.zeros((2, *size)), np.zeros(size)
    for i in range(rows):
        for j in range(columns):
            place = slice(i * stride, i * stride + patch), slice(j * stride, j * stride + patch)
            total[(slice(None), *place)] += maps[:, i, j]
            count[place] += 1
    height, width = (rows - 1) * stride + patch, (columns - 1) * stride + patch
    mean = (total / np.maximum(count, 1))[:, :height, :width]
    expected = np.pad(mean, ((0, 0), (0, size[0] - height), (0, size[1] - width)), mode="edge")
    found = overlay(jnp.asarray(maps), size=size, stride=stride)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    flat = maps[..., :1, :1].mean(axis=(3, 4))
    constant = jnp.broadcast_to(jnp.asarray(flat)[..., None, None], maps.shape)
    spreaded = spread(jnp.asarray(flat), size=size, patch=patch, stride=stride)
    np.testing.assert_allclose(overlay(constant, size=size, stride=stride), spreaded, atol=1e-5)
