"""The cases of a method: a step of each of its training phases, and scoring.

Nothing is private to the benchmark: training calls `train.one_step`, or `train.some_steps` where `drive` would scan,
scoring calls `score.score_rows`. Pictures are noise and weights are untrained; neither changes what is computed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxad import metrics, score, settings, train
from jaxad.bench.case import Case, Contender
from jaxad.bench.program import Program, compile_program
from jaxad.core import Method, Phase, Source, Spec

_STEPS_CHECKED = 2  # the first loss is the same whatever the gradient, the second follows from it
_PICTURES_CHECKED = 2
_CHUNK = 50  # steps of a scan, as in `train.drive`


class Tolerance(NamedTuple):
    """Largest differences to the reference."""

    outputs: float  # relative to the largest magnitude
    changes: float  # of a field of the state, see `worst_change`: 1 would let a step pass that does nothing


# Steps amplify rounding. Off the CPU, float32 products are made of shorter ones unless the user says otherwise. Adam
# divides gradients by their size, so small ones, which are mostly rounding, count like others: MNAD's changes in
# bfloat16 disagree by 0.4.
_BFLOAT16 = Tolerance(1e-1, 0.8)
_TOLERANCES = {("cpu", "float32"): Tolerance(2e-3, 0.05), ("cpu", "bfloat16"): _BFLOAT16}
_ELSEWHERE = {"float32": Tolerance(2e-2, 0.3), "bfloat16": _BFLOAT16}


class Setting(NamedTuple):
    """A method at one size."""

    method: Method
    preset: str
    cfg: Any
    shape: tuple[int, ...]  # of a sample: (H, W, C) or (T, H, W, C)
    target: int  # the frame of a clip that its label belongs to
    batch: int
    dtype: str
    tolerance: float  # largest difference of outputs to the reference

    @property
    def changes_tolerance(self) -> float:
        """Largest disagreement of what training changes in the state."""
        return max(self.tolerance, _usual(self.dtype).changes)

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        names = {"method": self.method.name, "preset": self.preset, "image": list(self.shape)}
        return {**names, "batch": self.batch, "dtype": self.dtype, "tolerance": self.tolerance}

    def name_of(self, work: str) -> str:
        """A case's name; what the name says is what must agree for two records to be compared."""
        size = "x".join(map(str, self.shape))
        return f"{self.method.name} {self.preset} {size} {work} b{self.batch} {self.dtype}"


def set_up(
    method: Method,
    *,
    preset: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 32,
    dtype: str = "float32",
    tolerance: float | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Setting:
    """Resolves preset, picture size, batch and dtype, as training does. Raises ValueError where they do not fit.

    `tolerance` is the largest difference to the reference, relative to the largest magnitude; None for that of the
    device and dtype. Steps that are training runs themselves amplify rounding by more than it allows. What they change
    in the state may disagree by what device and dtype allow, or by `tolerance` where that is more.
    """
    known = {field.name for field in dataclasses.fields(method.config)}
    given = {**({"batch_size": batch} if "batch_size" in known else {}), "dtype": dtype, **(fields or {})}
    chosen = settings.Settings(method=method.name, preset=preset, image_size=image_size, config=given)
    full, cfg = settings.resolve(method, chosen)
    size = full.image_size or 256
    height, width = (size, size) if isinstance(size, int) else size
    picture = (height, width, full.channels or 3)
    shape = (full.clip, *picture) if full.clip else picture
    tolerance = tolerance or _usual(dtype).outputs
    return Setting(method, str(full.preset), cfg, shape, full.target or 0, batch, dtype, tolerance)


def _usual(dtype: str) -> Tolerance:
    """What the device and a dtype allow."""
    return _TOLERANCES.get((jax.default_backend(), dtype)) or _ELSEWHERE[dtype]


def cases(
    setting: Setting,
    *,
    work: Sequence[str] = ("train", "score"),
    rivals: Callable | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Iterator[Case]:
    """The cases of a method at one size, built one at a time: what is compiled for one is dropped before the next.

    Args:
      setting: see `set_up`.
      work: "train" (a case for each phase), "score", or both.
      rivals: (setting, work, phase index or None, state, spec, key) -> (further contenders: peers, {name: reason} of
        those left out).
      variants: name -> fields of the config in which a further contender differs, for comparing implementations.
    """
    if "train" in work:
        for index in _raced_phases(setting):
            yield _training(setting, index, rivals, variants or {})
    if "score" in work:
        yield _scoring(setting, rivals, variants or {})


def case_names(setting: Setting, work: Sequence[str]) -> list[str]:
    """Names of the cases that `cases` would build."""
    phases = setting.method.phases(setting.cfg)
    steps = [f"train:{phases[index].name}" for index in _raced_phases(setting)] if "train" in work else []
    return [setting.name_of(part) for part in (*steps, *(["score"] if "score" in work else []))]


def _raced_phases(setting: Setting) -> list[int]:
    """Indices of the phases; rounds of the same phase are one program."""
    phases = setting.method.phases(setting.cfg)
    first_of = {(phase.step, phase.source): index for index, phase in reversed(list(enumerate(phases)))}
    return sorted(first_of.values())


def draw_source(setting: Setting, numbers: np.random.Generator, rows: int, *, labelled: bool = False) -> Source:
    """A source of noise, NumPy arrays; half of a labelled one's samples are anomalous, in a quarter of the picture."""
    *clip, height, width, channels = setting.shape
    pictures = rows + clip[0] - 1 if clip else rows
    pixels = np.frombuffer(numbers.bytes(pictures * height * width * channels), np.uint8)
    label = np.arange(pictures, dtype=np.int32) % 2 if labelled else np.zeros(pictures, np.int32)
    mask = np.zeros((pictures, height, width), np.uint8) if labelled else None
    if mask is not None:
        mask[1::2, : height // 2, : width // 2] = 1
    options: dict[str, Any] = {}
    if clip:
        options = {"start": np.arange(rows, dtype=np.int32), "clip": clip[0], "target": setting.target}
    return Source(image=pixels.reshape(pictures, height, width, channels), label=label, mask=mask, **options)


def rows_of(setting: Setting) -> int:
    """Samples in a source from which batches are drawn."""
    return max(2 * setting.batch, 8)


def spec_of(setting: Setting) -> Spec:
    """What `init` may know: every source that a phase folds over has `rows_of` samples."""
    sources = {"train", *(phase.source for phase in setting.method.phases(setting.cfg))}
    return Spec(setting.shape, dict.fromkeys(sorted(sources), rows_of(setting)))


def start(setting: Setting, cfg: Any, spec: Spec) -> Any:
    """The untrained state; the same for the same shapes."""
    setting.method.check(cfg, spec)
    return jax.jit(lambda key: train.init(setting.method, key, cfg, spec))(jax.random.key(0))


# --- training -----------------------------------------------------------------------------------------------------


class Steps(NamedTuple):
    """What is drawn for a run of a training phase."""

    source: Source
    first: np.int32


def steps_of_run(phase: Phase) -> int:
    """Steps in one program: one, or a scan of them where `drive` scans."""
    return 1 if train.default_mode() == "loop" else min(_CHUNK, phase.steps or 1)


def _training(setting: Setting, index: int, rivals: Callable | None, variants: Mapping) -> Case:
    phase, key = _phase(setting, setting.cfg, index), train.phase_key(jax.random.key(0), index)
    rows, count = rows_of(setting), steps_of_run(phase)
    spec = spec_of(setting)
    begun = [0]

    def draw(numbers):
        first, begun[0] = begun[0], begun[0] + count
        last = train.num_steps(phase, rows)  # of a pass, the end of which is padding
        first = first % max(last - count + 1, 1) if phase.steps is None else first
        return Steps(draw_source(setting, numbers, rows, labelled=phase.source == "labelled"), np.int32(first))

    given = draw(np.random.default_rng(0))
    configs = {"jaxad": setting.cfg}
    configs |= {name: dataclasses.replace(setting.cfg, **fields) for name, fields in variants.items()}
    own = []
    for name, cfg in configs.items():
        own.append(_trainer(name, _phase(setting, cfg, index), key, start(setting, cfg, spec), given, count))
    state = start(setting, setting.cfg, spec)
    more, left_out = rivals(setting, "train", index, state, spec, key) if rivals else ((), {})
    reference, changes = _slow_steps(phase, key, start(setting, _precise(setting.cfg), spec), count)
    begun[0] = 0
    facts = {**setting.facts, "work": "train", "phase": phase.name, "steps": count, "left_out": left_out}
    return Case(
        setting.name_of(f"train:{phase.name}"),
        draw,
        (*own, *more),
        samples=setting.batch * count,
        reference=reference,
        tolerance=setting.tolerance,
        checks=_STEPS_CHECKED if count == 1 else 1,
        changes=changes,
        changes_tolerance=setting.changes_tolerance,
        facts=facts,
    )


def _phase(setting: Setting, cfg: Any, index: int) -> Phase:
    return setting.method.phases(cfg)[index]._replace(batch_size=setting.batch)


def _trainer(name: str, phase: Phase, key: Any, state: Any, given: Steps, count: int) -> Contender:
    """Trains on and on: each run takes the state that the run before it left, which it may overwrite, as in `drive`."""
    program = _compile_steps(phase, key, state, given, count, donate=(0,))
    begun, held = _on_host(state), [state]
    del state

    def run(steps):
        held[0], found = program.call(held[0], key, steps.source, steps.first)
        return found, held[0]

    def changes(drawn):
        if count <= _STEPS_CHECKED:
            return _changes(begun, held[0])
        few = _compile_steps(phase, key, begun, drawn, _STEPS_CHECKED)  # of a scan: the reference goes no further
        return _changes(begun, few.call(begun, key, drawn.source, drawn.first)[0])

    return Contender(
        name,
        run,
        put=lambda drawn: Steps(jax.device_put(drawn.source), drawn.first),
        fetch=lambda result: telling(jax.device_get(result[0])),
        flops=program.flops,
        program=program,
        compile_seconds=program.seconds,
        changes=changes,
    )


def _compile_steps(phase: Phase, key: Any, state: Any, given: Steps, count: int, **options: Any) -> Program:
    def steps(state, key, source, first):
        if count == 1:
            return train.one_step(phase, key, state, source, first)
        return train.some_steps(phase, key, state, source, first, count)

    return compile_program(steps, state, key, jax.device_put(given.source), given.first, **options)


_copied = jax.jit(functools.partial(jax.tree.map, jnp.copy))


def _on_host(state: Any) -> Any:
    """A copy: on the CPU `device_get` alone gives views, of memory that the next step wants to overwrite."""
    return jax.device_get(_copied(state))


def _changes(begun: Any, state: Any) -> dict[str, np.ndarray]:
    """What steps changed in a state, of float leaves: a vector for each field that holds arrays, by its path.

    The moments of an optimiser are left out. Steps are made of them, and the squares among them double each rounding.
    """
    found: dict[str, list[np.ndarray]] = {}
    befores, afters = (jax.tree_util.tree_leaves_with_path(s, is_leaf=_is_moments) for s in (begun, _on_host(state)))
    for (path, before), (_, after) in zip(befores, afters, strict=True):
        if _is_moments(before) or not jnp.issubdtype(before.dtype, jnp.floating):
            continue
        if np.isfinite(before).all():  # the least value of no pictures is infinite
            found.setdefault(_field(path), []).append((after - before).ravel())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _is_moments(node: Any) -> bool:
    return type(node).__module__.startswith("optax")


def _field(path: tuple) -> str:
    """The path to a leaf without the layers of its network: ".generator.params" of ".generator.params['up']['bias']".

    Fields are compared apart: running statistics, say, change by far more than the weights beside them.
    """
    named = [depth for depth, key in enumerate(path, 1) if isinstance(key, jax.tree_util.GetAttrKey)]
    return jax.tree_util.keystr(path[: named[-1] if named else 1])


def telling(found: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics by which steps are compared: the loss, or all where a phase has none. Counts may jump by rounding."""
    return {"loss": found["loss"]} if "loss" in found else dict(found)


def _slow_steps(phase: Phase, key: Any, state: Any, count: int) -> tuple[Callable, Callable]:
    """The same steps operation by operation, in float32 at the highest precision; of a scan the first few.

    Returns:
      (drawn) -> metrics, and () -> what these steps changed in the state.
    """
    begun, held = _on_host(state), [state]
    batch_at = jax.jit(functools.partial(train.batch_at, phase=phase))

    def reference(drawn):
        found = []
        source = jax.device_put(drawn.source)
        for t in range(int(drawn.first), int(drawn.first) + min(count, _STEPS_CHECKED)):
            batch = batch_at(key, step=jnp.int32(t), source=source)
            with jax.disable_jit(), jax.default_matmul_precision("highest"):
                held[0], metrics_of_step = phase.step(jax.random.fold_in(key, t), held[0], batch)
            found.append(telling(jax.device_get(metrics_of_step)))
        return found[0] if count == 1 else jax.tree.map(lambda *values: np.stack(values), *found)

    return reference, lambda: _changes(begun, held[0])


def _precise(cfg: Any) -> Any:
    return dataclasses.replace(cfg, dtype="float32")


# --- scoring ------------------------------------------------------------------------------------------------------


def _scoring(setting: Setting, rivals: Callable | None, variants: Mapping) -> Case:
    spec = spec_of(setting)
    configs = {"jaxad": setting.cfg}
    configs |= {name: dataclasses.replace(setting.cfg, **fields) for name, fields in variants.items()}

    def draw(numbers):
        return draw_source(setting, numbers, setting.batch, labelled=True)

    given = jax.device_put(draw(np.random.default_rng(0)))
    own = [_scorer(name, setting, start(setting, cfg, spec), given) for name, cfg in configs.items()]
    state = start(setting, setting.cfg, spec)
    more, left_out = rivals(setting, "score", None, state, spec, None) if rivals else ((), {})
    reference = _slow_scores(setting.method, start(setting, _precise(setting.cfg), spec))
    return Case(
        setting.name_of("score"),
        draw,
        (*own, *more),
        samples=setting.batch,
        reference=reference,
        tolerance=setting.tolerance,
        facts={**setting.facts, "work": "score", "left_out": left_out},
    )


def _scorer(name: str, setting: Setting, state: Any, given: Source) -> Contender:
    run = functools.partial(score.score_rows, setting.method)
    rows = jnp.arange(setting.batch, dtype=jnp.int32)
    program: Program = compile_program(run, state, given, rows)
    return Contender(
        name,
        lambda source: program.call(state, source, rows),
        fetch=lambda result: jax.device_get(result)._asdict(),
        flops=program.flops,
        program=program,
        compile_seconds=program.seconds,
        after={"metrics": _counter(setting)},
    )


def _counter(setting: Setting) -> Callable:
    """Counts the pixels of scored maps, as `score.evaluate` does for every batch."""
    fold, held = jax.jit(metrics.add, donate_argnums=0), [metrics.empty_histogram()]
    weights = np.zeros((setting.batch, *setting.shape[-3:-1]), np.float32)
    weights[:, : weights.shape[1] // 4, : weights.shape[2] // 4] = 0.01
    valid = np.ones(setting.batch, bool)

    def count(scores):
        held[0] = fold(held[0], scores.map, weights > 0, weights, valid)
        return held[0]

    return count


def _slow_scores(method: Method, state: Any) -> Callable:
    """The first pictures one at a time, operation by operation, in float32 at the highest precision."""

    def reference(source):
        source, found = jax.device_put(source), []
        for row in range(min(len(source), _PICTURES_CHECKED)):
            with jax.disable_jit(), jax.default_matmul_precision("highest"):
                found.append(jax.device_get(score.score_rows(method, state, source, jnp.array([row]))))
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)._asdict()

    return reference
