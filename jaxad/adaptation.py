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
from jaxad.core import Method, Source, take
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
    step, size, unit = method.ordered.step, len(source), method.ordered.unit(state.cfg)
    wanted = batch_size or (1 if jax.default_backend() == "cpu" else 32)
    count = unit * max(1, min(wanted, size) // unit)

    def run(state, source, rows):
        images = take(source, jnp.minimum(rows, size - 1))[0]
        state, scores, parts = step(state, images, rows < size)
        return state, scores.image, parts

    began = time.perf_counter()
    compiled = jax.jit(run).lower(state, source, jnp.zeros(count, jnp.int32)).compile()
    compiling, began, pieces = time.perf_counter() - began, time.perf_counter(), []
    for first in range(0, size, count):
        state, *found = compiled(state, source, jnp.arange(first, first + count, dtype=jnp.int32))
        pieces.append(jax.device_get(found))
    image, parts = jax.tree.map(lambda *leaves: np.concatenate(leaves)[:size], *pieces)
    return Ordered(state, image, parts, time.perf_counter() - began, compiling)


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
    stretched = protocol_scores(method, jax.device_get(state.cfg), found.parts, groups)
    return {
        "ordered_auroc": metrics.image_metrics(found.image, labels)["auroc"],
        "ordered_auroc_video_protocol": metrics.image_metrics(stretched, labels)["auroc"],
        "ordered_seconds": found.seconds,
        "ordered_images_per_second": len(source) / max(found.seconds, 1e-9),
    }
