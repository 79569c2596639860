"""Time from the command to the first training step, with a cold and with a warm cache of compiled programs.

    python -m benchmarks.startup --json benchmarks/results/cpu/startup.json

Starts `jaxad train` in processes of their own, with a cache folder of its own, and waits for the first line of
metrics.jsonl, which a run of one step writes when that step is done. Expected: <= 6 s warm on 2 cores for the MemAE
preset `cpu` (128x128).
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks.common import environment, write


def first_step(arguments, folder, cache):
    """Seconds from starting the command until its first step is logged."""
    log = folder / "metrics.jsonl"
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxad", "train", *arguments, "--set", "steps=1", "--out", str(folder), "--quiet"]
    process = subprocess.Popen(command, env={**os.environ, "JAXAD_CACHE": str(cache)})
    while not (log.exists() and log.stat().st_size):
        if process.poll() is not None and not log.exists():
            raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    process.wait()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="memae")
    parser.add_argument("--preset", default="cpu")
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    arguments = [options.method, "--preset", options.preset, "--data", options.data]
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        seconds = [first_step(arguments, folder / str(run), folder / "cache") for run in range(options.repeats + 1)]
    cold, warm = seconds[0], seconds[1:]
    print(f"first step after {cold:.1f} s with a cold cache; warm {statistics.median(warm):.2f} s", end=" ")
    print(f"(median of {len(warm)}, {min(warm):.2f} to {max(warm):.2f})")
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        seconds = {"cold_seconds": cold, "warm_seconds": warm}
        write(options.json, {"settings": settings, "environment": environment(), **seconds})


if __name__ == "__main__":
    main()
