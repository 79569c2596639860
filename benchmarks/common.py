"""For benchmarks that are no race, and so have no use for the harness (jaxad.bench): a stopwatch, the machine, JSON."""

import json
import pathlib
import platform
import subprocess
import time

import jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


def compile_step(step, arguments):
    """Compiles ahead of time: (the program, seconds it took)."""
    start = time.perf_counter()
    compiled = jax.jit(step).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def timed(compiled, *arguments):
    """Runs a program to the end: (seconds, result)."""
    start = time.perf_counter()
    result = jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - start, result


def turns(forms, repeat):
    """The forms in the order of this repeat: A B, then B A, since what ran before leaves the caches in its state."""
    return list(forms)[:: -1 if repeat % 2 else 1]


def environment():
    """Versions, device and commit, for the record."""
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "device": device.device_kind,
        "platform": device.platform,
        "machine": platform.machine(),
        "commit": commit.stdout.strip() or None,
    }


def write(path, result):
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def race(cases, *, settings, rounds, out):
    """Measures cases with the harness, prints their tables and ratios, and writes the record if `out` names a file."""
    from jaxad import files
    from jaxad.bench import race as racing
    from jaxad.bench import report
    from jaxad.console import Console

    console = Console()

    def say(record):
        console.table(report.rows(record))
        for line in report.ratio_lines(record):
            console.say(line)

    effort = racing.Effort(rounds=rounds, least_rounds=min(rounds, racing.Effort().least_rounds))
    records, ceilings = report.run_all(cases, effort=effort, say=say)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(out, report.record_of(records, {**settings, "rounds": rounds}, ceilings))
