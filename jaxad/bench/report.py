"""Records of benchmarks: JSON, tables, and what changed since an older record."""

from __future__ import annotations

import pathlib
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxad import files
from jaxad.bench import machine, race
from jaxad.bench.case import BenchmarkError, Case, Contender

SCHEMA = 1
_NOISE = 0.1  # changes below a tenth are never called one
_BUSY = 0.1  # of the processors: what other programs may take before a remark is due


def summary(values: Sequence[float]) -> dict[str, float]:
    """Percentiles of measurements: p50, p95, p99, min, max, mean, and `spread`, the interquartile range over p50."""
    p25, p50, p75, p95, p99 = (float(v) for v in np.percentile(values, (25, 50, 75, 95, 99)))
    ends = {"min": float(np.min(values)), "max": float(np.max(values)), "mean": float(np.mean(values))}
    return {"p50": p50, "p95": p95, "p99": p99, **ends, "spread": (p75 - p25) / p50, "count": len(values)}


def measure(case: Case, ceilings: machine.Ceilings, *, effort: race.Effort | None = None) -> dict[str, Any]:
    """Checks and times a case: its record.

    Raises:
      BenchmarkError: an output or a timing that must not be believed.
    """
    dtype = case.facts.get("dtype", "float32")
    ceilings.measure(dtype)
    checked = race.check(case, np.random.default_rng(2))
    with machine.OtherLoad() as others:
        turns, rounds = _race(case, ceilings, effort, dtype)
    best = ceilings.measure(dtype)
    first = case.contenders[0].name
    contenders = [_record(case, c, turns[c.name], checked, best) for c in case.contenders]
    ratios = {c.name: ratio([r[c.name] / r[first] for r in rounds]) for c in case.contenders[1:]}
    record = {"case": case.name, **case.facts, "samples": case.samples, "ceilings": best, "other_load": others.share}
    record["check"] = {name: checked[name] for name in ("against", "tolerance", "worst", "changes")}
    return {**record, "contenders": contenders, "time_over": {"name": first, "ratios": ratios}}


def _race(case: Case, ceilings: machine.Ceilings, effort: race.Effort | None, dtype: str):
    try:
        return race.race(case, ceilings=ceilings.best[dtype], effort=effort)
    except BenchmarkError as error:
        if "GFLOP/s" not in str(error):
            raise
        for _ in range(5):  # a ceiling taken while a neighbour was busy is too low: once more, with better ones
            ceilings.measure(dtype)
        return race.race(case, ceilings=ceilings.best[dtype], effort=effort)


def ratio(pairs: Sequence[float]) -> dict[str, Any]:
    """Ratios of rounds: median, `spread` (interquartile range over median), `range` (largest less smallest)."""
    low, median, high = (float(v) for v in np.percentile(pairs, (25, 50, 75)))
    whole = (max(pairs) - min(pairs)) / median
    return {"median": median, "spread": (high - low) / median, "range": whole, "pairs": [float(p) for p in pairs]}


def _record(case: Case, contender: Contender, turns: list[race.Turn], checked: Mapping, best: Mapping) -> dict:
    seconds = summary([s for t in turns for s in t.seconds])
    program = contender.program
    moved = program.xla["bytes"] if program else None
    flop_rate = contender.flops / seconds["p50"] if contender.flops else None
    byte_rate = moved / seconds["p50"] if moved else None
    return {
        "name": contender.name,
        "seconds": seconds,
        "samples_per_second": case.samples / seconds["p50"],
        "transfer_seconds": float(np.median([s for t in turns for s in t.transfers])),
        **{f"{name}_seconds": value for name, value in race.stages(case, contender).items()},
        "compile_seconds": dict(contender.compile_seconds) if contender.compile_seconds else None,
        "compile_cached": program.cached if program else None,
        "flops": contender.flops,
        "xla": program.xla if program else None,
        "flops_per_second": flop_rate,
        "bytes_per_second": byte_rate,
        "share_of": {
            "product": flop_rate / best["product"] if flop_rate else None,
            "convolution": flop_rate / best["convolution"] if flop_rate else None,
            "copy": byte_rate / best["copy"] if byte_rate else None,
        },
        "memory": {
            "program": {**program.memory, "peak": program.peak_bytes} if program else None,
            "seen": checked["seen_bytes"][contender.name],
            "seen_how": checked["seen_how"],
        },
        "worst_difference": checked["worst"][contender.name],
    }


class Failure(NamedTuple):
    """In place of a case that could not be built."""

    name: str
    error: Exception


def tried(name: str, cases: Iterable[Case]) -> Iterator[Case | Failure]:
    """The cases; where building one fails, a failure of this name instead of it and those after it."""
    try:
        yield from cases
    except Exception as error:  # noqa: BLE001 - a compiler or an allocator may raise anything
        yield Failure(name, error)


def record_of(
    records: Sequence[Mapping], failed: Mapping[str, str], settings: Mapping[str, Any], ceilings: machine.Ceilings
) -> dict[str, Any]:
    """The whole record of a run, to be written as JSON."""
    return {
        "schema": SCHEMA,
        "settings": dict(settings),
        "environment": machine.environment(),
        "ceilings": ceilings.best,
        "cases": list(records),
        "failed": dict(failed),
    }


def refuse_failures(record: Mapping[str, Any]) -> None:
    """Raises BenchmarkError where cases failed, naming them."""
    failed = record["failed"]
    if failed:
        raise BenchmarkError(
            f"{len(failed)} of {len(failed) + len(record['cases'])} cases failed; the others are measured. "
            "Mend these, or leave them out:\n" + "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        )


def rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table that is printed for a case, a contender each."""
    return [
        {
            record["case"]: c["name"],
            "per s": c["samples_per_second"],
            "p50 ms": 1e3 * c["seconds"]["p50"],
            "p95 ms": 1e3 * c["seconds"]["p95"],
            "p99 ms": 1e3 * c["seconds"]["p99"],
            "spread": _percent(c["seconds"]["spread"]),
            "transfer ms": 1e3 * c["transfer_seconds"],
            "metrics ms": 1e3 * c["metrics_seconds"] if "metrics_seconds" in c else None,
            "of product": _percent(c["share_of"]["product"]),
            "of conv": _percent(c["share_of"]["convolution"]),
            "of copy": _percent(c["share_of"]["copy"]),
            "compile s": compile_cell(c),
            "peak MiB": c["memory"]["program"]["peak"] / 2**20 if c["memory"]["program"] else None,
            "seen MiB": c["memory"]["seen"] / 2**20 if c["memory"]["seen"] is not None else None,
        }
        for c in record["contenders"]
    ]


def compile_cell(contender: Mapping[str, Any]) -> float | str | None:
    """Seconds of compiling, marked where the program was read from jax's cache instead; None without them."""
    if not contender["compile_seconds"]:
        return None
    seconds = sum(contender["compile_seconds"].values())
    return f"{seconds:.3g} (cached)" if contender.get("compile_cached") else seconds


def left_out_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each contender that takes no part in a case, with the reason."""
    return [{"left out": name, "because": reason} for name, reason in record.get("left_out", {}).items()]


def ratio_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each contender after the first: its time over the first's, round by round."""
    first = record["time_over"]["name"]
    return [
        {
            "time ratio": f"{name} / {first}",
            "median": r["median"],
            "spread": _percent(r["spread"]),
            "all": _percent(r["range"]),
            "round by round": " ".join(f"{p:.2f}" for p in r["pairs"]),
        }
        for name, r in record["time_over"]["ratios"].items()
    ]


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.0%}"


def check_comparable(old: Mapping[str, Any], cases: Sequence[str]) -> None:
    """Refuses an older record with which cases of these names, to be measured here, cannot be compared.

    Raises:
      ValueError: another schema or device, no case in common, or one without its numbers.
    """
    device = files.device_name()
    for name, one, other in (
        ("schema", old.get("schema"), SCHEMA),
        ("device", old.get("environment", {}).get("device"), device),
    ):
        if one != other:
            raise ValueError(
                f"--compare: the older record has {name} {one!r}; expected {other!r}, as measured now. "
                f"Pass a file that jaxad bench --json wrote on {device!r}."
            )
    try:
        before = {case for case, _ in dict(_costs(old))}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"--compare: a case of the older record lacks {error}; expected seconds, spread and ceilings of each. "
            "Measure it again with jaxad bench --json."
        ) from error
    if not before & set(cases):
        raise ValueError(
            f"--compare: the older record has none of {sorted(cases)}; expected at least one case in common. "
            f"Run bench with the method, preset, batch and dtype of one that it has: {sorted(before)}."
        )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What changed between two records: a row for each contender of each case that both have.

    Seconds are multiplied by the matrix-product ceiling measured beside them: the same machine is not always equally
    fast. "slower" or "faster" is a change of more than a tenth and of more than the interquartile ranges of both.
    """
    before, after = dict(_costs(old)), dict(_costs(new))
    return [_change(*key, before[key], after[key]) for key in after if key in before]


def _costs(record: Mapping[str, Any]) -> Iterable[tuple[tuple[str, str], tuple[float, float]]]:
    for case in record["cases"]:
        for contender in case["contenders"]:
            cost = contender["seconds"]["p50"] * case["ceilings"]["product"]
            yield (case["case"], contender["name"]), (cost, contender["seconds"]["spread"])


def _change(case: str, name: str, old: tuple[float, float], new: tuple[float, float]) -> dict[str, Any]:
    factor, noise = new[0] / old[0], max(_NOISE, old[1] + new[1])
    verdict = "slower" if factor > 1 + noise else "faster" if factor < 1 / (1 + noise) else "same"
    return {"case": case, "by": name, "time ratio": factor, "noise": _percent(noise), "verdict": verdict}


def run_all(
    cases: Iterable[Case | Failure], *, console: Any, rounds: int, settings: Mapping[str, Any], out: pathlib.Path | None
) -> dict[str, Any]:
    """Measures cases one after another and prints them: the whole record. Goes on past those that fail.

    Args:
      cases: made one at a time; what an earlier one compiled is dropped.
      console: `jaxad.console.Console`.
      rounds: of every case.
      settings: for the record.
      out: the file that the record is written to after every case, so that an error or a kill loses one case only.
    """
    effort = race.Effort(rounds=rounds, least_rounds=min(rounds, race.Effort().least_rounds))
    ceilings, records, failed = machine.Ceilings(), [], {}
    for case in cases:
        try:
            records.append(_measure_and_print(case, ceilings, effort, console))
        except Exception as error:  # noqa: BLE001 - whatever stops one case, such as its memory, leaves the others
            failed[case.name] = _reason(case.name, error)
            console.say(f"{case.name} failed: {failed[case.name]}")
            if not isinstance(error, ValueError):
                console.say("".join(traceback.format_exception(error)))
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            files.write_json(out, record_of(records, failed, {**settings, "rounds": rounds}, ceilings))
        del case  # with what it compiled and holds on the device, before the next is built
    return record_of(records, failed, {**settings, "rounds": rounds}, ceilings)


def _measure_and_print(case: Case | Failure, ceilings: machine.Ceilings, effort: race.Effort, console: Any) -> dict:
    if isinstance(case, Failure):
        raise case.error
    console.say(f"{case.name}: {', '.join(c.name for c in case.contenders)}")
    record = measure(case, ceilings, effort=effort)
    for table in (rows(record), ratio_rows(record), left_out_rows(record)):
        if table:
            console.table(table)
    if (record["other_load"] or 0) > _BUSY:
        console.say(
            f"other programs took {record['other_load']:.0%} of the processors meanwhile: "
            "expect noise, and unfair ratios where a contender's threads wait for each other"
        )
    return record


def _reason(name: str, error: Exception) -> str:
    """Why a case failed, in one line without its name."""
    text = (str(error).strip().splitlines() or [""])[0].removeprefix(f"{name}: ")
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
