"""The SMAI peer does the same work: same scores, losses, gradients and steps."""

import importlib.util

import jax
import numpy as np
import pytest
from batches import batch_of, torch_batch

from benchmarks import peers
from jaxad import train
from jaxad.core import Spec
from jaxad.methods import smai

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")

SHAPE = (16, 16, 3)
SMALL = {"widths": (6, 8, 10), "grids": (4, 2), "dilate": 1, "steps": 50, "conv_impl": "conv"}


def start(**fields):
    """A state with statistics away from their start, so that a mistake in importing them shows."""
    spec, numbers = Spec(SHAPE, {"train": 8}), np.random.default_rng(1)
    cfg = smai.SMAIConfig(**{**SMALL, "ssim_weight": 0.7, "gms_weight": 1.3, **fields})
    state = jax.jit(lambda key: train.init(smai.METHOD, key, cfg, spec))(jax.random.key(3))
    stats = jax.tree.map(lambda x: 0.05 * x + numbers.uniform(0.01, 0.05, x.shape).astype("f"), state.batch_stats)
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)
    state = state._replace(batch_stats=stats)
    return spec, jax.jit(smai.calibrate_step)(jax.random.key(0), state, batch_of(images[:3]))[0], images


@pytest.mark.parametrize(
    "fields",
    [{}, {"residual": "ssim"}, {"residual": "l2", "grouping": "one_by_one", "calibrate": "none"}],
    ids=["coloured", "ssim", "one by one, l2"],
)
def test_scores_are_equal(fields):
    spec, state, images = start(**fields)
    ours = jax.jit(smai.score)(state, batch_of(images).image)
    image, maps = peers.make("smai", state, spec).score(peers.place(images))
    scale = float(np.abs(ours.map).max())
    np.testing.assert_allclose(image, ours.image, atol=1e-4 * scale)
    np.testing.assert_allclose(maps, ours.map, atol=1e-4 * scale)


def test_steps_are_equal():
    """Loss and gradients of the first step, then the losses of five; the same is hidden on both sides."""
    spec, state, images = start()
    peer = peers.make("smai", state, spec)
    key, step = train.phase_key(jax.random.key(0), 0), jax.jit(smai.train_step)
    given, hidden = smai.view(jax.random.fold_in(key, 0), state.cfg, batch_of(images).image)
    gradient = jax.jit(jax.grad(smai.loss, has_aux=True))
    grads = gradient(state.params, state.batch_stats, state.cfg, given, hidden)[0]
    kernel = importlib.import_module("benchmarks.peers.smai").kernel
    for t in range(5):
        state, metrics = step(jax.random.fold_in(key, t), state, batch_of(images))
        theirs = peer.steps["train"](torch_batch(images))
        np.testing.assert_allclose(theirs["loss"], metrics["loss"], rtol=1e-5 if t == 0 else 2e-3)
        if t == 0:
            for conv, own in (
                (peer.module.down[0][0][0], grads["Layer_0"]["Conv_0"]),
                (peer.module.up[0][0][0], grads["Layer_6"]["Conv_0"]),
                (peer.module.last, grads["Layer_10"]["Conv_0"]),
            ):
                expected = kernel(own["kernel"])
                scale = float(expected.abs().max())
                assert scale > 0
                np.testing.assert_allclose(conv.weight.grad, expected, rtol=0, atol=1e-3 * scale)
    peer.reset()
    again = float(peer.steps["train"](torch_batch(images))["loss"])
    assert again > float(theirs["loss"])


def test_settings_that_the_peer_lacks_are_refused():
    spec, state, _ = start(conv="partial")
    with pytest.raises(ValueError, match="peer of smai got conv='partial'; expected 'plain'"):
        peers.make("smai", state, spec)
