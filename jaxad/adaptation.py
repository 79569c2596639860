"""Scoring samples in their order, with a detector that may adapt in between: video protocols.

Nothing here knows a method: one that cares for order gives `Method.ordered`. What it is told of the test set is the
frames themselves, in order; labels are read only to measure.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import metrics
from jaxad.core import Array, Method, Source, take
from jaxad.score import normalize_groups


class Ordered(NamedTuple):
    """What an ordered pass over N samples gives."""

    state: Any  # the detector as the last sample left it
    image: np.ndarray  # (N,) image scores, each from the detector as it was when its turn came
    parts: dict[str, np.ndarray]  # (N,) what the method makes its scores of
    seconds: float  # compiled
    compile_seconds: float


def score_ordered(method: Method, state: Any, source: Source, *, batch_size: int | None = None) -> Ordered:
    """Scores a source in order, adapting as the method's config says.

    Args:
      method: one with `ordered`.
      state: the detector.
      source: N samples on the device.
      batch_size: samples to a program; it changes the speed, not the result. None: on CPU, where convolutions inside a
        scan are slow, the fewest that the method allows; elsewhere about 32.

    Raises:
      ValueError: the method does not care for order.
    """
    if method.ordered is None:
        raise ValueError(
            f"method {method.name!r} scores each sample by itself; expected one that adapts. Use score.score_dataset."
        )
    size, count = len(source), samples_at_once(method, state.cfg, len(source), batch_size)

    def run(state, source, rows):
        return score_next(method, state, source, rows)

    began = time.perf_counter()
    compiled = jax.jit(run).lower(state, source, jnp.zeros(count, jnp.int32)).compile()
    compiling, began, pieces = time.perf_counter() - began, time.perf_counter(), []
    for first in range(0, size, count):
        state, *found = compiled(state, source, jnp.arange(first, first + count, dtype=jnp.int32))
        pieces.append(jax.device_get(found))
    image, parts = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *pieces)
    return Ordered(state, image, parts, time.perf_counter() - began, compiling)


def samples_at_once(method: Method, cfg: Any, size: int, batch_size: int | None = None) -> int:
    """How many of `size` samples in order one program scores; `batch_size` as for `score_ordered`."""
    assert method.ordered is not None
    unit, wanted = method.ordered.unit(cfg), batch_size or (1 if jax.default_backend() == "cpu" else 32)
    return unit * max(1, min(wanted, size) // unit)


def score_next(method: Method, state: Any, source: Source, rows: Array) -> tuple[Any, Array, dict[str, Array]]:
    """Scores the samples whose turn it is: the program that runs for every piece of an ordered pass.

    Args:
      method, state, source: as for `score_ordered`.
      rows: (B,) in order; B a multiple of what the method takes at once. Rows beyond the source adapt nothing.

    Returns:
      (the state after them, (B,) image scores, what the method makes them of, (B,) each).
    """
    assert method.ordered is not None
    size = len(source) if source.size is None else source.size
    images = take(source, jnp.minimum(rows, size - 1))[0]
    state, scores, parts = method.ordered.step(state, images, rows < size)
    return state, scores.image, parts


def protocol_scores(method: Method, cfg: Any, parts: dict[str, np.ndarray], groups: np.ndarray) -> np.ndarray:
    """The image scores of video papers: every part stretched to [0, 1] within its video, then combined.

    Args:
      method: one with `ordered`.
      cfg: its config.
      parts: (N,) each, as `score_ordered` gives them.
      groups: (N,) video of each sample.

    Returns:
      (N,). They read whole videos, so they are no online scores, and a video without anomalies has its 1 too.
    """
    assert method.ordered is not None
    return np.asarray(method.ordered.combine(cfg, {k: normalize_groups(v, groups) for k, v in parts.items()}))


def measure_ordered(
    method: Method, state: Any, source: Source, groups: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Measures of an ordered pass: AUROC of the online score and of the video protocol's, and what the pass cost.

    Args:
      method, state, source: as for `score_ordered`.
      groups: (N,) video of each sample.
      labels: (N,) 0 normal, 1 anomalous, -1 unknown.
    """
    found = score_ordered(method, state, source)
    return {
        **ordered_figures(method, jax.device_get(state.cfg), found.image, found.parts, groups=groups, labels=labels),
        "ordered_seconds": found.seconds,
        "ordered_images_per_second": len(source) / max(found.seconds, 1e-9),
    }


def ordered_figures(
    method: Method, cfg: Any, image: np.ndarray, parts: dict[str, np.ndarray], *, groups: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """The measures of samples scored in order, as in report.json.

    Args:
      method, cfg, parts, groups: as for `protocol_scores`.
      image: (N,) image scores, as `score_ordered` gives them.
      labels: (N,) 0 normal, 1 anomalous, -1 unknown.
    """
    stretched = protocol_scores(method, cfg, parts, groups)
    return {
        "ordered_auroc": metrics.image_metrics(image, labels)["auroc"],
        "ordered_auroc_video_protocol": metrics.image_metrics(stretched, labels)["auroc"],
    }
