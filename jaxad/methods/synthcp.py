"""SynthCP: segment, synthesise from the segmentation, compare; what the synthesis does not bring back is anomalous.

Xia, Zhang, Liu, Shen, Yuille. "Synthesize then Compare: Detecting Failures and Anomalies for Semantic Segmentation".
ECCV 2020. https://arxiv.org/abs/2003.08440

A segmentation says which known class each pixel is. A conditional GAN, trained on normal pairs of labels and pictures,
makes a picture of it. Where the input holds something outside the known classes the synthesis differs from it. Scored:
how unlike input and synthesis are in the segmenter's features, except where the segmenter is sure.

What is whose:
  * `labels="given"`, preset `semantic`, is the paper's: PSPNet on a dilated ResNet-50, SPADE and its discriminators,
    hinge and feature-matching losses, cosine of the map before the last convolution averaged over scales, the gate at a
    maximal softmax probability (MSP) of 0.999, and (`comparator="failure"`) the comparison net of its failure
    detection. Numbers are those of the official code (no copyable licence for the generator; written from the SPADE
    paper). Pixel classes are the training source's masks: a `Source` whose `mask` holds 0, 1, ... L - 1, other values
    for no class. Folders have no such masks: pass the source to `train.fit` or replace it in a data set.
  * `labels="clusters"`, presets `industrial`, `cpu` and `tiny`, is OURS, no part of the paper: industrial sets have no
    pixel classes. k-means on features of normal pictures makes pseudo-classes, the nearest centre is the segmenter. The
    comparison is in feature space and, by SSIM, in image space, each standardised by normal pictures at each position.
  * `comparator="discrepancy"` follows Lis et al., "Detecting the Unexpected via Image Resynthesis", ICCV 2019: a net
    that learns on pictures resynthesised with some labels swapped. Ours: superpixels are swapped instead of labelled
    objects, and without a backbone its features are learned with it instead of VGG's.
  * Ours in `semantic`: one picture size in training, flips, no ImageNet start, scores of whole training pictures rather
    than crops; the failure net learns on the segmenter's own training pictures, not by cross-validation; its trunks
    start at random. The perceptual term is of EfficientNet-Lite0 or ResNet-18 from a file of the user's
    (`backbone_weights`), not of VGG-19; without, there is none, or multi-scale L1 and SSIM ("l1_ssim").
  * Generator and discriminators are updated from one shared forward pass, where the code runs the generator twice.
  * Ours: the image score, the mean of the highest hundredth of the pixels; the paper has none.
  * Nothing here reproduces the paper's figures: its data sets are not at hand. Nor is it shown yet that comparing beats
    confidence alone: on 64 made scenes of three classes, 150 steps for each network, an unseen shape was told with a
    pixel AUROC of 0.88 by the MSP alone, 0.68 behind the gate of 0.999 and 0.64 by features alone.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec, config, static
from jaxad.nn import init as draw
from jaxad.nn import pretrained, spade
from jaxad.nn.comparison import DiscrepancyNet, FailureNet
from jaxad.nn.segmenter import Segmenter
from jaxad.ops import kmeans, moments, similarity, superpixels, texture
from jaxad.ops import labels as label_ops
from jaxad.ops.bank import write
from jaxad.ops.compare import cosine_map, gated, resize, top_share
from jaxad.ops.moments import Moments
from jaxad.ops.smooth import gaussian_smooth

_TOP = 0.01  # share of the pixels that make the image score
_BINS = 1024  # of the confidences' histogram
_DECAY = 0.5  # share of the generator's steps after which its learning rate falls linearly
_MOMENTUM, _WEIGHT_DECAY = 0.9, 1e-4  # of the segmenter's SGD
_AUXILIARY = 0.4  # weight of the segmenter's auxiliary loss
_FLOOR = 0.5  # added to a position's deviation, in means over positions


@config
class SynthCPConfig:
    """Settings of SynthCP. Fields marked static force a new compilation; the others may be vmapped over.

    Numbers that only one kind of labels reads are static.
    """

    labels: str = static("given")  # classes of pixels: "given" by masks (paper) | "clusters" of features (ours)
    num_labels: int = static(13)  # L
    comparator: str = static("feature")  # "feature" | "failure" (given labels only) | "discrepancy"
    gate: str = static("absolute")  # sure pixels: "absolute" confidence | "quantile" of normal pixels' | "none"
    # Segmenter, given labels.
    segmenter_blocks: tuple[int, ...] = static((3, 4, 6, 3))  # of each of four stages
    segmenter_width: int = static(64)
    segmenter_head: int = static(512)
    scales: tuple[float, ...] = static((1.0,))  # picture sizes over which segmentation and features are averaged
    segment_steps: int = static(100_000)
    segment_rate: float = static(0.02)  # SGD, poly decay of power 0.9
    # Pseudo-classes, clusters.
    cluster_rows: int = static(2**16)  # feature vectors that k-means sees, at most
    cluster_iterations: int = static(30)
    label_grid: int = static(0)  # superpixels a side that take their majority's label; 0: none
    # Pretrained maps, for clusters' features, the perceptual term and the discrepancy net.
    backbone: str = static("none")  # "none" | "efficientnet_lite0" | "resnet18"
    backbone_weights: str = static("")  # file of its weights
    # Generator and discriminators.
    generator_widths: tuple[int, ...] = static((1024, 1024, 1024, 512, 256, 128, 64))
    upsamplings: int = static(6)
    spade_hidden: int = static(128)
    discriminator_widths: tuple[int, ...] = static((64, 128, 256, 512))
    discriminator_scales: int = static(2)
    reconstruction: str = static("none")  # a third term of the generator: "none" | "l1_ssim" | "perceptual"
    augment: str = static("none")  # "none" | "flip" left to right
    # Comparison.
    compare_rows: int = static(0)  # rows of a tile; 0: untiled
    quantise_recon: bool = static(False)  # syntheses are rounded to 8 bits, as when they are saved
    share_trunks: bool = static(False)  # of the failure net
    compare_width: int = static(64)  # of the failure net's first stage; the discrepancy net's finest maps
    compare_steps: int = static(20_000)  # of the failure or discrepancy net
    compare_rate: float = static(2e-4)  # Adam
    swap_grid: int = static(8)  # superpixels a side, some of which get another label for the discrepancy net
    swap_share: float = static(0.25)  # of the superpixels
    steps: int = static(60_000)  # of the generator
    batch_size: int = static(16)
    dtype: str = static("float32")  # of convolutions: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "mixed" | "gemm"
    learning_rate: float = 1e-4  # of the generator; Adam, betas 0 and 0.9
    discriminator_rate: float = 4e-4
    feature_weight: float = 10.0  # of feature matching
    reconstruction_weight: float = 10.0
    msp_threshold: float = 0.999  # t: confidence, or share of normal pixels, above which a pixel counts as sure
    position_weight: float = 1.0  # of a pixel's place among the features that are clustered
    image_weight: float = 1.0  # of the image-space comparison against the feature-space one
    smooth_sigma: float = 4.0  # of the map's Gaussian, in pixels of a picture 256 high; clusters only


class Pseudo(NamedTuple):
    """What makes pseudo-classes and standardises comparisons; empty trees where labels are given."""

    features: Moments  # (D,) of normal pixels' features
    bank: Array  # (N, P, D + 2) sampled vectors
    filled: Array  # (N,) bool
    centres: Array  # (L, D + 2)
    temperature: Array  # () median squared distance to the nearest centre
    confidence: Array  # (bins,) histogram of normal pixels
    distances: dict[str, Moments]  # by space, (h * w,) each: normal pictures' at each position


class SynthCPState(NamedTuple):
    """A SynthCP, trained or in training. Dicts have the networks' names."""

    cfg: SynthCPConfig
    params: dict[str, Any]
    others: dict[str, Any]  # running statistics, vectors of spectral normalisation
    optimizer: dict[str, Any]
    done: dict[str, Array]  # steps of each network, int32
    backbone: Any  # variables, {} without
    pseudo: Pseudo | None


class Segmented(NamedTuple):
    """What is known of the pixels of B pictures."""

    labels: Array  # (B, h, w) int32; of pictures, or of every fourth pixel
    confidence: Array  # (B, h, w) in (0, 1]
    features: list[Array]  # of each scale (B, h', w', D)
    probabilities: Array | None  # (B, H, W, L), given labels only


_CHOICES = {
    "labels": ("given", "clusters"),
    "comparator": ("feature", "failure", "discrepancy"),
    "gate": ("absolute", "quantile", "none"),
    "backbone": ("none", *pretrained.BACKBONES),
    "reconstruction": ("none", "l1_ssim", "perceptual"),
    "augment": ("none", "flip"),
    "dtype": ("float32", "bfloat16"),
}


def check(cfg: SynthCPConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, combinations that do not exist, sizes that cannot be halved as often as needed.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"synthcp: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    if len(spec.image) != 3 or spec.image[-1] not in (1, 3):
        raise ValueError(
            f"synthcp: samples are {spec.image}; expected pictures (H, W, 1 or 3). Pass --channels 3, no clip."
        )
    blocks = len(cfg.generator_widths)
    if not spade.fits(blocks, cfg.upsamplings):
        raise ValueError(
            f"synthcp: {blocks} blocks with upsamplings={cfg.upsamplings}; expected {blocks - 1}, or {blocks - 2} of "
            f"three blocks and more. Pass --set upsamplings={blocks - 1}."
        )
    height, width = spec.image[:2]
    step = math.lcm(2**cfg.upsamplings, 4 if cfg.labels == "clusters" else 1)
    step = math.lcm(step, 8 if cfg.comparator == "discrepancy" or cfg.reconstruction == "l1_ssim" else 1)
    if height % step or width % step:
        raise ValueError(
            f"synthcp: pictures of {height}x{width}; expected multiples of {step}, which the networks halve to whole "
            f"sizes. Pass --image-size {-(-height // step) * step}x{-(-width // step) * step}."
        )
    grids = {"label_grid": cfg.label_grid, "swap_grid": cfg.swap_grid if cfg.comparator == "discrepancy" else 0}
    for name, grid in grids.items():
        if grid and (height % grid or width % grid):
            raise ValueError(
                f"synthcp: {name}={grid} does not divide pictures of {height}x{width}; expected a divisor of both. "
                f"Pass --set {name}={math.gcd(height, width, 16)}."
            )
    if cfg.comparator == "failure" and cfg.labels != "given":
        raise ValueError(
            "synthcp: comparator='failure' learns where a segmentation is wrong, which pseudo-classes cannot tell; "
            "expected labels='given'. Pass --set comparator=feature."
        )
    if cfg.gate == "quantile" and cfg.labels == "given":
        raise ValueError(
            "synthcp: gate='quantile' is of normal pixels' confidence, kept for pseudo-classes alone; expected "
            "'absolute' or 'none'. Pass --set gate=absolute."
        )
    if min(cfg.num_labels - 1, cfg.cluster_rows, cfg.discriminator_scales, len(cfg.scales)) < 1:
        raise ValueError(
            f"synthcp: num_labels={cfg.num_labels}, cluster_rows={cfg.cluster_rows}, "
            f"discriminator_scales={cfg.discriminator_scales}, scales={cfg.scales}; expected at least 2, 1, 1 and one. "
            "Pass --set num_labels=13."
        )
    if (cfg.backbone == "none") != (not cfg.backbone_weights) or (
        cfg.reconstruction == "perceptual" and cfg.backbone == "none"
    ):
        raise ValueError(
            f"synthcp: backbone={cfg.backbone!r}, backbone_weights={cfg.backbone_weights!r}, "
            f"reconstruction={cfg.reconstruction!r}; expected a backbone with its file of weights, or neither. "
            "Pass --set backbone=efficientnet_lite0 --set backbone_weights=FILE."
        )
    if cfg.backbone != "none":
        pretrained.read(cfg.backbone, cfg.backbone_weights)


# --- networks -----------------------------------------------------------------------------------------------------


def networks(cfg: SynthCPConfig, shape: tuple[int, ...]) -> dict[str, Any]:
    """The networks of pictures of this shape (H, W, C), by name."""
    kind: dict[str, Any] = {"impl": cfg.conv_impl, "dtype": jnp.dtype(cfg.dtype)}
    made: dict[str, Any] = {
        "generator": spade.SpadeGenerator(
            (shape[0], shape[1]),
            shape[-1],
            cfg.num_labels,
            cfg.generator_widths,
            cfg.upsamplings,
            cfg.spade_hidden,
            **kind,
        ),
        "discriminator": spade.PatchDiscriminators(
            cfg.num_labels, cfg.discriminator_widths, cfg.discriminator_scales, **kind
        ),
    }
    if cfg.labels == "given":
        made["segmenter"] = Segmenter(
            cfg.num_labels, cfg.segmenter_blocks, cfg.segmenter_width, cfg.segmenter_head, **kind
        )
    if cfg.comparator == "failure":
        made["comparator"] = FailureNet(cfg.compare_width, cfg.share_trunks, **kind)
    if cfg.comparator == "discrepancy":
        w = cfg.compare_width
        widths = (w // 2, w, 2 * w, 4 * w), (w, 2 * w, 4 * w, 4 * w)
        made["comparator"] = DiscrepancyNet(cfg.num_labels, *widths, **kind)
    return made


def optimisers() -> dict[str, optax.GradientTransformation]:
    """What turns each network's gradients into directions; rates are applied by the steps."""
    gan = optax.scale_by_adam(b1=0.0, b2=0.9)
    own = {"segmenter": optax.trace(_MOMENTUM), "comparator": optax.scale_by_adam()}
    return {"generator": gan, "discriminator": gan, **own}


def init(key: Array, cfg: SynthCPConfig, spec: Spec) -> SynthCPState:
    """The untrained detector."""
    shape = spec.image
    picture, labels = jnp.zeros((1, *shape)), jnp.zeros((1, *shape[:2]), jnp.int32)
    given = {
        "generator": (labels,),
        "discriminator": (labels, picture),
        "segmenter": (picture,),
        "comparator": (jnp.zeros((1, *shape[:2], cfg.num_labels)), picture, picture),
    }
    options: dict[str, Any] = {"train": False}
    backbone = {} if cfg.backbone == "none" else pretrained.load_later(cfg.backbone, cfg.backbone_weights)
    params, others, optimizer, done = {}, {}, {}, {}
    for place, (name, network) in enumerate(sorted(networks(cfg, shape).items())):
        arguments: tuple = given[name]
        if name == "comparator" and cfg.comparator == "discrepancy":
            maps = None if cfg.backbone == "none" else (maps_of(cfg, backbone, picture),) * 2
            variables = dict(draw.init_flat(jax.random.fold_in(key, place), network, labels, picture, picture, maps))
        else:
            variables = dict(draw.init_flat(jax.random.fold_in(key, place), network, *arguments, **options))
        params[name] = variables.pop("params")
        others[name] = variables
        optimizer[name] = optimisers()[name].init(params[name])
        done[name] = jnp.zeros((), jnp.int32)
    pseudo = _no_classes(jax.random.fold_in(key, len(params)), cfg, spec) if cfg.labels == "clusters" else None
    return SynthCPState(cfg, params, others, optimizer, done, backbone, pseudo)


def _no_classes(key: Array, cfg: SynthCPConfig, spec: Spec) -> Pseudo:
    """Pseudo-classes before anything was seen: centres at random."""
    features, nothing = _num_features(cfg), moments.empty()

    def many(size):
        return jax.tree.map(lambda leaf: jnp.full((size,), leaf), nothing)

    pictures = spec.sizes["train"]
    per_picture = max(1, cfg.cluster_rows // pictures)
    height, width = (n // texture.STRIDE for n in spec.image[:2])
    per_picture = min(per_picture, height * width)
    return Pseudo(
        features=many(features),
        bank=jnp.zeros((pictures, per_picture, features + 2)),
        filled=jnp.zeros(pictures, bool),
        centres=jax.random.normal(key, (cfg.num_labels, features + 2)),
        temperature=jnp.ones(()),
        confidence=jnp.zeros(_BINS),
        distances={space: many(height * width) for space in ("feature", "image")},
    )


def maps_of(cfg: SynthCPConfig, variables: Any, images: Array) -> list[Array]:
    """The backbone's maps of pictures in [0, 1], fine to coarse."""
    return pretrained.maps_of(cfg.backbone, variables, images)


def _train_apply(state: SynthCPState, name: str, params: Any, *arguments, shape, **options):
    """A network in training mode: (what it gives, its other variables afterwards)."""
    network, others = networks(state.cfg, shape)[name], state.others[name]
    return network.apply({"params": params, **others}, *arguments, train=True, mutable=list(others), **options)


def _apply(state: SynthCPState, name: str, *arguments, shape, **options) -> Any:
    network = networks(state.cfg, shape)[name]
    return network.apply({"params": state.params[name], **state.others[name]}, *arguments, **options)


def _updated(state: SynthCPState, name: str, grads: Any, rate: Array | float, others: Any) -> SynthCPState:
    updates, optimizer = optimisers()[name].update(grads, state.optimizer[name])
    params = jax.tree.map(lambda p, u: p - rate * u, state.params[name], updates)
    return state._replace(
        params={**state.params, name: params},
        others={**state.others, name: others},
        optimizer={**state.optimizer, name: optimizer},
        done={**state.done, name: state.done[name] + 1},
    )


# --- segment ------------------------------------------------------------------------------------------------------


def _num_features(cfg: SynthCPConfig) -> int:
    if cfg.backbone == "none":
        return texture.FEATURES
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    made = jax.eval_shape(
        lambda x: _backbone_features(cfg, pretrained.load_later(cfg.backbone, cfg.backbone_weights), x), images
    )
    return made.shape[-1]


def _backbone_features(cfg: SynthCPConfig, variables: Any, images: Array) -> Array:
    """The second to the last but one of the backbone's maps, at every fourth pixel."""
    size = (images.shape[1] // texture.STRIDE, images.shape[2] // texture.STRIDE)
    maps = maps_of(cfg, variables, images)[:-1]
    return jnp.concatenate([resize(m, size) for m in maps], axis=-1)


def features_of(state: SynthCPState, images: Array) -> Array:
    """Features of every fourth pixel, not standardised: images (B, H, W, C) in [0, 1] -> (B, h, w, D)."""
    if state.cfg.backbone == "none":
        return texture.texture_features(images)
    return _backbone_features(state.cfg, state.backbone, images)


def standardised(state: SynthCPState, images: Array) -> Array:
    """`features_of`, with the mean and deviation of normal pixels taken out."""
    assert state.pseudo is not None
    return moments.standardise(features_of(state, images), state.pseudo.features)


def placed(cfg: SynthCPConfig, features: Array) -> Array:
    """Features (B, h, w, D) joined by the pixel's row and column in units of standard deviation times its weight,
    spread over the number of features so that the weight means the same for all: (B, h, w, D + 2)."""
    batch, height, width, count = features.shape
    scale = cfg.position_weight * math.sqrt(count / 2)
    rows, columns = (scale * (jnp.arange(n) - (n - 1) / 2) / (n / math.sqrt(12)) for n in (height, width))
    grid = jnp.stack(jnp.meshgrid(rows, columns, indexing="ij"), axis=-1)
    return jnp.concatenate([features, jnp.broadcast_to(grid, (batch, height, width, 2))], axis=-1)


def segment(state: SynthCPState, images: Array) -> Segmented:
    """The class of each pixel and how sure it is: images (B, H, W, C) in [0, 1]."""
    return _segment_given(state, images) if state.cfg.labels == "given" else _segment_clusters(state, images)


def _segment_clusters(state: SynthCPState, images: Array) -> Segmented:
    cfg, pseudo = state.cfg, state.pseudo
    assert pseudo is not None
    features = standardised(state, images)
    distances = kmeans.squared_distances(placed(cfg, features), pseudo.centres)
    labels = jnp.argmin(distances, axis=-1).astype(jnp.int32)
    nearest = distances.min(axis=-1, keepdims=True)
    confidence = 1 / jnp.sum(jnp.exp((nearest - distances) / pseudo.temperature), axis=-1)
    if cfg.label_grid:
        size = (labels.shape[1], labels.shape[2])
        segments = label_ops.resize_labels(superpixels.slic(images, grid=cfg.label_grid), size)
        sizes = {"count": cfg.num_labels, "num_segments": cfg.label_grid**2}
        labels = label_ops.majority(labels, segments, **sizes)
    return Segmented(labels, confidence, [features], None)


def _parsed(state: SynthCPState, images: Array) -> list[Any]:
    """The segmenter on each scale of pictures in [0, 1]."""
    height, width = images.shape[1:3]
    found = []
    for scale in state.cfg.scales:
        size = (max(8, round(height * scale / 8) * 8), max(8, round(width * scale / 8) * 8))
        seen = images if size == (height, width) else resize(images, size)
        found.append(_apply(state, "segmenter", seen * 2 - 1, shape=images.shape[1:], train=False))
    return found


def _segment_given(state: SynthCPState, images: Array) -> Segmented:
    parsed, size = _parsed(state, images), images.shape[1:3]
    total = sum(jax.nn.softmax(resize(p.logits, size)) for p in parsed)
    probabilities = jnp.asarray(total) / len(parsed)
    labels = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
    return Segmented(labels, probabilities.max(axis=-1), [p.features for p in parsed], probabilities)


def given_labels(cfg: SynthCPConfig, batch: Batch) -> Array:
    """Classes of the pixels (B, H, W) int32, -1 for no class: the masks, which the source holds as whole numbers."""
    labels = batch.mask.astype(jnp.int32)
    return jnp.where((labels >= 0) & (labels < cfg.num_labels), labels, -1)


def flipped(key: Array, cfg: SynthCPConfig, batch: Batch) -> Batch:
    """The batch with pictures and masks flipped left to right at random, where `augment` permits."""
    if cfg.augment == "none":
        return batch
    turn = jax.random.bernoulli(key, shape=(batch.image.shape[0],))
    image = jnp.where(turn[:, None, None, None], batch.image[:, :, ::-1], batch.image)
    return batch._replace(image=image, mask=jnp.where(turn[:, None, None], batch.mask[:, :, ::-1], batch.mask))


def segment_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Cross-entropy over pixels with a class, and the share of them that is right: (B, h, w, L), (B, h, w)."""
    known = labels >= 0
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    count = jnp.maximum(known.sum(), 1)
    is_right = (logits.argmax(axis=-1) == labels) & known
    return -jnp.sum(jnp.where(known, chosen, 0.0)) / count, is_right.sum() / count


def segment_step(key: Array, state: SynthCPState, batch: Batch):
    """One step of SGD for the segmenter, on labels at the size of its maps."""
    cfg = state.cfg
    key_flip, key_drop = jax.random.split(key)
    batch = flipped(key_flip, cfg, batch)
    shape = batch.image.shape[1:]

    def loss(params):
        options = {"shape": shape, "rngs": {"dropout": key_drop}}
        parsed, others = _train_apply(state, "segmenter", params, batch.image * 2 - 1, **options)
        labels = label_ops.resize_labels(given_labels(cfg, batch), parsed.logits.shape[1:3])
        (main, right), (auxiliary, _) = (segment_loss(x, labels) for x in (parsed.logits, parsed.auxiliary))
        return main + _AUXILIARY * auxiliary, (others, {"loss": main, "accuracy": right})

    params = state.params["segmenter"]
    grads, (others, metrics) = jax.grad(loss, has_aux=True)(params)
    grads = jax.tree.map(lambda g, p: g + _WEIGHT_DECAY * p if p.ndim > 1 else g, grads, params)
    rate = cfg.segment_rate * jnp.maximum(1 - state.done["segmenter"] / cfg.segment_steps, 0.0) ** 0.9
    return _updated(state, "segmenter", grads, rate, others), metrics


# --- pseudo-classes -----------------------------------------------------------------------------------------------


def feature_step(key: Array, state: SynthCPState, batch: Batch):
    """Folds a batch into mean and deviation of each feature."""
    del key
    pseudo = state.pseudo
    assert pseudo is not None
    seen = features_of(state, batch.image)
    folded = jax.vmap(moments.add, in_axes=(0, -1, None))(pseudo.features, seen, batch.valid)
    deviation = jnp.sqrt(folded.squares / jnp.maximum(folded.count, 1.0))
    return state._replace(pseudo=pseudo._replace(features=folded)), {"deviation": deviation.mean()}


def cluster_step(key: Array, state: SynthCPState, batch: Batch):
    """Keeps some feature vectors of each picture for k-means."""
    del key
    pseudo = state.pseudo
    assert pseudo is not None
    rows = placed(state.cfg, standardised(state, batch.image))
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    where = kmeans.spread_places(batch.index, per_picture=pseudo.bank.shape[1], pixels=flat.shape[1])
    taken = jnp.take_along_axis(flat, where[..., None], axis=1)
    place = jnp.where(batch.valid, batch.index, pseudo.filled.shape[0])
    filled = pseudo.filled.at[place].set(True, mode="drop")
    bank = write(pseudo.bank, taken, batch.index, batch.valid)
    return state._replace(pseudo=pseudo._replace(bank=bank, filled=filled)), {"filled": filled.mean()}


def make_classes(key: Array, state: SynthCPState) -> SynthCPState:
    """k-means on what was kept; the temperature is the median squared distance to the nearest centre."""
    cfg, pseudo = state.cfg, state.pseudo
    assert pseudo is not None
    rows = pseudo.bank.reshape(-1, pseudo.bank.shape[-1])
    valid = jnp.repeat(pseudo.filled, pseudo.bank.shape[1])
    centres = kmeans.fit(key, rows, count=cfg.num_labels, valid=valid, iterations=cfg.cluster_iterations)
    nearest = jnp.sort(jnp.where(valid, kmeans.squared_distances(rows, centres).min(axis=1), jnp.inf))
    temperature = nearest[jnp.maximum(valid.sum() - 1, 0) // 2]
    pseudo = pseudo._replace(centres=centres, temperature=jnp.maximum(temperature, 1e-6))
    return state._replace(pseudo=pseudo)


# --- synthesise ---------------------------------------------------------------------------------------------------


def synthesise(state: SynthCPState, labels: Array, shape: tuple[int, ...]) -> Array:
    """Pictures (B, H, W, C) in [0, 1] of labels (B, h, w) int32; `shape` is (H, W, C)."""
    made = (_apply(state, "generator", labels, shape=shape, train=False) + 1) / 2
    return jnp.round(made * 255) / 255 if state.cfg.quantise_recon else made


def labels_of(state: SynthCPState, batch: Batch) -> Array:
    """The labels that the generator learns from: the ground truth where it is given, else pseudo-classes."""
    if state.cfg.labels == "given":
        return given_labels(state.cfg, batch)
    return _segment_clusters(state, batch.image).labels


def reconstruction_loss(state: SynthCPState, fake: Array, real: Array) -> Array:
    """The generator's third term: how far syntheses are from pictures, both (B, H, W, C) in [-1, 1].

    "perceptual": L1 of the backbone's maps, each twice the weight of the next finer one, the coarsest 1. "l1_ssim": L1
    and 1 - SSIM, averaged over the full size, a half and a quarter.
    """
    ours, theirs = ((x + 1) / 2 for x in (fake, real))
    if state.cfg.reconstruction == "perceptual":
        pairs = list(zip(*(maps_of(state.cfg, state.backbone, x) for x in (ours, theirs)), strict=True))
        return jnp.asarray(sum(2.0**-n * jnp.mean(jnp.abs(a - b)) for n, (a, b) in enumerate(reversed(pairs))))
    total = jnp.zeros(())
    for scale in range(3):
        if scale:
            ours, theirs = (texture.cell_means(x, 2) for x in (ours, theirs))
        total += jnp.mean(jnp.abs(ours - theirs)) + jnp.mean(1 - similarity.ssim_map(ours, theirs))
    return total / 3


def generator_step(key: Array, state: SynthCPState, batch: Batch):
    """One step of Adam for generator and discriminators, from one forward pass of both."""
    cfg = state.cfg
    batch = flipped(key, cfg, batch)
    labels, real, shape = labels_of(state, batch), batch.image * 2 - 1, batch.image.shape[1:]

    def paint(params):
        return _train_apply(state, "generator", params, labels, shape=shape)

    def judge(params, fake):
        (theirs, ours), others = _train_apply(state, "discriminator", params, labels, fake, real, shape=shape)
        return (theirs, ours), others

    def wanted(judged):
        adversarial, matching = spade.hinge_generator(judged[0]), spade.feature_matching(judged[1], judged[0])
        return adversarial + cfg.feature_weight * matching, (adversarial, matching)

    fake, pull_fake, painted = jax.vjp(paint, state.params["generator"], has_aux=True)
    judged, pull_judged, looked = jax.vjp(judge, state.params["discriminator"], fake, has_aux=True)
    to_generator, (adversarial, matching) = jax.grad(wanted, has_aux=True)(judged)
    verdict, to_judge = jax.value_and_grad(lambda j: spade.hinge_discriminator(j[1], j[0]))(judged)
    slope = pull_judged(to_generator)[1]
    found = {"adversarial": adversarial, "matching": matching, "discriminator": verdict}
    if cfg.reconstruction != "none":
        apart, direct = jax.value_and_grad(lambda x: reconstruction_loss(state, x, real))(fake)
        slope = slope + cfg.reconstruction_weight * direct
        found["reconstruction"] = apart
    total = adversarial + cfg.feature_weight * matching
    found["loss"] = total + cfg.reconstruction_weight * found.get("reconstruction", 0.0)
    decay = jnp.minimum(1.0, (1 - state.done["generator"] / max(cfg.steps, 1)) / (1 - _DECAY))
    state = _updated(state, "generator", pull_fake(slope)[0], cfg.learning_rate * decay, painted)
    rate = cfg.discriminator_rate * decay
    return _updated(state, "discriminator", pull_judged(to_judge)[0], rate, looked), found


# --- compare ------------------------------------------------------------------------------------------------------


def failure_loss(right: Array, iou: Array, segmented: Segmented, labels: Array) -> tuple[Array, dict[str, Array]]:
    """Loss of the failure net: smooth L1 of the IoU of classes that are there, and cross-entropy of "right" weighted by
    the squared confidence, a plain mean over pixels, where pixels without a class count zero.

    Args:
      right: (B, H, W) logits.
      iou: (B, L) predicted.
      segmented: the segmenter's.
      labels: (B, H, W) int32, -1 for no class.
    """
    truth, is_there = label_ops.mean_iou(segmented.labels, labels, count=iou.shape[-1])
    apart = jnp.abs(iou - truth)
    smooth = jnp.where(apart < 1, 0.5 * apart**2, apart - 0.5)
    quality = jnp.sum(jnp.where(is_there, smooth, 0.0)) / jnp.maximum(is_there.sum(), 1)
    is_right = (segmented.labels == labels).astype(jnp.float32)
    weights = (labels >= 0) * segmented.confidence**2
    wrong = jnp.mean(optax.sigmoid_binary_cross_entropy(right, is_right) * weights)
    return quality + wrong, {"loss": quality + wrong, "iou_loss": quality, "pixel_loss": wrong}


def failure_step(key: Array, state: SynthCPState, batch: Batch):
    """One step of Adam for the failure net; segmenter and generator stay as they are."""
    cfg = state.cfg
    batch = flipped(key, cfg, batch)
    shape, labels = batch.image.shape[1:], given_labels(cfg, batch)
    segmented = segment(state, batch.image)
    made = synthesise(state, segmented.labels, shape)
    inputs = segmented.probabilities, batch.image * 2 - 1, made * 2 - 1

    def loss(params):
        (right, iou), others = _train_apply(state, "comparator", params, *inputs, shape=shape)
        total, found = failure_loss(right, iou, segmented, labels)
        return total, (others, found)

    grads, (others, found) = jax.grad(loss, has_aux=True)(state.params["comparator"])
    return _updated(state, "comparator", grads, cfg.compare_rate, others), found


def swapped(key: Array, cfg: SynthCPConfig, images: Array, labels: Array) -> Array:
    """Labels (B, h, w) int32 of pictures (B, H, W, C), those of some superpixels replaced by another class each."""
    count = cfg.swap_grid**2
    segments = label_ops.resize_labels(superpixels.slic(images, grid=cfg.swap_grid), labels.shape[1:])
    numbers = jax.random.uniform(key, (2, images.shape[0], count))
    other = superpixels.paint(jnp.floor(numbers[0] * cfg.num_labels), segments).astype(jnp.int32)
    is_swapped = superpixels.paint(numbers[1] < cfg.swap_share, segments)
    return jnp.where(is_swapped & (labels >= 0), other, labels)


def discrepancy_of(state: SynthCPState, labels: Array, images: Array, made: Array, *, params: Any = None) -> Array:
    """Logits (B, H, W, 2) of the discrepancy net for labels (B, h, w), pictures and syntheses in [0, 1]."""
    cfg, shape = state.cfg, images.shape[1:]
    maps = None if cfg.backbone == "none" else tuple(maps_of(cfg, state.backbone, x) for x in (images, made))
    given = label_ops.resize_labels(labels, shape[:2]), images * 2 - 1, made * 2 - 1, maps
    params = state.params["comparator"] if params is None else params
    return networks(cfg, shape)["comparator"].apply({"params": params}, *given)


def discrepancy_step(key: Array, state: SynthCPState, batch: Batch):
    """One step of Adam for the discrepancy net, on pictures resynthesised with some labels swapped."""
    cfg = state.cfg
    key_flip, key_swap = jax.random.split(key)
    batch = flipped(key_flip, cfg, batch)
    labels = labels_of(state, batch)
    changed = swapped(key_swap, cfg, batch.image, labels)
    made = synthesise(state, changed, batch.image.shape[1:])
    target = label_ops.resize_labels((changed != labels).astype(jnp.int32), batch.image.shape[1:3])
    share = jnp.clip(target.mean(), 0.01, 0.99)
    weights = jnp.where(target == 1, 0.5 / share, 0.5 / (1 - share))

    def loss(params):
        logits = discrepancy_of(state, changed, batch.image, made, params=params)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), target)
        return jnp.mean(weights * errors)

    value, grads = jax.value_and_grad(loss)(state.params["comparator"])
    state = _updated(state, "comparator", grads, cfg.compare_rate, state.others["comparator"])
    return state, {"loss": value, "swapped": target.mean()}


def distances_of(state: SynthCPState, segmented: Segmented, images: Array, made: Array) -> dict[str, Array]:
    """How unlike syntheses are at every fourth pixel: 1 - cosine of features, 1 - SSIM; (B, h, w) each.

    Standardised features of an ordinary pixel are near zero, where directions mean nothing: both sides share a
    component of the length that vectors have on average.
    """
    theirs = standardised(state, made)
    size, rows = (theirs.shape[1], theirs.shape[2]), state.cfg.compare_rows
    alike = cosine_map(segmented.features, [theirs], size, rows=rows, offset=theirs.shape[-1])
    return {"feature": 1 - alike, "image": texture.cell_means(1 - similarity.ssim_map(made, images))}


def calibrate_step(key: Array, state: SynthCPState, batch: Batch):
    """Folds a batch of normal pictures into the statistics of positions and of confidences."""
    del key
    pseudo = state.pseudo
    assert pseudo is not None
    segmented = segment(state, batch.image)
    made = synthesise(state, segmented.labels, batch.image.shape[1:])
    fold = jax.vmap(moments.add, in_axes=(0, 1, None))
    distances = {
        space: fold(pseudo.distances[space], values.reshape(values.shape[0], -1), batch.valid)
        for space, values in distances_of(state, segmented, batch.image, made).items()
    }
    bins = jnp.minimum((segmented.confidence * _BINS).astype(jnp.int32), _BINS - 1)
    # Picture by picture, so that a batch split over devices stays split.
    by_picture = jax.vmap(lambda own: jnp.zeros(_BINS).at[own.reshape(-1)].add(1.0))(bins)
    confidence = pseudo.confidence + jnp.sum(jnp.where(batch.valid[:, None], by_picture, 0.0), axis=0)
    found = {space: values.mean.mean() for space, values in distances.items()}
    return state._replace(pseudo=pseudo._replace(distances=distances, confidence=confidence)), found


def sure_above(cfg: SynthCPConfig, pseudo: Pseudo | None) -> Array | float:
    """The confidence above which a pixel counts as sure."""
    if cfg.gate != "quantile":
        return cfg.msp_threshold
    assert pseudo is not None
    seen = jnp.cumsum(pseudo.confidence)
    return jnp.sum(seen < cfg.msp_threshold * seen[-1]) / _BINS


def calibrated(values: Array, seen: Moments) -> Array:
    """Values (B, h, w) in standard deviations of normal pictures at each position, a floor added to them."""
    deviation = jnp.sqrt(seen.squares / jnp.maximum(seen.count, 1.0)).reshape(values.shape[1:])
    floor = jnp.maximum(_FLOOR * deviation.mean(), 1e-6)
    return (values - seen.mean.reshape(values.shape[1:])) / (deviation + floor)


def compare(state: SynthCPState, images: Array, segmented: Segmented, made: Array) -> Scores:
    """Scores from pictures, what was segmented and what was synthesised of it; pictures (B, H, W, C) in [0, 1]."""
    cfg = state.cfg
    if cfg.comparator == "discrepancy":
        logits = discrepancy_of(state, segmented.labels, images, made)
        return _scores(jax.nn.softmax(logits.astype(jnp.float32))[..., 1])
    if cfg.labels == "clusters":
        return _compare_clusters(state, images, segmented, made)
    if cfg.comparator == "failure":
        inputs = segmented.probabilities, images * 2 - 1, made * 2 - 1
        right, _ = _apply(state, "comparator", *inputs, shape=images.shape[1:], train=False)
        return _scores(-(jax.nn.sigmoid(right) + segmented.confidence))
    theirs, size = [p.features for p in _parsed(state, made)], images.shape[1:3]
    quarter = (-(-size[0] // 4), -(-size[1] // 4))
    alike = resize(cosine_map(segmented.features, theirs, quarter, rows=cfg.compare_rows), size)
    if cfg.gate != "none":
        alike = gated(segmented.confidence, alike, cfg.msp_threshold)
    return _scores(-alike)


def _compare_clusters(state: SynthCPState, images: Array, segmented: Segmented, made: Array) -> Scores:
    cfg, pseudo = state.cfg, state.pseudo
    assert pseudo is not None
    found = distances_of(state, segmented, images, made)
    own = {space: calibrated(values, pseudo.distances[space]) for space, values in found.items()}
    both = (own["feature"] + cfg.image_weight * own["image"]) / (1 + cfg.image_weight)
    if cfg.gate != "none":
        both = jnp.where(segmented.confidence > sure_above(cfg, pseudo), jnp.minimum(both, 0.0), both)
    sigma = cfg.smooth_sigma * images.shape[1] / 256
    return _scores(gaussian_smooth(resize(both, images.shape[1:3]), sigma=sigma))


def _scores(pixel_map: Array) -> Scores:
    return Scores(image=top_share(pixel_map, _TOP), map=pixel_map)


def score(state: SynthCPState, images: Array) -> Scores:
    """Segments, synthesises and compares.

    Args:
      state: the detector.
      images: (B, H, W, C) in [0, 1].

    Returns:
      Scores: with given labels minus the cosine, or minus the confidence where the gate is open; with pseudo-classes
      standard deviations of normal pictures; of the discrepancy net a probability.
    """
    segmented = segment(state, images)
    return compare(state, images, segmented, synthesise(state, segmented.labels, images.shape[1:]))


def phases(cfg: SynthCPConfig) -> tuple[Phase, ...]:
    size = cfg.batch_size
    generate = Phase("generate", generator_step, steps=cfg.steps, batch_size=size)
    learned = {"failure": failure_step, "discrepancy": discrepancy_step}.get(cfg.comparator)
    last = Phase("calibrate", calibrate_step, batch_size=size)
    if learned is not None:
        last = Phase("compare", learned, steps=cfg.compare_steps, batch_size=size)
    if cfg.labels == "given":
        segmenter = Phase("segment", segment_step, steps=cfg.segment_steps, batch_size=size)
        return (segmenter, generate) if learned is None else (segmenter, generate, last)
    features = Phase("features", feature_step, batch_size=size)
    return features, Phase("clusters", cluster_step, batch_size=size, finish=make_classes), generate, last


_INDUSTRIAL = {
    "labels": "clusters",
    "gate": "none",
    "reconstruction": "l1_ssim",
}

PRESETS = {
    "industrial": Preset(
        "256x256 pictures without pixel classes (ours): 13 pseudo-classes, SPADE at half the width",
        config={
            **_INDUSTRIAL,
            "generator_widths": (512, 512, 512, 256, 128, 64, 32),
            "upsamplings": 5,
        },
        data={"image_size": 256, "channels": 3},
    ),
    "semantic": Preset(
        "the paper's anomaly segmentation, 256x512; needs a training source whose masks are classes",
        config={"scales": (0.8, 1.0, 1.2, 1.4, 1.6), "augment": "flip"},
        data={"image_size": (256, 512), "channels": 3},
    ),
    "cpu": Preset(
        "pictures of 64x64 at a small width and few steps, minutes on two cores (ours)",
        config={
            **_INDUSTRIAL,
            "generator_widths": (48, 48, 32, 16),
            "upsamplings": 3,
            "spade_hidden": 12,
            "discriminator_widths": (16, 32, 64),
            "image_weight": 0.5,
            "learning_rate": 1e-3,
            "discriminator_rate": 2e-3,
            "batch_size": 8,
            "steps": 250,
        },
        data={"image_size": 64, "channels": 3},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32, seconds on two cores (ours)",
        config={
            **_INDUSTRIAL,
            "num_labels": 6,
            "generator_widths": (16, 16, 8),
            "upsamplings": 2,
            "spade_hidden": 8,
            "discriminator_widths": (8, 16),
            "discriminator_scales": 1,
            "cluster_rows": 4096,
            "image_weight": 0.2,
            "conv_impl": "conv",
            "learning_rate": 2e-3,
            "discriminator_rate": 2e-3,
            "batch_size": 16,
            "steps": 60,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="synthcp",
    config=SynthCPConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
