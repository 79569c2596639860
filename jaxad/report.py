"""`report.html`, one self-contained file that says at a glance how good a run is, and the pictures drawn for it.

Everything here takes plain values (dicts, lists, NumPy arrays) and knows nothing of methods or engines. Keys read from
`report`, all optional: method, preset, data, layout, image_size, seed, device, parameters; `<source>_images` (counts);
image_auroc, image_ap, image_f1max, pixel_auroc, pixel_ap, aupro, aupro_005 (None or NaN: not defined); threshold,
threshold_kind, fpr; load_seconds, compile_seconds, train_seconds, score_seconds, train_images_per_second,
score_images_per_second; per_defect (dicts: defect, images, detected, image_auroc, pixel_auroc), image_auroc_per_video
(dict), notes and used_test_for (lists of text).
"""

from __future__ import annotations

import base64
import functools
import html
import io
import math
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_PICTURE_BYTES = 2_000_000  # of all pictures together, encoded: keeps the file below 3 MB
_SIDES = (320, 256, 192, 128, 64)  # longest side of a shown picture in pixels; the first that fits the bytes
_ENOUGH_POINTS = 400  # of one curve: more cannot be seen at this size

_METRICS = {
    "image_auroc": ("image AUROC", "chance that an anomalous {one} scores higher than a normal one; 0.5 is guessing"),
    "image_ap": ("image AP", "average precision over all thresholds"),
    "image_f1max": ("image F1-max", "best F1 any threshold could reach on these {many}"),
    "pixel_auroc": ("pixel AUROC", "chance that an anomalous pixel scores higher than a normal one; 0.5 is guessing"),
    "pixel_ap": ("pixel AP", "average precision over pixels; low where defects are small"),
    "aupro": ("AUPRO 0.3", "mean overlap with each defect region, up to 30% false pixels; large and small count alike"),
    "aupro_005": ("AUPRO 0.05", "the same, up to 5% false pixels"),
}


class Picture(NamedTuple):
    """One scored sample to show (of a clip: its target frame)."""

    file: str
    defect: str
    label: int  # 0 normal, 1 anomalous, -1 unknown
    score: float  # raw
    normalised: float  # 0: median of held-out normal images, 1: threshold
    predicted: int
    image: np.ndarray  # (H, W, C) uint8
    mask: np.ndarray | None  # (H, W), non-zero on anomalous pixels
    map: np.ndarray  # (H, W) float32 raw scores


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
    table = _read(scores)
    sections = [
        _head(report, table),
        _headline(report, table),
        _remarks(report, table),
        _curves_section(report, table),
        _pictures_section(pictures, scores),
        _types_section(report, table),
        _videos_section(report, table),
        _training_section(history),
        _time_section(report),
        _settings_section("Settings", config),
        _settings_section("Environment", environment),
    ]
    title = _escape(f"{report.get('method', 'jaxad')} on {_data_name(report)}")
    page = _PAGE.format(title=title, style=_STYLE, body="\n".join(filter(None, sections)))
    draft = path.with_name(path.name + ".part")
    draft.write_bytes(page.encode("utf-8", "backslashreplace"))  # file names may hold bytes that are no UTF-8
    os.replace(draft, path)


# ---- what is said in words and numbers, in the report and on the terminal


def sentence(report: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    """What the threshold does to the scored images, in one plain sentence.

    Args:
      report: as in `write_report`; tells whether frames of videos are meant.
      scores: rows of scores.csv.
    """
    return _sentence(_words(report), _read(scores))


def metric_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The defined metrics, the threshold and the rates as rows for `console.text_table`: metric, value."""
    names = {key: name for key, (name, _) in _METRICS.items()} | {key: key.replace("_", " ") for key in _ON_TERMINAL}
    values = {name: _number(report.get(key)) for key, name in names.items()}
    return [{"metric": name, "value": value} for name, value in values.items() if math.isfinite(value)]


_ON_TERMINAL = (
    "threshold",
    "compile_seconds",
    "train_seconds",
    "score_seconds",
    "train_images_per_second",
    "score_images_per_second",
)


class _Table(NamedTuple):
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


def _read(rows: Sequence[Mapping[str, Any]]) -> _Table:
    kept = [row for row in rows if math.isfinite(_number(row.get("score")))]
    return _Table(
        file=[str(row.get("file", "")) for row in kept],
        defect=[str(row.get("defect") or "") for row in kept],
        label=np.array([_label(row.get("label")) for row in kept], int),
        predicted=np.array([_label(row.get("predicted")) for row in kept], int),
        score=np.array([_number(row["score"]) for row in kept], float),
        normalised=np.array([_number(row.get("score_normalised")) for row in kept], float),
        broken=len(rows) - len(kept),
    )


def _number(value: Any) -> float:
    """A float of a number or its text; NaN for None, "" and anything else."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _label(value: Any) -> int:
    number = _number(value)
    return int(number) if number in (0, 1) else -1


def _words(report: Mapping[str, Any]) -> tuple[str, str]:
    return ("frame", "frames") if report.get("image_auroc_per_video") else ("image", "images")


def _sentence(words: tuple[str, str], table: _Table) -> str:
    caught, anomalous = table.flagged(1)
    alarms, normal = table.flagged(0)
    flagged, unknown = table.flagged(-1)
    if not table.file:
        return f"No {words[1]} were scored: there was no test set."
    if not table.is_judged:
        return f"{_count(len(table.file), words)} scored; none flagged or passed, for there is no threshold."
    parts = []
    if anomalous:
        parts.append(
            f"of {_count(anomalous, words, 'anomalous ')} {_is(caught)} flagged and {anomalous - caught} missed"
        )
    if normal:
        parts.append(f"of {_count(normal, words, 'normal ')} {_is(alarms)} flagged by mistake")
    if unknown:
        parts.append(f"of {_count(unknown, words, 'unlabelled ')} {_is(flagged)} flagged, rightly or not is unknown")
    text = "; ".join(parts)
    if normal and not anomalous:
        text += f". No anomalous {words[1]} were given, so how many would be found is not known"
    if anomalous and not normal:
        text += f". No normal {words[1]} were given, so how many false alarms to expect is not known"
    return text[0].upper() + text[1:] + "."


def _count(number: int, words: tuple[str, str], kind: str = "") -> str:
    return f"{number:,} {kind}{words[number != 1]}"


def _is(number: int) -> str:
    return "none is" if number == 0 else "1 is" if number == 1 else f"{number:,} are"


def _interval(hits: int, total: int) -> tuple[float, float]:
    """95% Wilson interval of a share: honest for the few images a test set has."""
    z = 1.96
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)


# ---- pictures


def heat_map(map: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """A map in colour on a fixed scale, dark where normal (inferno: even steps in brightness), so that maps compare.

    Args:
      map: (H, W) scores.
      low: score of the darkest colour.
      high: score of the brightest colour; what is beyond is clipped.

    Returns:
      (H, W, 3) uint8; mid-grey where the map is not finite.
    """
    level = np.round(255 * _unit(map, low, high)).astype(np.uint8)
    return np.where(np.isfinite(map)[..., None], _colours()[level], np.uint8(128))


def overlay(
    image: np.ndarray,
    map: np.ndarray,
    *,
    low: float,
    high: float,
    mask: np.ndarray | None = None,
    opacity: float = 0.6,
) -> np.ndarray:
    """The image with the map laid over it, the more opaque the higher the score, and the mask's outline in cyan.

    Args:
      image: (H, W, C) or (H, W) uint8.
      map: (H, W) scores.
      low: score at which nothing is laid over.
      high: score from which `opacity` is reached.
      mask: (H, W), non-zero on anomalous pixels; None: no outline.
      opacity: of the map at `high`, in [0, 1].

    Returns:
      (H, W, 3) uint8.

    Raises:
      ValueError: if the sizes differ.
    """
    for name, other in (("map", map), ("mask", mask)):
        if other is not None and other.shape != image.shape[:2]:
            raise ValueError(
                f"{name} has shape {other.shape}; expected the image's (H, W) = {image.shape[:2]}. "
                f"Resize the {name} to the image first."
            )
    weight = opacity * _unit(map, low, high)[..., None]
    mixed = (1 - weight) * _rgb(image) + weight * heat_map(map, low=low, high=high)
    mixed = np.round(mixed).astype(np.uint8)
    if mask is not None:
        mixed[_grow(mask != 0) & (mask == 0)] = 0  # a dark rim, so that the outline shows on bright images too
        mixed[outline(mask)] = _CYAN
    return mixed


_CYAN = (0, 240, 255)  # far from every colour of the map


def outline(mask: np.ndarray) -> np.ndarray:
    """The outermost pixels of each region of a mask (H, W), regions cut by the border included -> (H, W) bool."""
    inside = mask != 0
    outside = np.pad(~inside, 1, constant_values=True)
    return inside & _grow(outside)[1:-1, 1:-1]


def save_map(
    path: str | os.PathLike[str], map: np.ndarray, *, low: float, high: float, image: np.ndarray | None = None
) -> None:
    """Saves a map: raw scores for `.npy`, else a picture in colour (or laid over `image`, at the image's size).

    Args:
      path: the file to write; its ending decides the format (.npy, .png, .jpg, ...).
      map: (H, W) float scores.
      low: score of the darkest colour.
      high: score of the brightest colour.
      image: (H', W', C) uint8 to lay the map over.
    """
    from PIL import Image

    path = pathlib.Path(path)
    if image is not None and image.shape[:2] != map.shape:
        map = _resize(map, image.shape[1::-1], smooth=True)
    if path.suffix == ".npy":
        np.save(path, np.asarray(map, np.float32))
        return
    drawn = heat_map(map, low=low, high=high) if image is None else overlay(image, map, low=low, high=high)
    Image.fromarray(drawn).save(path)


def colour_scale(pictures: Sequence[Picture]) -> tuple[float, float]:
    """(low, high) on which these maps compare: the median pixel, and the usual peak of an anomalous picture's map."""
    finite = [picture.map[np.isfinite(picture.map)] for picture in pictures]
    finite = [values for values in finite if values.size]
    if not finite:
        return 0.0, 1.0
    loud = [picture.label == 1 or (picture.label < 0 and picture.predicted == 1) for picture in pictures]
    peaks = [np.max(picture.map, initial=-np.inf, where=np.isfinite(picture.map)) for picture in pictures]
    peaks = [peak for peak, is_loud in zip(peaks, loud, strict=True) if is_loud or not any(loud)]
    low = float(np.median([np.median(values) for values in finite]))
    return low, max(float(np.median(peaks)), low)


def choose(rows: Sequence[Any], *, each: int = 4) -> dict[str, list[int]]:
    """Which samples tell most about a run, as indices by group; groups without samples are left out.

    Groups: "caught" (highest first, one of each defect type before a second one), "missed" (lowest first), "alarms"
    (highest first), "passed" (normal, nearest to the threshold first), "high" and "low" (without label or threshold).

    Args:
      rows: rows of scores.csv or Pictures.
      each: the most samples of a group.
    """
    groups = _grouped(rows)
    undecided = groups.pop("undecided")
    groups = {name: found[:each] for name, found in groups.items()}
    groups |= {"high": undecided[:each], "low": undecided[each:][::-1][:each]}
    return {name: found for name, found in groups.items() if found}


def _grouped(rows: Sequence[Any]) -> dict[str, list[int]]:
    """All rows with a finite score by what became of them, the most telling first."""
    dicts = [row._asdict() if isinstance(row, Picture) else row for row in rows]
    order = [i for i, row in enumerate(dicts) if math.isfinite(_number(row.get("score")))]
    order.sort(key=lambda i: -_number(dicts[i]["score"]))
    outcomes = [(_label(row.get("label")), _label(row.get("predicted"))) for row in dicts]

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


def _unit(map: np.ndarray, low: float, high: float) -> np.ndarray:
    span = max(high - low, 1e-30)
    return np.clip((np.nan_to_num(np.asarray(map, np.float64), nan=low) - low) / span, 0, 1)


@functools.cache
def _colours() -> np.ndarray:
    import matplotlib

    return np.round(255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)


def _rgb(image: np.ndarray) -> np.ndarray:
    image = image if image.ndim == 3 else image[..., None]
    if image.shape[2] in (3, 4):
        return image[..., :3]
    return np.repeat(np.round(image.mean(-1, keepdims=True)).astype(np.uint8), 3, -1)  # grey, or many bands


def _grow(region: np.ndarray) -> np.ndarray:
    wide = np.pad(region, 1)
    return region | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def _resize(plane: np.ndarray, size: tuple[int, ...], *, smooth: bool) -> np.ndarray:
    """A float plane (H, W) at size (width, height)."""
    from PIL import Image

    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.BOX
    return np.asarray(Image.fromarray(np.asarray(plane, np.float32)).resize((size[0], size[1]), how))


def _fit(picture: Picture, side: int) -> Picture:
    """The picture at about `side` pixels: small ones enlarged by whole pixels (crisp), large ones shrunk."""
    from PIL import Image

    height, width = picture.image.shape[:2]
    image, mask, map = _rgb(picture.image), picture.mask, picture.map
    if max(height, width) > side:
        size = tuple(max(1, round(length * side / max(height, width))) for length in (width, height))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        map = _resize(map, size, smooth=False)
        # a scratch thinner than a pixel must not vanish
        mask = None if mask is None else _resize(mask != 0, size, smooth=False) > 0
    else:
        times = side // max(height, width)
        image, map = (plane.repeat(times, 0).repeat(times, 1) for plane in (image, map))
        mask = None if mask is None else mask.repeat(times, 0).repeat(times, 1)
    return picture._replace(image=image, mask=mask, map=map)


def _encode(image: np.ndarray, *, crisp: bool) -> str:
    """An image as a data URI: PNG for masks and enlarged pixels, JPEG for the rest."""
    from PIL import Image

    buffer = io.BytesIO()
    if crisp:
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(image).save(buffer, "JPEG", quality=85, subsampling=0)
    return f"data:image/{'png' if crisp else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"


_GROUPS = {
    "caught": ("Caught", "anomalous and flagged; the highest scores of each type first"),
    "missed": ("Missed", "anomalous, but below the threshold; the lowest scores first"),
    "alarms": ("False alarms", "normal, but flagged; the highest scores first"),
    "passed": ("Normal and passed", "the ones nearest to a false alarm first"),
    "high": ("Highest scores", "no label or no threshold: whether they are flagged rightly is not known"),
    "low": ("Lowest scores", "no label or no threshold: whether they are passed rightly is not known"),
}


def _pictures_section(pictures: Sequence[Picture], scores: Sequence[Mapping[str, Any]]) -> str:
    groups = choose(pictures)
    if not groups:
        return ""
    low, high = colour_scale(pictures)
    totals = {name: len(found) for name, found in _grouped(scores).items()}
    for side in _SIDES:
        parts = []
        for name, rows in groups.items():
            heading, doc = _GROUPS[name]
            total = max(totals.get(name, totals["undecided"]), len(rows))
            shown = f"{len(rows)} of {total:,} shown: " if total > len(rows) else ""
            cards = "".join(_card(_fit(pictures[i], side), low, high, pictures[i].image.shape) for i in rows)
            parts.append(f'<h3>{heading} <small>{shown}{doc}</small></h3><div class="cards">{cards}</div>')
        body = "".join(parts)
        if len(body) <= _PICTURE_BYTES:
            break
    stops = ", ".join("#{:02x}{:02x}{:02x}".format(*_colours()[level]) for level in range(0, 256, 17))
    scale = (
        f'<div class="scale"><span>{_short(low)}</span><i style="background:linear-gradient(90deg,{stops})"></i>'
        f"<span>{_short(high)} and above</span></div>"
        '<p class="hint">One colour scale of map scores for all pictures. Cyan outline: the true defect, where a '
        "mask is given. Scores are normalised: 0 is the median of held-out normal images, 1 the threshold.</p>"
    )
    if high <= low:
        scale = '<p class="hint">The maps are constant: this run does not tell where an image is anomalous.</p>'
    return _section("Pictures", scale + body)


def _card(picture: Picture, low: float, high: float, shape: tuple[int, ...]) -> str:
    crisp = picture.image.shape[0] > shape[0]
    panels = {"image": _encode(picture.image, crisp=crisp)}
    if picture.mask is not None:
        panels["mask"] = _encode(np.where(picture.mask != 0, 255, 0).astype(np.uint8), crisp=True)
    panels["heat map"] = _encode(heat_map(picture.map, low=low, high=high), crisp=crisp)
    panels["overlay"] = _encode(overlay(picture.image, picture.map, low=low, high=high, mask=picture.mask), crisp=crisp)
    file = _escape(picture.file)
    figures = "".join(
        f'<figure><img src="{uri}" alt="{name} of {file}"><figcaption>{name}</figcaption></figure>'
        for name, uri in panels.items()
    )
    kind = f"<b>{_escape(picture.defect)}</b> · " if picture.defect else ""
    score = f"score {_short(picture.normalised)}" if math.isfinite(picture.normalised) else ""
    raw = f"raw {_short(picture.score)}"
    facts = kind + " · ".join(filter(None, [score, raw]))
    head = f'<p class="file">{file}</p><p class="facts">{facts}</p>'
    return f'<div class="card">{head}<div class="panels">{figures}</div></div>'


# ---- sections


def _head(report: Mapping[str, Any], table: _Table) -> str:
    size = report.get("image_size")
    counts = [
        f"{_short(value)} {key.removesuffix('_images')}"
        for key, value in report.items()
        if key.endswith("_images") and math.isfinite(_number(value))
    ]
    facts = [
        f"preset {report['preset']}" if report.get("preset") else "",
        f"{size}×{size}" if isinstance(size, int) else "×".join(map(str, size)) if size else "",
        f"{_words(report)[1]}: {', '.join(counts)}" if counts else "",
        f"seed {report['seed']}" if report.get("seed") is not None else "",
        str(report.get("device") or ""),
    ]
    title = f"{_escape(report.get('method', 'jaxad'))} <span>on {_escape(_data_name(report))}</span>"
    return f'<header><h1>{title}</h1><p class="hint">{_escape(" · ".join(filter(None, facts)))}</p></header>'


def _data_name(report: Mapping[str, Any]) -> str:
    """The data set's last folder: the path in full is in the settings."""
    data = str(report.get("data") or "unnamed data").rstrip("/\\")
    return re.split(r"[/\\]", data)[-1] or data


def _headline(report: Mapping[str, Any], table: _Table) -> str:
    words = _words(report)
    cards = [
        _share_card("Anomalous and flagged", *table.flagged(1), "good", f"no anomalous {words[1]} in the test set"),
        _share_card("False alarms", *table.flagged(0), "bad", f"no normal {words[1]} in the test set"),
    ]
    if not table.is_judged:
        cards = []
    elif not any(table.flagged(label)[1] for label in (0, 1)):
        cards = [_share_card("Flagged", *table.flagged(-1), "bad")]
    for key in ("image_auroc", "pixel_auroc", "aupro"):
        name, doc = _METRICS[key]
        value = _number(report.get(key))
        doc = doc.format(one=words[0], many=words[1]) if math.isfinite(value) else _why_missing(key, table)
        full = 2 * value - 1 if key.endswith("auroc") else value  # an empty bar is guessing
        cards.append(_stat(name, _fixed(value), doc, full))
    rows = [
        [name, _fixed(report.get(key)), doc.format(one=words[0], many=words[1])]
        for key, (name, doc) in _METRICS.items()
    ]
    body = f'<p class="lead">{_escape(_sentence(words, table))}</p><div class="stats">{"".join(cards)}</div>'
    body += _threshold_line(report)
    body += f"<details><summary>All metrics</summary>{_html_table(['metric', 'value', 'meaning'], rows)}</details>"
    return _section("", body)


def _share_card(name: str, hits: int, total: int, kind: str, why_missing: str = "") -> str:
    if not total:
        return _stat(name, "–", why_missing, math.nan)
    low, high = _interval(hits, total)
    doc = f"{hits:,} of {total:,}; 95% interval {100 * low:.0f} to {100 * high:.0f}%"
    return _stat(name, f"{100 * hits / total:.0f}<small>%</small>", doc, hits / total, kind)


def _stat(name: str, value: str, doc: str, share: float, kind: str = "good") -> str:
    width = 100 * max(share, 0) if math.isfinite(share) else 0
    bar = f'<i class="meter {kind}"><i style="width:{width:.1f}%"></i></i>'
    return f'<div class="stat"><h3>{name}</h3><p class="value">{value}</p>{bar}<p class="hint">{_escape(doc)}</p></div>'


def _why_missing(key: str, table: _Table) -> str:
    if key.startswith("image") and not (table.flagged(0)[1] and table.flagged(1)[1]):
        return "not defined: needs both normal and anomalous test images"
    return "not defined: needs masks of anomalous test images" if not key.startswith("image") else "not defined"


def _threshold_line(report: Mapping[str, Any]) -> str:
    if not math.isfinite(_number(report.get("threshold"))):
        return '<p class="threshold">No threshold was set.</p>'
    kind = f" ({_escape(report['threshold_kind'])})" if report.get("threshold_kind") else ""
    return f'<p class="threshold">Threshold: a raw score of <b>{_short(report["threshold"])}</b>{kind}.</p>'


def _remarks(report: Mapping[str, Any], table: _Table) -> str:
    parts = []
    used = report.get("used_test_for")
    if used:
        what = _escape(", ".join(map(str, used)))
        parts.append(
            f'<p class="alert"><b>The test set was used for: {what}.</b> Figures that depend on it are optimistic.</p>'
        )
    notes = _warnings(report, table) + [str(note) for note in report.get("notes") or []]
    if table.file and used is not None and not used:
        notes.append("The test set was used for these figures only: not for training, validation or the threshold.")
    if notes:
        parts.append(f"<ul>{''.join(f'<li>{_escape(note)}</li>' for note in notes)}</ul>")
    return _section("Notes", "".join(parts)) if parts else ""


def _warnings(report: Mapping[str, Any], table: _Table) -> list[str]:
    """What the figures themselves give reason to doubt."""
    alarms, normal = table.flagged(0)
    aim, auroc = _number(report.get("fpr")), _number(report.get("image_auroc"))
    found = []
    if table.broken:
        found.append(f"{table.broken:,} scores are not finite numbers; they are left out of everything shown here.")
    if normal and _interval(alarms, normal)[0] > aim:
        found.append(
            f"The threshold aims at {100 * aim:.3g}% false alarms, but {alarms:,} of {normal:,} normal test images are "
            "flagged, more than chance explains: the held-out normal images are too few or unlike those of the test."
        )
    if auroc < 0.6:
        found.append(f"An image AUROC of {auroc:.3f} is close to guessing (0.5): do not rely on these scores.")
    return found


def _curves_section(report: Mapping[str, Any], table: _Table) -> str:
    if not table.file:
        return ""
    plots = [_histogram(table)]
    if table.flagged(0)[1] and table.flagged(1)[1]:
        plots += [_roc(report, table), _precision_recall(report, table)]
    return _section("Scores", f'<div class="plots">{"".join(plots)}</div>')


def _types_section(report: Mapping[str, Any], table: _Table) -> str:
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
        hits = int(row.get("detected", np.sum(mine & (table.predicted == 1))))
        kind = "bad" if name in normal else "good"
        share = 100 * hits / total if total else 0
        bar = f'<i class="meter {kind}"><i style="width:{share:.1f}%"></i></i>'
        flagged = f'<span class="flagged">{hits:,} ({share:.0f}%){bar}</span>' if table.is_judged else "–"
        cells = [_escape(name), f"{total:,}", flagged]
        rows.append([*cells, _fixed(row.get("image_auroc")), _fixed(row.get("pixel_auroc"))])
    head = ["type", _words(report)[1], "flagged", "image AUROC", "pixel AUROC"]
    dots = _strips(table)
    return _section("By type", f'<div class="split">{_html_table(head, rows, safe=True)}{dots}</div>')


def _videos_section(report: Mapping[str, Any], table: _Table) -> str:
    videos = report.get("image_auroc_per_video")
    if not isinstance(videos, Mapping) or not videos:
        return ""
    owner = [_video_of(file, videos) for file in table.file]
    parts: list[str] = []
    for name, value in videos.items():
        rows = [i for i, video in enumerate(owner) if video == name]
        plot = _timeline(table, rows) if rows and len(parts) < 24 else ""
        head = f'<p class="file">{_escape(name)}</p><p class="facts">AUROC {_fixed(value)}</p>'
        parts.append(f'<div class="card">{head}{plot}</div>')
    hint = '<p class="hint">Score of each frame in order. Shaded: the frame is anomalous. Dashed: the threshold.</p>'
    return _section("By video", f'{hint}<div class="plots">{"".join(parts)}</div>')


def _video_of(file: str, videos: Iterable[str]) -> str | None:
    parts = re.split(r"[/\\#:]", file)
    return next((name for name in videos if name in parts or file.startswith(name)), None)


def _training_section(history: Sequence[Mapping[str, Any]]) -> str:
    phases: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in history:
        curves = phases.setdefault(str(row.get("phase", "train")), {})
        for name, value in row.items():
            if name not in ("phase", "step") and isinstance(value, int | float | None):
                curves.setdefault(name, []).append((_number(row.get("step")), _number(value)))
    parts = []
    for phase, curves in phases.items():
        plots = "".join(_training_curve(name, points) for name, points in list(curves.items())[:9])
        if plots:
            parts.append(f'<h3>Phase {_escape(phase)}</h3><div class="plots small">{plots}</div>')
    return _section("Training", "".join(parts)) if parts else ""


def _time_section(report: Mapping[str, Any]) -> str:
    seconds = {name: _number(report.get(f"{name}_seconds")) for name in ("load", "compile", "train", "score")}
    seconds = {name: value for name, value in seconds.items() if math.isfinite(value)}
    total = sum(seconds.values())
    if not total > 0:
        return ""
    bars = "".join(f'<i class="{name}" style="flex:{value / total:.4f}"></i>' for name, value in seconds.items())
    rows = []
    for name, value in seconds.items():
        rate = _number(report.get(f"{name}_images_per_second"))
        speed = f"{_short(rate)} {_words(report)[1]}/s" if math.isfinite(rate) else ""
        rows.append([f'<i class="dot {name}"></i>{name}', _seconds(value), f"{100 * value / total:.0f}%", speed])
    parameters = report.get("parameters")
    foot = f'<p class="hint">{int(parameters):,} parameters</p>' if isinstance(parameters, int | float) else ""
    table = _html_table(["", "time", "share", "rate"], rows, safe=True)
    return _section("Time", f'<div class="times">{bars}</div>{table}{foot}')


def _settings_section(title: str, values: Mapping[str, Any] | None) -> str:
    rows = [[key, value] for key, value in _flat(values or {})]
    return f"<section><details><summary>{title}</summary>{_html_table([], rows)}</details></section>" if rows else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _section(title: str, body: str) -> str:
    return f"<section>{f'<h2>{title}</h2>' if title else ''}{body}</section>"


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, safe: bool = False) -> str:
    """A table that scrolls in its own box. Cells are escaped unless `safe` says that they are HTML."""
    top = f"<thead><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{c if safe else _escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _escape(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _fixed(value: Any) -> str:
    number = _number(value)
    return f"{number:.3f}" if math.isfinite(number) else "–"


def _short(value: Any) -> str:
    number = _number(value)
    if not math.isfinite(number):
        return "–"
    return f"{number:,.0f}" if abs(number) >= 1000 or number == int(number) else f"{number:.3g}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


# ---- plots: matplotlib draws SVG in stand-in colours, which become the page's own, light or dark

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
    opening = f'<svg {box[0]} role="img" aria-label="{_escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<div class="plot">{opening}{text[start:]}</div>'


def _histogram(table: _Table) -> str:
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


def _strips(table: _Table) -> str:
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


def _timeline(table: _Table, rows: list[int]) -> str:
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


def _roc(report: Mapping[str, Any], table: _Table) -> str:
    known = table.label >= 0
    fpr, tpr, _ = _operating_points(table.label[known], table.score[known])
    figure, axes = _axes(f"ROC, area {_fixed(report.get('image_auroc'))}", "normal flagged", "anomalous flagged")
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
    _curve(axes, fpr, tpr)
    caught, anomalous = table.flagged(1)
    alarms, normal = table.flagged(0)
    if table.is_judged:
        _mark_point(axes, alarms / normal, caught / anomalous)
    return _svg(figure, "ROC curve")


def _precision_recall(report: Mapping[str, Any], table: _Table) -> str:
    known = table.label >= 0
    fpr, recall, precision = _operating_points(table.label[known], table.score[known])
    figure, axes = _axes(
        f"Precision and recall, AP {_fixed(report.get('image_ap'))}", "anomalous flagged (recall)", "flagged rightly"
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


def _training_curve(name: str, points: list[tuple[float, float]]) -> str:
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


def _scores_axis(table: _Table) -> tuple[np.ndarray, float | None, str]:
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


def _each_kind(table: _Table) -> Iterable[tuple[str, str, np.ndarray]]:
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


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --paper: #f5f6f8; --card: #fff; --ink: #1c2430; --muted: #667080; --line: #e3e6ea; --normal: #2f6fb5;
  --anomalous: #d9572b; --warn: #fff3dc; --warn-line: #e0a030; --load: #9aa5b1; --compile: #8a6fc0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1d2128; --ink: #e8ebf0; --muted: #9aa4b2;
  --line: #323843; --normal: #6aa9ee; --anomalous: #ff8a5c; --warn: #3a2f17; --warn-line: #c08a2a; --load: #7c8794;
  --compile: #a993dd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 48px; }
header { padding: 4px 4px 12px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; } h1 span { font-weight: 400; }
h2 { font-size: 18px; margin: 0 0 12px; } h3 { font-size: 15px; margin: 20px 0 8px; }
h3 small, .hint, .facts { color: var(--muted); font-size: 13px; font-weight: 400; }
p { margin: 0 0 8px; } header .hint { margin: 6px 0 0; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px;
  margin: 0 0 14px; }
.lead { font-size: 20px; line-height: 1.35; margin: 0 0 16px; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); gap: 14px 22px; }
.stat h3::first-letter { text-transform: uppercase; }
.stat h3 { margin: 0; font-weight: 500; color: var(--muted); font-size: 14px; }
.value { font-size: 34px; line-height: 1.15; font-weight: 600; margin: 0 0 4px; } .value small { font-size: 20px; }
.meter { display: block; height: 5px; border-radius: 3px; background: var(--line); margin: 0 0 6px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--normal); } .meter.bad i { background: var(--anomalous); }
.threshold { margin: 14px 0 6px; padding-top: 12px; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.alert { background: var(--warn); border-left: 4px solid var(--warn-line); padding: 10px 14px; border-radius: 4px; }
ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; } li { margin: 2px 0; }
summary { cursor: pointer; color: var(--muted); } section > details > summary { font-size: 16px; color: var(--ink); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px 24px; }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); }
.plot svg { display: block; width: 100%; height: auto; max-width: 480px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--muted); font-weight: 500; } th, td { padding: 6px 14px 6px 0; vertical-align: top; }
tr + tr td, thead + tbody tr td { border-top: 1px solid var(--line); }
details .scroll { margin-top: 8px; } details td { overflow-wrap: anywhere; min-width: 90px; }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 20px 32px; }
.split > * { min-width: 0; } .flagged { display: block; min-width: 96px; } .flagged .meter { margin: 3px 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px; min-width: 0; }
.file { margin: 0; font-size: 13px; overflow-wrap: anywhere; } .facts { margin: 0 0 8px; overflow-wrap: anywhere; }
.facts b { color: var(--ink); font-weight: 600; }
.panels { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 6px; }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--muted); font-size: 12px; text-align: center; }
.scale { display: flex; align-items: center; gap: 10px; font-size: 13px; color: var(--muted); margin: 0 0 4px; }
.scale i { flex: 1; max-width: 260px; height: 10px; border-radius: 5px; }
.times { display: flex; height: 16px; border-radius: 5px; overflow: hidden; gap: 2px; margin: 0 0 10px; }
.load { background: var(--load); } .compile { background: var(--compile); } .train { background: var(--normal); }
.score { background: var(--anomalous); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
@media (max-width: 560px) { main { padding: 12px 8px 32px; } section { padding: 14px 12px; } .lead { font-size: 17px; }
  h1 { font-size: 22px; } .panels { grid-auto-flow: row; grid-template-columns: 1fr 1fr; }
  .stats { grid-template-columns: 1fr 1fr; gap: 16px; } .value { font-size: 28px; } h3 small { display: block; } }
"""
