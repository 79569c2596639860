"""GradCon: golden numbers of an independent implementation, every choice, what is averaged, which round is kept."""

import dataclasses
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from batches import batch_of
from conformance import Case, check_cuts, check_passes, check_structure, make_data

from jaxad import train
from jaxad.core import Spec
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


# --- small networks -----------------------------------------------------------------------------------------------


def images_of(count=6, *, side=8, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(size=(count, side, side, 3)), jnp.float32)


def config(**fields):
    return gradcon.GradConConfig(**{**SMALL, **fields})


def trained(steps=3, *, side=8, keep=False, **fields):
    """A state after a few steps; with `keep`, the total gradients of each step too."""
    state = train.init(gradcon.METHOD, jax.random.key(1), config(**fields), Spec((side, side, 3), {"train": 6}))
    step, recorded = jax.jit(gradcon.train_step), []
    for i in range(steps):
        batch = batch_of(images_of(side=side, seed=10 + i))
        if keep:
            arguments = state.params, state.reference_sum, state.reference_weight == 0, state.cfg, batch.image, None
            recorded.append(jax.jit(jax.grad(gradcon.loss, has_aux=True))(*arguments))
        state, _ = step(jax.random.key(i), state, batch)
    return (state, recorded) if keep else state


def parts_of(state, *, side=8, **fields):
    state = state._replace(cfg=dataclasses.replace(state.cfg, **fields))
    return jax.jit(gradcon.components, static_argnames="with_alignment")(state, images_of(side=side))


def same(found, wanted, rtol=1e-4):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "channels", "encoder", "decoder", "total"),
    [
        ("cae", 1, 115_392, 115_329, 230_721),
        ("cae", 3, 116_416, 116_355, 232_771),
        ("vae", 1, 115_392, 115_329, 1_227_777),
        ("vae", 3, 116_416, 116_355, 1_229_827),
    ],
)
def test_sizes_of_the_official_networks(model, channels, encoder, decoder, total):
    cfg, spec = gradcon.GradConConfig(model=model), Spec((28, 28, channels), {"train": 1})
    params = jax.eval_shape(lambda key: gradcon.init(key, cfg, spec), jax.random.key(0)).params

    def count(prefix):
        return sum(leaf.size for name, own in params.items() for leaf in own.values() if name.startswith(prefix))

    assert (count("conv_"), count("deconv_"), count("")) == (encoder, decoder, total)
    assert gradcon.sizes(28, *gradcon.layers_of(cfg, channels)) == [28, 15, 8, 5, 3, 4, 8, 14, 28]


def test_initial_weights_are_torchs():
    """U(+-1/sqrt(fan-in)), where a transposed convolution's fan-in counts its outputs."""
    params = train.init(
        gradcon.METHOD, jax.random.key(0), gradcon.GradConConfig(), Spec((28, 28, 3), {"train": 1})
    ).params
    for name, fan_in in (("conv_0", 16 * 3), ("conv_2", 16 * 32), ("deconv_1", 16 * 32), ("deconv_3", 16 * 3)):
        bound, kernel = 1 / math.sqrt(fan_in), params[name]["kernel"]
        assert (
            0.98 * bound < float(jnp.abs(kernel).max()) <= bound and float(jnp.abs(params[name]["bias"]).max()) <= bound
        )
        np.testing.assert_allclose(kernel.std(), bound / math.sqrt(3), rtol=0.05)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ref_grad", "decay"), [("total", 1.0), ("recon", 1.0), ("total", 0.5)])
def test_reference_is_the_average_of_recorded_gradients(ref_grad, decay):
    state, recorded = trained(keep=True, ref_grad=ref_grad, ref_decay=decay)
    wanted, weight = 0.0, 0.0
    for total, (recon, _) in recorded:
        gradient = total if ref_grad == "total" else recon
        wanted = decay * wanted + np.asarray(gradient["deconv_0"]["kernel"])
        weight = decay * weight + 1
    same(state.reference_sum["deconv_0"]["kernel"] / state.reference_weight, wanted / weight, rtol=1e-3)
    np.testing.assert_allclose(state.reference_weight, weight)
    scale = float(jnp.abs(recorded[-1][1][0]["deconv_0"]["kernel"]).max())
    differences = [float(jnp.abs(t[n]["kernel"] - r[0][n]["kernel"]).max()) for t, r in recorded for n in r[0]]
    assert max(differences[:2]) < 1e-6 * scale  # the first step has nothing to align with
    assert min(differences[2:]) > 1e-4 * scale


def test_pull_towards_the_reference_is_orthogonal():
    """<d cos / d G, G> = 0, and no scale of G matters: alignment turns gradients, it does not grow them."""
    rng = np.random.default_rng(0)
    gradient, reference = ({"a": {"kernel": jnp.asarray(rng.normal(size=(4, 4, 3, 2)))}} for _ in range(2))
    cfg = config()
    value, pull = jax.value_and_grad(gradcon.batch_cosine, argnums=1)(cfg, gradient, reference)
    inner = (pull["a"]["kernel"] * gradient["a"]["kernel"]).sum()
    assert abs(float(inner)) < 1e-6 and norm(pull) > 1e-3
    scaled = jax.tree.map(lambda leaf: 7 * leaf, gradient)
    np.testing.assert_allclose(gradcon.batch_cosine(cfg, scaled, reference), value, rtol=1e-5)


def test_alignment_is_learned():
    """With a large alpha the gradients' cosine with the reference ends higher than without."""

    def cosine(weight):
        cfg = config(gradient_weight=weight, learning_rate=3e-3)
        state = train.init(gradcon.METHOD, jax.random.key(1), cfg, Spec((8, 8, 3), {"train": 6}))
        step, found = jax.jit(gradcon.train_step), []
        for i in range(150):
            state, metrics = step(jax.random.key(i), state, batch_of(images_of(seed=i)))
            found.append(float(metrics["cosine"]))
        return np.mean(found[-10:])

    assert cosine(1.0) > cosine(0.0) + 0.15  # 0.3 to 0.5 above, by seed


def test_variational_network_draws_latents_in_training_only():
    state = train.init(gradcon.METHOD, jax.random.key(1), config(model="vae"), Spec((8, 8, 3), {"train": 6}))
    step, batch = jax.jit(gradcon.train_step), batch_of(images_of())
    first, again, other = (step(jax.random.key(i), state, batch)[1] for i in (0, 0, 1))
    assert first["loss"] == again["loss"] != other["loss"]
    mean = gradcon.forward(state.cfg, state.params, batch.image).mean
    variance = jnp.exp(gradcon.forward(state.cfg, state.params, batch.image).log_variance)
    divergence = 0.5 * (mean**2 + variance - 1 - jnp.log(variance)).sum(axis=1).mean()
    same(first["latent"], divergence / (8 * 8 * 3))
    weighted = state._replace(cfg=dataclasses.replace(state.cfg, latent_weight=3.0))
    same(step(jax.random.key(0), weighted, batch)[1]["latent"], 3 * first["latent"])


def test_cross_entropy():
    logits, x = jnp.asarray([[[[0.3], [-2.0]]]]), jnp.asarray([[[[0.2], [0.9]]]])
    p = jax.nn.sigmoid(logits)
    wanted = -(x * jnp.log(p) + (1 - x) * jnp.log(1 - p))[..., 0]
    same(gradcon.errors(config(recon="bce"), logits, x), wanted)
    same(gradcon.errors(config(), logits, x), ((p - x) ** 2)[..., 0])


# --- which round is kept ------------------------------------------------------------------------------------------


def rounds(values, select):
    """The round whose state a run with these validation losses ends with."""
    state = trained(0, select=select, validations=len(values))
    cfg = dataclasses.replace(state.cfg, steps=len(values))
    phases = [phase for phase in gradcon.phases(cfg) if phase.source == "holdout"]
    for number, (value, phase) in enumerate(zip(values, phases, strict=True)):
        marked = jax.tree.map(lambda leaf, n=number: jnp.full_like(leaf, n), state.params)
        choice = state.choice._replace(error_sum=jnp.float32(10 * value), rows=jnp.float32(10))
        state = phase.finish(jax.random.key(0), state._replace(params=marked, choice=choice))
    return int(state.params["conv_0"]["bias"][0])


def test_the_best_round_is_kept():
    losses = [5, 4, 1, 3, 3, 2, 2, 2, 2, 2]
    assert rounds(losses, "val") == 2
    assert rounds(losses, "val_every5") == 0  # round 6 is not the best so far, though better than round 1
    assert rounds([5, 4, 3, 3, 3, 1, 2], "val_every5") == 5
    assert rounds([5, 4, 3, 3, 3, 4, 2], "val_every5") == 6  # the last round is always written


def test_validation_is_a_pass_like_any_other():
    data = make_data((8, 8, 3))
    case = Case(gradcon.METHOD, config(select="val", validations=2, batch_size=4), data)
    assert [phase.name for phase in gradcon.phases(case.cfg)] == ["train_1", "validate_1", "train_2", "validate_2"]
    check_structure(case)
    check_passes(case)
    check_cuts(case)


# --- scores -------------------------------------------------------------------------------------------------------

VARIANTS = {
    "decoder": {},
    "all layers": {"grad_layers": "all"},
    "biases": {"use_bias": True},
    "variational": {"model": "vae", "grad_layers": "all"},
    "cross-entropy": {"recon": "bce"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_per_sample_cosines_are_those_of_each_gradient(name):
    state = trained(**VARIANTS[name])
    wanted = parts_of(state, cos_impl="vmap")
    counts = {"all layers": 4, "variational": 6}
    assert wanted.cosine.shape == (6, counts.get(name, 2))
    for cos_impl in ("direct", "ghost", "auto"):
        found = parts_of(state, cos_impl=cos_impl)
        same(found.cosine, wanted.cosine)
        same(found.error, wanted.error)
    plain = parts_of(trained(), cos_impl="direct").cosine
    assert name == "decoder" or not np.allclose(wanted.cosine[:, -2:], plain, rtol=1e-3)


def test_cosine_is_a_directional_derivative():
    """<g_i, reference>, by central differences of the error along the reference, layer by layer."""
    state, x = jax.device_get((trained(), images_of()))  # drawn and trained in float32
    with jax.enable_x64():
        state, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (state, x))
        passed, _, deltas = gradcon.backpropagate(state, x)
        layer = gradcon.tracked_layers(state.cfg, 3)[0]
        entering, delta, reference = passed.inputs[layer.name], deltas[layer.name], state.reference_sum[layer.name]
        dot, _, _ = gradcon.layer_moments(state.cfg, layer, entering, delta, reference)

        def error(amount):
            moved = {layer.name: {"kernel": state.params[layer.name]["kernel"] + amount * reference["kernel"]}}
            logits = gradcon.forward(state.cfg, gradcon.merge(state.params, moved), x).logits
            return gradcon.errors(state.cfg, logits, x).mean(axis=(1, 2))

        np.testing.assert_allclose(dot, (error(1e-3) - error(-1e-3)) / 2e-3, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_alignment_map_sums_to_the_cosine(name):
    state = trained(**{"side": 16, **VARIANTS[name]})
    parts = parts_of(state, side=16, cos_impl="direct")
    whole = jax.jit(lambda s: gradcon.components(s, images_of(side=16), with_alignment=True))(state)
    spatial = [i for i, layer in enumerate(gradcon.tracked_layers(state.cfg, 3)) if layer.kind != "dense"]
    same(whole.alignment_map.mean(axis=(1, 2)), parts.cosine[:, jnp.asarray(spatial)].mean(axis=1))
    same(whole.error_map.mean(axis=(1, 2)), parts.error)
    assert float(whole.alignment_map.std()) > 1e-4


def test_alignment_map_of_the_paper_network_keeps_its_sum():
    state = golden_state()
    parts = gradcon.components(state, golden_images(0), with_alignment=True)
    same(parts.alignment_map.mean(axis=(1, 2)), parts.cosine.mean(axis=1), rtol=1e-3)


def score(state, images, **fields):
    return jax.jit(gradcon.score)(
        state._replace(cfg=dataclasses.replace(state.cfg, smooth_sigma=0.0, **fields)), images
    )


def test_maps():
    """Unsmoothed, the mean of the map "both" is the image score; the other maps are its two parts."""
    state, images = trained(), images_of()
    parts = parts_of(state)
    both, error, gradient = (score(state, images, map=name) for name in ("both", "error", "gradient"))
    same(both.map.mean(axis=(1, 2)), both.image)
    same(error.map, parts.error_map)
    same(both.map, error.map + 0.12 * gradient.map)
    same(both.image, parts.error - 0.12 * parts.cosine.mean(axis=1))
    same(score(state, images, score_error_weight=0.0).image, -0.12 * parts.cosine.mean(axis=1))


def test_tiles_are_samples_of_their_own():
    state = trained(side=16, tile=8)
    images = images_of(3, side=16)
    tiles = [images[:, y : y + 8, x : x + 8] for y in (0, 8) for x in (0, 8)]
    alone = [score(state, tile, tile=0, map="both") for tile in tiles]
    whole = score(state, images, map="both")
    same(whole.image, np.max([s.image for s in alone], axis=0))
    same(score(state, images, tile_score="mean").image, np.mean([s.image for s in alone], axis=0))
    same(whole.map[:, 8:, :8], alone[2].map)
    same(whole.map[:, :8, 8:], alone[1].map)


def test_batches_are_scored_in_chunks_of_bounded_memory():
    """The same scores, and temporary memory that stays what it is for one chunk."""
    cfg = gradcon.GradConConfig(memory_mb=12)
    state = train.init(gradcon.METHOD, jax.random.key(0), cfg, Spec((28, 28, 3), {"train": 1}))
    chunk = gradcon.chunk_size(cfg, (28, 28, 3))
    assert 4 <= chunk <= 16

    def memory(count, budget):
        own = state._replace(cfg=dataclasses.replace(cfg, memory_mb=budget))
        compiled = jax.jit(gradcon.score).lower(own, jnp.zeros((count, 28, 28, 3))).compile()
        return compiled.memory_analysis().temp_size_in_bytes, compiled

    small, large = memory(4 * chunk, 12), memory(16 * chunk, 12)
    pictures = 12 * chunk * 28 * 28 * 3 * 4
    assert large[0] - small[0] < 2.5 * pictures  # what grows is the pictures and maps themselves
    assert small[0] < 1.3 * 12 * 2**20 + 2.5 * pictures
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(4 * chunk, 28, 28, 3)), jnp.float32)
    own = state._replace(reference_sum=jax.tree.map(lambda p: jnp.cos(100 * p), state.reference_sum))
    whole = memory(4 * chunk, 512)
    assert whole[0] > 2 * small[0]
    big = own._replace(cfg=dataclasses.replace(cfg, memory_mb=512))
    same(small[1](own, images).image, whole[1](big, images).image)
    odd = jax.jit(gradcon.score)(own, images[: 2 * chunk + 1])
    same(odd.image, whole[1](big, images).image[: 2 * chunk + 1])


def test_short_gradients_follow_the_torch_in_question():
    state = trained()
    tiny = state._replace(reference_sum=jax.tree.map(lambda leaf: 1e-7 * leaf, state.reference_sum))
    kept, shrunk = (parts_of(tiny, cos_eps_mode=mode).cosine for mode in ("norm", "product"))
    assert float(jnp.abs(shrunk).max()) < 0.9 * float(jnp.abs(kept).max())


def test_costs_in_operations():
    """By XLA's count, in convolutions: a training step is at most 2.1 plain ones, scoring 2.5 forward passes."""
    cfg = gradcon.GradConConfig(conv_impl="conv", cos_impl="direct")
    state = train.init(gradcon.METHOD, jax.random.key(0), cfg, Spec((28, 28, 3), {"train": 1}))
    x = jnp.zeros((16, 28, 28, 3))

    def error(params):
        return gradcon.errors(cfg, gradcon.forward(cfg, params, x).logits, x).mean()

    def count(function, *arguments):
        return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]

    plain, forward = count(jax.grad(error), state.params), count(error, state.params)
    arguments = state.params, state.reference_sum, jnp.bool_(False), cfg, x, None
    ours = count(jax.grad(gradcon.loss, has_aux=True), *arguments)
    assert 1.5 * plain < ours < 2.1 * plain
    assert count(gradcon.score, state, x) < 2.5 * forward


# --- learning -----------------------------------------------------------------------------------------------------


def test_learns_what_is_normal():
    """Preset "tiny" on the default synthetic family: better than chance by a margin, and than before training."""
    from jaxad import settings
    from jaxad.runs import train_run

    report = train_run(settings.Settings("gradcon", preset="tiny"), untrained=True)[1]
    assert report["image_auroc"] >= 0.60 and report["image_auroc"] > report["untrained_image_auroc"]


# --- mistakes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({"model": "gan"}, (8, 8, 3), "model='gan' is unknown; expected one of .*--set model=cae"),
        ({"select": "best"}, (8, 8, 3), "select='best' is unknown"),
        ({"decoder": (8, 4)}, (8, 8, 3), "decoder=.* has 2 layers; expected 1"),
        ({"geometry": "paper"}, (28, 28, 3), "2 layers; expected 4 with geometry='paper'"),
        ({}, (10, 8, 3), "sides of 10 .* multiples of 4.*--image-size"),
        ({"geometry": "paper", "encoder": (4,) * 4, "decoder": (4,) * 3}, (256, 256, 3), "16 j - 4.*--image-size 252"),
        ({"tile": 3}, (8, 8, 3), "tile=3 does not divide"),
        ({"tile": 2}, (8, 8, 3), "sides of 2 "),
        ({}, (4, 8, 8, 3), "not clips"),
        ({"cos_impl": "vmap", "map": "both"}, (8, 8, 3), "no alignment map"),
        ({"ref_decay": 0.0}, (8, 8, 3), "0 < ref_decay <= 1"),
        ({"select": "val", "validations": 9}, (8, 8, 3), "no more validations than steps"),
        ({"memory_mb": 0}, (8, 8, 3), "memory_mb=0"),
    ],
    ids=str,
)
def test_mistakes_are_named(fields, shape, message):
    with pytest.raises(ValueError, match=f"gradcon: .*{message}"):
        gradcon.check(config(**fields), Spec(shape, {"train": 1}))


@pytest.mark.parametrize("name", gradcon.PRESETS)
def test_presets_fit_their_pictures(name):
    preset = gradcon.PRESETS[name]
    size, channels = preset.data["image_size"], preset.data["channels"]
    gradcon.check(gradcon.GradConConfig(**preset.config), Spec((size, size, channels), {"train": 1}))
