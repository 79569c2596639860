"""The methods, by name. Looking one up imports it; listing the names imports nothing."""

from __future__ import annotations

import importlib

from jaxad.core import Method

METHODS = {
    "memae": "jaxad.methods.memae",
}


def get(name: str) -> Method:
    """The method with this name. Raises ValueError for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; expected one of {sorted(METHODS)}. `jaxad list` describes them.")
    return importlib.import_module(METHODS[name]).METHOD
