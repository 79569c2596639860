"""A small method that uses every part of the interface: a pass, training steps, `finish`, `adapt`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxad.core import Array, Method, Ordered, Phase, Preset, Scores, config, static


@config
class ToyConfig:
    steps: int = static(6)
    batch_size: int = static(8)
    learning_rate: float = 0.5
    noise: float = 0.1


class ToyState(NamedTuple):
    cfg: ToyConfig
    total: Array  # (H, W, C) sum of normal images, then their mean
    count: Array
    template: Array  # (H, W, C) learned by noisy gradient steps from a random start
    seen: Array  # (N,) how often each training row was seen
    adapted: Array  # images seen at test time


def init(key, cfg, spec):
    zeros = jnp.zeros(spec.image)
    noise = cfg.noise * jax.random.normal(key, spec.image)
    return ToyState(cfg, zeros, jnp.zeros(()), noise, jnp.zeros(spec.sizes["train"]), jnp.zeros(()))


def mean_step(key, state, batch):
    del key
    weights = batch.valid.astype(jnp.float32)
    total = state.total + jnp.einsum("b,bhwc->hwc", weights, batch.image)
    rows = jnp.where(batch.valid, batch.index, state.seen.shape[0])
    seen = state.seen.at[rows].add(1, mode="drop")
    return state._replace(total=total, count=state.count + weights.sum(), seen=seen), {"rows": weights.sum()}


def mean_finish(key, state):
    del key
    return state._replace(total=state.total / jnp.maximum(state.count, 1))


def train_step(key, state, batch):
    cfg = state.cfg
    noisy = batch.image + cfg.noise * jax.random.normal(key, batch.image.shape)
    error = state.template - noisy.mean(axis=0)
    template = state.template - cfg.learning_rate * error
    return state._replace(template=template), {"loss": jnp.mean(error**2)}


def score(state, images):
    maps = ((images - state.total) ** 2 + (images - state.template) ** 2).mean(axis=-1)
    return Scores(image=maps.mean(axis=(1, 2)), map=maps)


def adapt(state, images, scores):
    del scores
    total = state.total + 0.5 * (images.mean(axis=0) - state.total)
    return state._replace(total=total, adapted=state.adapted + images.shape[0])


def score_in_order(state, images, valid):
    """Adapts after each picture."""

    def one(state, picture):
        image, is_valid = picture
        scores = score(state, image[None])
        adapted = adapt(state, image[None], scores)
        state = jax.tree.map(lambda new, old: jnp.where(is_valid, new, old), adapted, state)
        return state, (scores.image[0], scores.map[0])

    state, (image, maps) = jax.lax.scan(one, state, (images, valid))
    return state, Scores(image, maps), {"first": image, "second": maps[:, 0, 0]}


def combine(cfg, parts):
    del cfg
    return 0.25 * parts["first"] + 0.75 * (1 - parts["second"])


def phases(cfg):
    return (
        Phase("mean", mean_step, steps=None, batch_size=cfg.batch_size, finish=mean_finish),
        Phase("train", train_step, steps=cfg.steps, batch_size=cfg.batch_size),
    )


METHOD = Method("toy", ToyConfig, init, phases, score, {"tiny": Preset("toy")}, adapt=adapt)
IN_ORDER = METHOD._replace(ordered=Ordered(score_in_order, lambda cfg: 2, combine))
