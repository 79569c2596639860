"""Data sets from NumPy arrays in memory."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxad.data import files
from jaxad.data.build import Settings, build
from jaxad.data.dataset import DataError, Dataset
from jaxad.data.records import ROLES, Plan, Record


def from_arrays(
    train: Any,
    *,
    train_classes: Any = None,
    test: Any = None,
    test_label: Any = None,
    test_mask: Any = None,
    holdout: float | Any = 0.1,
    labelled: Any = None,
    labelled_mask: Any = None,
    aux: Any = None,
    names: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Makes a data set of arrays.

    Pictures are (N, H, W), (N, H, W, 1) or (N, H, W, 3); uint8 in [0, 255] or floats in [0, 1]. Masks are (N, H, W),
    anomalous where they are not 0.

    Args:
      train: pictures, normal ones only.
      train_classes: (N, H, W) whole numbers in [0, 255], which class each of their pixels is, for methods that learn
        from a segmentation of normal pictures; kept as the training source's masks.
      test: pictures to evaluate on.
      test_label: (N,) 0 normal, 1 anomalous, -1 unknown; by default 1 where the mask has a pixel, else unknown.
      test_mask: masks of the test pictures.
      holdout: fraction of `train` kept apart for thresholds, or other normal pictures for it.
      labelled: anomalous pictures that a method may learn from.
      labelled_mask: their masks.
      aux: pictures of anything, for methods that learn features first.
      names: of the test pictures, unique, for the tables of results.
      image_size: pixels to resize to; None: as they are.
      channels: 1 or 3; None: as in `train`.
      seed: of the choice of the holdout.

    Raises:
      DataError: an array has another shape, type or range, or the arrays do not fit each other.
    """
    share = holdout if isinstance(holdout, float | int) else 0.0
    parts = {"train": train, "holdout": None if isinstance(holdout, float | int) else holdout}
    parts |= {"test": test, "labelled": labelled, "aux": aux}
    pictures = {role: _pictures(role, value) for role, value in parts.items() if value is not None}
    masks = {"test": test_mask, "labelled": labelled_mask}
    shape = pictures["train"].shape
    if image_size is None and any(array.shape[1:3] != shape[1:3] for array in pictures.values()):
        sizes = {role: array.shape[1:3] for role, array in pictures.items()}
        raise DataError(f"the arrays differ in picture size: {sizes}; expected one. Pass image_size to resize them.")
    size = shape[1:3] if image_size is None else (image_size, image_size) if isinstance(image_size, int) else image_size
    stored: dict[str, np.ndarray] = {}
    plan = Plan("arrays", None, [])
    for role in (role for role in ROLES if role in pictures):
        found = _names(role, names if role == "test" else None, len(pictures[role]))
        stored.update(zip(found, pictures[role], strict=True))
        marked = _marked(role, masks.get(role), pictures[role].shape[:3])
        labels = _labels(role, test_label if role == "test" else None, marked, len(found))
        if marked is not None:
            stored.update((f"{name}#mask", mask) for name, mask in zip(found, marked, strict=True))
        for name, label in zip(found, labels, strict=True):
            defect = {0: "good", 1: "anomalous"}.get(label, "")
            plan.records.append(Record(name, role, label, defect, (f"{name}#mask",) if marked is not None else ()))
    digest = hashlib.sha256()
    for array in stored.values():
        digest.update(array.tobytes())
    plan.store = files.Arrays(stored, "arrays", digest.hexdigest())
    settings = Settings(tuple(size), channels or (shape[3] if len(shape) == 4 else 1), float(share), seed=seed)
    if train_classes is None:
        return build(plan, settings, name="arrays", cached=False)
    return _with_classes(build(plan, settings, name="arrays", cached=False), _classes(train_classes, shape[:3]))


def _classes(value: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != shape:
        raise DataError(
            f"train_classes has shape {array.shape}; expected {shape}, as the pictures. Pass one class map a picture."
        )
    if not np.issubdtype(array.dtype, np.integer) or array.min() < 0 or array.max() > 255:
        raise DataError(
            f"train_classes has {array.dtype} from {array.min()} to {array.max()}; expected whole numbers in [0, 255]. "
            "Pass array.astype(np.uint8), 255 where a pixel has no class."
        )
    return array.astype(np.uint8)


def _with_classes(data: Dataset, classes: np.ndarray) -> Dataset:
    """The data set with classes (N, H, W), of all pictures in the order given, as masks of the training source."""
    source = data.sources["train"]
    chosen = [int(name.rpartition("/")[2]) for name in data.rows["train"].files]
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)  # the nearest pixel
        for old, new in zip(classes.shape[1:], source.image.shape[1:3], strict=True)
    )
    mask = classes[chosen][:, rows[:, None], columns]
    fingerprint = hashlib.sha256(data.fingerprint.encode() + classes.tobytes()).hexdigest()
    sources = {**data.sources, "train": dataclasses.replace(source, mask=mask)}
    return dataclasses.replace(data, sources=sources, fingerprint=fingerprint)


def _pictures(role: str, value: Any) -> np.ndarray:
    """(N, H, W) or (N, H, W, 3) uint8."""
    array = np.asarray(value)
    shape = array.shape
    if array.ndim not in (3, 4) or 0 in shape or (array.ndim == 4 and shape[3] not in (1, 3)):
        hint = " Pass array[None] for one picture." if array.ndim == 2 else ""
        hint = (
            " Move the channels last: array.transpose(0, 2, 3, 1)." if array.ndim == 4 and shape[1] in (1, 3) else hint
        )
        raise DataError(f"{role} has shape {shape}; expected (N, H, W), (N, H, W, 1) or (N, H, W, 3) with N > 0.{hint}")
    if array.ndim == 4 and shape[3] == 1:
        array = array[..., 0]
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(
            f"{role} has type {array.dtype}; expected uint8, or floats in [0, 1]. Pass array.astype(np.uint8)."
        )
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(array).all() and low >= 0 and high <= 1):
        raise DataError(f"{role} has floats from {low:g} to {high:g}; expected [0, 1]. Pass (array / 255) or uint8.")
    return np.rint(array * 255).astype(np.uint8)


def _names(role: str, names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        return [f"{role}/{i:05d}" for i in range(count)]
    if len(names) != count or len(set(names)) != count:
        raise DataError(
            f"names has {len(names)} entries, {len(set(names))} different; expected {count}, one a test picture."
        )
    return list(names)


def _marked(role: str, mask: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    if mask is None:
        return None
    array = np.asarray(mask)
    array = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    if array.shape != shape:
        raise DataError(
            f"{role}_mask has shape {np.shape(mask)}; expected {shape}, as the pictures. Pass one mask a picture."
        )
    return (array != 0).astype(np.uint8)


def _labels(role: str, label: Any, marked: np.ndarray | None, count: int) -> list[int]:
    if label is not None:
        array = np.asarray(label)
        if array.shape != (count,) or not np.isin(array, (-1, 0, 1)).all():
            raise DataError(f"{role}_label has shape {array.shape}; expected ({count},) of 0, 1 and -1 (unknown).")
        return [int(value) for value in array]
    if role == "test":
        return [-1] * count if marked is None else marked.any(axis=(1, 2)).astype(int).tolist()
    return [1 if role == "labelled" else 0] * count
