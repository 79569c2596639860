"""What `benchmarks/gpu.sh` calls: runs the suite piece by piece within a time budget, and goes on where it stopped.

A piece is one command in a process of its own that writes one JSON file. It counts as done once that file is in the
results folder and the list of pieces says that the same command made it; what is killed half-way leaves nothing.
Never starts jax itself: a piece must find the GPU's memory free.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUITE = "suite.json"  # what was run, beside the pieces' results
DTYPES = ("bfloat16", "float32")
LEFT, FAILED = 3, 1  # exit status: run again; something does not work
_TAIL = 4000  # characters of a piece's output that are kept
_GRACE = 10  # seconds before the end of the budget at which a piece is stopped

# Names of fields that choose an implementation, wherever a method has them, and what there is to choose.
CHOICES = {"conv_impl": ("conv", "gemm"), "read_impl": ("fused", "naive")}
# XLA's own, tried on the training step and the scores of one batch.
FLAGS = {
    "latency-hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no-command-buffers": "--xla_gpu_enable_command_buffer=",
    "no-triton-gemm": "--xla_gpu_enable_triton_gemm=false",
    "exhaustive-tiling": "--xla_gpu_exhaustive_tiling_search=true",
}
# float32 products in float32 on both sides; by default jax, and torch's convolutions, use TF32.
STRICT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "NVIDIA_TF32_OVERRIDE": "0"}


class Piece(NamedTuple):
    """One command of the suite. "{json}" in it is the file to write."""

    name: str
    command: tuple[str, ...]
    seconds: int = 60  # that it may well need: not begun with less left
    environment: tuple[tuple[str, str], ...] = ()
    needs: str | None = None  # a file of the checkout; without it there is nothing to run


# --- the list -----------------------------------------------------------------------------------------------------


def pieces(methods: list[str], *, smoke: bool = False, peers: bool = True) -> Iterator[Piece]:
    """All there is to run, the most telling first."""
    small = ("--preset", "tiny", "--rounds", "1") if smoke else ()
    batches = (8,) if smoke else (32, 128, 8, 1)  # every method takes the first
    first = batches[0]

    def bench(name, method, batch, dtype, *flags, environment=(), seconds=75):
        command = ("-m", "jaxad.bench", method, "--batch", str(batch), "--dtype", dtype, *small, *flags)
        return Piece(name, (*command, "--json", "{json}"), seconds, environment)

    def race(method):
        return ("--peer",) if peers and (ROOT / "benchmarks" / "peers" / f"{method}.py").exists() else ()

    for batch in batches:
        for method in (m for m in methods if fits(m, batch, smoke=smoke)):
            for dtype in DTYPES:
                yield bench(f"bench-{method}-{dtype}-b{batch}", method, batch, dtype, *race(method))
        if batch == first:
            yield from others(smoke=smoke)
            yield from choices(methods, first, smoke=smoke)
    for method in methods:
        strict = tuple(STRICT.items())
        yield bench(f"bench-{method}-strict-b{first}", method, first, "float32", *race(method), environment=strict)
    for name, flag in FLAGS.items():
        xla = (("XLA_FLAGS", flag),)
        yield bench(f"flag-{name}-{methods[0]}-b{first}", methods[0], first, DTYPES[0], environment=xla, seconds=60)


def others(*, smoke: bool) -> Iterator[Piece]:
    """Ops, metrics and sweeps: benchmarks of the checkout, where it has them."""
    read = ("--queries", "256", "--items", "50", "--features", "16", "--rounds", "1") if smoke else ()
    quick = ("--smoke",) if smoke else ()
    modules = {"memory_read": (read, 60), "sweep": (quick, 150), "metrics": (quick, 60), "conv": (quick, 150)}
    for module, (flags, seconds) in modules.items():
        command = ("-m", f"benchmarks.{module}", *flags, "--json", "{json}")
        yield Piece(module.replace("_", "-"), command, seconds, needs=f"benchmarks/{module}.py")


def choices(methods: list[str], batch: int, *, smoke: bool) -> Iterator[Piece]:
    """Implementations of a method's parts raced against the ones that it chooses."""
    quick = ("--preset", "tiny", "--rounds", "1") if smoke else ()
    for method in methods:
        against = [f"--against={field}={value}" for field in CHOICES if has(method, field) for value in CHOICES[field]]
        for dtype in DTYPES if against else ():
            command = ("-m", "benchmarks.choices", method, "--dtype", dtype, "--batch", str(batch), *quick, *against)
            yield Piece(f"choices-{method}-{dtype}-b{batch}", (*command, "--json", "{json}"), 90)


def fits(method: str, batch: int, *, smoke: bool) -> bool:
    """Whether a method's settings for an accelerator allow a batch."""
    from jaxad import methods
    from jaxad.bench.__main__ import refusal_of
    from jaxad.bench.methods import set_up

    known = methods.get(method)
    preset = "tiny" if smoke else next(iter(known.presets))
    # With a preset and a tolerance jax is not asked for its device, and so does not start.
    return refusal_of(set_up(known, preset=preset, batch=batch, tolerance=0.1)) is None


def has(method: str, field: str) -> bool:
    """Whether a method's config has a field."""
    from jaxad import methods

    return field in methods.get(method).config.__dataclass_fields__


# --- running ------------------------------------------------------------------------------------------------------


class Suite:
    """The results folder: which pieces are done, and what they gave.

    Args:
      folder: of this device.
      bundle: file for everything at once, or None.
    """

    def __init__(self, folder: pathlib.Path, bundle: pathlib.Path | None = None):
        self.folder, self.bundle = folder, bundle
        folder.mkdir(parents=True, exist_ok=True)
        self.runs: dict[str, dict[str, Any]] = _read(folder / SUITE).get("runs", {})

    def is_done(self, piece: Piece) -> bool:
        run = self.runs.get(piece.name, {})
        same = run.get("command") == list(piece.command) and run.get("environment") == dict(piece.environment)
        return same and run.get("status") == "done" and (self.folder / f"{piece.name}.json").exists()

    def needed(self, piece: Piece) -> float:
        """Seconds a piece may need, by what it took when it was stopped."""
        run = self.runs.get(piece.name, {})
        was_stopped = run.get("code", 0) is None
        return max(piece.seconds, 1.2 * run["seconds"] if was_stopped else 0)

    def run(self, piece: Piece, *, limit: float, is_alone: bool = False) -> str:
        """Runs a piece for at most `limit` seconds and records how it ended: "done", "failed" or "stopped".

        One that `is_alone`, with a whole budget to itself, failed if it had to be stopped: no call will give it more.
        """
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            result, log = pathlib.Path(scratch) / "result.json", pathlib.Path(scratch) / "log"
            command = [str(result) if part == "{json}" else part for part in piece.command]
            code = _call([sys.executable, *command], dict(piece.environment), log, limit)
            output = log.read_text(errors="replace")
            status = "stopped" if code is None and not is_alone else "failed"
            if code is None and is_alone:
                output += f"\ntoo long: not finished after {limit:.0f} s, a whole budget. Pass a larger --budget."
            status = "done" if code == 0 and _read(result) else status
            if code is not None and _read(result):  # of a piece that failed the cases that did not
                _write(self.folder / f"{piece.name}.json", _read(result))
        self.runs[piece.name] = {
            "status": status,
            "code": code,
            "seconds": round(time.monotonic() - began, 1),
            "command": list(piece.command),
            "environment": dict(piece.environment),
            "commit": commit(),
            "output": output[-_TAIL:],
        }
        self.save()
        return status

    def save(self) -> None:
        """Writes the list and, where asked for, the bundle."""
        record = {"device": self.folder.name, "runs": self.runs}
        _write(self.folder / SUITE, record)
        if self.bundle:
            found = {name: _read(self.folder / f"{name}.json") for name in self.runs}
            _write(self.bundle, record | {"results": {name: result for name, result in found.items() if result}})


def _call(command: list[str], environment: dict[str, str], log: pathlib.Path, limit: float) -> int | None:
    """Exit status of a command, its output in `log`; None if it had to be stopped, with all that it had started."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """Kills a process with its group: torch.compile's helpers hold on to the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _stop(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # and on the way out `_call` ends the piece


def _read(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {"results": found}


def _write(path: pathlib.Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)  # a reader, and a killed run, see all of it or nothing


def commit() -> str | None:
    """Of the checkout; None where there is no git, or no repository came along."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None


def ask(code: str, *, fallback: str) -> str:
    """What a line of Python prints in a process of its own; the fallback if it fails."""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip().splitlines()[-1] if found.returncode == 0 and found.stdout.strip() else fallback


def device_name() -> str:
    """The device as a folder's name, such as "nvidia-h100-80gb-hbm3". "" if jax does not start."""
    kind = ask("import jax; print(jax.devices()[0].device_kind)", fallback="")
    return "".join(c if c.isalnum() else "-" for c in kind.lower()).strip("-")


def run_all(suite: Suite, todo: list[Piece], *, budget: float) -> int:
    """Runs what is not done and fits into the budget: exit status 0 if all is done, `LEFT` or `FAILED`."""
    end = time.monotonic() + budget
    # What failed before comes last: it may fail again.
    order = sorted(todo, key=lambda piece: suite.runs.get(piece.name, {}).get("status") == "failed")
    for piece in order:
        left = end - time.monotonic()
        if suite.is_done(piece):
            continue
        # What may need more than a budget gets a whole one; a second of it is for looking at what is done.
        if left < min(suite.needed(piece) + _GRACE, budget - 1):
            print(f"{piece.name}: {left:.0f} s left, may need {suite.needed(piece):.0f} s; next time")
            continue
        status = suite.run(piece, limit=left - _GRACE, is_alone=left >= budget - 1)
        print(f"{piece.name}: {status}, {suite.runs[piece.name]['seconds']:.0f} s")
        if status == "failed":
            print(_indented(suite.runs[piece.name]["output"][-800:]))
    states = [suite.runs.get(p.name, {}).get("status") if not suite.is_done(p) else "done" for p in todo]
    suite.save()
    print(f"{states.count('done')} of {len(todo)} pieces done, {states.count('failed')} failed. {suite.folder}")
    if all(state == "done" for state in states):
        return 0
    return FAILED if all(state in ("done", "failed") for state in states) else LEFT


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def unpack(file: pathlib.Path) -> int:
    """Puts the results of a bundle into the checkout; newer ones win."""
    record = _read(file)
    if "results" not in record or "device" not in record:
        print(f"--unpack {file}: no suite.json; expected the file that gpu.sh left under $OUT.", file=sys.stderr)
        return 2
    suite = Suite(RESULTS / record["device"])
    for name, result in record["results"].items():
        _write(suite.folder / f"{name}.json", result)
    suite.runs.update(record["runs"])
    suite.save()
    print(f"{len(record['results'])} results are in {suite.folder}; commit them.")
    return 0


# --- the command --------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=520, help="seconds after which nothing runs any more")
    parser.add_argument("--methods", help="names with commas between; default: all")
    parser.add_argument("--only", help="pieces whose name contains this")
    parser.add_argument("--out", type=pathlib.Path, help="folder of results; default benchmarks/results/<device>")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: whether it works, not how fast")
    parser.add_argument("--fresh", action="store_true", help="run again what is done, too")
    parser.add_argument("--list", action="store_true", help="print the pieces and what is done")
    parser.add_argument("--unpack", type=pathlib.Path, metavar="FILE", help="put a suite.json into the checkout")
    options = parser.parse_args(arguments)
    if options.unpack:
        return unpack(options.unpack)
    if options.budget <= _GRACE:
        print(f"--budget {options.budget:g}; expected more than {_GRACE}. Pass --budget 520.", file=sys.stderr)
        return 2
    device = device_name()
    if not device:
        print("jax does not start here; expected a Python with jax. Set PYTHON=/path/to/python.", file=sys.stderr)
        return 2
    has_torch = bool(ask("import torch; print(torch.__version__)", fallback=""))
    print(f"device {device}, {'torch found' if has_torch else 'no torch: no peers'}, {options.budget:.0f} s")
    methods = options.methods.split(",") if options.methods else known_methods()
    todo = [p for p in pieces(methods, smoke=options.smoke, peers=has_torch) if (options.only or "") in p.name]
    todo = [p for p in todo if p.needs is None or (ROOT / p.needs).exists()]
    out = os.environ.get("OUT")
    folder = options.out or RESULTS / (f"smoke-{device}" if options.smoke else device)
    suite = Suite(folder, pathlib.Path(out) / SUITE if out else None)
    if options.fresh:
        suite.runs = {name: run for name, run in suite.runs.items() if name not in {p.name for p in todo}}
    if options.list:
        for piece in todo:
            state = "done" if suite.is_done(piece) else suite.runs.get(piece.name, {}).get("status", "-")
            print(f"{state:8} {piece.name}")
        return 0
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    return run_all(suite, todo, budget=options.budget)


def known_methods() -> list[str]:
    """Names of all methods, in their order."""
    from jaxad.methods import METHODS

    return list(METHODS)


if __name__ == "__main__":
    sys.exit(main())
