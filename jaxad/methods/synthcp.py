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
    paper). Pixel classes are the training source's masks, which hold 0, 1, ... L - 1, other values for no class:
    `jaxad.data.from_arrays(pictures, train_classes=classes, ...)`. Folders have no such masks.
  * `labels="clusters"`, presets `industrial`, `cpu` and `tiny`, is OURS, no part of the paper: industrial sets have no
    pixel classes. k-means on features of normal pictures makes pseudo-classes, the nearest centre is the segmenter. The
    comparison is in feature space and, by SSIM, in image space, each standardised by normal pictures at each position.
  * `comparator="discrepancy"` follows Lis et al., "Detecting the Unexpected via Image Resynthesis", ICCV 2019: a net
    that learns on pictures resynthesised with some labels swapped. Ours: superpixels are swapped instead of labelled
    objects, and without a backbone its features are learned with it instead of VGG's.
  * Ours in `semantic`: no ImageNet start; whole pictures, flipped, not crops; every step of the segmenter draws one of
    the scales that testing averages over; the failure net learns on the segmenter's own training pictures, not by
    cross-validation, its trunks start at random. The perceptual term is of EfficientNet-Lite0 or ResNet-18 from a file
    of the user's (`backbone_weights`), not of VGG-19; without, there is none, or multi-scale L1 and SSIM ("l1_ssim").
  * Generator and discriminators are updated from one shared forward pass, where the code runs the generator twice.
  * Ours: the image score, the mean of the highest hundredth of the pixels; the paper has none.
  * Ours: `compare_features="image"`, SSIM in the place of the features' cosine: it asks nothing of features that a
    segmenter learnt from few pictures, without ImageNet, but marks coarsely and needs a synthesis that is right.
  * Nothing here reproduces the paper's figures: its data sets are not at hand. What it reaches on drawn scenes and on
    bottle is in benchmarks/ACCURACY.md.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec
from jaxad.methods.synthcp_clusters import (
    calibrate_step,
    cluster_step,
    compare_clusters,
    feature_step,
    make_classes,
    no_classes,
    segment_clusters,
)
from jaxad.methods.synthcp_given import compare_given, failure_step, given_labels, segment_given, segment_step
from jaxad.methods.synthcp_state import (
    Segmented,
    SynthCPConfig,
    SynthCPState,
    check,
    flipped,
    maps_of,
    networks,
    optimisers,
    scores_of,
    synthesise,
    train_apply,
    updated,
)
from jaxad.nn import init as draw
from jaxad.nn import pretrained, spade
from jaxad.ops import labels as label_ops
from jaxad.ops import similarity, superpixels, texture

_DECAY = 0.5  # share of the generator's steps after which its learning rate falls linearly


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
    pseudo = no_classes(jax.random.fold_in(key, len(params)), cfg, spec) if cfg.labels == "clusters" else None
    return SynthCPState(cfg, params, others, optimizer, done, backbone, pseudo)


def segment(state: SynthCPState, images: Array) -> Segmented:
    """The class of each pixel and how sure it is: images (B, H, W, C) in [0, 1]."""
    return segment_given(state, images) if state.cfg.labels == "given" else segment_clusters(state, images)


# --- synthesise ---------------------------------------------------------------------------------------------------


def labels_of(state: SynthCPState, batch: Batch) -> Array:
    """The labels that the generator learns from: the ground truth where it is given, else pseudo-classes."""
    if state.cfg.labels == "given":
        return given_labels(state.cfg, batch)
    return segment_clusters(state, batch.image).labels


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
        return train_apply(state, "generator", params, labels, shape=shape)

    def judge(params, fake):
        (theirs, ours), others = train_apply(state, "discriminator", params, labels, fake, real, shape=shape)
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
    state = updated(state, "generator", pull_fake(slope)[0], cfg.learning_rate * decay, painted)
    rate = cfg.discriminator_rate * decay
    return updated(state, "discriminator", pull_judged(to_judge)[0], rate, looked), found


# --- compare ------------------------------------------------------------------------------------------------------


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
    state = updated(state, "comparator", grads, cfg.compare_rate, state.others["comparator"])
    return state, {"loss": value, "swapped": target.mean()}


def compare(state: SynthCPState, images: Array, segmented: Segmented, made: Array) -> Scores:
    """Scores from pictures, what was segmented and what was synthesised of it; pictures (B, H, W, C) in [0, 1]."""
    cfg = state.cfg
    if cfg.comparator == "discrepancy":
        logits = discrepancy_of(state, segmented.labels, images, made)
        return scores_of(jax.nn.softmax(logits.astype(jnp.float32))[..., 1])
    own = compare_given if cfg.labels == "given" else compare_clusters
    return own(state, images, segmented, made)


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
