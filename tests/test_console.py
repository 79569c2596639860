"""The terminal: aligned tables, plain lines without a terminal, a bar on one, silence when quiet."""

import io
import subprocess
import sys

import pytest

from jaxad import console


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets by hand."""

    class Clock:
        now = 0.0

    monkeypatch.setattr(console.time, "monotonic", lambda: Clock.now)
    return Clock


def test_table_aligns_words_left_and_numbers_right():
    rows = [{"defect": "broken", "images": 3, "auroc": 0.98765}, {"defect": "ok", "images": 120, "auroc": float("nan")}]
    assert console.text_table(rows).splitlines() == [
        "defect  images   auroc",
        "------  ------  ------",
        "broken       3  0.9877",
        "ok         120       -",
    ]
    assert console.text_table([]) == ""


def test_plain_lines_come_at_the_start_every_ten_seconds_and_at_the_end(clock):
    log = io.StringIO()
    show = console.Console(log=log)
    for step in range(101):
        clock.now = step * 0.49
        show.progress("train", step, 100, {"grad": 3, "loss": 1 / (step + 1)}, 64.4)
    lines = log.getvalue().splitlines()
    assert len(lines) == 6  # at 0, 10, 20, 30 and 41 s and at the end
    assert lines[0] == "train:  0/100  0%  loss 1  64 images/s"
    assert lines[1] == "train:  21/100  21%  39 s left  loss 0.04545  64 images/s"
    assert lines[-1] == "train:  100/100  100%  done in 49 s  loss 0.009901  64 images/s"


def test_time_left_of_a_resumed_phase_counts_from_where_it_went_on(clock):
    log = io.StringIO()
    show = console.Console(log=log)
    show.progress("train", 900, 1000)
    clock.now = 60.0
    show.progress("train", 950, 1000)
    assert log.getvalue().splitlines()[-1] == "train:  950/1000  95%  1:00 left"


def test_a_phase_of_unknown_length_tells_how_long_it_took(clock):
    log = io.StringIO()
    show = console.Console(log=log)
    show.progress("compile", 0, None)
    clock.now = 12.4
    show.progress("compile", 1, 1)
    assert log.getvalue().splitlines() == ["compile:  started", "compile:  1/1  100%  done in 12 s"]


def test_terminal_gets_a_bar_and_remarks_stay_whole():
    log = Terminal()
    path = "runs/[red]" + "x" * 200  # rich would wrap it and read [red] as a colour
    with console.Console(log=log) as show:
        show.progress("compile", 0, None)
        show.progress("compile", 1, 1)
        show.progress("train", 0, 10)
        show.progress("train", 5, 10, {"loss": 0.125}, 512.0)
        show.say(f"checkpoint written to {path}")
        show.progress("train", 10, 10, {"loss": 0.0625}, 512.0)
    text = log.getvalue()
    assert "\x1b[?25l" in text and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # cursor hidden, then back
    assert text.split("compile")[-1].split("train")[0].count("100%") == 1  # known only after it began
    assert "100%" in text and "loss 0.0625" in text and "512 images/s" in text
    assert f"checkpoint written to {path}\n" in text


def test_a_table_ends_the_bar_and_goes_to_the_other_stream():
    out, log = io.StringIO(), Terminal()
    show = console.Console(out=out, log=log)
    show.progress("train", 1, 10)
    show.table([{"metric": "AUROC", "value": 0.5}])
    assert out.getvalue() == "metric  value\n------  -----\nAUROC     0.5\n"
    assert log.getvalue().endswith("\x1b[?25h")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_is_silent(stream):
    out, log = stream(), stream()
    with console.Console(quiet=True, out=out, log=log) as show:
        show.say("hello")
        show.progress("train", 1, 1, {"loss": 1.0})
        show.table([{"a": 1}])
    assert out.getvalue() == log.getvalue() == ""


def test_a_name_the_terminal_cannot_print_does_not_end_the_run():
    raw = io.BytesIO()
    log = io.TextIOWrapper(raw, encoding="ascii")
    console.Console(log=log).say("façade/日本.png")
    assert raw.getvalue() == b"fa\\xe7ade/\\u65e5\\u672c.png\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (9.97, "10 s"), (59.7, "1:00"), (75, "1:15"), (3675, "1:01:15")]
)
def test_clock(seconds, text):
    assert console._clock(seconds) == text


def test_importing_it_is_light():
    code = "import jaxad.console, sys; print(sorted({'jax', 'matplotlib', 'rich', 'numpy', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
