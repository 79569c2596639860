"""The style guide where a test can enforce it: docstrings, argument order, no method in generic code, light imports."""

import ast
import dataclasses
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

import jaxad
from jaxad import methods

PACKAGE = pathlib.Path(jaxad.__file__).parent
FILES = sorted(p for p in PACKAGE.rglob("*.py"))
NAMES = ("memae", "mnad", "ognet", "uninformed_students", "patch_svdd", "neural_batch", "gradcon", "smai", "synthcp")


def module_of(path):
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_every_module_and_public_function_has_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "module docstring missing"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            short = isinstance(node, ast.FunctionDef) and node.name in ("phases", "main")
            assert short or ast.get_docstring(node), f"{node.name} has no docstring"


def code_without_docs(path):
    """The module's names and strings, docstrings and comments left out."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).lower()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_method_is_named_in_generic_code(path):
    parts = path.relative_to(PACKAGE).parts
    if parts[0] == "methods" or parts[0] == "cli":
        return
    found = [name for name in NAMES if name in code_without_docs(path)]
    assert not found, f"{path.name} names {found}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_keys_come_first(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            names = [a.arg for a in node.args.posonlyargs + node.args.args if a.arg not in ("self", "method", "phase")]
            assert "key" not in names or names[0] == "key", f"{node.name}{names}"


@pytest.mark.parametrize("name", sorted(methods.METHODS))
def test_methods_keep_the_contract(name):
    method = methods.get(name)
    card = inspect.getdoc(importlib.import_module(methods.METHODS[name]))
    assert method.name == name and methods.summary(name) == card.splitlines()[0]
    assert "http" in card and "What is whose" in card, "the paper card names source and deviations"
    fields = {field.name for field in dataclasses.fields(method.config)}
    assert "tiny" in method.presets and "dtype" in fields
    for preset in method.presets.values():
        assert set(preset.config) <= fields and preset.doc
        method.config(**preset.config)
    for function in (method.init, method.score):
        assert function.__doc__


def test_public_names_exist():
    for name in dir(jaxad):
        assert getattr(jaxad, name) is not None
    with pytest.raises(AttributeError, match="jaxad has no 'fitt'"):
        jaxad.fitt  # noqa: B018


ABSENT = "tensorflow_datasets,tensorflow,tyro,matplotlib,PIL,grain,array_record,importlib_resources,scipy.ndimage"


def test_the_library_trains_and_scores_where_only_its_core_is_installed():
    """On the GPU machine there is no tensorflow-datasets, tyro or array_record: imports of them must not happen."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}.split(",")))  # importing a module that is None raises
import jax, jax.numpy as jnp, numpy as np
from jaxad import methods, train, score
from jaxad.core import Source
method = methods.get("memae")
cfg = method.config(**{{**method.presets["tiny"].config, "steps": 2, "encoder": (4, 8), "decoder": (4,)}})
data = {{"train": Source(image=jnp.zeros((4, 8, 8, 3), jnp.uint8), label=jnp.zeros(4, jnp.int32))}}
for progress in train.drive(method, jax.random.key(0), cfg, data):
    state = progress.state
print(score.score_dataset(method, state, data["train"]).map.shape)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "(4, 8, 8)" in run.stdout, run.stderr[-2000:]


def test_importing_jaxad_imports_nothing_heavy():
    code = "import jaxad, sys; print([m for m in ('jax', 'flax', 'numpy', 'scipy', 'tyro') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
