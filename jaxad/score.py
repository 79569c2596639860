"""Scoring: a detector over a source, statistics of held-out normals, thresholds.

Nothing here knows a method: a method is its `score`. Thresholds come from normal pictures that training did not see;
the test set is read only to be scored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import metrics, shard
from jaxad.core import Array, Method, Scores, Source, take
from jaxad.ops.blocks import rows_over


class Calibration(NamedTuple):
    """What held-out normal images say about a detector's scores."""

    image_median: float
    threshold: float  # image scores above it are called anomalous
    pixel_median: float
    pixel_threshold: float  # the same for pixels of the map
    fpr: float  # the share of normals that `threshold` was asked to exceed
    images: int  # held-out normals


class Evaluation(NamedTuple):
    """A detector's scores of N samples, the metrics of its pixels, and what the pass cost."""

    image: np.ndarray  # (N,) image scores
    map_max: np.ndarray  # (N,) of the maps, whatever the method makes its image score from
    map_mean: np.ndarray  # (N,)
    pixels: metrics.Histogram | None
    seconds: float  # scoring alone, compiled
    compile_seconds: float


class _Piece(NamedTuple):
    rows: np.ndarray  # (b,) without padding
    scores: Scores  # (B, ...), padded
    valid: np.ndarray  # (B,)
    seconds: float
    compile_seconds: float  # > 0 for the first


def score_rows(method: Method, state: Any, source: Source, rows: Array) -> Scores:
    """Scores samples of a source, rows (B,) in [0, N): the program that runs for every batch."""
    return method.score(state, take(source, rows)[0])


def _pieces(method: Method, state: Any, source: Source, *, batch_size: int) -> Iterator[_Piece]:
    """Scores a source batch by batch; every batch has the same shape, the last is padded with its last row.

    A detector on a mesh scores with all its devices, a share of each batch on each.
    """
    size, mesh = len(source), shard.mesh_of(state)
    batch_size = max(1, min(batch_size, size))
    if mesh is not None:
        batch_size = -(-batch_size // mesh.shape["data"]) * mesh.shape["data"]
        source = shard.replicate(source, mesh)

    def run(state, source, rows):
        if mesh is not None:
            rows = jax.lax.with_sharding_constraint(rows, shard.split(mesh))
        with rows_over(1 if mesh is None else mesh.shape["data"]):
            return score_rows(method, state, source, rows)

    rows_at = [np.arange(first, first + batch_size, dtype=np.int32) for first in range(0, size, batch_size)]
    began = time.perf_counter()
    whole = None if mesh is None else shard.replicated(mesh)
    compiled = jax.jit(run, out_shardings=whole).lower(state, source, rows_at[0]).compile()
    compiling = time.perf_counter() - began
    for rows in rows_at:
        began = time.perf_counter()
        scores = jax.block_until_ready(compiled(state, source, np.minimum(rows, size - 1)))
        seconds = time.perf_counter() - began
        valid = rows < size
        yield _Piece(rows[valid], scores if mesh is None else shard.local(scores), valid, seconds, compiling)
        compiling = 0.0


def score_dataset(method: Method, state: Any, source: Source, *, batch_size: int = 32) -> Scores:
    """Scores every sample of a source.

    Args:
      method: the method that made `state`.
      state: the detector.
      source: N samples on the device.
      batch_size: samples scored at a time; the result does not depend on it.

    Returns:
      Scores of NumPy arrays on the host: image (N,), map (N, H, W).
    """
    pieces = [
        jax.tree.map(lambda leaf, p=piece: np.asarray(leaf)[p.valid], piece.scores)
        for piece in _pieces(method, state, source, batch_size=batch_size)
    ]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)


def evaluate(
    method: Method,
    state: Any,
    source: Source,
    *,
    region_weights: np.ndarray | None = None,
    has_mask: np.ndarray | None = None,
    centre: float = 0.0,
    batch_size: int = 32,
) -> Evaluation:
    """Scores a source without keeping its maps: pixels go into a histogram of fixed size.

    Args:
      method, state, source, batch_size: as for `score_dataset`.
      region_weights: (N, H, W) from `metrics.label_regions`; None leaves pixels out.
      has_mask: (N,) bool, samples whose mask may be trusted; the others are left out of pixel metrics.
      centre: where the histogram resolves scores best: a typical score of normal pixels.
    """
    image, tops, means, seconds, compiling = [], [], [], 0.0, 0.0
    pixels = None if region_weights is None else metrics.empty_histogram(centre=centre)
    fold = jax.jit(metrics.add, donate_argnums=0)
    for piece in _pieces(method, state, source, batch_size=batch_size):
        seconds, compiling = seconds + piece.seconds, compiling + piece.compile_seconds
        image.append(np.asarray(piece.scores.image)[piece.valid])
        tops.append(np.asarray(piece.scores.map.max(axis=(1, 2)))[piece.valid])
        means.append(np.asarray(piece.scores.map.mean(axis=(1, 2)))[piece.valid])
        if pixels is not None and region_weights is not None:
            rows = np.resize(piece.rows, piece.valid.shape)  # padding repeats rows; `valid` leaves it out
            trusted = piece.valid if has_mask is None else piece.valid & has_mask[rows]
            weights = region_weights[rows]
            pixels = fold(pixels, piece.scores.map, weights > 0, weights, trusted)
    return Evaluation(np.concatenate(image), np.concatenate(tops), np.concatenate(means), pixels, seconds, compiling)


def stream(method: Method, state: Any, source: Source) -> tuple[Any, Scores]:
    """Scores samples one at a time in order, adapting the detector after each with `method.adapt`.

    Returns:
      (the adapted state, Scores of NumPy arrays as from `score_dataset`).
    """

    @jax.jit
    def run(state, source, row):
        images = take(source, row[None])[0]
        scores = method.score(state, images)
        return method.adapt(state, images, scores), scores

    pieces = []
    for row in range(len(source)):
        state, scores = run(state, source, jnp.int32(row))
        pieces.append(jax.tree.map(np.asarray, scores))
    return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *pieces)


# --- calibration --------------------------------------------------------------------------------------------------


def quantile_threshold(normal_scores: np.ndarray, *, fpr: float) -> float:
    """The least score that a new normal exceeds with probability at most `fpr`, given n exchangeable held-out normals.

    That is the k-th smallest with k = ceil((n + 1)(1 - fpr)). Where n < 1/fpr - 1 no such score exists and the largest
    is returned; it states a rate of 1/(n + 1).
    """
    ordered = np.sort(np.asarray(normal_scores, np.float64).ravel())
    return float(ordered[quantile_place(ordered.size, fpr=fpr)])


def quantile_place(count: int, *, fpr: float) -> int:
    """Where the `quantile_threshold` of `count` scores stands among them in ascending order, from 0."""
    rank = math.ceil((count + 1) * (1 - fpr) - 1e-9)
    return min(max(rank, 1), count) - 1


def calibrate(method: Method, state: Any, holdout: Source, *, fpr: float = 0.01, batch_size: int = 32) -> Calibration:
    """Statistics of held-out normal samples, for thresholds and normalised scores.

    Args:
      method, state: the detector.
      holdout: normal samples that training did not see.
      fpr: the share of normal samples that may be called anomalous, in (0, 1).
      batch_size: samples scored at a time.

    Raises:
      ValueError: an empty holdout, one with anomalous samples, or `fpr` outside (0, 1).
    """
    if not 0 < fpr < 1:
        raise ValueError(f"fpr={fpr}; expected a rate between 0 and 1, such as 0.01.")
    labels = np.asarray(holdout.label)
    if not len(holdout) or (labels == 1).any():
        raise ValueError(
            f"holdout has {len(holdout)} samples, {(labels == 1).sum()} of them anomalous; expected normals only. "
            "Load the data with holdout=0.1, or pass normal images that training did not see."
        )
    scores = score_dataset(method, state, holdout, batch_size=batch_size)
    return Calibration(
        image_median=float(np.median(scores.image)),
        threshold=quantile_threshold(scores.image, fpr=fpr),
        pixel_median=float(np.median(scores.map)),
        pixel_threshold=quantile_threshold(scores.map, fpr=fpr),
        fpr=fpr,
        images=len(holdout),
    )


def normalize(scores: Scores, calibration: Calibration) -> Scores:
    """Scores on a common scale: 0 is the median of held-out normals, 1 the threshold. Order is kept, raw scores too."""

    def to_unit(values, median, threshold):
        return (values - median) / max(threshold - median, np.finfo(np.float32).tiny)

    return Scores(
        image=to_unit(scores.image, calibration.image_median, calibration.threshold),
        map=to_unit(scores.map, calibration.pixel_median, calibration.pixel_threshold),
    )


def normalize_groups(scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Min-max within each group, the protocol of video papers: it reads the whole video, so it is no online score.

    Args:
      scores: (N,) raw scores.
      groups: (N,) video of each.

    Returns:
      (N,) in [0, 1]; 0 throughout a group of equal scores.
    """
    result = np.zeros_like(scores)
    for group in np.unique(groups):
        rows = groups == group
        low, high = scores[rows].min(), scores[rows].max()
        result[rows] = (scores[rows] - low) / (high - low) if high > low else 0
    return result
