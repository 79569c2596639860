"""What determines a run: plain values from presets, files and flags, resolved and checked before any work."""

from __future__ import annotations

import dataclasses
import difflib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxad.core import Method

DATA_FIELDS = (
    *("image_size", "channels", "layout", "normal_class", "holdout", "clip", "clip_stride", "target"),
    *("labels_per_type", "labels_total"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's settings, all of them JSON. `config` holds every field of the method's config once resolved."""

    method: str
    data: str = "synthetic"
    preset: str | None = None  # None: the method's default on this device
    seed: int = 0
    fpr: float = 0.01  # asked of the threshold, on normal images
    image_size: int | tuple[int, int] | None = None  # None here and below: the preset's
    channels: int | None = None
    layout: str | None = None
    normal_class: int | str | None = None
    holdout: float | None = None
    clip: int | None = None
    clip_stride: int | None = None
    target: int | None = None
    labels_per_type: int | None = None
    labels_total: int | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def load_arguments(self) -> dict[str, Any]:
        """Keyword arguments for `jaxad.data.load`."""
        return {name: getattr(self, name) for name in DATA_FIELDS if getattr(self, name) is not None}

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def from_json(values: Mapping[str, Any], *, origin: str = "settings") -> Settings:
    """Settings from plain values, such as those of a `config.json`. Raises ValueError for names that do not exist."""
    names = [field.name for field in dataclasses.fields(Settings)]
    for name in values:
        if name not in names:
            raise ValueError(
                f"{origin}: no setting is called {name!r}{_nearest(name, names)}. Settings: {', '.join(names)}."
            )
    if "method" not in values:
        raise ValueError(
            f"{origin}: 'method' is missing; expected the name of a method. Add method: NAME (`jaxad list` has names)."
        )
    values = dict(values)
    if isinstance(values.get("image_size"), list):
        values["image_size"] = tuple(values["image_size"])
    for name, value in values.items():
        if name in _EXPECTED and value is not None and not _EXPECTED[name][0](value):
            raise ValueError(
                f"{origin}: {name} is {value!r}; expected {_EXPECTED[name][1]}. Correct it or leave it out."
            )
    return Settings(**values)


def _is_size(value: Any) -> bool:
    return _is_count(value) or (isinstance(value, tuple) and len(value) == 2 and all(map(_is_count, value)))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_EXPECTED = {
    "data": (lambda value: isinstance(value, str), "a path or a name"),
    "preset": (lambda value: isinstance(value, str), "the name of a preset"),
    "seed": (lambda value: _is_count(value) and value < 2**32, "a whole number from 0 to 2**32 - 1"),
    "fpr": (lambda value: _is_number(value) and 0 < value < 1, "a rate between 0 and 1, such as 0.01"),
    "image_size": (_is_size, "pixels a side, or [height, width]"),
    **dict.fromkeys(("channels", "clip", "clip_stride", "target"), (_is_count, "a whole number")),
    **dict.fromkeys(("labels_per_type", "labels_total"), (_is_count, "a whole number")),
    "holdout": (_is_number, "a number, such as 0.1"),
    "config": (lambda value: isinstance(value, Mapping), "fields of the method with their values"),
}


def read_file(path: str | pathlib.Path) -> dict[str, Any]:
    """A settings file, YAML or JSON, as a dict; the `config.json` of a run is one. Raises ValueError if it is none."""
    import yaml

    path = pathlib.Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no readable settings file: {reason}. Expected YAML or JSON.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected names and values, such as 'seed: 1'.")
    return {name: value for name, value in values.items() if name not in ("jaxad", "spec", "fingerprint")}


def default_preset(method: Method) -> str:
    """The preset used when none is named: "cpu" without an accelerator if the method has it, else its first."""
    import jax

    if jax.default_backend() == "cpu" and "cpu" in method.presets:
        return "cpu"
    return next(iter(method.presets))


def resolve(method: Method, settings: Settings) -> tuple[Settings, Any]:
    """Fills in the preset and checks every field.

    Args:
      method: the method named by the settings.
      settings: as given; `config` may hold any part of the fields, as values or as text.

    Returns:
      (settings with nothing left open, the method's config).

    Raises:
      ValueError: an unknown preset, an unknown field, or a value of the wrong type.
    """
    name = settings.preset or default_preset(method)
    if name not in method.presets:
        raise ValueError(
            f"{method.name} has no preset {name!r}{_nearest(name, list(method.presets))}. "
            f"Presets: {', '.join(method.presets)}."
        )
    preset = method.presets[name]
    data = {**preset.data, **settings.load_arguments()}
    fields = {field.name: field for field in dataclasses.fields(method.config)}
    chosen = {}
    for field, value in {**preset.config, **settings.config}.items():
        if field not in fields:
            raise ValueError(
                f"{method.name} has no field {field!r}{_nearest(field, list(fields))}. Fields: {', '.join(fields)}."
            )
        chosen[field] = parse_value(f"{method.name}: {field}", value, fields[field].default)
    cfg = method.config(**chosen)
    full = {field: getattr(cfg, field) for field in fields}
    return dataclasses.replace(settings, preset=name, config=full, **data), cfg


def parse_value(name: str, value: Any, default: Any) -> Any:
    """A value for a field, from text or from a file, of the type of the field's default.

    Raises:
      ValueError: text that does not read as that type, or a value of another type.
    """
    kind = type(default)
    try:
        if kind is bool:
            return _parse_bool(value)
        if kind is tuple:
            items = value.strip("()[] ").split(",") if isinstance(value, str) else value
            inner = default[0] if default else ""
            return tuple(parse_value(name, item, inner) for item in items if item != "")
        if kind is int and isinstance(value, float | bool):
            raise ValueError
        if kind is str and not isinstance(value, str):
            raise ValueError
        return kind(value)
    except (ValueError, TypeError, KeyError) as error:
        expected = {int: "a whole number", float: "a number", bool: "true or false", tuple: "numbers with commas"}
        raise ValueError(
            f"{name}={value!r} is not {expected.get(kind, 'text')}; expected something like {_example(default)}."
        ) from error


def parse_assignments(texts: list[str] | tuple[str, ...]) -> dict[str, str]:
    """`field=value` texts as a dict. Raises ValueError for one without "="."""
    pairs = {}
    for text in texts:
        field, equals, value = text.partition("=")
        if not equals or not field:
            raise ValueError(f"--set {text!r} is no assignment; expected field=value, such as --set steps=500.")
        pairs[field.strip()] = value.strip()
    return pairs


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Pixels a side, or (height, width), of a flag. Raises ValueError for another form."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(
            f"--image-size {text!r}; expected pixels a side, such as 128, or HEIGHTxWIDTH, such as 96x128."
        )
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def _parse_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[str(value).lower()]


def _example(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _nearest(name: str, names: list[str]) -> str:
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
