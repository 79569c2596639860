"""SMAI: superpixel masking and inpainting; a reconstruction from the paper's abstract, not the authors' method.

Li, Li, Jiang, Ma, Wei, Hong, Gong. "Superpixel Masking and Inpainting for Self-Supervised Anomaly Detection".
BMVC 2020, paper 0275. https://www.bmvc2020-conference.com

A network learns to fill in hidden superpixels of normal pictures from what is around them. At test time all superpixels
are hidden, one after another or those of one colour of a grid at once, and what is filled in is compared with what is
there. Normal content follows from its surroundings, defects do not. Scored: the dissimilarity of each superpixel to its
filling, on two scales.

What is whose:
  * The full text of the paper could not be obtained and no official code is known. The abstract says: pictures are cut
    into superpixels, the network is trained on normal pictures to restore random ones, and at test time they are
    restored one by one (`grouping="one_by_one"`) and compared.
  * Everything else is ours: SLIC as the superpixels, their numbers, the sampling of what is hidden, network, schedule,
    image scores and maps. The losses and the kinds of residual are of the sort that RIAD (Zavrtanik et al., 2021,
    square masks instead of superpixels) published: squared error, SSIM, similarity of gradients on four scales.
  * Ours, and an approximation to one by one: hiding all superpixels of one colour in one pass (`coloured3`, the
    default: superpixels whose home cells are 3 apart in both directions, 9 passes instead of one for each superpixel).
  * Ours: calibration by position (`calibrate`), which serves objects that always lie in the same place.
  * Superpixels of training pictures are computed anew at every step rather than kept: with what else is drawn, 4 % of
    a step of the preset `cpu` there.
  * The abstract gives no numbers; none here are the paper's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec, config, static
from jaxad.nn import init as draw
from jaxad.nn.conv import lowering_for
from jaxad.nn.inpainting import CONVS, InpaintingUNet
from jaxad.ops import moments, similarity, superpixels
from jaxad.ops.moments import Moments
from jaxad.ops.smooth import box_smooth

_GROUPINGS = {"one_by_one": None, "coloured2": 2, "coloured3": 3, "coloured4": 4}
_SCALES = 4  # of the similarity of gradients
_BOX = 21  # pixels of a picture 256 high, over which "pixel" maps are averaged
_TOP = 5


@config
class SMAIConfig:
    """Settings of SMAI, all of them ours. Fields marked static force a new compilation; the others may be vmapped."""

    widths: tuple[int, ...] = static((64, 128, 256, 512, 512))  # channels at each size of the network
    conv: str = static("plain")  # "plain": the mask is a channel | "partial": what is hidden is not counted
    grids: tuple[int, ...] = static((16, 8))  # superpixels along a side, one number for each scale
    iterations: int = static(10)  # of SLIC
    connectivity: str = static("none")  # superpixels: "none" | "largest" part only
    dilate: int = static(2)  # pixels around a superpixel that are hidden with it, but not scored
    grouping: str = static("coloured3")  # hidden at once: "one_by_one" | every 2nd, 3rd, 4th: "coloured2" ...
    loss: str = static("riad")  # "l1" | "l2" | "riad": l2, SSIM and similarity of gradients
    residual: str = static("gms")  # what is compared: "gms" | "ssim" | "l2"
    pixel_map: str = static("region")  # "region": means over superpixels | "pixel": means over squares
    image_score: str = static("max")  # of the map | "top5": mean of the five highest superpixels
    calibrate: str = static("train")  # by the residual of normal pictures of "train" | "holdout" there | "none"
    augment: str = static("none")  # training pictures: "none" | "flip" left to right | "dihedral": all eight ways
    passes: int = static(32)  # pictures that the network sees at once, those of different passes together
    steps: int = static(15_000)
    batch_size: int = static(8)
    dtype: str = static("float32")  # of convolutions: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "gemm"
    learning_rate: float = 1e-4  # Adam, betas 0.9 and 0.999
    drop_at: float = 5 / 6  # share of the steps after which the learning rate is a tenth
    compactness: float = 10.0  # of superpixels
    largest_share: float = 1 / 8  # of superpixels, the most that are hidden at random
    colour_share: float = 0.5  # of training pictures in which one colour is hidden instead
    ssim_weight: float = 1.0  # of 1 - SSIM in the loss
    gms_weight: float = 1.0  # of 1 - similarity of gradients in the loss
    position_floor: float = 0.5  # added to a position's standard deviation, in means over positions


class SMAIState(NamedTuple):
    """A SMAI, trained or in training."""

    cfg: SMAIConfig
    params: Any
    batch_stats: Any
    optimizer: optax.OptState
    positions: tuple[Moments, ...]  # of normal pictures' residuals, for each grid and position


class Look(NamedTuple):
    """What one grid of superpixels says about B pictures."""

    labels: Array  # (B, H, W) int32
    restored: Array  # (B, H, W, C) in [0, 1] or a little beyond: every superpixel as it was filled in
    residual: Array  # (B, H, W)
    values: Array  # (B, P) what is calibrated and mapped: of superpixels, or of pixels
    counts: Array  # (B, P) bool: False for empty superpixels


def network(cfg: SMAIConfig) -> InpaintingUNet:
    """The network that fills in."""
    return InpaintingUNet(cfg.widths, cfg.conv, impl=cfg.conv_impl, dtype=jnp.dtype(cfg.dtype))


_CHOICES = {
    "conv": CONVS,
    "connectivity": superpixels.CONNECTIVITIES,
    "grouping": tuple(_GROUPINGS),
    "loss": ("riad", "l1", "l2"),
    "residual": ("gms", "ssim", "l2"),
    "pixel_map": ("region", "pixel"),
    "image_score": ("max", "top5"),
    "calibrate": ("train", "holdout", "none"),
    "augment": ("none", "flip", "dihedral"),
    "dtype": ("float32", "bfloat16"),
}


def check(cfg: SMAIConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, clips, channels other than 1 or 3, pictures that the network cannot halve or that a
        grid does not divide, turned pictures that are not square, statistics of a holdout that is not there.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"smai: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    if len(spec.image) != 3 or spec.image[-1] not in (1, 3):
        raise ValueError(
            f"smai: samples are {spec.image}; expected pictures (H, W, 1 or 3). Pass --channels 3, no clip."
        )
    if not cfg.grids or min(cfg.iterations, cfg.passes) < 1 or cfg.dilate < 0:
        raise ValueError(
            f"smai: grids={cfg.grids}, iterations={cfg.iterations}, passes={cfg.passes}, dilate={cfg.dilate}; expected "
            "at least one grid, 1, 1 and 0. Pass --set grids=16,8 --set iterations=10 --set passes=32 --set dilate=2."
        )
    height, width = spec.image[:2]
    step = 2 ** (max(len(cfg.widths), _SCALES) - 1)
    if height % step or width % step or any(n < 1 or height % n or width % n for n in cfg.grids):
        raise ValueError(
            f"smai: pictures of {height}x{width} cannot be halved as often as the network does, or not be divided into "
            f"grids of {cfg.grids}; expected multiples of {step} and of each grid. Pass --image-size 256."
        )
    if cfg.augment == "dihedral" and height != width:
        raise ValueError(
            f"smai: augment='dihedral' turns pictures, which are {height}x{width}; expected square ones. "
            "Pass --set augment=flip."
        )
    if cfg.pixel_map == "pixel" and cfg.image_score == "top5":
        raise ValueError(
            "smai: image_score='top5' means superpixels, but pixel_map='pixel' has none; expected 'max'. "
            "Pass --set image_score=max."
        )
    if cfg.calibrate == "holdout" and not spec.sizes.get("holdout"):
        raise ValueError(
            "smai: calibrate='holdout', but the data has no held-out normals; expected some. "
            "Pass --holdout 0.1 or --set calibrate=train."
        )


def init(key: Array, cfg: SMAIConfig, spec: Spec) -> SMAIState:
    """The untrained detector."""
    height, width, _ = spec.image
    step = 2 ** (len(cfg.widths) - 1)
    variables = draw.init_flat(
        key, network(cfg), jnp.zeros((1, step, step, spec.image[-1])), jnp.zeros((1, step, step), bool), train=True
    )
    sizes = [n * n if cfg.pixel_map == "region" else height * width for n in cfg.grids]
    nothing = moments.empty()
    return SMAIState(
        cfg=cfg,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        optimizer=optax.scale_by_adam().init(variables["params"]),
        positions=tuple(jax.tree.map(lambda leaf, n=n: jnp.full((n,), leaf), nothing) for n in sizes),
    )


# --- training -----------------------------------------------------------------------------------------------------


def superpixels_of(cfg: SMAIConfig, images: Array, grid: int) -> Array:
    """Labels (B, H, W) int32 in [0, grid^2) of images (B, H, W, C) in [0, 1]."""
    options: dict[str, Any] = {"iterations": cfg.iterations, "connectivity": cfg.connectivity}
    return superpixels.slic(images, grid=grid, compactness=cfg.compactness, **options)


def draw_hidden(cfg: SMAIConfig, numbers: Array, images: Array, grid: int) -> Array:
    """What a training step hides: superpixels at random, 1 to `largest_share` of them, or all of one colour.

    Args:
      cfg: the config.
      numbers: (B, >= grid^2 + 3) uniform in [0, 1).
      images: (B, H, W, C) in [0, 1].
      grid: superpixels along a side.

    Returns:
      (B, H, W) bool, `dilate` pixels around superpixels included.
    """
    count, labels = grid * grid, superpixels_of(cfg, images, grid)
    order, (how_many, colour, kind) = numbers[:, :count], numbers[:, count : count + 3].T
    most = jnp.maximum(jnp.floor(cfg.largest_share * count), 1)
    last = jnp.minimum(jnp.floor(how_many * most), count - 1).astype(jnp.int32)
    highest = jnp.take_along_axis(jnp.sort(order, axis=1), last[:, None], axis=1)
    at_random = superpixels.paint(order <= highest, labels)
    colours = min(_GROUPINGS[cfg.grouping] or 3, grid)
    classes = superpixels.colour_classes(labels, grid=grid, colours=colours)
    of_colour = classes == jnp.floor(colour * colours**2).astype(jnp.int32)[:, None, None]
    hidden = jnp.where((kind < cfg.colour_share)[:, None, None], of_colour, at_random)
    return superpixels.dilate(hidden, pixels=cfg.dilate)


def augmented(cfg: SMAIConfig, numbers: Array, images: Array) -> Array:
    """Images (B, H, W, C), each flipped and turned as three numbers (B, 3) in [0, 1) say and `augment` permits."""
    bits = (numbers < 0.5)[:, :, None, None, None]
    if cfg.augment != "none":
        images = jnp.where(bits[:, 0], images[:, :, ::-1], images)
    if cfg.augment == "dihedral":
        images = jnp.where(bits[:, 1], images[:, ::-1], images)
        images = jnp.where(bits[:, 2], images.swapaxes(1, 2), images)
    return images


def view(key: Array, cfg: SMAIConfig, images: Array) -> tuple[Array, Array]:
    """The pictures of a step, (B, H, W, C) in [0, 1], and what is hidden of them, (B, H, W) bool, of one scale."""
    size, width = images.shape[0], max(cfg.grids) ** 2 + 6
    numbers = jax.random.uniform(key, (size * width + 1,))
    which, numbers = numbers[0], numbers[1:].reshape(size, width)
    images = augmented(cfg, numbers[:, -3:], images)
    branches = [lambda n, x, grid=grid: draw_hidden(cfg, n, x, grid) for grid in cfg.grids]
    if len(branches) == 1:
        return images, branches[0](numbers, images)
    return images, lax.switch(jnp.int32(which * len(branches)), branches, numbers, images)


def loss(params: Any, batch_stats: Any, cfg: SMAIConfig, images: Array, hidden: Array):
    """Error of what is filled in, a mean over hidden pixels.

    SSIM and the similarity of gradients are of the picture with its hidden part filled in, so that borders count.

    Args:
      params, batch_stats: of the network.
      cfg: the config.
      images: (B, H, W, C) in [0, 1].
      hidden: (B, H, W) bool.

    Returns:
      (loss, (new batch_stats, metrics)).
    """
    target = images * 2 - 1
    variables = {"params": params, "batch_stats": batch_stats}
    filled, updated = network(cfg).apply(variables, target, hidden, train=True, mutable=["batch_stats"])
    count = jnp.maximum(hidden.sum(), 1)

    def over_hidden(values):
        return jnp.where(hidden, values, 0.0).sum() / count

    difference = filled - target
    error = over_hidden((abs(difference) if cfg.loss == "l1" else difference**2).mean(axis=-1))
    found = {"hidden": hidden.mean(), "error": error}
    total = error
    if cfg.loss == "riad":
        composite = jnp.where(hidden[..., None], (filled + 1) / 2, images)
        found["ssim"] = over_hidden(1 - similarity.ssim_map(composite, images))
        found["gms"] = over_hidden(1 - similarity.ms_gms_map(composite, images, scales=_SCALES))
        total += cfg.ssim_weight * found["ssim"] + cfg.gms_weight * found["gms"]
    return total, (updated["batch_stats"], {"loss": total, **found})


def train_step(key: Array, state: SMAIState, batch: Batch):
    """One step of Adam on pictures with superpixels hidden."""
    cfg = state.cfg
    images, hidden = view(key, cfg, batch.image)
    grads, (batch_stats, metrics) = jax.grad(loss, has_aux=True)(state.params, state.batch_stats, cfg, images, hidden)
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer)
    is_late = state.optimizer.count >= cfg.drop_at * cfg.steps
    rate = cfg.learning_rate * jnp.where(is_late, 0.1, 1.0)
    params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
    return state._replace(params=params, batch_stats=batch_stats, optimizer=optimizer), metrics


def calibrate_step(key: Array, state: SMAIState, batch: Batch):
    """Folds the residuals of a batch of normal pictures into the statistics of their positions."""
    del key
    fold = jax.vmap(moments.add, in_axes=(0, 1, 1))
    positions = tuple(
        fold(seen, found.values, found.counts & batch.valid[:, None])
        for seen, found in zip(state.positions, look(state, batch.image), strict=True)
    )
    return state._replace(positions=positions), {"residual": jnp.mean(positions[0].mean)}


def phases(cfg: SMAIConfig) -> tuple[Phase, ...]:
    train = Phase("train", train_step, steps=cfg.steps, batch_size=cfg.batch_size)
    if cfg.calibrate == "none":
        return (train,)
    return train, Phase("calibrate", calibrate_step, source=cfg.calibrate, batch_size=cfg.batch_size)


# --- scoring ------------------------------------------------------------------------------------------------------


def restore(cfg: SMAIConfig, fill: Callable, images: Array, labels: Array, grid: int) -> Array:
    """Every superpixel as it is filled in while it is hidden, alone or with those of its colour.

    No pixel of a superpixel, nor of another of its colour, has any influence on how it is restored.

    Args:
      cfg: the config; `grouping`, `dilate` and `passes` are read.
      fill: (images (N, H, W, C), hidden (N, H, W) bool) -> images (N, H, W, C) with all pixels filled in.
      images: (B, H, W, C) in [0, 1].
      labels: (B, H, W) int32 in [0, grid^2).
      grid: superpixels along a side.

    Returns:
      (B, H, W, C).
    """
    colours = _GROUPINGS[cfg.grouping]
    if colours is None:
        classes, count = labels, grid * grid
    else:
        colours = min(colours, grid)
        classes, count = superpixels.colour_classes(labels, grid=grid, colours=colours), colours**2
    size = images.shape[0]
    # The number of pictures may be open in an exported score.
    at_once = max(1, min(count, cfg.passes // size)) if isinstance(size, int) else 1
    at_once = -(-count // -(-count // at_once))  # no more passes than in as many turns are needed

    def turn(restored, first):
        is_mine = classes[None] == (first + jnp.arange(at_once))[:, None, None, None]
        flat = is_mine.reshape(at_once * size, *labels.shape[1:])
        repeated = jnp.broadcast_to(images[None], (at_once, *images.shape)).reshape(-1, *images.shape[1:])
        filled = fill(repeated, superpixels.dilate(flat, pixels=cfg.dilate)).reshape(at_once, *images.shape)
        for own, values in zip(is_mine, filled, strict=True):
            restored = jnp.where(own[..., None], values, restored)
        return restored, None

    if at_once >= count:
        return turn(images, 0)[0]
    with lowering_for(looped=True):
        return lax.scan(turn, images, jnp.arange(0, count, at_once))[0]


def residual_of(cfg: SMAIConfig, restored: Array, images: Array) -> Array:
    """How unlike the pictures what was restored is, (B, H, W) from 0 on."""
    if cfg.residual == "l2":
        return jnp.mean((restored - images) ** 2, axis=-1)
    if cfg.residual == "ssim":
        return 1 - similarity.ssim_map(restored, images)
    return 1 - similarity.ms_gms_map(restored, images, scales=_SCALES)


def examine(cfg: SMAIConfig, fill: Callable, images: Array) -> tuple[Look, ...]:
    """What each grid says about images (B, H, W, C) in [0, 1], filled in by `fill` (see `restore`)."""
    found = []
    for grid in cfg.grids:
        labels = superpixels_of(cfg, images, grid)
        restored = restore(cfg, fill, images, labels, grid)
        residual = residual_of(cfg, restored, images)
        batch, height, width = labels.shape
        if cfg.pixel_map == "region":
            values, sizes = superpixels.segment_means(residual, labels, grid=grid)
            counts = sizes > 0
        else:
            box = 2 * round(_BOX * height / 256 / 2 - 0.5) + 1
            values = box_smooth(residual, size=box).reshape(batch, height * width)
            counts = jnp.ones(values.shape, bool)
        found.append(Look(labels, restored, residual, values, counts))
    return tuple(found)


def look(state: SMAIState, images: Array) -> tuple[Look, ...]:
    """The trained network on images (B, H, W, C) in [0, 1], each by itself."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}

    def fill(images, hidden):
        filled: Any = network(state.cfg).apply(variables, images * 2 - 1, hidden, train=False)
        return (filled + 1) / 2

    return examine(state.cfg, fill, images)


def calibrated(cfg: SMAIConfig, values: Array, positions: Moments) -> Array:
    """Values (B, P) in standard deviations of normal pictures at each position, a floor added to them."""
    variance = positions.squares / jnp.maximum(positions.count, 1.0)
    deviation = jnp.sqrt(variance)
    floor = jnp.maximum(cfg.position_floor * deviation.mean(), 1e-6)
    return (values - positions.mean) / (deviation + floor)


def scores_of(cfg: SMAIConfig, looks: tuple[Look, ...], positions: tuple[Moments, ...]) -> Scores:
    """Maps of all grids averaged, and the image score."""
    maps, tops = [], []
    for found, seen in zip(looks, positions, strict=True):
        values = found.values if cfg.calibrate == "none" else calibrated(cfg, found.values, seen)
        if cfg.pixel_map == "region":
            maps.append(superpixels.paint(values, found.labels))
            values = jnp.where(found.counts, values, jnp.min(values, axis=1, keepdims=True))
            tops.append(lax.top_k(values, min(_TOP, values.shape[1]))[0].mean(axis=1))
        else:
            maps.append(values.reshape(found.labels.shape))
    pixel_map = jnp.stack(maps).mean(axis=0)
    if cfg.image_score == "top5":
        return Scores(image=jnp.stack(tops).mean(axis=0), map=pixel_map)
    return Scores(image=pixel_map.max(axis=(1, 2)), map=pixel_map)


def score(state: SMAIState, images: Array) -> Scores:
    """Hides every superpixel, at once with those of its colour or alone, and compares it with what is filled in.

    Args:
      state: the detector.
      images: (B, H, W, C) in [0, 1].

    Returns:
      Scores; the map is constant within superpixels of both scales unless `pixel_map="pixel"`.
    """
    return scores_of(state.cfg, look(state, images), state.positions)


PRESETS = {
    "image": Preset(
        "256x256 textures and objects (ours): 64 to 512 channels, about 300 epochs of 400 pictures",
        data={"image_size": 256, "channels": 3},
    ),
    "small": Preset(
        "the same at half the width (ours)",
        config={"widths": (32, 64, 128, 256, 256)},
        data={"image_size": 256, "channels": 3},
    ),
    "cpu": Preset(
        "pictures of 128x128 at a quarter of the width, minutes on two cores (ours)",
        config={
            "widths": (16, 32, 64, 128, 128),
            "residual": "ssim",  # tells defects that were planted on held-out bottles better than gms does
            "passes": 288,  # all nine of 32 pictures: a loop over fewer takes XLA-CPU three times as long
            "learning_rate": 1e-3,
            "steps": 1000,
        },
        data={"image_size": 128, "channels": 3},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32, half a minute on two cores (ours)",
        config={
            "widths": (8, 16),
            "grids": (8,),
            "residual": "ssim",
            "dilate": 1,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "steps": 150,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="smai",
    config=SMAIConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
