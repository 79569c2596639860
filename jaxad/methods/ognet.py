"""OGNet, "Old is Gold": the discriminator of a one-class GAN learns to tell good reconstructions from bad ones.

Zaheer, Lee, Astrid, Lee. "Old is Gold: Redefining the Adversarially Learned One-Class Classifier Training Paradigm".
CVPR 2020. https://arxiv.org/abs/2004.07657

Phase one trains an autoencoder that removes strong noise against a discriminator of real and reconstructed pictures;
the autoencoder of an early step is kept. Such a discriminator is a fickle judge of anomalies. In phase two it alone
learns on: reconstructions of the final autoencoder and pictures are good; reconstructions of the old one are bad, and
so are pseudo anomalies, blends of two of them seen through the final one. Scored: the discriminator's logit of the
reconstruction, of whole pictures (`patch=0`) or of patches. `jaxad.methods.ognet_stability` shows what phase two does
to detectors that stopped at different steps.

What is whose:
  * Networks, losses, noise, rates, weights and lengths are those of the author's code (MIT): a noise of standard
    deviation 0.81, which it obtains by squaring 0.9; the first two convolutions normalised before their ReLU and the
    others after it; `low_weight` on reconstructions of the old autoencoder, although its name there says pseudo.
  * In the code the autoencoder's gradient goes through activations of the old and weights of the new discriminator,
    which newer frameworks refuse. `generator_gradient="pre"` takes both from the old one, in the same forward pass;
    "post" runs the new one, the usual alternation of GANs.
  * The code writes a checkpoint and runs phase two at every step from the fourth epoch on, and prints the results of
    all. Here phase one ends after `steps` and phase two runs once, for 75 updates (the code's counter makes 76).
  * Ours: phase two's reconstructions, which do not depend on the discriminator, are made for `refine_block` updates at
    once, and each is used three times: in its own update, and in the pseudo anomalies of two others
    (`pseudo_pairs="batches"`), where the code draws two further batches; "roll" blends pictures of one batch.
    `pseudo_blend="moved"` shifts, mirrors and turns one of the two by chance, since blends of aligned objects, or
    of patches of one texture, are nearly normal.
  * The paper's large pictures are frames cut to patches of 45 pixels by motion. Random patches in training, a grid of
    them in testing, the map as the mean over patches, `map="recon"` (the absolute error of the reconstruction),
    `image_score="top"` (the mean of the highest hundredth of patches) and `dense` are ours, as is every preset but
    `mnist`. With `dense` the autoencoder sees the picture as a whole, which equals its patches in their middle only.
  * The score is the logit, whose sigmoid is the paper's score: the order is the same, without ties where it saturates.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec, config, static
from jaxad.nn import init as draw
from jaxad.nn.adversarial import Discriminator, Generator
from jaxad.nn.conv import lowering_for
from jaxad.ops.blocks import devices_of_rows, map_blocks
from jaxad.ops.coverage import overlay, spread
from jaxad.ops.patches import cut_grid, cut_patches
from jaxad.ops.smooth import gaussian_smooth

_AT_ONCE = 128 * 45 * 45  # pixels that go through the autoencoder together: its maps take 6 MB for each 45x45 patch


@config
class OGNetConfig:
    """Settings of OGNet. Fields marked static force a new compilation; the others may be vmapped over."""

    widths: tuple[int, ...] = static((64, 128, 256, 512))  # of the autoencoder's encoder, and of the discriminator
    taps: int = static(5)  # of all convolutions; an encoder's layer takes away taps - 1 pixels
    patch: int = static(0)  # pixels a side of the patches that networks see; 0: whole pictures
    stride: int = static(15)  # pixels between patches that are scored
    dense: bool = static(False)  # reconstruct pictures as a whole when scoring, and cut patches out afterwards
    map: str = static("patch")  # "patch": the patches' scores | "recon": the error of reconstructions
    image_score: str = static("max")  # of the patches' scores: "max" | "top", the mean of the highest hundredth
    generator_gradient: str = static("pre")  # through the discriminator before its step, or after it: "pre" | "post"
    pseudo_pairs: str = static("batches")  # blends of pictures of two further batches, or of one: "batches" | "roll"
    pseudo_blend: str = static("plain")  # "plain" | "moved": one of the two is shifted, mirrored, turned by chance
    old_share: float = static(1 / 3)  # of `steps`, after which the old autoencoder is kept: the first of three epochs
    steps: int = static(276)  # of phase one: three epochs of a digit of MNIST
    refine_steps: int = static(75)  # updates of phase two
    refine_block: int = static(25)  # updates whose reconstructions are made at once; divides refine_steps
    batch_size: int = static(64)
    dtype: str = static("float32")  # of convolutions: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "mixed" | "gemm"
    learning_rate: float = 1e-3  # of the autoencoder; Adam, betas 0.9 and 0.999
    discriminator_rate: float = 1e-4  # in phase one
    refine_rate: float = 5e-5  # in phase two
    noise_std: float = 0.81  # added to pictures in [-1, 1], which are then cut to that range
    adversarial_weight: float = 0.5  # f; the squared error weighs 1 - f
    real_weight: float = 0.1  # alpha, of pictures among what is good; reconstructions weigh 1 - alpha
    low_weight: float = 0.001  # beta, of old reconstructions among what is bad; pseudo anomalies weigh 1 - beta
    smooth_sigma: float = 4.0  # of the map's Gaussian, in pixels of a picture 256 high


class Network(NamedTuple):
    """What a trained network consists of."""

    params: Any
    batch_stats: Any


class Optimizers(NamedTuple):
    """Adam's states."""

    generator: optax.OptState
    discriminator: optax.OptState


class OGNetState(NamedTuple):
    """An OGNet, trained or in training."""

    cfg: OGNetConfig
    generator: Network
    old: Network  # the generator as it was at `old_share` of phase one
    discriminator: Network
    optimizer: Optimizers


_CHOICES = {
    "map": ("patch", "recon"),
    "image_score": ("max", "top"),
    "generator_gradient": ("pre", "post"),
    "pseudo_pairs": ("batches", "roll"),
    "pseudo_blend": ("plain", "moved"),
    "dtype": ("float32", "bfloat16"),
}


def check(cfg: OGNetConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, clips, patches that do not fit pictures or networks, lengths that do not fit.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"ognet: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    if len(spec.image) != 3:
        raise ValueError(
            f"ognet: samples of shape {spec.image}; expected pictures (H, W, C). Load the data without clip."
        )
    seen, least = input_size(cfg, spec.image[:2]), (cfg.taps - 1) * len(cfg.widths) + 1
    if min(seen) < least or min(spec.image[:2]) < cfg.patch or not 0 < cfg.stride <= (cfg.patch or cfg.stride):
        raise ValueError(
            f"ognet: pictures of {'x'.join(map(str, spec.image))} with patch={cfg.patch}, stride={cfg.stride}; "
            f"expected patches of at least {least} pixels a side, for {len(cfg.widths)} layers of {cfg.taps} taps, no "
            "larger than the pictures, and a stride of 1 to a patch. "
            f"Pass --set patch=0, or --image-size {max(45, least)}."
        )
    if not 0 < cfg.old_share < 1 or cfg.steps < 2:
        raise ValueError(
            f"ognet: old_share={cfg.old_share}, steps={cfg.steps}; expected a share between 0 and 1 and at least 2 "
            "steps, so that the old autoencoder is an earlier one. Pass --set old_share=0.33 --set steps=276."
        )
    if cfg.refine_block < 1 or cfg.refine_steps % cfg.refine_block:
        raise ValueError(
            f"ognet: refine_steps={cfg.refine_steps}, refine_block={cfg.refine_block}; expected a block of at least 1 "
            f"that divides the steps. Pass --set refine_block={math.gcd(cfg.refine_steps, 25)}."
        )
    if cfg.pseudo_pairs == "batches" and cfg.refine_block < 3:
        raise ValueError(
            f"ognet: pseudo_pairs='batches' with refine_block={cfg.refine_block}; expected a block of at least 3, "
            "since a blend is of two further batches of the block. Pass --set pseudo_pairs=roll, or a larger block."
        )


def input_size(cfg: OGNetConfig, size: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of what networks see of pictures of this size."""
    return (cfg.patch, cfg.patch) if cfg.patch else (size[0], size[1])


# --- networks -----------------------------------------------------------------------------------------------------


def generator_of(cfg: OGNetConfig) -> Generator:
    """The autoencoder."""
    return Generator(cfg.widths, cfg.taps, impl=cfg.conv_impl, dtype=jnp.dtype(cfg.dtype))


def discriminator_of(cfg: OGNetConfig) -> Discriminator:
    """The discriminator; positive logits mean anomalous."""
    return Discriminator(cfg.widths, cfg.taps, impl=cfg.conv_impl, dtype=jnp.dtype(cfg.dtype))


def _learn(module: Any, params: Any, batch_stats: Any, x: Array) -> tuple[Array, Any]:
    """(outputs, new batch_stats) of a network in training."""
    variables = {"params": params, "batch_stats": batch_stats}
    outputs, updated = module.apply(variables, x, train=True, mutable=["batch_stats"])
    return outputs, updated["batch_stats"]


def _infer(module: Any, network: Network, x: Array) -> Array:
    return module.apply(network._asdict(), x, train=False)


def _in_blocks(function: Any, x: Array) -> Any:
    """`function` of the rows of x (N, h, w, C), as many at once as `_AT_ONCE` allows on each device."""
    rows = max(1, _AT_ONCE // math.prod(x.shape[1:3])) * devices_of_rows()
    if not isinstance(x.shape[0], int) or x.shape[0] <= rows:  # open where a score is exported
        return function(x)
    with lowering_for(looped=True):
        return map_blocks(function, x, rows=rows)


def reconstruct(cfg: OGNetConfig, network: Network, x: Array) -> Array:
    """What a trained autoencoder makes of pictures (N, h, w, C) in [-1, 1]; no noise is added."""
    return _in_blocks(lambda some: _infer(generator_of(cfg), network, some), x)


def init(key: Array, cfg: OGNetConfig, spec: Spec) -> OGNetState:
    """The untrained detector; distributions are those of the code's framework."""
    key_generator, key_discriminator = jax.random.split(key)
    x = jnp.zeros((1, *input_size(cfg, spec.image), spec.image[-1]))
    generator = Network(**draw.init_flat(key_generator, generator_of(cfg), x, train=True))
    discriminator = Network(**draw.init_flat(key_discriminator, discriminator_of(cfg), x[:, None], train=True))
    optimizer = Optimizers(*(optax.scale_by_adam().init(net.params) for net in (generator, discriminator)))
    return OGNetState(cfg, generator, jax.tree.map(jnp.copy, generator), discriminator, optimizer)


# --- phase one ----------------------------------------------------------------------------------------------------


def uniform_rows(key: Array, rows: int, count: int) -> Array:
    """Numbers (rows, count) in (0, 1), drawn at once: every shape of random numbers compiles by itself."""
    bits = jax.random.bits(key, (rows * count,), jnp.uint32)
    return (((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-23).reshape(rows, count)


def views(cfg: OGNetConfig, images: Array, uniform: Array) -> Array:
    """What networks see of pictures in training: random patches, or the pictures, in [-1, 1].

    Args:
      cfg: the config.
      images: (B, H, W, C) in [0, 1].
      uniform: (B, 2) in [0, 1), the places of patches.

    Returns:
      (B, h, w, C).
    """
    if cfg.patch:
        room = jnp.asarray(images.shape[1:3], jnp.float32) - cfg.patch + 1
        corners = jnp.minimum((uniform * room).astype(jnp.int32), room.astype(jnp.int32) - 1)
        images = cut_patches(images, corners[:, None], patch=cfg.patch)[:, 0]
    return images * 2 - 1


def add_noise(x: Array, uniform: Array, *, std: Array) -> Array:
    """Pictures (B, h, w, C) plus normal noise of standard deviation `std`, cut to [-1, 1]; uniform (B, h*w*C)."""
    noise = math.sqrt(2) * lax.erf_inv(2 * uniform - 1)
    return jnp.clip(x + std * noise.reshape(x.shape), -1, 1)


def anomalous(logits: Array) -> Array:
    """Mean binary cross-entropy of logits to "anomalous"."""
    return jax.nn.softplus(-logits).mean()


def normal(logits: Array) -> Array:
    """Mean binary cross-entropy of logits to "normal"."""
    return jax.nn.softplus(logits).mean()


def discriminator_loss(logits: Array) -> Array:
    """Phase one: logits (B, 2) of reconstructions, which are to be called anomalous, and of pictures."""
    return 0.5 * (anomalous(logits[:, 0]) + normal(logits[:, 1]))


def generator_loss(rebuilt: Array, logits: Array, x: Array, *, weight: Array) -> Array:
    """Phase one: (1 - f) times the mean squared error plus f times the cross-entropy of being called normal.

    Args:
      rebuilt, x: (B, h, w, C), the reconstruction of what was noisy, and the picture.
      logits: (B, ...) of the reconstructions; of further ones behind them only the first count.
      weight: f.
    """
    return (1 - weight) * jnp.mean((rebuilt - x) ** 2) + weight * normal(logits[:, 0])


def _adam(network: Network, batch_stats: Any, grads: Any, optimizer: Any, rate: Array) -> tuple[Network, Any]:
    updates, optimizer = optax.scale_by_adam().update(grads, optimizer)
    return Network(jax.tree.map(lambda p, u: p - rate * u, network.params, updates), batch_stats), optimizer


def adversarial_step(key: Array, state: OGNetState, batch: Batch):
    """One step of Adam for the discriminator, then one for the autoencoder."""
    cfg, count = state.cfg, batch.image.shape[0]
    seen = input_size(cfg, batch.image.shape[1:3])
    uniform = uniform_rows(key, count, 2 + math.prod(seen) * batch.image.shape[-1])
    x = views(cfg, batch.image, uniform[:, :2])
    noisy = add_noise(x, uniform[:, 2:], std=cfg.noise_std)
    generator, discriminator = generator_of(cfg), discriminator_of(cfg)
    rebuilt, through_generator, generator_stats = jax.vjp(
        lambda params: _learn(generator, params, state.generator.batch_stats, noisy),
        state.generator.params,
        has_aux=True,
    )

    def judge(params, batch_stats, *pictures):
        return _learn(discriminator, params, batch_stats, jnp.stack(pictures, axis=1))

    logits, through_discriminator, stats = jax.vjp(
        lambda params, rebuilt: judge(params, state.discriminator.batch_stats, rebuilt, x),
        state.discriminator.params,
        rebuilt,
        has_aux=True,
    )
    told, slope = jax.value_and_grad(discriminator_loss)(logits)
    judged, judging = _adam(
        state.discriminator,
        stats,
        through_discriminator(slope)[0],
        state.optimizer.discriminator,
        cfg.discriminator_rate,
    )
    if cfg.generator_gradient == "post":
        logits, through_discriminator, stats = jax.vjp(
            lambda params, rebuilt: judge(params, judged.batch_stats, rebuilt), judged.params, rebuilt, has_aux=True
        )
        judged = judged._replace(batch_stats=stats)
    total, slopes = jax.value_and_grad(generator_loss, argnums=(0, 1))(
        rebuilt, logits, x, weight=cfg.adversarial_weight
    )
    grads = through_generator(slopes[0] + through_discriminator(slopes[1])[1])[0]
    made, making = _adam(state.generator, generator_stats, grads, state.optimizer.generator, cfg.learning_rate)
    metrics = {"loss": total, "reconstruction": jnp.mean((rebuilt - x) ** 2), "discriminator": told}
    return state._replace(generator=made, discriminator=judged, optimizer=Optimizers(making, judging)), metrics


def keep_old(key: Array, state: OGNetState) -> OGNetState:
    """Keeps the autoencoder of this step as the old one."""
    del key
    return state._replace(old=jax.tree.map(jnp.copy, state.generator))


def begin_refining(key: Array, state: OGNetState) -> OGNetState:
    """Forgets what Adam knows of the discriminator, which begins to learn something else."""
    del key
    fresh = jax.tree.map(jnp.zeros_like, state.optimizer.discriminator)
    return state._replace(optimizer=state.optimizer._replace(discriminator=fresh))


# --- phase two ----------------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """What the discriminator is shown in phase two, or its logits, of each picture of a batch."""

    high: Any  # reconstruction by the final autoencoder
    real: Any  # the picture
    low: Any  # reconstruction by the old autoencoder
    pseudo: Any  # blend of two old reconstructions, seen through the final autoencoder


def move(pictures: Array, uniform: Array) -> Array:
    """Shifts pictures by up to an eighth of their size, mirrors them, and turns square ones on their side, by chance.

    Args:
      pictures: (N, h, w, C); what comes in at a border repeats it.
      uniform: (N, 5) in [0, 1): shift by rows and columns, mirror rows, mirror columns, swap rows with columns.
    """
    height, width = pictures.shape[1:3]
    reach = np.array([height // 8, width // 8])
    shift = (uniform[:, :2] * (2 * reach + 1)).astype(jnp.int32) - reach
    places = (jnp.clip(jnp.arange(n) + shift[:, i, None], 0, n - 1) for i, n in enumerate((height, width)))
    rows, columns = (
        jnp.where(uniform[:, 2 + i, None] < 0.5, at[:, ::-1], at) for i, at in enumerate(places)
    )  # (N, h) and (N, w)
    pictures = jnp.take_along_axis(pictures, rows[:, :, None, None], axis=1)
    pictures = jnp.take_along_axis(pictures, columns[:, None, :, None], axis=2)
    if height != width:
        return pictures
    # Of a brushed or woven surface a mirrored part looks like any other; turned, it runs across the grain.
    return jnp.where(uniform[:, 4, None, None, None] < 0.5, pictures.swapaxes(1, 2), pictures)


def blend(cfg: OGNetConfig, low: Array, uniform: Array) -> Array:
    """Means of two old reconstructions each.

    Args:
      cfg: the config; `pseudo_pairs` and `pseudo_blend` are read.
      low: (rows, updates, h, w, C), the rows of each update's batch.
      uniform: (rows, updates, 5) in [0, 1), see `move`.

    Returns:
      (rows, updates, h, w, C): of the next two batches, or of the batch itself and its rows moved by one.
    """
    if cfg.pseudo_pairs == "batches" and low.shape[1] > 2:
        first, second = jnp.roll(low, -1, axis=1), jnp.roll(low, -2, axis=1)
    else:
        first, second = low, jnp.roll(low, -1, axis=0)
    if cfg.pseudo_blend == "moved":
        second = move(second.reshape(-1, *low.shape[2:]), uniform.reshape(-1, 5)).reshape(low.shape)
    return (first + second) / 2


def examples(key: Array, state: OGNetState, images: Array) -> Judged:
    """What the discriminator is shown in a block of updates; none of it depends on the discriminator.

    Args:
      key: fixes places of patches and moves.
      state: the detector after phase one.
      images: (B, H, W, C) in [0, 1]; row r is of update r % updates, so that devices share every update's batch.

    Returns:
      Judged of arrays (B / updates, updates, h, w, C), of `refine_block` updates where that divides B.
    """
    cfg, count = state.cfg, images.shape[0]
    updates = math.gcd(count, cfg.refine_block)  # fewer where a batch of another size is given
    uniform = uniform_rows(key, count, 7)
    x = views(cfg, images, uniform[:, :2])

    def by_update(rows):
        return rows.reshape(count // updates, updates, *rows.shape[1:])

    low = reconstruct(cfg, state.old, x)
    mixed = blend(cfg, by_update(low), by_update(uniform[:, 2:])).reshape(x.shape)
    high, pseudo = (reconstruct(cfg, state.generator, given) for given in (x, mixed))
    return Judged(*map(by_update, (high, x, low, pseudo)))


def refine_loss(logits: Judged, cfg: OGNetConfig) -> tuple[Array, dict[str, Array]]:
    """Phase two: cross-entropies of what is good to "normal" and of what is bad to "anomalous".

    Args:
      logits: (B,) each.
      cfg: the config; `real_weight` (alpha) and `low_weight` (beta) are read.

    Returns:
      (loss, metrics).
    """
    good = (1 - cfg.real_weight) * normal(logits.high) + cfg.real_weight * normal(logits.real)
    bad = cfg.low_weight * anomalous(logits.low) + (1 - cfg.low_weight) * anomalous(logits.pseudo)
    return good + bad, {"loss": good + bad, "good": good, "bad": bad}


def refine_step(key: Array, state: OGNetState, batch: Batch):
    """A block of updates of the discriminator; both autoencoders stay as they are. Metrics are the updates' means."""
    cfg = state.cfg
    shown = jnp.stack(examples(key, state, batch.image), axis=2)  # (rows, updates, 4, h, w, C)

    def loss(params, batch_stats, pictures):
        logits, stats = _learn(discriminator_of(cfg), params, batch_stats, pictures)
        total, metrics = refine_loss(Judged(*logits.T), cfg)
        return total, (stats, metrics)

    def update(carry, t):
        network, optimizer = carry
        pictures = lax.dynamic_index_in_dim(shown, t, 1, keepdims=False)
        grads, (stats, metrics) = jax.grad(loss, has_aux=True)(network.params, network.batch_stats, pictures)
        return _adam(network, stats, grads, optimizer, cfg.refine_rate), metrics

    with lowering_for(looped=True):
        (network, optimizer), metrics = lax.scan(
            update, (state.discriminator, state.optimizer.discriminator), jnp.arange(shown.shape[1])
        )
    optimizers = state.optimizer._replace(discriminator=optimizer)
    return state._replace(discriminator=network, optimizer=optimizers), jax.tree.map(jnp.mean, metrics)


def phases(cfg: OGNetConfig) -> tuple[Phase, ...]:
    early = min(max(1, round(cfg.old_share * cfg.steps)), cfg.steps - 1)
    one: dict[str, Any] = {"step": adversarial_step, "batch_size": cfg.batch_size}
    two: dict[str, Any] = {"step": refine_step, "batch_size": cfg.refine_block * cfg.batch_size}
    return (
        Phase("warmup", steps=early, finish=keep_old, **one),
        Phase("adversarial", steps=cfg.steps - early, finish=begin_refining, **one),
        Phase("refine", steps=cfg.refine_steps // cfg.refine_block, **two),
    )


# --- scoring ------------------------------------------------------------------------------------------------------


def judge_pictures(state: OGNetState, x: Array, rebuilt: Array | None = None) -> tuple[Array, Array]:
    """Logits (N,) of pictures or patches (N, h, w, C) in [-1, 1], and the error of their reconstruction (N, h, w)."""
    cfg = state.cfg
    rebuilt = _infer(generator_of(cfg), state.generator, x) if rebuilt is None else rebuilt
    logits = _infer(discriminator_of(cfg), state.discriminator, rebuilt[:, None])[:, 0]
    return logits, abs(x - rebuilt).mean(axis=-1)


def score(state: OGNetState, images: Array) -> Scores:
    """The discriminator's logits of reconstructions.

    Args:
      state: the detector.
      images: (B, H, W, C) in [0, 1].

    Returns:
      Scores. Of whole pictures the map is the score everywhere, of patches the mean over those that cover a pixel,
      smoothed; with map="recon" it is the smoothed absolute error of reconstructions.
    """
    cfg, x = state.cfg, images * 2 - 1
    size = images.shape[1:3]
    if cfg.patch:
        logits, maps = _score_patches(state, x)
    else:
        logits, error = _in_blocks(lambda some: judge_pictures(state, some), x)
        logits = logits[:, None]
        maps = error if cfg.map == "recon" else jnp.broadcast_to(logits[..., None], error.shape)
    maps = gaussian_smooth(maps, sigma=cfg.smooth_sigma * size[0] / 256)
    return Scores(image=_image_score(cfg, logits), map=maps)


def _score_patches(state: OGNetState, x: Array) -> tuple[Array, Array]:
    """Logits (B, P) of the patches of a grid, and maps (B, H, W) before smoothing."""
    cfg, size = state.cfg, (x.shape[1], x.shape[2])
    cut = {"patch": cfg.patch, "stride": cfg.stride}
    patches = cut_grid(x, **cut)
    rows, columns = patches.shape[1:3]
    flat = patches.reshape(-1, *patches.shape[3:])
    if cfg.dense:
        rebuilt = cut_grid(reconstruct(cfg, state.generator, x), **cut).reshape(flat.shape)
        logits, error = judge_pictures(state, flat, rebuilt)
    else:
        logits, error = _in_blocks(lambda some: judge_pictures(state, some), flat)
    if cfg.map == "recon":
        maps = overlay(error.reshape(-1, rows, columns, cfg.patch, cfg.patch), size=size, stride=cfg.stride)
    else:
        maps = spread(logits.reshape(-1, rows, columns), size=size, **cut)
    return logits.reshape(-1, rows * columns), maps


def _image_score(cfg: OGNetConfig, logits: Array) -> Array:
    """Image scores (B,) from logits (B, P) of patches."""
    if cfg.image_score == "max":
        return logits.max(axis=1)
    return lax.top_k(logits, math.ceil(logits.shape[1] / 100))[0].mean(axis=1)


PRESETS = {
    "mvtec": Preset(
        "256x256 textures and objects (ours): random patches of 45 pixels, four epochs of about 20,000",
        config={
            "patch": 45,
            "steps": 1250,
            "old_share": 0.25,
            "refine_block": 5,
            "pseudo_blend": "moved",
        },
        data={"image_size": 256, "channels": 3},
    ),
    "cpu": Preset(
        "the same at an eighth of the width, 128x128, minutes on two cores (ours)",
        config={
            "widths": (8, 16, 32, 64),
            "patch": 45,
            "steps": 300,
            "refine_block": 3,
            "batch_size": 32,
            "pseudo_blend": "moved",
        },
        data={"image_size": 128, "channels": 3},
    ),
    "mnist": Preset(
        "45x45x1, one digit is normal: the author's network and schedule",
        data={"image_size": 45, "channels": 1},
    ),
    "tiny": Preset(
        "for tests and first looks: patches of 8 of 32x32, seconds on two cores; its own rates and noise (ours)",
        config={
            "widths": (8, 16),
            "taps": 3,
            "patch": 8,
            "stride": 1,
            "pseudo_blend": "moved",
            "steps": 300,
            "batch_size": 32,
            "refine_steps": 300,
            "refine_block": 10,
            "learning_rate": 3e-3,
            "discriminator_rate": 1e-3,
            "refine_rate": 1e-3,
            "noise_std": 0.4,
            "low_weight": 0.1,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="ognet",
    config=OGNetConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
