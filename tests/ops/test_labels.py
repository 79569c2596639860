"""Label maps: look-ups equal convolutions over one-hot maps, sizes, majorities, and pooled one-hot maps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops import labels as ops


def drawn(shape, count, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(-1, count + 1, shape), jnp.int32)  # some have no class


def by_one_hot(labels, kernel, stride, padding):
    one_hot = jax.nn.one_hot(labels, kernel.shape[2])  # no class: all zero
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        one_hot, kernel, (stride,) * 2, ((padding, padding),) * 2, dimension_numbers=numbers, precision="highest"
    )


@pytest.mark.parametrize("taps, stride, padding", [(3, 1, 1), (4, 2, 2), (7, 1, 3), (1, 1, 0)])
def test_a_look_up_is_the_convolution_over_one_hot_maps(taps, stride, padding):
    """At the border too, where nothing is added, not class 0; and so are its gradients."""
    labels = drawn((2, 9, 12), 5)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(taps, taps, 5, 6)), jnp.float32)
    ours = ops.label_conv(labels, kernel, stride=stride, padding=padding)
    theirs = by_one_hot(labels, kernel, stride, padding)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=ours.shape), jnp.float32)
    ours, theirs = (
        jax.grad(lambda k, f=f: jnp.sum(f(k) * weights))(kernel)
        for f in (
            lambda k: ops.label_conv(labels, k, stride=stride, padding=padding),
            lambda k: by_one_hot(labels, k, stride, padding),
        )
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_on_tpus_the_look_up_is_a_product(monkeypatch):
    """Rows are looked up one by one there. Labels of no class, and places outside, still add nothing."""
    labels, kernel = drawn((2, 9, 12), 5), jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 5, 6)), jnp.float32)
    looked_up = ops.label_conv(labels, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "gather" not in str(jax.make_jaxpr(lambda k: ops.label_conv(labels, k))(kernel))
    np.testing.assert_allclose(ops.label_conv(labels, kernel), looked_up, atol=1e-5)


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (12, 16), (5, 9)])
def test_labels_take_the_nearest_pixel(size):
    labels = drawn((2, 6, 8), 5)
    got = np.asarray(ops.resize_labels(labels, size))
    for i, j in itertools.product(*map(range, size)):
        np.testing.assert_array_equal(got[:, i, j], labels[:, i * 6 // size[0], j * 8 // size[1]])


@pytest.mark.parametrize("size", [(3, 2), (6, 8), (12, 16), (5, 3)])
def test_labels_at_the_centres_of_cells(size):
    labels = drawn((2, 6, 8), 5)
    got = np.asarray(ops.nearest_labels(labels, size))
    for i, j in itertools.product(*map(range, size)):
        row, column = (int((k + 0.5) * old / new) for k, old, new in zip((i, j), (6, 8), size, strict=True))
        np.testing.assert_array_equal(got[:, i, j], labels[:, row, column])


def test_pooled_maps_count_the_pictures_pixels_alone():
    """By hand: the corner's window has four pixels, an edge's six, others nine."""
    labels = jnp.asarray([[[0, 1, 1], [1, 1, 2], [2, 2, 2]]])
    pooled = ops.one_hot_pooled(labels, 3)
    assert pooled.shape == (1, 2, 2, 3)
    np.testing.assert_allclose(pooled[0, 0, 0], [1 / 4, 3 / 4, 0], rtol=1e-6)
    np.testing.assert_allclose(pooled[0, 0, 1], [0, 3 / 4, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(pooled[0, 1, 1], [0, 1 / 4, 3 / 4], rtol=1e-6)
    maps = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 7, 2)), jnp.float32)
    got = np.asarray(ops.halve_by_mean(maps))
    for i, j in itertools.product(range(3), range(4)):
        rows, columns = (slice(max(2 * n - 1, 0), 2 * n + 2) for n in (i, j))
        np.testing.assert_allclose(got[0, i, j], np.asarray(maps)[0, rows, columns].mean(axis=(0, 1)), atol=1e-6)


def test_segments_take_the_label_that_most_pixels_have():
    labels = jnp.asarray([[[0, 2, 1], [2, 1, 1]], [[0, 0, 2], [2, 1, 1]]])
    segments = jnp.asarray([[[0, 0, 1], [0, 1, 1]], [[0, 0, 0], [0, 3, 3]]])
    got = ops.majority(labels, segments, count=3, num_segments=4)
    np.testing.assert_array_equal(got, [[[2, 2, 1], [2, 1, 1]], [[0, 0, 0], [0, 1, 1]]])


def test_intersection_over_union_by_hand():
    predicted = jnp.asarray([[[0, 0, 1, 1]]])
    expected = jnp.asarray([[[0, 1, 1, -1]]])  # the last has no class and is left out
    iou, is_there = ops.mean_iou(predicted, expected, count=3)
    np.testing.assert_allclose(iou, [[1 / 2, 1 / 2, 0]])
    np.testing.assert_array_equal(is_there, [[True, True, False]])
