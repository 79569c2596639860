"""Batch normalisation and activation with a gradient of their own, against Linen's and XLA's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.nn.norm import BatchNorm

STEADY = {"momentum": 0.9, "epsilon": 1e-5}


class Reference(nn.Module):
    slope: float
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype, **STEADY)(x)
        return jnp.where(x > 0, x, self.slope * x)


class Ours(nn.Module):
    slope: float
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, x, *, train):
        return BatchNorm(self.slope, dtype=self.dtype, **STEADY)(x, train=train)


def a_map(shape=(3, 4, 5, 6), mean=0.7):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(mean, 1.5, shape), jnp.float32)


def variables_of(channels):
    rng = np.random.default_rng(1)
    scale, bias, mean, spread = (jnp.asarray(rng.normal(size=channels), jnp.float32) for _ in range(4))
    return {
        "params": {"BatchNorm_0": {"scale": scale, "bias": bias}},
        "batch_stats": {"BatchNorm_0": {"mean": mean, "var": jnp.exp(spread)}},
    }


def trained(module, variables, x):
    return module.apply(variables, x, train=True, mutable=["batch_stats"])


def assert_close(found, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_training_and_scoring_equal_linens(slope):
    x, variables = a_map(), variables_of(6)
    assert_close(
        jax.tree.map(jnp.shape, Ours(slope).init(jax.random.key(0), x, train=True)),
        jax.tree.map(jnp.shape, Reference(slope).init(jax.random.key(0), x, train=True)),
    )
    assert_close(trained(Ours(slope), variables, x), trained(Reference(slope), variables, x))
    scored = [module(slope).apply(variables, x, train=False) for module in (Ours, Reference)]
    assert_close(*scored)


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_gradients_equal_those_that_jax_derives(slope):
    x, variables = a_map(), variables_of(6)
    weights = a_map(x.shape)

    def loss(module):
        def value(params, x):
            out, updates = trained(module, variables | {"params": params}, x)
            statistics = updates["batch_stats"]["BatchNorm_0"]  # they have gradients, too
            return (weights * out**2).sum() + (statistics["mean"] * statistics["var"]).sum()

        return value

    found, expected = (jax.grad(loss(module(slope)), (0, 1))(variables["params"], x) for module in (Ours, Reference))
    assert_close(found, expected, tolerance=1e-4)

    def steepness(module):
        return lambda x: (jax.grad(loss(module), 1)(variables["params"], x) ** 2).mean()

    found, expected = (jax.grad(steepness(module(slope)))(x) for module in (Ours, Reference))
    assert_close(found / abs(expected).max(), expected / abs(expected).max(), tolerance=1e-4)


def test_bfloat16_maps_have_float32_statistics():
    x, variables = a_map(mean=20.0), variables_of(6)
    out, updates = trained(Ours(0.2, jnp.bfloat16), variables, x)
    expected, statistics = trained(Reference(0.2), variables, x.astype(jnp.bfloat16).astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    assert_close(updates, statistics, tolerance=1e-4)
    assert_close(out.astype(jnp.float32), expected, tolerance=2e-2)
    grad = jax.grad(lambda x: trained(Ours(0.2, jnp.bfloat16), variables, x)[0].astype(jnp.float32).sum())(x)
    assert grad.dtype == jnp.float32 and bool(jnp.isfinite(grad).all())


def test_members_are_normalised_alone():
    x = a_map()
    many = jnp.stack([x, 2 * x + 1, -x])
    found = jax.vmap(lambda x: trained(Ours(0.2), variables_of(6), x))(many)
    for i, one in enumerate(many):
        assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], found), trained(Ours(0.2), variables_of(6), one))
