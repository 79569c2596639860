"""Pictures given one by one, as for prediction: no roles, no labels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import numpy as np

from jaxad.data import decode, files
from jaxad.data.dataset import DataError


def find(paths: Iterable[str | os.PathLike]) -> list[str]:
    """The pictures at some paths: files as they are, folders with all pictures below them.

    Raises:
      DataError: a path does not exist or cannot be read, or a folder holds no picture.
    """
    found: list[str] = []
    for path in (os.fspath(path) for path in paths):
        if not os.path.isdir(path):
            found.append(path)
            continue
        store = files.Folder(path)
        if store.problems:
            raise DataError(store.problems[0])
        below = [os.path.join(path, name) for name in store.names if files.is_picture(name)]
        if not below:
            raise DataError(f"{path}: no pictures in this folder. Give a folder with pictures, or files.")
        found += below
    return found


def read(paths: Sequence[str], *, image_size: int | tuple[int, int], channels: int = 3) -> np.ndarray:
    """Reads picture files of any size.

    Args:
      paths: N files.
      image_size: pixels a side, or (height, width), to resize to.
      channels: 1 or 3.

    Returns:
      (N, H, W, C) uint8.

    Raises:
      DataError: naming the first file that is missing, damaged or no picture.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    store = files.Loose()
    found = decode.in_threads(lambda path: decode.picture(store, path, size, channels)[0], list(paths))
    return np.stack(list(found)) if paths else np.zeros((0, *size, channels), np.uint8)


def read_full(path: str) -> np.ndarray:
    """Reads one picture at its own size: (H, W, 3) uint8. Raises DataError if it is missing, damaged or no picture."""
    image, _ = decode.full_picture(files.Loose(), path)
    return np.asarray(image.convert("RGB"))
