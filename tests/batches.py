"""Batches of a test's pictures, as jaxad and as the torch peers take them."""

import jax.numpy as jnp
import numpy as np

from jaxad.core import Batch


def batch_of(images, *, mask=None, valid=None):
    """Normal pictures (B, [T,] H, W, C), uint8 ones brought to [0, 1], with empty masks and all valid unless told."""
    size = len(images)
    pixels = jnp.asarray(images, jnp.float32) / 255 if images.dtype == np.uint8 else jnp.asarray(images)
    mask = jnp.zeros((size, *images.shape[-3:-1])) if mask is None else jnp.asarray(mask, jnp.float32)
    valid = jnp.ones(size, bool) if valid is None else jnp.asarray(valid)
    return Batch(pixels, jnp.zeros(size, jnp.int32), mask, jnp.arange(size), valid)


def torch_batch(images):
    """The same of uint8 pictures for a peer."""
    from benchmarks import peers

    return peers.place_batch(images, np.zeros(len(images)), np.zeros((len(images), *images.shape[-3:-1])))
