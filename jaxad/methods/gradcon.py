"""GradCon: anomaly detection from back-propagated gradients.

Kwon, Prabhushankar, Temel, AlRegib. "Backpropagated Gradient Representations for Anomaly Detection". ECCV 2020, LNCS
12366, 206-226. https://arxiv.org/abs/2007.09507

An autoencoder is trained on normal pictures; besides rebuilding them it learns that the gradients of its decoder's
kernels keep the direction of the average of all earlier training gradients. A test picture's own reconstruction loss is
back-propagated once: the less its gradient agrees with that average, the more unusual the change that the model would
need to represent the picture. Scored: reconstruction error minus beta times the mean cosine over decoder layers.

What is whose:
  * Network, initialisation, optimiser, losses, what is averaged and the score are those of the official code (which has
    no licence: nothing is copied). Its sign is the opposite of ours. It has no code for variational runs, for the
    condition shift, nor any pixel map.
  * Written here from facts about paper and code; the paper's full text was not open to us, so no equation is numbered.
  * Batches are full and cut from an endless shuffled stream; the code has a smaller last batch in every epoch.
  * Model choice (`select`): the code looks at the validation loss of each epoch. Here the run is cut into `validations`
    rounds, and a round's cosine is that of the whole validation gradient instead of a mean over shuffled batches, so
    that it depends on no batch size. Default: the last state, since that choice is dominated by a noisy cosine.
  * Extensions, ours: both pixel maps (`map`), tiles, the network for other picture sizes, cross-entropy, the latent
    loss's scale, decayed averages, the presets `mvtec`, `cpu`, `demo` and `tiny`, and all schedules in them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec, config, static
from jaxad.nn import init as draw
from jaxad.nn.strided import Layer, Pass, StridedAutoencoder, apply_layer, sizes
from jaxad.ops import gradient_cosine
from jaxad.ops.blocks import devices_of_rows, map_blocks
from jaxad.ops.gradient_cosine import gradient_moments, safe_cosine
from jaxad.ops.smooth import gaussian_smooth
from jaxad.ops.space_to_depth import TAPS, patches, unfold_kernel

PAPER_PADDING = ((2, 2, 2, 2), (2, 1, 2, 1))  # of encoder and decoder


@config
class GradConConfig:
    """Settings of GradCon. Fields marked static force a new compilation; the others may be vmapped over."""

    model: str = static("cae")  # "cae" | "vae"
    encoder: tuple[int, ...] = static((32, 32, 64, 64))  # output channels of each layer
    decoder: tuple[int, ...] = static((64, 32, 32))  # the same, without the last, which gives the picture
    geometry: str = static("paper")  # "paper": 4 layers, sides of 16 j - 4 | "halving": any depth, sides of 2^depth j
    recon: str = static("mse")  # "mse" | "bce"
    latent_weight: float = static(1.0)  # of the KL term of the VAE
    grad_layers: str = static("decoder")  # "decoder": transposed convolutions | "all": every layer that a score reaches
    use_bias: bool = static(False)  # whether gradients of biases count
    ref_grad: str = static("total")  # averaged are gradients of the whole loss: "total", or without alignment: "recon"
    cos_eps_mode: str = static("norm")  # "norm" (torch >= 2) | "product" (torch 1)
    select: str = static("last")  # "last" | "val": the best round | "val_every5": rounds 1, 6, 11, ... and the last
    validations: int = static(10)  # rounds of the run, unless select is "last"
    tile: int = static(0)  # side of tiles that are samples of their own; 0: whole pictures
    tile_score: str = static("max")  # of a picture from its tiles: "max" | "mean"
    map: str = static("error")  # "error" | "gradient" | "both": error map - beta * alignment map
    steps: int = static(71_000)
    batch_size: int = static(64)
    dtype: str = static("float32")  # of layers: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "gemm"
    cos_impl: str = static("auto")  # per-sample cosines in scoring: "auto" | "direct" | "ghost" | "vmap" (slow oracle)
    memory_mb: int = static(512)  # of scoring; batches are scored in chunks that stay below it
    learning_rate: float = 1e-3  # Adam, betas 0.9 and 0.999
    gradient_weight: float = 0.03  # alpha
    ref_decay: float = 1.0  # of the average of gradients; 1: all training steps count alike
    score_gradient_weight: float = 0.12  # beta
    score_error_weight: float = 1.0  # of the reconstruction error in the score; 0 scores by gradients alone
    smooth_sigma: float = 4.0  # of the map's Gaussian, in pixels of a picture 256 high


class Choice(NamedTuple):
    """The best round so far, and sums over the validation pass under way."""

    params: Any
    reference: Any
    loss: Array  # () of the round whose state is kept
    lowest: Array  # () over all rounds
    error_sum: Array  # ()
    gradient_sum: Any
    rows: Array  # ()


class GradConState(NamedTuple):
    """A GradCon, trained or in training."""

    cfg: GradConConfig
    params: Any
    optimizer: optax.OptState
    reference_sum: Any  # of training gradients of the tracked weights; only its direction matters in scores
    reference_weight: Array  # () number of gradients in the sum, less what decay took
    choice: Any  # `Choice`; None if select is "last"


# --- the network --------------------------------------------------------------------------------------------------


def layers_of(cfg: GradConConfig, channels: int) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
    """The encoder's and the decoder's layers."""
    paddings = PAPER_PADDING if cfg.geometry == "paper" else ((1,) * len(cfg.encoder), (1,) * (len(cfg.decoder) + 1))
    widths = cfg.encoder, (*cfg.decoder, channels)
    names = ("conv", "conv"), ("deconv", "transposed")
    parts = [
        tuple(Layer(f"{name}_{i}", kind, w, p) for i, (w, p) in enumerate(zip(width, padding, strict=True)))
        for (name, kind), width, padding in zip(names, widths, paddings, strict=True)
    ]
    return parts[0], parts[1]


def tracked_layers(cfg: GradConConfig, channels: int) -> tuple[Layer, ...]:
    """The layers whose gradients are compared. The log variance is not among them: no score's gradient reaches it."""
    encoder, decoder = layers_of(cfg, channels)
    if cfg.grad_layers == "decoder":
        return decoder
    dense = [Layer(name, "dense", 0) for name in ("mean", "code")] if cfg.model == "vae" else []
    return (*encoder, *dense, *decoder)


def network(cfg: GradConConfig, channels: int) -> StridedAutoencoder:
    """The autoencoder of a config."""
    encoder, decoder = layers_of(cfg, channels)
    dtype = None if cfg.dtype == "float32" else jnp.dtype(cfg.dtype)
    return StridedAutoencoder(encoder, decoder, is_variational=cfg.model == "vae", impl=cfg.conv_impl, dtype=dtype)


def forward(cfg: GradConConfig, params: Any, x: Array, **options: Any) -> Pass:
    """The network applied to pictures (B, H, W, C); options as for `StridedAutoencoder`."""
    passed: Any = network(cfg, x.shape[-1]).apply({"params": params}, x, **options)
    return passed


def tracked(cfg: GradConConfig, params: Mapping[str, Any]) -> dict[str, dict[str, Array]]:
    """The weights whose gradients are compared, by layer."""
    channels = params[f"deconv_{len(cfg.decoder)}"]["bias"].shape[0]
    names = ("kernel", "bias") if cfg.use_bias else ("kernel",)
    return {l.name: {name: params[l.name][name] for name in names} for l in tracked_layers(cfg, channels)}


def merge(params: Mapping[str, Any], some: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with some weights replaced."""
    return {name: {**own, **some.get(name, {})} for name, own in params.items()}


def errors(cfg: GradConConfig, logits: Array, x: Array) -> Array:
    """Per-pixel reconstruction error, mean over channels: logits and pictures (B, H, W, C) -> (B, H, W)."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if cfg.recon == "bce":
        return (jax.nn.softplus(logits) - x * logits).mean(axis=-1)
    return ((jax.nn.sigmoid(logits) - x) ** 2).mean(axis=-1)


def latent_loss(cfg: GradConConfig, passed: Pass, pixels: int) -> Array:
    """KL divergence of the latents from N(0, 1), per pixel and channel as the error is, mean over the batch; 0: CAE."""
    if passed.log_variance is None:
        return jnp.zeros(())
    mean, log_variance = passed.mean.astype(jnp.float32), passed.log_variance.astype(jnp.float32)
    divergence = 0.5 * (mean**2 + jnp.exp(log_variance) - 1 - log_variance).sum(axis=-1)
    return cfg.latent_weight * divergence.mean() / pixels


# --- training -----------------------------------------------------------------------------------------------------


def init(key: Array, cfg: GradConConfig, spec: Spec) -> GradConState:
    """The untrained detector."""
    shape = (cfg.tile, cfg.tile, spec.image[-1]) if cfg.tile else spec.image
    params = draw.init_flat(key, network(cfg, spec.image[-1]), jnp.zeros((1, *shape)))["params"]
    reference = jax.tree.map(jnp.zeros_like, tracked(cfg, params))
    zero = jnp.zeros((), jnp.float32)
    far = jnp.full((), jnp.inf, jnp.float32)
    choice = None if cfg.select == "last" else Choice(params, reference, far, far, zero, reference, zero)
    return GradConState(cfg, params, optax.scale_by_adam().init(params), reference, zero, choice)


def batch_cosine(cfg: GradConConfig, gradients: Mapping[str, Any], reference: Mapping[str, Any]) -> Array:
    """Mean over layers of the cosine between a gradient and the reference, each layer's weights as one vector."""
    cosines = []
    for name, own in gradients.items():
        pairs = [(own[weight].ravel(), reference[name][weight].ravel()) for weight in own]
        dot, square, other = (sum(f(g, r) for g, r in pairs) for f in (jnp.dot, _square, lambda g, r: _square(r)))
        cosines.append(safe_cosine(dot, square, other, eps_mode=cfg.cos_eps_mode))
    return jnp.mean(jnp.stack(cosines))


def _square(vector: Array, *_: Array) -> Array:
    return jnp.dot(vector, vector)


def loss(params: Any, reference: Any, is_first: Array, cfg: GradConConfig, x: Array, noise: Array | None):
    """Reconstruction error + latent loss - alpha * mean cosine of its decoder gradients with the reference.

    The gradient inside is taken with respect to the tracked weights alone, so that no encoder is back-propagated
    through twice.

    Args:
      params: of the network.
      reference: sum or mean of earlier gradients of the tracked weights.
      is_first: () whether there are none yet; then the cosine does not count.
      cfg: the config.
      x: (B, H, W, C) in [0, 1].
      noise: (B, L) for the VAE, else None.

    Returns:
      (loss, (gradients of the reconstruction error of the tracked weights, metrics)).
    """

    def rebuild(some):
        passed = forward(cfg, merge(params, some), x, noise=noise)
        return errors(cfg, passed.logits, x).mean(), latent_loss(cfg, passed, math.prod(x.shape[1:]))

    (error, latent), gradients = jax.value_and_grad(rebuild, has_aux=True)(tracked(cfg, params))
    cosine = batch_cosine(cfg, gradients, reference)
    total = error + latent - jnp.where(is_first, 0.0, cfg.gradient_weight) * cosine
    metrics = {"loss": total, "reconstruction": error, "cosine": cosine}
    return total, (gradients, metrics if cfg.model == "cae" else {**metrics, "latent": latent})


def train_step(key: Array, state: GradConState, batch: Batch):
    """One step of Adam; the gradient joins the reference before it."""
    cfg, x = state.cfg, to_tiles(state.cfg, batch.image)
    noise = jax.random.normal(key, (x.shape[0], latents(state.params))) if cfg.model == "vae" else None
    reference = lax.stop_gradient(state.reference_sum)
    is_first = state.reference_weight == 0
    total, (recon, metrics) = jax.grad(loss, has_aux=True)(state.params, reference, is_first, cfg, x, noise)
    added = tracked(cfg, total) if cfg.ref_grad == "total" else recon
    updates, optimizer = optax.scale_by_adam().update(total, state.optimizer)
    state = state._replace(
        params=jax.tree.map(lambda p, u: p - cfg.learning_rate * u, state.params, updates),
        optimizer=optimizer,
        reference_sum=jax.tree.map(lambda s, g: cfg.ref_decay * s + g, state.reference_sum, added),
        reference_weight=cfg.ref_decay * state.reference_weight + 1,
    )
    return state, metrics


def latents(params: Mapping[str, Any]) -> int:
    """Latent numbers of a variational network."""
    return params["mean"]["bias"].shape[0]


def validate_step(key: Array, state: GradConState, batch: Batch):
    """Adds a batch of held-out pictures to the sums from which the round's loss is made."""
    del key
    cfg, x = state.cfg, to_tiles(state.cfg, batch.image)
    weight = jnp.repeat(batch.valid.astype(x.dtype), x.shape[0] // batch.valid.shape[0])

    def rebuild(some):
        passed = forward(cfg, merge(state.params, some), x)
        return (weight * errors(cfg, passed.logits, x).mean(axis=(1, 2))).sum()

    error, gradients = jax.value_and_grad(rebuild)(tracked(cfg, state.params))
    choice = state.choice
    choice = choice._replace(
        error_sum=choice.error_sum + error,
        gradient_sum=jax.tree.map(jnp.add, choice.gradient_sum, gradients),
        rows=choice.rows + weight.sum(),
    )
    return state._replace(choice=choice), {"reconstruction": error / jnp.maximum(weight.sum(), 1)}


def choose_round(key: Array, state: GradConState, *, is_written: bool, is_last: bool) -> GradConState:
    """Ends a round: keeps its state if none was better; at the end of the run the kept state becomes the detector.

    Args:
      key: not used.
      state: after a pass over the held-out pictures.
      is_written: whether this round's state may be kept.
      is_last: whether the run ends here.
    """
    del key
    cfg, choice = state.cfg, state.choice
    cosine = batch_cosine(cfg, choice.gradient_sum, state.reference_sum)
    value = choice.error_sum / jnp.maximum(choice.rows, 1) - cfg.gradient_weight * cosine
    is_kept = (value < choice.lowest) & is_written
    kept = jax.tree.map(
        lambda new, old: jnp.where(is_kept, new, old),
        (state.params, state.reference_sum, value),
        (choice.params, choice.reference, choice.loss),
    )
    zeros = jax.tree.map(jnp.zeros_like, choice.gradient_sum)
    lowest = jnp.minimum(value, choice.lowest)
    nothing = jnp.zeros_like(choice.rows)
    choice = Choice(kept[0], kept[1], kept[2], lowest, error_sum=nothing, gradient_sum=zeros, rows=nothing)
    state = state._replace(choice=choice)
    return state._replace(params=kept[0], reference_sum=kept[1]) if is_last else state


# --- scoring ------------------------------------------------------------------------------------------------------


class Components(NamedTuple):
    """What a score is made of."""

    error: Array  # (B,) reconstruction error
    cosine: Array  # (B, n) of each layer's gradient with the reference
    error_map: Array  # (B, H, W); its mean over pixels is `error`
    alignment_map: Array | None  # (B, H, W), extension; its mean over pixels is the mean cosine of its layers


def backpropagate(state: GradConState, x: Array) -> tuple[Pass, Array, dict[str, Array]]:
    """One pass forward and back for all samples.

    The loss's derivative with respect to the layers' outputs holds each sample's own in its row, since samples do not
    meet. The encoder is not passed backwards unless its layers are tracked.

    Returns:
      (the forward pass, error map (B, H, W), derivative of each sample's error by the output of each tracked layer).
    """
    cfg = state.cfg
    outputs: dict[str, tuple[int, ...]] = {}
    jax.eval_shape(lambda: outputs.update(forward(cfg, state.params, x).shapes))
    shifts = {layer.name: jnp.zeros(outputs[layer.name], x.dtype) for layer in tracked_layers(cfg, x.shape[-1])}

    def total(shifts):
        passed = forward(cfg, state.params, x, shifts=shifts)
        error_map = errors(cfg, passed.logits, x)
        return error_map.mean(axis=(1, 2)).sum(), (passed._replace(shapes={}), error_map)

    deltas, (passed, error_map) = jax.grad(total, has_aux=True)(shifts)
    return passed, error_map, deltas


def factors(layer: Layer, entering: Array, delta: Array) -> tuple[Array, Array]:
    """The matrices (B, T, C) and (B, T, D) whose product is each sample's kernel gradient."""
    size = entering.shape[0]
    if layer.kind == "dense":
        return entering[:, None], delta[:, None]
    narrow, wide = (entering, delta) if layer.kind == "transposed" else (delta, entering)
    columns = patches(wide, padding=layer.padding)
    return narrow.reshape(size, -1, narrow.shape[-1]), columns.reshape(size, -1, columns.shape[-1])


def as_matrix(layer: Layer, kernel: Array) -> Array:
    """A kernel laid out as the product of `factors`: (C, D)."""
    if layer.kind == "dense":
        return kernel
    taps = unfold_kernel(kernel)  # (16, C, O)
    order = (1, 0, 2) if layer.kind == "transposed" else (2, 0, 1)
    taps = taps.transpose(order)
    return taps.reshape(taps.shape[0], -1)


def layer_moments(cfg: GradConConfig, layer: Layer, entering: Array, delta: Array, reference: Mapping[str, Array]):
    """Inner product with the reference (B,) and squared norm (B,) of a layer's per-sample gradient, and the
    reference's squared norm ()."""
    left, right = factors(layer, entering, delta)
    budget = 2**20 * cfg.memory_mb / 4
    positions, narrow = left.shape[1:]
    impl = gradient_cosine.choose(cfg.cos_impl, positions, narrow, right.shape[2], budget=budget)
    dot, square = gradient_moments(left, right, as_matrix(layer, reference["kernel"]), impl=impl)
    if cfg.use_bias:
        bias = delta.reshape(delta.shape[0], -1, delta.shape[-1]).sum(axis=1)
        dot, square = dot + bias @ reference["bias"], square + (bias**2).sum(axis=1)
    return dot, square, sum((leaf**2).sum() for leaf in jax.tree.leaves(reference))


def components(state: GradConState, x: Array, *, with_alignment: bool = False) -> Components:
    """Errors, cosines and maps of samples that are scored as a whole.

    Args:
      state: the detector.
      x: (B, H, W, C) in [0, 1], of the size that the network was made for.
      with_alignment: whether to make the alignment map too.
    """
    cfg = state.cfg
    if cfg.cos_impl == "vmap":
        return _components_by_vmap(state, x)
    passed, error_map, deltas = backpropagate(state, x)
    cosines, maps = [], []
    for layer in tracked_layers(cfg, x.shape[-1]):
        entering, delta, reference = passed.inputs[layer.name], deltas[layer.name], state.reference_sum[layer.name]
        dot, square, other = layer_moments(cfg, layer, entering, delta, reference)
        cosines.append(safe_cosine(dot, square, other, eps_mode=cfg.cos_eps_mode))
        if with_alignment and layer.kind != "dense":
            aligned = alignment(cfg, layer, entering, delta, reference)
            scale = safe_cosine(jnp.ones_like(dot), square, other, eps_mode=cfg.cos_eps_mode)
            maps.append(spread(aligned * scale[:, None, None], x.shape[1:3]))
    alignment_map = jnp.mean(jnp.stack(maps), axis=0) if with_alignment else None
    return Components(error_map.mean(axis=(1, 2)), jnp.stack(cosines, axis=1), error_map, alignment_map)


def alignment(cfg: GradConConfig, layer: Layer, entering: Array, delta: Array, reference: Mapping[str, Array]) -> Array:
    """Where a layer's inner product with the reference comes from: (B, h, w), summing to it over positions."""
    pushed = apply_layer(layer, entering, reference["kernel"].astype(entering.dtype), impl=cfg.conv_impl)
    if cfg.use_bias:
        pushed = pushed + reference["bias"]
    return (pushed * delta).sum(axis=-1)


def spread(maps: Array, size: tuple[int, int]) -> Array:
    """Resizes maps (B, h, w) as if each cell were flat; the mean of the result is the sum over cells."""
    rows, columns = (_overlaps(n, m) for n, m in zip(size, maps.shape[1:], strict=True))
    return maps.shape[1] * maps.shape[2] * jnp.einsum("hi,bij,wj->bhw", rows, maps, columns)


def _overlaps(new: int, old: int) -> Array:
    """(new, old): the share of each new cell that each old one covers."""
    ends, starts = (jnp.arange(new) + 1) / new, jnp.arange(new) / new
    cuts = jnp.arange(old + 1) / old
    shared = jnp.minimum(ends[:, None], cuts[None, 1:]) - jnp.maximum(starts[:, None], cuts[None, :-1])
    return new * jnp.maximum(shared, 0)


def _components_by_vmap(state: GradConState, x: Array) -> Components:
    """The same from the definition, one gradient a sample: slow, for comparison."""
    cfg = state.cfg

    def one(image):
        def rebuild(some):
            passed = forward(cfg, merge(state.params, some), image[None])
            error_map = errors(cfg, passed.logits, image[None])[0]
            return error_map.mean(), error_map

        gradients, error_map = jax.grad(rebuild, has_aux=True)(tracked(cfg, state.params))
        names = [layer.name for layer in tracked_layers(cfg, x.shape[-1])]
        cosines = [batch_cosine(cfg, {name: gradients[name]}, state.reference_sum) for name in names]
        return error_map, jnp.stack(cosines)

    error_map, cosine = jax.vmap(one)(x)
    return Components(error_map.mean(axis=(1, 2)), cosine, error_map, None)


def score(state: GradConState, images: Array) -> Scores:
    """Reconstruction error minus beta times the mean cosine of the picture's own decoder gradients.

    Args:
      state: the detector.
      images: (B, H, W, C) in [0, 1].

    Returns:
      Scores. Of tiled pictures the image score is the tiles' maximum or mean. The map is smoothed.
    """
    cfg = state.cfg
    tiles = to_tiles(cfg, images)
    rows = chunk_size(cfg, tiles.shape[1:]) * devices_of_rows()
    found, maps = map_blocks(lambda x: _score_whole(state, x), tiles, rows=rows)
    per_image = found.reshape(images.shape[0], -1)
    image = per_image.mean(axis=1) if cfg.tile_score == "mean" else per_image.max(axis=1)
    maps = from_tiles(cfg, maps, images.shape[1:3])
    maps = gaussian_smooth(maps, sigma=cfg.smooth_sigma * images.shape[1] / 256)
    return Scores(image.astype(jnp.float32), maps.astype(jnp.float32))


def _score_whole(state: GradConState, x: Array) -> tuple[Array, Array]:
    cfg = state.cfg
    parts = components(state, x, with_alignment=cfg.map != "error")
    image = cfg.score_error_weight * parts.error - cfg.score_gradient_weight * parts.cosine.mean(axis=1)
    if parts.alignment_map is None:
        return image, parts.error_map
    if cfg.map == "gradient":
        return image, -parts.alignment_map
    return image, cfg.score_error_weight * parts.error_map - cfg.score_gradient_weight * parts.alignment_map


def to_tiles(cfg: GradConConfig, images: Array) -> Array:
    """Cuts pictures (B, H, W, C) into tiles (B n, t, t, C), if the config says so."""
    if not cfg.tile:
        return images
    size, height, width, channels = images.shape
    cut = images.reshape(size, height // cfg.tile, cfg.tile, width // cfg.tile, cfg.tile, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(-1, cfg.tile, cfg.tile, channels)


def from_tiles(cfg: GradConConfig, maps: Array, size: tuple[int, ...]) -> Array:
    """Puts the maps of tiles (B n, t, t) together again: (B, H, W)."""
    if not cfg.tile:
        return maps
    rows, columns = (n // cfg.tile for n in size)
    return maps.reshape(-1, rows, columns, cfg.tile, cfg.tile).transpose(0, 1, 3, 2, 4).reshape(-1, *size)


def numbers_per_sample(cfg: GradConConfig, shape: tuple[int, ...]) -> int:
    """About how many numbers scoring holds for each sample (H, W, C) at once: windows both ways, largest gradients."""
    encoder, decoder = layers_of(cfg, shape[-1])
    sides = [sizes(n, encoder, decoder) for n in shape[:2]]
    channels = [shape[-1], *(layer.features for layer in (*encoder, *decoder))]
    windows, gradients = 0, 0
    for i in range(len(channels) - 1):
        small, wide = (i + 1, i) if i < len(encoder) else (i, i + 1)
        windows += sides[0][small] * sides[1][small] * TAPS * channels[wide]
        gradients = max(gradients, TAPS * channels[i] * channels[i + 1])
    return 2 * windows + 2 * gradients


def chunk_size(cfg: GradConConfig, shape: tuple[int, ...]) -> int:
    """Samples (H, W, C) that are scored at a time so that they stay below `memory_mb`."""
    return max(1, 2**18 * cfg.memory_mb // numbers_per_sample(cfg, shape))


# --- what can be chosen -------------------------------------------------------------------------------------------

_CHOICES = {
    "model": ("cae", "vae"),
    "geometry": ("paper", "halving"),
    "recon": ("mse", "bce"),
    "grad_layers": ("decoder", "all"),
    "ref_grad": ("total", "recon"),
    "cos_eps_mode": ("norm", "product"),
    "select": ("last", "val", "val_every5"),
    "tile_score": ("max", "mean"),
    "map": ("error", "gradient", "both"),
    "dtype": ("float32", "bfloat16"),
    "cos_impl": (*gradient_cosine.IMPLS, "vmap"),
}


def check(cfg: GradConConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, clips, layers that do not mirror, sides that the network does not give back, numbers
        out of their range, a map that the oracle does not make.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"gradcon: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    if len(spec.image) != 3:
        raise ValueError(
            f"gradcon: samples have shape {spec.image}; expected pictures (H, W, C), not clips. Leave out --clip."
        )
    _check_layers(cfg)
    _check_size(cfg, spec)
    if cfg.cos_impl == "vmap" and cfg.map != "error":
        raise ValueError(
            f"gradcon: cos_impl='vmap' makes no alignment map, but map={cfg.map!r}; expected map='error' with it. "
            "Pass --set cos_impl=auto."
        )
    if min(cfg.steps, cfg.validations, cfg.memory_mb) < 1 or (cfg.select != "last" and cfg.validations > cfg.steps):
        raise ValueError(
            f"gradcon: steps={cfg.steps}, validations={cfg.validations}, memory_mb={cfg.memory_mb}; expected at least "
            "1 each, and no more validations than steps. Pass --set validations=1."
        )
    if not 0 < float(cfg.ref_decay) <= 1:
        raise ValueError(
            f"gradcon: ref_decay={float(cfg.ref_decay)}; expected 0 < ref_decay <= 1. Pass --set ref_decay=1."
        )


def _check_layers(cfg: GradConConfig) -> None:
    if not cfg.encoder or len(cfg.decoder) != len(cfg.encoder) - 1:
        raise ValueError(
            f"gradcon: decoder={cfg.decoder} has {len(cfg.decoder)} layers; expected {max(len(cfg.encoder) - 1, 0)}, "
            f"one fewer than encoder={cfg.encoder}, since the last layer's channels are the picture's. "
            "Shorten or extend decoder."
        )
    if cfg.geometry == "paper" and len(cfg.encoder) != 4:
        raise ValueError(
            f"gradcon: encoder={cfg.encoder} has {len(cfg.encoder)} layers; expected 4 with geometry='paper'. "
            "Pass --set geometry=halving."
        )


def _check_size(cfg: GradConConfig, spec: Spec) -> None:
    height, width, channels = spec.image
    if cfg.tile < 0 or (cfg.tile and (height % cfg.tile or width % cfg.tile)):
        raise ValueError(
            f"gradcon: tile={cfg.tile} does not divide pictures of {height}x{width}; expected a divisor of both sides, "
            "or 0 for whole pictures. Pass --set tile=0."
        )
    encoder, decoder = layers_of(cfg, channels)
    for side in (cfg.tile, cfg.tile) if cfg.tile else (height, width):
        found = sizes(side, encoder, decoder)
        exact = cfg.geometry == "paper" or side % 2 ** len(encoder) == 0
        if found[-1] != side or min(found) < 1 or not exact:
            step = 16 if cfg.geometry == "paper" else 2 ** len(encoder)
            fitting = max(1, round((side + 4) / 16)) * 16 - 4 if step == 16 and cfg.geometry == "paper" else None
            near = fitting or max(1, round(side / step)) * step
            raise ValueError(
                f"gradcon: sides of {side} do not come back from geometry={cfg.geometry!r}; expected "
                f"{'16 j - 4' if fitting else f'multiples of {step}'}. Pass --image-size {near}"
                f"{' or --set geometry=halving' if fitting else ''}."
            )


def phases(cfg: GradConConfig) -> tuple[Phase, ...]:
    if cfg.select == "last":
        return (Phase("train", train_step, steps=cfg.steps, batch_size=cfg.batch_size),)
    found, rounds = [], cfg.validations
    for i in range(rounds):
        steps = cfg.steps * (i + 1) // rounds - cfg.steps * i // rounds
        is_last = i == rounds - 1
        end = functools.partial(choose_round, is_written=cfg.select == "val" or i % 5 == 0 or is_last, is_last=is_last)
        found.append(Phase(f"train_{i + 1}", train_step, steps=steps, batch_size=cfg.batch_size))
        found.append(Phase(f"validate_{i + 1}", validate_step, "holdout", None, cfg.batch_size, end))
    return tuple(found)


_INDUSTRIAL = {"geometry": "halving", "map": "both"}

PRESETS = {
    "mvtec": Preset(
        "256x256 textures and objects (ours): six halving layers, both parts in the map",
        config={
            **_INDUSTRIAL,
            "encoder": (32, 32, 64, 64, 128, 128),
            "decoder": (128, 64, 64, 32, 32),
            "batch_size": 32,
            "steps": 4000,
        },
        data={"image_size": 256, "channels": 3},
    ),
    "mnist": Preset(
        "28x28x1, one class is normal: the official network and schedule (about 1000 epochs of one digit)",
        config={"steps": 85_000, "select": "val"},
        data={"image_size": 28, "channels": 1},
    ),
    "cifar": Preset(
        "CIFAR-10 at 28x28x3, one class is normal: the official network and schedule (1000 epochs of 4500 pictures)",
        config={"steps": 71_000, "select": "val"},
        data={"image_size": 28, "channels": 3},
    ),
    "cpu": Preset(
        "the official network for 28x28x1 with a schedule of a minute or two on two cores (ours)",
        config={"steps": 600},
        data={"image_size": 28, "channels": 1},
    ),
    "demo": Preset(
        "64x64 for the embedded synthetic pictures, a few minutes on two cores (ours)",
        config={**_INDUSTRIAL, "batch_size": 16, "steps": 600},
        data={"image_size": 64, "channels": 3},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32 in tiles of 8, seconds on two cores (ours); alpha and beta are "
        "small since the error is",
        config={
            **_INDUSTRIAL,
            "encoder": (16, 32),
            "decoder": (16,),
            "tile": 8,
            "batch_size": 16,
            "steps": 400,
            "learning_rate": 3e-3,
            "gradient_weight": 3e-4,
            "score_gradient_weight": 3e-3,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="gradcon",
    config=GradConConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
