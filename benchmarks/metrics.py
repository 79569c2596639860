"""Metrics against what one would otherwise call: scikit-learn for AUROC and average precision, scipy for regions.

    python -m benchmarks.metrics --json benchmarks/results/cpu/metrics.json

Needs jax, numpy, scipy and scikit-learn. Every value is compared with a plain NumPy version. Pixels: the histogram of
jaxad.metrics has every measure at once (AUROC, average precision, F1-max, AUPRO); scikit-learn computes the two that it
has. Its bins round scores by 1/512, hence the tolerance.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import race
from jaxad import allocator, metrics
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import compile_program

TOLERANCE = 2e-3


def draw_maps(numbers, count, side):
    """(maps, masks): squared noise, higher in a square on every second picture."""
    masks = np.zeros((count, side, side), np.uint8)
    for row in range(0, count, 2):
        top, left = numbers.integers(0, side - side // 4, 2)
        masks[row, top : top + side // 4, left : left + side // 4] = 1
    noise = numbers.standard_normal(masks.shape, np.float32)
    return (noise + masks) ** 2, masks


def plain(scores, labels):
    """AUROC and average precision from one sort; scores without ties."""
    labels = labels[np.argsort(-scores)].astype(np.float64)
    hits, ranks = np.cumsum(labels), np.arange(1, len(labels) + 1)
    positives, negatives = hits[-1], len(labels) - hits[-1]
    return {
        "auroc": (hits * (1 - labels)).sum() / positives / negatives,
        "ap": (labels * hits / ranks).sum() / positives,
    }


def sklearn_metrics(scores, labels):
    from sklearn.metrics import average_precision_score, roc_auc_score

    return {"auroc": roc_auc_score(labels, scores), "ap": average_precision_score(labels, scores)}


def host(name, function):
    """A contender of NumPy arrays."""
    return Contender(name, lambda drawn: function(*drawn), put=lambda drawn: drawn, fetch=lambda result: result)


def image_case(count):
    def draw(numbers):
        labels = numbers.integers(0, 2, count)
        return numbers.standard_normal(count) + labels, labels

    def ours(scores, labels):
        return {name: metrics.image_metrics(scores, labels)[name] for name in ("auroc", "ap")}

    contenders = host("jaxad", ours), host("scikit-learn", sklearn_metrics)
    facts = {"op": "image metrics", "work": "metrics", "batch": count}
    return Case(f"image metrics {count}", draw, contenders, count, lambda drawn: plain(*drawn), 1e-6, facts=facts)


def pixel_case(count, side):
    def draw(numbers):
        return draw_maps(numbers, count, side)

    def measures(maps, masks):
        weights = masks / jnp.maximum(masks.sum(axis=(1, 2), keepdims=True), 1)  # one region a picture
        valid = jnp.ones(count, bool)
        return metrics.pixel_metrics(metrics.add(metrics.empty_histogram(), maps, masks, weights, valid))

    program = compile_program(measures, *draw(np.random.default_rng(0)))
    ours = Contender(
        "jaxad", lambda x: program.call(*x), program=program, compile_seconds=program.seconds
    )  # fmt: skip
    theirs = host("scikit-learn", lambda maps, masks: sklearn_metrics(maps.ravel(), masks.ravel()))
    return Case(
        f"pixel metrics {count}x{side}x{side}",
        draw,
        (ours, theirs),
        samples=count,
        reference=lambda drawn: plain(*(x.ravel() for x in drawn)),
        tolerance=TOLERANCE,
        facts={"op": "pixel metrics", "work": "metrics", "batch": count},
    )


def region_case(count, side):
    """Weights 1 / size of region: jaxad's against scipy's labels and sums picture by picture."""
    from scipy import ndimage

    def draw(numbers):
        return (draw_maps(numbers, count, side)[1],)

    def theirs(masks):
        weights = np.zeros(masks.shape, np.float32)
        for mask, weight in zip(masks, weights, strict=True):
            labels, regions = ndimage.label(mask, structure=np.ones((3, 3)))
            for region in range(1, regions + 1):
                weight[labels == region] = 1 / ndimage.sum_labels(mask, labels, region)
        return {"weights": weights}

    contenders = host("jaxad", lambda masks: {"weights": metrics.label_regions(masks)}), host("scipy", theirs)
    facts = {"op": "regions", "work": "metrics", "batch": count}

    def reference(drawn):  # one square on every second picture
        return {"weights": drawn[0] / np.maximum(drawn[0].sum(axis=(1, 2), keepdims=True), 1)}

    return Case(f"regions {count}x{side}x{side}", draw, contenders, count, reference, 1e-6, facts=facts)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--smoke", action="store_true", help="small, to see that it works")
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    count, side = (4, 32) if options.smoke else (32, 256)
    makers = (
        lambda: image_case(1_000 if options.smoke else 100_000),
        lambda: pixel_case(count, side),
        lambda: region_case(count, side),
    )
    settings = {"smoke": options.smoke, "backend": jax.default_backend()}
    race((make() for make in makers), settings=settings, rounds=options.rounds, out=options.json)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as the command line does
    main()
