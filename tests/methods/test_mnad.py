"""What makes MNAD MNAD: published sizes, items moved by queries and never by gradients, adaptation in order, scores."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import batch_of

from jaxad import adaptation, methods, metrics, runs, score, shard, sweep, train
from jaxad.core import Scores, Source, Spec, as_arrays, take
from jaxad.data import load, video
from jaxad.methods import mnad
from jaxad.ops import prototypes

SMALL = {"widths": (4, 6), "num_items": 4, "batch_size": 4, "steps": 10, "conv_impl": "conv"}
CLIP = (3, 8, 12, 2)
# Two pairs of items, close to each other within a pair: a query of one item can be the most similar to the other's.
ITEMS = jnp.asarray(
    [[1, 0.2, 0, -1, 0.3, 0.1], [1, 0, 0.2, -1, 0.1, 0.3], [-1, 0.5, 1, 0, 0.2, -0.4], [-1, 0.3, 1, 0.2, 0, -0.4]]
)


def config(**fields):
    return mnad.MNADConfig(**{**SMALL, **fields})


@functools.cache
def _initial(cfg, image, seed):
    return jax.jit(lambda key: mnad.init(key, as_arrays(cfg), Spec(image, {})))(jax.random.key(seed))


def initial(cfg, image=CLIP, seed=0):
    return _initial(cfg, image, seed)


def images_of(count, image=CLIP, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(0, 1, (count, *image)), jnp.float32)


step = jax.jit(mnad.train_step)
looked = jax.jit(mnad.look)
ordered = jax.jit(mnad.score_in_order)


def with_fields(state, **fields):
    return state._replace(cfg=as_arrays(dataclasses.replace(state.cfg, **fields)))


@pytest.fixture(scope="module")
def trained():
    """Items, normalisation and statistics of pictures, so that frames differ in all that is scored."""
    state, images = initial(config()), images_of(12)
    for t in range(4):
        state, _ = step(jax.random.key(0), state, batch_of(images[2 * t : 2 * t + 4]))
    return jax.jit(mnad.statistics_step)(jax.random.key(0), state, batch_of(images[:4]))[0]


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, image, encoder, decoder, buffers",
    [
        ("prediction", (5, 256, 256, 3), 4_694_400, 10_957_443, 8_576),
        ("reconstruction", (256, 256, 3), 4_689_216, 12_507_075, 9_472),
    ],
)
def test_published_networks_have_the_published_number_of_parameters(preset, image, encoder, decoder, buffers):
    """Less the 1024 parameters and 1024 buffers of a batch normalisation that the official code never calls."""
    cfg = mnad.MNADConfig(**mnad.PRESETS[preset].config)
    state = jax.eval_shape(lambda: mnad.init(jax.random.key(0), cfg, Spec(image, {})))
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in state.params.items()}
    assert counts == {"encoder": encoder - 1024, "decoder": decoder}
    assert sum(leaf.size for leaf in jax.tree.leaves(state.batch_stats)) == buffers - 1024
    assert state.items.shape == (10, 512)
    scores = jax.eval_shape(lambda s: mnad.score(s, jnp.zeros((2, *image))), state)
    assert scores.image.shape == (2,) and scores.map.shape == (2, 256, 256)


def test_items_start_as_unit_vectors_close_to_each_other():
    items = np.asarray(initial(config(widths=(4, 512), num_items=10)).items)
    np.testing.assert_allclose(np.linalg.norm(items, axis=1), 1, rtol=1e-5)
    cosines = (items @ items.T)[np.triu_indices(10, 1)]
    assert abs(cosines.mean() - 0.75) < 0.01 and (items >= 0).all()  # uniform on [0, 1): (1/4) / (1/3)


def test_the_last_frame_is_predicted_from_those_before():
    images = images_of(2)
    x, target = mnad.frames(images)
    np.testing.assert_allclose(target, 2 * images[:, 2] - 1, atol=1e-6)
    assert x.shape == (2, 8, 12, 4)
    for t in range(2):
        np.testing.assert_allclose(x[..., 2 * t : 2 * t + 2], 2 * images[:, t] - 1, atol=1e-6)
    x, target = mnad.frames(images[:, 0])
    np.testing.assert_array_equal(x, target)


def test_clips_drop_the_first_labels_of_every_video():
    """Clips of 5 whose last frame is scored: the first 4 frames of each video have no score."""
    labels = np.arange(8 + 6)
    starts, _ = video.starts(["a"] * 8 + ["b"] * 6, 5, 1)
    data = mnad.PRESETS["prediction"].data
    image = np.broadcast_to(labels.astype(np.uint8)[:, None, None, None], (14, 8, 8, 1))
    clips = {"start": jnp.asarray(starts), "clip": data["clip"], "target": data["target"]}
    source = Source(image=jnp.asarray(image), label=jnp.asarray(labels), **clips)
    images, found, _ = take(source, jnp.arange(len(source)))
    assert found.tolist() == [4, 5, 6, 7, 12, 13]
    target = mnad.frames(images)[1]
    np.testing.assert_allclose((target[:, 0, 0, 0] + 1) / 2 * 255, found, atol=1e-4)


def test_ped2_gives_176_scores_for_each_video_of_180_frames(shared):
    data = load(shared / "data" / "ucsd_ped2", image_size=(16, 24), channels=1, clip=5, target=4)
    assert len(data.sources["test"]) == 3 * 176
    assert data.rows["test"].files[0].endswith("/004.jpg")


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learnable", [False, True])
def test_no_gradient_reaches_the_memory_unless_it_is_learnable(learnable):
    cfg, images = config(learnable_items=learnable), images_of(4)
    state = initial(cfg)

    def of_items(items):
        return mnad.loss(*mnad._variables(state._replace(items=items)), state.cfg, images)[0]

    gradient = jax.jit(jax.grad(of_items))(state.items)
    assert bool((gradient != 0).any()) == learnable
    moments = state.optimizer.mu
    assert ("memory" in moments) == learnable
    after, _ = step(jax.random.key(0), state, batch_of(images))
    np.testing.assert_allclose(np.linalg.norm(after.items, axis=1), 1, rtol=1e-5)
    moved = float(abs(after.items - state.items).max())
    assert 0 < moved < 1e-3 if learnable else moved > 0.1  # a step of Adam, or nearly a mean of queries


@pytest.mark.parametrize("norm", ["all", "assigned"])
@pytest.mark.parametrize("scope", ["batch", "frame"])
def test_a_step_loses_against_the_old_items_and_leaves_new_ones(norm, scope):
    state, images = initial(config(update_norm=norm, update_scope=scope)), images_of(4)
    after, log = step(jax.random.key(0), state, batch_of(images))
    variables = {"params": state.params, "batch_stats": state.batch_stats, "memory": {"items": state.items}}
    x, target = mnad.frames(images)
    apply = jax.jit(lambda v, x: mnad.Network(state.cfg, 2).apply(v, x, train=True, mutable=["batch_stats"])[0])
    outcome = apply(variables, x)
    queries = outcome.queries.reshape(-1, 6)
    expected = state.items
    for part in [queries] if scope == "batch" else outcome.queries:
        expected = prototypes.update(expected, part, prototypes.match(part, expected), norm=norm)
    np.testing.assert_allclose(after.items, expected, atol=1e-5)
    matches = prototypes.match(queries, state.items)
    pixels = float(jnp.mean((outcome.rebuilt - target) ** 2))
    pull = float(prototypes.compactness(matches, features=6).mean())
    push = float(prototypes.separateness(matches).mean())
    np.testing.assert_allclose(log["loss"], pixels + 0.1 * pull + 0.1 * push, rtol=1e-4)
    counts = np.asarray(prototypes.assigned(matches))
    shares = counts[counts > 0] / counts.sum()
    assert float(log["items_used"]) == (counts > 0).sum()
    np.testing.assert_allclose(log["largest_share"], shares.max(), rtol=1e-5)
    np.testing.assert_allclose(log["assignment_entropy"], -(shares * np.log(shares)).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flag",
    [
        {"update_norm": "assigned"},
        {"update_scope": "frame"},
        {"grad_read": True},
        {"feature_dist": "l2"},
        {"skips": False},
        {"memory": False},
    ],
    ids=lambda flag: "=".join(map(str, *flag.items())),
)
def test_every_flag_changes_what_two_steps_do(flag):
    def run(cfg):
        # Items in all directions, so that each has queries and is near to some of the others' too.
        state = initial(cfg, seed=2)._replace(items=prototypes.unit(ITEMS))
        for seed in range(2):
            state, _ = step(jax.random.key(0), state, batch_of(images_of(4, seed=seed)))
        outcome, _ = looked(state, images_of(4))
        return state.items, outcome.rebuilt

    ours, default = run(config(learning_rate=0.01, **flag)), run(config(learning_rate=0.01))
    assert any(abs(a - b).max() > 1e-5 for a, b in zip(ours, default, strict=True))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in ours)


def test_the_learning_rate_ends_at_zero():
    state, images = initial(config(learning_rate=0.1)), batch_of(images_of(4))
    begun, _ = step(jax.random.key(0), state, images)
    adam = state.optimizer

    def moved(count):
        late = state._replace(optimizer=adam._replace(count=jnp.int32(count)))
        after, _ = step(jax.random.key(0), late, images)
        kernel = lambda s: s.params["decoder"]["Conv_0"]["kernel"]  # noqa: E731
        # Adam's first step is its learning rate, but for the correction of its two moments by their age.
        ages = (1 - 0.9 ** (count + 1)) / (1 - 0.9) / np.sqrt((1 - 0.999 ** (count + 1)) / (1 - 0.999))
        return float(jnp.median(abs(kernel(after) - kernel(state)))) * ages

    assert begun.optimizer.count == 1
    np.testing.assert_allclose(moved(0), 0.1, rtol=1e-3)
    np.testing.assert_allclose(moved(5), 0.05, rtol=1e-3)
    assert moved(10) < 1e-8


def test_devices_together_move_the_items_as_one_does():
    state, images = initial(config()), images_of(8)
    alone, _ = step(jax.random.key(0), state, batch_of(images))
    mesh = shard.data_mesh(jax.devices()[:4])
    place = shard.over_data(mesh)
    run = jax.jit(lambda s, b: mnad.train_step(jax.random.key(0), s, place(b))[0])
    together = run(shard.replicate(state, mesh), shard.replicate(batch_of(images), mesh))
    np.testing.assert_allclose(together.items, alone.items, atol=1e-5)


def test_statistics_count_every_normal_picture_once():
    state, images = initial(config()), images_of(5)
    fold = jax.jit(mnad.statistics_step)
    padded = jnp.concatenate([images[3:], images[:2]])
    state, _ = fold(jax.random.key(0), state, batch_of(images[:4], valid=[True, True, True, False]))
    state, _ = fold(jax.random.key(0), state, batch_of(padded, valid=[True, True, False, False]))
    _, parts = looked(state, images)
    np.testing.assert_allclose(state.statistics.psnr.mean, parts.psnr.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        [state.statistics.psnr.low, state.statistics.psnr.high], [parts.psnr.min(), parts.psnr.max()]
    )
    np.testing.assert_allclose(state.statistics.distance.mean, parts.distance.mean(), rtol=1e-5)
    assert float(state.assigned.sum()) == 5 * 4 * 6  # positions of 5 pictures of 8x12, halved once
    assert float(state.statistics.error_map.count) == 5 * 8 * 12


# --- scores -------------------------------------------------------------------------------------------------------


def test_scores_are_made_of_psnr_and_distance(trained):
    images = images_of(5, seed=3)
    outcome, parts = looked(trained, images)
    target = mnad.frames(images)[1]
    mse = (((outcome.rebuilt - target) / 2) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(parts.psnr, -10 * np.log10(mse), rtol=1e-5)
    nearest = np.asarray(outcome.queries @ trained.items.T).max(axis=2)
    np.testing.assert_allclose(parts.distance, (2 - 2 * nearest).mean(axis=1) / 6, rtol=1e-3)
    np.testing.assert_allclose(parts.distance_map.reshape(5, -1), np.sqrt(2 - 2 * nearest), rtol=1e-3, atol=1e-4)
    seen = trained.statistics
    psnr = (parts.psnr - seen.psnr.low) / (seen.psnr.high - seen.psnr.low)
    apart = (parts.distance - seen.distance.low) / (seen.distance.high - seen.distance.low)
    got = jax.jit(mnad.score)(trained, images)
    np.testing.assert_allclose(got.image, 0.6 * (1 - psnr) + 0.4 * apart, rtol=1e-4)
    error, distance = mnad.full_maps(trained.cfg, parts)
    z = sum(
        (values - m.mean) / np.sqrt(m.squares / m.count)
        for values, m in ((error, seen.error_map), (distance, seen.distance_map))
    )
    np.testing.assert_allclose(got.map, z, rtol=1e-3, atol=1e-4)
    best = jax.jit(mnad.score)(with_fields(trained, image_score="max"), images)
    np.testing.assert_allclose(best.image, got.map.max(axis=(1, 2)), rtol=1e-5)
    only = [jax.jit(mnad.score)(with_fields(trained, pixel_map=name), images).map for name in ("error", "distance")]
    np.testing.assert_allclose(only[0] + only[1], got.map, atol=1e-4)
    spread = jax.jit(mnad.score)(with_fields(trained, score_scale="std"), images).image
    z = [
        (v - m.mean) / np.sqrt(m.squares / m.count)
        for v, m in ((parts.psnr, seen.psnr), (parts.distance, seen.distance))
    ]
    np.testing.assert_allclose(spread, 0.6 * (1 - z[0]) + 0.4 * z[1], rtol=1e-3)


def test_without_memory_psnr_alone_is_scored():
    state, images = initial(config(memory=False)), images_of(4)
    got, (_, parts) = jax.jit(mnad.score)(state, images), looked(state, images)
    np.testing.assert_allclose(got.image, 1 - parts.psnr, rtol=1e-5)
    after, scores, _ = ordered(with_fields(state, test_update="sequential", gate=10.0), images, jnp.ones(4, bool))
    np.testing.assert_array_equal(after.items, state.items)
    np.testing.assert_allclose(scores.image, got.image, rtol=1e-5)


@pytest.mark.parametrize("dtype, impl, tolerance", [("bfloat16", "conv", 0.3), ("float32", "gemm", 1e-3)])
def test_other_arithmetic_scores_the_same(trained, dtype, impl, tolerance):
    images = images_of(4, seed=5)
    expected = jax.jit(mnad.score)(trained, images)
    got = jax.jit(mnad.score)(with_fields(trained, dtype=dtype, conv_impl=impl), images)
    assert got.image.dtype == jnp.float32
    np.testing.assert_allclose(got.image, expected.image, rtol=tolerance, atol=tolerance)
    assert dtype == "float32" or (got.image != expected.image).any()


# --- adaptation ---------------------------------------------------------------------------------------------------


def gate_that_parts(state, images):
    """A gate that half of the frames pass."""
    return float(jnp.median(looked(state, images)[1].regular))


def in_order(state, images, **fields):
    return ordered(with_fields(state, **fields), images, jnp.ones(images.shape[0], bool))


def by_hand(state, images, size, gate):
    """Chunks of frames scored with the same items, then moved by those below the gate, one after the other."""
    items, found = state.items, []
    for first in range(0, len(images), size):
        outcome, parts = looked(state._replace(items=items), images[first : first + size])
        found.append(np.asarray([parts.psnr, parts.distance, parts.regular]))
        for queries, regular in zip(outcome.queries, parts.regular, strict=True):
            if regular < gate:
                items = prototypes.update(items, queries, prototypes.match(queries, items))
    return items, np.concatenate(found, axis=1)


@pytest.mark.parametrize("mode, size", [("sequential", 1), ("chunked", 1), ("chunked", 4)])
@pytest.mark.parametrize("count", [4, 12])
def test_adaptation_scores_and_moves_as_worked_by_hand(trained, mode, size, count):
    images = images_of(count, seed=4)
    gate = gate_that_parts(trained, images)
    state, scores, parts = in_order(trained, images, test_update=mode, update_chunk=size, gate=gate)
    items, expected = by_hand(trained, images, size, gate)
    np.testing.assert_allclose(state.items, items, atol=1e-4)
    got = np.asarray([parts["psnr"], parts["distance"], parts["regular"]])
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-5)
    untouched = jax.jit(mnad.score)(trained, images)
    assert abs(scores.image - untouched.image).max() > 1e-3 or count == size
    assert abs(state.items - trained.items).max() > 1e-3


def test_without_adaptation_order_does_not_matter(trained):
    images = images_of(4, seed=4)
    state, scores, _ = in_order(trained, images, test_update="none", gate=10.0)
    np.testing.assert_array_equal(state.items, trained.items)
    np.testing.assert_allclose(scores.image, jax.jit(mnad.score)(trained, images).image, rtol=1e-4)
    shut, scores, _ = in_order(trained, images, test_update="sequential", gate=0.0)
    np.testing.assert_array_equal(shut.items, trained.items)
    np.testing.assert_allclose(scores.image, jax.jit(mnad.score)(trained, images).image, rtol=1e-4, atol=1e-5)


def test_the_engines_stream_is_the_sequential_mode(trained):
    frames = np.random.default_rng(7).integers(0, 256, (9, 8, 12, 2), np.uint8)
    starts = jnp.arange(7, dtype=jnp.int32)
    source = Source(image=jnp.asarray(frames), label=jnp.zeros(9, jnp.int32), start=starts, clip=3, target=2)
    images = take(source, jnp.arange(7))[0]
    state = with_fields(trained, gate=gate_that_parts(trained, images), test_update="sequential")
    expected_state, expected = score.stream(mnad.METHOD, state, source)
    for batch_size in (1, 3):
        found = adaptation.score_ordered(mnad.METHOD, state, source, batch_size=batch_size)
        np.testing.assert_allclose(found.image, expected.image, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(found.state.items, expected_state.items, atol=1e-4)
    assert abs(expected_state.items - state.items).max() > 1e-3


def test_adapt_obeys_the_gate(trained):
    images = images_of(3, seed=8)
    nothing = Scores(jnp.zeros(3), jnp.zeros((3, 8, 12)))
    adapt = jax.jit(mnad.adapt)
    np.testing.assert_array_equal(adapt(with_fields(trained, gate=0.0), images, nothing).items, trained.items)
    moved = adapt(with_fields(trained, gate=10.0), images, nothing).items
    np.testing.assert_allclose(moved, by_hand(trained, images, 3, 10.0)[0], atol=1e-5)


def test_the_video_protocol_combines_stretched_parts():
    parts = {"psnr": np.array([1.0, 0.25, 0.0]), "distance": np.array([0.0, 0.5, 1.0]), "regular": np.zeros(3)}
    np.testing.assert_allclose(mnad.combine(config(psnr_weight=0.6), parts), [0, 0.65, 1.0])
    np.testing.assert_allclose(mnad.combine(config(memory=False), parts), [0, 0.75, 1.0])


@pytest.fixture(scope="module")
def video_run(tmp_path_factory):
    """A run of the command line on made videos whose later test frames are other pictures than those before."""
    from PIL import Image

    from jaxad.cli import main

    root, numbers = tmp_path_factory.mktemp("video"), np.random.default_rng(0)
    lines = ["clip,frame,label"]
    for part, clips in (("training", ("01", "02")), ("testing", ("01", "02"))):
        for clip in clips:
            folder = root / "data" / part / "frames" / clip
            folder.mkdir(parents=True)
            for i in range(9):
                bad = part == "testing" and i > 6
                lines += [f"{clip},{i:03d},{int(bad)}"] if part == "testing" else []
                pixels = numbers.integers(200 if bad else 60, 256 if bad else 100, (16, 24), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    (root / "data" / "labels.csv").write_text("\n".join(lines) + "\n")
    size = ("--image-size", "16x24", "--set", "widths=4,6", "--set", "steps=3", "--set", "gate=10", "--quiet")
    main(
        ["train", "mnad", "--data", str(root / "data"), "--preset", "prediction_cpu", *size, "--out", str(root / "run")]
    )
    return root / "run"


def test_videos_are_measured_in_order_from_the_command_line(video_run, tmp_path, capsys):
    """After training, and again in each mode; the first 4 of the 9 frames of both test videos have no score."""
    from jaxad.cli import main

    def measured(mode):
        out = tmp_path / mode.replace(" ", "-")
        changes = [part for field in mode.split() for part in ("--set", field)]
        main(["eval", str(video_run), *changes, "--out", str(out)])
        report = json.loads((out / "report.json").read_text())
        assert "AUROC in order" in capsys.readouterr().out
        return report

    found = {"none": measured("test_update=none"), "by one": measured("test_update=chunked update_chunk=1")}
    trained = json.loads((video_run / "report.json").read_text())
    assert trained["test_images"] == 10 and trained["ordered_auroc_video_protocol"] is not None
    for name in ("ordered_auroc", "ordered_auroc_video_protocol"):
        assert found["by one"][name] == trained[name]  # of the preset, which is sequential
    assert found["none"]["ordered_auroc"] == found["none"]["image_auroc"]


def test_a_sweep_shows_what_adapting_changes(video_run):
    """Its rows are those of the lone run, whose preset is sequential, and of the same detector without adapting."""
    chosen = runs.read_config(video_run)[0]
    config = {name: value for name, value in chosen.config.items() if name != "test_update"}
    request = sweep.Request(dataclasses.replace(chosen, config=config), (chosen.data,), seeds=(chosen.seed,))
    request = dataclasses.replace(request, grid={"test_update": ("none", "sequential")})
    none, sequential = sweep.run_request(request, metric="ordered_auroc")
    trained = json.loads((video_run / "report.json").read_text())
    for name in ("ordered_auroc", "ordered_auroc_video_protocol", "image_auroc"):
        assert sequential[name] == pytest.approx(trained[name], abs=1e-6), name
    assert none["ordered_auroc"] == none["image_auroc"] != sequential["ordered_auroc"]


def test_settings_that_need_another_training_are_refused_at_eval(video_run, capsys):
    from jaxad.cli import main

    with pytest.raises(SystemExit):
        main(["eval", str(video_run), "--set", "num_items=20", "--quiet"])
    assert "num_items=20 changes what is trained" in capsys.readouterr().err
    detector, chosen = runs.load_detector(video_run), runs.read_config(video_run)[0]
    changed, settings = runs._with_fields(detector, chosen, {"test_update": "chunked", "gate": "0.5"})
    assert (changed.state.cfg.test_update, float(changed.state.cfg.gate)) == ("chunked", 0.5)
    assert settings.config["test_update"] == "chunked" and detector.state.cfg.test_update == "sequential"


# --- settings and learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, image, message",
    [
        ({"update_norm": "max"}, (8, 8, 3), "update_norm='max' is unknown; expected one of"),
        ({"test_update": "online"}, (8, 8, 3), "test_update='online' is unknown"),
        ({"num_items": 1}, (8, 8, 3), "num_items=1.*expected at least 2 items"),
        ({"widths": (4, 6, 8)}, (8, 10, 3), "pictures of 8x10 cannot be halved 2 times.*--image-size 8x12"),
        ({}, (1, 8, 8, 3), "clips of 1 frame leave nothing to predict from"),
        ({"score_norm": "holdout"}, (8, 8, 3), "score_norm='holdout', but the data has no held-out"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, image, message):
    with pytest.raises(ValueError, match=message):
        mnad.check(config(**fields), Spec(image, {"train": 9}))
    mnad.check(config(), Spec((5, 8, 10, 3), {"train": 9}))


@pytest.mark.slow
@pytest.mark.optimised
def test_learning_beats_no_learning():
    """On the default family of synthetic defects, at a third of the preset "tiny", three seeds in one program."""
    method, preset = methods.get("mnad"), mnad.PRESETS["tiny"]
    data = load("synthetic", **preset.data).to_device()
    cfg = mnad.MNADConfig(**{**preset.config, "steps": 200, "conv_impl": "gemm"})
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    sources = {"train": data.sources["train"]}

    def run(key):
        start = train.init(method, key, cfg, Spec(sources["train"].sample_shape, {"train": len(sources["train"])}))
        return start, train.fit(method, key, cfg, sources)[0]

    untrained, fitted = jax.jit(jax.vmap(run))(keys)
    test = data.sources["test"]
    images, labels = take(test, jnp.arange(len(test)))[0], np.asarray(test.label)
    score_all = jax.jit(jax.vmap(lambda state: mnad.score(state, images).image))

    def aurocs(states):
        return np.array([metrics.image_metrics(np.asarray(row), labels)["auroc"] for row in score_all(states)])

    before, after = aurocs(untrained), aurocs(fitted)
    assert after.min() > 0.6 and after.mean() > before.mean() + 0.05, (before, after)
