"""The condition-shift protocol with a detector whose scores are known: brightness, weighed."""

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest

from jaxad.conditions import condition_shift
from jaxad.core import Array, Method, Scores, Source, config, static


@config
class Brightness:
    sign: float = 1.0
    width: int = static(4)


class State(NamedTuple):
    cfg: Brightness
    offset: Array


def score(state, images):
    """How bright a picture is, or, with a negative sign, how dark."""
    mean = images.mean(axis=(1, 2, 3))
    return Scores(state.cfg.sign * mean + state.offset, images.mean(axis=3))


METHOD = Method("brightness", Brightness, None, None, score, {})
STATE = State(Brightness(), np.float32(3.0))


def pictures(count=7):
    pixels = np.random.default_rng(0).integers(60, 120, (count, 16, 16, 3), dtype=np.uint8)
    return Source(image=pixels, label=np.zeros(count, np.int32))


def table(**options):
    rows = condition_shift(jax.random.key(0), METHOD, STATE, pictures(), batch_size=3, **options)
    return {(row["kind"], row["level"], row["variant"]): row["image_auroc"] for row in rows}


def test_conditions_are_told_by_what_they_change():
    """Brighter pictures score above all clean ones (1), darker ones below (0), the same pictures beside them (1/2)."""
    found = table(kinds=("exposure", "darkening"), levels=(0, 3))
    wanted = {("exposure", 0): 0.5, ("exposure", 3): 1.0, ("darkening", 0): 0.5, ("darkening", 3): 0.0}
    assert found == pytest.approx({(*where, "score"): value for where, value in wanted.items()})


def test_variants_change_what_is_scored_by():
    found = table(kinds=("exposure",), levels=(1, 3), variants={"bright": {}, "dark": {"sign": -1.0}})
    assert (found[("exposure", 3, "bright")], found[("exposure", 3, "dark")]) == pytest.approx((1, 0))
    assert found[("exposure", 1, "bright")] == pytest.approx(1 - found[("exposure", 1, "dark")])


def test_every_picture_counts_once():
    """Seven pictures in batches of three: the last picture alone is bright, so filling rows up with it would show."""
    source = pictures()
    pixels = np.array(source.image)
    pixels[-1] = 250
    source = dataclasses.replace(source, image=pixels)
    rows = condition_shift(jax.random.key(0), METHOD, STATE, source, kinds=("exposure",), levels=(5,), batch_size=3)
    # All corrupted pictures exceed the six dark ones that are clean; the bright one is exceeded by itself alone.
    assert rows[0]["image_auroc"] == pytest.approx((7 * 6 + 1) / 49, abs=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"variant 'x' sets \['width'\], which cannot change .*\['sign'\]"):
        table(variants={"x": {"width": 3}})
    clips = dataclasses.replace(pictures(), start=np.arange(3, dtype=np.int32), clip=4)
    with pytest.raises(ValueError, match="holds clips; expected pictures"):
        condition_shift(jax.random.key(0), METHOD, STATE, clips)
