"""What loss profiles, a learned sampler and a few labels are worth: five detectors on the same pictures and labels.

    python -m benchmarks.loss_profiles --data ../shared/data/mvtec/bottle --seeds 3 --json FILE

  final      the predictor sees the error after the last step only (T = 1)
  random     patches are picked by uniform actions
  colour     the same predictor on colours, without an autoencoder: a small supervised segmentation network
  unlabelled the mean of the profile, random patches, no labels
  full       the whole method

Prints a Markdown table: mean over seeds with its 95 % interval (Student's t), then the paired differences that the
method's claims are about. Labelled pictures are drawn by seed and are in nobody's test set. Expected: `full` above
`final`; whether it is above `random` is what one wants to know.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from benchmarks.common import environment, write
from jaxad import data, settings, train
from jaxad.core import Scores, as_arrays, spec_of, take
from jaxad.detector import Detector
from jaxad.measure import measure
from jaxad.members import Programs
from jaxad.methods import neural_batch

METHOD = neural_batch.METHOD

VARIANTS = {
    "final": {"profile_length": 1},
    "random": {"sampler": "random"},
    "colour": {"profile_length": 3},
    "unlabelled": {"predictor": "none", "sampler": "random"},
    "full": {},
}
MEASURES = ("pixel_auroc", "pixel_ap", "image_auroc")
CLAIMS = (("full", "final"), ("full", "random"), ("full", "unlabelled"), ("full", "colour"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], help="field=value of the config")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    names, rows, programs = options.variants.split(","), [], {}
    for seed in range(options.seeds):
        chosen = settings.Settings(
            method=METHOD.name,
            data=options.data,
            preset=options.preset,
            seed=seed,
            config=settings.parse_assignments(options.set),
        )
        chosen, cfg = settings.resolve(METHOD, chosen)
        loaded = data.load(chosen.data, seed=seed, **chosen.load_arguments()).to_device()
        for name in names:
            row = {"seed": seed, "variant": name, **run(name, cfg, seed, loaded, programs)}
            rows.append(row)
            print(json.dumps({part: value for part, value in row.items() if part != "over_time"}), flush=True)
            if options.json:
                facts = {key: value for key, value in vars(options).items() if key != "json"}
                write(options.json, {"settings": facts, "environment": environment(), "rows": rows})
    show(rows, names)


def run(name, cfg, seed, loaded, programs):
    """Trains and measures a variant."""
    began = time.perf_counter(), time.process_time()
    cfg = dataclasses.replace(cfg, **VARIANTS[name])
    sources = {role: source for role, source in loaded.sources.items() if role != "test"}
    key, spec, tested, log = jax.random.key(seed), spec_of(sources), METHOD, {}
    if name == "colour":
        state = fit_colours(key, cfg, sources, spec)
        tested = tested._replace(score=score_colours)
    else:
        shared = programs.setdefault(name, Programs())
        for progress in train.drive(tested, key, cfg, sources, programs=shared):
            state = progress.state
            if progress.name == "sampler":
                for part, values in progress.metrics.items():
                    log.setdefault(part, []).extend(round(float(value), 5) for value in values)
    found = measure(Detector(tested, state, None, spec), loaded)[0]
    late = {part: float(np.mean(values[-10:])) for part, values in log.items()}
    figures = {name: float(found[name]) for name in MEASURES}
    seconds = {"seconds": time.perf_counter() - began[0], "processor_seconds": time.process_time() - began[1]}
    return {**figures, **seconds, "over_time": log, "at_the_end": late}


def fit_colours(key, cfg, sources, spec):
    """The predictor alone, on colours: as many steps on as many pictures as beside an autoencoder."""
    state = train.init(METHOD, key, cfg, spec)
    labelled, normal = sources["labelled"], sources["train"]
    images, _, masks = take(labelled, jnp.arange(len(labelled)))
    positive, negative = masks.sum(), (1 - masks).sum()
    state = state._replace(labelled=state.labelled._replace(positive=positive, negative=negative))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(key, state):
        key_rows, key_fit = jax.random.split(key)
        rows = jax.random.randint(key_rows, (cfg.episodes, len(labelled)), 0, len(normal))
        others = jax.vmap(lambda r: take(normal, r)[0])(rows)
        pictures = jnp.concatenate([jnp.broadcast_to(images, (cfg.episodes, *images.shape)), others], axis=1)
        known = jnp.broadcast_to(masks, (cfg.episodes, *masks.shape))
        marks = jnp.concatenate([known, jnp.zeros((cfg.episodes, *masks.shape))], axis=1)
        return neural_batch.fit_predictor(key_fit, state, jnp.moveaxis(pictures, -1, 2), marks)[0]

    state = state._replace(cfg=as_arrays(state.cfg))
    for t in range(cfg.steps):
        state = jax.block_until_ready(step(jax.random.fold_in(key, t), state))
    return state


def score_colours(state, images):
    """Scores pictures by their colours."""
    maps = jax.nn.sigmoid(neural_batch.classify(state, jnp.moveaxis(images, -1, 1)))
    return Scores(image=maps.max(axis=(1, 2)), map=maps)


def show(rows, names):
    """Prints means with their intervals, and paired differences."""
    table = {name: [row for row in rows if row["variant"] == name] for name in names}
    print("| | " + " | ".join(MEASURES) + " |\n" + "|---" * (1 + len(MEASURES)) + "|")
    for name, own in table.items():
        print(f"| {name} | " + " | ".join(interval([row[m] for row in own]) for m in MEASURES) + " |")
    for better, worse in CLAIMS:
        if better in table and worse in table:
            pairs = [(a, b) for a, b in zip(table[better], table[worse], strict=True)]
            apart = [interval([a[m] - b[m] for a, b in pairs]) for m in MEASURES]
            print(f"| {better} - {worse} | " + " | ".join(apart) + " |")


def interval(values):
    """A mean with its 95 % interval."""
    mean = np.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"


if __name__ == "__main__":
    main()
