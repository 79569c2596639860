"""REINFORCE: returns, a leave-one-out baseline, and the loss whose gradient is the policy gradient's estimate.

E episodes of N actions each, from one policy. Nothing here has parameters.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxad.core import Array


def returns_to_go(rewards: Array, last: Array) -> Array:
    """What is still to come at each action: rewards from it on, and what the end pays.

    Args:
      rewards: (E, N, ...) by action, in time order.
      last: (E,) paid at the end of each episode.

    Returns:
      (E, N, ...).
    """
    future = jnp.flip(jnp.cumsum(jnp.flip(rewards, 1), axis=1), 1)
    return future + last.reshape(-1, *(1,) * (rewards.ndim - 1))


def leave_one_out(returns: Array) -> Array:
    """Baseline of each episode: the mean return of the others, which its own actions do not touch.

    Args:
      returns: (E, ...), E at least 2.

    Returns:
      (E, ...).
    """
    return (returns.sum(axis=0) - returns) / (returns.shape[0] - 1)


def policy_loss(logits: Array, actions: Array, advantages: Array, *, entropy_weight: Array | float) -> Array:
    """Minus the mean of log pi(action) x advantage, minus `entropy_weight` x the mean entropy.

    Args:
      logits: (..., A).
      actions: (...) int32.
      advantages: (...), taken as constants.
      entropy_weight: of the bonus that keeps the policy from settling early.
    """
    log_policy = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(log_policy, actions[..., None], axis=-1)[..., 0]
    gain = jnp.mean(chosen * jax.lax.stop_gradient(advantages))
    return -gain - entropy_weight * jnp.mean(entropy_of(logits))


def entropy_of(logits: Array) -> Array:
    """Entropy of the policies in nats: (..., A) -> (...), between 0 and log A."""
    log_policy = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_policy) * log_policy, axis=-1)
