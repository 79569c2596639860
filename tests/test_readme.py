"""Every command and every Python example of the README runs as it stands there."""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(), flags=re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.strip().splitlines()]
EXAMPLES = [text for kind, text in BLOCKS if kind == "python"]


def test_set_up_and_tests_are_the_first_two_commands():
    """They cannot run inside a test, so their words are pinned; `.ci/run` runs both."""
    assert COMMANDS[0] == 'pip install -e ".[test]" && jaxad demo --out runs/demo'
    assert COMMANDS[1] == "pytest -n 2 --dist loadfile"
    script = (README.parent / ".ci" / "run").read_text()
    assert "pip install" in script and '-e ".[test' in script and f"exec {COMMANDS[1]}" in script


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder like the reader's, with a few pictures in MVTec AD's layout."""
    from PIL import Image

    from jaxad.data import synthetic

    root = tmp_path_factory.mktemp("readme")
    data = synthetic.load(image_size=32, num_train=40, num_test_normal=5, num_test_anomalous=8)
    for part, folder in (("train", "train"), ("holdout", "train"), ("test", "test")):
        source, rows = data.sources[part], data.rows[part]
        for i, (file, defect) in enumerate(zip(rows.files, rows.defects, strict=True)):
            path = root / "data" / "bottle" / folder / defect / f"{part}{pathlib.Path(file).stem}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(source.image[i])).save(path)
            if defect != "good":
                mask = root / "data" / "bottle" / "ground_truth" / defect / f"{path.stem}_mask.png"
                mask.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.asarray(source.mask[i]) * np.uint8(255)).save(mask)
    return root


def run(arguments, place):
    bin_folder = pathlib.Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(arguments, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_demo_reaches_what_the_readme_shows(place):
    import json

    command = COMMANDS[0].split("&&")[1]
    table = run(shlex.split(command), place)
    assert "trained" in table and "untrained" in table
    report = json.loads((place / "runs" / "demo" / "report.json").read_text())
    assert report["image_auroc"] >= 0.90 and report["untrained_image_auroc"] <= 0.75
    assert (place / "runs" / "demo" / "report.html").stat().st_size > 100_000


@pytest.mark.slow
def test_the_commands_run_in_order(place):
    for command in COMMANDS[2:]:
        assert command.startswith("jaxad "), command
        run(shlex.split(command), place)
    assert (place / "runs" / "bottle-eval" / "report.html").exists()
    assert (place / "runs" / "scores.csv").read_text().count("\n") == 14  # a header and 13 pictures
    assert len(list((place / "runs" / "maps").rglob("*.png"))) == 13


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=["three_lines", "sixteen_runs"])
def test_the_python_examples_run(example, place):
    check = "\nprint(states.params['memory'].shape)" if "states" in example else "\nprint(scores.map.shape)"
    expected = "(16, 50, 32)" if "states" in example else "(128, 32, 32)"
    assert expected in run([sys.executable, "-c", example + check], place)
