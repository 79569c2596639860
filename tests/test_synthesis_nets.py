"""SPADE, its discriminators, the segmenter and the comparison nets: published sizes, and each against slow forms."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.nn import spade
from jaxad.nn.comparison import DiscrepancyNet, FailureNet
from jaxad.nn.init import init_flat
from jaxad.nn.segmenter import Segmenter, dilated, max_pool, pool

LABELS = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 8, 8)), jnp.int32)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def params_of(module, *arguments, **options):
    return jax.eval_shape(lambda key: init_flat(key, module, *arguments, **options), jax.random.key(0))["params"]


def drawn(module, *arguments, seed=0, **options):
    """Variables with biases and running statistics away from their start."""
    variables = jax.jit(lambda key: init_flat(key, module, *arguments, **options))(jax.random.key(seed))
    numbers = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + numbers.normal(0, 0.1, x.shape).astype("f"), variables["params"])
    stats = {
        "batch_stats": jax.tree.map(
            lambda x: x + numbers.uniform(0, 0.3, x.shape).astype("f"), variables.get("batch_stats", {})
        )
    }
    return {**variables, "params": params, **stats}


# --- published sizes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels, fields, parameters", [(13, {}, 92_359_107), (19, {}, 92_538_819)])
def test_the_generator_has_the_published_size(labels, fields, parameters):
    net = spade.SpadeGenerator((256, 512), 3, labels, **fields)
    given = jnp.zeros((1, 256, 512), jnp.int32)
    variables = jax.eval_shape(lambda key: init_flat(key, net, given, train=True), jax.random.key(0))
    assert count(variables["params"]) == parameters
    if labels == 13:
        assert variables["params"]["start"].size + variables["params"]["start_bias"].size == 120_832
    made = jax.eval_shape(lambda v: net.apply(v, given, train=False), variables)
    assert made.shape == (1, 256, 512, 3)


def test_with_five_upsamplings_the_third_block_does_not_double():
    widths = (512, 512, 512, 256, 128, 64, 32)
    net = spade.SpadeGenerator((256, 256), 3, 13, widths, 5)
    assert count(params_of(net, jnp.zeros((1, 64, 64), jnp.int32), train=True)) == 29_635_555
    assert [spade.doubles(i, 7, 5) for i in range(7)] == [False, True, False, True, True, True, True]
    assert [spade.doubles(i, 7, 6) for i in range(7)] == [False] + [True] * 6
    assert spade.fits(7, 5) and spade.fits(7, 6) and not spade.fits(7, 4) and not spade.fits(2, 0)


def test_discriminators_segmenter_and_failure_net_have_the_published_sizes():
    picture = jnp.zeros((1, 64, 64, 3))
    judges = params_of(spade.PatchDiscriminators(13), jnp.zeros((1, 64, 64), jnp.int32), picture, train=True)
    assert count(judges["scale_0"]) == 2_777_153 and count(judges) == 5_554_306
    for labels, head in ((150, 27_947_308), (13, 27_806_746)):
        parser = params_of(Segmenter(labels), picture, train=False)
        assert count(parser) == 23_631_808 + head
    assert count(params_of(FailureNet(), jnp.zeros((1, 64, 64, 19)), picture, picture, train=False)) == 22_502_698


def test_maps_have_the_published_sizes():
    made = jax.eval_shape(
        lambda: Segmenter(13).init_with_output(jax.random.key(0), jnp.zeros((1, 64, 128, 3)), train=False)[0]
    )
    assert made.features.shape == (1, 8, 16, 4096) and made.logits.shape == (1, 8, 16, 13)
    net = spade.PatchDiscriminators(13)
    labels, picture = jnp.zeros((1, 256, 256), jnp.int32), jnp.zeros((1, 256, 256, 3))
    ((fine, coarse),) = jax.eval_shape(lambda: net.init_with_output(jax.random.key(0), labels, picture, train=False)[0])
    assert [m.shape[1] for m in fine] == [129, 65, 33, 34, 35] and coarse[-1].shape == (1, 19, 19, 1)


# --- SPADE --------------------------------------------------------------------------------------------------------


def block_of(seed=0, **fields):
    net = spade.SpadeBlock(**{"features": 4, "num_labels": 3, "hidden": 5, "impl": "conv", **fields})
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(2, 8, 8, 6)), jnp.float32)
    return net, x, drawn(net, x, LABELS, train=True)


def test_without_modulation_spade_is_batch_normalisation():
    _, x, _ = block_of()
    net = spade.Modulation("conv")
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 5)), jnp.float32)
    nothing = {"params": {"kernel": jnp.zeros((3, 3, 5, 12)), "bias": jnp.zeros(12)}}
    normed, _ = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False).init_with_output(
        jax.random.key(0), x
    )
    np.testing.assert_array_equal(net.apply(nothing, normed, hidden), normed)
    bias = jnp.arange(12.0)  # gamma 0 to 5, beta 6 to 11
    got = net.apply({"params": {"kernel": jnp.zeros((3, 3, 5, 12)), "bias": bias}}, normed, hidden)
    np.testing.assert_allclose(got, normed * (1 + bias[:6]) + bias[6:], rtol=1e-5)


def test_constant_labels_make_a_picture_that_is_constant_away_from_the_border():
    net = spade.SpadeGenerator((64, 64), 3, 3, (6, 4), 1, 5, impl="conv")
    variables = drawn(net, jnp.zeros((1, 64, 64), jnp.int32), train=True)
    made = np.asarray(net.apply(variables, jnp.full((1, 64, 64), 2, jnp.int32), train=False))
    inside = made[0, 20:-20, 20:-20]
    np.testing.assert_allclose(inside, np.broadcast_to(inside[0, 0], inside.shape), atol=1e-5)
    assert np.abs(made[0, 0, 0] - inside[0, 0]).max() > 1e-4
    other = np.asarray(net.apply(variables, jnp.zeros((1, 64, 64), jnp.int32), train=False))
    assert np.abs(other - made).max() > 1e-3


def test_kernels_are_divided_by_their_largest_singular_value():
    net = spade.SpectralKernel(3, 5)
    variables = jax.jit(lambda key: init_flat(key, net, 4, train=True))(jax.random.key(0))
    matrix = np.asarray(variables["params"]["kernel"]).reshape(-1, 5)
    largest = np.linalg.svd(matrix, compute_uv=False)[0]
    step = jax.jit(lambda v: net.apply(v, 4, train=True, mutable=["spectral"]))
    for _ in range(60):
        kernel, updated = step(variables)
        variables = {**variables, **updated}
    np.testing.assert_allclose(kernel, variables["params"]["kernel"] / largest, rtol=1e-4)
    np.testing.assert_allclose(net.apply(variables, 4, train=False), kernel, rtol=1e-4)
    # The vectors are constants of the gradient: that of the value is their outer product.
    left, right = (variables["spectral"][name] for name in ("left", "right"))
    weights = variables["params"]["kernel"]

    def weighted(kernel):
        return jnp.sum(net.apply({**variables, "params": {"kernel": kernel}}, 4, train=False) * weights)

    slope = jax.grad(weighted)(weights)
    sigma = float(left @ jnp.asarray(matrix) @ right)
    outer = (left[:, None] * right).reshape(weights.shape)
    expected = weights / sigma - outer * jnp.sum(weights**2) / sigma**2
    np.testing.assert_allclose(slope, expected, rtol=1e-3, atol=1e-4)


# --- discriminators -----------------------------------------------------------------------------------------------


def test_discriminators_are_those_on_one_hot_maps_joined_to_pictures():
    """The first layer of both scales against one convolution of what is joined; labels may be smaller than pictures."""
    net = spade.PatchDiscriminators(3, (4, 5), 2, impl="conv")
    small = jnp.asarray(np.random.default_rng(3).integers(0, 3, (2, 5, 5)), jnp.int32)
    picture = jnp.asarray(np.random.default_rng(1).normal(size=(2, 10, 10, 2)), jnp.float32)
    variables = drawn(net, small, picture, train=True)
    (found,) = net.apply(variables, small, picture, train=False)
    joined = jnp.concatenate([jax.nn.one_hot(jnp.repeat(jnp.repeat(small, 2, 1), 2, 2), 3), picture], axis=-1)
    for scale in range(2):
        own = variables["params"][f"scale_{scale}"]
        kernel = jnp.concatenate([own["labels"], own["image"]], axis=2)
        numbers = ("NHWC", "HWIO", "NHWC")
        expected = jax.lax.conv_general_dilated(joined, kernel, (2, 2), ((2, 2), (2, 2)), dimension_numbers=numbers)
        np.testing.assert_allclose(found[scale][0], spade.leaky(expected + own["image_bias"]), atol=1e-5)
        joined = nn.avg_pool(joined, (3, 3), (2, 2), ((1, 1), (1, 1)), count_include_pad=False)


def test_one_pass_judges_several_pictures_as_several_passes_do():
    net = spade.PatchDiscriminators(3, (4, 5, 6), 1, impl="conv")
    pictures = [jnp.asarray(np.random.default_rng(i).normal(size=(2, 8, 8, 3)), jnp.float32) for i in range(2)]
    variables = drawn(net, LABELS, pictures[0], train=True)
    both = net.apply(variables, LABELS, *pictures, train=False)
    for own, picture in zip(both, pictures, strict=True):
        alone = net.apply(variables, LABELS, picture, train=False)[0]
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), own, alone)
    _, once = net.apply(variables, LABELS, pictures[0], train=True, mutable=["spectral"])
    _, twice = net.apply(variables, LABELS, *pictures, train=True, mutable=["spectral"])
    jax.tree.map(np.testing.assert_array_equal, once, twice)  # one power iteration for each step


def test_losses_by_hand():
    real, fake = ([[jnp.zeros((1, 1, 1, 1)), jnp.asarray(v).reshape(1, 2, 1, 1)]] for v in ((2.0, 0.0), (-2.0, 0.5)))
    np.testing.assert_allclose(spade.hinge_discriminator(real, fake), 0.5 + 0.75)
    np.testing.assert_allclose(spade.hinge_generator(fake), 0.75)
    np.testing.assert_allclose(spade.hinge_discriminator(real * 2, fake * 2), 1.25)  # a mean over scales
    maps = [[jnp.full((1, 2, 2, 1), 1.0), jnp.full((1, 1, 1, 1), 2.0), fake[0][-1]]]
    other = [[jnp.full((1, 2, 2, 1), 1.5), jnp.full((1, 1, 1, 1), 5.0), real[0][-1]]]
    np.testing.assert_allclose(spade.feature_matching(maps, other), 0.5 + 3.0)
    slope = jax.grad(lambda m: spade.feature_matching(m, other))(maps)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(slope))


# --- segmenter, comparison nets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dilation", [2, 3, 4])
def test_dilated_convolutions_are_xlas(dilation):
    numbers = np.random.default_rng(0)
    x, kernel = (jnp.asarray(numbers.normal(size=s), jnp.float32) for s in ((2, 9, 10, 3), (3, 3, 3, 4)))
    padding, layout = ((dilation, dilation),) * 2, ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, rhs_dilation=(dilation,) * 2, dimension_numbers=layout
    )
    np.testing.assert_allclose(dilated(x, kernel, dilation=dilation, impl="conv"), expected, atol=1e-5)


def test_pooling_is_torchs():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(2, 3, 9, 12)).astype("f")
    ours = jnp.asarray(x.transpose(0, 2, 3, 1))
    for cells in (1, 2, 3, 6):
        theirs = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x), cells).permute(0, 2, 3, 1)
        np.testing.assert_allclose(pool(ours, cells), theirs, atol=1e-5)
    theirs = torch.nn.functional.max_pool2d(torch.tensor(x), 3, 2, 1).permute(0, 2, 3, 1)
    np.testing.assert_array_equal(max_pool(ours), theirs)


def test_the_failure_net_shares_trunks_if_told():
    probabilities, picture = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1, 32, 32, 3))
    apart, shared = (params_of(FailureNet(4, s), probabilities, picture, picture, train=False) for s in (False, True))
    assert "Trunk_1" in apart and "Trunk_1" not in shared
    right, iou = jax.eval_shape(
        lambda: FailureNet(4).init_with_output(jax.random.key(0), probabilities, picture, picture, train=False)[0]
    )
    assert right.shape == (1, 32, 32) and iou.shape == (1, 4)


def test_the_discrepancy_net_sees_both_pictures_and_labels():
    net = DiscrepancyNet(3, (2, 3, 4, 5), (3, 4, 5, 5), impl="conv")
    numbers = np.random.default_rng(0)
    a, b = (jnp.asarray(numbers.normal(size=(2, 8, 8, 3)), jnp.float32) for _ in range(2))
    variables = drawn(net, LABELS, a, b)
    apply = jax.jit(lambda *given: net.apply(variables, *given))
    base = apply(LABELS, a, b)
    assert base.shape == (2, 8, 8, 2)
    for given in ((2 - LABELS, a, b), (LABELS, b, b), (LABELS, a, a)):
        assert float(jnp.abs(apply(*given) - base).max()) > 1e-3
    again = net.apply(variables, LABELS, a, b, None)
    np.testing.assert_allclose(again, base, atol=1e-5)
