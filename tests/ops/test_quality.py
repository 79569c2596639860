"""PSNR and the regular score against numbers worked by hand."""

import jax.numpy as jnp
import numpy as np

from jaxad.ops import quality


def test_numbers_worked_by_hand():
    predicted = (jnp.array([[0.0, 0, 1]]) + 1) / 2
    target = (jnp.array([[0.0, 0.2, -1]]) + 1) / 2
    np.testing.assert_allclose(quality.psnr(predicted, target), [4.727999], atol=1e-6)
    np.testing.assert_allclose(quality.regular_score(predicted, target), [0.984658], atol=1e-6)


def test_a_perfect_prediction_is_finite_and_every_picture_has_its_own():
    target = jnp.asarray(np.random.default_rng(0).uniform(0, 1, (3, 4, 5, 2)), jnp.float32)
    predicted = target.at[1].add(0.1)
    np.testing.assert_allclose(quality.psnr(predicted, target), [100, 20, 100], rtol=1e-5)
    np.testing.assert_allclose(quality.regular_score(predicted, target), [0, 0.01, 0], rtol=1e-4)


def test_one_badly_predicted_part_counts_more_than_the_same_error_spread():
    target = jnp.zeros((2, 100))
    predicted = jnp.stack([jnp.full(100, 0.1), jnp.zeros(100).at[0].set(1.0)])
    spread, peak = quality.regular_score(predicted, target)
    np.testing.assert_allclose(quality.psnr(predicted, target), 20, rtol=1e-5)
    np.testing.assert_allclose([spread, peak], [0.01, 1.0], rtol=1e-4)
