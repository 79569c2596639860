"""Patch SVDD in plain PyTorch, the way its public implementation works: every patch is cut out and embedded by itself,
the score of a patch is its distance to the nearest of all normal patches, and a loop adds scores to pixels.

Decisions that favour the peer: pictures wait as tensors, patches are cut by one `unfold` rather than one by one, and go
through the network some thousand at a time, without gradients. The public code's neighbours come from a KD-tree and an
approximate index; here from products with slices of the bank, which is faster on two cores than the former. Training
draws patches at random, other ones in each framework, and is left out. Of the settings, those of the public code are
here; others are refused.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, refuse_other, tensor

_PATCHES = 2048  # embedded at a time
_ROWS = 8192  # of the bank in a product


class Small(nn.Module):
    """Patches (n, C, p, p) -> (n, D)."""

    def __init__(self, channels, widths, features):
        super().__init__()
        sizes = [channels, *widths, features]
        pairs = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 1 if i else 2) for i, (a, b) in enumerate(pairs))

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = functional.leaky_relu(layer(x), 0.1)
        return torch.tanh(self.layers[-1](x)).flatten(1)


class Large(nn.Module):
    """Patches (n, C, 2p, 2p) -> (n, D): the four quarters embedded, laid out 2x2, and joined."""

    def __init__(self, small, hidden, features):
        super().__init__()
        self.small = small
        self.first, self.second = nn.Conv2d(features, hidden, 2), nn.Conv2d(hidden, features, 1)

    def forward(self, x):
        half = x.shape[-1] // 2
        rows = [
            torch.stack([self.small(x[..., a : a + half, b : b + half]) for b in (0, half)], dim=2) for a in (0, half)
        ]
        joined = functional.leaky_relu(self.first(torch.stack(rows, dim=2)), 0.1)
        return torch.tanh(self.second(joined)).flatten(1)


@torch.no_grad()
def load(model: Large, encoder) -> Large:
    """Gives the network the weights of a jaxad encoder, `params["encoder"]`."""
    for number, layer in enumerate(model.small.layers, start=1):
        own = encoder["small"][f"conv{number}"]
        layer.weight.copy_(tensor(own["kernel"]).permute(3, 2, 0, 1))
        layer.bias.copy_(tensor(own["bias"]))
    for name, layer, side in (("large_0", model.first, 2), ("large_1", model.second, 1)):
        kernel = tensor(encoder[name]["kernel"])
        layer.weight.copy_(kernel.view(side, side, -1, kernel.shape[1]).permute(3, 2, 0, 1))
        layer.bias.copy_(tensor(encoder[name]["bias"]))
    return model


def embed_all(model, pictures, patch: int, stride: int):
    """Every patch of pictures (B, C, H, W), cut out and embedded by itself: (B, h, w, D)."""
    cut = pictures.unfold(2, patch, stride).unfold(3, patch, stride).permute(0, 2, 3, 1, 4, 5)
    patches = cut.reshape(-1, *cut.shape[3:])
    return torch.cat([model(some) for some in patches.split(_PATCHES)]).view(*cut.shape[:3], -1)


def nearest(queries, bank):
    """Distance of queries (Q, D) to their nearest rows of the bank: products slice by slice, then directly."""
    squares, best, found = (queries**2).sum(dim=1), None, None
    for first in range(0, len(bank), _ROWS):
        rows = bank[first : first + _ROWS]
        least, index = (squares[:, None] - 2 * queries @ rows.t() + (rows**2).sum(dim=1)).min(dim=1)
        index += first
        if best is None:
            best, found = least, index
        else:
            found = torch.where(least < best, index, found)
            best = torch.minimum(least, best)
    return (queries - bank[found]).pow(2).sum(dim=1).sqrt()


def spread(scores, size, patch: int, stride: int):
    """The mean over patches that cover a pixel: (B, h, w) -> (B, H, W), patch by patch."""
    total, hits = torch.zeros(len(scores), *size), torch.zeros(size)
    total, hits = total.to(scores.device), hits.to(scores.device)
    for i in range(scores.shape[1]):
        for j in range(scores.shape[2]):
            where = (slice(i * stride, i * stride + patch), slice(j * stride, j * stride + patch))
            total[(slice(None), *where)] += scores[:, i, j, None, None]
            hits[where] += 1
    return total / hits


def refuse(cfg) -> None:
    """Raises Refusal for settings that the public code does not have."""
    expected: dict[str, Any] = {"neighbours": 1, "coreset": 1.0, "approximate": False}
    refuse_other("patch_svdd", cfg, expected)


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg, channels = state.cfg, spec.image[-1]
    model = load(
        Large(Small(channels, cfg.widths, cfg.features), cfg.hidden, cfg.features), state.params["encoder"]
    ).to(device)
    small_patch = 4 * (len(cfg.widths) + 1)
    kinds = {
        "large": (wrap(model), 2 * small_patch, cfg.stride_large),
        "small": (wrap(model.small), small_patch, cfg.stride_small),
    }
    mean = tensor(state.mean).permute(2, 0, 1).to(device)
    banks = {}
    for name in kinds:
        rows, filled = tensor(getattr(state.banks, name)).flatten(0, 1), tensor(getattr(state.filled, name)).flatten()
        banks[name] = (rows[filled] if bool(filled.any()) else rows).to(device)

    def embeddings(images):
        x, half = images.float() / 255 - mean, cfg.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            found = {name: embed_all(network, x, patch, stride) for name, (network, patch, stride) in kinds.items()}
        return {name: embedded.float() for name, embedded in found.items()}

    @torch.no_grad()
    def step(batch):
        found = {}
        for name, embedded in embeddings(batch.image).items():
            found[f"spread_{name}"] = embedded.flatten(0, 2).std(dim=0, unbiased=False).mean()
        collapsed = torch.minimum(*found.values()) < 1e-3
        return {**found, "collapsed": collapsed.float()}

    @torch.no_grad()
    def score(images):
        maps = {}
        for name, embedded in embeddings(images).items():
            far = nearest(embedded.flatten(0, 2), banks[name]).view(embedded.shape[:3])
            maps[name] = spread(far, images.shape[2:], *kinds[name][1:])
        if cfg.fusion in maps:
            fused = maps[cfg.fusion]
        else:
            fused = maps["large"] * maps["small"] if cfg.fusion == "product" else maps["large"] + maps["small"]
        return fused.amax(dim=(1, 2)), fused

    return Peer(score=score, steps={"bank": step}, reset=lambda: None, module=model)
