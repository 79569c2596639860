"""MemAE in plain PyTorch, the way its public implementations work: eager modules and autograd, addressing weights of
all queries x items stored, Adam.

Two decisions favour the peer: pictures wait as tensors on its device instead of coming from a DataLoader, and the map
is smoothed by the two matrix products that jaxad uses instead of a convolution. Conv biases before a batch
normalisation are trained, as in the public code; their gradient is zero but for rounding.
"""

from __future__ import annotations

import contextlib

import jax
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, refuse_other, tensor

_BY_RANK = {2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d), 3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d)}


class Memory(nn.Module):
    """Reads a convex combination of items for each query (T, C): (value, entropy (T,))."""

    def __init__(self, num_items, features, cfg):
        super().__init__()
        self.items = nn.Parameter(torch.empty(num_items, features))
        self.similarity, self.temperature = cfg.similarity, float(cfg.temperature)
        self.threshold = float(cfg.shrink_threshold)

    def forward(self, queries):
        keys = self.items
        if self.similarity == "cosine":
            queries, keys = functional.normalize(queries, dim=1), functional.normalize(keys, dim=1)
        weights = torch.softmax(functional.linear(queries, keys).float() / self.temperature, dim=1)
        if self.threshold > 0:
            weights = functional.normalize(torch.where(weights > self.threshold, weights, 0.0), p=1, dim=1)
        entropy = -(weights * torch.log(weights + 1e-12)).sum(dim=1)
        return functional.linear(weights, self.items.t()), entropy


class MemAE(nn.Module):
    """Pictures in [-1, 1] -> (reconstruction, entropy of each query, or None without a memory)."""

    def __init__(self, cfg, shape):
        super().__init__()
        rank, channels = len(shape) - 1, shape[-1]
        conv, transposed, norm = _BY_RANK[rank]
        strides = [(2, 2)] * len(cfg.encoder) if rank == 2 else [(t, 2, 2) for t in cfg.time_strides]
        activation = nn.ReLU if cfg.activation == "relu" else lambda: nn.LeakyReLU(0.2)
        sizes, layers, inputs = [shape[:-1]], [], channels
        for i, (outputs, stride) in enumerate(zip(cfg.encoder, strides, strict=True)):
            taps = cfg.first_kernel if i == 0 else 3
            layers += [conv(inputs, outputs, taps, stride, taps // 2), norm(outputs), activation()]
            sizes.append(tuple(-(-n // s) for n, s in zip(sizes[-1], stride, strict=True)))
            inputs = outputs
        self.encoder = nn.Sequential(*layers)
        positions = 1
        for n in sizes[-1]:
            positions *= n
        self.query = cfg.query
        features = inputs if cfg.query == "position" else inputs * positions
        self.memory = Memory(cfg.num_items, features, cfg) if cfg.memory else None
        layers, last = [], len(cfg.decoder)
        for i, outputs in enumerate((*cfg.decoder, channels)):
            stride, small, large = strides[last - i], sizes[last - i + 1], sizes[last - i]
            extra = tuple(n - (m - 1) * s - 1 for n, m, s in zip(large, small, stride, strict=True))
            layers.append(transposed(inputs, outputs, 3, stride, 1, extra))
            layers += [norm(outputs), activation()] if i < last else []
            inputs = outputs
        self.decoder = nn.Sequential(*layers)

    def forward(self, x):
        code, entropy = self.encoder(x), None
        if self.memory is not None:
            last = code.movedim(1, -1)  # channels last, so that an item of a whole picture is laid out as jaxad's
            read, entropy = self.memory(last.reshape(-1 if self.query == "position" else len(last), self.width(last)))
            code = read.reshape(last.shape).movedim(-1, 1)
        return self.decoder(code).float(), entropy

    def width(self, code):
        return code.shape[-1] if self.query == "position" else code[0].numel()


@torch.no_grad()
def load(model: MemAE, state) -> MemAE:
    """Gives the network the weights of a jaxad state."""
    for name, part, layers in (
        ("encoder", model.encoder, "Conv"),
        ("decoder", model.decoder, "ConvTranspose"),
    ):
        params, stats = state.params[name], state.batch_stats.get(name, {})
        convs = [m for m in part if hasattr(m, "kernel_size")]
        norms = [m for m in part if hasattr(m, "running_mean")]
        for i, conv in enumerate(convs):
            own = params[f"{layers}_{i}"]
            conv.weight.copy_(kernel(own["kernel"], is_transposed=layers == "ConvTranspose"))
            conv.bias.copy_(tensor(own["bias"]))
        for i, norm in enumerate(norms):
            own, seen = params[f"NormActivate_{i}"]["BatchNorm_0"], stats[f"NormActivate_{i}"]["BatchNorm_0"]
            norm.weight.copy_(tensor(own["scale"]))
            norm.bias.copy_(tensor(own["bias"]))
            norm.running_mean.copy_(tensor(seen["mean"]))
            norm.running_var.copy_(tensor(seen["var"]))
    if model.memory is not None:
        model.memory.items.copy_(tensor(state.params["memory"]))
    return model


def kernel(values, *, is_transposed: bool):
    """jaxad's kernel (*taps, C, O) as torch's (O, C, *taps), or (C, O, *taps) flipped for a transposed convolution."""
    moved = tensor(values).movedim((-2, -1), (0, 1))
    moved = moved.flip(tuple(range(2, moved.ndim))) if is_transposed else moved.transpose(0, 1)
    return moved.contiguous()


def refuse(cfg) -> None:
    """Raises Refusal for settings that the peer does not have."""
    refuse_other("memae", cfg, {"empty_policy": "zero", "flip": False})


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg = jax.tree.map(float, state.cfg)
    model = load(MemAE(cfg, spec.image), state).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    height, width = spec.image[-3:-1]
    sigma = cfg.smooth_sigma * height / 256
    rows, columns = (smoother(n, sigma).to(device) for n in (height, width))

    def precision():
        half = cfg.dtype == "bfloat16"
        return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def loss_of(images):
        x = images.float() / 255 * 2 - 1
        rebuilt, entropy = model(x)
        reconstruction = functional.mse_loss(rebuilt, x)
        return reconstruction if entropy is None else reconstruction + cfg.entropy_weight * entropy.mean()

    def scores_of(images):
        x = images.float() / 255 * 2 - 1
        squares = (model(x)[0] - x) ** 2
        error = squares.sum(dim=1).sqrt() if cfg.score_norm == "l1" else squares.mean(dim=1)
        frame = error if error.ndim == 3 else error[:, cfg.score_frame]
        maps = rows @ frame @ columns.t()
        image = maps.amax(dim=(1, 2)) if cfg.image_score == "max" else error.flatten(1).mean(dim=1)
        return image, maps

    losses, scores = wrap(loss_of), wrap(scores_of)

    def step(batch):
        model.train()
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
        load(model, state)
        optimizer.state.clear()

    return Peer(score=score, steps={"train": step}, reset=reset, module=model)


def smoother(size: int, sigma: float):
    """The (size, size) matrix of a Gaussian of `sigma` pixels, renormalised at borders."""
    offsets = torch.arange(size)[:, None] - torch.arange(size)[None, :]
    weights = torch.exp(-0.5 * (offsets / max(sigma, 1e-3)) ** 2)
    return weights / weights.sum(dim=1, keepdim=True)
