"""A sweep of seeds x learning rates against the same runs one after the other, and ways to compute the model axis.

    python -m benchmarks.sweep --json benchmarks/results/cpu/sweep.json
    python -m benchmarks.sweep --parts processes --json benchmarks/results/cpu/sweep.json  (adds to the file)

Parts:
  runs       4 seeds x 4 rates in this process: as a sweep, and with `runs.train_run` called for each, in turn
             A B B A. Data are loaded and programs compiled before; "compute" leaves compiling out as well.
  ways       one training step of all members, by each way to compute the model axis, over the same steps called
             member by member.
  processes  `jaxad sweep` once against `jaxad train` once for each member, compiled programs cached on disk.

Expected on 2 CPU cores with the preset tiny: compute <= 1.1 of the runs one by one (must hold), a sweep's command
<= 1/3 of the 16 commands (must hold).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jaxad import cache  # noqa: E402

if folder := cache.folder("xla"):  # as every jaxad command; jaxad.cli needs more than is installed on some machines
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from jaxad import members  # noqa: E402

members.use_all_cores()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.common import environment, turns, write  # noqa: E402
from jaxad import methods, runs, settings, sweep, train  # noqa: E402
from jaxad.core import as_arrays, spec_of  # noqa: E402
from jaxad.data import load  # noqa: E402
from jaxad.sweep import engine, grid, stack  # noqa: E402

RATES = (5e-4, 1e-3, 2e-3, 4e-3)


def request_of(options):
    """The sweep's request: seeds x learning rates."""
    config = {"steps": options.steps} if options.steps else {}
    base = settings.Settings(method=options.method, preset=options.preset, config=config)
    return sweep.Request(base, ("synthetic",), seeds=tuple(range(options.seeds)), grid={"learning_rate": RATES})


# --- a sweep against runs one by one ------------------------------------------------------------------------------


class Contest:
    """The members of a request, computed together or one after the other; data are on the host already."""

    def __init__(self, request):
        self.method = methods.get(request.base.method)
        self.members = grid.members_of(self.method, request)
        self.library = stack.Library()
        self.groups = engine.groups_of(self.method, self.members, self.library)
        self.data = {m.seed: load(m.settings.data, seed=m.seed, **m.settings.load_arguments()) for m in self.members}

    def together(self):
        """As a sweep: (seconds in all, seconds without compiling, image AUROCs)."""
        began, compute, rows = time.perf_counter(), 0.0, []
        for group in self.groups:
            for finished in engine.compute_group(self.method, group, self.library):
                rows += finished.rows
                compute += finished.rows[0]["chunk_seconds"]
        rows.sort(key=lambda row: row["member"])
        return time.perf_counter() - began, compute, [row["image_auroc"] for row in rows]

    def one_by_one(self):
        """With `train_run` for each member, as together. Compute: training and scoring, the calibration left out."""
        began, compute, found = time.perf_counter(), 0.0, []
        for member in self.members:
            report = runs.train_run(member.settings, data=self.data[member.seed])[1]
            compute += report["train_seconds"] + report["score_seconds"]
            found.append(report["image_auroc"])
        return time.perf_counter() - began, compute, found


def race_runs(request, rounds):
    """Both forms in turn; their AUROCs must agree."""
    contest = Contest(request)
    forms = {"together": contest.together, "one_by_one": contest.one_by_one}
    contest.together()  # compiles, and fills the cache on disk
    runs.train_run(contest.members[0].settings, data=contest.data[contest.members[0].seed])
    seen = {name: [] for name in forms}
    for repeat in range(rounds):
        for name in turns(forms, repeat):
            seen[name].append(forms[name]())
    difference = float(np.max(np.abs(np.subtract(seen["together"][0][2], seen["one_by_one"][0][2]))))
    assert difference < 0.02, f"members differ from lone runs by {difference} in image AUROC"
    seconds = {name: {"all": [r[0] for r in rs], "compute": [r[1] for r in rs]} for name, rs in seen.items()}
    ratios = {
        kind: [a / b for a, b in zip(seconds["together"][kind], seconds["one_by_one"][kind], strict=True)]
        for kind in ("all", "compute")
    }
    return {
        "members": len(contest.members),
        "steps": contest.members[0].settings.config["steps"],
        "seconds": seconds,
        "ratio_together_to_one_by_one": {kind: statistics.median(values) for kind, values in ratios.items()},
        "ratios": ratios,
        "largest_difference_of_image_auroc": difference,
    }


# --- ways to compute the model axis -------------------------------------------------------------------------------


def race_ways(request, rounds, steps):
    """Seconds of `steps` steps of all members for each way, over the same steps member by member."""
    method = methods.get(request.base.method)
    everyone = grid.members_of(method, request)
    loaded = load(everyone[0].settings.data, **everyone[0].settings.load_arguments()).to_device()
    source, spec = loaded.sources["train"], spec_of(loaded.sources)
    phase = method.phases(everyone[0].cfg)[0]
    forms = {"calls": _calls(method, everyone, source, spec, phase, steps)}
    fields = [field.name for field in dataclasses.fields(everyone[0].cfg)]
    impls = ("auto", "conv", "gemm") if "conv_impl" in fields else ("",)
    meshes = {"": None, " over devices": engine.default_mesh(len(everyone))}
    compile_seconds = {}
    for way in members.WAYS:
        for where, mesh in meshes.items():
            for impl in impls if not where else impls[:1]:
                if where and mesh is None:
                    continue
                name = f"{way}{where}{f' {impl}' if impl else ''}"
                count = len(everyone) if mesh is None else engine._up(len(everyone), mesh.shape["run"])
                programs = members.Programs(members.Members(count, way, mesh))
                chosen = [dataclasses.replace(m.cfg, conv_impl=impl) for m in everyone] if impl else everyone
                forms[name] = _lifted(method, chosen, source, spec, steps, programs, len(everyone))
                compile_seconds[name] = programs.seconds
    seen = {name: [] for name in forms}
    for repeat in range(rounds):
        for name in turns(forms, repeat):
            seen[name].append(forms[name]())
    ratios = {name: [s / c for s, c in zip(values, seen["calls"], strict=True)] for name, values in seen.items()}
    return {
        "members": len(everyone),
        "steps": steps,
        "ratio_to_calls": {name: statistics.median(values) for name, values in ratios.items()},
        "ratios": ratios,
        "compile_seconds": compile_seconds,
        "default": f"{members.default_way()}{'' if meshes[' over devices'] is None else ' over devices'}",
    }


def _calls(method, everyone, source, spec, phase, steps):
    programs = members.Programs()
    start = jax.jit(lambda key, cfg: train.init(method, key, cfg, spec))
    keys = [train.phase_key(jax.random.key(m.seed), 0) for m in everyone]

    def run():
        states = [start(jax.random.key(m.seed), as_arrays(m.cfg)) for m in everyone]
        step = train.step_program(phase, keys[0], states[0], source, programs=programs)
        jax.block_until_ready(states)
        began = time.perf_counter()
        for state, key in zip(states, keys, strict=True):
            for t in range(steps):
                state, metrics = step(state, key, source, np.int32(t))
                jax.block_until_ready(metrics)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    run()
    return run


def _lifted(method, everyone, source, spec, steps, programs, count):
    cfgs = [getattr(m, "cfg", m) for m in everyone]
    filled = (cfgs * 2)[: programs.members.count]
    seeds = jnp.arange(programs.members.count, dtype=jnp.uint32)
    keys = programs.place(jax.vmap(jax.random.key)(seeds))
    stacked = programs.place(jax.tree.map(lambda *v: jnp.stack(v), *map(as_arrays, filled)))
    phase = method.phases(cfgs[0])[0]
    data = programs.place(source, None)
    args = keys, stacked
    start = programs.compile(("init",), lambda k, c: train.init(method, k, c, spec), (0, 0), (), *args)
    phase_keys = programs.each(lambda k: train.phase_key(k, 0), keys)
    step = train.step_program(phase, phase_keys, start(*args), data, programs=programs)

    def run():
        state = jax.block_until_ready(start(*args))
        began = time.perf_counter()
        for t in range(steps):
            state, metrics = step(state, phase_keys, data, np.int32(t))
            jax.block_until_ready(metrics)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) * count / programs.members.count

    run()
    return run


# --- processes ----------------------------------------------------------------------------------------------------


def race_processes(request, runs_of_each):
    """Wall seconds of the sweep's command before, between and after the commands of its members."""
    method = methods.get(request.base.method)
    everyone = grid.members_of(method, request)
    shared = [f"--set=steps={everyone[0].settings.config['steps']}", "--preset", everyone[0].settings.preset, "--quiet"]
    with tempfile.TemporaryDirectory() as folder:
        numbers = iter(range(10**6))

        def command(verb, *flags):
            out = f"{folder}/{next(numbers)}"
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "jaxad", verb, request.base.method, *shared, *flags, "--out", out],
                check=True,
                env={**os.environ, "XLA_FLAGS": ""},
            )
            return time.perf_counter() - began

        def as_sweep():
            rates = ",".join(map(str, RATES))
            return command("sweep", "--seeds", str(len(request.seeds)), "--grid", f"learning_rate={rates}")

        def alone(member):
            rate = member.settings.config["learning_rate"]
            return command("train", "--seed", str(member.seed), "--set", f"learning_rate={rate}")

        as_sweep(), alone(everyone[0])  # fills the caches on disk
        half = len(everyone) // 2
        sweeps, alones = [], []
        for _ in range(runs_of_each):
            sweeps.append(as_sweep())
            alones += [alone(member) for member in everyone[:half]]
            sweeps.append(as_sweep())
            alones += [alone(member) for member in everyone[half:]]
    return {
        "members": len(everyone),
        "sweep_seconds": sweeps,
        "train_seconds": alones,
        "ratio_sweep_to_commands": statistics.median(sweeps) / (sum(alones) / runs_of_each),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="memae")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, help="of training; the preset's if not given")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--way-steps", type=int, default=10, help="steps timed of each way")
    parser.add_argument("--parts", default="runs,ways")
    parser.add_argument("--smoke", action="store_true", help="as small as it gets, to see that it runs")
    parser.add_argument("--json", type=pathlib.Path, help="file to write")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.seeds, options.rounds, options.way_steps = 2, 1, 1, 1
    request, result = request_of(options), {"method": options.method, "preset": options.preset}
    facts = {"environment": environment(), "devices": jax.device_count()}
    if "runs" in options.parts:
        result["runs"] = race_runs(request, options.rounds)
        print("sweep / one by one:", result["runs"]["ratio_together_to_one_by_one"])
    if "ways" in options.parts:
        result["ways"] = race_ways(request, options.rounds, options.way_steps)
        for name, ratio in result["ways"]["ratio_to_calls"].items():
            print(f"{name:24} {ratio:.2f} of calls for each member")
    if "processes" in options.parts:
        result["processes"] = race_processes(request, 1)
        print("sweep / commands:", result["processes"]["ratio_sweep_to_commands"])
    if options.json:
        before = json.loads(options.json.read_text()) if options.json.exists() else {}
        measured = {name: {**facts, **part} for name, part in result.items() if isinstance(part, dict)}
        write(options.json, {**before, **result, **measured})


if __name__ == "__main__":
    main()
