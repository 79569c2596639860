"""The harness: it refuses what must not be believed, and what it reports is what it was given."""

import functools
import json
import os
import subprocess
import sys
import time
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxad import methods
from jaxad.bench import __main__ as entrance
from jaxad.bench import machine, race, report, rivals
from jaxad.bench.case import BenchmarkError, Case, Contender, worst_change, worst_difference
from jaxad.bench.methods import case_names, cases, draw_source, set_up
from jaxad.bench.program import compile_program
from jaxad.console import Console
from jaxad.core import Batch, Method, Phase, Preset, Scores, config, static

SIDE = 300
QUICK = race.Effort(rounds=4, round_seconds=0.04, least_rounds=4, most_runs=8)


def draw(numbers):
    """A matrix whose powers neither die nor explode: results can be compared."""
    return 0.06 * numbers.standard_normal((SIDE, SIDE), np.float32)


def heavy(x):
    """Many milliseconds of products, small enough a program to compile at once."""
    return jax.lax.fori_loop(0, 60, lambda _, y: jnp.tanh(y @ x), x)


@pytest.fixture(scope="module")
def ceilings():
    best = machine.Ceilings()
    best.measure("float32")
    return best


def case_of(*contenders, **options):
    options = {"draw": draw, "samples": 1, **options}
    return Case("products", contenders=contenders, **options)


def contender(name="ours", **options):
    program = jax.jit(heavy)
    options = {"run": lambda x: {"y": program(x)}, **options}
    return Contender(name, **options)


def numpy_heavy(x):
    y = x.astype(np.float64)
    for _ in range(60):
        y = np.tanh(y @ x)
    return {"y": y}


def test_a_timing_that_does_not_wait_is_caught(ceilings):
    """The planted defect: jax hands out arrays before they are computed, and this contender's clock stops then."""
    unsynced = contender("unsynced", wait=lambda result: result)
    turns = [race.turn(case_of(unsynced), unsynced, np.random.default_rng(0), 3) for _ in range(3)]
    with pytest.raises(BenchmarkError, match="'unsynced' was not finished when its clock stopped.*expected at most"):
        race.refuse_unsynced(case_of(unsynced), unsynced, turns)
    with pytest.raises(BenchmarkError, match="was not finished"):
        race.race(case_of(unsynced), ceilings=ceilings.best["float32"], effort=QUICK)


def test_work_in_another_thread_is_caught(ceilings):
    """A result that block_until_ready does not know how to wait for."""
    import concurrent.futures

    pool = concurrent.futures.ThreadPoolExecutor(1)
    late = Contender(
        "late",
        run=lambda x: pool.submit(lambda: time.sleep(0.05) or x),
        fetch=lambda future: {"y": np.asarray(future.result())},
    )
    with pytest.raises(BenchmarkError, match="was not finished"):
        race.race(case_of(late), ceilings=ceilings.best["float32"], effort=QUICK)


def test_faster_than_the_machine_is_refused(ceilings):
    """Work that nobody waits for and nobody fetches shows only in being too fast."""
    forgetful = contender("forgetful", run=lambda x: {"y": x}, flops=60 * 2.0 * 4000**3)
    with pytest.raises(BenchmarkError, match=r"'forgetful' would make .* GFLOP/s; expected at most"):
        race.race(case_of(forgetful), ceilings=ceilings.best["float32"], effort=QUICK)


def test_a_wrong_output_is_refused_before_it_is_timed():
    wrong = jax.jit(lambda x: {"y": heavy(x) + 0.01})
    case = case_of(contender(), contender("wrong", run=wrong), reference=numpy_heavy)
    with pytest.raises(BenchmarkError, match="outputs of 'wrong' differ from the reference by"):
        race.check(case, np.random.default_rng(0))
    right = race.check(case_of(contender(), reference=numpy_heavy), np.random.default_rng(0))
    assert right["worst"]["ours"] < 1e-3 and right["against"] == "reference"


def test_nan_is_a_wrong_output():
    assert worst_difference({"y": np.array([1.0, np.nan])}, {"y": np.ones(2)}) == float("inf")
    with pytest.raises(BenchmarkError, match="no name in common"):
        worst_difference({"a": np.ones(2)}, {"b": np.ones(2)})
    with pytest.raises(BenchmarkError, match="has shape"):
        worst_difference({"a": np.ones((2, 3))}, {"a": np.ones((2, 4))})
    assert worst_difference({"a": np.arange(4.0)}, {"a": np.arange(2.0)}) == 0  # a reference of the first rows


def test_a_contender_against_itself_has_ratio_one(ceilings):
    """The median of rounds, on a machine that may be busy: wide, but a factor of two is out."""
    case = case_of(contender(), contender("again"))
    record = report.measure(case, ceilings, effort=QUICK._replace(round_seconds=0.2))
    ratios = record["time_over"]["ratios"]["again"]
    assert len(ratios["pairs"]) == 4 and 0.6 < ratios["median"] < 1.6
    assert record["contenders"][0]["seconds"]["p50"] > 1e-4


def test_a_ratio_says_who_is_slower(ceilings):
    slow = contender("slow", run=lambda x: time.sleep(0.05) or {"y": x})
    fast = contender("fast", run=lambda x: time.sleep(0.01) or {"y": x})
    record = report.measure(case_of(fast, slow), ceilings, effort=QUICK)
    assert 3 < record["time_over"]["ratios"]["slow"]["median"] < 6
    (row,) = report.ratio_rows(record)
    assert row["time ratio"] == "slow / fast" and len(row["round by round"].split()) == 4


def test_every_run_has_inputs_of_its_own():
    seen = []
    spy = Contender("spy", run=lambda x: seen.append(x[0, 0]) or {"y": x}, put=lambda x: x)
    race.turn(case_of(spy), spy, np.random.default_rng(0), 5)
    assert len({float(x) for x in seen}) == len(seen) == 6  # one is not counted


def test_the_first_run_of_several_is_not_counted():
    runs = []
    waking = Contender("waking", run=lambda x: runs.append(time.sleep(0 if runs else 0.1)) or {"y": x})
    counted = race.turn(case_of(waking), waking, np.random.default_rng(0), 3).seconds
    assert len(counted) == 3 and max(counted) < 0.05
    assert len(race.turn(case_of(waking), waking, np.random.default_rng(0), 1).seconds) == 1 and len(runs) == 5


def test_one_long_run_does_not_make_a_ratio(ceilings):
    """A neighbour takes the machine for a moment: of the runs of a round only some are long."""
    count = [0]

    def disturbed(x):
        count[0] += 1
        time.sleep(0.05 if count[0] % 5 == 0 else 0.002)
        return {"y": x}

    steady = contender("steady", run=lambda x: time.sleep(0.002) or {"y": x})
    record = report.measure(case_of(steady, contender("disturbed", run=disturbed)), ceilings, effort=QUICK)
    assert record["time_over"]["ratios"]["disturbed"]["median"] < 2
    assert record["contenders"][1]["seconds"]["max"] > 0.05  # but the record shows them


def test_percentiles_of_known_numbers():
    made = report.summary([float(n) for n in range(101)])
    assert (made["p50"], made["p95"], made["p99"], made["min"], made["max"]) == (50, 95, 99, 0, 100)
    assert made["spread"] == 1.0 and made["count"] == 101  # (75 - 25) / 50
    made = report.ratio([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (made["median"], made["spread"]) == (3, 2 / 3) and made["range"] == pytest.approx(4 / 3)


def test_flops_of_loops_count_as_often_as_they_run():
    def looped(x):
        return jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=7)[0]

    program = compile_program(looped, jnp.ones((16, 16)))
    assert program.flops == 7 * 2 * 16**3
    assert program.xla["flops"] < 3 * 2 * 16**3, "XLA counts a loop's body once; if no longer, count_flops may go"


def test_flops_of_convolutions():
    def convolve(x, k, **options):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, k, dimension_numbers=numbers, **options)

    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    plain = compile_program(lambda x, k: convolve(x, k, window_strides=(1, 1), padding="VALID"), image, kernel)
    assert plain.flops == 2 * (2 * 6 * 6 * 5) * 9 * 3 == plain.xla["flops"]
    options = {"window_strides": (1, 1), "padding": ((1, 2), (1, 2)), "lhs_dilation": (2, 2)}
    up = compile_program(lambda x, k: convolve(x, k, **options), image, kernel)
    assert up.flops == 2 * (2 * 16 * 16 * 5) * 9 * 3 / 4  # three quarters of what the taps meet are zeros


def test_peak_memory_sees_what_a_program_needs():
    with machine.PeakMemory() as peak:
        np.ones(10_000_000).sum()  # 80 MB
    if peak.how == "resident set":
        assert 60e6 < peak.bytes < 200e6


def test_the_load_of_other_programs_is_seen():
    """Another program keeps a processor busy while this one sleeps."""
    command = [sys.executable, "-c", "import time; end = time.time() + 60\nwhile time.time() < end: pass"]
    busy = subprocess.Popen(command)
    try:
        time.sleep(0.3)
        with machine.OtherLoad() as others:
            time.sleep(1)
    finally:
        busy.kill()
        busy.wait()
    if others.share is not None:
        assert others.share > 0.5 / os.cpu_count()


def test_the_load_of_this_program_is_not_the_others(monkeypatch):
    told = iter([(100.0, 10.0, 50.0), (104.0, 12.0, 51.0)])  # 4 s of work, 2 of them ours, and 1 s idle
    monkeypatch.setattr(machine, "_processor_seconds", lambda: next(told))
    with machine.OtherLoad() as others:
        pass
    assert others.share == 0.4


def test_ceilings_only_rise(ceilings):
    before = dict(ceilings.best["float32"])
    after = ceilings.measure("float32")
    assert set(after) == {"product", "convolution", "copy"} and all(after[k] >= before[k] > 1e8 for k in after)


# --- methods ------------------------------------------------------------------------------------------------------


@config
class TwoPhases:
    steps: int = static(4)
    batch_size: int = static(4)
    dtype: str = static("float32")
    rate: float = 0.1


def _init(key, cfg, spec):
    del key
    bank = jnp.zeros((spec.sizes["labelled"], 2))
    return {"cfg": cfg, "w": jnp.ones(spec.image), "bank": bank}


def _bank_step(key, state, batch):
    del key
    rows = jnp.where(batch.valid, batch.index, state["bank"].shape[0])
    values = jnp.stack([batch.image.mean(axis=(1, 2, 3)), batch.label.astype(jnp.float32)], axis=1)
    return {**state, "bank": state["bank"].at[rows].set(values, mode="drop")}, {"anomalous": batch.label.sum()}


def _train_step(key, state, batch: Batch):
    del key
    error = batch.image - state["w"]
    return {**state, "w": state["w"] + state["cfg"].rate * error.mean(axis=0)}, {"loss": (error**2).mean()}


def _score(state, images):
    maps = ((images - state["w"]) ** 2).mean(axis=-1)
    return Scores(maps.max(axis=(1, 2)), maps)


TWO = Method(
    "two",
    TwoPhases,
    _init,
    lambda cfg: (Phase("train", _train_step, steps=cfg.steps), Phase("bank", _bank_step, source="labelled")),
    _score,
    {"tiny": Preset("two phases", data={"image_size": 8, "channels": 1})},
)


def test_every_phase_is_a_case(ceilings):
    setting = set_up(TWO, batch=4)
    made = list(cases(setting))
    assert [case.facts["work"] for case in made] == ["train", "train", "score"]
    assert [case.facts.get("phase") for case in made] == ["train", "bank", None]
    for case in made:
        record = report.measure(case, ceilings, effort=QUICK._replace(rounds=1, least_rounds=1))
        assert record["check"]["worst"]["jaxad"] < 1e-4 and record["contenders"][0]["samples_per_second"] > 0


def test_a_method_that_trains_wrongly_is_refused():
    """The reference runs operation by operation: what only the compiled step gets wrong shows in the second loss."""

    def step(key, state, batch):
        state, metrics = _train_step(key, state, batch)
        wrong = isinstance(batch.image, jax.core.Tracer)
        return {**state, "w": state["w"] + 0.05 * wrong}, metrics

    phases = (Phase("train", step, steps=4), Phase("bank", _bank_step, source="labelled"))
    broken = TWO._replace(phases=lambda cfg: phases)
    case = next(cases(set_up(broken, batch=4), work=("train",)))
    with pytest.raises(BenchmarkError, match="differ from the reference"):
        race.check(case, np.random.default_rng(0))


@config
class Slow:
    steps: int = static(60)
    dtype: str = static("float32")


class SlowState(NamedTuple):
    """Of a method whose steps are too short to be seen in two losses, beside statistics that change by more."""

    cfg: Slow
    params: dict
    statistics: dict
    optimizer: Any


def slow_method(wrong, direction):
    """`direction` is what becomes of an update: 1 right, 0 none, -1 wrong. Of compiled steps where `wrong` says so."""

    def begin(key, cfg, spec):
        del spec
        params = {"w": jax.random.normal(key, (8, 4)) / 8, "b": jnp.zeros(4)}
        statistics = {"mean": jnp.zeros(()), "least": jnp.inf}
        return SlowState(cfg, params, statistics, optax.scale_by_adam().init(params))

    def step(key, state, batch):
        del key
        sign = direction if wrong(batch.image) else 1
        dtype = jnp.dtype(state.cfg.dtype)

        def loss_of(params):
            rows = batch.image.mean(axis=(2, 3)).astype(dtype)
            answers = jnp.tanh(rows @ params["w"].astype(dtype)) + params["b"].astype(dtype)
            return ((answers - 1) ** 2).mean().astype(jnp.float32)

        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, optimizer = optax.scale_by_adam().update(gradients, state.optimizer)
        params = jax.tree.map(lambda p, u: p - sign * 5e-5 * u, state.params, updates)
        statistics = {"mean": state.statistics["mean"] + 10 * batch.image.mean(), "least": batch.image.min()}
        return SlowState(state.cfg, params, statistics, optimizer), {"loss": loss}

    tiny = {"tiny": Preset("short steps", data={"image_size": 8, "channels": 1})}
    return Method("slow", Slow, begin, lambda cfg: (Phase("train", step, steps=cfg.steps),), _score, tiny)


def is_compiled(array):
    return isinstance(array, jax.core.Tracer)


# What device and dtype allow, on a CPU and elsewhere.
EACH_TOLERANCE = [("cpu", "float32"), ("gpu", "float32"), ("cpu", "bfloat16"), ("gpu", "bfloat16")]


def check_steps(monkeypatch, device, dtype, method):
    """Checks a method's steps as on a device: with its tolerances, and in a scan where it is no CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: device)
        case = next(cases(set_up(method, batch=4, dtype=dtype), work=("train",)))
    assert case.facts["steps"] == (1 if device == "cpu" else 50)
    return race.check(case, np.random.default_rng(0))


@pytest.mark.parametrize(("device", "dtype"), EACH_TOLERANCE)
def test_wrong_updates_are_refused_at_every_tolerance(monkeypatch, device, dtype):
    """Short steps: the losses of right, missing and opposite updates are all within the tolerance."""
    right = check_steps(monkeypatch, device, dtype, slow_method(is_compiled, 1))
    assert right["changes"]["jaxad"] < 1e-3
    for direction, disagreement in ((0, 1), (-1, 2)):
        with pytest.raises(BenchmarkError, match=rf"'jaxad' changes '\.params' .* by {disagreement} where"):
            check_steps(monkeypatch, device, dtype, slow_method(is_compiled, direction))


def test_disagreement_of_changes_by_hand():
    change, across = np.array([3.0, 0.0, 4.0]), np.array([0.0, 5.0, 0.0])
    assert worst_change({"a": change, "b": change}, {"a": change, "b": 2 * change}) == (0.5, "b")
    assert worst_change({"a": 2 * change}, {"a": change}) == (0.5, "a")
    assert worst_change({"a": change + across}, {"a": change}) == (0.5, "a")
    assert worst_change({"a": -change}, {"a": change, "of others": change}) == (2, "a")
    assert worst_change({"a": 0 * change}, {"a": change}) == worst_change({"a": change}, {"a": 0 * change}) == (1, "a")
    assert worst_change({"a": 0 * change}, {"a": 0 * change}) == (0, "a")
    assert worst_change({"a": change * np.nan}, {"a": change}) == (float("inf"), "a")


def test_the_users_tolerance_holds_for_changes_where_it_is_larger():
    assert set_up(TWO, tolerance=0.95).changes_tolerance == 0.95
    assert set_up(TWO, tolerance=1e-12).changes_tolerance == set_up(TWO).changes_tolerance < 1


def test_clips_and_labels_are_drawn():
    video = TWO._replace(
        presets={"tiny": Preset("clips", data={"image_size": 8, "channels": 1, "clip": 3, "target": 1})}
    )
    setting = set_up(video, batch=2)
    source = draw_source(setting, np.random.default_rng(0), 5, labelled=True)
    assert source.image.shape == (7, 8, 8, 1) and len(source) == 5 and source.sample_shape == (3, 8, 8, 1)
    assert source.mask[1].mean() == 0.25 and source.mask[0].sum() == 0


# --- records and the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A record of the command, on the tiny preset, and the older record it was compared with."""
    path = tmp_path_factory.mktemp("bench") / "new" / "tiny.json"
    status = entrance.main(
        ["memae", "--preset", "tiny", "--batch", "2", "--rounds", "2", "--json", str(path), "--quiet"]
    )
    assert status == 0
    return path


def test_fields_of_the_record(tiny):
    record = json.loads(tiny.read_text())
    assert record["schema"] == report.SCHEMA and record["settings"]["batch"] == [2]
    environment = record["environment"]
    assert {"jax", "flax", "numpy"} <= set(environment["versions"]) and environment["device"] == "cpu"
    assert "commit" in environment and environment["backend"] == "cpu" and environment["threads"] >= 1
    assert [case["work"] for case in record["cases"]] == ["train", "score"]
    for case in record["cases"]:
        assert case["check"]["against"] == "reference" and case["check"]["worst"]["jaxad"] <= case["check"]["tolerance"]
        assert (
            "other_load" in case
            and case["batch"] == 2
            and case["dtype"] == "float32"
            and case["ceilings"]["product"] > 1e9
        )
        (ours,) = case["contenders"]
        assert {"p50", "p95", "p99", "spread"} <= set(ours["seconds"]) and ours["transfer_seconds"] >= 0
        assert set(ours["compile_seconds"]) == {"trace", "lower", "compile"}
        assert ours["flops"] > 0 and ours["xla"]["flops"] > 0 and ours["xla"]["bytes"] > 0
        assert 0 < ours["share_of"]["product"] < 1.25 and ours["share_of"]["copy"] > 0
        assert ours["memory"]["program"]["peak"] > 0 and "seen" in ours["memory"]
        rate = case["samples"] / ours["seconds"]["p50"]
        assert ours["samples_per_second"] == pytest.approx(rate)
    assert record["cases"][1]["contenders"][0]["metrics_seconds"] > 0


def test_the_tolerance_is_the_users():
    """Nothing is this exact: the run is refused, and says what was allowed."""
    with pytest.raises(race.BenchmarkError, match="expected at most 1e-12"):
        entrance.bench("memae", preset="tiny", batch="2", rounds=1, train=True, tolerance=1e-12, quiet=True)


def test_a_failing_case_leaves_the_others(tmp_path):
    """An error in the middle of a long list: what comes before and after it is in the file, and so is the error."""
    waiting = Contender("waiting", run=lambda x: time.sleep(0.002) or {"y": x})
    wrong = contender("wrong", run=lambda x: {"y": x + 1})

    def broken():
        yield case_of(waiting)
        raise RuntimeError("no memory left\nfor this")

    todo = [case_of(wrong, reference=numpy_heavy), *report.tried("big", broken()), case_of(waiting)]
    report.run_all(todo, console=Console(True), rounds=1, settings={}, out=tmp_path / "a" / "b.json")
    record = json.loads((tmp_path / "a" / "b.json").read_text())
    assert [case["contenders"][0]["name"] for case in record["cases"]] == ["waiting"] * 2
    assert record["failed"]["products"].startswith("outputs of 'wrong' differ from the reference")
    assert record["failed"]["big"] == "RuntimeError: no memory left"
    with pytest.raises(BenchmarkError, match=r"(?s)2 of 4 cases failed.*products: outputs.*big: RuntimeError"):
        report.refuse_failures(record)
    report.refuse_failures({**record, "failed": {}})


class Peers:
    """Stands for the package of peers."""

    class Refusal(ValueError):
        pass

    def __init__(self, error, phases=("train", "bank")):
        self.error, self.phases = error, phases

    def check(self, method):
        pass

    def forms(self, method):
        return {"slowly": {}}

    def make(self, method, state, spec, *, compiled, form):
        if self.error and (compiled or isinstance(self.error, self.Refusal)):
            raise self.error
        step = dict.fromkeys(self.phases, lambda batch: {})
        return types.SimpleNamespace(score=lambda images: (images, None), steps=step, reset=lambda: None)

    def place(self, images):
        return images

    def place_batch(self, *parts):
        return parts

    def wait(self, result):
        return result


def left_out(monkeypatch, peers, work):
    """Of each case: names of those who race, and those left out with the reason."""
    pytest.importorskip("torch")
    monkeypatch.setattr(rivals, "find_peers", lambda: peers)
    made = cases(set_up(TWO, batch=4), work=(work,), rivals=rivals.rivals(["two"]))
    return [([c.name for c in case.contenders], case.facts["left_out"]) for case in made]


def test_a_refused_peer_leaves_jaxad_alone_and_says_why(monkeypatch):
    refusal = Peers.Refusal("the torch peer of two got rate=1; expected 0.")
    ((names, reasons),) = left_out(monkeypatch, Peers(refusal), "score")
    assert names == ["jaxad"] and reasons == dict.fromkeys(("torch", "torch.compile"), str(refusal))
    ((names, reasons),) = left_out(monkeypatch, Peers(RuntimeError("no compiler\nat all")), "score")
    assert names == ["jaxad", "torch"] and reasons == {"torch.compile": "RuntimeError: no compiler"}
    made = left_out(monkeypatch, Peers(None, phases=("bank",)), "train")
    assert [names for names, _ in made] == [["jaxad"], ["jaxad", "torch", "torch.compile", "torch, slowly"]]
    reasons = made[0][1]
    assert set(reasons) == {"torch", "torch.compile", "torch, slowly"} and "has no phase 'train'" in reasons["torch"]
    assert report.left_out_rows({"left_out": reasons})[0] == {"left out": "torch", "because": reasons["torch"]}


def test_a_peer_that_is_broken_is_no_refusal(monkeypatch):
    broken = Peers(None)
    monkeypatch.setattr(broken, "wait", lambda result: result.nothing)
    with pytest.raises(AttributeError):
        left_out(monkeypatch, broken, "score")


def make_neural_batch(**options):
    return functools.partial(set_up, methods.get("neural_batch"), preset="tiny", **options)


def test_default_batches_are_those_that_the_method_allows():
    said = []
    found = entrance.at_batches(make_neural_batch(), None, say=said.append)
    assert [setting.batch for setting in found] == [8, 32, 128]
    assert len(said) == 1 and "no batch of 1: neural_batch: episodes=8, batch_size=1" in said[0]
    assert "--set" not in said[0]  # which bench does not have
    with pytest.raises(
        ValueError, match=r"--batch 1: neural_batch refuses it .*divide the batch.*Pass --batch 8,32,128"
    ):
        entrance.at_batches(make_neural_batch(), [8, 1], say=said.append)
    with pytest.raises(ValueError, match="^neural_batch: pictures of 21x21.*Pass --image-size"):
        entrance.at_batches(make_neural_batch(image_size=21), [8], say=said.append)


def test_names_of_cases_are_known_before_they_are_built():
    setting = set_up(TWO, batch=4)
    for work in (["train"], ["score"], ["train", "score"]):
        assert case_names(setting, work) == [case.name for case in cases(setting, work=work)]


def test_a_missing_peer_is_told_before_anything_is_measured(monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.setattr(methods, "METHODS", {"peerless": "nowhere"})
    assert entrance.main(["all", "--peer", "--batch", "2"]) == 2
    assert "'peerless' has no peer" in capsys.readouterr().err


def test_compare_finds_a_planted_regression(tiny):
    new = json.loads(tiny.read_text())
    for case in new["cases"]:
        for contender in case["contenders"]:
            contender["seconds"]["spread"] = 0.05
    assert {change["verdict"] for change in report.compare(new, new)} == {"same"}
    old = json.loads(json.dumps(new))
    old["cases"][0]["contenders"][0]["seconds"]["p50"] /= 1.3  # it was faster
    old["cases"][1]["contenders"][0]["seconds"]["p50"] *= 1.3
    assert [change["verdict"] for change in report.compare(old, new)] == ["slower", "faster"]
    old["cases"][0]["ceilings"]["product"] *= 1.3  # so was the machine
    assert report.compare(old, new)[0]["verdict"] == "same"


def changed(record, **environment):
    return {**record, "environment": {**record["environment"], **environment}}


def test_a_record_that_cannot_be_compared_is_refused_before_anything_is_measured(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "run_all", lambda *a, **k: pytest.fail("it was measured"))
    old = json.loads(tiny.read_text())
    bare = json.loads(tiny.read_text())
    del bare["cases"][0]["ceilings"]
    for record, batch, message in (
        ({**old, "schema": 0}, "2", "has schema 0; expected 1"),
        (changed(old, device="another"), "2", "has device 'another'; expected 'cpu'"),
        (old, "4", "has none of ['memae tiny 32x32x3 score b4"),
        (bare, "2", "lacks 'ceilings'; expected seconds, spread and ceilings"),
    ):
        path = tmp_path / "old.json"
        path.write_text(json.dumps(record))
        assert entrance.main(["memae", "--preset", "tiny", "--batch", batch, "--compare", str(path)]) == 2
        assert message in capsys.readouterr().err


def test_what_was_read_from_the_cache_is_no_compile_time(tiny):
    (ours,) = json.loads(tiny.read_text())["cases"][0]["contenders"]
    seconds = sum(ours["compile_seconds"].values())
    assert report.compile_cell({**ours, "compile_cached": False}) == seconds
    assert report.compile_cell({**ours, "compile_cached": True}) == f"{seconds:.3g} (cached)"
    assert report.compile_cell({**ours, "compile_seconds": None}) is None


def test_an_unusable_file_is_told_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "run_all", lambda *a, **k: pytest.fail("it was measured"))
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "a.json"):
        assert entrance.main(["memae", "--preset", "tiny", "--batch", "2", "--json", str(path)]) == 2
        assert f"--json {str(path)!r} cannot be written" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # no draft was left behind


def test_an_error_of_the_disk_is_one_line(monkeypatch, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "run_all", full)
    assert entrance.main(["memae", "--preset", "tiny", "--batch", "2"]) == 2
    assert capsys.readouterr().err == "jaxad.bench: [Errno 28] No space left on device\n"


def test_the_exit_status_tells_of_a_regression(tiny, tmp_path, monkeypatch, capsys):
    record = json.loads(tiny.read_text())
    monkeypatch.setattr(report, "run_all", lambda *a, **k: record)
    for factor, status in ((1.0, 0), (1 / 20, 1)):
        old = json.loads(tiny.read_text())
        old["cases"][0]["contenders"][0]["seconds"]["p50"] *= factor
        path = tmp_path / f"{status}.json"
        path.write_text(json.dumps(old))
        assert entrance.bench("memae", preset="tiny", batch="2", compare=str(path)) == status
    assert "slower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "method 'nothing' is unknown"),
        (["memae", "--batch", "0"], "--batch '0'; expected whole numbers"),
        (["all", "--batch", "8,1"], "--batch 1: neural_batch refuses it (neural_batch: episodes=8, batch_size=1"),
        (["memae", "--dtype", "float16"], "--dtype 'float16'; expected float32 or bfloat16"),
        (["memae", "--preset", "none"], "memae has no preset 'none'"),
        (["memae", "--compare", "/nowhere.json"], "--compare '/nowhere.json' cannot be read"),
        (["memae", "--image-size", "a"], "--image-size 'a'; expected pixels a side"),
        (["memae", "--rounds", "0"], "--rounds 0; expected at least 1"),
        (["memae", "--tolerance", "2"], "--tolerance 2.0; expected a share"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert entrance.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_missing_checkout_or_torch_is_said(monkeypatch, tmp_path):
    import importlib.util

    monkeypatch.setattr(rivals, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(ValueError, match="has no benchmarks/peers; expected a checkout"):
        rivals.find_peers()
    from benchmarks import peers

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="PyTorch, which is not installed here"):
        peers.make("memae", None, None)


def test_both_entrances_have_the_same_flags():
    pytest.importorskip("tyro")
    texts = []
    for module in ("jaxad", "jaxad.bench"):
        verb = ["bench"] if module == "jaxad" else []
        command = [sys.executable, "-m", module, *verb, "--help"]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        texts.append({word.strip(",[]") for word in run.stdout.split() if word.strip("[").startswith("--")})
    assert texts[0] >= texts[1] >= {"--preset", "--batch", "--dtype", "--train", "--score", "--peer", "--json"}


def test_bench_needs_no_command_line_packages():
    absent = "tensorflow_datasets,tyro,matplotlib,PIL,grain,array_record,torch,scipy.ndimage"
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent!r}.split(",")))  # importing a module that is None raises
from jaxad.bench.__main__ import main
sys.exit(main(["memae", "--preset", "tiny", "--batch", "2", "--rounds", "1", "--score"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0 and "memae tiny 32x32x3 score b2 float32" in run.stdout, run.stderr[-2000:]
