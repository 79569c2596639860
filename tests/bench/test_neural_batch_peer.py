"""The peer of the Neural Batch Sampler does the same work: same cycles, losses, updates and scores."""

import dataclasses
import importlib.util
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import train
from jaxad.core import as_arrays, spec_of
from jaxad.methods import neural_batch as method

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "methods"))
from test_neural_batch import batch_of, config, sources  # noqa: E402

from benchmarks import peers  # noqa: E402

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")
FIELDS = {
    "ae_features": (4, 8),
    "predictor_features": (4, 6),
    "policy_features": (4, 8),
    "ae_learning_rate": 1e-3,
    "learning_rate": 1e-3,
    "leave_cost": 0.1,
    "steps": 4,
    "shaping": 0.3,  # the second update is half paid by the predictor
    "predictor_batch": 3,
    "reach": "picture",
    "profile_stride": 2,
    "predictor_learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def trained():
    """(spec, the detector before, three batches as uint8, metrics of three steps, the detector after)."""
    cfg, data = config(**FIELDS), jax.device_put(sources())
    phases, spec, key = method.phases(cfg), spec_of(data), jax.random.key(0)

    @jax.jit
    def start(key):
        state = train.init(method.METHOD, key, as_arrays(cfg), spec)
        return train.some_steps(phases[0], key, state, data["labelled"], jnp.int32(0), 1)[0]

    before = after = start(key)
    images = np.random.default_rng(1).integers(0, 255, (3, cfg.batch_size, 8, 8, 3), np.uint8)
    step, found = jax.jit(method.sampler_step), []
    for t, pixels in enumerate(images):
        step_key = jax.random.fold_in(train.phase_key(key, 1), t)
        after, metrics = step(step_key, after, batch_of(jnp.asarray(pixels, jnp.float32) / 255))
        found.append(jax.device_get(metrics))
    return spec, before, images, found, after


def torch_batch(images):
    return peers.place_batch(images, np.zeros(len(images)), np.zeros(images.shape[:3]))


@pytest.mark.parametrize("form", [None, "walker by walker"])
def test_steps_have_the_same_losses_and_gradients(trained, form):
    """Later profiles lie where the young predictor's statistics make much of small differences."""
    spec, before, images, found, _ = trained
    peer = peers.make("neural_batch", before, spec, form=form)
    for _ in range(2):
        for t, (pixels, expected) in enumerate(zip(images, found, strict=True)):
            got = peer.steps["sampler"](torch_batch(pixels))
            for name in ("ae_loss", "predictor_loss", "loss"):
                close = {"rel": 0.01} if name == "loss" and t else {"abs": 1e-4}
                assert float(got[name]) == pytest.approx(float(expected[name]), **close), name
            assert float(got["policy_gradient"]) == pytest.approx(float(expected["policy_gradient"]), rel=0.02)
        peer.reset()


def test_scores_are_the_same(trained):
    spec, _, images, _, after = trained
    cfg = after.cfg
    step = jax.jit(method.profile_step)
    state, _ = step(jax.random.key(3), after, batch_of(jnp.asarray(images[0][:2], jnp.float32) / 255))
    pixels = images[1][:3]
    expected = jax.jit(method.score)(state, jnp.asarray(pixels, jnp.float32) / 255)
    image, maps = peers.make("neural_batch", state, spec).score(peers.place(pixels))
    np.testing.assert_allclose(maps, expected.map, atol=1e-4)
    np.testing.assert_allclose(image, expected.image, atol=1e-4)
    assert cfg.eval_cycles == 1 and float(np.ptp(expected.map)) > 1e-3


def test_settings_that_it_lacks_are_refused(trained):
    spec, before, *_ = trained
    other = before._replace(cfg=dataclasses.replace(before.cfg, ae_skip=True))
    with pytest.raises(ValueError, match="peer of neural_batch got ae_skip=True; expected False"):
        peers.make("neural_batch", other, spec)
