"""What the terminal shows: lines, a progress bar (plain lines where there is no terminal) and aligned tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

_INTERVAL = 10.0  # seconds between two plain lines of one phase


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text in aligned columns, numbers to the right; the first row's keys are the columns.

    Args:
      rows: dicts; a missing or None value prints as "-", a float with four significant digits.

    Returns:
      Lines without a final newline; "" without rows.
    """
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [all(row.get(column) is None or _is_number(row[column]) for row in rows) for column in columns]

    def line(values: Sequence[str]) -> str:
        pairs = zip(values, widths, numeric, strict=True)
        return "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in pairs).rstrip()

    return "\n".join([line(columns), line(["-" * width for width in widths]), *map(line, cells)])


class Console:
    """Says what happens: results on `out`, progress and remarks on `log`. Usable as a context manager.

    Args:
      quiet: print nothing at all.
      out: where tables go; standard output if not given.
      log: where `say` and `progress` go; standard error if not given, so that a result on standard output can be piped.
    """

    def __init__(self, quiet: bool = False, *, out: TextIO | None = None, log: TextIO | None = None):
        self._quiet = quiet
        self._out = out or sys.stdout
        self._log = log or sys.stderr
        self._bar: Any = None  # rich's Progress while a bar is drawn
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, tuple[float, int]] = {}  # phase -> (time, step) of its first call
        self._printed: dict[str, float] = {}  # phase -> time of its last plain line

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Prints one remark, above the bar if there is one."""
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            _write(self._log, text)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Prints a result as an aligned table (see `text_table`)."""
        if self._quiet:
            return
        self.close()  # a bar still drawn would be torn by the table
        _write(self._out, text_table(rows))

    def progress(
        self,
        phase: str,
        step: int,
        steps: int | None,
        metrics: Mapping[str, Any] | None = None,
        images_per_second: float | None = None,
    ) -> None:
        """Shows how far a phase is: a bar on a terminal, else a line at its start, every 10 s and at its end.

        Args:
          phase: name; a new name starts a new bar.
          step: steps done, 0 at the start.
          steps: steps in all; None while unknown (compiling): no share and no time left are shown.
          metrics: scalars of the newest step; "loss" is shown, or the first one if there is no loss.
          images_per_second: newest rate; None: not shown.
        """
        if self._quiet:
            return
        now = time.monotonic()
        self._started.setdefault(phase, (now, step))
        facts = _facts(metrics or {}, images_per_second)
        if self._log.isatty():
            self._draw(phase, step, steps, facts)
        elif self._is_due(phase, step, steps, now):
            self._printed[phase] = now
            _write(self._log, "  ".join([f"{phase}:", *self._where(phase, step, steps, now), *facts]))

    def close(self) -> None:
        """Ends the bar and gives the terminal its cursor back; the next `progress` starts afresh."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._tasks.clear()
        self._started.clear()
        self._printed.clear()

    def _is_due(self, phase: str, step: int, steps: int | None, now: float) -> bool:
        return phase not in self._printed or step == steps or now - self._printed[phase] >= _INTERVAL

    def _where(self, phase: str, step: int, steps: int | None, now: float) -> list[str]:
        began, first = self._started[phase]
        elapsed, done = now - began, step - first
        if steps is None:
            return ["started"] if elapsed < 1 else [f"{_clock(elapsed)} so far"]
        share = [f"{step}/{steps}", f"{100 * step // max(steps, 1)}%"]
        if step >= steps:
            return [*share, f"done in {_clock(elapsed)}"]
        return [*share, f"{_clock(elapsed / done * (steps - step))} left"] if done > 0 else share

    def _draw(self, phase: str, step: int, steps: int | None, facts: list[str]) -> None:
        if self._bar is None:
            self._bar = _new_bar(self._log)
            self._bar.start()
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=steps, facts="")
        self._bar.update(self._tasks[phase], completed=step, total=steps, facts="  ".join(facts))


def _new_bar(stream: TextIO) -> Any:
    from rich import console, progress

    return progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=24),
        progress.TextColumn("{task.percentage:>3.0f}%"),
        progress.TextColumn("{task.fields[facts]}", markup=False),
        progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        console=console.Console(file=stream),
        refresh_per_second=4,  # each redraw takes time from training on a small machine
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _facts(metrics: Mapping[str, Any], images_per_second: float | None) -> list[str]:
    name = "loss" if "loss" in metrics else next(iter(metrics), None)
    facts = [] if name is None else [f"{name} {float(metrics[name]):.4g}"]
    return facts if images_per_second is None else [*facts, f"{images_per_second:,.0f} images/s"]


def _clock(seconds: float) -> str:
    """12.3 -> "12 s", 75 -> "1:15", 3675 -> "1:01:15"."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN: not defined here, as None
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(stream: TextIO, text: str) -> None:
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # a file name that the terminal's encoding lacks must not end a run
        encoding = stream.encoding or "ascii"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
