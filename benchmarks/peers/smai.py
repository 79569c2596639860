"""SMAI in plain PyTorch, as its users would write it: eager modules, a Python loop over the passes of a picture,
depthwise convolutions as filters, sums over superpixels by `index_add_`. There is no public code to follow.

What is hidden must be the same on both sides, so the peer asks jaxad for superpixels and for what a step hides, and is
timed with them. That favours it: scikit-image's superpixels take 3 times as long (benchmarks/superpixels.py). Pictures
wait as tensors on its device, and testing runs without gradients. Other kinds of network, loss and map than the default
ones are refused.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, refuse_other, tensor
from jaxad import train
from jaxad.methods import smai

COLOURS = {"coloured2": 2, "coloured3": 3, "coloured4": 4}


class Layer(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs, outputs):
        super().__init__(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Pictures in [-1, 1] (B, C, H, W) and what is hidden (B, 1, H, W) -> pictures."""

    def __init__(self, channels, widths):
        super().__init__()
        *small, last = widths
        inputs = channels + 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for width in small:
            self.down.append(nn.Sequential(Layer(inputs, width), Layer(width, width)))
            inputs = width
        self.deepest = nn.Sequential(Layer(inputs, last), Layer(last, last))
        inputs = last
        for width in small[::-1]:
            self.up.append(nn.Sequential(Layer(width + inputs, width), Layer(width, width)))
            inputs = width
        self.last = nn.Conv2d(inputs, channels, 3, padding=1)

    def forward(self, x, hidden):
        x, maps = torch.cat([x * (1 - hidden), hidden], dim=1), []
        for layers in self.down:
            maps.append(layers(x))
            x = functional.max_pool2d(maps[-1], 2)
        x = self.deepest(x)
        for layers, skip in zip(self.up, maps[::-1], strict=True):
            x = layers(torch.cat([skip, functional.interpolate(x, scale_factor=2, mode="nearest")], dim=1))
        return self.last(x).float()


@torch.no_grad()
def load(model: UNet, state) -> UNet:
    """Gives the network the weights of a jaxad state; its layers are made in the same order."""
    layers = [layer for pair in (*model.down, model.deepest, *model.up) for layer in pair]
    for i, (conv, norm, _) in enumerate(layers):
        own, seen = state.params[f"Layer_{i}"], state.batch_stats[f"Layer_{i}"]["BatchNorm_0"]
        _give(conv, own["Conv_0"])
        norm.weight.copy_(tensor(own["BatchNorm_0"]["scale"]))
        norm.bias.copy_(tensor(own["BatchNorm_0"]["bias"]))
        norm.running_mean.copy_(tensor(seen["mean"]))
        norm.running_var.copy_(tensor(seen["var"]))
    _give(model.last, state.params[f"Layer_{len(layers)}"]["Conv_0"])
    return model


def _give(conv, own):
    conv.weight.copy_(kernel(own["kernel"]))
    conv.bias.copy_(tensor(own["bias"]))


def kernel(values):
    """jaxad's kernel (3, 3, C, O) as torch's (O, C, 3, 3)."""
    return tensor(values).permute(3, 2, 0, 1).contiguous()


def ssim_map(a, b):
    """Structural similarity with Gaussian windows of 11 pixels, averaged over channels: (B, H, W)."""
    channels, offsets = a.shape[1], torch.arange(-5.0, 6.0, device=a.device)
    window = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    window = (window / window.sum())[:, None] * (window / window.sum())
    window = window.expand(channels, 1, 11, 11).contiguous()
    rows, columns = (torch.as_tensor(np.pad(np.arange(n), 5, "symmetric"), device=a.device) for n in a.shape[2:])

    def smooth(x):
        return functional.conv2d(x[:, :, rows][:, :, :, columns], window, groups=channels)

    mean_a, mean_b = smooth(a), smooth(b)
    var_a, var_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
    return (alike / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))).mean(dim=1)


def ms_gms_map(a, b):
    """Similarity of Prewitt's gradient magnitudes, averaged over four scales: (B, H, W)."""
    down = torch.tensor([[-1.0, -1, -1], [0, 0, 0], [1, 1, 1]], device=a.device) / 3
    filters = torch.stack([down, down.t()])[:, None]
    a, b, size, total = a.mean(dim=1, keepdim=True), b.mean(dim=1, keepdim=True), a.shape[2:], 0.0

    def magnitude(x):
        slopes = functional.conv2d(functional.pad(x, (1, 1, 1, 1), mode="replicate"), filters)
        return torch.sqrt((slopes**2).sum(dim=1, keepdim=True) + 1e-12)

    for _ in range(4):
        g, h = magnitude(a), magnitude(b)
        alike = (2 * g * h + 0.0026) / (g**2 + h**2 + 0.0026)
        total = total + functional.interpolate(alike, size, mode="nearest")[:, 0]
        a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
    return total / 4


RESIDUALS = {
    "gms": lambda restored, images: 1 - ms_gms_map(restored, images),
    "ssim": lambda restored, images: 1 - ssim_map(restored, images),
    "l2": lambda restored, images: ((restored - images) ** 2).mean(dim=1),
}


def refuse(cfg) -> None:
    """Raises Refusal for settings that the peer does not have."""
    expected: dict[str, Any] = {
        "conv": "plain",
        "loss": "riad",
        "pixel_map": "region",
        "image_score": "max",
        "augment": "none",
    }
    refuse_other("smai", cfg, expected)


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg = jax.tree.map(np.asarray, state.cfg)
    model = load(UNet(spec.image[-1], cfg.widths), state).to(device)
    rate, steps = float(cfg.learning_rate), cfg.steps
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8)
    weights = float(cfg.ssim_weight), float(cfg.gms_weight)
    hide = jax.jit(lambda key, images: smai.view(key, cfg, images)[1])
    labels_of = jax.jit(lambda images: [smai.superpixels_of(cfg, images, grid) for grid in cfg.grids])
    key, done = train.phase_key(jax.random.key(0), 0), 0  # of the harness, so that both sides hide the same

    def precision():
        half = cfg.dtype == "bfloat16"
        return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def last(images):
        return np.moveaxis(images.cpu().numpy(), 1, -1)

    fill = wrap(model)  # alone: with the losses in one function, Inductor's backward pass corrupts the heap (2.13, CPU)

    def loss_of(images, hidden):
        filled = fill(images * 2 - 1, hidden)
        count, mine = hidden.sum().clamp(min=1), hidden[:, 0]
        error = (((filled - (images * 2 - 1)) ** 2).mean(dim=1) * mine).sum() / count
        composite = torch.where(hidden > 0, (filled + 1) / 2, images)
        ssim = ((1 - ssim_map(composite, images)) * mine).sum() / count
        gms = ((1 - ms_gms_map(composite, images)) * mine).sum() / count
        return error + weights[0] * ssim + weights[1] * gms

    unlike = RESIDUALS[cfg.residual]

    def classes_of(labels, grid):
        if cfg.grouping == "one_by_one":
            return labels, grid * grid
        colours = min(COLOURS[cfg.grouping], grid)
        return labels // grid % colours * colours + labels % grid % colours, colours**2

    def region_scores(images, labels, grid, seen):
        classes, count = classes_of(labels, grid)
        restored = torch.zeros_like(images)
        for k in range(count):  # one pass after the other
            mine = (classes == k)[:, None].float()
            hidden = functional.max_pool2d(mine, 2 * cfg.dilate + 1, stride=1, padding=cfg.dilate)
            restored = torch.where(mine > 0, (fill(images * 2 - 1, hidden) + 1) / 2, restored)
        residual = unlike(restored, images)
        mean, squares, number = (tensor(x).to(images.device) for x in (seen.mean, seen.squares, seen.count))
        deviation = torch.sqrt(squares / number.clamp(min=1))
        floor = (float(cfg.position_floor) * deviation.mean()).clamp(min=1e-6)
        maps = []
        for own, values in zip(labels.flatten(1), residual.flatten(1), strict=True):
            nothing = torch.zeros(grid * grid, device=images.device)
            sizes = nothing.clone().index_add_(0, own, torch.ones_like(values))
            means = nothing.clone().index_add_(0, own, values) / sizes.clamp(min=1)
            if cfg.calibrate != "none":
                means = (means - mean) / (deviation + floor)
            maps.append(means[own])
        return torch.stack(maps).view(residual.shape)

    def step(batch):
        nonlocal done
        model.train()
        images = batch.image.float() / 255
        hidden = hide(jax.random.fold_in(key, done), last(images))
        hidden = tensor(np.asarray(hidden)).float()[:, None].to(images.device)
        optimizer.param_groups[0]["lr"] = rate * (0.1 if done >= float(cfg.drop_at) * steps else 1.0)
        done += 1
        optimizer.zero_grad()
        with precision():
            loss = loss_of(images, hidden)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    def score(images):
        model.eval()
        images = images.float() / 255
        found = [tensor(np.asarray(labels)).long().to(images.device) for labels in labels_of(last(images))]
        with torch.no_grad(), precision():
            maps = [
                region_scores(images, labels, grid, seen)
                for labels, grid, seen in zip(found, cfg.grids, state.positions, strict=True)
            ]
        pixel_map = torch.stack(maps).mean(dim=0)
        return pixel_map.flatten(1).max(dim=1).values, pixel_map

    def reset():
        nonlocal done
        load(model, state)
        optimizer.state.clear()
        done = 0

    return Peer(score=score, steps={"train": step}, reset=reset, module=model)
