"""Plots of a sweep's report, in the look of the run report's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxad.report import plots
from jaxad.sweep.stats import Cell, Summary

_MOST_LINES = 40  # cells of one plot


def draw_cells(
    summaries: Mapping[Cell, Summary],
    labels: Mapping[Cell, str],
    points: Mapping[Cell, Sequence[float]],
    bases: Mapping[Cell, Cell],
    metric: str,
) -> str:
    """A line for each cell: its seeds as dots, its mean and interval; dashed: the mean of its base, if it has one."""
    cells = [cell for cell, summary in summaries.items() if summary.number][:_MOST_LINES]
    if not cells:
        return ""
    figure, axes = plots._axes("Mean and 95% interval of each cell", metric, "", size=(6.4, 1.0 + 0.32 * len(cells)))
    for line, cell in enumerate(reversed(cells)):
        summary = summaries[cell]
        seeds = [value for value in points[cell] if math.isfinite(value)]
        axes.scatter(seeds, [line - 0.24] * len(seeds), s=16, c=plots._MUTED, alpha=0.7, linewidths=0)
        if math.isfinite(summary.half):
            axes.plot(
                [summary.mean - summary.half, summary.mean + summary.half],
                [line, line],
                color=plots._NORMAL,
                linewidth=2.2,
                solid_capstyle="round",
            )
        axes.plot([summary.mean], [line], marker="o", markersize=6, color=plots._NORMAL, linestyle="none")
        if cell in bases and summaries[bases[cell]].number:
            place = [summaries[bases[cell]].mean] * 2
            axes.plot(place, [line - 0.5, line + 0.5], color=plots._INK, linewidth=1.0, linestyle=(0, (3, 2)))
    axes.set_yticks(range(len(cells)), [plots._plain(labels[cell]) for cell in reversed(cells)])
    axes.grid(axis="y", visible=False)
    return plots._svg(figure, f"{metric} of each cell")


def draw_effect(axis: str, effect: Sequence[tuple[Any, Summary]], metric: str) -> str:
    """The means of one axis with their intervals; joined where the values are numbers, which are then in order."""
    effect = [(value, summary) for value, summary in effect if summary.number]
    if len(effect) < 2:
        return ""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in effect)
    if numeric:
        effect = sorted(effect, key=lambda pair: pair[0])
    figure, axes = plots._axes(plots._plain(axis), "", metric, size=(3.4, 2.5))
    places = range(len(effect))
    means = [summary.mean for _, summary in effect]
    halves = [summary.half if math.isfinite(summary.half) else 0 for _, summary in effect]
    axes.errorbar(
        places,
        means,
        yerr=halves,
        color=plots._NORMAL,
        linewidth=1.6,
        marker="o",
        markersize=5,
        capsize=3,
        linestyle="-" if numeric else "none",
    )
    axes.set_xticks(places, [plots._plain(label_of(value)) for value, _ in effect])
    axes.margins(x=0.15)
    axes.grid(axis="x", visible=False)
    return plots._svg(figure, f"{metric} by {axis}")


def draw_heat(pair: tuple[str, str], means: Mapping[tuple, float], metric: str) -> str:
    """Means over two axes; the darker the higher."""
    from matplotlib.patches import Rectangle

    across = list(dict.fromkeys(key[1] for key in means))
    up = list(dict.fromkeys(key[0] for key in means))
    finite = [value for value in means.values() if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    figure, axes = plots._axes(
        f"{metric}, mean over the rest",
        plots._plain(pair[1]),
        plots._plain(pair[0]),
        size=(max(4.2, 1.6 + 0.85 * len(across)), 1.1 + 0.4 * len(up)),
    )
    for row, first in enumerate(reversed(up)):
        for column, second in enumerate(across):
            value = means.get((first, second), math.nan)
            if not math.isfinite(value):
                continue
            shade = 0.08 + 0.62 * (value - low) / (high - low) if high > low else 0.3
            axes.add_patch(
                Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=plots._NORMAL, alpha=shade, linewidth=0)
            )
            axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=9.5, color=plots._INK)
    axes.set_xticks(range(len(across)), [plots._plain(label_of(value)) for value in across])
    axes.set_yticks(range(len(up)), [plots._plain(label_of(value)) for value in reversed(up)])
    axes.set_xlim(-0.5, len(across) - 0.5)
    axes.set_ylim(-0.5, len(up) - 0.5)
    axes.grid(visible=False)
    return plots._svg(figure, f"{metric} over {pair[0]} and {pair[1]}")


def label_of(value: Any) -> str:
    """A value of an axis, short."""
    return f"{value:g}" if isinstance(value, float) else str(value)
