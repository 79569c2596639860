"""From a path or a name to a Dataset."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxad.data import files, layouts, manifest
from jaxad.data.build import Settings, build
from jaxad.data.dataset import DataError, Dataset
from jaxad.data.labels import move_labelled
from jaxad.data.records import Plan


def load(
    where: str | os.PathLike | np.ndarray | Mapping[str, Any],
    *,
    image_size: int | tuple[int, int] = 256,
    layout: str | None = None,
    channels: int = 3,
    normal_class: int | str | None = None,
    holdout: float = 0.1,
    clip: int | None = None,
    clip_stride: int = 1,
    target: int = 0,
    labels_per_type: int = 0,
    labels_total: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Loads a data set as uint8 arrays ready for the device.

    Args:
      where: a folder, ZIP or table; "synthetic" or "synthetic:FAMILY"; "tfds:NAME[/config]"; an array of normal
        pictures, or the arguments of `from_arrays` as a mapping.
      image_size: pixels a side, or (height, width); pictures are resized to it, antialiased, masks by nearest pixel.
      layout: how the pictures are arranged, one of `LAYOUTS`; None finds out.
      channels: 1 or 3; grey pictures are repeated, colour ones turned grey.
      normal_class: the class that is normal, by name or number, for sets of classes.
      holdout: fraction of the normal training samples kept apart for calibration and thresholds (of videos, whole
        ones); 0 for none. Where the layout has such a part, that is taken.
      clip: frames a sample, for videos; None makes each frame a sample.
      clip_stride: frames between the starts of neighbouring clips.
      target: the frame of a clip, from 0, whose label and mask are the clip's.
      labels_per_type: anomalous test pictures of each type of defect that go to the source "labelled" with their masks,
        and are no more tested on (see `jaxad.data.labels`).
      labels_total: at most so many in all.
      seed: of what is chosen by chance: the holdout, labelled pictures, and a test part where the layout has none.

    Returns:
      A Dataset with NumPy arrays inside; `to_device()` puts them on the device.

    Raises:
      DataError: the data cannot be used as it is; the message names the first file at fault.
      ValueError: an option is out of its range.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    settings = Settings((height, width), channels, holdout, clip, clip_stride, target, seed)
    found = _load(where, settings, layout, normal_class)
    return move_labelled(found, per_type=labels_per_type, total=labels_total, seed=seed)


def _load(where: Any, settings: Settings, layout: str | None, normal_class: int | str | None) -> Dataset:
    (height, width), channels, holdout, seed = settings.size, settings.channels, settings.holdout, settings.seed
    clip, image_size = settings.clip, settings.size
    made_here = isinstance(where, np.ndarray | Mapping) or _is_synthetic(where)
    if made_here and clip is not None:
        raise DataError(f"clip={clip}, but this data has no videos to cut clips from. Leave out clip.")
    if isinstance(where, np.ndarray | Mapping):
        from jaxad.data.arrays import from_arrays

        parts: dict[str, Any] = dict(where) if isinstance(where, Mapping) else {"train": where}
        parts = {"holdout": holdout, **parts}  # its own holdout pictures win over a share
        return from_arrays(**parts, image_size=(height, width), channels=channels, seed=seed)
    if _is_synthetic(where):
        from jaxad.data import synthetic

        family = str(where).partition(":")[2] or None
        return synthetic.load(family, image_size=image_size, channels=channels, seed=seed, holdout=holdout)
    made = plan(where, layout=layout, normal_class=normal_class)
    if str(where).startswith("tfds:"):
        return build(made, settings, name=str(where)[5:])
    path = pathlib.Path(where).resolve()
    name = path.parent.name if files.suffix(path.name) in manifest.TABLES else path.name
    return build(made, settings, name=name)


def plan(where: str | os.PathLike, *, layout: str | None = None, normal_class: int | str | None = None) -> Plan:
    """Opens a folder, ZIP, table or "tfds:NAME" and says which picture plays which role, without reading any."""
    if _is_synthetic(where):
        raise DataError(f"{where}: drawn from a seed; there are no files to check or to stream. Pass it to load.")
    if str(where).startswith("tfds:"):
        from jaxad.data import tfds

        return tfds.plan(str(where)[5:], normal_class)
    path = pathlib.Path(where)
    store = _open(path)
    if files.suffix(path.name) in manifest.TABLES and layout in (None, "manifest"):
        return manifest.plan_table(store, path.name)
    try:
        name, view = layouts.recognise(store, layout)
        return layouts.LAYOUTS[name].plan(view, normal_class)
    except DataError:
        if store.problems:  # what could not be read may be why the rest makes no sense
            raise DataError(store.problems[0]) from None
        raise


def _is_synthetic(where: Any) -> bool:
    return str(where).partition(":")[0] == "synthetic"


def _open(path: pathlib.Path) -> Any:
    """The store at a path."""
    if not os.path.lexists(path):
        raise DataError(f"{path}: no such file or folder. Check the path, or pass 'synthetic'.")
    if path.is_dir():
        visa = path.parent / "split_csv"
        if (path / "Data").is_dir() and visa.is_dir():  # one object of VisA: its table lies beside its folder
            return files.Folder(path.parent, only=(path.name, "split_csv"))
        inside = files.Folder(path)
        zips = [name for name in inside.names if files.suffix(name) == ".zip"]
        if len(zips) == 1 and not any(map(files.is_picture, inside.names)):
            return files.Zip(path / zips[0])
        return inside
    if files.suffix(path.name) == ".zip":
        return files.Zip(path)
    if files.suffix(path.name) in manifest.TABLES:
        return files.Folder(path.parent, only=(path.name,))
    raise DataError(
        f"{path}: a single file; expected a folder, a .zip or a table ({', '.join(sorted(manifest.TABLES))})."
    )
