"""The SynthCP peer does the same work: same scores, losses, gradients and steps."""

import dataclasses
import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from jaxad import train
from jaxad.core import Batch, Spec
from jaxad.methods import synthcp
from jaxad.nn import spade

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")

SHAPE = (16, 16, 3)
SMALL = {
    **synthcp.PRESETS["tiny"].config,
    "generator_widths": (6, 6, 4),
    "upsamplings": 2,
    "spade_hidden": 5,
    "discriminator_widths": (4, 5, 6),
    "discriminator_scales": 2,
    "steps": 8,
    "learning_rate": 1e-3,
    "discriminator_rate": 2e-3,
    "conv_impl": "conv",
}


def batch_of(images):
    size = len(images)
    floats = jnp.asarray(images, jnp.float32) / 255
    mask = jnp.zeros(images.shape[:3])
    return Batch(floats, jnp.zeros(size, jnp.int32), mask, jnp.arange(size), jnp.ones(size, bool))


def torch_batch(images):
    return peers.place_batch(images, np.zeros(len(images)), np.zeros(images.shape[:3]))


def start(**fields):
    """A state with statistics and biases away from their start, so that a mistake in importing them shows."""
    spec, numbers = Spec(SHAPE, {"train": 4}), np.random.default_rng(1)
    cfg = synthcp.SynthCPConfig(**{**SMALL, **fields})
    state = jax.jit(lambda key: train.init(synthcp.METHOD, key, cfg, spec))(jax.random.key(3))
    images = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), np.uint8)

    def away(path, leaf):
        if not any(word in str(path) for word in ("batch_stats", "bias")):
            return leaf
        return leaf + numbers.uniform(0.01, 0.1, leaf.shape).astype("f")

    params, others = (jax.tree_util.tree_map_with_path(away, tree) for tree in (state.params, state.others))
    state = state._replace(params=params, others=others)
    for phase in synthcp.phases(cfg):
        if phase.steps is None and cfg.labels == "clusters":
            state = jax.jit(phase.finish)(
                jax.random.key(0), jax.jit(phase.step)(jax.random.key(0), state, batch_of(images[:3]))[0]
            )
    return spec, state, images


def test_scores_are_equal():
    spec, state, images = start()
    ours = jax.jit(synthcp.score)(state, batch_of(images).image)
    image, maps = peers.make("synthcp", state, spec).score(peers.place(images))
    scale = float(np.abs(ours.map).max())
    np.testing.assert_allclose(maps, ours.map, atol=1e-3 * scale)
    np.testing.assert_allclose(image, ours.image, atol=1e-3 * scale)
    sharper = state._replace(cfg=dataclasses.replace(state.cfg, smooth_sigma=0.0, image_weight=0.0))
    assert float(np.abs(jax.jit(synthcp.score)(sharper, batch_of(images).image).map - ours.map).max()) > 0.1 * scale


def test_steps_are_equal():
    """Loss and gradients of the first step, then the losses of five, past where the learning rate falls."""
    spec, state, images = start()
    peer = peers.make("synthcp", state, spec)
    step = jax.jit(synthcp.generator_step)
    kernel = importlib.import_module("benchmarks.peers.synthcp").kernel
    for t in range(5):
        state, metrics = step(jax.random.key(t), state, batch_of(images))
        theirs = peer.steps["generate"](torch_batch(images))
        np.testing.assert_allclose(theirs["loss"], metrics["loss"], rtol=1e-4 if t == 0 else 2e-3)
        if t == 0:
            # Adam's first moment with beta 0 is the gradient.
            painted, judged = (state.optimizer[name].mu for name in ("generator", "discriminator"))
            nets = peer.module.generator, peer.module.discriminators
            first = nets[1].scales[0].layers[0][0].weight
            for weight, own in (
                (nets[0].start.weight, painted["start"]),
                (nets[0].blocks[0].conv_0.weight_orig, painted["block_0"]["conv_0"]["kernel"]),
                (nets[0].blocks[2].conv_s.weight_orig, painted["block_2"]["conv_s"]["kernel"]),
                (nets[0].blocks[2].norm_s.shared.weight, painted["block_2"]["labels_s"]),
                (nets[0].blocks[1].norm_1.beta.weight, painted["block_1"]["modulate_1"]["kernel"][..., 6:]),
                (nets[1].scales[1].layers[1][0].weight_orig, judged["scale_1"]["middle_0"]["kernel"]),
                (first, jnp.concatenate([judged["scale_0"][name] for name in ("labels", "image")], axis=2)),
            ):
                grad, expected = weight.grad, kernel(own)
                scale = float(expected.abs().max())
                assert scale > 0
                np.testing.assert_allclose(grad, expected, rtol=0, atol=2e-3 * scale)
    peer.reset()
    spec, state, _ = start()
    _, metrics = step(jax.random.key(0), state, batch_of(images))
    np.testing.assert_allclose(peer.steps["generate"](torch_batch(images))["loss"], metrics["loss"], rtol=1e-4)


def test_the_peer_doubles_where_jaxad_does():
    assert [spade.doubles(i, 3, 2) for i in range(3)] == [False, True, True]
    generator = peers.make("synthcp", *start()[1::-1]).module.generator
    assert generator.doubles == [False, True, True] and generator.begin == (4, 4)


def test_settings_that_the_peer_lacks_are_refused():
    spec, state, _ = start(comparator="discrepancy", swap_grid=4)
    with pytest.raises(ValueError, match="peer of synthcp got comparator='discrepancy'; expected 'feature'"):
        peers.make("synthcp", state, spec)
