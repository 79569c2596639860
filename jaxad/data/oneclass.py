"""The one-class protocol: one class of a classification set is normal, every other one anomalous."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from jaxad.data.dataset import DataError
from jaxad.data.records import UNDECIDED, Plan, Record


def normal_index(origin: str, normal_class: int | str | None, classes: Sequence[str]) -> int:
    """The place of the normal class among the classes, given by name or by place.

    Raises:
      DataError: it is missing or not among them.
    """
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    if normal_class is None:
        raise DataError(
            f"{origin}: holds {len(classes)} classes ({shown}) and nothing says which is normal. "
            f"Pass normal_class (--normal-class {classes[0]})."
        )
    name = str(normal_class)
    if name in classes:
        return list(classes).index(name)
    if name.isdecimal() and int(name) < len(classes):
        return int(name)
    near = difflib.get_close_matches(name, classes, 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise DataError(f"{origin}: has no class {normal_class!r}; expected one of {shown}.{hint}")


def choose(plan: Plan, pictures: Iterable[tuple[str, str, str]], normal: str) -> list[str]:
    """Fills a plan: train on the normal class of the training part, test on all of the test part.

    Args:
      plan: gets records and a note.
      pictures: (name, role, class) each.
      normal: the normal class.

    Returns:
      The names that the protocol leaves out: training pictures of the other classes.
    """
    left_out = []
    for name, role, kind in pictures:
        if kind == normal:
            plan.records.append(Record(name, role, 0, "good"))
        elif role in ("test", UNDECIDED):
            plan.records.append(Record(name, role, 1, kind))
        else:
            left_out.append(name)
    plan.notes.append(f"One-class protocol: '{normal}' is normal, every other class anomalous.")
    if left_out:
        plan.notes.append(f"{len(left_out)} training pictures of other classes are left out, as the protocol says.")
    return left_out
