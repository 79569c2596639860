"""The engine: which rows a step sees, runs in pieces, runs from the host."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conformance import make_data

from jaxad import train
from jaxad.core import Phase, Source

DATA = make_data((8, 8, 3))
KEY = jax.random.key(3)
CFG = toy.ToyConfig()


@pytest.mark.parametrize("size", [1, 2, 3, 13, 64, 65, 1000])
def test_every_epoch_is_another_permutation(size):
    rows = np.asarray(jax.jit(lambda p: train.shuffled_rows(KEY, p, size=size))(jnp.arange(4 * size)))
    epochs = rows.reshape(4, size)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(size))
    if size > 10:
        assert all((epochs[i] != epochs[i + 1]).mean() > 0.5 for i in range(3))
        assert (epochs[0] != np.arange(size)).mean() > 0.5


def test_rows_that_follow_each_other_are_unrelated():
    """The step from a row to the next (modulo N) is as often 1 as any other; chance stays within 5 deviations."""
    size, epochs = 209, 3000
    positions = jnp.arange(size * epochs, dtype=jnp.int32)
    rows = np.asarray(jax.jit(lambda p: train.shuffled_rows(KEY, p, size=size))(positions)).reshape(epochs, size)
    steps = np.bincount((np.diff(rows, axis=1) % size).ravel(), minlength=size)[1:]
    expected = epochs
    excess = (((steps - expected) ** 2 / expected).sum() - (size - 2)) / np.sqrt(2 * (size - 2))
    assert steps.sum() == expected * (size - 1) and abs(excess) < 5


def test_shuffling_depends_on_the_key_and_spreads_rows_evenly():
    positions = jnp.arange(1000)
    run = jax.jit(lambda key: train.shuffled_rows(key, positions, size=1000))
    orders = np.stack([run(jax.random.key(seed)) for seed in range(200)])
    assert len({tuple(order[:10]) for order in orders}) == 200
    # the mean row at each place is 499.5 with a standard error of 289 / sqrt(200) = 20; a biased shuffle shows
    assert abs(orders.mean(axis=0) - 499.5).max() < 5 * 20.5
    steps = np.diff(orders, axis=1)
    assert abs(np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]) < 0.01 and steps.std() > 350


def test_a_batch_may_be_larger_than_its_source():
    phase = Phase("x", toy.train_step, steps=3, batch_size=30)
    rows, valid = train.batch_rows(KEY, phase, jnp.int32(0), size=13)
    assert np.bincount(rows, minlength=13).min() >= 2 and valid.all()


def test_a_pass_is_ordered_and_padded():
    phase = Phase("x", toy.mean_step, steps=None, batch_size=8)
    batch = train.batch_at(KEY, phase, jnp.int32(1), DATA["train"])
    np.testing.assert_array_equal(batch.index, np.arange(8, 16))
    np.testing.assert_array_equal(batch.valid, np.arange(8, 16) < 13)
    np.testing.assert_allclose(batch.image[0], np.asarray(DATA["train"].image[8]) / 255, rtol=1e-6)
    assert train.num_steps(phase, 13) == 2


@pytest.mark.parametrize("mode", ["scan", "chunks", "loop"])
def test_a_run_taken_up_again_gives_the_same_bits(mode):
    pieces = []
    for progress in train.drive(toy.METHOD, KEY, CFG, DATA, mode=mode, chunk=2):
        pieces.append((progress.position, jax.device_get(progress.state)))
    assert [tuple(p) for p, _ in pieces][-1] == (2, 0)
    for position, state in pieces[:-1]:
        *_, last = train.drive(toy.METHOD, KEY, CFG, DATA, mode=mode, chunk=2, start=(position, state))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(last.state), pieces[-1][1])


def test_pieces_end_at_multiples_of_the_chunk_and_carry_every_metric():
    cfg = dataclasses.replace(CFG, steps=7)
    seen = [p for p in train.drive(toy.METHOD, KEY, cfg, DATA, mode="chunks", chunk=3) if p.name == "train"]
    assert [len(p.metrics["loss"]) for p in seen] == [3, 3, 1]
    assert [tuple(p.position) for p in seen] == [(1, 3), (1, 6), (2, 0)]
    _, log = jax.jit(lambda: train.fit(toy.METHOD, KEY, cfg, DATA))()
    np.testing.assert_allclose(np.concatenate([p.metrics["loss"] for p in seen]), log["train"]["loss"], rtol=1e-5)


def test_a_slow_loop_yields_before_its_piece_is_whole():
    seen = list(train.drive(toy.METHOD, KEY, CFG, DATA, mode="loop", chunk=100, patience=0.0))
    assert len([p for p in seen if p.name == "train"]) == CFG.steps  # after each step


def test_streamed_from_the_host_equals_resident_on_the_device():
    """Arrays on the host stand for data that no device holds: a pass with padding and shuffled training."""
    source = DATA["train"]
    feed = train.feed_arrays(np.asarray(source.image), np.asarray(source.label))
    state, log = train.fit_stream(toy.METHOD, KEY, CFG, {"train": feed})
    expected, expected_log = jax.jit(lambda: train.fit(toy.METHOD, KEY, CFG, {"train": source}))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state, expected)
    np.testing.assert_allclose(log["train"]["loss"], expected_log["train"]["loss"], rtol=1e-4)
    assert log["mean"]["rows"].tolist() == [8, 5]


def test_nothing_in_a_run_calls_back_to_the_host():
    jaxpr = str(jax.make_jaxpr(lambda key: train.fit(toy.METHOD, key, CFG, DATA))(KEY))
    assert "callback" not in jaxpr and "scan" in jaxpr


def test_images_stay_uint8_on_the_device():
    """The float copy of a batch exists, never one of the data set."""
    jaxpr = jax.make_jaxpr(lambda key, data: train.fit(toy.METHOD, key, CFG, data))(KEY, DATA)
    assert f"f32[{DATA['train'].image.shape[0]}," not in str(jaxpr)


@pytest.mark.parametrize(
    "data, mode, message",
    [
        ({"train": DATA["train"]}, "fast", "mode='fast' is unknown"),
        ({"holdout": DATA["train"]}, None, "no source named 'train'"),
        (
            {"train": Source(image=jnp.zeros((0, 8, 8, 3), jnp.uint8), label=jnp.zeros(0, jnp.int32))},
            None,
            "needs data",
        ),
    ],
)
def test_wrong_input_is_refused_before_any_work(data, mode, message):
    with pytest.raises(ValueError, match=message):
        next(train.drive(toy.METHOD, KEY, CFG, data, mode=mode))


def test_fit_names_the_source_it_misses():
    def phases(cfg):
        return (toy.phases(cfg)[0]._replace(source="labelled"),)

    with pytest.raises(ValueError, match=r"toy: phase 'mean' needs data\['labelled'\]"):
        train.fit(toy.METHOD._replace(phases=phases), KEY, CFG, {"train": DATA["train"]})
