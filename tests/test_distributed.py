"""Several processes are one run: the same bits as one, a share of the reading each, one end for all."""

import contextlib
import csv
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from jaxad import distributed, runs
from jaxad.cli import main

SCRIPT = pathlib.Path(__file__).with_name("one_of_several.py")
SMALL = ("memae", "--preset", "tiny", "--set", "encoder=8,16", "--set", "decoder=8", "--set", "learning_rate=1e-4")
TIMES = ("seconds", "per_second")  # parts of names in report.json that are measured by a clock


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """24 normal pictures to train on, 10 to test, of which 5 have a dark hole."""
    root, rng = tmp_path_factory.mktemp("data") / "cloth", np.random.default_rng(0)
    for part, count in (("train/good", 24), ("test/good", 5), ("test/hole", 5)):
        (root / part).mkdir(parents=True)
        for i in range(count):
            tone = rng.integers(90, 140, (32, 32, 3), np.uint8)
            tone[4:12, 20:28] -= np.uint8(80 * (part == "test/hole"))
            Image.fromarray(tone).save(root / part / f"{i:03}.png")
    return root


def start(what, *arguments, devices=1, cluster=(), **variables):
    """A process with some virtual devices; -k, because jax's runtime swallows SIGTERM at times."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_cpu_collective_call_terminate_timeout_seconds=60"
    command = [sys.executable, str(SCRIPT), what, *map(str, arguments), *map(str, cluster)]
    environment = {**os.environ, "XLA_FLAGS": flags, **variables}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_two(what, *arguments, flags=True, **variables):
    """Two processes of one device each that know each other's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    parts = ("--coordinator", "--processes", "--process") if flags else ("", "", "")
    clusters = [
        [text for pair in zip(parts, (address, 2, i), strict=True) for text in pair if text != ""] for i in (0, 1)
    ]
    return [start(what, *arguments, cluster=cluster, **variables) for cluster in clusters]


def ends(processes, seconds=240):
    """(exit status, standard output, standard error) of each; none is left running."""
    results, until = [], time.monotonic() + seconds
    try:
        for process in processes:
            said, errors = process.communicate(timeout=until - time.monotonic())
            results.append((process.returncode, said, errors))
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
    return results


def read(path):
    return json.loads(path.read_text())


def scores(folder):
    with open(folder / "scores.csv", newline="") as file:
        return np.array([float(row["score"]) for row in csv.DictReader(file)])


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory):
    """A run of two processes, and the same of one process with two devices."""
    root = tmp_path_factory.mktemp("runs")
    arguments = (*SMALL, "--set", "steps=20", "--data", pictures)
    caches = {name: {"JAXAD_CACHE": str(root / f"cache-{name}")} for name in ("two", "one")}
    two = start_two("train", *arguments, "--out", root / "two", **caches["two"])
    results = ends(two)
    (alone,) = ends([start("train", *arguments, "--mesh", "data=2", "--out", root / "one", devices=2, **caches["one"])])
    for status, _, errors in (*results, alone):
        assert status == 0, errors[-3000:]
    return root, results, alone


@pytest.mark.slow
def test_two_processes_are_one_run_to_the_bit(finished):
    """A sum of two numbers is the same in either order, so with one device each nothing may differ."""
    root, _, _ = finished
    for name in ("metrics.jsonl", "scores.csv", "calibration.json", "config.json"):
        assert (root / "two" / name).read_bytes() == (root / "one" / name).read_bytes(), name
    two, one = (
        {name: value for name, value in read(root / run / "report.json").items() if not name.endswith(TIMES)}
        for run in ("two", "one")
    )
    assert (two.pop("processes"), one.pop("processes")) == (2, 1)
    assert two == one and one["devices"] == 2 and one["image_auroc"] is not None


@pytest.mark.slow
def test_each_process_reads_half(finished):
    _, ((_, first, _), (_, second, _)), (_, alone, _) = finished
    assert [int(said.splitlines()[-1]) for said in (first, second, alone)] == [17, 17, 34]


@pytest.mark.slow
def test_only_the_first_process_speaks(finished):
    root, ((_, said, errors), (_, other, other_errors)), _ = finished
    assert "image AUROC" in said and "each batch split over 2 devices (2 processes, cpu)" in errors
    assert "AUROC" not in other and "memae" not in other + other_errors
    assert read(root / "two" / "environment.json")["processes"] == 2


@pytest.mark.slow
def test_a_run_of_two_processes_is_read_by_one(finished, pictures):
    root, _, _ = finished
    detector = runs.load_detector(root / "two")
    assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(detector.state))
    main(["eval", str(root / "two"), "--out", str(root / "again"), "--quiet"])
    np.testing.assert_allclose(scores(root / "again"), scores(root / "two"), rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_one_goes_on(pictures, tmp_path):
    """The run goes on where both stopped; its scores are those of a run that nothing stopped, to rounding."""
    arguments = (*SMALL, "--set", "steps=150", "--data", pictures)
    processes = start_two("train", *arguments, "--out", tmp_path / "run", JAXAD_SAVE_SECONDS="1000")
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and log.stat().st_size) and all(process.poll() is None for process in processes):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    (status, _, errors), (other, _, other_errors) = ends(processes)
    assert (status, other) == (130, 130), errors + other_errors
    command = errors.strip().partition("go on with: ")[2].splitlines()[0]
    assert "another process" in errors and "Traceback" not in errors + other_errors
    steps = log.read_text().count("\n")
    assert 0 < steps < 150 and steps % 50 == 0
    main([*shlex.split(command)[1:], "--quiet"])
    assert log.read_text().count("\n") == 150
    main(["train", *map(str, arguments), "--out", str(tmp_path / "whole"), "--quiet"])
    # Adam turns the rounding of sums over two devices into steps of 1e-4, see test_shard
    np.testing.assert_allclose(scores(tmp_path / "run"), scores(tmp_path / "whole"), rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_an_error_in_one_process_ends_both(pictures, tmp_path, which):
    damaged = tmp_path / "cloth"
    subprocess.run(["cp", "-r", pictures, damaged], check=True)
    name = damaged / ("test/good/000.png", "train/good/020.png")[which]  # in the first or the second half, by name
    name.write_bytes(name.read_bytes()[:100])
    results = ends(start_two("train", *SMALL, "--data", damaged, "--out", tmp_path / "run"))
    lines = [[line for line in errors.splitlines() if line.startswith("jaxad: ")] for _, _, errors in results]
    assert [status for status, _, _ in results] == [2, 2], results
    assert all(len(line) == 1 and str(name) in line[0] for line in lines), lines
    assert lines[1 - which][0].startswith(f"jaxad: process {which} ended: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_feeds_of_two_processes_read_half_of_each_batch(pictures, tmp_path):
    results = ends(start_two("stream", pictures, tmp_path / "two.npz", flags=False))
    results += ends([start("stream", pictures, tmp_path / "one.npz", devices=2)])
    assert [status for status, _, _ in results] == [0, 0, 0], [errors[-2000:] for _, _, errors in results]
    assert [int(said.split()[-1]) for _, said, _ in results] == [5 * 8, 5 * 8, 5 * 16]
    two, one = np.load(tmp_path / "two.npz"), np.load(tmp_path / "one.npz")
    for name in ("loss", "image", "map"):
        np.testing.assert_array_equal(two[name], one[name])


# --- joining --------------------------------------------------------------------------------------------------------


def test_one_process_needs_nothing_of_it():
    rows = np.arange(6).reshape(3, 2)
    assert distributed.gather(rows) is rows and distributed.gather_facts([{"a": 1}]) == [{"a": 1}]
    assert distributed.share(7) == range(7) and distributed.agree(True, False) == (True, False)
    assert distributed.is_first() and not distributed.is_active()
    with distributed.session() as several:
        assert not several and not jax.distributed.is_initialized()
    with pytest.raises(RuntimeError, match="passes through"), distributed.session():
        raise RuntimeError("passes through")


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_shares_are_all_rows_once(monkeypatch, size, processes):
    monkeypatch.setattr(distributed, "count", lambda: processes)
    found = []
    for process in range(processes):
        monkeypatch.setattr(distributed, "index", lambda process=process: process)
        found.append(list(distributed.share(size)))
    assert sum(found, []) == list(range(size)) and max(map(len, found)) == -(-size // processes)


@pytest.fixture
def joined(monkeypatch):
    """What jax was asked to do instead of doing it."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    before = jax.config.jax_enable_preemption_service
    yield calls
    jax.config.update("jax_enable_preemption_service", before)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
MPI = {
    "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:3",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({**MPI, "OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ],
    ids=["nothing", "slurm", "one task", "open mpi", "a lone pod"],
)
def test_a_cluster_is_detected(monkeypatch, joined, variables, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="started as 2 processes") if expected else contextlib.nullcontext():
        distributed.check_alone("sweep")
    assert not joined
    assert distributed.initialize() == expected
    assert joined == [(None, None, None)] * expected
    assert not distributed.initialize(num_processes=1) and len(joined) == expected


def test_flags_that_do_not_fit_are_refused(joined):
    assert distributed.initialize("host:1", 2, 1) and joined == [("host:1", 2, 1)]
    for given in (("host:1", None, None), (None, 2, 0), ("host:1", 2, None)):
        with pytest.raises(ValueError, match=r"--coordinator .* expected all three. Pass --coordinator HOST:PORT"):
            distributed.initialize(*given)
    with pytest.raises(ValueError, match=r"--coordinator host has no port; expected HOST:PORT. Pass"):
        distributed.initialize("host", 2, 0)
    with pytest.raises(ValueError, match=r"--process 2 of --processes 2; expected 0 to 1. Number"):
        distributed.initialize("host:1", 2, 2)
    assert len(joined) == 1
