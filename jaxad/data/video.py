"""Folders of video frames, as the UCSD, Avenue and ShanghaiTech sets come, and the clips cut from them."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from jaxad.data import files, manifest
from jaxad.data.records import MASK_NAMES, Plan, Record, finish, match_masks

_FRAME = re.compile(
    r"(?P<part>train|training|test|testing)/(?P<frames>frames/)?(?P<clip>[^/]+)/(?P<frame>[^/]+)$", re.IGNORECASE
)
_LABEL_COLUMNS = {"clip", "frame", "label"}


def fits(store) -> bool:
    """Frames lie in a folder "frames" or in UCSD's Train/Train001, or a table of clip, frame, label is there."""
    matches = [match for match in map(_FRAME.match, filter(files.is_picture, store.names)) if match]
    named = any(m["frames"] or m["clip"].lower().startswith(m["part"].lower()) for m in matches)
    return named or bool(matches and _label_tables(store))


def plan(store, normal_class=None) -> Plan:
    """Training frames are normal; test frames take their labels from the table, else from masks, else have none."""
    result, masks = Plan("video", store, []), collections.defaultdict(list)
    for name in filter(files.is_picture, store.names):
        match = _FRAME.match(name)
        folder = name.rpartition("/")[0].rpartition("/")[2]
        if folder.lower().endswith("_gt"):
            masks[folder[:-3], _frame_key(name)].append(name)
        elif any(part.lower() in MASK_NAMES for part in name.split("/")[:-1]):
            masks[folder, _frame_key(name)].append(name)
        elif match:
            role = "train" if match["part"].lower().startswith("train") else "test"
            known = role == "train"
            result.records.append(Record(name, role, 0 if known else -1, "good" if known else "", group=match["clip"]))
    tables = _label_tables(store)
    for table in tables:
        _apply_labels(result, table)
    _apply_masks(result, masks, labelled=bool(tables))
    unknown = sorted({r.group for r in result.records if r.label == -1})
    if unknown:
        result.notes.append(f"Test frames without a label, left out of metrics: clips {', '.join(unknown[:5])}.")
    return finish(result, tables)


def _frame_key(name: str) -> int | str:
    """Frames are matched by number where they have one: "001.tif" and "1.bmp" are one frame."""
    stem = files.stem(name)
    return int(stem) if stem.isdecimal() else stem


def _label_tables(store) -> list[str]:
    tables = [name for name in store.names if files.suffix(name) == ".csv" and "/" not in name]
    return [name for name in tables if set(manifest.header(store, name)) >= _LABEL_COLUMNS]


def _apply_labels(plan: Plan, table: str) -> None:
    rows = {}
    for line, row in manifest.rows(plan.store, table):
        place = f"{plan.store.where(table)}, line {line}"
        if row["label"] not in ("0", "1"):
            plan.problems.append(f"{place}: label {row['label']!r}; expected 0 (normal) or 1 (anomalous). Correct it.")
            continue
        frame = int(row["frame"]) if row["frame"].isdecimal() else row["frame"]
        rows[row["clip"], frame] = int(row["label"]), place
    clips = {clip for clip, _ in rows}
    for i, record in enumerate(plan.records):
        if record.role != "test" or record.group not in clips:
            continue
        label, _ = rows.pop((record.group, _frame_key(record.file)), (None, ""))
        if label is None:
            plan.problems.append(f"{plan.store.where(record.file)}: no label for it in {table}. Add its line.")
        else:
            plan.records[i] = dataclasses.replace(record, label=label, defect="anomalous" if label else "good")
    for (clip, frame), (_, place) in rows.items():
        plan.problems.append(f"{place}: clip {clip} has no frame {frame}. Add the frame or remove the line.")


def _apply_masks(plan: Plan, masks: dict, *, labelled: bool) -> None:
    clips = {clip for clip, _ in masks}
    match_masks(plan, masks, lambda r: (r.group, _frame_key(r.file)) if r.role == "test" else None)
    if labelled:
        return
    for i, record in enumerate(plan.records):
        if record.role == "test" and record.group in clips:
            plan.records[i] = dataclasses.replace(
                record, label=None if record.masks else 0, defect="anomalous" if record.masks else "good"
            )


def starts(groups: Sequence[str], clip: int, stride: int) -> tuple[np.ndarray, list[str]]:
    """First frames of all clips that stay within one video.

    Args:
      groups: the video of each frame; a video's frames are neighbours.
      clip: T, frames a clip.
      stride: frames between the starts of neighbouring clips.

    Returns:
      (N,) int32, and the videos too short for a clip.
    """
    found: list[int] = []
    short, first = [], 0
    while first < len(groups):
        last = first
        while last < len(groups) and groups[last] == groups[first]:
            last += 1
        if last - first < clip:
            short.append(groups[first])
        found += range(first, last - clip + 1, stride)
        first = last
    return np.asarray(found, np.int32), short
