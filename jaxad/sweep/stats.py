"""Statistics of a sweep's table: intervals over seeds, paired comparisons, main effects.

Seeds are the repetitions: the same seed means the same split of the data and the same draws in every cell, so cells are
compared seed by seed. Rows whose metric is missing or not finite are left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

LEVEL = 0.95  # of all intervals
Row = Mapping[str, Any]
Cell = tuple  # a value for each axis


class Summary(NamedTuple):
    """A mean over seeds."""

    number: int  # finite values
    mean: float  # NaN without any
    std: float  # of the sample (n - 1); NaN below two values
    half: float  # half the width of the interval of the mean, by Student's t; NaN below two values


class Difference(NamedTuple):
    """A cell against its base, seed by seed."""

    cell: Cell
    base: Cell
    summary: Summary  # of the differences
    p: float  # of the two-sided paired t-test; NaN below two pairs
    p_holm: float  # corrected for the number of comparisons


def summarise(values: Sequence[float]) -> Summary:
    """Mean, standard deviation and interval of the finite values."""
    from scipy import stats

    finite = np.asarray([value for value in values if math.isfinite(value)], np.float64)
    n = len(finite)
    if n < 2:
        return Summary(n, float(finite.mean()) if n else math.nan, math.nan, math.nan)
    std = float(finite.std(ddof=1))
    return Summary(n, float(finite.mean()), std, float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n))


def cells_of(rows: Sequence[Row], axes: Sequence[str], metric: str) -> dict[Cell, dict[int, float]]:
    """The metric of each cell by seed, in the order of the table; what is no finite number is NaN."""
    cells: dict[Cell, dict[int, float]] = {}
    for row in rows:
        cell = tuple(row[axis] for axis in axes)
        cells.setdefault(cell, {})[row["seed"]] = _number(row.get(metric))
    return cells


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def compare(cells: Mapping[Cell, Mapping[int, float]], pairs: Sequence[tuple[Cell, Cell]]) -> list[Difference]:
    """Paired differences cell - base with a t-test each, and Holm's correction over all of them.

    Args:
      cells: from `cells_of`.
      pairs: (cell, base) each.
    """
    found = []
    for cell, base in pairs:
        seeds = [seed for seed in cells[cell] if seed in cells[base]]
        both = np.asarray([(cells[cell][s], cells[base][s]) for s in seeds], np.float64).reshape(-1, 2)
        both = both[np.isfinite(both).all(axis=1)]
        found.append((cell, base, summarise((both[:, 0] - both[:, 1]).tolist()), paired_p(both[:, 0], both[:, 1])))
    corrected = holm([p for *_, p in found])
    return [Difference(*parts, p_holm) for parts, p_holm in zip(found, corrected, strict=True)]


def paired_p(a: np.ndarray, b: np.ndarray) -> float:
    """p of the two-sided paired t-test; 1 where all differences are 0, NaN below two pairs or without spread."""
    from scipy import stats

    difference = a - b
    if len(difference) < 2:
        return math.nan
    if np.ptp(difference) <= 1e-12 * np.abs(a).max():  # rounding at most: t would be infinite, or 0/0
        return math.nan if difference.any() else 1.0
    return float(stats.ttest_rel(a, b).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: keeps the chance of any false finding among all tests below the level.

    The k-th smallest of m is multiplied by m - k + 1, and no corrected value falls below one before it. NaN stays NaN
    and does not count.
    """
    known = [i for i, p in enumerate(p_values) if math.isfinite(p)]
    order, corrected, highest = sorted(known, key=lambda i: p_values[i]), [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def main_effects(
    cells: Mapping[Cell, Mapping[int, float]], axes: Sequence[str]
) -> dict[str, list[tuple[Any, Summary]]]:
    """For each axis with several values: the mean at each value, over all other axes.

    Each seed is averaged over the other axes first, so that the interval is one over seeds; a seed that lacks a cell
    would compare unlike with unlike and is left out of that value.
    """
    effects: dict[str, list[tuple[Any, Summary]]] = {}
    for place, axis in enumerate(axes):
        values = list(dict.fromkeys(cell[place] for cell in cells))
        if len(values) < 2:
            continue
        effects[axis] = []
        for value in values:
            mine = [by_seed for cell, by_seed in cells.items() if cell[place] == value]
            means = [float(np.mean([cell.get(seed, math.nan) for cell in mine])) for seed in mine[0]]
            effects[axis].append((value, summarise(means)))
    return effects


def data_sets(cells: Mapping[Cell, Mapping[int, float]], axes: Sequence[str]) -> list[dict[Cell, Mapping[int, float]]]:
    """The cells of each data set: only these are alternatives to choose from."""
    found: dict[Any, dict[Cell, Mapping[int, float]]] = {}
    for cell, by_seed in cells.items():
        found.setdefault(dict(zip(axes, cell, strict=True)).get("data"), {})[cell] = by_seed
    return list(found.values())


def best_cell(cells: Mapping[Cell, Mapping[int, float]]) -> Cell | None:
    """The cell with the highest mean of those with the most seeds; None if no cell has a mean.

    A cell that lost seeds would be judged by those that did not diverge.
    """
    summaries = {cell: summarise(list(values.values())) for cell, values in cells.items()}
    most = max((summary.number for summary in summaries.values()), default=0)
    means = {cell: summary.mean for cell, summary in summaries.items() if summary.number == most}
    return max(means, key=lambda cell: means[cell]) if most else None
