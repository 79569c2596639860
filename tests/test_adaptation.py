"""Scoring in order: every row once, adapting in between, the videos' own scale."""

import jax
import numpy as np
import pytest
import toy
from conformance import make_data

from jaxad import adaptation, metrics, score, train

DATA = make_data((8, 8, 3), rows=17)["labelled"]
LABELS = np.asarray(DATA.label)
METHOD = toy.IN_ORDER


@pytest.fixture(scope="module")
def state():
    data = make_data((8, 8, 3), rows=17)
    return jax.jit(lambda key: train.fit(toy.METHOD, key, toy.ToyConfig(), data)[0])(jax.random.key(0))


@pytest.mark.parametrize("batch_size", [None, 1, 4, 6, 17, 100])
def test_every_sample_is_scored_once_in_order_whatever_the_batch(state, batch_size):
    expected_state, expected = score.stream(toy.METHOD, state, DATA)
    got = adaptation.score_ordered(METHOD, state, DATA, batch_size=batch_size)
    np.testing.assert_allclose(got.image, expected.image, rtol=1e-5)
    np.testing.assert_array_equal(got.parts["first"], got.image)
    np.testing.assert_allclose(got.state.total, expected_state.total, rtol=1e-5)
    assert float(got.state.adapted) == 17  # padding adapts nothing


def test_measures_stretch_every_part_within_its_video(state):
    groups = np.repeat(["a", "b"], [9, 8])
    found = adaptation.score_ordered(METHOD, state, DATA)
    first, second = (
        np.concatenate([(v - v.min()) / (v.max() - v.min()) for v in (part[:9], part[9:])])
        for part in (found.parts["first"], found.parts["second"])
    )
    expected = 0.25 * first + 0.75 * (1 - second)
    got = adaptation.protocol_scores(METHOD, state.cfg, found.parts, groups)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    measured = adaptation.measure_ordered(METHOD, state, DATA, groups, LABELS)
    assert measured["ordered_auroc_video_protocol"] == metrics.image_metrics(expected, LABELS)["auroc"]
    assert measured["ordered_auroc"] == metrics.image_metrics(found.image, LABELS)["auroc"]
    assert measured["ordered_auroc"] != measured["ordered_auroc_video_protocol"]
    assert measured["ordered_images_per_second"] == 17 / measured["ordered_seconds"]


def test_a_method_without_order_is_refused(state):
    with pytest.raises(ValueError, match="method 'toy' scores each sample by itself; expected one that adapts"):
        adaptation.score_ordered(toy.METHOD, state, DATA)
