"""The prototype memory against numbers worked by hand and a loop over items in NumPy, and what must always hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops import prototypes


def units(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def reference(queries, items, *, norm="all"):
    """Everything by loops over queries and items, float64: a dict."""
    found = {"read": [], "nearest": [], "mse": [], "l2": [], "separateness": []}
    similarity = np.array([[q @ p for p in items] for q in queries])
    for q, row in zip(queries, similarity, strict=True):
        weights = np.exp(row) / np.exp(row).sum()
        found["read"].append(sum(w * p for w, p in zip(weights, items, strict=True)))
        first, second = sorted(range(len(items)), key=lambda m, row=row: (-row[m], m))[:2]
        found["nearest"].append(first)
        found["mse"].append(((q - items[first]) ** 2).mean())
        found["l2"].append(np.linalg.norm(q - items[first]))
        far = np.linalg.norm(q - items[second])
        found["separateness"].append(max(found["l2"][-1] - far + 1, 0))
    moved = np.array(items)
    for m, item in enumerate(items):
        mine = [k for k, first in enumerate(found["nearest"]) if first == m]
        share = np.exp(similarity[:, m]) / np.exp(similarity[:, m]).sum()
        if mine:
            top = share.max() if norm == "all" else share[mine].max()
            total = item + sum(share[k] / top * queries[k] for k in mine)
            moved[m] = total / np.linalg.norm(total)
    return {**{name: np.asarray(values) for name, values in found.items()}, "update": moved}


HAND_ITEMS = units([[1, 0], [0, 1], [-1, -1]])
HAND_QUERIES = units([[2, 0], [1, 1], [0, 3], [1, 2], [4, -1]])


def drawn(seed=0, shape=(40, 7, 12)):
    """Queries and items of a batch in which some items have no query."""
    count, num_items, features = shape
    rng = np.random.default_rng(seed)
    items = units(rng.uniform(0, 1, (num_items, features)))
    queries = units(rng.normal(0, 1, (count, features)) + 12 * items[rng.integers(0, num_items - 2, count)])
    return queries, items


def matched(queries, items):
    queries, items = jnp.asarray(queries, jnp.float32), jnp.asarray(items, jnp.float32)
    return queries, items, prototypes.match(queries, items)


def test_numbers_worked_by_hand():
    queries, items, matches = matched(HAND_QUERIES, HAND_ITEMS)
    similarity = [
        [1, 0, -0.707107],
        [0.707107, 0.707107, -1],
        [0, 1, -0.707107],
        [0.447214, 0.894427, -0.948683],
        [0.970143, -0.242536, -0.514496],
    ]
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    close(matches.similarity, similarity)
    assert matches.is_nearest.argmax(axis=1).tolist() == [0, 0, 1, 1, 0]  # the second query is as near to item 1
    read = [[0.562677, 0.154665], [0.399625, 0.399625], [0.154665, 0.562677], [0.2934, 0.493982], [0.551043, 0.090014]]
    close(prototypes.read(matches, items), read)
    moved = [[0.996472, 0.083922], [0.142016, 0.989864], [-0.707107, -0.707107]]
    close(prototypes.update(items, queries, matches), moved)
    close(prototypes.separateness(matches).mean(), 0.281609)
    close(prototypes.compactness(matches, features=2).mean(), 0.085665)


@pytest.mark.parametrize(
    "norm, first", [("all", (0.989793, -0.142511)), ("assigned", (0.989400, -0.145213))], ids=["all", "assigned"]
)
def test_normalisers_of_code_and_paper_by_hand(norm, first):
    queries, items, matches = matched(
        units([[1, 0.1], [1, -0.3], [1, 0.5], [-1, 0.1]]), units([[1, 0], [1, 0.2], [-1, 0]])
    )
    assert matches.is_nearest.argmax(axis=1).tolist() == [1, 0, 1, 2]
    moved = prototypes.update(items, queries, matches, norm=norm)
    np.testing.assert_allclose(moved[0], first, atol=1e-6)
    other = prototypes.update(items, queries, matches, norm="assigned" if norm == "all" else "all")
    np.testing.assert_allclose(moved[1:], other[1:], atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 7, 12), (1, 3, 3), (300, 10, 5)])
def test_equals_a_loop_over_items(shape):
    queries, items = drawn(1, shape)
    wide, stored, matches = matched(queries, items)
    for norm in prototypes.UPDATE_NORMS:
        expected = reference(queries, items, norm=norm)
        np.testing.assert_allclose(prototypes.update(stored, wide, matches, norm=norm), expected["update"], atol=2e-6)
    assert matches.is_nearest.argmax(axis=1).tolist() == expected["nearest"].tolist()
    np.testing.assert_allclose(prototypes.read(matches, stored), expected["read"], atol=2e-6)
    for distance in prototypes.DISTANCES:
        got = prototypes.compactness(matches, features=shape[2], distance=distance)
        np.testing.assert_allclose(got, expected[distance], atol=2e-5)
    np.testing.assert_allclose(prototypes.separateness(matches), expected["separateness"], atol=2e-5)


def test_items_keep_unit_length_and_order_does_not_matter():
    queries, items, matches = matched(*drawn(2))
    moved = prototypes.update(items, queries, matches)
    np.testing.assert_allclose(np.linalg.norm(moved, axis=1), 1, rtol=1e-6)
    assert abs(moved - items).max() > 0.01
    rng = np.random.default_rng(0)
    order = rng.permutation(len(queries))
    shuffled = prototypes.update(items, queries[order], prototypes.match(queries[order], items))
    np.testing.assert_allclose(shuffled, moved, atol=1e-6)
    order = rng.permutation(len(items))
    permuted = prototypes.update(items[order], queries, prototypes.match(queries, items[order]))
    np.testing.assert_allclose(permuted, moved[order], atol=1e-6)


def test_items_without_queries_stay_and_so_do_all_if_every_query_is_an_item():
    queries, items, matches = matched(*drawn(3))
    empty = prototypes.assigned(matches) == 0
    assert empty.any() and not empty.all()
    for norm in prototypes.UPDATE_NORMS:
        moved = prototypes.update(items, queries, matches, norm=norm)
        np.testing.assert_array_equal(moved[empty], items[empty])
        same = jnp.broadcast_to(items[2], queries.shape)
        np.testing.assert_allclose(
            prototypes.update(items, same, prototypes.match(same, items), norm=norm), items, atol=1e-6
        )


def test_updates_in_order_see_what_came_before_and_obey_the_gate():
    queries, items = drawn(4, (60, 5, 8))
    pictures, allowed = queries.reshape(4, 15, 8), [True, False, True, True]
    expected = items
    for picture, is_allowed in zip(pictures, allowed, strict=True):
        expected = reference(picture, expected)["update"] if is_allowed else expected
    got = prototypes.update_in_order(jnp.float32(items), jnp.float32(pictures), allowed=jnp.asarray(allowed))
    np.testing.assert_allclose(got, expected, atol=5e-6)
    assert abs(got - reference(queries, items)["update"]).max() > 1e-3  # at once would be something else


def test_gradients_reach_queries_as_asked_and_items_never_by_the_update():
    raw, items = (jnp.asarray(x, jnp.float32) for x in drawn(5))

    def reads(raw, grad_weights):
        return prototypes.read(prototypes.match(raw, items), items, grad_weights=grad_weights)[:, 0].sum()

    assert not jax.grad(reads)(raw, False).any()
    # by hand: d phat / d s_m = w_m (p_m - phat), for the first component
    weights = np.asarray(jax.nn.softmax(raw @ items.T, axis=1), np.float64)
    phat = weights @ np.asarray(items)
    expected = (weights * (np.asarray(items)[:, 0] - phat[:, :1])) @ np.asarray(items)
    np.testing.assert_allclose(jax.grad(reads)(raw, True), expected, atol=1e-6)

    def moved(raw, items):
        return prototypes.update(items, raw, prototypes.match(raw, items)).sum()

    assert not any(g.any() for g in jax.grad(moved, argnums=(0, 1))(raw, items))


def test_losses_pull_to_the_nearest_item_and_push_from_the_second():
    queries, items = (jnp.asarray(x, jnp.float32) for x in drawn(6))
    matches = prototypes.match(queries, items)
    order = np.argsort(-np.asarray(matches.similarity), axis=1)
    first, second = items[order[:, 0]], items[order[:, 1]]
    pull = jax.grad(lambda q: prototypes.compactness(prototypes.match(q, items), features=12).sum())(queries)
    np.testing.assert_allclose(pull, -2 * first / 12, atol=1e-6)  # of 2 - 2 <q, p>; the radial part is unit's to remove
    triplet = jax.grad(lambda q: prototypes.separateness(prototypes.match(q, items)).sum())(queries)
    near, far = (np.linalg.norm(queries - p, axis=1, keepdims=True) for p in (first, second))
    active = (near - far + 1) > 0
    np.testing.assert_allclose(triplet, active * (-first / near + second / far), atol=1e-4)


def test_gradients_are_finite_where_a_query_is_an_item():
    items = jnp.asarray(drawn(7)[1], jnp.float32)

    def losses(q):
        matches = prototypes.match(prototypes.unit(q), items)
        return (prototypes.compactness(matches, features=12, distance="l2") + prototypes.separateness(matches)).sum()

    assert jnp.isfinite(jax.grad(losses)(items)).all() and jnp.isfinite(jax.grad(losses)(jnp.zeros((3, 12)))).all()


def test_the_histogram_shows_collapse():
    queries, items, matches = matched(*drawn(8))
    counts = prototypes.assigned(matches)
    assert counts.tolist() == np.bincount(reference(queries, items)["nearest"], minlength=7).tolist()
    assert float(prototypes.entropy(jnp.array([8.0, 0, 0]))) == 0
    np.testing.assert_allclose(prototypes.entropy(jnp.array([3.0, 3, 3])), np.log(3), rtol=1e-6)
    np.testing.assert_allclose(
        prototypes.entropy(jnp.array([1.0, 3])), -(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), rtol=1e-6
    )


def test_unknown_choices_are_refused():
    queries, items, matches = matched(*drawn(9))
    with pytest.raises(ValueError, match="update_norm='max' is unknown; expected one of"):
        prototypes.update(items, queries, matches, norm="max")
    with pytest.raises(ValueError, match="feature_dist='cosine' is unknown; expected one of"):
        prototypes.compactness(matches, features=12, distance="cosine")
