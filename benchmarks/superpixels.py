"""SLIC on the device against scikit-image's, the same number of superpixels, iterations and compactness.

    python -m benchmarks.superpixels --json benchmarks/results/cpu/superpixels.json

Needs jax, numpy and scikit-image. The two do not draw the same borders, so labels cannot be compared; what is compared
is how much of a picture's colour varies within superpixels, relative to the first contender. scikit-image runs without
its clean-up of unconnected parts, as jaxad does, picture after picture as its users call it, and once more with a
thread for each core. Wanted on two cores: at least 3 times the pictures of one call after the other.
"""

import argparse
import concurrent.futures
import os
import pathlib

import jax
import numpy as np

from benchmarks.common import race
from jaxad import allocator
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program
from jaxad.ops import superpixels

ITERATIONS, COMPACTNESS = 10, 10.0
TOLERANCE = 0.3


def draw_pictures(numbers, count, side):
    """Flat patches with straight borders, smooth shading and a little noise, (count, side, side, 3) in [0, 1]."""
    places = np.indices((side, side)).transpose(1, 2, 0) / side
    found = []
    for _ in range(count):
        seeds = numbers.uniform(size=(40, 2))
        nearest = ((places[:, :, None] - seeds) ** 2).sum(axis=-1).argmin(axis=-1)
        flat = numbers.uniform(0.1, 0.9, (40, 3))[nearest]
        shade = 0.1 * np.sin(4 * places @ numbers.uniform(-1, 1, (2, 3)))
        found.append(np.clip(flat + shade + numbers.normal(0, 0.02, flat.shape), 0, 1))
    return np.stack(found).astype(np.float32)


def left_within(labels, image):
    """The share of the colours' variance that is left within superpixels."""
    labels, values = labels.ravel(), image.reshape(-1, 3).astype(np.float64)
    counts = np.maximum(np.bincount(labels), 1)
    means = np.stack([np.bincount(labels, values[:, c]) / counts for c in range(3)], axis=-1)
    return ((values - means[labels]) ** 2).sum() / ((values - values.mean(axis=0)) ** 2).sum()


def fetch(result):
    labels, images = result
    return {"left within": np.asarray(left_within(np.asarray(labels[0]), np.asarray(images[0])))}


def case_of(side, grid, count):
    def ours(images):
        return superpixels.slic(images, grid=grid, compactness=COMPACTNESS, iterations=ITERATIONS)

    def theirs(image):
        from skimage.segmentation import slic

        options = {"n_segments": grid**2, "compactness": COMPACTNESS, "max_num_iter": ITERATIONS}
        return slic(image, **options, start_label=0, enforce_connectivity=False)

    threads = concurrent.futures.ThreadPoolExecutor(os.cpu_count())

    def draw(numbers):
        return draw_pictures(numbers, count, side)

    program = compile_program(ours, draw(np.random.default_rng(0)))
    contenders = (
        Contender(
            "jaxad",
            lambda images: (program.call(images), images),
            fetch=fetch,
            program=program,
            compile_seconds=program.seconds,
        ),
        _host("scikit-image", lambda images: [theirs(image) for image in images]),
        _host("scikit-image, a thread for each core", lambda images: list(threads.map(theirs, images))),
    )
    facts = {"op": "slic", "work": "superpixels", "batch": count, "grid": grid, "tolerance": TOLERANCE}
    return Case(f"slic {side}x{side} K={grid**2} b{count}", draw, contenders, count, tolerance=TOLERANCE, facts=facts)


def _host(name, run):
    return Contender(name, lambda images: (run(images), images), put=lambda drawn: drawn, fetch=fetch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--grids", type=int, nargs="+", default=[16, 8], help="superpixels along a side")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    cases = (case_of(options.side, grid, options.batch) for grid in options.grids)
    race(cases, settings={"backend": jax.default_backend()}, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
