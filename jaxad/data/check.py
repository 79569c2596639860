"""Looks through a data set without training on it: what is there, what will be used how, what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from jaxad.data import build, decode, loading, split
from jaxad.data.dataset import DataError
from jaxad.data.records import ROLES, Plan, Record


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found. `str(report)` is for people."""

    where: str
    layout: str  # "" if none was recognised
    counts: Mapping[str, Mapping[str, int]]  # source -> "normal", "anomalous", "unknown", "masks"
    defects: Mapping[str, int]  # defect type -> pictures, in all sources
    sizes: Mapping[tuple[int, int], int]  # (width, height) -> pictures
    modes: Mapping[str, int]  # Pillow's name of the pixel format -> pictures
    notes: tuple[str, ...]  # what is skipped or assumed
    problems: tuple[str, ...]  # what keeps the data from being loaded; each names a file

    def __str__(self) -> str:
        lines = [f"{self.where}: layout {self.layout or 'not recognised'}"]
        if self.counts:
            columns = ("normal", "anomalous", "unknown", "masks")
            lines.append("  ".join(["  source   ", *(f"{column:>9}" for column in columns)]))
            for source, numbers in self.counts.items():
                lines.append("  ".join([f"  {source:9}", *(f"{numbers[column]:9d}" for column in columns)]))
        if self.defects:
            lines.append("  defects: " + ", ".join(f"{name} {n}" for name, n in self.defects.items()))
        if self.sizes:
            lines.append(f"  sizes (width x height): {_sizes(self.sizes)}")
            lines.append("  pixels: " + ", ".join(f"{_MODES.get(name, name)} ({n})" for name, n in self.modes.items()))
        for title, items in (("notes", self.notes), ("problems", self.problems)):
            lines += [f"  {title}:", *(f"    - {item}" for item in items)] if items else []
        lines.append(f"  {len(self.problems) or 'no'} problem{'' if len(self.problems) == 1 else 's'}")
        return "\n".join(lines)


_MODES = {"L": "grey, 8 bits", "RGB": "RGB, 8 bits", "RGBA": "RGB with transparency", "P": "palette", "1": "1 bit"}
_MODES |= {"I;16": "grey, 16 bits", "I;16B": "grey, 16 bits", "I": "grey, 32 bits", "F": "grey, floats"}


def check(
    where: str | os.PathLike,
    *,
    layout: str | None = None,
    normal_class: int | str | None = None,
    holdout: float = 0.1,
    seed: int = 0,
) -> Report:
    """Reads every picture and mask once and reports what `load` with the same arguments would make of them.

    Never raises for what is wrong with the data: that is in `problems`, all of it, where `load` stops at the first.
    """
    try:
        plan = loading.plan(where, layout=layout, normal_class=normal_class)
    except DataError as error:
        return Report(str(where), "", {}, {}, {}, {}, (), (str(error),))
    problems, notes = list(plan.problems), list(plan.notes)
    read: list[tuple[Record, dict[str, Any]]] = []
    for found in decode.in_threads(lambda record: _inspect(plan, record), plan.records):
        if isinstance(found, str):
            problems.append(found)
        else:
            read.append(found)
    records, facts = [record for record, _ in read], [fact for _, fact in read]
    roles: list[str] = []
    try:
        origin = plan.store.where("").rstrip("/")
        roles, more = split.roles(records, holdout=holdout, seed=seed, clip=1, origin=origin)
        notes += [*more, *build.remarks(records, facts)]
    except DataError as error:
        problems += [] if problems else [str(error)]
    return Report(
        where=str(where),
        layout=plan.layout,
        counts=_count(records, roles),
        defects=dict(sorted(collections.Counter(r.defect for r in records if r.label == 1).items())),
        sizes=dict(collections.Counter(fact["size"][::-1] for fact in facts).most_common()),
        modes=dict(collections.Counter(fact["mode"] for fact in facts).most_common()),
        notes=tuple(notes),
        problems=tuple(dict.fromkeys(problems)),
    )


def _inspect(plan: Plan, record: Record) -> tuple[Record, dict[str, Any]] | str:
    """The settled record and its facts, or what is wrong with it."""
    try:
        _, facts = decode.full_picture(plan.store, record.file)
        known = {**dataclasses.asdict(facts), "defect_pixels": None}
        if record.masks:
            marked, _ = decode.mask(plan.store, record.masks, plan.store.where(record.file), facts.size)
            known["defect_pixels"] = int(marked.sum())
        return build.settle(plan, record, known), known
    except DataError as error:
        return str(error)


def _count(records: list[Record], roles: list[str]) -> dict[str, dict[str, int]]:
    found = {}
    for source in ROLES:
        mine = [record for record, role in zip(records, roles, strict=False) if role == source]
        if mine:
            labels = collections.Counter(record.label for record in mine)
            found[source] = {"normal": labels[0], "anomalous": labels[1], "unknown": labels[-1]}
            found[source]["masks"] = sum(bool(record.masks) for record in mine)
    return found


def _sizes(sizes: Mapping[tuple[int, int], int]) -> str:
    shown = [f"{width} x {height} ({n})" for (width, height), n in sizes.items()]
    if len(shown) <= 4:
        return ", ".join(shown)
    widths, heights = zip(*sizes, strict=True)
    return f"{len(shown)} different, {min(widths)}-{max(widths)} x {min(heights)}-{max(heights)}"
