"""What is said in words and numbers, in the report and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxad.report.table import Table, number_of, read_scores

METRICS = {
    "image_auroc": ("image AUROC", "chance that an anomalous {one} scores higher than a normal one; 0.5 is guessing"),
    "image_ap": ("image AP", "average precision over all thresholds"),
    "image_f1max": ("image F1-max", "best F1 any threshold could reach on these {many}"),
    "pixel_auroc": ("pixel AUROC", "chance that an anomalous pixel scores higher than a normal one; 0.5 is guessing"),
    "pixel_ap": ("pixel AP", "average precision over pixels; low where defects are small"),
    "aupro": ("AUPRO 0.3", "mean overlap with each defect region, up to 30% false pixels; large and small count alike"),
    "aupro_005": ("AUPRO 0.05", "the same, up to 5% false pixels"),
}


def sentence(report: Mapping[str, Any], scores: Sequence[Mapping[str, Any]]) -> str:
    """What the threshold does to the scored images, in one plain sentence.

    Args:
      report: as in `write_report`; tells whether frames of videos are meant.
      scores: rows of scores.csv.
    """
    return sentence_of(nouns(report), read_scores(scores))


def metric_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The defined metrics, the threshold and the rates as rows for `console.text_table`: metric, value."""
    names = {key: name for key, (name, _) in METRICS.items()} | {key: key.replace("_", " ") for key in _ON_TERMINAL}
    values = {name: number_of(report.get(key)) for key, name in names.items()}
    return [{"metric": name, "value": value} for name, value in values.items() if math.isfinite(value)]


_ON_TERMINAL = (
    "threshold",
    "compile_seconds",
    "train_seconds",
    "score_seconds",
    "train_images_per_second",
    "score_images_per_second",
)


def nouns(report: Mapping[str, Any]) -> tuple[str, str]:
    """What one sample is called, and several."""
    return ("frame", "frames") if report.get("image_auroc_per_video") else ("image", "images")


def sentence_of(words: tuple[str, str], table: Table) -> str:
    """`sentence` of what was read already; words: from `nouns`."""
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


def interval(hits: int, total: int) -> tuple[float, float]:
    """95% Wilson interval of a share: honest for the few images a test set has."""
    z = 1.96
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, middle - half), min(1.0, middle + half)
