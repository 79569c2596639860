"""Convolutions against slow loops, the flat initialisation, smoothing."""

import itertools

import flax.linen as flax_nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxad.nn import conv, init
from jaxad.ops.blocks import rows_over
from jaxad.ops.smooth import gaussian_smooth


def correlate_loop(image, kernel, strides, padding):
    """Cross-correlation, one output at a time."""
    rank = len(strides)
    padded = np.pad(image, ((0, 0), *padding, (0, 0)))
    taps = kernel.shape[:rank]
    sizes = [(n - t) // s + 1 for n, t, s in zip(padded.shape[1:-1], taps, strides, strict=True)]
    out = np.zeros((image.shape[0], *sizes, kernel.shape[-1]))
    for at in itertools.product(*map(range, sizes)):
        window = padded[(slice(None), *(slice(a * s, a * s + t) for a, s, t in zip(at, strides, taps, strict=True)))]
        out[(slice(None), *at)] = np.tensordot(window, kernel, axes=rank + 1)
    return out


def transposed_loop(image, kernel, strides, output_padding):
    """Dilate by the stride, pad (1, 1 + output_padding), correlate."""
    sizes = [(n - 1) * s + 1 for n, s in zip(image.shape[1:-1], strides, strict=True)]
    dilated = np.zeros((image.shape[0], *sizes, image.shape[-1]))
    dilated[(slice(None), *(slice(None, None, s) for s in strides))] = image
    return correlate_loop(dilated, kernel, [1] * len(strides), [(1, 1 + o) for o in output_padding])


@pytest.mark.parametrize("impl", ["conv", "mixed", "gemm", "winograd"])
@pytest.mark.parametrize(
    "spatial, taps, strides, padding",
    [
        ((7, 6), (3, 3), (2, 2), ((1, 1), (1, 1))),
        ((8, 5), (1, 1), (2, 2), ((0, 0), (0, 0))),
        ((4, 5, 6), (3, 3, 3), (1, 2, 2), ((1, 1),) * 3),
        ((6, 6), (4, 4), (2, 2), ((1, 2), (0, 1))),
    ],
)
def test_correlate(impl, spatial, taps, strides, padding):
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(2, *spatial, 3)), rng.normal(size=(*taps, 3, 5))
    got = conv.correlate(jnp.float32(image), jnp.float32(kernel), strides=strides, padding=padding, impl=impl)
    np.testing.assert_allclose(got, correlate_loop(image, kernel, strides, padding), atol=1e-4)


@pytest.mark.parametrize(
    "spatial, taps, strides, padding, channels, outputs, fold",
    [
        ((9, 11), (5, 5), (1, 1), ((0, 1), (0, 1)), 3, 32, 2),
        ((9, 10), (3, 3), (2, 1), ((1, 1), (1, 1)), 3, 8, 4),
        ((4, 5, 7), (3, 3, 3), (1, 2, 1), ((1, 1),) * 3, 1, 16, 2),
        ((8, 9), (3, 4), (1, 1), ((1, 0), (2, 0)), 2, 5, 4),
        ((8, 9), (3, 3), (1, 2), ((1, 1), (1, 1)), 3, 8, 1),
        ((8, 9), (3, 1), (1, 1), ((1, 1), (0, 0)), 3, 8, 1),
        ((8, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), 8, 32, 1),
        ((8, 9), (3, 3), (1, 1), ((1, 1), (1, 1)), 1, 64, 1),
    ],
)
def test_pixels_are_folded_into_few_channels_on_cpu(spatial, taps, strides, padding, channels, outputs, fold):
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(2, *spatial, channels)), rng.normal(size=(*taps, channels, outputs))

    def traced(platform):
        with conv.lowering_for(platform=platform):
            f = jax.make_jaxpr(lambda x, k: conv.correlate(x, k, strides=strides, padding=padding, impl="conv"))
            return f(jnp.float32(image), jnp.float32(kernel))

    def wide(jaxpr):
        return [e.invars[1].aval.shape[-1] for e in jaxpr.eqns if e.primitive.name == "conv_general_dilated"]

    assert wide(traced("cpu")) == [fold * outputs] and wide(traced("tpu")) == [outputs]
    got = conv.correlate(jnp.float32(image), jnp.float32(kernel), strides=strides, padding=padding, impl="conv")
    np.testing.assert_allclose(got, correlate_loop(image, kernel, strides, padding), atol=1e-4)


@pytest.mark.parametrize(
    "spatial, taps, padding, channels, outputs",
    [
        ((5, 8), (3, 3), ((1, 1), (1, 1)), 3, 5),  # two outputs at a time
        ((6, 10), (2, 3), ((1, 0), (2, 0)), 2, 3),  # the same, unevenly padded
        ((4, 3, 8), (3, 3, 3), ((1, 1),) * 3, 1, 4),
        ((5, 8), (3, 3), ((1, 1), (1, 1)), 9, 2),  # narrowing: multiplied, then added
        ((5, 6), (3, 2), ((2, 0), (0, 1)), 8, 2),
        ((5, 8), (3, 3), ((1, 1), (1, 1)), 2, 9),  # its gradient narrows
    ],
)
def test_products_of_stride_1(spatial, taps, padding, channels, outputs):
    """The form and its transpose are those of XLA's convolution, whichever way the products are made."""
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(2, *spatial, channels)), rng.normal(size=(*taps, channels, outputs))
    image, kernel, ones = jnp.float32(image), jnp.float32(kernel), (1,) * len(taps)
    expected, pull = jax.vjp(lambda x: conv.correlate(x, kernel, strides=ones, padding=padding, impl="conv"), image)
    got, own_pull = jax.vjp(lambda x: conv.correlate(x, kernel, strides=ones, padding=padding, impl="gemm"), image)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    back = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    np.testing.assert_allclose(own_pull(back)[0], pull(back)[0], atol=1e-4)


@pytest.mark.parametrize("impl", ["conv", "mixed", "gemm", "winograd"])
@pytest.mark.parametrize(
    "spatial, strides, output_padding",
    [
        ((4, 4), (2, 2), (0, 0)),
        ((3, 5), (2, 2), (1, 0)),
        ((2, 3, 4), (1, 2, 2), (0, 1, 1)),
        ((2, 2, 3), (2, 2, 2), (1, 1, 0)),
    ],
)
def test_correlate_transposed(impl, spatial, strides, output_padding):
    rng = np.random.default_rng(1)
    image, kernel = rng.normal(size=(2, *spatial, 3)), rng.normal(size=(*(3,) * len(spatial), 3, 4))
    expected = transposed_loop(image, kernel, strides, output_padding)

    def run(x, k):
        return conv.correlate_transposed(x, k, strides=strides, output_padding=output_padding, impl=impl)

    args = jnp.float32(image), jnp.float32(kernel)
    np.testing.assert_allclose(run(*args), expected, atol=1e-4)
    # the gradient of <g, f(x, k)> in k is linear in x: compare with the loop's at one direction
    g, direction = rng.normal(size=expected.shape), rng.normal(size=kernel.shape)
    grad = jax.grad(lambda k: jnp.vdot(jnp.float32(g), run(args[0], k)))(args[1])
    slope = np.vdot(g, transposed_loop(image, direction, strides, output_padding))
    np.testing.assert_allclose(np.vdot(grad, direction), slope, rtol=1e-4)


_GEOMETRIES = [  # channels decide how many axes the kernel's gradient gathers windows along
    ((7, 6), (3, 3), (2, 2), ((1, 1), (1, 1)), 3),
    ((8, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), 40),
    ((9, 11), (5, 5), (3, 2), ((2, 0), (0, 3)), 20),
    ((9, 9), (2, 2), (3, 3), ((0, 0), (0, 0)), 40),
    ((3, 5, 4), (3, 3, 3), (1, 2, 2), ((1, 1),) * 3, 30),
]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-5)])  # products sum in float32
@pytest.mark.parametrize("spatial, taps, strides, padding, channels", _GEOMETRIES)
def test_gradients_are_those_of_xla(spatial, taps, strides, padding, channels, dtype, tolerance):
    rng = np.random.default_rng(3)

    def gradients(impl, images, kernels, grads):
        def one(x, k, g):
            run = lambda x, k: conv.correlate(x, k, strides=strides, padding=padding, impl=impl)  # noqa: E731
            return jax.vjp(run, x, k)[1](g)

        return jax.jit(jax.vmap(one))(images, kernels, grads)

    with jax.enable_x64(dtype == "float64"):
        members = 2
        images = jnp.asarray(rng.normal(size=(members, 2, *spatial, channels)), dtype)
        kernels = jnp.asarray(rng.normal(size=(members, *taps, channels, 4)), dtype)
        counts = [(n + sum(p) - t) // s + 1 for n, t, s, p in zip(spatial, taps, strides, padding, strict=True)]
        grads = jnp.asarray(rng.normal(size=(members, 2, *counts, 4)), dtype)
        expected = gradients("conv", images, kernels, grads)
        for impl in ("mixed", "gemm", "winograd"):
            for got, want in zip(gradients(impl, images, kernels, grads), expected, strict=True):
                assert got.dtype == want.dtype == dtype
                np.testing.assert_allclose(got, want, atol=tolerance * float(jnp.abs(want).max()))


@pytest.mark.parametrize(
    "target, convolutions, products",
    [
        ({"platform": "cpu"}, 2, 3),  # XLA's for images there and back, a product for each row of taps
        ({"platform": "cpu", "looped": True}, 0, 5),
        ({"platform": "cpu", "members": True}, 0, 5),
        ({"platform": "tpu"}, 3, 0),
    ],
)
def test_the_chosen_lowering_is_what_is_traced(target, convolutions, products):
    def loss(image, kernel):
        return conv.correlate(image, kernel, strides=(2, 2), padding=((1, 1), (1, 1)), impl="auto").sum()

    def gradients(image, kernel):  # a new function at every call: traces are cached
        return jax.value_and_grad(loss, argnums=(0, 1))(image, kernel)

    with conv.lowering_for(**target):
        text = str(jax.make_jaxpr(gradients)(jnp.ones((1, 8, 8, 32)), jnp.ones((3, 3, 32, 32))))
    assert (text.count("conv_general_dilated["), text.count("dot_general[")) == (convolutions, products)


@pytest.mark.parametrize(
    "pixels, inputs, outputs, target, convolutions, products",
    [
        (128, 32, 32, {"platform": "cpu"}, 0, 18 + 3),  # two of Winograd's form, the kernel's gradient row by row
        (64, 64, 64, {"platform": "cpu"}, 0, 27),
        (64, 64, 64, {"platform": "cpu", "members": True}, 0, 27),
        (63, 64, 64, {"platform": "cpu", "looped": True}, 0, 27),
        (32, 64, 64, {"platform": "cpu"}, 2, 3),  # too little work to pay
        (256, 16, 64, {"platform": "cpu"}, 2, 3),  # too few channels
        (64, 64, 64, {"platform": "tpu"}, 3, 0),
    ],
)
def test_larger_layers_take_fewer_products(pixels, inputs, outputs, target, convolutions, products):
    def gradients(image, kernel):
        run = lambda x, k: conv.correlate(x, k, strides=(2, 2), padding=((1, 1),) * 2, impl="auto").sum()  # noqa: E731
        return jax.value_and_grad(run, argnums=(0, 1))(image, kernel)

    with conv.lowering_for(**target):
        shapes = (1, pixels, pixels, inputs), (3, 3, inputs, outputs)
        text = str(jax.make_jaxpr(gradients)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))
    assert (text.count("conv_general_dilated["), text.count("dot_general[")) == (convolutions, products)


@pytest.mark.parametrize(
    "outputs, target, devices, is_grouped",
    [
        (4, {"platform": "cpu"}, 1, True),
        (32, {"platform": "cpu"}, 1, False),  # wide enough
        (4, {"platform": "cpu"}, 2, False),  # rows are split over devices already
        (4, {"platform": "cpu", "members": True}, 1, False),  # members are
        (4, {"platform": "gpu"}, 1, False),
    ],
)
def test_narrow_kernel_gradients_are_a_product_for_each_core(monkeypatch, outputs, target, devices, is_grouped):
    monkeypatch.setattr(conv, "usable_cores", lambda: 4)

    def gradient(image, kernel):
        run = lambda k: conv.correlate(image, k, strides=(1, 1), padding=((1, 1),) * 2, impl="gemm").sum()  # noqa: E731
        return jax.grad(run)(kernel)

    with conv.lowering_for(**target), rows_over(devices):
        shapes = (2, 64, 64, 16), (3, 3, 16, outputs)
        made = jax.make_jaxpr(gradient)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    assert ("f32[4,12,48] = dot_general[" in str(made)) == is_grouped  # three taps' outputs, windows of three pixels


def test_impls_agree_under_vmapped_kernels():
    rng = np.random.default_rng(2)
    images, kernels = jnp.float32(rng.normal(size=(3, 2, 6, 6, 4))), jnp.float32(rng.normal(size=(3, 3, 3, 4, 5)))

    def run(impl):
        def one(x, k):
            return conv.correlate(x, k, strides=(2, 2), padding=((1, 1), (1, 1)), impl=impl)

        return jax.vmap(one)(images, kernels)

    np.testing.assert_allclose(run("gemm"), run("conv"), atol=1e-4)
    np.testing.assert_allclose(run("winograd"), run("conv"), atol=1e-4)


@pytest.mark.parametrize(
    "target, outputs, expected",
    [
        ({}, 3, "conv"),
        ({}, 64, "gemm"),
        ({"members": True}, 3, "gemm"),
        ({"looped": True}, 3, "gemm"),
        ({"platform": "tpu"}, 64, "conv"),
        ({"platform": "gpu", "members": True}, 64, "conv"),
        ({"platform": "cpu", "looped": True}, 3, "gemm"),
    ],
)
def test_the_lowering_suits_what_is_traced_for(target, outputs, expected):
    with conv.lowering_for(**target):
        assert conv.choose_impl("auto", outputs) == expected
        with conv.lowering_for(platform="tpu"):
            assert conv.choose_impl("auto", outputs) == "conv", "the innermost platform counts"
        with conv.lowering_for(looped=True):
            inner = "gemm" if target.get("platform", "cpu") == "cpu" else "conv"
            assert conv.choose_impl("auto", outputs) == inner, "a loop within is on the platform around it"
        assert conv.choose_impl("conv", outputs) == "conv" and conv.choose_impl("gemm", outputs) == "gemm"
    assert conv.choose_impl("auto", 64) == "gemm", "the target outlived its block"


def test_unknown_impl_is_refused():
    with pytest.raises(ValueError, match="conv_impl='fft' is unknown"):
        conv.choose_impl("fft", 8)


def test_bias_before_normalisation_gets_no_gradient():
    layer = conv.Conv(4, (3, 3), (2, 2), (1, 1), normalised=True)
    x = jnp.ones((1, 4, 4, 2))
    params = init.init_flat(jax.random.key(0), layer, x)["params"]
    grads = jax.grad(lambda p: layer.apply({"params": p}, x).sum())(params)
    assert not grads["bias"].any() and grads["kernel"].any()


class Two(flax_nn.Module):
    @flax_nn.compact
    def __call__(self, x):
        a = self.param("a", init.normal(0.5, mean=2.0), (40, 50))
        b = self.param("b", init.uniform(0.1), (3000,))
        return x + a.sum() + b.sum()


def test_flat_init_draws_the_distributions_asked_for():
    params = init.init_flat(jax.random.key(0), Two(), jnp.zeros(()))["params"]
    assert abs(float(params["a"].mean()) - 2) < 0.05 and abs(float(params["a"].std()) - 0.5) < 0.03
    assert float(params["b"].min()) < -0.095 and 0.095 < float(params["b"].max()) <= 0.1
    assert abs(float(params["b"].std()) - 0.1 / 3**0.5) < 0.003
    correlation = np.corrcoef(params["a"].ravel()[:2000], params["b"][:2000])[0, 1]
    assert abs(correlation) < 0.1, "two parameters were cut from the same numbers"


def test_flat_init_is_one_draw():
    jaxpr = str(jax.make_jaxpr(lambda key: init.init_flat(key, Two(), jnp.zeros(())))(jax.random.key(0)))
    assert jaxpr.count("random_bits") == 1


def test_flat_init_under_vmap_equals_a_loop():
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    stacked = jax.vmap(lambda key: init.init_flat(key, Two(), jnp.zeros(())))(keys)["params"]
    for i in range(3):
        alone = init.init_flat(jax.random.key(i), Two(), jnp.zeros(()))["params"]
        np.testing.assert_array_equal(stacked["b"][i], alone["b"])
    assert (stacked["b"][0] != stacked["b"][1]).any()


def test_smoothing_equals_scipy_away_from_borders_and_keeps_constants():
    maps = np.random.default_rng(0).normal(size=(2, 40, 50)).astype(np.float32)
    got = gaussian_smooth(jnp.asarray(maps), sigma=2.0)
    expected = np.stack([ndimage.gaussian_filter(m, 2.0, truncate=8) for m in maps])
    np.testing.assert_allclose(got[:, 12:-12, 12:-12], expected[:, 12:-12, 12:-12], atol=1e-5)
    np.testing.assert_allclose(gaussian_smooth(jnp.ones((1, 9, 7)), sigma=4.0), 1, rtol=1e-6)
    np.testing.assert_allclose(gaussian_smooth(jnp.asarray(maps), sigma=0.0), maps, atol=1e-6)
