"""What makes it Uninformed Students: its networks, losses and scores by hand, its teachers as files."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import batch_of
from sklearn.metrics import roc_auc_score

from jaxad import score, train
from jaxad.core import Source, Spec
from jaxad.importers import WeightsError
from jaxad.methods import patch_teacher
from jaxad.methods import uninformed_students as us
from jaxad.nn import dense, patch_net
from jaxad.nn.init import init_flat
from jaxad.nn.patch_net import Shape

SMALL = {"patches": (17,), "students": 2, "width": 0.03, "descriptor": 5, "batch_size": 2}


@functools.cache
def start(size=12, **fields):
    """(config, untrained state, pictures)."""
    cfg = us.UninformedStudentsConfig(**{**SMALL, **fields})
    images = jnp.asarray(np.random.default_rng(9).uniform(size=(3, size, size + 3, 3)), jnp.float32)
    spec = Spec(images.shape[1:], {"train": 3})
    state = jax.jit(lambda key, cfg: train.init(us.METHOD, key, cfg, spec))(jax.random.key(0), cfg)
    return cfg, state, images


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "fields", "counts"),
    [
        (17, {}, [13_952, 819_456, 1_638_656, 524_416]),
        (33, {}, [9_728, 819_456, 262_400, 524_416]),
        (65, {}, [9_728, 409_728, 409_728, 524_544, 32_896]),
        (65, {"conv3_features": 256}, [9_728, 409_728, 819_456, 1_048_832, 32_896]),
        (33, {"p33_conv1": 3}, [128 * 28, 819_456, 262_400, 524_416]),
        (17, {"p17_taps": (5, 5, 5, 5)}, [9_728, 819_456, 1_638_656, 128 * (256 * 25 + 1)]),
    ],
)
def test_networks_have_the_stated_weights(patch, fields, counts):
    network = patch_net.network_of(patch, Shape(**fields))
    params = jax.eval_shape(lambda: init_flat(jax.random.key(0), network, jnp.zeros((1, patch, patch, 3)))["params"])
    assert [sum(leaf.size for leaf in jax.tree.leaves(own)) for own in params.values()] == counts


@pytest.mark.parametrize(("patch", "field", "slopes"), [(17, 17, 3), (33, 32, 3), (65, 60, 4)])
def test_fields_and_constant_pictures(patch, field, slopes):
    """Kernels that average and no bias: a picture of ones gives ones, one of -1 loses 0.005 at every activation."""
    shape = Shape(width=0.02, descriptor=2)
    network = patch_net.network_of(patch, shape)
    assert dense.field_of(network.layers) == field
    x = jnp.ones((1, patch + 1, patch, 3))
    params = init_flat(jax.random.key(0), network, x)["params"]
    params = jax.tree.map(lambda p: jnp.full(p.shape, 1 / np.prod(p.shape[:-1]) if p.ndim == 4 else 0.0), params)
    run = jax.jit(lambda x: network.apply({"params": params}, x))
    np.testing.assert_allclose(run(x), 1, rtol=1e-5)
    np.testing.assert_allclose(run(-x), -(0.005**slopes), rtol=1e-4)
    leaky = patch_net.layers_of(patch, shape._replace(final_activation="leaky"))
    assert [layer.activation is patch_net.leaky for layer in (leaky[-1], network.layers[-1])] == [True, False]


@pytest.mark.parametrize(("patch", "centre", "reads"), [(17, False, (8, 8)), (33, True, (15, 16))])
def test_which_pixels_a_descriptor_reads(patch, centre, reads):
    """(p - 1) / 2 pixels above and left, and below and right what pools leave of as many; or evenly around."""
    cfg, state, _ = start(patches=(patch,), centre_field=centre, padding="zero")
    images = np.full((1, 41, 43, 3), 0.5, np.float32)
    row, column = 20, 21

    @jax.jit
    def at(images):
        x = us.padded(cfg, patch, images)
        out = us.describe(cfg, patch, state.scales[us.name_of(patch)].teacher, x)
        assert out.shape == (1, 41, 43, 5)
        return out[0, row, column]

    for place in (row - reads[0] - 1, row - reads[0], row + reads[1], row + reads[1] + 1):
        spoilt = images.copy()
        spoilt[0, place, column] = 1.0
        is_read = -reads[0] <= place - row <= reads[1]
        assert bool(np.any(np.asarray(at(spoilt)) != np.asarray(at(images)))) == is_read, place


def test_padding_modes():
    layers = patch_net.layers_of(17, Shape())
    x = jnp.arange(10.0).reshape(1, 1, 10, 1).repeat(10, axis=1)
    assert patch_net.pad(x, 17, layers)[0, 0, 7:10, 0].tolist() == [1, 0, 1]
    assert patch_net.pad(x, 17, layers, mode="zero")[0, 12, 7:10, 0].tolist() == [0, 0, 1]


def test_enlarged_maps_keep_their_values_and_places():
    full = jnp.arange(11.0)[None, :, None] + 0.5 * jnp.arange(9.0)
    known = full[:, ::4, ::4]
    found = patch_net.enlarge(known, (11, 9), out_stride=4)
    np.testing.assert_allclose(found[:, :9], full[:, :9], atol=1e-5)
    np.testing.assert_allclose(found[:, 9:], found[:, 8:9].repeat(2, axis=1), atol=1e-5)
    assert patch_net.enlarge(full, (11, 9), out_stride=1) is full


def test_strided_maps_are_part_of_the_whole():
    cfg, state, images = start()
    strided = dataclasses.replace(cfg, out_stride=4)
    teacher, x = state.scales["p17"].teacher, us.padded(cfg, 17, images)
    whole, part = jax.jit(lambda p, x: [us.describe(c, 17, p, x) for c in (cfg, strided)])(teacher, x)
    np.testing.assert_allclose(part, whole[:, ::4, ::4], atol=1e-5)


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("said", "error", "variance"), [([(1, 0), (0, 1)], 0.5, 0.5), ([(1, 1), (1, 1)], 2.0, 0.0)])
def test_error_and_variance_by_hand(said, error, variance):
    """Two students, two components, a target of (0, 0); then the same around another target."""
    for target in ((0.0, 0.0), (3.0, -1.0)):
        target = jnp.array(target).reshape(1, 1, 1, 2)
        students = {"says": jnp.array(said, jnp.float32).reshape(2, 1, 1, 1, 2) + target}
        found = us.votes_in_turn(lambda params: params["says"], students, target)
        assert float(jnp.sum(found.mean**2)) == pytest.approx(error)
        assert float(found.squares[0, 0, 0] / found.students) == pytest.approx(variance)


def test_standardised_scores_by_hand(monkeypatch):
    """Error 0.5 and variance 0.5 with means of 0.1 and deviations of 0.2 and 0.4: 2 + 1; scales are averaged."""
    cfg, state, images = start(patches=(17, 33))

    def moments_of(mean, deviation):
        return us.moments.empty()._replace(count=jnp.float32(4), mean=mean, squares=4 * deviation**2)

    scales = {
        name: scale._replace(error=moments_of(0.1, 0.2), variance=moments_of(0.1, 0.4))
        for name, scale in state.scales.items()
    }
    at = {17: 0.5, 33: 0.9}
    monkeypatch.setattr(us, "judge", lambda s, patch, x: (jnp.full(x.shape[:3], at[patch]), jnp.full(x.shape[:3], 0.5)))
    scores = us.score(state._replace(scales=scales), images)
    np.testing.assert_allclose(scores.map, (3 + 5) / 2, rtol=1e-5)
    assert scores.image.tolist() == pytest.approx([4] * 3, rel=1e-5)


def test_one_student_has_no_variance_and_a_finite_score():
    _, state, images = start(students=1)

    @jax.jit
    def run(state, images):
        state, _ = us.calibration_step(None, state, batch_of(images))
        return us.judge(state, 17, images)[1], us.score(state, images).map

    variance, map_ = run(state, images)
    assert float(jnp.abs(variance).max()) == 0 and bool(jnp.isfinite(map_).all())


def test_targets_are_standardised():
    """Zero mean and unit variance for each component over the training pixels, in batches of any size; padding rows
    count for nothing."""
    cfg, state, images = start(size=20)
    step = jax.jit(us.target_step)
    state, _ = step(None, state, batch_of(images[:2]))
    spoilt = jnp.concatenate([images[2:], 1 - images[:1]])
    state, _ = step(None, state, batch_of(spoilt, valid=[True, False]))
    found = jax.jit(lambda s, x: us.targets(cfg, 17, s, us.padded(cfg, 17, x)))(state.scales["p17"], images)
    found = found.reshape(-1, cfg.descriptor)
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(found.var(axis=0), 1, atol=1e-3)


def test_ensembles_are_equal():
    """One after the other, in a loop, vmapped, and spread over devices: steps, error and variance."""
    found = {}
    for ensemble in ("unrolled", "loop", "vmap", "shard"):
        cfg, state, images = start(size=8, students=2, ensemble=ensemble)

        @jax.jit
        def run(state, images):
            after, metrics = us.train_step(None, state, batch_of(images))
            return us.judge(after, 17, images), after.scales["p17"].students, metrics["loss"]

        program = run.lower(state, images).compile()
        found[ensemble] = jax.device_get(program(state, images))
        if ensemble == "shard":
            assert "all-reduce" in program.as_text() and "num_partitions=2" in program.as_text()
        if ensemble in ("unrolled", "loop"):
            assert (" while(" in program.as_text()) == (ensemble == "loop")
    for ensemble in ("loop", "vmap", "shard"):
        for a, b in zip(jax.tree.leaves(found[ensemble]), jax.tree.leaves(found["unrolled"]), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


def test_students_train_alone_and_the_teacher_not_at_all():
    """A student's step is the same whoever is beside it; the loss is summed over components, averaged over pixels."""
    cfg, state, images = start(students=3)
    scale = state.scales["p17"]

    def student(m):
        return jax.tree.map(lambda leaf: leaf[m], scale.students)

    @jax.jit
    def look(scale, images):
        x = us.padded(cfg, 17, images)
        alone = [us.describe(cfg, 17, student(m), x) for m in range(3)]
        return us.targets(cfg, 17, scale, x), alone

    after, metrics = jax.jit(us.train_step)(None, state, batch_of(images))
    target, alone = jax.device_get(look(scale, images))
    expected = np.mean([np.sum((a - target) ** 2, axis=-1).mean() for a in alone])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    for a, b in zip(jax.tree.leaves(after.scales["p17"].teacher), jax.tree.leaves(scale.teacher), strict=True):
        np.testing.assert_array_equal(a, b)
    pair = scale._replace(students=jax.tree.map(lambda leaf: leaf[1:], scale.students))
    fewer = state._replace(cfg=dataclasses.replace(cfg, students=2), scales={"p17": pair})
    fewer = fewer._replace(optimizer=us.optax.scale_by_adam().init({"p17": pair.students}))
    beside, _ = jax.jit(us.train_step)(None, fewer, batch_of(images))
    for a, b in zip(
        jax.tree.leaves(beside.scales["p17"].students), jax.tree.leaves(after.scales["p17"].students), strict=True
    ):
        np.testing.assert_allclose(a, b[1:], atol=2e-5)


def test_grey_pictures_are_tripled():
    cfg, _, images = start()
    grey = images[..., :1]
    np.testing.assert_array_equal(us.padded(cfg, 17, grey), us.padded(cfg, 17, grey.repeat(3, axis=-1)))


def textures(numbers, count, *, spoilt=False):
    """Stripes at random places with noise, (count, 32, 32, 3) uint8; spoilt ones have a square of stripes across."""
    place = np.arange(32)
    phase, noise = numbers.uniform(0, 8, (count, 1, 1)), numbers.normal(0, 8, (count, 32, 32, 3))
    stripes = np.sin((place[None, None] + phase) * (2 * np.pi / 8)) + np.zeros((count, 32, 1))
    for image, (row, column) in zip(stripes, numbers.integers(4, 18, (count, 2)), strict=True):
        if spoilt:
            across = np.sin(place[:10, None] * (2 * np.pi / 8)) + np.zeros(10)
            image[row : row + 10, column : column + 10] = across
    return np.clip(128 + 60 * stripes[..., None] + noise, 0, 255).astype(np.uint8)


@pytest.mark.slow
def test_trained_students_find_planted_defects():
    """The tiny preset with its schedule, a random teacher and no file: far better than before training."""
    numbers = np.random.default_rng(0)
    test = np.concatenate([textures(numbers, 30), textures(numbers, 30, spoilt=True)])
    label = np.repeat(np.array([0, 1], np.int32), 30)
    sources = {
        name: Source(image=jnp.asarray(textures(numbers, rows)), label=jnp.zeros(rows, jnp.int32))
        for name, rows in (("train", 60), ("holdout", 8))
    }
    cfg, key = us.METHOD.config(**us.METHOD.presets["tiny"].config), jax.random.key(0)
    rates = []
    for progress in train.drive(us.METHOD, key, cfg, sources, mode="loop", chunk=1000, patience=1e3):
        if progress.name in ("init", "calibrate"):
            scores = score.score_dataset(us.METHOD, progress.state, Source(image=jnp.asarray(test), label=label))
            rates.append(roc_auc_score(label, scores.image))
    assert rates[-1] > max(0.9, rates[0] + 0.1), rates


# --- teachers -----------------------------------------------------------------------------------------------------


def test_knowledge_and_triplet_losses_by_hand():
    decoded, features = jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [0.0, 3.0]])
    assert float(patch_teacher.knowledge_loss(decoded, features)) == pytest.approx((5 + 9) / 2)
    anchor, positive, negative = (jnp.array([x]) for x in ([0.0, 0.0], [1.0, 0.0], [0.0, 2.0]))
    for margin, expected in ((1.0, 0.0), (4.0, 1.0)):
        found = patch_teacher.triplet_loss(anchor, positive, negative, margin=margin)
        assert float(found) == pytest.approx(expected)
    harder = patch_teacher.triplet_loss(anchor, jnp.array([[0.0, 1.0]]), negative, margin=1.0)
    assert float(harder) == pytest.approx(1.0), "the negative nearer to the positive counts"


@pytest.mark.parametrize(("kind", "expected"), [("squared", 0.36), ("literal", 1.2), ("abs", 1.2)])
def test_compactness_by_hand(kind, expected):
    rows = jnp.array([[1.0, 2.0], [2.0, 1.0], [3.0, 4.0], [4.0, 3.0]])  # correlation 0.6
    assert float(patch_teacher.compactness_loss(rows, rows, kind=kind)) == pytest.approx(expected, rel=1e-4)
    turned = rows * jnp.array([1.0, -1.0])
    signs = {"squared": expected, "literal": -expected, "abs": expected}
    assert float(patch_teacher.compactness_loss(turned, rows, kind=kind)) == pytest.approx(signs[kind], rel=1e-4)


def test_compactness_between_samples():
    numbers = np.random.default_rng(0).normal(size=(3, 7))
    expected = sum(np.corrcoef(numbers)[i, j] ** 2 for i in range(3) for j in range(i + 1, 3))
    found = patch_teacher.compactness_loss(jnp.zeros((3, 2)), jnp.asarray(numbers, jnp.float32), kind="samples")
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_crops_are_pieces_of_the_resized_picture():
    image = jax.random.uniform(jax.random.key(0), (12, 12, 3))
    for side, top, left in ((24, 3, 5), (12, 2, 0), (9, 1, 3)):
        whole = jax.image.resize(image, (side, side, 3), "linear")
        found = patch_teacher.crop(image, jnp.float32(side), top, left, size=5)
        np.testing.assert_allclose(found, whole[top : top + 5, left : left + 5], atol=1e-5)


def test_samples_are_what_the_recipe_says():
    """Zooms in their range, patches inside the picture, moved ones near; grey for all or for none."""
    ramp = jnp.linspace(0, 1, 64)
    plane = jnp.stack(jnp.meshgrid(ramp, ramp, indexing="ij") + [jnp.zeros((64, 64))], axis=-1)
    images = jnp.broadcast_to(plane, (200, 64, 64, 3))
    cfg = patch_teacher.TeacherConfig(patch=17, grey_probability=0.0, noise=0.0, brightness=0.0)
    made = patch_teacher.sample(jax.random.key(0), cfg, images)
    assert float(made.anchor.min()) >= 0 and float(made.anchor.max()) <= 1
    extent = np.ptp(np.asarray(made.anchor[..., 0]), axis=(1, 2)) * 64 / 63  # of 16 steps of the patch
    zoom = 16 / 17 / extent
    assert 3.5 < zoom.min() < 5 and 14 < zoom.max() < 17.5
    apart = np.asarray(made.moved - made.anchor)[:, 8, 8, :2] / extent[:, None] * 16
    assert 3.5 < np.abs(apart).max() < 4.2, "up to (p - 1) / 4 pixels"
    grey = patch_teacher.sample(jax.random.key(0), dataclasses.replace(cfg, grey_probability=1.0), images)
    for patches in grey:
        assert float(np.ptp(np.asarray(patches), axis=-1).max()) < 1e-6
    loud = patch_teacher.sample(jax.random.key(0), dataclasses.replace(cfg, noise=0.1), images)
    np.testing.assert_array_equal(loud.anchor, made.anchor)
    assert float(jnp.std(loud.moved - made.moved)) == pytest.approx(0.1, rel=0.3)


class Mean:
    """A backbone for tests: averages of the four quarters of a patch."""

    def apply(self, variables, x):
        quarter = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
        return jax.image.resize(quarter, (len(x), 2, 2, 3), "linear").reshape(len(x), -1) * variables


@pytest.fixture
def mean_backbone(monkeypatch):
    """Stands for a classifier, whose weights are not at hand in tests."""
    backbone = patch_teacher.Backbone(Mean(), 12, lambda arrays, origin: arrays, lambda x: x)
    monkeypatch.setitem(patch_teacher.BACKBONES, "mean", backbone)
    return "mean"


def distilled(backbone, path, *, steps=40, **fields):
    cfg = patch_teacher.TeacherConfig(
        patch=17, backbone=backbone, width=0.03, descriptor=5, steps=steps, batch_size=8, learning_rate=3e-3, **fields
    )
    pictures = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    params, log = patch_teacher.distil(jax.random.key(0), cfg, pictures, 3.0)
    patch_teacher.save(path, {17: params}, patch_net.shape_of(cfg), facts={"steps": steps})
    return params, log


def test_distilled_teachers_are_files(mean_backbone, tmp_path):
    """Distilling lowers the loss; the file is a teacher for students of its shape, and for no others."""
    params, log = distilled(mean_backbone, tmp_path / "t.npz", triplet=True)
    assert log["knowledge"][-5:].mean() < 0.5 * log["knowledge"][:5].mean()
    assert set(log) == {"loss", "knowledge", "compactness", "triplet"}
    cfg, state, images = start(teacher=str(tmp_path / "t.npz"))
    for a, b in zip(jax.tree.leaves(state.scales["p17"].teacher), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    other = start(teacher="random")[1]
    assert not np.allclose(other.scales["p17"].teacher["conv1"]["kernel"], params["conv1"]["kernel"])
    np.testing.assert_array_equal(
        other.scales["p17"].students["conv1"]["kernel"], state.scales["p17"].students["conv1"]["kernel"]
    )
    spec = Spec((12, 12, 3), {"train": 3, "holdout": 1})
    us.check(cfg, spec)
    for wrong, message in (
        ({"width": 0.05}, "width=0.03 instead of 0.05.*Pass --set width=0.03 --set descriptor=5"),
        ({"patches": (17, 33)}, "no patches of 33"),
        ({"teacher": str(tmp_path / "none.npz")}, "none.npz: cannot be read"),
    ):
        with pytest.raises(WeightsError, match=message):
            us.check(dataclasses.replace(cfg, **wrong), spec)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(WeightsError, match="no file of teachers; expected one made by"):
        us.check(dataclasses.replace(cfg, teacher=str(tmp_path / "other.npz")), spec)


def test_a_trained_detector_needs_no_file(mean_backbone, tmp_path):
    """Shapes of a state are known without the teacher's file, so that a detector is restored where there is none."""
    distilled(mean_backbone, tmp_path / "t.npz", steps=1)
    cfg, state, _ = start(teacher=str(tmp_path / "t.npz"))
    (tmp_path / "t.npz").unlink()
    spec = Spec((12, 15, 3), {"train": 3})
    shapes = jax.eval_shape(lambda key: us.init(key, cfg, spec), jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes.scales) == jax.tree.map(jnp.shape, state.scales)


def test_members_of_a_sweep_share_the_teacher(mean_backbone, tmp_path):
    params, _ = distilled(mean_backbone, tmp_path / "t.npz", steps=1)
    cfg = us.UninformedStudentsConfig(**SMALL, teacher=str(tmp_path / "t.npz"))
    spec = Spec((12, 12, 3), {"train": 3})
    states = jax.jit(jax.vmap(lambda key: us.init(key, cfg, spec)))(jax.random.split(jax.random.key(0), 2))
    for m in (0, 1):
        kernel = states.scales["p17"].teacher["conv1"]["kernel"][m]
        np.testing.assert_array_equal(kernel, params["conv1"]["kernel"])


@pytest.mark.parametrize("fields", [{"compactness": "literal"}, {"knowledge_weight": 0.0}, {"weight_decay": 1.0}])
def test_settings_of_distillation_matter(mean_backbone, tmp_path, fields):
    base, changed = (distilled(mean_backbone, tmp_path / "t.npz", steps=3, **given)[0] for given in ({}, fields))
    kernels = [np.asarray(params["conv4"]["kernel"]) for params in (base, changed)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-4


def test_command_reads_folders_and_zips(mean_backbone, tmp_path, monkeypatch, capsys):
    from PIL import Image

    for i in range(8):
        folder = tmp_path / "pictures" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (10 + i, 12, 3), np.uint8)).save(folder / f"{i}.png")
    import zipfile

    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "pictures").rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path).as_posix())
    from_folder = patch_teacher.pictures_of(tmp_path / "pictures", size=9)
    assert from_folder.shape == (8, 9, 9, 3)
    np.testing.assert_array_equal(from_folder, patch_teacher.pictures_of(tmp_path / "all.zip", size=9))
    monkeypatch.setattr(patch_teacher, "backbone_of", lambda name, path: 3.0)
    cfg = patch_teacher.TeacherConfig(
        backbone=mean_backbone, width=0.03, descriptor=5, steps=2, batch_size=4, p17_taps=(5, 5, 5, 5)
    )
    patch_teacher.command(
        str(tmp_path / "all.zip"), "w", str(tmp_path / "t.npz"), cfg=cfg, patches=(17,), picture_size=16
    )
    loaded = patch_teacher.load(tmp_path / "t.npz", (17,), patch_net.shape_of(cfg))
    assert set(loaded) == {"p17"} and "p17 2/2" in capsys.readouterr().out
    notes = json.loads(np.load(tmp_path / "t.npz")["notes"].tobytes())
    assert notes["distilled"]["backbone"] == mean_backbone and notes["pictures"] == 8


def test_teacher_settings_that_cannot_work_are_refused():
    pictures = np.zeros((4, 8, 8, 3), np.uint8)
    for fields, message in (
        ({"backbone": "vgg"}, "backbone='vgg' is unknown; expected one of"),
        ({"compactness": "none"}, "compactness='none' is unknown"),
        ({"zoom_low": 0.5}, "zoom from 0.5 to 16.0; expected 1 or more"),
        ({"patch": 32}, "patches=.32,.; expected some of .17, 33, 65."),
        ({}, "4 pictures for steps of 64"),
    ):
        with pytest.raises(ValueError, match=message):
            patch_teacher.distil(jax.random.key(0), patch_teacher.TeacherConfig(**fields), pictures, None)


@pytest.mark.parametrize(
    ("fields", "image", "message"),
    [
        ({"padding": "edge"}, (8, 8, 3), "padding='edge' is unknown; expected one of"),
        ({"ensemble": "both"}, (8, 8, 3), "ensemble='both'"),
        ({"patches": (17, 17)}, (8, 8, 3), "expected some of .17, 33, 65., each once"),
        ({"conv3_features": 64}, (8, 8, 3), "conv3_features=64 is unknown; expected one of .128, 256."),
        ({"width": 0.0}, (8, 8, 3), "width=0.0, descriptor=5; expected more than 0"),
        ({"students": 0}, (8, 8, 3), "students=0, out_stride=1; expected at least 1"),
        ({}, (2, 8, 8, 3), "samples of shape .2, 8, 8, 3."),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, image, message):
    cfg = us.UninformedStudentsConfig(**{**SMALL, **fields})
    with pytest.raises(ValueError, match=message):
        us.check(cfg, Spec(image, {"train": 3, "holdout": 1}))
    with pytest.raises(ValueError, match="no normal pictures are held out"):
        us.check(us.UninformedStudentsConfig(**SMALL), Spec((8, 8, 3), {"train": 3, "holdout": 0}))


def test_fields_reach_where_they_belong():
    cfg, _, images = start()
    other = dataclasses.replace(cfg, padding="zero", calibration="train")
    assert not np.allclose(us.padded(cfg, 17, images), us.padded(other, 17, images))
    assert [phase.source for phase in us.phases(cfg)] == ["train", "train", "holdout"]
    assert [phase.source for phase in us.phases(other)] == ["train", "train", "train"]
