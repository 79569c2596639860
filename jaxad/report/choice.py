"""Which samples tell most about a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxad.report.pictures import Picture
from jaxad.report.table import label_of, number_of


def choose(rows: Sequence[Any], *, each: int = 4) -> dict[str, list[int]]:
    """Which samples tell most about a run, as indices by group; groups without samples are left out.

    Groups: "caught" (highest first, one of each defect type before a second one), "missed" (lowest first), "alarms"
    (highest first), "passed" (normal, nearest to the threshold first), "high" and "low" (without label or threshold).

    Args:
      rows: rows of scores.csv or Pictures.
      each: the most samples of a group.
    """
    groups = grouped(rows)
    undecided = groups.pop("undecided")
    groups = {name: found[:each] for name, found in groups.items()}
    groups |= {"high": undecided[:each], "low": undecided[each:][::-1][:each]}
    return {name: found for name, found in groups.items() if found}


def grouped(rows: Sequence[Any]) -> dict[str, list[int]]:
    """All rows with a finite score by what became of them, the most telling first."""
    dicts = [row._asdict() if isinstance(row, Picture) else row for row in rows]
    order = [i for i, row in enumerate(dicts) if math.isfinite(number_of(row.get("score")))]
    order.sort(key=lambda i: -number_of(dicts[i]["score"]))
    outcomes = [(label_of(row.get("label")), label_of(row.get("predicted"))) for row in dicts]

    def of(*outcome: int) -> list[int]:
        return [i for i in order if outcomes[i] == outcome]

    return {
        "caught": _round_robin(of(1, 1), [str(row.get("defect")) for row in dicts]),
        "missed": of(1, 0)[::-1],
        "alarms": of(0, 1),
        "passed": of(0, 0),
        "undecided": [i for i in order if -1 in outcomes[i]],
    }


def _round_robin(order: list[int], kinds: list[str]) -> list[int]:
    """Keeps the order within a kind, but takes one of each kind before a second one."""
    seen: dict[str, int] = {}
    turns = []
    for i in order:
        seen[kinds[i]] = seen.get(kinds[i], 0) + 1
        turns.append((seen[kinds[i]], i))
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])]
