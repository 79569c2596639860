"""Sweeps of a small method: members equal lone runs, chunks fit the memory, killed sweeps go on."""

import io
import json
import math
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from conformance import CLOSE

from jaxad import members, methods, metrics, score, shard, sweep, train
from jaxad.cli import main
from jaxad.core import as_arrays
from jaxad.data import load
from jaxad.members import Programs
from jaxad.sweep import engine, grid, member, stack
from jaxad.sweep.folder import TIMINGS

GRID = {"learning_rate": [0.1, 0.5], "noise": [0.1, 0.4]}
OPTIONS = {"image_size": 16, "steps": 3}
FLAGS = ["--grid", "steps=2,3,4", "--grid", "noise=0.1,0.3", "--seeds", "2", "--image-size", "16", "--quiet"]


@pytest.fixture(autouse=True, scope="module")
def known():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "toy", "toy")
        yield


@pytest.fixture(scope="module")
def expected(known):
    """The table of eight members, computed at once."""
    return sweep.run("toy", grid=GRID, seeds=2, **OPTIONS)


def asked(**changes):
    """(members, library, groups) of a small sweep."""
    base = sweep.api.settings.Settings(method="toy", image_size=16, config={"steps": 3})
    request = sweep.Request(base, **{"grid": GRID, "seeds": (0, 1), **changes})
    everyone, library = grid.members_of(toy.METHOD, request), stack.Library()
    return everyone, library, engine.groups_of(toy.METHOD, everyone, library)


def results(rows):
    """Rows without what differs when they are computed again."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def assert_equal_rows(ours, others, **tolerance):
    assert [row["member"] for row in ours] == [row["member"] for row in others]
    for one, other in zip(results(ours), results(others), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value == (pytest.approx(other[name], **tolerance) if isinstance(value, float) else other[name]), name


# --- members and lone runs ------------------------------------------------------------------------------------------


def lone(one):
    """A member alone: (image scores, pixel AUROC, threshold)."""
    chosen = one.settings
    data = load(chosen.data, seed=chosen.seed, **chosen.load_arguments())
    sources = data.to_device().sources
    training = {name: source for name, source in sources.items() if name != "test"}
    for progress in train.drive(toy.METHOD, jax.random.key(chosen.seed), one.cfg, training):
        state = progress.state
    held = score.calibrate(toy.METHOD, state, sources["holdout"], fpr=chosen.fpr)
    scores = score.score_dataset(toy.METHOD, state, sources["test"])
    mask = np.asarray(data.sources["test"].mask)
    histogram = metrics.empty_histogram(centre=held.pixel_median)
    pixels = metrics.add(histogram, scores.map, mask > 0, metrics.label_regions(mask), np.ones(len(mask), bool))
    return scores.image, float(metrics.pixel_metrics(pixels)["auroc"]), held.threshold


def test_whole_members_and_members_in_pieces_equal_lone_runs():
    everyone, library, (group,) = asked()
    work = engine._Work(toy.METHOD, group, library, engine.Limits(), engine.Console(quiet=True))
    keys, cfg, data, ask = work._arguments(group.members, work._programs(8))
    pieces = member.run_pieces(keys, cfg, data, ask, method=toy.METHOD, programs=work._programs(8))
    scores, auroc, threshold = lone(everyone[5])
    np.testing.assert_allclose(pieces.image[5], scores, **CLOSE)
    assert pieces.pixel["auroc"][5] == pytest.approx(auroc, abs=1e-4)
    assert pieces.calibration["threshold"][5] == pytest.approx(threshold, rel=1e-4)
    chosen = everyone[5].settings
    sources = load(chosen.data, seed=chosen.seed, **chosen.load_arguments()).to_device().sources
    truth = member.Truth(metrics.label_regions(np.asarray(sources["test"].mask)), np.ones(len(sources["test"]), bool))
    alone = member.Ask(jax.tree.map(jnp.asarray, truth), ask.places[5])
    whole = jax.jit(lambda key, cfg: member.whole_run(key, cfg, sources, alone, method=toy.METHOD))(
        jax.random.key(chosen.seed), as_arrays(everyone[5].cfg)
    )
    fifth = jax.tree.map(lambda leaf: leaf[5], pieces)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), whole, fifth)
    assert np.abs(pieces.image[4] - pieces.image[5]).max() > 0.01  # another seed is another run


@pytest.mark.parametrize(("run", "data", "way", "mode"), [(1, 1, "vmap", "loop"), (2, 2, "map", "chunks")])
def test_devices_and_ways_give_the_same_table(expected, run, data, way, mode):
    mesh = shard.make_mesh(run=run, data=data, devices=jax.devices()[: run * data])
    table = sweep.run("toy", grid=GRID, seeds=2, limits=sweep.Limits(mesh=mesh, way=way, mode=mode), **OPTIONS)
    assert_equal_rows(table, expected, rel=1e-3, abs=1e-3)


def test_devices_that_share_batches_share_calibration_and_scoring(monkeypatch):
    flops, original = {}, Programs.compile

    def compile_and_count(programs, label, *args, **options):
        program = original(programs, label, *args, **options)
        flops[label[0]] = program.cost_analysis()["flops"]
        return program

    def count(devices):
        mesh = shard.make_mesh(data=devices, devices=jax.devices()[:devices])
        sweep.run("toy", seeds=2, limits=sweep.Limits(mesh=mesh, way="vmap"), batch_size=9, **OPTIONS)
        return dict(flops)

    monkeypatch.setattr(Programs, "compile", compile_and_count)
    one, three = count(1), count(3)
    for label in ("holdout", "tally"):  # of 32 samples, or 33; pixels are counted by every device
        assert one[label] / three[label] == pytest.approx(3, rel=0.15), label


def test_members_are_grouped_by_what_is_compiled_in():
    everyone, _, groups = asked(grid={"noise": ["0.1", "0.3"], "steps": ["2", "3"]})
    assert [[one.index for one in group.members] for group in groups] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [group.members[0].cfg.steps for group in groups] == [2, 3]
    assert [one.seed for one in everyone] == [0, 1] * 4
    assert dict(everyone[6].axes) == {"noise": 0.3, "steps": 3}


def test_values_from_numpy_ask_for_the_same_as_those_of_python(monkeypatch):
    requests = []
    monkeypatch.setattr(sweep.api, "run_request", lambda request, *rest, **options: requests.append(request.to_json()))
    numbers = {"image_size": np.int64(16), "fpr": np.float64(0.02), "batch_size": np.int32(4)}
    axes = {"steps": np.arange(2, 4), "noise": list(np.float32([0.25, 0.5])), "learning_rate": jnp.ones(1)}
    sweep.run("toy", grid=axes, seeds=np.arange(3), normal_class=np.arange(2), **numbers)
    sweep.run("toy", seeds=np.int64(2), normal_class=np.int64(1))
    axes = {"steps": [2, 3], "noise": [0.25, 0.5], "learning_rate": [1.0]}
    sweep.run("toy", grid=axes, seeds=[0, 1, 2], normal_class=[0, 1], image_size=16, fpr=0.02, batch_size=4)
    sweep.run("toy", seeds=2, normal_class=1)
    assert requests[:2] == requests[2:]


# --- memory ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_by_its_programs_is_computed_in_chunks(expected):
    one_device = shard.make_mesh(devices=jax.devices()[:1])
    _, library, (group,) = asked()
    work = engine._Work(toy.METHOD, group, library, engine.Limits(mesh=one_device), engine.Console(quiet=True))
    # as much as three members need: eight in chunks of three would leave a place empty, in chunks of two none
    limits, said = engine.Limits(mesh=one_device, budget=work._need(3)), io.StringIO()
    found = list(engine.compute_group(toy.METHOD, group, library, limits=limits, console=engine.Console(log=said)))
    assert [len(part.members) for part in found] == [2, 2, 2, 2]
    assert "8 members in 4 chunks of 2, to fit the memory: " in said.getvalue()
    assert_equal_rows([row for part in found for row in part.rows], expected, rel=1e-3, abs=1e-3)


def test_maps_of_held_out_pictures_count_and_nothing_is_compiled_twice():
    base = sweep.api.settings.Settings(method="toy", image_size=64, holdout=0.9, config={"steps": 1})
    library, everyone = stack.Library(), grid.members_of(toy.METHOD, sweep.Request(base, seeds=(0,)))
    (group,) = engine.groups_of(toy.METHOD, everyone, library)
    work = engine._Work(toy.METHOD, group, library, engine.Limits(), engine.Console(quiet=True))
    need, made = work._need(1), dict(work._programs(1)._made)
    size = {label[0]: members.bytes_of(program) for (label, *_), program in made.items()}
    assert size["calibrate"] > 2 * 230 * 64 * 64 * 4 and size["calibrate"] > max(size["step"], size["tally"])
    assert need > size["calibrate"]  # the detector stays on the device beside it
    work.compute(group.members, 1)
    later = {label[0] for label, *_ in work._programs(1)._made.keys() - made.keys()}
    assert later == {"init", "finish", "pixel"}


@pytest.mark.parametrize(
    ("total", "devices", "most", "size"),
    [
        *((16, 6, 16, 18), (8, 3, 8, 9), (20, 8, 20, 24), (20, 3, 20, 21), (16, 2, 16, 16)),  # all fit: one chunk
        *((16, 6, 15, 12), (8, 3, 5, 3), (8, 3, 2, 3), (20, 4, 19, 12), (9, 1, 4, 3), (8, 1, 1, 1)),
        (7, 1, 6, 4),  # 8 places; chunks of 6 and 5 have 12 and 10, and of 1, which have 7, would be small
        (12, 1, 11, 6),
    ],
)
def test_chunks_leave_few_places_empty(total, devices, most, size):
    assert engine.spread(total, most, devices) == size


def test_members_that_fit_are_computed_at_once_on_devices_that_do_not_divide_them(monkeypatch):
    monkeypatch.setattr(engine._Work, "_need", lambda work, count: 0)
    _, library, (group,) = asked()
    for most, size, told in ((None, 9, "at once"), (8, 9, "at once"), (5, 3, "in 3 chunks of 3, as asked")):
        limits, said = engine.Limits(mesh=shard.make_mesh(run=3), members=most), io.StringIO()
        work = engine._Work(toy.METHOD, group, library, limits, engine.Console(log=said))
        assert work.chunk_size() == size and f"8 members {told}: " in said.getvalue()


@pytest.mark.parametrize("while_compiling", [True, False])
def test_chunks_that_run_out_of_memory_are_halved(expected, monkeypatch, while_compiling):
    name = "_need" if while_compiling else "compute"
    original, tried = getattr(engine._Work, name), []

    def out_of_memory(work, first, *rest):
        count = first if while_compiling else len(first)
        tried.append(count)
        if count > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return original(work, first, *rest)

    monkeypatch.setattr(engine._Work, name, out_of_memory)
    limits = sweep.Limits(mesh=shard.make_mesh(devices=jax.devices()[:1]))
    table = sweep.run("toy", grid=GRID, seeds=2, limits=limits, **OPTIONS)
    assert tried == ([8, 4, 2] if while_compiling else [8, 4, 2, 2, 2, 2])
    assert [row["chunk_members"] for row in table] == [2] * 8
    assert_equal_rows(table, expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("message", "sizes"), [("INTERNAL: broken", [8]), ("RESOURCE_EXHAUSTED: too much", [8, 4, 2, 1])]
)
def test_other_failures_and_a_member_that_never_fits_are_told(monkeypatch, message, sizes):
    tried = []

    def compute(work, members, count):
        tried.append(count)
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(engine._Work, "compute", compute)
    limits = sweep.Limits(mesh=shard.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        sweep.run("toy", grid=GRID, seeds=2, limits=limits, **OPTIONS)
    assert tried == sizes


# --- going on -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from jaxad import cli, methods
from jaxad.sweep import engine

methods.METHODS["toy"] = "toy"
original, calls = engine.run_pieces, []

def run_pieces(*args, show, **options):
    calls.append(None)

    def deadly(name, step, steps, values):
        if len(calls) == 3 and name == "train":
            os.kill(os.getpid(), signal.SIGKILL)

    return original(*args, show=deadly, **options)

engine.run_pieces = run_pieces
cli.main(sys.argv[1:])
"""


def test_a_killed_sweep_goes_on_without_computing_groups_again(tmp_path, monkeypatch, compiled_alike):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    main(["sweep", "toy", *FLAGS, "--out", str(whole)])
    command = [sys.executable, "-c", KILLED, "sweep", "toy", *FLAGS, "--out", str(killed)]
    tests = str(pathlib.Path(__file__).parents[1])
    ended = subprocess.run(command, env={**compiled_alike, "PYTHONPATH": tests}, check=False)
    assert ended.returncode == -signal.SIGKILL  # in the middle of the third group
    parts = {part.name: (part.read_bytes(), part.stat().st_mtime_ns) for part in (killed / "parts").glob("*.json")}
    assert len(parts) == 2 and not (killed / "results.csv").exists()

    computed, original = [], engine._Work.compute
    monkeypatch.setattr(
        engine._Work, "compute", lambda work, members, count: computed.append(members) or original(work, members, count)
    )
    main(["sweep", "toy", *FLAGS, "--out", str(killed)])
    assert [[one.cfg.steps for one in members] for members in computed] == [[4] * 4]
    for name, before in parts.items():
        part = killed / "parts" / name
        assert (part.read_bytes(), part.stat().st_mtime_ns) == before
    ours, theirs = (
        [line.split(",")[: -len(TIMINGS)] for line in (folder / "results.csv").read_text().splitlines()]
        for folder in (killed, whole)
    )
    assert ours == theirs and len(ours) == 13
    main(["sweep", "toy", *FLAGS, "--out", str(killed)])
    assert len(computed) == 1  # nothing was left


def test_a_folder_keeps_to_its_sweep(tmp_path, monkeypatch):
    def start(noise=(0.1,), **options):
        return sweep.run("toy", grid={"noise": noise}, seeds=1, out=tmp_path, **{**OPTIONS, **options})

    start()
    with pytest.raises(ValueError, match=r"another sweep: grid.noise differ.*another --out"):
        start((0.1, 0.2))
    with pytest.raises(ValueError, match="another sweep: fpr differ"):
        start(fpr=0.02)
    known = json.loads((tmp_path / "sweep.json").read_text())
    known["fingerprints"] = dict.fromkeys(known["fingerprints"], "of other pictures")
    (tmp_path / "sweep.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match="another sweep: fingerprints.synthetic seed 0 differ"):
        start()
    assert known["request"]["base"]["preset"] == "tiny"  # not "what is best on this device", which may change
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run, no sweep"):
        sweep.run("toy", seeds=1, out=run, **OPTIONS)


# --- what cannot be measured ----------------------------------------------------------------------------------------


def test_a_member_that_diverges_is_told_and_left_out(tmp_path):
    rates = {"learning_rate": [0.5, 1e30]}
    table = sweep.run("toy", grid=rates, seeds=2, out=tmp_path, **OPTIONS)
    assert [math.isfinite(row["image_auroc"] or math.nan) for row in table] == [True, True, False, False]
    report = (tmp_path / "report.html").read_text()
    assert "2 of 4 runs have no image AUROC" in report and "NaN" not in (tmp_path / "results.csv").read_text()
