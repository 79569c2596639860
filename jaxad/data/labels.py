"""A few anomalous test pictures given to training with their masks, and kept out of every evaluation.

Which ones depends on their names and a seed only, not on the method or the picture's size: methods that learn from them
and methods that do not are measured on the same pictures that remain, if both load the data with the same arguments.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib

import numpy as np

from jaxad.data.dataset import Dataset, Rows
from jaxad.data.records import count


def move_labelled(dataset: Dataset, *, per_type: int = 0, total: int | None = None, seed: int = 0) -> Dataset:
    """Moves some anomalous test pictures with masks to the source "labelled".

    Args:
      dataset: as loaded, with NumPy arrays inside.
      per_type: pictures of each defect type, of which at least one stays in the test set; 0 for as many as there are,
        if `total` is given.
      total: at most so many in all, spread evenly over the types; None: no limit.
      seed: of the draw.

    Returns:
      The data set. It is as it was if neither is asked for, if it has labelled pictures of its own, which win, or if
      there are none to take: no type of defect with two test pictures and their masks, or clips instead of pictures.

    Raises:
      ValueError: a negative number.
    """
    if per_type < 0 or (total is not None and total < 0):
        raise ValueError(
            f"labels_per_type={per_type}, labels_total={total}; expected at least 0. Pass labels_per_type=5."
        )
    test, rows = dataset.sources.get("test"), dataset.rows.get("test")
    if (
        not (per_type or total)
        or "labelled" in dataset.sources
        or test is None
        or rows is None
        or test.start is not None
    ):
        return dataset
    chosen = _choose(rows, np.asarray(test.label), per_type, total, seed)
    if not chosen:
        return dataset
    kept = np.setdiff1d(np.arange(len(rows)), chosen)
    taken = np.asarray(chosen)
    sources, facts = dict(dataset.sources), dict(dataset.rows)
    for role, some in (("test", kept), ("labelled", taken)):
        mask = None if test.mask is None else test.mask[some]
        sources[role] = dataclasses.replace(test, image=test.image[some], label=test.label[some], mask=mask)
        facts[role] = Rows(*(tuple(values[i] for i in some) for values in dataclasses.astuple(rows)))
    note = (
        f"{count([rows.files[i] for i in taken], 'anomalous test picture')} of "
        f"{len({rows.defects[i] for i in taken})} types, drawn by seed, are labelled: for training, not for testing."
    )
    digest = hashlib.sha256(f"{dataset.fingerprint} {sorted(facts['labelled'].files)}".encode()).hexdigest()
    notes, fingerprint = (*dataset.notes, note), digest[: len(dataset.fingerprint)]
    return dataclasses.replace(dataset, sources=sources, rows=facts, notes=notes, fingerprint=fingerprint)


def _choose(rows: Rows, label: np.ndarray, per_type: int, total: int | None, seed: int) -> list[int]:
    """Test rows to label, ascending: of each type in the order of a draw that each file has to itself."""
    types = collections.defaultdict(list)
    for i in np.flatnonzero((label == 1) & np.asarray(rows.has_mask)):
        types[rows.defects[i]].append(int(i))
    ranked = []
    for members in types.values():
        drawn = sorted(members, key=lambda i: _draw(seed, rows.files[i]))
        most = len(drawn) - 1
        ranked += [(rank, _draw(seed, rows.files[i]), i) for rank, i in enumerate(drawn[: min(per_type or most, most)])]
    return sorted(i for _, _, i in sorted(ranked)[:total])


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"labelled:{seed}:{name}".encode("utf-8", "surrogateescape")).hexdigest()
