"""Patch SVDD: patches embedded by a network that knows where they lie, scored by their nearest normal patch.

Yi, Yoon. "Patch SVDD: Patch-level SVDD for Anomaly Detection and Segmentation". ACCV 2020.
https://arxiv.org/abs/2006.16067

A network embeds patches of two sizes; the large patch's embedding is made from those of its four quarters. Two losses
train it. Patches a few pixels apart shall have embeddings close together: that alone ends in a constant. So a
classifier must tell, from the difference of the embeddings of two patches further apart, in which of eight directions
the second lies. The embeddings of all normal patches are kept in a bank. Scored: the distance of a patch to its nearest
row of the bank, averaged over the patches that cover a pixel, and the two sizes multiplied.

What is whose:
  * Networks, sampling, losses, optimiser, strides and scores are those of the official code (no licence; nothing is
    copied, and its trained encoders are read from the user's own copy, `encoder_weights`). As there, the last layer of
    the classifiers stays as it was drawn (`train_last`), a partner beyond the border is moved onto it while its label
    stays (`boundary="clip"`), and the norm of differences is not squared.
  * The paper varies the weight of the SVDD loss by class and does not publish it; the official example for bottle has
    0.001. Objects of one kind seem to want small values; embeddings that collapse to a constant want smaller ones.
  * The official code's neighbours of small patches are approximate; here all are exact. Its pictures are resized by
    Pillow's default filter, which Pillow changed; here by the data pipeline's (bilinear, antialiased).
  * Ours: images come in shuffled epochs, each step's from different pictures; `boundary="reject"` draws a first patch
    whose partner fits; `kernel_gain`, `fusion`, `neighbours`, `coreset` and `precision` but the defaults; the collapse
    monitor; every preset but `mvtec`.
  * An encoder that collapsed to a constant gives scores that are rounding noise, as the published one for leather does.
    `spread_large` and `spread_small`, the mean standard deviation of embeddings by dimension, show it: `collapsed` is 1
    where one is below 0.001. That is a warning, no proof: large patches of the published encoder for screw are below it
    and tell pictures apart all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxad import importers
from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec, config, static
from jaxad.nn import init as draw
from jaxad.nn.dense import Conv, Layers, PatchNetwork
from jaxad.ops.bank import k_centre, write
from jaxad.ops.coverage import spread
from jaxad.ops.nearest import PRECISIONS, nearest
from jaxad.ops.patches import cut_patches

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))  # (row, column), by label
COLLAPSED = 1e-3  # mean standard deviation under which embeddings count as constant


@config
class PatchSVDDConfig:
    """Settings of Patch SVDD. Fields marked static force a new compilation; the others may be vmapped over."""

    widths: tuple[int, ...] = static((32, 64, 128, 128, 64, 32, 32))  # of the convolutions before the last; n of them
    # make small patches of 4 (n + 1) pixels; large ones have twice as many
    features: int = static(64)  # D, of embeddings
    hidden: int = static(128)  # of what makes large embeddings from four small ones, and of the classifiers
    stride_large: int = static(16)  # pixels between large patches that are scored; divides their size
    stride_small: int = static(4)  # the same of small patches; divides stride_large
    boundary: str = static("clip")  # partners beyond the border are moved onto it ("clip", code), or "reject"ed
    train_last: bool = static(False)  # train the classifiers' last layer, which the code leaves as drawn
    fusion: str = static("product")  # of the two maps: "product" (paper) | "sum" | "large" | "small"
    neighbours: int = static(1)  # rows of the bank whose distances are averaged; 1 in paper and code
    coreset: float = static(1.0)  # share of the bank's rows that k-centre selection keeps; 1: all, as in paper and code
    precision: str = static("float32")  # of the search's products: "float32" | "default" | "bfloat16"
    approximate: bool = static(False)  # search by approx_min_k, for TPU
    encoder_weights: str = static("")  # a file with the official code's names; training goes on from it
    steps: int = static(97_800)  # 0 keeps the encoder as drawn or imported
    batch_size: int = static(64)
    dtype: str = static("float32")  # of the encoder: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "mixed" | "gemm"
    learning_rate: float = 1e-4  # Adam, betas 0.9 and 0.999
    svdd_weight: float = 1e-3  # lambda
    kernel_gain: float = (
        1.0  # of the encoder's kernels as drawn; 1 in the code, whose encoder is nearly constant at first
    )
    colour_noise: float = 0.02  # standard deviation of a shift by patch and channel, in units of [0, 1] pictures
    pixel_noise: float = 0.02  # the same, by pixel and channel


class Sizes(NamedTuple):
    """What large or small patches have, small ones second."""

    large: Any
    small: Any


class PatchSVDDState(NamedTuple):
    """A Patch SVDD, trained or in training."""

    cfg: PatchSVDDConfig
    params: Any
    optimizer: optax.OptState
    mean: Array  # (H, W, C), the mean training picture, taken off every picture
    pictures: Array  # () float32, how many it was made from
    banks: Sizes  # of (N, positions, D): embeddings of each training picture
    filled: Sizes  # of (N, positions) bool, rows that count


def patch_sizes(cfg: PatchSVDDConfig) -> Sizes:
    """Pixels a side."""
    small = 4 * (len(cfg.widths) + 1)
    return Sizes(2 * small, small)


def grid_shapes(cfg: PatchSVDDConfig, size: tuple[int, ...]) -> Sizes:
    """(rows, columns) of the patches that are scored, for pictures of `size` pixels."""
    strides = Sizes(cfg.stride_large, cfg.stride_small)
    return Sizes(*(tuple((n - p) // s + 1 for n in size[:2]) for p, s in zip(patch_sizes(cfg), strides, strict=True)))


# --- networks -----------------------------------------------------------------------------------------------------


def leaky(x: Array) -> Array:
    """Leaky ReLU of slope 0.1."""
    return jax.nn.leaky_relu(x, 0.1)


def layers(cfg: PatchSVDDConfig) -> Layers:
    """The encoder of small patches: 3x3 convolutions without padding, the first of stride 2; tanh at the end."""
    hidden = (Conv(width, 3, 1 if i else 2, activation=leaky) for i, width in enumerate(cfg.widths))
    return (*hidden, Conv(cfg.features, 3, 1 if cfg.widths else 2, activation=jnp.tanh))


class Linear(nn.Module):
    """A product and a bias, drawn from U(+-1/sqrt(inputs)), torch's default."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bound = draw.uniform(1 / math.sqrt(x.shape[-1]))
        kernel = self.param("kernel", bound, (x.shape[-1], self.features))
        bias = self.param("bias", bound, (self.features,))
        return x @ kernel.astype(x.dtype) + bias.astype(x.dtype)


class Encoder(nn.Module):
    """Embeds patches, cut out or all those of whole pictures."""

    cfg: PatchSVDDConfig

    def setup(self):
        cfg = self.cfg
        self.small = PatchNetwork(layers(cfg), patch_sizes(cfg).small, impl=cfg.conv_impl)
        self.large = (Linear(cfg.hidden), Linear(cfg.features))

    def join(self, quarters: Array) -> Array:
        """Embeddings of large patches from those of their quarters, (..., 4 D): upper left, upper right, lower ones."""
        first, second = self.large
        return jnp.tanh(second(leaky(first(quarters))))

    def crops(self, large: Array, small: Array) -> Sizes:
        """Embeds patches cut out, as many of each size: large (m, 2p, 2p, C), small (m, p, p, C) -> (m, D) of each."""
        count, patch, channels = small.shape[0], small.shape[1], small.shape[-1]
        quarters = large.reshape(count, 2, patch, 2, patch, channels).swapaxes(2, 3).reshape(count, 4, *small.shape[1:])
        # Side by side along an axis of their own, so that devices which share the patches keep theirs.
        together = jnp.concatenate([quarters, small[:, None]], axis=1).reshape(-1, *small.shape[1:])
        # A stride of a whole patch: the network is applied as it is described, its own strides taken.
        embedded = self.small(together.astype(self.cfg.dtype), out_stride=patch).reshape(count, 5, -1)
        whole = self.join(embedded[:, :4].reshape(count, -1))
        return Sizes(whole.astype(jnp.float32), embedded[:, 4].astype(jnp.float32))

    def dense(self, images: Array) -> Sizes:
        """Embeds every patch that is scored: images (B, H, W, C) -> (B, h, w, D) of each size."""
        cfg, patch = self.cfg, patch_sizes(self.cfg).small
        small = self.small(images.astype(cfg.dtype), out_stride=cfg.stride_small)
        rows, columns = grid_shapes(cfg, images.shape[1:3]).large
        apart, every = patch // cfg.stride_small, cfg.stride_large // cfg.stride_small
        quarters = [
            small[:, a : a + (rows - 1) * every + 1 : every, b : b + (columns - 1) * every + 1 : every]
            for a in (0, apart)
            for b in (0, apart)
        ]
        large = self.join(jnp.concatenate(quarters, axis=-1))
        return Sizes(large.astype(jnp.float32), small.astype(jnp.float32))


class Classifier(nn.Module):
    """Differences of embeddings (B, D) -> logits of the eight directions, (B, 8).

    The last layer's columns have unit length over the eight outputs. In the official code no gradient reaches them,
    since the division happens outside its record: a fixed random projection, of which the bias alone is trained.
    """

    cfg: PatchSVDDConfig

    @nn.compact
    def __call__(self, difference: Array) -> Array:
        hidden = leaky(Linear(self.cfg.hidden)(difference))
        hidden = leaky(Linear(self.cfg.hidden)(hidden))
        bound = draw.uniform(1 / math.sqrt(self.cfg.hidden))
        kernel = self.param("kernel", bound, (self.cfg.hidden, len(DIRECTIONS)))
        bias = self.param("bias", bound, (len(DIRECTIONS),))
        return hidden @ unit_columns(kernel if self.cfg.train_last else lax.stop_gradient(kernel)) + bias


def unit_columns(kernel: Array) -> Array:
    """A kernel (inputs, outputs) whose weights from each input have unit length over the outputs."""
    return kernel / jnp.sqrt(jnp.sum(kernel**2, axis=1, keepdims=True))


class Network(nn.Module):
    """All that is trained."""

    cfg: PatchSVDDConfig

    def setup(self):
        self.encoder = Encoder(self.cfg)
        self.classifiers = Sizes(Classifier(self.cfg), Classifier(self.cfg))

    def __call__(self, large: Array, small: Array) -> tuple[Sizes, Sizes]:
        """Embeddings of the patches, and the logits of differences of pairs that follow one another; for `init`."""
        embedded = self.encoder.crops(large, small)
        return embedded, Sizes(*(c(e[:1] - e[1:2]) for c, e in zip(self.classifiers, embedded, strict=True)))

    def embed(self, large: Array, small: Array) -> Sizes:
        """See `Encoder.crops`."""
        return self.encoder.crops(large, small)

    def dense(self, images: Array) -> Sizes:
        """See `Encoder.dense`."""
        return self.encoder.dense(images)

    def classify(self, differences: Sizes) -> Sizes:
        """Logits (B, 8) of differences (B, D), for each size."""
        return Sizes(*(c(d) for c, d in zip(self.classifiers, differences, strict=True)))


# --- where patches are taken --------------------------------------------------------------------------------------


def below(uniform: Array, count: Array | int) -> Array:
    """Whole numbers in [0, count) from numbers in [0, 1)."""
    return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)


def position_pairs(uniform: Array, *, size: tuple[int, int], patch: int, boundary: str) -> tuple[Array, Array, Array]:
    """Patches and their partners in one of eight directions, three quarters of a patch to nearly a whole one away.

    Args:
      uniform: (B, 5) in [0, 1): direction, distance by row and column, place by row and column.
      size: (H, W) of the pictures.
      patch: pixels a side.
      boundary: "clip" moves a partner beyond the border onto it; "reject" draws a first patch whose partner fits.

    Returns:
      (corners (B, 2) int32, corners of partners (B, 2), directions (B,) in [0, 8)).
    """
    label = below(uniform[:, 0], len(DIRECTIONS))
    away = 3 * patch // 4 + below(uniform[:, 1:3], max(patch // 4, 1))
    offset = jnp.asarray(DIRECTIONS, jnp.int32)[label] * away
    last = jnp.asarray(size, jnp.int32) - patch
    if boundary == "clip":
        first = below(uniform[:, 3:5], last + 1)
        return first, jnp.clip(first + offset, 0, last), label
    least = jnp.maximum(-offset, 0)
    first = least + below(uniform[:, 3:5], jnp.minimum(last, last - offset) - least + 1)
    return first, first + offset, label


def near_pairs(uniform: Array, *, size: tuple[int, int], patch: int) -> tuple[Array, Array]:
    """Patches and others up to a 32nd of a patch away (at least a pixel), never the same unless the border makes it so.

    Args:
      uniform: (B, 3) in [0, 1): place by row and column, offset.
      size: (H, W) of the pictures.
      patch: pixels a side.

    Returns:
      (corners (B, 2) int32, corners of the others (B, 2)).
    """
    reach = max(patch // 32, 1)
    side = 2 * reach + 1
    last = jnp.asarray(size, jnp.int32) - patch
    first = below(uniform[:, :2], last + 1)
    number = below(uniform[:, 2], side * side - 1)
    number = number + (number >= side * side // 2)  # past the middle, which is no offset
    jitter = jnp.stack([number // side, number % side], axis=1) - reach
    return first, jnp.clip(first + jitter, 0, last)


class Pairs(NamedTuple):
    """Patches of one size from B pictures, four of each: a position pair, then a near pair."""

    patches: Array  # (B, 4, p, p, C)
    label: Array  # (B,) direction of the position pair


def sample(key: Array, cfg: PatchSVDDConfig, images: Array) -> Sizes:
    """Draws the pairs of a training step; patches of position pairs get noise, each its own.

    Args:
      key: a PRNG key.
      cfg: the config.
      images: (B, H, W, C), the mean picture taken off.

    Returns:
      `Pairs` of each size.
    """
    batch, height, width, channels = images.shape
    patches = patch_sizes(cfg)
    places, colours = 8, 2 * channels
    counts = [places + colours + 2 * p * p * channels for p in patches]
    # All at once, for every shape compiles by itself; by rows, so that devices which share the batch draw their own.
    bits = jax.random.bits(key, (batch, sum(counts)), jnp.uint32)
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    found = []
    for patch, mine in zip(patches, jnp.split(uniform, [counts[0]], axis=1), strict=True):
        where = {"size": (height, width), "patch": patch}
        *position, label = position_pairs(mine[:, :5], boundary=cfg.boundary, **where)
        corners = jnp.stack([*position, *near_pairs(mine[:, 5:places], **where)], axis=1)
        noise = math.sqrt(2) * lax.erf_inv(2 * mine[:, places:] - 1)
        shift = cfg.colour_noise * noise[:, :colours].reshape(batch, 2, 1, 1, channels)
        grain = cfg.pixel_noise * noise[:, colours:].reshape(batch, 2, patch, patch, channels)
        cut = cut_patches(images, corners, patch=patch)
        found.append(Pairs(jnp.concatenate([cut[:, :2] + shift + grain, cut[:, 2:]], axis=1), label))
    return Sizes(*found)


# --- training -----------------------------------------------------------------------------------------------------


_CHOICES = {
    "boundary": ("clip", "reject"),
    "fusion": ("product", "sum", "large", "small"),
    "precision": PRECISIONS,
    "dtype": ("float32", "bfloat16"),
}


def check(cfg: PatchSVDDConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, strides that do not divide, pictures too small, a share or a number of neighbours out
        of range, weights that cannot be read or are of another network.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"patch_svdd: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    large, small = patch_sizes(cfg)
    if min(cfg.stride_small, cfg.stride_large) < 1 or (
        small % cfg.stride_small or large % cfg.stride_large or cfg.stride_large % cfg.stride_small
    ):
        raise ValueError(
            f"patch_svdd: stride_small={cfg.stride_small}, stride_large={cfg.stride_large}; expected the first to "
            f"divide {small} and the second, and the second to divide {large}, the sizes of patches. "
            f"Pass --set stride_small={small // 8} --set stride_large={large // 4}."
        )
    least = large if cfg.boundary == "clip" else 2 * large - 1
    if len(spec.image) != 3 or min(spec.image[:2]) < least:
        raise ValueError(
            f"patch_svdd: pictures of {'x'.join(map(str, spec.image))}; expected (H, W, C) of at least {least} pixels "
            f"a side, for patches of {large} and boundary={cfg.boundary!r}. Pass --image-size {max(256, least)}."
        )
    if not 0 < cfg.coreset <= 1 or cfg.neighbours < 1 or cfg.steps < 0:
        raise ValueError(
            f"patch_svdd: coreset={cfg.coreset}, neighbours={cfg.neighbours}, steps={cfg.steps}; expected a share in "
            "(0, 1], at least 1, and at least 0. Pass --set coreset=1 --set neighbours=1."
        )
    if cfg.encoder_weights:
        read_encoder(cfg.encoder_weights, cfg, channels=spec.image[-1])


def init(key: Array, cfg: PatchSVDDConfig, spec: Spec) -> PatchSVDDState:
    """The untrained detector, its banks empty; distributions are those of the official code's framework."""
    channels = spec.image[-1]
    dummies = (jnp.zeros((2, patch, patch, channels)) for patch in patch_sizes(cfg))
    params = draw.init_flat(key, Network(cfg), *dummies)["params"]
    encoder = jax.tree_util.tree_map_with_path(
        lambda path, leaf: cfg.kernel_gain * leaf if path[-1].key == "kernel" else leaf, params["encoder"]
    )
    params = {**params, "encoder": encoder}
    positions = Sizes(*(math.prod(shape) for shape in grid_shapes(cfg, spec.image)))
    capacity = spec.sizes.get("train", 0)
    return PatchSVDDState(
        cfg=cfg,
        params=params,
        optimizer=optax.scale_by_adam().init(params),
        mean=jnp.zeros(spec.image),
        pictures=jnp.zeros(()),
        banks=Sizes(*(jnp.zeros((capacity, n, cfg.features)) for n in positions)),
        filled=Sizes(*(jnp.zeros((capacity, n), bool) for n in positions)),
    )


def mean_step(key: Array, state: PatchSVDDState, batch: Batch):
    """Folds a batch into the mean picture; metric: its mean."""
    del key
    weight = batch.valid.astype(jnp.float32)
    pictures = state.pictures + weight.sum()
    change = jnp.einsum("b,bhwc->hwc", weight, batch.image - state.mean) / jnp.maximum(pictures, 1.0)
    mean = state.mean + change
    return state._replace(mean=mean, pictures=pictures), {"brightness": mean.mean()}


def safe_norm(x: Array) -> Array:
    """Euclidean length along the last axis; at 0 its gradient is 0, as torch's, where jnp.linalg.norm's is NaN."""
    squares = jnp.sum(x * x, axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def loss(params: Any, cfg: PatchSVDDConfig, pairs: Sizes):
    """Cross-entropy of directions plus `svdd_weight` times the distance of near pairs, summed over both sizes.

    Args:
      params: of the `Network`.
      cfg: the config.
      pairs: `Pairs` of each size.

    Returns:
      (loss, metrics).
    """
    network, batch = Network(cfg), pairs.small.label.shape[0]
    flat = (p.patches.reshape(-1, *p.patches.shape[2:]) for p in pairs)
    embedded: Any = network.apply({"params": params}, *flat, method=Network.embed)
    fours = Sizes(*(e.reshape(batch, 4, -1) for e in embedded))
    differences = Sizes(*(e[:, 0] - e[:, 1] for e in fours))
    logits: Any = network.apply({"params": params}, differences, method=Network.classify)
    metrics, total = {}, jnp.zeros(())
    for name, of, pair, four in zip(Sizes._fields, logits, pairs, fours, strict=True):
        position = optax.softmax_cross_entropy_with_integer_labels(of, pair.label).mean()
        svdd = safe_norm(four[:, 2] - four[:, 3]).mean()
        total = total + position + cfg.svdd_weight * svdd
        metrics[f"position_{name}"], metrics[f"svdd_{name}"] = position, svdd
        metrics[f"spread_{name}"] = spread_of(four[:, 2], jnp.ones(batch))
    return total, {"loss": total, **metrics}


def spread_of(vectors: Array, weight: Array) -> Array:
    """Mean over dimensions of the standard deviation of vectors (n, D) weighed by (n,): near 0 after a collapse."""
    share = weight / jnp.maximum(weight.sum(), 1.0)
    mean = share @ vectors
    return jnp.mean(jnp.sqrt(share @ (vectors - mean) ** 2))


def train_step(key: Array, state: PatchSVDDState, batch: Batch):
    """One step of Adam on encoder and classifiers; every picture gives four pairs of patches."""
    cfg = state.cfg
    pairs = sample(key, cfg, batch.image - state.mean)
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, cfg, pairs)
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer)
    params = jax.tree.map(lambda p, u: p - cfg.learning_rate * u, state.params, updates)
    return state._replace(params=params, optimizer=optimizer), metrics


def embed(state: PatchSVDDState, images: Array) -> Sizes:
    """Embeddings of every patch that is scored: images (B, H, W, C) in [0, 1] -> (B, positions, D) of each size."""
    found: Any = Network(state.cfg).apply({"params": state.params}, images - state.mean, method=Network.dense)
    return Sizes(*(e.reshape(e.shape[0], e.shape[1] * e.shape[2], -1) for e in found))


def bank_step(key: Array, state: PatchSVDDState, batch: Batch):
    """Writes the embeddings of a batch of pictures to the banks.

    Metrics: the spread of embeddings over the batch's positions, and whether it is that of a collapse.
    """
    del key
    embedded = embed(state, batch.image)
    banks = Sizes(*(write(b, e, batch.index, batch.valid) for b, e in zip(state.banks, embedded, strict=True)))
    places = jnp.where(batch.valid, batch.index, state.filled.small.shape[0])
    filled = Sizes(*(f.at[places].set(True, mode="drop") for f in state.filled))
    weight = batch.valid.astype(jnp.float32)
    spreads = {}
    for name, e in zip(Sizes._fields, embedded, strict=True):
        spreads[f"spread_{name}"] = spread_of(e.reshape(-1, e.shape[-1]), jnp.repeat(weight, e.shape[1]))
    collapsed = jnp.minimum(*spreads.values()) < COLLAPSED
    return state._replace(banks=banks, filled=filled), {**spreads, "collapsed": collapsed.astype(jnp.float32)}


def kept_rows(cfg: PatchSVDDConfig, rows: int) -> int:
    """Rows of a bank of `rows` that are searched."""
    return max(1, math.ceil(cfg.coreset * rows))


def thin_banks(key: Array, state: PatchSVDDState) -> PatchSVDDState:
    """Moves the rows that k-centre selection keeps to the front of the banks."""
    del key
    banks, filled = [], []
    for bank, full in zip(state.banks, state.filled, strict=True):
        rows, valid = bank.reshape(-1, bank.shape[-1]), full.reshape(-1)
        count = kept_rows(state.cfg, rows.shape[0])
        chosen = k_centre(rows, count=count, valid=valid)
        banks.append(rows.at[:count].set(rows[chosen]).reshape(bank.shape))
        filled.append(valid.at[:count].set(valid[chosen]).reshape(full.shape))
    return state._replace(banks=Sizes(*banks), filled=Sizes(*filled))


def phases(cfg: PatchSVDDConfig) -> tuple[Phase, ...]:
    found = [Phase("mean", mean_step)]
    if cfg.encoder_weights:
        found.append(Phase("weights", import_step, steps=1, batch_size=1))
    if cfg.steps:
        found.append(Phase("encoder", train_step, steps=cfg.steps, batch_size=cfg.batch_size))
    bank = Phase("bank", bank_step, batch_size=8)
    found.append(bank if cfg.coreset == 1 else bank._replace(finish=thin_banks))
    return tuple(found)


# --- weights of the official code ---------------------------------------------------------------------------------


def read_encoder(path: str, cfg: PatchSVDDConfig, *, channels: int = 3) -> dict[str, Any]:
    """The encoder's parameters from a file with the official code's names.

    Args:
      path: an npz, safetensors or torch file with `enc.conv1.weight` and so on, kernels (out, in, height, width).
      cfg: says which shapes are expected.
      channels: C of the pictures.

    Returns:
      A tree like `params["encoder"]`, of NumPy arrays.

    Raises:
      importers.WeightsError: a file that cannot be read, or weights of another network.
    """
    arrays, small, inputs = importers.read(path), {}, channels
    for number, layer in enumerate(layers(cfg), start=1):
        name, outputs = f"enc.conv{number}", layer.features if isinstance(layer, Conv) else inputs
        kernel = importers.take(arrays, f"{name}.weight", (outputs, inputs, 3, 3), origin=path)
        bias = importers.take(arrays, f"{name}.bias", (outputs,), origin=path)
        small[f"conv{number}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
        inputs = outputs
    shapes = {"conv1": (cfg.hidden, cfg.features, 2, 2), "conv2": (cfg.features, cfg.hidden, 1, 1)}
    large = []
    for name, shape in shapes.items():
        kernel = importers.take(arrays, f"{name}.weight", shape, origin=path)
        bias = importers.take(arrays, f"{name}.bias", shape[:1], origin=path)
        large.append({"kernel": kernel.transpose(2, 3, 1, 0).reshape(-1, shape[0]), "bias": bias})
    return {"small": small, "large_0": large[0], "large_1": large[1]}


def with_encoder(params: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    """The network's parameters with those of another encoder."""
    return {**params, "encoder": jax.tree.map(lambda new: jnp.asarray(np.asarray(new, np.float32)), dict(encoder))}


def import_step(key: Array, state: PatchSVDDState, batch: Batch):
    """Takes the encoder's parameters from the file that the config names, read while this is traced."""
    del key
    encoder = read_encoder(state.cfg.encoder_weights, state.cfg, channels=batch.image.shape[-1])
    return state._replace(params=with_encoder(state.params, encoder)), {}


# --- scoring ------------------------------------------------------------------------------------------------------


def distances(state: PatchSVDDState, images: Array) -> Sizes:
    """Distance of every patch to its nearest row of the bank, or the mean to more of them: (B, h, w) of each size."""
    cfg, found = state.cfg, []
    shapes = grid_shapes(cfg, images.shape[1:3])
    for embedded, bank, filled, shape in zip(embed(state, images), state.banks, state.filled, shapes, strict=True):
        rows, valid = bank.reshape(-1, bank.shape[-1]), filled.reshape(-1)
        valid = valid | ~valid.any()  # before training: the zeros that stand there
        count = kept_rows(cfg, rows.shape[0])
        neighbours = nearest(
            embedded.reshape(-1, embedded.shape[-1]),
            rows[:count],
            k=cfg.neighbours,
            valid=valid[:count],
            precision=cfg.precision,
            approximate=cfg.approximate,
        )
        found.append(neighbours.distance.mean(axis=1).reshape(-1, *shape))
    return Sizes(*found)


def fuse(cfg: PatchSVDDConfig, found: Sizes, size: tuple[int, int]) -> Array:
    """Distances as one map (B, ceil(H / stride_small), ceil(W / stride_small)); what lies between repeats it."""
    if cfg.fusion in Sizes._fields:
        found = Sizes(*(x if name == cfg.fusion else None for name, x in zip(Sizes._fields, found, strict=True)))
    settings = zip(found, patch_sizes(cfg), (cfg.stride_large, cfg.stride_small), strict=True)
    maps = [
        spread(x, size=size, patch=patch, stride=stride, every=cfg.stride_small)
        for x, patch, stride in settings
        if x is not None
    ]
    return math.prod(maps[1:], start=maps[0]) if cfg.fusion == "product" else sum(maps[1:], start=maps[0])


def score(state: PatchSVDDState, images: Array) -> Scores:
    """Distances of patches to the bank, spread over the picture. Of an empty bank: the lengths of embeddings.

    Args:
      state: the detector.
      images: (B, H, W, C) in [0, 1].

    Returns:
      Scores; the image score is the map's maximum.
    """
    height, width = images.shape[1:3]
    coarse = fuse(state.cfg, distances(state, images), (height, width))
    fine = jnp.repeat(jnp.repeat(coarse, state.cfg.stride_small, axis=1), state.cfg.stride_small, axis=2)
    return Scores(image=coarse.max(axis=(1, 2)), map=fine[:, :height, :width])


PRESETS = {
    "mvtec": Preset(
        "256x256, the official network and its schedule for bottle (299 epochs of 327 steps)",
        data={"image_size": 256, "channels": 3},
    ),
    "cpu": Preset(
        "256x256 at half the width, every other small patch, some ten minutes on two cores (ours)",
        config={
            "widths": (16, 32, 64, 64, 32, 32, 32),
            "stride_small": 8,
            "kernel_gain": 1.6,
            "learning_rate": 4e-4,
            "batch_size": 16,
            "steps": 3000,
        },
        data={"image_size": 256, "channels": 3},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32, patches of 8 and 16, seconds on two cores (ours)",
        config={
            "widths": (16,),
            "features": 16,
            "hidden": 32,
            "stride_large": 4,
            "stride_small": 2,
            "learning_rate": 1e-3,
            "batch_size": 16,
            "steps": 300,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="patch_svdd",
    config=PatchSVDDConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
