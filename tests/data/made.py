"""Small made pictures and masks."""

import pathlib
import zlib

import numpy as np
from PIL import Image


def picture(path: pathlib.Path, *, size=(8, 6), seed=0, mode="RGB"):
    """Writes a random picture of (width, height); its array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    array = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    Image.fromarray(array).save(path)
    return array


def mask(path: pathlib.Path, *, size=(8, 6), box=(2, 1, 5, 4), value=255):
    """Writes a mask with a filled box (left, top, right, bottom); None: empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.zeros(size[::-1], np.uint8)
    if box is not None:
        array[box[1] : box[3], box[0] : box[2]] = value
    Image.fromarray(array).save(path)
    return array


def pictures(folder: pathlib.Path, count: int, *, first=0, ending="png", **options):
    for i in range(first, first + count):
        picture(folder / f"{i:03d}.{ending}", seed=seed_of(folder.name, i), **options)


def seed_of(folder: str, number: int) -> int:
    return zlib.crc32(folder.encode()) + number
