"""Measures of a detector on a test source: metrics, rows of scores.csv, pictures for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxad import adaptation, metrics, score
from jaxad.core import Scores, Source, select
from jaxad.data import Dataset
from jaxad.detector import Detector, batch_size_for
from jaxad.files import SCORE_COLUMNS

_MEASURES = (
    *("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro", "aupro_005"),
    *("score_seconds", "score_images_per_second"),
)


def measure(detector: Detector, data: Dataset, *, f1max: bool = False) -> tuple[dict[str, Any], list[dict], list]:
    """Scores the test source: (measures, rows of scores.csv, pictures for the report)."""
    calibration, notes = detector.calibration, [*data.notes, *_calibration_notes(detector.calibration)]
    result: dict[str, Any] = {f"{name}_images": len(source) for name, source in data.sources.items()}
    result |= {"parameters": _count(detector.state), "notes": notes}
    result |= {"threshold": None, "fpr": None, "holdout_images": calibration.images if calibration else 0}
    if "test" not in data.sources or not len(data.sources["test"]):
        notes.append("The data has no test images: nothing was measured.")
        result |= dict.fromkeys(_MEASURES)
        return {**result, **_threshold(calibration, {}, f1max), "per_defect": []}, [], []
    source, facts = data.sources["test"], data.rows["test"]
    labels = sample_labels(source)
    has_mask = np.asarray(facts.has_mask)
    weights = None
    if source.mask is not None and has_mask.any():
        weights = metrics.label_regions(sample_masks(source))
    evaluation = score.evaluate(
        detector.method,
        detector.state,
        source,
        region_weights=weights,
        has_mask=has_mask,
        centre=calibration.pixel_median if calibration else 0.0,
        batch_size=batch_size_for(detector.spec),
    )
    pixel = {} if evaluation.pixels is None else jax.device_get(jax.jit(metrics.pixel_metrics)(evaluation.pixels))
    scored = evaluation.image, evaluation.map_max, evaluation.map_mean
    result |= figures(*scored, pixel, calibration, labels=labels, groups=facts.groups, f1max=f1max)
    if detector.method.ordered is not None and any(facts.groups):
        videos = np.asarray(facts.groups)
        result |= adaptation.measure_ordered(detector.method, detector.state, source, videos, labels)
    result["score_seconds"] = evaluation.seconds
    result["score_compile_seconds"] = evaluation.compile_seconds
    result["score_images_per_second"] = len(source) / max(evaluation.seconds, 1e-9)
    rows = score_rows(
        evaluation.image,
        facts.files,
        calibration,
        threshold=result["threshold"],
        labels=labels,
        defects=facts.defects,
    )
    result["per_defect"] = _per_defect(rows)
    return result, rows, _pictures(detector, source, rows, has_mask)


def figures(
    image: np.ndarray,
    map_max: np.ndarray,
    map_mean: np.ndarray,
    pixel: Mapping[str, Any],
    calibration: score.Calibration | None,
    *,
    labels: np.ndarray,
    groups: Sequence[str] = (),
    f1max: bool = False,
) -> dict[str, Any]:
    """The measures of a scored test source, as in report.json.

    Args:
      image, map_max, map_mean: (N,) image scores, and maxima and means of the maps.
      pixel: from `metrics.pixel_metrics`; empty without masks.
      calibration: for the threshold.
      labels: (N,) of the samples.
      groups: the video of each sample; "" or none elsewhere.
      f1max: take the threshold from these samples.
    """
    measured = metrics.image_metrics(image, labels)
    result: dict[str, Any] = {f"image_{name}": measured[name] for name in ("auroc", "ap", "f1max")}
    result["image_auroc_of_map_max"] = metrics.image_metrics(map_max, labels)["auroc"]
    result["image_auroc_of_map_mean"] = metrics.image_metrics(map_mean, labels)["auroc"]
    result |= {f"pixel_{name}": pixel.get(name) for name in ("auroc", "ap", "f1max")}
    result |= {name: pixel.get(name) for name in ("aupro", "aupro_005")}
    result |= _threshold(calibration, measured, f1max)
    if any(groups):
        result |= _video_measures(image, np.asarray(groups), labels)
    return result | _rates(image, result["threshold"], labels)


def score_rows(
    scores: np.ndarray,
    files: Sequence[str],
    calibration: score.Calibration | None,
    *,
    threshold: float | None = None,
    labels: Any = (),
    defects: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Rows of scores.csv.

    Args:
      scores: (N,) raw image scores.
      files: N names.
      calibration: for normalised scores, and for predictions unless `threshold` is given; None leaves them open.
      threshold: another threshold.
      labels, defects: of the N samples, if known.
    """
    normalised, predicted = [None] * len(files), [None] * len(files)
    if calibration is not None:
        threshold = calibration.threshold if threshold is None else threshold
        empty = np.zeros((len(files), 0, 0), np.float32)
        normalised = score.normalize(Scores(scores, empty), calibration).image.tolist()
    if threshold is not None:
        predicted = (scores > threshold).astype(int).tolist()
    labels = np.asarray(labels).tolist() or [-1] * len(files)
    columns = files, labels, scores.tolist(), normalised, predicted, defects or [""] * len(files)
    return [dict(zip(SCORE_COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]


def _threshold(calibration: score.Calibration | None, image: Mapping[str, float], f1max: bool) -> dict[str, Any]:
    """The threshold and where it is from: held-out normals, or, if asked for by name, the labelled test set."""
    if f1max and np.isfinite(image.get("f1max_threshold", np.nan)):
        # the measure calls scores >= its threshold anomalous, a prediction scores > threshold
        below = np.nextafter(np.float32(image["f1max_threshold"]), np.float32(-np.inf))
        kind = "F1-max on labelled test images (optimistic)"
        return {"threshold": float(below), "threshold_kind": kind, "used_test_for": ["threshold"]}
    if calibration is None:
        return {"threshold": None, "threshold_kind": "none: no held-out normal images", "used_test_for": []}
    kind = f"quantile of held-out normal images, fpr={calibration.fpr:g}"
    return {
        "threshold": calibration.threshold,
        "threshold_kind": kind,
        "fpr": calibration.fpr,
        "used_test_for": [],
    }


def _calibration_notes(calibration: score.Calibration | None) -> list[str]:
    if calibration is None:
        return ["No normal images were held out, so there is no threshold; load with a holdout such as 0.1."]
    if calibration.images + 1 >= 1 / calibration.fpr:
        return []
    return [
        f"Only {calibration.images} held-out normal images: the finest false-positive rate they can state is "
        f"1/{calibration.images + 1}, coarser than the fpr={calibration.fpr:g} asked for. "
        "The threshold is their largest score."
    ]


def _video_measures(scores: np.ndarray, videos: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """AUROC within each video, and over all of them after the papers' min-max of each, which reads whole videos."""
    stretched = score.normalize_groups(scores, videos)
    return {
        "image_auroc_video_protocol": metrics.image_metrics(stretched, labels)["auroc"],
        "image_auroc_per_video": {
            str(video): metrics.image_metrics(scores[videos == video], labels[videos == video])["auroc"]
            for video in np.unique(videos)
        },
    }


def _known(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _rates(scores: np.ndarray, threshold: float | None, labels: np.ndarray) -> dict[str, float | None]:
    def share(label):
        mine = scores[labels == label]
        return float(np.mean(mine > threshold)) if len(mine) and threshold is not None else None

    return {"test_fpr": share(0), "test_tpr": share(1)}


def _per_defect(rows: list[dict]) -> list[dict[str, Any]]:
    normal = [row["score"] for row in rows if row["label"] == 0]
    table = []
    for defect in sorted({row["defect"] for row in rows if row["label"] == 1}):
        own = [row for row in rows if row["label"] == 1 and row["defect"] == defect]
        scores = [*normal, *(row["score"] for row in own)]
        labels = [0] * len(normal) + [1] * len(own)
        flags = [row["predicted"] for row in own]
        table.append(
            {
                "defect": defect,
                "images": len(own),
                "image_auroc": metrics.image_metrics(np.asarray(scores), np.asarray(labels))["auroc"],
                "detected": None if None in flags else sum(flags),
            }
        )
    return table


def _pictures(detector: Detector, source: Source, rows: list[dict], has_mask: np.ndarray) -> list:
    """The telling samples with their maps; only theirs are kept."""
    from jaxad.report import Picture, choose

    chosen = np.asarray(sorted({row for kind in choose(rows).values() for row in kind}), np.int32)
    part = select(source, chosen)
    scores = score.score_dataset(detector.method, detector.state, part, batch_size=batch_size_for(detector.spec))
    frames = chosen if source.start is None else np.asarray(source.start)[chosen] + source.target
    return [
        Picture(
            file=rows[row]["file"],
            defect=rows[row]["defect"],
            label=rows[row]["label"],
            score=rows[row]["score"],
            normalised=_known(rows[row]["score_normalised"], float("nan")),
            predicted=_known(rows[row]["predicted"], -1),
            image=np.asarray(source.image[frame]),
            mask=np.asarray(source.mask[frame]) if source.mask is not None and has_mask[row] else None,
            map=scores.map[position],
        )
        for position, (row, frame) in enumerate(zip(chosen, frames, strict=True))
    ]


def _count(state: Any) -> int:
    """Numbers that the detector learned: its parameters where it has some, else its whole state."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(getattr(state, "params", state)))


def sample_labels(source: Source) -> np.ndarray:
    """(N,) labels of the samples of a source on the host."""
    labels = np.asarray(source.label)
    return labels if source.start is None else labels[np.asarray(source.start) + source.target]


def sample_masks(source: Source) -> np.ndarray:
    """(N, H, W) masks of the samples of a source on the host; it must have some."""
    masks = np.asarray(source.mask)
    return masks if source.start is None else masks[np.asarray(source.start) + source.target]
