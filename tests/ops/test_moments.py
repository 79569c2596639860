"""Running moments against NumPy's over everything at once."""

import jax.numpy as jnp
import numpy as np

from jaxad.ops import moments


def folded(values, valid, size):
    state = moments.empty()
    for first in range(0, len(values), size):
        part = slice(first, first + size)
        state = moments.add(state, jnp.asarray(values[part], jnp.float32), jnp.asarray(valid[part]))
    return state


def test_equal_numpys_for_every_cut_and_leave_padding_out():
    rng = np.random.default_rng(0)
    values = 1000 + rng.normal(0, 0.5, (24, 3, 2))  # far from zero: sums of squares would cancel
    valid = rng.uniform(size=24) > 0.3
    values[~valid] = 1e6
    kept = values[valid].astype(np.float32).astype(np.float64)
    for size in (1, 5, 24):
        state = folded(values, valid, size)
        assert float(state.count) == kept.size
        np.testing.assert_allclose(
            [state.mean, state.low, state.high], [kept.mean(), kept.min(), kept.max()], rtol=1e-6
        )
        np.testing.assert_allclose(np.sqrt(state.squares / state.count), kept.std(), rtol=2e-3)
        np.testing.assert_allclose(
            moments.standardise(jnp.float32(1001), state), (1001 - kept.mean()) / kept.std(), rtol=3e-3
        )
        ends = moments.stretch(jnp.asarray([kept.min(), kept.max()], jnp.float32), state)
        np.testing.assert_allclose(ends, [0, 1], atol=1e-5)


def test_nothing_or_one_value_seen_gives_finite_results():
    for state in (moments.empty(), folded(np.full((3, 2), 7.0), np.ones(3, bool), 2)):
        middle = float(state.mean)
        assert float(moments.standardise(jnp.float32(middle + 2), state)) == 2
        assert float(moments.stretch(jnp.float32(2), state)) == 2
