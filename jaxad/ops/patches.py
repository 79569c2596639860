"""Patches cut out of pictures, at given places or on a grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad.core import Array


def cut_patches(images: Array, corners: Array, *, patch: int) -> Array:
    """Cuts patches out: images (B, H, W, C), corners (B, n, 2) int32 -> (B, n, patch, patch, C)."""

    def cut(image, corner):
        return lax.dynamic_slice(image, (corner[0], corner[1], 0), (patch, patch, image.shape[-1]))

    return jax.vmap(jax.vmap(cut, in_axes=(None, 0)))(images, corners)


def grid_shape(size: tuple[int, int], *, patch: int, stride: int) -> tuple[int, int]:
    """(rows, columns) of the patches that begin at pixels 0, stride, ... of a picture, as many as fit."""
    height, width = size
    return (height - patch) // stride + 1, (width - patch) // stride + 1


def cut_grid(images: Array, *, patch: int, stride: int) -> Array:
    """The patches of a grid: images (B, H, W, C) -> (B, rows, columns, patch, patch, C)."""
    rows, columns = grid_shape(images.shape[1:3], patch=patch, stride=stride)
    at_rows, at_columns = (np.arange(n)[:, None] * stride + np.arange(patch) for n in (rows, columns))
    bands = jnp.take(images, at_rows, axis=1, mode="clip")  # (B, rows, patch, W, C)
    return jnp.moveaxis(jnp.take(bands, at_columns, axis=3, mode="clip"), 3, 2)
