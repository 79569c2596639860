"""Per-sample gradient moments against loops; the choice of form by counts; cosines that stay finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops.gradient_cosine import choose, gradient_moments, safe_cosine


def numbers(seed=0, shape=(3, 5, 4, 7)):
    rng = np.random.default_rng(seed)
    count, positions, left, right = shape
    sizes = ((count, positions, left), (count, positions, right), (left, right))
    return [rng.normal(size=size) for size in sizes]


def slow_moments(left, right, reference):
    dots, squares = [], []
    for a, b in zip(left, right, strict=True):
        gradient = sum(np.outer(x, y) for x, y in zip(a, b, strict=True))
        dots.append((gradient * reference).sum())
        squares.append((gradient**2).sum())
    return dots, squares


@pytest.mark.parametrize("impl", ["direct", "ghost", "auto"])
@pytest.mark.parametrize("shape", [(3, 5, 4, 7), (2, 1, 6, 3), (1, 9, 2, 2)], ids=str)
def test_equals_loops(impl, shape):
    arrays = numbers(shape=shape)
    with jax.enable_x64():
        dot, square = gradient_moments(*map(jnp.asarray, arrays), impl=impl)
    wanted = slow_moments(*arrays)
    np.testing.assert_allclose(dot, wanted[0], rtol=1e-10)
    np.testing.assert_allclose(square, wanted[1], rtol=1e-10)
    found = gradient_moments(*(jnp.asarray(a, jnp.float32) for a in arrays), impl=impl)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("impl", ["direct", "ghost"])
def test_half_precision_is_summed_in_float32(impl):
    left, right, reference = numbers(shape=(2, 400, 3, 5))
    half = [jnp.asarray(a, jnp.bfloat16) for a in (np.abs(left), np.abs(right))]
    rounded = [np.asarray(a, np.float64) for a in half]
    dot, square = gradient_moments(*half, jnp.ones((3, 5)), impl=impl)
    wanted = slow_moments(*rounded, np.ones((3, 5)))
    assert dot.dtype == square.dtype == jnp.float32
    np.testing.assert_allclose((dot, square), wanted, rtol=2e-3)


def test_auto_counts_operations():
    """28 pixels: T, C, D of the four decoder layers; the break-evens of the specification are 11.0, 10.7, 7.8, 6.2."""
    layers = [(9, 64, 1024), (16, 64, 512), (64, 32, 512), (196, 32, 48)]
    assert [choose("auto", *layer) for layer in layers] == ["ghost", "direct", "direct", "direct"]
    assert choose("auto", 10, 64, 1024) == "ghost" and choose("auto", 11, 64, 1024) == "direct"


def test_auto_saves_memory_where_it_must():
    assert choose("auto", 100, 128, 2048, budget=128 * 2048 - 1) == "ghost"
    assert choose("auto", 100, 128, 2048, budget=128 * 2048) == "direct"
    assert choose("auto", 400, 128, 2048, budget=1000) == "direct"  # Gram matrices would be as large
    with pytest.raises(ValueError, match="cos_impl='gost' is unknown; expected one of .*Pass cos_impl='auto'"):
        choose("gost", 1, 1, 1)


@pytest.mark.parametrize("eps_mode", ["norm", "product"])
def test_cosine(eps_mode):
    found = safe_cosine(jnp.float32(6.0), jnp.float32(9.0), jnp.float32(16.0), eps_mode=eps_mode)
    np.testing.assert_allclose(found, 0.5, rtol=1e-6)

    def of_vector(v):
        return safe_cosine(v @ jnp.ones(3), v @ v, jnp.float32(0), eps_mode=eps_mode)

    value, gradient = jax.value_and_grad(of_vector)(jnp.zeros(3))
    assert value == 0 and bool(jnp.isfinite(gradient).all())


def test_short_gradients_by_either_rule():
    """Norms of 1e-5: torch 2 keeps the cosine; torch 1 clamps their product at 1e-8 and so shrinks it 100 times."""
    arguments = jnp.float32(5e-11), jnp.float32(1e-10), jnp.float32(1e-10)
    np.testing.assert_allclose(safe_cosine(*arguments, eps_mode="norm"), 0.5, rtol=1e-5)
    np.testing.assert_allclose(safe_cosine(*arguments, eps_mode="product"), 0.005, rtol=1e-5)
