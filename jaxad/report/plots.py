"""Plots: matplotlib draws SVG in stand-in colours, which become the page's own, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxad.report.parts import escape, fixed
from jaxad.report.table import Table

_ENOUGH_POINTS = 400  # of one curve: more cannot be seen at this size
_INK, _MUTED, _GRID, _NORMAL, _ANOMALOUS = (f"#0{i}0{i}0{i}" for i in range(1, 6))
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "line", _NORMAL: "normal", _ANOMALOUS: "anomalous"}
_KINDS = {0: ("normal", _NORMAL), 1: ("anomalous", _ANOMALOUS), -1: ("unlabelled", _MUTED)}


def _axes(title: str, across: str, up: str, *, size: tuple[float, float] = (4.2, 3.1)) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.set_xlabel(across, fontsize=9.5, color=_MUTED)
    axes.set_ylabel(up, fontsize=9.5, color=_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=9, length=0)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """The figure as inline SVG: the page's colours and font, no prologue, no dates, no ids that clash."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    start = text.index(">")
    box = re.search(r'viewBox="[^"]*"', text[:start])
    assert box is not None  # matplotlib always writes one
    opening = f'<svg {box[0]} role="img" aria-label="{escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<div class="plot">{opening}{text[start:]}</div>'


def draw_histogram(table: Table) -> str:
    """How the scores of each kind spread, with the threshold."""
    values, limit, name = _scores_axis(table)
    figure, axes = _axes("How scores spread", name, "count")
    squash = _squash(values, limit)
    edges = np.linspace(*_padded(squash(values)), 41)
    for kind, colour, mine in _each_kind(table):
        axes.hist(squash(values[mine]), edges, color=colour, histtype="stepfilled", alpha=0.5, linewidth=0, label=kind)
        axes.hist(squash(values[mine]), edges, color=colour, histtype="step", linewidth=1.2)
    _mark_threshold(axes.axvline, squash, limit)
    _squashed_ticks(axes.set_xticks, squash, values)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="x", visible=False)
    _legend(axes)
    return _svg(figure, "Histogram of scores")


def draw_strips(table: Table) -> str:
    """One line of dots per type: which types overlap with the normal ones."""
    values, limit, name = _scores_axis(table)
    names = sorted(set(table.defect), key=lambda kind: np.median(values[[d == kind for d in table.defect]]))[-24:]
    if len(names) < 2:
        return ""
    figure, axes = _axes("Each image's score", name, "", size=(4.6, 0.9 + 0.3 * len(names)))
    squash = _squash(values, limit)
    for line, kind in enumerate(names):
        rows = np.flatnonzero([defect == kind for defect in table.defect])
        rows = rows[np.argsort(values[rows])][_thin(len(rows), 120)]
        height = line + 0.5 * (np.arange(len(rows)) * 0.618 % 1 - 0.5)  # golden-ratio jitter: even, no random numbers
        colours = [_KINDS[label][1] for label in table.label[rows]]
        axes.scatter(squash(values[rows]), height, s=14, c=colours, alpha=0.6, linewidths=0)
    _mark_threshold(axes.axvline, squash, limit)
    _squashed_ticks(axes.set_xticks, squash, values)
    axes.set_yticks(range(len(names)), [_plain(kind[:24]) for kind in names])
    axes.grid(axis="y", visible=False)
    return _svg(figure, "Scores by type")


def draw_timeline(table: Table, rows: list[int]) -> str:
    """Scores of one video's frames in order; anomalous stretches are shaded."""
    values, limit, name = _scores_axis(table)
    squash = _squash(values, limit)
    frames = _thin(len(rows), _ENOUGH_POINTS)
    shown = np.array(rows)[frames]
    figure, axes = _axes("", "frame", "score", size=(4.2, 1.9))
    low, high = _padded(squash(values))
    shade = np.where(table.label[shown] == 1, high, low)
    axes.fill_between(frames, low, shade, step="mid", color=_ANOMALOUS, alpha=0.18, linewidth=0)
    axes.plot(frames, squash(values[shown]), color=_NORMAL, linewidth=1.2)
    _mark_threshold(axes.axhline, squash, limit)
    _squashed_ticks(axes.set_yticks, squash, values, apart=0.2)
    axes.set_ylim(low, high)
    return _svg(figure, f"Scores over time, {name}")


def draw_roc(report: Mapping[str, Any], table: Table) -> str:
    """The ROC curve of the images, with the point at the threshold."""
    known = table.label >= 0
    fpr, tpr, _ = _operating_points(table.label[known], table.score[known])
    figure, axes = _axes(f"ROC, area {fixed(report.get('image_auroc'))}", "normal flagged", "anomalous flagged")
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    _curve(axes, fpr, tpr)
    caught, anomalous = table.flagged(1)
    alarms, normal = table.flagged(0)
    if table.is_judged:
        _mark_point(axes, alarms / normal, caught / anomalous)
    return _svg(figure, "ROC curve")


def draw_precision_recall(report: Mapping[str, Any], table: Table) -> str:
    """Precision over recall of the images, with the point at the threshold."""
    known = table.label >= 0
    fpr, recall, precision = _operating_points(table.label[known], table.score[known])
    figure, axes = _axes(
        f"Precision and recall, AP {fixed(report.get('image_ap'))}", "anomalous flagged (recall)", "flagged rightly"
    )
    axes.axhline(np.mean(table.label[known]), color=_MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    precision[0] = precision[1]  # drawn from recall 0 on, so that a lone point (all scores tied) shows
    _curve(axes, recall, precision, drawstyle="steps-pre")
    caught, alarms = table.flagged(1)[0], table.flagged(0)[0]
    if caught + alarms:
        _mark_point(axes, caught / table.flagged(1)[1], caught / (caught + alarms))
    return _svg(figure, "Precision-recall curve")


def _operating_points(label: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(fpr, tpr, precision) at each threshold, from none flagged (precision 1 by convention) to all; ties together."""
    order = np.argsort(-score, kind="stable")
    label, score = label[order], score[order]
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1)  # the last row of each tie
    hits = np.append(0, np.cumsum(label == 1)[last])
    alarms = np.append(0, np.cumsum(label == 0)[last])
    return alarms / alarms[-1], hits / hits[-1], np.where(hits + alarms, hits / np.maximum(hits + alarms, 1), 1.0)


def draw_training(name: str, points: list[tuple[float, float]]) -> str:
    """One metric over the steps (step, value); "" if none is finite."""
    step, value = np.array(points).T
    finite = np.isfinite(value) & np.isfinite(step)
    if not finite.any():
        return ""
    lost = int(np.sum(~finite))
    title = _plain(name) + (f" ({lost} not finite)" if lost else "")
    figure, axes = _axes(title, "step", "", size=(3.4, 2.1))
    rows = np.flatnonzero(finite)[_thin(int(np.sum(finite)), _ENOUGH_POINTS)]
    axes.plot(step[rows], value[rows], color=_NORMAL, linewidth=1.4, marker="o" if len(rows) < 3 else None)
    seen = value[finite]
    if seen.min() > 0 and seen.max() > 30 * seen.min():
        axes.set_yscale("log")
        axes.minorticks_off()
    return _svg(figure, f"{name} during training")


def _plain(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _scores_axis(table: Table) -> tuple[np.ndarray, float | None, str]:
    """(values, threshold, axis title): normalised scores where there are any, else raw ones."""
    if len(table.normalised) and np.isfinite(table.normalised).all():
        return table.normalised, 1.0, "score (0: usual normal, 1: threshold)"
    return table.score, None, "raw score"


def _squash(values: np.ndarray, limit: float | None) -> Any:
    """Identity, or asinh where far normalised scores would press what lies around the threshold into one bar."""
    return np.arcsinh if limit is not None and np.max(np.abs(values)) > 8 * limit else np.asarray


def _squashed_ticks(put: Any, squash: Any, values: np.ndarray, *, apart: float = 0.07) -> None:
    if squash is np.asarray:
        return
    low, high = _padded(squash(values))
    sizes = [base * 10.0**power for power in range(13) for base in (1, 3)]
    ticks: list[float] = []
    for tick in sorted([0.0, *sizes, *[-size for size in sizes]]):
        far_enough = not ticks or squash(tick) - squash(ticks[-1]) > apart * (high - low)
        if low <= squash(tick) <= high and far_enough:
            ticks.append(tick)
    put([float(squash(tick)) for tick in ticks], [f"{tick:g}" for tick in ticks])


def _padded(values: np.ndarray) -> tuple[float, float]:
    low, high = float(np.min(values)), float(np.max(values))
    pad = 0.03 * (high - low) or 0.5
    return low - pad, high + pad


def _thin(length: int, most: int) -> np.ndarray:
    """At most `most` row numbers out of `length`, even, both ends kept."""
    return np.unique(np.linspace(0, length - 1, min(length, most)).round().astype(int))


def _each_kind(table: Table) -> Iterable[tuple[str, str, np.ndarray]]:
    for label, (name, colour) in _KINDS.items():
        if np.any(table.label == label):
            yield name, colour, table.label == label


def _curve(axes: Any, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    rows = _thin(len(x), _ENOUGH_POINTS)
    axes.plot(x[rows], y[rows], color=_ANOMALOUS, linewidth=1.8, solid_joinstyle="round", **style)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.04)


def _mark_point(axes: Any, x: float, y: float) -> None:
    axes.plot([x], [y], marker="o", markersize=7, color=_INK, linestyle="none", label="at the threshold")
    _legend(axes, loc="lower right" if y > 0.5 else "upper right")


def _mark_threshold(draw: Any, squash: Any, limit: float | None) -> None:
    if limit is not None:
        draw(float(squash(limit)), color=_INK, linewidth=1.1, linestyle=(0, (3, 2)), label="threshold")


def _legend(axes: Any, **where: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK, **where)
