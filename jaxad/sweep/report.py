"""`report.html` of a sweep: one self-contained file that says which cells are best and how sure that is."""

from __future__ import annotations

import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxad.files import environment, write_text
from jaxad.report.parts import duration, escape, section
from jaxad.report.style import PAGE, STYLE
from jaxad.sweep import stats
from jaxad.sweep.folder import TIMINGS
from jaxad.sweep.grid import Request
from jaxad.sweep.plots import draw_cells, draw_effect, draw_heat, label_of
from jaxad.sweep.stats import Cell, Difference, Summary

_STYLE = (
    STYLE
    + """
th.num, td.num { text-align: right; white-space: nowrap; } .wide .plot svg { max-width: 760px; }
tr.best td { font-weight: 600; } .narrow table { width: auto; } .wide { margin-top: 22px; }
.cells th, .cells td { padding-right: 10px; } .cells th:last-child, .cells td:last-child { padding-right: 0; }
"""
)
_NAMES = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1-max",
    "aupro": "AUPRO 0.3",
    "aupro_005": "AUPRO 0.05",
    "image_auroc_of_map_max": "image AUROC of map maxima",
    "image_auroc_of_map_mean": "image AUROC of map means",
    "image_auroc_video_protocol": "image AUROC, videos stretched",
    "ordered_auroc": "AUROC in order",
    "ordered_auroc_video_protocol": "AUROC in order, videos stretched",
}
_METHODS = (
    "Seeds are the repetitions: each is another split of the data, another initialisation, another order of the "
    "pictures, and the same in every cell. Intervals are 95% intervals of the mean by Student's t over the seeds. "
    "Differences are taken seed by seed; p is of the two-sided paired t-test (scipy.stats.ttest_rel), and Holm's "
    "correction keeps the chance of any false finding among all {count} of them below 5%. Intervals of differences are "
    "not corrected. With few seeds the tests are weak, and they assume differences that are roughly normal."
)


def write_sweep_report(
    path: pathlib.Path,
    table: Sequence[Mapping[str, Any]],
    *,
    request: Request,
    axes: Sequence[str],
    metric: str,
    base: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> None:
    """Writes the whole report as one HTML file that needs neither network nor scripts.

    Args:
      path: the file to write, in one move.
      table: rows of results.csv.
      request: of the sweep.
      axes: columns that name a cell.
      metric: column that cells are compared by.
      base: the cell that others are compared with, by axis.
      notes: about the data.
    """
    cells = stats.cells_of(table, axes, metric)
    summaries = {cell: stats.summarise(list(values.values())) for cell, values in cells.items()}
    differences = stats.compare(cells, base_pairs(list(cells), axes, base))
    name = _NAMES[metric]
    sections = [
        _head(request, table, cells),
        section("", _lead(cells, summaries, differences, axes, name)),
        _cells_section(cells, summaries, differences, axes, name),
        _effects_section(cells, axes, name),
        _metrics_section(table, axes),
        _notes_section(table, metric, differences, notes),
        _cost_section(table),
        _settings_section("Settings", request.to_json()),
        _settings_section("Environment", environment()),
    ]
    title = escape(f"sweep of {request.base.method}")
    write_text(path, PAGE.format(title=title, style=_STYLE, body="\n".join(filter(None, sections))))


def base_pairs(cells: Sequence[Cell], axes: Sequence[str], base: Mapping[str, Any]) -> list[tuple[Cell, Cell]]:
    """Each cell with the base cell of its own data set; other data are no alternative to choose."""
    pairs = []
    for cell in cells:
        own = tuple(value if axis == "data" else base[axis] for axis, value in zip(axes, cell, strict=True))
        if own != cell and own in cells:
            pairs.append((cell, own))
    return pairs


def _head(request: Request, table: Sequence[Mapping[str, Any]], cells: Mapping[Cell, Any]) -> str:
    data = ", ".join(pathlib.PurePath(where).name or where for where in request.data)
    facts = [
        f"preset {request.base.preset}" if request.base.preset else "",
        f"{len(table)} runs: {len(cells)} cells × {len(request.seeds)} seeds",
        f"grid: {', '.join(request.grid)}" if request.grid else "",
    ]
    title = f"Sweep of {escape(request.base.method)} <span>on {escape(data)}</span>"
    return f'<header><h1>{title}</h1><p class="hint">{escape(" · ".join(filter(None, facts)))}</p></header>'


def _lead(cells, summaries, differences: list[Difference], axes, name: str) -> str:
    """The best cell of each data set."""
    digits = _decimals(summaries.values())
    found = [_lead_of(own, differences, axes, name, digits) for own in stats.data_sets(cells, axes)]
    if len(found) == 1:
        return f'<p class="lead">{escape(found[0])}</p>'
    return f'<ul class="lead">{"".join(f"<li>{escape(text)}</li>" for text in found)}</ul>'


def _lead_of(cells, differences: list[Difference], axes, name: str, digits: int) -> str:
    """The best of the cells of one data set."""
    chosen = dict(zip(axes, next(iter(cells)), strict=True))
    what = f"{name} on {chosen['data']}" if "data" in chosen else name
    best = stats.best_cell(cells)
    if best is None:
        return f"No cell has a defined {what}."
    values = list(cells[best].values())
    summary, axes_text = stats.summarise(values), _cell_text(best, axes, leave_out="data")
    text = f"{'Best mean' if len(cells) > 1 else 'Mean'} {what}: {_with_interval(summary, digits)}"
    text += f" with {axes_text}." if axes_text else "."
    if summary.number < len(values):
        lost = len(values) - summary.number
        text += f" It lacks the results of {lost} of {len(values)} seeds; no cell lacks fewer."
    return " ".join(filter(None, [text, _verdict(best, differences)]))


def _verdict(best: Cell, differences: list[Difference]) -> str:
    """How sure it is that a cell differs from its base."""
    found = next((d for d in differences if d.cell == best), None)
    if found is None:
        return "That is the base cell." if any(d.base == best for d in differences) else ""
    if not found.summary.number:
        return "The base cell has no result with the same seeds."
    change = f"That is {_signed(found.summary.mean, _decimals([found.summary]))} against the base cell"
    if found.summary.number < 2:
        return f"{change}; too few seeds to test."
    if not math.isfinite(found.p_holm):
        return f"{change}, the same with every seed: no spread to test."
    sure = "more" if found.p_holm < 0.05 else "no more"
    return f"{change}, {sure} than chance explains (Holm-corrected p {_p(found.p_holm)})."


def _cells_section(cells, summaries, differences, axes, name: str) -> str:
    by_cell = {difference.cell: difference for difference in differences}
    best = {stats.best_cell(own) for own in stats.data_sets(cells, axes) if len(own) > 1}
    rows, classes = [], []
    digits = _decimals(summaries.values())
    fine = _decimals(difference.summary for difference in differences)
    for cell, summary in summaries.items():
        other = by_cell.get(cell)
        row = [*map(label_of, cell), str(summary.number), _number(summary.mean, digits), _span(summary, digits)]
        if other is not None:
            change = other.summary
            row += [_signed(change.mean, fine), _span(change, fine, signed=True), _p(other.p), _p(other.p_holm)]
        elif differences:
            row += ["base", "", "", ""]
        rows.append(row)
        classes.append("best" if cell in best else "")
    head = [*axes, "seeds", name, "95% interval"]
    head += ["difference", "95% interval", "p", "p (Holm)"] if differences else []
    labels = {cell: _cell_text(cell, axes) or "all" for cell in cells}
    points = {cell: list(values.values()) for cell, values in cells.items()}
    bases = {cell: d.base for d in differences for cell in (d.cell, d.base)}
    plot = draw_cells(summaries, labels, points, bases, name) if len(cells) > 1 else ""
    hint = '<p class="hint">Dots are seeds. Dashed: the mean of the base cell.</p>' if plot and differences else ""
    told = (
        '<p class="hint">Mean over seeds. Differences from the base cell are seed by seed; p of the paired t-test, '
        "and after Holm's correction for all of them. In bold: the best mean of a data set, of the cells with the most "
        "seeds.</p>"
    )
    body = _table(head, rows, text_columns=_text_axes(cells, axes), classes=classes)
    return section(
        "Cells", (told if differences else "") + f'<div class="cells">{body}</div><div class="wide">{plot}{hint}</div>'
    )


def _effects_section(cells, axes, name: str) -> str:
    effects = stats.main_effects(cells, axes)
    if len(effects) < 2:
        return ""
    plots = [draw_effect(axis, effect, name) for axis, effect in effects.items()]
    heats = [
        draw_heat(pair, _means(cells, axes, pair), name)
        for pair in itertools.islice(itertools.combinations(effects, 2), 6)
    ]
    digits = _decimals(summary for effect in effects.values() for _, summary in effect)
    rows = [
        [
            axis if first else "",
            label_of(value),
            str(summary.number),
            _number(summary.mean, digits),
            _span(summary, digits),
        ]
        for axis, effect in effects.items()
        for first, (value, summary) in zip(itertools.chain([True], itertools.repeat(False)), effect)  # noqa: B905
    ]
    hint = '<p class="hint">Each value of an axis, averaged over all other axes, seed by seed.</p>'
    table = _table(["axis", "value", "seeds", f"mean {name}", "95% interval"], rows, text_columns=[0])
    drawn = f'<div class="plots small">{"".join(plots)}</div><div class="plots">{"".join(heats)}</div>'
    return section("Main effects", hint + drawn + table)


def _means(cells, axes, pair: tuple[str, str]) -> dict[tuple, float]:
    """Mean over seeds and the other axes of each combination of two axes."""
    places = [list(axes).index(axis) for axis in pair]
    found: dict[tuple, list[float]] = {}
    for cell, by_seed in cells.items():
        found.setdefault(tuple(cell[p] for p in places), []).extend(by_seed.values())
    return {key: stats.summarise(values).mean for key, values in found.items()}


def _metrics_section(table, axes) -> str:
    """All measures of each cell."""
    known = [name for name in _NAMES if any(row.get(name) is not None for row in table)]
    if not known:
        return ""
    columns = []
    for name in known:
        cells = stats.cells_of(table, axes, name)
        summaries = [stats.summarise(list(by_seed.values())) for by_seed in cells.values()]
        columns.append([_with_interval(summary, _decimals(summaries)) for summary in summaries])
    rows = [[*map(label_of, cell), *values] for cell, *values in zip(cells, *columns, strict=True)]
    body = _table([*axes, *(_NAMES[name] for name in known)], rows, text_columns=_text_axes(cells, axes))
    return (
        f"<section><details><summary>All metrics, mean ± half of the 95% interval</summary>{body}</details></section>"
    )


def _notes_section(table, metric: str, differences: list[Difference], notes: Sequence[str]) -> str:
    lost = [row for row in table if row.get(metric) is None]
    found = [_METHODS.format(count=len(differences))] if differences else [_METHODS.split(" Differences")[0]]
    if lost:
        found.append(
            f"{len(lost)} of {len(table)} runs have no {_NAMES[metric]}: their scores are not finite (training "
            "diverged), or the test set lacks a class. They are left out of means; 'seeds' counts what is left."
        )
    found += list(notes)
    return section("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in found)}</ul>")


def _cost_section(table) -> str:
    chunks = {}
    for row in table:  # the rows of a chunk repeat its figures
        chunks[tuple(row[name] for name in TIMINGS)] = row
    seconds = sum(row["chunk_seconds"] for row in chunks.values())
    compiling = sum(row["chunk_compile_seconds"] for row in chunks.values())
    rows = [
        ["runs", str(len(table))],
        ["computed in", f"{len(chunks)} chunk{'' if len(chunks) == 1 else 's'}"],
        ["training, scoring, measuring", duration(seconds)],
        ["compiling", duration(compiling)],
        ["for each run", duration((seconds + compiling) / max(len(table), 1))],
    ]
    return section("Time", f'<div class="narrow">{_table([], rows, text_columns=[0])}</div>')


def _settings_section(title: str, values: Mapping[str, Any]) -> str:
    rows = [[name, json.dumps(value, ensure_ascii=False)] for name, value in _flat(values)]
    return f"<section><details><summary>{title}</summary>{_table([], rows, text_columns=[0, 1])}</details></section>"


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return found


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: Sequence[int], classes: Sequence[str] = ()
) -> str:
    """A table whose columns are numbers, to the right, except for the text columns."""

    def cell(tag: str, place: int, text: str) -> str:
        kind = "" if place in text_columns else ' class="num"'
        return f"<{tag}{kind}>{escape(text)}</{tag}>"

    top = "".join(cell("th", i, text) for i, text in enumerate(head))
    body = ""
    for number, row in enumerate(rows):
        kind = f' class="{classes[number]}"' if classes and classes[number] else ""
        body += f"<tr{kind}>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>"
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _text_axes(cells, axes) -> list[int]:
    return [place for place in range(len(axes)) if any(isinstance(cell[place], str) for cell in cells)]


def _cell_text(cell: Cell, axes: Sequence[str], *, leave_out: str = "") -> str:
    pairs = zip(axes, cell, strict=True)
    return ", ".join(f"{axis} {label_of(value)}" for axis, value in pairs if axis != leave_out)


def _decimals(summaries: Iterable[Summary]) -> int:
    """Decimals at which the narrowest interval still has two digits; 3 to 5."""
    halves = [summary.half for summary in summaries if math.isfinite(summary.half) and summary.half > 0]
    return min(max(1 - math.floor(math.log10(min(halves))), 3), 5) if halves else 4


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _span(summary: Summary, digits: int, *, signed: bool = False) -> str:
    if not math.isfinite(summary.half):
        return "–"
    ends = summary.mean - summary.half, summary.mean + summary.half
    return " to ".join(_signed(end, digits) if signed else _number(end, digits) for end in ends)


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−") if math.isfinite(value) else "–"


def _with_interval(summary: Summary, digits: int) -> str:
    text = _number(summary.mean, digits)
    return f"{text} ± {summary.half:.{digits}f}" if math.isfinite(summary.half) else text


def _p(value: float) -> str:
    return "–" if not math.isfinite(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"
