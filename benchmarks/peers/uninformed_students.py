"""Uninformed Students in plain PyTorch, the way its public reimplementations work: networks with pooling are evaluated
densely by stacking the four shifts of every pool on the batch axis and interleaving them at the end ("fast dense
feature extraction"), students one after the other, each with its own optimiser.

Decisions that favour the peer: pictures wait as tensors on its device, the teacher is read without gradients, the
targets of all students of a scale are computed once, and where the map is wanted at every n-th pixel only, pools keep
their stride, as users of smaller patch networks have it.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, Refusal, tensor
from jaxad.nn import dense, patch_net


class PatchNet(nn.Module):
    """A patch network; `forward` evaluates it at every `out_stride`-th pixel of pictures."""

    def __init__(self, layers, channels, out_stride):
        super().__init__()
        self.slopes, self.convs, self.order, self.out_stride = [], nn.ModuleList(), [], out_stride
        for layer in layers:
            if isinstance(layer, dense.Pool):
                self.order.append(None)
                continue
            self.order.append(len(self.convs))
            self.convs.append(nn.Conv2d(channels, layer.features, layer.taps))
            self.slopes.append(0.005 if layer.activation is patch_net.leaky else 1.0)
            channels = layer.features
        self.last = max(n for n, conv in enumerate(self.convs) if conv.kernel_size[0] > 1)

    def forward(self, x):
        """(B, 3, H, W), padded -> (B, d, h, w)."""
        left, shifts, batch = self.out_stride, [], len(x)
        for number in self.order:
            if number is None:
                if left > 1:
                    x, left = functional.max_pool2d(x, 2), left // 2
                else:
                    shifts.append(tuple(n - 1 for n in x.shape[2:]))
                    x = self.pool_all_shifts(x)
                continue
            conv, stride = self.convs[number], left if number == self.last else 1
            x = functional.conv2d(x, conv.weight, conv.bias, stride=stride)
            x = x if self.slopes[number] == 1.0 else functional.leaky_relu(x, self.slopes[number])
        for _ in shifts:
            x = self.interleave(x)
        return x[:batch]

    @staticmethod
    def pool_all_shifts(x):
        """The four ways to lay a 2x2 pool, on the batch axis: down, right, fastest last."""
        rows, columns = (n + n % 2 for n in (x.shape[2] - 1, x.shape[3] - 1))
        x = functional.pad(x, (0, columns + 1 - x.shape[3], 0, rows + 1 - x.shape[2]))
        four = [functional.max_pool2d(x[:, :, i : i + rows, j : j + columns], 2) for i in (0, 1) for j in (0, 1)]
        return torch.stack(four).flatten(0, 1)

    @staticmethod
    def interleave(x):
        """The inverse in space: (4 B, d, h, w) -> (B, d, 2 h, 2 w)."""
        four = x.view(2, 2, -1, *x.shape[1:])
        return four.permute(2, 3, 4, 0, 5, 1).reshape(four.shape[2], x.shape[1], 2 * x.shape[2], 2 * x.shape[3])


@torch.no_grad()
def load(net: PatchNet, params, m: int | None = None) -> PatchNet:
    """Gives a network the weights of jaxad's, those of student m where they are stacked."""
    for number, conv in enumerate(net.convs):
        own = {name: np.asarray(leaf) for name, leaf in params[f"conv{number + 1}"].items()}
        own = own if m is None else {name: leaf[m] for name, leaf in own.items()}
        conv.weight.copy_(kernel(own["kernel"]))
        conv.bias.copy_(tensor(own["bias"]))
    return net


def kernel(values):
    """jaxad's kernel (taps, taps, C, O) as torch's (O, C, taps, taps)."""
    return tensor(values).permute(3, 2, 0, 1).contiguous()


class Scale(nn.Module):
    """Teacher and students of one size of patches."""

    def __init__(self, cfg, patch):
        super().__init__()
        layers = patch_net.layers_of(patch, patch_net.shape_of(cfg))
        before = (dense.field_of(layers) - 1) // 2 if cfg.centre_field else (patch - 1) // 2
        self.edges, self.mode = (before, patch - 1 - before) * 2, "reflect" if cfg.padding == "reflect" else "constant"
        self.teacher = PatchNet(layers, 3, cfg.out_stride)
        self.students = nn.ModuleList(PatchNet(layers, 3, cfg.out_stride) for _ in range(cfg.students))

    def set_weights(self, scale):
        """Takes the weights and statistics of a jaxad scale."""
        load(self.teacher, scale.teacher)
        for m, student in enumerate(self.students):
            load(student, scale.students, m)
        self.mean = tensor(scale.target.mean)[None, :, None, None]
        variance = np.asarray(scale.target.squares) / np.maximum(np.asarray(scale.target.count), 1)
        self.deviation = tensor(np.sqrt(np.where(variance > 0, variance, 1)))[None, :, None, None]
        self.statistics = [_moments(scale.error), _moments(scale.variance)]

    def padded(self, x):
        """Normalised pictures with a patch for every pixel."""
        return functional.pad(x, self.edges, mode=self.mode)

    @torch.no_grad()
    def targets(self, x):
        """The teacher's descriptors of padded pictures, standardised."""
        return (self.teacher(x).float() - self.mean) / self.deviation

    def map_of(self, x, height, width):
        """Standardised error plus variance of padded pictures, (B, h, w)."""
        target = self.targets(x)[:, :, :height, :width]
        said = torch.stack([student(x).float()[:, :, :height, :width] for student in self.students])
        mean = said.mean(dim=0)
        error = ((mean - target) ** 2).sum(dim=1)
        variance = ((said - mean) ** 2).sum(dim=2).mean(dim=0)
        parts = zip((error, variance), self.statistics, strict=True)
        return sum((values - mean) / deviation for values, (mean, deviation) in parts)


def _moments(seen):
    variance = float(seen.squares) / max(float(seen.count), 1.0)
    return float(seen.mean), variance**0.5 if variance > 0 else 1.0


def refuse(cfg) -> None:
    """Raises Refusal for settings that the peer does not have."""
    if cfg.out_stride not in (1, 2, 4, 8):
        raise Refusal(
            f"the torch peer of uninformed_students got out_stride={cfg.out_stride}; expected 1, 2, 4 or 8, the "
            "strides of its pools. Pass --set out_stride=4, or leave out --peer."
        )


def make(state, spec, *, device: str, wrap) -> Peer:
    """The peer; see `benchmarks.peers.make`."""
    cfg = state.cfg
    size = tuple(-(-n // cfg.out_stride) for n in spec.image[:2])
    scales = nn.ModuleDict({f"p{patch}": Scale(cfg, patch) for patch in cfg.patches}).to(device)
    constants = (
        tensor(np.array(x, np.float32))[None, :, None, None].to(device) for x in (patch_net.MEAN, patch_net.STD)
    )
    mean, std = constants
    ups = [
        tensor(np.asarray(_between(n, k, cfg.out_stride))).to(device) for n, k in zip(spec.image[:2], size, strict=True)
    ]

    def set_weights():
        for name, scale in scales.items():
            scale.set_weights(state.scales[name])
            scale.mean, scale.deviation = scale.mean.to(device), scale.deviation.to(device)

    set_weights()
    rate, decay = float(cfg.learning_rate), float(cfg.weight_decay)
    optimizers = [
        torch.optim.Adam(student.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay)
        for scale in scales.values()
        for student in scale.students
    ]

    def precision():
        half = cfg.dtype == "bfloat16"
        return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def normalised(images):
        x = images.float() / 255
        return ((x.repeat(1, 3, 1, 1) if x.shape[1] == 1 else x) - mean) / std

    def loss_of(student, x, target):
        said = student(x).float()[:, :, : size[0], : size[1]]
        return ((said - target) ** 2).sum(dim=1).mean()

    def scores_of(images):
        x = normalised(images)
        maps = [scale.map_of(scale.padded(x), *size) for scale in scales.values()]
        map_ = torch.stack(maps).mean(dim=0)
        map_ = map_ if cfg.out_stride == 1 else ups[0] @ map_ @ ups[1].t()
        return map_.flatten(1).amax(dim=1), map_

    losses, scores, targets = wrap(loss_of), wrap(scores_of), wrap(lambda scale, x: scale.targets(x))

    def step(batch):
        x, found = normalised(batch.image), []
        each = iter(optimizers)
        for scale in scales.values():
            padded = scale.padded(x)
            with precision():
                target = targets(scale, padded)[:, :, : size[0], : size[1]]
            for student in scale.students:
                optimizer = next(each)
                optimizer.zero_grad()
                with precision():
                    loss = losses(student, padded, target)
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
        return {"loss": torch.stack(found).mean()}

    def score(images):
        with torch.no_grad(), precision():
            return scores(images)

    def reset():
        set_weights()
        for optimizer in optimizers:
            optimizer.state.clear()

    return Peer(score=score, steps={"students": step}, reset=reset, module=scales)


def _between(size: int, known: int, stride: int):
    places = np.minimum(np.arange(size) / stride, known - 1)
    return np.maximum(1 - np.abs(places[:, None] - np.arange(known)), 0.0).astype(np.float32)
