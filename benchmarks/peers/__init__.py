"""Peers: plain PyTorch versions of the methods, as their public implementations work, to race against.

A peer is a file here with the name of its method and two functions:

    def refuse(cfg) -> None
    def make(state, spec, *, device, wrap) -> Peer

`refuse` raises `Refusal` for settings that the peer does not have: jaxad is then timed without it, and the record
says why.
It takes its weights from a jaxad state, so that both sides do the same work on the same numbers; `wrap` is either
`torch.compile` or a function that changes nothing, and is put around whatever a user would compile.

Where public code is slower than a peer for a reason that is not worth imitating in each race, the peer's `FORMS` names
further forms, {name: keywords of make}, which race eagerly beside it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxad.cores import usable_cores


class Refusal(ValueError):
    """A setting that a peer, or the public code it stands for, does not have."""


class Peer(NamedTuple):
    """What a peer does. Every function returns tensors on the peer's device."""

    score: Callable  # (images uint8 tensor) -> (image scores (B,), maps (B, H, W), or None if it has no such maps)
    steps: Mapping[
        str, Callable
    ]  # phase name -> (PeerBatch) -> {metric: scalar}, at least the loss; phases may be missing
    reset: Callable  # () -> None; back to the weights of the state, and an optimiser that has seen nothing
    module: Any = None  # the nn.Module that holds the weights
    parts: Mapping[str, Callable] = {}  # of a step, for a benchmark that times them apart


class PeerBatch(NamedTuple):
    """B rows of a source as tensors."""

    image: Any  # (B, C, H, W), or (B, C, T, H, W) for clips; uint8
    label: Any  # (B,) int64
    mask: Any  # (B, H, W) float32


def make(method: str, state: Any, spec: Any, *, compiled: bool = False, form: str | None = None) -> Peer:
    """The peer of a method, with the weights of a state.

    Args:
      method: name of the method.
      state: a jaxad state of it; trained or not.
      spec: of the data the state was made for.
      compiled: under `torch.compile`.
      form: one of `forms(method)`.

    Raises:
      Refusal: the peer does not have the state's settings.
      ValueError: the method has no peer, or torch is missing.
    """
    check(method)
    refuse(method, state.cfg)
    import torch

    torch.set_num_threads(usable_cores())
    wrap = (lambda function: torch.compile(function, dynamic=False)) if compiled else (lambda function: function)
    options = forms(method)[form] if form else {}
    return importlib.import_module(f"{__name__}.{method}").make(state, spec, device=device(), wrap=wrap, **options)


def forms(method: str) -> Mapping[str, dict[str, Any]]:
    """Further forms of a method's peer: {name: what `make` takes}."""
    return getattr(importlib.import_module(f"{__name__}.{method}"), "FORMS", {})


def refuse(method: str, cfg: Any) -> None:
    """Raises Refusal for a config that the method's peer, which must exist, does not have."""
    importlib.import_module(f"{__name__}.{method}").refuse(cfg)


def refuse_other(method: str, cfg: Any, expected: Mapping[str, Any]) -> None:
    """Raises Refusal for a field of the config that is not as the peer, and the public code, have it."""
    for name, value in expected.items():
        if getattr(cfg, name) != value:
            raise Refusal(
                f"the torch peer of {method} got {name}={getattr(cfg, name)!r}; expected {value!r}, all it has. "
                "Leave it at its default, or leave out --peer."
            )


def check(method: str) -> None:
    """Raises ValueError where the method has no peer, or torch is missing."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            "peers are written in PyTorch, which is not installed here; expected torch >= 2.13. "
            "Run pip install torch==2.13.0, or leave out --peer."
        )
    if importlib.util.find_spec(f"{__name__}.{method}") is None:
        raise ValueError(
            f"method {method!r} has no peer; expected a file benchmarks/peers/{method}.py. "
            "Write one (see benchmarks/peers/__init__.py), or leave out --peer."
        )


def device() -> str:
    """Where peers run: on the GPU if jax does, else on the CPU."""
    import jax
    import torch

    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def place(images: np.ndarray) -> Any:
    """Pictures (B, H, W, C) or clips (B, T, H, W, C), uint8, as a channels-first tensor on the peer's device."""
    import torch

    return torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(device())


def place_batch(images: np.ndarray, labels: np.ndarray, masks: np.ndarray) -> PeerBatch:
    """A batch for a step; images as for `place`, labels (B,), masks (B, H, W)."""
    import torch

    where = device()
    label, mask = torch.tensor(labels, dtype=torch.int64), torch.tensor(masks, dtype=torch.float32)
    return PeerBatch(place(images), label.to(where), mask.to(where))


def wait(result: Any) -> Any:
    """Returns the result once the peer's device has done all its work."""
    import torch

    if torch.cuda.is_available() and device() == "cuda":
        torch.cuda.synchronize()
    return result


def tensor(array: Any) -> Any:
    """A jax or NumPy array as a tensor of its own memory."""
    import torch

    return torch.from_numpy(np.array(array))
