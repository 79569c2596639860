"""SynthCP with pseudo-classes made of features, ours; the method itself is `jaxad.methods.synthcp`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxad.core import Array, Batch, Scores, Spec
from jaxad.methods.synthcp_state import (
    Pseudo,
    Segmented,
    SynthCPConfig,
    SynthCPState,
    maps_of,
    scores_of,
    synthesise,
)
from jaxad.nn import pretrained
from jaxad.ops import kmeans, moments, similarity, superpixels, texture
from jaxad.ops import labels as label_ops
from jaxad.ops.bank import write
from jaxad.ops.compare import cosine_map, resize
from jaxad.ops.moments import Moments
from jaxad.ops.smooth import gaussian_smooth

_BINS = 1024  # of the confidences' histogram
_FLOOR = 0.5  # added to a position's deviation, in means over positions


def no_classes(key: Array, cfg: SynthCPConfig, spec: Spec) -> Pseudo:
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


def segment_clusters(state: SynthCPState, images: Array) -> Segmented:
    """The nearest centre of every fourth pixel, with superpixels of most of them: images (B, H, W, C) in [0, 1]."""
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
    segmented = segment_clusters(state, batch.image)
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


def compare_clusters(state: SynthCPState, images: Array, segmented: Segmented, made: Array) -> Scores:
    """Both comparisons in standard deviations of normal pictures, averaged and smoothed."""
    cfg, pseudo = state.cfg, state.pseudo
    assert pseudo is not None
    found = distances_of(state, segmented, images, made)
    own = {space: calibrated(values, pseudo.distances[space]) for space, values in found.items()}
    both = (own["feature"] + cfg.image_weight * own["image"]) / (1 + cfg.image_weight)
    if cfg.gate != "none":
        both = jnp.where(segmented.confidence > sure_above(cfg, pseudo), jnp.minimum(both, 0.0), both)
    sigma = cfg.smooth_sigma * images.shape[1] / 256
    return scores_of(gaussian_smooth(resize(both, images.shape[1:3]), sigma=sigma))
