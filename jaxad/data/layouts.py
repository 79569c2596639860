"""The layouts: how each is recognised by its file names, and which picture plays which role in it."""

from __future__ import annotations

import collections
import difflib
from collections.abc import Callable
from typing import NamedTuple

from jaxad.data import files, idx, manifest, video
from jaxad.data.dataset import DataError
from jaxad.data.oneclass import choose, parse
from jaxad.data.records import (
    MASK_NAMES,
    NORMAL_NAMES,
    UNDECIDED,
    Plan,
    Record,
    count,
    defect_name,
    few,
    finish,
    match_masks,
)

_ROLES = {"train": "train", "training": "train", "validation": "holdout", "test": "test", "testing": "test"}


class Layout(NamedTuple):
    """A way to arrange pictures."""

    looks_like: str  # for messages
    fits: Callable  # (store) -> bool, by its names and, for tables, their headers
    plan: Callable  # (store, normal_class) -> Plan


def recognise(store, layout: str | None = None) -> tuple[str, object]:
    """Finds a store's layout.

    Args:
      store: see `jaxad.data.files`.
      layout: a name from LAYOUTS to insist on, or None to find out.

    Returns:
      The layout's name and the store, seen from the folder that has the layout.

    Raises:
      DataError: nothing fits, nothing is there, or there are several data sets.
    """
    if layout is not None and layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, LAYOUTS, 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise DataError(f"layout '{layout}' is not known; expected one of {', '.join(LAYOUTS)}.{hint}")
    view = store
    while True:
        fitting = [name for name in ([layout] if layout else LAYOUTS) if LAYOUTS[name].fits(view)]
        if fitting:
            return fitting[0], view
        tops = {name.split("/")[0] for name in view.names if files.is_picture(name)}
        if len(tops) != 1 or f"{min(tops)}/" not in {name[: len(min(tops)) + 1] for name in view.names}:
            break
        view = files.Below(view, f"{min(tops)}/")
    raise DataError(_why_nothing_fits(store, layout))


def _why_nothing_fits(store, layout: str | None) -> str:
    here = store.where("").rstrip("/")
    pictures = [name for name in store.names if files.is_picture(name)]
    if not pictures:
        found = f"only {few(store.names)}" if store.names else "nothing"
        return f"{here}: no pictures in it; found {found}. Give a folder with {LAYOUTS['mvtec'].looks_like}."
    parts = sorted({name.split("/")[0] for name in pictures})
    whole = [part for part in parts if _mvtec_fits(files.Below(store, f"{part}/"))]
    if whole and layout in (None, "mvtec", "loco"):
        return f"{here}: holds {count(whole, 'data set')} ({few(whole)}). Give one of them: {here}/{whole[0]}"
    wanted = [layout] if layout else list(LAYOUTS)
    expected = "; ".join(f"{name}: {LAYOUTS[name].looks_like}" for name in wanted)
    return f"{here}: its {count(pictures, 'picture')} (in {few(parts)}) fit no known layout. Expected {expected}."


def _is_in(name: str, top: str) -> bool:
    """Whether a picture lies in <top>/<a name for normal>/."""
    parts = name.lower().split("/")
    return len(parts) > 2 and parts[0] == top and parts[1] in NORMAL_NAMES and files.is_picture(name)


def _mvtec_fits(store) -> bool:
    return any(_is_in(name, "train") for name in store.names)


def _loco_fits(store) -> bool:
    return _mvtec_fits(store) and any(_is_in(name, "validation") for name in store.names)


def _mvtec(store, normal_class=None) -> Plan:
    return _plan_mvtec(store, "mvtec")


def _loco(store, normal_class=None) -> Plan:
    return _plan_mvtec(store, "loco")


def _plan_mvtec(store, layout: str) -> Plan:
    plan, masks = Plan(layout, store, []), collections.defaultdict(list)
    for name in filter(files.is_picture, store.names):
        top, *folders, _ = name.split("/")
        if not folders:
            continue
        if top.lower() in _ROLES:
            plan.records.append(Record(name, _ROLES[top.lower()], *defect_name(folders[0])))
        elif top.lower() in MASK_NAMES:
            key = files.composed(folders[1]) if len(folders) > 1 else files.stem(name).removesuffix("_mask")
            masks[folders[0].lower(), key].append(name)
    match_masks(plan, masks, lambda r: (r.file.split("/")[1].lower(), files.stem(r.file)) if r.role == "test" else None)
    return finish(plan)


def _visa_fits(store) -> bool:
    return any(name.startswith("split_csv/") and name.endswith(".csv") for name in store.names)


def _visa(store, normal_class=None) -> Plan:
    tables = [name for name in store.names if name.startswith("split_csv/") and name.endswith(".csv")]
    table = "split_csv/1cls.csv" if "split_csv/1cls.csv" in tables else tables[0]
    plan = manifest.plan_table(store, table, layout="visa")
    plan.notes.append(f"Splits as in {table}.")
    return plan


def _normal_folder(store) -> str | None:
    """The first folder outside train/, test/ and masks that is called normal, good or ok, with a "/" behind it."""
    for name in filter(files.is_picture, store.names):
        parts = name.split("/")[:-1]
        for depth, part in enumerate(parts):
            if part.lower() in MASK_NAMES or part.lower() in _ROLES:
                break
            if part.lower() in NORMAL_NAMES:
                return "/".join(parts[: depth + 1]) + "/"
    return None


def _folder_fits(store) -> bool:
    pictures = [name for name in store.names if files.is_picture(name)]
    flat = bool(pictures) and all("/" not in name for name in pictures)
    return flat or _normal_folder(store) is not None


def _folder(store, normal_class=None) -> Plan:
    plan, masks = Plan("folder", store, []), collections.defaultdict(list)
    normal = _normal_folder(store)
    if normal is None:
        plan.records = [Record(name) for name in store.names if files.is_picture(name) and "/" not in name]
        plan.notes.append("No folders tell the pictures apart: all are taken as normal, for training.")
        return finish(plan)
    parent = normal[:-1].rpartition("/")[0] + "/" if "/" in normal[:-1] else ""
    for name in filter(files.is_picture, store.names):
        parts = name.split("/")
        where = next((i for i, part in enumerate(parts[:-1]) if part.lower() in MASK_NAMES), None)
        if where is not None:
            masks[_picture_key(parts[where + 1 :])].append(name)
        elif name.startswith(parent) and "/" in name[len(parent) :]:
            top, *inner, _ = name[len(parent) :].split("/")
            label, defect = defect_name(top)
            plan.records.append(Record(name, UNDECIDED, label, inner[0] if label and inner else defect))
    match_masks(plan, masks, lambda r: _picture_key(r.file[len(parent) :].split("/")))
    return finish(plan)


def _picture_key(parts: list[str]) -> tuple[str, ...]:
    """Folders (lower case, "abnormal" and its like left out) and stem, by which a mask finds its picture."""
    folders = [part.lower() for part in parts[:-1] if defect_name(part)[1] != "anomalous"]
    return (*folders, files.stem(parts[-1]).removesuffix("_mask"))


def _class_of(name: str) -> tuple[str, str] | None:
    """(role, class) of a picture in class folders; None if it is in none."""
    folders = name.split("/")[:-1]
    role = _ROLES.get(folders[0].lower(), UNDECIDED) if folders else UNDECIDED
    depth = 0 if role == UNDECIDED else 1
    return (role, folders[depth]) if len(folders) == depth + 1 else None


def _classes_fits(store) -> bool:
    found = [_class_of(name) for name in store.names if files.is_picture(name)]
    return len({kind[1] for kind in found if kind is not None}) > 1


def _classes(store, normal_class=None) -> Plan:
    found = ((name, _class_of(name)) for name in store.names if files.is_picture(name))
    kinds = [(name, kind[0], kind[1]) for name, kind in found if kind is not None]
    classes = sorted({kind for _, _, kind in kinds})
    protocol = parse(store.where("").rstrip("/"), normal_class, classes)
    plan = Plan("classes", store, [])
    left_out = choose(plan, kinds, protocol)
    return finish(plan, left_out)


LAYOUTS = {
    "idx": Layout("train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz (MNIST)", idx.fits, idx.plan),
    "visa": Layout("split_csv/1cls.csv beside the pictures", _visa_fits, _visa),
    "loco": Layout(
        "train/good, validation/good, test/<defect>, ground_truth/<defect>/<picture>/*.png", _loco_fits, _loco
    ),
    "mvtec": Layout(
        "train/good, test/good, test/<defect>, ground_truth/<defect>/<picture>_mask.png", _mvtec_fits, _mvtec
    ),
    "video": Layout(
        "training/frames/<clip>/<frame>.jpg and testing/..., labels in a CSV: clip,frame,label", video.fits, video.plan
    ),
    "manifest": Layout("a CSV or JSONL file with columns image, mask, split, label", manifest.fits, manifest.plan),
    "folder": Layout("normal/ and abnormal/ (or good/, <defect>/), masks/ if there are any", _folder_fits, _folder),
    "classes": Layout("train/<class>/ and test/<class>/", _classes_fits, _classes),
}
