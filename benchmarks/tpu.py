"""TPU without a TPU: compiles every method's programs with the real TPU compiler and reports what it says of them.

    pip install -e ".[aot]"  # the compiler, of the version that made the record; no TPU is needed
    python -m benchmarks.tpu --methods all

Every figure is an ESTIMATE of the compiler or, where it says so, ours. Nothing is run, nothing is measured.

Programs of a method: each phase's training step and `score`, split over the axis "data" with the preset's batch on
every chip (fixed work per chip; a phase that sees each picture once has no more of them at a time than there are, and
where that is less it is left out of the comparison of slices); `sweep`, the training step of members spread over the
axis "run"; and the Pallas kernels of `jaxad.ops.kernels`. Reported for each: whether it compiles, memory per chip,
collectives, seconds.

What the seconds are made of:
  * compiler: XLA's `optimal_seconds`. It counts the body of a loop once and takes 1 s off for every custom call that it
    knows nothing of (negative totals). The first is corrected by the estimated cycles of the loop bodies, with their
    trip counts read from the HLO; the second by adding whole seconds until the total is positive. It does not know how
    precisely float32 is multiplied (default: in one bfloat16 pass).
  * collectives: ours, since `optimal_seconds` does not count them: the all-reduce of 64 MiB over 4 and over 256 chips
    has the seconds of a copy. 2 V (n - 1) / n bytes over the links that a chip has in its slice, and a latency per
    hop; nothing is assumed to overlap. See `Chip`.

Exits with 1 and the reasons if a program does not compile, does not fit, exchanges something of the batch's size (but
for what happens once in a training, where as much as the detector may move), or if its step takes 15 % longer on 256
chips than on 4. Results are kept in a JSON file; a program that did not change since (same StableHLO, same compiler) is
not compiled again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.common import ROOT, environment
from jaxad import members, methods, score, settings, shard, train
from jaxad.core import Source, as_arrays, spec_of
from jaxad.nn.conv import lowering_for
from jaxad.ops.blocks import rows_over

FOLDER = ROOT / "benchmarks" / "results" / "tpu-estimates"
TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "v5e:16x16", "v6e:16x16")
PROGRAMS = ("train", "score", "sweep", "kernels")
DTYPES = ("float32", "bfloat16")
COMPILER = "0.0.52"  # the earliest libtpu that compiles everything; 0.0.42.1, which jax[tpu] 0.10.2 asks for, does not
PICTURES = 400  # in a source; the largest category of MVTec AD trains on 391
MEMBERS = 2  # of a sweep on every chip: more than one, so that they are computed side by side
GROWTH = 0.15  # of a step's seconds from the smallest to the largest slice of a chip
SAMPLE_BYTES = 64  # of a sample that chips may exchange: labels, indices, scores; no pictures, maps or features


class Chip(NamedTuple):
    """What a chip has, from docs.cloud.google.com/tpu/docs/v5e and /v6e (read in 2026)."""

    hbm: int  # bytes; stated as 16 and 32 GB, allocated in units of 2**30
    link: float  # bytes a second and direction of one of 4 links: a quarter of half the "bidirectional ICI bandwidth"


CHIPS = {"v5e": Chip(16 * 2**30, 400e9 / 2 / 4), "v6e": Chip(32 * 2**30, 800e9 / 2 / 4)}
HOP_SECONDS = 1e-6  # our assumption of a hop's latency, for messages too small to fill a link


class Program(NamedTuple):
    """A function to compile for a slice, with the shapes and shardings of its arguments."""

    name: str
    function: Callable
    arguments: tuple
    samples: int  # that a call works on, on all chips together
    state_bytes: int = 0  # of one detector: what an all-reduce may exchange is of this size
    donate: tuple[int, ...] = ()
    out: Any = None  # sharding of the results
    members: bool = False  # whether networks are vmapped
    once: bool = False  # whether each picture of the source is seen once, to keep something of it
    single: bool = False  # whether a training has one such step


class Task(NamedTuple):
    """What names a program, plain enough to be sent to another process."""

    method: str  # or "kernels"
    program: str
    dtype: str
    topology: str
    preset: str | None


# --- slices -------------------------------------------------------------------------------------------------------


def devices_of(topology: str) -> list:
    """The chips of a slice, such as "v5e:2x2". No TPU needed, but libtpu.

    Raises:
      ValueError: a chip whose memory and links are not known here.
    """
    if topology.split(":")[0] not in CHIPS:
        raise ValueError(f"topology {topology!r} has an unknown chip; expected one of {list(CHIPS)}, as in v5e:2x2.")
    # Without the first, libtpu asks a metadata server that is not there; without the second only one process at a
    # time may use it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology, platform="tpu").devices)


def sides_of(topology: str) -> list[int]:
    """Chips along each side: [2, 2] of "v5e:2x2"."""
    return [int(side) for side in topology.split(":")[1].split("x")]


@contextlib.contextmanager
def tracing_for_tpu(*, vmapped: bool = False) -> Iterator[None]:
    """What asks for the backend while it is traced is told "tpu", although this process runs on a CPU."""
    with lowering_for(platform="tpu", members=vmapped), mock.patch.object(jax, "default_backend", lambda: "tpu"):
        yield


def placed(tree: Any, sharding: NamedSharding) -> Any:
    """Shapes of a tree with a sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


# --- programs of methods ------------------------------------------------------------------------------------------


def sources_of(method, cfg, data: Mapping[str, Any]) -> dict[str, Source]:
    """Shapes of the sources that a method's phases read, as its preset reads data."""
    size, channels, clip = data["image_size"], data["channels"], data.get("clip") or 1
    height, width = (size, size) if isinstance(size, int) else size

    def source(name):
        pixels = jax.ShapeDtypeStruct((PICTURES, height, width, channels), jnp.uint8)
        numbers = jax.ShapeDtypeStruct((PICTURES,), jnp.int32)
        mask = jax.ShapeDtypeStruct((PICTURES, height, width), jnp.uint8) if name == "labelled" else None
        clips = {} if clip == 1 else {"start": numbers, "clip": clip, "target": data.get("target") or 0}
        return Source(image=pixels, label=numbers, mask=mask, **clips)

    return {name: source(name) for name in {"train", *(phase.source for phase in method.phases(cfg))}}


def setting_of(name: str, *, preset: str | None, dtype: str):
    """(method, its config, sources by name) of a preset; None: the method's first."""
    method = methods.get(name)
    wanted = settings.Settings(method=name, preset=preset or next(iter(method.presets)), config={"dtype": dtype})
    resolved, cfg = settings.resolve(method, wanted)
    return method, cfg, sources_of(method, cfg, resolved.load_arguments())


def method_programs(name: str, kind: str, devices: list, *, preset: str | None, dtype: str) -> list[Program]:
    """The programs of one kind, "train" (one for each phase), "score" or "sweep", for a slice."""
    method, cfg, data = setting_of(name, preset=preset, dtype=dtype)
    spec, count = spec_of(data), len(devices)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda k: train.init(method, k, as_arrays(cfg), spec), key)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    if kind == "sweep":
        return [
            _sweep_step(phase, key, state, data[phase.source], step, devices, state_bytes)
            for phase in method.phases(cfg)
        ]
    mesh = shard.make_mesh(data=count, devices=devices)
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    if kind == "score":
        rows = jax.ShapeDtypeStruct((method.phases(cfg)[0].batch_size * count,), jnp.int32, sharding=split)

        def run_score(state, source, rows):
            with rows_over(count):
                return score.score_rows(method, state, source, rows)

        arguments = placed(state, whole), placed(data["train"], whole), rows
        return [Program("score", run_score, arguments, rows.shape[0], state_bytes, out=split)]
    programs = []
    for phase in method.phases(cfg):
        once = phase.steps is None
        size = phase.batch_size * count
        if once:  # a step has no more pictures than there are
            size = min(size, max(1, PICTURES // count) * count)
        wide = phase._replace(batch_size=size)

        def run(key, state, source, step, phase=wide):
            return train.one_step(phase, key, state, source, step, place=shard.over_data(mesh))

        arguments = tuple(placed(part, whole) for part in (key, state, data[phase.source], step))
        seldom = {"once": once, "single": phase.steps == 1}
        programs.append(Program(f"train {phase.name}", run, arguments, size, state_bytes, (1,), whole, **seldom))
    return programs


def _sweep_step(phase, key, state, source, step, devices, state_bytes) -> Program:
    """The training step of `MEMBERS` members on every chip; they share the pictures."""
    mesh, count = shard.make_mesh(run=len(devices), devices=devices), MEMBERS * len(devices)
    own, shared = NamedSharding(mesh, PartitionSpec("run")), NamedSharding(mesh, PartitionSpec())

    def run(key, state, source, step):
        return train.one_step(phase, key, state, source, step)

    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype), (key, state))
    function = members.lift(run, (0, 0, None, None), members.Members(count, "vmap", mesh))
    arguments = *placed(stacked, own), *placed((source, step), shared)
    samples = phase.batch_size * count
    return Program(f"sweep {phase.name}", function, arguments, samples, state_bytes, (1,), own, members=True)


# --- kernels ------------------------------------------------------------------------------------------------------


def memory_read(dtype: str, *, similarity: str = "dot") -> tuple[Callable, list]:
    """Value and gradients of the memory read, 16,384 queries of 256 features over 2,000 items."""
    from jaxad.ops.memory import read_memory

    def loss(queries, items, threshold):
        read = read_memory(queries, items, threshold=threshold, similarity=similarity, impl="pallas")
        return jnp.sum(read.value.astype(jnp.float32) ** 2) + jnp.sum(read.entropy), (read.usage, read.num_active)

    shapes = [((16384, 256), dtype), ((2000, 256), "float32"), ((), "float32")]
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), [jax.ShapeDtypeStruct(*shape) for shape in shapes]


def memory_read_cosine(dtype: str) -> tuple[Callable, list]:
    """The same with cosine similarity, whose kernels have two tables."""
    return memory_read(dtype, similarity="cosine")


KERNELS = {"memory read": memory_read, "memory read, cosine": memory_read_cosine}  # name -> (dtype) -> function, shapes


def kernel_programs(devices: list, *, dtype: str) -> list[Program]:
    """The Pallas kernels, each on one chip."""
    chip = jax.sharding.SingleDeviceSharding(devices[0])
    programs = []
    for name, make in KERNELS.items():
        function, shapes = make(dtype)
        programs.append(Program(name, function, tuple(placed(shape, chip) for shape in shapes), shapes[0].shape[0]))
    return programs


# --- what the compiler says ---------------------------------------------------------------------------------------


class Text(NamedTuple):
    """The HLO of one computation, where `shard.collectives` expects a program."""

    text: str

    def as_text(self) -> str:
        return self.text


class Computation(NamedTuple):
    lines: list[str]
    cycles: int  # that the compiler estimates for its instructions, a loop's body not counted
    loops: list[tuple[str, int | None]]  # (name of the body, trips; None: not known before it runs)


_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")


def computations_of(text: str) -> tuple[str, dict[str, Computation]]:
    """The computations of an HLO text by name, and the name of the entry."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[2]
            entry = name if head[1] else entry
            lines[name] = []
        elif name:
            lines[name].append(line)
    found = {}
    for name, body in lines.items():
        loops = [(loop[2], _trips(lines.get(loop[1], []))) for line in body if (loop := _LOOP.search(line))]
        found[name] = Computation(body, sum(int(c) for line in body for c in _CYCLES.findall(line)), loops)
    return entry, found


def _trips(condition: list[str]) -> int | None:
    """Trips of a loop that counts from 0 to a constant, as `scan` and `fori_loop` do; None for any other."""
    if not any("ROOT" in line and "compare(" in line and "direction=LT" in line for line in condition):
        return None
    constants = [int(c) for line in condition for c in re.findall(r"= s32\[\]\S* constant\((\d+)\)", line)]
    return constants[0] if len(constants) == 1 else None


class Totals(NamedTuple):
    """Of a program on one chip, loop bodies counted as often as they run."""

    cycles_once: int  # as the compiler's totals count them: loop bodies once
    cycles: int
    collectives: dict[str, tuple[int, int]]  # kind -> (operations, bytes of their results)
    unknown_loops: int  # whose trips are not known: counted once


def totals_of(text: str) -> Totals:
    """Walks the loops of an HLO text."""
    entry, found = computations_of(text)

    def walk(name, times):
        here, collectives = found[name], shard.collectives(Text("\n".join(found[name].lines)))
        once, cycles, unknown = here.cycles, times * here.cycles, 0
        total = {kind: (times * count, times * size) for kind, (count, size) in collectives.items()}
        for body, trips in here.loops:
            inner = walk(body, times * (trips or 1))
            once, cycles = once + inner.cycles_once, cycles + inner.cycles
            unknown += inner.unknown_loops + (trips is None)
            for kind, (count, size) in inner.collectives.items():
                before = total.get(kind, (0, 0))
                total[kind] = before[0] + count, before[1] + size
        return Totals(once, cycles, total, unknown)

    return walk(entry, 1)


def compiler_seconds(optimal: float, totals: Totals) -> float:
    """`optimal_seconds` without its -1 s for each unknown custom call, and with loops as often as they run."""
    known = optimal if optimal >= 0 else optimal - math.floor(optimal)
    return known * totals.cycles / totals.cycles_once if totals.cycles_once else known


def collective_seconds(collectives: Mapping[str, tuple[int, int]], topology: str) -> float:
    """Our estimate: bytes over the links that a chip has in its slice, and a latency for every hop along the sides."""
    sides, chip = [n for n in sides_of(topology) if n > 1], CHIPS[topology.split(":")[0]]
    chips = math.prod(sides)
    if chips == 1:
        return 0.0
    links = sum(1 if n == 2 else 2 for n in sides)  # two neighbours along a side, which are one where it has two chips
    hops = sum(n // 2 for n in sides)  # to the farthest chip, in both directions at once
    seconds = 0.0
    for kind, (count, size) in collectives.items():
        passes = 2 if kind == "all-reduce" else 1  # all-reduce is a reduce-scatter and an all-gather
        seconds += passes * (size * (chips - 1) / chips / (links * chip.link) + count * hops * HOP_SECONDS)
    return seconds


def memory_of(compiled) -> dict[str, int]:
    """Bytes on one chip."""
    facts = compiled.memory_analysis()
    parts = {
        "arguments": facts.argument_size_in_bytes,
        "results": facts.output_size_in_bytes - facts.alias_size_in_bytes,  # donated arguments hold the others
        "scratch": facts.temp_size_in_bytes,
        "code": facts.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def examine(compiled, program: Program, topology: str) -> dict[str, Any]:
    """The facts of a compiled program."""
    text, costs = compiled.as_text(), compiled.cost_analysis()
    totals = totals_of(text)
    pallas = text.count('custom_call_target="tpu_custom_call"')
    compute = compiler_seconds(costs.get("optimal_seconds", 0.0), totals)
    exchange = collective_seconds(totals.collectives, topology)
    return {
        "memory": memory_of(compiled),
        "collectives": {kind: list(both) for kind, both in sorted(totals.collectives.items())},
        "flops": costs.get("flops"),  # loop bodies counted once, here and below
        "bytes_accessed": costs.get("bytes accessed"),
        "optimal_seconds": costs.get("optimal_seconds"),
        "loops": {"cycles_factor": totals.cycles / max(1, totals.cycles_once), "unknown_trips": totals.unknown_loops},
        "pallas_kernels": pallas,
        # The compiler knows nothing of the time that our own kernels take.
        "seconds": None if pallas else {"compiler": compute, "collectives": exchange, "step": compute + exchange},
    }


# --- one program --------------------------------------------------------------------------------------------------


def programs_of(task: Task) -> list[Program]:
    """The programs that a task names."""
    devices = devices_of(task.topology)
    if task.method == "kernels":
        return kernel_programs(devices, dtype=task.dtype)
    return method_programs(task.method, task.program, devices, preset=task.preset, dtype=task.dtype)


def attempt(program: Program, task: Task, known: Mapping[str, dict] | None = None) -> dict[str, Any]:
    """Compiles one program: its facts, or why it did not compile.

    Args:
      program: what to compile.
      task: what named it.
      known: earlier rows by fingerprint; a program found there is not compiled again.
    """
    row: dict[str, Any] = {
        **task._asdict(),
        "program": program.name,
        "chips": 1 if task.method == "kernels" else math.prod(sides_of(task.topology)),
        "samples": program.samples,
        "state_bytes": program.state_bytes,
        "once": program.once,
        "single": program.single,
        "libtpu": metadata.version("libtpu"),
    }
    began = time.perf_counter()
    try:
        with tracing_for_tpu(vmapped=program.members):
            made = jax.jit(program.function, donate_argnums=program.donate, out_shardings=program.out)
            lowered = made.lower(*program.arguments)
        row["fingerprint"] = fingerprint(lowered.as_text(), task.topology)
        if known and row["fingerprint"] in known:
            return {**known[row["fingerprint"]], **row}
        facts = examine(compile_readably(lowered), program, task.topology)
    except Exception as error:  # a compiler fails in many ways, and the others shall still be reported
        return row | {"error": _failed(task, error)["error"], "compile_seconds": time.perf_counter() - began}
    return row | facts | {"error": None, "compile_seconds": time.perf_counter() - began}


class Readable(NamedTuple):
    """A compiled program and its HLO text."""

    compiled: Any
    text: str

    def as_text(self) -> str:
        return self.text

    def cost_analysis(self):
        return self.compiled.cost_analysis()

    def memory_analysis(self):
        return self.compiled.memory_analysis()


def compile_readably(lowered) -> Readable:
    """Compiles. jax cannot read the HLO of gathers that v6e's SparseCores do; the compiler's own dump has them."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        try:
            return Readable(compiled, compiled.as_text())
        except jax.errors.JaxRuntimeError:
            (dump,) = pathlib.Path(folder).glob("*.after_codegen.txt")
            return Readable(compiled, dump.read_text())


def fingerprint(text: str, topology: str) -> str:
    """Tells whether a program is the one that an earlier run compiled."""
    versions = f"{metadata.version('libtpu')} {jax.__version__} {_rules()}"
    return hashlib.sha256(f"{versions} {topology} {text}".encode()).hexdigest()[:20]


def _rules() -> str:
    """What decides the facts of a row: rows found by other rules than today's are found anew."""
    parts = (examine, totals_of, computations_of, _trips, compiler_seconds, collective_seconds, memory_of)
    return "".join(map(inspect.getsource, parts)) + f"{CHIPS} {HOP_SECONDS}"


def work(task: Task, known: Mapping[str, dict]) -> list[dict[str, Any]]:
    """All programs of a task."""
    try:
        programs = programs_of(task)
    except Exception as error:
        return [_failed(task, error)]
    return [attempt(program, task, known) for program in programs]


def _alone(task: Task, known: Mapping[str, dict]) -> list[dict[str, Any]]:
    """`work` in a process of its own: a compiler that dies takes nobody along."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent) as process:
        try:
            return process.submit(work, task, known).result()
        except concurrent.futures.BrokenExecutor as error:
            return [_failed(task, error)]


def _end_with_parent() -> None:
    """Ends this process when its parent does, also in the middle of a compilation, which takes minutes."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _failed(task: Task, error: BaseException) -> dict[str, Any]:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return {**task._asdict(), "chips": math.prod(sides_of(task.topology)), "samples": 0, "error": reason}


# --- judgement ----------------------------------------------------------------------------------------------------


def task_of(row: Mapping[str, Any]) -> Task:
    """The task that a row is of. Its "program" is the program's name, or the kind alone where the compiler died."""
    kind = "kernels" if row["method"] == "kernels" else row["program"].split()[0]
    return Task(row["method"], kind, row["dtype"], row["topology"], row["preset"])


def owner(row: Mapping[str, Any]) -> str:
    """The method, and the preset if one was asked for."""
    return " ".join(filter(None, (row["method"], row["preset"])))


def title(row: Mapping[str, Any]) -> str:
    """How a row is called."""
    return f"{owner(row)}: {row['program']}, {row['dtype']}, {row['topology']}"


def faults(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with one program."""
    if row.get("error"):
        return [f"{title(row)}: does not compile: {row['error']}"]
    found, hbm = [], CHIPS[row["topology"].split(":")[0]].hbm
    if row["memory"]["total"] > hbm:
        found.append(f"{title(row)}: needs {_size(row['memory']['total'])} of the chip's {_size(hbm)}")
    if row["program"].startswith("sweep") and row["collectives"]:
        found.append(f"{title(row)}: members of a sweep exchange {row['collectives']}; they should not meet")
    for kind, (_, size) in row["collectives"].items():
        # Gradients and statistics are summed, in pieces that together are about as large as the detector. What it keeps
        # of each picture, as a bank does, is brought to all chips. In a training's only step of its kind pictures may
        # be too: an episode whose chips are more than its walkers cannot be split.
        is_of_state = kind == "all-reduce" or (kind == "all-gather" and row.get("once")) or row.get("single")
        limit = 2 * row["state_bytes"] + 2**20 if is_of_state else max(SAMPLE_BYTES * row["samples"], 2**16)
        if size > limit:
            found.append(
                f"{title(row)}: {kind} of {size / 2**20:.1f} MiB on each chip, more than {limit / 2**20:.1f} MiB: "
                "something of the batch's size is gathered"
            )
    return found


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of the same program on the smallest and on the largest slice of a chip, at fixed work per chip."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        if not row.get("error") and row["seconds"] and row["method"] != "kernels":
            chip = row["topology"].split(":")[0]
            groups.setdefault((row["method"], row["program"], row["dtype"], chip, row["preset"]), []).append(row)
    found = []
    for (method, program, dtype, chip, preset), group in groups.items():
        small, large = min(group, key=lambda r: r["chips"]), max(group, key=lambda r: r["chips"])
        if small["chips"] < large["chips"] and small["samples"] * large["chips"] == large["samples"] * small["chips"]:
            before, after = small["seconds"]["step"], large["seconds"]["step"]
            found.append(
                {"method": method, "program": program, "dtype": dtype, "chip": chip, "preset": preset}
                | {"chips": [small["chips"], large["chips"]], "seconds": [before, after], "growth": after / before - 1}
            )
    return found


def judge(rows: list[dict[str, Any]]) -> list[str]:
    """Every reason why the programs are not fit for the slices; empty if they are."""
    reasons = [fault for row in rows for fault in faults(row)]
    for case in growth(rows):
        if case["growth"] >= GROWTH:
            reasons.append(
                f"{owner(case)}: {case['program']}, {case['dtype']}, {case['chip']}: a step takes "
                f"{case['growth']:.0%} longer on {case['chips'][1]} chips than on {case['chips'][0]}"
            )
    return reasons


# --- report -------------------------------------------------------------------------------------------------------

NOTE = (
    "Compiler estimates, not measurements: nothing was run on a TPU. Seconds of collectives are ours (bytes over the "
    "slice's links and 1 us a hop, no overlap), since the compiler's do not count them."
)
COLUMNS = ("method", "program", "dtype", "slice", "samples", "a chip", "of HBM", "collectives", "ms", "collectives ms")


UNITS = ("B", "KiB", "MiB", "GiB")


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table, as text."""
    start = [owner(row), row["program"], row["dtype"], row["topology"], f"{row['samples']:,}"]
    if row.get("error"):
        return [*start, "-", "-", "does not compile", "-", "-"]
    total, hbm = row["memory"]["total"], CHIPS[row["topology"].split(":")[0]].hbm
    kinds = ", ".join(f"{n} {kind} {_size(size)}" for kind, (n, size) in row["collectives"].items()) or "none"
    if row["seconds"] is None:
        times = ["unknown", "-"]
    else:
        times = [f"{1e3 * row['seconds'][part]:.2f}" for part in ("step", "collectives")]
    return [*start, _size(total), f"{total / hbm:.0%}", kinds, *times]


def _size(size: float) -> str:
    power = min(3, max(0, math.floor(math.log2(max(size, 1)) / 10)))
    number = size / 1024**power
    return f"{number:.0f} {UNITS[power]}" if power == 0 or number >= 100 else f"{number:.1f} {UNITS[power]}"


def growth_line(case: Mapping[str, Any]) -> str:
    """How a program scales, in words."""
    (few, many), (before, after) = case["chips"], case["seconds"]
    return (
        f"{owner(case)}: {case['program']}, {case['dtype']}, {case['chip']}: {1e3 * before:.2f} ms on {few} chips, "
        f"{1e3 * after:.2f} ms on {many} ({case['growth']:+.1%})"
    )


def compilers(rows: list[dict[str, Any]]) -> str:
    """Which compiler made which methods' rows: a run keeps rows of earlier ones."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(f"libtpu {row.get('libtpu', 'unknown')}", []).append(owner(row))
    return "Compiled by " + "; ".join(f"{name}: {', '.join(sorted(set(made)))}" for name, made in found.items()) + "."


def markdown(result: Mapping[str, Any]) -> str:
    """The tables for RESULTS.md."""
    lines = [NOTE, "", compilers(result["rows"]), "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in result["rows"]]
    lines += ["", "The same work on every chip, from the smallest slice to the largest:", ""]
    lines += [f"* {growth_line(case)}" for case in result["growth"]] or ["* only one slice was asked for"]
    return "\n".join(lines) + "\n"


def show(rows: list[dict[str, Any]]) -> None:
    """Prints the table."""
    table = [list(COLUMNS), *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(COLUMNS))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


# --- the command --------------------------------------------------------------------------------------------------


def tasks_of(names, topologies, programs, dtypes, preset) -> list[Task]:
    """What to compile, the slowest kinds first."""
    slowest = [program for program in ("sweep", "train", "score") if program in programs]
    found = [Task(n, program, d, t, preset) for d in dtypes for program in slowest for n in names for t in topologies]
    if "kernels" in programs:  # on one chip, whatever the slice
        chips = {topology.split(":")[0]: topology for topology in reversed(topologies)}
        found += [Task("kernels", "kernels", d, t, None) for d in dtypes for t in chips.values()]
    return found


def run(tasks: list[Task], *, jobs: int, known: Mapping[str, dict], each: Callable) -> list[dict[str, Any]]:
    """Compiles in `jobs` processes; `each` is called with the rows of every task that is done."""
    rows: dict[Task, list[dict]] = {}
    if jobs == 1:
        for task in tasks:
            rows[task] = work(task, known)
            each(rows[task])
    else:
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(_alone, task, known): task for task in tasks}
            for done in concurrent.futures.as_completed(waiting):
                rows[waiting[done]] = done.result()
                each(done.result())
    return [row for task in tasks for row in rows[task]]


def compiler_problem() -> str | None:
    """Why nothing can be compiled, and what to do about it; None if the compiler is there."""
    remedy = f"Run: pip install --no-deps libtpu=={COMPILER}"
    if importlib.util.find_spec("libtpu") is None:
        return f"the TPU compiler is missing; it needs no TPU. {remedy}"
    found = metadata.version("libtpu")
    if [int(part) for part in found.split(".")[:3]] < [int(part) for part in COMPILER.split(".")]:
        return f"libtpu {found} overflows its stack on some sweeps for v6e; expected {COMPILER} or later. {remedy}"
    return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line. Raises SystemExit for names that do not exist."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tpu", description=(__doc__ or "").splitlines()[0])
    listed = lambda text: tuple(part for part in text.split(",") if part)  # noqa: E731
    parser.add_argument("--methods", type=listed, default=("all",), help="names with commas, or all")
    parser.add_argument("--topologies", type=listed, default=TOPOLOGIES, help=f"default {','.join(TOPOLOGIES)}")
    parser.add_argument("--programs", type=listed, default=PROGRAMS, help=f"of {','.join(PROGRAMS)}")
    parser.add_argument(
        "--dtypes", type=listed, default=DTYPES[:1], help=f"of {','.join(DTYPES)}; the presets' if not given"
    )
    parser.add_argument("--preset", help="of every method; default: the first of each, meant for accelerators")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--json", type=pathlib.Path, default=FOLDER / "estimates.json", help="results, kept")
    parser.add_argument("--fresh", action="store_true", help="compile what is in the JSON file already, too")
    options = parser.parse_args(arguments)
    if "all" in options.methods:
        options.methods = tuple(methods.METHODS)
    for field, allowed in (("methods", methods.METHODS), ("programs", PROGRAMS), ("dtypes", DTYPES)):
        for name in getattr(options, field):
            if name not in allowed:
                parser.error(f"--{field} {name!r} is unknown; expected some of {', '.join(allowed)}.")
    for topology in options.topologies:
        if not re.fullmatch(rf"({'|'.join(CHIPS)}):\d+x\d+", topology):
            parser.error(f"--topologies {topology!r} is unknown; expected {' or '.join(CHIPS)} as in v5e:2x2.")
    if problem := compiler_problem():
        parser.error(problem)
    return options


def with_others(rows: list[dict], earlier: list[dict]) -> list[dict]:
    """Rows, and those of earlier runs that are of other tasks: a run of some keeps what is known of the others.

    Programs are not compared by name alone: a compiler that died leaves a row without a program, and a phase may have
    been renamed. A task that failed leaves the earlier rows of its other programs, which are hours of compilation.
    """
    found, done = {title(row) for row in rows}, {task_of(row) for row in rows if not row.get("error")}
    return rows + [row for row in earlier if title(row) not in found and task_of(row) not in done]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    tasks = tasks_of(options.methods, options.topologies, options.programs, options.dtypes, options.preset)
    earlier = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    known = {} if options.fresh else {row["fingerprint"]: row for row in earlier if not row.get("error")}
    finished: list[dict] = []

    def each(rows):
        finished.extend(rows)
        for row in rows:
            seconds = "earlier" if row.get("fingerprint") in known else f"{row.get('compile_seconds', 0):.0f} s"
            print(f"compiled {title(row)}: {'FAILED' if row.get('error') else 'ok'}, {seconds}", flush=True)
        keep(options.json, with_others(finished, earlier))  # a killed run goes on where it was

    print(NOTE)
    rows = run(tasks, jobs=options.jobs, known=known, each=each)
    result = keep(options.json, with_others(rows, earlier))
    options.json.with_suffix(".md").write_text(markdown(result))
    print()
    show(rows)
    print()
    for case in result["growth"]:
        print(growth_line(case))
    for reason in result["reasons"]:
        print(f"NOT FIT: {reason}")
    print(f"{len(rows)} programs, {len(result['reasons'])} reasons why not. {options.json}")
    return 1 if result["reasons"] else 0


def keep(path: pathlib.Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the results: {"note", "environment", "rows", "growth", "reasons"}."""
    facts = {**environment(), "libtpu": metadata.version("libtpu"), "chips": {k: v._asdict() for k, v in CHIPS.items()}}
    result = {"note": NOTE, "environment": facts, "rows": rows, "growth": growth(rows), "reasons": judge(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    return result


if __name__ == "__main__":
    sys.exit(main())
