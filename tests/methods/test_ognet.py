"""What makes OGNet OGNet: its networks, both phases' losses and gradients, what phase two leaves alone, its scores."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import metrics, score, train
from jaxad.core import Batch, Source, Spec, as_arrays
from jaxad.methods import ognet, ognet_stability
from jaxad.nn.adversarial import Discriminator, Generator, Layer, Norm
from jaxad.nn.conv import lowering_for

SMALL = {"widths": (3, 4), "taps": 3, "steps": 6, "batch_size": 4, "refine_block": 3, "conv_impl": "conv"}
SHAPE = (9, 9, 2)  # 9 - 7 - 5 inside the autoencoder, 9 - 5 - 3 inside the discriminator
IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(12, *SHAPE)), jnp.float32)


def config(**fields):
    return ognet.OGNetConfig(**{**SMALL, **fields})


@functools.cache
def fresh(shape=SHAPE, **fields):
    """A detector whose statistics and old autoencoder are no longer those of the start."""
    cfg = config(**fields)
    state = jax.jit(lambda key: ognet.init(key, as_arrays(cfg), Spec(shape, {})))(jax.random.key(1))
    other = jax.jit(lambda key: ognet.init(key, as_arrays(cfg), Spec(shape, {})))(jax.random.key(2))
    numbers = np.random.default_rng(3)

    def moved(network):
        stats = jax.tree.map(lambda s: s * 0.8 + numbers.uniform(0.05, 0.2, s.shape).astype("f"), network.batch_stats)
        return network._replace(batch_stats=stats)

    return state._replace(
        generator=moved(state.generator), old=moved(other.generator), discriminator=moved(state.discriminator)
    )


def with_fields(state, **fields):
    return state._replace(cfg=as_arrays(dataclasses.replace(state.cfg, **fields)))


def batch_of(images):
    size = images.shape[0]
    mask, rows = jnp.zeros(images.shape[:3]), jnp.arange(size, dtype=jnp.int32)
    return Batch(images, jnp.zeros(size, jnp.int32), mask, rows, jnp.ones(size, bool))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def assert_same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def assert_close(tree, other, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or {"rtol": 1e-5, "atol": 1e-6})), tree, other
    )


# --- networks -------------------------------------------------------------------------------------------------------


def test_networks_have_the_published_sizes():
    cfg = ognet.OGNetConfig(**ognet.PRESETS["mnist"].config)
    state = jax.eval_shape(lambda: ognet.init(jax.random.key(0), cfg, Spec((45, 45, 1), {})))
    assert count(state.generator.params) == count(state.old.params) == 8_609_025
    assert count(state.discriminator.params) == 4_308_865
    assert (count(state.generator.batch_stats), count(state.discriminator.batch_stats)) == (2_816, 896)
    assert state.discriminator.params["kernel"].shape == (512 * 3 * 3, 1)
    generator = Generator(cfg.widths)
    taps = jax.eval_shape(
        lambda network: generator.apply(
            network._asdict(),
            jnp.zeros((1, 45, 45, 1)),
            train=False,
            capture_intermediates=lambda module, _: isinstance(module, Layer),
            mutable="intermediates",
        ),
        state.generator,
    )
    outputs = {name: leaf["__call__"][0].shape[1:] for name, leaf in taps[1]["intermediates"].items()}
    assert outputs == {
        "down_0": (41, 41, 64),
        "down_1": (37, 37, 128),
        "down_2": (33, 33, 256),
        "down_3": (29, 29, 512),
        "up_0": (33, 33, 256),
        "up_1": (37, 37, 128),
        "up_2": (41, 41, 64),
        "last": (45, 45, 1),
    }


def test_drawn_as_torch_draws():
    state = fresh()
    for network, name, fan in (
        ("generator", "down_1", 9 * 3),
        ("generator", "up_0", 9 * 3),
        ("generator", "last", 9 * 2),
    ):
        kernel = getattr(state, network).params[name]["kernel"]
        bound = 1 / math.sqrt(fan)  # of a transposed convolution torch counts the outputs
        assert 0.9 * bound < float(abs(kernel).max()) <= bound, name


def normalised(x, mean, variance):
    return (x - mean) / np.sqrt(variance + 1e-5)


def test_the_first_half_is_normalised_before_its_relu_and_the_second_half_after_it():
    state = fresh()
    _, seen = Generator(state.cfg.widths, 3, impl="conv").apply(
        state.generator._asdict(), IMAGES[:2] * 2 - 1, train=False, capture_intermediates=True, mutable="intermediates"
    )
    outputs = {name: np.asarray(leaf["__call__"][0]) for name, leaf in seen["intermediates"].items() if "down" in name}
    stats = state.generator.batch_stats
    for i in range(2):
        before, after, own = outputs[f"down_{i}"], outputs[f"down_norm_{i}"], stats[f"down_norm_{i}"]
        rectified = before if i < 1 else np.maximum(before, 0)
        expected = normalised(rectified, own["mean"], own["var"])  # scale and bias are still 1 and 0
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    assert (outputs["down_norm_0"] < 0).any() and (outputs["down_norm_1"] < 0).any()


def test_a_transposed_convolution_adds_up_turned_kernels():
    """torch's ConvTranspose of 5 taps, stride 1 and no padding: y[i + r, j + s] += x[i, j] @ w[r, s], w ours turned."""
    numbers = np.random.default_rng(0)
    x, kernel = numbers.normal(size=(1, 3, 4, 2)), numbers.normal(size=(5, 5, 2, 3))
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(3)}
    found = Layer(3, 5, is_transposed=True, impl="conv").apply({"params": params}, jnp.asarray(x, jnp.float32))
    expected = np.zeros((1, 7, 8, 3))
    for i in range(3):
        for j in range(4):
            expected[0, i : i + 5, j : j + 5] += np.einsum("c,rsco->rso", x[0, i, j], kernel[::-1, ::-1])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_picture_as_a_whole_equals_its_patches_in_their_middle_only():
    generator = Generator((2, 2, 2, 2), impl="conv")
    picture = jnp.asarray(np.random.default_rng(0).normal(size=(1, 58, 60, 1)), jnp.float32)
    variables = generator.init(jax.random.key(0), picture, train=True)
    whole = generator.apply(variables, picture, train=False)[:, 6:51, 9:54]
    patch = generator.apply(variables, picture[:, 6:51, 9:54], train=False)
    is_same = np.isclose(whole, patch, rtol=1e-4, atol=1e-6)[0, :, :, 0]
    assert is_same[16:29, 16:29].all()
    assert not is_same[15].all() and not is_same[29].all() and not is_same[:, 15].all() and not is_same[:, 29].all()


def test_statistics_of_groups_by_hand():
    """One channel, two groups of two pictures of one pixel: (1, 3) and (10, 20)."""
    x = jnp.asarray([1.0, 10.0, 3.0, 20.0]).reshape(4, 1, 1, 1)
    variables = {"params": {"scale": jnp.full(1, 2.0), "bias": jnp.full(1, 5.0)}}
    variables["batch_stats"] = {"mean": jnp.zeros(1), "var": jnp.ones(1)}
    y, updated = Norm(2).apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y.ravel(), [3, 3, 7, 7], atol=1e-4)  # each group: -1 and 1, times 2, plus 5
    # 0.9 (0.9 * 0 + 0.1 * 2) + 0.1 * 15; unbiased variances 2 and 50: 0.9 (0.9 + 0.2) + 5
    assert float(updated["batch_stats"]["mean"][0]) == pytest.approx(1.68)
    assert float(updated["batch_stats"]["var"][0]) == pytest.approx(5.99)


def test_groups_are_calls_one_after_the_other():
    state = fresh()
    judge, params = Discriminator(state.cfg.widths, 3, impl="conv"), state.discriminator.params
    groups = IMAGES.reshape(4, 3, *SHAPE) * 2 - 1

    @jax.jit
    def call(stats, pictures):
        variables = {"params": params, "batch_stats": stats}
        return judge.apply(variables, pictures, train=True, mutable=["batch_stats"])

    together, updated = call(state.discriminator.batch_stats, groups)
    stats = state.discriminator.batch_stats
    for group in range(3):
        alone, seen = call(stats, groups[:, group : group + 1])
        stats = seen["batch_stats"]
        np.testing.assert_allclose(together[:, group], alone[:, 0], rtol=1e-4, atol=1e-5)
    assert_close(updated["batch_stats"], stats)
    mixed, _ = call(state.discriminator.batch_stats, groups.reshape(12, 1, *SHAPE))
    assert not np.allclose(mixed.reshape(4, 3), together, atol=1e-3)


# --- phase one ------------------------------------------------------------------------------------------------------


def logit(p):
    return jnp.full(5, math.log(p / (1 - p)))


def test_losses_by_hand():
    cfg = config()
    told = ognet.discriminator_loss(jnp.stack([logit(0.6), logit(0.3)], axis=1))
    assert float(told) == pytest.approx(0.433750, abs=1e-6)
    rebuilt, x = jnp.full((5, 2, 2, 1), 0.5), jnp.full((5, 2, 2, 1), 0.3)  # squared error 0.04
    total = ognet.generator_loss(rebuilt, logit(0.6)[:, None], x, weight=0.5)
    assert float(total) == pytest.approx(0.478145, abs=1e-6)
    shown = ognet.Judged(high=logit(0.2), real=logit(0.1), low=logit(0.7), pseudo=logit(0.6))
    total, parts = ognet.refine_loss(shown, cfg)
    assert float(parts["good"]) == pytest.approx(0.211365, abs=1e-6)
    assert float(parts["bad"]) == pytest.approx(0.510671, abs=1e-6)
    assert float(total) == pytest.approx(0.722037, abs=2e-6)


def test_noise_has_its_deviation_and_is_cut():
    uniform = ognet.uniform_rows(jax.random.key(0), 20, 1000)
    assert float(uniform.min()) > 0 and float(uniform.max()) < 1
    x = jnp.zeros((20, 10, 100, 1))
    noise = ognet.add_noise(x, uniform, std=0.1)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.02) and abs(float(noise.mean())) < 0.002
    strong = ognet.add_noise(x, uniform, std=0.81)
    assert float(abs(strong).max()) == 1
    # P(|n| > 1) = 2 (1 - Phi(1 / 0.81)) = 0.2170
    assert float((abs(strong) == 1).mean()) == pytest.approx(0.217, abs=0.01)


adversarial_step, refine_step = jax.jit(ognet.adversarial_step), jax.jit(ognet.refine_step)


def gradient_of(state):
    """The autoencoder's gradient at Adam's first step: its first moment is a tenth of it."""
    return jax.tree.map(lambda m: m / 0.1, state.optimizer.generator.mu)


@functools.partial(jax.jit, static_argnames="part")
def own_gradient(state, judged, x, part):
    """Of the squared error, or of the cross-entropy of a discriminator that has its own statistics of every call."""

    def loss(params):
        rebuilt, _ = ognet._learn(ognet.generator_of(state.cfg), params, state.generator.batch_stats, x)
        if part == "error":
            return jnp.mean((rebuilt - x) ** 2)
        logits, _ = ognet._learn(ognet.discriminator_of(state.cfg), judged.params, judged.batch_stats, rebuilt[:, None])
        return jnp.mean(jax.nn.softplus(logits))

    return jax.grad(loss)(state.generator.params)


@pytest.mark.parametrize("kind", ["pre", "post"])
def test_the_autoencoders_gradient_has_two_parts_and_weights_of_one_discriminator(kind):
    state = with_fields(fresh(generator_gradient=kind), noise_std=0.0)
    x = IMAGES[:8] * 2 - 1
    close = {"rtol": 2e-3, "atol": 2e-6}
    plain, _ = adversarial_step(jax.random.key(0), with_fields(state, adversarial_weight=0.0), batch_of(IMAGES[:8]))
    assert_close(gradient_of(plain), own_gradient(state, state.discriminator, x, "error"), **close)
    # A rate at which weights before and after the discriminator's step differ much.
    fooling = with_fields(state, adversarial_weight=1.0, discriminator_rate=0.05)
    after, _ = adversarial_step(jax.random.key(0), fooling, batch_of(IMAGES[:8]))
    expected = {
        "pre": own_gradient(state, state.discriminator, x, "fooling"),
        "post": own_gradient(state, after.discriminator, x, "fooling"),
    }
    assert_close(gradient_of(after), expected.pop(kind), **close)
    (other,) = expected.values()
    slopes = [float(abs(tree["last"]["kernel"]).max()) for tree in (other, gradient_of(after))]
    assert not np.allclose(
        other["last"]["kernel"], gradient_of(after)["last"]["kernel"], rtol=0.05, atol=0.01 * slopes[0]
    )


def test_the_discriminator_learns_from_its_own_loss_alone():
    state = with_fields(fresh(), noise_std=0.0)
    after, metrics = adversarial_step(jax.random.key(0), state, batch_of(IMAGES[:8]))
    x = IMAGES[:8] * 2 - 1
    rebuilt, stats = ognet._learn(ognet.generator_of(state.cfg), state.generator.params, state.generator.batch_stats, x)
    assert_close(after.generator.batch_stats, stats, rtol=1e-4, atol=1e-5)

    def loss(params):
        shown = jnp.stack([rebuilt, x], axis=1)
        logits, _ = ognet._learn(ognet.discriminator_of(state.cfg), params, state.discriminator.batch_stats, shown)
        return 0.5 * (jax.nn.softplus(-logits[:, 0]).mean() + jax.nn.softplus(logits[:, 1]).mean())

    told, grads = jax.jit(jax.value_and_grad(loss))(state.discriminator.params)
    np.testing.assert_allclose(metrics["discriminator"], told, rtol=1e-5)
    mine = jax.tree.map(lambda m: m / 0.1, after.optimizer.discriminator.mu)
    assert_close(mine, grads, rtol=2e-3, atol=2e-6)
    moved = state.discriminator.params["kernel"] - after.discriminator.params["kernel"]
    clear = abs(grads["kernel"]) > 1e-4
    np.testing.assert_allclose(moved[clear], 1e-4 * jnp.sign(grads["kernel"])[clear], rtol=1e-2)
    assert_same(state.old, after.old)


def test_training_sees_patches_of_the_picture():
    place = jnp.arange(20 * 30, dtype=jnp.float32).reshape(1, 20, 30, 1) / 1000
    images, cfg = jnp.broadcast_to(place, (400, 20, 30, 1)), config(patch=16)
    seen = (ognet.views(cfg, images, ognet.uniform_rows(jax.random.key(0), 400, 2)) + 1) / 2 * 1000
    first = np.rint(np.asarray(seen[:, 0, 0, 0])).astype(int)
    rows, columns = first // 30, first % 30
    assert set(rows) == set(range(5)) and set(columns) == set(range(15))
    for patch, row, column in zip(seen[:5], rows, columns, strict=False):
        np.testing.assert_allclose(patch[..., 0], place[0, row : row + 16, column : column + 16, 0] * 1000, atol=0.01)
    np.testing.assert_array_equal(ognet.views(config(), IMAGES, None), IMAGES * 2 - 1)


def test_phases_are_as_long_as_the_authors_and_keep_the_old_autoencoder():
    phases = ognet.phases(ognet.OGNetConfig(**ognet.PRESETS["mnist"].config))
    assert [(p.name, p.steps, p.batch_size) for p in phases] == [
        ("warmup", 92, 64),  # an epoch of 5,923 zeros
        ("adversarial", 184, 64),
        ("refine", 3, 25 * 64),
    ]
    cfg = config(steps=6, refine_steps=6, refine_block=3)
    data = {"train": Source(image=jnp.uint8(IMAGES * 255), label=jnp.zeros(12, jnp.int32))}
    states = {}
    for progress in train.drive(ognet.METHOD, jax.random.key(0), cfg, data, mode="loop"):
        states[progress.name] = jax.device_get(progress.state)
    assert_same(states["warmup"].old, states["warmup"].generator)
    assert_same(states["refine"].old, states["warmup"].generator)
    assert_same(states["refine"].generator, states["adversarial"].generator)
    assert differs(states["refine"].old.params, states["refine"].generator.params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(states["adversarial"].optimizer.discriminator))
    assert int(states["refine"].optimizer.discriminator.count) == 6


def differs(tree, other):
    return any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (tree, other)), strict=True))


# --- phase two ------------------------------------------------------------------------------------------------------


def test_phase_two_leaves_both_autoencoders_alone():
    state = fresh()
    after, metrics = refine_step(jax.random.key(0), state, batch_of(IMAGES))
    assert_same(state.generator, after.generator)
    assert_same(state.old, after.old)
    assert_same(state.optimizer.generator, after.optimizer.generator)
    assert differs(state.discriminator.params, after.discriminator.params)
    assert differs(state.discriminator.batch_stats, after.discriminator.batch_stats)
    assert int(after.optimizer.discriminator.count) == 3 and np.isfinite(metrics["loss"])


def test_what_is_shown_is_made_of_trained_autoencoders_without_noise():
    state = fresh()
    shown = jax.jit(ognet.examples)(jax.random.key(0), state, IMAGES)
    x = IMAGES * 2 - 1
    run = jax.jit(
        lambda network, x: Generator(state.cfg.widths, 3, impl="conv").apply(network._asdict(), x, train=False)
    )
    high, low = np.asarray(run(state.generator, x)), np.asarray(run(state.old, x))
    for t in range(3):  # of three updates of four pictures
        mine, following, after = (np.arange(12) % 3 == (t + more) % 3 for more in range(3))
        pseudo = run(state.generator, jnp.asarray((low[following] + low[after]) / 2))
        for found, expected in zip(shown, (high[mine], x[mine], low[mine], pseudo), strict=True):
            np.testing.assert_allclose(found[:, t], expected, rtol=1e-4, atol=1e-5)


def test_a_block_is_updates_one_after_the_other():
    state = fresh()
    after, _ = refine_step(jax.random.key(0), state, batch_of(IMAGES))
    shown = jax.jit(ognet.examples)(jax.random.key(0), state, IMAGES)
    network, optimizer = state.discriminator, state.optimizer.discriminator

    @jax.jit
    def update(network, optimizer, pictures):
        def loss(params):
            stats, logits = network.batch_stats, []
            for kind in pictures:  # four calls
                found, stats = ognet._learn(ognet.discriminator_of(state.cfg), params, stats, kind[:, None])
                logits.append(found[:, 0])
            return ognet.refine_loss(ognet.Judged(*logits), state.cfg)[0], stats

        grads, stats = jax.grad(loss, has_aux=True)(network.params)
        return ognet._adam(network, stats, grads, optimizer, state.cfg.refine_rate)

    for t in range(3):
        network, optimizer = update(network, optimizer, [kind[:, t] for kind in shown])
    assert_close(after.discriminator.batch_stats, network.batch_stats, rtol=1e-4, atol=1e-5)
    assert_close(after.optimizer.discriminator.mu, optimizer.mu, rtol=5e-3, atol=2e-5)


def test_blends():
    low = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1)), jnp.float32)
    still = jnp.zeros((2, 3, 5))
    batches = ognet.blend(config(), low, still)
    np.testing.assert_allclose(batches[:, 0], (low[:, 1] + low[:, 2]) / 2)
    np.testing.assert_allclose(batches[:, 2], (low[:, 0] + low[:, 1]) / 2)
    rolled = ognet.blend(config(pseudo_pairs="roll"), low, still)
    np.testing.assert_allclose(rolled[0], (low[0] + low[1]) / 2)
    np.testing.assert_allclose(rolled[0], rolled[1])  # of a pair, in either order
    same = jnp.broadcast_to(low[:1, :1], low.shape)
    np.testing.assert_allclose(ognet.blend(config(), same, still), same, rtol=1e-6)
    moved = ognet.blend(config(pseudo_blend="moved"), jnp.zeros((2, 3, 8, 8, 1)).at[:, 2, 3, 2].set(2.0), still + 0.4)
    # Mirrored both ways, then turned; the middle third of numbers shifts by nothing.
    assert float(moved[0, 0, 5, 4, 0]) == 1.0


def test_pictures_are_moved():
    picture = jnp.arange(16 * 8, dtype=jnp.float32).reshape(1, 16, 8, 1)
    stay = jnp.asarray([[0.5, 0.5, 0.9, 0.9, 0.1]])  # no square: it cannot be turned
    np.testing.assert_array_equal(ognet.move(picture, stay), picture)
    down = ognet.move(picture, stay.at[0, 0].set(0.99))[0, ..., 0]  # 16 rows move by up to 2
    np.testing.assert_array_equal(down[:14], picture[0, 2:, :, 0])
    np.testing.assert_array_equal(down[14:], jnp.broadcast_to(picture[0, 15:, :, 0], (2, 8)))
    left = ognet.move(picture, stay.at[0, 1].set(0.0))[0, ..., 0]  # 8 columns by 1
    np.testing.assert_array_equal(left[:, 1:], picture[0, :, :-1, 0])
    mirrored = ognet.move(picture, stay.at[0, 3].set(0.1))[0, ..., 0]
    np.testing.assert_array_equal(mirrored, picture[0, :, ::-1, 0])
    square = jnp.concatenate([picture[:, :8]] * 2)
    turned = ognet.move(square, jnp.concatenate([stay, stay.at[0, 4].set(0.9)]))[..., 0]
    np.testing.assert_array_equal(turned[0], picture[0, :8, :, 0].T)
    np.testing.assert_array_equal(turned[1], picture[0, :8, :, 0])


# --- scores ---------------------------------------------------------------------------------------------------------


def test_the_score_of_a_picture_is_the_logit_of_its_reconstruction():
    state = with_fields(fresh(), smooth_sigma=0.0)
    scores = jax.jit(ognet.score)(state, IMAGES[:3])
    x = IMAGES[:3] * 2 - 1
    rebuilt = Generator(state.cfg.widths, 3, impl="conv").apply(state.generator._asdict(), x, train=False)
    judge = Discriminator(state.cfg.widths, 3, impl="conv")
    logits = judge.apply(state.discriminator._asdict(), rebuilt[:, None], train=False)[:, 0]
    np.testing.assert_allclose(scores.image, logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        scores.map, jnp.broadcast_to(logits[:, None, None], scores.map.shape), rtol=1e-4, atol=1e-5
    )
    error = jax.jit(ognet.score)(with_fields(state, map="recon"), IMAGES[:3]).map
    np.testing.assert_allclose(error, abs(rebuilt - x).mean(axis=-1), rtol=1e-4, atol=1e-5)


def test_scores_of_patches(monkeypatch):
    """On a grid of 3x4 patches: the map is the mean over patches, the image score their maximum, or the top one."""
    cut = {"patch": 9, "stride": 4}
    state = with_fields(fresh(), smooth_sigma=0.0, **cut)
    picture = jnp.asarray(np.random.default_rng(5).uniform(size=(2, 17, 22, 2)), jnp.float32)
    scores = jax.jit(ognet.score)(state, picture)
    whole = jax.jit(ognet.score)
    patches = [(i, j) for i in (0, 4, 8) for j in (0, 4, 8, 12)]
    alone = {
        (i, j): np.asarray(whole(with_fields(state, patch=0), picture[:, i : i + 9, j : j + 9]).image)
        for i, j in patches
    }
    np.testing.assert_allclose(scores.image, np.max([*alone.values()], axis=0), rtol=1e-4, atol=1e-5)
    covering = [value for (i, j), value in alone.items() if i <= 8 < i + 9 and j <= 5 < j + 9]
    np.testing.assert_allclose(scores.map[:, 8, 5], np.mean(covering, axis=0), rtol=1e-4, atol=1e-5)
    assert len(covering) == 3 * 2
    monkeypatch.setattr(ognet, "_AT_ONCE", 5 * 9 * 9)  # 24 patches in blocks of 5
    in_blocks = jax.jit(lambda state, images: ognet.score(state, images))(state, picture)
    assert_close(in_blocks, scores, rtol=1e-4, atol=1e-5)


def test_the_top_hundredth_of_patches():
    logits = jnp.asarray(np.random.default_rng(0).permutation(201)[None], jnp.float32)
    top = ognet._image_score(config(image_score="top"), logits)
    np.testing.assert_allclose(top, [(200 + 199 + 198) / 3])  # of 201 the highest three
    np.testing.assert_allclose(ognet._image_score(config(), logits), [200])


def test_dense_scores_are_those_of_patches_of_the_whole_reconstruction():
    state = with_fields(fresh(), smooth_sigma=0.0, patch=9, stride=6, dense=True, map="recon")
    picture = jnp.asarray(np.random.default_rng(5).uniform(size=(2, 15, 15, 2)), jnp.float32)
    scores = jax.jit(ognet.score)(state, picture)
    rebuilt = Generator(state.cfg.widths, 3, impl="conv").apply(state.generator._asdict(), picture * 2 - 1, train=False)
    np.testing.assert_allclose(scores.map, abs(rebuilt - (picture * 2 - 1)).mean(axis=-1), rtol=1e-4, atol=1e-5)
    judge = Discriminator(state.cfg.widths, 3, impl="conv")
    four = jnp.stack([rebuilt[:, i : i + 9, j : j + 9] for i in (0, 6) for j in (0, 6)], axis=1)
    logits = judge.apply(state.discriminator._asdict(), four, train=False)
    np.testing.assert_allclose(scores.image, logits.max(axis=1), rtol=1e-4, atol=1e-5)


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"map": "heat"}, "map='heat' is unknown; expected one of"),
        ({"generator_gradient": "both"}, "generator_gradient='both' is unknown"),
        ({"patch": 4}, "at least 5 pixels a side, for 2 layers of 3 taps"),
        ({"patch": 10}, "no larger than the pictures"),
        ({"patch": 8, "stride": 9}, "a stride of 1 to a patch"),
        ({"old_share": 1.0}, "a share between 0 and 1 and at least 2 steps"),
        ({"steps": 1}, "steps=1; expected a share"),
        ({"refine_steps": 20, "refine_block": 8}, "divides the steps. Pass --set refine_block=5"),
        ({"refine_block": 1}, "a block of at least 3"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, expected):
    with pytest.raises(ValueError, match=expected.replace("(", r"\(")):
        ognet.check(config(**fields), Spec(SHAPE, {}))


def test_clips_are_refused_and_presets_are_not():
    with pytest.raises(ValueError, match="expected pictures"):
        ognet.check(config(), Spec((4, *SHAPE), {}))
    for preset in ognet.PRESETS.values():
        size, channels = preset.data["image_size"], preset.data["channels"]
        ognet.check(ognet.OGNetConfig(**preset.config), Spec((size, size, channels), {}))


# --- stability ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_study_refines_each_stop_as_a_run_that_ends_there_would(tmp_path):
    cfg = config(steps=9, refine_steps=6, refine_block=3, refine_rate=0.01, learning_rate=0.01)
    pictures = np.random.default_rng(1).integers(0, 256, (24, *SHAPE), np.uint8)
    data = {"train": Source(image=jnp.asarray(pictures[:12]), label=jnp.zeros(12, jnp.int32))}
    test = Source(image=jnp.asarray(pictures), label=jnp.arange(24, dtype=jnp.int32) // 12)
    said = []
    found = ognet_stability.stability(
        jax.random.key(0), cfg, data, test, stops=(5, 6, 9), batch_size=10, say=said.append
    )
    assert list(found.stops) == [5, 6, 9] and len(set(found.before)) > 1 and said
    whole = {}
    for progress in train.drive(ognet.METHOD, jax.random.key(0), cfg, data, mode="loop"):
        whole[progress.name] = jax.tree.map(jnp.copy, progress.state)
    for name, mine in (("adversarial", found.before), ("refine", found.after)):
        scores = score.score_dataset(ognet.METHOD, whole[name], test)
        assert mine[-1] == pytest.approx(metrics.image_metrics(scores.image, test.label)["auroc"], abs=0.02)
    together = ognet_stability.stability(jax.random.key(0), cfg, data, test, stops=(5, 6, 9), way="vmap")
    np.testing.assert_array_equal(together.before, found.before)
    np.testing.assert_allclose(together.after, found.after, atol=0.02)
    ognet_stability.plot(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="ascending steps after 3"):
        ognet_stability.stability(jax.random.key(0), cfg, data, test, stops=(3, 9))


def test_the_table_of_the_study():
    found = ognet_stability.Stability(np.array([5, 9]), np.array([0.5, 0.7]), np.array([0.8, 0.9]))
    facts = ognet_stability.summary(found)
    assert facts["before"]["mean"] == pytest.approx(0.6) and facts["after"]["deviation"] == pytest.approx(0.0707107)
    lines = ognet_stability.table(found).splitlines()
    assert lines[2] == "| 5 steps | 0.5000 | 0.8000 |" and lines[-1] == "| deviation | 0.1414 | 0.0707 |"


def test_the_studys_pictures_are_all_normal_ones_and_some_of_each_kind():
    label = np.array([0, 1, 1, 1, 0, 1, 1])
    source = Source(image=jnp.arange(7, dtype=jnp.uint8).reshape(7, 1, 1, 1), label=jnp.asarray(label))
    chosen = ognet_stability.choose_test(source, ["good", "a", "b", "a", "good", "a", "b"], per_kind=2)
    assert list(chosen.image.ravel()) == [0, 1, 2, 3, 4, 6]


def test_on_cpu_no_convolution_is_without_padding():
    """There XLA takes a slow path; elsewhere nothing is to be padded."""
    state = fresh(conv_impl="mixed")

    def bare(platform):
        with lowering_for(platform=platform):
            step = jax.make_jaxpr(lambda *given: ognet.adversarial_step(*given))  # new: what is traced is kept
            traced = step(jax.random.key(0), state, batch_of(IMAGES[:4]))
        found = [e.params["padding"] for e in _equations(traced.jaxpr) if e.primitive.name == "conv_general_dilated"]
        assert len(found) > 10
        return sum(not any(map(any, padding)) for padding in found)

    assert bare("cpu") == 0 and bare("tpu") > 0


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from _equations(inner)
