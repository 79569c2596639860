"""Groups of members that one compiled program computes, in chunks that fit the memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxad import adaptation, score, shard, train
from jaxad.console import Console
from jaxad.core import Method, Source, as_arrays, spec_of
from jaxad.detector import batch_size_for
from jaxad.files import plain
from jaxad.measure import figures
from jaxad.members import Members, Programs, bytes_of, default_way, one_of
from jaxad.sweep.grid import Member, static_key
from jaxad.sweep.member import (
    Ask,
    InOrder,
    Outcome,
    calibrate_program,
    holdout_program,
    new_histogram,
    ordered_program,
    run_pieces,
    tally_program,
)
from jaxad.sweep.memory import free_bytes
from jaxad.sweep.stack import Library, Loaded, Stack

_NUMBERS = (float, int, np.generic, type(None))


class Limits(NamedTuple):
    """How members are computed together."""

    mesh: Mesh | None = None
    members: int | None = None  # at most so many at a time; None: as memory allows
    way: str | None = None  # see `jaxad.members`; None: by backend
    mode: str | None = None  # see `train.drive`; None: by backend
    budget: int | None = None  # bytes to use on each device; None: what is free


class Group(NamedTuple):
    """Members that can share a program."""

    number: int
    members: list[Member]


def default_mesh(members: int) -> Mesh | None:
    """All devices over the members of a sweep, fewer if there are fewer members; None for a single device."""
    devices = min(jax.local_device_count(), members)
    return shard.make_mesh(run=devices, devices=jax.local_devices()[:devices]) if devices > 1 else None


def groups_of(method: Method, members: Sequence[Member], library: Library) -> list[Group]:
    """Splits members into groups by what is compiled in: static fields of the config and shapes of the data.

    Data sets of different sizes are padded and share a group where that changes nothing for a member: no phase is a
    pass over a source of another size, and `init` does not depend on the sizes.
    """
    found: dict[tuple, list[Member]] = {}
    for member in members:
        found.setdefault((static_key(member), library.get(member.settings).kinds), []).append(member)
    result: list[list[Member]] = []
    for together in found.values():
        by_size: dict[tuple, list[Member]] = {}
        for member in together:
            by_size.setdefault(_sizes(library.get(member.settings)), []).append(member)
        whole = len(by_size) == 1 or _can_pad(method, [part[0] for part in by_size.values()], library)
        result += [together] if whole else list(by_size.values())
    result.sort(key=lambda members: members[0].index)
    return [Group(index, members) for index, members in enumerate(result)]


def _sizes(data: Loaded) -> tuple:
    return tuple(sorted((name, len(part.rows)) for name, part in data.parts.items()))


def _can_pad(method: Method, members: Sequence[Member], library: Library) -> bool:
    specs = [library.get(member.settings).spec for member in members]
    cfg = members[0].cfg
    for phase in method.phases(cfg):
        if phase.steps is None and len({spec.sizes.get(phase.source) for spec in specs}) > 1:
            return False
    texts = {str(jax.make_jaxpr(lambda k, s=s: train.init(method, k, cfg, s))(jax.random.key(0))) for s in specs}
    return len(texts) == 1


class Finished(NamedTuple):
    """Members whose results are known: a row of the table each."""

    members: list[Member]
    rows: list[dict[str, Any]]


def compute_group(
    method: Method,
    group: Group,
    library: Library,
    *,
    limits: Limits | None = None,
    console: Console | None = None,
) -> Iterator[Finished]:
    """Computes a group chunk by chunk, yielding each chunk's rows when it is done.

    Chunks are as large as the memory allows, by what the compiled programs say they need, and are halved when it runs
    out all the same.
    """
    limits, console = limits or Limits(), console or Console(quiet=True)
    work = _Work(method, group, library, limits, console)
    left, size = list(group.members), work.chunk_size()
    while left:
        chunk, rest = left[:size], left[size:]
        try:
            rows = work.compute(chunk, size)
        except jax.errors.JaxRuntimeError as error:
            step = work.devices
            if not is_out_of_memory(error) or size <= step:
                raise
            size = max(step, _up(size // 2, step))
            console.say(f"out of memory; going on with {size} members at a time")
            work.forget()
            continue
        left = rest
        yield Finished(chunk, rows)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether XLA failed for want of memory."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()


def spread(total: int, most: int, devices: int) -> int:
    """How many of `total` members to compute at a time if `most` of them may be: a multiple of the devices.

    Each device has its share of a chunk, chunk after chunk, and a place left empty in the last one costs as much as a
    member; so the fewest places in all, and the largest such chunk. Never below half of what may be: small chunks leave
    accelerators idle.
    """
    rounds = -(-total // devices)
    largest = rounds if most >= total else max(most // devices, 1)
    return devices * min(range(largest, largest // 2, -1), key=lambda share: _up(rounds, share))


def _mean(values: np.ndarray) -> float:
    """Of the finite values; NaN without any."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


class _Work:
    """A group's data on the device and its programs."""

    def __init__(self, method: Method, group: Group, library: Library, limits: Limits, console: Console):
        self.method, self.group, self.limits, self.console = method, group, limits, console
        mesh = limits.mesh or default_mesh(min(len(group.members), limits.members or len(group.members)))
        self.mesh, self.devices = mesh, 1 if mesh is None else mesh.shape["run"]
        self.mode = limits.mode or train.default_mode()
        self.place_batch = shard.over_data(mesh) if mesh is not None and mesh.shape["data"] > 1 else train.unplaced
        self.data: dict[tuple, Loaded] = {library.key(m.settings): library.get(m.settings) for m in group.members}
        self.number = {key: number for number, key in enumerate(self.data)}
        self.which = {member.index: self.number[library.key(member.settings)] for member in group.members}
        self.programs: dict[int, Programs] = {}
        self._counted: dict[int, float] = {}  # compile seconds that rows tell of already
        self.stack: Stack = library.stack(list(self.data.values()), self._programs(self.devices).place)

    def _programs(self, count: int) -> Programs:
        """The programs of `count` members."""
        if count not in self.programs:
            self.programs[count] = Programs(Members(count, self.limits.way or default_way(), self.mesh))
        return self.programs[count]

    def forget(self) -> None:
        """Drops all programs, and with them what they hold on to."""
        self.programs.clear()

    def compute(self, members: list[Member], count: int) -> list[dict[str, Any]]:
        """Rows of the results of members, computed `count` at a time: the last ones are repeated to fill up."""
        programs = self._programs(count)
        padded = members + [members[-1]] * (count - len(members))
        keys, cfg, data, ask = self._arguments(padded, programs)
        began, compiled_before = time.perf_counter(), programs.seconds

        def show(name: str, step: int, steps: int, values: dict) -> None:
            title = f"group {self.group.number + 1}, {len(members)} members: {name}"
            self.console.progress(title, step, steps, {k: _mean(v[: len(members)]) for k, v in values.items()})

        outcome = run_pieces(
            keys,
            cfg,
            data,
            ask,
            method=self.method,
            programs=programs,
            batch_size=self._batch_size(),
            mode=self.mode,
            place=self.place_batch,
            show=show,
        )
        compiling = programs.seconds - compiled_before
        timing = {
            "chunk_members": len(members),
            "chunk_seconds": time.perf_counter() - began - compiling,
            "chunk_compile_seconds": programs.seconds - self._counted.get(count, 0.0),
        }
        self._counted[count] = programs.seconds
        return [{**self._row(member, outcome, i), **timing} for i, member in enumerate(members)]

    def _batch_size(self) -> int:
        """Samples scored at a time, as many on each of the devices that share a batch."""
        return _up(batch_size_for(next(iter(self.data.values())).spec), getattr(self.place_batch, "devices", 1))

    def _in_order(self) -> bool:
        """Whether samples are scored in order, too, as a lone run does where they are frames of videos."""
        return self.method.ordered is not None and any(any(loaded.groups) for loaded in self.data.values())

    def _arguments(self, members: Sequence[Member], programs: Programs) -> tuple[Any, Any, dict[str, Source], Ask]:
        """What `run_pieces` takes, on the device."""
        keys = programs.place(jax.vmap(jax.random.key)(jnp.asarray([m.seed for m in members], jnp.uint32)))
        leaves = [as_arrays(member.cfg) for member in members]
        cfg = programs.place(jax.tree.map(lambda *values: jnp.stack(values), *leaves))
        data = self.stack.choose([self.which[member.index] for member in members], programs.place)
        places = None
        if "holdout" in data:
            places = programs.place(np.asarray([self._places(member) for member in members], np.int32))
        return keys, cfg, data, Ask(self.stack.truth, places, self._in_order())

    def _loaded(self, member: Member) -> Loaded:
        return list(self.data.values())[self.which[member.index]]

    def _places(self, member: Member) -> tuple[int, int]:
        loaded, fpr = self._loaded(member), member.settings.fpr
        held, pixels = len(loaded.parts["holdout"].rows), math.prod(loaded.spec.image[-3:-1])
        return score.quantile_place(held, fpr=fpr), score.quantile_place(held * pixels, fpr=fpr)

    def _row(self, member: Member, outcome: Outcome, i: int) -> dict[str, Any]:
        """A member's row of the table: its measures are those of the lone run's report.json."""
        loaded = self._loaded(member)
        calibration = None
        if outcome.calibration:
            held = {name: float(values[i]) for name, values in outcome.calibration.items()}
            calibration = score.Calibration(**held, fpr=member.settings.fpr, images=len(loaded.parts["holdout"].rows))
        row: dict[str, Any] = {"member": member.index, **member.axes, "seed": member.seed}
        if len(loaded.labels):
            size = len(loaded.labels)
            image, tops, means = (values[i][:size] for values in (outcome.image, outcome.map_max, outcome.map_mean))
            pixel = {name: values[i] for name, values in outcome.pixel.items()}
            measured = figures(image, tops, means, pixel, calibration, labels=loaded.labels, groups=loaded.groups)
            measured |= self._ordered_figures(member, outcome.ordered, i)
            row |= {name: plain(value) for name, value in measured.items() if isinstance(value, _NUMBERS)}
        for phase, values in outcome.last.items():
            row |= {f"{phase}.{name}": float(value[i]) for name, value in values.items()}
        return row

    def _ordered_figures(self, member: Member, ordered: InOrder | None, i: int) -> dict[str, float]:
        """Measures of a member's ordered pass; none where its samples are no frames of videos."""
        loaded = self._loaded(member)
        if ordered is None or not any(loaded.groups):
            return {}
        image, parts = jax.tree.map(lambda values: values[i][: len(loaded.labels)], ordered)
        cfg = jax.device_get(as_arrays(member.cfg))  # rounded as in the state of a lone run
        groups = np.asarray(loaded.groups)
        return adaptation.ordered_figures(self.method, cfg, image, parts, groups=groups, labels=loaded.labels)

    # --- memory ---------------------------------------------------------------------------------------------------

    def chunk_size(self) -> int:
        """How many members to compute at a time: all of them, or else as many as fit and leave few places empty."""
        total = len(self.group.members)
        budget = self.limits.budget or free_bytes(self.mesh)
        size = asked = spread(total, self.limits.members or total, self.devices)
        while smaller := self._smaller(size, budget):
            size = smaller
        need = self._programs(size).bytes
        chunks = -(-total // size)
        where = f" on each of {self.devices} devices" if self.devices > 1 else ""
        free = f" of {_gib(budget)}" if budget is not None else ""
        why = "as asked" if size == asked else "to fit the memory"
        many = "at once" if chunks == 1 else f"in {chunks} chunks of {size}, {why}"
        compiled = f"compiled in {self._programs(size).seconds:.1f} s"
        self.console.say(
            f"group {self.group.number + 1}: {total} members {many}: {_gib(need)}{free}{where}; {compiled}"
        )
        return size

    def _smaller(self, size: int, budget: int | None) -> int | None:
        """How many to try where `size` members do not fit; None where they do, or where there is no less."""
        try:
            need = self._need(size)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error) or size <= self.devices:
                raise
            fitting = size // 2
        else:
            if budget is None or need <= budget or size <= self.devices:
                return None
            least = self._need(self.devices)
            each = max((need - least) / (size - self.devices), 1)
            fitting = self.devices + int(max(budget - least, 0) / each)
        self.programs.pop(size, None)
        return spread(len(self.group.members), min(fitting, size - self.devices), self.devices)

    def _need(self, count: int) -> int:
        """Bytes on each device that `count` members need, from their compiled programs."""
        programs = self._programs(count)
        members = (self.group.members * count)[:count]
        keys, cfg, data, ask = self._arguments(members, programs)
        training = {name: source for name, source in data.items() if name != "test"}
        spec = spec_of({name: one_of(source) for name, source in training.items()})
        begin = jax.vmap(lambda key, cfg: train.init(self.method, key, cfg, spec))
        state = self._shapes(begin, keys, cfg)
        for index, phase in enumerate(self.method.phases(members[0].cfg)):
            source = train.source_of(self.method, phase, training)
            key = programs.each(lambda k, i=index: train.phase_key(k, i), keys)
            if self.mode == "loop":
                train.step_program(phase, key, state, source, programs=programs, place=self.place_batch)
            else:
                steps = train.num_steps(phase, len(one_of(source)))
                count_at_once = steps if self.mode == "scan" else min(50, steps)
                train.scan_program(phase, key, state, source, count_at_once, programs=programs, place=self.place_batch)
        if "test" in data:
            pixels = None if ask.truth is None else self._shapes(jax.vmap(lambda key: new_histogram({})), keys)
            args = state, data["test"], ask.truth, pixels, np.int32(0)
            tally_program(programs, args, method=self.method, batch_size=self._batch_size(), place=self.place_batch)
            if ask.in_order:
                several = adaptation.samples_at_once(self.method, cfg, len(one_of(data["test"])))
                ordered_program(programs, (state, data["test"], np.int32(0)), method=self.method, count=several)
        if "holdout" in data:
            programs.bytes = max(programs.bytes, self._calibrating(programs, state, data["holdout"], ask))
        return programs.bytes

    def _calibrating(self, programs: Programs, state: Any, held: Source, ask: Ask) -> int:
        """Bytes on each device while members are calibrated, when the maps of all held-out samples are kept."""
        size, place = self._batch_size(), self.place_batch
        score = holdout_program(programs, (state, held, np.int32(0)), method=self.method, batch_size=size, place=place)
        pieces = [score.out_info] * -(-len(one_of(held)) // size)
        sort = calibrate_program(programs, (pieces, ask.places))
        # Neither program knows what stays on the device beside its own arguments.
        return max(bytes_of(score) + self._share(pieces), bytes_of(sort) + self._share(state))

    def _share(self, tree: Any) -> int:
        """Bytes on each device of what is stacked for members."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) // self.devices

    def _shapes(self, function: Callable, *args: Any) -> Any:
        """Shapes of stacked results, where the programs would put them."""
        shapes = jax.eval_shape(function, *args)
        if self.mesh is None:
            return shapes
        there = NamedSharding(self.mesh, PartitionSpec("run"))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=there), shapes)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2g} GiB" if count >= 2**28 else f"{count / 2**20:.3g} MiB"
