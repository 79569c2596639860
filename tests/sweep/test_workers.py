"""Sweeps over ray: the same table, and a worker that is killed loses only its group."""

import csv
import io
import os
import pathlib
import signal
import threading
import types

import jax
import numpy as np
import pytest
from PIL import Image

from jaxad import methods, settings
from jaxad.cli import main
from jaxad.console import Console
from jaxad.data import DataError
from jaxad.sweep import Limits, Request, memory, workers
from jaxad.sweep.engine import Group
from jaxad.sweep.folder import TIMINGS
from jaxad.sweep.workers import Computed, Share, Slot

SMALL = ["--preset", "tiny", "--image-size", "16", "--set", "encoder=4,8", "--set", "decoder=4", "--set", "steps=6"]
COMMAND = ["sweep", "memae", *SMALL, "--grid", "num_items=5,6,7", "--seeds", "2", "--quiet"]


class Numbered:
    """All that `share_out` looks at of a member."""

    def __init__(self, index):
        self.index = index


def test_groups_are_shared_out_so_that_no_worker_waits():
    def shares(sizes, count):
        first, groups = 0, []
        for size in sizes:
            groups.append(Group(len(groups), [Numbered(first + i) for i in range(size)]))
            first += size
        found = workers.share_out(groups, count)
        assert [share.number for share in found] == list(range(len(found)))
        return [share.members for share in found]

    assert shares([3, 2, 1], 2) == [[0, 1, 2], [3, 4], [5]]  # whole groups: each is compiled once
    assert shares([5], 2) == [[0, 1, 2], [3, 4]]
    assert shares([2, 3], 4) == [[0], [1], [2, 3], [4]]
    assert shares([1], 8) == [[0]] and shares([], 2) == []


# --- what a worker gets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "count", "expected"),
    [
        ([{"CPU": 8}], 2, Slot(4, 0, 2)),
        ([{"CPU": 8}], 3, Slot(2, 0, 3)),
        ([{"CPU": 2}], 8, Slot(1, 0, 2)),  # two at a time
        ([{"CPU": 2}, {"CPU": 2}], 1, Slot(2, 0, 1)),  # no node has all four
        ([{"CPU": 4}, {"CPU": 4}], 2, Slot(4, 0, 1)),
        ([{"CPU": 4}, {"CPU": 2}], 2, Slot(2, 0, 2)),  # both may come to be on the first
        ([{"CPU": 64, "GPU": 8}], 2, Slot(1, 4, 2)),
        ([{"CPU": 64, "GPU": 8}], 16, Slot(1, 1, 8)),
        ([{"CPU": 64, "GPU": 4}, {"CPU": 96}, {"CPU": 64, "GPU": 4}], 1, Slot(1, 4, 1)),
        ([{"GPU": 8}, {"CPU": 2}], 1, Slot(2, 0, 1)),  # ray puts nothing on a node without CPUs
    ],
)
def test_a_worker_gets_no_more_than_a_node_has(nodes, count, expected):
    assert workers.slot_of(nodes, count) == expected


def test_a_cluster_that_can_hold_no_worker_is_refused():
    with pytest.raises(ValueError, match=r"--workers 2: none of the 2 living nodes .* has a CPU; expected .* Start"):
        workers.slot_of([{"CPU": 0, "GPU": 1}, {"memory": 1e9}], 2)


def small_request(*data):
    return Request(
        settings.Settings(method="toy", preset="tiny", image_size=16, config={"steps": 3}), data, seeds=(0, 1)
    )


def test_neighbours_share_the_memory_and_say_how_many_members_fit(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", "toy")
    monkeypatch.setattr(memory, "available_bytes", lambda: 8 * 2**30)
    request, limits = small_request("synthetic").to_json(), Limits()
    computed = workers.compute_share(request, {"synthetic": "synthetic"}, Share(2, [0, 1]), limits, Slot(2, 0, 4))
    assert [row["member"] for row in computed.rows] == [0, 1]
    (said,) = computed.said
    # 85 % of 8 GiB for four processes with two devices each
    assert said.startswith("group 3: 2 members at once: ") and " of 0.85 GiB on each of 2 devices" in said


def test_memory_that_is_a_worker_s_own_is_not_shared(monkeypatch):
    assert workers._share_memory(Limits(budget=5), 2, 4).budget == 5
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert workers._share_memory(Limits(), 2, 4) == Limits()


# --- what becomes of groups, without ray's processes ----------------------------------------------------------------


class Tasks:
    """Stands in for ray: tasks end in the order in which they were begun, each with its result or error.

    A task without either never ends: its node dies.
    """

    def __init__(self, nodes, results):
        self.exceptions = pytest.importorskip("ray").exceptions
        self.living, self.results, self.begun, self.needs = nodes, results, [], None

    def nodes(self):
        return [{"Alive": True, "Resources": node} for node in self.living] + [{"Alive": False}]

    def remote(self, **needs):
        self.needs = needs
        return lambda function: types.SimpleNamespace(remote=self.begin)

    def begin(self, request, paths, share, limits, slot):
        self.begun.append(share.number)
        return share.number

    def wait(self, running, *, num_returns, timeout):
        ended = [number for number in running if number in self.results][:num_returns]
        self.living = self.living if ended else []
        return ended, [number for number in running if number not in ended]

    def get(self, number):
        if isinstance(self.results[number], Exception):
            raise self.results[number]
        return self.results[number]

    def cancel(self, number, *, force):
        pass


def compute(monkeypatch, tasks, kept):
    """Four groups of a member each, by two workers. Returns what is said."""
    monkeypatch.setattr(workers, "_start_ray", lambda: tasks)
    groups, log = [Group(number, [Numbered(number)]) for number in range(4)], io.StringIO()
    options = {"limits": Limits(), "workers": 2, "console": Console(log=log)}
    try:
        workers.compute_groups(small_request("synthetic"), groups, kept.extend, **options)
    finally:
        tasks.said = log.getvalue()


def test_rows_are_kept_and_remarks_printed(monkeypatch):
    done = {number: Computed([{"member": number}], [f"group {number + 1}: fits"]) for number in range(4)}
    tasks, kept = Tasks([{"CPU": 2.0}, {"CPU": 3.0}], done), []
    compute(monkeypatch, tasks, kept)
    assert kept == [{"member": number} for number in range(4)]
    assert all(f"group {number}: fits\n" in tasks.said for number in (1, 2, 3, 4))
    assert tasks.needs == {"max_retries": 3, "num_cpus": 2, "num_gpus": 0}


def test_an_error_in_one_group_is_raised_once_those_that_run_are_kept(monkeypatch):
    error = pytest.importorskip("ray").exceptions.RayTaskError("compute_share", "Traceback", ValueError("too large"))
    tasks, kept = Tasks([{"CPU": 2}], {0: error, 1: Computed([{"member": 1}], [])}), []
    with pytest.raises(ValueError, match="^too large$") as raised:
        compute(monkeypatch, tasks, kept)
    assert type(raised.value) is ValueError and kept == [{"member": 1}] and tasks.begun == [0, 1]
    assert "group 1 failed; 1 more are waited for" in tasks.said


def test_workers_whose_nodes_have_gone_are_not_waited_for(monkeypatch):
    tasks, kept = Tasks([{"CPU": 8}], {0: Computed([{"member": 0}], [])}), []
    with pytest.raises(ValueError, match="no living node of the ray cluster has the 4 CPUs of a worker"):
        compute(monkeypatch, tasks, kept)
    assert kept == [{"member": 0}]


# --- with ray's processes -------------------------------------------------------------------------------------------


def table(folder):
    rows = csv.DictReader((folder / "results.csv").open())
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The table computed in this process."""
    folder = tmp_path_factory.mktemp("sweeps") / "here"
    main([*COMMAND, "--out", str(folder)])
    return table(folder)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    yield
    ray = pytest.importorskip("ray")
    ray.shutdown()


def descendants():
    """Processes below this one: (id, command line)."""
    parents = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1]), command

    def is_ours(process):
        while process in parents and process != os.getpid():
            process = parents[process][0]
        return process == os.getpid()

    return [(process, command) for process, (_, command) in parents.items() if is_ours(process)]


class Killer(threading.Thread):
    """Kills the first worker that computes a group."""

    def __init__(self):
        super().__init__(daemon=True)
        self.over, self.killed = threading.Event(), []

    def run(self):
        while not self.over.wait(0.05) and not self.killed:
            self.killed = [process for process, command in descendants() if "compute_share" in command][:1]
            for process in self.killed:
                os.kill(process, signal.SIGKILL)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        self.join()


def assert_same(ours, others):
    assert len(ours) == len(others) == 6
    for one, other in zip(ours, others, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            # other devices and other chunks: rounding differs, and ranks of near ties with it
            assert value == other[name] or float(value) == pytest.approx(float(other[name]), rel=1e-2, abs=5e-3), name


@pytest.mark.slow
def test_a_killed_worker_is_replaced(expected, tmp_path):
    pytest.importorskip("ray")
    with Killer() as killer:
        main([*COMMAND, "--workers", "2", "--out", str(tmp_path)])
    assert len(killer.killed) == 1
    assert_same(table(tmp_path), expected)
    assert len(list((tmp_path / "parts").iterdir())) == 3


@pytest.mark.slow
def test_a_worker_that_dies_for_good_loses_only_its_group(expected, tmp_path, monkeypatch, capsys):
    pytest.importorskip("ray")
    monkeypatch.setattr(workers, "_RETRIES", 0)
    with Killer() as killer, pytest.raises(SystemExit) as end:
        main([*COMMAND, "--workers", "2", "--out", str(tmp_path)])
    assert end.value.code == 2 and len(killer.killed) == 1
    assert "the workers of 1 of 3 groups died" in capsys.readouterr().err
    kept = {part: part.stat().st_mtime_ns for part in (tmp_path / "parts").iterdir()}
    assert len(kept) == 2 and not (tmp_path / "results.csv").exists()
    main([*COMMAND, "--workers", "2", "--out", str(tmp_path)])
    assert {part: part.stat().st_mtime_ns for part in kept} == kept
    assert_same(table(tmp_path), expected)


@pytest.mark.slow
def test_workers_elsewhere_find_relative_paths_and_their_errors_are_plain(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    workers._start_ray()  # in another folder than the sweep
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for part, count in (("train/good", 20), ("test/good", 2), ("test/hole", 2)):
        folder = tmp_path / "cloth" / part
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(draw.integers(90, 140, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
    config = {"encoder": "4,8", "decoder": "4", "steps": "2"}
    base = settings.Settings(method="memae", preset="tiny", image_size=16, config=config)
    request, kept = Request(base, ("nowhere", "cloth"), seeds=(0,)), []
    groups = [Group(number, [Numbered(number)]) for number in (0, 1)]
    with pytest.raises(DataError, match=f"^{tmp_path}/nowhere: no such file or folder") as raised:
        workers.compute_groups(request, groups, kept.extend, limits=Limits(), workers=2, console=Console(quiet=True))
    assert type(raised.value) is DataError
    assert [(row["member"], row["data"]) for row in kept] == [(1, "cloth")]
