"""The condition-shift protocol: trained on clean pictures of all classes, asked for the same pictures under conditions.

    python -m benchmarks.condition_shift gradcon --data ../shared/data/mnist --preset cpu --seeds 3 \\
        --variant both: --variant error:score_gradient_weight=0 --variant gradient:score_error_weight=0 --json FILE

Prints a Markdown table of image AUROCs, mean over seeds, by kind and level (see jaxad/data/corruptions.py). A variant
is a name and fields of the config that count in scoring only. Expected: 0.5 where a score does not see the change.
"""

import argparse
import pathlib

import jax
import numpy as np

from benchmarks.common import environment, write
from jaxad import data, methods, runs, settings
from jaxad.conditions import condition_shift
from jaxad.core import select


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("method")
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset")
    parser.add_argument("--normal-class", default="all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=500, help="of the test set")
    parser.add_argument("--set", action="append", default=[], help="field=value of the config")
    parser.add_argument("--variant", action="append", default=[], help="name:field=value[;field=value]")
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    texts = [text.partition(":") for text in options.variant or ["score:"]]
    fields = {name: settings.parse_assignments([t for t in rest.split(";") if t]) for name, _, rest in texts}
    variants = {name: {field: float(value) for field, value in own.items()} for name, own in fields.items()}
    method, rows = methods.get(options.method), []
    for seed in range(options.seeds):
        chosen = settings.Settings(
            method=options.method,
            data=options.data,
            preset=options.preset,
            seed=seed,
            normal_class=options.normal_class,
            config=settings.parse_assignments(options.set),
        )
        chosen, _ = settings.resolve(method, chosen)
        loaded = data.load(chosen.data, seed=seed, **chosen.load_arguments())
        test = loaded.sources["test"]
        drawn = np.random.default_rng(0).permutation(len(test))[: options.pictures]  # the same for every seed
        clean = jax.device_put(select(test, drawn))
        # Without its test set, which holds one class only here, a run is trained and calibrated and nothing else.
        loaded.sources.pop("test")
        detector, _ = runs.train_run(chosen, data=loaded)
        found = condition_shift(jax.random.key(seed), method, detector.state, clean, variants=variants, batch_size=64)
        rows += [{"seed": seed, **row} for row in found]
    show(rows, list(variants))
    if options.json:
        facts = {name: value for name, value in vars(options).items() if name != "json"}
        write(options.json, {"settings": facts, "environment": environment(), "rows": rows})


def show(rows, variants):
    """Prints mean AUROCs, a line for each kind and level."""
    print("| condition | level |", " | ".join(variants), "|")
    print("|" + "---|" * (2 + len(variants)))
    for kind, level in dict.fromkeys((row["kind"], row["level"]) for row in rows):
        chosen = [row for row in rows if (row["kind"], row["level"]) == (kind, level)]
        means = [np.mean([row["image_auroc"] for row in chosen if row["variant"] == name]) for name in variants]
        print(f"| {kind} | {level} |", " | ".join(f"{mean:.3f}" for mean in means), "|")


if __name__ == "__main__":
    main()
