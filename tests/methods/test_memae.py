"""What makes MemAE MemAE: its published sizes, its read, its scores, and that it learns."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import metrics, score, train
from jaxad.core import Source, Spec, as_arrays, take
from jaxad.methods import memae


def config(preset="tiny", **fields):
    return memae.MemAEConfig(**{**memae.PRESETS[preset].config, **fields})


def initial(cfg, image, seed=0):
    """An untrained detector; one program, since op by op each shape compiles on its own."""
    return jax.jit(lambda key: memae.init(key, as_arrays(cfg), Spec(image, {})))(jax.random.key(seed))


scored = jax.jit(memae.score)


@functools.partial(jax.jit, static_argnames="train")
def rebuild(state, images, train=False):
    """(reconstruction, read) in the network's units, [-1, 1]."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    mutable = ["batch_stats"] if train else False
    out = memae.MemAE(state.cfg).apply(variables, memae.scale(images), train=train, mutable=mutable)
    return out[0] if train else out


@jax.jit
def gradients(state, images):
    return jax.grad(lambda p: memae.loss(p, state.batch_stats, state.cfg, images)[0])(state.params)


def shapes(preset, image):
    return jax.eval_shape(lambda: memae.init(jax.random.key(0), config(preset), Spec(image, {})))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "preset, image, encoder, memory, decoder",
    [
        ("video", (16, 256, 256, 1), 2_990_784, 512_000, 2_990_017),
        ("mnist", (28, 28, 1), 23_392, 102_400, 55_873),
        ("cifar", (32, 32, 3), 519_552, 512_000, 1_037_187),
    ],
)
def test_published_networks_have_the_published_number_of_parameters(preset, image, encoder, memory, decoder):
    state = shapes(preset, image)
    counts = {name: count(part) for name, part in state.params.items()}
    assert counts == {"encoder": encoder, "memory": memory, "decoder": decoder}
    if preset == "video":
        assert count(state.params) == 6_492_801 and count(state.batch_stats) == 2_432


@pytest.mark.parametrize("image", [(28, 28, 1), (33, 50, 3), (16, 16, 3)])
def test_pictures_of_any_size_come_back_at_their_size(image):
    cfg = config()
    scores = jax.eval_shape(
        lambda: memae.score(memae.init(jax.random.key(0), cfg, Spec(image, {})), jnp.zeros((2, *image)))
    )
    assert scores.map.shape == (2, *image[:2])


def test_initial_distributions_are_the_official_codes():
    state = initial(config("mnist"), (28, 28, 1))
    kernel = state.params["encoder"]["Conv_2"]["kernel"]
    assert abs(float(kernel.std()) - 0.02) < 0.001
    bound = (64 * 4 * 4) ** -0.5
    assert 0.99 * bound < float(abs(state.params["memory"]).max()) <= bound
    scale = state.params["encoder"]["NormActivate_2"]["BatchNorm_0"]["scale"]
    assert abs(float(scale.mean()) - 1) < 0.02 and 0.005 < float(scale.std()) < 0.04
    bias = state.params["decoder"]["ConvTranspose_1"]["bias"]  # 32 outputs: fan-in 9 * 32, as torch counts it
    assert 0.8 * (9 * 32) ** -0.5 < float(abs(bias).max()) <= (9 * 32) ** -0.5


@pytest.fixture(scope="module")
def fresh():
    """An untrained detector with shrinkage off, so that every query reads."""
    return initial(config(shrink_threshold=0.0), (16, 16, 3), seed=1)


IMAGES = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 16, 16, 3)), jnp.float32)


def with_fields(state, **fields):
    return state._replace(cfg=as_arrays(dataclasses.replace(state.cfg, **fields)))


def test_the_decoder_sees_memory_only(fresh):
    empty = fresh._replace(params={**fresh.params, "memory": jnp.zeros_like(fresh.params["memory"])})
    rebuilt, _ = rebuild(empty, IMAGES)
    np.testing.assert_allclose(rebuilt, jnp.broadcast_to(rebuilt[:1], rebuilt.shape), atol=1e-6)


def test_memory_learns_by_gradient_and_is_frozen_when_scoring(fresh):
    grads = gradients(fresh, IMAGES)
    assert float(abs(grads["memory"]).max()) > 0
    before = jax.tree.map(np.asarray, fresh)
    after = memae.METHOD.adapt(fresh, IMAGES, scored(fresh, IMAGES))
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_loss_is_mean_square_plus_weighted_mean_entropy(fresh):
    state = with_fields(fresh, entropy_weight=0.5, shrink_threshold=0.01)
    total, (_, measured) = jax.jit(memae.loss)(state.params, state.batch_stats, state.cfg, IMAGES)
    rebuilt, read = rebuild(state, IMAGES, train=True)
    expected = np.mean((np.asarray(rebuilt) - (2 * np.asarray(IMAGES) - 1)) ** 2) + 0.5 * np.mean(read.entropy)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    np.testing.assert_allclose(measured["frac_empty"], np.mean(np.asarray(read.num_active) == 0))
    np.testing.assert_allclose(measured["slots_used"], np.sum(np.asarray(read.usage) > 0))


def test_adam_step_is_adams(fresh):
    """After one step every parameter with a gradient has moved by the learning rate, against its gradient's sign."""
    after, _ = jax.jit(memae.train_step)(jax.random.key(0), fresh, _batch(IMAGES))
    grads = gradients(fresh, IMAGES)
    kernel, moved = (s.params["decoder"]["ConvTranspose_0"]["kernel"] for s in (fresh, after))
    slope = grads["decoder"]["ConvTranspose_0"]["kernel"]
    clear = abs(slope) > 1e-5
    np.testing.assert_allclose((kernel - moved)[clear], fresh.cfg.learning_rate * jnp.sign(slope)[clear], rtol=1e-2)


def _batch(images):
    size = images.shape[0]
    source = Source(image=jnp.uint8(images * 255), label=jnp.zeros(size, jnp.int32))
    phase = memae.phases(config())[0]._replace(batch_size=size, steps=None)
    return train.batch_at(jax.random.key(0), phase, jnp.int32(0), source)._replace(image=images)


def test_residual_by_hand():
    x, rebuilt = jnp.zeros((1, 1, 3)), jnp.asarray([[[3.0, 4.0, 0.0]]])
    np.testing.assert_allclose(memae.residual(rebuilt, x, norm="l1"), [[5.0]])  # root of 9 + 16 + 0
    np.testing.assert_allclose(memae.residual(rebuilt, x, norm="l2"), [[25 / 3]])
    grey = jnp.asarray([[[-2.0]]])
    np.testing.assert_allclose(memae.residual(grey, grey * 0, norm="l1"), [[2.0]])  # one channel: absolute error


def test_image_score_is_the_mean_of_the_raw_or_the_maximum_of_the_smoothed_residual(fresh):
    rebuilt, _ = rebuild(fresh, IMAGES)
    raw = memae.residual(rebuilt, memae.scale(IMAGES), norm="l2")
    mean = scored(with_fields(fresh, image_score="mean"), IMAGES)
    np.testing.assert_allclose(mean.image, raw.mean(axis=(1, 2)), rtol=1e-5)
    top = scored(fresh, IMAGES)
    np.testing.assert_allclose(top.image, top.map.max(axis=(1, 2)), rtol=1e-6)
    sharp = scored(with_fields(fresh, smooth_sigma=0.0), IMAGES)
    np.testing.assert_allclose(sharp.map, raw, rtol=1e-4, atol=1e-6)
    assert float(top.image.max()) < float(sharp.image.max())


CLIP = {"encoder": (4, 8), "decoder": (4,), "time_strides": (1, 2), "num_items": 10, "shrink_threshold": 0.0}


def test_clips_are_scored_whole_and_mapped_at_the_ninth_frame():
    state = with_fields(initial(config("video", **CLIP), (16, 8, 8, 1)), smooth_sigma=0.0)
    clips = jnp.asarray(np.random.default_rng(1).uniform(size=(2, 16, 8, 8, 1)), jnp.float32)
    scores, (rebuilt, _) = scored(state, clips), rebuild(state, clips)
    error = abs(np.asarray(rebuilt) - np.asarray(memae.scale(clips)))[..., 0]
    np.testing.assert_allclose(scores.image, error.mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(scores.map, error[:, 8], rtol=1e-4, atol=1e-6)


def test_clips_start_at_every_frame_and_carry_the_ninth_frames_label():
    frames = np.zeros((20, 4, 4, 1), np.uint8)
    frames[:, 0, 0, 0] = np.arange(20)
    label = (np.arange(20) == 10).astype(np.int32)
    starts = np.arange(20 - 15, dtype=np.int32)  # F - 15 clips, as in the official label cut [8:-7]
    source = Source(image=jnp.asarray(frames), label=jnp.asarray(label), start=jnp.asarray(starts), clip=16, target=8)
    assert len(source) == 5 and source.sample_shape == (16, 4, 4, 1)
    clips, labels, _ = take(source, jnp.arange(5))
    np.testing.assert_array_equal(np.round(clips[2, :, 0, 0, 0] * 255), np.arange(2, 18))
    np.testing.assert_array_equal(labels, label[8:-7])


def test_scores_are_stretched_within_each_video():
    scores, videos = np.asarray([1.0, 3.0, 2.0, 10.0, 10.0]), np.asarray(["a", "a", "a", "b", "b"])
    np.testing.assert_allclose(score.normalize_groups(scores, videos), [0, 1, 0.5, 0, 0])


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"similarity": "cosine", "num_items": 2000, "shrink_threshold": 0.0040}, "leaves every query empty"),
        ({"similarity": "euclid"}, "expected one of"),
        ({"decoder": (8, 8, 8)}, "one fewer"),
        ({"shrink_threshold": 1.5}, "0 <= shrink_threshold < 1"),
        ({"temperature": 0.0}, "temperature > 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(fields, message):
    data = {"train": Source(image=jnp.zeros((4, 16, 16, 3), jnp.uint8), label=jnp.zeros(4, jnp.int32))}
    with pytest.raises(ValueError, match=message):
        next(train.drive(memae.METHOD, jax.random.key(0), config(**fields), data))


def test_cosine_bound_is_that_of_the_spec():
    """Without temperature no weight exceeds about e^2 / N; at a threshold just below it the check is content."""
    cfg = config(similarity="cosine", num_items=2000, shrink_threshold=7.3 / 2000)
    memae.check(cfg, Spec((16, 16, 3), {}))
    with pytest.raises(ValueError):
        memae.check(dataclasses.replace(cfg, shrink_threshold=7.4 / 2000), Spec((16, 16, 3), {}))


def test_clip_settings_that_do_not_fit_are_refused():
    spec = Spec((5, 8, 8, 1), {})
    with pytest.raises(ValueError, match="score_frame=8 lies outside the clip of 5 frames"):
        memae.check(config("video", **CLIP), spec)
    with pytest.raises(ValueError, match="time_strides"):
        memae.check(config("video", **{**CLIP, "time_strides": (1, 2, 2)}), spec)


@pytest.mark.parametrize(
    "fields, tolerance",
    [
        ({"dtype": "bfloat16"}, 0.05),
        ({"conv_impl": "conv"}, 1e-4),
        ({"conv_impl": "gemm"}, 1e-4),
        ({"read_impl": "naive"}, 1e-4),
    ],
)
def test_other_arithmetic_scores_the_same(fresh, fields, tolerance):
    state = with_fields(fresh, shrink_threshold=0.001)
    expected = scored(state, IMAGES)
    got = scored(state._replace(cfg=dataclasses.replace(state.cfg, **fields)), IMAGES)
    assert got.image.dtype == jnp.float32
    np.testing.assert_allclose(got.image, expected.image, rtol=tolerance)
    assert fields.get("dtype") is None or (got.image != expected.image).any()


def test_flips_are_drawn_by_picture(fresh):
    """With flips on, the loss depends on the key, since some pictures are mirrored; without them it does not."""
    step = jax.jit(memae.train_step)
    batch, losses = _batch(IMAGES), {}
    for flip in (False, True):
        state = fresh._replace(cfg=dataclasses.replace(fresh.cfg, flip=flip))
        losses[flip] = {float(step(jax.random.key(seed), state, batch)[1]["loss"]) for seed in range(4)}
    assert len(losses[False]) == 1 and len(losses[True]) > 1


@pytest.fixture(scope="module")
def digits():
    """Scikit-learn's real 8x8 digits: eights are normal."""
    from sklearn.datasets import load_digits

    pixels, digit = load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    normal, others = pixels[digit == 8], pixels[digit != 8][:300]
    train_source = Source(image=jnp.asarray(normal[:120]), label=jnp.zeros(120, jnp.int32))
    label = np.repeat([0, 1], [len(normal) - 120, 300]).astype(np.int32)
    test_source = Source(image=jnp.asarray(np.concatenate([normal[120:], others])), label=jnp.asarray(label))
    return {"train": train_source}, test_source


def train_seeds(data, **fields):
    """Three seeds in one program: (states, logs), stacked."""
    cfg = config(**{"image_score": "mean", "query": "image", "num_items": 30, "steps": 150, **fields})
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    return jax.jit(jax.vmap(lambda key: train.fit(memae.METHOD, key, cfg, data)))(keys)


def mean_auroc(states, source):
    scores = jax.jit(jax.vmap(lambda state: memae.score(state, take(source, jnp.arange(len(source)))[0]).image))(states)
    return np.mean([metrics.image_metrics(row, np.asarray(source.label))["auroc"] for row in np.asarray(scores)])


@pytest.mark.slow
def test_memory_beats_the_same_network_without_it_and_both_beat_no_training(digits):
    data, test = digits
    with_memory = mean_auroc(train_seeds(data, shrink_threshold=1 / 30)[0], test)
    without = mean_auroc(train_seeds(data, memory=False)[0], test)
    untrained = mean_auroc(train_seeds(data, shrink_threshold=1 / 30, steps=1)[0], test)
    assert with_memory > without + 0.005, (with_memory, without)  # 0.981 against 0.965 when written
    assert without > untrained + 0.1, (without, untrained)


@pytest.mark.slow
def test_queries_that_address_nothing_become_rare(digits):
    log = train_seeds(digits[0], shrink_threshold=2 / 30)[1]["train"]
    empty = np.asarray(log["frac_empty"])
    assert (empty[:, 0] > 0.03).all() and (empty[:, -20:].mean(axis=1) < 0.01).all()
