"""MNAD: memory-guided normality for anomaly detection.

Park, Noh, Ham. "Learning Memory-guided Normality for Anomaly Detection". CVPR 2020. https://arxiv.org/abs/2003.13228

A U-shaped network predicts the next frame of a video, or rebuilds a picture. Every position of the encoder's features
is a query into a memory of ten unit vectors; the decoder gets the query joined by what it read. The items are no
parameters: after each step they move towards the queries assigned to them, and go on doing so at test time on frames
that look normal. Two losses shape the queries: compactness pulls each to its nearest item, separateness pushes it from
the second nearest. Scored: the PSNR of the prediction, and the distance of the queries to their nearest items.

What is whose:
  * Network, losses, update, gate and score are those of the official code (no licence; nothing is copied), as far as
    they are known. Where paper and code differ the code is the default: `update_norm`, `update_scope`, `grad_read`,
    `feature_dist`, and the mean of losses over positions where the paper sums.
  * The code's normalised weights of the update are computed as exp(s - max s), which is the same number. Distances come
    from similarities; the code's shift of 1e-6 within them is left out. The batch normalisation that the code builds
    after the encoder and never calls is not built.
  * Ours: channels are RGB, not BGR; the learning rate falls by a cosine at every step rather than every epoch; biases
    before a batch normalisation, which have no effect, are not trained; `update_scope="frame"` updates picture after
    picture; `learnable_items`; the chunked test-time update; PSNR is at most 100 dB.
  * Ours, since neither paper nor code has them: scores of single pictures (`score_norm`), the pixel map, and every
    preset but `prediction` and `reconstruction`. The papers' frame scores stretch PSNR and distance to [0, 1] within
    each video, which reads the whole video; `METHOD.ordered` gives those.
  * Frame AUROCs near the paper's were reached by others only with one old version of its framework; we promise none.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxad.core import Array, Batch, Method, Ordered, Phase, Preset, Scores, Spec, config, static
from jaxad.nn import init as draw
from jaxad.nn.conv import lowering_for
from jaxad.nn.unet import UNetDecoder, UNetEncoder
from jaxad.ops import moments, prototypes, quality
from jaxad.ops.moments import Moments
from jaxad.ops.smooth import gaussian_smooth


@config
class MNADConfig:
    """Settings of MNAD. Fields marked static force a new compilation; the others may be vmapped over."""

    widths: tuple[int, ...] = static((64, 128, 256, 512))  # channels at each size of the network; the last: C
    skips: bool = static(True)  # the decoder joins the encoder's maps; they let a still picture's defects through
    memory: bool = static(True)  # False: the same network without, scored by PSNR alone
    num_items: int = static(10)  # M
    update_norm: str = static("all")  # an item's largest weight is over "all" queries (code) | those "assigned" (paper)
    update_scope: str = static("batch")  # the queries of a training update: the "batch" (code) | each "frame" (paper)
    grad_read: bool = static(False)  # gradients pass through the weights of reading (paper); the code cuts them
    feature_dist: str = static("mse")  # compactness: "mse" over channels (code) | "l2" (paper)
    learnable_items: bool = static(False)  # items are trained by gradients instead of moved by queries
    test_update: str = static("none")  # of ordered test frames: "none" | "sequential" | "chunked"
    update_chunk: int = static(16)  # frames that "chunked" scores with the same items
    score_norm: str = static("train")  # statistics for pictures' scores are of "train" | "holdout" | "none"
    score_scale: str = static("minmax")  # those statistics: "minmax" | "std"
    image_score: str = static("combined")  # PSNR and distance "combined" | the map's "max"
    pixel_map: str = static("both")  # "both" | "error" | "distance"
    steps: int = static(37_260)
    batch_size: int = static(4)
    dtype: str = static("float32")  # of convolutions: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "gemm"
    learning_rate: float = 2e-4  # at first; Adam, betas 0.9 and 0.999, cosine to 0
    compactness_weight: float = 0.1  # lambda_c
    separateness_weight: float = 0.1  # lambda_s
    margin: float = 1.0  # alpha, of separateness
    psnr_weight: float = 0.6  # lambda: share of the PSNR in the score, the rest is the distance's
    gate: float = 0.01  # gamma: frames with a smaller regular score may move the items at test time
    smooth_sigma: float = 4.0  # of the error map's Gaussian, in pixels of a picture 256 high


class Statistics(NamedTuple):
    """What normal pictures gave."""

    psnr: Moments
    distance: Moments
    error_map: Moments  # over all pixels
    distance_map: Moments


class MNADState(NamedTuple):
    """An MNAD, trained or in training."""

    cfg: MNADConfig
    params: Any
    items: Array  # (M, C) of unit length
    batch_stats: Any
    optimizer: optax.OptState
    statistics: Statistics
    assigned: Array  # (M,) queries of normal pictures that have each item as their nearest


class Outcome(NamedTuple):
    """What the network makes of B pictures."""

    rebuilt: Array  # (B, H, W, C) in [-1, 1]
    queries: Array  # (B, K, features), of unit length where there is a memory
    matches: prototypes.Matches | None  # of all B * K queries


class Parts(NamedTuple):
    """What the scores of B pictures are made of."""

    psnr: Array  # (B,) in dB
    distance: Array  # (B,) mean distance of queries to their nearest items
    regular: Array  # (B,) regular score, which the gate is for
    error_map: Array  # (B, H, W) squared error in [0, 1] units
    distance_map: Array  # (B, h, w) Euclidean


class Network(nn.Module):
    """Pictures (B, H, W, C) in [-1, 1] -> Outcome. The items are the collection "memory", out of reach of gradients."""

    cfg: MNADConfig
    channels: int  # of the picture that comes out

    def setup(self):
        layers: dict[str, Any] = {"impl": self.cfg.conv_impl, "dtype": jnp.dtype(self.cfg.dtype)}
        self.encoder = UNetEncoder(self.cfg.widths, **layers)
        self.decoder = UNetDecoder(self.channels, self.cfg.widths, self.cfg.skips, **layers)
        self.items = self.variable("memory", "items", self._draw_items)

    def _draw_items(self) -> Array:
        shape = (self.cfg.num_items, self.cfg.widths[-1])
        return prototypes.unit(draw.uniform(0.5)(self.make_rng("params"), shape) + 0.5)

    def encode(self, x: Array, *, train: bool) -> tuple[Array, list[Array]]:
        """Queries (B, h, w, features) and the encoder's maps; neither depends on the items."""
        features, maps = self.encoder(x, train=train)
        return prototypes.unit(features) if self.cfg.memory else features, maps

    def decode(self, queries: Array, maps: list[Array], *, train: bool) -> Outcome:
        """Reads the memory and decodes."""
        flat, matches, joined = queries.reshape(-1, queries.shape[-1]), None, queries
        if self.cfg.memory:
            matches = prototypes.match(flat, self.items.value)
            read = prototypes.read(matches, self.items.value, grad_weights=self.cfg.grad_read)
            joined = jnp.concatenate([queries, read.reshape(queries.shape)], axis=-1)
        rebuilt = self.decoder(joined, maps, train=train)
        return Outcome(rebuilt, queries.reshape(queries.shape[0], -1, queries.shape[-1]), matches)

    def __call__(self, x: Array, *, train: bool) -> Outcome:
        return self.decode(*self.encode(x, train=train), train=train)


def frames(images: Array) -> tuple[Array, Array]:
    """What the network sees and what it shall give, both in [-1, 1].

    Args:
      images: in [0, 1]. Pictures (B, H, W, C) are to be rebuilt; of clips (B, T, H, W, C) the last frame is to be
        predicted from those before it, laid out as (T - 1) * C channels, frame by frame.
    """
    scaled = images * 2 - 1
    if images.ndim == 4:
        return scaled, scaled
    before = jnp.moveaxis(scaled[:, :-1], 1, 3)
    return before.reshape(*before.shape[:3], -1), scaled[:, -1]


_CHOICES = {
    "update_norm": prototypes.UPDATE_NORMS,
    "update_scope": ("batch", "frame"),
    "feature_dist": prototypes.DISTANCES,
    "test_update": ("none", "sequential", "chunked"),
    "score_norm": ("train", "holdout", "none"),
    "score_scale": ("minmax", "std"),
    "image_score": ("combined", "max"),
    "pixel_map": ("both", "error", "distance"),
    "dtype": ("float32", "bfloat16"),
}


def check(cfg: MNADConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, a memory or a chunk that is too small, pictures that cannot be halved, clips of one
        frame, statistics of a holdout that is not there.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"mnad: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    if min(cfg.num_items, len(cfg.widths)) < 2 or cfg.update_chunk < 1:
        raise ValueError(
            f"mnad: num_items={cfg.num_items}, widths={cfg.widths}, update_chunk={cfg.update_chunk}; expected at least "
            "2 items (a nearest and a second), 2 widths and 1 frame. Pass --set num_items=10 --set update_chunk=16."
        )
    step = 2 ** (len(cfg.widths) - 1)
    if any(n % step for n in spec.image[-3:-1]):
        height, width = (-(-n // step) * step for n in spec.image[-3:-1])
        raise ValueError(
            f"mnad: pictures of {spec.image[-3]}x{spec.image[-2]} cannot be halved {len(cfg.widths) - 1} times; "
            f"expected multiples of {step}. Pass --image-size {height}x{width}."
        )
    if len(spec.image) == 4 and spec.image[0] < 2:
        raise ValueError(
            "mnad: clips of 1 frame leave nothing to predict from; expected 2 or more. Pass clip=5, target=4."
        )
    if cfg.score_norm == "holdout" and not spec.sizes.get("holdout"):
        raise ValueError(
            "mnad: score_norm='holdout', but the data has no held-out normals; expected some. "
            "Pass --holdout 0.1 or --set score_norm=train."
        )


def init(key: Array, cfg: MNADConfig, spec: Spec) -> MNADState:
    """The untrained detector; distributions are the official code's, so all items start close together."""
    inputs, target = (jnp.zeros(part.shape) for part in jax.eval_shape(frames, jnp.zeros((1, *spec.image))))
    variables = draw.init_flat(key, Network(cfg, target.shape[-1]), inputs, train=True)
    nothing = moments.empty()
    state = MNADState(
        cfg=cfg,
        params=variables["params"],
        items=variables["memory"]["items"],
        batch_stats=variables["batch_stats"],
        optimizer=optax.scale_by_adam().init({}),
        statistics=Statistics(nothing, nothing, nothing, nothing),
        assigned=jnp.zeros(cfg.num_items),
    )
    return state._replace(optimizer=optax.scale_by_adam().init(_variables(state)[0]))


def _variables(state: MNADState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network's variables: (those that gradients train, the others)."""
    memory = {"memory": {"items": state.items}}
    if state.cfg.learnable_items:
        return {"params": state.params, **memory}, {"batch_stats": state.batch_stats}
    return {"params": state.params}, {"batch_stats": state.batch_stats, **lax.stop_gradient(memory)}


# --- training -----------------------------------------------------------------------------------------------------


def loss(trained: Any, fixed: Any, cfg: MNADConfig, images: Array):
    """Mean squared error of the prediction, plus weighted compactness and separateness against the items as they are.

    Args:
      trained, fixed: the network's variables, collections by name.
      cfg: the config.
      images: (B, H, W, C) or (B, T, H, W, C) in [0, 1].

    Returns:
      (loss, (new batch_stats, outcome, metrics)).
    """
    x, target = frames(images)
    network = Network(cfg, target.shape[-1])
    outcome, updated = network.apply({**fixed, **trained}, x, train=True, mutable=["batch_stats"])
    prediction = jnp.mean((outcome.rebuilt - target) ** 2)
    if outcome.matches is None:
        return prediction, (updated["batch_stats"], outcome, {"loss": prediction, "prediction": prediction})
    pull = prototypes.compactness(outcome.matches, features=cfg.widths[-1], distance=cfg.feature_dist)
    compactness = pull.mean()
    separateness = prototypes.separateness(outcome.matches, margin=cfg.margin).mean()
    total = prediction + cfg.compactness_weight * compactness + cfg.separateness_weight * separateness
    counts = prototypes.assigned(outcome.matches)
    metrics = {
        "loss": total,
        "prediction": prediction,
        "compactness": compactness,
        "separateness": separateness,
        "items_used": jnp.sum(counts > 0, dtype=jnp.float32),
        "largest_share": counts.max() / counts.sum(),
        "assignment_entropy": prototypes.entropy(counts),
    }
    return total, (updated["batch_stats"], outcome, metrics)


def train_step(key: Array, state: MNADState, batch: Batch):
    """One step of Adam on the network; then the items move towards this step's queries."""
    del key
    cfg, (trained, fixed) = state.cfg, _variables(state)
    grads, (batch_stats, outcome, metrics) = jax.grad(loss, has_aux=True)(trained, fixed, cfg, batch.image)
    done = state.optimizer.count / cfg.steps
    rate = cfg.learning_rate * 0.5 * (1 + jnp.cos(math.pi * done))
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer)
    trained = jax.tree.map(lambda p, u: p - rate * u, trained, updates)
    if cfg.learnable_items:
        items = prototypes.unit(trained["memory"]["items"])
    else:
        items = moved_items(cfg, state.items, outcome)
    state = state._replace(params=trained["params"], items=items, batch_stats=batch_stats, optimizer=optimizer)
    return state, metrics


def moved_items(cfg: MNADConfig, items: Array, outcome: Outcome) -> Array:
    """The items after a training step, out of reach of gradients."""
    if outcome.matches is None:
        return items
    queries = lax.stop_gradient(outcome.queries)
    if cfg.update_scope == "frame":
        return prototypes.update_in_order(items, queries, norm=cfg.update_norm)
    return prototypes.update(items, queries.reshape(-1, queries.shape[-1]), outcome.matches, norm=cfg.update_norm)


def statistics_step(key: Array, state: MNADState, batch: Batch):
    """Folds a batch of normal pictures into the statistics that scores are normalised by.

    Its metric "psnr" (dB) is the mean over the pictures seen so far.
    """
    del key
    outcome, parts = look(state, batch.image)
    seen = (parts.psnr, parts.distance, *full_maps(state.cfg, parts))
    folded = [moments.add(old, new, batch.valid) for old, new in zip(state.statistics, seen, strict=True)]
    assigned = state.assigned
    if outcome.matches is not None:
        is_nearest = outcome.matches.is_nearest.reshape(*outcome.queries.shape[:2], -1)
        assigned = assigned + jnp.einsum("bkm,b->m", is_nearest.astype(jnp.float32), batch.valid.astype(jnp.float32))
    statistics = Statistics(*folded)
    return state._replace(statistics=statistics, assigned=assigned), {"psnr": statistics.psnr.mean}


def phases(cfg: MNADConfig) -> tuple[Phase, ...]:
    train = Phase("train", train_step, steps=cfg.steps, batch_size=cfg.batch_size)
    if cfg.score_norm == "none":
        return (train,)
    return train, Phase("statistics", statistics_step, source=cfg.score_norm, batch_size=cfg.batch_size)


# --- scoring ------------------------------------------------------------------------------------------------------


def _all_variables(state: MNADState) -> dict[str, Any]:
    trained, fixed = _variables(state)
    return {**fixed, **trained}


def look(state: MNADState, images: Array) -> tuple[Outcome, Parts]:
    """The network on images (B, ...) in [0, 1], each by itself, and what their scores are made of."""
    x, target = frames(images)
    outcome: Any = Network(state.cfg, target.shape[-1]).apply(_all_variables(state), x, train=False)
    return outcome, examine(state.cfg, outcome, target)


def examine(cfg: MNADConfig, outcome: Outcome, target: Array) -> Parts:
    """What the scores are made of, for a target (B, H, W, C) in [-1, 1]."""
    rebuilt, target = (outcome.rebuilt + 1) / 2, (target + 1) / 2
    size, halvings = target.shape, len(cfg.widths) - 1
    shape = (size[0], size[1] >> halvings, size[2] >> halvings)
    distance, distance_map = jnp.zeros(size[0]), jnp.zeros(shape)
    if outcome.matches is not None:
        matches, features = outcome.matches, cfg.widths[-1]
        each = prototypes.compactness(matches, features=features, distance=cfg.feature_dist)
        distance = each.reshape(size[0], -1).mean(axis=1)
        distance_map = prototypes.compactness(matches, features=features, distance="l2").reshape(shape)
    return Parts(
        psnr=quality.psnr(rebuilt, target),
        distance=distance,
        regular=quality.regular_score(rebuilt, target),
        error_map=jnp.mean((rebuilt - target) ** 2, axis=-1),
        distance_map=distance_map,
    )


def full_maps(cfg: MNADConfig, parts: Parts) -> tuple[Array, Array]:
    """The smoothed error and the distance, both (B, H, W)."""
    shape = parts.error_map.shape
    error = gaussian_smooth(parts.error_map, sigma=cfg.smooth_sigma * shape[1] / 256)
    # One by one, so that the number of pictures may stay open in an exported score.
    return error, jax.vmap(lambda x: jax.image.resize(x, shape[1:], "bilinear"))(parts.distance_map)


def scores_of(state: MNADState, parts: Parts) -> Scores:
    """Scores of single pictures, normalised by the statistics of normal ones (raw where there are none)."""
    cfg, seen = state.cfg, state.statistics
    error, distance = full_maps(cfg, parts)
    maps = {"error": moments.standardise(error, seen.error_map)}
    if cfg.memory:
        maps["distance"] = moments.standardise(distance, seen.distance_map)
        maps["both"] = maps["error"] + maps["distance"]
    pixel_map = maps[cfg.pixel_map if cfg.memory else "error"]
    if cfg.image_score == "max":
        return Scores(image=pixel_map.max(axis=(1, 2)), map=pixel_map)
    scale = moments.stretch if cfg.score_scale == "minmax" else moments.standardise
    scaled = {"psnr": scale(parts.psnr, seen.psnr), "distance": scale(parts.distance, seen.distance)}
    return Scores(image=combine(cfg, scaled), map=pixel_map)


def combine(cfg: MNADConfig, parts: dict[str, Any]) -> Any:
    """The anomaly score: psnr_weight * (1 - PSNR) + (1 - psnr_weight) * distance, both of them normalised."""
    if not cfg.memory:
        return 1 - parts["psnr"]
    return cfg.psnr_weight * (1 - parts["psnr"]) + (1 - cfg.psnr_weight) * parts["distance"]


def score(state: MNADState, images: Array) -> Scores:
    """Scores pictures one by one, with the items as training left them.

    Args:
      state: the detector.
      images: (B, H, W, C), or clips (B, T, H, W, C), in [0, 1].

    Returns:
      Scores; a clip's are those of its last frame.
    """
    return scores_of(state, look(state, images)[1])


# --- adapting at test time ----------------------------------------------------------------------------------------


def adapt(state: MNADState, images: Array, scores: Scores) -> MNADState:
    """Moves the items by pictures in order, after they were scored, by those whose regular score is below the gate."""
    del scores
    return state._replace(items=_gated(state, state.items, *look(state, images), True))


def _gated(state: MNADState, items: Array, outcome: Outcome, parts: Parts, valid: Array | bool) -> Array:
    if outcome.matches is None:
        return items
    allowed = (parts.regular < state.cfg.gate) & valid
    return prototypes.update_in_order(items, outcome.queries, allowed=allowed, norm=state.cfg.update_norm)


def score_in_order(state: MNADState, images: Array, valid: Array) -> tuple[MNADState, Scores, dict[str, Array]]:
    """Scores pictures in order, the items moving in between as `test_update` says.

    The encoder, which no item reaches, sees all pictures at once. "sequential" decodes each with the items that the one
    before left; "chunked" decodes `update_chunk` at once and then moves the items by each of them in turn.

    Args:
      state: the detector.
      images: (B, ...) in [0, 1]; B a multiple of `frames_at_once`.
      valid: (B,) bool; other pictures move nothing.

    Returns:
      (the state with its items moved, Scores, {"psnr", "distance", "regular": (B,)}).
    """
    cfg, (x, target) = state.cfg, frames(images)
    network, variables = Network(cfg, target.shape[-1]), _all_variables(state)
    seen = network.apply(variables, x, train=False, method=Network.encode)
    size = len(images) if cfg.test_update == "none" else frames_at_once(cfg)

    def chunk(items, pictures):
        (queries, maps), target, valid = pictures
        memory = {**variables, "memory": {"items": items}}
        outcome: Any = network.apply(memory, queries, maps, train=False, method=Network.decode)
        parts = examine(cfg, outcome, target)
        return items if cfg.test_update == "none" else _gated(state, items, outcome, parts, valid), parts

    whole = (seen, target, valid)
    if size == len(images):
        items, parts = chunk(state.items, whole)
    else:
        chunks = jax.tree.map(lambda leaf: leaf.reshape(-1, size, *leaf.shape[1:]), whole)
        with lowering_for(looped=True):
            items, parts = lax.scan(chunk, state.items, chunks)
        parts = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parts)
    named = {"psnr": parts.psnr, "distance": parts.distance, "regular": parts.regular}
    return state._replace(items=items), scores_of(state, parts), named


def frames_at_once(cfg: MNADConfig) -> int:
    """Pictures scored with the same items; `score_in_order` takes multiples of it."""
    return cfg.update_chunk if cfg.test_update == "chunked" else 1


_VIDEO = {"image_size": 256, "channels": 3}
_STILL = {
    "skips": False,
    "compactness_weight": 0.01,
    "separateness_weight": 0.01,
    "psnr_weight": 0.7,
    "gate": 0.015,
}

PRESETS = {
    "image": Preset(
        "256x256 textures and objects (ours): the reconstruction network, 200 epochs of about 200 pictures",
        config={**_STILL, "batch_size": 8, "steps": 5000},
        data={"image_size": 256, "channels": 3},
    ),
    "cpu": Preset(
        "the same for pictures of 128x128 at a quarter of the width, minutes on two cores (ours)",
        config={**_STILL, "widths": (16, 32, 64, 128), "batch_size": 8, "steps": 1000},
        data={"image_size": 128, "channels": 3},
    ),
    "prediction": Preset(
        "the frame after 4 frames of 256x256, the official network and schedule for UCSD Ped2",
        config={"steps": 37_260, "test_update": "sequential"},
        data={**_VIDEO, "clip": 5, "target": 4},
    ),
    "reconstruction": Preset(
        "frames of 256x256 by themselves, the official network and schedule for UCSD Ped2",
        config={**_STILL, "learning_rate": 2e-5, "steps": 38_220, "test_update": "sequential"},
        data=_VIDEO,
    ),
    "prediction_cpu": Preset(
        "prediction of grey frames of 128x192 at a quarter of the width, minutes on two cores (ours)",
        config={"widths": (16, 32, 64, 128), "batch_size": 4, "steps": 1500, "test_update": "sequential"},
        data={"image_size": (128, 192), "channels": 1, "clip": 5, "target": 4},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32, seconds on two cores (ours)",
        # PSNR averages over the picture, in which a small defect is lost: the largest value of the map tells more.
        config={
            **_STILL,
            "image_score": "max",
            "widths": (8, 16, 32),
            "batch_size": 16,
            "learning_rate": 2e-3,
            "steps": 600,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="mnad",
    config=MNADConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    adapt=adapt,
    check=check,
    ordered=Ordered(score_in_order, frames_at_once, combine),
)
