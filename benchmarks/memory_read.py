"""Memory read of MemAE: the naive form, which stores queries x items, against the fused form.

    python benchmarks/memory_read.py --out memory_read.json

Needs jax and numpy only. Every repeat draws fresh inputs and runs all forms on them in turn (A B B A), so that a busy
machine slows both. Times are medians with the fastest and slowest repeat, after a warm-up, up to `block_until_ready`;
compilation is reported apart. The matrix product measured in the same loop is the ceiling that shares refer to.
FLOPs count the matrix products that a form performs: 2 forward; 6 with the gradient, 7 where logits are computed again.

The error is the largest difference to the first form. A weight within rounding of the threshold may be read by one form
and not by the other, which is a jump and no error of arithmetic; "differ" counts the queries that this happened to.

Results are in benchmarks/README.md.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import compile_step, environment, timed, turns, write  # noqa: E402
from jaxad.ops.memory import read_memory  # noqa: E402

ENTROPY_WEIGHT = 2e-4
PRODUCTS = {("naive", "forward"): 2, ("fused", "forward"): 2, ("naive", "gradient"): 6, ("fused", "gradient"): 7}


def forward(form):
    def run(queries, items, threshold, weights):
        read = read_memory(queries, items, threshold=threshold, impl=form)
        return read.value, read.entropy, read.num_active, read.usage

    return run


def gradient(form):
    def loss(queries, items, threshold, weights):
        read = read_memory(queries, items, threshold=threshold, impl=form)
        value = jnp.sum(read.value * weights) + ENTROPY_WEIGHT * jnp.mean(read.entropy)
        return value, (read.num_active, read.usage)  # the monitors of a training step

    return jax.grad(loss, argnums=(0, 1), has_aux=True)


def draw(numbers, num_queries, num_items, features):
    """Items as MemAE initialises them, queries of unit variance, threshold 1/N."""
    bound = features**-0.5
    return jax.block_until_ready(
        (
            jnp.asarray(numbers.standard_normal((num_queries, features), np.float32)),
            jnp.asarray(numbers.uniform(-bound, bound, (num_items, features)).astype(np.float32)),
            jnp.float32(1 / num_items),
            jnp.asarray(numbers.standard_normal((num_queries, features), np.float32)),
        )
    )


def worst_error(result, expected):
    """Largest difference of any output, relative to the largest magnitude of that output, at least 1."""
    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / jnp.maximum(1, jnp.max(jnp.abs(b)))) for a, b in pairs)


def queries_that_differ(result, expected):
    """Queries whose number of items read is not the same. Both are outputs of `forward` or of `gradient`."""
    active, usual = (jax.tree.leaves(x)[2] for x in (result, expected))
    return int(jnp.sum(active != usual))


def measure(num_queries, num_items, features, forms, repeats, numbers):
    arguments = draw(numbers, num_queries, num_items, features)
    square = jax.jit(lambda x: x @ x)
    compiled = {}
    for name, make in (("forward", forward), ("gradient", gradient)):
        compiled.update({(form, name): compile_step(make(form), arguments) for form in forms})
    seconds, errors, differ = {case: [] for case in compiled}, dict.fromkeys(compiled, 0.0), dict.fromkeys(compiled, 0)
    ceiling = []
    for repeat in range(repeats + 1):
        arguments = draw(numbers, num_queries, num_items, features)
        matrix = jnp.asarray(numbers.standard_normal((2048, 2048), np.float32))
        ceiling.append(timed(square, matrix)[0])
        for name in ("forward", "gradient"):
            results = {}
            for form in turns(forms, repeat):
                took, results[form] = timed(compiled[form, name][0], *arguments)
                seconds[form, name].append(took)
            expected = results[forms[0]]
            for form, result in results.items():
                errors[form, name] = max(errors[form, name], worst_error(result, expected))
                differ[form, name] = max(differ[form, name], queries_that_differ(result, expected))
        if repeat == 0:  # warm-up
            ceiling.clear()
            for times in seconds.values():
                times.clear()
    peak = 2 * 2048**3 / min(ceiling)
    return [
        report(form, name, num_queries, num_items, features, compiled[form, name], seconds[form, name], peak)
        | {"worst_error": errors[form, name], "queries_that_differ": differ[form, name]}
        for form, name in compiled
    ]


def report(form, name, num_queries, num_items, features, compiled, seconds, peak):
    step, compile_seconds = compiled
    flops, median = PRODUCTS[form, name] * 2 * num_queries * num_items * features, float(np.median(seconds))
    return {
        "form": form,
        "pass": name,
        "items": num_items,
        "median_ms": 1e3 * median,
        "fastest_ms": 1e3 * min(seconds),
        "slowest_ms": 1e3 * max(seconds),
        "queries_per_second": num_queries / median,
        "gflop": flops / 1e9,
        "share_of_product_ceiling": flops / min(seconds) / peak,
        "product_ceiling_gflops": peak / 1e9,
        "temporary_mib": step.memory_analysis().temp_size_in_bytes / 2**20,
        "compile_seconds": compile_seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=16384)
    parser.add_argument("--items", type=int, nargs="+", default=[500, 2000, 10000])
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--queries-per-image", type=int, default=256, help="positions of the encoding; for images/s")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--forms", nargs="+", default=["naive", "fused"], help="the first is the reference")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    numbers, rows = np.random.default_rng(0), []
    print("form   pass       items  median ms            range  images/s  ceiling  temp MiB    error  differ")
    for num_items in options.items:
        for row in measure(options.queries, num_items, options.features, options.forms, options.repeats, numbers):
            row["images_per_second"] = row["queries_per_second"] / options.queries_per_image
            rows.append(row)
            print(
                f"{row['form']:6} {row['pass']:9} {num_items:6d} {row['median_ms']:10.1f} "
                f"{row['fastest_ms']:7.1f}-{row['slowest_ms']:<8.1f} {row['images_per_second']:9.1f} "
                f"{row['share_of_product_ceiling']:8.0%} {row['temporary_mib']:9.1f} "
                f"{row['worst_error']:8.1e} {row['queries_that_differ']:7d}"
            )
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    if options.out:
        write(options.out, {"settings": settings, "environment": environment(), "results": rows})


if __name__ == "__main__":
    main()
