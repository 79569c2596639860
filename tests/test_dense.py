"""Dense evaluation of patch networks: three backends, one truth."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.nn import dense
from jaxad.nn.conv import lowering_for
from jaxad.nn.dense import Conv, Pool
from jaxad.nn.init import init_flat

leaky = functools.partial(nn.leaky_relu, negative_slope=0.1)
# name: (layers, patch)
NETWORKS = {
    "plain": ((Conv(5, 4, activation=leaky), Conv(4, 3, activation=leaky), Conv(3, 2)), 7),
    "pools": ((Conv(5, 3, activation=leaky), Pool(), Conv(4, 3, activation=leaky), Pool(), Conv(3, 2), Conv(2, 1)), 15),
    "deep": ((Conv(3, 2), Pool(), Conv(3, 2, activation=leaky), Pool(), Conv(3, 2), Pool(), Conv(4, 2)), 24),
    "strided": ((Conv(5, 3, stride=2, activation=leaky), Conv(4, 3, activation=leaky), Conv(3, 3)), 12),
    "wide pool": ((Conv(3, 2), Pool(3, 2), Conv(3, 3, activation=leaky)), 8),
    "quarters": ((Conv(5, 3, stride=2), Conv(4, 3, activation=leaky), Conv(3, 2, dilation=4, activation=jnp.tanh)), 16),
    "three": ((Conv(3, 2, stride=3), Conv(4, 2, activation=leaky), Pool(2, 3)), 9),
}


@functools.cache
def case(name, size=(27, 30), batch=2):
    """(network, its variables, pictures) of a size that no stride divides."""
    layers, patch = NETWORKS[name]
    network = dense.PatchNetwork(layers, patch)
    images = jax.random.normal(jax.random.key(1), (batch, *size, 3))
    return network, init_flat(jax.random.key(0), network, images), images


def by_hand(network, variables, image, row, column):
    """One patch, layer by layer in NumPy loops."""
    x = np.asarray(image, np.float64)[row : row + network.patch, column : column + network.patch]
    number = 0
    for layer in network.layers:
        reach = (layer.taps - 1) * layer.dilation
        side = (x.shape[0] - reach - 1) // layer.stride + 1
        is_conv = isinstance(layer, Conv)
        if is_conv:
            number += 1
            own = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"][f"conv{number}"])
        out = np.zeros((side, side, layer.features if is_conv else x.shape[-1]))
        for i in range(side):
            for j in range(side):
                top, left = i * layer.stride, j * layer.stride
                window = x[top : top + reach + 1 : layer.dilation, left : left + reach + 1 : layer.dilation]
                if is_conv:
                    out[i, j] = np.tensordot(window, own["kernel"], 3) + own["bias"]
                else:
                    out[i, j] = window.max(axis=(0, 1))
        x = np.asarray(layer.activation(out)) if is_conv else out
    assert x.shape[:2] == (1, 1)
    return x[0, 0]


CASES = [(name, 1) for name in NETWORKS if name != "three"]
CASES += [("pools", 2), ("pools", 3), ("pools", 4), ("deep", 8), ("quarters", 8), ("three", 3)]


@pytest.mark.parametrize(("name", "out_stride"), CASES)
def test_backends_agree(name, out_stride):
    """In pictures of odd sizes, two at a time: each other, loops by hand, and in gradients of weights and pictures."""
    network, variables, images = case(name)

    def run(variables, images, backend):
        def total(variables, images):
            out = network.apply(variables, images, out_stride=out_stride, backend=backend)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)), out

        (_, out), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(variables, images)
        return out, grads

    (truth, true_grads), *others = jax.jit(lambda v, x: [run(v, x, b) for b in ("patch", "phase", "dilated")])(
        variables, images
    )
    height, width = (n - network.patch + 1 for n in images.shape[1:3])
    assert truth.shape[:3] == (2, -(-height // out_stride), -(-width // out_stride))
    for row, column in ((0, 0), (truth.shape[1] - 1, truth.shape[2] - 1), (0, truth.shape[2] // 2)):
        expected = by_hand(network, variables, images[1], row * out_stride, column * out_stride)
        np.testing.assert_allclose(truth[1, row, column], expected, atol=2e-6)
    for out, grads in others:
        assert out.shape == truth.shape
        np.testing.assert_allclose(out, truth, atol=3e-6)
        for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=3e-5 * float(jnp.abs(expected).max()))


def test_every_target_gives_the_same_numbers():
    """Off the CPU nothing is padded; inside loops convolutions are matrix products."""
    network, variables, images = case("pools")

    def run(backend="auto", **target):
        def traced(variables, images):
            with lowering_for(**target):
                return network.apply(variables, images, backend=backend)

        return jax.jit(traced)(variables, images), str(jax.make_jaxpr(traced)(variables, images))

    expected, dilated = run(platform="cpu")
    assert "rhs_dilation=(2, 2)" in dilated and "padding=((0, 0), (0, 1))" in dilated
    for backend, target, has, lacks in (
        ("auto", {"platform": "gpu"}, "conv_general_dilated", "rhs_dilation=(2, 2)"),
        ("dilated", {"platform": "tpu"}, "rhs_dilation=(2, 2)", "padding=((0, 0), (0, 1))"),
        ("auto", {"platform": "cpu", "looped": True}, "dot_general", "conv_general_dilated"),
        ("auto", {"platform": "cpu", "members": True}, "dot_general", "conv_general_dilated"),
    ):
        found, program = run(backend, **target)
        assert has in program and lacks not in program
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_what_is_computed_shrinks_with_the_stride():
    """The plan strides where it can: counted in products, each layer at the coarsest grid that serves."""
    layers, patch = NETWORKS["pools"]
    assert [(s.dilation, s.stride) for s in dense.plan(layers)[1]] == [(1, 1), (1, 1), (2, 1), (2, 1), (4, 1), (1, 1)]
    by_four = [(s.dilation, s.stride) for s in dense.plan(layers, out_stride=4)[1]]
    assert by_four == [(1, 1), (1, 2), (1, 1), (1, 2), (1, 1), (1, 1)]
    # Quarters 8 pixels apart, patches too: the second layer is computed at quarters' corners only.
    layers, _ = NETWORKS["quarters"]
    assert [(s.dilation, s.stride) for s in dense.plan(layers, out_stride=8)[1]] == [(1, 2), (1, 4), (1, 1)]


@pytest.mark.parametrize(("name", "field"), [("pools", 14), ("strided", 11), ("quarters", 15)])
def test_field_is_what_is_read(name, field):
    """The last pixel of the field counts, the next one does not."""
    network, variables, _ = case(name)
    assert dense.field_of(network.layers) == field < network.patch
    image = jax.random.normal(jax.random.key(2), (1, network.patch, network.patch, 3))
    out = jax.jit(lambda x: network.apply(variables, x))
    for row in (field - 1, field):
        changed = bool(jnp.any(out(image.at[0, row].add(3.0)) != out(image)))
        assert changed == (row < field)


@pytest.mark.parametrize(
    ("layers", "patch", "size", "backend", "message"),
    [
        ((Conv(2, 3),), 3, 5, "fast", "backend='fast' is unknown; expected one of"),
        ((Conv(2, 3),), 3, 2, "auto", "pictures of 2x2, patches of 3x3"),
        ((Conv(2, 3),), 4, 5, "auto", "leaves 2 values a side of a patch of 4x4; expected 1. It sees 3x3"),
        ((Conv(2, 3), Conv(2, 3)), 4, 5, "auto", "leaves 0 values a side"),
    ],
)
def test_what_cannot_work_is_refused(layers, patch, size, backend, message):
    network = dense.PatchNetwork(layers, patch)
    with pytest.raises(ValueError, match=message):
        network.init(jax.random.key(0), jnp.zeros((1, size, size, 3)), backend=backend)
