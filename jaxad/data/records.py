"""What a layout makes of a store: one record a picture, and what it skipped, assumed or found wrong."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

from jaxad.data import files

NORMAL_NAMES = frozenset({"good", "normal", "ok"})
ANOMALOUS_NAMES = frozenset(
    {"anomalous", "anomaly", "anomalies", "abnormal", "bad", "defect", "defects", "defective", "ng"}
)
MASK_NAMES = frozenset({"masks", "mask", "ground_truth", "groundtruth", "gt"})
ROLES = ("train", "holdout", "test", "aux", "labelled")
UNDECIDED = "undecided"  # the role of pictures whose layout does not tell training from test


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture of a data set, before it is read."""

    file: str
    role: str = "train"  # one of ROLES, or UNDECIDED
    label: int | None = 0  # 0 normal, 1 anomalous, -1 unknown, None: anomalous if its mask has a pixel
    defect: str = "good"
    masks: tuple[str, ...] = ()  # several are joined
    group: str = ""  # the video of a frame


@dataclasses.dataclass
class Plan:
    """A layout's reading of a store. `load` raises the first problem, `check` lists them all."""

    layout: str
    store: Any  # see jaxad.data.files
    records: list[Record]
    notes: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)


def defect_name(folder: str) -> tuple[int, str]:
    """A folder's name -> label and defect type."""
    if folder.lower() in NORMAL_NAMES:
        return 0, "good"
    return 1, "anomalous" if folder.lower() in ANOMALOUS_NAMES else folder


def finish(plan: Plan, ignored: Iterable[str] = (), twins: bool = True) -> Plan:
    """Adds what holds for every layout: files left over, two pictures of one name.

    Args:
      plan: with its records.
      ignored: names the layout used otherwise (label files) or explains in a note of its own.
      twins: whether "a.png" beside "a.jpg" is a mistake.
    """
    plan.problems[:0] = plan.store.problems
    used = {record.file for record in plan.records}.union(*(record.masks for record in plan.records), ignored)
    left = [name for name in plan.store.names if name not in used and not files.is_junk(name)]
    pictures = [name for name in left if files.is_picture(name)]
    others = [name for name in left if not files.is_picture(name)]
    if pictures:
        plan.notes.append(
            f"{count(pictures, 'picture')} outside the layout '{plan.layout}', not used: {few(pictures)}."
        )
    if others:
        plan.notes.append(f"{count(others, 'file')} skipped, not pictures: {few(others)}.")
    if twins:
        plan.problems += _twins(plan)
    return plan


def match_masks(plan: Plan, masks: dict[Any, list[str]], key_of) -> None:
    """Gives records their masks by key, notes anomalous ones without, and reports masks that belong to no picture.

    Args:
      plan: its records are replaced.
      masks: key -> mask files.
      key_of: record -> key.
    """
    if not masks:
        return
    left, bare = dict(masks), []
    for i, record in enumerate(plan.records):
        found = left.pop(key_of(record), None)
        if found:
            plan.records[i] = dataclasses.replace(record, masks=tuple(found))
        elif record.label == 1:
            bare.append(record.file)
    for found in left.values():
        plan.problems.append(
            f"{plan.store.where(found[0])}: a mask without its picture (expected the same name as a test picture). "
            "Add the picture or remove the mask."
        )
    if bare:
        plan.notes.append(f"{count(bare, 'anomalous picture')} without a mask, left out of pixel metrics: {few(bare)}.")


def _twins(plan: Plan) -> list[str]:
    """Two pictures of one folder that differ in their ending only: masks and frames could not be told apart."""
    places = collections.defaultdict(list)
    for record in plan.records:
        places[record.file.rpartition("/")[0], files.stem(record.file)].append(record.file)
    return [
        f"{plan.store.where(same[0])}: there is another picture of this name, {same[1]}. Rename or remove one."
        for same in places.values()
        if len(same) > 1
    ]


def count(items: list, noun: str) -> str:
    """A number with its noun, in the plural if need be."""
    return f"{len(items)} {noun}{'s' if len(items) != 1 else ''}"


def few(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
