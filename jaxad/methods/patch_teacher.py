"""Teachers for Uninformed Students: patch networks distilled from an ImageNet classifier on any natural pictures.

    python -m jaxad.methods.patch_teacher PICTURES resnet18.safetensors teacher.npz --backbone resnet18

A teacher does not know the pictures that it will be used on: it is trained once, kept as a file, and used for every
data set (`jaxad train uninformed_students --set teacher=teacher.npz`).

What is whose: the three losses, their weights, Adam at 2e-4 with an L2 decay of 1e-5, 64 patches a step and 50,000
steps are the paper's (see `jaxad.methods.uninformed_students`); so is cropping patches from pictures enlarged to 4 to
16 times the patch, and the noise, shift and grey of triplets, which we recall and could not check. The paper distils
ResNet-18; EfficientNet-Lite0 in its place is ours, and so are other zooms, for pictures smaller than ImageNet's, and
the size of the change of brightness. The paper sums correlations of different components without a square, which one
constraint satisfies; the default here is half the sum of their squares, `compactness` names the literal reading and
others.
"""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxad import importers, train
from jaxad.core import Array, Batch, Phase, Source, config, static
from jaxad.nn import efficientnet, patch_net, resnet
from jaxad.nn import init as draw
from jaxad.nn.patch_net import Shape

COMPACTNESS = ("squared", "literal", "abs", "samples")


class Backbone(NamedTuple):
    """A classifier to distil."""

    network: Any
    features: int  # of its averaged output
    from_torch: Callable
    normalise: Callable  # of pictures in [0, 1]


BACKBONES = {
    "resnet18": Backbone(resnet.ResNet18(), resnet.FEATURES, resnet.from_torch, resnet.normalise),
    "efficientnet_lite0": Backbone(
        efficientnet.EfficientNetLite0(), efficientnet.FEATURES, efficientnet.from_torch, efficientnet.normalise
    ),
}


@config
class TeacherConfig:
    """How one teacher is distilled."""

    patch: int = static(33)  # p: 17 | 33 | 65
    backbone: str = static("resnet18")  # or "efficientnet_lite0"
    width: float = static(1.0)  # here and below: of the network, as for the students
    descriptor: int = static(128)
    conv3_features: int = static(128)
    final_activation: str = static("none")
    p33_conv1: int = static(5)
    p17_taps: tuple[int, ...] = static((6, 5, 5, 4))
    compactness: str = static("squared")  # of correlations: "squared" | "literal" | "abs" | of "samples"
    triplet: bool = static(False)  # whether the triplet loss is computed
    backbone_size: int = static(0)  # pixels a side that the backbone sees patches at; 0: the patch's own
    steps: int = static(50_000)
    batch_size: int = static(64)
    knowledge_weight: float = 1.0  # lambda_k
    triplet_weight: float = 1.0  # lambda_m; counts with `triplet` alone
    compactness_weight: float = 1.0  # lambda_c
    margin: float = 1.0  # delta
    zoom_low: float = 4.0  # pictures are enlarged to a side of so many patches ...
    zoom_high: float = 16.0  # ... up to so many
    grey_probability: float = 0.1
    noise: float = 0.1  # deviation, on the triplet's moved patch
    brightness: float = 0.1  # largest change, on the triplet's moved patch
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5


class TeacherState(NamedTuple):
    """A teacher in training."""

    params: Any  # {"network", "decoder"}
    optimizer: optax.OptState


def check(cfg: TeacherConfig) -> None:
    """Refuses settings that cannot work. Raises ValueError."""
    patch_net.check(patch_net.shape_of(cfg), (cfg.patch,), who="teacher")
    for field, allowed in (("compactness", COMPACTNESS), ("backbone", tuple(BACKBONES))):
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"teacher: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass {field}={allowed[0]!r}."
            )
    if not 0 < float(cfg.zoom_low) <= float(cfg.zoom_high) or float(cfg.zoom_low) < 1:
        raise ValueError(
            f"teacher: zoom from {cfg.zoom_low} to {cfg.zoom_high}; expected 1 or more, and low below high. "
            "Pass zoom_low=4, zoom_high=16."
        )


# --- losses -------------------------------------------------------------------------------------------------------


def knowledge_loss(decoded: Array, features: Array) -> Array:
    """L_k: squared distance of decoded descriptors (B, F) to the backbone's features, mean over the batch."""
    return jnp.mean(jnp.sum((decoded - features) ** 2, axis=-1))


def triplet_loss(anchor: Array, positive: Array, negative: Array, *, margin: Array | float) -> Array:
    """L_m: max(0, margin + d(a, p) - min(d(a, n), d(p, n))) of squared distances; rows (B, d), mean over the batch."""

    def apart(a, b):
        return jnp.sum((a - b) ** 2, axis=-1)

    nearest = jnp.minimum(apart(anchor, negative), apart(positive, negative))
    return jnp.mean(jnp.maximum(0.0, margin + apart(anchor, positive) - nearest))


def correlations(rows: Array) -> Array:
    """Correlations (d, d) between the columns of rows (B, d)."""
    centred = rows - rows.mean(axis=0)
    scaled = centred / (jnp.sqrt(jnp.sum(centred**2, axis=0) / (len(rows) - 1)) + 1e-6)
    return scaled.T @ scaled / (len(rows) - 1)


def compactness_loss(descriptors: Array, decoded: Array, *, kind: str = "squared") -> Array:
    """L_c, that components of descriptors shall not say the same.

    Args:
      descriptors: (B, d).
      decoded: (B, F); read by "samples" alone.
      kind: "squared", half the sum over i != j of c_ij**2; "literal", the sum of c_ij; "abs", the sum of |c_ij|;
        "samples", as "squared" but of correlations between the batch's decoded rows, as in reproductions.
    """
    seen = correlations(decoded.T if kind == "samples" else descriptors)
    others = seen * (1 - jnp.eye(len(seen)))
    if kind == "literal":
        return others.sum()
    return jnp.abs(others).sum() if kind == "abs" else 0.5 * jnp.sum(others**2)


# --- patches ------------------------------------------------------------------------------------------------------


class Patches(NamedTuple):
    """Crops of a batch of pictures, (B, p, p, 3) in [0, 1]."""

    anchor: Array
    moved: Array  # the anchor's place shifted a little, changed in brightness, with noise


def sample(key: Array, cfg: TeacherConfig, images: Array) -> Patches:
    """Crops a patch at random from each picture enlarged at random, and one moved a little.

    Args:
      key: a PRNG key.
      cfg: the config.
      images: (B, H, W, 3) in [0, 1].
    """
    batch, p = images.shape[0], cfg.patch
    numbers = jax.random.uniform(key, (batch * (7 + p * p * 3),))
    seven, noise = numbers[: batch * 7].reshape(7, batch), numbers[batch * 7 :].reshape(batch, p, p, 3)
    zoom, top, left, down, right, is_grey, change = seven
    side = p * (cfg.zoom_low + zoom * (cfg.zoom_high - cfg.zoom_low))
    shift = (p - 1) // 4
    corner = top * (side - p), left * (side - p)
    moved = (jnp.clip(c + shift * (2 * m - 1), 0, side - p) for c, m in zip(corner, (down, right), strict=True))
    grey = (is_grey < cfg.grey_probability)[:, None, None, None]

    def cut(place):
        crops = jax.vmap(functools.partial(crop, size=p))(images, side, *place)
        return jnp.where(grey, crops.mean(axis=-1, keepdims=True), crops)

    normal = jnp.sqrt(2.0) * jax.lax.erf_inv(jnp.clip(2 * noise - 1, -1 + 1e-6, 1 - 1e-6))
    brightness = cfg.brightness * (2 * change - 1)[:, None, None, None]
    return Patches(cut(corner), jnp.clip(cut(tuple(moved)) + brightness + cfg.noise * normal, 0.0, 1.0))


def crop(image: Array, side: Array, top: Array, left: Array, *, size: int) -> Array:
    """A crop of `size` x `size` of a picture (H, W, 3) resized to `side` x `side`, linearly and antialiased.

    `top` and `left` are in pixels of the resized picture and need not be whole.
    """

    def weights(pixels, start):
        step = pixels / side  # pixels of the picture in one of the crop
        centres = (start + jnp.arange(size) + 0.5) * step - 0.5
        near = jnp.maximum(1 - jnp.abs(centres[:, None] - jnp.arange(pixels)) / jnp.maximum(step, 1.0), 0.0)
        return near / jnp.maximum(near.sum(axis=1, keepdims=True), 1e-6)

    rows, columns = weights(image.shape[0], top), weights(image.shape[1], left)
    return jnp.einsum("ph,hwc,qw->pqc", rows, image, columns)


# --- training -----------------------------------------------------------------------------------------------------


def start(key: Array, cfg: TeacherConfig) -> TeacherState:
    """The untrained teacher with its decoder."""
    key_network, key_decoder = jax.random.split(key)
    network = patch_net.network_of(cfg.patch, patch_net.shape_of(cfg))
    features = BACKBONES[cfg.backbone].features
    bound = draw.uniform(1 / math.sqrt(cfg.descriptor))
    decoder = nn.Dense(features, kernel_init=bound, bias_init=bound)
    params = {
        "network": draw.init_flat(key_network, network, jnp.zeros((1, cfg.patch, cfg.patch, 3)))["params"],
        "decoder": draw.init_flat(key_decoder, decoder, jnp.zeros((1, cfg.descriptor)))["params"],
    }
    return TeacherState(params, optax.scale_by_adam().init(params))


def describe(cfg: TeacherConfig, params: Any, patches: Array) -> Array:
    """Descriptors (B, d) of patches (B, p, p, 3) in [0, 1]."""
    network = patch_net.network_of(cfg.patch, patch_net.shape_of(cfg))
    # One patch fits: any stride that pooling divides asks for no more than its own values.
    out: Any = network.apply({"params": params["network"]}, patch_net.normalise(patches), out_stride=64)
    return out[:, 0, 0]


def features_of(cfg: TeacherConfig, variables: Any, patches: Array) -> Array:
    """What the backbone says of patches (B, p, p, 3) in [0, 1]: (B, F)."""
    backbone = BACKBONES[cfg.backbone]
    if cfg.backbone_size:
        patches = jax.image.resize(patches, (len(patches), cfg.backbone_size, cfg.backbone_size, 3), "bilinear")
    return backbone.network.apply(variables, backbone.normalise(patches))


def loss(params: Any, cfg: TeacherConfig, patches: Patches, features: Array) -> tuple[Array, dict[str, Array]]:
    """The weighted losses of a batch: (sum, {"loss", "knowledge", "compactness", perhaps "triplet"})."""
    batch = len(patches.anchor)
    seen = [patches.anchor, patches.moved] if cfg.triplet else [patches.anchor]
    descriptors = describe(cfg, params, jnp.concatenate(seen))
    anchor = descriptors[:batch]
    decoded = anchor @ params["decoder"]["kernel"] + params["decoder"]["bias"]
    parts = {
        "knowledge": knowledge_loss(decoded, features),
        "compactness": compactness_loss(anchor, decoded, kind=cfg.compactness),
    }
    total = cfg.knowledge_weight * parts["knowledge"] + cfg.compactness_weight * parts["compactness"]
    if cfg.triplet:  # the next picture's patch is of another picture, at random
        parts["triplet"] = triplet_loss(anchor, descriptors[batch:], jnp.roll(anchor, 1, axis=0), margin=cfg.margin)
        total = total + cfg.triplet_weight * parts["triplet"]
    return total, {"loss": total, **parts}


def step(key: Array, cfg: TeacherConfig, variables: Any, state: TeacherState, batch: Batch):
    """One step of Adam; `variables` are the backbone's."""
    patches = sample(key, cfg, batch.image)
    features = features_of(cfg, variables, patches.anchor)
    grads, metrics = jax.grad(loss, has_aux=True)(state.params, cfg, patches, features)
    grads = jax.tree.map(lambda g, p: g + cfg.weight_decay * p, grads, state.params)
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer)
    params = jax.tree.map(lambda p, u: p - cfg.learning_rate * u, state.params, updates)
    return TeacherState(params, optimizer), metrics


def distil(
    key: Array, cfg: TeacherConfig, pictures: np.ndarray, variables: Any, *, say: Callable | None = None
) -> tuple[Any, dict[str, np.ndarray]]:
    """Trains one teacher.

    Args:
      key: fixes its start, the crops and their order.
      cfg: how.
      pictures: (N, H, W, 3) uint8, N at least the batch size.
      variables: of the backbone, as from `backbone_of`.
      say: called with (steps done, metrics of the last) now and then.

    Returns:
      (params of the teacher's network, metrics of every step, (steps,)).

    Raises:
      ValueError: settings that cannot work, too few pictures.
    """
    check(cfg)
    if len(pictures) < cfg.batch_size:
        raise ValueError(
            f"{len(pictures)} pictures for steps of {cfg.batch_size}; expected at least as many. "
            f"Give more, or batch_size={len(pictures)}."
        )
    source = jax.device_put(Source(image=pictures, label=np.zeros(len(pictures), np.int32)))
    key_start, key_run = jax.random.split(key)
    phase = Phase("distil", lambda k, state, batch: state, steps=cfg.steps, batch_size=cfg.batch_size)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, variables, source, t):
        batch = train.batch_at(key_run, phase, t, source)
        return step(jax.random.fold_in(key_run, t), cfg, variables, state, batch)

    state = jax.jit(start)(key_start, cfg)
    log = []
    for t in range(cfg.steps):
        state, metrics = run(state, variables, source, np.int32(t))
        log.append(metrics)
        if say and ((t + 1) % 100 == 0 or t + 1 == cfg.steps):
            say(t + 1, {name: float(value) for name, value in metrics.items()})
    fetched = jax.device_get(log)
    return state.params["network"], {name: np.stack([m[name] for m in fetched]) for name in fetched[0]}


def backbone_of(name: str, path: str | os.PathLike) -> Any:
    """The variables of a backbone from a file of torch's names. Raises WeightsError."""
    return jax.device_put(BACKBONES[name].from_torch(importers.read(path), origin=str(path)))


# --- files --------------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike, teachers: Mapping[int, Any], shape: Shape, *, facts: Mapping[str, Any] = {}) -> None:  # noqa: B006
    """Writes teachers as a NumPy archive.

    Args:
      path: ending in .npz.
      teachers: params of the network for each size of patch.
      shape: of all of them.
      facts: plain values on how they were made, for the record.
    """
    arrays = {f"p{patch}/{name}": leaf for patch, params in teachers.items() for name, leaf in _flat(params).items()}
    notes = json.dumps({"shape": patch_net.as_text(shape), "patches": list(teachers), **facts})
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        everything: dict[str, Any] = {**arrays, "notes": np.frombuffer(notes.encode(), np.uint8)}
        np.savez(file, **everything)


def _flat(params: Any) -> dict[str, np.ndarray]:
    return {f"{layer}/{name}": np.asarray(leaf) for layer, own in params.items() for name, leaf in own.items()}


def load(path: str | os.PathLike, patches: Sequence[int], shape: Shape) -> dict[str, Any]:
    """The teachers of a file: params by "p17" and so on.

    Args:
      path: as `save` wrote it.
      patches: the sizes wanted.
      shape: of the networks wanted.

    Raises:
      WeightsError: no such file, none of teachers, another shape, or a size of patches that it does not hold.
    """
    arrays = importers.read(path)
    try:
        notes = json.loads(arrays["notes"].tobytes())
        own = patch_net.from_text(notes["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise importers.WeightsError(
            f"{path}: no file of teachers; expected one made by `python -m jaxad.methods.patch_teacher`. "
            "Distil one, or pass --set teacher=random."
        ) from error
    if own != shape or not set(patches) <= set(notes["patches"]):
        wrong = [f"{f}={a!r} instead of {b!r}" for f, a, b in zip(Shape._fields, own, shape, strict=True) if a != b]
        wrong += [f"no patches of {p}" for p in patches if p not in notes["patches"]]
        flags = " ".join(f"--set {field}={getattr(own, field)}" for field in Shape._fields)
        raise importers.WeightsError(
            f"{path}: its teachers have {', '.join(wrong)}; expected the networks of this run. "
            f"Pass {flags} and patches of {notes['patches']}."
        )
    teachers: dict[str, Any] = {}
    for patch in patches:
        layers: dict[str, Any] = {}
        for name, array in arrays.items():
            scale, _, rest = name.partition("/")
            if scale == f"p{patch}":
                layer, _, part = rest.partition("/")
                layers.setdefault(layer, {})[part] = array
        teachers[f"p{patch}"] = layers
    return teachers


# --- command ------------------------------------------------------------------------------------------------------


def pictures_of(path: str | os.PathLike, *, size: int) -> np.ndarray:
    """All pictures in a folder or ZIP, (N, size, size, 3) uint8. Raises DataError."""
    from jaxad.data import decode, files, pictures

    where = pathlib.Path(path)
    zips = sorted(where.glob("*.zip")) if where.is_dir() else [where] if where.suffix.lower() == ".zip" else []
    if not zips:
        return pictures.read(pictures.find([where]), image_size=size)
    store = files.Zip(zips[0])
    names = [name for name in store.names if files.is_picture(name)]
    return np.stack(list(decode.in_threads(lambda name: decode.picture(store, name, (size, size), 3)[0], names)))


def command(
    pictures: str,
    weights: str,
    out: str,
    *,
    cfg: TeacherConfig,
    patches: tuple[int, ...] = patch_net.PATCHES,
    picture_size: int = 256,
    seed: int = 0,
) -> None:
    """Distils a teacher for each size of patches and writes them to one file.

    Args:
      pictures: folder or ZIP of natural pictures.
      weights: file of the backbone's weights, torch's names (see `jaxad.importers`).
      out: file to write, ending in .npz.
      cfg: how; its field `patch` is not used.
      patches: sizes of patches.
      picture_size: pixels that pictures are resized to when they are read.
      seed: of all randomness.
    """
    import dataclasses

    data = pictures_of(pictures, size=picture_size)
    variables = backbone_of(cfg.backbone, weights)
    print(f"{len(data)} pictures of {picture_size}x{picture_size}, {cfg.backbone} from {weights}")
    teachers = {}
    for patch in patches:
        own = dataclasses.replace(cfg, patch=patch)

        def say(done, metrics, patch=patch):
            print(f"p{patch} {done}/{cfg.steps} " + " ".join(f"{k} {v:.3f}" for k, v in metrics.items()), flush=True)

        teachers[patch] = distil(jax.random.fold_in(jax.random.key(seed), patch), own, data, variables, say=say)[0]
    plain = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg) if field.name != "patch"}
    facts = {"distilled": {**plain, "p17_taps": list(cfg.p17_taps)}, "seed": seed, "pictures": len(data)}
    save(out, teachers, patch_net.shape_of(cfg), facts=facts)
    print(f"wrote {out}; use it with --set teacher={out}")


def main() -> None:
    import tyro

    from jaxad import allocator

    allocator.keep_freed_memory()
    tyro.cli(command, config=(tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes))


if __name__ == "__main__":
    main()
