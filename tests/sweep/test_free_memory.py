"""How much memory a sweep may use, on machines made of a few files."""

import pytest

from jaxad import shard
from jaxad.sweep import memory

MACHINE = {"proc/meminfo": "MemTotal:  2000 kB\nMemAvailable:  1000 kB"}
FREE = 1000 * 1024  # of the machine, in bytes
NO_LIMIT = 9223372036854771712  # what version 1 says then


@pytest.fixture
def machine(tmp_path):
    """Makes the files of a machine: its root."""

    def make(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(f"{text}\n")
        return tmp_path

    return make


def group(where, limit, used, stat=None, *, version=2):
    """The files of a control group."""
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    files = dict(zip(names, (limit, used), strict=True)) | ({} if stat is None else {"memory.stat": stat})
    return {f"sys/fs/cgroup/{where}/{name}": text for name, text in files.items()}


def in_group(line):
    """The file that says which groups a process is in."""
    return {"proc/self/cgroup": line}


OLD = "11:cpuset:/job\n4:memory:/slurm/job\n0::/"
CASES = {
    "a machine of its own": (MACHINE, FREE),
    "groups without a limit": (MACHINE | in_group("0::/user") | group("user", "max", 7), FREE),
    "a container, which sees its group as the outermost": (MACHINE | in_group("0::/") | group(".", 5000, 2000), 3000),
    "a container that is told the path outside": (MACHINE | in_group("0::/docker/1a") | group(".", 5000, 2000), 3000),
    "a parent that allows less": (
        MACHINE | in_group("0::/pod/one") | group("pod/one", 9000, 1000) | group("pod", 6000, 2000),
        4000,
    ),
    "a group of another process": (MACHINE | in_group("0::/mine") | group("other", 5000, 0), FREE),
    "files that can be dropped": (
        MACHINE | in_group("0::/") | group(".", 5000, 4500, "anon 1\ninactive_file 4000\nactive_file 2"),
        4500,
    ),
    "a group that is full": (MACHINE | in_group("0::/") | group(".", 5000, 5001), 0),
    "a group that allows more than the machine has": (MACHINE | in_group("0::/") | group(".", 10**9, 0), FREE),
    "a job under version 1": (
        MACHINE
        | in_group(OLD)
        | group("memory/slurm/job", NO_LIMIT, 3000, version=1)
        | group("memory/slurm", 8000, 3000, "inactive_file 1\ntotal_inactive_file 500", version=1),
        5500,
    ),
    "version 2 beside version 1": (MACHINE | in_group("0::/a") | group("unified/a", 5000, 1000), 4000),
    "a group alone": (in_group("0::/") | group(".", 5000, 2000), 3000),
    "nothing": ({}, None),
    "nonsense": ({"proc/meminfo": "?", "proc/self/cgroup": "?"}, None),
}


@pytest.mark.parametrize(("files", "expected"), CASES.values(), ids=CASES)
def test_the_least_of_machine_and_groups_is_available(machine, files, expected):
    assert memory.available_bytes(machine(files)) == expected


def test_devices_of_a_cpu_share_what_is_available(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert memory.free_bytes(None) == 850 and memory.free_bytes(shard.make_mesh(run=2)) == 425
