"""MemAE: memory-augmented autoencoder.

Gong, Liu, Le, Saha, Mansour, Venkatesh, van den Hengel. "Memorizing Normality to Detect Anomaly: Memory-augmented Deep
Autoencoder for Unsupervised Anomaly Detection". ICCV 2019. https://arxiv.org/abs/1904.02639

An encoding is used only as a query into N learned memory items; the decoder sees a sparse convex combination of items.
Items are learned on normal pictures by back-propagation, so whatever comes in is rebuilt out of normal prototypes.
Scored: the reconstruction residual.

What is whose:
  * The video network, its initialisation, optimiser and score are those of the official code (MIT, video only). Where
    paper and code differ the code is the default: dot product instead of cosine similarity (`similarity`), absolute
    instead of squared residual on one channel (`score_norm`), threshold 5/N for video (`shrink_threshold`), decoder
    widths 256, 128, 96, 1, mean instead of sum losses.
  * The paper's MNIST and CIFAR networks have no official code: their layers are recalled from the paper, paddings are
    our decision. One memory item stands for a whole flattened encoding there (`query="image"`).
  * The presets `mvtec`, `cpu` and `tiny`, the pixel map and its smoothing are ours; the paper has no MVTec figure.
  * Conv biases before a batch normalisation have no effect; their gradient, zero but for rounding, is cut.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec, config, static
from jaxad.nn import init as draw
from jaxad.nn.autoencoder import Decoder, Encoder, halved_sizes
from jaxad.ops.memory import cosine_weight_bound, read_memory
from jaxad.ops.smooth import gaussian_smooth


@config
class MemAEConfig:
    """Settings of MemAE. Fields marked static force a new compilation; the others may be vmapped over."""

    encoder: tuple[int, ...] = static((96, 128, 256, 256))  # output channels of each layer
    decoder: tuple[int, ...] = static((256, 128, 96))  # the same, without the last, which gives the picture
    time_strides: tuple[int, ...] = static((1, 2, 2, 2))  # of the encoder over time; clips only
    first_kernel: int = static(3)  # taps of the first layer; the paper's MNIST network has 1
    activation: str = static("leaky_relu")  # "leaky_relu" | "relu"
    memory: bool = static(True)  # False: a plain autoencoder of the same layers
    query: str = static("position")  # what one memory item stands for: "position" | "image"
    num_items: int = static(2000)  # N
    similarity: str = static("dot")  # "dot" (code) | "cosine" (paper; needs a temperature or a threshold of 1/N)
    empty_policy: str = static("zero")  # a query above no threshold reads zeros, or its best item: "zero" | "top1"
    score_norm: str = static("l2")  # "l1": root of the channels' squares (code) | "l2": their mean square (paper)
    image_score: str = static("max")  # the map's "max" | "mean"
    score_frame: int = static(8)  # whose map a clip gets; clips only
    flip: bool = static(False)  # random horizontal flips in training
    steps: int = static(2000)
    batch_size: int = static(32)
    dtype: str = static("float32")  # of convolutions: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "gemm"
    read_impl: str = static("fused")  # memory read: "fused" | "naive" | "pallas"
    learning_rate: float = 1e-4  # Adam, betas 0.9 and 0.999
    entropy_weight: float = 2e-4  # alpha
    shrink_threshold: float = 1 / 2000  # lambda; the paper advises 1/N to 3/N, 0 turns shrinkage off
    temperature: float = 1.0  # similarities are divided by it; 1 in paper and code
    smooth_sigma: float = 4.0  # of the map's Gaussian, in pixels of a picture 256 high


class MemAEState(NamedTuple):
    """A MemAE, trained or in training."""

    cfg: MemAEConfig
    params: Any
    batch_stats: Any
    optimizer: optax.OptState


class MemAE(nn.Module):
    """The network: pictures (B, *spatial, C) -> (reconstruction of the same shape, the memory read or None)."""

    cfg: MemAEConfig

    @nn.compact
    def __call__(self, x: Array, *, train: bool):
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        strides = layer_strides(cfg, x.ndim - 2)
        layers: dict[str, Any] = {
            "strides": strides,
            "activation": cfg.activation,
            "impl": cfg.conv_impl,
            "dtype": dtype,
        }
        code = Encoder(cfg.encoder, first_kernel=cfg.first_kernel, name="encoder", **layers)(x, train=train)
        read = None
        if cfg.memory:
            queries = code.reshape((-1, code.shape[-1]) if cfg.query == "position" else (code.shape[0], -1))
            bound = queries.shape[-1] ** -0.5
            items = self.param("memory", draw.uniform(bound), (cfg.num_items, queries.shape[-1]))
            read = read_memory(
                queries,
                items,
                threshold=cfg.shrink_threshold,
                similarity=cfg.similarity,
                temperature=cfg.temperature,
                empty_policy=cfg.empty_policy,
                impl=cfg.read_impl,
            )
            code = read.value.reshape(code.shape).astype(dtype)
        sizes = halved_sizes(x.shape[1:-1], strides)
        features = (*cfg.decoder, x.shape[-1])
        return Decoder(features, sizes=sizes, name="decoder", **layers)(code, train=train), read


def layer_strides(cfg: MemAEConfig, rank: int) -> list[tuple[int, ...]]:
    """Strides of the encoder's layers: 2 over space, `time_strides` over time."""
    if rank == 2:
        return [(2, 2)] * len(cfg.encoder)
    return [(t, 2, 2) for t in cfg.time_strides]


def scale(images: Array) -> Array:
    """[0, 1] to the [-1, 1] in which the network works."""
    return images * 2 - 1


def check(cfg: MemAEConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, layers that do not mirror, clips and time strides that do not fit, a threshold that
        no weight can exceed.
    """
    for field, allowed in (
        ("query", ("position", "image")),
        ("similarity", ("dot", "cosine")),
        ("empty_policy", ("zero", "top1")),
        ("score_norm", ("l1", "l2")),
        ("image_score", ("max", "mean")),
        ("dtype", ("float32", "bfloat16")),
    ):
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"memae: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    if len(cfg.decoder) != len(cfg.encoder) - 1:
        raise ValueError(
            f"memae: decoder={cfg.decoder} has {len(cfg.decoder)} layers; expected {len(cfg.encoder) - 1}, one fewer "
            f"than encoder={cfg.encoder}, since the last layer's channels are the picture's. Shorten or extend decoder."
        )
    if len(spec.image) == 4:
        _check_clips(cfg, spec)
    _check_threshold(cfg)


def _check_clips(cfg: MemAEConfig, spec: Spec) -> None:
    if len(cfg.time_strides) != len(cfg.encoder):
        raise ValueError(
            f"memae: time_strides={cfg.time_strides} needs one entry per layer of encoder={cfg.encoder}. "
            f"Pass {len(cfg.encoder)} strides."
        )
    if not 0 <= cfg.score_frame < spec.image[0]:
        raise ValueError(
            f"memae: score_frame={cfg.score_frame} lies outside the clip of {spec.image[0]} frames; expected 0 to "
            f"{spec.image[0] - 1}. Pass --set score_frame={spec.image[0] // 2}."
        )


def _check_threshold(cfg: MemAEConfig) -> None:
    threshold, temperature = float(cfg.shrink_threshold), float(cfg.temperature)
    if not 0 <= threshold < 1 or temperature <= 0:
        raise ValueError(
            f"memae: shrink_threshold={threshold} and temperature={temperature}; expected 0 <= shrink_threshold < 1 "
            f"and temperature > 0. Pass --set shrink_threshold={1 / cfg.num_items:.3g} --set temperature=1."
        )
    if not cfg.memory or cfg.similarity == "dot":
        return
    top = cosine_weight_bound(cfg.num_items, temperature=temperature)
    if threshold >= top:
        raise ValueError(
            f"memae: with similarity='cosine', num_items={cfg.num_items} and temperature={temperature} no weight "
            f"exceeds {top:.3g}, so shrink_threshold={threshold:.3g} leaves every query empty; expected less. "
            f"Pass --set shrink_threshold={1 / cfg.num_items:.3g} or --set temperature=0.1."
        )


def init(key: Array, cfg: MemAEConfig, spec: Spec) -> MemAEState:
    """The untrained detector. Distributions are the official code's."""
    variables = draw.init_flat(key, MemAE(cfg), jnp.zeros((1, *spec.image)), train=True)
    return MemAEState(
        cfg=cfg,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        optimizer=optax.scale_by_adam().init(variables["params"]),
    )


def loss(params: Any, batch_stats: Any, cfg: MemAEConfig, images: Array):
    """Mean squared reconstruction error plus `entropy_weight` times the mean entropy of addressing.

    Args:
      params, batch_stats: of the network.
      images: (B, H, W, C) or (B, T, H, W, C) in [0, 1].

    Returns:
      (loss, (new batch_stats, metrics)).
    """
    x = scale(images)
    variables = {"params": params, "batch_stats": batch_stats}
    (rebuilt, read), updated = MemAE(cfg).apply(variables, x, train=True, mutable=["batch_stats"])
    reconstruction = jnp.mean((rebuilt - x) ** 2)
    if read is None:
        return reconstruction, (updated["batch_stats"], {"loss": reconstruction, "reconstruction": reconstruction})
    entropy = read.entropy.mean()
    total = reconstruction + cfg.entropy_weight * entropy
    metrics = {
        "loss": total,
        "reconstruction": reconstruction,
        "entropy": entropy,
        "frac_empty": jnp.mean(read.num_active == 0),
        "mean_active": jnp.mean(read.num_active.astype(jnp.float32)),
        "slots_used": jnp.sum(read.usage > 0).astype(jnp.float32),
    }
    return total, (updated["batch_stats"], metrics)


def train_step(key: Array, state: MemAEState, batch: Batch):
    """One step of Adam on encoder, decoder and memory."""
    cfg, images = state.cfg, batch.image
    if cfg.flip:
        flipped = jax.random.bernoulli(key, shape=(images.shape[0],) + (1,) * (images.ndim - 1))
        images = jnp.where(flipped, images[..., ::-1, :], images)
    grads, (batch_stats, metrics) = jax.grad(loss, has_aux=True)(state.params, state.batch_stats, cfg, images)
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer)
    params = jax.tree.map(lambda p, u: p - cfg.learning_rate * u, state.params, updates)
    return MemAEState(cfg, params, batch_stats, optimizer), metrics


def residual(rebuilt: Array, x: Array, *, norm: str) -> Array:
    """Per-pixel error over the last axis: "l1" the root of the sum of squares (official code), "l2" the mean square."""
    squares = (rebuilt - x) ** 2
    if norm == "l1":
        return jnp.sqrt(squares.sum(axis=-1))
    return squares.mean(axis=-1)


def score(state: MemAEState, images: Array) -> Scores:
    """Reconstruction residual in [-1, 1] units.

    Args:
      state: the detector.
      images: (B, H, W, C) or (B, T, H, W, C) in [0, 1].

    Returns:
      Scores. The map is smoothed; the image score is the smoothed map's maximum, or the mean of the raw residual over
      the picture (the whole clip, as in the official code, for clips).
    """
    cfg, x = state.cfg, scale(images)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    rebuilt, _ = MemAE(cfg).apply(variables, x, train=False)
    error = residual(rebuilt, x, norm=cfg.score_norm)
    frame = error if error.ndim == 3 else error[:, cfg.score_frame]
    maps = gaussian_smooth(frame, sigma=cfg.smooth_sigma * frame.shape[-2] / 256)
    if cfg.image_score == "max":
        return Scores(image=maps.max(axis=(1, 2)), map=maps)
    return Scores(image=error.reshape(error.shape[0], -1).mean(axis=1), map=maps)


def phases(cfg: MemAEConfig) -> tuple[Phase, ...]:
    return (Phase("train", train_step, steps=cfg.steps, batch_size=cfg.batch_size),)


_STILL = {"activation": "relu", "query": "image", "score_norm": "l2", "image_score": "mean"}

PRESETS = {
    "mvtec": Preset(
        "256x256 textures and objects (ours): the video network in two dimensions, 300 epochs of about 200 pictures",
        config={"steps": 2000, "batch_size": 32},
        data={"image_size": 256, "channels": 3},
    ),
    "cpu": Preset(
        "the same at a third of the width, with a schedule of minutes on two cores (ours)",
        config={
            "encoder": (32, 64, 128, 128),
            "decoder": (128, 64, 32),
            "num_items": 500,
            "shrink_threshold": 1 / 500,
            "learning_rate": 1e-3,
            "batch_size": 16,
            "steps": 1000,
        },
        data={"image_size": 128, "channels": 3},
    ),
    "video": Preset(
        "16 grey frames of 256x256, the official network and schedule for UCSD Ped2",
        config={
            "score_norm": "l1",
            "image_score": "mean",
            "shrink_threshold": 0.0025,
            "batch_size": 10,
            "steps": 20_000,
        },
        data={"image_size": 256, "channels": 1, "clip": 16, "target": 8},
    ),
    "mnist": Preset(
        "28x28x1, one digit is normal, one item per picture (network recalled from the paper)",
        config={
            **_STILL,
            "encoder": (16, 32, 64),
            "decoder": (64, 32),
            "first_kernel": 1,
            "num_items": 100,
            "shrink_threshold": 1 / 100,
            "batch_size": 64,
            "steps": 3000,
        },
        data={"image_size": 28, "channels": 1},
    ),
    "cifar": Preset(
        "32x32x3, one class is normal, one item per picture (network recalled from the paper)",
        config={
            **_STILL,
            "encoder": (64, 128, 128, 256),
            "decoder": (256, 128, 128),
            "num_items": 500,
            "shrink_threshold": 1 / 500,
            "batch_size": 64,
            "steps": 5000,
        },
        data={"image_size": 32, "channels": 3},
    ),
    "demo": Preset(
        "64x64 for the embedded synthetic pictures, a minute or two on two cores (ours)",
        config={
            "encoder": (32, 64, 128),
            "decoder": (64, 32),
            "num_items": 200,
            "shrink_threshold": 1 / 200,
            "learning_rate": 1e-3,
            "batch_size": 16,
            "steps": 1000,
        },
        data={"image_size": 64, "channels": 3},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32, seconds on two cores (ours)",
        config={
            "encoder": (16, 32),
            "decoder": (16,),
            "num_items": 50,
            "shrink_threshold": 1 / 50,
            "learning_rate": 2e-3,
            "batch_size": 16,
            "steps": 200,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="memae",
    config=MemAEConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
