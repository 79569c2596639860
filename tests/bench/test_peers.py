"""Peers do the same work: same weights and pictures, same scores, losses, gradients and steps."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import batch_of, torch_batch

from benchmarks import peers
from jaxad import methods, train
from jaxad.core import Spec
from jaxad.methods import memae

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")

SMALL = {"encoder": (8, 12), "decoder": (8,), "num_items": 20, "shrink_threshold": 1 / 20, "entropy_weight": 0.05}
CASES = {
    "pictures": ((18, 22, 3), {}),
    "whole picture is the query": ((9, 9, 3), {"query": "image", "activation": "relu", "first_kernel": 1}),
    "cosine": ((16, 16, 3), {"similarity": "cosine", "temperature": 0.1}),
    "no memory, mean": ((16, 16, 3), {"memory": False, "image_score": "mean"}),
    "no shrinkage": ((16, 16, 3), {"shrink_threshold": 0.0}),
    "clips": (
        (5, 12, 12, 1),
        {"time_strides": (1, 2), "score_frame": 2, "score_norm": "l1", "image_score": "mean"},
    ),
}


def start(shape, fields):
    method = methods.get("memae")
    spec = Spec(shape, {"train": 8})
    state = train.init(method, jax.random.key(3), method.config(**{**SMALL, **fields}), spec)
    numbers = np.random.default_rng(1)
    # Statistics away from 0 and 1, so that a mistake in importing them shows; a code that reads several items.
    stats = jax.tree.map(lambda x: x + jnp.asarray(numbers.uniform(0.1, 0.5, x.shape), jnp.float32), state.batch_stats)
    # Kernels start small (0.02), so that beside the biases flax's variance, E[x^2] - E[x]^2, would lose its digits.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 10 if path[-1].key == "kernel" else leaf, state.params
    )
    if "memory" in params:
        params["memory"] = params["memory"] * 3
    images = numbers.integers(0, 256, (4, *shape), np.uint8)
    return spec, state._replace(batch_stats=stats, params=params), images


@pytest.mark.parametrize("name", CASES)
def test_memae_scores_are_equal(name):
    spec, state, images = start(*CASES[name])
    ours = jax.jit(methods.get("memae").score)(state, batch_of(images).image)
    image, maps = peers.make("memae", state, spec).score(peers.place(images))
    np.testing.assert_allclose(image, ours.image, rtol=2e-4)
    np.testing.assert_allclose(maps, ours.map, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_memae_loss_and_gradients_are_equal(name):
    spec, state, images = start(*CASES[name])
    (value, _), grads = jax.jit(jax.value_and_grad(memae.loss, has_aux=True))(
        state.params, state.batch_stats, state.cfg, batch_of(images).image
    )
    peer = peers.make("memae", state, spec)
    loss = peer.steps["train"](torch_batch(images))["loss"]
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    modules = [*peer.module.encoder, *peer.module.decoder]
    convs, norms = ([m for m in modules if hasattr(m, kind)] for kind in ("kernel_size", "running_mean"))
    ours = [*_layers(grads["encoder"], "Conv"), *_layers(grads["decoder"], "ConvTranspose")]
    for conv, own in zip(convs, ours, strict=True):
        is_transposed = "Transpose" in type(conv).__name__
        expected = importlib.import_module("benchmarks.peers.memae").kernel(own["kernel"], is_transposed=is_transposed)
        _same(conv.weight.grad, expected)
    _same(convs[-1].bias.grad, ours[-1]["bias"])  # the others come before a batch normalisation: zero but for rounding
    scales = [*_layers(grads["encoder"], "NormActivate"), *_layers(grads["decoder"], "NormActivate")]
    for norm, own in zip(norms, scales, strict=True):
        _same(norm.weight.grad, own["BatchNorm_0"]["scale"])
        _same(norm.bias.grad, own["BatchNorm_0"]["bias"])
    if peer.module.memory is not None:
        assert np.abs(grads["memory"]).max() > 0
        _same(peer.module.memory.items.grad, grads["memory"])


def _layers(tree, kind):
    return [tree[f"{kind}_{i}"] for i in range(len(tree)) if f"{kind}_{i}" in tree]


def _same(theirs, ours):
    # Sums over thousands of rounded products, in another order: compared on the scale of the whole array.
    scale = float(np.abs(np.asarray(ours)).max())
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=2e-4 * scale)


def test_memae_steps_stay_together():
    """Ten steps of Adam from one state on the same pictures: the losses agree."""
    spec, state, _ = start(*CASES["pictures"])
    state = state._replace(cfg=train.as_arrays(memae.MemAEConfig(**SMALL, learning_rate=3e-3)))
    peer = peers.make("memae", state, spec)
    step, key, numbers = jax.jit(memae.train_step), jax.random.key(0), np.random.default_rng(2)
    ours, theirs = [], []
    for _ in range(10):
        images = numbers.integers(0, 256, (4, *spec.image), np.uint8)
        state, metrics = step(key, state, batch_of(images))
        ours.append(float(metrics["loss"]))
        theirs.append(float(peer.steps["train"](torch_batch(images))["loss"]))
    assert ours[-1] < 0.95 * ours[0]
    np.testing.assert_allclose(theirs, ours, rtol=2e-3)


def test_a_missing_peer_says_what_to_do():
    with pytest.raises(ValueError, match=r"'nothing' has no peer; expected a file .*nothing.py.*--peer"):
        peers.make("nothing", None, None)
