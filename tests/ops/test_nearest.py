"""Nearest neighbours: against float64 NumPy, in the clouds that need centring, tied, masked, blocked and sharded."""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import shard
from jaxad.ops import blocks
from jaxad.ops import nearest as op

nearest = jax.jit(op.nearest, static_argnames=("k", "precision", "approximate", "recall", "tile_rows"))


def reference(queries, bank, k=1, valid=None):
    """Every distance in float64; the first of equal ones."""
    queries, bank = np.asarray(queries, np.float64), np.asarray(bank, np.float64)
    distance = np.stack([np.sqrt(((bank - query) ** 2).sum(axis=1)) for query in queries])
    if valid is not None:
        distance[:, ~valid] = np.inf
    index = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, index, axis=1), index


def draw(num_queries, num_rows, features, *, seed=0, mean=0.0, std=1.0):
    numbers = np.random.default_rng(seed)
    shapes = (num_queries, features), (num_rows, features)
    return tuple((mean + std * numbers.standard_normal(shape)).astype(np.float32) for shape in shapes)


def assert_nearest(found, expected, rtol=1e-6):
    np.testing.assert_array_equal(found.index, expected[1])
    np.testing.assert_allclose(found.distance, expected[0], rtol=rtol)


@pytest.mark.parametrize(
    "sizes, options",
    [
        ((7, 1, 5), {}),
        ((50, 100, 8), {"k": 3}),
        ((33, 1300, 16), {}),
        ((100, 5000, 64), {"k": 5}),
        ((100, 5000, 64), {"k": 5, "tile_rows": 1024}),
        ((100, 5000, 64), {"k": 2, "precision": "bfloat16"}),
        ((100, 5000, 64), {"k": 2, "precision": "default"}),
        ((100, 5000, 64), {"k": 2, "approximate": True, "recall": 1.0}),
        ((3, 700, 8), {"k": 700}),
        ((9, 33_000, 8), {"k": 4, "tile_rows": 128}),  # segments are found in two rounds
    ],
)
def test_neighbours_are_those_of_every_distance_in_float64(sizes, options):
    queries, bank = draw(*sizes)
    assert_nearest(nearest(queries, bank, **options), reference(queries, bank, options.get("k", 1)))


@pytest.mark.parametrize("precision", op.PRECISIONS)
def test_a_tight_cloud_far_from_zero_is_searched_exactly(precision):
    """Embeddings of a collapsed encoder. The expanded form as it stands gets nearly all of them wrong."""
    queries, bank = draw(200, 3000, 64, mean=5.0, std=1e-4)
    expected = reference(queries, bank)
    expanded = (bank**2).sum(axis=1)[None] - 2 * queries @ bank.T
    assert (expanded.argmin(axis=1) != expected[1][:, 0]).mean() > 0.5
    assert_nearest(nearest(queries, bank, precision=precision), expected, rtol=1e-6)


def test_a_centre_does_not_blur_distances_that_are_tiny_beside_the_clouds_size():
    _, bank = draw(1, 2000, 64)
    queries = bank[:300] + 1e-5 * draw(300, 1, 64, seed=1)[0]
    assert_nearest(nearest(queries, bank), reference(queries, bank), rtol=1e-6)


def test_rows_of_the_bank_are_at_distance_zero_from_themselves():
    _, bank = draw(1, 1000, 64, mean=0.3)
    found = nearest(bank, bank)
    np.testing.assert_array_equal(found.distance, np.zeros((1000, 1)))
    np.testing.assert_array_equal(found.index[:, 0], np.arange(1000))


@pytest.mark.parametrize("k", [1, 3])
def test_of_rows_equally_far_the_first_comes_first(k):
    queries, bank = draw(20, 300, 8)
    bank = np.concatenate([bank, bank[::-1], bank])  # rows 300 to 599 and 600 to 899 repeat the first
    found = nearest(queries, bank, k=k)
    first = reference(queries, bank[:300])[1][:, 0]
    np.testing.assert_array_equal(found.index, np.stack([first, 599 - first, 600 + first], axis=1)[:, :k])


def test_rows_that_are_not_valid_do_not_count():
    queries, bank = draw(40, 1000, 8)
    valid = np.random.default_rng(1).uniform(size=1000) < 0.2
    bank[~valid] = queries[0]  # what stands there must not matter
    assert_nearest(nearest(queries, bank, k=2, valid=valid), reference(queries, bank, 2, valid))


def test_a_bank_with_fewer_valid_rows_than_neighbours_asked_gives_infinite_distances():
    queries, bank = draw(5, 600, 4)
    valid = np.arange(600) == 577
    found = nearest(queries, bank, k=3, valid=valid)
    np.testing.assert_allclose(found.distance[:, 0], reference(queries, bank, 1, valid)[0][:, 0], rtol=1e-6)
    assert (found.index[:, 0] == 577).all() and np.isinf(found.distance[:, 1:]).all()


@pytest.mark.parametrize("devices", [1, 4])
def test_blocks_of_queries_give_what_the_whole_gives(monkeypatch, devices):
    queries, bank = draw(101, 900, 8)
    expected = reference(queries, bank, 2)
    monkeypatch.setattr(op, "_QUERIES", 32)
    monkeypatch.setattr(op, "_GATHERED_BYTES", {"cpu": 5 * 128 * 8 * 4 * 3})  # three queries
    with blocks.rows_over(devices):
        assert_nearest(jax.jit(functools.partial(op.nearest, k=2))(queries, bank), expected)


@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16"}, {"k": 3}])
def test_a_bank_split_over_devices_gives_what_one_device_gives(options):
    mesh = shard.data_mesh(jax.devices()[:4])
    queries, bank = draw(60, 2400, 16)
    bank[1800:2100] = bank[:300]  # ties between devices: the earlier row wins
    valid = np.arange(2400) % 7 != 3
    split = jax.device_put(bank, shard.split(mesh))
    found = jax.jit(functools.partial(op.nearest_sharded, mesh=mesh, axis="data", **options))
    assert_nearest(found(queries, split, valid=valid), reference(queries, bank, options.get("k", 1), valid))
    moved = shard.collectives(found.lower(queries, split, valid=valid).compile())
    assert set(moved) == {"all-gather"}, moved
    assert moved["all-gather"][1] <= 2 * 4 * 4 * 60 * options.get("k", 1), "vectors travel"


def test_a_bank_that_devices_do_not_divide_is_refused():
    mesh = shard.data_mesh(jax.devices()[:4])
    with pytest.raises(ValueError, match="does not split over 4 devices"):
        op.nearest_sharded(*draw(5, 602, 4), mesh=mesh, axis="data")


def test_queries_split_over_devices_need_no_exchange():
    mesh = shard.data_mesh(jax.devices()[:4])
    queries, bank = draw(64, 900, 8)
    found = jax.jit(functools.partial(op.nearest, k=2))
    arguments = jax.device_put(queries, shard.split(mesh)), jax.device_put(bank, shard.replicated(mesh))
    assert_nearest(found(*arguments), reference(queries, bank, 2))
    assert not shard.collectives(found.lower(*arguments).compile())


@pytest.mark.parametrize(
    "num_queries, num_rows, k", [(3249, 35_321, 1), (500, 200_000, 4), (9000, 20_000, 1), (9, 99, 1)]
)
def test_memory_is_within_what_is_announced_and_far_from_all_distances(num_queries, num_rows, k):
    shapes = jax.ShapeDtypeStruct((num_queries, 64), jnp.float32), jax.ShapeDtypeStruct((num_rows, 64), jnp.float32)
    compiled = jax.jit(functools.partial(op.nearest, k=k)).lower(*shapes).compile()
    needed, announced = compiled.memory_analysis().temp_size_in_bytes, op.working_bytes(num_queries, num_rows, 64, k=k)
    assert needed <= announced, (needed, announced)
    assert num_rows < 1000 or announced < 4 * num_queries * num_rows / 4


def test_neighbours_export_for_any_number_of_queries():
    queries, bank = draw(11, 700, 8)
    anyhow = jax.ShapeDtypeStruct((jax.export.symbolic_shape("q")[0], 8), jnp.float32)
    exported = jax.export.export(jax.jit(lambda q: op.nearest(q, bank, k=2)._asdict()))(anyhow)
    found = exported.call(queries)
    assert_nearest(op.Neighbours(**found), reference(queries, bank, 2))


def test_no_gradient_passes():
    queries, bank = draw(5, 300, 4)
    grads = jax.jit(jax.grad(lambda q, b: op.nearest(q, b).distance.sum(), argnums=(0, 1)))(queries, bank)
    assert all((np.asarray(leaf) == 0).all() for leaf in grads)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"bank": np.zeros((9, 5))}, "expected \\(Q, D\\) and \\(N, D\\)"),
        ({"bank": np.zeros((0, 4))}, "N >= 1"),
        ({"k": 10}, "k=10 neighbours in a bank of 9"),
        ({"precision": "tf32"}, "expected one of"),
        ({"recall": 0.0}, "more than 0 and at most 1"),
        ({"tile_rows": 200}, "Pass tile_rows=256"),
    ],
)
def test_what_cannot_be_searched_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        op.nearest(**{"queries": np.zeros((3, 4)), "bank": np.zeros((9, 4)), **fields})


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.parametrize("approximate", [False, True])
def test_a_bank_split_over_four_tpu_chips_compiles_and_no_vector_travels(approximate):
    """1.27 million rows, the patches of four pictures as queries."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    mesh = shard.data_mesh(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
    whole, split = shard.replicated(mesh), shard.split(mesh)
    queries = jax.ShapeDtypeStruct((4 * 3249, 64), jnp.float32, sharding=whole)
    bank = jax.ShapeDtypeStruct((1_270_360, 64), jnp.float32, sharding=split)
    search = functools.partial(op.nearest_sharded, mesh=mesh, axis="data", tile_rows=8192, approximate=approximate)
    compiled = jax.jit(search).lower(queries, bank).compile()
    moved = shard.collectives(compiled)
    assert set(moved) <= {"all-gather"} and moved["all-gather"][1] <= 3 * 2 * 4 * 4 * 4 * 3249, moved
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.argument_size_in_bytes < 2e9
