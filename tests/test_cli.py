"""The command line: every verb on a folder of pictures, what is said when the user is wrong, how light it is."""

import csv
import io
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxad import methods
from jaxad.cli import main

METHOD = "memae"
SMALL = ("--preset", "tiny", "--set", "steps=60")
HEAVY = ("jax", "flax", "numpy", "matplotlib", "PIL", "rich.progress", "tensorflow", "yaml")


def cloth(rng, *, hole=False):
    """A woven grey picture 40 wide and 30 high; with a dark hole at its upper right."""
    y, x = np.mgrid[:30, :40]
    tone = 120 + 50 * np.sin(x * 1.1 + rng.uniform(0, 6)) * np.sin(y * 0.9) + rng.normal(0, 4, (30, 40))
    if hole:
        tone[4:12, 24:36] = 5
    return Image.fromarray(np.clip(tone, 0, 255).astype(np.uint8)).convert("RGB")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An MVTec-like folder: 24 normal pictures to train on, 4 normal and 4 with a hole to test."""
    root, rng = tmp_path_factory.mktemp("data") / "cloth", np.random.default_rng(0)
    for part, count in (("train/good", 24), ("test/good", 4), ("test/hole", 4)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            cloth(rng, hole=part == "test/hole").save(root / part / f"{i:03}.png")
    (root / "ground_truth/hole").mkdir(parents=True)
    mask = np.zeros((30, 40), np.uint8)
    mask[4:12, 24:36] = 255
    for i in range(4):
        Image.fromarray(mask).save(root / "ground_truth/hole" / f"{i:03}_mask.png")
    return root


@pytest.fixture(scope="module")
def trained(parts, tmp_path_factory):
    """A run on the folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    main(["train", METHOD, "--data", str(parts), *SMALL, "--out", str(folder), "--fpr", "0.2", "--quiet"])
    return folder


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def read(path):
    return json.loads(path.read_text())


def python(code, *arguments, **options):
    """Runs code in a process of its own: standard output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


# --- start ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", [(), ("train",), ("predict",), ("data",)], ids=" ".join)
def test_help_imports_nothing_heavy(verb):
    code = f"""
import sys
from jaxad.cli import main
try:
    main([*sys.argv[1:], "--help"])
except SystemExit as end:
    print(end.code, sorted(set({HEAVY}) & set(sys.modules)))
"""
    said = python(code, *verb)
    assert said.splitlines()[-1] == "0 []"
    assert f"usage: jaxad {' '.join(verb)}".strip() in said


def test_help_is_quick():
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "jaxad", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Less than 0.5 s where nothing else runs; processor time, doubled, is what holds on a busy machine too.
    assert min(seconds() for _ in range(3)) < 1.0


def test_importing_jaxad_is_light():
    code = f"""
import sys, jaxad
print(sorted(set({HEAVY}) & set(sys.modules)))
jaxad.fit, jaxad.load, jaxad.fit_detector
print(sorted({{"tensorflow", "tensorflow_datasets", "matplotlib", "grain", "PIL", "tyro"}} & set(sys.modules)))
"""
    assert python(code) == "[]\n[]\n"


def test_python_m_is_the_command(capsys):
    main(["list"])
    said = capsys.readouterr().out
    module = subprocess.run([sys.executable, "-m", "jaxad", "list"], capture_output=True, text=True, check=True)
    assert module.stdout == said
    for name in methods.METHODS:
        assert f"\n{name}: {methods.summary(name)}\n" in "\n" + said
        assert all(f"    {preset}" in said for preset in methods.get(name).presets)


def test_info(capsys):
    import jax

    main(["info"])
    said = capsys.readouterr().out
    assert f"jax {jax.__version__}" in said and f"device: cpu x {jax.device_count()}" in said
    main(["info", "--env"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["jax"] == jax.__version__ and facts["devices"] == jax.device_count()


# --- what the user got wrong ----------------------------------------------------------------------------------------


def refused(arguments, capsys):
    """The one line on standard error with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    said, errors = capsys.readouterr()
    assert end.value.code == 2 and said == "" and errors.count("\n") == 1 and "Traceback" not in errors
    return errors


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["nothing"], ["method 'nothing' is unknown", METHOD, "jaxad list"]),
        ([METHOD, "--preset", "tinny"], ["no preset 'tinny'", "did you mean 'tiny'?", "cpu"]),
        ([METHOD, "--set", "stepps=3"], ["no field 'stepps'", "did you mean 'steps'?", "learning_rate"]),
        ([METHOD, "--set", "steps=many"], ["steps='many' is not a whole number", "expected something like"]),
        ([METHOD, "--set", "steps=1.5"], ["steps='1.5' is not a whole number"]),
        ([METHOD, "--set", "steps"], ["--set 'steps' is no assignment", "field=value"]),
        ([METHOD, "--set", "flip=perhaps"], ["flip='perhaps' is not true or false"]),
        ([METHOD, "--set", "encoder=8,x"], ["encoder='8,x' is not numbers with commas"]),
        ([METHOD, "--data", "nowhere/at/all"], ["nowhere/at/all: no such file or folder"]),
        ([METHOD, "--data", "synthetic:paper"], ["synthetic:paper is unknown", "woven"]),
        ([METHOD, "--image-size", "big"], ["--image-size 'big'", "HEIGHTxWIDTH"]),
        ([METHOD, "--image-size", "0"], ["--image-size '0'"]),
        ([METHOD, "--image-size", "64x64x3"], ["--image-size '64x64x3'"]),
        ([METHOD, "--preset", "tiny", "--image-size", "4"], ["too small"]),
        ([METHOD, "--preset", "tiny", "--fpr", "2"], ["fpr is 2.0", "between 0 and 1"]),
        ([METHOD, "--preset", "tiny", "--holdout", "1.5"], ["holdout is 1.5"]),
        ([METHOD, "--preset", "tiny", "--seed", "-1"], ["seed is -1", "whole number"]),
        ([METHOD, "--data", ".", "--layout", "shelf"], ["shelf", "mvtec"]),
        ([METHOD, "--config", "missing.yaml"], ["missing.yaml is no readable settings file"]),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    errors = refused(["train", *flags], capsys)
    assert errors.startswith("jaxad: ") and all(part in errors for part in expected), errors
    assert not list(tmp_path.iterdir())  # refused before anything was made


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("JAXAD_DEBUG", "1")
    with pytest.raises(ValueError, match="is unknown"):
        main(["train", "nothing"])


@pytest.mark.parametrize("name", ["train/good/001.png", "test/hole/000.png", "ground_truth/hole/002_mask.png"])
def test_a_damaged_picture_is_one_line(capsys, tmp_path, parts, name):
    damaged = tmp_path / "cloth"
    subprocess.run(["cp", "-r", parts, damaged], check=True)
    content = (damaged / name).read_bytes()
    (damaged / name).write_bytes(content[: len(content) // 2])
    errors = refused(["train", METHOD, "--data", damaged, *SMALL, "--out", tmp_path / "run"], capsys)
    assert str(damaged / name) in errors
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(damaged)])
    said = capsys.readouterr().out
    assert end.value.code == 1 and str(damaged / name) in said and "1 problem\n" in said


def test_what_is_no_run_is_one_line(capsys, tmp_path, parts, trained):
    picture = parts / "test/good/000.png"
    for verb in (["eval", tmp_path], ["predict", tmp_path, picture], ["export", tmp_path, "--out", tmp_path / "x"]):
        assert f"{tmp_path} holds no run" in refused(verb, capsys)
    assert "holds a run already" in refused(["train", METHOD, *SMALL, "--out", trained], capsys)
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file") in refused(["train", METHOD, *SMALL, "--quiet", "--out", tmp_path / "file"], capsys)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("sead: 3", "no setting is called 'sead' (did you mean 'seed'?)"),
        ("seed: three", "seed is 'three'; expected a whole number"),
        ("fpr: 0", "fpr is 0; expected a rate between 0 and 1"),
        ("image_size: [64]", "image_size is (64,); expected pixels a side"),
        ("image_size: 64x64", "image_size is '64x64'; expected pixels a side"),
        ("config: tiny", "config is 'tiny'; expected fields"),
        ("config: {steps: 1.5}", "steps=1.5 is not a whole number"),
        ("config: {steps: true}", "steps=True is not a whole number"),
        ("- memae", "holds list; expected names and values"),
        ("seed: [", "is no readable settings file"),
    ],
)
def test_a_wrong_settings_file_is_one_line(capsys, tmp_path, line, expected):
    (tmp_path / "settings.yaml").write_text(line + "\n")
    errors = refused(["train", METHOD, "--config", tmp_path / "settings.yaml", "--out", tmp_path / "run"], capsys)
    assert expected in errors


def test_data_check(capsys, parts):
    main(["data", "check", str(parts)])
    said = capsys.readouterr().out
    assert "layout mvtec" in said and "defects: hole 4" in said and "40 x 30 (32)" in said and "no problems" in said
    with pytest.raises(SystemExit) as end:
        main(["data", "check", str(parts / "nothing")])
    assert end.value.code == 1


def test_an_unexpected_interrupt_is_one_line(capsys, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(methods, "summary", interrupt)
    with pytest.raises(SystemExit) as end:
        main(["list"])
    assert end.value.code == 130 and capsys.readouterr().err == "jaxad: interrupted\n"


# --- train ----------------------------------------------------------------------------------------------------------


def test_train_says_what_happens(capsys, tmp_path, parts):
    main(["train", METHOD, "--data", str(parts), *SMALL, "--out", str(tmp_path / "run"), "--threshold", "f1max"])
    said, log = capsys.readouterr()
    report = read(tmp_path / "run" / "report.json")
    names, _, values = said.splitlines()
    assert "image AUROC" in names and f"{report['image_auroc']:.4g}" in values.split()
    assert "22 train, 2 holdout, 8 test" in log and "train:  60/60  100%" in log and "images/s" in log
    assert f"Look at {tmp_path / 'run' / 'report.html'}" in log
    assert report["used_test_for"] == ["threshold"]
    assert report["train_images_per_second"] == pytest.approx(60 * 16 / report["train_seconds"])


def test_train_does_what_the_flags_say(trained, parts):
    report, config = read(trained / "report.json"), read(trained / "config.json")
    assert report["image_auroc"] > 0.9  # the holes are plain to see, whatever was learned
    assert (config["data"], config["preset"], config["fpr"], config["image_size"]) == (str(parts), "tiny", 0.2, 32)
    assert config["config"]["steps"] == 60


def test_flags_win_over_the_config_file_and_that_over_the_preset(capsys, tmp_path, parts):
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"method: other\ndata: {parts}\npreset: tiny\nseed: 4\nfpr: 0.3\nimage_size: [24, 40]\n"
        "config:\n  steps: 7\n  learning_rate: 0.01\n"
    )
    flags = ["--seed", "5", "--set", "learning_rate=0.02", "--set", "encoder=8,16", "--dtype", "bfloat16"]
    main(["train", METHOD, "--config", str(file), *flags, "--out", str(tmp_path / "a"), "--quiet"])
    assert capsys.readouterr() == ("", "")  # quiet
    made = read(tmp_path / "a" / "config.json")
    assert (made["method"], made["seed"], made["fpr"], made["image_size"]) == (METHOD, 5, 0.3, [24, 40])
    assert (made["config"]["steps"], made["config"]["learning_rate"]) == (7, 0.02)
    assert (made["config"]["encoder"], made["config"]["dtype"]) == ([8, 16], "bfloat16")
    assert made["config"]["num_items"] == methods.get(METHOD).presets["tiny"].config["num_items"]
    assert made["spec"]["image"] == [24, 40, 3]
    main(["train", METHOD, "--config", str(tmp_path / "a" / "config.json"), "--out", str(tmp_path / "b"), "--quiet"])
    assert read(tmp_path / "b" / "config.json") == made
    assert (tmp_path / "b" / "scores.csv").read_bytes() == (tmp_path / "a" / "scores.csv").read_bytes()


LONG = {"mnad", "ognet"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.optimised if name in LONG else ()) for name in methods.METHODS]
)
def test_every_method_has_a_tiny_preset_that_learns(tmp_path, name):
    main(["train", name, "--data", "synthetic", "--preset", "tiny", "--out", str(tmp_path / "run"), "--quiet"])
    assert read(tmp_path / "run" / "report.json")["image_auroc"] >= 0.60


# --- eval, predict, export ------------------------------------------------------------------------------------------


def test_eval_again_and_at_another_threshold(capsys, trained, tmp_path):
    was = read(trained / "report.json")
    main(["eval", str(trained), "--quiet"])
    main(["eval", str(trained), "--quiet"])  # does not overwrite the one before
    assert read(trained / "eval" / "report.json")["image_auroc"] == was["image_auroc"]
    assert (trained / "eval-2" / "scores.csv").read_bytes() == (trained / "scores.csv").read_bytes()
    main(["eval", str(trained), "--threshold", "f1max", "--out", str(tmp_path / "best")])
    assert "image F1-max" in capsys.readouterr().out
    best = read(tmp_path / "best" / "report.json")
    assert best["used_test_for"] == ["threshold"] and best["threshold"] != was["threshold"]
    assert "The test set was used for: threshold." in (tmp_path / "best" / "report.html").read_text()
    main(["eval", str(trained), "--fpr", "0.9", "--out", str(tmp_path / "loose"), "--quiet"])
    assert read(tmp_path / "loose" / "report.json")["threshold"] < was["threshold"]
    assert read(trained / "report.json") == was


def test_eval_on_other_data(trained, parts, tmp_path):
    other = tmp_path / "other"
    for part in ("test/good", "test/hole"):
        (other / part).mkdir(parents=True)
        subprocess.run(["cp", parts / part / "000.png", other / part / "one.png"], check=True)
    subprocess.run(["cp", "-r", parts / "train", other / "train"], check=True)
    main(["eval", str(trained), "--data", str(other), "--out", str(tmp_path / "out"), "--quiet"])
    rows = table((tmp_path / "out" / "scores.csv").read_text())
    known = {row["file"]: row["score"] for row in table((trained / "scores.csv").read_text())}
    assert {row["file"]: float(row["score"]) for row in rows} == {
        f"test/{kind}/one.png": pytest.approx(float(known[f"test/{kind}/000.png"]), rel=1e-5)
        for kind in ("good", "hole")
    }


def test_predict_takes_files_folders_and_a_list(capsys, monkeypatch, tmp_path, trained, parts):
    known = {row["file"]: row for row in table((trained / "scores.csv").read_text())}
    wanted = ["test/hole/002.png", "test/good/000.png", "test/good/001.png", "test/good/002.png", "test/good/003.png"]
    main(["predict", str(trained), str(parts / wanted[0]), str(parts / "test/good")])
    said, _ = capsys.readouterr()
    rows = table(said)
    assert list(rows[0]) == ["file", "score", "score_normalised", "predicted"]
    assert [row["file"] for row in rows] == [str(parts / name) for name in wanted]
    for row, name in zip(rows, wanted, strict=True):
        assert float(row["score"]) == pytest.approx(float(known[name]["score"]), rel=1e-5)
        assert row["predicted"] == known[name]["predicted"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{parts / name}\n" for name in wanted)))
    main(["predict", str(trained), "-", "--out", str(tmp_path / "p.csv"), "--quiet"])
    assert (tmp_path / "p.csv").read_text() == said
    assert capsys.readouterr() == ("", "")


def test_predict_saves_maps(tmp_path, trained, parts):
    main(["predict", str(trained), str(parts / "test"), "--save-maps", str(tmp_path / "maps"), "--quiet"])
    maps = {str(path.relative_to(tmp_path / "maps")) for path in (tmp_path / "maps").rglob("*.*")}
    assert maps == {f"{kind}/00{i}.png" for kind in ("good", "hole") for i in range(4)}
    hole = tmp_path / "maps/hole/001.png"
    shown, picture = (np.asarray(Image.open(p).convert("RGB")).astype(int) for p in (hole, parts / "test/hole/001.png"))
    assert shown.shape == picture.shape  # at the picture's own size
    painted = np.abs(shown - picture).sum(axis=-1)
    inside = np.zeros((30, 40), bool)
    inside[2:14, 22:38] = True
    assert painted[inside].mean() > 4 * painted[~inside].mean()


def test_maps_of_different_pictures_are_different_files(tmp_path, trained, parts):
    names = ["a/b.png", "a_b.png", "a/b.bmp"]
    (tmp_path / "a").mkdir()
    for name in names:
        Image.open(parts / "test/good/000.png").save(tmp_path / name)
    for given in (names, names[:1]):
        arguments = [*(str(tmp_path / name) for name in given), "--save-maps", str(tmp_path / f"maps{len(given)}")]
        main(["predict", str(trained), *arguments, "--quiet"])
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("maps*/**/*.*")}
    assert found == {"maps3/a/b.png", "maps3/a_b.png", "maps3/a/b.bmp.png", "maps1/b.png"}


def test_predict_names_what_it_cannot_read(capsys, monkeypatch, tmp_path, trained):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    for path, why in (("gone.png", "gone.png"), ("empty", "no pictures in this folder"), ("text.png", "text.png")):
        with pytest.raises(SystemExit) as end:
            main(["predict", str(trained), str(tmp_path / path)])
        errors = capsys.readouterr().err
        assert end.value.code == 2 and errors.count("\n") == 1 and why in errors
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "no pictures given" in refused(["predict", trained, "-"], capsys)


def test_an_export_needs_only_jax(tmp_path, trained, parts):
    main(["export", str(trained), "--out", str(tmp_path / "score.bin")])
    code = """
import sys
sys.modules["jaxad"] = sys.modules["flax"] = sys.modules["optax"] = None
import numpy as np
from jax import export
score = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
images = np.load(sys.argv[2])
image, map = score.call(images)
assert map.shape == images.shape[:3] and list(score.platforms) == ["cpu", "cuda", "tpu"]
print(*image.tolist())
"""
    from jaxad.data import pictures

    names = [str(parts / f"test/hole/{i:03}.png") for i in range(3)]
    np.save(tmp_path / "images.npy", pictures.read(names, image_size=32))
    found = [float(value) for value in python(code, tmp_path / "score.bin", tmp_path / "images.npy").split()]
    known = {row["file"]: float(row["score"]) for row in table((trained / "scores.csv").read_text())}
    np.testing.assert_allclose(found, [known[f"test/hole/{i:03}.png"] for i in range(3)], rtol=1e-4)


def test_a_closed_pipe_is_no_error(trained, parts):
    command = f"{sys.executable} -m jaxad predict {trained} {parts / 'test'} --quiet | head -1"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert ended.stdout == "file,score,score_normalised,predicted\n" and ended.stderr == ""


def test_the_clip_stride_reaches_the_data(monkeypatch):
    seen = []
    monkeypatch.setattr("jaxad.runs.train_run", lambda chosen, *args, **options: (seen.append(chosen), {}))
    main(["train", "memae", "--clip-stride", "3", "--quiet"])
    assert seen[0].load_arguments()["clip_stride"] == 3
