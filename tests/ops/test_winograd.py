"""Fewer products: the three derivatives against loops over taps, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops import winograd

# pictures a whole number of tiles large and not, padded before or not, with outputs beyond the picture
GEOMETRIES = [
    ((8, 8), (1, 1), (4, 4)),
    ((7, 9), (1, 1), (4, 5)),
    ((12, 5), (0, 1), (6, 3)),
    ((6, 4), (2, 0), (4, 2)),
]


def parts(padded, counts):
    """For every tap the pixels that it meets."""
    for i in range(3):
        for j in range(3):
            yield i, j, padded[:, i : i + 2 * counts[0] : 2, j : j + 2 * counts[1] : 2]


def padded_of(image, before, counts):
    edges = [(b, max(0, 2 * n + 1 - b - size)) for b, n, size in zip(before, counts, image.shape[1:3], strict=True)]
    return np.pad(image, ((0, 0), *edges, (0, 0)))


@pytest.mark.parametrize("size, before, counts", GEOMETRIES)
def test_three_derivatives_of_one_form(size, before, counts):
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(2, *size, 3)), rng.normal(size=(3, 3, 3, 5))
    small = rng.normal(size=(2, *counts, 5))
    padded = padded_of(image, before, counts)
    expected = sum(part @ kernel[i, j] for i, j, part in parts(padded, counts))
    d_kernel, d_padded = np.zeros_like(kernel), np.zeros_like(padded)
    for i, j, part in parts(padded, counts):
        d_kernel[i, j] = np.tensordot(part, small, axes=((0, 1, 2), (0, 1, 2)))
    for i, j, part in parts(d_padded, counts):
        part += small @ kernel[i, j].T
    d_image = d_padded[:, before[0] : before[0] + size[0], before[1] : before[1] + size[1]]

    x, k, y = (jnp.asarray(a, jnp.float32) for a in (image, kernel, small))
    np.testing.assert_allclose(winograd.correlate(x, k, before=before, counts=counts), expected, atol=2e-5)
    np.testing.assert_allclose(winograd.transpose(y, k, before=before, size=size), d_image, atol=2e-5)
    np.testing.assert_allclose(winograd.kernel_gradient(x, y, before=before), d_kernel, atol=5e-5)


def test_a_row_by_hand():
    """Pixels 1 2 3 4 5, zero before them, taps 1 10 100: 210, 432, 54 a row; the same taps down meet rows of zeros."""
    image = jnp.zeros((1, 5, 5, 1)).at[0, 1, :, 0].set(jnp.arange(1.0, 6.0))
    kernel = jnp.zeros((3, 3, 1, 1)).at[2, :, 0, 0].set(jnp.array([1.0, 10.0, 100.0]))
    got = winograd.correlate(image, kernel, before=(1, 1), counts=(3, 3))
    np.testing.assert_array_equal(got[0, :, :, 0], [[210, 432, 54], [0, 0, 0], [0, 0, 0]])


def test_25_products_for_36():
    tiles, shape = 4, (1, 8, 8, 2)
    jaxpr = jax.make_jaxpr(lambda x, k: winograd.correlate(x, k, before=(1, 1), counts=(4, 4)))(
        jnp.ones(shape), jnp.ones((3, 3, 2, 3))
    )
    products = [e for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    columns = sum(e.invars[0].aval.shape[-1] for e in products)
    assert len(products) == 9 and columns == 25 * 2
    assert all(e.invars[0].aval.size == tiles * e.invars[0].aval.shape[-1] for e in products)


def test_rounding_stays_near_that_of_taps():
    rng = np.random.default_rng(1)
    image, kernel = rng.normal(size=(1, 32, 32, 64)) + 3, rng.normal(size=(3, 3, 64, 8))
    exact = sum(part @ kernel[i, j] for i, j, part in parts(padded_of(image, (1, 1), (16, 16)), (16, 16)))
    x, k = jnp.float32(image), jnp.float32(kernel)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = sum(part @ k[i, j] for i, j, part in parts(padded, (16, 16)))
    error = lambda got: float(np.abs(np.asarray(got, np.float64) - exact).max())  # noqa: E731
    assert error(winograd.correlate(x, k, before=(1, 1), counts=(16, 16))) < 4 * error(taps)
