"""Pictures of maps: in colour, laid over the image, saved, sized and encoded for the page."""

from __future__ import annotations

import base64
import functools
import io
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Picture(NamedTuple):
    """One scored sample to show (of a clip: its target frame)."""

    file: str
    defect: str
    label: int  # 0 normal, 1 anomalous, -1 unknown
    score: float  # raw
    normalised: float  # 0: median of held-out normal images, 1: threshold
    predicted: int
    image: np.ndarray  # (H, W, C) uint8
    mask: np.ndarray | None  # (H, W), non-zero on anomalous pixels
    map: np.ndarray  # (H, W) float32 raw scores


def heat_map(map: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """A map in colour on a fixed scale, dark where normal (inferno: even steps in brightness), so that maps compare.

    Args:
      map: (H, W) scores.
      low: score of the darkest colour.
      high: score of the brightest colour; what is beyond is clipped.

    Returns:
      (H, W, 3) uint8; mid-grey where the map is not finite.
    """
    level = np.round(255 * _unit(map, low, high)).astype(np.uint8)
    return np.where(np.isfinite(map)[..., None], palette()[level], np.uint8(128))


def overlay(
    image: np.ndarray,
    map: np.ndarray,
    *,
    low: float,
    high: float,
    mask: np.ndarray | None = None,
    opacity: float = 0.6,
) -> np.ndarray:
    """The image with the map laid over it, the more opaque the higher the score, and the mask's outline in cyan.

    Args:
      image: (H, W, C) or (H, W) uint8.
      map: (H, W) scores.
      low: score at which nothing is laid over.
      high: score from which `opacity` is reached.
      mask: (H, W), non-zero on anomalous pixels; None: no outline.
      opacity: of the map at `high`, in [0, 1].

    Returns:
      (H, W, 3) uint8.

    Raises:
      ValueError: if the sizes differ.
    """
    for name, other in (("map", map), ("mask", mask)):
        if other is not None and other.shape != image.shape[:2]:
            raise ValueError(
                f"{name} has shape {other.shape}; expected the image's (H, W) = {image.shape[:2]}. "
                f"Resize the {name} to the image first."
            )
    weight = opacity * _unit(map, low, high)[..., None]
    mixed = (1 - weight) * _rgb(image) + weight * heat_map(map, low=low, high=high)
    mixed = np.round(mixed).astype(np.uint8)
    if mask is not None:
        mixed[_grow(mask != 0) & (mask == 0)] = 0  # a dark rim, so that the outline shows on bright images too
        mixed[outline(mask)] = _CYAN
    return mixed


_CYAN = (0, 240, 255)  # far from every colour of the map


def outline(mask: np.ndarray) -> np.ndarray:
    """The outermost pixels of each region of a mask (H, W), regions cut by the border included -> (H, W) bool."""
    inside = mask != 0
    outside = np.pad(~inside, 1, constant_values=True)
    return inside & _grow(outside)[1:-1, 1:-1]


def save_map(
    path: str | os.PathLike[str], map: np.ndarray, *, low: float, high: float, image: np.ndarray | None = None
) -> None:
    """Saves a map: raw scores for `.npy`, else a picture in colour (or laid over `image`, at the image's size).

    Args:
      path: the file to write; its ending decides the format (.npy, .png, .jpg, ...).
      map: (H, W) float scores.
      low: score of the darkest colour.
      high: score of the brightest colour.
      image: (H', W', C) uint8 to lay the map over.
    """
    from PIL import Image

    path = pathlib.Path(path)
    if image is not None and image.shape[:2] != map.shape:
        map = _resize(map, image.shape[1::-1], smooth=True)
    if path.suffix == ".npy":
        np.save(path, np.asarray(map, np.float32))
        return
    drawn = heat_map(map, low=low, high=high) if image is None else overlay(image, map, low=low, high=high)
    Image.fromarray(drawn).save(path)


def colour_scale(pictures: Sequence[Picture]) -> tuple[float, float]:
    """(low, high) on which these maps compare: the median pixel, and the usual peak of an anomalous picture's map."""
    finite = [picture.map[np.isfinite(picture.map)] for picture in pictures]
    finite = [values for values in finite if values.size]
    if not finite:
        return 0.0, 1.0
    loud = [picture.label == 1 or (picture.label < 0 and picture.predicted == 1) for picture in pictures]
    peaks = [np.max(picture.map, initial=-np.inf, where=np.isfinite(picture.map)) for picture in pictures]
    peaks = [peak for peak, is_loud in zip(peaks, loud, strict=True) if is_loud or not any(loud)]
    low = float(np.median([np.median(values) for values in finite]))
    return low, max(float(np.median(peaks)), low)


def _unit(map: np.ndarray, low: float, high: float) -> np.ndarray:
    span = max(high - low, 1e-30)
    return np.clip((np.nan_to_num(np.asarray(map, np.float64), nan=low) - low) / span, 0, 1)


@functools.cache
def palette() -> np.ndarray:
    """The 256 colours of a map, dark to bright: (256, 3) uint8."""
    import matplotlib

    return np.round(255 * matplotlib.colormaps["inferno"](np.arange(256))[:, :3]).astype(np.uint8)


def _rgb(image: np.ndarray) -> np.ndarray:
    image = image if image.ndim == 3 else image[..., None]
    if image.shape[2] in (3, 4):
        return image[..., :3]
    return np.repeat(np.round(image.mean(-1, keepdims=True)).astype(np.uint8), 3, -1)  # grey, or many bands


def _grow(region: np.ndarray) -> np.ndarray:
    wide = np.pad(region, 1)
    return region | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]


def _resize(plane: np.ndarray, size: tuple[int, ...], *, smooth: bool) -> np.ndarray:
    """A float plane (H, W) at size (width, height)."""
    from PIL import Image

    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.BOX
    return np.asarray(Image.fromarray(np.asarray(plane, np.float32)).resize((size[0], size[1]), how))


def fit_to(picture: Picture, side: int) -> Picture:
    """The picture at about `side` pixels: small ones enlarged by whole pixels (crisp), large ones shrunk."""
    from PIL import Image

    height, width = picture.image.shape[:2]
    image, mask, map = _rgb(picture.image), picture.mask, picture.map
    if max(height, width) > side:
        size = tuple(max(1, round(length * side / max(height, width))) for length in (width, height))
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
        map = _resize(map, size, smooth=False)
        # a scratch thinner than a pixel must not vanish
        mask = None if mask is None else _resize(mask != 0, size, smooth=False) > 0
    else:
        times = side // max(height, width)
        image, map = (plane.repeat(times, 0).repeat(times, 1) for plane in (image, map))
        mask = None if mask is None else mask.repeat(times, 0).repeat(times, 1)
    return picture._replace(image=image, mask=mask, map=map)


def encode(image: np.ndarray, *, crisp: bool) -> str:
    """An image as a data URI: PNG for masks and enlarged pixels, JPEG for the rest."""
    from PIL import Image

    buffer = io.BytesIO()
    if crisp:
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(image).save(buffer, "JPEG", quality=85, subsampling=0)
    return f"data:image/{'png' if crisp else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
