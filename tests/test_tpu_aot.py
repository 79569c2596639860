"""Compilation for TPUs that are not there: what is made of the compiler's answers, and the compiler itself."""

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import tpu
from jaxad import score, shard, train
from jaxad.core import Batch, Phase, Scores, Source
from jaxad.ops.blocks import devices_of_rows, rows_over
from jaxad.ops.memory import read_memory

has_compiler = pytest.mark.skipif(tpu.compiler_problem() is not None, reason=str(tpu.compiler_problem()))


def aot(function):
    return pytest.mark.tpu_aot(has_compiler(function))


# --- rules, without a compiler ------------------------------------------------------------------------------------

HLO = """HloModule jit_f

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%p), backend_config={"estimated_cycles":"50"}
  %all-reduce.1 = f32[8]{0} all-reduce(%fusion.1), to_apply=%add
}

%cond.1 (p: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[] compare(%i, %constant.1), direction=LT
}

%asking.1 (p: (s32[], f32[8])) -> pred[] {
  ROOT %any = pred[] fusion(%p)
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %fusion.2 = f32[8]{0} fusion(%x), backend_config={"estimated_cycles":"400"}
  %while.1 = (s32[], f32[8]) while(%tuple), condition=%cond.1, body=%body.1
  %all-gather.1 = f32[64,2]{1,0} all-gather(%fusion.2), dimensions={0}
}
"""


def test_loop_bodies_count_as_often_as_they_run():
    totals = tpu.totals_of(HLO)
    assert (totals.cycles_once, totals.cycles, totals.unknown_loops) == (450, 400 + 12 * 50, 0)
    assert totals.collectives == {"all-reduce": (12, 12 * 32), "all-gather": (1, 512)}


def test_a_loop_of_unknown_length_counts_once_and_is_told():
    totals = tpu.totals_of(HLO.replace("condition=%cond.1", "condition=%asking.1"))
    assert (totals.cycles, totals.unknown_loops, totals.collectives["all-reduce"]) == (450, 1, (1, 32))


@pytest.mark.parametrize(("optimal", "known"), [(0.018, 0.018), (-28.982, 0.018), (-0.25, 0.75)])
def test_seconds_without_the_penalty_of_unknown_calls_and_with_loops(optimal, known):
    totals = tpu.Totals(cycles_once=450, cycles=900, collectives={}, unknown_loops=0)
    assert tpu.compiler_seconds(optimal, totals) == pytest.approx(2 * known)


def test_seconds_of_collectives_by_hand():
    exchange = {"all-reduce": (3, 10**8)}
    # 2x2: two links of 50 GB/s a chip; half of 3/4 of the bytes on each, there and back; 3 times 2 hops, there and back
    assert tpu.collective_seconds(exchange, "v5e:2x2") == pytest.approx(2 * (0.75e8 / 100e9 + 6e-6))
    # 16x16: four links, 8 hops to the farthest chip along each side
    assert tpu.collective_seconds(exchange, "v5e:16x16") == pytest.approx(2 * (255 / 256 * 1e8 / 200e9 + 48e-6))
    assert tpu.collective_seconds({"all-gather": (0, 10**8)}, "v6e:2x2") == pytest.approx(0.75e8 / 200e9)
    assert tpu.collective_seconds(exchange, "v5e:1x1") == 0


def a_row(**changes):
    row = {"method": "m", "program": "train x", "dtype": "float32", "topology": "v5e:2x2", "preset": None}
    row |= {"chips": 4, "samples": 128, "state_bytes": 10 << 20, "error": None, "memory": {"total": 1 << 30}}
    row |= {"collectives": {"all-reduce": [20, 12 << 20]}, "seconds": {"step": 0.010, "collectives": 0.001}}
    return row | changes


def test_a_program_that_is_fit_has_no_faults():
    assert tpu.judge([a_row(), a_row(topology="v5e:16x16", chips=256, samples=8192, seconds={"step": 0.0114})]) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"memory": {"total": 17 << 30}}, "needs 17.0 GiB of the chip's 16.0 GiB"),
        ({"error": "RESOURCE_EXHAUSTED"}, "does not compile: RESOURCE_EXHAUSTED"),
        ({"collectives": {"all-gather": [1, 128 * 64 * 64 * 3]}}, "something of the batch's size is gathered"),
        ({"collectives": {"all-reduce": [1, 25 << 20]}}, "something of the batch's size is gathered"),
        ({"program": "sweep x", "collectives": {"all-reduce": [1, 4]}}, "should not meet"),
    ],
)
def test_faults_are_told(changes, reason):
    (fault,) = tpu.judge([a_row(**changes)])
    assert reason in fault and "float32, v5e:2x2" in fault
    assert len(tpu.judge([a_row(), a_row(**changes)])) == 1


def test_larger_chips_hold_more():
    assert tpu.judge([a_row(memory={"total": 17 << 30}, topology="v6e:2x2")]) == []


def test_steps_that_take_longer_on_more_chips_are_told():
    rows = [
        a_row(),
        a_row(topology="v5e:16x16", chips=256, samples=8192, seconds={"step": 0.0116, "collectives": 0.002}),
    ]
    (reason,) = tpu.judge(rows)
    assert "a step takes 16% longer on 256 chips than on 4" in reason
    assert tpu.judge([rows[0], rows[1] | {"topology": "v6e:16x16"}]) == []  # not the same chip
    assert tpu.judge([rows[0], rows[1] | {"dtype": "bfloat16"}]) == []
    assert tpu.judge([rows[0], rows[1] | {"samples": 256}]) == []  # less work on every chip: pictures ran out


def test_what_is_kept_of_each_picture_may_reach_all_chips():
    bank = a_row(collectives={"all-gather": [2, 15 << 20]}, once=True)
    assert tpu.judge([bank]) == []
    (fault,) = tpu.judge([bank | {"collectives": {"all-gather": [2, 25 << 20]}}])
    assert "more than 21.0 MiB" in fault
    assert len(tpu.judge([bank | {"collectives": {"all-to-all": [1, 15 << 20]}}])) == 1


def test_what_a_training_does_once_may_move_as_much_as_the_detector():
    step = a_row(collectives={"all-to-all": [3, 15 << 20]}, single=True)
    assert tpu.judge([step]) == []
    assert len(tpu.judge([step | {"collectives": {"all-to-all": [3, 25 << 20]}}])) == 1
    assert len(tpu.judge([step | {"single": False}])) == 1


@pytest.mark.parametrize(("chips", "samples"), [(4, 32), (256, 256)])
def test_a_pass_has_no_more_pictures_at_a_time_than_there_are(monkeypatch, chips, samples):
    """Patch SVDD's bank takes 8 pictures at a time on every chip; there are 400."""
    monkeypatch.setattr(tpu.shard, "make_mesh", lambda **_: None)
    monkeypatch.setattr(tpu.shard, "over_data", lambda mesh: None)
    monkeypatch.setattr(tpu, "NamedSharding", lambda *_: None)
    monkeypatch.setattr(tpu, "placed", lambda tree, sharding: tree)
    programs = tpu.method_programs("patch_svdd", "train", [None] * chips, preset=None, dtype="float32")
    (bank,) = (p for p in programs if p.name == "train bank")
    (encoder,) = (p for p in programs if p.name == "train encoder")
    assert bank.once and bank.samples == samples
    assert not encoder.once and encoder.samples == 64 * chips


def results_of_a_run(path, monkeypatch, work, *arguments):
    """(exit status, rows in the file) of the command, with `work` in the compiler's place."""
    monkeypatch.setattr(tpu, "compiler_problem", lambda: None)
    monkeypatch.setattr(tpu, "work", work)
    version = tpu.metadata.version
    monkeypatch.setattr(tpu.metadata, "version", lambda name: "0" if name == "libtpu" else version(name))
    command = ["--methods", "memae", "--topologies", "v5e:2x2", "--programs", "train", "--jobs", "1"]
    status = tpu.main([*command, "--json", str(path), *arguments])
    return status, json.loads(path.read_text())["rows"]


def compiles(task, known):
    name = "memory read" if task.method == "kernels" else f"{task.program} x"
    row = a_row(**task._asdict() | {"program": name}, fingerprint=str(task), collectives={})
    return [row | {"earlier": row["fingerprint"] in known}]


def dies(task, known):
    return [tpu._failed(task, RuntimeError("the compiler died"))]


def test_a_failure_goes_once_its_task_compiles(tmp_path, monkeypatch):
    status, rows = results_of_a_run(tmp_path / "t.json", monkeypatch, dies, "--programs", "train,sweep,kernels")
    assert status == 1 and [row["program"] for row in rows] == ["sweep", "train", "kernels"]
    status, rows = results_of_a_run(tmp_path / "t.json", monkeypatch, compiles, "--programs", "train,sweep,kernels")
    assert status == 0 and [row["program"] for row in rows] == ["sweep x", "train x", "memory read"]


def test_a_failure_leaves_what_was_compiled_before(tmp_path, monkeypatch):
    """Of a task's programs all but one may be as they were: the next run need not compile them again."""
    results_of_a_run(tmp_path / "t.json", monkeypatch, compiles)
    status, rows = results_of_a_run(tmp_path / "t.json", monkeypatch, dies)
    assert status == 1 and [row["program"] for row in rows] == ["train", "train x"]
    status, (row,) = results_of_a_run(tmp_path / "t.json", monkeypatch, compiles)
    assert status == 0 and row["earlier"]


def test_a_renamed_phase_leaves_no_row_behind():
    new, old = a_row(program="train new"), a_row(program="train old", error="RESOURCE_EXHAUSTED")
    others = [a_row(program="train old", topology="v6e:2x2"), a_row(program="sweep old")]
    assert tpu.with_others([new], [old, *others]) == [new, *others]


def test_presets_do_not_overwrite_each_other(tmp_path, monkeypatch):
    results_of_a_run(tmp_path / "t.json", monkeypatch, compiles)
    _, rows = results_of_a_run(tmp_path / "t.json", monkeypatch, compiles, "--preset", "tiny")
    assert {tpu.title(row) for row in rows} == {
        "memae: train x, float32, v5e:2x2",
        "memae tiny: train x, float32, v5e:2x2",
    }
    assert "| memae tiny | train x | float32 |" in (tmp_path / "t.md").read_text()


def test_a_killed_run_keeps_what_it_had_not_come_to(tmp_path, monkeypatch):
    path, both = tmp_path / "t.json", ["--programs", "sweep,train"]
    results_of_a_run(path, monkeypatch, compiles, *both)

    def killed(task, known):
        if task.program == "train":
            raise KeyboardInterrupt
        return compiles(task, known)

    with pytest.raises(KeyboardInterrupt):
        results_of_a_run(path, monkeypatch, killed, *both)
    _, rows = results_of_a_run(path, monkeypatch, compiles, *both)
    assert [row["program"] for row in rows] == ["sweep x", "train x"] and all(row["earlier"] for row in rows)


def test_rows_of_the_record_belong_to_the_tasks_of_a_run():
    rows = json.loads((tpu.FOLDER / "estimates.json").read_text())["rows"]
    tasks = tpu.tasks_of(tuple(tpu.methods.METHODS), tpu.TOPOLOGIES, tpu.PROGRAMS, tpu.DTYPES[:1], None)
    assert rows and {tpu.task_of(row) for row in rows} <= set(tasks)


def test_the_table_marks_estimates_and_failures():
    rows = [a_row(), a_row(error="no"), a_row(seconds=None)]
    text = tpu.markdown({"rows": rows, "growth": []})
    assert text.startswith("Compiler estimates, not measurements")
    assert "| m | train x | float32 | v5e:2x2 | 128 | 1.0 GiB | 6% | 20 all-reduce 12.0 MiB | 10.00 | 1.00 |" in text
    assert "does not compile" in text and "unknown" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "none"], "--methods 'none' is unknown"),
        (["--topologies", "v9:2x2"], "--topologies 'v9:2x2' is unknown"),
        (["--programs", "trian"], "--programs 'trian' is unknown"),
    ],
)
def test_unknown_names_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        tpu.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_compiler_too_old_for_all_programs_is_refused(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(tpu.metadata, "version", lambda name: "0.0.42.1")
    assert "libtpu 0.0.42.1 overflows its stack" in tpu.compiler_problem()
    monkeypatch.setattr(tpu.metadata, "version", lambda name: "0.0.100")
    assert tpu.compiler_problem() is None


WITH_CHECKOUT = {**os.environ, "PYTHONPATH": str(tpu.ROOT)}


def alive(process: int) -> bool:
    """Whether a process still runs; one that ended and waits for its parent does not."""
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


BUSY = """
import os, time
from benchmarks import tpu

def busy(task, known):
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    tpu.work = busy
    tpu._alone(None, {})
"""


def test_a_killed_run_leaves_no_compiler_behind(tmp_path):
    script = tmp_path / "busy.py"
    script.write_text(BUSY)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=WITH_CHECKOUT) as parent:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
    patience = time.monotonic() + 20
    while alive(child) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not alive(child)


# --- blocks of rows that devices share ----------------------------------------------------------------------------


def turns(rows, devices):
    """Turns of the loop over blocks in a read of the memory, by its jaxpr."""
    shapes = jax.ShapeDtypeStruct((rows, 8), jnp.float32), jax.ShapeDtypeStruct((2**14, 8), jnp.float32)
    with rows_over(devices):
        text = str(jax.make_jaxpr(lambda q, m: read_memory(q, m, threshold=0.1).value)(*shapes))
    return [line for line in text.split() if line.startswith("length=")]


def test_blocks_grow_with_the_devices_that_share_the_rows():
    assert turns(2**14, 1) == turns(2**16, 4) != []
    assert turns(2**16, 1) != turns(2**16, 4)


def test_kernels_refuse_rows_that_tpus_share(monkeypatch):
    shapes = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((16, 8), jnp.float32)

    def trace():
        jax.eval_shape(lambda q, m: read_memory(q, m, threshold=0.1, impl="pallas").value, *shapes)

    with rows_over(4):
        trace()  # interpreted on CPU, where XLA splits them like anything else
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        with pytest.raises(ValueError, match="for one device.*; got queries split over 4.*Pass impl='fused'"):
            trace()
    trace()


def test_steps_and_scores_tell_ops_how_many_devices_share_a_batch():
    seen, mesh = [], shard.make_mesh(data=4)
    source = Source(image=jnp.zeros((8, 4, 4, 1), jnp.uint8), label=jnp.zeros(8, jnp.int32))

    def step(key, state, batch):
        seen.append(devices_of_rows())
        return state, {}

    def judge(state, images):
        seen.append(devices_of_rows())
        return Scores(image=images.mean((1, 2, 3)) + state, map=images[..., 0])

    phase = Phase("train", step, steps=1, batch_size=8)
    key, step_0, state = jax.random.key(0), jnp.int32(0), jnp.zeros(())
    jax.eval_shape(lambda k, t: train.one_step(phase, k, state, source, t, place=shard.over_data(mesh))[0], key, step_0)
    batch = Batch(*(jnp.zeros((8, 1)),) * 5)
    train.placed_step(phase, key, state, batch, step_0)
    method = types.SimpleNamespace(score=judge)
    score.score_dataset(method, shard.replicate(state, mesh), source, batch_size=8)
    score.score_dataset(method, state, source, batch_size=8)
    assert seen == [4, 1, 4, 1] and devices_of_rows() == 1


# --- the compiler -------------------------------------------------------------------------------------------------


def planted(function, shape, spec):
    """Facts of a program (mesh, array) on 4 chips, with the shape and sharding of the array."""
    task = tpu.Task("planted", "train", "float32", "v5e:2x2", None)
    mesh = shard.data_mesh(tpu.devices_of(task.topology))
    function = functools.partial(function, mesh)
    argument = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    return tpu.attempt(tpu.Program("train x", function, (argument,), samples=shape[0], state_bytes=1 << 20), task)


@aot
def test_a_program_that_gathers_the_batch_is_found():
    def gathers(mesh, images):
        whole = jax.lax.with_sharding_constraint(images * 2, NamedSharding(mesh, PartitionSpec()))
        return whole @ whole.T

    row = planted(gathers, (512, 3072), ("data",))
    assert row["error"] is None and row["collectives"]["all-gather"][1] == 512 * 3072 * 4
    assert any("something of the batch's size is gathered" in fault for fault in tpu.faults(row))
    split = planted(lambda mesh, images: images @ images.mean(0), (512, 3072), ("data",))
    assert split["collectives"].keys() == {"all-reduce"} and tpu.faults(split) == []


@aot
def test_a_program_that_does_not_fit_is_found():
    row = planted(lambda mesh, x: jnp.cumsum(x, 0)[::2], (17 * 2**18, 2**10), ())
    assert tpu.faults(row), row


@aot
def test_loops_and_collectives_as_this_compiler_writes_them():
    def looped(mesh, images):
        return jax.lax.fori_loop(0, 24, lambda i, x: jnp.sin(x @ images.T @ images), images)

    row = planted(looped, (512, 512), ())
    once = planted(lambda mesh, images: jnp.sin(images @ images.T @ images), (512, 512), ())
    assert row["loops"]["cycles_factor"] > 5 and row["loops"]["unknown_trips"] == 0
    assert 10 < row["seconds"]["compiler"] / once["seconds"]["compiler"] < 40


@aot
def test_the_command_compiles_a_method_and_kernels_and_remembers(tmp_path, capsys):
    file = tmp_path / "tpu.json"
    command = ["--methods", "memae", "--preset", "tiny", "--topologies", "v5e:2x2", "--programs", "train,score,kernels"]
    command += ["--dtypes", "bfloat16", "--json", str(file), "--jobs", "1"]
    assert tpu.main(command) == 0
    result = json.loads(file.read_text())
    programs = {row["program"]: row for row in result["rows"]}
    assert {"train train", "score", "memory read"} <= set(programs) and not result["reasons"]
    assert programs["train train"]["collectives"]["all-reduce"][0] > 0 and programs["score"]["collectives"] == {}
    assert programs["memory read"]["pallas_kernels"] == 3  # forward, queries, tables
    assert programs["train train"]["memory"]["total"] < 2**30
    assert result["note"] in file.with_suffix(".md").read_text()
    capsys.readouterr()
    assert tpu.main(command) == 0
    assert capsys.readouterr().out.count("ok, earlier") == len(result["rows"])
    assert tpu.main([*command, "--programs", "score"]) == 0  # a run of some keeps what is known of the others
    kept = json.loads(file.read_text())["rows"]
    assert {tpu.title(row) for row in kept} == {tpu.title(row) for row in result["rows"]}
    assert jax.device_count() == 4 and jax.default_backend() == "cpu"
    assert float(jax.jit(jnp.sum)(jnp.ones(8))) == 8  # the CPU is still there


@aot
def test_the_command_fails_where_a_program_does(tmp_path, capsys, monkeypatch):
    def broken(dtype):
        return (lambda x: jnp.concatenate([x, x])[: -x.shape[0]] @ x), [jax.ShapeDtypeStruct((3, 4), dtype)]

    monkeypatch.setattr(tpu, "KERNELS", {"broken": broken})
    command = ["--programs", "kernels", "--topologies", "v5e:2x2", "--jobs", "1", "--json", str(tmp_path / "t.json")]
    assert tpu.main(command) == 1
    assert "NOT FIT: kernels: broken, float32, v5e:2x2: does not compile: TypeError" in capsys.readouterr().out


def test_a_program_whose_text_jax_cannot_read_is_read_from_the_dump():
    class Compiled:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: async-update instruction should have 1 operands but sees 3")

    class Lowered:
        def compile(self, compiler_options):
            folder = pathlib.Path(compiler_options["xla_dump_to"])
            (folder / "module_0000.jit_f.after_optimizations.txt").write_text("earlier")
            (folder / "module_0000.jit_f.after_codegen.txt").write_text("HloModule jit_f")
            return Compiled()

    assert tpu.compile_readably(Lowered()).as_text() == "HloModule jit_f"
