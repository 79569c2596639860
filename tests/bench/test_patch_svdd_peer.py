"""The Patch SVDD peer does the same work: same embeddings, distances, maps and spread."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from jaxad import train
from jaxad.core import Batch, Source, spec_of
from jaxad.methods import patch_svdd

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed: no peers")


@pytest.fixture(scope="module")
def trained():
    """A tiny detector whose bank holds five pictures, and others."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    data = {"train": Source(image=jnp.asarray(pixels[:5]), label=jnp.zeros(5, jnp.int32))}
    cfg = patch_svdd.PatchSVDDConfig(**{**patch_svdd.PRESETS["tiny"].config, "steps": 0})
    return jax.jit(lambda: train.fit(patch_svdd.METHOD, jax.random.key(0), cfg, data)[0])(), spec_of(data), pixels[5:]


@pytest.mark.parametrize("fusion", ["product", "sum", "large", "small"])
def test_scores_are_equal(trained, fusion):
    state, spec, images = trained
    state = state._replace(cfg=dataclasses.replace(state.cfg, fusion=fusion))
    ours = jax.jit(patch_svdd.score)(state, images.astype(np.float32) / 255)
    image, maps = peers.make("patch_svdd", state, spec).score(peers.place(images))
    np.testing.assert_allclose(image, ours.image, rtol=2e-4)
    np.testing.assert_allclose(maps, ours.map, rtol=2e-4, atol=1e-6)


def test_an_empty_bank_gives_the_same_scores_too(trained):
    state, spec, images = trained
    empty = jax.jit(lambda: train.init(patch_svdd.METHOD, jax.random.key(0), state.cfg, spec))()
    ours = jax.jit(patch_svdd.score)(empty, images.astype(np.float32) / 255)
    assert bool(jnp.isfinite(ours.map).all())
    np.testing.assert_allclose(peers.make("patch_svdd", empty, spec).score(peers.place(images))[1], ours.map, rtol=2e-4)


def test_the_pass_over_the_bank_tells_the_same(trained):
    state, spec, images = trained
    batch = Batch(images / np.float32(255), np.zeros(3), np.zeros((3, 32, 32)), np.arange(3), np.ones(3, bool))
    _, ours = jax.jit(patch_svdd.bank_step)(jax.random.key(0), state, batch)
    step = peers.make("patch_svdd", state, spec).steps["bank"]
    found = step(peers.place_batch(images, np.zeros(3), np.zeros((3, 32, 32))))
    for name, value in ours.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4)


def test_settings_that_the_public_code_lacks_are_refused(trained):
    state, spec, _ = trained
    other = dataclasses.replace(state.cfg, neighbours=3)
    with pytest.raises(ValueError, match="peer of patch_svdd got neighbours=3"):
        peers.make("patch_svdd", state._replace(cfg=other), spec)


def test_bfloat16_is_close_and_not_the_same(trained):
    state, spec, images = trained
    half = state._replace(cfg=dataclasses.replace(state.cfg, dtype="bfloat16"))
    ours = jax.jit(patch_svdd.score)(half, images.astype(np.float32) / 255)
    found, exact = (peers.make("patch_svdd", s, spec).score(peers.place(images))[1] for s in (half, state))
    # Eight bits of mantissa, some layers of them, and products of two distances, small beside what they are between.
    np.testing.assert_allclose(found, ours.map, rtol=0, atol=0.1 * float(ours.map.max()))
    assert np.abs(np.asarray(found) - np.asarray(exact)).max() > 0
