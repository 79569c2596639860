"""A sweep from a request to its table and report."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxad import methods, settings, shard
from jaxad.console import Console
from jaxad.core import Method
from jaxad.sweep import stats
from jaxad.sweep.engine import Group, Limits, compute_group, groups_of
from jaxad.sweep.folder import Folder
from jaxad.sweep.grid import Member, Request, find_cell, members_of, python_value
from jaxad.sweep.stack import Library

_IN_ORDER = ("ordered_auroc", "ordered_auroc_video_protocol")
_OF_VIDEOS = ("image_auroc_video_protocol", *_IN_ORDER)
# What cells may be compared by, all of them better the higher. The first that is defined is the default.
METRICS = (
    *("image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro", "aupro_005"),
    *("image_auroc_of_map_max", "image_auroc_of_map_mean", *_OF_VIDEOS),
)


def run(
    method: str,
    data: str | Sequence[str] = "synthetic",
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int | Sequence[int] = 8,
    normal_class: int | str | Sequence[int | str] | None = None,
    out: str | os.PathLike | None = None,
    metric: str | None = None,
    base: str | None = None,
    limits: Limits | None = None,
    workers: int = 0,
    console: Console | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Trains and measures every combination of the grid with every seed on every data set, many in one program.

    A member's row equals what `jaxad train` with its settings and seed reports.

    Args:
      method: its name.
      data: a path or name for `jaxad.load`, or several.
      grid: values for fields of the method's config.
      seeds: how many (from 0 on), or which.
      normal_class: the class that is normal, for sets of classes, or several.
      out: folder for the table and the report; results that are in it already are not computed again. None writes
        nothing.
      metric: what cells are compared by; the first of `METRICS` that is defined if None.
      base: the cell that others are compared with, such as "learning_rate=1e-4"; the first if None.
      limits: how members are computed together.
      workers: processes to hand groups to, over ray; 0 computes here.
      console: where to show progress.
      **options: further fields of `Settings` (preset, image_size, holdout, fpr, ...); others are fields of the
        method's config, such as steps=500, the same for all members.

    Returns:
      The table: a dict for each member, its axes, seed and measures.

    Raises:
      ValueError: settings or data that cannot work, a metric that the table would not have, a folder that holds
        something else.
    """
    seeds, normal_class, options = python_value(seeds), python_value(normal_class), python_value(options)
    fields = {field.name for field in dataclasses.fields(settings.Settings)} - {"method", "data", "config"}
    chosen = {name: value for name, value in options.items() if name in fields}
    config = {name: value for name, value in options.items() if name not in fields}
    several = normal_class if isinstance(normal_class, tuple) else (normal_class,)
    request = Request(
        base=settings.Settings(method=method, config=config, **chosen),
        data=(data,) if isinstance(data, str) else tuple(data),
        normal_classes=tuple(several),
        grid={name: tuple(map(python_value, values)) for name, values in (grid or {}).items()},
        seeds=tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds),
    )
    return run_request(request, out, metric=metric, base=base, limits=limits, workers=workers, console=console)


def run_request(
    request: Request,
    out: str | os.PathLike | None = None,
    *,
    metric: str | None = None,
    base: str | None = None,
    limits: Limits | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """`run` of a request."""
    console, limits = console or Console(quiet=True), limits or Limits()
    if jax.process_count() > 1:
        raise ValueError(
            f"sweep: jax runs in {jax.process_count()} processes; expected one. Start it once and pass --workers N."
        )
    if workers and limits.mesh is not None:
        raise ValueError(
            f"--mesh with --workers {workers}: a mesh is of the devices here, and workers have others; expected one of "
            "the two. Leave --mesh out: each worker spreads its members over all devices that it has."
        )
    method = methods.get(request.base.method)
    if metric is not None:
        _check_metric(metric, method)
    # Named now: the default depends on the device, and workers, or a later start that goes on, may have another one.
    preset = request.base.preset or settings.default_preset(method)
    request = dataclasses.replace(request, base=dataclasses.replace(request.base, preset=preset))
    members = members_of(method, request)
    base_cell = find_cell(members, base)
    if limits.mesh is not None:
        for member in members:
            shard.check_batches(method.phases(member.cfg), limits.mesh)
    library = Library()
    groups = _plan(method, members, library, console)
    if metric is not None:
        _check_videos(metric, members, library)
    folder = Folder(pathlib.Path(out) if out is not None else None)
    fingerprints = {_data_key(member): library.get(member.settings).fingerprint for member in members}
    folder.open(request, fingerprints, [[member.index for member in group.members] for group in groups])
    _announce(request, members, groups, folder, console)
    left = [group._replace(members=[m for m in group.members if m.index not in folder.done]) for group in groups]
    left = [group for group in left if group.members]
    if workers:
        from jaxad.sweep.workers import compute_groups

        compute_groups(request, left, folder.add, limits=limits, workers=workers, console=console)
    else:
        for group in left:
            for finished in compute_group(method, group, library, limits=limits, console=console):
                folder.add(finished.rows)
    table = folder.table()
    chosen = metric or next((name for name in METRICS if any(row.get(name) is not None for row in table)), METRICS[0])
    remark = folder.write_table()
    if remark:
        console.say(remark)
    if folder.path is not None:
        from jaxad.sweep.report import write_sweep_report

        notes = dict.fromkeys(note for member in members for note in library.get(member.settings).notes)
        write_sweep_report(
            folder.path / "report.html", table, request=request, axes=axes_of(members), metric=chosen, base=base_cell,
            notes=list(notes),
        )  # fmt: skip
    console.table(summary_rows(table, axes_of(members), chosen))
    return table


def axes_of(members: Sequence[Member]) -> list[str]:
    """Names of the columns that name a cell."""
    return list(members[0].axes)


def summary_rows(table: Sequence[Mapping[str, Any]], axes: Sequence[str], metric: str) -> list[dict[str, Any]]:
    """A row for each cell: its axes, the seeds with a result, mean and half width of the interval of a metric."""
    rows = []
    for cell, by_seed in stats.cells_of(table, axes, metric).items():
        summary = stats.summarise(list(by_seed.values()))
        name = metric.replace("_", " ")
        found = {"seeds": summary.number, name: summary.mean, "± 95%": summary.half}
        rows.append({**dict(zip(axes, cell, strict=True)), **found})
    return rows


def _data_key(member: Member) -> str:
    chosen = member.settings
    name = chosen.data if chosen.normal_class is None else f"{chosen.data} class {chosen.normal_class}"
    return f"{name} seed {chosen.seed}"


def _plan(method: Method, members: list[Member], library: Library, console: Console) -> list[Group]:
    """Loads all data, checks all members and splits them into groups."""
    different = {library.key(member.settings): member.settings for member in members}
    for done, chosen in enumerate(different.values()):
        console.progress("load data", done, len(different))
        library.get(chosen)
    console.progress("load data", len(different), len(different))
    console.close()
    for member in members:
        method.check(member.cfg, library.get(member.settings).spec)
    return groups_of(method, members, library)


def _check_metric(metric: str, method: Method) -> None:
    """Refuses a measure that the method's table cannot have. Raises ValueError."""
    if metric not in METRICS:
        raise ValueError(f"--metric {metric!r} is unknown; expected one of {', '.join(METRICS)}. Pass --metric aupro.")
    if metric in _IN_ORDER and method.ordered is None:
        raise ValueError(
            f"--metric {metric!r} is of methods that adapt to samples in order, and {method.name!r} scores each by "
            "itself; expected another measure. Pass --metric image_auroc."
        )


def _check_videos(metric: str, members: Sequence[Member], library: Library) -> None:
    """Refuses a measure of videos where there are none. Raises ValueError."""
    if metric in _OF_VIDEOS and not any(any(library.get(member.settings).groups) for member in members):
        raise ValueError(
            f"--metric {metric!r} is of frames of videos, and no test sample is one; expected another measure. "
            "Pass --metric image_auroc."
        )


def _announce(request: Request, members: list[Member], groups: list[Group], folder: Folder, console: Console) -> None:
    cells = len({tuple(member.axes.items()) for member in members})
    seeds = len(request.seeds)
    console.say(
        f"{request.base.method} ({members[0].settings.preset}): {_count(len(members), 'member')} = "
        f"{_count(cells, 'cell')} x {_count(seeds, 'seed')}, in {_count(len(groups), 'group')}, "
        f"compiled once{' each' if len(groups) > 1 else ''}; {jax.devices()[0].device_kind}"
    )
    if folder.done:
        console.say(f"{len(folder.done)} members are done already and not computed again")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
