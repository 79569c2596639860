"""Scoring, calibration and thresholds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conformance import make_data

from jaxad import metrics, score, train
from jaxad.core import Scores, Source, select

DATA = make_data((8, 8, 3), rows=17)


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda key: train.fit(toy.METHOD, key, toy.ToyConfig(), DATA)[0])(jax.random.key(0))


def test_scores_do_not_depend_on_the_batch_size(state):
    whole = toy.score(state, DATA["labelled"].image / 255)
    for size in (1, 5, 17, 64):
        scores = score.score_dataset(toy.METHOD, state, DATA["labelled"], batch_size=size)
        np.testing.assert_allclose(scores.image, whole.image, rtol=1e-5)
        np.testing.assert_allclose(scores.map, whole.map, rtol=1e-4, atol=1e-6)


def test_evaluate_measures_what_it_scores(state):
    source = DATA["labelled"]
    scores = score.score_dataset(toy.METHOD, state, source)
    weights = metrics.label_regions(np.asarray(source.mask))
    found = score.evaluate(toy.METHOD, state, source, region_weights=weights, batch_size=4)
    np.testing.assert_allclose(found.image, scores.image, rtol=1e-5)
    np.testing.assert_allclose(found.map_max, scores.map.max(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_allclose(found.map_mean, scores.map.mean(axis=(1, 2)), rtol=1e-5)
    exact = metrics.exact_pixel_metrics(scores.map, np.asarray(source.mask), weights)
    binned = metrics.pixel_metrics(found.pixels)
    assert abs(float(binned["auroc"]) - exact["auroc"]) < 1e-3 and abs(float(binned["aupro"]) - exact["aupro"]) < 1e-2


def test_pixels_without_a_trusted_mask_are_left_out(state):
    source = DATA["labelled"]
    weights = metrics.label_regions(np.asarray(source.mask))
    trusted = np.arange(len(source)) % 2 == 0
    found = score.evaluate(toy.METHOD, state, source, region_weights=weights, has_mask=trusted, batch_size=4)
    rows = np.flatnonzero(trusted)
    part = score.evaluate(toy.METHOD, state, select(source, rows), region_weights=weights[rows])
    jax.tree.map(np.testing.assert_array_equal, found.pixels, part.pixels)


def test_stream_scores_first_and_adapts_after(state):
    source = select(DATA["labelled"], jnp.arange(4))
    adapted, scores = score.stream(toy.METHOD, state, source)
    images, current = np.asarray(source.image) / 255, state
    for row in range(4):
        expected = toy.score(current, images[row : row + 1])
        np.testing.assert_allclose(scores.image[row], expected.image[0], rtol=1e-4)
        current = toy.adapt(current, images[row : row + 1], expected)
    np.testing.assert_allclose(adapted.total, current.total, rtol=1e-4)
    assert float(adapted.adapted) == 4


def test_threshold_by_hand():
    """Of 99 exchangeable normals the 99th smallest, of 199 the 198th, of 20 the largest, at a rate of 0.01."""
    assert score.quantile_threshold(np.arange(99), fpr=0.01) == 98
    assert score.quantile_threshold(np.arange(199), fpr=0.01) == 197
    assert score.quantile_threshold(np.arange(20), fpr=0.01) == 19
    assert score.quantile_threshold(np.arange(9), fpr=0.5) == 4


def test_new_normals_exceed_the_threshold_as_often_as_asked():
    rng = np.random.default_rng(0)
    rates = [
        np.mean(rng.normal(size=2000) > score.quantile_threshold(rng.normal(size=199), fpr=0.05)) for _ in range(200)
    ]
    assert abs(np.mean(rates) - 0.05) < 0.005


def test_normalised_scores_put_the_median_at_0_and_the_threshold_at_1(state):
    found = score.calibrate(toy.METHOD, state, DATA["holdout"], fpr=0.1)
    raw = score.score_dataset(toy.METHOD, state, DATA["holdout"])
    assert found.images == 17 and found.threshold == np.sort(raw.image)[16]  # ceil(18 * 0.9) = 17th
    scaled = score.normalize(raw, found)
    assert abs(np.median(scaled.image)) < 1e-6 and np.isclose(scaled.image.max(), 1)
    np.testing.assert_array_equal(np.argsort(scaled.image), np.argsort(raw.image))
    np.testing.assert_allclose(
        scaled.map, (raw.map - found.pixel_median) / (found.pixel_threshold - found.pixel_median)
    )


def test_normalising_equal_scores_stays_finite():
    flat = score.Calibration(2.0, 2.0, 2.0, 2.0, 0.01, 5)
    scaled = score.normalize(Scores(np.full(3, 2.0), np.full((3, 2, 2), 2.0)), flat)
    np.testing.assert_array_equal(scaled.image, 0)


@pytest.mark.parametrize("fpr", [0.0, 1.0, -0.1])
def test_a_rate_outside_0_and_1_is_refused(state, fpr):
    with pytest.raises(ValueError, match="between 0 and 1"):
        score.calibrate(toy.METHOD, state, DATA["holdout"], fpr=fpr)


def test_calibration_takes_normal_images_only(state):
    with pytest.raises(ValueError, match="6 of them anomalous"):
        score.calibrate(toy.METHOD, state, DATA["labelled"])
    empty = Source(image=jnp.zeros((0, 8, 8, 3), jnp.uint8), label=jnp.zeros(0, jnp.int32))
    with pytest.raises(ValueError, match="0 samples"):
        score.calibrate(toy.METHOD, state, empty)
