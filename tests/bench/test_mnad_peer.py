"""The MNAD peer does the same work: same scores, losses, gradients, items and steps."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import batch_of, torch_batch

from benchmarks import peers
from jaxad import train
from jaxad.core import Spec
from jaxad.methods import mnad

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")

SMALL = {"widths": (6, 8, 10), "num_items": 5, "steps": 50, "compactness_weight": 0.3, "separateness_weight": 0.2}
CASES = {"prediction": ((3, 16, 20, 2), {"skips": True}), "reconstruction": ((16, 16, 3), {"skips": False})}


def start(shape, fields):
    """A state with statistics away from their start, so that a mistake in importing them shows."""
    spec, numbers = Spec(shape, {"train": 8}), np.random.default_rng(1)
    state = train.init(mnad.METHOD, jax.random.key(3), mnad.MNADConfig(**{**SMALL, **fields}), spec)
    # Variances small enough for the deepest features to differ from place to place, as trained ones do.
    stats = jax.tree.map(lambda x: 0.05 * x + numbers.uniform(0.01, 0.05, x.shape).astype("f"), state.batch_stats)
    items = jnp.asarray(numbers.normal(size=state.items.shape), jnp.float32)
    state = state._replace(batch_stats=stats, items=items / jnp.linalg.norm(items, axis=1, keepdims=True))
    # Not every draw will do: where a maximum or a ReLU is within rounding of a tie, gradients differ by more.
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)
    state, _ = jax.jit(mnad.statistics_step)(jax.random.key(0), state, batch_of(images))
    return spec, state, images


@pytest.mark.parametrize("name", CASES)
def test_scores_are_equal(name):
    spec, state, images = start(*CASES[name])
    images = images[::-1].copy()  # other pictures than the order in which the statistics saw them
    ours = jax.jit(mnad.score)(state, batch_of(images).image)
    image, maps = peers.make("mnad", state, spec).score(peers.place(images))
    np.testing.assert_allclose(image, ours.image, atol=2e-4)
    np.testing.assert_allclose(maps, ours.map, atol=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_equal(name):
    """Loss, gradients and new items of the first step; then the losses and items of two more.

    Where a gradient is zero but for rounding Adam takes whole steps, and items are 1e-3 apart after the third.
    """
    spec, state, images = start(*CASES[name])
    peer = peers.make("mnad", state, spec)
    trained, fixed = mnad._variables(state)
    grads = jax.jit(jax.grad(mnad.loss, has_aux=True))(trained, fixed, state.cfg, batch_of(images).image)[0]["params"]
    step, key = jax.jit(mnad.train_step), jax.random.key(0)
    for t in range(3):
        state, metrics = step(key, state, batch_of(images))
        theirs = peer.steps["train"](torch_batch(images))
        np.testing.assert_allclose(theirs["loss"], metrics["loss"], rtol=1e-5 if t == 0 else 2e-3)
        np.testing.assert_allclose(peer.module.memory.items, state.items, atol=1e-5 if t == 0 else 5e-3)
        if t == 0:
            kernel = importlib.import_module("benchmarks.peers.mnad").kernel
            for conv, own in (
                (peer.module.deepest[1], grads["encoder"]["Conv_0"]),
                (peer.module.down[0][0][0], grads["encoder"]["ConvNormRelu_0"]["Conv_0"]),
                (peer.module.last, grads["decoder"]["Conv_0"]),
            ):
                _same(conv.weight.grad, kernel(own["kernel"], is_transposed=False))
            rise = grads["decoder"]["ConvNormRelu_2"]["ConvTranspose_0"]["kernel"]
            _same(peer.module.rise[0][0].weight.grad, kernel(rise, is_transposed=True))


def test_reset_starts_again():
    spec, state, images = start(*CASES["prediction"])
    peer = peers.make("mnad", state, spec)
    first = [float(peer.steps["train"](torch_batch(images))["loss"]) for _ in range(3)]
    peer.reset()
    assert [float(peer.steps["train"](torch_batch(images))["loss"]) for _ in range(3)] == pytest.approx(first, rel=1e-5)
    assert first[2] < first[0]


def _same(theirs, ours):
    # Sums over thousands of rounded products, in another order: compared on the scale of the whole array.
    scale = float(np.abs(np.asarray(ours)).max())
    assert scale > 0
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * scale)


def test_settings_that_the_public_code_lacks_are_refused():
    spec, state, _ = start((16, 16, 3), {"update_norm": "assigned"})
    with pytest.raises(ValueError, match="peer of mnad got update_norm='assigned'; expected 'all'"):
        peers.make("mnad", state, spec)
