"""Nearest neighbours in a bank: jaxad's tiled search against torch, scikit-learn and scipy.

    python -m benchmarks.nearest --json benchmarks/results/cpu/nearest.json

Needs torch, scikit-learn and scipy for the peers; those missing are left out. Sizes are those of Patch SVDD on 209
pictures: 679,041 rows of 64 features, and the 3,249 patches of a picture as queries. The tree is given fewer queries
(--tree-queries), since in as many dimensions it visits nearly all rows; building it is not timed. torch and
scikit-learn compute products slice by slice, the former with the place of each minimum, then the distance directly.
`--vectors FILE.npz` takes `bank` and `queries` from a file, such as embeddings of pictures, whose dimension is lower
than that of noise. Distances are compared with a float64 NumPy version.

On record for two cores: 2.8 times as fast as torch, at 44 % of the rate of a square product, in bfloat16 at 70 %.
"""

import argparse
import importlib.util
import os
import pathlib

import jax
import numpy as np

from benchmarks.common import race
from jaxad import allocator
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program
from jaxad.ops.nearest import nearest

_SLICE = 8192  # bank rows in a product of the torch version
_CHECKED = 16  # queries


def ours(given, options):
    """jaxad's contender."""
    program = compile_program(lambda queries, bank: nearest(queries, bank, **options).distance[:, 0], *given)
    return Contender(
        "jaxad" + "".join(f" {value}" for value in options.values()),
        lambda inputs: program.call(*inputs),
        fetch=lambda found: {"distance": jax.device_get(found)},
        flops=2.0 * given[0].size * len(given[1]),
        program=program,
        compile_seconds=program.seconds,
    )


def in_torch(flops):
    """Products with slices of the bank, the place of each minimum, the distance directly."""
    import torch

    from benchmarks import peers
    from benchmarks.peers import patch_svdd

    torch.set_num_threads(_cores())

    def put(drawn):
        return tuple(torch.from_numpy(x).to(peers.device()) for x in drawn)

    def run(inputs):
        with torch.no_grad():
            return patch_svdd.nearest(*inputs)

    return Contender("torch", run, put=put, wait=peers.wait, fetch=lambda d: {"distance": d.cpu().numpy()}, flops=flops)


def in_sklearn(flops):
    """Its brute force, which computes products in blocks on all cores."""
    from sklearn.neighbors import NearestNeighbors

    def put(drawn):
        queries, bank = drawn
        return queries, NearestNeighbors(n_neighbors=1, algorithm="brute", n_jobs=-1).fit(bank)

    def run(inputs):
        queries, fitted = inputs
        return fitted.kneighbors(queries)[0][:, 0]

    return Contender("scikit-learn", run, put=put, wait=lambda d: d, fetch=lambda d: {"distance": d}, flops=flops)


def in_scipy():
    """The KD-tree on all cores."""
    from scipy.spatial import cKDTree

    return Contender(
        "scipy tree",
        lambda inputs: inputs[1].query(inputs[0], workers=-1)[0],
        put=lambda drawn: (drawn[0], cKDTree(drawn[1])),
        wait=lambda d: d,
        fetch=lambda d: {"distance": d},
    )


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def reference(drawn):
    """The first queries in float64, against all rows."""
    queries, bank = drawn[0][:_CHECKED].astype(np.float64), drawn[1]
    least = np.full(len(queries), np.inf)
    for first in range(0, len(bank), 1 << 16):
        rows = bank[first : first + (1 << 16)].astype(np.float64)
        squares = (queries**2).sum(axis=1)[:, None] - 2 * queries @ rows.T + (rows**2).sum(axis=1)
        least = np.minimum(least, squares.min(axis=1))
    return {"distance": np.sqrt(np.maximum(least, 0))}


def case_of(name, num_queries, num_rows, features, vectors, *, contenders):
    """One size. `contenders` is a function of what was drawn, since programs are compiled for its shapes."""

    def draw(numbers):
        if vectors is None:
            queries, bank = (numbers.standard_normal((n, features), np.float32) for n in (num_queries, num_rows))
            return queries, bank
        chosen = numbers.choice(len(vectors["queries"]), num_queries, replace=False)
        return vectors["queries"][chosen], vectors["bank"]

    given = draw(np.random.default_rng(0))
    where = "noise" if vectors is None else "vectors given"
    return Case(
        f"nearest of {len(given[1])}x{given[1].shape[1]} ({where}), {num_queries} queries, {name}",
        draw,
        tuple(contenders(given)),
        samples=num_queries,
        reference=reference,
        facts={"op": "nearest", "work": name, "rows": len(given[1]), "batch": num_queries, "dtype": "float32"},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--queries", type=int, default=3249)
    parser.add_argument("--tree-queries", type=int, default=64, help="0 leaves the tree out")
    parser.add_argument("--rows", type=int, nargs="+", default=[679_041])
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--vectors", type=pathlib.Path, help="npz file with float32 arrays bank and queries")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    vectors = None
    if options.vectors:
        with np.load(options.vectors, allow_pickle=False) as file:
            vectors = {name: file[name] for name in ("bank", "queries")}

    def brute(given):
        flops = 2.0 * given[0].size * len(given[1])
        yield ours(given, {})
        yield ours(given, {"precision": "bfloat16"})
        if importlib.util.find_spec("torch"):
            yield in_torch(flops)
        if importlib.util.find_spec("sklearn"):
            yield in_sklearn(flops)

    def tree(given):
        yield ours(given, {})
        yield in_scipy()

    def cases():
        for rows in options.rows:
            sizes = rows, options.features, vectors
            yield case_of("brute force", options.queries, *sizes, contenders=brute)
            if options.tree_queries:
                yield case_of("tree", options.tree_queries, *sizes, contenders=tree)

    settings = {"tree queries": options.tree_queries, "vectors": bool(vectors)}
    race(cases(), settings=settings, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
