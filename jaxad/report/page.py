"""`report.html`, one self-contained file that says at a glance how good a run is, and the pictures drawn for it.

Everything here takes plain values (dicts, lists, NumPy arrays) and knows nothing of methods or engines. Keys read from
`report`, all optional: method, preset, data, layout, image_size, seed, device, parameters; `<source>_images` (counts);
image_auroc, image_ap, image_f1max, pixel_auroc, pixel_ap, aupro, aupro_005 (None or NaN: not defined); threshold,
threshold_kind, fpr; load_seconds, compile_seconds, train_seconds, score_seconds, train_images_per_second,
score_images_per_second; per_defect (dicts: defect, images, detected, image_auroc), image_auroc_per_video
(dict), notes and used_test_for (lists of text).
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxad.report.gallery import pictures_section
from jaxad.report.parts import duration, escape, fixed, html_table, section, short
from jaxad.report.pictures import Picture
from jaxad.report.plots import (
    draw_histogram,
    draw_precision_recall,
    draw_roc,
    draw_strips,
    draw_timeline,
    draw_training,
)
from jaxad.report.style import PAGE, STYLE
from jaxad.report.table import Table, number_of, read_scores
from jaxad.report.words import METRICS, interval, nouns, sentence_of


def write_report(
    path: str | os.PathLike[str],
    report: Mapping[str, Any],
    *,
    scores: Sequence[Mapping[str, Any]] = (),
    history: Sequence[Mapping[str, Any]] = (),
    pictures: Sequence[Picture] = (),
    config: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
) -> None:
    """Writes the whole report as one HTML file that needs neither network nor scripts.

    Args:
      path: the file to write; replaced in one move, never left half written.
      report: the headline (see the module's docstring).
      scores: rows of scores.csv: file, label, score, score_normalised, predicted, defect; text or numbers.
      history: rows of metrics.jsonl: phase, step and scalars.
      pictures: samples that may be shown; the telling ones are picked (see `choose`).
      config: resolved settings, may be nested.
      environment: versions, device and the like, may be nested.
    """
    path = pathlib.Path(path)
    table = read_scores(scores)
    sections = [
        _head(report, table),
        _headline(report, table),
        _remarks(report, table),
        _curves_section(report, table),
        pictures_section(pictures, scores),
        _types_section(report, table),
        _videos_section(report, table),
        _training_section(history),
        _time_section(report),
        _settings_section("Settings", config),
        _settings_section("Environment", environment),
    ]
    title = escape(f"{report.get('method', 'jaxad')} on {_data_name(report)}")
    page = PAGE.format(title=title, style=STYLE, body="\n".join(filter(None, sections)))
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(page.encode("utf-8", "backslashreplace"))  # file names may hold bytes that are no UTF-8
    os.replace(draft, path)


def _head(report: Mapping[str, Any], table: Table) -> str:
    size = report.get("image_size")
    counts = [
        f"{short(value)} {key.removesuffix('_images')}"
        for key, value in report.items()
        if key.endswith("_images") and math.isfinite(number_of(value))
    ]
    facts = [
        f"preset {report['preset']}" if report.get("preset") else "",
        f"{size}×{size}" if isinstance(size, int) else "×".join(map(str, size)) if size else "",
        f"{nouns(report)[1]}: {', '.join(counts)}" if counts else "",
        f"seed {report['seed']}" if report.get("seed") is not None else "",
        str(report.get("device") or ""),
    ]
    title = f"{escape(report.get('method', 'jaxad'))} <span>on {escape(_data_name(report))}</span>"
    return f'<header><h1>{title}</h1><p class="hint">{escape(" · ".join(filter(None, facts)))}</p></header>'


def _data_name(report: Mapping[str, Any]) -> str:
    """The data set's last folder: the path in full is in the settings."""
    data = str(report.get("data") or "unnamed data").rstrip("/\\")
    return re.split(r"[/\\]", data)[-1] or data


def _headline(report: Mapping[str, Any], table: Table) -> str:
    words = nouns(report)
    cards = [
        _share_card("Anomalous and flagged", *table.flagged(1), "good", f"no anomalous {words[1]} in the test set"),
        _share_card("False alarms", *table.flagged(0), "bad", f"no normal {words[1]} in the test set"),
    ]
    if not table.is_judged:
        cards = []
    elif not any(table.flagged(label)[1] for label in (0, 1)):
        cards = [_share_card("Flagged", *table.flagged(-1), "bad")]
    for key in ("image_auroc", "pixel_auroc", "aupro"):
        name, doc = METRICS[key]
        value = number_of(report.get(key))
        doc = doc.format(one=words[0], many=words[1]) if math.isfinite(value) else _why_missing(key, table)
        full = 2 * value - 1 if key.endswith("auroc") else value  # an empty bar is guessing
        cards.append(_stat(name, fixed(value), doc, full))
    rows = [
        [name, fixed(report.get(key)), doc.format(one=words[0], many=words[1])] for key, (name, doc) in METRICS.items()
    ]
    body = f'<p class="lead">{escape(sentence_of(words, table))}</p><div class="stats">{"".join(cards)}</div>'
    body += _threshold_line(report)
    body += f"<details><summary>All metrics</summary>{html_table(['metric', 'value', 'meaning'], rows)}</details>"
    return section("", body)


def _share_card(name: str, hits: int, total: int, kind: str, why_missing: str = "") -> str:
    if not total:
        return _stat(name, "–", why_missing, math.nan)
    low, high = interval(hits, total)
    doc = f"{hits:,} of {total:,}; 95% interval {100 * low:.0f} to {100 * high:.0f}%"
    return _stat(name, f"{100 * hits / total:.0f}<small>%</small>", doc, hits / total, kind)


def _stat(name: str, value: str, doc: str, share: float, kind: str = "good") -> str:
    width = 100 * max(share, 0) if math.isfinite(share) else 0
    bar = f'<i class="meter {kind}"><i style="width:{width:.1f}%"></i></i>'
    return f'<div class="stat"><h3>{name}</h3><p class="value">{value}</p>{bar}<p class="hint">{escape(doc)}</p></div>'


def _why_missing(key: str, table: Table) -> str:
    if key.startswith("image") and not (table.flagged(0)[1] and table.flagged(1)[1]):
        return "not defined: needs both normal and anomalous test images"
    return "not defined: needs masks of anomalous test images" if not key.startswith("image") else "not defined"


def _threshold_line(report: Mapping[str, Any]) -> str:
    if not math.isfinite(number_of(report.get("threshold"))):
        return '<p class="threshold">No threshold was set.</p>'
    kind = f" ({escape(report['threshold_kind'])})" if report.get("threshold_kind") else ""
    return f'<p class="threshold">Threshold: a raw score of <b>{short(report["threshold"])}</b>{kind}.</p>'


def _remarks(report: Mapping[str, Any], table: Table) -> str:
    parts = []
    used = report.get("used_test_for")
    if used:
        what = escape(", ".join(map(str, used)))
        parts.append(
            f'<p class="alert"><b>The test set was used for: {what}.</b> Figures that depend on it are optimistic.</p>'
        )
    notes = _warnings(report, table) + [str(note) for note in report.get("notes") or []]
    if table.file and used is not None and not used:
        notes.append("The test set was used for these figures only: not for training, validation or the threshold.")
    if notes:
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")
    return section("Notes", "".join(parts)) if parts else ""


def _warnings(report: Mapping[str, Any], table: Table) -> list[str]:
    """What the figures themselves give reason to doubt."""
    alarms, normal = table.flagged(0)
    aim, auroc = number_of(report.get("fpr")), number_of(report.get("image_auroc"))
    found = []
    if table.broken:
        found.append(f"{table.broken:,} scores are not finite numbers; they are left out of everything shown here.")
    if normal and interval(alarms, normal)[0] > aim:
        found.append(
            f"The threshold aims at {100 * aim:.3g}% false alarms, but {alarms:,} of {normal:,} normal test images are "
            "flagged, more than chance explains: the held-out normal images are too few or unlike those of the test."
        )
    if auroc < 0.6:
        found.append(f"An image AUROC of {auroc:.3f} is close to guessing (0.5): do not rely on these scores.")
    return found


def _curves_section(report: Mapping[str, Any], table: Table) -> str:
    if not table.file:
        return ""
    plots = [draw_histogram(table)]
    if table.flagged(0)[1] and table.flagged(1)[1]:
        plots += [draw_roc(report, table), draw_precision_recall(report, table)]
    return section("Scores", f'<div class="plots">{"".join(plots)}</div>')


def _types_section(report: Mapping[str, Any], table: Table) -> str:
    given = {str(row.get("defect")): row for row in report.get("per_defect") or []}
    names = sorted(set(table.defect) - set(given) - {""})
    normal = {name for name, label in zip(table.defect, table.label, strict=True) if label == 0}
    names = sorted(names, key=lambda name: name not in normal) + list(given)
    if not names:
        return ""
    rows = []
    for name in names:
        row = given.get(name, {})
        mine = np.array([defect == name for defect in table.defect], bool)
        total = int(row.get("images", np.sum(mine)))
        detected = row.get("detected")
        hits = int(np.sum(mine & (table.predicted == 1)) if detected is None else detected)
        kind = "bad" if name in normal else "good"
        share = 100 * hits / total if total else 0
        bar = f'<i class="meter {kind}"><i style="width:{share:.1f}%"></i></i>'
        flagged = f'<span class="flagged">{hits:,} ({share:.0f}%){bar}</span>' if table.is_judged else "–"
        cells = [escape(name), f"{total:,}", flagged]
        rows.append([*cells, fixed(row.get("image_auroc"))])
    head = ["type", nouns(report)[1], "flagged", "image AUROC"]
    dots = draw_strips(table)
    return section("By type", f'<div class="split">{html_table(head, rows, safe=True)}{dots}</div>')


def _videos_section(report: Mapping[str, Any], table: Table) -> str:
    videos = report.get("image_auroc_per_video")
    if not isinstance(videos, Mapping) or not videos:
        return ""
    owner = [_video_of(file, videos) for file in table.file]
    parts: list[str] = []
    for name, value in videos.items():
        rows = [i for i, video in enumerate(owner) if video == name]
        plot = draw_timeline(table, rows) if rows and len(parts) < 24 else ""
        head = f'<p class="file">{escape(name)}</p><p class="facts">AUROC {fixed(value)}</p>'
        parts.append(f'<div class="card">{head}{plot}</div>')
    hint = '<p class="hint">Score of each frame in order. Shaded: the frame is anomalous. Dashed: the threshold.</p>'
    return section("By video", f'{hint}<div class="plots">{"".join(parts)}</div>')


def _video_of(file: str, videos: Iterable[str]) -> str | None:
    parts = re.split(r"[/\\#:]", file)
    return next((name for name in videos if name in parts or file.startswith(name)), None)


def _training_section(history: Sequence[Mapping[str, Any]]) -> str:
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in history:
        curves = phases.setdefault(str(row.get("phase", "train")), {})
        for name, value in row.items():
            if name not in ("phase", "step") and isinstance(value, int | float | None):
                curves.setdefault(name, []).append((number_of(row.get("step")), number_of(value)))
    parts = []
    for phase, curves in phases.items():
        plots = "".join(draw_training(name, points) for name, points in list(curves.items())[:9])
        if plots:
            parts.append(f'<h3>Phase {escape(phase)}</h3><div class="plots small">{plots}</div>')
    return section("Training", "".join(parts)) if parts else ""


def _time_section(report: Mapping[str, Any]) -> str:
    seconds = {name: number_of(report.get(f"{name}_seconds")) for name in ("load", "compile", "train", "score")}
    seconds = {name: value for name, value in seconds.items() if math.isfinite(value)}
    total = sum(seconds.values())
    if not total > 0:
        return ""
    bars = "".join(f'<i class="{name}" style="flex:{value / total:.4f}"></i>' for name, value in seconds.items())
    rows = []
    for name, value in seconds.items():
        rate = number_of(report.get(f"{name}_images_per_second"))
        speed = f"{short(rate)} {nouns(report)[1]}/s" if math.isfinite(rate) else ""
        rows.append([f'<i class="dot {name}"></i>{name}', duration(value), f"{100 * value / total:.0f}%", speed])
    parameters = report.get("parameters")
    foot = f'<p class="hint">{int(parameters):,} parameters</p>' if isinstance(parameters, int | float) else ""
    table = html_table(["", "time", "share", "rate"], rows, safe=True)
    return section("Time", f'<div class="times">{bars}</div>{table}{foot}')


def _settings_section(title: str, values: Mapping[str, Any] | None) -> str:
    rows = [[key, value] for key, value in _flat(values or {})]
    return f"<section><details><summary>{title}</summary>{html_table([], rows)}</details></section>" if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)
