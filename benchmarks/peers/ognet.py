"""OGNet in plain PyTorch, the way the author's code works: two networks of the usual layers, the discriminator called
once for every kind of picture, and in phase two, update by update, the autoencoders of the batch and of two more.

Decisions that favour the peer: pictures wait as tensors on its device; no gradient of the discriminator's loss flows
into the autoencoder, where the code computes and clears one; phase two and tests run the autoencoders without
gradients; blends of one batch (`pseudo_pairs="roll"`) are made of reconstructions that are there already. Noise and
places of patches must be the same on both sides, so the peer asks jaxad for the numbers they are made from and is
timed with that. Dense evaluation is jaxad's own and refused.
"""

from __future__ import annotations

import contextlib
import math

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, refuse_other, tensor
from benchmarks.peers.memae import smoother
from jaxad import train
from jaxad.methods import ognet

_PATCHES = 512  # through the networks at once


def generator(channels: int, widths, taps: int) -> nn.Sequential:
    """The autoencoder: pictures (B, C, H, W) in [-1, 1] to pictures."""
    layers, inputs = [], channels
    for i, width in enumerate(widths):
        norm, relu = nn.BatchNorm2d(width), nn.ReLU()
        layers += [nn.Conv2d(inputs, width, taps), *((norm, relu) if i < len(widths) // 2 else (relu, norm))]
        inputs = width
    for width in widths[-2::-1]:
        layers += [nn.ConvTranspose2d(inputs, width, taps), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.ConvTranspose2d(inputs, channels, taps), nn.Tanh())


def discriminator(shape, widths, taps: int) -> nn.Sequential:
    """Pictures (B, C, H, W) to logits (B, 1); shape is (H, W, C)."""
    height, width, inputs = shape
    layers = []
    for i, outputs in enumerate(widths):
        layers += [nn.Conv2d(inputs, outputs, taps, stride=2, padding=taps // 2)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()] if i < len(widths) - 1 else [nn.ReLU()]
        height, width, inputs = (height + 1) // 2, (width + 1) // 2, outputs
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(height * width * inputs, 1))


@torch.no_grad()
def load(model: nn.Sequential, network) -> nn.Sequential:
    """Gives a network the weights of jaxad's, whose layers have other names in the same order."""
    params, stats = network.params, network.batch_stats
    is_generator = "last" in params
    down, up = ("down_{}", "up_{}") if is_generator else ("conv_{}", "")
    down_norm, up_norm = ("down_norm_{}", "up_norm_{}") if is_generator else ("norm_{}", "")
    convs = [m for m in model if isinstance(m, nn.Conv2d)]
    turned = [m for m in model if isinstance(m, nn.ConvTranspose2d)]
    norms = [m for m in model if isinstance(m, nn.BatchNorm2d)]
    for i, conv in enumerate(convs):
        _give(conv, params[down.format(i)], kernel(params[down.format(i)]["kernel"]))
    for i, conv in enumerate(turned):
        own = params["last" if i == len(turned) - 1 else up.format(i)]
        _give(conv, own, kernel(own["kernel"], is_transposed=True))
    before = len(convs) if is_generator else len(norms)
    for i, norm in enumerate(norms):
        name = down_norm.format(i) if i < before else up_norm.format(i - before)
        _give(norm, params[name], tensor(params[name]["scale"]))
        norm.running_mean.copy_(tensor(stats[name]["mean"]))
        norm.running_var.copy_(tensor(stats[name]["var"]))
    if not is_generator:  # jaxad's features lie channels last
        dense = tensor(params["kernel"]).view(-1, convs[-1].out_channels).t()
        _give(model[-1], params, dense.reshape(1, -1))
    return model


def _give(layer, own, weight):
    layer.weight.copy_(weight)
    layer.bias.copy_(tensor(own["bias"]))


def kernel(values, *, is_transposed: bool = False):
    """jaxad's kernel (taps, taps, C, O) as torch's (O, C, taps, taps), or (C, O, taps, taps) flipped."""
    moved = tensor(values)
    return moved.permute(2, 3, 0, 1).flip(2, 3).contiguous() if is_transposed else moved.permute(3, 2, 0, 1)


class Networks(nn.Module):
    """The three networks."""

    def __init__(self, cfg, shape):
        super().__init__()
        self.generator = generator(shape[-1], cfg.widths, cfg.taps)
        self.old = generator(shape[-1], cfg.widths, cfg.taps)
        self.discriminator = discriminator(shape, cfg.widths, cfg.taps)

    def set_weights(self, state):
        """Takes the weights and statistics of a jaxad state."""
        for name, network in self.named_children():
            load(network, getattr(state, name))
        return self


def anomalous(logits):
    """Mean cross-entropy of being called anomalous."""
    return functional.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def normal(logits):
    """Mean cross-entropy of being called normal."""
    return functional.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))


def move(pictures, uniform):
    """Shifts, mirrors and turns pictures (B, C, H, W) by numbers (B, 5) in [0, 1)."""
    moved = []
    for picture, (down, right, *chances) in zip(pictures, uniform.tolist(), strict=True):
        for axis, by in ((1, down), (2, right)):
            size = picture.shape[axis]
            shift = int(by * (2 * (size // 8) + 1)) - size // 8
            places = torch.arange(shift, shift + size, device=picture.device).clamp(0, size - 1)
            picture = picture.index_select(axis, places)
        picture = picture.flip([axis for axis, chance in ((1, chances[0]), (2, chances[1])) if chance < 0.5])
        is_turned = picture.shape[1] == picture.shape[2] and chances[2] < 0.5
        moved.append(picture.transpose(1, 2) if is_turned else picture)
    return torch.stack(moved)


def refuse(cfg) -> None:
    """Raises Refusal for settings that the peer does not have."""
    refuse_other("ognet", cfg, {"dense": False, "map": "patch", "image_score": "max"})


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg = jax.tree.map(float, state.cfg)
    height, width, channels = spec.image
    seen = ognet.input_size(cfg, spec.image)
    model = Networks(cfg, (*seen, channels)).set_weights(state).to(device)
    make_adam = {"betas": (0.9, 0.999), "eps": 1e-8}
    adams = {
        "generator": torch.optim.Adam(model.generator.parameters(), lr=cfg.learning_rate, **make_adam),
        "discriminator": torch.optim.Adam(model.discriminator.parameters(), lr=cfg.discriminator_rate, **make_adam),
        "refine": torch.optim.Adam(model.discriminator.parameters(), lr=cfg.refine_rate, **make_adam),
    }
    rebuild, rebuild_old, judge = (wrap(network.forward) for network in model.children())
    rebuild, rebuild_old, judge = (_float(function) for function in (rebuild, rebuild_old, judge))
    draw = jax.jit(ognet.uniform_rows, static_argnums=(1, 2))
    keys = {name: train.phase_key(jax.random.key(0), i) for name, i in (("warmup", 0), ("refine", 2))}  # the harness's
    done = dict.fromkeys(keys, 0)
    rows, columns = (smoother(n, cfg.smooth_sigma * height / 256).to(device) for n in (height, width))

    def precision():
        half = cfg.dtype == "bfloat16"
        return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def numbers(phase, *shape):
        drawn = draw(jax.random.fold_in(keys[phase], done[phase]), *shape)
        done[phase] += 1
        return tensor(np.asarray(drawn)).to(device)

    def views(images, uniform):
        x = images.float() / 255 * 2 - 1
        if not cfg.patch:
            return x
        room = torch.tensor([height, width], device=device) - cfg.patch + 1
        corners = (uniform * room).long().tolist()
        cut = [p[:, i : i + cfg.patch, j : j + cfg.patch] for p, (i, j) in zip(x, corners, strict=True)]
        return torch.stack(cut)

    def noisy(x, uniform):
        noise = torch.erfinv(2 * uniform - 1) * 2**0.5
        noise = noise.view(len(x), *seen, channels).permute(0, 3, 1, 2)
        return (x + cfg.noise_std * noise).clamp(-1, 1)

    def adversarial_step(batch):
        model.train()
        uniform = numbers("warmup", len(batch.image), 2 + seen[0] * seen[1] * channels)
        x = views(batch.image, uniform[:, :2])
        with precision():
            rebuilt = rebuild(noisy(x, uniform[:, 2:]))
            logits = judge(rebuilt)
            told = 0.5 * (anomalous(logits) + normal(judge(x)))

        def loss_of(logits):
            error = functional.mse_loss(rebuilt, x)
            return (1 - cfg.adversarial_weight) * error + cfg.adversarial_weight * normal(logits)

        _descend(told, model.discriminator, adams["discriminator"], retain_graph=True, waits=True)
        if cfg.generator_gradient == "post":
            adams["discriminator"].step()
            with precision():
                loss = loss_of(judge(rebuilt))
            _descend(loss, model.generator, adams["generator"])
        else:
            loss = loss_of(logits)
            _descend(loss, model.generator, adams["generator"])
            adams["discriminator"].step()
        return {"loss": loss.detach(), "discriminator": told.detach()}

    @torch.no_grad()
    def shown(batches, moves, t):
        """What update t shows the discriminator."""
        x, updates = batches[t], len(batches)
        low = rebuild_old(x)
        if cfg.pseudo_pairs == "batches" and updates > 2:
            others = [rebuild_old(batches[(t + more) % updates]) for more in (1, 2)]
        else:
            others = [low, low.roll(-1, dims=0)]
        if cfg.pseudo_blend == "moved":
            others[1] = move(others[1], moves[t])
        return rebuild(x), x, low, rebuild((others[0] + others[1]) / 2)

    def refine_step(batch):
        model.eval()
        model.discriminator.train()
        updates, losses = math.gcd(len(batch.image), cfg.refine_block), []
        uniform = numbers("refine", len(batch.image), 7)
        x = views(batch.image, uniform[:, :2])
        batches, moves = ([rows[t::updates] for t in range(updates)] for rows in (x, uniform[:, 2:]))
        for t in range(updates):
            with precision():
                high, real, low, pseudo = (judge(pictures) for pictures in shown(batches, moves, t))
            good = (1 - cfg.real_weight) * normal(high) + cfg.real_weight * normal(real)
            bad = cfg.low_weight * anomalous(low) + (1 - cfg.low_weight) * anomalous(pseudo)
            _descend(good + bad, model.discriminator, adams["refine"])
            losses.append((good + bad).detach())
        return {"loss": torch.stack(losses).mean()}

    def spread(logits):
        total, hits = torch.zeros(len(logits), height, width), torch.zeros(height, width)
        total, hits = total.to(device), hits.to(device)
        for i in range(logits.shape[1]):
            for j in range(logits.shape[2]):
                down, right = i * cfg.stride, j * cfg.stride
                total[:, down : down + cfg.patch, right : right + cfg.patch] += logits[:, i, j, None, None]
                hits[down : down + cfg.patch, right : right + cfg.patch] += 1
        covered = [(n - cfg.patch) // cfg.stride * cfg.stride + cfg.patch for n in (height, width)]
        maps = (total / hits.clamp(min=1))[:, None, : covered[0], : covered[1]]
        return functional.pad(maps, (0, width - covered[1], 0, height - covered[0]), mode="replicate")[:, 0]

    @torch.no_grad()
    def score(images):
        model.eval()
        x = images.float() / 255 * 2 - 1
        grid = (1, 1)
        if cfg.patch:
            cut = x.unfold(2, cfg.patch, cfg.stride).unfold(3, cfg.patch, cfg.stride).permute(0, 2, 3, 1, 4, 5)
            x, grid = cut.reshape(-1, *cut.shape[3:]), cut.shape[1:3]
        with precision():
            logits = torch.cat([judge(rebuild(some)) for some in x.split(_PATCHES)]).view(-1, *grid)
        maps = spread(logits) if cfg.patch else logits.expand(-1, height, width)
        return logits.flatten(1).amax(dim=1), rows @ maps @ columns.t()

    def reset():
        model.set_weights(state)
        for adam in adams.values():
            adam.state.clear()
        done.update(dict.fromkeys(done, 0))

    return Peer(score=score, steps={"warmup": adversarial_step, "refine": refine_step}, reset=reset, module=model)


def _float(function):
    return lambda x: function(x).float()


def _descend(loss, network, adam, *, retain_graph=False, waits=False):
    """A step of Adam on one network's parameters alone; if it `waits`, only the gradients."""
    adam.zero_grad()
    parameters = list(network.parameters())
    for parameter, grad in zip(
        parameters, torch.autograd.grad(loss, parameters, retain_graph=retain_graph), strict=True
    ):
        parameter.grad = grad
    if not waits:
        adam.step()
