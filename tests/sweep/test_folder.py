"""The folder of a sweep: one process at a time works in it, and one that was killed does not count."""

import os
import subprocess
import sys

import pytest

from jaxad import settings
from jaxad.sweep import Request
from jaxad.sweep.folder import Folder

REQUEST = Request(settings.Settings(method="toy"))
WORKING = """
import pathlib, sys, time
from jaxad import settings
from jaxad.sweep import Request
from jaxad.sweep.folder import Folder

folder = Folder(pathlib.Path(sys.argv[1]))
folder.open(Request(settings.Settings(method="toy")), {}, [])
print("open", flush=True)
time.sleep(600)
"""


def opened(path):
    folder = Folder(path)
    folder.open(REQUEST, {}, [])
    return folder


def test_a_folder_is_one_process_s_until_it_ends_or_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "open\n"
            with pytest.raises(ValueError, match=f"process {other.pid} on .* works on a sweep in it.* another --out"):
                opened(tmp_path)
        finally:
            other.kill()
    first = opened(tmp_path)
    first.add([{"member": 0, "seed": 0}])
    assert opened(tmp_path).done == {0}  # this process may go on with its own


def test_sweeps_that_end_together_do_not_take_each_other_s_draft(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = opened(tmp_path)
    folder.add([{"member": 0, "seed": 0}])
    write_table = parquet.write_table

    def write(table, draft):
        """Another process writes the whole table before our draft is moved."""
        monkeypatch.setattr(parquet, "write_table", write_table)
        write_table(table, draft)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: 1)
            folder.write_table()

    monkeypatch.setattr(parquet, "write_table", write)
    folder.write_table()
    assert [row["member"] for row in parquet.read_table(tmp_path / "results.parquet").to_pylist()] == [0]
    assert not list(tmp_path.glob(".results*"))
