"""The GradCon peer does the same work: same scores, losses, gradients and steps."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import batch_of, torch_batch

from benchmarks import peers
from jaxad import train
from jaxad.core import Spec
from jaxad.methods import gradcon

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")

CASES = {
    "paper": ((28, 28, 1), {"encoder": (8, 8, 12, 12), "decoder": (12, 8, 8)}),
    "halving": ((16, 24, 3), {"geometry": "halving", "encoder": (8, 12), "decoder": (8,), "ref_decay": 0.5}),
}


def start(name):
    """A state with a reference of its own, and pictures.

    The reference has the size of gradients, so that those that training adds to it count.
    """
    shape, fields = CASES[name]
    spec, numbers = Spec(shape, {"train": 8}), np.random.default_rng(1)
    cfg = gradcon.GradConConfig(steps=50, gradient_weight=0.3, **fields)
    state = train.init(gradcon.METHOD, jax.random.key(3), cfg, spec)
    reference = jax.tree.map(lambda x: jnp.asarray(1e-3 * numbers.normal(size=x.shape), "f"), state.reference_sum)
    images = numbers.integers(0, 256, (4, *shape), np.uint8)
    return spec, state._replace(reference_sum=reference, reference_weight=jnp.float32(1)), images


@pytest.mark.parametrize("name", CASES)
def test_scores_are_equal(name):
    """The cosines too: scored by gradients alone, and by both."""
    spec, state, images = start(name)
    for fields in ({}, {"score_error_weight": 0.0, "score_gradient_weight": 1.0}):
        own = state._replace(cfg=train.as_arrays(state.cfg.__class__(**{**vars(state.cfg), **fields})))
        ours = jax.jit(gradcon.score)(own, batch_of(images).image)
        image, maps = peers.make("gradcon", own, spec).score(peers.place(images))
        np.testing.assert_allclose(image, ours.image, rtol=1e-4, atol=2e-6)
        np.testing.assert_allclose(maps, ours.map, rtol=1e-4, atol=1e-6)
        assert float(np.std(ours.image)) > 1e-5


@pytest.mark.parametrize("is_first", [False, True], ids=["aligned", "first"])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_equal(name, is_first):
    spec, state, images = start(name)
    if is_first:
        zeros = jax.tree.map(jnp.zeros_like, state.reference_sum)
        state = state._replace(reference_sum=zeros, reference_weight=jnp.float32(0))
    arguments = state.params, state.reference_sum, jnp.bool_(is_first), state.cfg, batch_of(images).image, None
    (value, _), grads = jax.jit(jax.value_and_grad(gradcon.loss, has_aux=True))(*arguments)
    peer = peers.make("gradcon", state, spec)
    found = peer.steps["train"](torch_batch(images))
    np.testing.assert_allclose(found["loss"], value, rtol=1e-5)
    kernel = importlib.import_module("benchmarks.peers.gradcon").kernel
    for part, prefix in ((peer.module.encoder, "conv"), (peer.module.decoder, "deconv")):
        for i, layer in enumerate(part):
            own = grads[f"{prefix}_{i}"]
            _same(layer.weight.grad, kernel(own["kernel"], is_transposed=prefix == "deconv"))
            _same(layer.bias.grad, own["bias"])


def _same(theirs, ours):
    # Sums over thousands of rounded products, in another order: compared on the scale of the whole array.
    scale = float(np.abs(np.asarray(ours)).max())
    assert scale > 0
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("name", CASES)
def test_steps_stay_together(name):
    """Ten steps of Adam from an empty reference: losses and cosines agree, so the references that both gather do."""
    spec, state, _ = start(name)
    zeros = jax.tree.map(jnp.zeros_like, state.reference_sum)
    state = state._replace(reference_sum=zeros, reference_weight=jnp.float32(0))
    peer = peers.make("gradcon", state, spec)
    step, numbers = jax.jit(gradcon.train_step), np.random.default_rng(2)
    ours, theirs = [], []
    for _ in range(10):
        images = numbers.integers(0, 256, (4, *spec.image), np.uint8)
        state, metrics = step(jax.random.key(0), state, batch_of(images))
        found = peer.steps["train"](torch_batch(images))
        ours.append([float(metrics[name]) for name in ("loss", "reconstruction", "cosine")])
        theirs.append([float(found[name]) for name in ("loss", "reconstruction", "cosine")])
    np.testing.assert_allclose(theirs, ours, rtol=2e-3, atol=2e-4)
    assert max(abs(row[2]) for row in ours) > 0.05 and ours[0][2] == 0


def test_reset_starts_again():
    spec, state, images = start("halving")
    peer = peers.make("gradcon", state, spec)
    before = np.asarray(peer.score(peers.place(images))[0])
    first = [float(peer.steps["train"](torch_batch(images))["loss"]) for _ in range(3)]
    assert np.abs(np.asarray(peer.score(peers.place(images))[0]) - before).max() > 1e-4
    peer.reset()
    np.testing.assert_allclose(peer.score(peers.place(images))[0], before, rtol=1e-5)
    assert [float(peer.steps["train"](torch_batch(images))["loss"]) for _ in range(3)] == pytest.approx(first, rel=1e-5)


def test_settings_that_the_public_code_lacks_are_refused():
    spec, state, _ = start("halving")
    other = gradcon.GradConConfig(**{**vars(state.cfg), "use_bias": True})
    with pytest.raises(peers.Refusal, match="peer of gradcon got use_bias=True; expected False"):
        peers.make("gradcon", state._replace(cfg=other), spec)


def with_fields(state, **fields):
    return state._replace(cfg=train.as_arrays(gradcon.GradConConfig(**{**vars(state.cfg), **fields})))


def test_a_map_that_the_public_code_lacks_is_not_compared():
    spec, state, images = start("halving")
    image, maps = peers.make("gradcon", with_fields(state, map="both"), spec).score(peers.place(images))
    expected, _ = peers.make("gradcon", state, spec).score(peers.place(images))
    np.testing.assert_array_equal(image, expected)
    assert maps is None


def test_bfloat16_is_close_and_not_the_same():
    spec, state, images = start("halving")
    half = with_fields(state, dtype="bfloat16")
    ours = jax.jit(gradcon.score)(half, batch_of(images).image)
    peer, exact = peers.make("gradcon", half, spec), peers.make("gradcon", state, spec)
    image, maps = peer.score(peers.place(images))
    np.testing.assert_allclose(image, ours.image, rtol=3e-2)  # eight bits of mantissa, some layers of them
    np.testing.assert_allclose(maps, ours.map, rtol=0, atol=3e-2 * float(ours.map.max()))
    assert np.abs(np.asarray(image) - np.asarray(exact.score(peers.place(images))[0])).max() > 0
    losses = [float(p.steps["train"](torch_batch(images))["loss"]) for p in (peer, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
