"""Sweeps on videos: members score frames in order and adapt in between, as lone runs do."""

import csv

import jax
import numpy as np
import pytest
import toy
from PIL import Image

from jaxad import adaptation, methods, runs, settings, shard, sweep, train
from jaxad.data import load
from jaxad.sweep import api, grid, member, report

OPTIONS = {"image_size": 8, "steps": 3}
MEASURES = ("image_auroc", "image_auroc_video_protocol", "ordered_auroc", "ordered_auroc_video_protocol")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", "toy")
    monkeypatch.setattr(toy, "METHOD", toy.IN_ORDER)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two sets of videos whose test sets differ in length; anomalous frames are somewhat brighter."""
    return [drawn(tmp_path_factory.mktemp("videos") / name, clips) for name, clips in (("a", (9, 6)), ("b", (8,)))]


def drawn(root, clips):
    numbers, lines = np.random.default_rng(len(clips)), ["clip,frame,label"]
    for part, lengths in (("training", (9, 9)), ("testing", clips)):
        for clip, length in enumerate(lengths):
            folder = root / part / "frames" / f"{clip:02d}"
            folder.mkdir(parents=True)
            for i in range(length):
                bad = part == "testing" and i % 3 == 1
                lines += [f"{clip:02d},{i:03d},{int(bad)}"] if part == "testing" else []
                pixels = np.clip(numbers.normal(numbers.integers(60, 120) + 40 * bad, 5, (8, 8)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return str(root)


@pytest.mark.parametrize("mesh", [{"run": 1}, {"run": 2, "data": 2}], ids=str)
def test_a_row_has_the_ordered_measures_of_the_lone_run(videos, mesh):
    mesh = shard.make_mesh(**mesh, devices=jax.devices()[: np.prod(list(mesh.values()))])
    table = sweep.run(
        "toy",
        videos,
        grid={"noise": [0.1, 0.4]},
        seeds=1,
        limits=sweep.Limits(mesh=mesh),
        metric="ordered_auroc",
        **OPTIONS,
    )
    base = settings.Settings(method="toy", image_size=8, config={"steps": 3})
    request = sweep.Request(base, data=tuple(videos), grid={"noise": (0.1, 0.4)}, seeds=(0,))
    for one, row in zip(grid.members_of(toy.METHOD, request), table, strict=True):
        alone = runs.train_run(one.settings)[1]
        for name in MEASURES:
            assert row[name] == pytest.approx(alone[name], abs=1e-6), name
    assert len({tuple(row[name] for name in MEASURES) for row in table}) > 1
    assert all(row["ordered_auroc"] != row["image_auroc"] for row in table)


def test_the_report_compares_by_a_measure_of_videos(videos, tmp_path):
    name = "ordered_auroc_video_protocol"
    sweep.run("toy", videos[1], grid={"noise": [0.1, 0.4]}, seeds=2, metric=name, out=tmp_path, **OPTIONS)
    page = (tmp_path / "report.html").read_text()
    assert "Best mean AUROC in order, videos stretched: " in page
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 4 and all(0 <= float(row[name]) <= 1 for row in rows)


def test_every_metric_has_a_name_in_the_report():
    assert tuple(report._NAMES) == api.METRICS


@pytest.mark.parametrize(
    ("metric", "method", "message"),
    [
        ("ordered_auroc", toy.METHOD, r"of methods that adapt .* 'toy' scores each by itself.*--metric image_auroc"),
        ("ordered_auroc", toy.IN_ORDER, r"of frames of videos, and no test sample is one.*--metric image_auroc"),
        ("image_auroc_video_protocol", toy.METHOD, "of frames of videos, and no test sample is one"),
        ("image_auroc_per_video", toy.IN_ORDER, "unknown; expected one of image_auroc, "),
    ],
)
def test_a_metric_that_no_row_would_have_is_refused_before_training(monkeypatch, metric, method, message):
    monkeypatch.setattr(toy, "METHOD", method)
    monkeypatch.setattr(api, "compute_group", None)
    with pytest.raises(ValueError, match=message):
        sweep.run("toy", "synthetic", seeds=1, metric=metric, image_size=16)


def test_a_whole_run_scores_in_order_as_a_lone_detector_does(videos):
    data, key, cfg = load(videos[0], image_size=8).to_device().sources, jax.random.key(0), toy.ToyConfig(steps=3)
    training = {name: source for name, source in data.items() if name != "test"}
    asked = member.Ask(None, None, in_order=True)
    whole = jax.jit(lambda key: member.whole_run(key, cfg, data, asked, method=toy.METHOD))(key)
    state = jax.jit(lambda key: train.fit(toy.METHOD, key, cfg, training)[0])(key)
    alone = adaptation.score_ordered(toy.METHOD, state, data["test"])
    np.testing.assert_allclose(whole.ordered.image, alone.image, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), whole.ordered.parts, alone.parts)
