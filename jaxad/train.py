"""Training: one `fit` for every method, and a driver that shows its progress.

`fit` is one pure function: phases as `lax.scan` over data that lives on the device. Jit it whole, vmap it over keys
and config leaves, shard its batches. `drive` runs the very same steps in pieces, so that a caller can print, save and
stop between them; `fit_stream` feeds the same steps from a host iterator, for data that no device holds.

Step t of phase i gets the key `fold_in(fold_in(run_key, i), t)` and the rows `batch_rows(..., t)`; neither depends on
where a run was cut, so a resumed run equals an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxad import shard
from jaxad.core import Array, Batch, Method, Phase, Source, as_arrays, keep, spec_of, take
from jaxad.members import Programs, axes_of, one_of
from jaxad.ops.blocks import rows_over

MODES = ("scan", "chunks", "loop")


def unplaced(batch: Batch) -> Batch:
    """The `place` of a run on one device."""
    return batch


# --- which rows a step sees ---------------------------------------------------------------------------------------


def _mix(x: Array) -> Array:
    """Scrambles uint32 words (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def shuffled_rows(key: Array, positions: Array, *, size: int | Array) -> Array:
    """Maps positions of an endless stream to rows so that every epoch is a new permutation of all rows.

    A keyed swap-or-not shuffle: in each round a row changes place with its mirror image about a random point, or not.
    O(B log N) work a step, no state, and none of the sorting and compile time of `jax.random.permutation`. No round
    depends on the data: a walk until all rows are found makes devices, and members of a sweep, wait for each other.

    Args:
      key: a PRNG key; fixes all epochs.
      positions: (B,) int32, position in the stream; epoch = position // size.
      size: N, rows in the source; an int32 scalar where members of a sweep differ in it.

    Returns:
      (B,) int32 rows in [0, N).
    """
    words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
    seed = _mix(words[0] ^ _mix(words[-1] + (positions // size).astype(jnp.uint32)))

    def maybe_swap(turn, x):
        salt = _mix(seed + jnp.uint32(0x9E3779B9) * (turn.astype(jnp.uint32) + 1))
        mirror = salt % jnp.uint32(size) + jnp.uint32(size) - x
        mirror = jnp.where(mirror >= size, mirror - jnp.uint32(size), mirror)
        # Both rows of a pair draw the same bit, from the larger of them.
        bit = _mix(jnp.maximum(x, mirror) ^ (salt * jnp.uint32(0x85EBCA6B))) & 1
        return jnp.where(bit == 1, mirror, x)

    first = (positions % size).astype(jnp.uint32)
    if isinstance(size, int):
        return lax.fori_loop(0, 6 * size.bit_length(), maybe_swap, first, unroll=8).astype(jnp.int32)
    rounds = 6 * (32 - lax.clz(size))
    return lax.fori_loop(0, rounds, maybe_swap, first).astype(jnp.int32)


def num_steps(phase: Phase, size: int) -> int:
    """Steps of a phase over a source of `size` rows."""
    return -(-size // phase.batch_size) if phase.steps is None else phase.steps


def batch_rows(key: Array, phase: Phase, step: Array, *, size: int | Array) -> tuple[Array, Array]:
    """The rows of step t: (index, valid), both (B,). A pass is ordered and padded; training is shuffled by epochs."""
    positions = step * phase.batch_size + jnp.arange(phase.batch_size, dtype=jnp.int32)
    if phase.steps is None:
        return positions, positions < size
    return shuffled_rows(key, positions, size=size), jnp.ones(phase.batch_size, bool)


def batch_at(key: Array, phase: Phase, step: Array, source: Source) -> Batch:
    """Gathers the batch of step t from a source on the device."""
    size = len(source) if source.size is None else source.size
    index, valid = batch_rows(key, phase, step, size=size)
    image, label, mask = take(source, jnp.minimum(index, size - 1))
    return Batch(image=image, label=label, mask=mask, index=index, valid=valid)


# --- whole runs as one function -----------------------------------------------------------------------------------


def init(method: Method, key: Array, cfg: Any, spec) -> Any:
    """The state before the first step."""
    return method.init(jax.random.split(key)[0], as_arrays(cfg), spec)


def phase_key(key: Array, index: int) -> Array:
    """The key of phase `index` in the run with this key."""
    return jax.random.fold_in(jax.random.split(key)[1], index)


def one_step(phase: Phase, key: Array, state: Any, source: Source, step: Array, *, place: Callable = unplaced):
    """Step t of a phase: (state, metrics)."""
    return placed_step(phase, key, state, batch_at(key, phase, step, source), step, place=place)


def placed_step(phase: Phase, key: Array, state: Any, batch: Batch, step: Array, *, place: Callable = unplaced):
    """Step t of a phase on the batch given: (state, metrics)."""
    with rows_over(getattr(place, "devices", 1)):
        return phase.step(jax.random.fold_in(key, step), state, place(batch))


def some_steps(phase: Phase, key: Array, state: Any, source: Source, first: Array, count: int, *, place=unplaced):
    """Steps [first, first + count) as one scan: (state, metrics stacked over steps)."""
    steps = first + jnp.arange(count, dtype=jnp.int32)
    return lax.scan(lambda s, t: one_step(phase, key, s, source, t, place=place), state, steps)


def finish(phase: Phase, key: Array, state: Any) -> Any:
    """Ends a phase; its key is that of no step."""
    return phase.finish(jax.random.fold_in(key, 2**32 - 1), state)


def fit(
    method: Method, key: Array, cfg: Any, data: Mapping[str, Source], *, place: Callable = unplaced
) -> tuple[Any, dict[str, dict[str, Array]]]:
    """Trains a method: one pure function, to be jitted whole, vmapped over `key` and leaves of `cfg`, and sharded.

    Args:
      method: what to train.
      key: fixes initialisation, shuffling and all randomness.
      cfg: the method's config; leaves may be traced.
      data: sources by name; phases name the ones they need.
      place: applied to every batch; `jaxad.shard.over_data(mesh)` splits it over devices.

    Returns:
      (state, log): the trained detector as one pytree, and per phase the metrics of every step, (steps,).

    Raises:
      ValueError: a phase needs a source that `data` lacks.
    """
    state, log = init(method, key, cfg, spec_of(data)), {}
    for index, phase in enumerate(method.phases(cfg)):
        source = source_of(method, phase, data)
        key_phase = phase_key(key, index)
        state, log[phase.name] = some_steps(
            phase, key_phase, state, source, jnp.int32(0), num_steps(phase, len(source)), place=place
        )
        state = finish(phase, key_phase, state)
    return state, log


def source_of(method: Method, phase: Phase, data: Mapping[str, Any]) -> Any:
    """The source a phase folds over. Raises ValueError if it is missing or empty."""
    if phase.source not in data or not len(data[phase.source]):
        raise ValueError(
            f"{method.name}: phase '{phase.name}' needs data['{phase.source}']; got sources "
            f"{[name for name in data if len(data[name])]}. Pass {{..., '{phase.source}': Source(...)}} as data."
        )
    return data[phase.source]


# --- runs in pieces -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Feed:
    """A source that stays on the host: batches come from an iterator."""

    sample_shape: tuple[int, ...]  # (H, W, C) or (T, H, W, C)
    size: int  # N
    batches: Callable  # (key, phase, first_step) -> iterator of Batch of NumPy arrays; images uint8

    def __len__(self) -> int:
        return self.size


class Position(NamedTuple):
    """Where a run stands: `step` steps of phase `phase` are done."""

    phase: int
    step: int


class Progress(NamedTuple):
    """What a driver yields after each piece. `state` is donated to the next piece: use it before asking for more."""

    position: Position
    name: str  # of the phase; "init" for the state before the first step
    steps: int  # of the phase
    state: Any
    metrics: dict[str, np.ndarray]  # (steps since the last yield,)
    compile_seconds: float  # spent compiling since the last yield


def default_mode() -> str:
    """How to drive a run on this backend: convolutions inside a scan are 2x and more slower on XLA-CPU."""
    return "loop" if jax.default_backend() == "cpu" else "chunks"


def drive(
    method: Method,
    key: Array,
    cfg: Any,
    data: Mapping[str, Source | Feed],
    *,
    mode: str | None = None,
    chunk: int = 50,
    patience: float = 1.0,
    start: tuple[Position, Any] | None = None,
    place: Callable = unplaced,
    sharding: jax.sharding.Sharding | None = None,
    programs: Programs | None = None,
) -> Iterator[Progress]:
    """Runs `fit` in pieces of `chunk` steps, yielding the state between them.

    Args:
      method, key, cfg, data, place: as for `fit`; a `Feed` in place of a `Source` is streamed from the host.
      mode: "scan" (a phase is one program), "chunks" (a scan of `chunk` steps is one program), "loop" (a step is one
        program, called `chunk` times), None: by backend. Same numbers whichever is picked, up to rounding.
      chunk: steps between yields; pieces end at multiples of it, so a resumed run makes the same cuts.
      patience: seconds after which a loop yields before a piece is whole; steps can be slow.
      start: (position, state) to go on from, as yielded earlier; None: from the beginning.
      sharding: of state and metrics, on all devices of a mesh for example; None: one device.
      programs: where programs are compiled, for use by further runs of the same shapes. With `programs.members` this is
        a sweep: `key`, the leaves of `cfg`, and `rows`, `start` and `size` of sources have a leading axis of members
        (see `jaxad.members.axes_of`), so have states, and metrics are (steps, K). Its configs are not checked here.

    Yields:
      Progress: first the initial state (or `start`), then one after each piece and one at the end of each phase.

    Raises:
      ValueError: an unknown mode, a missing source, or a config that does not suit the data.
    """
    mode = mode or default_mode()
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown; expected one of {MODES} or None. Pass mode='loop'.")
    programs = programs or Programs(sharding=sharding)
    spec = spec_of({name: one_of(source) for name, source in data.items()})
    if programs.members is None:
        method.check(cfg, spec)
    phases = method.phases(cfg)
    for phase in phases:
        source_of(method, phase, data)
    if sharding is not None:
        key = shard.put(key, sharding)
    if start is None:
        arrays = as_arrays(cfg) if sharding is None else shard.put(as_arrays(cfg), sharding)
        begin = programs.compile(("init",), lambda k, c: init(method, k, c, spec), (0, 0), (), key, arrays)
        start = Position(0, 0), begin(key, arrays)
    position, state = start
    del start
    yield Progress(position, "init", 0, state, {}, programs.take_seconds())
    for index in range(position.phase, len(phases)):
        first = position.step if index == position.phase else 0
        phase, source = phases[index], data[phases[index].source]
        key_phase = programs.each(lambda k, i=index: phase_key(k, i), key)
        steps = num_steps(phase, len(one_of(source)))
        if mode == "loop" or isinstance(source, Feed):
            pieces = _loop(phase, key_phase, state, source, first, steps, chunk, patience, place, programs)
        else:
            length = steps if mode == "scan" else chunk
            pieces = _scans(phase, key_phase, state, source, first, steps, length, place, programs)
        step = first
        for step, state, metrics in pieces:
            if step < steps:
                yield Progress(Position(index, step), phase.name, steps, state, metrics, programs.take_seconds())
        metrics = metrics if step > first else {}
        if phase.finish is not keep:
            label = ("finish", phase.name)
            end = programs.compile(label, lambda k, s, p=phase: finish(p, k, s), (0, 0), (), key_phase, state)
            state = end(key_phase, state)
        yield Progress(Position(index + 1, 0), phase.name, steps, state, metrics, programs.take_seconds())


def _scans(phase, key, state, source, first, steps, chunk, place, programs) -> Iterator[tuple[int, Any, dict]]:
    """Steps [first, steps) in scans that end at multiples of `chunk`: (steps done, state, metrics) after each."""
    while first < steps:
        last = min((first // chunk + 1) * chunk, steps)
        run = scan_program(phase, key, state, source, last - first, programs=programs, place=place)
        state, metrics = run(state, key, source, np.int32(first))
        first = last
        yield first, state, jax.tree.map(lambda leaf: np.asarray(leaf).T, metrics)  # (K, steps) -> (steps, K)


def scan_program(phase: Phase, key, state, source, count: int, *, programs: Programs, place: Callable = unplaced):
    """The program of `count` steps: (state, key, source, first step) -> (state, metrics). Arguments may be shapes."""

    def run(state, key, source, first):
        return some_steps(phase, key, state, source, first, count, place=place)

    axes = (0, 0, axes_of(source), None)
    label = ("scan", phase.name, count)
    return programs.compile(label, run, axes, (0,), state, key, source, np.int32(0), looped=True)


def _loop(phase, key, state, source, first, steps, chunk, patience, place, programs) -> Iterator[tuple[int, Any, dict]]:
    """The same steps, one program called for each; batches come from the device or, of a `Feed`, from the host."""
    batches = iter(source.batches(key, phase, first)) if isinstance(source, Feed) else None
    run, logs, began = None, [], time.monotonic()
    for t in range(first, steps):
        data = source if batches is None else next(batches)
        if isinstance(data, Batch) and not isinstance(data.image, jax.Array):  # else the feed has put it on a mesh
            data = jax.device_put(data)
        run = run or step_program(phase, key, state, data, programs=programs, place=place)
        state, metrics = run(state, key, data, np.int32(t))
        logs.append(metrics)
        jax.block_until_ready(logs[-2:][0])  # one step ahead: the next batch loads while this one is computed
        if (t + 1) % chunk == 0 or t + 1 == steps or time.monotonic() - began > patience:
            yield t + 1, state, _stack(logs)
            logs, began = [], time.monotonic()


def step_program(phase: Phase, key, state, data, *, programs: Programs, place: Callable = unplaced):
    """The program of a step: (state, key, source or batch, step) -> (state, metrics). Arguments may be shapes."""

    def step(state, key, data, t):
        if isinstance(data, Source):
            return one_step(phase, key, state, data, t, place=place)
        batch = data._replace(image=data.image.astype(jnp.float32) / 255, mask=data.mask.astype(jnp.float32))
        return placed_step(phase, key, state, batch, t, place=place)

    axes = (0, 0, axes_of(data), None)
    return programs.compile(("step", phase.name), step, axes, (0,), state, key, data, np.int32(0))


def _stack(logs: list[dict[str, Array]]) -> dict[str, np.ndarray]:
    fetched = jax.device_get(logs)
    return {name: np.stack([log[name] for log in fetched]) for name in fetched[0]} if fetched else {}


# --- data that stays on the host ----------------------------------------------------------------------------------


def feed_arrays(image: np.ndarray, label: np.ndarray, mask: np.ndarray | None = None) -> Feed:
    """A feed over NumPy arrays (memory-mapped files too) in the order in which `fit` would see them on the device.

    Args:
      image: (N, H, W, C) uint8.
      label: (N,) integers: 0 normal, 1 anomalous, -1 unknown.
      mask: (N, H, W) 0/1, or None.
    """
    size = image.shape[0]

    def batches(key, phase, first):
        rows_at = jax.jit(lambda t: batch_rows(key, phase, t, size=size))
        for step in range(first, num_steps(phase, size)):
            index, valid = (np.asarray(a) for a in rows_at(np.int32(step)))
            rows = np.minimum(index, size - 1)
            pixels = np.asarray(image[rows])
            masks = np.zeros(pixels.shape[:3], np.uint8) if mask is None else np.asarray(mask[rows])
            yield Batch(pixels, np.asarray(label[rows], np.int32), masks, index, valid)

    return Feed(sample_shape=tuple(image.shape[1:]), size=size, batches=batches)


def fit_stream(
    method: Method, key: Array, cfg: Any, feeds: Mapping[str, Source | Feed], *, mesh: jax.sharding.Mesh | None = None
) -> tuple[Any, dict]:
    """`fit` for data larger than device memory: the same steps fed by host iterators, the same result and log.

    Args:
      method, key, cfg: as for `fit`.
      feeds: by name of the source.
      mesh: splits batches over its axis "data"; the feeds are opened for the same mesh.
    """
    log: dict[str, dict[str, list]] = {}
    state = None
    options: dict[str, Any] = (
        {} if mesh is None else {"place": shard.over_data(mesh), "sharding": shard.replicated(mesh)}
    )
    for progress in drive(method, key, cfg, feeds, mode="loop", **options):
        state = progress.state
        for name, values in progress.metrics.items():
            log.setdefault(progress.name, {}).setdefault(name, []).append(values)
    return state, {phase: {k: np.concatenate(v) for k, v in values.items()} for phase, values in log.items()}
