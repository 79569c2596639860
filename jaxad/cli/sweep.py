"""The verb for ablations: sweep."""

from __future__ import annotations

import os
import pathlib
import shlex
import sys
from typing import Any

import tyro

from jaxad.cli.app import Flag, app, parse_size
from jaxad.console import Console

_INTERRUPTED = 130


@app.command(name="sweep")
def sweep(
    method: tyro.conf.Positional[str],
    *,
    data: tyro.conf.UseAppendAction[list[str]] = [],  # noqa: B006 - here and below: tyro copies it
    normal_class: str | None = None,
    seeds: str = "8",
    grid: tyro.conf.UseAppendAction[list[str]] = [],  # noqa: B006
    preset: str | None = None,
    set: tyro.conf.UseAppendAction[list[str]] = [],  # noqa: A002, B006
    metric: str | None = None,
    base: str | None = None,
    layout: str | None = None,
    image_size: str | None = None,
    holdout: float | None = None,
    labels_per_type: int | None = None,
    clip_stride: int | None = None,
    fpr: float | None = None,
    mesh: str | None = None,
    members: int | None = None,
    workers: int = 0,
    out: str | None = None,
    quiet: Flag = False,
) -> None:
    """Train and measure seeds x settings x data sets, many in one compiled program; prints a table, leaves a report.

    The same command with the same --out goes on where it was stopped.

    Args:
      method: name of a method (see `jaxad list`).
      data: as for train; may be repeated, which makes the data an axis of the table.
      normal_class: the class that is normal, for sets of classes; several with commas are an axis too.
      seeds: how many, such as 8, or which, such as 0,3,5.
      grid: field=value,value of the method's config; may be repeated, all combinations are run.
      preset: named settings of the method (see `jaxad list`).
      set: field=value of the method's config, for all members; may be repeated.
      metric: what is compared, such as aupro; the image AUROC, or the first that is defined, if not given.
      base: the cell that others are compared with, such as learning_rate=1e-4,num_items=500; the first if not given.
      layout: how the pictures are arranged, if it is not recognised.
      image_size: pixels a side, or HEIGHTxWIDTH; the preset's if not given.
      holdout: share of the normal training pictures kept for the threshold.
      labels_per_type: anomalous test pictures of each type that training may use, and testing may not.
      clip_stride: frames between the starts of clips, for videos; 1 if not given.
      fpr: share of normal pictures that may be called anomalous.
      mesh: devices, such as run=4,data=2; run spreads members, data splits batches; all over members if not given.
        Without workers only: each of them spreads its members over an equal part of its machine.
      members: at most so many at a time; as many as the memory takes if not given.
      workers: processes to hand groups of members to, over ray; 0 computes here.
      out: folder of the sweep; a new one below runs/ if not given.
      quiet: print nothing.
    """
    from jaxad import distributed, files
    from jaxad.members import use_all_cores

    distributed.check_alone("sweep")
    use_all_cores()
    if workers:  # else this process, which computes nothing, takes most of the memory of an accelerator beforehand
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    console = Console(quiet)
    given = {"layout": layout, "image_size": parse_size(image_size), "holdout": holdout, "clip_stride": clip_stride}
    given |= {"preset": preset, "fpr": fpr, "labels_per_type": labels_per_type}
    request = _request(method, data or ["synthetic"], normal_class, seeds, grid, set, given)
    name = f"sweep-{method}-{pathlib.PurePath(request.data[0]).name.replace(':', '-')}"
    folder = pathlib.Path(out) if out else files.free_folder(pathlib.Path("runs"), name)
    _check_workers(workers, members)
    try:
        from jaxad.sweep import Limits, run_request

        limits = Limits(mesh=_mesh(mesh), members=members)
        run_request(request, folder, metric=metric, base=base, limits=limits, workers=workers, console=console)
    except KeyboardInterrupt:
        console.close()
        if not (folder / "sweep.json").exists():
            raise  # nothing to go on with
        again = shlex.join(["jaxad", *sys.argv[1:], *([] if out else ["--out", str(folder)])])
        print(f"interrupted; go on with: {again}", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    console.say(f"Look at {folder / 'report.html'}")


def _request(method: str, data: list[str], normal_class: str | None, seeds: str, grid, assignments, given) -> Any:
    from jaxad import settings
    from jaxad.sweep import grid as axes

    given = {name: value for name, value in given.items() if value is not None}
    base = settings.from_json({"method": method, **given, "config": settings.parse_assignments(assignments)})
    doubled = [field for field in axes.parse_grid(grid) if field in base.config]
    if doubled:
        raise ValueError(
            f"{doubled[0]} is in --grid and in --set; expected it in one of them. Drop --set {doubled[0]}."
        )
    classes: tuple[str | None, ...] = (None,)
    if normal_class is not None:
        classes = tuple(part.strip() for part in normal_class.split(",") if part.strip())
    return axes.Request(base, tuple(data), classes, axes.parse_grid(grid), axes.parse_seeds(seeds))


def _mesh(text: str | None) -> Any:
    if text is None:
        return None
    from jaxad import shard

    sizes = shard.parse_mesh(text)
    return shard.make_mesh(run=sizes["run"], data=sizes["data"])


def _check_workers(workers: int, members: int | None) -> None:
    if workers < 0 or (members is not None and members < 1):
        raise ValueError(
            f"--workers {workers}, --members {members}; expected at least 0 workers and 1 member at a time. "
            "Leave them out to compute here, as many at a time as the memory takes."
        )
