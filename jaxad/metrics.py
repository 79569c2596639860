"""How well scores separate normal from anomalous: exact for images, streamed through histograms for pixels.

The pixels of a test set are too many to sort: sorting is some sixty times slower than counting on a CPU, and needs all
maps at once. So pixel scores are counted in bins that keep their order, in three histograms (normal pixels, anomalous
pixels, and anomalous pixels weighted by 1 / size of their region), and every measure is read from the cumulative sums.
Everything counted is an integer: adding batches in another order, merging shards or summing over devices gives the
same bits.

The measures: AUROC, average precision, F1-max (best F1 over all thresholds, and that threshold) and AUPRO (area under
the mean per-region overlap against the false positive rate, up to a rate of 0.3 and of 0.05, divided by that rate).
A pixel or picture is called anomalous where its score >= threshold. Without both classes all of them are NaN.

The bins are the leading bits of the score's distance from a `centre`, so their width is a fixed part of that distance:
1/512 at the default 18 bits. Scores that crowd far from zero (1000 +- 0.01) need a centre among them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.core import Array

AUPRO_LIMITS = {"aupro": 0.3, "aupro_005": 0.05}  # name -> largest false positive rate
MAX_REGIONS = 2**16 - 1  # more would overflow the region histogram
_REGION = 2**16  # whole units that one region's pixels share


class Histogram(NamedTuple):
    """Counts of pixel scores in 2^bits bins, ascending. Holds up to 2^32 - 1 pixels and `MAX_REGIONS` regions."""

    counts: Array  # (2, bins) uint32: normal pixels, anomalous pixels
    regions: Array  # (bins,) uint32: each region's pixels together add 65536
    undefined: Array  # () uint32: pixels scored NaN, which have no order; any makes every measure NaN
    centre: Array  # () float32, subtracted before binning


def empty_histogram(*, centre: Any = 0.0, bits: int = 18) -> Histogram:
    """A histogram of nothing, 12 * 2^bits bytes.

    Args:
      centre: where bins are finest; any value inside the bulk of the scores, such as their median on held-out normal
        images. 0 suits scores that are at least 0 and span orders of magnitude, as squared errors do.
      bits: 10 to 24; each more halves the width of the bins.
    """
    if not 10 <= bits <= 24:
        raise ValueError(f"bits={bits} is out of range; expected 10 to 24. Leave it at 18 unless memory is short.")
    return Histogram(
        counts=jnp.zeros((2, 1 << bits), jnp.uint32),
        regions=jnp.zeros(1 << bits, jnp.uint32),
        undefined=jnp.zeros((), jnp.uint32),
        centre=jnp.asarray(centre, jnp.float32),
    )


def add(histogram: Histogram, maps: Array, masks: Array, region_weights: Array, valid: Array) -> Histogram:
    """Counts the pixels of a batch.

    Infinite scores are counted at their end of the order. NaN has no place in it: such pixels are counted in
    `undefined`, and the measures of the whole histogram become NaN rather than better than they are.

    Args:
      maps: (B, H, W) float32 scores.
      masks: (B, H, W), above 0.5 on anomalous pixels.
      region_weights: (B, H, W) float32 from `label_regions`: 1 / size of its region on anomalous pixels.
      valid: (B,) bool; False rows (padding, unknown label, anomalous without a mask) are left out.
    """
    bins = histogram.regions.shape[0]
    scores = maps.astype(jnp.float32) - histogram.centre
    counted = jnp.broadcast_to(valid[:, None, None], maps.shape)
    undefined = counted & jnp.isnan(maps)
    rows = jnp.where(counted, _bin_of(scores, bins), 2 * bins)  # beyond the end: dropped
    anomalous = masks > 0.5
    # Whole units keep sums exact. The offset, spread evenly from pixel to pixel, keeps a large region's rounding from
    # adding up: without it the 20,000 pixels of one would all be rounded the same way.
    units = jnp.floor(region_weights * _REGION + _offsets(maps.shape[1:])).astype(jnp.uint32)
    counts = histogram.counts.ravel().at[rows + bins * anomalous].add(1, mode="drop")
    return histogram._replace(
        counts=counts.reshape(2, bins),
        regions=histogram.regions.at[rows].add(units, mode="drop"),
        undefined=histogram.undefined + undefined.sum(dtype=jnp.uint32),
    )


def merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of the pixels of both. Their centres must agree: if not, every measure is NaN."""
    summed = jax.tree.map(jnp.add, a, b)
    return summed._replace(centre=jnp.where(a.centre == b.centre, a.centre, jnp.nan))


def pixel_metrics(histogram: Histogram) -> dict[str, Array]:
    """Measures of a histogram: auroc, ap, f1max, f1max_threshold, aupro, aupro_005 as float32 scalars. Pure; vmaps."""
    negatives, positives = histogram.counts[:, ::-1]
    regions = histogram.regions[::-1]
    lower = _lower_edges(histogram.regions.shape[0])[::-1] + histogram.centre
    measures = _measures(jnp, _steps_of(jnp, lower, negatives, positives, regions))
    broken = (histogram.undefined > 0) | jnp.isnan(histogram.centre)
    return {name: jnp.where(broken, jnp.nan, value) for name, value in measures.items()}


def image_metrics(scores: Any, labels: Any) -> dict[str, float]:
    """Exact measures of image scores, on the host in float64.

    Args:
      scores: (N,) real. Infinite scores keep their order; any NaN makes every measure NaN.
      labels: (N,) int: 0 normal, 1 anomalous; rows with -1 (unknown) are left out.

    Returns:
      auroc, ap, f1max and f1max_threshold (a score); all NaN if only one class is left.
    """
    scores, labels = _check_pair(scores, labels)
    measures = _exact(scores, labels == 1, None)
    return {name: measures[name] for name in ("auroc", "ap", "f1max", "f1max_threshold")}


def exact_pixel_metrics(maps: Any, masks: Any, region_weights: Any) -> dict[str, float]:
    """What `pixel_metrics` measures, without bins: one sort of all pixels on the host, in float64.

    Some 60 bytes and 0.7 microseconds a pixel; for small sets, and for the figure that goes into a paper.

    Args:
      maps: (N, H, W) scores; any NaN makes every measure NaN.
      masks: (N, H, W), above 0.5 on anomalous pixels.
      region_weights: (N, H, W) from `label_regions`.
    """
    maps, masks, region_weights = (np.asarray(value) for value in (maps, masks, region_weights))
    if not maps.shape == masks.shape == region_weights.shape:
        raise ValueError(
            f"maps {maps.shape}, masks {masks.shape} and region_weights {region_weights.shape} differ in shape; "
            "expected one (N, H, W) for all. Score at the size of the masks; weights are label_regions(masks)."
        )
    return _exact(maps.ravel(), masks.ravel() > 0.5, region_weights.ravel().astype(np.float64))


def label_regions(masks: Any) -> np.ndarray:
    """Weights that make every connected region count the same. Host; once for each data set.

    Args:
      masks: (N, H, W), above 0.5 on anomalous pixels. Pixels that touch by a side or a corner belong together, as in
        the evaluation of MVTec AD.

    Returns:
      (N, H, W) float32: 1 / size of its region on anomalous pixels, else 0; sums to the number of regions.

    Raises:
      ValueError: masks have another rank, or there are more than `MAX_REGIONS` regions.
    """
    from scipy import ndimage

    masks = np.asarray(masks)
    if masks.ndim != 3:
        raise ValueError(f"masks have shape {masks.shape}; expected (N, H, W). Pass masks[None] for a single one.")
    weights, total = np.zeros(masks.shape, np.float32), 0
    for mask, weight in zip(masks, weights, strict=True):
        regions, count = ndimage.label(mask > 0.5, structure=np.ones((3, 3)))
        total += count
        if count:
            sizes = np.bincount(regions.ravel())
            weight[...] = np.append(0, 1 / sizes[1:]).astype(np.float32)[regions]
    if total > MAX_REGIONS:
        raise ValueError(
            f"the masks hold {total} connected regions; at most {MAX_REGIONS} can be counted. Speckled masks are the "
            "usual cause: clean them (scipy.ndimage.binary_opening), or evaluate the set in parts."
        )
    return weights


def curves(scores: Any, labels: Any, *, points: int = 200) -> dict[str, dict[str, list[float | None]]]:
    """ROC and precision-recall curves of image scores for a drawing, thinned evenly along the curve. Host.

    Args:
      scores: (N,), labels: (N,) as for `image_metrics`.
      points: at most so many for each curve, ends included; at least 3.

    Returns:
      {"roc": {"fpr", "tpr", "threshold"}, "pr": {"recall", "precision", "threshold"}}, lists from the highest threshold
      down; the ROC starts at (0, 0), whose threshold is None. Empty lists if a class is missing or a score is NaN.
    """
    scores, labels = _check_pair(scores, labels)
    positives = labels == 1
    if not 0 < positives.sum() < len(positives) or np.isnan(scores).any():
        return {"roc": {"fpr": [], "tpr": [], "threshold": []}, "pr": {"recall": [], "precision": [], "threshold": []}}
    steps = _sorted_steps(scores, positives, np.zeros(len(scores)))
    roc, pr = _thin(steps.fpr, steps.tpr, points - 1), _thin(steps.tpr, steps.precision, points)
    return {
        "roc": {
            "fpr": [0.0, *steps.fpr[roc].tolist()],
            "tpr": [0.0, *steps.tpr[roc].tolist()],
            "threshold": [None, *steps.threshold[roc].tolist()],
        },
        "pr": {
            "recall": steps.tpr[pr].tolist(),
            "precision": steps.precision[pr].tolist(),
            "threshold": steps.threshold[pr].tolist(),
        },
    }


class _Steps(NamedTuple):
    """What changes as the threshold falls through T scores or bins. Arrays (T,), descending; shares in [0, 1]."""

    threshold: Any
    dfpr: Any  # share of all normal pixels that this step newly calls anomalous
    dtpr: Any
    dpro: Any  # the same of the regions, each region counting as one
    fpr: Any  # including this step
    tpr: Any
    pro: Any
    precision: Any
    f1: Any
    one_class: Any  # bool: normal or anomalous are missing


def _steps_of(xp: Any, threshold: Any, negatives: Any, positives: Any, regions: Any) -> _Steps:
    """Cumulative shares from counts (T,), in NumPy or jax.numpy: exact and binned measures share their formulas."""
    fp, tp, overlap = (xp.cumsum(counts) for counts in (negatives, positives, regions))
    # Sums are whole numbers until here: a float32 running sum would lose single pixels beyond 2^24.
    kind = xp.float32 if xp is jnp else xp.float64
    negatives, positives, regions, fp, tp, overlap = (
        counts.astype(kind) for counts in (negatives, positives, regions, fp, tp, overlap)
    )
    num_normal, num_anomalous, num_regions = (xp.where(c[-1] > 0, c[-1], 1) for c in (fp, tp, overlap))
    return _Steps(
        threshold=threshold,
        dfpr=negatives / num_normal,
        dtpr=positives / num_anomalous,
        dpro=regions / num_regions,
        fpr=fp / num_normal,
        tpr=tp / num_anomalous,
        pro=xp.clip(overlap / num_regions, 0, 1),
        precision=tp / xp.where(tp + fp > 0, tp + fp, 1),
        f1=2 * tp / (tp[-1] + xp.where(tp + fp > 0, tp + fp, 1)),
        one_class=(fp[-1] == 0) | (tp[-1] == 0),
    )


def _measures(xp: Any, steps: _Steps) -> dict[str, Any]:
    best = xp.argmax(steps.f1)  # the first of equals: the highest threshold, never an empty bin
    measures = {
        "auroc": (steps.dfpr * (steps.tpr - steps.dtpr / 2)).sum(),
        "ap": (steps.dtpr * steps.precision).sum(),
        "f1max": steps.f1[best],
        "f1max_threshold": steps.threshold[best],
    }
    for name, limit in AUPRO_LIMITS.items():
        measures[name] = _area_below(xp, steps, limit) / limit
    return {name: xp.where(steps.one_class, xp.nan, value) for name, value in measures.items()}


def _area_below(xp: Any, steps: _Steps, limit: float) -> Any:
    """Area under the overlap curve for false positive rates up to `limit`; straight lines between thresholds."""
    start, low = steps.fpr - steps.dfpr, steps.pro - steps.dpro
    width = xp.clip(limit - start, 0, steps.dfpr)
    slope = steps.dpro / xp.where(steps.dfpr > 0, steps.dfpr, 1)
    return xp.clip((width * (low + slope * width / 2)).sum(), 0, limit)  # rounding may pass the ends by an ulp


def _exact(scores: np.ndarray, positives: np.ndarray, region_weights: np.ndarray | None) -> dict[str, float]:
    if np.isnan(scores).any() or not len(scores):
        return dict.fromkeys(("auroc", "ap", "f1max", "f1max_threshold", *AUPRO_LIMITS), float("nan"))
    weights = np.zeros(len(scores)) if region_weights is None else region_weights
    return {name: float(value) for name, value in _measures(np, _sorted_steps(scores, positives, weights)).items()}


def _sorted_steps(scores: np.ndarray, positives: np.ndarray, region_weights: np.ndarray) -> _Steps:
    """Steps of sorted scores, equal scores being one step."""
    order = np.argsort(-scores)
    scores, positives, region_weights = scores[order], positives[order], region_weights[order]
    first = np.flatnonzero(np.append(True, scores[1:] != scores[:-1]))
    sizes = np.diff(np.append(first, len(scores)))
    anomalous = np.add.reduceat(positives.astype(np.int64), first)
    regions = np.add.reduceat(region_weights, first)
    return _steps_of(np, scores[first], sizes - anomalous, anomalous, regions)


def _check_pair(scores: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(
            f"scores {scores.shape} and labels {labels.shape} do not fit; expected one score and one label for each "
            "image, both (N,). Pass Scores.image of the whole test set and its labels in the same order."
        )
    known = labels >= 0
    return scores[known].astype(np.float64), labels[known]


def _thin(x: np.ndarray, y: np.ndarray, points: int) -> np.ndarray:
    """Rows to keep of a curve: all, or at most `points`, evenly spaced along it, ends included."""
    if len(x) <= points:
        return np.arange(len(x))
    along = np.append(0, np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y))))
    return np.unique(np.append(np.searchsorted(along, np.linspace(0, along[-1], points)[:-1]), len(x) - 1))


def _bin_of(scores: Array, bins: int) -> Array:
    """Bin of each score: the leading bits of an integer that has the order of the floats. int32 in [0, bins)."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)  # -0 is 0: equal scores tie
    ordered = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    return (ordered >> _dropped_bits(bins)).astype(jnp.int32)


def _lower_edges(bins: int) -> Array:
    """(bins,) float32: the smallest score that falls in each bin."""
    ordered = jnp.arange(bins, dtype=jnp.uint32) << _dropped_bits(bins)
    bits = jnp.where(ordered >> 31 == 1, ordered & jnp.uint32((1 << 31) - 1), ~ordered)
    edges = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return jnp.where(jnp.isnan(edges), jnp.where(ordered >> 31 == 1, jnp.inf, -jnp.inf), edges)


def _dropped_bits(bins: int) -> int:
    return 32 - (bins.bit_length() - 1)


def _offsets(shape: tuple[int, ...]) -> Array:
    """(H, W) float32 in [0, 1): an even sequence, so that any run of pixels has nearly the mean 1/2."""
    pixels = jnp.arange(shape[0] * shape[1], dtype=jnp.uint32)
    golden = jnp.uint32(2654435769)  # 2^32 / golden ratio: its multiples modulo 2^32 spread evenly
    return ((pixels * golden) >> 8).astype(jnp.float32).reshape(shape) / 2**24
