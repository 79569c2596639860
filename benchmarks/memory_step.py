"""Memory step of MNAD (read, both losses, update of the items): one K x M matrix against the public code's item loop.

    python -m benchmarks.memory_step --json benchmarks/results/cpu/memory_step.json

Needs torch for the peer (benchmarks/peers/mnad.py). Both take the encoder's features as their framework lays them out,
and give the decoder's input, compactness, separateness and the new items; "gradient" gives, instead of the first, the
gradient with respect to the features, as a training step does. Outputs are compared with a float64 NumPy version.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.common import race
from jaxad import allocator
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program
from jaxad.cores import usable_cores
from jaxad.ops import prototypes

COMPACTNESS, SEPARATENESS, MARGIN = 0.1, 0.1, 1.0


def forward(features, items):
    """Features (B, h, w, C), items (M, C): all that the memory does in a training step."""
    queries = prototypes.unit(features)
    flat = queries.reshape(-1, queries.shape[-1])
    matches = prototypes.match(flat, items)
    read = prototypes.read(matches, items).reshape(queries.shape)
    return {
        "joined": jnp.concatenate([queries, read], axis=-1),
        "compactness": prototypes.compactness(matches, features=flat.shape[1]).mean(),
        "separateness": prototypes.separateness(matches, margin=MARGIN).mean(),
        "items": prototypes.update(items, flat, matches),
    }


def gradient(features, items, weights):
    """The same, with the gradient of a weighted sum of the decoder's input and of both losses."""

    def loss(features):
        found = forward(features, items)
        total = jnp.sum(found.pop("joined") * weights)
        return total + COMPACTNESS * found["compactness"] + SEPARATENESS * found["separateness"], found

    d_features, found = jax.grad(loss, has_aux=True)(features)
    return {"d_features": d_features, **found}


def reference(drawn, *, is_gradient):
    """The same in float64: queries gathered per item, derivatives by hand."""
    features, items, weights = (np.asarray(x, np.float64) for x in drawn)
    flat = features.reshape(-1, features.shape[-1])
    lengths = np.linalg.norm(flat, axis=1, keepdims=True)
    queries = flat / lengths
    similarity = queries @ items.T
    order = np.argsort(-similarity, axis=1, kind="stable")
    shares = np.exp(similarity) / np.exp(similarity).sum(axis=1, keepdims=True)
    joined = np.concatenate([queries, shares @ items], axis=1)
    near, far = (queries - items[order[:, i]] for i in range(2))
    near_length, far_length = (np.linalg.norm(x, axis=1, keepdims=True) for x in (near, far))
    triplet = near_length - far_length + MARGIN
    moved = items.copy()
    for m in range(len(items)):
        mine = order[:, 0] == m
        pull = np.exp(similarity[mine, m] - similarity[:, m].max()) @ queries[mine]
        moved[m] = (items[m] + pull) / np.linalg.norm(items[m] + pull)
    found = {"compactness": (near**2).mean(), "separateness": np.maximum(triplet, 0).mean(), "items": moved}
    if not is_gradient:
        return {"joined": joined.reshape(*features.shape[:-1], -1), **found}
    count, size = queries.shape
    d_queries = weights.reshape(count, -1)[:, :size] + COMPACTNESS * 2 * near / near.size
    d_queries += SEPARATENESS / count * (triplet > 0) * (near / near_length - far / far_length)
    d_features = (d_queries - queries * (queries * d_queries).sum(axis=1, keepdims=True)) / lengths
    return {"d_features": d_features.reshape(features.shape), **found}


def ours(given, *, is_gradient):
    """jaxad's contender."""
    program = compile_program(gradient if is_gradient else forward, *(given if is_gradient else given[:2]))
    return Contender(
        "jaxad",
        lambda inputs: program.call(*(inputs if is_gradient else inputs[:2])),
        flops=program.flops,
        program=program,
        compile_seconds=program.seconds,
    )


def peer(given, *, is_gradient):
    """The public code's way in torch, eager."""
    import torch

    from benchmarks.peers.mnad import MemoryStep

    torch.set_num_threads(usable_cores())

    def put(drawn):
        features, items, weights = drawn
        features, weights = peers.place(features), peers.place(weights)
        return features.requires_grad_(is_gradient), torch.from_numpy(items).to(peers.device()), weights

    def run(inputs):
        features, items, weights = inputs
        memory = MemoryStep(items)
        with torch.set_grad_enabled(is_gradient):
            joined, separateness, squares, _ = memory(features, train=True, margin=MARGIN)
            compactness = squares.mean()
            found = {"compactness": compactness, "separateness": separateness, "items": memory.items}
            if not is_gradient:
                return {"joined": joined, **found}
            total = (joined * weights).sum() + COMPACTNESS * compactness + SEPARATENESS * separateness
            return {"d_features": torch.autograd.grad(total, features)[0], **found}

    def fetch(found):
        arrays = {name: x.detach().cpu().numpy() for name, x in found.items()}
        return {name: np.moveaxis(x, 1, -1) if x.ndim == 4 else x for name, x in arrays.items()}

    products = 3 * 2 * given[0].size * len(given[1])
    return Contender("torch", run, put=put, wait=peers.wait, fetch=fetch, flops=float(products))


def case_of(name, batch, side, items, features):
    """One pass at one size."""

    def draw(numbers):
        """Features around unit items in all directions, so that each has queries and no query is between two."""
        centres = numbers.standard_normal((items, features), np.float32)
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        noise, weights = (numbers.standard_normal((batch, side, side, n), np.float32) for n in (features, 2 * features))
        near = centres[numbers.integers(0, items, (batch, side, side))]
        return noise + np.float32(features**0.5) * near, centres, weights / np.float32(batch * side * side)

    is_gradient, given = name == "gradient", draw(np.random.default_rng(0))
    return Case(
        f"memory step {batch}x{side}x{side}x{features}, {items} items, {name}",
        draw,
        (ours(given, is_gradient=is_gradient), peer(given, is_gradient=is_gradient)),
        samples=batch,
        reference=lambda drawn: reference(drawn, is_gradient=is_gradient),
        facts={"op": "memory step", "work": name, "items": items, "batch": batch, "dtype": "float32"},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=32, help="of the encoder's map")
    parser.add_argument("--items", type=int, nargs="+", default=[10])
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    sizes = [(name, n) for n in options.items for name in ("forward", "gradient")]
    cases = (case_of(name, options.batch, options.side, n, options.features) for name, n in sizes)
    race(cases, settings={"form": "one matrix against an item loop"}, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
