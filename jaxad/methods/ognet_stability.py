"""Does OGNet's phase two make up for where phase one stopped? Its study of stability, as a function and a command.

    python -m jaxad.methods.ognet_stability data/mnist --normal-class 0 --set widths=8,16,32,64 \\
        --stops 150,175,200,225,250,275 --json FILE --plot FILE.png

Phase one runs once and is looked at after several steps. Phase two then runs from each of these detectors, side by side
in one program on accelerators, one after the other on a CPU, where vmapped kernels have no fast convolution. Every
detector is judged before and after it. The author's code does so at every step from the fourth epoch
on, one after the other, and the paper's claim is that results vary less afterwards, and are better.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import metrics, train
from jaxad.core import Array, Source, as_arrays, select, take
from jaxad.members import Members, Programs, default_way
from jaxad.methods import ognet

WAYS = ("vmap", "loop")


class Stability(NamedTuple):
    """Image AUROCs of detectors whose phase one stopped after `stops` steps, (k,) each."""

    stops: np.ndarray
    before: np.ndarray  # phase two
    after: np.ndarray


def stability(
    key: Array,
    cfg: ognet.OGNetConfig,
    data: Mapping[str, Any],
    test: Source,
    *,
    stops: Sequence[int],
    way: str | None = None,
    batch_size: int = 64,
    say: Callable[[str], None] = lambda text: None,
) -> Stability:
    """Runs phase two from several steps of one phase one; it sees the same pictures in the same order each time.

    Args:
      key: fixes everything, as in `jaxad.train.fit`: the last stop is the detector of such a run.
      cfg: the config; `steps` is replaced by the last stop, and the old autoencoder is that of `old_share` of it.
      data: its source "train" is trained on.
      test: labelled pictures to judge by.
      stops: steps of phase one, ascending.
      way: phase two of all detectors at once, "vmap", or of one after the other, "loop"; None: by backend.
      batch_size: pictures scored at a time.
      say: gets a line about each piece of work.

    Raises:
      ValueError: an unknown way; fewer than two stops, stops out of order, or before the old autoencoder is there.
    """
    way = way or ("loop" if default_way() == "map" else "vmap")
    if way not in WAYS:
        raise ValueError(f"way={way!r} is unknown; expected one of {WAYS} or None. Pass way='loop'.")
    cfg = _until(cfg, stops)
    states = _phase_one(key, cfg, data, stops, say)
    refined = (_at_once if way == "vmap" else _one_by_one)(key, cfg, data, states, say)
    before, after = [], []
    for stop, state, discriminator in zip(stops, states, refined, strict=True):
        pair = _aurocs(state, discriminator, test, batch_size)
        say(f"stopped after {stop} steps: AUROC {pair[0]:.4f}, after phase two {pair[1]:.4f}")
        before.append(pair[0])
        after.append(pair[1])
    return Stability(np.asarray(stops), np.asarray(before), np.asarray(after))


def _until(cfg: ognet.OGNetConfig, stops: Sequence[int]) -> ognet.OGNetConfig:
    """The config that ends phase one at the last stop."""
    cfg = dataclasses.replace(cfg, steps=max(stops, default=0))
    early = ognet.phases(cfg)[0].steps or 0
    if len(stops) < 2 or sorted(set(stops)) != list(stops) or min(stops) <= early:
        raise ValueError(
            f"stops={list(stops)}; expected at least two ascending steps after {early}, when the old autoencoder is "
            f"kept. Pass stops={[early + (cfg.steps - early) * n // 5 for n in range(1, 6)]}, or a smaller old_share."
        )
    return cfg


def _phase_one(key, cfg, data, stops, say) -> list[ognet.OGNetState]:
    """The detectors at the stops, ready for phase two."""
    early = ognet.phases(cfg)[0].steps or 0
    ready = jax.jit(lambda state: jax.tree.map(jnp.copy, ognet.begin_refining(key, state)))
    states: dict[int, ognet.OGNetState] = {}
    chunk = math.gcd(*(stop - early for stop in stops))
    for progress in train.drive(ognet.METHOD, key, cfg, data, chunk=chunk, patience=math.inf):
        index, step = progress.position
        done = {0: step, 1: early + step, 2: cfg.steps}[index]
        if done in stops:
            states[done] = ready(progress.state)
            say(f"phase one: {done}/{cfg.steps}")
        if index == 2:
            break
    return [states[stop] for stop in stops]


def _at_once(key, cfg, data, states, say) -> list[ognet.Network]:
    """The discriminators after phase two, whose members are the detectors."""
    count = len(states)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    keys, configs = (jax.tree.map(lambda leaf: jnp.stack([leaf] * count), tree) for tree in (key, as_arrays(cfg)))
    final = _refine(keys, configs, data, stacked, Programs(Members(count, "vmap")), say)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], final) for i in range(count)]


def _one_by_one(key, cfg, data, states, say) -> list[ognet.Network]:
    """The same by one program that is called for each."""
    programs = Programs()
    return [_refine(key, cfg, data, jax.tree.map(jnp.copy, state), programs, say) for state in states]


def _refine(key, cfg, data, state, programs, say) -> ognet.Network:
    """Runs phase two from a state, or from stacked ones: the discriminator."""
    start = train.Position(2, 0), state
    for progress in train.drive(ognet.METHOD, key, cfg, data, start=start, programs=programs):
        state = progress.state
        if progress.metrics:
            say(f"phase two: loss {np.mean(progress.metrics['loss']):.3f}")
    return state.discriminator


@jax.jit
def _both_scores(state, discriminator, test, rows):
    """Image scores before and after; the compiler runs the autoencoder, which they share, once."""
    images = take(test, rows)[0]
    return ognet.score(state, images).image, ognet.score(state._replace(discriminator=discriminator), images).image


def _aurocs(state, discriminator, test, batch_size) -> tuple[float, ...]:
    size = len(test)
    pieces = []
    for first in range(0, size, batch_size):
        rows = np.minimum(np.arange(first, first + batch_size, dtype=np.int32), size - 1)
        pieces.append(_both_scores(state, discriminator, test, rows))
    both = (np.concatenate(scores)[:size] for scores in zip(*pieces, strict=True))
    return tuple(metrics.image_metrics(scores, np.asarray(test.label))["auroc"] for scores in both)


# --- report ---------------------------------------------------------------------------------------------------------


def summary(found: Stability) -> dict[str, dict[str, float]]:
    """Mean, sample standard deviation, least and largest AUROC, before and after phase two."""

    def of(values):
        return {
            "mean": float(values.mean()),
            "deviation": float(values.std(ddof=1)),
            "least": float(values.min()),
            "largest": float(values.max()),
        }

    return {"before": of(found.before), "after": of(found.after)}


def table(found: Stability) -> str:
    """The study as a Markdown table."""
    lines = ["| phase one stopped after | image AUROC before phase two | after |", "| --- | --- | --- |"]
    lines += [f"| {stop} steps | {a:.4f} | {b:.4f} |" for stop, a, b in zip(*found, strict=True)]
    facts = summary(found)
    for name in ("mean", "deviation"):
        lines.append(f"| {name} | {facts['before'][name]:.4f} | {facts['after'][name]:.4f} |")
    return "\n".join(lines)


def plot(found: Stability, path: str | os.PathLike) -> None:
    """Draws AUROC over the stops, before and after phase two; the file's ending names its format."""
    from matplotlib.figure import Figure

    figure = Figure((5.0, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, values, colour in (("before", found.before, "#d1495b"), ("after", found.after, "#1b6ca8")):
        text = f"{name} phase two: {values.mean():.3f} ± {values.std(ddof=1):.3f}"
        axes.plot(found.stops, values, marker="o", color=colour, label=text)
    axes.set_xlabel("phase one stopped after, steps")
    axes.set_ylabel("image AUROC")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


# --- command --------------------------------------------------------------------------------------------------------


def choose_test(source: Source, kinds: Sequence[str], *, per_kind: int) -> Source:
    """All normal pictures and the first `per_kind` of each kind of anomaly; `kinds` names that of every sample."""
    label = np.asarray(source.label)
    rows = list(np.flatnonzero(label == 0))
    for kind in sorted(set(np.asarray(kinds)[label == 1])):
        rows += list(np.flatnonzero((label == 1) & (np.asarray(kinds) == kind))[:per_kind])
    return select(source, np.sort(np.asarray(rows)))


def main() -> None:
    import argparse
    import json
    import pathlib

    from jaxad import allocator, data, settings
    from jaxad.bench import machine

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--normal-class", default="0")
    parser.add_argument("--per-class", type=int, default=100, help="test pictures of each other class")
    parser.add_argument("--preset", default="mnist")
    parser.add_argument("--set", action="append", default=[], help="field=value of the config")
    parser.add_argument("--stops", default="150,175,200,225,250,275", help="steps of phase one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    parser.add_argument("--plot", type=pathlib.Path, help="picture to write, ending in .png or .svg")
    options = parser.parse_args()
    allocator.keep_freed_memory()
    wanted = settings.Settings(
        method="ognet",
        data=options.data,
        preset=options.preset,
        seed=options.seed,
        normal_class=options.normal_class,
        holdout=0.0,
        config=settings.parse_assignments(options.set),
    )
    chosen, cfg = settings.resolve(ognet.METHOD, wanted)
    loaded = data.load(options.data, seed=options.seed, **chosen.load_arguments())
    test = choose_test(loaded.sources["test"], loaded.rows["test"].defects, per_kind=options.per_class)
    sources = {"train": jax.device_put(loaded.sources["train"])}
    key, stops = jax.random.key(options.seed), [int(stop) for stop in options.stops.split(",")]
    found = stability(key, cfg, sources, jax.device_put(test), stops=stops, say=lambda text: print(text, flush=True))
    print(table(found))
    if options.plot:
        plot(found, options.plot)
    if options.json:
        facts = {name: value for name, value in vars(options).items() if name not in ("json", "plot", "data")}
        rows = [{"stop": int(stop), "before": float(a), "after": float(b)} for stop, a, b in zip(*found, strict=True)]
        record = {"settings": facts, "pictures": len(test), "rows": rows, "summary": summary(found)}
        record["environment"] = machine.environment()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
