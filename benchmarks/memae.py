"""Throughput of MemAE: pictures or clips a second, training and scoring, with the naive and with the fused memory read.

    python benchmarks/memae.py --preset mvtec --batch 4 --items 500 2000 10000 --out memae.json

Needs jax, flax, optax and numpy only. Every repeat draws fresh pictures and runs all forms on them in turn (A B B A),
up to `block_until_ready`, after a warm-up; medians with the fastest and slowest repeat. Compilation is reported apart.
Scores of the forms are compared with each other in every repeat. FLOPs are XLA's count of the compiled program, and the
ceiling is a matrix product measured in the same loop.
"""

import argparse
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks.common import compile_step, environment, timed, turns, write  # noqa: E402
from jaxad import train  # noqa: E402
from jaxad.core import Batch, Spec  # noqa: E402
from jaxad.methods import get  # noqa: E402

METHOD = get("memae")


def shape_of(preset, image_size):
    """The sample's shape in this preset, at another picture size if one is given."""
    size = image_size or preset.data["image_size"]
    picture = (size, size, preset.data["channels"])
    return (preset.data["clip"], *picture) if "clip" in preset.data else picture


def programs(cfg, spec, images):
    """{"score": ..., "train": ...}: functions of (state, images)."""
    state = jax.jit(lambda key: train.init(METHOD, key, cfg, spec))(jax.random.key(0))
    size = images.shape[0]
    rows = jnp.arange(size)
    mask = jnp.zeros((size, *images.shape[-3:-1]))

    def train_step(state, images):
        batch = Batch(images.astype(jnp.float32) / 255, jnp.zeros(size, jnp.int32), mask, rows, rows >= 0)
        return METHOD.phases(cfg)[0].step(jax.random.key(1), state, batch)

    def score(state, images):
        return METHOD.score(state, images.astype(jnp.float32) / 255)

    return state, {"score": score, "train": train_step}


def measure(preset, num_items, options, numbers):
    """Rows of the table for one size of the memory."""
    spec = Spec(shape_of(preset, options.image_size), {})
    fields = {**preset.config, "num_items": num_items, "shrink_threshold": 1 / num_items, "dtype": options.dtype}

    def draw():
        return jnp.asarray(numbers.integers(0, 256, (options.batch, *spec.image), np.uint8))

    square, cases, seconds, ceiling, error = jax.jit(lambda x: x @ x), {}, {}, [], 0.0
    for form in options.forms:
        state, made = programs(METHOD.config(**{**fields, "read_impl": form}), spec, draw())
        for name in options.passes:
            cases[form, name] = (state, *compile_step(made[name], (state, draw())))
            seconds[form, name] = []
    for repeat in range(options.repeats + 1):
        images, matrix = draw(), jnp.asarray(numbers.standard_normal((2048, 2048), np.float32))
        product = timed(square, matrix)[0]
        scores = []
        for name, form in itertools.product(options.passes, turns(options.forms, repeat)):
            state, program, _ = cases[form, name]
            took, result = timed(program, state, images)
            if repeat:  # the first is the warm-up
                seconds[form, name].append(took)
            if name == "score":
                scores.append(np.asarray(result.image))
        ceiling += [product] if repeat else []
        error = max([error, *(float(abs(s - scores[0]).max() / abs(scores[0]).max()) for s in scores)])
    peak = 2 * 2048**3 / min(ceiling)
    return [
        {
            "form": form,
            "pass": name,
            "items": num_items,
            "samples_per_second": options.batch / float(np.median(seconds[form, name])),
            "median_ms": 1e3 * float(np.median(seconds[form, name])),
            "fastest_ms": 1e3 * min(seconds[form, name]),
            "slowest_ms": 1e3 * max(seconds[form, name]),
            "share_of_product_ceiling": program.cost_analysis()["flops"] / min(seconds[form, name]) / peak,
            "temporary_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
            "compile_seconds": compile_seconds,
            "worst_score_difference": error,
        }
        for (form, name), (_, program, compile_seconds) in cases.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=METHOD.presets, default="mvtec")
    parser.add_argument("--image-size", type=int, help="pixels a side, if not the preset's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--items", type=int, nargs="+", default=[500, 2000, 10000])
    parser.add_argument("--passes", nargs="+", default=["score", "train"])
    parser.add_argument("--forms", nargs="+", default=["naive", "fused"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file to write")
    options = parser.parse_args()
    numbers, rows = np.random.default_rng(0), []
    print("form   pass   items  samples/s  median ms            range  ceiling  temp MiB  compile s  difference")
    for num_items in options.items:
        for row in measure(METHOD.presets[options.preset], num_items, options, numbers):
            rows.append(row)
            print(
                f"{row['form']:6} {row['pass']:5} {row['items']:6d} {row['samples_per_second']:10.2f} "
                f"{row['median_ms']:10.1f} {row['fastest_ms']:7.1f}-{row['slowest_ms']:<8.1f} "
                f"{row['share_of_product_ceiling']:8.0%} {row['temporary_mib']:9.1f} {row['compile_seconds']:10.1f} "
                f"{row['worst_score_difference']:11.1e}"
            )
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    if options.out:
        write(options.out, {"settings": settings, "environment": environment(), "results": rows})


if __name__ == "__main__":
    main()
