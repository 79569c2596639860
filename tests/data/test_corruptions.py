"""Corruptions: each kind against numbers worked by hand, levels that grow, pictures that stay what files can hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.data.corruptions import KINDS, LEVELS, corrupt

IMAGES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3)) / 255, jnp.float32)


def changed(kind, level, images=IMAGES, seed=0):
    return np.asarray(corrupt(jax.random.key(seed), images, kind=kind, level=level))


@pytest.mark.parametrize("kind", KINDS)
def test_levels_grow_from_nothing(kind):
    np.testing.assert_allclose(changed(kind, 0), IMAGES, atol=1e-6)
    distances = [np.abs(changed(kind, level) - IMAGES).mean() for level in LEVELS]
    assert all(np.diff([0.0, *distances]) > 0.003)
    found = changed(kind, 5)
    assert found.min() >= 0 and found.max() <= 1
    np.testing.assert_allclose(found * 255, np.rint(found * 255), atol=1e-4)


def flat(*colour):
    return jnp.broadcast_to(jnp.asarray(colour, jnp.float32), (1, 28, 28, len(colour)))


@pytest.mark.parametrize(
    ("kind", "colour", "wanted"),
    [
        ("grey", (1.0, 0.5, 0.0), (0.5925,) * 3),  # 0.299 + 0.587 / 2
        ("exposure", (0.1, 0.2, 0.6), (0.25, 0.5, 1.0)),
        ("darkening", (0.4, 0.8, 1.0), (0.1, 0.2, 0.25)),
        ("haze", (0.0, 0.8, 1.0), (0.6, 0.8, 0.85)),
        ("blur", (0.2, 0.4, 0.6), (0.2, 0.4, 0.6)),  # a constant stays one, at borders too
    ],
)
def test_the_strongest_level_of_flat_pictures(kind, colour, wanted):
    np.testing.assert_allclose(changed(kind, 5, flat(*colour)), np.broadcast_to(wanted, (1, 28, 28, 3)), atol=0.5 / 255)


def test_grey_leaves_single_channels_alone():
    np.testing.assert_allclose(changed("grey", 5, IMAGES[..., :1]), IMAGES[..., :1], atol=1e-6)


def test_blur_is_a_gaussian_of_a_fourteenth_of_the_height():
    point = jnp.zeros((1, 28, 28, 1)).at[0, 14, 14].set(1.0)
    line = np.exp(-0.5 * (np.arange(28) - 14) ** 2 / 2.0**2)
    line /= line.sum()
    np.testing.assert_allclose(changed("blur", 5, point)[0, :, :, 0], np.outer(line, line), atol=0.51 / 255)


def test_noise_has_its_size_and_its_key():
    grey = jnp.full((2, 64, 64, 1), 0.5)
    found = changed("noise", 2, grey)  # a standard deviation of 0.12: hardly anything is clipped
    np.testing.assert_allclose((found - 0.5).std(), 0.12, rtol=0.05)
    assert not np.array_equal(found[0], found[1])
    assert np.array_equal(found, changed("noise", 2, grey)) and not np.array_equal(found, changed("noise", 2, grey, 1))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="corruption 'fog' is unknown; expected one of .*'haze'.*Pass kind='grey'"):
        changed("fog", 1)
