"""GradCon: golden numbers of an independent implementation, every choice, what is averaged, which round is kept."""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


from jaxad.methods import gradcon

SMALL = {"geometry": "halving", "encoder": (8, 12), "decoder": (8,), "steps": 4, "batch_size": 8}


# --- golden numbers: an independent JAX and an independent torch program agree on them to 1e-12 -------------------

WIDTHS = ((1, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 32), (32, 32), (32, 1))
GOLDEN = {
    "error": [0.126690037, 0.125820178, 0.127350403, 0.126856700],
    "cosine": [
        [0.414326346, -0.212370159, 0.371931565, -0.103218411],
        [0.536288826, 0.710261677, 0.641995617, 0.356443442],
        [0.108412579, -0.058632779, 0.052845657, -0.195380795],
        [0.915880355, 0.979928831, 0.693747862, 0.965741126],
    ],
    "score": [0.067442794, 0.083244551, 0.074534782, 0.096149139],
    "reference norms": [0.016591694845, 0.672211703107, 0.004697901045, 0.003820768190],
    "batch norms": [0.009373437053, 0.394773176003, 0.004746846616, 0.004402736980],
    "batch cosines": [0.288956794732, 0.710857200052, -0.011022567710, 0.976552150029],
}


def golden_params():
    params = {}
    for number, (inputs, outputs) in enumerate(WIDTHS, 1):
        is_conv = number <= 4
        shape = (outputs, inputs, 4, 4) if is_conv else (inputs, outputs, 4, 4)
        size = 1.7 / math.sqrt((16 if is_conv else 4) * inputs)
        kernel = size * np.sin(12.9898 * np.arange(math.prod(shape)) + number).reshape(shape)
        kernel = kernel.transpose((2, 3, 1, 0) if is_conv else (2, 3, 0, 1))
        name = f"conv_{number - 1}" if is_conv else f"deconv_{number - 5}"
        params[name] = {"kernel": jnp.asarray(kernel), "bias": jnp.full(outputs, 0.01 * number)}
    return params


def golden_images(first):
    row, column = np.arange(28)[:, None], np.arange(28)[None]
    waves = [0.5 + 0.5 * np.sin(0.3 * row * (b + 1) + 0.2 * column + b) for b in range(first, first + 4)]
    return jnp.asarray(np.stack(waves))[..., None]


def golden_state(**fields):
    """Weights by formula; the reference is the gradient of the error of pictures 4 to 7."""
    cfg, params = gradcon.GradConConfig(**fields), golden_params()
    nothing = jax.tree.map(jnp.zeros_like, gradcon.tracked(cfg, params))
    reference = jax.jit(lambda p: gradcon.loss(p, nothing, True, cfg, golden_images(4), None)[1][0])(params)
    return gradcon.GradConState(cfg, params, None, reference, jnp.ones(()), None)


def norm(tree):
    return math.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(tree)))


PRECISIONS = {"float64": {"rtol": 1e-8, "atol": 1e-9}, "float32": {"rtol": 1e-4, "atol": 1e-4}}


@pytest.fixture(params=PRECISIONS)
def close(request):
    """Compares at a precision. The golden numbers have 9 to 12 digits."""
    with jax.enable_x64(request.param == "float64"):
        yield lambda found, wanted: np.testing.assert_allclose(found, wanted, **PRECISIONS[request.param])


@pytest.mark.parametrize("impls", [("gemm", "direct"), ("gemm", "ghost"), ("conv", "auto"), ("auto", "vmap")], ids=str)
def test_golden_scores(close, impls):
    state = golden_state(conv_impl=impls[0], cos_impl=impls[1])
    close([norm(state.reference_sum[f"deconv_{i}"]) for i in range(4)], GOLDEN["reference norms"])
    parts = jax.jit(gradcon.components)(state, golden_images(0))
    close(parts.error, GOLDEN["error"])
    close(parts.cosine.T, GOLDEN["cosine"])
    close(parts.error - 0.12 * parts.cosine.mean(axis=1), GOLDEN["score"])
    # scores are float32 whatever comes in
    np.testing.assert_allclose(jax.jit(gradcon.score)(state, golden_images(0)).image, GOLDEN["score"], rtol=1e-4)


@pytest.mark.parametrize("conv_impl", ["gemm", "conv"])
def test_golden_training_loss(close, conv_impl):
    state = golden_state(conv_impl=conv_impl)
    run = jax.jit(jax.value_and_grad(gradcon.loss, has_aux=True))
    (total, (gradients, metrics)), grads = run(
        state.params, state.reference_sum, jnp.bool_(False), state.cfg, golden_images(0), None
    )
    close(total, 0.1119392525499)
    close(metrics["reconstruction"], 0.12667932937819)
    close([norm(gradients[f"deconv_{i}"]) for i in range(4)], GOLDEN["batch norms"])
    alone = [
        gradcon.batch_cosine(state.cfg, {name: gradients[name]}, state.reference_sum) for name in sorted(gradients)
    ]
    close(alone, GOLDEN["batch cosines"])
    close(norm(grads), 0.9227345926808)
    close(norm({name: g for name, g in grads.items() if name.startswith("conv")}), 0.3892904425)
    close(norm({name: g for name, g in grads.items() if name.startswith("deconv")}), 0.8365955294)
    _, plain = run(state.params, state.reference_sum, jnp.bool_(True), state.cfg, golden_images(0), None)
    close(norm(plain), 0.4291371197)


def test_golden_forward(close):
    passed = gradcon.forward(gradcon.GradConConfig(), golden_params(), golden_images(0))
    close(passed.mean.sum(), 171.7834184920)
    assert float((passed.mean > 0).mean()) == 0.73828125
    close(jax.nn.sigmoid(passed.logits).sum(), 1631.0575990043)
