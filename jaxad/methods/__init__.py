"""The methods, by name. Looking one up imports it; listing the names imports nothing."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pathlib

from jaxad.core import Method

METHODS = {
    "gradcon": "jaxad.methods.gradcon",
    "memae": "jaxad.methods.memae",
    "mnad": "jaxad.methods.mnad",
    "neural_batch": "jaxad.methods.neural_batch",
    "ognet": "jaxad.methods.ognet",
    "patch_svdd": "jaxad.methods.patch_svdd",
    "smai": "jaxad.methods.smai",
    "synthcp": "jaxad.methods.synthcp",
    "uninformed_students": "jaxad.methods.uninformed_students",
}


def get(name: str) -> Method:
    """The method with this name. Raises ValueError for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"method {name!r} is unknown; expected one of {sorted(METHODS)}. `jaxad list` describes them.")
    return importlib.import_module(METHODS[name]).METHOD


def summary(name: str) -> str:
    """First line of a method's paper card, read without importing the method."""
    spec = importlib.util.find_spec(METHODS[name])
    assert spec is not None and spec.origin is not None
    card = ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text(encoding="utf-8")))
    return (card or "").partition("\n")[0]
