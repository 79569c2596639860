"""SynthCP with classes of pixels given by masks, as in the paper; the method itself is `jaxad.methods.synthcp`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxad.core import Array, Batch, Scores
from jaxad.methods.synthcp_state import (
    Segmented,
    SynthCPConfig,
    SynthCPState,
    apply,
    flipped,
    scores_of,
    synthesise,
    train_apply,
    updated,
)
from jaxad.ops import labels as label_ops
from jaxad.ops import similarity, texture
from jaxad.ops.compare import cosine_map, gated, resize

_WEIGHT_DECAY = 1e-4  # of the segmenter's SGD
_AUXILIARY = 0.4  # weight of the segmenter's auxiliary loss


def parse(state: SynthCPState, images: Array) -> list[Any]:
    """The segmenter on each scale of pictures in [0, 1]."""
    shape = images.shape[1:]
    views = (scaled(images, scale) for scale in state.cfg.scales)
    return [apply(state, "segmenter", view * 2 - 1, shape=shape, train=False) for view in views]


def scaled(images: Array, scale: float) -> Array:
    """Pictures (B, H, W, C) resized by a factor, to multiples of 8."""
    height, width = (max(8, round(n * scale / 8) * 8) for n in images.shape[1:3])
    return resize(images, (height, width))


def segment_given(state: SynthCPState, images: Array) -> Segmented:
    """The segmenter's class of each pixel, probabilities averaged over scales: images (B, H, W, C) in [0, 1]."""
    parsed, size = parse(state, images), images.shape[1:3]
    total = sum(jax.nn.softmax(resize(p.logits, size)) for p in parsed)
    probabilities = jnp.asarray(total) / len(parsed)
    labels = jnp.argmax(probabilities, axis=-1).astype(jnp.int32)
    return Segmented(labels, probabilities.max(axis=-1), [p.features for p in parsed], probabilities)


def given_labels(cfg: SynthCPConfig, batch: Batch) -> Array:
    """Classes of the pixels (B, H, W) int32, -1 for no class: the masks, which the source holds as whole numbers."""
    labels = batch.mask.astype(jnp.int32)
    return jnp.where((labels >= 0) & (labels < cfg.num_labels), labels, -1)


def segment_loss(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Cross-entropy over pixels with a class, and the share of them that is right: (B, h, w, L), (B, h, w)."""
    known = labels >= 0
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    count = jnp.maximum(known.sum(), 1)
    is_right = (logits.argmax(axis=-1) == labels) & known
    return -jnp.sum(jnp.where(known, chosen, 0.0)) / count, is_right.sum() / count


def segment_step(key: Array, state: SynthCPState, batch: Batch):
    """One step of SGD for the segmenter, at one of its scales, on labels at the size of its maps."""
    cfg = state.cfg
    key_flip, key_drop, key_scale = jax.random.split(key, 3)
    batch = flipped(key_flip, cfg, batch)
    shape = batch.image.shape[1:]

    def loss(params, scale):
        options = {"shape": shape, "rngs": {"dropout": key_drop}}
        parsed, others = train_apply(state, "segmenter", params, scaled(batch.image, scale) * 2 - 1, **options)
        labels = label_ops.nearest_labels(given_labels(cfg, batch), parsed.logits.shape[1:3])
        (main, right), (auxiliary, _) = (segment_loss(x, labels) for x in (parsed.logits, parsed.auxiliary))
        return main + _AUXILIARY * auxiliary, (others, {"loss": main, "accuracy": right})

    params = state.params["segmenter"]
    slopes = [functools.partial(jax.grad(loss, has_aux=True), scale=scale) for scale in cfg.scales]
    drawn = jax.random.randint(key_scale, (), 0, len(slopes))
    grads, (others, metrics) = lax.switch(drawn, slopes, params)  # a lone scale is called without a switch
    grads = jax.tree.map(lambda g, p: g + _WEIGHT_DECAY * p if p.ndim > 1 else g, grads, params)
    rate = cfg.segment_rate * jnp.maximum(1 - state.done["segmenter"] / cfg.segment_steps, 0.0) ** 0.9
    return updated(state, "segmenter", grads, rate, others), metrics


def compare_given(state: SynthCPState, images: Array, segmented: Segmented, made: Array) -> Scores:
    """Minus the cosine of features (or the SSIM), or minus the confidence where the segmenter is sure; by the failure
    net minus the sum of what it takes for right and the confidence."""
    cfg, size = state.cfg, images.shape[1:3]
    if cfg.comparator == "failure":
        inputs = segmented.probabilities, images * 2 - 1, made * 2 - 1
        right, _ = apply(state, "comparator", *inputs, shape=images.shape[1:], train=False)
        return scores_of(-(jax.nn.sigmoid(right) + segmented.confidence))
    if cfg.compare_features == "image":
        alike = texture.cell_means(similarity.ssim_map(made, images))
    else:
        theirs = [p.features for p in parse(state, made)]
        quarter = (-(-size[0] // 4), -(-size[1] // 4))
        alike = cosine_map(segmented.features, theirs, quarter, rows=cfg.compare_rows)
    alike = resize(alike, size)
    if cfg.gate != "none":
        alike = gated(segmented.confidence, alike, cfg.msp_threshold)
    return scores_of(-alike)


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
    segmented = segment_given(state, batch.image)
    made = synthesise(state, segmented.labels, shape)
    inputs = segmented.probabilities, batch.image * 2 - 1, made * 2 - 1

    def loss(params):
        (right, iou), others = train_apply(state, "comparator", params, *inputs, shape=shape)
        total, found = failure_loss(right, iou, segmented, labels)
        return total, (others, found)

    grads, (others, found) = jax.grad(loss, has_aux=True)(state.params["comparator"])
    return updated(state, "comparator", grads, cfg.compare_rate, others), found
