"""The vocabulary: a case is one piece of work, its contenders are ways of doing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxad.bench.program import Program


class BenchmarkError(ValueError):
    """A measurement that must not be believed: a wrong output, a timing that ended before its work."""


def put_on_device(drawn: Any) -> Any:
    """The `put` of a contender in jax that takes what was drawn as it is."""
    return jax.device_put(drawn)


class Contender(NamedTuple):
    """One way of doing a case's work. `wait(run(put(drawn)))` is all of it; only `run` and `wait` are the work."""

    name: str
    run: Callable  # (inputs) -> result; timed together with `wait`
    put: Callable = put_on_device  # (drawn) -> inputs on the device; timed apart, as the transfer
    wait: Callable = jax.block_until_ready  # (result) -> the result, once everything that `run` started is done
    fetch: Callable = jax.device_get  # (result) -> {name: NumPy array}, by which outputs are compared
    flops: float | None = None  # of a run: its matrix products and convolutions
    program: Program | None = None  # the compiled program, of contenders in jax
    compile_seconds: Mapping[str, float] | None = None  # by stage
    after: Mapping[str, Callable] = {}  # stages that follow: name -> (result) -> jax arrays; timed apart
    changes: Callable | None = None  # (drawn) -> {field: vector}: what the runs so far changed in a state; not timed


class Case(NamedTuple):
    """One piece of work and those who race on it. The first contender is what the others are compared with."""

    name: str
    draw: Callable  # (NumPy generator) -> NumPy arrays, new at every call
    contenders: tuple[Contender, ...]
    samples: int  # pictures, clips or rows in a run
    reference: Callable | None = None  # (drawn) -> {name: array}: slow and obvious; arrays may hold the first rows only
    tolerance: float = 1e-3  # largest difference to the reference, relative to the largest magnitude of the array
    checks: int = 1  # runs compared with the reference, one after another; contenders may keep a state
    changes: Callable | None = None  # () -> {field: vector}: what the reference's runs so far changed in its state
    changes_tolerance: float = 0.1  # largest disagreement with them, see `worst_change`
    facts: Mapping[str, Any] = {}  # for the record: method, preset, batch, dtype


def worst_difference(result: Mapping[str, Any], expected: Mapping[str, Any]) -> float:
    """Largest difference of the arrays that both have, relative to the largest magnitude of each; NaN counts as inf.

    Raises:
      BenchmarkError: they have no array in common, or shapes differ other than by rows left out of `expected`.
    """
    shared = [name for name in expected if name in result]
    if not shared:
        raise BenchmarkError(
            f"outputs {sorted(result)} and {sorted(expected)} have no name in common; expected at least one. "
            "Let `fetch` and `reference` return dicts with the same names."
        )
    return max(_difference(name, result[name], expected[name]) for name in shared)


def worst_change(changes: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, str]:
    """The largest disagreement of two changes of a field that both have, and the field; (0.0, "") if they share none.

    1 - <a, b> / max(|a|^2, |b|^2): 0 for the same change, 1 for none and for one that has nothing to do with it, 2 for
    the opposite; inf for NaN. Not element by element, nor by the distance: the first steps of Adam are as long for
    gradients that are only rounding, which turns such steps anywhere.
    """
    shared = [name for name in expected if name in changes]
    return max(((_disagreement(changes[name], expected[name]), name) for name in shared), default=(0.0, ""))


def _disagreement(change: Any, expected: Any) -> float:
    change, expected = np.asarray(change, np.float64), np.asarray(expected, np.float64)
    longest = max(float(change @ change), float(expected @ expected))
    found = 1 - float(change @ expected) / longest if longest else 0.0
    return found if found == found else float("inf")


def _difference(name: str, result: Any, expected: Any) -> float:
    result, expected = np.asarray(result, np.float64), np.asarray(expected, np.float64)
    if result.ndim and result.shape[1:] == expected.shape[1:]:
        result = result[: len(expected)]
    if result.shape != expected.shape:
        raise BenchmarkError(
            f"output {name!r} has shape {result.shape}; expected {expected.shape}, or its first rows. Mend the output."
        )
    scale = max(float(np.abs(expected).max(initial=0)), 1e-30)
    worst = float(np.abs(result - expected).max(initial=0)) / scale
    return worst if worst == worst else float("inf")
