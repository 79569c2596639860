"""The verb that measures speed: bench."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from jaxad.bench.__main__ import bench as measure
from jaxad.cli.app import Flag, app


@app.command(name="bench")
def bench(
    method: tyro.conf.Positional[str],
    *,
    preset: str | None = None,
    image_size: str | None = None,
    batch: str | None = None,
    dtype: str = "float32",
    train: Flag = False,
    score: Flag = False,
    peer: Flag = False,
    rounds: int = 8,
    tolerance: float | None = None,
    json: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    compare: Annotated[str | None, tyro.conf.arg(metavar="OLD.json")] = None,
    quiet: Flag = False,
) -> None:
    """Measure how fast a method trains and scores on this device: compile, transfer, compute and metrics apart.

    Args:
      method: name of a method (see `jaxad list`), or all.
      preset: named settings of the method; its default on this device if not given.
      image_size: pixels a side, or HEIGHTxWIDTH; the preset's if not given.
      batch: batch sizes with commas between; 1, 8, 32 and 128 if not given, as far as the method's settings allow them.
      dtype: float32, bfloat16, or both with a comma between.
      train: training only, unless --score is given too.
      score: scoring only, unless --train is given too.
      peer: race against the PyTorch versions in benchmarks/peers of a checkout.
      rounds: of every case; each gives one ratio.
      tolerance: largest difference to the slow reference that is believed, of its largest magnitude; that of device
        and dtype if not given. A step that is a training run itself needs more, since it amplifies rounding.
      json: file for the record.
      compare: an older record; prints what changed and exits with 1 if jaxad is slower by more than the noise.
      quiet: print nothing.
    """
    status = measure(
        method,
        preset=preset,
        image_size=image_size,
        batch=batch,
        dtype=dtype,
        train=train,
        score=score,
        peer=peer,
        rounds=rounds,
        tolerance=tolerance,
        json_file=json,
        compare=compare,
        quiet=quiet,
    )
    if status:
        sys.exit(status)
