"""The section of pictures: the telling ones by what became of them, all on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxad.report.choice import choose, grouped
from jaxad.report.parts import escape, section, short
from jaxad.report.pictures import Picture, colour_scale, encode, fit_to, heat_map, overlay, palette

_PICTURE_BYTES = 2_000_000  # of all pictures together, encoded: keeps the file below 3 MB
_SIDES = (320, 256, 192, 128, 64)  # longest side of a shown picture in pixels; the first that fits the bytes
_GROUPS = {
    "caught": ("Caught", "anomalous and flagged; the highest scores of each type first"),
    "missed": ("Missed", "anomalous, but below the threshold; the lowest scores first"),
    "alarms": ("False alarms", "normal, but flagged; the highest scores first"),
    "passed": ("Normal and passed", "the ones nearest to a false alarm first"),
    "high": ("Highest scores", "no label or no threshold: whether they are flagged rightly is not known"),
    "low": ("Lowest scores", "no label or no threshold: whether they are passed rightly is not known"),
}


def pictures_section(pictures: Sequence[Picture], scores: Sequence[Mapping[str, Any]]) -> str:
    """The chosen pictures as cards, as large as the bytes allow; "" without any."""
    groups = choose(pictures)
    if not groups:
        return ""
    low, high = colour_scale(pictures)
    totals = {name: len(found) for name, found in grouped(scores).items()}
    for side in _SIDES:
        parts = []
        for name, rows in groups.items():
            heading, doc = _GROUPS[name]
            total = max(totals.get(name, totals["undecided"]), len(rows))
            shown = f"{len(rows)} of {total:,} shown: " if total > len(rows) else ""
            cards = "".join(_card(fit_to(pictures[i], side), low, high, pictures[i].image.shape) for i in rows)
            parts.append(f'<h3>{heading} <small>{shown}{doc}</small></h3><div class="cards">{cards}</div>')
        body = "".join(parts)
        if len(body) <= _PICTURE_BYTES:
            break
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*palette()[level]) for level in range(0, 256, 17))
    scale = (
        f'<div class="scale"><span>{short(low)}</span><i style="background:linear-gradient(90deg,{stops})"></i>'
        f"<span>{short(high)} and above</span></div>"
        '<p class="hint">One colour scale of map scores for all pictures. Cyan outline: the true defect, where a '
        "mask is given. Scores are normalised: 0 is the median of held-out normal images, 1 the threshold.</p>"
    )
    if high <= low:
        scale = '<p class="hint">The maps are constant: this run does not tell where an image is anomalous.</p>'
    return section("Pictures", scale + body)


def _card(picture: Picture, low: float, high: float, shape: tuple[int, ...]) -> str:
    crisp = picture.image.shape[0] > shape[0]
    panels = {"image": encode(picture.image, crisp=crisp)}
    if picture.mask is not None:
        panels["mask"] = encode(np.where(picture.mask != 0, 255, 0).astype(np.uint8), crisp=True)
    panels["heat map"] = encode(heat_map(picture.map, low=low, high=high), crisp=crisp)
    panels["overlay"] = encode(overlay(picture.image, picture.map, low=low, high=high, mask=picture.mask), crisp=crisp)
    file = escape(picture.file)
    figures = "".join(
        f'<figure><img src="{uri}" alt="{name} of {file}"><figcaption>{name}</figcaption></figure>'
        for name, uri in panels.items()
    )
    kind = f"<b>{escape(picture.defect)}</b> · " if picture.defect else ""
    score = f"score {short(picture.normalised)}" if math.isfinite(picture.normalised) else ""
    raw = f"raw {short(picture.score)}"
    facts = kind + " · ".join(filter(None, [score, raw]))
    head = f'<p class="file">{file}</p><p class="facts">{facts}</p>'
    return f'<div class="card">{head}<div class="panels">{figures}</div></div>'
