"""Which sample goes to which source. Choices depend on file names and a seed, not on order or on other files."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

from jaxad.data.dataset import DataError
from jaxad.data.records import UNDECIDED, Record

_TEST_SHARE = 0.2  # of the normal pictures, where a layout has no test part


def roles(
    records: Sequence[Record], *, holdout: float, seed: int, clip: int, origin: str
) -> tuple[list[str], list[str]]:
    """Decides each record's source.

    Args:
      records: in order, with their labels; a video's frames are neighbours.
      holdout: fraction of the training samples to keep apart; 0 for none. A holdout of the layout's own wins.
      seed: of the choices.
      clip: frames a sample needs, where it is a clip; else 1.
      origin: the data set, for messages.

    Returns:
      A source name each, and notes.

    Raises:
      DataError: there is nothing to train on, or too little to keep any apart.
    """
    found, notes = [record.role for record in records], []
    undecided = [i for i, role in enumerate(found) if role == UNDECIDED]
    normal = [i for i in undecided if records[i].label == 0]
    for i in undecided:
        found[i] = "train" if records[i].label == 0 else "test"
    if len(normal) < len(undecided):
        for i in _choose(records, normal, _TEST_SHARE, seed + 1):
            found[i] = "test"
        notes.append(
            f"The layout has no test part: {_TEST_SHARE:.0%} of the normal pictures, chosen by seed, are for testing."
        )
    moved = [i for i, role in enumerate(found) if role in ("train", "holdout") and records[i].label == 1]
    for i in moved:
        found[i] = "labelled"
    if moved:
        notes.append(f"{len(moved)} anomalous training pictures are in the source 'labelled', not in 'train'.")
    train = [i for i, role in enumerate(found) if role == "train"]
    if not train:
        raise DataError(f"{origin}: no normal picture to train on. Add a training part.")
    if holdout and "holdout" not in found:
        for i in _hold_out(records, train, holdout, seed, clip, origin):
            found[i] = "holdout"
    return found, notes


def _hold_out(
    records: Sequence[Record], train: list[int], share: float, seed: int, clip: int, origin: str
) -> list[int]:
    videos = collections.defaultdict(list)
    for i in train:
        videos[records[i].group].append(i)
    enough = 2 * clip if len(videos) == 1 else 2
    if len(train) < enough:
        raise DataError(
            f"{origin}: {len(train)} training pictures, too few to keep some apart for thresholds. "
            "Add more or pass holdout=0."
        )
    if "" in videos:
        return _choose(records, train, share, seed)
    if len(videos) == 1:  # its last frames
        return train[-min(max(clip, round(share * len(train))), len(train) - clip) :]
    chosen: list[int] = []
    for group in sorted(videos, key=lambda group: _draw(seed, group))[:-1]:
        if len(chosen) < share * len(train):
            chosen += videos[group]
    return chosen


def _choose(records: Sequence[Record], candidates: list[int], share: float, seed: int) -> list[int]:
    """A share of the candidates, at least one but not all, by a draw that each file has to itself."""
    drawn = sorted(candidates, key=lambda i: _draw(seed, records[i].file))
    return drawn[: min(max(1, round(share * len(drawn))), max(len(drawn) - 1, 0))]


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).hexdigest()
