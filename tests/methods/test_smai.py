"""What makes SMAI SMAI: nothing leaks from what is hidden, regions are scored by what fills them, masks as at test."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import batch_of

from jaxad import metrics, score, train
from jaxad.core import Source, Spec, as_arrays, spec_of
from jaxad.methods import smai
from jaxad.nn.init import init_flat
from jaxad.nn.inpainting import InpaintingUNet, PartialConv
from jaxad.ops import similarity, superpixels

SMALL = {"widths": (4,), "grids": (4, 2), "dilate": 1, "batch_size": 4, "steps": 12, "conv_impl": "conv"}
SHAPE = (16, 16, 3)
COLOURS = {"one_by_one": None, "coloured2": 2, "coloured3": 3, "coloured4": 4}

examine = jax.jit(smai.examine, static_argnums=1)


def config(**fields):
    return smai.SMAIConfig(**{**SMALL, **fields})


def images_of(count, shape=SHAPE, seed=0):
    """Blocks of colour under noise: superpixels that are not squares."""
    numbers = np.random.default_rng(seed)
    blocks = np.kron(numbers.uniform(size=(count, shape[0] // 4, shape[1] // 4, shape[2])), np.ones((1, 4, 4, 1)))
    rolled = np.roll(blocks, 2, axis=(1, 2))
    return jnp.asarray(np.clip(rolled + numbers.normal(0, 0.05, rolled.shape), 0, 1), jnp.float32)


def fix_superpixels(monkeypatch, images):
    """Has the superpixels of a test's pictures computed once, not in each of its programs: that is most of them."""
    known = superpixels.slic(images, grid=4)
    monkeypatch.setattr(smai, "superpixels_of", lambda cfg, images, grid: known)


@functools.cache
def initial(cfg, shape=SHAPE, seed=0):
    state = jax.jit(lambda key: smai.init(key, as_arrays(cfg), Spec(shape, {})))(jax.random.key(seed))
    numbers = np.random.default_rng(1)
    # Variances as small as those of trained maps, or nothing would be left of the picture in the last one.
    stats = jax.tree.map(lambda x: 0.05 * x + numbers.uniform(-0.01, 0.01, x.shape).astype("f"), state.batch_stats)
    return state._replace(batch_stats=stats)


def with_fields(state, **fields):
    return state._replace(cfg=as_arrays(dataclasses.replace(state.cfg, **fields)))


# --- nothing leaks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grouping, grid, conv",
    [
        ("one_by_one", 4, "plain"),
        ("coloured2", 4, "plain"),
        ("coloured3", 8, "plain"),
        ("coloured4", 8, "plain"),
        ("coloured3", 4, "partial"),
    ],
)
def test_nothing_of_a_superpixel_reaches_its_own_restoration(grouping, grid, conv):
    """To the bit: every pixel of one class changes, and no pixel of the class is restored differently."""
    state, cfg = initial(config(conv=conv, widths=(4, 6, 8))), config(conv=conv, widths=(4, 6, 8), grouping=grouping)
    images, colours = images_of(1, (32, 32, 3)), COLOURS[grouping]
    labels = superpixels.slic(images, grid=grid)
    home = np.kron(np.arange(grid**2).reshape(grid, grid), np.ones((32 // grid, 32 // grid)))
    assert len(np.unique(labels)) == grid**2 and (np.asarray(labels[0]) != home).any()
    classes = labels if colours is None else superpixels.colour_classes(labels, grid=grid, colours=colours)
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    @jax.jit
    def restore(images):
        def fill(x, hidden):
            return smai.network(cfg).apply(variables, x * 2 - 1, hidden, train=False)

        return smai.restore(cfg, fill, images, labels, grid)

    before = np.asarray(restore(images))
    for k in np.unique(classes):
        mine = np.asarray(classes == k)
        after = np.asarray(restore(jnp.where(mine[..., None], 1 - images, images)))
        np.testing.assert_array_equal(after[mine], before[mine])
        assert (after != before).any()  # the others do see it


def test_dilation_hides_what_is_around_superpixels_but_does_not_score_it():
    """Restored with the same network, a superpixel does not depend on the pixels beside it either."""
    cfg, images = config(grids=(4,), grouping="one_by_one", dilate=2), images_of(1)
    labels = superpixels.slic(images, grid=4)
    mine = np.asarray(labels == 5)
    around = np.asarray(superpixels.dilate(labels == 5, pixels=2)) & ~mine

    @jax.jit
    def restore(images):
        def mean(x, hidden):
            return jnp.where(hidden[..., None], 0.0, x).sum((1, 2), keepdims=True) + 0 * x

        return smai.restore(cfg, mean, images, labels, 4)

    before, after = np.asarray(restore(images)), np.asarray(restore(jnp.where(around[..., None], 1 - images, images)))
    np.testing.assert_array_equal(after[mine], before[mine])
    assert (after[around] != before[around]).any()


@pytest.mark.parametrize("passes", [1, 3, 100])
def test_every_class_is_restored_in_its_own_pass_however_many_share_one(passes):
    """`fill` writes how many pixels are hidden: each pixel then says how large its class is, dilated."""
    for grouping in ("one_by_one", "coloured3"):
        cfg, images = config(grouping=grouping, passes=passes), images_of(2)
        labels = superpixels.slic(images, grid=4)
        fill = lambda x, hidden: jnp.broadcast_to(hidden.sum((1, 2))[:, None, None, None] * 1.0, x.shape)  # noqa: E731
        restored = jax.jit(functools.partial(smai.restore, cfg, fill, grid=4))(images, labels)
        classes = labels if grouping == "one_by_one" else superpixels.colour_classes(labels, grid=4, colours=3)
        for k in range(int(classes.max()) + 1):
            wide = np.asarray(superpixels.dilate(classes == k, pixels=1))
            for own, mine, values in zip(wide, np.asarray(classes == k), np.asarray(restored), strict=True):
                assert mine.any() and (values[mine] == own.sum()).all()


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", ["gms", "ssim", "l2"])
@pytest.mark.parametrize("pixel_map", ["region", "pixel"])
def test_a_network_that_knows_the_picture_scores_zero(residual, pixel_map, monkeypatch):
    cfg, images = config(grids=(4,), residual=residual, pixel_map=pixel_map, calibrate="none"), images_of(2)
    fix_superpixels(monkeypatch, images)
    scores = uncalibrated(cfg, examine(cfg, lambda x, hidden: x, images))
    np.testing.assert_allclose(scores.image, 0, atol=1e-5)
    np.testing.assert_allclose(scores.map, 0, atol=1e-5)


def test_a_network_that_gives_zero_scores_the_mean_square_of_each_superpixel():
    cfg, images = config(residual="l2", calibrate="none", grids=(4,)), images_of(2)
    looks = examine(cfg, lambda x, hidden: 0 * x, images)
    scores = uncalibrated(cfg, looks)
    squares = np.asarray((images**2).mean(axis=-1))
    for row in range(2):
        labels = np.asarray(looks[0].labels[row])
        for k in np.unique(labels):
            np.testing.assert_allclose(
                np.asarray(scores.map[row])[labels == k], squares[row][labels == k].mean(), rtol=1e-5
            )


def uncalibrated(cfg, looks):
    return smai.scores_of(cfg, looks, [None] * len(looks))


def by_hand():
    """A picture of four squares, one pixel of which is wrong, and what each square should be."""
    rows = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 8]]
    picture = jnp.asarray(rows, jnp.float32)[None, ..., None]
    return picture, jnp.asarray(np.kron([[1, 2], [3, 4]], np.ones((2, 2))), jnp.float32)[None, ..., None]


def test_numbers_worked_by_hand(monkeypatch):
    picture, oracle = by_hand()
    home = jnp.asarray(np.kron([[0, 1], [2, 3]], np.ones((2, 2), np.int32)), jnp.int32)[None]
    monkeypatch.setattr(smai, "superpixels_of", lambda cfg, images, grid: home)
    cfg = config(grids=(2,), residual="l2", calibrate="none")
    looks = examine(cfg, lambda x, hidden: jnp.broadcast_to(oracle, x.shape), picture)
    np.testing.assert_allclose(looks[0].values, [[0, 0, 0, 4]], atol=1e-6)
    scores = uncalibrated(cfg, looks)
    np.testing.assert_allclose(scores.image, [4], atol=1e-6)
    np.testing.assert_allclose(scores.map[0], np.where(home[0] == 3, 4, 0), atol=1e-6)
    top = uncalibrated(dataclasses.replace(cfg, image_score="top5"), looks)
    np.testing.assert_allclose(top.image, [1], atol=1e-6)  # the mean of all four


def test_calibration_is_by_position_and_leaves_empty_superpixels_out():
    cfg = config(grids=(2,), position_floor=0.5)
    values = jnp.asarray([[1.0, 0, 5, 2], [3.0, 4, 5, 2], [2.0, 6, 5, 8]])
    counts = jnp.asarray([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    found = smai.Look(jnp.zeros((3, 16, 16), jnp.int32), None, None, values, counts)
    state = initial(cfg)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smai, "look", lambda state, images: (found,))
        state, _ = smai.calibrate_step(None, state, batch_of(images_of(3), valid=[True, True, False]))
    np.testing.assert_allclose(state.positions[0].count, [2, 1, 2, 2])
    np.testing.assert_allclose(state.positions[0].mean, [2, 4, 5, 2])
    # Deviations 1, 0, 0, 0: a floor of 0.5 * 0.25.
    expected = (values - jnp.asarray([2.0, 4, 5, 2])) / (jnp.asarray([1.0, 0, 0, 0]) + 0.125)
    np.testing.assert_allclose(smai.calibrated(cfg, values, state.positions[0]), expected, rtol=1e-5)


def test_one_superpixel_is_restored_from_nothing():
    for conv in ("plain", "partial"):
        state = with_fields(initial(config(conv=conv)), grids=(1,))
        looks = jax.jit(smai.look)(state, images_of(2))
        assert bool(jnp.isfinite(uncalibrated(config(calibrate="none"), looks).map).all())
        np.testing.assert_array_equal(looks[0].restored[0], looks[0].restored[1])  # whatever the picture


@pytest.mark.parametrize(
    "fields", [{"pixel_map": "pixel"}, {"image_score": "top5"}, {"residual": "ssim"}, {"grouping": "one_by_one"}]
)
def test_flags_of_scoring_change_scores(fields, monkeypatch):
    fix_superpixels(monkeypatch, images := images_of(3))
    base = initial(config(grids=(4,), calibrate="none"))
    ours, theirs = (
        jax.jit(lambda state: smai.score(state, images))(state) for state in (base, with_fields(base, **fields))
    )
    assert not np.allclose(ours.image, theirs.image, rtol=1e-3)
    assert bool(jnp.isfinite(theirs.map).all())


# --- training -----------------------------------------------------------------------------------------------------


COUNT = 64


@functools.partial(jax.jit, static_argnums=2)
def draw_hidden(cfg, numbers, grid=4):
    return smai.draw_hidden(cfg, numbers, jnp.repeat(images_of(1), COUNT, axis=0), grid)


def hidden_of(**fields):
    """What is hidden of one picture, drawn 64 times: (masks, its superpixels, the numbers that decided)."""
    numbers = np.random.default_rng(0).uniform(size=(COUNT, 4 * 4 + 3)).astype(np.float32)
    hidden = draw_hidden(as_arrays(config(**fields)), jnp.asarray(numbers))
    return np.asarray(hidden), np.asarray(superpixels.slic(images_of(1), grid=4))[0], numbers


def test_at_random_one_up_to_a_share_of_superpixels_is_hidden():
    hidden, labels, _ = hidden_of(colour_share=0.0, largest_share=0.25, dilate=0)
    found = []
    for mask in hidden:
        mine = np.unique(labels[mask])
        assert (mask == np.isin(labels, mine)).all()  # whole ones
        found.append(len(mine))
    assert set(found) == {1, 2, 3, 4}


def test_the_colours_of_scoring_are_hidden_in_training():
    for grouping, colours in (("coloured2", 2), ("coloured3", 3), ("one_by_one", 3)):
        hidden, labels, numbers = hidden_of(colour_share=1.0, grouping=grouping, dilate=0)
        classes = np.asarray(superpixels.colour_classes(jnp.asarray(labels), grid=4, colours=colours))
        for mask, colour in zip(hidden, numbers[:, 17], strict=True):
            np.testing.assert_array_equal(mask, classes == int(colour * colours**2))


def test_a_share_of_pictures_has_a_colour_hidden_and_the_others_some_at_random():
    coloured, at_random, both = (hidden_of(colour_share=share, dilate=0) for share in (1.0, 0.0, 0.3))
    is_coloured = both[2][:, 18] < 0.3
    assert 10 < is_coloured.sum() < COUNT - 10
    np.testing.assert_array_equal(both[0], np.where(is_coloured[:, None, None], coloured[0], at_random[0]))
    wide = hidden_of(colour_share=0.3, dilate=1)
    np.testing.assert_array_equal(wide[0], superpixels.dilate(jnp.asarray(both[0]), pixels=1))


def test_both_scales_are_trained_on():
    cfg, images = as_arrays(config(colour_share=1.0, dilate=0)), images_of(4)
    seen, view = set(), jax.jit(smai.view)
    fine, coarse = (
        np.asarray(superpixels.colour_classes(superpixels.slic(images, grid=g), grid=g, colours=n))
        for g, n in ((4, 3), (2, 2))
    )
    for t in range(8):
        hidden = np.asarray(view(jax.random.key(t), cfg, images)[1])
        whole = [
            all(any((mask == (own == k)).all() for k in range(9)) for mask, own in zip(hidden, classes, strict=True))
            for classes in (fine, coarse)
        ]
        assert any(whole)
        seen.add(tuple(whole))
    assert {(True, False), (False, True)} <= seen


def test_pictures_are_flipped_and_turned_as_permitted():
    images, numbers = (
        images_of(8),
        jnp.asarray([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)], jnp.float32),
    )
    for kind, ways in (("none", 1), ("flip", 2), ("dihedral", 8)):
        made = smai.augmented(config(augment=kind), numbers, jnp.repeat(images[:1], 8, axis=0))
        assert len(np.unique(np.asarray(made).reshape(8, -1), axis=0)) == ways
    np.testing.assert_array_equal(
        smai.augmented(config(augment="flip"), numbers[:1], images[:1])[0], images[0, :, ::-1]
    )


def test_the_loss_counts_hidden_pixels_alone():
    """Worked with a network of zeros: what is filled in is 0 in [-1, 1], grey."""
    state, images, loss = initial(config()), images_of(2), jax.jit(smai.loss)
    params = jax.tree.map(jnp.zeros_like, state.params)
    hidden = jnp.zeros((2, 16, 16), bool).at[0, 2:7, 3:9].set(True).at[1, 8:, 8:].set(True)
    target = np.asarray(images) * 2 - 1
    for kind, power in (("l2", 2), ("l1", 1)):
        cfg = dataclasses.replace(state.cfg, loss=kind)
        total, (_, found) = loss(params, state.batch_stats, cfg, images, hidden)
        expected = (abs(target) ** power).mean(axis=-1)[np.asarray(hidden)].mean()
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        np.testing.assert_allclose(found["hidden"], hidden.mean(), rtol=1e-6)
    total, (_, found) = loss(params, state.batch_stats, state.cfg, images, hidden)
    composite = jnp.where(hidden[..., None], 0.5, images)
    ssim, gms = (
        1 - np.asarray(jax.jit(alike)(composite, images))[np.asarray(hidden)].mean()
        for alike in (similarity.ssim_map, similarity.ms_gms_map)
    )
    np.testing.assert_allclose([found["ssim"], found["gms"]], [ssim, gms], rtol=1e-4)
    np.testing.assert_allclose(total, found["error"] + ssim + gms, rtol=1e-4)
    nothing, _ = loss(params, state.batch_stats, state.cfg, images, jnp.zeros_like(hidden))
    assert float(nothing) == 0


def textures(count, seed, *, defects):
    """Stripes whose phase and slope vary, with a spot of other stripes on every second picture."""
    numbers = np.random.default_rng(seed)
    y, x = np.indices((32, 32))
    images, masks = [], np.zeros((count, 32, 32), np.uint8)
    for row in range(count):
        phase, slope = numbers.uniform(0, 6.3), numbers.uniform(0.9, 1.1)
        wave = np.sin(0.8 * (x + slope * y) + phase)
        if defects and row % 2:
            top, left = numbers.integers(4, 20, 2)
            masks[row, top : top + 7, left : left + 7] = 1
            wave = np.where(masks[row], np.sin(0.8 * (x - y) + phase), wave)
        image = 0.5 + 0.3 * wave[..., None] * [1, 0.8, 0.6]
        images.append(np.clip(image + numbers.normal(0, 0.02, image.shape), 0, 1))
    pixels = np.rint(np.stack(images) * 255).astype(np.uint8)
    return Source(image=jnp.asarray(pixels), label=jnp.asarray(masks.max(axis=(1, 2)), jnp.int32), mask=masks)


@pytest.mark.optimised
@pytest.mark.slow
def test_it_learns_textures_and_finds_spots_of_others():
    """Spots have the colours of the rest."""
    data, test = {"train": textures(64, 0, defects=False)}, textures(32, 1, defects=True)
    cfg = smai.SMAIConfig(**{**smai.PRESETS["tiny"].config, "grids": (8, 4), "residual": "gms"})
    start = jax.jit(lambda key: train.init(smai.METHOD, key, as_arrays(cfg), spec_of(data)))(jax.random.key(0))
    *_, last = (progress.state for progress in train.drive(smai.METHOD, jax.random.key(0), cfg, data))
    found = [score.score_dataset(smai.METHOD, state, test).map.ravel().astype(np.float64) for state in (start, last)]
    untrained, trained = (metrics.image_metrics(maps, test.mask.ravel())["auroc"] for maps in found)
    assert trained > 0.9 and trained > untrained + 0.2, (untrained, trained)


# --- the network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset, parameters", [("image", 19_593_411), ("small", 4_903_011)])
def test_networks_have_the_specified_number_of_parameters(preset, parameters):
    cfg = smai.SMAIConfig(**smai.PRESETS[preset].config)
    state = jax.eval_shape(lambda: smai.init(jax.random.key(0), cfg, Spec((256, 256, 3), {})))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) == parameters
    scores = jax.eval_shape(smai.score, state, jnp.zeros((2, 256, 256, 3)))
    assert scores.image.shape == (2,) and scores.map.shape == (2, 256, 256)


def test_a_partial_convolution_that_sees_all_is_a_plain_one_inside():
    numbers = np.random.default_rng(0)
    x, kernel = (jnp.asarray(numbers.normal(size=s), jnp.float32) for s in ((2, 6, 7, 3), (3, 3, 3, 4)))
    params = {"params": {"kernel": kernel, "bias": jnp.arange(4.0)}}
    partial, seen = PartialConv(4, impl="conv").apply(params, x, jnp.ones((2, 6, 7, 1)))
    plain = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(partial[:, 1:-1, 1:-1], (plain + jnp.arange(4.0))[:, 1:-1, 1:-1], atol=1e-5)
    np.testing.assert_allclose(partial[:, 0, 3], plain[:, 0, 3] * 9 / 6 + jnp.arange(4.0), atol=1e-5)
    assert bool((seen == 1).all())


def test_a_partial_convolution_counts_what_it_sees():
    x = jnp.full((1, 5, 5, 2), 3.0)
    seen = jnp.zeros((1, 5, 5, 1)).at[0, 1, 1].set(1.0)
    params = {"params": {"kernel": jnp.ones((3, 3, 2, 1)), "bias": jnp.full(1, 0.5)}}
    outputs, updated = PartialConv(1, impl="conv").apply(params, x * seen, seen)
    near = np.zeros((5, 5))
    near[:3, :3] = 1  # windows that hold the one pixel seen
    np.testing.assert_allclose(outputs[0, ..., 0], near * (3 * 2 * 9 + 0.5), rtol=1e-6)
    np.testing.assert_array_equal(updated[0, ..., 0], near)


def test_networks_do_not_see_what_is_hidden():
    images, hidden = images_of(1), jnp.zeros((1, 16, 16), bool).at[0, 4:12, 4:12].set(True)
    for conv in ("plain", "partial"):
        net = InpaintingUNet((4, 6, 8), conv, impl="conv")
        variables = jax.jit(lambda key, n=net: init_flat(key, n, images, hidden, train=True))(jax.random.key(0))
        apply = jax.jit(lambda x, n=net, v=variables: n.apply(v, x, hidden, train=False))
        outputs = [apply(jnp.where(hidden[..., None], value, images)) for value in (0.0, 7.0, jnp.nan)]
        np.testing.assert_array_equal(outputs[0], outputs[1])
        np.testing.assert_array_equal(outputs[0], outputs[2])


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, shape, message",
    [
        ({"grouping": "coloured5"}, SHAPE, "grouping='coloured5' is unknown; expected one of"),
        ({}, (3, 16, 16, 3), "samples are .*expected pictures"),
        ({"grids": (3,)}, SHAPE, "not be divided into grids of"),
        ({"widths": (4, 4, 4, 4, 4, 4)}, SHAPE, "cannot be halved as often"),
        ({"grids": ()}, SHAPE, "expected at least one grid"),
        ({"augment": "dihedral"}, (16, 32, 3), "expected square ones"),
        ({"pixel_map": "pixel", "image_score": "top5"}, SHAPE, "has none; expected 'max'"),
        ({"calibrate": "holdout"}, SHAPE, "no held-out normals"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, shape, message):
    with pytest.raises(ValueError, match=message):
        smai.check(config(**fields), Spec(shape, {"train": 4}))
