"""Run folders: what they hold, that a run goes on to the same bits after any end, and that thresholds are honest."""

import csv
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import jaxad
from jaxad import methods, runs, settings
from jaxad.console import Console
from jaxad.data.arrays import from_arrays

PROMISED = {
    *("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro", "aupro_005", "threshold"),
    *("train_seconds", "compile_seconds", "train_images_per_second", "score_images_per_second", "device"),
}
STEPS = [("mean", step) for step in (1, 2)] + [("train", step) for step in range(1, 121)]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", "toy")


@pytest.fixture
def no_page(monkeypatch):
    """Leaves report.html out: drawing it takes longer than everything else here."""
    monkeypatch.setattr("jaxad.report.write_report", lambda path, *args, **kwargs: path.write_text("a page"))


def pictures(count, *, seed):
    return np.random.default_rng(seed).integers(90, 120, (count, 8, 8, 3), np.uint8)


def made(*, normal=12, anomalous=6, masks=True, holdout=0.25, label=None):
    """15 normal pictures to train on, 5 held out; in the anomalous ones a corner is bright, in some of them hardly."""
    if not normal + anomalous:
        return from_arrays(pictures(20, seed=0), holdout=holdout)
    test, mask = pictures(normal + anomalous, seed=1), np.zeros((normal + anomalous, 8, 8), np.uint8)
    for i in range(anomalous):
        test[normal + i, :3, :3] += np.uint8(8 * i)
        mask[normal + i, :3, :3] = 1
    label = np.repeat([0, 1], [normal, anomalous]) if label is None else label
    return from_arrays(
        pictures(20, seed=0), test=test, test_label=label, test_mask=mask if masks else None, holdout=holdout
    )


def train(folder, data=None, *, resume=False, f1max=False, console=None, steps=120, **fields):
    """A run of the toy method: two steps of a pass, then 120 of training in pieces of 50, too slow to forget."""
    config = {"steps": steps, "learning_rate": 0.01}
    chosen = settings.Settings(**{"method": "toy", "data": "made", "config": config, **fields})
    return runs.train_run(chosen, folder, data=data or made(), resume=resume, f1max=f1max, console=console)


def bits(folder):
    """The bytes of all arrays of the newest checkpoint."""
    leaves = jax.tree.leaves(runs.load_detector(folder).state)
    return [(leaf.dtype, leaf.shape, np.asarray(leaf).tobytes()) for leaf in leaves]


def scores(folder):
    with open(folder / "scores.csv", newline="") as file:
        return list(csv.DictReader(file))


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["phase"], row["step"]) for row in rows]


def read(path):
    return json.loads(path.read_text())


class Ending(Console):
    """Ends the run at its n-th piece: by a signal, or by an error that comes before the piece is saved."""

    def __init__(self, piece, how):
        super().__init__(quiet=True)
        self.left, self.how = piece, how

    def progress(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            if isinstance(self.how, int):
                signal.raise_signal(self.how)
            else:
                raise self.how


# --- what a run folder holds ----------------------------------------------------------------------------------------


def test_a_run_folder_is_complete(tmp_path):
    detector, report = train(tmp_path / "run")
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "environment.json", "checkpoint", "metrics.jsonl", "calibration.json"),
        *("scores.csv", "report.json", "report.html"),
    }
    assert read(folder / "report.json") == report
    assert report.keys() >= PROMISED and not PROMISED - {name for name in report if report[name] is not None}
    assert report["train_images_per_second"] == pytest.approx(122 * 8 / report["train_seconds"])
    assert logged(folder) == STEPS
    versions = read(folder / "environment.json")["versions"]
    assert versions["jax"] == jax.__version__ and versions["jaxad"] == jaxad.__version__
    assert read(folder / "calibration.json") == detector.calibration._asdict()
    page = (folder / "report.html").read_text()
    assert f"{report['image_auroc']:.3f}" in page and "loss during training" in page


def test_scores_say_what_the_report_says(tmp_path, no_page):
    detector, report = train(tmp_path / "run")
    rows = scores(tmp_path / "run")
    assert list(rows[0]) == ["file", "label", "score", "score_normalised", "predicted", "defect"]
    assert [row["file"] for row in rows] == [f"test/{i:05d}" for i in range(18)]
    assert [row["label"] + row["defect"] for row in rows] == ["0good"] * 12 + ["1anomalous"] * 6
    score, level = np.array([(float(row["score"]), float(row["score_normalised"])) for row in rows]).T
    flagged = np.array([row["predicted"] for row in rows]) == "1"
    np.testing.assert_array_equal(flagged, score > report["threshold"])
    median = detector.calibration.image_median
    np.testing.assert_allclose(level, (score - median) / (report["threshold"] - median), rtol=1e-5)
    pairs = score[12:, None] - score[None, :12]
    assert report["image_auroc"] == pytest.approx(np.mean(pairs > 0) + np.mean(pairs == 0) / 2)
    assert report["test_tpr"] == np.mean(flagged[12:]) and report["test_fpr"] == np.mean(flagged[:12])
    assert 0 < report["test_tpr"] < 1  # neither all nor none: the comparisons above say something
    np.testing.assert_allclose(detector.score(np.asarray(made().sources["test"].image)).image, score, rtol=1e-5)


def test_the_same_seed_gives_the_same_run(tmp_path, no_page):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, seed=seed)
    assert bits(tmp_path / "a") == bits(tmp_path / "b") != bits(tmp_path / "c")
    written = [(tmp_path / name / "scores.csv").read_bytes() for name in "abc"]
    assert written[0] == written[1] != written[2]


def test_a_run_is_its_config(tmp_path, no_page):
    train(tmp_path / "run", config={"steps": 60, "learning_rate": 0.25}, seed=3, fpr=0.2)
    values = settings.read_file(tmp_path / "run" / "config.json")
    assert values["preset"] == "tiny" and values["config"] == {
        "steps": 60,
        "batch_size": 8,
        "learning_rate": 0.25,
        "noise": 0.1,
    }
    runs.train_run(settings.from_json(values), tmp_path / "again", data=made())
    assert bits(tmp_path / "run") == bits(tmp_path / "again")
    assert read(tmp_path / "run" / "config.json") == read(tmp_path / "again" / "config.json")


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    detector = runs.fit_detector("toy", made(), steps=120, learning_rate=0.01, fpr=0.5)
    assert not list(tmp_path.iterdir())
    assert detector.calibration.fpr == 0.5
    train(tmp_path / "run", fpr=0.5)
    images = pictures(5, seed=9)
    loaded = runs.load_detector(tmp_path / "run")
    np.testing.assert_array_equal(detector.score(images).image, loaded.score(images).image)
    np.testing.assert_array_equal(detector.score(images, batch_size=2).map, loaded.score(images).map)


@pytest.mark.parametrize(
    "case",
    [
        {"normal": 0, "anomalous": 0},
        {"anomalous": 0},
        {"normal": 0},
        {"holdout": 0.0},
        {"masks": False},
        {"label": np.full(18, -1), "masks": False},
        {"normal": 0, "anomalous": 0, "holdout": 0.0},
    ],
    ids=lambda case: " ".join(f"{name}={np.ravel(value)[0]}" for name, value in case.items()),
)
def test_data_with_gaps_reaches_a_report(tmp_path, case):
    detector, report = train(tmp_path / "run", made(**case))
    assert report.keys() >= PROMISED and read(tmp_path / "run" / "report.json") == report
    both = "label" not in case and case.get("normal", 1) and case.get("anomalous", 1)
    masks = case.get("masks", True) and case.get("anomalous", 1)
    assert (report["image_auroc"] is not None) == (report["image_ap"] is not None) == bool(both)
    assert (report["pixel_auroc"] is not None) == (report["aupro"] is not None) == bool(masks)
    has_holdout = "holdout" not in case
    assert (detector.calibration is not None) == (report["threshold"] is not None) == has_holdout
    assert (tmp_path / "run" / "calibration.json").exists() == has_holdout
    rows = scores(tmp_path / "run")
    assert len(rows) == report.get("test_images", 0) == case.get("normal", 12) + case.get("anomalous", 6)
    assert all((row["predicted"] in ("0", "1")) == (row["score_normalised"] != "") == has_holdout for row in rows)
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("No threshold was set" in page) == (not has_holdout)
    assert ("there was no test set" in page) == (not rows)
    loaded = runs.load_detector(tmp_path / "run")
    assert loaded.calibration == detector.calibration


# --- ended and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, RuntimeError("crash")], ids=["INT", "TERM", "crash"])
@pytest.mark.parametrize("piece", [1, 2, 3])
def test_an_ended_run_goes_on_to_the_same_bits(tmp_path, no_page, monkeypatch, piece, how):
    monkeypatch.setenv("JAXAD_SAVE_SECONDS", "0")
    train(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError if isinstance(how, RuntimeError) else runs.Interrupted):
        train(tmp_path / "run", console=Ending(piece, how))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    ended = [2, 52, 102][piece - 1]
    assert logged(tmp_path / "run") == STEPS[:ended]  # after a crash more than the checkpoint holds
    with pytest.raises((ValueError, FileNotFoundError), match="train"):
        runs.load_detector(tmp_path / "run")
    said = Said()
    train(tmp_path / "run", resume=True, console=said)
    saved = ended if isinstance(how, int) else [0, 2, 52][piece - 1]
    assert f"resumed at step {saved} of 122" in said.lines
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")
    for name in ("metrics.jsonl", "scores.csv", "calibration.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert logged(tmp_path / "run") == STEPS


class Said(Console):
    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text):
        self.lines.append(text)


def test_a_signal_saves_whatever_the_interval(tmp_path, no_page, monkeypatch):
    monkeypatch.setenv("JAXAD_SAVE_SECONDS", "1000")
    with pytest.raises(runs.Interrupted, match="SIGINT"):
        train(tmp_path / "run", console=Ending(2, signal.SIGINT))
    said = Said()
    train(tmp_path / "run", resume=True, console=said)
    assert "resumed at step 52 of 122" in said.lines
    monkeypatch.setenv("JAXAD_SAVE_SECONDS", "often")
    with pytest.raises(ValueError, match=r"JAXAD_SAVE_SECONDS=often .* expected .* pass 15"):
        train(tmp_path / "other")


def test_a_crash_before_any_checkpoint_starts_anew(tmp_path, no_page):
    train(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        train(tmp_path / "run", console=Ending(3, RuntimeError("crash")))
    train(tmp_path / "run", resume=True)
    assert bits(tmp_path / "run") == bits(tmp_path / "whole") and logged(tmp_path / "run") == STEPS


def test_resuming_a_finished_run_trains_no_more(tmp_path, no_page):
    first = train(tmp_path / "run")[1]
    (tmp_path / "run" / "report.json").unlink()
    before, was = bits(tmp_path / "run"), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = train(tmp_path / "run", resume=True, console=Ending(1, RuntimeError("trained again")))[1]
    assert bits(tmp_path / "run") == before and (tmp_path / "run" / "metrics.jsonl").read_bytes() == was
    assert {name: again[name] for name in PROMISED if "score_" not in name} == {
        name: first[name] for name in PROMISED if "score_" not in name
    }
    assert read(tmp_path / "run" / "report.json") == again


def test_another_run_does_not_go_into_the_folder(tmp_path, no_page):
    train(tmp_path / "run")
    held = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds a run already; pass --resume"):
        train(tmp_path / "run")
    with pytest.raises(ValueError, match="trained with another config; expected the same"):
        train(tmp_path / "run", resume=True, steps=121)
    with pytest.raises(ValueError, match="trained with another fpr, seed;"):
        train(tmp_path / "run", resume=True, seed=1, fpr=0.1)
    with pytest.raises(ValueError, match="trained with another fingerprint"):
        train(tmp_path / "run", made(normal=11), resume=True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == held


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run .*; expected a folder that `jaxad train` wrote"):
        runs.load_detector(tmp_path)


# --- thresholds -----------------------------------------------------------------------------------------------------


def test_the_default_threshold_never_sees_the_test_labels(tmp_path, no_page):
    label = np.repeat([0, 1], [12, 6])
    for name, labels in (("true", label), ("turned", 1 - label), ("unknown", np.full(18, -1))):
        train(tmp_path / name, made(label=labels, masks=False))
    true, *others = [scores(tmp_path / name) for name in ("true", "turned", "unknown")]
    assert len({row["predicted"] for row in true}) == 2
    for other in others:
        for column in ("file", "score", "score_normalised", "predicted"):
            assert [row[column] for row in other] == [row[column] for row in true]
    reports = [read(tmp_path / name / "report.json") for name in ("true", "turned", "unknown")]
    assert len({report["threshold"] for report in reports}) == 1
    assert [report["used_test_for"] for report in reports] == [[], [], []]
    assert reports[0]["image_auroc"] == pytest.approx(1 - reports[1]["image_auroc"])  # the labels did matter to this
    assert bits(tmp_path / "true") == bits(tmp_path / "turned")
    calibrations = [(tmp_path / name / "calibration.json").read_text() for name in ("true", "turned", "unknown")]
    assert len(set(calibrations)) == 1


def test_a_threshold_from_the_test_set_says_so(tmp_path):
    honest, report = train(tmp_path / "honest")[1], train(tmp_path / "run", f1max=True)[1]
    assert report["used_test_for"] == ["threshold"] and "optimistic" in report["threshold_kind"]
    assert "The test set was used for: threshold." in (tmp_path / "run" / "report.html").read_text()
    assert "The test set was used for: " not in (tmp_path / "honest" / "report.html").read_text()
    rows = scores(tmp_path / "run")
    label, predicted = (np.array([int(row[name]) for row in rows]) for name in ("label", "predicted"))
    f1 = 2 * np.sum(label & predicted) / (np.sum(label) + np.sum(predicted))
    assert f1 == pytest.approx(report["image_f1max"])
    assert report["threshold"] != honest["threshold"]
    assert (tmp_path / "run" / "calibration.json").read_bytes() == (
        tmp_path / "honest" / "calibration.json"
    ).read_bytes()


def test_evaluating_again(tmp_path, no_page):
    train(tmp_path / "run", fpr=0.2)
    first = read(tmp_path / "run" / "report.json")
    held = (tmp_path / "run" / "calibration.json").read_bytes()
    wanted = {"data": made(), "other": made(anomalous=3)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load", lambda where, **options: wanted.get(where) or made())
        same = runs.eval_run(tmp_path / "run", tmp_path / "same")
        strict = runs.eval_run(tmp_path / "run", tmp_path / "strict", fpr=0.5)
        other = runs.eval_run(tmp_path / "run", tmp_path / "other", data="other")
    measured = ("image_auroc", "image_ap", "pixel_auroc", "aupro", "threshold", "fpr", "test_tpr")
    assert {name: same[name] for name in measured} == {name: first[name] for name in measured}
    assert (tmp_path / "same" / "scores.csv").read_bytes() == (tmp_path / "run" / "scores.csv").read_bytes()
    assert strict["threshold"] < same["threshold"] and strict["fpr"] == 0.5
    assert strict["image_auroc"] == same["image_auroc"]
    assert other["test_images"] == 15 and other["data"] == "other" and other["threshold"] == same["threshold"]
    assert (tmp_path / "run" / "calibration.json").read_bytes() == held


# --- killed ---------------------------------------------------------------------------------------------------------

COMMAND = (sys.executable, "-m", "jaxad", "train", "memae", "--data", "synthetic", "--preset", "tiny", "--quiet")


def start(folder, *flags):
    """Trains MemAE in a process of its own, with a checkpoint after every piece."""
    command = [*COMMAND, "--set", "steps=400", "--out", str(folder), *flags]
    return subprocess.Popen(
        command, env=os.environ | {"JAXAD_SAVE_SECONDS": "0"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def steps_logged(folder):
    path = pathlib.Path(folder) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = start(folder)
    assert run.wait() == 0, run.stderr.read()
    return folder


def assert_same_run(folder, whole):
    assert bits(folder) == bits(whole)
    for name in ("metrics.jsonl", "scores.csv", "calibration.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    assert logged(folder) == [("train", step) for step in range(1, 401)]


@pytest.mark.slow
def test_killed_ten_times_it_ends_in_the_same_bits(tmp_path, whole):
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    moments = [*np.sort(rng.integers(0, 400, 8)), 399, 399]  # steps logged when the kill is due
    for moment in moments:
        run = start(folder, "--resume")
        while run.poll() is None and steps_logged(folder) < moment:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))  # in the middle of a step, of a line, of a checkpoint
        assert run.poll() is None, run.stderr.read()
        run.kill()
        run.wait()
    last = start(folder, "--resume")
    assert last.wait() == 0, last.stderr.read()
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, whole):
    folder = tmp_path / "a run"
    run = start(folder)
    while run.poll() is None and not steps_logged(folder):
        time.sleep(0.005)
    run.send_signal(signal.SIGINT)
    said, errors = run.communicate()
    assert run.returncode == 130 and said == "" and "Traceback" not in errors
    assert 0 < steps_logged(folder) < 400
    command = errors.strip().partition("go on with: ")[2]
    assert command == f"jaxad train memae --out '{folder}' --resume"
    again = [sys.executable, "-m", *shlex.split(command)]
    assert subprocess.run(again, capture_output=True, text=True, check=True).stderr.count("resumed at step") == 1
    assert_same_run(folder, whole)
