"""What makes SynthCP SynthCP: labels in, pictures out, compared where the segmenter is not sure."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import metrics, train
from jaxad.core import Batch, Spec, as_arrays, spec_of
from jaxad.data.arrays import from_arrays
from jaxad.methods import synthcp, synthcp_clusters, synthcp_given, synthcp_state
from jaxad.nn import segmenter, spade
from jaxad.ops import compare as compare_ops
from jaxad.ops import superpixels, texture

SHAPE = (16, 16, 3)
NETS = {
    "generator_widths": (6, 4),
    "upsamplings": 1,
    "spade_hidden": 4,
    "discriminator_widths": (4, 6),
    "discriminator_scales": 2,
    "conv_impl": "conv",
    "batch_size": 4,
}
GIVEN = {
    **NETS,
    "num_labels": 3,
    "segmenter_blocks": (1, 1, 1, 1),
    "segmenter_width": 2,
    "segmenter_head": 4,
    "compare_width": 4,
}
CLUSTERS = {**NETS, "labels": "clusters", "gate": "none", "num_labels": 4, "cluster_rows": 512, "compare_width": 4}


def given(**fields):
    return synthcp.SynthCPConfig(**{**GIVEN, **fields})


def clusters(**fields):
    return synthcp.SynthCPConfig(**{**CLUSTERS, **fields})


def images_of(count, seed=0, shape=SHAPE):
    """Blocks of colour under noise."""
    numbers = np.random.default_rng(seed)
    blocks = np.kron(numbers.uniform(size=(count, shape[0] // 8, shape[1] // 8, 3)), np.ones((1, 8, 8, 1)))
    return jnp.asarray(np.clip(blocks + numbers.normal(0, 0.05, blocks.shape), 0, 1), jnp.float32)


def batch_of(images, mask=None, valid=None):
    size = images.shape[0]
    mask = jnp.zeros(images.shape[:3]) if mask is None else jnp.asarray(mask, jnp.float32)
    valid = jnp.ones(size, bool) if valid is None else jnp.asarray(valid)
    return Batch(images, jnp.zeros(size, jnp.int32), mask, jnp.arange(size), valid)


@functools.cache
def initial(cfg, shape=SHAPE):
    state = jax.jit(lambda key: synthcp.init(key, as_arrays(cfg), Spec(shape, {"train": 8})))(jax.random.key(0))
    numbers = np.random.default_rng(1)

    def away(path, leaf):
        moved = "batch_stats" in str(path)
        # Variances as small as those of trained maps, or nothing would be left of the picture in the last one.
        return 0.05 * leaf + numbers.uniform(0.005, 0.02, leaf.shape).astype("f") if moved else leaf

    return state._replace(others=jax.tree_util.tree_map_with_path(away, state.others))


@functools.cache
def prepared(cfg):
    """Pseudo-classes of eight pictures, and statistics of positions."""
    state, batch = initial(cfg), batch_of(images_of(8))
    for phase in synthcp.phases(cfg):
        if phase.steps is None:
            state, _ = jax.jit(phase.step)(jax.random.key(0), state, batch)
            state = jax.jit(phase.finish)(jax.random.key(0), state)
    return state


def with_fields(state, **fields):
    return state._replace(cfg=dataclasses.replace(state.cfg, **fields))


# --- the method ---------------------------------------------------------------------------------------------------


def test_phases_are_the_methods():
    named = lambda cfg: [phase.name for phase in synthcp.phases(cfg)]  # noqa: E731
    assert named(given()) == ["segment", "generate"]
    assert named(given(comparator="failure")) == ["segment", "generate", "compare"]
    assert named(clusters()) == ["features", "clusters", "generate", "calibrate"]
    assert named(clusters(comparator="discrepancy")) == ["features", "clusters", "generate", "compare"]


def test_presets_have_the_papers_networks():
    for name, size, parameters in (("semantic", (256, 512, 3), 92_359_107), ("industrial", (256, 256, 3), 29_635_555)):
        cfg = synthcp.SynthCPConfig(**synthcp.PRESETS[name].config)
        synthcp.check(cfg, Spec(size, {"train": 300}))
        state = jax.eval_shape(
            lambda cfg=cfg, size=size: synthcp.init(jax.random.key(0), cfg, Spec(size, {"train": 300}))
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(state.params["generator"])) == parameters
        scores = jax.eval_shape(synthcp.score, state, jnp.zeros((2, *size)))
        assert scores.image.shape == (2,) and scores.map.shape == (2, *size[:2])


@pytest.mark.slow
def test_scoring_is_its_three_stages():
    for state in (initial(given()), prepared(clusters())):
        images = images_of(3)
        segmented = jax.jit(synthcp.segment)(state, images)
        made = jax.jit(lambda s, labels: synthcp.synthesise(s, labels, SHAPE))(state, segmented.labels)
        apart = jax.jit(synthcp.compare)(state, images, segmented, made)
        whole = jax.jit(synthcp.score)(state, images)
        np.testing.assert_allclose(apart.map, whole.map, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(apart.image, compare_ops.top_share(whole.map, 0.01), rtol=1e-3, atol=1e-4)


def test_a_perfect_synthesis_is_normal_wherever_the_segmenter_is_not_sure():
    state = initial(given())
    images = images_of(3)
    confidence = jnp.asarray(np.random.default_rng(0).uniform(size=(3, 16, 16)), jnp.float32)
    segmented = synthcp.segment(state, images)._replace(confidence=confidence)
    scores = synthcp.compare(with_fields(state, msp_threshold=0.6), images, segmented, images)
    sure = np.asarray(confidence) > 0.6
    np.testing.assert_allclose(np.asarray(scores.map)[~sure], -1, atol=1e-5)
    np.testing.assert_allclose(np.asarray(scores.map)[sure], -np.asarray(confidence)[sure], atol=1e-6)


def test_the_threshold_opens_and_closes_the_gate():
    """t = 1: features alone, as without a gate; t = -1: the confidence alone."""
    state, images = initial(given()), images_of(3)
    segmented = synthcp.segment(state, images)
    made = images[::-1]
    map_of = lambda **fields: synthcp.compare(with_fields(state, **fields), images, segmented, made).map  # noqa: E731
    np.testing.assert_allclose(map_of(msp_threshold=-1.0), -segmented.confidence, atol=1e-6)
    np.testing.assert_allclose(map_of(msp_threshold=1.0), map_of(gate="none"), atol=1e-6)
    assert float(jnp.abs(map_of(gate="none") + segmented.confidence).max()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
def test_tiles_change_nothing(rows):
    images = images_of(2)
    for base in (initial(given(scales=(1.0, 1.5))), prepared(clusters())):
        whole = jax.jit(synthcp.score)(base, images)
        tiled = jax.jit(synthcp.score)(with_fields(base, compare_rows=rows), images)
        np.testing.assert_allclose(tiled.map, whole.map, rtol=1e-4, atol=1e-5)


def test_scales_are_averaged():
    one, two = (initial(given(scales=s)) for s in ((1.0,), (1.0, 1.5)))
    images = images_of(2)
    parts = [synthcp_given.segment_given(with_fields(one, scales=(s,)), images).probabilities for s in (1.0, 1.5)]
    both = synthcp.segment(two, images)
    np.testing.assert_allclose(both.probabilities, (parts[0] + parts[1]) / 2, atol=1e-5)
    np.testing.assert_allclose(both.confidence, both.probabilities.max(axis=-1), atol=1e-6)


def test_syntheses_are_rounded_to_bytes_if_told():
    state = initial(given())
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 3, (1, 16, 16)), jnp.int32)
    made, rounded = (synthcp.synthesise(with_fields(state, quantise_recon=q), labels, SHAPE) for q in (False, True))
    np.testing.assert_allclose(rounded * 255, np.rint(np.asarray(made) * 255), atol=1e-3)
    assert float(jnp.abs(rounded - made).max()) > 1e-4 and made.min() >= 0 and made.max() <= 1


# --- training -----------------------------------------------------------------------------------------------------


def test_masks_are_classes_and_other_values_are_none():
    mask = jnp.asarray([[[0, 1, 2], [3, 255, 2]]])
    found = synthcp_given.given_labels(given(), batch_of(jnp.zeros((1, 2, 3, 3)), mask))
    np.testing.assert_array_equal(found, [[[0, 1, 2], [-1, -1, 2]]])


def test_pictures_and_masks_are_flipped_together():
    images, mask = images_of(16), jnp.arange(16 * 256).reshape(16, 16, 16) % 3
    batch = batch_of(images, mask)
    made = synthcp_state.flipped(jax.random.key(0), given(augment="flip"), batch)
    turned = [bool((own == picture[:, ::-1]).all()) for own, picture in zip(made.image, images, strict=True)]
    assert 2 < sum(turned) < 14
    for i, is_turned in enumerate(turned):
        np.testing.assert_array_equal(made.mask[i], mask[i][:, ::-1] if is_turned else mask[i])
    np.testing.assert_array_equal(synthcp_state.flipped(jax.random.key(0), given(), batch).image, images)


def test_the_segmentation_loss_by_hand():
    logits = jnp.log(jnp.asarray([[[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]]))
    loss, right = synthcp_given.segment_loss(logits, jnp.asarray([[[0, 2, -1]]]))
    np.testing.assert_allclose(loss, -(np.log(0.5) + np.log(0.1)) / 2, rtol=1e-5)
    np.testing.assert_allclose(right, 0.5)


@pytest.mark.slow
def test_every_step_of_the_segmenter_draws_one_of_its_scales(monkeypatch):
    """Without dropout nothing else is drawn: one loss for each scale."""
    monkeypatch.setattr(segmenter, "_DROPOUT", 0.0)
    batch = batch_of(images_of(4), np.random.default_rng(0).integers(0, 3, (4, 16, 16)))
    state, step = with_fields(initial(given()), scales=(1.0, 1.5)), jax.jit(synthcp.segment_step)
    losses = [round(float(step(jax.random.key(i), state, batch)[1]["loss"]), 4) for i in range(12)]
    assert len(set(losses)) == 2 and 2 <= losses.count(losses[0]) <= 10


@pytest.mark.slow
@pytest.mark.parametrize("reconstruction", ["none", "l1_ssim"])
def test_one_forward_pass_gives_both_gradients(reconstruction):
    """Against the two losses differentiated one after the other; with the first moment's beta 0, Adam keeps them."""
    cfg = given(reconstruction=reconstruction, feature_weight=3.0, reconstruction_weight=2.0)
    state, images = initial(cfg), images_of(4)
    labels = jnp.asarray(np.random.default_rng(0).integers(0, 3, (4, 16, 16)), jnp.int32)
    batch = batch_of(images, labels)
    after, found = jax.jit(synthcp.generator_step)(jax.random.key(0), state, batch)
    nets, real = synthcp_state.networks(cfg, SHAPE), images * 2 - 1

    def play(params, fake=None):
        own = {name: {"params": params[name], **state.others[name]} for name in ("generator", "discriminator")}
        if fake is None:
            options = {"train": True, "mutable": ["batch_stats", "spectral"]}
            fake, _ = nets["generator"].apply(own["generator"], labels, **options)
        both, _ = nets["discriminator"].apply(
            own["discriminator"], labels, fake, real, train=True, mutable=["spectral"]
        )
        return fake, both

    @jax.jit
    @jax.grad
    def by_generator(params):
        fake, (theirs, ours) = play(params)
        total = spade.hinge_generator(theirs) + 3.0 * spade.feature_matching(ours, theirs)
        return total + (2.0 * synthcp.reconstruction_loss(state, fake, real) if reconstruction != "none" else 0.0)

    @jax.jit
    @jax.grad
    def by_discriminator(params):
        _, (theirs, ours) = play(params, jax.lax.stop_gradient(play(params)[0]))
        return spade.hinge_discriminator(ours, theirs)

    for name, slopes in (("generator", by_generator), ("discriminator", by_discriminator)):
        expected, kept = slopes(state.params)[name], after.optimizer[name].mu
        for own, theirs in zip(jax.tree.leaves(kept), jax.tree.leaves(expected), strict=True):
            scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
            np.testing.assert_allclose(own, theirs, atol=1e-4 * scale)
            assert scale > 0
    assert ("reconstruction" in found) == (reconstruction != "none")
    assert int(after.done["generator"]) == int(after.done["discriminator"]) == 1


@pytest.mark.slow
def test_the_first_steps_move_by_the_learning_rates_and_the_last_hardly():
    cfg = given(steps=10)
    state, batch = initial(cfg), batch_of(images_of(4))
    step = jax.jit(synthcp.generator_step)

    def moved(state, name):
        after, _ = step(jax.random.key(0), state, batch)
        pairs = zip(jax.tree.leaves(after.params[name]), jax.tree.leaves(state.params[name]), strict=True)
        return max(float(jnp.abs(a - b).max()) for a, b in pairs)

    for done, share in ((0, 1.0), (5, 1.0), (9, 0.2)):
        at = state._replace(done=jax.tree.map(lambda n, done=done: jnp.int32(done), state.done))
        for name, rate in (("generator", 1e-4), ("discriminator", 4e-4)):
            np.testing.assert_allclose(moved(at, name), rate * share, rtol=0.05)


# --- pseudo-classes -----------------------------------------------------------------------------------------------


def test_features_are_standardised_by_what_is_valid():
    cfg = clusters()
    images = images_of(8)
    state, _ = synthcp_clusters.feature_step(None, initial(cfg), batch_of(images, valid=[True] * 6 + [False] * 2))
    features = np.asarray(synthcp_clusters.standardised(state, images[:6])).reshape(-1, texture.FEATURES)
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(axis=0), 1, rtol=1e-3)


def test_a_pixels_place_counts_as_its_weight_says():
    features = jnp.zeros((2, 6, 8, 18))
    rows = np.asarray(synthcp_clusters.placed(clusters(position_weight=0.5), features))[..., -2:]
    np.testing.assert_allclose(rows.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose((rows**2).mean(axis=(0, 1, 2)), (0.5 * 3) ** 2 * np.array([35 / 36, 63 / 64]), rtol=1e-4)
    assert (np.asarray(synthcp_clusters.placed(clusters(position_weight=0.0), features))[..., -2:] == 0).all()


def test_pseudo_classes_are_the_nearest_centres():
    state, images = prepared(clusters()), images_of(3)
    found = synthcp.segment(state, images)
    rows = np.asarray(synthcp_clusters.placed(state.cfg, synthcp_clusters.standardised(state, images)))
    apart = ((rows[..., None, :] - np.asarray(state.pseudo.centres)) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(found.labels, apart.argmin(axis=-1))
    weights = np.exp(-(apart - apart.min(axis=-1, keepdims=True)) / float(state.pseudo.temperature))
    np.testing.assert_allclose(found.confidence, 1 / weights.sum(axis=-1), rtol=1e-3)
    kept = np.asarray(state.pseudo.bank).reshape(-1, rows.shape[-1])
    nearest = ((kept[:, None] - np.asarray(state.pseudo.centres)) ** 2).sum(axis=-1).min(axis=1)
    np.testing.assert_allclose(state.pseudo.temperature, np.sort(nearest)[(len(nearest) - 1) // 2], rtol=1e-3)
    assert len(np.unique(found.labels)) > 1


def test_superpixels_take_one_label_each():
    cfg = clusters(label_grid=4)
    state, images = with_fields(prepared(clusters()), label_grid=4), images_of(2)
    labels = np.asarray(synthcp.segment(state, images).labels)
    segments = np.asarray(superpixels.slic(images, grid=4))[:, ::4, ::4]
    for own, parts in zip(labels, segments, strict=True):
        assert all(len(np.unique(own[parts == k])) == 1 for k in np.unique(parts))
    assert cfg.label_grid == 4 and (labels != np.asarray(synthcp.segment(prepared(clusters()), images).labels)).any()


def test_positions_are_standardised_by_normal_pictures():
    """By hand: mean 2, deviation 1 at one place and 0 elsewhere, so a floor of 0.5 * 0.25."""
    state = prepared(clusters())
    seen = jax.tree.map(lambda leaf: leaf[:4], state.pseudo.distances["image"])
    seen = seen._replace(count=jnp.full(4, 2.0), mean=jnp.full(4, 2.0), squares=jnp.asarray([2.0, 0, 0, 0]))
    got = synthcp_clusters.calibrated(jnp.asarray([[[3.0, 2.0], [1.0, 4.0]]]), seen)
    np.testing.assert_allclose(got, [[[1 / 1.125, 0], [-8, 16]]], rtol=1e-5)


def test_the_training_pictures_themselves_are_standard():
    state, images = prepared(clusters()), images_of(8)
    found = synthcp.segment(state, images)
    made = synthcp.synthesise(state, found.labels, SHAPE)
    for space, values in synthcp_clusters.distances_of(state, found, images, made).items():
        assert float(values.min()) > -1e-5
        np.testing.assert_allclose(
            synthcp_clusters.calibrated(values, state.pseudo.distances[space]).mean(axis=0), 0, atol=1e-3
        )


def test_a_quantile_of_normal_confidence_closes_the_gate():
    state, images = with_fields(prepared(clusters()), gate="quantile", msp_threshold=0.7), images_of(8)
    found = synthcp.segment(state, images)
    threshold = float(synthcp_clusters.sure_above(state.cfg, state.pseudo))
    share = float((found.confidence <= threshold).mean())
    np.testing.assert_allclose(share, 0.7, atol=0.05)
    sharp = with_fields(state, smooth_sigma=0.0)
    made = images[::-1]
    open_map = np.asarray(synthcp.compare(with_fields(sharp, gate="none"), images, found, made).map)
    closed = np.asarray(synthcp.compare(sharp, images, found, made).map)
    assert (closed <= open_map + 1e-4).all() and (closed < open_map - 1e-3).any()


# --- learned comparators ------------------------------------------------------------------------------------------


def test_the_failure_loss_by_hand():
    segmented = synthcp_state.Segmented(jnp.asarray([[[0, 1, 1]]]), jnp.asarray([[[1.0, 0.5, 0.8]]]), [], None)
    labels = jnp.asarray([[[0, 0, -1]]])
    right, iou = jnp.asarray([[[2.0, -1.0, 5.0]]]), jnp.asarray([[0.9, 0.2, 0.3]])
    total, found = synthcp_given.failure_loss(right, iou, segmented, labels)
    # Class 0 alone is there: IoU 1 / 2. The first pixel is right, the second wrong, the third has no class.
    np.testing.assert_allclose(found["iou_loss"], 0.5 * 0.4**2, rtol=1e-5)
    expected = (np.log1p(np.exp(-2.0)) * 1 + np.log1p(np.exp(-1.0)) * 0.25) / 3
    np.testing.assert_allclose(found["pixel_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(total, found["iou_loss"] + found["pixel_loss"])


def test_whole_superpixels_are_swapped():
    cfg, images = clusters(swap_grid=4, swap_share=0.5, num_labels=5), images_of(6)
    labels = jnp.full((6, 16, 16), 2, jnp.int32).at[0, :4].set(-1)
    changed = np.asarray(synthcp.swapped(jax.random.key(0), cfg, images, labels))
    segments = np.asarray(superpixels.slic(images, grid=4))
    for own, parts, before in zip(changed[1:], segments[1:], np.asarray(labels)[1:], strict=True):
        assert all(len(np.unique(own[parts == k])) == 1 for k in np.unique(parts))
        assert (own != before).any()
    assert 0.25 < (changed[1:] != 2).mean() < 0.55 and (changed[0, :4] == -1).all()  # a fifth draw their own label


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [given(comparator="failure"), clusters(comparator="discrepancy", swap_grid=4)])
def test_a_learned_comparator_alone_is_trained_and_scores(cfg):
    state, images = initial(cfg), images_of(4)
    mask = np.random.default_rng(0).integers(0, 3, (4, 16, 16))
    step = jax.jit(next(phase for phase in synthcp.phases(cfg) if phase.name == "compare").step)
    after, first = step(jax.random.key(0), state, batch_of(images, mask))
    for name in after.params:
        same = all(
            bool((a == b).all())
            for a, b in zip(jax.tree.leaves(after.params[name]), jax.tree.leaves(state.params[name]), strict=True)
        )
        assert same == (name != "comparator")
    for _ in range(15):
        after, last = step(jax.random.key(0), after, batch_of(images, mask))
    assert float(last["loss"]) < float(first["loss"])
    before, scores = (jax.jit(synthcp.score)(s, images) for s in (state, after))
    assert bool(jnp.isfinite(scores.map).all()) and float(jnp.abs(scores.map - before.map).max()) > 1e-3
    if cfg.comparator == "failure":  # minus two probabilities
        assert float(scores.map.min()) >= -2 and float(scores.map.max()) <= 0
    else:
        assert float(scores.map.min()) >= 0 and float(scores.map.max()) <= 1


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, shape, message",
    [
        ({"comparator": "siamese"}, SHAPE, "comparator='siamese' is unknown; expected one of"),
        ({}, (3, 16, 16, 3), "samples are .*expected pictures"),
        ({"upsamplings": 3}, SHAPE, "2 blocks with upsamplings=3; expected 1"),
        ({}, (15, 16, 3), "pictures of 15x16; expected multiples of 2"),
        ({"labels": "clusters", "gate": "none"}, (18, 16, 3), "expected multiples of 4"),
        ({"comparator": "discrepancy", "swap_grid": 5}, SHAPE, "swap_grid=5 does not divide"),
        ({"labels": "clusters", "comparator": "failure"}, SHAPE, "expected labels='given'"),
        ({"gate": "quantile"}, SHAPE, "gate='quantile' is of normal pixels' confidence"),
        ({"num_labels": 1}, SHAPE, "num_labels=1"),
        ({"labels": "clusters", "compare_features": "image"}, SHAPE, "nothing else reads it"),
        ({"reconstruction": "perceptual"}, SHAPE, "expected a backbone with its file of weights"),
        ({"backbone": "resnet18"}, SHAPE, "expected a backbone with its file of weights"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        synthcp.check(given(**fields), Spec(shape, {"train": 4}))


def test_given_labels_need_masks_in_training():
    pictures = np.zeros((4, *SHAPE), np.uint8)
    without, with_classes = (
        spec_of(from_arrays(pictures, holdout=pictures, train_classes=classes).sources)
        for classes in (None, np.zeros((4, 16, 16), int))
    )
    with pytest.raises(ValueError, match="labels='given' learns .* no masks; expected .*train_classes.*pass --preset"):
        synthcp.check(given(), without)
    synthcp.check(given(), with_classes)
    synthcp.check(clusters(), without)


# --- learning -----------------------------------------------------------------------------------------------------


SIDE = 32
Y, X = np.mgrid[:SIDE, :SIDE]
COLOURS = np.array([[0.05, 0.05, 0.1], [0.95, 0.95, 0.9], [0.85, 0.1, 0.1], [0.1, 0.2, 0.85], [0.9, 0.8, 0.1]])
GREY, BROWN, TEAL, VIOLET, ORANGE = [0.5] * 3, [0.5, 0.35, 0.2], [0.1, 0.55, 0.55], [0.55, 0.2, 0.6], [0.9, 0.45, 0.1]
STRIPES = np.where((X + Y)[..., None] % 6 < 3, COLOURS[2], COLOURS[4])
UNSEEN = [*(np.full((SIDE, SIDE, 3), colour) for colour in (GREY, BROWN, TEAL, VIOLET, ORANGE)), STRIPES]


def scenes(count, *, seed, looks=()):
    """Fields of five colours, each a class; if `looks` are given they fill, in turn, a triangle of no class.

    Returns pictures uint8, classes, and where the triangle is, each with a leading axis of pictures.
    """
    numbers, made = np.random.default_rng(seed), []
    for i in range(count):
        (y, x), kinds = numbers.uniform(0, SIDE, (2, 6, 1, 1)), numbers.integers(0, 5, 6)
        label = kinds[np.hypot(Y - y, X - x).argmin(axis=0)].astype(np.uint8)
        picture, (row, column) = COLOURS[label] * numbers.uniform(0.95, 1.05), numbers.uniform(2, SIDE - 16, 2)
        is_odd = (np.abs(Y - row - 7) < 7) & (np.abs(X - column - 7) < (Y - row) / 2 + 1) & bool(looks)
        picture = np.where(is_odd[..., None], looks[i % len(looks)], picture) if looks else picture
        noisy = picture + numbers.normal(0, 0.01, picture.shape)
        made.append((np.clip(noisy * 255, 0, 255).astype(np.uint8), label, is_odd))
    return [np.stack(parts) for parts in zip(*made, strict=True)]


@pytest.mark.slow
def test_an_unseen_shape_is_told_by_comparing_better_than_by_the_segmenters_confidence():
    """From end to end; a plain grey picture in the place of the synthesis shows what comparing with anything tells.

    Of three seeds: the net that learns discrepancies 0.950, 0.956 and 0.916; cosines 0.894, 0.918 and 0.899; the
    confidence 0.853, 0.876 and 0.873. On another processor the latter two were 0.05 lower: rounding decides much.
    """
    cfg = synthcp.SynthCPConfig(
        num_labels=5,
        segmenter_blocks=(1, 1, 1, 1),
        segmenter_width=8,
        segmenter_head=16,
        scales=(2.0,),
        segment_steps=500,
        segment_rate=0.05,
        generator_widths=(24, 24, 16),
        upsamplings=2,
        spade_hidden=8,
        discriminator_widths=(8, 16),
        discriminator_scales=1,
        steps=200,
        learning_rate=4e-3,
        discriminator_rate=4e-3,
        comparator="discrepancy",
        compare_steps=200,
        compare_rate=1e-3,
        compare_width=16,
        batch_size=8,
        conv_impl="conv",
    )
    images, classes, _ = scenes(96, seed=0)
    data = from_arrays(images, train_classes=classes, holdout=images[:2])
    for progress in train.drive(synthcp.METHOD, jax.random.key(0), cfg, data.to_device().sources, patience=1e9):
        state = progress.state
    pictures, labels, odd = scenes(24, seed=1, looks=UNSEEN)
    pictures = jnp.asarray(pictures) / 255.0
    segmented = jax.jit(synthcp.segment)(state, pictures)
    made = jax.jit(synthcp.synthesise, static_argnums=2)(state, segmented.labels, pictures.shape[1:])

    def auroc(made, **fields):
        maps = jax.jit(synthcp.compare)(with_fields(state, **fields), pictures, segmented, made).map
        return metrics.image_metrics(np.asarray(maps).reshape(-1), odd.reshape(-1).astype(int))["auroc"]

    cosine = {"comparator": "feature", "gate": "none"}
    by_confidence, grey = auroc(made, comparator="feature", msp_threshold=-1.0), jnp.full_like(made, 0.5)
    by_cosine, by_net = auroc(made, **cosine), auroc(made)
    assert (np.asarray(segmented.labels) == labels)[~odd].mean() > 0.9
    assert by_cosine > 0.78 and by_cosine > by_confidence + 0.01 and by_cosine > auroc(grey, **cosine) + 0.3
    assert by_net > 0.88 and by_net > by_confidence + 0.03 and by_net > auroc(grey) + 0.2
