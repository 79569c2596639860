"""`python -m jaxad.bench METHOD ...`: `jaxad bench` for checkouts where the command line's packages are missing."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

EXIT_SLOWER = 1
DTYPES = ("float32", "bfloat16")
BATCHES = "1,8,32,128"


def bench(
    method: str,
    *,
    preset: str | None = None,
    image_size: str | None = None,
    batch: str = BATCHES,
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
      batch: batch sizes with commas between.
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
      ValueError: an unknown name or value, a missing peer, or a measurement that must not be believed.
    """
    from jaxad import methods
    from jaxad.bench import report
    from jaxad.bench.methods import cases, set_up
    from jaxad.bench.rivals import rivals
    from jaxad.console import Console
    from jaxad.settings import parse_size

    console = Console(quiet)
    old = _read(compare) if compare else None
    names = sorted(methods.METHODS) if method == "all" else [method]
    work = [name for name, asked in (("train", train), ("score", score)) if asked] or ["train", "score"]
    batches, dtypes = _batches(batch), _dtypes(dtype)
    if rounds < 1:
        raise ValueError(f"--rounds {rounds}; expected at least 1. Pass --rounds 8.")
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(
            f"--tolerance {tolerance}; expected a share of the reference's largest magnitude between 0 and 1. "
            "Pass --tolerance 1e-2."
        )
    size = parse_size(image_size)
    others = rivals(console.say, names) if peer else None
    wanted = [
        set_up(methods.get(name), preset=preset, image_size=size, batch=b, dtype=d, tolerance=tolerance)
        for name in names
        for d in dtypes
        for b in batches
    ]

    every = (case for setting in wanted for case in cases(setting, work=work, rivals=others))
    settings: dict[str, Any] = {"method": method, "preset": preset, "image_size": image_size}
    settings |= {"batch": batches, "dtype": dtypes, "work": work, "peer": peer}
    out = pathlib.Path(json_file) if json_file else None
    record = report.run_all(every, console=console, rounds=rounds, settings=settings, out=out)
    console.table(
        [{"ceilings": d, **{f"{k} G/s": v / 1e9 for k, v in best.items()}} for d, best in record["ceilings"].items()]
    )
    return _changes(old, record, console) if old else 0


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the flags with argparse, since tyro may be missing."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m jaxad.bench", description="Measure methods on this device.")
    parser.add_argument("method", help="name of a method, or all")
    parser.add_argument("--preset", help="the method's default on this device if not given")
    parser.add_argument("--image-size", help="pixels a side, or HEIGHTxWIDTH, if not the preset's")
    parser.add_argument("--batch", default=BATCHES, help="batch sizes with commas between")
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
    except ValueError as error:
        print(f"jaxad.bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
