"""A plan's pictures, decoded and packed into sources."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxad import distributed
from jaxad.data import cache, decode, split, video
from jaxad.data.dataset import DataError, Dataset, Rows
from jaxad.data.records import ROLES, Plan, Record, count, few

if TYPE_CHECKING:
    from jaxad.core import Source


@dataclasses.dataclass(frozen=True)
class Settings:
    """How samples are made of a plan's pictures. Checked on making."""

    size: tuple[int, int]
    channels: int = 3
    holdout: float = 0.1
    clip: int | None = None
    clip_stride: int = 1
    target: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.size) < 1:
            raise ValueError(f"image_size is {self.size}; expected pixels, at least 1. Pass 256 or (height, width).")
        if self.channels not in (1, 3):
            raise ValueError(f"channels is {self.channels}; expected 1 (grey) or 3 (RGB). Pass channels=3.")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is {self.holdout}; expected a fraction in [0, 1). Pass holdout=0.1.")
        if self.clip is not None and (self.clip < 1 or not 0 <= self.target < self.clip or self.clip_stride < 1):
            raise ValueError(
                f"clip={self.clip}, target={self.target}, clip_stride={self.clip_stride}; expected clip >= 1, "
                "0 <= target < clip and clip_stride >= 1. Pass clip=16, target=8."
            )


def build(plan: Plan, settings: Settings, *, name: str, cached: bool = True) -> Dataset:
    """Reads a plan's pictures (or takes them from the cache) and packs them into sources.

    Raises:
      DataError: for the plan's first problem, or the first file that cannot be used.
    """
    if plan.problems:
        raise DataError(plan.problems[0])
    origin = plan.store.where("").rstrip("/")
    if settings.clip is not None and not all(record.group for record in plan.records):
        raise DataError(
            f"{origin}: layout '{plan.layout}' has no videos to cut clips from. Leave out clip or pass layout='video'."
        )
    _check_memory(plan, settings, origin)
    pixels = _pixels(plan, settings, cached)
    records = [settle(plan, record, fact) for record, fact in zip(plan.records, pixels.facts, strict=True)]
    roles, notes = split.roles(
        records, holdout=settings.holdout, seed=settings.seed, clip=settings.clip or 1, origin=origin
    )
    sources, rows = {}, {}
    for role in ROLES:
        chosen = np.asarray([i for i, other in enumerate(roles) if other == role], np.int64)
        if len(chosen):
            sources[role], rows[role], short = _pack(records, pixels, chosen, settings)
            if short:
                notes.append(f"Videos of {role} with fewer than {settings.clip} frames are left out: {few(short)}.")
            if not len(sources[role]):
                raise DataError(f"{origin}: no video of {role} has {settings.clip} frames. Pass a smaller clip.")
    if "test" not in sources:
        notes.append("There is no test part: nothing to evaluate on.")
    notes = [*plan.notes, *notes, *remarks(records, pixels.facts), *_lost(records, pixels)]
    content = [
        (role, dataclasses.asdict(r), fact["digest"])
        for role, r, fact in zip(roles, records, pixels.facts, strict=True)
    ]
    fingerprint = cache.key_of(decode.VERSION, dataclasses.asdict(settings), content)
    return Dataset(name, plan.layout, sources, rows, tuple(notes), fingerprint)


@dataclasses.dataclass(frozen=True)
class _Pixels:
    """The decoded records of a plan."""

    image: np.ndarray  # (F, H, W, C) uint8
    mask: np.ndarray  # (K, H, W) uint8 0/1, of the records that have masks
    facts: list[dict[str, Any]]  # a record each: digest, remark, defect_pixels as stored (None: no mask)
    mask_row: np.ndarray  # (F,) row in `mask`; -1: none


_Decoded = tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]


def _pixels(plan: Plan, settings: Settings, cached: bool) -> _Pixels:
    """Decodes all records; of several processes each decodes its share and gets the others' over the network."""
    mask_row = np.full(len(plan.records), -1)
    masked = [i for i, record in enumerate(plan.records) if record.masks]
    mask_row[masked] = np.arange(len(masked))
    stamps = [(plan.store.where(n), plan.store.stamp(n)) for r in plan.records for n in (r.file, *r.masks)]
    key = cache.key_of(decode.VERSION, settings.size, settings.channels, stamps)
    if not cached:  # pictures in memory: every process has them
        return _Pixels(*_decode(plan, settings, mask_row, range(len(plan.records))), mask_row)
    mine = distributed.share(len(plan.records))
    image, mask, facts = _cached(plan, settings, mask_row, mine, key)
    return _Pixels(distributed.gather(image), distributed.gather(mask), distributed.gather_facts(facts), mask_row)


def _cached(plan: Plan, settings: Settings, mask_row: np.ndarray, mine: range, key: str) -> _Decoded:
    """Some records decoded: out of the cache, or into it."""
    whole = len(mine) == len(plan.records)
    own = key if whole else cache.key_of(key, [mine.start, mine.stop])
    if (stored := cache.read(own)) is not None:
        return stored[0]["image"], stored[0]["mask"], stored[1]
    if not whole and (stored := cache.read(key)) is not None:
        rows = mask_row[mine.start : mine.stop]
        return (
            stored[0]["image"][mine.start : mine.stop],
            stored[0]["mask"][rows[rows >= 0]],
            stored[1][mine.start : mine.stop],
        )
    image, mask, facts = _decode(plan, settings, mask_row, mine)
    cache.write(own, {"image": image, "mask": mask}, facts)
    return image, mask, facts


def _decode(plan: Plan, settings: Settings, mask_row: np.ndarray, mine: range) -> _Decoded:
    """Some records decoded: pictures (n, H, W, C), masks of those that have one (k, H, W), and a fact each."""
    masked = [i for i in mine if mask_row[i] >= 0]
    image = np.empty((len(mine), *settings.size, settings.channels), np.uint8)
    mask = np.zeros((len(masked), *settings.size), np.uint8)

    def decode_one(i: int) -> dict[str, Any]:
        record = plan.records[i]
        image[i - mine.start], facts = decode.picture(plan.store, record.file, settings.size, settings.channels)
        known: dict[str, Any] = {"digest": facts.digest, "remark": facts.remark, "defect_pixels": None}
        if record.masks:
            marked, digest = decode.mask(plan.store, record.masks, plan.store.where(record.file), facts.size)
            mask[mask_row[i] - mask_row[masked[0]]] = decode.shrink_mask(marked, settings.size)
            known |= {"digest": f"{facts.digest} {digest}", "defect_pixels": int(marked.sum())}
        return known

    return image, mask, list(decode.in_threads(decode_one, list(mine)))


def settle(plan: Plan, record: Record, fact: dict[str, Any]) -> Record:
    """The record with its label decided by its mask where the layout left that open.

    Args:
      plan: of the record, for messages.
      record: to settle.
      fact: what was read: "defect_pixels" of its masks, None without any.

    Raises:
      DataError: the mask of a normal picture marks pixels.
    """
    marked = bool(fact["defect_pixels"])
    if record.label is None:
        return dataclasses.replace(record, label=int(marked), defect=record.defect if marked else "good")
    if record.label == 0 and marked:
        mask, where = plan.store.where(record.masks[0]), plan.store.where(record.file)
        raise DataError(
            f"{mask}: marks {fact['defect_pixels']} pixels, but {where} counts as normal. "
            "Empty the mask or correct the label."
        )
    return record


def _pack(
    records: Sequence[Record], pixels: _Pixels, chosen: np.ndarray, settings: Settings
) -> tuple[Source, Rows, list[str]]:
    """The source and rows of some records, and the videos too short for a clip."""
    from jaxad.core import Source

    mine = [records[i] for i in chosen]
    label = np.asarray([record.label for record in mine], np.int32)
    mask, usable = _masks(pixels, chosen, label)
    start, frames = None, np.arange(len(chosen))
    short: list[str] = []
    if settings.clip is not None:
        start, short = video.starts([record.group for record in mine], settings.clip, settings.clip_stride)
        frames = start + settings.target
    arrays: dict[str, Any] = {"image": _take(pixels.image, chosen), "label": label, "mask": mask, "start": start}
    source = Source(**arrays, clip=settings.clip or 1, target=settings.target)
    rows = Rows(
        files=tuple(mine[i].file for i in frames),
        defects=tuple(mine[i].defect for i in frames),
        groups=tuple(mine[i].group for i in frames),
        has_mask=tuple(bool(usable[i]) for i in frames),
    )
    return source, rows, short


def _masks(pixels: _Pixels, chosen: np.ndarray, label: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Masks (N, H, W) of some records, None if no pixel is marked; and which of them pixel metrics may use."""
    rows = pixels.mask_row[chosen]
    if not pixels.mask[rows[rows >= 0]].any():
        return None, np.zeros(len(chosen), bool)
    mask = np.zeros((len(chosen), *pixels.mask.shape[1:]), np.uint8)
    mask[rows >= 0] = pixels.mask[rows[rows >= 0]]
    return mask, (label == 0) | mask.any(axis=(1, 2))


def _take(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """array[rows], without a copy where the rows are neighbours."""
    first, last = int(rows[0]), int(rows[-1])
    return array[first : last + 1] if last - first + 1 == len(rows) else array[rows]


def remarks(records: Sequence[Record], facts: Sequence[dict[str, Any]]) -> list[str]:
    """Notes on what decoding did, from each record's facts: "remark" and "defect_pixels"."""
    notes, pairs = [], list(zip(records, facts, strict=True))
    for remark in sorted({fact["remark"] for fact in facts} - {""}):
        names = [record.file for record, fact in pairs if fact["remark"] == remark]
        notes.append(f"{count(names, 'picture')}: {remark}: {few(names)}.")
    empty = [record.file for record, fact in pairs if record.label == 1 and fact["defect_pixels"] == 0]
    if empty:
        notes.append(
            f"{count(empty, 'anomalous picture')} with an empty mask, left out of pixel metrics: {few(empty)}."
        )
    return notes


def _lost(records: Sequence[Record], pixels: _Pixels) -> list[str]:
    found = zip(records, pixels.facts, pixels.mask_row, strict=True)
    lost = [record.file for record, fact, row in found if fact["defect_pixels"] and not pixels.mask[row].any()]
    return (
        [f"{count(lost, 'mask')} lost all pixels when resized, left out of pixel metrics: {few(lost)}."] if lost else []
    )


def _check_memory(plan: Plan, settings: Settings, origin: str) -> None:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    height, width = settings.size
    needed = len(plan.records) * height * width * (settings.channels + 1)
    if needed > 0.8 * memory:
        raise DataError(
            f"{origin}: {len(plan.records)} pictures of {height} x {width} need {needed / 2**30:.0f} GiB, this machine "
            f"has {memory / 2**30:.0f}. Pass a smaller image_size, or stream them (jaxad.data.stream)."
        )
