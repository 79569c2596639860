"""The benchmarks of ops and metrics run on the harness, and the page of results is made of records."""

import importlib.util
import json

import pytest

from benchmarks import choices, memory_read, metrics, results


def run(module, monkeypatch, path, *arguments):
    monkeypatch.setattr("sys.argv", [module.__name__, *arguments, "--json", str(path)])
    module.main()
    return json.loads(path.read_text())


def test_memory_read(monkeypatch, tmp_path):
    sizes = ("--queries", "64", "--items", "20", "--features", "8", "--rounds", "1")
    record = run(memory_read, monkeypatch, tmp_path / "a.json", *sizes)
    assert [case["work"] for case in record["cases"]] == ["forward", "gradient"]
    for case in record["cases"]:
        assert max(case["check"]["worst"].values()) < 1e-4 and list(case["time_over"]["ratios"]) == ["naive"]
        products = 2 if case["work"] == "forward" else 6
        assert case["contenders"][1]["flops"] == products * 2 * 64 * 20 * 8  # naive: stored weights, nothing twice


@pytest.mark.skipif(importlib.util.find_spec("sklearn") is None, reason="scikit-learn is not installed")
def test_metrics(monkeypatch, tmp_path):
    record = run(metrics, monkeypatch, tmp_path / "a.json", "--smoke", "--rounds", "1")
    assert [case["op"] for case in record["cases"]] == ["image metrics", "pixel metrics", "regions"]
    for case in record["cases"]:
        assert all(worst <= case["check"]["tolerance"] for worst in case["check"]["worst"].values())


def test_choices(monkeypatch, tmp_path):
    arguments = ("memae", "--preset", "tiny", "--batch", "2", "--against", "read_impl=naive", "--rounds", "1")
    record = run(choices, monkeypatch, tmp_path / "a.json", *arguments)
    assert [list(case["time_over"]["ratios"]) for case in record["cases"]] == [["read_impl=naive"]] * 2


def record_with(batch, ratio):
    def contender(name, seconds):
        return {
            "name": name,
            "seconds": {"p50": seconds, "p95": 2 * seconds, "p99": 3 * seconds},
            "samples_per_second": batch / seconds,
            "compile_seconds": {"compile": 1.5},
            "compile_cached": name == "jaxad",
            "share_of": {"product": 0.5, "convolution": 0.4, "copy": None},
            "memory": {"program": None, "seen": None},
        }

    pairs = {"median": ratio, "spread": 0.1, "range": 0.2, "pairs": [ratio]}
    case = {
        "case": f"m cpu 8x8x1 score b{batch} float32",
        "method": "m",
        "batch": batch,
        "contenders": [contender("jaxad", 0.1), contender("torch", 0.1 * ratio)],
        "time_over": {"name": "jaxad", "ratios": {"torch": pairs}},
        "left_out": {"torch.compile": "no compiler", "torch, slowly": "no compiler"},
    }
    facts = {"device": "cpu", "backend": "cpu", "threads": 2, "versions": {"jax": "1"}, "commit": "abc"}
    return {"schema": 1, "environment": facts, "cases": [case], "failed": {f"m train b{batch}": "too large"}}


def test_results_page(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "OUT", tmp_path / "RESULTS.md")
    folder = tmp_path / "results" / "cpu"
    folder.mkdir(parents=True)
    for batch, ratio in ((32, 3.0), (1, 2.0)):
        (folder / f"b{batch}.json").write_text(json.dumps(record_with(batch, ratio)))
    another = {"environment": {"commit": "def"}, "warm": [1, 3, 2], "part": {"ways": [{"way": "vmap", "ms": 2000.5}]}}
    (folder / "another.json").write_text(json.dumps(another))
    (folder / "paged.json").write_text('{"rows": 17}')
    (folder / "paged.md").write_text("A page of its own.")
    results.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| m cpu 8x8x1 score b32 float32 | torch | 3 | 10% (20%) | 50% | 40% | - | 1.5 |" in text
    assert "| jaxad | 1 | - | 50% | 40% | - | 1.5 (cached) |" in text
    assert "\n\n* Left out of m cpu 8x8x1 score b32 float32: torch.compile, torch, slowly. no compiler\n" in text
    assert "\n* Failed: m train b32: too large\n" in text
    assert "results/cpu/peers.png" in text and "samples/s" not in text.split("## cpu")[1]
    assert "commit def" in text and "| warm (median of 3) | 2 |" in text and "part ways:" in text
    assert "| vmap | 2,000 |" in text and "[results/cpu/paged.md](results/cpu/paged.md)" in text and "17" not in text
    assert (folder / "peers.png").stat().st_size > 5000
    (series,) = results.grouped(results.load()["cpu"]).values()
    assert [case["batch"] for case in series] == [1, 32]
