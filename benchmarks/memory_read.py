"""Memory read of MemAE: the fused form against the naive one, which stores queries x items.

    python -m benchmarks.memory_read --json benchmarks/results/cpu/memory_read.json

Needs jax, flax and numpy only. Outputs, and gradients with respect to queries and items, are compared with a float64
NumPy version. A weight within rounding of the threshold may be read by one form and not by the other, which changes
what such a query reads by the weight of one item in hundreds: hence the tolerance. Expected on two cores: fused needs a
third to a fourteenth of the memory and 1.0 to 1.1 times the time (benchmarks/RESULTS.md); where freed memory goes back
to the kernel, as it does by default, the naive form's page faults make it 1.2 to 1.6 times slower than fused.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import race
from jaxad import allocator
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program
from jaxad.ops.memory import read_memory

ENTROPY_WEIGHT = 2e-4
TOLERANCE = 5e-2


def forward(form):
    def run(queries, items, threshold, weights):
        read = read_memory(queries, items, threshold=threshold, impl=form)
        return {"value": read.value, "entropy": read.entropy}, (read.num_active, read.usage)

    return run


def gradient(form):
    def loss(queries, items, threshold, weights):
        read = read_memory(queries, items, threshold=threshold, impl=form)
        value = jnp.sum(read.value * weights) + ENTROPY_WEIGHT * jnp.mean(read.entropy)
        return value, (read.num_active, read.usage)  # the monitors of a training step

    def run(*arguments):
        (d_queries, d_items), monitors = jax.grad(loss, argnums=(0, 1), has_aux=True)(*arguments)
        return {"d_queries": d_queries, "d_items": d_items}, monitors

    return run


def reference(drawn, *, is_gradient):
    """The same in float64, all weights at once."""
    queries, items, threshold, weights = (np.asarray(x, np.float64) for x in drawn)
    logits = queries @ items.T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    read = np.where(shares > threshold, shares, 0)
    read /= np.maximum(read.sum(axis=1, keepdims=True), 1e-12)
    logs = np.log(np.where(read > 0, read, 1))
    if not is_gradient:
        return {"value": read @ items, "entropy": -(read * logs).sum(axis=1)}
    d_read = weights @ items.T - ENTROPY_WEIGHT / len(queries) * (logs + 1)
    d_logits = read * (d_read - (read * d_read).sum(axis=1, keepdims=True))
    return {"d_queries": d_logits @ items, "d_items": d_logits.T @ queries + read.T @ weights}


def case_of(name, num_queries, num_items, features, forms):
    """One pass at one size, each form a contender."""

    def draw(numbers):
        """Items as MemAE initialises them, queries of unit variance, threshold 1/N."""
        bound = features**-0.5
        queries, weights = (numbers.standard_normal((num_queries, features), np.float32) for _ in range(2))
        items = numbers.uniform(-bound, bound, (num_items, features)).astype(np.float32)
        return queries, items, np.float32(1 / num_items), weights

    given, contenders = draw(np.random.default_rng(0)), []
    for form in forms:
        program = compile_program((gradient if name == "gradient" else forward)(form), *given)
        contenders.append(
            Contender(
                form,
                lambda inputs, program=program: program.call(*inputs),
                fetch=lambda result: jax.device_get(result[0]),
                flops=program.flops,
                program=program,
                compile_seconds=program.seconds,
            )
        )
    return Case(
        f"memory read {num_queries}x{num_items}x{features} {name}",
        draw,
        tuple(contenders),
        samples=num_queries,
        reference=lambda drawn: reference(drawn, is_gradient=name == "gradient"),
        tolerance=TOLERANCE,
        facts={"op": "memory read", "work": name, "items": num_items, "batch": num_queries, "dtype": "float32"},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=16384)
    parser.add_argument("--items", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--forms", nargs="+", default=["fused", "naive"], help="the others are compared with the first")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    sizes = [(name, n) for n in options.items for name in ("forward", "gradient")]
    cases = (case_of(name, options.queries, n, options.features, options.forms) for name, n in sizes)
    race(cases, settings={"forms": options.forms}, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
