"""What all benchmarks share: timing up to the last result, facts about the machine, JSON."""

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
