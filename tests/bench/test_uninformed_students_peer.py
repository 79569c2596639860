"""The Uninformed Students peer does the same work: same scores, losses and steps."""

import importlib.util

import jax
import numpy as np
import pytest
from batches import batch_of

from benchmarks import peers
from jaxad import train
from jaxad.core import Spec
from jaxad.methods import uninformed_students as us

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")

SMALL = {"students": 2, "width": 0.04, "descriptor": 6, "steps": 50, "learning_rate": 3e-3, "weight_decay": 0.1}
CASES = {
    "dense": ((18, 21, 3), {"patches": (33,)}),
    "three pools": ((18, 20, 3), {"patches": (65,), "padding": "zero", "centre_field": True}),
    "strided": ((28, 25, 1), {"patches": (33, 17), "out_stride": 4}),
}


def start(name):
    """A state with statistics of pictures, so that a mistake in importing them shows."""
    shape, fields = CASES[name]
    spec, cfg = Spec(shape, {"train": 8}), us.UninformedStudentsConfig(**{**SMALL, **fields})
    images = np.random.default_rng(0).integers(0, 256, (3, *shape), np.uint8)

    @jax.jit
    def made(key, batch):
        state = train.init(us.METHOD, key, cfg, spec)
        state, _ = us.target_step(key, state, batch)
        return us.calibration_step(key, state, batch)[0]

    return spec, made(jax.random.key(3), batch_of(images)), images


@pytest.mark.parametrize("name", CASES)
def test_scores_are_equal(name):
    spec, state, images = start(name)
    images = images[:2, ::-1].copy()  # not those of the statistics
    ours = jax.jit(us.score)(state, batch_of(images).image)
    image, maps = peers.make("uninformed_students", state, spec).score(peers.place(images))
    scale = np.abs(np.asarray(ours.map)).max()
    np.testing.assert_allclose(maps, ours.map, rtol=0, atol=2e-4 * scale)
    np.testing.assert_allclose(image, ours.image, rtol=0, atol=2e-4 * scale)


def test_steps_are_equal():
    """Five steps, decay included: losses, then kernels. And the first again after a reset."""
    spec, state, images = start("dense")
    peer = peers.make("uninformed_students", state, spec)
    batch = peers.place_batch(images, np.zeros(3), np.zeros(images.shape[:3]))
    step, first = jax.jit(us.train_step), None
    for _ in range(5):
        state, metrics = step(None, state, batch_of(images))
        theirs = float(peer.steps["students"](batch)["loss"])
        first = first or theirs
        np.testing.assert_allclose(theirs, metrics["loss"], rtol=1e-4)
    for name, scale in peer.module.items():
        own = state.scales[name]
        kernel = importlib.import_module("benchmarks.peers.uninformed_students").kernel
        for m, student in enumerate(scale.students):
            expected = kernel(own.students["conv2"]["kernel"][m])
            np.testing.assert_allclose(student.convs[1].weight.detach(), expected, atol=2e-3)
    peer.reset()
    assert float(peer.steps["students"](batch)["loss"]) == pytest.approx(first, rel=1e-5)


def test_settings_that_the_peer_lacks_are_refused():
    spec = Spec((20, 20, 3), {"train": 3})
    cfg = us.UninformedStudentsConfig(patches=(17,), out_stride=3)
    state = jax.eval_shape(lambda: us.init(jax.random.key(0), cfg, spec))
    with pytest.raises(ValueError, match="got out_stride=3; expected 1, 2, 4 or 8"):
        peers.make("uninformed_students", state, spec)
