"""REINFORCE on examples worked by hand, and against the exact gradient of a one-step game."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops.policy_gradient import entropy_of, leave_one_out, policy_loss, returns_to_go


def test_returns_add_up_what_is_to_come():
    rewards = jnp.array([[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]])
    np.testing.assert_allclose(returns_to_go(rewards, jnp.array([10.0, 20.0])), [[17, 16, 14], [28, 28, 28]])
    apart = returns_to_go(jnp.stack([rewards, 10 * rewards], axis=-1), jnp.zeros(2))
    np.testing.assert_allclose(apart[..., 1], 10 * returns_to_go(rewards, jnp.zeros(2)))


def test_the_baseline_is_the_mean_of_the_others():
    returns = jnp.array([[1.0, 10.0], [2.0, 20.0], [6.0, 60.0]])
    np.testing.assert_allclose(leave_one_out(returns), [[4, 40], [3.5, 35], [1.5, 15]])


def test_entropy_of_a_uniform_policy_and_of_a_sure_one():
    assert float(entropy_of(jnp.zeros(9))) == pytest.approx(2.197225)
    assert float(entropy_of(jnp.array([100.0, 0.0]))) == pytest.approx(0, abs=1e-6)


def test_the_gradient_is_that_of_log_policy_times_advantage_and_of_entropy():
    logits, gain = jnp.array([[0.3, -1.0, 0.5]]), jnp.array([2.0])
    found = jax.grad(lambda x: policy_loss(x, jnp.array([1]), gain, entropy_weight=0.0))(logits)
    policy = np.asarray(jax.nn.softmax(logits))[0]
    np.testing.assert_allclose(found[0], -2.0 * (np.array([0, 1, 0]) - policy), rtol=1e-5)
    more = jax.grad(lambda x: policy_loss(x, jnp.array([1]), gain, entropy_weight=0.7))(logits)
    entropy = -(policy * np.log(policy)).sum()
    np.testing.assert_allclose(more - found, [0.7 * policy * (np.log(policy) + entropy)], rtol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_one_step_game(offset):
    """Action 2 is paid 1 more: the mean over games is the exact gradient, with a baseline or without, and where all
    actions are paid alike besides, the baseline takes that noise away."""
    logits, groups = jnp.array([0.5, -0.2, 0.1, 0.0]), 12_500  # of 8 episodes
    policy, reward = jax.nn.softmax(logits), offset + jnp.array([0.0, 0.0, 1.0, 0.0])
    exact = policy * (reward - jnp.sum(policy * reward))  # sum over a of pi(a) grad log pi(a) r(a)
    actions = jax.random.categorical(jax.random.key(0), logits, shape=(8, groups))
    returns, variance = reward[actions], {}
    for name, gains in (("plain", returns), ("baseline", returns - leave_one_out(returns))):
        grad = jax.grad(lambda x, a, g: -policy_loss(jnp.broadcast_to(x, (8, 4)), a, g, entropy_weight=0.0))
        found = np.asarray(jax.vmap(grad, in_axes=(None, 1, 1))(logits, actions, gains))
        deviation = found.std(axis=0) / np.sqrt(groups)
        assert (np.abs(found.mean(axis=0) - exact) < 3 * deviation).all(), name
        variance[name] = found.var(axis=0).sum()
    assert not offset or variance["baseline"] < 0.5 * variance["plain"]


def test_steps_along_it_find_the_paid_action():
    def step(logits, key):
        actions = jax.random.categorical(key, logits, shape=(8, 5))
        returns = (actions == 3).astype(jnp.float32)
        gains = returns - leave_one_out(returns)
        grad = jax.grad(lambda x: policy_loss(jnp.broadcast_to(x, (8, 5, 9)), actions, gains, entropy_weight=0.0))
        return logits - 2.0 * grad(logits), None

    logits, _ = jax.lax.scan(step, jnp.zeros(9), jax.random.split(jax.random.key(1), 200))
    assert float(jax.nn.softmax(logits)[3]) > 0.9
