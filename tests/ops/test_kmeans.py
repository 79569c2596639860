"""k-means on the device against scikit-learn, its seeds, and places spread over pictures."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.ops import kmeans


def blobs(seed=0):
    """Four clusters in three dimensions, then rows that do not count."""
    numbers = np.random.default_rng(seed)
    middles = np.array([[0, 0, 0], [6, 0, 0], [0, 6, 0], [0, 0, 6.0]])
    rows = np.concatenate([m + numbers.normal(0, 0.3, (50, 3)) for m in middles])
    valid = np.r_[np.ones(200, bool), np.zeros(20, bool)]
    return jnp.asarray(np.concatenate([rows, np.full((20, 3), 50.0)]), jnp.float32), jnp.asarray(valid), middles


def test_clusters_are_found_and_rows_that_do_not_count_are_not():
    rows, valid, middles = blobs()
    fit = jax.jit(lambda key: kmeans.fit(key, rows, count=4, valid=valid))
    for seed in (0, 1, 2):  # of other seeds two may lie in one cluster, where they stay
        centres = np.asarray(fit(jax.random.key(seed)))
        apart = np.linalg.norm(centres[:, None] - middles, axis=-1)
        assert sorted(apart.argmin(axis=1)) == [0, 1, 2, 3] and apart.min(axis=1).max() < 0.2


def test_lloyds_iterations_are_scikit_learns():
    from sklearn.cluster import KMeans

    rows = jnp.asarray(np.random.default_rng(0).normal(size=(300, 5)), jnp.float32)
    valid, key = jnp.ones(300, bool), jax.random.key(0)
    start = kmeans.seed(key, rows, count=7, valid=valid)
    theirs = KMeans(7, init=np.asarray(start), n_init=1, max_iter=300, tol=0).fit(np.asarray(rows))
    ours = kmeans.fit(key, rows, count=7, valid=valid, iterations=100)
    np.testing.assert_allclose(ours, theirs.cluster_centers_, atol=1e-3)
    np.testing.assert_allclose(kmeans.inertia(rows, ours, valid) * 300, theirs.inertia_, rtol=1e-4)


def test_seeds_are_rows_drawn_by_squared_distance():
    """Of points at 0, 1 and 3 on a line the second centre is 3 rather than 1, begun at 0, nine times in ten."""
    rows = jnp.asarray([[0.0], [1.0], [3.0]])
    draw = jax.jit(jax.vmap(lambda key: kmeans.seed(key, rows, count=2, valid=jnp.ones(3, bool))[:, 0]))
    found = np.asarray(draw(jax.random.split(jax.random.key(0), 3000)))
    np.testing.assert_allclose((found[:, 0] == 0).mean(), 1 / 3, atol=0.03)
    begun = found[found[:, 0] == 0, 1]
    np.testing.assert_allclose((begun == 3).mean(), 0.9, atol=0.03)
    assert (begun != 0).all()
    same = kmeans.seed(jax.random.key(0), jnp.ones((5, 2)), count=3, valid=jnp.ones(5, bool))
    np.testing.assert_array_equal(same, 1)  # fewer rows differ than there are centres


def test_places_are_spread_over_all_pixels_and_do_not_depend_on_the_batch():
    index = jnp.arange(40)
    places = np.asarray(kmeans.spread_places(index, per_picture=25, pixels=500))
    assert places.min() >= 0 and places.max() < 500
    counts = np.bincount(places.reshape(-1), minlength=500)
    assert counts.min() >= 1 and counts.max() <= 4  # 1,000 places on 500 pixels
    np.testing.assert_array_equal(kmeans.spread_places(index[7:9], per_picture=25, pixels=500), places[7:9])
