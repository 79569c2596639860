"""Rows of scores.csv by column, and numbers read leniently: cells may be text, numbers or empty."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Table(NamedTuple):
    """scores.csv by column, rows without a finite score left out."""

    file: list[str]
    defect: list[str]
    label: np.ndarray  # (N,) int
    predicted: np.ndarray  # (N,) int, -1 where there is no threshold
    score: np.ndarray  # (N,) float
    normalised: np.ndarray  # (N,) float, NaN where there is no threshold
    broken: int  # rows left out

    @property
    def is_judged(self) -> bool:
        """Whether a threshold was applied."""
        return bool(np.any(self.predicted >= 0))

    def flagged(self, label: int) -> tuple[int, int]:
        """(flagged, all) rows of a label."""
        mine = self.label == label
        return int(np.sum(mine & (self.predicted == 1))), int(np.sum(mine))


def read_scores(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows of scores.csv, text or numbers, as columns."""
    kept = [row for row in rows if math.isfinite(number_of(row.get("score")))]
    return Table(
        file=[str(row.get("file", "")) for row in kept],
        defect=[str(row.get("defect") or "") for row in kept],
        label=np.array([label_of(row.get("label")) for row in kept], int),
        predicted=np.array([label_of(row.get("predicted")) for row in kept], int),
        score=np.array([number_of(row["score"]) for row in kept], float),
        normalised=np.array([number_of(row.get("score_normalised")) for row in kept], float),
        broken=len(rows) - len(kept),
    )


def number_of(value: Any) -> float:
    """A float of a number or its text; NaN for None, "" and anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def label_of(value: Any) -> int:
    """0 or 1 of a number or its text; -1 for anything else."""
    number = number_of(value)
    return int(number) if number in (0, 1) else -1
