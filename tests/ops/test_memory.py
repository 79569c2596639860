"""The memory read: hand-worked values, a float64 NumPy reference, and the three forms against each other."""

import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxad.ops import memory

FORMS = ("naive", "fused", "pallas")
read_memory = jax.jit(memory.read_memory, static_argnames=("similarity", "empty_policy", "impl", "block_rows"))
addressing = jax.jit(memory.addressing, static_argnames=("similarity", "empty_policy"))
HAND_MEMORY = np.array([[1, 0], [0, 1], [-1, 0], [2, 2]], np.float32)


def reference(queries, items, threshold, similarity="dot", temperature=1.0, empty_policy="zero"):
    """The read with its weights, one query at a time, in float64 and as the published code writes the shrinkage."""
    queries, items = np.asarray(queries, np.float64), np.asarray(items, np.float64)
    rows = []
    for query in queries:
        dots = items @ query
        if similarity == "cosine":
            dots = dots / (np.linalg.norm(items, axis=1) * np.linalg.norm(query))
        softmax = np.exp(dots / temperature - np.max(dots / temperature))
        softmax /= softmax.sum()
        weights = softmax
        if threshold > 0:
            gap = softmax - threshold
            weights = np.maximum(gap, 0) * softmax / (np.abs(gap) + 1e-12)
            if not weights.any() and empty_policy == "top1":
                weights = np.arange(len(items)) == np.argmax(softmax)
            weights = weights / max(weights.sum(), 1e-12)
        rows.append(weights)
    weights = np.stack(rows)
    entropy = -np.sum(weights * np.log(weights + 1e-12), axis=1)
    return weights @ items, entropy, weights.max(axis=1), (weights > 0).sum(axis=1), (weights > 0).sum(axis=0), weights


def make(num_queries, num_items, features, seed=0):
    """Queries of very different length, so that some read one item, some many, some none."""
    numbers = np.random.default_rng(seed)
    queries = numbers.standard_normal((num_queries, features)) * np.geomspace(0.05, 8, num_queries)[:, None]
    items = numbers.standard_normal((num_items, features)) / features**0.5
    return queries.astype(np.float32), items.astype(np.float32)


def in_a_gap(weights, near):
    """A threshold close to `near` in the widest gap between weights, so that rounding decides no comparison."""
    weights = np.sort(weights[weights > 0], axis=None)
    at = np.searchsorted(weights, near)
    window = weights[max(at - 20, 0) : at + 20]
    widest = np.argmax(window[1:] / window[:-1])
    return float(np.sqrt(window[widest] * window[widest + 1]))


@pytest.mark.parametrize("form", FORMS)
def test_hand_worked_reads(form):
    queries = np.array([[1, 0], [0, 0], [-1, -1]], np.float32)
    read = read_memory(queries, HAND_MEMORY, threshold=0.25, impl=form)
    np.testing.assert_allclose(read.value, [[2, 2], [0, 0], [-1, 0]], atol=1e-6)
    np.testing.assert_array_equal(read.entropy, 0)
    np.testing.assert_allclose(read.top_weight, [1, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(read.num_active, [1, 0, 1])  # a weight equal to the threshold is not read
    np.testing.assert_array_equal(read.usage, [0, 0, 1, 1])


def test_hand_worked_weights():
    queries = np.array([[1, 0], [0, 0], [-1, -1]], np.float32)
    softmax = [[0.236883, 0.087144, 0.032059, 0.643914], [0.25] * 4, [0.105945, 0.105945, 0.782835, 0.005275]]
    np.testing.assert_allclose(addressing(queries, HAND_MEMORY, threshold=0.0), softmax, atol=1e-6)
    weights = addressing(queries, HAND_MEMORY, threshold=0.25)
    np.testing.assert_allclose(weights, [[0, 0, 0, 1], [0] * 4, [0, 0, 1, 0]], atol=1e-6)
    cosine = addressing(np.array([[1.0, 0], [3, 0]]), HAND_MEMORY, threshold=0.0, similarity="cosine")
    np.testing.assert_allclose(cosine, [[0.444580, 0.163552, 0.060167, 0.331702]] * 2, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_top1_reads_the_best_item_and_averages_ties(form):
    queries = np.array([[0.1, 0.0], [0, 0]], np.float32)
    read = read_memory(queries, HAND_MEMORY, threshold=0.9, empty_policy="top1", impl=form)
    np.testing.assert_allclose(read.value, [[2, 2], [0.5, 0.75]], atol=1e-6)
    np.testing.assert_allclose(read.entropy, [0, np.log(4)], atol=1e-6)
    np.testing.assert_array_equal(read.num_active, [1, 4])


def test_shrink_cuts_and_renormalises():
    weights = jnp.array([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.2, 0.4, 0.4]])
    expected = [[0.625, 0.375, 0], [4 / 7, 3 / 7, 0], [0, 0.5, 0.5]]
    np.testing.assert_allclose(memory.shrink(weights.at[1, 2].set(0.2), threshold=0.25), expected, atol=1e-6)
    np.testing.assert_array_equal(memory.shrink(2 * weights, threshold=0.0), 2 * weights)  # not even divided
    np.testing.assert_array_equal(memory.shrink(weights, threshold=0.6), 0)


def test_rows_of_weights_sum_to_one_or_are_zero():
    queries, items = make(50, 30, 8)
    np.testing.assert_allclose(np.sum(addressing(queries, items, threshold=0.0), 1), 1, atol=1e-6)
    sums = np.sum(addressing(queries, items, threshold=2 / 30), 1)
    is_empty = sums == 0
    assert 0 < is_empty.sum() < 50
    np.testing.assert_allclose(sums[~is_empty], 1, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_entropy_of_uniform_reads(form):
    items = np.zeros((6, 3), np.float32)
    items[:4, 0] = 5  # four equal items above the threshold, two far below
    read = read_memory(np.array([[2.0, 0, 0]]), items, threshold=0.1, impl=form)
    np.testing.assert_allclose(read.entropy, np.log(4), atol=1e-6)


def test_permuting_items_permutes_weights_and_keeps_values():
    queries, items = make(40, 25, 8)
    order = np.random.default_rng(1).permutation(25)
    threshold = in_a_gap(reference(queries, items, 0)[-1], 1.5 / 25)
    read, permuted = (read_memory(queries, x, threshold=threshold) for x in (items, items[order]))
    np.testing.assert_array_equal(permuted.usage, read.usage[order])
    np.testing.assert_allclose(permuted.value, read.value, atol=1e-6)


def test_scaling_items_against_queries_scales_values():
    queries, items = make(40, 25, 8)
    read, scaled = (read_memory(queries / s, items * s, threshold=0.0) for s in (1, 4))
    np.testing.assert_allclose(scaled.value, 4 * read.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaled.entropy, read.entropy, rtol=1e-5, atol=1e-6)


# Blocks that divide the queries and that do not, a single block, fewer items or queries than one block of a kernel.
CASES = [
    {"shape": (103, 77, 12), "block_rows": 20},
    {"shape": (103, 77, 12), "block_rows": 20, "similarity": "cosine", "temperature": 0.1},
    {"shape": (300, 530, 8), "block_rows": 100, "empty_policy": "top1"},
    {"shape": (300, 530, 8), "block_rows": None, "similarity": "cosine", "temperature": 0.3, "empty_policy": "top1"},
    {"shape": (7, 3, 5), "block_rows": None},
    {"shape": (1, 1, 1), "block_rows": None},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(x) for x in case.values()))
def test_forms_agree_with_the_reference_and_in_their_gradients(case):
    options = {"temperature": 1.0, "block_rows": None} | case
    num_queries, num_items, features = options.pop("shape")
    temperature = options.pop("temperature")
    weighting = {k: v for k, v in case.items() if k not in ("shape", "block_rows")}
    queries, items = make(num_queries, num_items, features)
    if options.get("similarity") == "cosine":  # lengths do not matter there, directions have to
        queries[::3] += 3 * items[np.arange(len(queries[::3])) % num_items]
    d_value = np.random.default_rng(2).standard_normal((num_queries, features)).astype(np.float32)

    def loss(queries, items, temperature, threshold, form):
        read = read_memory(queries, items, threshold=threshold, temperature=temperature, impl=form, **options)
        return jnp.sum(read.value * d_value) + 2 * jnp.sum(jnp.sin(read.entropy)), read

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True), static_argnums=4)
    softmax = reference(queries, items, 0, **weighting)[-1]
    thresholds = [0.0, *(in_a_gap(softmax, k / num_items) for k in (1.5, 8) if num_items > 1), 0.999]
    kinds = set()
    for threshold in thresholds:
        expected = reference(queries, items, threshold, **weighting)
        kinds |= set(np.minimum(expected[3], 2))
        arguments = queries, items, np.float32(temperature), np.float32(threshold)
        (_, read), gradients = run(*arguments, "naive")
        for form in FORMS:
            (_, other), other_gradients = run(*arguments, form)
            for got, want, name in zip(other, expected, memory.Read._fields, strict=False):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=f"{form} {name} at {threshold}")
            for got, want, name in zip(other_gradients, gradients, ("queries", "items", "temperature"), strict=False):
                # The gradient of the temperature is a sum over all queries whose terms cancel.
                atol = (1e-4 if name == "temperature" else 1e-5) * max(1.0, float(jnp.max(jnp.abs(want))))
                np.testing.assert_allclose(got, want, atol=atol, err_msg=f"{form} d_{name} at {threshold}")
            assert other_gradients[3] == 0
    if num_items > 100:
        assert kinds == ({1, 2} if options.get("empty_policy") == "top1" else {0, 1, 2})


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("form", ["naive", "fused"])
def test_gradients_against_differences_of_the_reference(form, similarity):
    queries, items = make(6, 9, 4, seed=3)
    temperature = np.float32(0.5)
    threshold = in_a_gap(reference(queries, items, 0, similarity, temperature)[-1], 1.2 / 9)
    d_value = np.random.default_rng(4).standard_normal((6, 4))

    def reference_loss(queries, items, temperature):
        value, entropy, *_ = reference(queries, items, threshold, similarity, temperature)
        return np.sum(value * d_value) + 0.7 * np.sum(entropy)

    def loss(queries, items, temperature):
        options = {"similarity": similarity, "temperature": temperature, "impl": form, "block_rows": 4}
        read = read_memory(queries, items, threshold=threshold, **options)
        return jnp.sum(read.value * d_value) + 0.7 * jnp.sum(read.entropy)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(queries, items, temperature)
    arguments = [np.asarray(x, np.float64) for x in (queries, items, temperature)]
    for which, gradient in enumerate(gradients):
        for at in np.ndindex(gradient.shape):
            step = np.zeros_like(arguments[which])
            step[at] = 1e-6
            moved = [[a + sign * step if i == which else a for i, a in enumerate(arguments)] for sign in (1, -1)]
            difference = (reference_loss(*moved[0]) - reference_loss(*moved[1])) / 2e-6
            np.testing.assert_allclose(gradient[at], difference, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("empty_policy", ["zero", "top1"])
def test_gradient_of_empty_rows(form, empty_policy):
    queries, d_value = np.array([[0.1, 0.0]], np.float32), np.array([[3.0, 5.0]], np.float32)

    def loss(queries, items):
        read = read_memory(queries, items, threshold=0.9, empty_policy=empty_policy, impl=form)
        return jnp.sum(read.value * d_value) + jnp.sum(read.entropy)

    d_queries, d_items = jax.jit(jax.grad(loss, argnums=(0, 1)))(queries, HAND_MEMORY)
    np.testing.assert_allclose(d_queries, 0, atol=1e-6)
    best = d_value[0] if empty_policy == "top1" else 0
    np.testing.assert_allclose(d_items[3], best, atol=1e-6)
    np.testing.assert_allclose(d_items[:3], 0, atol=1e-6)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_zero_vectors_have_finite_gradients(similarity):
    queries, items = np.zeros((2, 4), np.float32), np.eye(5, 4, dtype=np.float32)  # the last item is zero

    def loss(queries, items):
        read = read_memory(queries, items, threshold=0.0, similarity=similarity)
        return jnp.sum(read.value**2) + jnp.sum(read.entropy)

    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.jit(jax.grad(loss, argnums=(0, 1)))(queries, items))


@pytest.mark.parametrize("form", FORMS)
def test_nan_is_not_hidden_and_stays_in_its_row(form):
    queries = np.array([[1, 0], [np.nan, 0]], np.float32)
    value = read_memory(queries, HAND_MEMORY, threshold=0.25, impl=form).value
    np.testing.assert_array_equal(np.isnan(value).any(axis=1), [False, True])


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_is_compared_in_float32(form):
    queries, items = (jnp.asarray(x, jnp.bfloat16) for x in make(60, 200, 16))
    softmax = reference(queries, items, 0)[-1]
    threshold = in_a_gap(softmax, 1 / 200)
    assert np.any(np.abs(softmax / threshold - 1) < 2**-9)  # bfloat16 weights could not be told from the threshold
    value, entropy, _, num_active, usage, _ = reference(queries, items, threshold)

    def loss(queries, items):
        read = read_memory(queries, items, threshold=threshold, impl=form, block_rows=25)
        return jnp.sum(read.value.astype(jnp.float32)) + jnp.sum(read.entropy), read

    (d_queries, d_items), read = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(queries, items)
    assert (read.value.dtype, d_queries.dtype, d_items.dtype) == (jnp.bfloat16,) * 3
    assert read.entropy.dtype == jnp.float32
    np.testing.assert_array_equal(read.num_active, num_active)
    np.testing.assert_array_equal(read.usage, usage)
    np.testing.assert_allclose(read.entropy, entropy, atol=1e-4)
    np.testing.assert_allclose(read.value.astype(jnp.float32), value, atol=2e-2)  # 8 bits of the value itself


@pytest.mark.parametrize("form", ["fused", "pallas"])
def test_vmap_over_memories_and_thresholds_equals_a_loop(form):
    queries, _ = make(50, 1, 8)
    items = np.stack([make(1, 40, 8, seed)[1] for seed in range(3)])
    thresholds = np.array([0.0, 0.03, 0.2], np.float32)

    def gradients(items, threshold):
        def loss(queries, items):
            read = read_memory(queries, items, threshold=threshold, impl=form, block_rows=16)
            return jnp.sum(read.value**2) + jnp.sum(read.entropy), read

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(queries, items)

    together = jax.jit(jax.vmap(gradients))(items, thresholds)
    single = jax.jit(gradients)
    for i in range(3):
        for got, want in zip(jax.tree.leaves(together), jax.tree.leaves(single(items[i], thresholds[i])), strict=True):
            np.testing.assert_allclose(got[i], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_new_numbers_do_not_recompile(form):
    queries, items = make(20, 10, 4)
    run = jax.jit(lambda t, s: read_memory(queries, items, threshold=t, temperature=s, impl=form, block_rows=8))
    reads = [run(threshold, temperature) for threshold, temperature in [(0.0, 1.0), (0.1, 1.0), (0.2, 0.5)]]
    assert run._cache_size() == 1
    assert len({int(read.usage.sum()) for read in reads}) == 3  # and the numbers matter


def test_sharded_queries_equal_one_device():
    queries, items = make(96, 40, 8)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))

    def loss(queries, items):
        read = read_memory(queries, items, threshold=0.03, block_rows=32)
        return jnp.sum(read.value**2) + jnp.sum(read.entropy), read

    run = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    sharded = run(jax.device_put(queries, NamedSharding(mesh, PartitionSpec("data"))), items)
    for got, want in zip(jax.tree.leaves(sharded), jax.tree.leaves(run(queries, items)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def temporary_bytes(form, num_queries, num_items=2000, features=256):
    def loss(queries, items, threshold):
        read = read_memory(queries, items, threshold=threshold, impl=form)
        return jnp.sum(read.value**2) + 2e-4 * jnp.mean(read.entropy), (read.usage, read.num_active)

    shapes = [(num_queries, features), (num_items, features), ()]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(*shapes).compile()
    return step.memory_analysis().temp_size_in_bytes


def test_fused_memory_does_not_grow_with_the_weights():
    fused, larger = temporary_bytes("fused", 16384), temporary_bytes("fused", 32768)
    assert fused <= temporary_bytes("naive", 16384) / 5
    assert larger - fused < 4 * (16384 * 256 * 4)  # a few arrays like the queries, none like the weights


def test_cosine_weight_bound_is_reached():
    items = np.array([[2.0, 0], [-1, 0], [-3, 0]], np.float32)
    top = read_memory(items[:1], items, threshold=0.0, similarity="cosine", temperature=0.7).top_weight
    np.testing.assert_allclose(top, memory.cosine_weight_bound(3, temperature=0.7), rtol=1e-5)
    assert memory.cosine_weight_bound(2000) < 7.39 / 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5 is out of range.*Pass threshold=0.25"),
        ({"threshold": 0.1, "temperature": 0.0}, "temperature=0.0 is not positive"),
        ({"threshold": 0.9, "similarity": "cosine"}, "empties every row"),
        ({"threshold": 0.1, "similarity": "l2"}, "similarity='l2' is unknown"),
        ({"threshold": 0.1, "empty_policy": "one"}, "empty_policy='one' is unknown"),
        ({"threshold": 0.1, "impl": "cuda"}, "impl='cuda' is unknown"),
        ({"threshold": 0.1, "block_rows": 0}, "block_rows=0 is not positive"),
    ],
)
def test_errors_name_value_expectation_and_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        memory.read_memory(HAND_MEMORY, HAND_MEMORY, **options)


def test_error_for_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"queries \(2, 3, 2\).*reshape"):
        memory.read_memory(np.zeros((2, 3, 2)), HAND_MEMORY, threshold=0.1)


def test_error_for_kernels_on_a_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="for TPU only.*impl='fused'"):
        memory.read_memory(HAND_MEMORY, HAND_MEMORY, threshold=0.1, impl="pallas")


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "similarity"), [("float32", "dot"), ("bfloat16", "cosine")])
def test_kernels_compile_for_a_tpu(dtype, similarity):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler: pip install libtpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    from jax.experimental import topologies

    chip = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]

    def loss(queries, items, threshold):
        read = memory.read_memory(queries, items, threshold=threshold, similarity=similarity, impl="pallas")
        return jnp.sum(read.value.astype(jnp.float32) ** 2) + jnp.sum(read.entropy), (read.usage, read.num_active)

    arguments = [((16384, 256), dtype), ((2000, 256), "float32"), ((), "float32")]
    shapes = [jax.ShapeDtypeStruct(s, d, sharding=jax.sharding.SingleDeviceSharding(chip)) for s, d in arguments]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(*shapes).compile()
    assert step.as_text().count('custom_call_target="tpu_custom_call"') == 3  # forward, queries, tables
