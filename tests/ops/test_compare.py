"""Cosines over scales: tiled equal untiled, equal slow NumPy; the gate; linear resizing as torch has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops import compare


def maps(seed, *sizes, channels=5):
    numbers = np.random.default_rng(seed)
    return [jnp.asarray(numbers.normal(size=(2, h, w, channels)), jnp.float32) for h, w in sizes]


SIZES = ((4, 6), (5, 7), (11, 13))


def slow(first, second, size):
    """Resized by matrices worked out pixel by pixel, averaged, normalised to unit length, multiplied."""

    def line(old, new):
        matrix = np.zeros((new, old))
        for i in range(new):
            at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
            low = int(at)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, old - 1)] += at - low
        return matrix

    def whole(scales):
        parts = [
            np.einsum("hi,bijc,wj->bhwc", line(m.shape[1], size[0]), np.float64(m), line(m.shape[2], size[1]))
            for m in scales
        ]
        mean = sum(parts) / len(parts)
        return mean / np.linalg.norm(mean, axis=-1, keepdims=True)

    return (whole(first) * whole(second)).sum(axis=-1)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 20])
def test_tiled_equals_untiled_equals_slow(rows):
    first, second = maps(0, *SIZES), maps(1, *SIZES)
    got = jax.jit(lambda a, b: compare.cosine_map(a, b, (10, 12), rows=rows))(first, second)
    np.testing.assert_allclose(got, compare.cosine_map(first, second, (10, 12)), atol=1e-6)
    np.testing.assert_allclose(got, slow(first, second, (10, 12)), atol=1e-5)


def test_a_cosine_knows_no_lengths_and_equal_maps_are_alike():
    first, second = maps(0, *SIZES), maps(1, *SIZES)
    base = compare.cosine_map(first, second, (8, 8))
    longer = compare.cosine_map([7.0 * m for m in first], second, (8, 8))
    np.testing.assert_allclose(longer, base, atol=1e-6)
    np.testing.assert_allclose(compare.cosine_map(first, first, (8, 8)), 1, atol=1e-6)
    assert float(jnp.abs(base).max()) < 1


def test_an_offset_makes_vectors_near_zero_alike():
    """By hand: (3, 0) and (0, 3) with a shared 4: 16 / 25; short ones of opposite directions nearly 1."""
    a, b = jnp.asarray([[[[3.0, 0]]]]), jnp.asarray([[[[0, 3.0]]]])
    np.testing.assert_allclose(compare.cosine_map([a], [b], (1, 1), offset=16.0), 16 / 25, rtol=1e-6)
    np.testing.assert_allclose(compare.cosine_map([0.01 * a], [-0.01 * a], (1, 1), offset=16.0), 1, atol=1e-3)


def test_the_gate_by_hand():
    confidence, alike = jnp.asarray([0.9995, 0.8, 0.99]), jnp.asarray([0.2, 0.3, 1.0])
    np.testing.assert_allclose(compare.gated(confidence, alike, 0.999), [0.9995, 0.3, 1.0])
    np.testing.assert_allclose(compare.gated(confidence, alike, 1.0), alike)
    np.testing.assert_allclose(compare.gated(confidence, alike, -1.0), confidence)


@pytest.mark.parametrize("size", [(3, 4), (9, 16), (6, 8)])
def test_resizing_is_torchs(size):
    torch = pytest.importorskip("torch")
    (picture,) = maps(0, (6, 8), channels=3)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(picture)).permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(compare.resize(picture, size), theirs.permute(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(compare.resize(picture[..., 0], size), theirs[:, 0], atol=1e-5)


def test_the_highest_share_of_pixels():
    maps = jnp.arange(200.0).reshape(1, 10, 20)
    np.testing.assert_allclose(compare.top_share(maps, 0.02), [(199 + 198 + 197 + 196) / 4])
    np.testing.assert_allclose(compare.top_share(maps, 0.0001), [199])
