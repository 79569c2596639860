"""GradCon in plain PyTorch, the way the public code works: pictures are scored one at a time, each with a backward pass
of its own through the whole network; training differentiates twice with `create_graph`, layer by layer; Adam.

Decisions that favour the peer: pictures wait as tensors on its device instead of coming from a DataLoader; the map is
smoothed once for the batch by the two matrix products that jaxad uses; where jaxad's map has a part from the gradients
(`map` other than "error"), an extension that public code lacks, the peer makes the map of errors alone and only image
scores are compared.
"""

from __future__ import annotations

import contextlib

import jax
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, refuse_other, tensor
from benchmarks.peers.memae import smoother
from jaxad.methods.gradcon import layers_of, phases, train_step

_ONLY = {
    "model": "cae",
    "recon": "mse",
    "grad_layers": "decoder",
    "use_bias": False,
    "ref_grad": "total",
    "cos_eps_mode": "norm",
    "tile": 0,
}


class GradCon(nn.Module):
    """Pictures (B, C, H, W) in [0, 1] -> their reconstruction."""

    def __init__(self, cfg, channels):
        super().__init__()
        encoder, decoder = layers_of(cfg, channels)
        inputs, layers = channels, []
        for layer in (*encoder, *decoder):
            kind = nn.Conv2d if layer.kind == "conv" else nn.ConvTranspose2d
            layers.append(kind(inputs, layer.features, 4, stride=2, padding=layer.padding))
            inputs = layer.features
        self.encoder, self.decoder = nn.ModuleList(layers[: len(encoder)]), nn.ModuleList(layers[len(encoder) :])

    def forward(self, x):
        for layer in (*self.encoder, *self.decoder[:-1]):
            x = functional.relu(layer(x))
        return torch.sigmoid(self.decoder[-1](x))


def kernel(values, *, is_transposed: bool):
    """jaxad's kernel (4, 4, C, O) as torch's (O, C, 4, 4), or (C, O, 4, 4) of a transposed convolution."""
    return tensor(values).permute((2, 3, 0, 1) if is_transposed else (3, 2, 0, 1)).contiguous()


@torch.no_grad()
def load(model: GradCon, params) -> GradCon:
    """Gives the network jaxad's weights."""
    for part, name in ((model.encoder, "conv"), (model.decoder, "deconv")):
        for i, layer in enumerate(part):
            layer.weight.copy_(kernel(params[f"{name}_{i}"]["kernel"], is_transposed=name == "deconv"))
            layer.bias.copy_(tensor(params[f"{name}_{i}"]["bias"]))
    return model


def refuse(cfg) -> None:
    """Raises Refusal for settings that the public code does not have."""
    refuse_other("gradcon", cfg, _ONLY)


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg = jax.tree.map(float, state.cfg)
    model = GradCon(cfg, spec.image[-1]).to(device)
    weights = [layer.weight for layer in model.decoder]
    sums = [torch.zeros_like(weight) for weight in weights]
    count = 0.0
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    height, width = spec.image[:2]
    rows, columns = (smoother(n, cfg.smooth_sigma * height / 256).to(device) for n in (height, width))
    network = wrap(model)

    def forward(x):
        half = cfg.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            return network(x).float()

    def reset():
        nonlocal count
        load(model, state.params)
        for i, own in enumerate(sums):
            own.copy_(kernel(state.reference_sum[f"deconv_{i}"]["kernel"], is_transposed=True))
        count = float(state.reference_weight)
        optimizer.state.clear()

    def cosine(gradients):
        pairs = zip(gradients, sums, strict=True)
        return sum(functional.cosine_similarity(g.flatten(), r.flatten(), dim=0) for g, r in pairs) / len(sums)

    def step(batch):
        nonlocal count
        optimizer.zero_grad()
        x = batch.image.float() / 255
        error = functional.mse_loss(forward(x), x)
        gradients = [torch.autograd.grad(error, weight, create_graph=True, retain_graph=True)[0] for weight in weights]
        aligned = cosine(gradients)
        loss = error - (cfg.gradient_weight if count else 0.0) * aligned
        loss.backward()
        for i, weight in enumerate(weights):
            sums[i].mul_(cfg.ref_decay).add_(weight.grad)
        count = cfg.ref_decay * count + 1
        optimizer.step()
        return {"loss": loss.detach(), "reconstruction": error.detach(), "cosine": aligned.detach()}

    def score(images):
        scores, maps = [], []
        for image in images.split(1):
            optimizer.zero_grad()
            x = image.float() / 255
            rebuilt = forward(x)
            error = functional.mse_loss(rebuilt, x)
            error.backward()
            with torch.no_grad():
                aligned = cosine([weight.grad for weight in weights])
                scores.append(cfg.score_error_weight * error - cfg.score_gradient_weight * aligned)
                maps.append(((rebuilt - x) ** 2).mean(dim=1))
        with torch.no_grad():
            smooth = rows @ torch.cat(maps) @ columns.t()
            return torch.stack(scores), smooth if cfg.map == "error" else None

    reset()
    rounds = [phase.name for phase in phases(cfg) if phase.step is train_step]
    return Peer(score=score, steps=dict.fromkeys(rounds, step), reset=reset, module=model)
