"""Prediction: picture files scored with a trained run, as CSV rows and heat maps."""

from __future__ import annotations

import contextlib
import csv
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxad.console import Console
from jaxad.measure import score_rows
from jaxad.runs import load_detector, read_config

_PREDICTED_AT_ONCE = 256  # pictures read before they are scored
PREDICTION_COLUMNS = ("file", "score", "score_normalised", "predicted")


def predict_run(
    run: str | os.PathLike,
    paths: Sequence[str | os.PathLike],
    *,
    out: str | os.PathLike | None = None,
    save_maps: str | os.PathLike | None = None,
    console: Console | None = None,
) -> None:
    """Scores picture files: CSV rows file, score, score_normalised, predicted, in the order given.

    Args:
      run: the run's folder.
      paths: files and folders.
      out: CSV file; None for standard output.
      save_maps: folder for heat maps laid over the pictures, on the scale of the calibration; in it the pictures keep
        their places below the folder that holds them all.
      console: where to show progress.

    Raises:
      DataError: a file that is missing, damaged or no picture; rows of the pictures before it are written.
      ValueError: no paths, or a detector of clips.
    """
    from jaxad.data import pictures

    detector = load_detector(run)
    chosen, _ = read_config(pathlib.Path(run))
    if len(detector.spec.image) == 4:
        raise ValueError(
            f"{run} scores clips of {detector.spec.image[0]} frames, not pictures; expected a detector of pictures. "
            f"Score videos with: jaxad eval {run} --data FOLDER"
        )
    if not paths:
        raise ValueError("no pictures given; expected files, folders, or - and a list on standard input.")
    names = pictures.find(paths)
    places = _places(names)
    height, width, channels = detector.spec.image
    with contextlib.ExitStack() as stack:
        file = sys.stdout if out is None else stack.enter_context(open(out, "w", encoding="utf-8", newline=""))
        writer = csv.DictWriter(file, PREDICTION_COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for first in range(0, len(names), _PREDICTED_AT_ONCE):
            part = names[first : first + _PREDICTED_AT_ONCE]
            images = pictures.read(part, image_size=(height, width), channels=channels)
            scores = detector.score(images)
            writer.writerows(score_rows(scores.image, part, detector.calibration))
            file.flush()
            if save_maps is not None:
                where = [pathlib.Path(save_maps) / place for place in places[first : first + _PREDICTED_AT_ONCE]]
                _save_maps(where, part, scores.map, detector.calibration)
            if console:
                console.progress("predict", first + len(part), len(names))


def _places(names: Sequence[str]) -> list[str]:
    """Where each picture's map goes: its path below the nearest folder of all, so that no two share one."""
    paths = [os.path.abspath(name) for name in names]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, root).removesuffix(".png") + ".png" for path in paths]


def _save_maps(where: Sequence[pathlib.Path], names: Sequence[str], maps: np.ndarray, calibration: Any) -> None:
    """Heat maps laid over the pictures at their own size, on one scale for all."""
    from jaxad.data import pictures
    from jaxad.report import save_map

    low, high = float(maps.min()), float(maps.max())
    if calibration is not None:  # so that maps of different calls compare
        low, span = calibration.pixel_median, calibration.pixel_threshold - calibration.pixel_median
        high = low + 3 * span
    for path, name, values in zip(where, names, maps, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_map(path, values, low=low, high=high, image=pictures.read_full(name))
