"""The data of many members on the device: pictures that several members share are held once.

Each member reads the data of its own lone run: another seed holds out other pictures, another class counts others as
normal. So a source becomes a pool of distinct pictures and, for each data set, the rows that make it up.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxad import metrics
from jaxad.core import Source, Spec, spec_of
from jaxad.data import Dataset, load
from jaxad.measure import sample_labels, sample_masks
from jaxad.settings import Settings
from jaxad.sweep.member import Truth


class Part(NamedTuple):
    """One source of one data set: which pictures of its pool it is made of."""

    kind: tuple  # what sources must agree in to be stacked; names the pool
    rows: np.ndarray  # (N,) int32 pictures of the pool; of clips, their first frames


class Loaded(NamedTuple):
    """What is kept of a data set on the host."""

    parts: dict[str, Part]
    spec: Spec
    labels: np.ndarray  # (N,) of the test samples; empty without any
    groups: tuple[str, ...]  # the test samples' videos
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def kinds(self) -> tuple:
        """What data sets must agree in to be stacked."""
        return tuple(part.kind for part in self.parts.values())


class _Pool:
    """Distinct pictures of one kind."""

    def __init__(self) -> None:
        self.where: dict[bytes, int] = {}
        self.columns: dict[str, list[np.ndarray]] = {}
        self.size = 0

    def add(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of pictures, (n,) each column's; those that are there already are not added."""
        rows = np.empty(len(columns["label"]), np.int32)
        for i in range(len(rows)):
            digest = _digest([values[i] for values in columns.values()])
            if digest not in self.where:
                self.where[digest] = self._append({name: values[i : i + 1] for name, values in columns.items()})
            rows[i] = self.where[digest]
        return rows

    def add_run(self, columns: dict[str, np.ndarray]) -> int:
        """Where a run of frames, which must stay neighbours, begins."""
        digest = _digest(list(columns.values()))
        if digest not in self.where:
            self.where[digest] = self._append(columns)
        return self.where[digest]

    def _append(self, columns: dict[str, np.ndarray]) -> int:
        first = self.size
        for name, values in columns.items():
            self.columns.setdefault(name, []).append(np.array(values))
        self.size += len(columns["label"])
        return first

    def gather(self, rows: np.ndarray | None) -> dict[str, np.ndarray]:
        """The columns at some rows; all if None."""
        whole = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        self.columns = {name: [values] for name, values in whole.items()}
        return whole if rows is None else {name: values[rows] for name, values in whole.items()}


def _digest(values: Sequence[np.ndarray]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.digest()


class Library:
    """Loads the data sets of a sweep, each once, and keeps each distinct picture once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple, Loaded] = {}
        self._pools: dict[tuple, _Pool] = {}

    @staticmethod
    def key(chosen: Settings) -> tuple:
        """What a lone run with these settings would load."""
        return chosen.data, chosen.seed, tuple(sorted((k, str(v)) for k, v in chosen.load_arguments().items()))

    def get(self, chosen: Settings) -> Loaded:
        """The data that a lone run with these settings has. Raises what `jaxad.load` does."""
        key = self.key(chosen)
        if key not in self._loaded:
            self._loaded[key] = self._keep(load(chosen.data, seed=chosen.seed, **chosen.load_arguments()))
        return self._loaded[key]

    def _keep(self, data: Dataset) -> Loaded:
        parts = {name: self._part(name, source, data) for name, source in data.sources.items()}
        training = {name: source for name, source in data.sources.items() if name != "test"}
        spec = spec_of(training)
        test = data.sources.get("test")
        labels = np.zeros(0, np.int32) if test is None else sample_labels(test)
        groups = data.rows["test"].groups if test is not None else ()
        return Loaded(parts, spec, labels, groups, data.notes, data.fingerprint)

    def _part(self, name: str, source: Source, data: Dataset) -> Part:
        columns = {"image": np.asarray(source.image), "label": np.asarray(source.label, np.int32)}
        if source.mask is not None:
            columns["mask"] = np.asarray(source.mask)
        if name == "test" and source.mask is not None and any(data.rows["test"].has_mask):
            columns |= _truth(source, np.asarray(data.rows["test"].has_mask))
        is_clip = source.start is not None
        kind = name, source.image.shape[1:], tuple(columns), is_clip and (source.clip, source.target)
        pool = self._pools.setdefault(kind, _Pool())
        if is_clip:
            return Part(kind, (np.asarray(source.start) + pool.add_run(columns)).astype(np.int32))
        return Part(kind, pool.add(columns))

    def stack(self, sets: Sequence[Loaded], place: Callable[[Any, Any], Any]) -> Stack:
        """Data sets of the same kinds as one.

        Args:
          sets: D of them.
          place: puts arrays on the device, as `Programs.place`.
        """
        sources, truth = {}, None
        for name, first in sets[0].parts.items():
            rows = [each.parts[name].rows for each in sets]
            clip = first.kind[3]
            used = None if clip else np.unique(np.concatenate(rows))
            columns = self._pools[first.kind].gather(used)
            local = [part if used is None else np.searchsorted(used, part).astype(np.int32) for part in rows]
            sources[name] = _Shared(
                place({key: columns[key] for key in ("image", "label", "mask") if key in columns}, None), local, clip
            )
            if "weights" in columns:
                truth = Truth(*place((columns["weights"], columns["trusted"]), None))
        return Stack(sources, truth)


def _truth(source: Source, has_mask: np.ndarray) -> dict[str, np.ndarray]:
    """Weights and trust of the stored pictures; of clips, those of the frames that are targets."""
    weights = metrics.label_regions(sample_masks(source))
    if source.start is None:
        return {"weights": weights, "trusted": has_mask}
    frames = np.asarray(source.start) + source.target
    whole = np.zeros(np.asarray(source.mask).shape, np.float32)
    trusted = np.zeros(len(whole), bool)
    whole[frames], trusted[frames] = weights, has_mask
    return {"weights": whole, "trusted": trusted}


class _Shared(NamedTuple):
    columns: dict[str, Any]  # of the pool, on the device
    rows: list[np.ndarray]  # of each data set, or its clips' first frames
    clip: Any  # (frames, target), or False


@dataclasses.dataclass(frozen=True)
class Stack:
    """Pools on the device, and which of their rows make up each of D data sets."""

    sources: dict[str, _Shared]
    truth: Truth | None

    def choose(self, which: Sequence[int], place: Callable[[Any, Any], Any]) -> dict[str, Source]:
        """The sources of K members, whose data sets have the numbers `which`; stacked where data sets differ."""
        return {name: self._source(shared, list(which), place) for name, shared in self.sources.items()}

    def _source(self, shared: _Shared, which: list[int], place: Callable[[Any, Any], Any]) -> Source:
        longest = max(map(len, shared.rows))
        sizes = np.asarray([len(shared.rows[d]) for d in which], np.int32)
        parts: dict[str, Any] = {}
        if any(len(rows) < longest for rows in shared.rows):
            parts["size"] = place(sizes, 0)
        field = "start" if shared.clip else "rows"
        if "size" not in parts and all(np.array_equal(shared.rows[0], rows) for rows in shared.rows):
            own = shared.rows[0]
            if shared.clip or not np.array_equal(own, np.arange(len(shared.columns["label"]))):
                parts[field] = place(own, None)
        else:
            parts[field] = place(np.stack([np.resize(shared.rows[d], longest) for d in which]), 0)
        clip, target = shared.clip or (1, 0)
        return Source(
            mask=shared.columns.get("mask"),
            clip=clip,
            target=target,
            **parts,
            **{key: shared.columns[key] for key in ("image", "label")},
        )
