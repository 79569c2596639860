"""Tables that list a data set's pictures: CSV, TSV or JSON lines."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator

from jaxad.data import files
from jaxad.data.dataset import DataError
from jaxad.data.records import ANOMALOUS_NAMES, NORMAL_NAMES, UNDECIDED, Plan, Record, count, few, finish

_JSON = frozenset([".jsonl", ".ndjson"])
TABLES = _JSON | {".csv", ".tsv"}
_COLUMNS = {  # a column's meaning -> the names it may have
    "image": ("image", "image_path", "path", "file", "filename", "file_name"),
    "mask": ("mask", "mask_path"),
    "split": ("split", "set", "subset", "phase"),
    "label": ("label", "target", "anomalous", "is_anomaly"),
    "defect": ("class", "defect", "defect_type", "category"),
    "object": ("object",),
}
_ROLES = {
    **dict.fromkeys(["train", "training"], "train"),
    **dict.fromkeys(["holdout", "val", "valid", "validation"], "holdout"),
    **dict.fromkeys(["test", "testing"], "test"),
    **dict.fromkeys(["labelled", "labeled"], "labelled"),
    "aux": "aux",
}
_NORMAL = NORMAL_NAMES | {"0", "false", "no"}
_ANOMALOUS = ANOMALOUS_NAMES | {"1", "true", "yes"}
_UNKNOWN = frozenset(["-1", "unknown", ""])


def fits(store) -> bool:
    """Whether the store looks like this layout."""
    return len(_tables(store)) == 1


def plan(store, normal_class=None) -> Plan:
    """The pictures of this layout and their roles. Raises DataError where they cannot be told."""
    tables = _tables(store)
    if len(tables) != 1:
        here = store.where("").rstrip("/")
        raise DataError(
            f"{here}: {count(tables, 'table')} list pictures ({few(tables) or 'none'}); expected one. "
            "Give the table's path."
        )
    return plan_table(store, tables[0])


def plan_table(store, table: str, layout: str = "manifest") -> Plan:
    """The records of one table; paths in it are relative to the store.

    A row's label is its label column; without one, training rows are normal, and another row is normal if its class is
    called so or also occurs among the training rows; without classes either, its mask decides.
    """
    columns = _meanings(header(store, table))
    if "image" not in columns:
        raise DataError(
            f"{store.where(table)}: no column 'image' (it has {', '.join(header(store, table)) or 'none'}). "
            "Name the column of paths so."
        )
    if not columns.keys() & {"split", "label", "defect", "mask"}:
        raise DataError(f"{store.where(table)}: only paths; expected a column 'split' or 'label' too. Add one.")
    lines = [(line, {key: row[name].strip() for key, name in columns.items()}) for line, row in rows(store, table)]
    if "object" in columns:
        lines = _one_object(store, table, lines)
    result = Plan(layout, store, [])
    seen: dict[str, int] = {}
    normal = {row["defect"] for _, row in lines if "split" in columns and "defect" in columns and _role(row) == "train"}
    for line, row in lines:
        try:
            record = _record(row, columns, normal)
        except DataError as error:
            result.problems.append(f"{store.where(table)}, line {line}: {error}")
            continue
        for name in (record.file, *record.masks):
            if not store.has(name):
                result.problems.append(
                    f"{store.where(name)}: no such file (line {line} of {table}). Add it or remove the line."
                )
        if record.file in seen:
            result.problems.append(
                f"{store.where(record.file)}: listed twice, in lines {seen[record.file]} and {line} of {table}. "
                "Remove one."
            )
        seen[record.file] = line
        result.records.append(record)
    if "mask" in columns:
        bare = [record.file for record in result.records if record.label == 1 and not record.masks]
        if bare and len(bare) < sum(record.label == 1 for record in result.records):
            result.notes.append(
                f"{count(bare, 'anomalous picture')} without a mask, left out of pixel metrics: {few(bare)}."
            )
    return finish(result, [table], twins=False)


def _one_object(store, table: str, lines: list) -> list:
    """The lines of the one object (VisA's word for a category) whose pictures are there."""
    tops = {name.split("/")[0] for name in store.names}
    here = sorted({row["object"] for _, row in lines} & tops)
    if len(here) != 1:
        origin, found = store.where("").rstrip("/"), few(here) or "none"
        raise DataError(
            f"{origin}: {table} lists several objects, here are {found}; expected one. "
            f"Give its folder: {origin}/{here[0] if here else 'OBJECT'}"
        )
    return [(line, row) for line, row in lines if row["object"] == here[0]]


def header(store, table: str) -> list[str]:
    """The column names of a table: its first line, or the keys of its first JSON object."""
    if files.suffix(table) in _JSON:
        return next((list(row) for _, row in rows(store, table)), [])
    try:
        return list(_reader(store, table).fieldnames or [])
    except csv.Error as error:
        raise DataError(f"{store.where(table)}, line 1: not CSV ({error}). Correct the line.") from None


def _reader(store, table: str) -> csv.DictReader:
    delimiter = "\t" if files.suffix(table) == ".tsv" else ","
    return csv.DictReader(
        io.StringIO(files.text_of(store, table), newline=""), delimiter=delimiter, skipinitialspace=True
    )


def rows(store, table: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields (line number, row). Raises DataError naming the line that cannot be read."""
    where = store.where(table)
    if files.suffix(table) in _JSON:
        yield from _json_rows(files.text_of(store, table), where)
        return
    reader = _reader(store, table)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DataError(
                    f"{where}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns. "
                    "Quote commas, fill gaps."
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{where}, line {reader.line_num}: not CSV ({error}). Correct the line.") from None


def _json_rows(text: str, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}, line {number}: not JSON ({error}). Correct the line.") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{where}, line {number}: expected an object such as {{"image": "a.png"}}. Correct the line.'
            )
        yield number, {key: "" if value is None else str(value) for key, value in row.items()}


def _tables(store) -> list[str]:
    """Tables in the store's top folder that have a column of pictures."""
    names = [
        name for name in store.names if files.suffix(name) in TABLES and "/" not in name and not files.is_junk(name)
    ]
    return [name for name in names if "image" in _meanings(header(store, name))]


def _meanings(names: list[str]) -> dict[str, str]:
    """Meaning -> the column that has it."""
    found = {name.strip().lower(): name for name in names}
    return {key: found[alias] for key, aliases in _COLUMNS.items() for alias in reversed(aliases) if alias in found}


def _record(row: dict[str, str], columns: dict[str, str], normal: set[str]) -> Record:
    if not row["image"]:
        raise DataError("no image path. Fill it in or remove the line.")
    role, label = _role(row), _label(row, columns, normal)
    kind = row.get("defect", "")
    defect = "good" if label == 0 else "" if label == -1 else kind or "anomalous"
    masks = (_path(row["mask"]),) if row.get("mask") else ()
    return Record(_path(row["image"]), role, label, defect, masks)


def _role(row: dict[str, str]) -> str:
    split = row.get("split", "")
    if split and split.lower() not in _ROLES:
        raise DataError(f"split '{split}'; expected train, holdout, test, aux or labelled. Correct it.")
    return _ROLES[split.lower()] if split else UNDECIDED


def _label(row: dict[str, str], columns: dict[str, str], normal: set[str]) -> int | None:
    role, label = _role(row), row.get("label", "").lower()
    if "label" in columns:
        if label == "" and role == "train":
            return 0
        if label in _UNKNOWN:
            return -1
        if label in _NORMAL or label in _ANOMALOUS:
            return int(label in _ANOMALOUS)
        raise DataError(f"label '{row['label']}'; expected 0 (normal), 1 (anomalous) or -1 (unknown). Correct it.")
    if role in ("train", "holdout", "aux"):
        return 0
    if "defect" in columns:
        return int(row["defect"] not in normal and row["defect"].lower() not in _NORMAL)
    return (None if row["mask"] else 0) if "mask" in columns else -1


def _path(text: str) -> str:
    return posixpath.normpath(text.replace("\\", "/"))
