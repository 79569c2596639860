"""What benchmarks share: `race` for those on the harness (jaxad.bench); turns, facts and JSON for the others."""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]


def turns(forms, repeat):
    """The forms in the order of this repeat: A B, then B A, since what ran before leaves the caches in its state."""
    return list(forms)[:: -1 if repeat % 2 else 1]


def environment():
    """Versions, device and commit, as in the records of the harness."""
    from jaxad.bench import machine

    return machine.environment()


def write(path, result):
    """Writes a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def race(cases, *, settings, rounds, out):
    """Measures cases with the harness and prints them; writes the record if `out` names a file.

    Raises BenchmarkError after the last case if some failed.
    """
    from jaxad.bench import report
    from jaxad.console import Console

    record = report.run_all(cases, console=Console(), rounds=rounds, settings=settings, out=out)
    report.refuse_failures(record)
