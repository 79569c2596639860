"""Runs the contenders of a case in turn and says how long they took, or why that must not be believed.

Order: A B C C B A, up to four times in a round, since short turns let what slows a machine for a second slow all alike.
A round gives one ratio, that of the median runs: a run of ten times the usual length tells of a neighbour, not of the
work (means and percentiles over all runs are in the record). Every run has inputs of its own, drawn and placed before
the turn. The first run of a turn of several is not counted: it finds threads asleep and caches full of others' data.

What makes a timing invalid:
  * an output, or a change of a state, that differs from the reference by more than the tolerance;
  * work that goes on after `wait`: fetching the last result then takes far longer than copying it could;
  * more FLOP/s than this machine's ceiling.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxad.bench.case import BenchmarkError, Case, Contender, worst_change, worst_difference
from jaxad.bench.machine import PeakMemory

_SETTLE = 0.02  # seconds before a turn: the threads of the contender before spin for a while when they are done
_MARGIN = 1.25  # over the ceiling; itself a measurement
_SLOWEST_COPY = 1e9  # bytes/s at which a finished result surely reaches the host
_HICCUP = 2e-3  # seconds that a fetch may always take


class Effort(NamedTuple):
    """How long to measure."""

    rounds: int = 8
    round_seconds: float = 1.0  # of each contender in a round
    case_seconds: float = 60.0  # after which no further round begins, `least_rounds` done
    least_rounds: int = 4
    most_turns: int = 8  # of a contender in a round
    most_runs: int = 64  # of a turn


class Turn(NamedTuple):
    """One contender's turn."""

    seconds: list[float]  # of each counted run
    transfers: list[float]  # of each `put`
    drain: float  # seconds from the last `wait` until the result had been fetched
    fetched_bytes: int


def check(case: Case, numbers: np.random.Generator) -> dict[str, Any]:
    """Compares every contender's first outputs with the reference, or without one with the first contender's.

    Where the case and a contender can tell, what the runs changed in its state is compared, too.

    Returns:
      {"against", "tolerance", "worst": {contender: largest difference}, "changes": {contender: largest disagreement},
      "seen_bytes": {contender: peak memory of the first run}, "seen_how"}.

    Raises:
      BenchmarkError: one differs by more than the tolerance.
    """
    worst: dict[str, float] = {}
    changed: dict[str, tuple[float, str]] = {}
    seen: dict[str, int | None] = {}
    for _ in range(case.checks):
        drawn = case.draw(numbers)
        expected = None if case.reference is None else case.reference(drawn)
        for contender in case.contenders:
            given = contender.wait(contender.put(drawn))
            with PeakMemory() as peak:
                result = contender.fetch(contender.wait(contender.run(given)))
            seen.setdefault(contender.name, peak.bytes)  # of the first run: later ones find memory that is held already
            expected = result if expected is None else expected
            worst[contender.name] = max(worst.get(contender.name, 0.0), worst_difference(result, expected))
        moved = case.changes() if case.changes else {}
        for contender in case.contenders:  # after all first runs, whose peak of memory this could hide
            if moved and contender.changes:
                found = worst_change(contender.changes(drawn), moved)
                changed[contender.name] = max(changed.get(contender.name, found), found)
    for name, difference in worst.items():
        if not difference <= case.tolerance:
            raise BenchmarkError(
                f"{case.name}: outputs of {name!r} differ from the reference by {difference:.2g} of its magnitude; "
                f"expected at most {case.tolerance:.2g}. Mend it before timing it."
            )
    for name, (disagreement, field) in changed.items():
        if not disagreement <= case.changes_tolerance:
            raise BenchmarkError(
                f"{case.name}: {name!r} changes {field!r} of its state otherwise than the reference, by "
                f"{disagreement:.2g} where no change is 1 and the opposite 2; expected at most "
                f"{case.changes_tolerance:.2g}. Mend it before timing it."
            )
    against = "reference" if case.reference is not None else case.contenders[0].name
    facts = {"against": against, "tolerance": case.tolerance, "worst": worst}
    facts["changes"] = {name: disagreement for name, (disagreement, _) in changed.items()}
    return {**facts, "seen_bytes": seen, "seen_how": peak.how}


def turn(case: Case, contender: Contender, numbers: np.random.Generator, runs: int) -> Turn:
    """Times `runs` runs on fresh inputs, each up to `wait`; where there are several, after one that is not counted."""
    transfers, inputs, result, uncounted = [], [], None, int(runs > 1)
    for _ in range(runs + uncounted):
        drawn = case.draw(numbers)
        began = time.perf_counter()
        inputs.append(contender.wait(contender.put(drawn)))
        transfers.append(time.perf_counter() - began)
    time.sleep(_SETTLE)
    seconds = []
    gc.disable()
    try:
        for given in inputs:
            began = time.perf_counter()
            result = contender.wait(contender.run(given))
            seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        fetched = contender.fetch(result)
        drain = time.perf_counter() - began
    finally:
        gc.enable()
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(fetched))
    return Turn(seconds[uncounted:], transfers, drain, size)


def race(
    case: Case, *, ceilings: Mapping[str, float], effort: Effort | None = None, seed: int = 0
) -> tuple[dict[str, list[Turn]], list[dict[str, float]]]:
    """Times all contenders of a case.

    Args:
      case: what to time. Its contenders have been checked.
      ceilings: FLOP/s of "product" and "convolution", above which no timing is believed.
      effort: how long to measure.
      seed: of the inputs.

    Returns:
      (turns of each contender, rounds): a round is the seconds of each contender's median run in it.

    Raises:
      BenchmarkError: a contender's timing ended before its work, or is faster than the machine.
    """
    effort, numbers, began = effort or Effort(), np.random.default_rng(seed), time.perf_counter()
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in case.contenders}
    warm = {c.name: max(min(turn(case, c, numbers, 2).seconds), 1e-6) for c in case.contenders}
    times = int(np.clip(effort.round_seconds / max(warm.values()), 2, effort.most_turns)) // 2  # A B C C B A
    each = effort.round_seconds / (2 * times)
    runs = {name: int(np.clip(np.ceil(each / run), 1, effort.most_runs)) for name, run in warm.items()}
    rounds: list[dict[str, float]] = []
    while len(rounds) < effort.rounds:
        if len(rounds) >= effort.least_rounds and time.perf_counter() - began > effort.case_seconds:
            break
        for contender in (*case.contenders, *case.contenders[::-1]) * times:
            turns[contender.name].append(turn(case, contender, numbers, runs[contender.name]))
        last = {name: [s for t in own[-2 * times :] for s in t.seconds] for name, own in turns.items()}
        rounds.append({name: float(np.median(seconds)) for name, seconds in last.items()})
    for contender in case.contenders:
        refuse_unsynced(case, contender, turns[contender.name])
        refuse_impossible(case, contender, turns[contender.name], ceilings)
    return turns, rounds


def refuse_unsynced(case: Case, contender: Contender, turns: list[Turn]) -> None:
    """Raises BenchmarkError where work went on after `wait`."""
    drain = float(np.median([t.drain for t in turns]))
    claimed = float(np.median([sum(t.seconds) for t in turns]))
    allowed = 0.5 * claimed + turns[0].fetched_bytes / _SLOWEST_COPY + _HICCUP
    if drain > allowed:
        raise BenchmarkError(
            f"{case.name}: {contender.name!r} was not finished when its clock stopped: its runs took {claimed:.2g} s, "
            f"fetching the last result another {drain:.2g} s; expected at most {allowed:.2g} s. "
            "Let `wait` block on everything that `run` starts, as jax.block_until_ready does."
        )


def refuse_impossible(case: Case, contender: Contender, turns: list[Turn], ceilings: Mapping[str, float]) -> None:
    """Raises BenchmarkError where the median run made more FLOP/s than the machine's ceiling."""
    if not contender.flops:
        return
    rate = contender.flops / float(np.median([s for t in turns for s in t.seconds]))
    ceiling = max(ceilings["product"], ceilings["convolution"])
    if rate > _MARGIN * ceiling:
        raise BenchmarkError(
            f"{case.name}: {contender.name!r} would make {rate / 1e9:.4g} GFLOP/s; expected at most the "
            f"{ceiling / 1e9:.4g} GFLOP/s of this machine's best matrix product or convolution. Either its work is not "
            "waited for (let `wait` block on all of it), or part of it is done before the clock starts."
        )


def stages(case: Case, contender: Contender, *, repeats: int = 5, seed: int = 1) -> dict[str, float]:
    """Median seconds of what follows the work: fetching the result, and the contender's stages after it."""
    numbers = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {"fetch": [], **{name: [] for name in contender.after}}
    for repeat in range(repeats + 1):
        result = contender.wait(contender.run(contender.wait(contender.put(case.draw(numbers)))))
        for name, stage in contender.after.items():
            began = time.perf_counter()
            jax.block_until_ready(stage(result))
            seconds[name] += [time.perf_counter() - began] if repeat else []  # the first compiles
        began = time.perf_counter()
        contender.fetch(result)
        seconds["fetch"] += [time.perf_counter() - began] if repeat else []
    return {name: float(np.median(values)) for name, values in seconds.items()}
