"""What a sweep asks for: axes, members and cells, as plain values."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxad import settings
from jaxad.core import Method, is_static


@dataclasses.dataclass(frozen=True)
class Request:
    """The members of a sweep: every data set x every combination of the grid x every seed. All of it JSON."""

    base: settings.Settings  # what all members share; its data, normal_class and seed are not used
    data: tuple[str, ...] = ("synthetic",)
    normal_classes: tuple[int | str | None, ...] = (None,)
    grid: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # field of the method's config -> values
    seeds: tuple[int, ...] = tuple(range(8))

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def from_json(values: Mapping[str, Any]) -> Request:
    """A request from plain values."""
    values = dict(values)
    base = settings.from_json(values.pop("base"), origin="sweep")
    grid = {name: tuple(map(python_value, choices)) for name, choices in values.pop("grid").items()}
    return Request(base=base, grid=grid, **{name: tuple(value) for name, value in values.items()})


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    index: int
    axes: Mapping[str, Any]  # the values that name its cell: "data" where there are several, then the grid's fields
    settings: settings.Settings  # resolved; those of the lone run that gives the same scores
    cfg: Any

    @property
    def seed(self) -> int:
        """Of everything drawn in the run."""
        return self.settings.seed


def members_of(method: Method, request: Request) -> list[Member]:
    """All members, seeds within cells within data sets.

    Raises:
      ValueError: an empty or doubled axis, an unknown field, a value of the wrong type.
    """
    _check_axes(request)
    names = _names(request)
    found: list[Member] = []
    grid = [_parsed(method, field, values) for field, values in request.grid.items()]
    for (data, normal), combination in itertools.product(names, itertools.product(*grid)):
        chosen = dict(zip(request.grid, combination, strict=True))
        axes = {"data": names[data, normal]} if len(names) > 1 else {}
        named = {field: _label(value) for field, value in chosen.items()}
        for seed in request.seeds:
            one = dataclasses.replace(
                request.base, data=data, normal_class=normal, seed=seed, config={**request.base.config, **chosen}
            )
            resolved, cfg = settings.resolve(method, one)
            found.append(Member(len(found), {**axes, **named}, resolved, cfg))
    return found


def _check_axes(request: Request) -> None:
    axes = {"data": request.data, "normal_class": request.normal_classes, "seeds": request.seeds, **request.grid}
    for name, values in axes.items():
        if not values:
            raise ValueError(f"sweep: {name} has no values; expected one or more. Pass --grid {name}=VALUE,VALUE.")
        if len(set(map(str, values))) < len(values):
            raise ValueError(
                f"sweep: {name} has a value twice: {', '.join(map(str, values))}; expected each once. Leave one out."
            )


def _parsed(method: Method, field: str, values: Sequence[Any]) -> list[Any]:
    """The values in the type of the field."""
    fields = {f.name: f for f in dataclasses.fields(method.config)}
    if field not in fields:
        one = settings.Settings(method=method.name, config={field: values[0]})
        settings.resolve(method, one)  # raises, naming the nearest field
    parsed = [settings.parse_value(f"--grid {field}", value, fields[field].default) for value in values]
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"sweep: --grid {field} has a value twice: {parsed}; expected each once. Leave one out.")
    return parsed


def _names(request: Request) -> dict[tuple[str, int | str | None], str]:
    """A short name for each data set: the last folder and the normal class, as far as they tell them apart."""
    pairs = list(itertools.product(request.data, request.normal_classes))
    shorts = [pathlib.PurePath(data).name or data for data in request.data]
    unique = len(set(shorts)) == len(shorts)
    named = dict(zip(request.data, shorts if unique else request.data, strict=True))
    names = {}
    for data, normal in pairs:
        parts = [named[data]] if len(request.data) > 1 or normal is None else []
        names[data, normal] = " ".join([*parts, *([] if normal is None else [f"class {normal}"])])
    return names


def static_key(member: Member) -> tuple:
    """What of a member's config is compiled in: members that agree in it can share a program."""
    cfg = member.cfg
    return tuple(
        (field.name, getattr(cfg, field.name)) for field in dataclasses.fields(cfg) if is_static(cfg, field.name)
    )


def parse_grid(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`field=value,value` texts as a grid; values that are tuples themselves stand in parentheses.

    Raises:
      ValueError: a text without "=", or a field named twice.
    """
    grid: dict[str, tuple[str, ...]] = {}
    for text in texts:
        field, equals, values = (part.strip() for part in text.partition("="))
        if not equals or not field or not values:
            raise ValueError(
                f"--grid {text!r} is no axis; expected field=value,value, such as --grid learning_rate=1e-4,3e-4."
            )
        if field in grid:
            raise ValueError(f"--grid {field} is given twice; expected once. Put all its values into one --grid.")
        grid[field] = tuple(value.strip() for value in re.split(r",(?![^(]*\))", values))
    return grid


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds: a number of them, from 0 on, or a list with commas. Raises ValueError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if (
        not parts
        or not all(part.isdigit() for part in parts)
        or (len(parts) == 1 and "," not in text and int(text) < 1)
    ):
        raise ValueError(f"--seeds {text!r}; expected how many, such as 8, or which, such as 0,3,5.")
    return tuple(map(int, parts)) if "," in text else tuple(range(int(text)))


def find_cell(members: Sequence[Member], text: str | None) -> dict[str, Any]:
    """The axes of the cell that a text such as "learning_rate=1e-4,num_items=500" names; the first cell if none.

    Axes left out take the value that the first cell has.

    Raises:
      ValueError: an axis or a value that the sweep does not have.
    """
    cell = dict(members[0].axes)
    for part in re.split(r",(?![^(]*\))", text or ""):
        axis, equals, value = (piece.strip() for piece in part.partition("="))
        if not part.strip():
            continue
        if not equals or axis not in cell:
            raise ValueError(
                f"--base {text!r}: {part.strip()!r} names no axis of the sweep; expected axis=value with one of "
                f"{', '.join(cell) or 'no axes: there is one cell'}. Leave --base out for the first cell."
            )
        values = list(dict.fromkeys(member.axes[axis] for member in members))
        matching = [known for known in values if _same(known, value)]
        if not matching:
            raise ValueError(
                f"--base {text!r}: {axis} has no value {value}; expected one of {', '.join(map(str, values))}. "
                "Leave --base out for the first cell."
            )
        cell[axis] = matching[0]
    return cell


def _same(known: Any, text: str) -> bool:
    if isinstance(known, str):
        return known == text.strip("() ")
    try:
        return settings.parse_value("--base", text, known) == known
    except ValueError:
        return False


def _label(value: Any) -> Any:
    """A value as the table shows it: a tuple becomes text."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def python_value(value: Any) -> Any:
    """A value as Python has it, which JSON takes and which can be a key: arrays and lists become tuples."""
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        value = np.asarray(value).tolist()
    if isinstance(value, Mapping):
        return {name: python_value(part) for name, part in value.items()}
    return tuple(map(python_value, value)) if isinstance(value, list | tuple) else value
