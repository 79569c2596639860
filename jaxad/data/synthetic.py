"""Pictures of made surfaces with made defects, drawn on the device from a seed: the data that is always there.

Five families, each with six kinds of defect whose masks are exact: `brushed` metal (the default), `woven` cloth,
`wood`, a printed `grid`, and an `object` (a flange, always in nearly the same place). What varies between normal
pictures is what varies in front of a real camera: brightness, its gradient, contrast, white balance, position, the
grain of the material, noise. It outweighs the defects, so that grey levels alone tell little and a model of the surface
tells much. Some defects are faint, down to what no model will find.

Lengths are in parts of the picture's side: a family looks the same at every size.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxad.core import Array, Source
from jaxad.data.dataset import DataError, Dataset, Rows

VISIBLE = 8  # grey levels of 255 by which a pixel must differ from its defect-free twin to be in the mask
_SURFACE, _LOOK, _DEFECT = 32, 16, 32  # uniform numbers a picture takes for each
_STRENGTH = 8  # where a defect's numbers have its contrast
_CHUNK = 32  # pictures drawn at a time


class Family(NamedTuple):
    """A kind of surface: how it is built, how its structure breaks, and its two colours."""

    tone: Callable[[Array, Array, Array], Array]  # (numbers, y, x) -> (H, W) in about [0, 1], from dark to light
    broken: Callable[..., tuple[Array, Array]]  # (numbers, y, x, (y0, x0), radius) -> where (H, W) in [0, 1], and tone
    damage: str  # what `broken` is called
    dark: tuple[float, float, float]
    light: tuple[float, float, float]


def load(
    family: str | None = None,
    *,
    image_size: int | tuple[int, int] = 64,
    channels: int = 3,
    seed: int = 0,
    num_train: int = 256,
    num_test_normal: int = 64,
    num_test_anomalous: int = 64,
    holdout: float = 0.1,
) -> Dataset:
    """Draws a data set: sources "train", "test" and, if `holdout` > 0, "holdout".

    Args:
      family: one of `FAMILIES`; None is the first.
      image_size: pixels a side, or (height, width); at least 16.
      channels: 3, or 1 for the grey version of the same pictures.
      seed: same seed, same bytes, on the same kind of device.
      num_train: normal pictures, of which the share `holdout` is kept apart.
      num_test_normal: normal pictures of the test source.
      num_test_anomalous: anomalous pictures of the test source, which has its normal ones first.
      holdout: in [0, 1).

    Raises:
      DataError: the family is unknown, or the picture too small.
      ValueError: another option is out of its range.
    """
    from jaxad.data.build import Settings

    family = next(iter(FAMILIES)) if family is None else family
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    Settings((height, width), channels, holdout)  # checks them
    if min(num_train - (holdout > 0), num_test_normal, num_test_anomalous + 1) < 1:
        raise ValueError(
            f"num_train={num_train}, num_test_normal={num_test_normal}, num_test_anomalous={num_test_anomalous}; "
            "expected at least 1, 1 and 0, and one more to train on with a holdout. Leave them out for 256, 64 and 64."
        )
    if family not in FAMILIES:
        raise DataError(f"synthetic:{family} is unknown; expected one of {', '.join(FAMILIES)}. Pass synthetic:wood.")
    if min(height, width) < 16:
        raise DataError(f"image_size={image_size} is too small to show a defect; expected at least 16. Pass 64.")
    # A number for each picture, so that how many there are of one part changes no picture of another.
    parts = [
        np.arange(size) + part * 2**28 for part, size in enumerate((num_train, num_test_normal, num_test_anomalous))
    ]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.concatenate(parts).astype(np.uint32))
    num_normal = num_train + num_test_normal
    images = _draw(normal, keys[:num_normal], family, (height, width, channels))
    masks, found = np.zeros(images.shape[:3], np.uint8), ["good"] * num_normal
    if num_test_anomalous:
        changed, outlines, kinds = _draw(sample, keys[num_normal:], family, (height, width, channels))
        images, masks = np.concatenate([images, changed]), np.concatenate([masks, outlines])
        found += [defects(family)[kind] for kind in kinds]
    num_holdout = min(max(1, round(holdout * num_train)), num_train - 1) if holdout else 0
    sizes = {"train": num_train - num_holdout, "holdout": num_holdout, "test": num_test_normal + num_test_anomalous}
    sources, rows = _pack(found, images, masks, sizes)
    digest = hashlib.sha256(repr(sizes).encode() + images.tobytes() + masks.tobytes()).hexdigest()
    return Dataset(f"synthetic:{family}", "synthetic", sources, rows, (), digest)


def defects(family: str) -> tuple[str, ...]:
    """The names of a family's defects; `sample` numbers them in this order."""
    return ("scratch", "stain", "contamination", "cut", "distortion", FAMILIES[family].damage)


def normal(key: Array, family: str, shape: tuple[int, int, int]) -> Array:
    """Draws one normal picture: (H, W, C) uint8, C 1 or 3. Pure; vmaps over keys."""
    surface = FAMILIES[family]
    numbers, noise = _numbers(key, shape)
    colour = _paint(surface, surface.tone(numbers.surface, *_centres(shape)))
    return _photograph(numbers.look, noise, colour, shape)


def sample(key: Array, family: str, shape: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """Draws one anomalous picture, the twin of `normal(key, family, shape)`. Pure; vmaps over keys.

    Returns:
      image (H, W, C) uint8; mask (H, W) uint8, never empty: 1 where some channel differs from the twin's by at least
      `VISIBLE` and, so that a defect is not in shreds, in the gaps between such pixels up to 1 / 16 of the side; the
      defect's number () int32 in `defects(family)`.
    """
    surface = FAMILIES[family]
    numbers, noise = _numbers(key, shape)
    y, x = _centres(shape)
    colour = _paint(surface, surface.tone(numbers.surface, y, x))
    twin = _photograph(numbers.look, noise, colour, shape)
    kind = jnp.int32(numbers.defect[0] * len(_DEFECTS))
    scene = _Scene(surface, numbers.surface, colour, y, x, 1 / min(shape[:2]))

    def finish(changed):
        image = _photograph(numbers.look, noise, changed, shape)
        difference = jnp.abs(image.astype(jnp.int32) - twin.astype(jnp.int32)).max(axis=-1)
        return image, _close(difference >= VISIBLE)

    branches = [functools.partial(defect, scene, numbers.defect[2:]) for defect in _DEFECTS]
    faint = jnp.minimum(1, 0.2 + 5 * numbers.defect[1])  # one in six, down to what nobody finds
    image, mask = finish(colour + faint * (jax.lax.switch(kind, branches) - colour))
    # Some hide altogether: a pattern moved onto itself, a crumb of the same grey. A strong stain always shows.
    stained, stain_mask = finish(_stain(scene, numbers.defect[2:].at[_STRENGTH].set(1)))
    hidden = mask.sum() < max(2, mask.size // 1024)
    return (
        jnp.where(hidden, stained, image),
        jnp.where(hidden, stain_mask, mask),
        jnp.where(hidden, _DEFECTS.index(_stain), kind),
    )


def _close(visible: Array) -> Array:
    """(H, W) bool -> uint8: fills gaps of up to 1 / 16 of the side, as someone who draws round a defect would."""
    reach = max(1, round(min(visible.shape) / 32))
    padded = jnp.pad(visible, reach).astype(jnp.float32)
    for sign in (1, -1):  # widen, then narrow
        for window in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
            padded = sign * jax.lax.reduce_window(sign * padded, -jnp.inf, jax.lax.max, window, (1, 1), "SAME")
    return padded[reach:-reach, reach:-reach].astype(jnp.uint8)


class _Numbers(NamedTuple):
    surface: Array  # uniform in [0, 1)
    look: Array
    defect: Array


class _Scene(NamedTuple):
    """What a defect is put into."""

    family: Family
    surface: Array
    colour: Array  # (H, W, 3)
    y: Array  # (H, 1)
    x: Array  # (1, W)
    pixel: float  # its side


def _numbers(key: Array, shape: tuple[int, int, int]) -> tuple[_Numbers, Array]:
    """All chance of a picture in one draw, since every new shape of a draw costs seconds of compile time on a CPU."""
    height, width, _ = shape
    drawn = jax.random.uniform(key, (_SURFACE + _LOOK + _DEFECT + height * width,))
    surface, look, defect, noise = jnp.split(drawn, np.cumsum([_SURFACE, _LOOK, _DEFECT]))
    gaussian = jax.scipy.special.ndtri(jnp.clip(noise, 1e-6, 1 - 1e-6))
    return _Numbers(surface, look, defect), gaussian.reshape(height, width, 1)


def _centres(shape: tuple[int, int, int]) -> tuple[Array, Array]:
    """Centres of the pixels in [0, 1]: (H, 1) and (1, W)."""
    height, width, _ = shape
    return ((jnp.arange(height) + 0.5) / height)[:, None], ((jnp.arange(width) + 0.5) / width)[None]


def _paint(family: Family, tone: Array) -> Array:
    dark, light = jnp.array(family.dark), jnp.array(family.light)
    return dark + (light - dark) * tone[..., None]


def _photograph(look: Array, noise: Array, colour: Array, shape: tuple[int, int, int]) -> Array:
    """Light, camera and noise, the same for a picture and its twin: (H, W, 3) colours -> (H, W, C) uint8."""
    y, x = _centres(shape)
    level, contrast = _between(look[0], 0.8, 1.15), _between(look[1], 0.85, 1.15)
    angle, slope = 2 * math.pi * look[2], _between(look[3], 0, 0.25)
    light = level * (1 + slope * ((x - 0.5) * jnp.cos(angle) + (y - 0.5) * jnp.sin(angle)))
    balance = 1 + 0.04 * (look[4:7] - 0.5)
    seen = (0.5 + contrast * (colour - 0.5)) * balance * light[..., None]
    seen = seen + _between(look[7], 0.006, 0.014) * noise
    if shape[2] == 1:
        seen = (seen * jnp.array([0.299, 0.587, 0.114])).sum(-1, keepdims=True)
    return jnp.round(255 * jnp.clip(seen, 0, 1)).astype(jnp.uint8)


# --- surfaces: `_name` is the tone, `_name_broken` the tone and the place of its damage near a point ----------------


def _woven(u: Array, y: Array, x: Array) -> Array:
    """Plain weave of 7 by 7 threads, a little askew."""
    across, down = _threads(u, y, x)
    return jnp.maximum(_thread(across, down), 0.85 * _thread(down, across + 1))


def _woven_broken(u: Array, y: Array, x: Array, point: tuple[Array, Array], radius: Array) -> tuple[Array, Array]:
    """A stretch of a thread is missing: those across it lie open."""
    across, down = _threads(u, y, x)
    across0, down0 = _threads(u, *point)
    stretch = _inside(jnp.abs(across - across0) - 7 * 1.6 * radius, 0.4)
    gap = stretch * _inside(jnp.abs(down - jnp.floor(down0) - 0.5) - 0.5, 0.2)
    return gap, 0.55 * _thread(across, jnp.floor(across))


def _threads(u: Array, y: Array, x: Array) -> tuple[Array, Array]:
    """Coordinates counted in threads."""
    bend_x, bend_y = (0.008 * jnp.sin(2 * math.pi * (v + phase)) for v, phase in ((y, u[4]), (x, u[5])))
    skew_x, skew_y = 0.03 * (u[2:4] - 0.5)
    shift_x, shift_y = 0.04 * (u[0:2] - 0.5)
    return 7 * (x + shift_x + skew_x * (y - 0.5) + bend_x), 7 * (y + shift_y + skew_y * (x - 0.5) + bend_y)


def _thread(across: Array, along: Array) -> Array:
    """A set of parallel threads, each up where its neighbours are down."""
    rounded = jnp.sqrt(1 - (2 * (across - jnp.floor(across)) - 1) ** 2)
    return rounded * (0.62 + 0.38 * jnp.cos(math.pi * (along - 0.5 + jnp.floor(across))))


def _wood(u: Array, y: Array, x: Array) -> Array:
    """Growth rings cut lengthwise, with fibres."""
    bend = 0.03 * jnp.sin(2 * math.pi * (0.8 * y + u[0])) + 0.012 * jnp.sin(2 * math.pi * (1.9 * y + u[1]))
    place = x + bend + 0.12 * (u[2] - 0.5)
    rings = 0.5 + 0.5 * jnp.sin(2 * math.pi * (5 * place + 0.35 * jnp.sin(2 * math.pi * (1.3 * place))))
    wave, phase, sway = (v[:, None, None] for v in (jnp.array((11, 16, 21)), u[4:7], u[8:11]))
    fibres = jnp.sin(2 * math.pi * (wave * place + 0.7 * jnp.sin(2 * math.pi * (0.5 * y + sway)) + phase)).sum(0)
    return 0.15 + 0.65 * rings**2 + 0.06 * fibres


def _wood_broken(u: Array, y: Array, x: Array, point: tuple[Array, Array], radius: Array) -> tuple[Array, Array]:
    """A knot: rings of its own round a dark heart, longer along the grain."""
    distance = jnp.sqrt((1.2 * (x - point[1])) ** 2 + (0.8 * (y - point[0])) ** 2) / radius
    tone = 0.1 + 0.3 * jnp.clip(distance, 0, 1) * (1 + 0.6 * jnp.sin(2 * math.pi * (2.5 * distance + u[12])))
    return _inside(distance - 0.9, 0.3), tone


def _brushed(u: Array, y: Array, x: Array) -> Array:
    """Brush marks along x, and the broad reflection of a lamp."""
    return _marks(u, y + 0.01 * (u[1] - 0.5) * x, x) + _reflection(u, y)


def _brushed_broken(u: Array, y: Array, x: Array, point: tuple[Array, Array], radius: Array) -> tuple[Array, Array]:
    """A round spot is brushed another way."""
    slant = 0.6 * (u[2] - 0.5)
    distance = jnp.sqrt((x - point[1]) ** 2 + (y - point[0]) ** 2) - 0.9 * radius
    return _inside(distance, 0.03), 1.6 * _marks(u[::-1], x + slant * y, y) - 0.2 + _reflection(u, y)


def _marks(u: Array, across: Array, along: Array) -> Array:
    wave, phase, swell = (v[:, None, None] for v in (jnp.array((5, 9, 13, 19, 24, 29)), u[4:10], u[10:16]))
    strength = 0.05 + 0.03 * jnp.sin(2 * math.pi * (0.7 * along + swell))
    return 0.35 + (strength * jnp.sin(2 * math.pi * (wave * across + phase))).sum(0)


def _reflection(u: Array, y: Array) -> Array:
    return 0.3 * jnp.exp(-(((y - 0.3 - 0.4 * u[0]) / 0.25) ** 2))


def _grid(u: Array, y: Array, x: Array) -> Array:
    """Rings and crosses by turns, 5 by 5, printed a little off."""
    across, down = _cells(u, y, x)
    column, row = jnp.floor(across), jnp.floor(down)
    dx, dy = jnp.abs(across - column - 0.5), jnp.abs(down - row - 0.5)
    size = 0.28 + 0.03 * (u[2] - 0.5)
    ring = jnp.abs(jnp.sqrt(dx**2 + dy**2) - size) - 0.07
    cross = jnp.minimum(jnp.maximum(dx - 0.08, dy - size), jnp.maximum(dy - 0.08, dx - size))
    ink = _inside(jnp.where((column + row) % 2 == 0, ring, cross), 0.06)
    return 1 - (0.8 + 0.2 * u[3]) * ink


def _grid_broken(u: Array, y: Array, x: Array, point: tuple[Array, Array], radius: Array) -> tuple[Array, Array]:
    """The nearest figure is missing, or (a small damage) cut off on one side."""
    across, down = _cells(u, y, x)
    across0, down0 = _cells(u, *point)
    dx, dy = across - jnp.floor(across0) - 0.5, down - jnp.floor(down0) - 0.5
    cell = jnp.maximum(jnp.abs(dx), jnp.abs(dy)) - 0.5
    side = dx * jnp.cos(6.3 * u[12]) + dy * jnp.sin(6.3 * u[12]) - (20 * radius - 1.6)
    return _inside(jnp.maximum(cell, side), 0.06), jnp.ones_like(dx * dy)


def _cells(u: Array, y: Array, x: Array) -> tuple[Array, Array]:
    return 5 * (x + 0.05 * (u[0] - 0.5)), 5 * (y + 0.05 * (u[1] - 0.5))


def _object(u: Array, y: Array, x: Array) -> Array:
    """A flange: a disc with a bore and six bolt holes, turned by a few degrees."""
    dx, dy = _on_object(u, y, x)
    radius, angle = jnp.sqrt(dx**2 + dy**2), jnp.arctan2(dy, dx)
    turn = (angle + _SIXTH / 2) % _SIXTH - _SIXTH / 2
    hole = jnp.sqrt((radius * jnp.cos(turn) - 0.27) ** 2 + (radius * jnp.sin(turn)) ** 2) - 0.045
    holes = _inside(jnp.minimum(hole, radius - 0.1), 0.02)
    return _plate(u, radius, angle) * (1 - 0.75 * holes)


def _object_broken(u: Array, y: Array, x: Array, point: tuple[Array, Array], radius: Array) -> tuple[Array, Array]:
    """The nearest bolt hole is not drilled."""
    dx, dy = _on_object(u, y, x)
    dx0, dy0 = _on_object(u, *point)
    sector = _SIXTH * jnp.round(jnp.arctan2(dy0, dx0) / _SIXTH)
    hole = jnp.sqrt((dx - 0.27 * jnp.cos(sector)) ** 2 + (dy - 0.27 * jnp.sin(sector)) ** 2)
    del radius
    return _inside(hole - 0.075, 0.02), _plate(u, jnp.sqrt(dx**2 + dy**2), jnp.arctan2(dy, dx))


def _on_object(u: Array, y: Array, x: Array) -> tuple[Array, Array]:
    """Coordinates that move and turn with the object."""
    dx, dy, turn = x - 0.5 - 0.04 * (u[0] - 0.5), y - 0.5 - 0.04 * (u[1] - 0.5), 0.2 * (u[2] - 0.5)
    return dx * jnp.cos(turn) - dy * jnp.sin(turn), dx * jnp.sin(turn) + dy * jnp.cos(turn)


def _plate(u: Array, radius: Array, angle: Array) -> Array:
    metal = 0.62 + 0.25 * _inside(jnp.abs(radius - 0.165) - 0.03, 0.02) + 0.08 * jnp.sin(2 * angle + 2 * math.pi * u[3])
    return 0.12 + (metal - 0.12) * _inside(radius - 0.4, 0.02)


_SIXTH = math.pi / 3

FAMILIES = {
    "brushed": Family(_brushed, _brushed_broken, "cross_brushed", (0.2, 0.21, 0.23), (0.85, 0.86, 0.88)),
    "woven": Family(_woven, _woven_broken, "missing_thread", (0.25, 0.2, 0.17), (0.8, 0.72, 0.6)),
    "wood": Family(_wood, _wood_broken, "knot", (0.36, 0.2, 0.1), (0.8, 0.58, 0.36)),
    "grid": Family(_grid, _grid_broken, "missing_print", (0.15, 0.22, 0.45), (0.8, 0.79, 0.75)),
    "object": Family(_object, _object_broken, "missing_hole", (0.16, 0.2, 0.19), (0.8, 0.8, 0.76)),
}


# --- defects: (scene, numbers) -> colours (H, W, 3) -----------------------------------------------------------------


def _scratch(scene: _Scene, u: Array) -> Array:
    """A thin, slightly bent line, lighter or darker than what it crosses."""
    across, along = _turned(scene, u)
    across = across - _between(u[4], -0.6, 0.6) * along**2
    length, width = _between(u[5], 0.12, 0.3), _between(u[6], 0.6, 1.3) * jnp.maximum(scene.pixel, 1 / 80)
    line = jnp.exp(-((across / width) ** 2)) * _inside(jnp.abs(along) - length, 0.06)
    return scene.colour + (_sign(u[7]) * _strength(u[_STRENGTH], 0.12, 0.4) * line)[..., None]


def _stain(scene: _Scene, u: Array) -> Array:
    """A soft, tinted, darker patch: something was spilt."""
    patch = _inside(_blob(scene, u, _between(u[5], 0.07, 0.15)), 0.05)
    return scene.colour * (1 - _strength(u[_STRENGTH], 0.2, 0.5) * patch[..., None] * jnp.array([0.6, 0.8, 1.0]))


def _contamination(scene: _Scene, u: Array) -> Array:
    """A crumb of something else lies on it, of one colour and a sharp outline."""
    patch = _inside(_blob(scene, u, _between(u[5], 0.03, 0.07)), scene.pixel)
    other = 0.25 + 0.5 * u[10:13]
    return scene.colour + _between(u[_STRENGTH], 0.6, 1.0) * patch[..., None] * (other - scene.colour)


def _cut(scene: _Scene, u: Array) -> Array:
    """A slit: dark inside, one lip catching light."""
    across, along = _turned(scene, u)
    length, width = _between(u[5], 0.06, 0.14), _between(u[6], 0.02, 0.035)
    open_ = width * (1 - (along / length) ** 2)
    slit = _inside(jnp.maximum(jnp.abs(across) - open_, jnp.abs(along) - length), scene.pixel)
    lip = jnp.exp(-(((across - open_) / 0.015) ** 2)) * _inside(jnp.abs(along) - length, 0.02)
    colour = scene.colour + 0.15 * lip[..., None]
    return colour + _between(u[_STRENGTH], 0.6, 1.0) * slit[..., None] * (jnp.array(scene.family.dark) - colour)


def _distortion(scene: _Scene, u: Array) -> Array:
    """The structure is pulled aside."""
    dy, dx = _offset(scene, u)
    pull = _between(u[_STRENGTH], 0.035, 0.065) * jnp.exp(-(dx**2 + dy**2) / _between(u[5], 0.08, 0.13) ** 2)
    angle = 2 * math.pi * u[3]
    tone = scene.family.tone(scene.surface, scene.y + pull * jnp.sin(angle), scene.x + pull * jnp.cos(angle))
    return _paint(scene.family, tone)


def _damage(scene: _Scene, u: Array) -> Array:
    """What belongs there is not, or something else is."""
    dy, dx = _offset(scene, u)
    point = (scene.y - dy)[0, 0], (scene.x - dx)[0, 0]
    where, tone = scene.family.broken(scene.surface, scene.y, scene.x, point, _between(u[5], 0.07, 0.13))
    broken = _paint(scene.family, tone)
    return scene.colour + _between(u[_STRENGTH], 0.5, 1.0) * where[..., None] * (broken - scene.colour)


_DEFECTS = (_scratch, _stain, _contamination, _cut, _distortion, _damage)


def _offset(scene: _Scene, u: Array) -> tuple[Array, Array]:
    """Distances from the defect's centre, which lies within 0.3 of the picture's (on the object, if there is one)."""
    reach, angle = 0.3 * jnp.sqrt(u[0]), 2 * math.pi * u[1]
    return scene.y - 0.5 - reach * jnp.sin(angle), scene.x - 0.5 - reach * jnp.cos(angle)


def _turned(scene: _Scene, u: Array) -> tuple[Array, Array]:
    """Distances from the defect's centre across and along its own direction."""
    dy, dx = _offset(scene, u)
    angle = math.pi * u[3]
    return dy * jnp.cos(angle) - dx * jnp.sin(angle), dx * jnp.cos(angle) + dy * jnp.sin(angle)


def _blob(scene: _Scene, u: Array, radius: Array) -> Array:
    """Distance to a wobbling closed outline, negative inside."""
    across, along = _turned(scene, u)
    angle = jnp.arctan2(across, along)
    wobble = sum(0.12 * jnp.sin(k * angle + 2 * math.pi * u[12 + k]) for k in (2, 3, 5))
    return jnp.sqrt((1.3 * across) ** 2 + (along / 1.1) ** 2) - radius * (1 + wobble)


def _inside(distance: Array, soft: float) -> Array:
    """1 inside, 0 outside, in between on an edge `soft` wide."""
    return jnp.clip(0.5 - distance / soft, 0, 1)


def _between(u: Array, low: float, high: float) -> Array:
    return low + (high - low) * u


def _strength(u: Array, low: float, high: float) -> Array:
    """Mostly faint, sometimes strong."""
    return _between(u**1.5, low, high)


def _sign(u: Array) -> Array:
    return jnp.where(u < 0.5, -1.0, 1.0)


# --- packing --------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("draw", "family", "shape"))
def _draw_chunk(keys: Array, *, draw: Callable, family: str, shape: tuple[int, int, int]) -> Any:
    return jax.vmap(lambda key: draw(key, family, shape))(keys)


def _draw(draw: Callable, keys: Array, family: str, shape: tuple[int, int, int]) -> Any:
    """Draws a picture for each key, a chunk at a time: what `draw` gives, with a leading axis, in NumPy."""
    rows = np.arange(-(-len(keys) // _CHUNK) * _CHUNK) % len(keys)  # the last chunk is filled up: one compiled shape
    chunks = [_draw_chunk(keys[some], draw=draw, family=family, shape=shape) for some in rows.reshape(-1, _CHUNK)]
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(keys)], *chunks)


def _pack(found: list[str], images: np.ndarray, masks: np.ndarray, sizes: Mapping[str, int]) -> tuple[dict, dict]:
    """Cuts pictures in the order of `sizes` into sources and rows."""
    sources: dict[str, Source] = {}
    rows, start = {}, 0
    for role, size in sizes.items():
        part = slice(start, start := start + size)
        if not size:
            continue
        label = np.array([defect != "good" for defect in found[part]], np.int32)
        arrays: dict[str, Any] = {
            "image": images[part],
            "label": label,
            "mask": masks[part] if role == "test" else None,
        }
        sources[role] = Source(**arrays)
        rows[role] = Rows(
            files=tuple(f"{role}/{defect}/{i:04d}.png" for i, defect in enumerate(found[part])),
            defects=tuple(found[part]),
            groups=("",) * size,
            has_mask=(role == "test",) * size,
        )
    return sources, rows
