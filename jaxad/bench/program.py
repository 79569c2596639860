"""A compiled program, with what XLA and its jaxpr say of it.

XLA counts the body of a loop once, however often it runs. So FLOPs are counted on the jaxpr too: those of matrix
products and convolutions, times the lengths of scans. A `while` whose length the program alone knows counts once there
as well; `jaxad` has none with products inside.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class Program(NamedTuple):
    """Calling `call` runs it."""

    call: Callable
    seconds: dict[str, float]  # "trace", "lower", "compile"
    cached: bool  # compiled before: read from jax's cache on disk, so that "compile" is not what compiling costs
    flops: float  # of products and convolutions, loops as often as they run
    xla: dict[str, float]  # XLA's own counts, loops once: "flops", "bytes"
    memory: dict[str, int]  # bytes: "arguments", "outputs", "temporary", "shared" (outputs in place of arguments)

    @property
    def peak_bytes(self) -> int:
        """What the compiler says the program needs at once, its arguments included."""
        parts = self.memory
        return parts["arguments"] + parts["outputs"] + parts["temporary"] - parts["shared"]


def compile_program(function: Callable, *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compiles a function for arguments of these shapes, with the time of each stage."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        hits.extend([event] if event == "/jax/compilation_cache/cache_hits" else [])

    jax.monitoring.register_event_listener(listen)
    times = [time.perf_counter()]
    try:
        traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
        times.append(time.perf_counter())
        lowered = traced.lower()
        times.append(time.perf_counter())
        compiled = lowered.compile()
        times.append(time.perf_counter())
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return Program(
        call=compiled,
        seconds=dict(zip(("trace", "lower", "compile"), (float(d) for d in np.diff(times)), strict=True)),
        cached=bool(hits),
        flops=count_flops(traced.jaxpr),
        xla=_xla_counts(compiled),
        memory=_memory(compiled),
    )


def _xla_counts(compiled: Any) -> dict[str, float]:
    counts = compiled.cost_analysis() or {}
    return {"flops": float(counts.get("flops", 0)), "bytes": float(counts.get("bytes accessed", 0))}


def _memory(compiled: Any) -> dict[str, int]:
    facts = compiled.memory_analysis()
    return {
        "arguments": int(facts.argument_size_in_bytes),
        "outputs": int(facts.output_size_in_bytes),
        "temporary": int(facts.temp_size_in_bytes),
        "shared": int(facts.alias_size_in_bytes),
    }


def count_flops(jaxpr: Any) -> float:
    """FLOPs of the matrix products and convolutions in a jaxpr, a multiplication and an addition each counting one.

    Loops of known length count as often as they run, the costliest branch of a conditional counts. Products with the
    zeros of padding count; those with the zeros of a dilation do not.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_flops_of(equation) for equation in jaxpr.eqns)


def _flops_of(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (over, _), _ = params["dimension_numbers"]
        contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in over)
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * contracted
    if name == "conv_general_dilated":
        return _flops_of_convolution(equation)
    if name == "cond":
        return max(count_flops(branch) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    if name == "pallas_call":
        times = math.prod(params["grid_mapping"].grid)
    return times * sum(count_flops(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if isinstance(value, tuple | list) else [value])]
    return [v for v in values if hasattr(v, "eqns") or hasattr(getattr(v, "jaxpr", None), "eqns")]


def _flops_of_convolution(equation: Any) -> float:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]  # taps x inputs of a group
    dilation = math.prod(equation.params["lhs_dilation"]) * math.prod(equation.params["rhs_dilation"])
    # A kernel dilated by s is not stored dilated; an image dilated by s is zero at all but 1/s of what each tap meets.
    sparse = math.prod(equation.params["lhs_dilation"]) if dilation > 1 else 1
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * per_output / sparse / equation.params["batch_group_count"]
