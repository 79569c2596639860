"""Peers as contenders: the PyTorch versions in benchmarks/peers, eager and compiled, beside jaxad in one process."""

from __future__ import annotations

import importlib
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxad import train
from jaxad.bench.case import Contender
from jaxad.bench.methods import Setting, Steps, draw_source, rows_of, steps_of_run
from jaxad.core import take


def find_peers() -> Any:
    """The package benchmarks.peers of the checkout that jaxad was imported from.

    Raises:
      ValueError: jaxad was installed without its checkout.
    """
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / "benchmarks" / "peers" / "__init__.py").is_file():
        raise ValueError(
            f"--peer: {root} has no benchmarks/peers; expected a checkout of jaxad, since peers are not installed with "
            "it. Clone the repository and run pip install -e '.[peers]' in it, or leave out --peer."
        )
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.peers")


def rivals(methods: Sequence[str]) -> Callable:
    """The `rivals` of `methods.cases`: torch, torch under torch.compile, and further forms; or why they are left out.

    Left out are a peer that does not have the setting, one that runs out of memory, and what torch.compile cannot do.

    Raises:
      ValueError: a method has no peer, or torch is missing; told before anything is measured.
    """
    peers = find_peers()
    for method in methods:
        peers.check(method)

    import torch

    def build(
        setting: Setting, work: str, index: int | None, state: Any, spec: Any, key: Any
    ) -> tuple[list[Contender], dict[str, str]]:
        found: list[Contender] = []
        left_out: dict[str, str] = {}
        forms = [("torch", False, None), ("torch.compile", True, None)]
        if work == "train":
            forms += [(f"torch, {form}", False, form) for form in peers.forms(setting.method.name)]
        for name, compiled, form in forms:
            expected = Exception if compiled else (peers.Refusal, torch.OutOfMemoryError)
            try:
                peer = peers.make(setting.method.name, state, spec, compiled=compiled, form=form)
                own = _scorer(peers, peer, setting) if work == "score" else _stepper(peers, peer, setting, index, key)
                seconds, flops = _first_run(own, setting, work, compiled)
            except expected as error:
                left_out[name] = _reason(error)
                continue
            peer.reset()
            flops = found[0].flops if found else flops
            compiling = {"compile": seconds} if compiled else None
            found.append(own._replace(name=name, flops=flops, compile_seconds=compiling))
        return found, left_out

    return build


def _first_run(contender: Contender, setting: Setting, work: str, compiled: bool) -> tuple[float, float | None]:
    """Runs once: (seconds, FLOPs of eager products and convolutions as torch counts them)."""
    from torch.utils.flop_counter import FlopCounterMode

    numbers = np.random.default_rng(0)
    if work == "score":
        drawn: Any = draw_source(setting, numbers, setting.batch)
    else:
        drawn = Steps(draw_source(setting, numbers, rows_of(setting), labelled=True), np.int32(0))
    given = contender.put(drawn)
    began = time.perf_counter()
    if compiled:
        contender.wait(contender.run(given))
        return time.perf_counter() - began, None
    with FlopCounterMode(display=False) as counter:
        contender.wait(contender.run(given))
    return time.perf_counter() - began, float(counter.get_total_flops())


def _scorer(peers: Any, peer: Any, setting: Setting) -> Contender:
    rows = np.arange(setting.batch, dtype=np.int32)

    def fetch(result):
        named = zip(("image", "map"), result, strict=True)
        return {name: values.cpu().float().numpy() for name, values in named if values is not None}

    return Contender(
        "torch",
        peer.score,
        put=lambda source: peers.place(_pictures(source, rows)[0]),
        wait=peers.wait,
        fetch=fetch,
    )


def _stepper(peers: Any, peer: Any, setting: Setting, index: int | None, key: Any) -> Contender:
    """Steps on the very batches that jaxad's steps see. Gathering them is not timed, which favours the peer."""
    assert index is not None
    phase = setting.method.phases(setting.cfg)[index]._replace(batch_size=setting.batch)
    if phase.name not in peer.steps:
        raise peers.Refusal(f"the torch peer of {setting.method.name} has no phase {phase.name!r}")
    step, count, size = peer.steps[phase.name], steps_of_run(phase), rows_of(setting)
    rows_at = jax.jit(lambda t: train.batch_rows(key, phase, t, size=size)[0])

    def put(drawn):
        rows = [np.minimum(np.asarray(rows_at(np.int32(drawn.first + t))), size - 1) for t in range(count)]
        return [peers.place_batch(*_pictures(drawn.source, r)) for r in rows]

    def fetch(found):
        stacked = {name: np.stack([f[name].cpu().float().numpy() for f in found]) for name in found[0]}
        return stacked if count > 1 else {name: values[0] for name, values in stacked.items()}

    return Contender(
        "torch",
        lambda batches: [step(batch) for batch in batches],
        put=put,
        wait=peers.wait,
        fetch=fetch,
    )


def _pictures(source: Any, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(images uint8, labels, masks) of rows of a source of NumPy arrays."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        images, labels, masks = jax.device_get(take(source, rows))
    return np.rint(np.asarray(images) * 255).astype(np.uint8), np.asarray(labels), np.asarray(masks)


def _reason(error: Exception) -> str:
    """One line: what a refusal says, or the kind of any other error with its first line."""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return text if type(error).__name__ == "Refusal" else f"{type(error).__name__}: {text}"
