"""One member of a sweep, whole: trained, calibrated, scored and measured, as pure functions.

`whole_run` is one function of a key, a config and data on the device: vmap it, shard it, compile it for a device that
is not here. `run_pieces` computes the same from the same parts in programs that a sweep can show, and stop, in between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad import adaptation, metrics, train
from jaxad.core import Array, Batch, Method, Scores, Source, frames_of, take
from jaxad.members import Programs, axes_of, one_of
from jaxad.ops.blocks import rows_over


class Truth(NamedTuple):
    """Which pixels of a source's stored pictures are anomalous."""

    weights: Array  # (F, H, W) float32 from `metrics.label_regions`
    trusted: Array  # (F,) bool: the picture's mask may be used


class InOrder(NamedTuple):
    """What an ordered pass over N samples gives: see `adaptation.Ordered`."""

    image: Array  # (N,) image scores
    parts: dict[str, Array]  # (N,) each


class Outcome(NamedTuple):
    """What is left of a member: its scores of the N test samples and figures; the detector itself is dropped."""

    image: Array  # (N,) image scores
    map_max: Array  # (N,) of the maps
    map_mean: Array  # (N,)
    pixel: dict[str, Array]  # of `metrics.pixel_metrics`; empty without masks
    calibration: dict[str, Array]  # medians and thresholds; empty without holdout
    last: dict[str, dict[str, Array]]  # per phase the metrics of its last step
    ordered: InOrder | None = None  # None unless asked for


class Ask(NamedTuple):
    """What a member is measured on and how."""

    truth: Truth | None  # of the pictures of data["test"]; None leaves pixels out
    places: Array | None  # (2,) int32, `score.quantile_place` of held-out images and of their pixels; None: no holdout
    in_order: bool = False  # whether to score the test samples in order, too, by `method.ordered`


def whole_run(
    key: Array,
    cfg: Any,
    data: Mapping[str, Source],
    ask: Ask,
    *,
    method: Method,
    batch_size: int = 32,
    place: Callable = train.unplaced,
) -> Outcome:
    """Trains, calibrates, scores and measures one member.

    Args:
      key: of the run.
      cfg: the method's config; leaves may be traced.
      data: "test" and, for calibration, "holdout"; the other sources are for training.
      ask: what to measure.
      method: what to train.
      batch_size: samples scored at a time; the result does not depend on it.
      place: as for `train.fit`.
    """
    state, log = train.fit(method, key, cfg, _training(data), place=place)
    last = {phase: {name: values[-1] for name, values in metric.items()} for phase, metric in log.items()}
    calibration: dict[str, Array] = {}
    if ask.places is not None:
        held = data["holdout"]
        scores, valid = lax.map(
            lambda first: score_at(state, held, first, method=method, batch_size=batch_size, place=place),
            _firsts(held, batch_size),
        )
        calibration = calibrate(_joined(scores), valid.ravel(), ask.places)
    test = data["test"]
    pixels = new_histogram(calibration) if ask.truth is not None else None
    pixels, scored = lax.scan(
        lambda p, first: tally_at(state, test, ask.truth, p, first, method=method, batch_size=batch_size, place=place),
        pixels,
        _firsts(test, batch_size),
    )
    image, map_max, map_mean = (part.ravel()[: len(test)] for part in scored)
    pixel = {} if pixels is None else metrics.pixel_metrics(pixels)
    ordered = None
    if ask.in_order:
        count = adaptation.samples_at_once(method, cfg, len(test))
        _, pieces = lax.scan(
            lambda s, first: ordered_at(s, test, first, method=method, count=count), state, _firsts(test, count)
        )
        ordered = jax.tree.map(lambda part: part.ravel()[: len(test)], pieces)
    return Outcome(image, map_max, map_mean, pixel, calibration, last, ordered)


def run_pieces(
    keys: Array,
    cfg: Any,
    data: Mapping[str, Source],
    ask: Ask,
    *,
    method: Method,
    programs: Programs,
    batch_size: int = 32,
    mode: str | None = None,
    place: Callable = train.unplaced,
    show: Callable[[str, int, int, dict], None] = lambda name, step, steps, metrics: None,
) -> Outcome:
    """`whole_run` of K members in pieces.

    Args:
      keys, cfg, data: stacked for the members of `programs`, as for `train.drive`; placed where they belong.
      ask: `truth` shared, `places` (K, 2).
      method, batch_size, place: as for `whole_run`.
      programs: of the members; used again for further members of the same shapes.
      mode: see `train.drive`.
      show: called with (what is done, step, of how many, metrics of the last step) after each piece.

    Returns:
      Outcome with a leading axis K, on the host.
    """
    last: dict[str, dict[str, np.ndarray]] = {}
    run = train.drive(method, keys, cfg, _training(data), mode=mode, place=place, programs=programs)
    phases = method.phases(cfg)
    for progress in run:
        state = progress.state
        if progress.metrics:
            last[progress.name] = {name: values[-1] for name, values in progress.metrics.items()}
        if progress.name != "init":
            step = progress.position.step or progress.steps
            show(progress.name, step, progress.steps, last.get(progress.name, {}))
        if progress.position.step == 0 and progress.position.phase < len(phases):
            phase = phases[progress.position.phase]
            show(phase.name, 0, train.num_steps(phase, len(one_of(data[phase.source]))), {})
    calibration = {}
    if ask.places is not None:
        calibration = _calibrate(state, data["holdout"], ask, method, programs, batch_size, place)
    held = jax.device_get(calibration)  # before its median is given away as the centre of the histogram
    if "test" not in data:
        none = np.zeros((keys.shape[0], 0), np.float32)
        return Outcome(none, none, none, {}, held, last)
    test = data["test"]
    pixels = programs.each(new_histogram, calibration) if ask.truth is not None and calibration else None
    if ask.truth is not None and pixels is None:
        pixels = programs.each(lambda key: new_histogram({}), keys)
    scored, firsts = [], _firsts(one_of(test), batch_size)
    for done, first in enumerate(firsts):
        args = state, test, ask.truth, pixels, first
        pixels, parts = tally_program(programs, args, method=method, batch_size=batch_size, place=place)(*args)
        scored.append(jax.device_get(parts))
        show("score", done + 1, len(firsts), {})
    size = len(one_of(test))
    image, map_max, map_mean = (np.concatenate(part, axis=1)[:, :size] for part in zip(*scored, strict=True))
    pixel = {}
    if pixels is not None:
        pixel = programs.compile(("pixel",), metrics.pixel_metrics, (0,), (), pixels)(pixels)
    ordered = _in_order(state, cfg, test, method, programs, show) if ask.in_order else None
    return Outcome(image, map_max, map_mean, jax.device_get(pixel), held, last, ordered)


def tally_program(
    programs: Programs, args: tuple, *, method: Method, batch_size: int, place: Callable = train.unplaced
) -> Callable:
    """The program of `tally_at` for members; args may be shapes: state, source, truth, histogram, first sample."""
    return programs.compile(
        ("tally", batch_size),
        lambda s, d, t, p, f: tally_at(s, d, t, p, f, method=method, batch_size=batch_size, place=place),
        (0, axes_of(args[1]), None, 0, None),
        (3,),
        *args,
    )


def holdout_program(
    programs: Programs, args: tuple, *, method: Method, batch_size: int, place: Callable
) -> jax.stages.Compiled:
    """The program of `score_at` for members; args may be shapes: state, source, first sample."""
    return programs.compile(
        ("holdout", batch_size),
        lambda s, d, f: score_at(s, d, f, method=method, batch_size=batch_size, place=place),
        (0, axes_of(args[1]), None),
        (),
        *args,
    )


def ordered_program(programs: Programs, args: tuple, *, method: Method, count: int) -> Callable:
    """The program of `ordered_at` for members; args may be shapes: state, which is given away, source, first sample."""
    return programs.compile(
        ("ordered", count),
        lambda s, d, f: ordered_at(s, d, f, method=method, count=count),
        (0, axes_of(args[1]), None),
        (0,),
        *args,
    )


def _in_order(state, cfg, test, method, programs, show) -> InOrder:
    """An ordered pass of K members, (K, N) each, on the host."""
    size, pieces = len(one_of(test)), []
    count = adaptation.samples_at_once(method, cfg, size)
    firsts = _firsts(one_of(test), count)
    for done, first in enumerate(firsts):
        args = state, test, first
        state, found = ordered_program(programs, args, method=method, count=count)(*args)
        pieces.append(jax.device_get(found))
        show("score in order", done + 1, len(firsts), {})
    return jax.tree.map(lambda *parts: np.concatenate(parts, axis=1)[:, :size], *pieces)


def calibrate_program(programs: Programs, args: tuple) -> Callable:
    """The program of `calibrate` for members; args may be shapes: what `score_at` gave, a list, and `Ask.places`."""

    def join(pieces, places):
        scores, valid = jax.tree.map(lambda *parts: jnp.concatenate(parts), *pieces)
        return calibrate(scores, valid, places)

    return programs.compile(("calibrate",), join, (0, 0), (), *args)


def _calibrate(state, held, ask, method, programs, batch_size, place) -> dict[str, Array]:
    pieces = []
    for first in _firsts(one_of(held), batch_size):
        args = state, held, first
        pieces.append(holdout_program(programs, args, method=method, batch_size=batch_size, place=place)(*args))
    return calibrate_program(programs, (pieces, ask.places))(pieces, ask.places)


def score_at(
    state: Any, source: Source, first: Array, *, method: Method, batch_size: int, place: Callable = train.unplaced
) -> tuple[Scores, Array]:
    """Scores the samples from `first` on: (Scores of B samples, which of them exist, (B,) bool)."""
    batch = _batch_at(source, first, batch_size)
    return _scores(method, state, batch, place), batch.valid


def tally_at(
    state: Any,
    source: Source,
    truth: Truth | None,
    pixels: metrics.Histogram | None,
    first: Array,
    *,
    method: Method,
    batch_size: int,
    place: Callable = train.unplaced,
) -> tuple[metrics.Histogram | None, tuple[Array, Array, Array]]:
    """Scores and measures the samples from `first` on.

    Returns:
      (the histogram with their pixels, (image scores, maxima and means of the maps), (B,) each). Rows beyond the
      source repeat its last one; their pixels are not counted.
    """
    batch = _batch_at(source, first, batch_size)
    scores = _scores(method, state, batch, place)
    if truth is not None and pixels is not None:
        frames = frames_of(source, batch.index)
        weights = truth.weights[frames]
        pixels = metrics.add(pixels, scores.map, weights > 0, weights, batch.valid & truth.trusted[frames])
    return pixels, (scores.image, scores.map.max(axis=(1, 2)), scores.map.mean(axis=(1, 2)))


def ordered_at(state: Any, source: Source, first: Array, *, method: Method, count: int) -> tuple[Any, InOrder]:
    """Scores the `count` samples from `first` on in order: (the state that adapted to them, their scores)."""
    # Not split over devices: each sample waits for what the one before did to the state.
    state, *found = adaptation.score_next(method, state, source, first + jnp.arange(count, dtype=jnp.int32))
    return state, InOrder(*found)


def new_histogram(calibration: Mapping[str, Array]) -> metrics.Histogram:
    """A histogram of nothing, finest around the median of held-out pixels."""
    return metrics.empty_histogram(centre=calibration.get("pixel_median", 0.0))


def calibrate(scores: Scores, valid: Array, places: Array) -> dict[str, Array]:
    """The figures of `score.calibrate` as a pure function.

    Args:
      scores: of held-out normals, padding among them: (n,), (n, H, W).
      valid: (n,) bool, False on padding.
      places: (2,) int32, see `Ask`.
    """
    known = jnp.broadcast_to(valid[:, None, None], scores.map.shape)
    image_median, threshold = _order(scores.image, valid, places[0])
    pixel_median, pixel_threshold = _order(scores.map.ravel(), known.ravel(), places[1])
    return {
        "image_median": image_median,
        "threshold": threshold,
        "pixel_median": pixel_median,
        "pixel_threshold": pixel_threshold,
    }


def _order(values: Array, valid: Array, place: Array) -> tuple[Array, Array]:
    """(median, the value at a place) of the valid values; the median of values with a NaN is NaN."""
    ordered, count = jnp.sort(jnp.where(valid, values, jnp.nan)), valid.sum()  # NaN sorts to the end
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return jnp.where(jnp.isnan(ordered[count - 1]), jnp.nan, median), ordered[place]


def _batch_at(source: Source, first: Array, batch_size: int) -> Batch:
    """The samples from `first` on; rows beyond the source repeat its last one, `index` too."""
    size = len(source) if source.size is None else source.size
    rows = first + jnp.arange(batch_size, dtype=jnp.int32)
    index = jnp.minimum(rows, size - 1)
    return Batch(*take(source, index), index=index, valid=rows < size)


def _scores(method: Method, state: Any, batch: Batch, place: Callable) -> Scores:
    """Scores of a batch, which `place` splits over devices as it does in training."""
    with rows_over(getattr(place, "devices", 1)):
        return method.score(state, place(batch).image)


def _firsts(source: Source, batch_size: int) -> np.ndarray:
    return np.arange(0, len(source), batch_size, dtype=np.int32)


def _joined(scores: Scores) -> Scores:
    """Batches of scores, (batches, B, ...), as (batches * B, ...)."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), scores)


def _training(data: Mapping[str, Source]) -> dict[str, Source]:
    """All sources but the test set, which no training sees."""
    return {name: source for name, source in data.items() if name != "test"}
