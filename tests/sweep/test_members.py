"""Programs of the members of a sweep: equal to lone runs however the model axis is computed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conformance import CLOSE, make_data

from jaxad import members, shard, train
from jaxad.core import Source, as_arrays, frames_of, select, take

POOL = make_data((8, 8, 3))["labelled"]
SIZES = (9, 13, 5, 13)
RATES = (0.5, 0.25, 0.1, 0.4)
TRAIN_ONLY = toy.METHOD._replace(phases=lambda cfg: toy.phases(cfg)[1:])


def rows_of(member: int) -> np.ndarray:
    return np.random.default_rng(member).permutation(13)[: SIZES[member]].astype(np.int32)


def alone(member: int):
    """What a lone run of the member trains, on its own pictures."""
    data = {"train": select(POOL, rows_of(member))}
    cfg = toy.ToyConfig(learning_rate=RATES[member])
    for progress in train.drive(TRAIN_ONLY, jax.random.key(member), cfg, data, mode="loop"):
        state = progress.state
    return state


def stacked() -> Source:
    """The pictures as one pool with the members' choices of rows, padded."""
    rows = np.stack([np.resize(rows_of(m), max(SIZES)) for m in range(4)])
    return dataclasses.replace(POOL, rows=jnp.asarray(rows), size=jnp.asarray(SIZES, jnp.int32))


@pytest.mark.parametrize(
    ("way", "devices", "mode"),
    [("vmap", 1, "loop"), ("map", 1, "chunks"), ("map", 2, "loop"), ("vmap", 4, "scan")],
)
def test_members_with_other_rates_seeds_and_numbers_of_pictures_equal_lone_runs(way, devices, mode):
    mesh = shard.make_mesh(run=devices, devices=jax.devices()[:devices]) if devices > 1 else None
    programs = members.Programs(members.Members(4, way, mesh))
    keys = programs.place(jax.vmap(jax.random.key)(jnp.arange(4)))
    cfg = programs.place(as_arrays(toy.ToyConfig(learning_rate=jnp.asarray(RATES), noise=jnp.full(4, 0.1))))
    data = {"train": programs.place(stacked(), members.axes_of(stacked()))}
    steps = 0
    for progress in train.drive(TRAIN_ONLY, keys, cfg, data, mode=mode, chunk=4, programs=programs):
        state = progress.state
        if progress.metrics:
            steps += progress.metrics["loss"].shape[0]
            assert progress.metrics["loss"].shape[1:] == (4,)
    assert steps == 6
    for member in range(4):
        np.testing.assert_allclose(state.template[member], alone(member).template, **CLOSE)
    assert not np.allclose(state.template[1], state.template[3], **CLOSE)
    if devices > 1:
        assert len({shard.device for shard in state.template.addressable_shards}) == devices


def test_programs_are_compiled_once_for_each_label_and_shape():
    programs = members.Programs(members.Members(2, "vmap"))
    first = programs.compile(("double",), lambda x: 2 * x, (0,), (), jnp.ones((2, 3)))
    assert programs.take_seconds() > 0 and programs.bytes >= 2 * 2 * 3 * 4
    assert programs.compile(("double",), lambda x: 2 * x, (0,), (), jnp.zeros((2, 3))) is first
    assert programs.take_seconds() == 0
    assert programs.compile(("double",), lambda x: 2 * x, (0,), (), jnp.ones((2, 4))) is not first
    np.testing.assert_array_equal(first(jnp.full((2, 3), 2.0)), np.full((2, 3), 4.0))


@pytest.mark.parametrize("way", members.WAYS)
def test_lifting_stacks_what_is_said_to_be_stacked(way):
    def weigh(x, parts):
        return {"sum": x * parts["own"] + parts["shared"].sum()}

    lifted = members.lift(weigh, (0, {"own": 0, "shared": None}), members.Members(3, way))
    x, own, shared = jnp.arange(3.0), jnp.arange(6.0).reshape(3, 2), jnp.arange(5.0)
    expected = [x[i] * own[i] + 10 for i in range(3)]
    np.testing.assert_allclose(jax.jit(lifted)(x, {"own": own, "shared": shared})["sum"], np.stack(expected))


def test_rows_choose_samples_from_a_pool_of_pictures():
    rows = np.array([7, 2, 12], np.int32)
    source = dataclasses.replace(POOL, rows=jnp.asarray(rows))
    assert len(source) == 3
    image, label, mask = take(source, jnp.array([2, 0]))
    np.testing.assert_allclose(image, np.asarray(POOL.image)[[12, 7]] / 255, rtol=1e-6)
    np.testing.assert_array_equal(label, np.asarray(POOL.label)[[12, 7]])
    np.testing.assert_array_equal(mask, np.asarray(POOL.mask)[[12, 7]])
    np.testing.assert_array_equal(frames_of(select(source, jnp.array([1])), jnp.array([0])), [2])


@pytest.mark.parametrize("size", [1, 2, 13, 64, 65])
def test_a_number_of_rows_known_late_shuffles_as_one_known_early(size):
    key, positions = jax.random.key(1), jnp.arange(3 * size)
    late = jax.jit(lambda size: train.shuffled_rows(key, positions, size=size))(jnp.int32(size))
    np.testing.assert_array_equal(late, train.shuffled_rows(key, positions, size=size))
