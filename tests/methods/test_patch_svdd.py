"""What makes Patch SVDD Patch SVDD: its networks and their published weights, pairs, losses, bank and maps."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import batch_of

from jaxad import metrics, runs, score, settings, shard, train
from jaxad.console import Console
from jaxad.core import Batch, Source, Spec, as_arrays, take
from jaxad.data.arrays import from_arrays
from jaxad.importers import WeightsError
from jaxad.methods import patch_svdd as method
from jaxad.methods.patch_svdd import Sizes
from jaxad.ops import bank, coverage

FULL = method.PatchSVDDConfig()
NUMBERS = np.random.default_rng(0)


def config(preset="tiny", **fields):
    return method.PatchSVDDConfig(**{**method.PRESETS[preset].config, **fields})


def initial(cfg, image, *, rows=3, seed=0):
    """An untrained detector, in one program."""
    return jax.jit(lambda key: method.init(key, as_arrays(cfg), Spec(image, {"train": rows})))(jax.random.key(seed))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- networks -----------------------------------------------------------------------------------------------------


def test_published_networks_have_the_published_number_of_parameters():
    state = jax.eval_shape(lambda: method.init(jax.random.key(0), FULL, Spec((256, 256, 3), {"train": 2})))
    small = state.params["encoder"]["small"]
    layers = [count(small[f"conv{i}"]) for i in range(1, 9)]
    assert layers == [896, 18_496, 73_856, 147_584, 73_792, 18_464, 9_248, 18_496] and sum(layers) == 360_832
    heads = [count(state.params["encoder"][f"large_{i}"]) for i in range(2)]
    assert heads == [32_896, 8_256] and count(state.params["encoder"]) == 401_984
    assert [count(state.params[f"classifiers_{name}"]) for name in Sizes._fields] == [25_864, 25_864]
    assert [b.shape for b in state.banks] == [(2, 169, 64), (2, 3249, 64)]


def test_initial_distributions_are_torchs():
    params = initial(FULL, (64, 64, 3)).params
    for kernel, fan_in in (
        (params["encoder"]["small"]["conv4"]["kernel"], 9 * 128),
        (params["encoder"]["small"]["conv4"]["bias"], 9 * 128),
        (params["encoder"]["large_0"]["kernel"], 4 * 64),
        (params["classifiers_small"]["kernel"], 128),
    ):
        assert 0.96 / math.sqrt(fan_in) < float(abs(kernel).max()) <= 1 / math.sqrt(fan_in)


def test_a_gain_of_the_kernels_lets_an_untrained_encoder_tell_patches_apart():
    """As torch draws it, the variance falls in every layer."""
    spreads, patches = {}, np.random.default_rng(1).uniform(-0.5, 0.5, (16, 64, 64, 3)).astype(np.float32)
    for gain in (1.0, 1.6):
        params = initial(dataclasses.replace(FULL, kernel_gain=gain), (64, 64, 3)).params
        embedded = crops(params["encoder"], patches, patches[:, :32, :32])
        spreads[gain] = float(embedded.small.std(axis=0).mean())
        own, size = params["encoder"]["small"]["conv4"], math.sqrt(9 * 128)
        assert float(abs(own["kernel"]).max()) * size == pytest.approx(gain, rel=1e-3)
        assert max(float(abs(x).max()) for x in (own["bias"], params["classifiers_small"]["Linear_1"]["bias"])) < 0.1
        assert float(abs(params["classifiers_small"]["kernel"]).max()) <= 1 / math.sqrt(128)
    assert spreads[1.6] > 10 * spreads[1.0], spreads


def naive(params, crop):
    """f_32 or f_64 of one patch by loops over layers, float64, channels last."""
    if len(crop) > 32:
        half = len(crop) // 2
        quarters = [crop[a : a + half, b : b + half] for a in (0, half) for b in (0, half)]
        x = np.concatenate([naive(params, quarter) for quarter in quarters])
        for layer in (params["large_0"], params["large_1"]):
            x = x @ layer["kernel"].astype(np.float64) + layer["bias"]
            x = np.where(x > 0, x, 0.1 * x) if layer is params["large_0"] else np.tanh(x)
        return x
    x = crop.astype(np.float64)
    for number in range(1, 9):
        kernel, bias = (params["small"][f"conv{number}"][name].astype(np.float64) for name in ("kernel", "bias"))
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(0, 1))
        windows = windows[:: 2 if number == 1 else 1, :: 2 if number == 1 else 1]
        x = np.einsum("hwcij,ijco->hwo", windows, kernel) + bias
        x = np.tanh(x) if number == 8 else np.where(x > 0, x, 0.1 * x)
    return x.reshape(-1)


@pytest.fixture(scope="module")
def encoder():
    """An untrained encoder of the full size and a picture that is no multiple of anything."""
    params = jax.tree.map(np.asarray, initial(FULL, (64, 64, 3)).params["encoder"])
    return params, NUMBERS.uniform(-0.5, 0.5, (2, 112, 128, 3)).astype(np.float32)


dense = jax.jit(lambda params, images: method.Encoder(FULL).apply({"params": params}, images, method="dense"))
crops = jax.jit(lambda params, *patches: method.Encoder(FULL).apply({"params": params}, *patches, method="crops"))


def test_the_whole_picture_at_once_equals_patch_by_patch(encoder):
    """At corners and within; cut-out patches in a batch too."""
    params, images = encoder
    found = dense(params, images)
    assert found.large.shape == (2, 4, 5, 64) and found.small.shape == (2, 21, 25, 64)
    for grid, patch, stride, places in (
        (found.large, 64, 16, [(0, 0), (3, 4), (1, 2)]),
        (found.small, 32, 4, [(0, 0), (20, 24), (7, 11)]),
    ):
        for row, column in places:
            crop = images[1, row * stride :, column * stride :][:patch, :patch]
            np.testing.assert_allclose(grid[1, row, column], naive(params, crop), atol=1e-5)
    cut = crops(params, images[:, 16:80, 48:112], images[:, 12:44, 20:52])
    np.testing.assert_allclose(cut.large, found.large[:, 1, 3], atol=1e-5)
    np.testing.assert_allclose(cut.small, found.small[:, 3, 5], atol=1e-5)


def test_the_last_row_of_a_patch_is_never_read(encoder):
    params, images = encoder
    for row, blind in ((31, True), (30, False)):  # of the patch that begins at row 0
        other = images.copy()
        other[:, row] += 1
        before, after = (dense(params, x).small[:, 0] for x in (images, other))
        assert bool((before == after).all()) == blind
    other = images.copy()
    other[:, 111], other[:, :, 127] = 9, 9
    assert all((a == b).all() for a, b in zip(dense(params, images), dense(params, other), strict=True))


def test_constant_pictures_embed_alike_everywhere_and_zero_weights_give_zero(encoder):
    params, images = encoder
    flat = dense(params, np.full_like(images, 0.3)).small
    np.testing.assert_allclose(flat, jnp.broadcast_to(flat[:, :1, :1], flat.shape), atol=1e-6)
    nothing = dense(jax.tree.map(np.zeros_like, params), images)
    assert all((np.asarray(x) == 0).all() for x in nothing)


@pytest.mark.parametrize("category", ["bottle", "screw", "leather"])
@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_published_encoders_give_what_torch_gives(shared, category, kind):
    weights = shared / "weights" / "patch_svdd"
    params = method.read_encoder(str(weights / f"{category}_enchier.{kind}"), FULL)
    with np.load(weights / "reference.npz", allow_pickle=False) as reference:
        patches = (reference[f"{category}_patches_uint8_nhwc"] / 255 - 0.5).astype(np.float32)
        found = crops(params, patches, patches[:, :32, :32])
        np.testing.assert_allclose(found.large, reference[f"{category}_emb64"], atol=1e-5)
        np.testing.assert_allclose(found.small, reference[f"{category}_emb32"], atol=1e-5)


def official_names(params):
    """A tree of encoder parameters under the official code's names, as torch lays them out."""
    arrays = {}
    for number, own in enumerate((params["small"][f"conv{i}"] for i in range(1, len(params["small"]) + 1)), start=1):
        arrays[f"enc.conv{number}.weight"] = own["kernel"].transpose(3, 2, 0, 1)
        arrays[f"enc.conv{number}.bias"] = own["bias"]
    for number, side in ((1, 2), (2, 1)):
        own = params[f"large_{number - 1}"]
        inputs = own["kernel"].shape[0] // side**2
        arrays[f"conv{number}.weight"] = own["kernel"].reshape(side, side, inputs, -1).transpose(3, 2, 0, 1)
        arrays[f"conv{number}.bias"] = own["bias"]
    return arrays


def make_source(rows, size, *, seed=0):
    """Stripes with noise: every patch differs from its neighbours."""
    numbers = np.random.default_rng(seed)
    wave = 120 + 60 * np.sin(np.arange(size)[:, None] * 0.9 + np.arange(size)[None] * 0.3)
    pixels = np.clip(wave[None, ..., None] + numbers.normal(0, 12, (rows, size, size, 3)), 0, 255).astype(np.uint8)
    return Source(image=jnp.asarray(pixels), label=jnp.zeros(rows, jnp.int32))


def test_imported_weights_replace_the_encoder_and_nothing_else(tmp_path):
    cfg = config(steps=0)
    other = jax.tree.map(np.asarray, initial(cfg, (32, 32, 3), seed=7).params["encoder"])
    np.savez(tmp_path / "encoder.npz", **official_names(other))
    cfg = dataclasses.replace(cfg, encoder_weights=str(tmp_path / "encoder.npz"))
    assert [phase.name for phase in method.phases(cfg)] == ["mean", "weights", "bank"]
    data = {"train": make_source(3, 32)}
    state = train.fit(method.METHOD, jax.random.key(0), cfg, data)[0]
    jax.tree.map(np.testing.assert_array_equal, dict(state.params["encoder"]), other)
    drawn = train.init(method.METHOD, jax.random.key(0), cfg, Spec((32, 32, 3), {"train": 3})).params
    jax.tree.map(np.testing.assert_array_equal, state.params["classifiers_small"], drawn["classifiers_small"])
    (tmp_path / "encoder.npz").unlink()  # a trained detector needs it no more
    jax.eval_shape(lambda: train.init(method.METHOD, jax.random.key(0), cfg, Spec((32, 32, 3), {"train": 3})))
    with pytest.raises(WeightsError, match="encoder.npz: cannot be read"):
        method.check(cfg, Spec((32, 32, 3), {"train": 3}))


def test_weights_of_another_network_are_refused(tmp_path):
    params = jax.tree.map(np.asarray, initial(config(), (32, 32, 3)).params["encoder"])
    np.savez(tmp_path / "tiny.npz", **official_names(params))
    with pytest.raises(WeightsError, match="enc.conv1.weight has shape"):
        method.check(dataclasses.replace(FULL, encoder_weights=str(tmp_path / "tiny.npz")), Spec((256, 256, 3), {}))


# --- pairs --------------------------------------------------------------------------------------------------------


def uniform(columns, *, rows=200_000, seed=0):
    return np.random.default_rng(seed).uniform(size=(rows, columns)).astype(np.float32)


def test_every_direction_by_hand():
    """First patch in the middle, least and largest distance: labels 0 to 7 as in the official code."""
    for label, direction in enumerate(
        itertools.chain([(-1, -1), (-1, 0), (-1, 1), (0, -1)], [(0, 1), (1, -1), (1, 0), (1, 1)])
    ):
        for far, pixels in ((0.0, 48), (0.999, 63)):
            numbers = jnp.asarray([[(label + 0.5) / 8, far, far, 0.5, 0.5]])
            first, second, found = method.position_pairs(numbers, size=(256, 256), patch=64, boundary="clip")
            assert found[0] == label and tuple(first[0]) == (96, 96)
            np.testing.assert_array_equal(second[0] - first[0], np.asarray(direction) * pixels)


@pytest.mark.parametrize("patch, clipped, vanished", [(64, 0.389, 0.0076), (32, 0.176, 0.0068)])
def test_partners_lie_three_quarters_to_nearly_a_patch_away_and_are_moved_onto_the_border(patch, clipped, vanished):
    first, second, label = method.position_pairs(uniform(5), size=(256, 256), patch=patch, boundary="clip")
    first, second, direction = np.asarray(first), np.asarray(second), np.asarray(method.DIRECTIONS)[np.asarray(label)]
    assert min(first.min(), second.min()) == 0 and max(first.max(), second.max()) == 256 - patch
    offset = second - first
    away = np.abs(offset)[(direction != 0) & (second > 0) & (second < 256 - patch)]
    assert away.min() == 3 * patch // 4 and away.max() == patch - 1
    assert (offset[direction == 0] == 0).all()
    beyond = first + direction * (3 * patch // 4 + np.floor(uniform(5)[:, 1:3] * (patch // 4)).astype(int))
    np.testing.assert_array_equal(second, np.clip(beyond, 0, 256 - patch))
    assert (beyond != second).any(axis=1).mean() == pytest.approx(clipped, abs=0.005)
    gone = ((offset == 0) & (direction != 0)).any(axis=1)
    assert gone.mean() == pytest.approx(vanished, abs=0.001)
    counts = np.bincount(np.asarray(label), minlength=8)
    assert ((counts - 25_000) ** 2 / 25_000).sum() < 24.3  # chi-square, 7 degrees of freedom, 0.1 %


def test_rejecting_draws_a_first_patch_whose_partner_fits():
    first, second, label = method.position_pairs(uniform(5), size=(256, 200), patch=64, boundary="reject")
    first, second = np.asarray(first), np.asarray(second)
    for corners in (first, second):
        assert (corners.min(axis=0) == 0).all() and (corners.max(axis=0) == [192, 136]).all()
    offset, direction = second - first, np.asarray(method.DIRECTIONS)[np.asarray(label)]
    assert set(np.unique(np.abs(offset)[direction != 0])) == set(range(48, 64))
    assert (np.sign(offset) == direction).all()


@pytest.mark.parametrize("patch, choices, same", [(64, 24, 0.0016), (32, 8, 0.0023)])
def test_near_pairs_are_uniform_over_all_offsets_but_none(patch, choices, same):
    first, second = (np.asarray(x) for x in method.near_pairs(uniform(3), size=(256, 256), patch=patch))
    inside = ((first >= 2) & (first <= 254 - patch)).all(axis=1)
    offsets, counts = np.unique((second - first)[inside], axis=0, return_counts=True)
    assert len(offsets) == choices and not (offsets == 0).all(axis=1).any()
    expected = counts.sum() / choices
    assert ((counts - expected) ** 2 / expected).sum() < {24: 49.7, 8: 24.3}[choices]  # chi-square, 0.1 %
    assert (first == second).all(axis=1).mean() == pytest.approx(same, abs=4e-4)
    assert second.min() == 0 and second.max() == 256 - patch


def test_patches_are_cut_where_the_pairs_say_and_only_position_pairs_get_noise():
    cfg = as_arrays(config())
    images = jnp.asarray(NUMBERS.uniform(size=(64, 32, 32, 3)), jnp.float32)
    draw = jax.jit(method.sample)
    noisy = draw(jax.random.key(1), cfg, images)
    plain = draw(jax.random.key(1), dataclasses.replace(cfg, colour_noise=0.0, pixel_noise=0.0), images)
    for patch, mine, bare in zip(method.patch_sizes(cfg), noisy, plain, strict=True):
        np.testing.assert_array_equal(mine.patches[:, 2:], bare.patches[:, 2:])
        views = np.lib.stride_tricks.sliding_window_view(np.asarray(images), (patch, patch), axis=(1, 2))
        views = views.transpose(0, 1, 2, 4, 5, 3).reshape(64, -1, patch, patch, 3)
        for part in range(4):  # each is a window of its own picture
            assert all((views[n] == np.asarray(bare.patches[n, part])).all(axis=(1, 2, 3)).any() for n in range(64))
        noise = np.asarray(mine.patches - bare.patches)[:, :2]
        by_channel = noise.mean(axis=(2, 3))
        assert by_channel.std() == pytest.approx(0.02, rel=0.15)
        assert (noise - by_channel[:, :, None, None]).std() == pytest.approx(0.02, rel=0.05)
        assert abs(np.corrcoef(by_channel[:, 0].ravel(), by_channel[:, 1].ravel())[0, 1]) < 0.25


# --- losses -------------------------------------------------------------------------------------------------------


def test_length_and_its_gradient_by_hand():
    value, slope = jax.value_and_grad(lambda x: method.safe_norm(x))(jnp.asarray([3.0, 4.0]))
    assert float(value) == 5.0
    np.testing.assert_allclose(slope, [0.6, 0.8])
    value, slope = jax.value_and_grad(lambda x: method.safe_norm(x))(jnp.zeros(2))
    assert float(value) == 0.0 and (np.asarray(slope) == 0).all()


def test_columns_of_the_last_layer_have_unit_length_over_the_outputs():
    kernel = NUMBERS.standard_normal((128, 8)).astype(np.float32)
    unit = np.asarray(method.unit_columns(kernel))
    np.testing.assert_allclose((unit**2).sum(axis=1), np.ones(128), rtol=1e-6)
    np.testing.assert_allclose(unit / kernel, np.broadcast_to((unit / kernel)[:, :1], unit.shape), rtol=1e-5)


@pytest.fixture(scope="module")
def fresh():
    """An untrained tiny detector."""
    return initial(config(), (32, 32, 3), seed=1)


IMAGES = jnp.asarray(NUMBERS.uniform(size=(6, 32, 32, 3)), jnp.float32)
losses = jax.jit(method.loss)
gradients = jax.jit(jax.grad(method.loss, has_aux=True))


def with_fields(state, **fields):
    return state._replace(cfg=as_arrays(dataclasses.replace(state.cfg, **fields)))


def test_loss_is_both_cross_entropies_plus_weighted_distances(fresh):
    cfg = with_fields(fresh, svdd_weight=0.7).cfg
    pairs = jax.jit(method.sample)(jax.random.key(0), cfg, IMAGES)
    total, parts = losses(fresh.params, cfg, pairs)
    expected = 0.0
    for name, pair in zip(Sizes._fields, pairs, strict=True):
        given = [np.asarray(pair.patches[:, part]) for part in range(4)]
        other = np.zeros((6, *(pairs.small if name == "large" else pairs.large).patches.shape[2:]), np.float32)
        network = jax.jit(
            lambda x, n=name, o=other: getattr(
                method.Encoder(fresh.cfg).apply(
                    {"params": fresh.params["encoder"]}, *((x, o) if n == "large" else (o, x)), method="crops"
                ),
                n,
            )
        )
        first, second, here, there = (np.asarray(network(x), np.float64) for x in given)
        own, x = jax.tree.map(np.asarray, fresh.params[f"classifiers_{name}"]), first - second
        for layer in ("Linear_0", "Linear_1"):
            x = x @ own[layer]["kernel"] + own[layer]["bias"]
            x = np.where(x > 0, x, 0.1 * x)
        logits = x @ (own["kernel"] / np.linalg.norm(own["kernel"], axis=1, keepdims=True)) + own["bias"]
        logs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        position = -logs[np.arange(6), np.asarray(pair.label)].mean()
        svdd = np.linalg.norm(here - there, axis=1).mean()
        np.testing.assert_allclose([parts[f"position_{name}"], parts[f"svdd_{name}"]], [position, svdd], rtol=1e-4)
        expected += position + 0.7 * svdd
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    without = losses(fresh.params, with_fields(fresh, svdd_weight=0.0).cfg, pairs)[0]
    np.testing.assert_allclose(without, parts["position_large"] + parts["position_small"], rtol=1e-6)


def test_zero_networks_know_nothing_and_identical_pairs_leave_gradients_finite(fresh):
    """ln 8 at uniform logits; on constant pictures all pairs are identical, where a plain norm's gradient is NaN."""
    cfg = with_fields(fresh, colour_noise=0.0, pixel_noise=0.0).cfg
    pairs = jax.jit(method.sample)(jax.random.key(0), cfg, jnp.full_like(IMAGES, 0.5))
    grads, parts = gradients(fresh.params, cfg, pairs)
    assert float(parts["svdd_large"]) == float(parts["svdd_small"]) == 0.0 and float(parts["spread_small"]) < 1e-6
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    _, parts = losses(jax.tree.map(jnp.zeros_like, fresh.params) | _unit_last(fresh), cfg, pairs)
    np.testing.assert_allclose([parts["position_large"], parts["position_small"]], [math.log(8)] * 2, rtol=1e-6)


def _unit_last(state):
    """Classifiers that give zeros; their last kernel must not be zero, for it is divided by its length."""
    names = [f"classifiers_{name}" for name in Sizes._fields]
    zero = {name: jax.tree.map(jnp.zeros_like, state.params[name]) for name in names}
    return {name: {**zero[name], "kernel": jnp.ones_like(zero[name]["kernel"])} for name in names}


def test_the_last_kernel_stays_as_drawn_unless_asked(fresh):
    pairs = jax.jit(method.sample)(jax.random.key(0), fresh.cfg, IMAGES)
    for train_last in (False, True):
        cfg = dataclasses.replace(fresh.cfg, train_last=train_last)
        grads = gradients(fresh.params, cfg, pairs)[0]["classifiers_small"]
        assert bool((grads["kernel"] != 0).any()) == train_last
        assert bool((grads["bias"] != 0).all()) and bool((grads["Linear_1"]["kernel"] != 0).any())


def test_adam_step_is_adams(fresh):
    fresh = fresh._replace(mean=IMAGES[0])
    batch = Batch(IMAGES, jnp.zeros(6, jnp.int32), jnp.zeros((6, 32, 32)), jnp.arange(6), jnp.ones(6, bool))
    after = jax.jit(method.train_step)(jax.random.key(5), fresh, batch)[0]
    pairs = jax.jit(method.sample)(jax.random.key(5), fresh.cfg, IMAGES - fresh.mean)
    slopes = gradients(fresh.params, fresh.cfg, pairs)[0]
    for before, moved, slope in zip(*map(jax.tree.leaves, (fresh.params, after.params, slopes)), strict=True):
        clear = abs(slope) > 1e-5
        np.testing.assert_allclose((before - moved)[clear], (1e-3 * jnp.sign(slope))[clear], rtol=2e-2, atol=2e-7)
    kernels = [p["classifiers_large"]["kernel"] for p in (fresh.params, after.params)]
    np.testing.assert_array_equal(*kernels)


# --- bank, search, maps -------------------------------------------------------------------------------------------


def brute_maps(state, images):
    """Both maps by loops over patches and pixels."""
    cfg, maps = state.cfg, {}
    embedded = jax.jit(method.embed)(state, images)
    strides = {"large": cfg.stride_large, "small": cfg.stride_small}
    for name, e, kept, patch in zip(Sizes._fields, embedded, state.banks, method.patch_sizes(cfg), strict=True):
        rows = np.asarray(kept, np.float64).reshape(-1, cfg.features)
        side, stride = math.isqrt(e.shape[1]), strides[name]
        found, hits = np.zeros((2, len(images), *images.shape[1:3]))
        for n in range(len(images)):
            for position, vector in enumerate(np.asarray(e[n], np.float64)):
                row, column = (stride * x for x in divmod(position, side))
                distance = np.sqrt(((rows - vector) ** 2).sum(axis=1).min())
                found[n, row : row + patch, column : column + patch] += distance
                hits[n, row : row + patch, column : column + patch] += 1
        maps[name] = found / hits
    return maps


@pytest.fixture(scope="module")
def untrained():
    """A detector with full banks whose encoder is as drawn."""
    data = {"train": make_source(5, 32)}
    return jax.jit(lambda: train.fit(method.METHOD, jax.random.key(0), config(steps=0), data)[0])(), data["train"]


def test_maps_are_mean_distances_of_all_patches_over_a_pixel_and_fused_by_pixel(untrained):
    state, _ = untrained
    images = take(make_source(2, 32, seed=9), jnp.arange(2))[0]
    encoder = method.Encoder(state.cfg)
    expected = encoder.apply({"params": state.params["encoder"]}, images - state.mean, method="dense")
    for found, grid in zip(jax.jit(method.embed)(state, images), expected, strict=True):
        np.testing.assert_allclose(found, grid.reshape(found.shape), atol=1e-6)
    maps = brute_maps(state, images)
    for fusion, expected in {
        **maps,
        "product": maps["large"] * maps["small"],
        "sum": maps["large"] + maps["small"],
    }.items():
        cfg = dataclasses.replace(state.cfg, fusion=fusion)
        scores = jax.jit(method.score)(state._replace(cfg=cfg), images)
        np.testing.assert_allclose(scores.map, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(scores.image, expected.max(axis=(1, 2)), rtol=1e-4)


def test_training_pictures_are_at_distance_zero_and_the_mean_picture_is_taken_off(untrained):
    state, source = untrained
    pictures = take(source, jnp.arange(5))[0]
    np.testing.assert_allclose(state.mean, pictures.mean(axis=0), atol=1e-6)
    found = jax.jit(method.distances)(state, pictures)
    assert max(float(x.max()) for x in found) < 1e-5
    others = jax.jit(method.distances)(state, take(make_source(2, 32, seed=9), jnp.arange(2))[0])
    assert min(float(x.mean()) for x in others) > 3e-3


def test_more_neighbours_average_their_distances(untrained):
    state, source = untrained
    pictures = take(source, jnp.arange(5))[0]
    two = jax.jit(method.distances)(state._replace(cfg=dataclasses.replace(state.cfg, neighbours=2)), pictures)
    rows = np.asarray(state.banks.large, np.float64).reshape(-1, 16)
    apart = np.sqrt(((rows[:, None] - rows[None]) ** 2).sum(axis=-1))
    expected = np.sort(apart, axis=1)[:, :2].mean(axis=1)  # itself, and the next
    np.testing.assert_allclose(np.asarray(two.large).ravel(), expected, rtol=1e-3, atol=1e-6)


def test_a_coreset_is_what_greedy_selection_by_hand_gives_and_is_all_that_is_searched(untrained):
    full, source = untrained
    cfg = config(steps=0, coreset=0.1)
    state = jax.jit(lambda: train.fit(method.METHOD, jax.random.key(0), cfg, {"train": source})[0])()
    for kept, whole in zip(state.banks, full.banks, strict=True):
        rows = np.asarray(whole, np.float64).reshape(-1, 16)
        chosen, nearest = [0], ((rows - rows[0]) ** 2).sum(axis=1)
        for _ in range(math.ceil(0.1 * len(rows)) - 1):
            chosen.append(int(nearest.argmax()))
            nearest = np.minimum(nearest, ((rows - rows[chosen[-1]]) ** 2).sum(axis=1))
        np.testing.assert_allclose(np.asarray(kept).reshape(-1, 16)[: len(chosen)], rows[chosen], atol=1e-6)
    pictures = take(source, jnp.arange(5))[0]
    rows, queries = (np.asarray(x, np.float64).reshape(-1, 16) for x in (state.banks.large, full.banks.large))
    expected = [np.sqrt(((rows[: math.ceil(0.1 * len(rows))] - q) ** 2).sum(axis=1).min()) for q in queries]
    found = jax.jit(method.distances)(state, pictures).large
    np.testing.assert_allclose(np.asarray(found).ravel(), expected, rtol=1e-3, atol=1e-5)


def test_a_coreset_of_half_filled_banks_holds_rows_that_count(untrained):
    state = untrained[0]._replace(filled=Sizes(*(f.at[:3].set(False) for f in untrained[0].filled)))
    state = state._replace(cfg=dataclasses.replace(state.cfg, coreset=0.1))
    thin = jax.jit(method.thin_banks)(jax.random.key(0), state)
    for kept, full, filled in zip(thin.banks, state.banks, thin.filled, strict=True):
        count = math.ceil(0.1 * filled.size)
        assert filled.reshape(-1)[:count].all()
        rows, allowed = kept.reshape(-1, 16)[:count], full[3:].reshape(-1, 16)
        assert (rows[:, None] == allowed[None]).all(axis=2).any(axis=1).all()


def test_k_centre_chooses_valid_rows_only_and_refuses_too_many():
    rows = jnp.asarray([[0.0], [10.0], [1.0], [6.0]])
    np.testing.assert_array_equal(bank.k_centre(rows, count=3), [0, 1, 3])
    valid = jnp.asarray([False, False, True, True])
    np.testing.assert_array_equal(bank.k_centre(rows, count=3, valid=valid)[:2], [2, 3])
    with pytest.raises(ValueError, match="count=5 of 4"):
        bank.k_centre(rows, count=5)


def test_spreading_by_hand():
    """An impulse at the first of the 13x13 patches of 64 pixels every 16."""
    impulse = jnp.zeros((1, 13, 13)).at[0, 0, 0].set(1)
    full = coverage.spread(impulse, size=(256, 256), patch=64, stride=16)[0]
    for at, value in (
        ((0, 0), 1),
        ((16, 0), 1 / 2),
        ((16, 16), 1 / 4),
        ((48, 48), 1 / 16),
        ((64, 64), 0),
        ((0, 64), 0),
    ):
        assert float(full[at]) == pytest.approx(value, abs=1e-6)
    ones = coverage.spread(jnp.ones((1, 13, 13)), size=(256, 256), patch=64, stride=16)
    np.testing.assert_allclose(ones, np.ones((1, 256, 256)), rtol=1e-6)
    assert int((coverage.coverage_operator(256, patch=32, stride=4)[128] > 0).sum()) == 8
    coarse = coverage.spread(impulse, size=(256, 256), patch=64, stride=16, every=4)[0]
    np.testing.assert_array_equal(jnp.repeat(jnp.repeat(coarse, 4, axis=0), 4, axis=1), full)


def test_pixels_behind_the_last_patch_repeat_the_last_that_is_covered():
    operator = coverage.coverage_operator(23, patch=8, stride=4)
    assert operator.shape == (23, 4)
    np.testing.assert_array_equal(operator[20:], np.broadcast_to(operator[19], (3, 4)))


@pytest.mark.parametrize("image", [(37, 50, 3), (40, 32, 1)])
def test_pictures_of_any_size_come_back_at_their_size(image):
    state = initial(config(), image)
    scores = jax.eval_shape(method.score, state, jnp.zeros((2, *image)))
    assert scores.map.shape == (2, *image[:2])


def test_a_collapsed_encoder_is_told(untrained):
    state, source = untrained
    step = jax.jit(method.bank_step)
    images = take(source, jnp.arange(5))[0]
    batch = Batch(images, jnp.zeros(5), jnp.zeros(images.shape[:3]), jnp.arange(5), jnp.arange(5) < 4)
    healthy = step(jax.random.key(0), state, batch)[1]
    assert float(healthy["collapsed"]) == 0 and float(healthy["spread_small"]) > 5e-3
    last = state.params["encoder"]["small"]["conv2"]
    flat = {**last, "kernel": last["kernel"] * 1e-4}
    encoder = {**state.params["encoder"], "small": {**state.params["encoder"]["small"], "conv2": flat}}
    told = step(jax.random.key(0), state._replace(params={**state.params, "encoder": encoder}), batch)[1]
    assert float(told["collapsed"]) == 1 and float(told["spread_small"]) < method.COLLAPSED


def test_a_run_with_a_collapsed_encoder_warns(tmp_path):
    """From weights to the console, as `jaxad train` does it."""
    healthy = jax.tree.map(np.asarray, initial(config(), (32, 32, 3)).params["encoder"])
    said = {}
    for name, scale in (("healthy", 1.0), ("collapsed", 1e-4)):
        arrays = official_names(healthy)
        arrays["enc.conv2.weight"] = arrays["enc.conv2.weight"] * np.float32(scale)
        np.savez(tmp_path / f"{name}.npz", **arrays)
        fields = {"steps": 0, "encoder_weights": str(tmp_path / f"{name}.npz")}
        chosen = settings.Settings(method="patch_svdd", preset="tiny", data="made", config=fields)
        console, said[name] = Console(quiet=True), []
        console.say = said[name].append
        data = from_arrays(np.asarray(make_source(6, 32).image), holdout=0.2)
        runs.train_run(chosen, data=data, console=console)
    assert not any("collapsed" in line for line in said["healthy"])
    assert any("bank: embeddings hardly differ" in line for line in said["collapsed"])


def test_spread_is_the_mean_standard_deviation_of_rows_that_count():
    vectors = NUMBERS.standard_normal((7, 5)).astype(np.float32)
    weight = np.asarray([1, 1, 0, 1, 1, 1, 0], np.float32)
    expected = vectors[weight > 0].std(axis=0).mean()
    np.testing.assert_allclose(method.spread_of(vectors, weight), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"boundary": "wrap"}, "expected one of"),
        ({"fusion": "max"}, "expected one of"),
        ({"stride_small": 3}, "stride_small=3, stride_large=4; expected the first to divide 8"),
        ({"stride_large": 3}, "expected the first to divide"),
        ({"widths": (8, 8, 8, 8)}, "patches of 40"),
        ({"boundary": "reject", "widths": (8, 8, 8)}, "at least 63 pixels"),
        ({"coreset": 0.0}, "expected a share"),
        ({"neighbours": 0}, "at least 1"),
        ({"encoder_weights": "nowhere.npz"}, "cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(fields, message):
    with pytest.raises(ValueError, match=message):
        method.check(config(**fields), Spec((32, 32, 3), {"train": 2}))


# --- learning -----------------------------------------------------------------------------------------------------


@pytest.mark.optimised
@pytest.mark.slow
def test_training_finds_pasted_defects_that_an_untrained_encoder_finds_less_well():
    """Textures with a square of another texture; no NaN in 500 steps."""
    normal, test = make_source(40, 32), make_source(20, 32, seed=5)
    pixels, mask = np.array(test.image), np.zeros((20, 32, 32), bool)
    for n in range(10):
        row, column = np.random.default_rng(n).integers(0, 24, 2)
        mask[n, row : row + 8, column : column + 8] = True
        pixels[n, row : row + 8, column : column + 8] = pixels[n, row : row + 8, column : column + 8].swapaxes(0, 1)
    label = mask.any(axis=(1, 2)).astype(np.int32)
    found = {}
    for steps in (0, 500):
        cfg = config(steps=steps)
        state, log = jax.jit(lambda c=cfg: train.fit(method.METHOD, jax.random.key(0), c, {"train": normal}))()
        scores = score.score_dataset(method.METHOD, state, Source(image=jnp.asarray(pixels), label=jnp.asarray(label)))
        found[steps] = (
            metrics.image_metrics(scores.map.ravel(), mask.ravel().astype(np.int32))["auroc"],
            metrics.image_metrics(scores.image, label)["auroc"],
        )
        assert all(np.isfinite(values).all() for phase in log.values() for values in phase.values())
    assert found[500][0] > 0.9 and found[500][0] > found[0][0], found


def test_devices_that_share_a_batch_exchange_gradients_only():
    """No patch, no random number and no embedding leaves the device of its picture."""
    cfg = method.PatchSVDDConfig(widths=(4, 4, 4), features=4, hidden=8, batch_size=8, steps=3)
    mesh, pictures = shard.data_mesh(jax.devices()[:4]), jnp.zeros((8, 40, 40, 3))
    key = jax.random.key(0)
    state = train.init(method.METHOD, key, cfg, Spec((40, 40, 3), {"train": 8}))
    arguments = shard.replicate((key, state), mesh), jax.device_put(batch_of(pictures), shard.split(mesh))
    step = jax.jit(lambda own, batch: method.train_step(*own, batch)[0].params)
    assert set(shard.collectives(step.lower(*arguments).compile())) == {"all-reduce"}
