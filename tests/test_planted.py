"""Each conformance check turns red on the defect it is there for."""

import jax
import jax.numpy as jnp
import pytest
import toy
from conformance import (
    Case,
    check_cuts,
    check_leaves,
    check_passes,
    check_recompiles,
    check_rows,
    check_saved,
    check_seeds,
    check_sharded,
    check_structure,
    make_data,
)

from jaxad import train
from jaxad.core import Scores, config, static

DATA = make_data((8, 8, 3))


def broken(**fields):
    return Case(toy.METHOD._replace(**fields), toy.ToyConfig(), DATA)


def phases_with(**fields):
    def phases(cfg):
        return tuple(phase._replace(**fields) for phase in toy.phases(cfg))

    return phases


def widening_step(key, state, batch):
    state, metrics = toy.train_step(key, state, batch)
    return state._replace(template=state.template.astype(jnp.bfloat16)), metrics


def test_structure_catches_a_widened_dtype():
    with pytest.raises(AssertionError, match="structure"):
        check_structure(broken(phases=phases_with(step=widening_step)))


def test_structure_catches_a_lost_field():
    with pytest.raises(AssertionError, match="structure"):
        check_structure(broken(phases=phases_with(finish=lambda key, state: state._replace(seen=None))))


def test_cuts_catches_keys_tied_to_the_start_of_a_chunk(monkeypatch):
    def tied(phase, key, state, source, first, count, *, place=train.unplaced):
        key = jax.random.fold_in(key, first)  # the defect: randomness depends on where the run was cut
        steps = first + jnp.arange(count, dtype=jnp.int32)
        return jax.lax.scan(lambda s, t: train.one_step(phase, key, s, source, t, place=place), state, steps)

    monkeypatch.setattr(train, "some_steps", tied)
    with pytest.raises(AssertionError):
        check_cuts(broken(name="tied"))


def test_seeds_catches_a_constant_key():
    def init(key, cfg, spec):
        return toy.init(jax.random.key(0), cfg, spec)

    def step(key, state, batch):
        return toy.train_step(jax.random.key(0), state, batch)

    def phases(cfg):
        mean, learn = toy.phases(cfg)
        return (mean, learn._replace(step=step, batch_size=13, steps=3))  # all rows in each step: no shuffling either

    with pytest.raises(AssertionError, match="two seeds"):
        check_seeds(broken(init=init, phases=phases))


def test_leaves_catches_a_dead_hyper_parameter():
    def step(key, state, batch):
        frozen = state._replace(cfg=toy.ToyConfig())
        after, metrics = toy.train_step(key, frozen, batch)
        return after._replace(cfg=state.cfg), metrics

    def phases(cfg):
        mean, learn = toy.phases(cfg)
        return (mean, learn._replace(step=step))

    with pytest.raises(AssertionError, match="changes nothing"):
        check_leaves(broken(phases=phases))


@config
class LeakyConfig:
    steps: int = static(6)
    batch_size: int = static(8)
    learning_rate: float = static(0.5)  # the defect
    noise: float = 0.1


def test_recompiles_catches_a_static_leak():
    with pytest.raises(AssertionError, match="compilations"):
        check_recompiles(Case(toy.METHOD, LeakyConfig(), DATA), ("learning_rate", "noise"))


def test_rows_catches_batch_statistics_at_test_time():
    def score(state, images):
        maps = toy.score(state, images - images.mean(axis=0)).map
        return Scores(image=maps.mean(axis=(1, 2)), map=maps)

    with pytest.raises(AssertionError):
        check_rows(broken(score=score))


def test_passes_catches_ignored_padding():
    def step(key, state, batch):
        return toy.mean_step(key, state, batch._replace(valid=jnp.ones_like(batch.valid)))

    def phases(cfg):
        mean, learn = toy.phases(cfg)
        return (mean._replace(step=step), learn)

    with pytest.raises(AssertionError):
        check_passes(broken(phases=phases))


def test_sharded_catches_means_over_one_device(monkeypatch):
    from jaxad import shard

    def place(mesh):
        return lambda batch: batch._replace(image=batch.image.at[2:].set(batch.image[:2].mean()))  # one shard's data

    monkeypatch.setattr(shard, "over_data", place)
    with pytest.raises(AssertionError):
        check_sharded(broken(name="sharded"))


def test_saved_catches_state_outside_the_tree(tmp_path):
    calls = []

    def score(state, images):
        calls.append(0)  # hidden state: what is scored depends on how often it was traced
        scores = toy.score(state, images)
        return Scores(scores.image * len(calls), scores.map)

    with pytest.raises((AssertionError, RuntimeError)):
        check_saved(broken(score=score), tmp_path)
