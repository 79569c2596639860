"""SynthCP with pseudo-classes in plain PyTorch: one-hot label maps through ordinary convolutions, gamma and beta by two
of them, torch's own spectral and instance normalisation, losses by autograd.

The public generator is under a licence that forbids copying; this one is written from the SPADE paper. Decisions that
favour the peer: pictures wait as tensors on its device, generator and discriminators run forward once for both updates
(the public code runs the generator twice), testing runs without gradients. Pseudo-classes must be the same on both
sides, where rounding moves a pixel between two centres either way: the peer asks jaxad for the labels and is timed
with that; features for the comparison are its own. Of the settings those of the industrial presets are here.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import spectral_norm

from benchmarks.peers import Peer, refuse_other, tensor
from benchmarks.peers.smai import ssim_map
from jaxad.methods import synthcp
from jaxad.nn import spade

_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)


class Spade(nn.Module):
    """Batch normalisation scaled and shifted by the labels' maps."""

    def __init__(self, channels, labels, hidden):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.shared = nn.Conv2d(labels, hidden, 3, padding=1)
        self.gamma = nn.Conv2d(hidden, channels, 3, padding=1)
        self.beta = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x, one_hot):
        seen = functional.relu(self.shared(functional.interpolate(one_hot, x.shape[2:], mode="nearest")))
        return self.norm(x) * (1 + self.gamma(seen)) + self.beta(seen)


class Block(nn.Module):
    """SPADE's residual block."""

    def __init__(self, inputs, outputs, labels, hidden):
        super().__init__()
        middle = min(inputs, outputs)
        self.norm_0, self.norm_1 = Spade(inputs, labels, hidden), Spade(middle, labels, hidden)
        self.conv_0 = spectral_norm(nn.Conv2d(inputs, middle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, outputs, 3, padding=1))
        self.is_wide = inputs != outputs
        if self.is_wide:
            self.norm_s = Spade(inputs, labels, hidden)
            self.conv_s = spectral_norm(nn.Conv2d(inputs, outputs, 1, bias=False))

    def forward(self, x, one_hot):
        y = self.conv_0(functional.leaky_relu(self.norm_0(x, one_hot), 0.2))
        y = self.conv_1(functional.leaky_relu(self.norm_1(y, one_hot), 0.2))
        return y + (self.conv_s(self.norm_s(x, one_hot)) if self.is_wide else x)


class Generator(nn.Module):
    """One-hot labels (B, L, h, w) -> pictures (B, C, H, W) in [-1, 1]."""

    def __init__(self, size, channels, labels, widths, upsamplings, hidden):
        super().__init__()
        self.begin = tuple(n // 2**upsamplings for n in size)
        self.doubles = [spade.doubles(i, len(widths), upsamplings) for i in range(len(widths))]
        self.start = nn.Conv2d(labels, widths[0], 3, padding=1)
        inputs = (widths[0], *widths)
        self.blocks = nn.ModuleList(Block(a, b, labels, hidden) for a, b in zip(inputs, widths, strict=False))
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, one_hot):
        x = self.start(functional.interpolate(one_hot, self.begin, mode="nearest"))
        for block, doubles in zip(self.blocks, self.doubles, strict=True):
            x = block(functional.interpolate(x, scale_factor=2, mode="nearest") if doubles else x, one_hot)
        return torch.tanh(self.last(functional.leaky_relu(x, 0.2)).float())


class Discriminator(nn.Module):
    """One scale: labels and picture joined (B, L + C, H, W) -> the maps of every layer."""

    def __init__(self, inputs, widths):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(inputs, widths[0], 4, 2, 2), nn.LeakyReLU(0.2))]
        for place, (a, b) in enumerate(zip(widths, widths[1:], strict=False), 2):
            conv = spectral_norm(nn.Conv2d(a, b, 4, 2 if place < len(widths) else 1, 2, bias=False))
            layers.append(nn.Sequential(conv, nn.InstanceNorm2d(b), nn.LeakyReLU(0.2)))
        layers.append(nn.Sequential(nn.Conv2d(widths[-1], 1, 4, 1, 2)))
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = layer(x)
            maps.append(x)
        return maps


class Discriminators(nn.Module):
    """Several scales, each half the one before."""

    def __init__(self, inputs, widths, scales):
        super().__init__()
        self.scales = nn.ModuleList(Discriminator(inputs, widths) for _ in range(scales))

    def forward(self, x):
        found = []
        for scale in self.scales:
            found.append(scale(x))
            x = functional.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        return found


class Both(nn.Module):
    """The networks of the method."""

    def __init__(self, cfg, shape):
        super().__init__()
        self.generator = Generator(
            shape[:2], shape[2], cfg.num_labels, cfg.generator_widths, cfg.upsamplings, cfg.spade_hidden
        )
        inputs = cfg.num_labels + shape[2]
        self.discriminators = Discriminators(inputs, cfg.discriminator_widths, cfg.discriminator_scales)


def kernel(values):
    """jaxad's kernel (taps, taps, C, O) as torch's (O, C, taps, taps)."""
    return tensor(values).permute(3, 2, 0, 1).contiguous()


@torch.no_grad()
def load(model: Both, state) -> Both:
    """Gives the networks the weights of a jaxad state."""
    own, others = state.params["generator"], state.others["generator"]
    _give(model.generator.start, own["start"], own["start_bias"])
    _give(model.generator.last, own["last"], own["last_bias"])
    for place, block in enumerate(model.generator.blocks):
        _give_block(block, own[f"block_{place}"], *(others[k][f"block_{place}"] for k in ("batch_stats", "spectral")))
    own, others = state.params["discriminator"], state.others["discriminator"]
    for place, scale in enumerate(model.discriminators.scales):
        mine = own[f"scale_{place}"]
        joined = np.concatenate([np.asarray(mine["labels"]), np.asarray(mine["image"])], axis=2)
        _give(scale.layers[0][0], joined, mine["image_bias"])
        for i, layer in enumerate(list(scale.layers)[1:-1]):
            _give_spectral(layer[0], mine[f"middle_{i}"]["kernel"], others["spectral"][f"scale_{place}"][f"middle_{i}"])
        _give(scale.layers[-1][0], mine["last"], mine["last_bias"])
    return model


def _give(conv, values, bias):
    conv.weight.copy_(kernel(values))
    conv.bias.copy_(tensor(bias))


def _give_spectral(conv, values, vectors):
    conv.weight_orig.copy_(kernel(values))
    conv.weight_u.copy_(tensor(vectors["right"]))
    taps, _, inputs, _ = np.shape(values)
    left = tensor(vectors["left"]).reshape(taps, taps, inputs)  # jaxad's order of a window, then torch's
    conv.weight_v.copy_(left.permute(2, 0, 1).reshape(-1))


def _give_block(block, own, stats, spectral):
    for part, norm in (("0", 0), ("1", 1), ("s", 0)):
        if part == "s" and not block.is_wide:
            continue
        module = getattr(block, f"norm_{part}")
        seen = stats[f"BatchNorm_{norm}"]  # jaxad normalises the shortcut's map once, with the first
        module.norm.running_mean.copy_(tensor(seen["mean"]))
        module.norm.running_var.copy_(tensor(seen["var"]))
        _give(module.shared, own[f"labels_{part}"], own[f"labels_{part}_bias"])
        both, bias = np.asarray(own[f"modulate_{part}"]["kernel"]), np.asarray(own[f"modulate_{part}"]["bias"])
        half = both.shape[-1] // 2
        _give(module.gamma, both[..., :half], bias[:half])
        _give(module.beta, both[..., half:], bias[half:])
        _give_spectral(getattr(block, f"conv_{part}"), own[f"conv_{part}"]["kernel"], spectral[f"conv_{part}"])
        if part != "s":
            getattr(block, f"conv_{part}").bias.copy_(tensor(own[f"conv_{part}_bias"]))


def texture_features(images):
    """(B, 1 or 3, H, W) in [0, 1] -> (B, 16, H / 4, W / 4)."""
    rgb = images.expand(-1, 3, -1, -1)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    weights = torch.tensor(_XYZ, device=images.device) / torch.tensor(_WHITE, device=images.device)[:, None]
    t = torch.einsum("ic,bchw->bihw", weights, linear)
    t = torch.where(t > (6 / 29) ** 3, t.clamp(min=1e-9) ** (1 / 3), t / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = t.unbind(dim=1)
    lab = torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1) / 100
    light = lab[:, :1]

    def around(maps):
        return functional.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)

    means, squares = functional.avg_pool2d(lab, 4), functional.avg_pool2d(light**2, 4)
    wide = around(means)
    own = torch.sqrt((squares - means[:, :1] ** 2).clamp(min=0) + 1e-6)
    other = torch.sqrt((around(squares) - wide[:, :1] ** 2).clamp(min=0) + 1e-6)
    height, width = light.shape[2:]
    slopes = []
    for n in (1, 2):
        for down, right in ((n, 0), (0, n), (n, n), (n, -n)):
            edge = abs(right)
            padded = functional.pad(light, (edge, edge, 0, down), mode="replicate")
            moved = padded[:, :, down : down + height, edge + right : edge + right + width]
            slopes.append(functional.avg_pool2d((moved - light).abs(), 4))
    return torch.cat([means, wide, own, other, *slopes], dim=1)


def smoothed(maps, sigma):
    """A Gaussian by two products, renormalised at borders."""

    def line(size):
        offsets = torch.arange(size, device=maps.device)
        weights = torch.exp(-0.5 * ((offsets[:, None] - offsets) / max(sigma, 1e-3)) ** 2)
        return weights / weights.sum(dim=1, keepdim=True)

    return line(maps.shape[1]) @ maps @ line(maps.shape[2]).t()


def refuse(cfg) -> None:
    """Raises Refusal for settings that the peer does not have."""
    expected: dict[str, Any] = {
        "labels": "clusters",
        "comparator": "feature",
        "gate": "none",
        "backbone": "none",
        "reconstruction": "l1_ssim",
        "augment": "none",
        "quantise_recon": False,
    }
    refuse_other("synthcp", cfg, expected)


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg = jax.tree.map(np.asarray, state.cfg)
    model = load(Both(cfg, spec.image), state).to(device)
    rates = float(cfg.learning_rate), float(cfg.discriminator_rate)
    nets = model.generator, model.discriminators
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=rate, betas=(0.0, 0.9)) for net, rate in zip(nets, rates, strict=True)
    ]
    frozen = [model.generator.start.bias]  # a normalisation follows, as after these
    for place, block in enumerate(model.generator.blocks):
        frozen += [block.conv_0.bias] + ([block.conv_1.bias] if place + 1 < len(model.generator.blocks) else [])
    for bias in frozen:
        bias.requires_grad_(False)
    labels_of = jax.jit(lambda images: synthcp.segment(state, images).labels)
    weights = float(cfg.feature_weight), float(cfg.reconstruction_weight)
    done = 0

    def precision():
        half = cfg.dtype == "bfloat16"
        return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def one_hot_of(images):
        labels = tensor(np.asarray(labels_of(np.moveaxis(images.cpu().numpy(), 1, -1)))).long()
        return functional.one_hot(labels, cfg.num_labels).permute(0, 3, 1, 2).float().to(images.device)

    def apart(fake, real):
        ours, theirs, total = (fake + 1) / 2, (real + 1) / 2, 0.0
        for scale in range(3):
            if scale:
                ours, theirs = functional.avg_pool2d(ours, 2), functional.avg_pool2d(theirs, 2)
            total = total + (ours - theirs).abs().mean() + (1 - ssim_map(ours, theirs)).mean()
        return total / 3

    def losses_of(one_hot, real):
        """(generator's, discriminators'), from one pass of fake and real in one batch."""
        fake, size = paint(one_hot), len(real)
        whole = functional.interpolate(one_hot, real.shape[2:], mode="nearest")
        joined = torch.cat([torch.cat([whole, fake], dim=1), torch.cat([whole, real], dim=1)])
        adversarial, matching, verdict = 0.0, 0.0, 0.0
        for maps in judge(joined):
            theirs, ours = maps[-1][:size].float(), maps[-1][size:].float()
            adversarial = adversarial - theirs.mean()
            verdict = verdict + functional.relu(1 - ours).mean() + functional.relu(1 + theirs).mean()
            for m in maps[:-1]:
                matching = matching + (m[:size].float() - m[size:].float().detach()).abs().mean()
        count = cfg.discriminator_scales
        total = adversarial / count + weights[0] * matching / count + weights[1] * apart(fake, real)
        return total, verdict / count

    # Network by network: with the losses in one function, Inductor's backward pass corrupts the heap (torch 2.13, CPU).
    paint, judge = wrap(model.generator), wrap(model.discriminators)

    def step(batch):
        nonlocal done
        model.train()
        images = batch.image.float() / 255
        one_hot = one_hot_of(images)
        with precision():
            total, verdict = losses_of(one_hot, images * 2 - 1)
        parts = [[p for p in net.parameters() if p.requires_grad] for net in nets]
        slopes = torch.autograd.grad(total, parts[0], retain_graph=True), torch.autograd.grad(verdict, parts[1])
        decay = min(1.0, 2 * (1 - done / cfg.steps))
        done += 1
        for optimizer, own, found, rate in zip(optimizers, parts, slopes, rates, strict=True):
            for p, slope in zip(own, found, strict=True):
                p.grad = slope
            optimizer.param_groups[0]["lr"] = rate * decay
            optimizer.step()
        return {"loss": total.detach()}

    pseudo = jax.device_get(state.pseudo)

    def calibrated(values, seen):
        mean, squares, number = (tensor(x).to(values.device) for x in (seen.mean, seen.squares, seen.count))
        deviation = torch.sqrt(squares / number.clamp(min=1)).view(values.shape[1:])
        floor = (0.5 * deviation.mean()).clamp(min=1e-6)
        return (values - mean.view(values.shape[1:])) / (deviation + floor)

    def features_of(images):
        seen = pseudo.features
        mean, squares, number = (tensor(x).to(images.device) for x in (seen.mean, seen.squares, seen.count))
        variance = squares / number.clamp(min=1)
        deviation = torch.sqrt(torch.where(variance > 0, variance, torch.ones_like(variance)))
        return (texture_features(images) - mean[:, None, None]) / deviation[:, None, None]

    def score(images):
        model.eval()
        images = images.float() / 255
        one_hot = one_hot_of(images)
        with torch.no_grad(), precision():
            made = (paint(one_hot) + 1) / 2
            a, b = features_of(images), features_of(made)
            offset = a.shape[1]
            both, squares, others = ((x * y).sum(dim=1) + offset for x, y in ((a, b), (a, a), (b, b)))
            feature = 1 - (both / torch.sqrt(squares * others)).clamp(-1, 1)
            image = functional.avg_pool2d((1 - ssim_map(made, images))[:, None], 4)[:, 0]
            share = float(cfg.image_weight)
            joined = calibrated(feature, pseudo.distances["feature"])
            joined = (joined + share * calibrated(image, pseudo.distances["image"])) / (1 + share)
            whole = functional.interpolate(joined[:, None], images.shape[2:], mode="bilinear", align_corners=False)[
                :, 0
            ]
            pixel_map = smoothed(whole, float(cfg.smooth_sigma) * images.shape[2] / 256)
        flat = pixel_map.flatten(1)
        count = max(1, round(0.01 * flat.shape[1]))
        return flat.topk(count, dim=1).values.mean(dim=1), pixel_map

    def reset():
        nonlocal done
        load(model, state)
        for optimizer in optimizers:
            optimizer.state.clear()
        done = 0

    return Peer(score=score, steps={"generate": step}, reset=reset, module=model)
