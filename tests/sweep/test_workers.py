"""Sweeps over ray: the same table, and a worker that is killed loses only its group."""

import csv
import os
import pathlib
import signal
import threading

import pytest

from jaxad.cli import main
from jaxad.sweep import workers
from jaxad.sweep.engine import Group
from jaxad.sweep.folder import TIMINGS

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
        return workers.share_out(groups, count)

    assert shares([3, 2, 1], 2) == [[0, 1, 2], [3, 4], [5]]  # whole groups: each is compiled once
    assert shares([5], 2) == [[0, 1, 2], [3, 4]]
    assert shares([2, 3], 4) == [[0], [1], [2, 3], [4]]
    assert shares([1], 8) == [[0]] and shares([], 2) == []


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
