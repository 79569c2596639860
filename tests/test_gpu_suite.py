"""The suite for GPUs: what is done is not done again, what is killed leaves nothing, and the budget is kept."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from benchmarks import gpu
from jaxad import methods
from jaxad.bench.__main__ import refusal_of
from jaxad.bench.methods import set_up

ROOT = pathlib.Path(gpu.__file__).parents[1]
WRITE = "import json, sys; json.dump({'value': 7}, open(sys.argv[1], 'w')); print('said')"


def piece(name, code=WRITE, **options):
    return gpu.Piece(name, ("-c", code, "{json}"), **{"seconds": 1, **options})


def is_gone(process):
    """Whether a process has ended, or does within seconds: a kill takes a moment to arrive."""
    end = time.monotonic() + 5
    state = pathlib.Path(f"/proc/{process}/stat")
    while time.monotonic() < end:
        try:
            if state.read_text().split()[2] == "Z":
                return True
        except (OSError, IndexError):
            return True
        time.sleep(0.05)
    return False


def states(suite):
    return {name: run["status"] for name, run in suite.runs.items()}


def test_what_is_done_is_not_done_again(tmp_path, capsys):
    todo = [piece("a"), piece("b", "import sys; sys.exit('broken')")]
    assert gpu.run_all(gpu.Suite(tmp_path), todo, budget=60) == 1
    assert "broken" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 7}
    before = (tmp_path / "a.json").stat().st_mtime_ns
    suite = gpu.Suite(tmp_path)
    assert states(suite) == {"a": "done", "b": "failed"} and suite.runs["a"]["output"] == "said\n"
    mended = [todo[0], piece("b")]
    assert gpu.run_all(suite, mended, budget=60) == 0
    assert (tmp_path / "a.json").stat().st_mtime_ns == before
    assert gpu.Suite(tmp_path).is_done(mended[1]) and not suite.is_done(todo[1])  # another command is another piece


def test_a_lost_result_is_made_again(tmp_path):
    suite, todo = gpu.Suite(tmp_path), [piece("a")]
    assert gpu.run_all(suite, todo, budget=60) == 0
    (tmp_path / "a.json").unlink()
    assert not suite.is_done(todo[0]) and gpu.run_all(suite, todo, budget=60) == 0 and suite.is_done(todo[0])


def test_a_piece_that_fails_leaves_the_cases_that_did_not(tmp_path):
    bundle = tmp_path / "out" / "suite.json"
    suite = gpu.Suite(tmp_path, bundle)
    assert gpu.run_all(suite, [piece("a", f"{WRITE}; sys.exit(2)")], budget=60) == gpu.FAILED
    assert states(suite) == {"a": "failed"} and json.loads((tmp_path / "a.json").read_text()) == {"value": 7}
    assert json.loads(bundle.read_text())["results"] == {"a": {"value": 7}}


def test_no_result_is_a_failure(tmp_path):
    suite = gpu.Suite(tmp_path)
    assert gpu.run_all(suite, [piece("a", "print('forgot to write')")], budget=60) == gpu.FAILED
    assert states(suite) == {"a": "failed"} and not (tmp_path / "a.json").exists()


def test_a_piece_that_does_not_end_is_stopped_with_its_children(tmp_path):
    child = tmp_path / "child"
    code = f"import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w')"
    code += ".write(str(p.pid)); time.sleep(60)"
    suite = gpu.Suite(tmp_path)
    began = time.monotonic()
    assert suite.run(piece("a", code), limit=2) == "stopped"
    assert time.monotonic() - began < gpu._GRACE + 2
    assert states(suite) == {"a": "stopped"} and not (tmp_path / "a.json").exists()
    assert is_gone(child.read_text())
    assert suite.needed(piece("a")) > 2  # not begun again with so little time


def test_a_piece_stopped_near_the_end_gets_a_whole_budget(tmp_path, monkeypatch, capsys):
    """It was stopped after most of a budget, so that 1.2 times as long is more than there ever is."""
    monkeypatch.setattr(gpu, "_GRACE", 1)
    suite, todo = gpu.Suite(tmp_path), [piece("a", "import time; time.sleep(60)"), piece("b")]
    suite.run(todo[0], limit=2)
    assert gpu.run_all(suite, todo, budget=3) == gpu.LEFT
    assert states(suite) == {"a": "failed"} and "too long: not finished after 2 s" in capsys.readouterr().out
    assert gpu.run_all(suite, todo, budget=3) == gpu.FAILED  # no "run again" for ever, and it kept nobody waiting
    assert states(suite) == {"a": "failed", "b": "done"}


def test_a_small_budget_still_begins_a_piece(tmp_path, capsys):
    suite = gpu.Suite(tmp_path)
    assert gpu.run_all(suite, [piece("a", seconds=75)], budget=gpu._GRACE + 60) == 0
    assert gpu.main(["--budget", "5"]) == 2 and "expected more than 10" in capsys.readouterr().err


def test_what_does_not_fit_waits_for_the_next_call(tmp_path, capsys):
    suite = gpu.Suite(tmp_path)
    todo = [piece("short", f"import time; time.sleep(1.1); {WRITE}"), piece("long", seconds=100)]
    assert gpu.run_all(suite, todo, budget=60) == gpu.LEFT
    assert states(suite) == {"short": "done"} and "long: " in capsys.readouterr().out
    assert gpu.run_all(suite, todo, budget=200) == 0


def test_failures_come_last(tmp_path, capsys):
    suite, broken = gpu.Suite(tmp_path), piece("a", "raise SystemExit(1)")
    gpu.run_all(suite, [broken], budget=60)
    capsys.readouterr()
    gpu.run_all(suite, [broken, piece("b")], budget=60)
    out = capsys.readouterr().out
    assert out.index("b: done") < out.index("a: failed")


def test_a_bundle_unpacks_into_the_checkout(tmp_path, monkeypatch, capsys):
    bundle = tmp_path / "out" / "suite.json"
    suite = gpu.Suite(tmp_path / "there" / "nvidia-x", bundle)
    gpu.run_all(suite, [piece("a"), piece("b", "raise SystemExit(1)")], budget=60)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "here")
    assert gpu.main(["--unpack", str(bundle)]) == 0
    here = gpu.Suite(tmp_path / "here" / "nvidia-x")
    assert here.is_done(piece("a")) and states(here) == {"a": "done", "b": "failed"}
    assert gpu.main(["--unpack", str(tmp_path / "nothing")]) == 2


def test_a_killed_run_goes_on(tmp_path):
    """Killed in its second piece; the first is not repeated, and nothing of the second is left running."""
    slow = tmp_path / "slow"
    code = f"import os, time, sys; open({str(slow)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    script = (
        "from benchmarks import gpu; from tests.test_gpu_suite import piece; import signal, pathlib\n"
        "signal.signal(signal.SIGTERM, gpu._stop)\n"
        f"gpu.run_all(gpu.Suite(pathlib.Path({str(tmp_path)!r})), [piece('a'), piece('b', {code!r})], budget=100)"
    )
    run = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    end = time.monotonic() + 60
    while not (slow.exists() and slow.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(20) == 128 + signal.SIGTERM
    assert is_gone(slow.read_text())
    suite = gpu.Suite(tmp_path)
    assert states(suite) == {"a": "done"} and suite.is_done(piece("a"))


def test_names_of_pieces_differ_and_can_be_files():
    for smoke in (False, True):
        names = [p.name for p in gpu.pieces(["memae", "gradcon"], smoke=smoke)]
        assert len(set(names)) == len(names)
        assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in names)
    assert not any("--peer" in p.command for p in gpu.pieces(["memae"], peers=False))


def settings_of(pieces):
    """(piece, set-up) of those that measure a method, as on a GPU."""
    for one in pieces:
        if one.command[1] in ("jaxad.bench", "benchmarks.choices"):
            flags = dict(zip(one.command, one.command[1:], strict=False))
            options = {"preset": flags.get("--preset"), "dtype": flags["--dtype"], "batch": int(flags["--batch"])}
            yield one, set_up(methods.get(one.command[2]), **options)


@pytest.mark.parametrize("smoke", [False, True], ids=["sizes of an accelerator", "smoke"])
def test_methods_allow_every_piece(smoke, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    found = list(settings_of(gpu.pieces(list(methods.METHODS), smoke=smoke)))
    assert {setting.method.name for _, setting in found} == set(methods.METHODS)
    assert smoke or all(setting.preset != "cpu" for _, setting in found)
    assert {piece.name: error for piece, setting in found if (error := refusal_of(setting))} == {}


@pytest.mark.parametrize("smoke", [False, True], ids=["sizes of an accelerator", "smoke"])
def test_peers_take_every_piece_or_refuse_it(smoke, monkeypatch):
    pytest.importorskip("torch")
    from benchmarks import peers

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    refused = set()
    for one, setting in settings_of(gpu.pieces(list(methods.METHODS), smoke=smoke)):
        if "--peer" in one.command:
            try:
                peers.refuse(setting.method.name, setting.cfg)
            except peers.Refusal:
                refused.add((setting.method.name, setting.dtype))
    names = ("gradcon", "mnad", "neural_batch") if smoke else ()  # their tiny presets are unlike any public code
    assert refused == {("neural_batch", "bfloat16"), *((name, dtype) for name in names for dtype in gpu.DTYPES)}


def test_the_list_does_not_start_jax():
    """A piece must find the GPU's memory free: with a platform that does not exist, starting would be an error."""
    code = "from benchmarks import gpu; print(len(list(gpu.pieces(['memae', 'neural_batch']))))"
    environment = {**os.environ, "JAX_PLATFORMS": "nowhere"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-500:]


def test_the_command_needs_only_what_a_gpu_machine_has(tmp_path):
    """`gpu.sh` itself, with the packages that are missing there made unimportable: one real piece at toy size."""
    missing = ["tensorflow_datasets", "tensorflow", "tyro", "array_record", "grain", "ray", "libtpu"]
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "found = PathFinder.find_spec\n"
        "def find(cls, name, path=None, target=None):\n"
        f"    return None if name.split('.')[0] in {missing!r} else found(name, path, target)\n"
        "PathFinder.find_spec = classmethod(find)\n"
    )
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OUT": str(out), "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu.sh", "--smoke", "--only", "memory-read", "--out", str(tmp_path / "results")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    bundle = json.loads((out / "suite.json").read_text())
    assert bundle["results"]["memory-read"]["cases"] and bundle["runs"]["memory-read"]["status"] == "done"
    refused = subprocess.run([sys.executable, "-c", "import tyro"], env=environment, capture_output=True, check=False)
    assert refused.returncode != 0  # the packages really were missing


def test_xla_knows_the_flags():
    environment = {**os.environ, "XLA_FLAGS": " ".join(gpu.FLAGS.values())}  # XLA ends a process over one it does not
    code = "import jax; jax.jit(lambda x: x + 1)(1.0)"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-500:]
