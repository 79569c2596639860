"""The OGNet peer does the same work: same scores, losses, gradients and steps of both phases."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from jaxad import train
from jaxad.core import Batch, Spec
from jaxad.methods import ognet

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")

SMALL = {"widths": (4, 6), "refine_block": 3, "conv_impl": "conv", "discriminator_rate": 1e-3, "refine_rate": 1e-3}
CASES = {
    "pictures": ((13, 15, 2), {"low_weight": 0.3}),
    "patches": (
        (17, 20, 1),
        {"patch": 13, "stride": 3, "pseudo_pairs": "roll", "generator_gradient": "post", "pseudo_blend": "moved"},
    ),
}


def start(name):
    """A state whose statistics and old autoencoder are not those of the start."""
    shape, fields = CASES[name]
    spec, cfg = Spec(shape, {"train": 8}), ognet.OGNetConfig(**{**SMALL, **fields})
    begin = jax.jit(lambda key: train.init(ognet.METHOD, key, cfg, spec))
    state, other, numbers = begin(jax.random.key(3)), begin(jax.random.key(4)), np.random.default_rng(1)

    def moved(network):
        stats = jax.tree.map(lambda s: 0.8 * s + numbers.uniform(0.05, 0.2, s.shape).astype("f"), network.batch_stats)
        return network._replace(batch_stats=stats)

    parts = {"generator": state.generator, "old": other.generator, "discriminator": state.discriminator}
    state = state._replace(**{name: moved(network) for name, network in parts.items()})
    return spec, state, numbers.integers(0, 256, (12, *shape), np.uint8)


def batch_of(images):
    size = len(images)
    mask, rows = jnp.zeros(images.shape[:3]), jnp.arange(size, dtype=jnp.int32)
    return Batch(jnp.asarray(images, jnp.float32) / 255, jnp.zeros(size, jnp.int32), mask, rows, jnp.ones(size, bool))


def torch_batch(images):
    return peers.place_batch(images, np.zeros(len(images)), np.zeros(images.shape[:3]))


@pytest.mark.parametrize("name", CASES)
def test_scores_are_equal(name):
    spec, state, images = start(name)
    ours = jax.jit(ognet.score)(state, batch_of(images).image)
    image, maps = peers.make("ognet", state, spec).score(peers.place(images))
    np.testing.assert_allclose(image, ours.image, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps, ours.map, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_steps_of_both_phases_are_equal(name):
    """Three steps of phase one; from the start again, three blocks of phase two: losses, weights, statistics."""
    spec, begun, images = start(name)
    peer = peers.make("ognet", begun, spec)
    kernel = importlib.import_module("benchmarks.peers.ognet").kernel
    for index, phase, step in ((0, "warmup", ognet.adversarial_step), (2, "refine", ognet.refine_step)):
        key, run = train.phase_key(jax.random.key(0), index), jax.jit(step)
        rows, state = images[:4] if phase == "warmup" else images, begun
        peer.reset()
        for t in range(3):
            state, metrics = run(jax.random.fold_in(key, t), state, batch_of(rows))
            theirs = peer.steps[phase](torch_batch(rows))
            assert set(theirs) <= set(metrics)
            for kind in theirs:
                np.testing.assert_allclose(theirs[kind], metrics[kind], rtol=1e-5 if t == 0 else 2e-3, err_msg=kind)
        layers, judged = peer.module.discriminator, state.discriminator
        # Of weights that Adam moved by 0.003 or 0.009.
        np.testing.assert_allclose(
            layers[0].weight.detach(), kernel(judged.params["conv_0"]["kernel"]), atol=5e-4, err_msg=phase
        )
        # The mean has the bias in it, which rounding moves there (see `is_normalised`) and here not.
        np.testing.assert_allclose(layers[1].running_var, judged.batch_stats["norm_0"]["var"], rtol=1e-2)
        if phase == "warmup":
            (up, *_) = (m for m in peer.module.generator if type(m).__name__ == "ConvTranspose2d")
            made = kernel(state.generator.params["up_0"]["kernel"], is_transposed=True)
            np.testing.assert_allclose(up.weight.detach(), made, atol=5e-4)


def test_settings_that_the_peer_lacks_are_refused():
    cfg = ognet.OGNetConfig(**SMALL, patch=13, stride=1, dense=True)
    state = jax.eval_shape(lambda: ognet.init(jax.random.key(0), cfg, Spec((13, 15, 2), {})))
    with pytest.raises(ValueError, match="got dense=True; expected False"):
        peers.make("ognet", state, Spec((13, 15, 2), {}))
