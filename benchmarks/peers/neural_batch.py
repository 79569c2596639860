"""The Neural Batch Sampler in plain PyTorch: episodes, steps and moves one after the other, as a public script would
have them, with eager modules, autograd and Adam.

Decisions that favour the peer: the walkers of an episode go through the networks together (the later system's script
has one, and a forward pass for each move), the policy's gradient is one pass over all observations, errors of labelled
pictures are taken at the last T steps only, and pictures wait as tensors. Random numbers are jaxad's, those of the step
with the same number, so that both sides do the same and losses can be compared; batch normalisation keeps the biased
variance, as Flax does. Settings that are not here are refused.

The form "walker by walker" is without the first of these favours, as that script is.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import Peer, refuse_other, tensor
from jaxad import train
from jaxad.methods import neural_batch
from jaxad.ops.walkers import LEAVE, MOVES

FORMS = {"walker by walker": {"together": False}}
_PHASE = 1  # of the sampler, after that of the labels


class Norm(nn.Module):
    """Batch normalisation that keeps statistics, as long as `kept` says, and can free them of their start."""

    def __init__(self, features, *, kept, affine=False):
        super().__init__()
        self.kept = kept
        self.weight = nn.Parameter(torch.ones(features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(features)) if affine else None
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("var", torch.ones(features))

    def forward(self, x):
        if not self.training:
            return functional.batch_norm(x, self.mean, self.var, self.weight, self.bias)
        mean, var, count = self.mean.clone(), self.var.clone(), x.numel() // x.shape[1]
        out = functional.batch_norm(x, mean, var, self.weight, self.bias, True, 1 - self.kept)
        with torch.no_grad():
            before = self.kept * self.var
            self.mean, self.var = mean, before + (var - before) * ((count - 1) / count)
        return out


class Autoencoder(nn.Module):
    """Patches (B, C, P, P) -> the same shape. Layers have the names that they have in jaxad."""

    def __init__(self, cfg, channels):
        super().__init__()
        widths, side = cfg.ae_features, cfg.patch // 2 ** len(cfg.ae_features)
        layers, inputs = {}, channels

        def add(name, made, outputs):
            layers[name] = made
            return outputs

        def same(name, outputs):
            return add(name, nn.Conv2d(inputs, outputs, 3, 1, 1), outputs)

        for i, width in enumerate(widths):
            inputs = add(f"down_{i}", nn.Conv2d(inputs, width, 4, 2, 1), width)
            inputs = same(f"keep_{i}", width) if i + 1 < len(widths) else inputs
        for i in reversed(range(len(widths) - 1)):
            inputs = same(f"narrow_{i}", widths[i])
        add("code", nn.Conv2d(inputs, cfg.ae_code, side), cfg.ae_code)
        add("open", nn.ConvTranspose2d(cfg.ae_code, inputs, side), inputs)
        for i in range(1, len(widths)):
            inputs = same(f"widen_{i}", widths[i])
        for i in reversed(range(1, len(widths))):
            inputs = add(f"up_{i}", nn.ConvTranspose2d(inputs, widths[i], 4, 2, 1), widths[i])
            inputs = same(f"mirror_{i}", widths[i - 1])
        add("last", nn.ConvTranspose2d(inputs, channels, 4, 2, 1), channels)
        plain = ("code", "last")
        norms = {name: Norm(made.out_channels, kept=0.0) for name, made in layers.items() if name not in plain}
        self.layers, self.norms = nn.ModuleDict(layers), nn.ModuleDict(norms)
        for name in norms:  # normalised away
            layers[name].bias.requires_grad_(False)

    def forward(self, x):
        for name, layer in self.layers.items():
            x = layer(x)
            x = functional.leaky_relu(self.norms[name](x), 0.2) if name in self.norms else x
        return x

    @torch.no_grad()
    def load(self, variables):
        """Gives the network jaxad's variables."""
        for name, layer in self.layers.items():
            own = variables["params"][name]
            values, size = tensor(own["kernel"]), layer.kernel_size[0]
            if name == "code":
                values = values.reshape(size, size, *layer.weight.shape[1::-1])
            if name == "open":
                values = values.reshape(-1, size, size, layer.out_channels).permute(1, 2, 0, 3)
            order = (2, 3, 0, 1) if isinstance(layer, nn.ConvTranspose2d) else (3, 2, 0, 1)
            layer.weight.copy_(values.permute(order))
            layer.bias.copy_(tensor(own["bias"]))
            if name in self.norms:
                seen = variables["batch_stats"][f"{name}_norm"]
                self.norms[name].mean.copy_(tensor(seen["mean"]))
                self.norms[name].var.copy_(tensor(seen["var"]))
        return self


class Frozen:
    """For a while, evaluates a network after t steps with statistics freed of their start."""

    def __init__(self, network, steps):
        self.network, self.kept = network, 0.9**steps if steps else 0.0

    def __enter__(self):
        self.before = [(m, m.mean, m.var) for m in self.network.modules() if isinstance(m, Norm)]
        for norm, mean, var in self.before:
            norm.mean, norm.var = mean / (1 - self.kept), (var - self.kept) / (1 - self.kept)
        return self.network.eval()

    def __exit__(self, *error):
        for norm, mean, var in self.before:
            norm.mean, norm.var = mean, var


class Predictor(nn.Module):
    """Profiles (B, T, H, W) -> logits (B, H, W)."""

    def __init__(self, cfg):
        super().__init__()
        inputs = (cfg.profile_length, *cfg.predictor_features)
        pairs = enumerate(zip(inputs[:-1], inputs[1:], strict=True))
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 2**i, 2**i) for i, (a, b) in pairs)
        self.inputs = Norm(cfg.profile_length, kept=0.9)
        self.norms = nn.ModuleList(Norm(b, kept=0.9, affine=True) for b in inputs[1:])
        self.last = nn.Conv2d(inputs[-1], 1, 1)
        for layer in self.layers:
            layer.bias.requires_grad_(False)

    def forward(self, x):
        x = self.inputs(x)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.leaky_relu(norm(layer(x)), 0.2)
        return self.last(x)[:, 0]

    @torch.no_grad()
    def load(self, params, stats):
        self.inputs.mean.copy_(tensor(stats["inputs"]["mean"]))
        self.inputs.var.copy_(tensor(stats["inputs"]["var"]))
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            layer.weight.copy_(tensor(params[f"kernel_{i}"]).permute(3, 2, 0, 1))
            layer.bias.copy_(tensor(params[f"bias_{i}"]))
            norm.weight.copy_(tensor(params[f"norm_{i}"]["scale"]))
            norm.bias.copy_(tensor(params[f"norm_{i}"]["bias"]))
            norm.mean.copy_(tensor(stats[f"norm_{i}"]["mean"]))
            norm.var.copy_(tensor(stats[f"norm_{i}"]["var"]))
        self.last.weight.copy_(tensor(params["last_kernel"]).t()[:, :, None, None])
        self.last.bias.copy_(tensor(params["last_bias"]))
        return self


class Policy(nn.Module):
    """Crops (B, C + 2, 2P, 2P) -> logits (B, A)."""

    def __init__(self, cfg, channels):
        super().__init__()
        inputs, side = (channels + 2, *cfg.policy_features), 2 * cfg.patch
        for _ in cfg.policy_features:
            side = -(-side // 2)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(inputs[:-1], inputs[1:], strict=True))
        self.norms = nn.ModuleList(nn.GroupNorm(b // math.gcd(8, b), b, eps=1e-6) for b in inputs[1:])
        self.hidden = nn.Linear(inputs[-1] * side * side, cfg.policy_hidden)
        self.actions = nn.Linear(cfg.policy_hidden, len(MOVES))

    def forward(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = functional.relu(norm(layer(x)))
        x = x.permute(0, 2, 3, 1).flatten(1)  # in jaxad's order
        return self.actions(functional.relu(self.hidden(x)))

    @torch.no_grad()
    def load(self, params):
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            layer.weight.copy_(tensor(params[f"conv_{i}"]["kernel"]).permute(3, 2, 0, 1))
            layer.bias.copy_(tensor(params[f"conv_{i}"]["bias"]))
            norm.weight.copy_(tensor(params[f"norm_{i}"]["scale"]))
            norm.bias.copy_(tensor(params[f"norm_{i}"]["bias"]))
        for name in ("hidden", "actions"):
            getattr(self, name).weight.copy_(tensor(params[name]["kernel"]).t())
            getattr(self, name).bias.copy_(tensor(params[name]["bias"]))
        return self


class Cycles(NamedTuple):
    """What E cycles leave behind: E episodes, N pictures, K moves of W walkers."""

    profiles: Any  # (E, N, T, H, W)
    masks: Any  # (N, H, W)
    seen: Any  # (E, K, W, C + 2, 2P, 2P)
    actions: Any  # (E, K, W)
    rewards: Any  # (E, K, W) hand-made
    end: Any  # (E,) reward
    ae_losses: Any  # (E,) at the last step


class Drawn:
    """The random numbers of a step, from jaxad."""

    def __init__(self, cfg, spec, rows):
        def of_step(step):
            key = jax.random.fold_in(train.phase_key(jax.random.key(0), _PHASE), step)
            key_cycles, key_fit = jax.random.split(key)
            key_rows, key_episodes = jax.random.split(key_cycles)

            def of_episode(e):
                key_weights, key_numbers = jax.random.split(jax.random.fold_in(key_episodes, e))
                fresh = neural_batch.fresh_weights(key_weights, cfg, spec.image[-1])
                variables = neural_batch.variables_of(cfg, fresh, spec.image[-1])
                return variables, neural_batch.draw_numbers(key_numbers, cfg)

            episodes = jax.vmap(of_episode)(jax.numpy.arange(cfg.episodes))
            shape = (cfg.predictor_steps, cfg.episodes, cfg.predictor_batch, 4)
            labelled = neural_batch.choose_rows(key_rows, rows, cfg.profile_pictures)
            return episodes, jax.random.uniform(key_fit, shape), labelled

        self.of_step = jax.jit(of_step)

    def __call__(self, step):
        (variables, numbers), fit, rows = jax.device_get(self.of_step(np.int32(step)))
        count = numbers.start.shape[0]
        return [jax.tree.map(lambda a, e=e: a[e], (variables, numbers)) for e in range(count)], fit, rows


def refuse(cfg) -> None:
    """Raises Refusal for settings that the peer does not have."""
    plain: dict[str, Any] = {
        "ae_skip": False,
        "predictor": "learned",
        "sampler": "learned",
        "pool": "all",
        "alpha_schedule": "const",
    }
    plain |= {"predictor_negatives": "labelled+normal", "tile_shifts": 1, "dtype": "float32", "image_score": "max"}
    refuse_other("neural_batch", cfg, plain)


def make(state, spec, *, device: str, wrap, together: bool = True) -> Peer:
    """The peer; see `benchmarks.peers.make`. With `together` the walkers of an episode look and act in one batch."""
    cfg = jax.tree.map(float, state.cfg)
    channels, patch, grid, margin = spec.image[-1], cfg.patch, cfg.grid, neural_batch.margin(cfg)
    policy, predictor = Policy(cfg, channels).to(device), Predictor(cfg).to(device)
    network = Autoencoder(cfg, channels).to(device)
    rates = (policy, cfg.learning_rate), (predictor, cfg.predictor_learning_rate)
    optimizers = [torch.optim.Adam(part.parameters(), lr=rate) for part, rate in rates]
    rows = state.labelled.image.shape[0]
    draw, done = Drawn(cfg, spec, rows), [0]
    act, classify = wrap(policy), wrap(predictor)
    known = tensor(state.labelled.image).to(device).movedim(-1, 1).float() / 255
    marks = tensor(state.labelled.mask).to(device).float()
    positive, negative, share = (float(getattr(state.labelled, n)) for n in ("positive", "negative", "share"))
    alpha = min(max(positive / max(negative, 1.0), 0.01), 1.0)

    def errors(images):
        """(B, C, H, W) -> (B, H, W), tile by tile."""
        count, _, height, width = images.shape
        tiles = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)
        tiles = tiles.reshape(-1, channels, patch, patch)
        found = (tiles - network(tiles)).abs().mean(dim=1)
        found = found.reshape(count, height // patch, width // patch, patch, patch)
        return found.permute(0, 1, 3, 2, 4).reshape(count, height, width)

    def losses(logits, masks):
        return -(masks * functional.logsigmoid(logits) + alpha * (1 - masks) * functional.logsigmoid(-logits))

    def arrive(pool, normals, drawn):
        """(W, 4) -> pictures and centres."""
        others, cells = len(pool) - normals, 2 * patch // grid
        first, last = cells // 2, [n // grid - cells // 2 for n in pool.shape[2:]]
        found = []
        for where, which, row, column in drawn.tolist():
            inside = normals + min(int(which * others), others - 1)
            image = inside if where < share else min(int(which * normals), normals - 1)
            place = (min(first + int(u * (z - first + 1)), z) for u, z in zip((row, column), last, strict=True))
            found.append((image, *place))
        return found

    def cut(maps, places, cells, unit):
        half = cells // 2
        return torch.stack(
            [
                maps[i, ..., (y - half) * unit : (y + half) * unit, (x - half) * unit : (x + half) * unit]
                for i, y, x in places
            ]
        )

    def look(pool, visits, places):
        """What walkers at these places see, and the policy's logits."""
        cells = 2 * patch // grid
        crops, counts = cut(pool, places, cells, grid), cut(visits, places, cells, 1)
        counts = counts.repeat_interleave(grid, 1).repeat_interleave(grid, 2)
        crops = torch.cat([crops, errors(crops)[:, None], counts[:, None]], dim=1)
        return crops, act(crops)

    def episode(own, labelled, variables, numbers):
        pool, normals = torch.cat([own, labelled]), len(own)
        count = min(len(labelled), normals)
        seen_by_predictor = torch.cat([labelled, own[:count]])
        edges = edge_strength(pool).unflatten(2, (-1, grid)).unflatten(1, (-1, grid)).mean(dim=(2, 4))
        edges, pool = (
            functional.pad(edges, (margin // grid,) * 4),
            functional.pad(pool, (margin,) * 4, mode="replicate"),
        )
        visits = torch.zeros_like(edges)
        optimizer = torch.optim.Adam(network.load(variables).parameters(), lr=cfg.ae_learning_rate)
        places, maps, seen, actions, rewards = arrive(pool, normals, numbers.start), [], [], [], []
        cells, size = 2 * patch // grid, patch // grid
        first, last = cells // 2, [n // grid - cells // 2 for n in pool.shape[2:]]
        for t in range(cfg.ae_steps):
            patches = []
            network.eval()
            with torch.no_grad():
                for drawn in numbers.moves[t]:
                    looks = [look(pool, visits, some) for some in ([places] if together else [[p] for p in places])]
                    crops, logits = (torch.cat(parts) for parts in zip(*looks, strict=True))
                    noise = -torch.log(-torch.log(tensor(drawn[:, : len(MOVES)]).to(device)))
                    action = (logits + noise).argmax(dim=1)
                    new, moved = arrive(pool, normals, drawn[:, len(MOVES) :]), []
                    for place, other, a in zip(places, new, action.tolist(), strict=True):
                        step = MOVES[a] * int(cfg.stride // grid)
                        there = [min(max(p + d, first), z) for p, d, z in zip(place[1:], step, last, strict=True)]
                        moved.append(other if a == LEAVE else (place[0], *map(int, there)))
                    places = moved
                    clone = torch.sigmoid(cut(edges, places, size, 1).mean(dim=(1, 2)))
                    cover = -torch.sigmoid(cut(visits, places, size, 1).mean(dim=(1, 2)))
                    for i, y, x in places:
                        visits[i, y - size // 2 : y + size // 2, x - size // 2 : x + size // 2] += 1
                    patches.append(cut(pool, places, size, grid))
                    seen.append(crops)
                    actions.append(action)
                    rewards.append(clone + cover - cfg.leave_cost * (action == LEAVE))
            network.train()
            x = torch.cat(patches)
            loss = functional.mse_loss(network(x), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                network(x)  # statistics of the new weights
            to_come, apart = divmod(cfg.ae_steps - 1 - t, cfg.profile_stride)
            if to_come < cfg.profile_length and not apart:
                network.eval()
                with torch.no_grad():
                    maps.append(errors(seen_by_predictor))
        profiles = shape_of(torch.stack(maps, dim=1))
        return profiles, torch.stack(seen), torch.stack(actions), torch.stack(rewards), loss.detach()

    def run_cycles(batch, episodes, chosen):
        """E cycles: profiles, their masks, what walkers saw and did, and the rewards at the end."""
        images = batch.image.float() / 255
        normals = len(images) // cfg.episodes
        own = images[: normals * cfg.episodes].reshape(cfg.episodes, normals, *images.shape[1:])
        labelled, masks = known[chosen.tolist()], marks[chosen.tolist()]
        found = [episode(part, labelled, *numbers) for part, numbers in zip(own, episodes, strict=True)]
        profiles, seen, actions, rewards, ae_losses = (torch.stack(parts) for parts in zip(*found, strict=True))
        with torch.no_grad(), Frozen(predictor, done[0] * cfg.predictor_steps):
            logits = predictor(profiles[:, : len(masks)].flatten(0, 1)).reshape(cfg.episodes, *masks.shape)
        end = -losses(logits, masks).mean(dim=(1, 2, 3))
        masks = torch.cat([masks, masks.new_zeros(profiles.shape[1] - len(masks), *masks.shape[1:])])
        return Cycles(profiles, masks, seen, actions, rewards, end, ae_losses)

    def step(batch):
        episodes, drawn, chosen = draw(done[0])
        found = run_cycles(batch, episodes, chosen)
        updates, done[0] = done[0], done[0] + 1
        fitted = fit(found.profiles, found.masks, drawn)
        beta = max(1 - updates / (cfg.shaping * cfg.steps), 0.0)
        made = (beta * found.rewards / found.rewards.shape[1]).flip(1).cumsum(1).flip(1)
        future = made + ((1 - beta) * found.end)[:, None, None]
        mean = future.mean(dim=2, keepdim=True)
        gains = future - (mean.sum(dim=0) - mean) / (cfg.episodes - 1)
        gains = gains / torch.sqrt((gains**2).mean() + 1e-12)
        norm = improve(found.seen.flatten(0, 2), found.actions.flatten(), gains.flatten())
        ae_loss = found.ae_losses.mean()
        return {"loss": -found.end.mean(), "ae_loss": ae_loss, "predictor_loss": fitted, "policy_gradient": norm}

    def fit(profiles, masks, drawn):
        predictor.train()
        total, count = 0.0, profiles.shape[1]
        for numbers in drawn:
            x, y = [], []
            for e, episode_numbers in enumerate(numbers):
                for which, *turns in episode_numbers.tolist():
                    row = min(int(which * count), count - 1)
                    pair = profiles[e, row], masks[row]
                    for axis, turn in zip((-2, -1), turns, strict=False):
                        pair = tuple(a.flip(axis) for a in pair) if turn < 0.5 else pair
                    pair = tuple(a.transpose(-1, -2) for a in pair) if turns[2] < 0.5 else pair
                    x.append(pair[0])
                    y.append(pair[1])
            loss = losses(classify(torch.stack(x)), torch.stack(y)).mean()
            optimizers[1].zero_grad()
            loss.backward()
            optimizers[1].step()
            total = total + loss.detach() / len(drawn)
        return total

    def improve(seen, actions, gains):
        log_policy = functional.log_softmax(act(seen), dim=1)
        chosen = log_policy.gather(1, actions[:, None])[:, 0]
        entropy = -(log_policy.exp() * log_policy).sum(dim=1).mean()
        loss = -(chosen * gains).mean() - cfg.entropy_weight * entropy
        optimizers[0].zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizers[0].step()
        return norm

    @torch.no_grad()
    def score(images):
        x, maps = images.float() / 255, []
        for variables in snapshots:
            profile = []
            for one in variables:
                network.load(one).eval()
                profile.append(errors(x))
            with Frozen(predictor, int(state.updates) * cfg.predictor_steps):
                maps.append(torch.sigmoid(classify(shape_of(torch.stack(profile, dim=1)))))
        found = torch.stack(maps).mean(dim=0)
        return found.amax(dim=(1, 2)), found

    def reset():
        done[0] = 0
        policy.load(state.params["policy"])
        predictor.load(state.params["predictor"], state.batch_stats)
        for optimizer in optimizers:
            optimizer.state.clear()

    def stored(c, t):
        weights = jax.tree.map(lambda leaf: leaf[c, t], state.snapshots)
        return jax.device_get(neural_batch.variables_of(cfg, weights, channels))

    snapshots = [[stored(c, t) for t in range(cfg.profile_length)] for c in range(cfg.eval_cycles)]
    reset()
    parts = {"draw": lambda: draw(0), "cycles": run_cycles, "predictor": fit, "sampler": improve}
    module = nn.ModuleList([policy, predictor])
    return Peer(score=score, steps={"sampler": step}, reset=reset, module=module, parts=parts)


_SMOOTH = torch.tensor([1.0, 4, 6, 4, 1]) / 16
_TENT, _SLOPE = torch.tensor([1.0, 2, 1]), torch.tensor([-1.0, 0, 1])


def edge_strength(images):
    """Sobel magnitude of smoothed grey pictures: (B, C, H, W) -> (B, H, W)."""
    weights = images.new_tensor([0.2989, 0.5870, 0.1140])
    grey = images if images.shape[1] == 1 else (images * weights[:, None, None]).sum(dim=1, keepdim=True)
    smooth = separable(grey, _SMOOTH, _SMOOTH)
    down, right = separable(smooth, _SLOPE, _TENT), separable(smooth, _TENT, _SLOPE)
    return torch.sqrt(down**2 + right**2 + 1e-8)[:, 0]


def shape_of(profiles):
    """Orthonormal cosines over time of log errors: (B, T, H, W) -> (B, T, H, W)."""
    steps = torch.arange(profiles.shape[1], device=profiles.device)
    basis = torch.cos(math.pi / len(steps) * (steps + 0.5) * steps[:, None]) * (2 / len(steps)) ** 0.5
    basis[0] /= 2**0.5
    return torch.einsum("kt,bt...->bk...", basis, torch.log(profiles + 0.01))


def separable(x, rows, columns):
    """Correlates with the product of two kernels; borders continue outwards."""
    kernel = (rows[:, None] * columns[None, :]).to(x.device)[None, None]
    half = kernel.shape[-1] // 2
    return functional.conv2d(functional.pad(x, (half,) * 4, mode="replicate"), kernel)
