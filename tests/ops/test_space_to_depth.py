"""4x4 convolutions of stride 2: both lowerings against loops, derivatives of first and second order against numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops.space_to_depth import conv4, conv4_transposed, doubled, halved, patches, unfold_kernel

IMPLS = ("conv", "gemm", "mixed")
CASES = [(9, 6, 2, 2, 3), (8, 8, 1, 9, 2), (5, 4, 2, 3, 4), (7, 7, 1, 1, 5)]  # height, width, padding, channels in, out


def slow_conv(image, kernel, padding):
    count, height, width, _ = image.shape
    padded = np.pad(image, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    out = np.zeros((count, halved(height, padding), halved(width, padding), kernel.shape[-1]))
    for h in range(out.shape[1]):
        for w in range(out.shape[2]):
            window = padded[:, 2 * h : 2 * h + 4, 2 * w : 2 * w + 4]
            out[:, h, w] = np.tensordot(window, kernel, 3)
    return out


def slow_transposed(image, kernel, padding):
    count, height, width, _ = image.shape
    full = np.zeros((count, 2 * height + 2, 2 * width + 2, kernel.shape[-1]))
    for h in range(height):
        for w in range(width):
            full[:, 2 * h : 2 * h + 4, 2 * w : 2 * w + 4] += np.tensordot(image[:, h, w], kernel, ([1], [2]))
    return full[:, padding : full.shape[1] - padding, padding : full.shape[2] - padding]


FORMS = {"conv": (conv4, slow_conv), "transposed": (conv4_transposed, slow_transposed)}


def numbers(case, seed=0):
    height, width, padding, inputs, outputs = case
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, height, width, inputs)), rng.normal(size=(4, 4, inputs, outputs)), padding


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_loops(form, case):
    image, kernel, padding = numbers(case)
    fast, slow = FORMS[form]
    with jax.enable_x64():
        for impl in IMPLS:
            found = fast(jnp.asarray(image), jnp.asarray(kernel), padding=padding, impl=impl)
            np.testing.assert_allclose(found, slow(image, kernel, padding), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_first_and_second_derivatives(form, impl, case):
    """Central differences along random directions, of a loss and of a function of its kernel gradient."""
    fast, _ = FORMS[form]
    with jax.enable_x64():
        image, kernel, padding = numbers(case)
        image, kernel = jnp.asarray(image), jnp.asarray(kernel)
        step = [jnp.asarray(array) for array in numbers(case, seed=1)[:2]]

        def loss(image, kernel):
            return jnp.tanh(0.1 * fast(image, kernel, padding=padding, impl=impl)).sum()

        def of_gradient(image, kernel):
            return (jax.grad(loss, argnums=1)(image, kernel) ** 2).sum()

        def of_back(image, kernel):
            return (jax.grad(loss, argnums=0)(image, kernel) ** 2).sum()

        for function in (loss, of_gradient, of_back):
            value = jax.jit(function)
            ahead, behind = (value(image + e * step[0], kernel + e * step[1]) for e in (1e-5, -1e-5))
            grads = jax.jit(jax.grad(function, argnums=(0, 1)))(image, kernel)
            slope = sum((g * s).sum() for g, s in zip(grads, step, strict=True))
            np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-6)


def test_patches_are_windows():
    image, _, padding = numbers(CASES[0])
    rows = patches(jnp.asarray(image, jnp.float32), padding=padding)
    padded = np.pad(image, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    window = padded[:, 2:6, 4:8]  # the one at (1, 2)
    taps = unfold_kernel(jnp.arange(16.0).reshape(4, 4, 1, 1)).ravel().astype(int)
    np.testing.assert_allclose(rows[:, 1, 2].reshape(2, 16, -1), window.reshape(2, 16, -1)[:, taps], rtol=1e-6)


def test_sizes_of_the_paper_network():
    assert [halved(n, 2) for n in (28, 15, 8, 5)] == [15, 8, 5, 3]
    assert [doubled(n, p) for n, p in zip((3, 4, 8, 14), (2, 1, 2, 1), strict=True)] == [4, 8, 14, 28]


def test_members_are_a_batched_product():
    """With kernels of several members "gemm" holds no convolution, derivatives included."""
    image, kernel, padding = numbers(CASES[0])
    kernels, image = jnp.stack([jnp.asarray(kernel, jnp.float32)] * 3), jnp.asarray(image, jnp.float32)

    def loss(kernel):
        return (conv4(image, kernel, padding=padding, impl="gemm") ** 2).sum()

    text = jax.jit(jax.vmap(jax.grad(lambda k: (jax.grad(loss)(k) ** 2).sum()))).lower(kernels).as_text()
    assert "convolution" not in text and "dot_general" in text
