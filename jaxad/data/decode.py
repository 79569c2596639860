"""Files to uint8 pictures and 0/1 masks of one size, by Pillow, on a pool of threads."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jaxad.data.dataset import DataError

VERSION = 1  # raise it when the same file begins to give other pixels: it is part of the cache's key
MAX_PIXELS = 100_000_000  # a picture of more is taken for a decompression bomb
_INDEX_MASK = 32  # a mask whose largest value is below it numbers its defects: any value but 0 is one


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a picture after reading it."""

    size: tuple[int, int]  # (height, width) as stored, after EXIF rotation
    mode: str  # Pillow's, as stored
    digest: str  # of the file's content
    remark: str = ""  # what was done to it that is worth a note


def open_picture(store, name: str):
    """Reads a picture or mask and turns it upright.

    Args:
      store: see `jaxad.data.files`.
      name: of a picture in it.

    Returns:
      A loaded PIL image and its Facts.

    Raises:
      DataError: the file is empty, damaged, too large or no picture.
    """
    from PIL import Image, ImageOps

    where, data = store.where(name), store.read(name)
    if isinstance(data, np.ndarray):
        image = Image.fromarray(data)
        return image, Facts(data.shape[:2], image.mode, hashlib.sha256(data.tobytes()).hexdigest())
    if not data:
        raise DataError(f"{where}: the file is empty (0 bytes). Replace or remove it.")
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        pages, mode = getattr(image, "n_frames", 1), image.mode
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError:
        raise DataError(f"{where}: not a picture ({_beginning(data)}). Replace or remove it.") from None
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{where}: too large ({error}; at most {MAX_PIXELS:,} are read). Downsize or remove it."
        ) from None
    except Exception as error:  # damaged files raise a dozen types: OSError, SyntaxError, ValueError, zlib.error, ...
        raise DataError(f"{where}: damaged or cut off ({error}). Replace or remove it.") from None
    remark = "holds several pictures, the first was read" if pages > 1 else ""
    return upright, Facts((upright.height, upright.width), mode, hashlib.sha256(data).hexdigest(), remark)


def picture(store, name: str, size: tuple[int, int], channels: int) -> tuple[np.ndarray, Facts]:
    """Reads one picture.

    Args:
      store: see `jaxad.data.files`.
      name: of the picture.
      size: (H, W) to resize to, antialiased.
      channels: 1 or 3.

    Returns:
      (H, W, C) uint8 and Facts.

    Raises:
      DataError: see `open_picture`; or it holds numbers that are no grey values.
    """
    from PIL import Image

    image, facts = full_picture(store, name)
    grey = image.mode == "L" or channels == 1
    image = image.convert("L" if grey else "RGB")
    if (image.height, image.width) != size:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    pixels = np.repeat(pixels[..., None], channels, axis=-1) if grey else pixels
    return pixels, facts


def full_picture(store, name: str):
    """Reads one picture at its own size: a PIL image of 8 bits and its Facts. Raises DataError, see `picture`."""
    image, facts = open_picture(store, name)
    image, remark = _eight_bits(image, store.where(name))
    return image, dataclasses.replace(facts, remark=facts.remark or remark)


def _eight_bits(image, where: str):
    """Maps 16-bit and float pictures to 8 bits by a fixed scale, so that pictures stay comparable."""
    from PIL import Image

    if not image.mode.startswith(("I", "F")):
        return image, "its transparency was ignored" if image.mode in ("RGBA", "LA", "PA") else ""
    values = np.asarray(image).astype(np.float32)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        low, high = float(values.min()), float(values.max())
        raise DataError(
            f"{where}: values from {low:g} to {high:g}; expected 0 to {top:g} in mode {image.mode}. "
            "Save it as 8 or 16 bits."
        )
    dark = image.mode != "F" and 0 < values.max() < 4096
    remark = "holds 12 bits or fewer in 16 and is dark: scale it to 65535" if dark else ""
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8)), remark


def mask(store, names: Iterable[str], of: str, shape: tuple[int, int]) -> tuple[np.ndarray, str]:
    """Reads the masks of one picture and joins them.

    Anomalous is what lies above 127; in lossless masks with values below 32 only, which number their defects,
    whatever is not 0.

    Args:
      store: see `jaxad.data.files`.
      names: of its masks.
      of: where the picture is, for messages.
      shape: (height, width) of the picture as stored.

    Returns:
      (height, width) bool, and a digest of the files.

    Raises:
      DataError: see `open_picture`; a mask has another size than its picture or no value that could mark a defect.
    """
    joined, digests = np.zeros(shape, bool), []
    for name in names:
        image, facts = open_picture(store, name)
        where = store.where(name)
        if facts.size != shape:
            raise DataError(
                f"{where}: the mask is {facts.size[1]} x {facts.size[0]}, its picture {of} is {shape[1]} x {shape[0]}. "
                "Export the mask at its picture's size."
            )
        joined |= _marked(image, where)
        digests.append(facts.digest)
    return joined, " ".join(digests)


def _marked(image, where: str) -> np.ndarray:
    if image.mode not in ("1", "L") and not image.mode.startswith(("I", "F")):
        image = image.convert("RGB")
    values = np.asarray(image)
    values = values.max(axis=-1) if values.ndim == 3 else values  # a defect may be drawn in any colour
    if values.dtype == bool:
        return values
    top = values.max()
    lossy = where.lower().endswith((".jpg", ".jpeg"))
    if top < _INDEX_MASK and not lossy:
        return values > 0
    half = 127 if top <= 255 else 32767
    if 0 < top <= half and not lossy:
        raise DataError(
            f"{where}: mask values up to {top}, none above {half}. Save it as 0 (normal) and 255 (anomalous)."
        )
    return values > half


def shrink_mask(marked: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes a bool mask to (H, W) uint8 0/1 by the nearest pixel."""
    from PIL import Image

    image = Image.fromarray(marked.astype(np.uint8))  # not as_image: the result counts in 0 and 1
    return np.asarray(image if marked.shape == size else image.resize(size[::-1], Image.Resampling.NEAREST))


def as_image(marked: np.ndarray):
    """A bool mask as a PIL image of 0 and 255."""
    from PIL import Image

    return Image.fromarray(marked.astype(np.uint8) * 255)


def in_threads(action: Callable, items: list) -> Iterator:
    """Results of action(item), in order; stops at the first error, without starting what has not begun."""
    from PIL import Image

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_picture has its own limit
        pool = stack.enter_context(concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)))
        try:
            yield from pool.map(action, items)
        finally:
            pool.shutdown(cancel_futures=True)


def _beginning(data: bytes) -> str:
    text = data[:20].decode("utf-8", "replace")
    return (
        f"it begins with {text!r}" if text.isprintable() or "\n" in text else f"{len(data):,} bytes of no known format"
    )
