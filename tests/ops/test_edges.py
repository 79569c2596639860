"""Edge strength against a slow loop, and on pictures whose edges are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops.edges import edge_strength


def slow(image):
    """Pixel by pixel."""
    grey = image[..., 0] if image.shape[-1] == 1 else image @ np.array([0.2989, 0.5870, 0.1140])
    height, width = grey.shape

    def correlate(x, kernel):
        half, out = len(kernel) // 2, np.zeros_like(x)
        for i in range(height):
            for j in range(width):
                for a in range(-half, half + 1):
                    for b in range(-half, half + 1):
                        y = min(max(i + a, 0), height - 1), min(max(j + b, 0), width - 1)
                        out[i, j] += kernel[a + half][b + half] * x[y]
        return out

    binomial = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]) / 256
    smooth = correlate(grey, binomial)
    sobel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    return np.sqrt(correlate(smooth, sobel) ** 2 + correlate(smooth, sobel.T) ** 2 + 1e-8)


@pytest.mark.parametrize("channels", [1, 3])
def test_it_is_that_of_the_slow_version(channels):
    images = np.random.default_rng(channels).random((2, 7, 9, channels))
    found = jax.jit(edge_strength)(jnp.asarray(images))
    for one, image in zip(found, images, strict=True):
        np.testing.assert_allclose(one, slow(image), rtol=1e-4, atol=1e-5)


def test_a_flat_picture_has_the_least_and_a_ramp_its_slope():
    flat = edge_strength(jnp.full((1, 8, 8, 3), 0.4))
    np.testing.assert_allclose(flat, 1e-4, rtol=0.02)
    assert float(jax.nn.sigmoid(flat.mean())) == pytest.approx(0.500025, abs=1e-6)
    ramp = jnp.broadcast_to(jnp.arange(12.0)[:, None, None] / 100, (1, 12, 12, 1))
    np.testing.assert_allclose(edge_strength(ramp)[0, 4:8, 4:8], 0.08, rtol=1e-4)  # 8 x the step, in a Sobel kernel
