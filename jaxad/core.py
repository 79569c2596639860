"""The vocabulary of jaxad: what data, scores, phases, methods and configs are.

A method is a config, an `init`, a tuple of named phases and a `score`. A phase folds a pure
`step(key, state, batch) -> (state, metrics)` over a stream of batches. Because nothing else is
needed to train, one `fit` (see `jaxad.train`) trains every method, and it can be jitted whole,
vmapped over seeds and hyper-parameters, and sharded over devices.

Sizes in docstrings: B batch, H W C image, T frames of a clip, F stored pictures, N samples of a source.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

if typing.TYPE_CHECKING:
    Array: typing.TypeAlias = Any  # sources hold NumPy arrays on the host and jax arrays on the device
else:
    Array = jax.Array
Config = typing.TypeVar("Config")


class Batch(NamedTuple):
    """B rows of a source: what every step sees."""

    image: Array  # (B, H, W, C), or (B, T, H, W, C) for clips; float32 in [0, 1]
    label: Array  # (B,) int32: 0 normal, 1 anomalous, -1 unknown
    mask: Array  # (B, H, W) float32: 1 on anomalous pixels (of the target frame, for clips)
    index: Array  # (B,) int32 row in the source; >= N on padding rows
    valid: Array  # (B,) bool: False on padding rows


class Scores(NamedTuple):
    """Anomaly scores; higher is more anomalous."""

    image: Array  # (B,) float32
    map: Array  # (B, H, W) float32 at input resolution


class Spec(NamedTuple):
    """What `init` may know of the data before training: static shapes and sizes only."""

    image: tuple[int, ...]  # (H, W, C) or (T, H, W, C)
    sizes: Mapping[str, int]  # rows of each source
    masked: frozenset[str] | None = None  # the sources with masks; None: not known, as where no data is at hand


class Preset(NamedTuple):
    """One published (or sized) setting of a method: config fields and how to read the data."""

    doc: str
    config: Mapping[str, Any] = {}  # fields of the method's config
    data: Mapping[str, Any] = {}  # keyword arguments of `jaxad.data.load`


def keep(key: Array, state: Any) -> Any:
    """The `finish` of a phase that needs none."""
    del key
    return state


def stay(state: Any, images: Array, scores: Scores) -> Any:
    """The `adapt` of a method that does not change at test time."""
    del images, scores
    return state


def accept(cfg: Any, spec: Spec) -> None:
    """The `check` of a method to which every config and picture size is fine."""
    del cfg, spec


class Phase(NamedTuple):
    """A named fold of `step` over batches of one source."""

    name: str
    step: Callable  # (key, state, batch) -> (state, metrics: dict of scalars)
    source: str = "train"  # "train" | "aux" | "holdout" | "labelled"
    steps: int | None = None  # None: one ordered pass over the source, last batch padded
    batch_size: int = 32
    finish: Callable = keep  # (key, state) -> state, once, after the last step


class Ordered(NamedTuple):
    """How a method scores samples that come in order, such as a video's frames: it may adapt in between."""

    step: Callable  # (state, images, valid) -> (state, Scores, parts: dict of (B,)); in order, B a multiple of `unit`
    unit: Callable  # (cfg) -> int, the least B; reads static fields only
    combine: Callable  # (cfg, parts, each stretched to [0, 1] within its video) -> (N,) image scores


class Method(NamedTuple):
    """An anomaly detection method. Its trained state is one pytree that holds its config."""

    name: str
    config: type  # frozen dataclass made by `config`
    init: Callable  # (key, cfg, spec) -> state
    phases: Callable  # (cfg) -> tuple[Phase, ...]; reads static fields only
    score: Callable  # (state, images) -> Scores; pure, no key; row i depends on image i only
    presets: Mapping[str, Preset]  # the first is the default; "cpu", if there, is it without an accelerator
    adapt: Callable = stay  # (state, images, scores) -> state; test-time update
    ordered: Ordered | None = None  # None: order does not matter to it
    check: Callable = accept  # (cfg, spec) -> None; raises ValueError on the host, before any work


def static(default: Any) -> Any:
    """A config field that changes a shape, a loop length or a Python branch: part of the tree, not a leaf."""
    return dataclasses.field(default=default, metadata={"static": True})


@typing.dataclass_transform(frozen_default=True, kw_only_default=True)
def config(cls: type[Config]) -> type[Config]:
    """Makes a class a frozen, keyword-only dataclass and a pytree.

    Fields given by `static(...)` are metadata; every other field is a leaf, so it may be traced,
    vmapped over, and changed without recompiling.
    """
    made: Any = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(made)
    return jax.tree_util.register_dataclass(
        made,
        data_fields=[f.name for f in fields if not f.metadata.get("static")],
        meta_fields=[f.name for f in fields if f.metadata.get("static")],
    )


def is_static(cfg: Any, field: str) -> bool:
    """Whether a config field forces a new compilation when it changes."""
    return bool(cfg.__dataclass_fields__[field].metadata.get("static"))


def as_arrays(cfg: Config) -> Config:
    """The config with Python numbers turned into float32/int32 arrays, so that a state has one structure for life."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), cfg)


@config
class Source:
    """A set of samples on the device. A sample is one picture, or, where `start` is given, a clip of T frames."""

    image: Array  # (F, H, W, C) uint8
    label: Array  # (F,) int32: 0 normal, 1 anomalous, -1 unknown
    mask: Array | None = None  # (F, H, W) uint8 0/1, or classes of pixels; None: no masks, read as all zero
    start: Array | None = None  # (N,) int32 first frame of each clip; None: every picture is a sample
    clip: int = static(1)  # T, frames a clip; used only with `start`
    target: int = static(0)  # the frame of the clip whose label and mask are the sample's
    rows: Array | None = None  # (N,) int32 pictures that are the samples, where sources share a pool; None: all of them
    size: Array | None = None  # () int32 samples that count, where sources are padded to one length; None: all of them

    def __len__(self) -> int:
        index = self.rows if self.start is None else self.start
        return self.label.shape[0] if index is None else index.shape[0]

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(H, W, C), or (T, H, W, C) for clips."""
        shape = self.image.shape[1:]
        return shape if self.start is None else (self.clip, *shape)


def frames_of(source: Source, rows: Array) -> Array:
    """Which stored pictures bear the label and mask of samples: rows (B,) int32 in [0, N) -> (B,) int32 in [0, F)."""
    if source.start is not None:
        return source.start[rows] + source.target
    return rows if source.rows is None else source.rows[rows]


def take(source: Source, rows: Array) -> tuple[Array, Array, Array]:
    """Gathers samples: rows (B,) int32 in [0, N) -> images float32 in [0, 1], labels (B,), masks (B, H, W) float32."""
    frames = frames_of(source, rows)
    if source.start is None:
        pixels = source.image[frames]
    else:
        pixels = source.image[source.start[rows][:, None] + jnp.arange(source.clip)]
    height, width = source.image.shape[1:3]
    if source.mask is None:
        mask = jnp.zeros((*rows.shape, height, width), jnp.float32)
    else:
        mask = source.mask[frames].astype(jnp.float32)
    return pixels.astype(jnp.float32) / 255, source.label[frames], mask


def spec_of(data: Mapping[str, Any]) -> Spec:
    """The static facts of a data set. Raises ValueError if it has no source named "train"."""
    if "train" not in data:
        raise ValueError(
            f"data has no source named 'train'; got {sorted(data)}. Pass {{'train': Source(image=..., label=...)}}."
        )
    masked = frozenset(name for name, source in data.items() if getattr(source, "mask", None) is not None)
    sizes = {name: len(source) for name, source in data.items()}
    return Spec(image=data["train"].sample_shape, sizes=sizes, masked=masked)


def select(source: Source, rows: Array) -> Source:
    """The source made of the given samples, rows (n,) in [0, N)."""
    if source.start is not None:
        return dataclasses.replace(source, start=source.start[rows], size=None)
    if source.rows is not None:
        return dataclasses.replace(source, rows=source.rows[rows], size=None)
    mask = None if source.mask is None else source.mask[rows]
    return dataclasses.replace(source, image=source.image[rows], label=source.label[rows], mask=mask)
