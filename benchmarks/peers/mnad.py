"""MNAD in plain PyTorch, the way its public implementation works: eager modules and autograd, a Python loop over items
for the update, items gathered for the losses, softmaxes over queries and over items.

Decisions that favour the peer: pictures wait as tensors on its device, and testing runs without gradients. Maps of
single pictures and what normalises them are as in jaxad, since the public code has none. Of the settings, those of the
public code are here; others are refused.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, refuse_other, tensor


class MemoryStep(nn.Module):
    """Reads the memory, gives both losses and moves the items, as the public code does."""

    def __init__(self, items):
        super().__init__()
        self.items = items  # (M, C), a plain tensor: no gradient

    def match(self, queries):
        """Similarities (K, M), and softmaxes of them over queries and over items."""
        similarity = torch.matmul(queries, self.items.t())
        return functional.softmax(similarity, dim=0), functional.softmax(similarity, dim=1)

    def losses(self, queries, over_items, margin):
        """(mean separateness, squared differences of queries to their nearest items (K, C))."""
        _, indices = torch.topk(over_items, 2, dim=1)
        nearest, second = self.items[indices[:, 0]].detach(), self.items[indices[:, 1]].detach()
        triplet = functional.triplet_margin_loss(queries, nearest, second, margin=margin)
        return triplet, (queries - nearest) ** 2

    def read(self, over_items):
        """What each query reads, (K, C); cut from gradients."""
        return torch.matmul(over_items.detach(), self.items)

    @torch.no_grad()
    def update(self, queries, over_queries, over_items):
        """Moves every item by the queries assigned to it, one item after the other."""
        _, nearest = torch.topk(over_items, 1, dim=1)
        change = torch.zeros_like(self.items)
        for item in range(len(self.items)):
            mine = torch.nonzero(nearest.squeeze(1) == item)
            if mine.shape[0]:
                weights = over_queries[mine, item] / torch.max(over_queries[:, item])
                change[item] = torch.sum(weights * queries[mine].squeeze(1), dim=0)
        used = change.abs().sum(dim=1, keepdim=True) > 0  # an item without queries stays, to the bit
        self.items = torch.where(used, functional.normalize(change + self.items, dim=1), self.items).detach()

    def forward(self, code, *, train, margin=1.0):
        """Encoder features (B, C, h, w): (decoder input, separateness, squared differences, queries (K, C))."""
        queries = functional.normalize(code, dim=1).permute(0, 2, 3, 1).contiguous()
        flat = queries.view(-1, queries.shape[-1])
        over_queries, over_items = self.match(flat)
        triplet, squares = self.losses(flat, over_items, margin)
        read = self.read(over_items).view(queries.shape)
        joined = torch.cat((queries, read), dim=3).permute(0, 3, 1, 2)
        if train:
            self.update(flat.detach(), over_queries.detach(), over_items.detach())
        return joined, triplet, squares, flat


class Layer(nn.Sequential):
    """Convolution, or transposed convolution with stride 2, batch normalisation, ReLU."""

    def __init__(self, inputs, outputs, *, doubles=False):
        conv = nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, 1) if doubles else nn.Conv2d(inputs, outputs, 3, padding=1)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class MNAD(nn.Module):
    """Frames in [-1, 1] -> (prediction, separateness, squared differences, queries)."""

    def __init__(self, inputs, channels, widths, items, *, skips):
        super().__init__()
        self.skips, self.pool = skips, nn.MaxPool2d(2)
        *small, last = widths
        self.down = nn.ModuleList()
        for width in small:
            self.down.append(nn.Sequential(Layer(inputs, width), Layer(width, width)))
            inputs = width
        self.deepest = nn.Sequential(Layer(inputs, last), nn.Conv2d(last, last, 3, padding=1))
        self.memory = MemoryStep(items)
        self.joined = nn.Sequential(Layer(2 * last, last), Layer(last, last))
        self.up, self.rise = nn.ModuleList(), nn.ModuleList()
        for width, smaller in zip(widths[:0:-1], small[::-1], strict=True):
            risen = smaller if skips else width
            self.rise.append(Layer(width, risen, doubles=True))
            self.up.append(nn.Sequential(Layer(2 * smaller if skips else risen, smaller), Layer(smaller, smaller)))
        self.last = nn.Conv2d(small[0], channels, 3, padding=1)

    def forward(self, x, *, train, margin=1.0):
        maps = []
        for layers in self.down:
            maps.append(layers(x))
            x = self.pool(maps[-1])
        joined, triplet, squares, queries = self.memory(self.deepest(x), train=train, margin=margin)
        x = self.joined(joined)
        for rise, up, skip in zip(self.rise, self.up, maps[::-1], strict=True):
            x = rise(x)
            x = up(torch.cat((skip, x), dim=1) if self.skips else x)
        return torch.tanh(self.last(x)).float(), triplet, squares, queries


@torch.no_grad()
def load(model: MNAD, state) -> MNAD:
    """Gives the network the weights and items of a jaxad state; its layers are made in the same order."""
    encoder = [*(layer for pair in model.down for layer in pair), model.deepest[0]]
    decoder = [*model.joined]
    for rise, up in zip(model.rise, model.up, strict=True):
        decoder += [rise, *up]
    for name, layers, bare in (("encoder", encoder, model.deepest[1]), ("decoder", decoder, model.last)):
        params, stats = state.params[name], state.batch_stats[name]
        for i, (conv, norm, _) in enumerate(layers):
            own, seen = params[f"ConvNormRelu_{i}"], stats[f"ConvNormRelu_{i}"]["BatchNorm_0"]
            is_transposed = isinstance(conv, nn.ConvTranspose2d)
            _give(conv, own["ConvTranspose_0" if is_transposed else "Conv_0"], is_transposed=is_transposed)
            norm.weight.copy_(tensor(own["BatchNorm_0"]["scale"]))
            norm.bias.copy_(tensor(own["BatchNorm_0"]["bias"]))
            norm.running_mean.copy_(tensor(seen["mean"]))
            norm.running_var.copy_(tensor(seen["var"]))
        _give(bare, params["Conv_0"], is_transposed=False)
    model.memory.items = tensor(state.items).to(model.memory.items.device)
    return model


def _give(conv, own, *, is_transposed):
    conv.weight.copy_(kernel(own["kernel"], is_transposed=is_transposed))
    conv.bias.copy_(tensor(own["bias"]))


def kernel(values, *, is_transposed: bool):
    """jaxad's kernel (3, 3, C, O) as torch's (O, C, 3, 3), or (C, O, 3, 3) flipped for a transposed convolution."""
    moved = tensor(values).movedim((-2, -1), (0, 1))
    return (moved.flip((2, 3)) if is_transposed else moved.transpose(0, 1)).contiguous()


def refuse(cfg) -> None:
    """Raises Refusal for settings that the public code does not have."""
    expected: dict[str, Any] = {
        "memory": True,
        "update_norm": "all",
        "update_scope": "batch",
        "grad_read": False,
        "feature_dist": "mse",
        "learnable_items": False,
        "image_score": "combined",
        "pixel_map": "both",
    }
    refuse_other("mnad", cfg, expected)


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg = state.cfg
    channels = spec.image[-1]
    inputs = channels * (spec.image[0] - 1) if len(spec.image) == 4 else channels
    items = tensor(state.items).to(device)
    model = load(MNAD(inputs, channels, cfg.widths, items, skips=cfg.skips), state).to(device)
    rate, steps = float(cfg.learning_rate), cfg.steps
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8)
    done = 0
    weights = float(cfg.compactness_weight), float(cfg.separateness_weight)

    def precision():
        half = cfg.dtype == "bfloat16"
        return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def frames(images):
        x = images.float() / 255 * 2 - 1
        if x.ndim == 4:
            return x, x
        return x[:, :, :-1].transpose(1, 2).flatten(1, 2), x[:, :, -1]  # (B, C, T, H, W): frame by frame

    def loss_of(images):
        x, target = frames(images)
        rebuilt, triplet, squares, _ = model(x, train=True, margin=float(cfg.margin))
        return functional.mse_loss(rebuilt, target) + weights[0] * squares.mean() + weights[1] * triplet

    scale = _stretch if cfg.score_scale == "minmax" else _standardise
    sigma = float(cfg.smooth_sigma) * spec.image[-3] / 256
    rows, columns = (smoother(n, sigma).to(device) for n in spec.image[-3:-1])
    share, seen = float(cfg.psnr_weight), state.statistics

    def scores_of(images):
        x, target = frames(images)
        rebuilt, _, squares, _ = model(x, train=False)
        errors = ((rebuilt + 1) / 2 - (target + 1) / 2) ** 2
        psnr = 10 * torch.log10(1 / errors.flatten(1).mean(dim=1).clamp(min=1e-10))
        distance = squares.view(len(x), -1).mean(dim=1)
        image = share * (1 - scale(psnr, seen.psnr)) + (1 - share) * scale(distance, seen.distance)
        error = rows @ errors.mean(dim=1) @ columns.t()
        size = [n >> (len(cfg.widths) - 1) for n in errors.shape[2:]]
        small = squares.sum(dim=1).sqrt().view(len(x), 1, *size)
        apart = functional.interpolate(small, errors.shape[2:], mode="bilinear", align_corners=False)[:, 0]
        return image, _standardise(error, seen.error_map) + _standardise(apart, seen.distance_map)

    losses, scores = wrap(loss_of), wrap(scores_of)

    def step(batch):
        nonlocal done
        model.train()
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done / steps))
        done += 1
        optimizer.zero_grad()
        with precision():
            loss = losses(batch.image)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    def score(images):
        model.eval()
        with torch.no_grad(), precision():
            return scores(images)

    def reset():
        nonlocal done
        load(model, state)
        optimizer.state.clear()
        done = 0

    return Peer(score=score, steps={"train": step}, reset=reset, module=model)


def _stretch(values, seen):
    low, high = float(seen.low), float(seen.high)
    return (values - low) / (high - low) if high > low else values


def _standardise(values, seen):
    variance = float(seen.squares) / max(float(seen.count), 1.0)
    return (values - float(seen.mean)) / (math.sqrt(variance) if variance > 0 else 1.0)


def smoother(size: int, sigma: float):
    """The (size, size) matrix of a Gaussian of `sigma` pixels, renormalised at borders."""
    offsets = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    weights = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)
