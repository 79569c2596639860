"""SSIM against scikit-image and by hand, GMS and MS-GMS against loops, and gradients where pictures are flat."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops import similarity, smooth


def pair(shape=(2, 24, 16, 3), seed=0):
    """A smooth picture and a distorted one."""
    numbers = np.random.default_rng(seed)
    y, x = np.indices(shape[1:3])
    waves = np.sin(0.4 * y + 0.3 * x)[None, :, :, None] * numbers.uniform(0.1, 0.4, (shape[0], 1, 1, shape[3])) + 0.5
    other = np.clip(waves + numbers.normal(0, 0.1, shape), 0, 1)
    return other.astype(np.float32), waves.astype(np.float32)


def test_ssim_is_scikit_images():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = pair()
    ours = np.asarray(similarity.ssim_map(jnp.asarray(a), jnp.asarray(b)))
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    for own, first, second in zip(ours, a.astype(np.float64), b.astype(np.float64), strict=True):
        full = metrics.structural_similarity(first, second, channel_axis=-1, full=True, **options)[1]
        np.testing.assert_allclose(own, full.mean(axis=-1), atol=2e-4)
    assert ours.min() < 0.5


def test_ssim_of_one_pixel_by_hand():
    """The window's weighted means, variances and covariance at a pixel far from borders."""
    a, b = (x.astype(np.float64)[1, 6:17, 2:13, 0] for x in pair())
    weights = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    weights = np.outer(weights, weights) / weights.sum() ** 2
    mean_a, mean_b = (weights * a).sum(), (weights * b).sum()
    var_a, var_b = (weights * (a - mean_a) ** 2).sum(), (weights * (b - mean_b) ** 2).sum()
    covariance = (weights * (a - mean_a) * (b - mean_b)).sum()
    expected = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    expected /= (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    ours = similarity.ssim_map(*(jnp.asarray(x[..., :1]) for x in pair()))[1, 11, 7]
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def magnitude(image):
    """Prewitt's gradient magnitude of one (H, W) picture, pixel by pixel."""
    padded, found = np.pad(image.astype(np.float64), 1, mode="edge"), np.zeros(image.shape)
    for y, x in np.ndindex(image.shape):
        near = padded[y : y + 3, x : x + 3]
        down, right = (near[2] - near[0]).sum() / 3, (near[:, 2] - near[:, 0]).sum() / 3
        found[y, x] = np.hypot(down, right)
    return found


def gms(a, b, constant=0.0026):
    g, h = magnitude(a), magnitude(b)
    return (2 * g * h + constant) / (g**2 + h**2 + constant)


def test_gms_is_the_slow_version():
    a, b = pair()
    ours = similarity.gms_map(jnp.asarray(a), jnp.asarray(b))
    for own, first, second in zip(ours, a, b, strict=True):
        np.testing.assert_allclose(own, gms(first.mean(axis=-1), second.mean(axis=-1)), atol=2e-5)


@pytest.mark.parametrize("scales", [1, 2, 4])
def test_ms_gms_is_the_slow_version(scales):
    a, b = pair()
    ours = similarity.ms_gms_map(jnp.asarray(a), jnp.asarray(b), scales=scales)
    for own, first, second in zip(ours, a.mean(axis=-1), b.mean(axis=-1), strict=True):
        expected = np.zeros(first.shape)
        for scale in range(scales):
            expected += np.kron(gms(first, second), np.ones((2**scale, 2**scale))) / scales
            if scale + 1 < scales:
                first, second = (
                    (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4 for x in (first, second)
                )
        np.testing.assert_allclose(own, expected, atol=2e-5)


@pytest.mark.parametrize("compare", [similarity.ssim_map, similarity.gms_map, similarity.ms_gms_map])
def test_equal_pictures_are_alike_and_gradients_are_finite_where_they_are_flat(compare):
    a, b = (jnp.asarray(x) for x in pair())
    np.testing.assert_allclose(compare(b, b), 1, atol=1e-5)
    flat = jnp.full_like(a, 0.5)
    slope = jax.jit(jax.grad(lambda x: compare(x, b).mean()))
    assert bool(jnp.isfinite(slope(flat)).all()) and bool(jnp.isfinite(slope(b)).all())
    assert float(compare(b, b).mean()) > float(compare(0.9 * b + 0.1 * a, b).mean()) > float(compare(a, b).mean())


def test_gradients_are_those_of_differences():
    a, b = (jnp.asarray(x[:1, :8, :8]) for x in pair())
    direction = jnp.asarray(np.random.default_rng(1).normal(size=a.shape), jnp.float32)
    for compare in (similarity.ssim_map, similarity.ms_gms_map):
        value = jax.jit(lambda t, f=compare: f(a + t * direction, b).mean())
        difference = (value(2e-3) - value(-2e-3)) / 4e-3
        np.testing.assert_allclose(jax.jit(jax.grad(value))(0.0), difference, rtol=3e-2, atol=1e-3)


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="12x20 cannot be halved 3 times; expected multiples of 8"):
        similarity.ms_gms_map(jnp.zeros((1, 12, 20, 3)), jnp.zeros((1, 12, 20, 3)))


def test_box_means_are_those_of_what_lies_on_the_map():
    maps = np.random.default_rng(0).uniform(size=(2, 5, 7)).astype(np.float32)
    expected = np.empty_like(maps)
    for i in range(5):
        for j in range(7):
            expected[:, i, j] = maps[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean(axis=(1, 2))
    np.testing.assert_allclose(smooth.box_smooth(jnp.asarray(maps), size=3), expected, rtol=1e-5)
