"""Freed memory is kept by processes of the command line, so that it is not paid for again page by page."""

import os
import subprocess
import sys

import pytest

from jaxad import allocator, cli

_FAULTS = """
import resource
from jaxad import allocator
allocator.keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for repeat in range(3):
    before = faults()
    block = b"1" * (64 << 20)  # 16,384 pages of 4 KiB
    del block
    print(faults() - before)
"""


def faults_of_repeats(setting):
    done = subprocess.run(
        [sys.executable, "-c", _FAULTS],
        env={**os.environ, "JAXAD_MALLOC": setting},
        capture_output=True,
        text=True,
        check=True,
    )
    return [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults():
    if min(faults_of_repeats("off")) < 10_000:
        pytest.skip("this C library or kernel keeps freed memory by itself")
    assert max(faults_of_repeats("")[1:]) < 100


def test_the_command_line_asks_for_it_and_its_callers_in_python_do_not(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: asked.append(True))
    monkeypatch.setattr(sys, "argv", ["jaxad", "--help"])
    for arguments, expected in ((["--help"], []), (None, [True])):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert asked == expected
