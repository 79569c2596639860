"""What every method must keep, as functions that raise AssertionError; `test_planted.py` shows that each can fail."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import checkpoint, export, shard, train
from jaxad.core import Method, Source, is_static, spec_of, take
from jaxad.members import Programs

# Scores, not parameters, are compared: where a gradient is zero but for rounding, Adam makes two correct runs differ.
CLOSE = {"rtol": 5e-3, "atol": 1e-4}


class Case(NamedTuple):
    """A method with a config and data small enough for seconds on a CPU."""

    method: Method
    cfg: Any
    data: Mapping[str, Source]
    change: Mapping[str, float] = {}  # another value for leaves that 0.5x would not suit
    close: Mapping[str, float] = CLOSE  # how close scores are that differ by rounding only


def make_data(shape, *, rows=13, seed=0) -> dict[str, Source]:
    """Smooth random pictures, a few with a bright square, for all sources."""
    rng = np.random.default_rng(seed)
    wave = np.sin(np.linspace(0, 3, shape[0]))[:, None, None] + rng.normal(0, 0.3, (rows, 1, 1, shape[-1]))
    image = np.clip(90 + 60 * wave + rng.normal(0, 8, (rows, *shape)), 0, 255).astype(np.uint8)
    label = (np.arange(rows) % 3 == 0).astype(np.int32)
    mask = np.zeros((rows, *shape[:2]), np.uint8)
    mask[label == 1, 2:5, 2:5] = 1
    spoilt = np.where(mask[..., None] == 1, 250, image).astype(np.uint8)
    normal = Source(image=jnp.asarray(image), label=jnp.zeros(rows, jnp.int32))
    labelled = Source(image=jnp.asarray(spoilt), label=jnp.asarray(label), mask=jnp.asarray(mask))
    return {"train": normal, "aux": normal, "holdout": normal, "labelled": labelled}


def images_of(case: Case) -> jax.Array:
    return take(case.data["labelled"], jnp.arange(6))[0]


# Without LLVM's optimisations a run compiles in 0.6 of the time, and these train for a few steps only.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_fit = jit(train.fit, static_argnums=0)


def fit(case: Case, seed: int = 0, **leaves):
    """The whole run as one program, compiled once for each method and static config."""
    hashable = case.method._replace(presets=None)
    return _fit(hashable, jax.random.key(seed), _arrays(dataclasses.replace(case.cfg, **leaves)), case.data)[0]


def _arrays(cfg):
    return jax.tree.map(lambda leaf: jnp.float32(leaf), cfg)


def scores_of(case: Case, state):
    return jit(case.method.score)(state, images_of(case))


def scores_after_adapting(case: Case, state):
    """What the images score once the detector has adapted to them; for methods that do not adapt, as before."""

    def run(state, images):
        adapted = case.method.adapt(state, images, case.method.score(state, images))
        assert _types(adapted) == _types(state), "adapt changes the state's structure"
        return case.method.score(adapted, images)

    return jit(run)(state, images_of(case))


def assert_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **(tolerance or CLOSE))


def differ(a, b) -> bool:
    return any(not np.allclose(x, y, rtol=1e-4, atol=1e-7) for x, y in zip(a, b, strict=True))


# --- the checks ---------------------------------------------------------------------------------------------------


def check_structure(case: Case) -> None:
    """No step and no finish changes tree, shapes or dtypes; metrics are a dict of scalars."""
    method, cfg, spec = case.method, case.cfg, spec_of(case.data)
    key = jax.random.key(0)
    state = jax.eval_shape(lambda: train.init(method, key, cfg, spec))
    for phase in method.phases(cfg):
        source = case.data[phase.source]
        after, metrics = jax.eval_shape(lambda s, p=phase, d=source: train.one_step(p, key, s, d, jnp.int32(0)), state)
        assert _types(after) == _types(state), f"step of {phase.name} changes the state's structure"
        assert isinstance(metrics, dict) and all(leaf.shape == () for leaf in jax.tree.leaves(metrics))
        done = jax.eval_shape(lambda s, p=phase: train.finish(p, key, s), state)
        assert _types(done) == _types(state), f"finish of {phase.name} changes the state's structure"


def _types(tree):
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def check_cuts(case: Case) -> None:
    """A run cut in pieces, in any mode, equals the whole."""
    whole, run = scores_of(case, fit(case)), (case.method, jax.random.key(0), case.cfg, case.data)
    programs = Programs()
    for mode, chunk in (("chunks", 2), ("loop", 3)):
        with mock.patch.object(jax, "jit", jit):  # see there
            for progress in train.drive(*run, mode=mode, chunk=chunk, programs=programs):
                state = progress.state
        assert_close(scores_of(case, state), whole, **case.close)


def check_seeds(case: Case) -> None:
    """vmap over keys equals a loop, and seeds differ."""
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    states = jit(jax.vmap(lambda key: train.fit(case.method, key, _arrays(case.cfg), case.data)[0]))(keys)
    singles = [scores_of(case, fit(case, seed)) for seed in range(3)]
    for member, single in enumerate(singles):
        assert_close(scores_of(case, jax.tree.map(lambda leaf, m=member: leaf[m], states)), single, **case.close)
    assert differ(singles[0], singles[1]) and differ(singles[1], singles[2]), "two seeds give the same detector"


def leaves_of(case: Case) -> list[str]:
    return [f.name for f in dataclasses.fields(case.cfg) if not is_static(case.cfg, f.name)]


def check_leaves(case: Case) -> None:
    """vmap over config leaves equals a loop, and each leaf changes something."""
    names = leaves_of(case)
    values = {name: getattr(case.cfg, name) for name in names}
    members = [{}] + [{name: case.change.get(name, 0.5 * values[name])} for name in names]
    stacked = {name: jnp.float32([m.get(name, values[name]) for m in members]) for name in names}
    run = jit(
        jax.vmap(
            lambda leaves: train.fit(
                case.method, jax.random.key(0), dataclasses.replace(case.cfg, **leaves), case.data
            )[0]
        )
    )
    states, singles = run(stacked), [fit(case, **member) for member in members]
    base, base_adapted = scores_of(case, singles[0]), scores_after_adapting(case, singles[0])
    for index, (member, single) in enumerate(zip(members, singles, strict=True)):
        alone = scores_of(case, single)
        assert_close(scores_of(case, jax.tree.map(lambda leaf, i=index: leaf[i], states)), alone, **case.close)
        if member and not differ(alone, base):  # it may be for adapting alone
            adapted = scores_after_adapting(case, single)
            assert differ(adapted, base_adapted), f"config leaf {list(member)[0]} changes nothing"


@contextlib.contextmanager
def compiles():
    """Counts the backend compilations inside."""
    count = [0]

    def listen(event, duration, **kwargs):
        del duration, kwargs
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        from jax._src import monitoring

        with contextlib.suppress(Exception):
            monitoring.unregister_event_duration_listener(listen)


def check_recompiles(case: Case, names: tuple[str, ...] = ()) -> None:
    """New values of config leaves (or of the named fields) do not compile anything."""
    run = jit(lambda key, cfg: train.fit(case.method, key, cfg, case.data)[0])
    key, configs = jax.random.key(0), [_arrays(case.cfg)]
    for name in names or leaves_of(case):
        value = case.change.get(name, 0.5 * getattr(case.cfg, name))
        configs.append(_arrays(dataclasses.replace(case.cfg, **{name: value})))
    jax.block_until_ready(run(key, configs[0]))
    with compiles() as count:
        for cfg in configs[1:]:
            jax.block_until_ready(run(key, cfg))
    assert count[0] == 0, f"{count[0]} compilations for new values of {names or leaves_of(case)}"


def check_rows(case: Case) -> None:
    """Row i of a score depends on image i only; scores are finite and have the declared shapes."""
    state, images, score = fit(case), images_of(case), jit(case.method.score)
    scores = score(state, images)
    assert scores.image.shape == images.shape[:1] and scores.map.shape == (images.shape[0], *images.shape[-3:-1])
    assert scores.image.dtype == scores.map.dtype == jnp.float32
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in scores)
    for row in range(images.shape[0]):
        alone = score(state, images[row : row + 1])
        assert_close(alone, jax.tree.map(lambda leaf, r=row: leaf[r : r + 1], scores), rtol=1e-4, atol=5e-5)


def check_passes(case: Case) -> None:
    """A pass gives the same for every batch size, so padding rows count for nothing."""
    key, spec = jax.random.key(0), spec_of(case.data)
    start = jit(lambda key: train.init(case.method, key, case.cfg, spec))(key)
    for index, phase in enumerate(case.method.phases(case.cfg)):
        if phase.steps is not None:
            continue
        results = []
        for size in (3, 8, len(case.data[phase.source])):
            sized = phase._replace(batch_size=size)
            source, key_phase = case.data[phase.source], train.phase_key(key, index)
            count = train.num_steps(sized, len(source))

            def run(state, phase=sized, key=key_phase, source=source, count=count):
                state, _ = train.some_steps(phase, key, state, source, jnp.int32(0), count)
                return train.finish(phase, key, state)

            results.append(jit(run)(start))
        assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
        assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)


def check_sharded(case: Case) -> None:
    """Batches split over 4 devices train the same detector as one device."""
    mesh = shard.data_mesh(jax.devices()[:4])
    data = shard.replicate(case.data, mesh)
    run = jit(lambda key, data: train.fit(case.method, key, case.cfg, data, place=shard.over_data(mesh))[0])
    state = jax.device_get(run(jax.random.key(0), data))
    assert_close(scores_of(case, state), scores_of(case, fit(case)), **case.close)


def check_saved(case: Case, folder: pathlib.Path) -> None:
    """A checkpoint gives the same bits back; the exported score is the score."""
    state = fit(case)
    checkpoint.save(folder, 1, state, {"note": "x"})
    template = jax.eval_shape(lambda: train.init(case.method, jax.random.key(0), case.cfg, spec_of(case.data)))
    saved = checkpoint.restore(folder, template)
    assert saved.meta["note"] == "x" and jax.tree.structure(saved.state) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(saved.state), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(a, b)
    pixels = case.data["labelled"].image[:3]
    artefact = export.export_score(case.method, saved.state, spec_of(case.data))
    got = jax.export.deserialize(bytearray(artefact)).call(pixels)
    assert_close(got, jax.jit(case.method.score)(state, pixels.astype(jnp.float32) / 255), rtol=1e-4, atol=1e-5)
