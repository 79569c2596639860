"""The folder of a sweep: what was asked, the results as they come in, the table.

sweep.json         the request, fingerprints of the data, groups, environment
parts/*.json       rows of finished chunks, each file written in one move
results.csv        a row for each member
results.parquet    the same, where pyarrow is installed
report.html        means, intervals, comparisons
.lock              locked by the process that works here, and naming it
"""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import platform
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from jaxad.files import environment, plain, write_json, write_text
from jaxad.sweep.grid import Request

try:
    import fcntl
except ImportError:  # Windows, where two sweeps in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

# Figures of the computation, not of the member: last in the table, and different when it is computed again.
TIMINGS = ("chunk_members", "chunk_seconds", "chunk_compile_seconds")


class Folder:
    """A sweep's folder, opened for one request by one process. `path` None keeps everything in memory."""

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self._rows: dict[int, dict[str, Any]] = {}

    def open(self, request: Request, fingerprints: Mapping[str, str], groups: Sequence[Sequence[int]]) -> None:
        """Makes the folder, or takes it up again; no other process can until this object or this process is gone.

        Raises:
          ValueError: it holds the results of another request, or of other data, or another process works in it.
        """
        if self.path is None:
            return
        asked = {"request": request.to_json(), "fingerprints": dict(fingerprints)}
        known = self.path / "sweep.json"
        if (self.path / "config.json").exists() and not known.exists():
            raise ValueError(f"{self.path} holds a run, no sweep; expected a new folder. Pass another --out.")
        (self.path / "parts").mkdir(parents=True, exist_ok=True)
        weakref.finalize(self, os.close, _lock(self.path))
        if known.exists():
            before = json.loads(known.read_text(encoding="utf-8"))
            changed = _changes({name: before.get(name) for name in asked}, asked)
            if changed:
                raise ValueError(
                    f"{self.path} holds another sweep: {', '.join(changed)} differ; expected the same command, to go "
                    "on with it. Repeat that command, or pass another --out."
                )
        else:
            write_json(known, {**asked, "groups": [list(group) for group in groups], "environment": environment()})
        for part in sorted((self.path / "parts").glob("*.json")):
            self._take(json.loads(part.read_text(encoding="utf-8")))

    def add(self, finished: Sequence[Mapping[str, Any]]) -> None:
        """Keeps the rows of finished members."""
        rows: list[dict[str, Any]] = plain(finished)
        if self.path is not None:
            numbers = [row["member"] for row in rows]
            write_json(self.path / "parts" / f"{min(numbers):06}-{max(numbers):06}-{len(numbers)}.json", rows)
        self._take(rows)

    def _take(self, rows: Sequence[dict[str, Any]]) -> None:
        self._rows |= {row["member"]: row for row in rows}

    @property
    def done(self) -> frozenset[int]:
        """Members whose results are known."""
        return frozenset(self._rows)

    def table(self) -> list[dict[str, Any]]:
        """The rows of all finished members in order, with the same columns each; what a member lacks is None."""
        rows = [self._rows[number] for number in sorted(self._rows)]
        names = list(dict.fromkeys(name for row in rows for name in row if name not in TIMINGS))
        return [{name: row.get(name) for name in (*names, *TIMINGS)} for row in rows]

    def write_table(self) -> str:
        """Writes results.csv and results.parquet. Returns a remark, "" if there is none."""
        if self.path is None:
            return ""
        rows = self.table()
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "results.csv", text.getvalue())
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            return "pyarrow is not installed: results.csv is written, results.parquet is not."
        draft = self.path / f".results.parquet.{os.getpid()}"
        parquet.write_table(pyarrow.Table.from_pylist(rows), draft)
        draft.replace(self.path / "results.parquet")
        return ""


def _lock(folder: pathlib.Path) -> int:
    """Locks a folder for this process. Returns the descriptor whose closing unlocks it.

    The kernel unlocks what a killed process had locked, so that the sweep can go on.

    Raises:
      ValueError: another process has locked it.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a forked child that outlives us would keep it
    except BlockingIOError:
        holder = os.pread(file, 1000, 0).decode(errors="replace") or "another process"
        os.close(file)
        raise ValueError(
            f"{folder}: {holder} works on a sweep in it; expected one at a time. Wait until it ends, or pass another "
            "--out."
        ) from None
    except OSError:  # a file system without locks
        return file
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    return file


def _changes(before: Any, after: Any, name: str = "") -> list[str]:
    """Names of the settings that differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            change
            for key in sorted({*before, *after})
            for change in _changes(before.get(key), after.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == after else [name.removeprefix("request.").removeprefix("base.")]
