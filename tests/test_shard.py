"""One device or eight: the same detector, an eighth of the work for each, and nothing sent but sums of gradients."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy
from jax.sharding import PartitionSpec

from jaxad import methods, runs, shard
from jaxad.core import Phase
from jaxad.data.arrays import from_arrays

BYTES = 4  # of a float32


METHODS = [name if name == "memae" else pytest.param(name, marks=pytest.mark.slow) for name in sorted(methods.METHODS)]
# Of the first step's gradient, as a share of its largest entry, and of scores and pixels after ten steps, as shares of
# their ranges. Sums over eight parts round differently, and where a gradient is zero but for rounding (a bias before a
# batch normalisation) Adam takes whole steps, of 1e-4 here. MNAD enlarges that: it divides by the spread of normal
# scores, and its items choose their queries.
USUAL = (1e-5, 1e-3, 1e-3)
# The Neural Batch Sampler's first gradient comes after twenty steps of Adam of the autoencoders that it sees.
# Rounding may turn a walker's move, after which its autoencoder sees other patches: on one machine of two that changes
# scores by 0.8 % of their range, where training changes them by all of it.
# OGNet's preset ends with 300 updates at 1e-3.
# SynthCP's L1 and leaky ReLU have kinks: on one device, too, weights moved by 1e-6 of their size move the gradient by
# 1e-6 of its largest entry or by 1e-3. Here an entry is at a kink; of six starts a little beside this one eight devices
# agree with one to 1e-6 from five. Its preset's discriminator takes ten signed steps of 2e-3 (Adam, first beta 0).
TOLERANCES = {
    "gradcon": (1e-5, 1e-5, 1e-5),
    "mnad": (1e-3, 0.1, 0.1),
    "neural_batch": (1e-2, 0.02, 0.01),
    "ognet": (1e-5, 0.05, 0.01),
    "patch_svdd": (1e-5, 1e-4, 1e-4),
    "synthcp": (5e-3, 0.03, 0.03),
}


@functools.cache
def eight(*arguments):
    """What `many_devices.py` finds on eight virtual devices."""
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=300"
    flags += " --xla_backend_optimization_level=0"  # compiled sooner; what XLA counts and exchanges is the same
    script = pathlib.Path(__file__).with_name("many_devices.py")
    command = ["timeout", "-k", "5", "300", sys.executable, str(script), *arguments]
    done = subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["devices"] == 8
    return facts


@pytest.mark.parametrize("name", METHODS)
def test_eight_devices_train_what_one_trains(name):
    facts = eight(name)
    gradient, *tolerances = TOLERANCES.get(name, USUAL)
    assert facts["held_by"] == 8 and facts["moved"] > 5e-4
    assert facts["gradient"] < gradient
    for apart, scale, learned, tolerance in zip(
        facts["apart"], facts["scale"], facts["learned"], tolerances, strict=True
    ):
        assert apart < tolerance * scale and apart < learned / 10


@pytest.mark.parametrize("mode", ["loop", "chunks"])
def test_the_driver_trains_the_same(mode):
    facts = eight("memae")
    for apart, scale, tolerance in zip(facts["drive"][mode], facts["scale"], USUAL[1:], strict=True):
        assert apart < tolerance * scale


# How many times less a device does than one alone, where that is not eight: the update of parameters and statistics is
# done on every device, and these steps of tiny presets have little else to do.
SHARES = {
    ("ognet", "warmup"): 7.8,
    ("ognet", "adversarial"): 7.8,
    ("patch_svdd", "mean"): 6.8,
    ("patch_svdd", "encoder"): 7.6,
    ("synthcp", "features"): 7.3,
    ("synthcp", "clusters"): 7.3,
    # The preset fills in all nine classes of superpixels at once. XLA does not split pictures that were repeated for it
    # along the axis that they share with the classes: each device restores all of them.
    ("smai", "calibrate"): 1.1,
}
# What is exchanged beside sums of gradients and statistics: kinds, and bytes at most.
EXCHANGES = {
    # Snapshots of autoencoders that devices trained apart become the state of all; TPUs send them all-to-all and by
    # collective-permute. The labelled pictures are kept by all.
    ("neural_batch", "profile"): {"all-gather": 2_000_000},
    ("neural_batch", "labels"): {"all-gather": 300_000},
    # A bank is made of what all devices computed, and searched by all.
    ("patch_svdd", "bank"): {"all-gather": 110_000},
    ("synthcp", "clusters"): {"all-gather": 80_000},
    ("smai", "train"): {"collective-permute": 32},  # a slice of six numbers goes across
    ("smai", "calibrate"): {"all-gather": 450_000},  # see SHARES
}
COUNTED = [
    ("memae",),
    *(pytest.param((name,), marks=pytest.mark.slow) for name in sorted(methods.METHODS) if name != "memae"),
    *(pytest.param((name, "cpu"), marks=pytest.mark.slow) for name in ("memae", "gradcon")),
]


@pytest.mark.parametrize("arguments", COUNTED, ids="-".join)
def test_each_device_does_an_eighth_of_every_phase_and_sends_only_sums_of_gradients_and_statistics(arguments):
    facts, name = eight(*arguments), arguments[0]
    # Gradients are as large as parameters. A transposed kernel's is summed in its sub-pixel form, 16/9 of its size, a
    # memory's as keys and as items, a gradient of gradients twice; then come statistics, counts and losses.
    sums = {"all-reduce": 2 * BYTES * facts["parameters"] + 2**14}
    for phase, found in facts["phases"].items():
        one, many = found["flops"]
        assert 0.98 * SHARES.get((name, phase), 8) < one / many < 1.02 * 8, phase
        alone, sent = found["collectives"]
        limits = sums | EXCHANGES.get((name, phase), {})
        assert alone == {} and sent, phase
        assert all(size <= limits.get(kind, 0) for kind, (_, size) in sent.items()), (phase, sent)
    if name in ("memae", "gradcon", "mnad"):  # train all their parameters at once
        assert facts["phases"]["train"]["collectives"][1]["all-reduce"][1] > BYTES * facts["parameters"]


# --- meshes ---------------------------------------------------------------------------------------------------------


def compiled(function, *specs):
    mesh = shard.make_mesh(run=2, data=2)
    shapes = [
        jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec)) for spec in specs
    ]
    return jax.jit(function, out_shardings=shard.replicated(mesh)).lower(*shapes).compile()


def test_collectives_are_counted_with_their_bytes():
    data, run = PartitionSpec("data"), PartitionSpec(None, "run")
    assert shard.collectives(compiled(lambda x: x + 1, PartitionSpec())) == {}
    assert shard.collectives(compiled(lambda x: x.sum(0), data)) == {"all-reduce": (1, 16 * 4)}
    assert shard.collectives(compiled(lambda x: x * 2, data)) == {"all-gather": (1, 8 * 16 * 4)}
    found = shard.collectives(compiled(lambda x, y: (x.sum(0), y.sum(1, dtype=jnp.bfloat16)), data, run))
    assert found["all-reduce"][1] in (16 * 4 + 8 * 2, 16 * 4 + 8 * 4)  # the CPU adds bfloat16 in float32


class Text:
    """A program in the words of the TPU compiler."""

    def as_text(self):
        return """
  %all-gather-start.1 = (bf16[2,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) all-gather-start(%x)
  %all-gather-done.1 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather-done(%all-gather-start.1)
  ROOT %r = (f32[3]{0}, pred[], /*index=2*/s32[2,2]{1,0}) all-reduce(%all-reduce.2, %b), channel_id=3
  %fusion = f32[3]{0} fusion(%all-reduce.3), kind=kLoop, calls=%all-to-all_fusion
"""


def test_asynchronous_collectives_count_once():
    assert shard.collectives(Text()) == {"all-gather": (1, 8 * 128 * 2), "all-reduce": (1, 12 + 1 + 16)}


@pytest.mark.parametrize(
    ("text", "sizes"), [("data=4", (1, 4)), ("data=2,run=2", (2, 2)), (" run = 3 ", (3, 1)), ("data=1", (1, 1))]
)
def test_a_mesh_is_described_in_words(text, sizes):
    assert tuple(shard.parse_mesh(text).values()) == sizes


@pytest.mark.parametrize("text", ["", "data", "data=", "data=0", "data=-1", "data=x", "batch=2", "data=2;run=2"])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match=r"--mesh .*; expected axes .* such as data=4,run=2"):
        shard.parse_mesh(text)


def test_a_mesh_that_does_not_fit_is_refused_before_work(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "toy", "toy")
    phases = (Phase("a", toy.train_step, batch_size=12), Phase("b", toy.train_step, batch_size=8))
    shard.check_batches(phases, shard.make_mesh(data=4))
    with pytest.raises(
        ValueError, match=r"data=3: phase 'b' has batches of 8, .* expected a divisor. Pass --mesh data=2"
    ):
        shard.check_batches(phases, shard.make_mesh(data=3))
    with pytest.raises(
        ValueError, match=r"run=2 spreads the members of a sweep; expected data only.* Pass --mesh data=4"
    ):
        shard.check_one_run(shard.make_mesh(run=2, data=2))
    for mesh in ("data=3", "run=2", "data=9"):
        with pytest.raises(ValueError, match=r"mesh .* expected .* Pass --mesh data="):
            runs.fit_detector("toy", "no/such/data", mesh=mesh)


def test_a_detector_trained_on_a_mesh_is_the_same(monkeypatch, tmp_path):
    """The toy method's sums are of the same numbers in another order; its steps do not enlarge the difference."""
    monkeypatch.setitem(methods.METHODS, "toy", "toy")
    pictures = np.random.default_rng(0).integers(0, 255, (30, 8, 8, 3), np.uint8)
    data = from_arrays(pictures, test=pictures[:5], test_label=[0, 0, 0, 1, 1], holdout=0.3)
    mesh = shard.make_mesh(data=4)
    one, many = (runs.fit_detector("toy", data, steps=20, mesh=given) for given in (None, mesh))
    assert shard.mesh_of(one.state) is None and shard.mesh_of(many.state) == mesh
    np.testing.assert_allclose(one.calibration, many.calibration, rtol=1e-5)
    for a, b in zip(one.score(pictures[:7]), many.score(pictures[:7]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    runs.fit_detector("toy", data, steps=20, mesh="data=4", out=tmp_path / "run")  # saved by four, read by one
    loaded = runs.load_detector(tmp_path / "run")
    assert shard.mesh_of(loaded.state) is None
    np.testing.assert_array_equal(
        loaded.score(pictures[:7]).map, one._replace(state=loaded.state).score(pictures[:7]).map
    )
    for a, b in zip(jax.tree.leaves(loaded.state), jax.tree.leaves(many.state), strict=True):
        np.testing.assert_array_equal(a, b)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["devices"], report["processes"]) == (4, 1)
