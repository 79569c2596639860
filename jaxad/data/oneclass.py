"""The one-class protocols: of a classification set one class is normal, every other one anomalous.

`normal_class` is a class's name or number, with options behind colons:
  * "8": train on the training part's 8s, test on the whole test part (heavily anomalous).
  * "8:balanced": of the other classes' test pictures as many as there are of 8s. "8:10%": so many that they make 10 %.
  * "8:folds": training and test part are pooled and each class is cut into five folds; three are for training, one is
    the holdout, one is for testing, of the other classes too (Fashion-MNIST in several papers, with "10%" to "50%").
  * "all": every class is normal; for tests with corrupted pictures.
Draws depend on file names only, so that every seed of training meets the same test set.
"""

from __future__ import annotations

import collections
import difflib
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxad.data.dataset import DataError
from jaxad.data.records import UNDECIDED, Plan, Record

ALL = "all"
_FOLDS = ("train", "train", "train", "holdout", "test")


class Protocol(NamedTuple):
    """Which class is normal, and which pictures are tested on."""

    normal: str | None  # None: every class
    percent: int | None = None  # of the test pictures that are anomalous; None: all there are
    is_pooled: bool = False


def parse(origin: str, normal_class: int | str | None, classes: Sequence[str]) -> Protocol:
    """Reads `normal_class`.

    Args:
      origin: the data set, for messages.
      normal_class: see above; a class's name goes before its number.
      classes: names in order.

    Raises:
      DataError: it is missing, not among the classes, or has an option that does not exist.
    """
    shown = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    if normal_class is None:
        raise DataError(
            f"{origin}: holds {len(classes)} classes ({shown}) and nothing says which is normal. "
            f"Pass normal_class (--normal-class {classes[0]})."
        )
    text = str(normal_class)
    name, *options = [text] if text in classes else text.split(":")
    percent, is_pooled = None, False
    for option in options:
        number = option.removesuffix("%")
        if option == "folds":
            is_pooled = True
        elif option == "balanced":
            percent = 50
        elif option.endswith("%") and number.isdecimal() and 0 < int(number) < 100:
            percent = int(number)
        else:
            raise DataError(
                f"{origin}: normal_class {text!r} has the option {option!r}; expected 'balanced', a share such as "
                f"'10%', or 'folds'. Pass --normal-class {name}:balanced."
            )
    return Protocol(_name_of(origin, name, classes, shown), percent, is_pooled)


def _name_of(origin: str, name: str, classes: Sequence[str], shown: str) -> str | None:
    if name in classes:
        return name
    if name == ALL:
        return None
    if name.isdecimal() and int(name) < len(classes):
        return classes[int(name)]
    near = difflib.get_close_matches(name, classes, 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    raise DataError(
        f"{origin}: has no class {name if name.isdecimal() else repr(name)}; expected one of {shown}, or '{ALL}'.{hint}"
    )


def choose(plan: Plan, pictures: Iterable[tuple[str, str, str]], protocol: Protocol) -> list[str]:
    """Fills a plan by a protocol.

    Args:
      plan: gets records and notes.
      pictures: (name, role, class) each.
      protocol: as from `parse`.

    Returns:
      The names that the protocol leaves out.

    Raises:
      DataError: a share of anomalous pictures is asked for where no normal ones are for testing.
    """
    pictures = list(pictures)
    if protocol.is_pooled:
        pictures = _in_folds(pictures)
    if protocol.normal is None:
        plan.records.extend(Record(name, role, 0, "good") for name, role, _ in pictures)
        plan.notes.append("Every class is normal.")
        return []
    normal = [(name, role) for name, role, kind in pictures if kind == protocol.normal]
    others = [(name, role, kind) for name, role, kind in pictures if kind != protocol.normal]
    tested = {name: kind for name, role, kind in others if role in ("test", UNDECIDED)}
    training = len(others) - len(tested)
    if protocol.percent is not None:
        inliers = sum(role == "test" for _, role in normal)
        if not inliers:
            raise DataError(
                f"{plan.store.where('').rstrip('/')}: no test pictures of '{protocol.normal}', so no number for "
                f"anomalous ones to match. Pass normal_class={protocol.normal}:folds:{protocol.percent}%."
            )
        wanted = inliers * protocol.percent // (100 - protocol.percent)
        tested = {name: tested[name] for name in _drawn(tested)[:wanted]}
        plan.notes.append(f"{len(tested)} anomalous test pictures for {inliers} normal ones, drawn by name.")
    roles = {name: role for name, role, _ in pictures}
    chosen = {name: Record(name, role, 0, "good") for name, role in normal}
    chosen |= {name: Record(name, roles[name], 1, kind) for name, kind in tested.items()}
    plan.records.extend(chosen[name] for name, _, _ in pictures if name in chosen)
    plan.notes.append(f"One-class protocol: '{protocol.normal}' is normal, every other class anomalous.")
    if training:
        plan.notes.append(f"{training} training pictures of other classes are left out, as the protocol says.")
    return [name for name, _, _ in pictures if name not in chosen]


def _in_folds(pictures: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Roles by fold; what is left over when a class is cut into five is for training."""
    by_class = collections.defaultdict(list)
    for name, _, kind in pictures:
        by_class[kind].append(name)
    roles = {}
    for names in by_class.values():
        size = max(1, len(names) // len(_FOLDS))
        for place, name in enumerate(_drawn(names)):
            fold = place // size
            roles[name] = _FOLDS[fold] if fold < len(_FOLDS) else "train"
    return [(name, roles[name], kind) for name, _, kind in pictures]


def _drawn(names: Iterable[str]) -> list[str]:
    """The names in an order that looks random and depends on nothing but each of them."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
