"""`jaxad sweep` on the command line: what it leaves, what it says, what it refuses."""

import contextlib
import csv
import io
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import stats as scipy_stats

from jaxad import methods, runs
from jaxad.cli import main
from jaxad.sweep import grid
from jaxad.sweep.folder import TIMINGS

METHOD = "memae"
SMALL = ["--preset", "tiny", "--image-size", "16", "--set", "steps=6", "--set", "encoder=4,8", "--set", "decoder=4"]
AXES = ["--grid", "learning_rate=1e-3,3e-2", "--grid", "num_items=5,8", "--seeds", "0,3"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """An MVTec-like folder of other sizes than the synthetic data: 23 pictures to train on, 3 + 3 to test."""
    root, rng = tmp_path_factory.mktemp("data") / "cloth", np.random.default_rng(0)
    mask = np.zeros((16, 16), np.uint8)
    mask[4:9, 4:9] = 255
    for part, count in (("train/good", 23), ("test/good", 3), ("test/hole", 3)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            tone = rng.uniform(90, 160, (16, 16, 3)) * (1 - 0.6 * (mask[..., None] > 0) * (part == "test/hole"))
            Image.fromarray(tone.astype(np.uint8)).save(root / part / f"{i:03}.png")
    (root / "ground_truth/hole").mkdir(parents=True)
    for i in range(3):
        Image.fromarray(mask).save(root / "ground_truth/hole" / f"{i:03}_mask.png")
    return root


def run(*arguments):
    """A command: (standard output, standard error)."""
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        main(["sweep", *map(str, arguments)])
    return said.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def command(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "one"
    compared = ["--metric", "pixel_auroc", "--base", "num_items=8,learning_rate=0.03"]
    return [METHOD, "--data", "synthetic:woven", "--data", parts, *SMALL, *AXES, *compared, "--out", folder]


@pytest.fixture(scope="module")
def finished(command):
    """(folder, standard output, standard error) of a sweep."""
    return command[-1], *run(*command)


def rows_of(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def test_the_table_has_a_row_for_each_member_as_csv_and_parquet(finished):
    from pyarrow import parquet

    rows = rows_of(finished[0])
    assert len(rows) == 16 and list(rows[0])[:5] == ["member", "data", "learning_rate", "num_items", "seed"]
    assert list(rows[0])[-len(TIMINGS) :] == list(TIMINGS)
    expected = [
        (data, rate, items, seed)
        for data in ("synthetic:woven", "cloth")
        for rate in ("0.001", "0.03")
        for items in ("5", "8")
        for seed in ("0", "3")
    ]
    assert [(row["data"], row["learning_rate"], row["num_items"], row["seed"]) for row in rows] == expected
    typed = parquet.read_table(finished[0] / "results.parquet").to_pylist()
    assert [{name: str(value) for name, value in row.items()} for row in typed] == rows
    kinds = {"data": str, "learning_rate": float, "num_items": int, "seed": int, "pixel_auroc": float}
    assert {name: type(typed[0][name]) for name in kinds} == kinds


def test_members_of_one_shape_share_a_group_across_data_sets(finished):
    known = json.loads((finished[0] / "sweep.json").read_text())
    fives = [0, 1, 4, 5, 8, 9, 12, 13]
    assert known["groups"] == [fives, [i for i in range(16) if i not in fives]]
    assert len(list((finished[0] / "parts").iterdir())) == 2
    assert {row["chunk_members"] for row in rows_of(finished[0])} == {"8"}
    assert "16 members = 8 cells x 2 seeds, in 2 groups, compiled once each" in finished[2]
    assert re.search(r"group 1: 8 members at once: \S+ \wiB of \S+ GiB on each of 4 devices", finished[2])


@pytest.mark.parametrize("number", [5, 14])
def test_a_member_equals_the_lone_run_with_its_settings(command, finished, number):
    asked = grid.from_json(json.loads((finished[0] / "sweep.json").read_text())["request"])
    member = grid.members_of(methods.get(METHOD), asked)[number]
    alone = runs.train_run(member.settings)[1]
    row = rows_of(finished[0])[number]
    # 6 steps of Adam from rounding that differs; measures by rank move in steps of a pair of pictures
    assert float(row["threshold"]) == pytest.approx(alone["threshold"], rel=1e-3)
    for name in ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro"):
        assert float(row[name]) == pytest.approx(alone[name], abs=5e-3), name
    others = [other["threshold"] for other in rows_of(finished[0]) if other["member"] != str(number)]
    assert row["threshold"] not in others


def test_the_report_compares_cells_of_one_data_set_seed_by_seed(finished):
    page = (finished[0] / "report.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "paired t-test (scipy.stats.ttest_rel)" in text and "Holm" in text and "Main effects" in text
    assert not re.search(r"(src|href)=.?https?:|<script", page) and page.count("<svg") >= 4
    rows = rows_of(finished[0])

    def values(data, rate, items):
        chosen = {"data": data, "learning_rate": rate, "num_items": items}
        return np.array([float(r["pixel_auroc"]) for r in rows if chosen.items() <= r.items()])

    for data in ("synthetic:woven", "cloth"):
        ours, base = values(data, "0.001", "5"), values(data, "0.03", "8")
        p = scipy_stats.ttest_rel(ours, base).pvalue
        cells = re.search(rf"<tr[^>]*><td>{data}</td><td[^>]*>0.001</td><td[^>]*>5</td>(.*?)</tr>", page).group(1)
        seeds, mean, _, change, _, shown, _ = re.findall(r"<td[^>]*>(.*?)</td>", cells)
        assert seeds == "2" and float(mean) == pytest.approx(ours.mean(), abs=6e-4)
        assert float(change.replace("−", "-")) == pytest.approx((ours - base).mean(), abs=6e-4)
        assert float(shown.removeprefix("&lt; ")) == pytest.approx(p, abs=6e-4)
    assert page.count(">base<") == 2  # one for each data set


def test_the_printed_table_has_the_mean_of_each_cell(finished):
    folder, said, errors = finished
    lines = said.splitlines()
    assert lines[0].split() == ["data", "learning_rate", "num_items", "seeds", "pixel", "auroc", "±", "95%"]
    assert len(lines) == 10 and str(folder / "report.html") in errors
    values = [float(row["pixel_auroc"]) for row in rows_of(folder)]
    for number, line in enumerate(lines[2:]):
        assert float(line.split()[4]) == pytest.approx(np.mean(values[2 * number : 2 * number + 2]), rel=1e-3)


def test_the_same_command_again_is_silent_if_asked_and_computes_nothing(finished, command):
    folder = finished[0]
    before = {part.name: part.stat().st_mtime_ns for part in (folder / "parts").iterdir()}
    table = (folder / "results.csv").read_text()
    assert run(*command, "--quiet") == ("", "")
    assert {part.name: part.stat().st_mtime_ns for part in (folder / "parts").iterdir()} == before
    assert (folder / "results.csv").read_text() == table
    assert "16 members are done already" in run(*command)[1]


def test_without_pyarrow_the_table_is_csv(finished, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "results.csv is written, results.parquet is not" in run(*command)[1]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--grid", "learnig_rate=1,2"], ["no field 'learnig_rate'", "did you mean 'learning_rate'?"]),
        (["--grid", "steps=1,few"], ["--grid steps='few' is not a whole number", "expected something like"]),
        (["--grid", "learning_rate"], ["--grid 'learning_rate' is no axis", "field=value,value"]),
        (["--grid", "learning_rate=1e-3,0.001"], ["learning_rate has a value twice", "Leave one out"]),
        (["--grid", "steps=1,2", "--grid", "steps=3"], ["--grid steps is given twice"]),
        (["--grid", "steps=1,2", "--set", "steps=3"], ["steps is in --grid and in --set", "Drop --set steps"]),
        (["--grid", "steps=1,2", "--base", "steps=3"], ["steps has no value 3", "one of 1, 2", "Leave --base out"]),
        (["--grid", "steps=1,2", "--base", "items=3"], ["'items=3' names no axis", "one of steps"]),
        (["--seeds", "0"], ["--seeds '0'", "how many, such as 8, or which"]),
        (["--seeds", "1,1"], ["seeds has a value twice"]),
        (["--seeds", "few"], ["--seeds 'few'"]),
        (["--metric", "auroc"], ["--metric 'auroc' is unknown", "image_auroc"]),
        (["--preset", "tinny"], ["no preset 'tinny'", "did you mean 'tiny'?"]),
        (["--data", "synthetic", "--data", "nowhere"], ["nowhere: no such file or folder"]),
        (["--mesh", "rows=2"], ["--mesh 'rows=2'"]),
        (["--mesh", "run=64"], ["needs 64 devices", "the 4 devices here"]),
        (["--mesh", "data=3"], ["--mesh data=3: phase 'train' has batches of ", "Pass --mesh data="]),
        (["--workers", "-1"], ["--workers -1", "at least 0 workers"]),
        (["--mesh", "run=2", "--workers", "2", "--data", "nowhere"], ["--mesh with --workers 2", "Leave --mesh out"]),
        (["--members", "0"], ["--members 0", "1 member at a time"]),
    ],
)
def test_a_wrong_flag_is_one_line_before_any_work(capsys, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["sweep", METHOD, "--preset", "tiny", *flags])
    said, errors = capsys.readouterr()
    errors = errors.splitlines()[-1]  # data that can be loaded are told of before those that cannot
    assert end.value.code == 2 and said == "" and "Traceback" not in errors
    assert errors.startswith("jaxad: ") and all(part in errors for part in expected), errors
    assert not list(tmp_path.iterdir())


def test_each_of_several_processes_refuses_to_do_the_whole_sweep(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1", "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}
    for name, value in {**step, "SLURM_NTASKS": "4"}.items():
        monkeypatch.setenv(name, value)
    for workers in ("0", "2"):
        with pytest.raises(SystemExit) as end:
            main(["sweep", METHOD, "--data", "nowhere", "--workers", workers])
        assert end.value.code == 2 and "sweep was started as 4 processes" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(SystemExit):
        main(["sweep", METHOD, "--data", "nowhere"])
    assert "nowhere: no such file" in capsys.readouterr().err


def test_values_that_are_tuples_stand_in_parentheses():
    assert grid.parse_grid(["encoder=(4,8),(8,16)", "steps= 1, 2"]) == {
        "encoder": ("(4,8)", "(8,16)"),
        "steps": ("1", "2"),
    }
    assert grid.parse_seeds("3") == (0, 1, 2) and grid.parse_seeds("5,") == (5,) and grid.parse_seeds("4,1") == (4, 1)
    base = grid.settings.Settings(method=METHOD, preset="tiny", config={"num_items": 5})
    asked = grid.Request(base, grid={"encoder": ("(4,8)", "(8,16)")}, seeds=(7,))
    everyone = grid.members_of(methods.get(METHOD), asked)
    assert [one.cfg.encoder for one in everyone] == [(4, 8), (8, 16)]
    assert [dict(one.axes) for one in everyone] == [{"encoder": "4,8"}, {"encoder": "8,16"}]
    assert grid.find_cell(everyone, "encoder=(8,16)") == {"encoder": "8,16"}
