"""`python -m jaxad.bench METHOD ...`: `jaxad bench` for checkouts where the command line's packages are missing."""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxad.bench.methods import Setting

EXIT_SLOWER = 1
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8, 32, 128)  # those that a method's settings allow


def bench(
    method: str,
    *,
    preset: str | None = None,
    image_size: str | None = None,
    batch: str | None = None,
    dtype: str = "float32",
    train: bool = False,
    score: bool = False,
    peer: bool = False,
    rounds: int = 8,
    tolerance: float | None = None,
    json_file: str | None = None,
    compare: str | None = None,
    quiet: bool = False,
) -> int:
    """Measures methods and prints a table.

    Args:
      method: name of a method, or "all".
      preset: of the method; its default on this device if None.
      image_size: pixels a side, or HEIGHTxWIDTH, if not the preset's.
      batch: batch sizes with commas between; those of `BATCHES` that the method's settings allow if None.
      dtype: one of `DTYPES`, or several with commas between.
      train, score: what to measure; both if neither is given.
      peer: race against the PyTorch versions in benchmarks/peers.
      rounds: of every case; each gives one ratio.
      tolerance: largest difference to the slow reference that is believed; that of device and dtype if None.
      json_file: file for the record.
      compare: file of an older record; changes are printed.
      quiet: print nothing.

    Returns:
      Exit status: 0, or 1 where `compare` found a contender named jaxad slower by more than the noise.

    Raises:
      ValueError: before anything is measured: an unknown name or value, a batch that a method refuses, a missing peer,
        a file that cannot be written, a record that cannot be compared with. After the last case: some failed.
    """
    from jaxad import methods
    from jaxad.bench import report
    from jaxad.bench.methods import case_names, cases, set_up
    from jaxad.bench.rivals import rivals
    from jaxad.console import Console
    from jaxad.settings import parse_size

    console = Console(quiet)
    old = _read(compare) if compare else None
    out = _writable(json_file) if json_file else None
    names = sorted(methods.METHODS) if method == "all" else [method]
    work = [name for name, asked in (("train", train), ("score", score)) if asked] or ["train", "score"]
    batches, dtypes = _batches(batch) if batch else None, _dtypes(dtype)
    if rounds < 1:
        raise ValueError(f"--rounds {rounds}; expected at least 1. Pass --rounds 8.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(
            f"--tolerance {tolerance}; expected a share of the reference's largest magnitude between 0 and 1. "
            "Pass --tolerance 1e-2."
        )
    size = parse_size(image_size)
    others = rivals(names) if peer else None
    wanted = []
    for name in names:
        for d in dtypes:
            options: dict[str, Any] = {"preset": preset, "image_size": size, "dtype": d, "tolerance": tolerance}
            wanted += at_batches(functools.partial(set_up, methods.get(name), **options), batches, say=console.say)
    if old:
        report.check_comparable(old, [name for setting in wanted for name in case_names(setting, work)])

    every = itertools.chain.from_iterable(
        report.tried(setting.name_of(part), cases(setting, work=(part,), rivals=others))
        for setting in wanted
        for part in work
    )
    settings: dict[str, Any] = {"method": method, "preset": preset, "image_size": image_size}
    settings |= {"batch": batches or list(BATCHES), "dtype": dtypes, "work": work, "peer": peer}
    record = report.run_all(every, console=console, rounds=rounds, settings=settings, out=out)
    console.table(
        [{"ceilings": d, **{f"{k} G/s": v / 1e9 for k, v in best.items()}} for d, best in record["ceilings"].items()]
    )
    status = _changes(old, record, console) if old else 0
    report.refuse_failures(record)
    return status


def at_batches(make: Callable[..., Setting], batches: list[int] | None, *, say: Callable) -> list[Setting]:
    """The settings `make(batch=...)` of the batches asked for, or of those of `BATCHES` that the method allows.

    Raises:
      ValueError: the method refuses a batch that was asked for, or all of `BATCHES`.
    """
    settings = {batch: make(batch=batch) for batch in batches or BATCHES}
    refusals = {batch: error for batch, setting in settings.items() if (error := refusal_of(setting))}
    for batch, error in refusals.items():
        reason, name = str(error).split(" Pass ")[0], settings[batch].method.name  # bench has no --set
        fitting = [b for b in BATCHES if not refusal_of(make(batch=b))]
        if not fitting:  # so it is not the batch
            raise error
        if batches:
            raise ValueError(
                f"--batch {batch}: {name} refuses it ({reason}) Expected such as {_list(fitting)}. "
                f"Pass --batch {_list(fitting)}, or leave out --batch."
            )
        say(f"{name}: no batch of {batch}: {reason}")
    return [setting for batch, setting in settings.items() if batch not in refusals]


def refusal_of(setting: Setting) -> ValueError | None:
    """Why the method refuses a setting; None if it does not."""
    from jaxad.bench.methods import spec_of

    try:
        setting.method.check(setting.cfg, spec_of(setting))
    except ValueError as error:
        return error
    return None


def _list(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _changes(old: dict[str, Any], record: dict[str, Any], console: Any) -> int:
    from jaxad.bench import report

    changes = report.compare(old, record)
    console.table(changes)
    slower = [c for c in changes if c["verdict"] == "slower" and c["by"] == "jaxad"]
    return EXIT_SLOWER if slower else 0


def _batches(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(
            f"--batch {text!r}; expected whole numbers of at least 1 with commas between. Pass --batch 1,32."
        )
    return [int(part) for part in parts]


def _dtypes(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not set(parts) <= set(DTYPES):
        raise ValueError(
            f"--dtype {text!r}; expected {' or '.join(DTYPES)}, or both with a comma. Pass --dtype float32."
        )
    return parts


def _read(path: str) -> dict[str, Any]:
    try:
        record = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--compare {path!r} cannot be read ({error}); expected a file that jaxad bench --json wrote. Name one."
        ) from error
    if not isinstance(record, dict) or "cases" not in record:
        raise ValueError(
            f"--compare {path!r} holds no cases; expected a file that jaxad bench --json wrote. Name such a file."
        )
    return record


def _writable(path: str) -> pathlib.Path:
    """The path of the record, told before hours of measuring if nothing can be written there."""
    out = pathlib.Path(path)
    try:
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--json {path!r} cannot be written ({error}); expected a file in a folder that may be written to. "
            "Name another, such as --json runs/bench.json."
        ) from error
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the flags with argparse, since tyro may be missing."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m jaxad.bench", description="Measure methods on this device.")
    parser.add_argument("method", help="name of a method, or all")
    parser.add_argument("--preset", help="the method's default on this device if not given")
    parser.add_argument("--image-size", help="pixels a side, or HEIGHTxWIDTH, if not the preset's")
    parser.add_argument("--batch", help=f"batch sizes with commas between; {_list(BATCHES)}, as far as allowed")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16, or both with a comma between")
    parser.add_argument("--train", action="store_true", help="training only, unless --score is given too")
    parser.add_argument("--score", action="store_true", help="scoring only, unless --train is given too")
    parser.add_argument("--peer", action="store_true", help="race against the PyTorch versions in benchmarks/peers")
    parser.add_argument("--rounds", type=int, default=8, help="of every case; each gives one ratio")
    parser.add_argument("--tolerance", type=float, help="largest difference to the slow reference, of its magnitude")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="write the record")
    parser.add_argument("--compare", metavar="OLD.json", help="print what changed; exit status 1 if jaxad is slower")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    options = parser.parse_args(arguments)
    if arguments is None:  # this process is ours
        from jaxad import allocator

        allocator.keep_freed_memory()
    try:
        return bench(**vars(options))
    except (ValueError, OSError) as error:
        print(f"jaxad.bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
