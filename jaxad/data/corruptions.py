"""Pictures under other conditions: colour, blur, exposure, darkness, noise and haze, in five levels, on the device.

For the condition-shift protocol (`jaxad.conditions`): a detector learns from clean pictures of every class and is asked
to tell the same scenes under other conditions from clean ones. What the objects are never changes.

Kinds and levels are ours. They take the place of recorded conditions such as CURE-TSR's, which are behind a request
form; numbers got with one are not comparable with the other's.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxad.core import Array
from jaxad.ops.smooth import gaussian_smooth

LEVELS = (1, 2, 3, 4, 5)
_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue in the luminance of BT.601


def corrupt(key: Array, images: Array, *, kind: str, level: Array) -> Array:
    """Puts pictures under a condition.

    Args:
      key: for noise.
      images: (B, H, W, C) in [0, 1].
      kind: one of `KINDS`.
      level: 0 (clean) to 5; may be traced. What changes grows in proportion to it.

    Returns:
      (B, H, W, C) in [0, 1], in steps of 1/255 as files would hold them.

    Raises:
      ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(
            f"corruption {kind!r} is unknown; expected one of {tuple(KINDS)}. Pass kind='{next(iter(KINDS))}'."
        )
    strength = jnp.asarray(level, jnp.float32) / LEVELS[-1]
    changed = KINDS[kind](key, images, strength)
    return jnp.round(255 * jnp.clip(changed, 0, 1)) / 255


def _grey(key: Array, images: Array, strength: Array) -> Array:
    """Towards the luminance. Pictures of one channel stay what they are."""
    del key
    if images.shape[-1] != len(_LUMA):
        return images
    return images + strength * ((images @ jnp.asarray(_LUMA))[..., None] - images)


def _blur(key: Array, images: Array, strength: Array) -> Array:
    """A Gaussian of up to a fourteenth of the picture's height: 2 pixels of 28."""
    del key
    planes = jnp.moveaxis(images, -1, 1)
    return jnp.moveaxis(gaussian_smooth(planes, sigma=strength * images.shape[1] / 14), 1, -1)


def _exposure(key: Array, images: Array, strength: Array) -> Array:
    """Up to 2.5 times the light; what exceeds white is lost."""
    del key
    return images * (1 + 1.5 * strength)


def _darkening(key: Array, images: Array, strength: Array) -> Array:
    """Down to a quarter of the light."""
    del key
    return images * (1 - 0.75 * strength)


def _noise(key: Array, images: Array, strength: Array) -> Array:
    """Normal noise with a standard deviation of up to 0.3, of its own for each value."""
    return images + 0.3 * strength * jax.random.normal(key, images.shape)


def _haze(key: Array, images: Array, strength: Array) -> Array:
    """Contrast falls to a quarter under a light grey veil."""
    del key
    return images + 0.75 * strength * (0.8 - images)


KINDS: dict[str, Callable[[Array, Array, Array], Array]] = {
    "grey": _grey,
    "blur": _blur,
    "exposure": _exposure,
    "darkening": _darkening,
    "noise": _noise,
    "haze": _haze,
}
