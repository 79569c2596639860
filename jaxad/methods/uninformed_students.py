"""Uninformed Students: students regress a teacher's descriptors of patches; where they err or disagree is anomalous.

Bergmann, Fauser, Sattlegger, Steger. "Uninformed Students: Student-Teacher Anomaly Detection with Discriminative Latent
Embeddings". CVPR 2020. https://arxiv.org/abs/1911.02357

A teacher, distilled from an ImageNet classifier by `jaxad.methods.patch_teacher`, turns the patch around each pixel
into a descriptor of 128 numbers. Several students of the same architecture learn on normal pictures to give the same,
standardised. A pixel's score is the students' squared error plus the variance between them, each standardised by
held-out normal pictures, averaged over patches of 17, 33 and 65 pixels. Nothing is computed patch by patch: networks
with pooling are evaluated densely (`jaxad.nn.dense`).

What is whose:
  * No official code was published. The losses, the scores, three students and Adam at 1e-4 with an L2 decay of 1e-5,
    100 epochs of single pictures of 256x256, are the paper's as its text and two transcriptions of it give them.
  * The paper's table of layers cannot be built literally; `jaxad.nn.patch_net` has the nearest that can, and other
    readings as fields: `conv3_features`, `p33_conv1`, `p17_taps`. That the descriptor is linear is our inference:
    standardised targets are negative half of the time, which a leaky unit of slope 0.005 (`final_activation="leaky"`,
    in reproductions) hardly reaches.
  * The paper does not say how pictures are padded: "reflect" and "zero" are two reproductions' choices. Inputs are
    normalised by ImageNet's mean and deviation, as in one of them. `centre_field` is ours: it removes the shift of
    half a pixel and of 2.5 pixels that the maps of 33 and 65 have.
  * Not stated for MVTec: the image score. It is the map's maximum, as later papers that ran the method have it.
  * Ours: all scales train in one step, which changes nothing for any of them; `width`, `out_stride` (the map at every
    n-th pixel, linear in between), `ensemble`, and every preset but `paper`. With `teacher="random"`, the default, the
    teacher is a network of random weights: it needs no file, finds less, and is no part of the paper.
  * Nobody has published weights, and no reproduction reached the paper's figures; we promise none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxad.core import Array, Batch, Method, Phase, Preset, Scores, Spec, config, static
from jaxad.methods import patch_teacher
from jaxad.nn import patch_net
from jaxad.nn.conv import target_platform
from jaxad.nn.dense import BACKENDS, PatchNetwork
from jaxad.nn.init import init_flat
from jaxad.ops import moments
from jaxad.ops.moments import Moments

ENSEMBLES = ("auto", "unrolled", "loop", "vmap", "shard")


@config
class UninformedStudentsConfig:
    """Settings of Uninformed Students. Fields marked static force a new compilation; the others may be vmapped over."""

    patches: tuple[int, ...] = static((17, 33, 65))  # p of each scale, some of 17, 33, 65
    teacher: str = static("random")  # file of distilled teachers (`python -m jaxad.methods.patch_teacher`) | "random"
    students: int = static(3)  # M, of each scale
    width: float = static(1.0)  # of the networks, relative to the paper's
    descriptor: int = static(128)  # d
    conv3_features: int = static(128)  # of the network for 65: 128 | 256
    final_activation: str = static("none")  # "none" | "leaky"
    p33_conv1: int = static(5)  # taps of the first layer of the network for 33: 5 | 3
    p17_taps: tuple[int, ...] = static((6, 5, 5, 4))  # of the network for 17; or (5, 5, 5, 5)
    padding: str = static("reflect")  # "reflect" | "zero"
    centre_field: bool = static(False)  # descriptors lie where their pixels do
    out_stride: int = static(1)  # pixels between descriptors, in training and scoring: 1 is every pixel
    calibration: str = static("holdout")  # normal pictures by which error and variance are standardised | "train"
    steps: int = static(18_800)  # of the students
    batch_size: int = static(1)
    dtype: str = static("float32")  # of convolutions: "float32" | "bfloat16"
    backend: str = static("auto")  # of dense evaluation: "auto" | "phase" | "dilated" | "patch"
    ensemble: str = static("auto")  # students one after the other: "unrolled" | "loop"; "vmap"; over devices: "shard"
    conv_impl: str = static("auto")  # "auto" | "conv" | "mixed" | "gemm"
    learning_rate: float = 1e-4  # Adam, betas 0.9 and 0.999
    weight_decay: float = 1e-5  # added to gradients, as torch's Adam has it


class Scale(NamedTuple):
    """All that belongs to one size of patches."""

    teacher: Any  # params of its network
    students: Any  # the same with a leading axis M
    target: Moments  # (d,) each, of the teacher's descriptors on training pictures
    error: Moments  # of normal pictures' pixels
    variance: Moments


class UninformedStudentsState(NamedTuple):
    """A detector, trained or in training."""

    cfg: UninformedStudentsConfig
    scales: dict[str, Scale]  # by "p17" and so on
    optimizer: optax.OptState


class Votes(NamedTuple):
    """What M students say of each pixel, relative to the teacher."""

    mean: Array  # (B, h, w, d) of their differences to it
    squares: Array  # (B, h, w) sum of squared distances of the students from their mean
    students: Array | int  # M


_CHOICES = {
    "padding": patch_net.PADDINGS,
    "calibration": ("holdout", "train"),
    "dtype": ("float32", "bfloat16"),
    "backend": BACKENDS,
    "ensemble": ENSEMBLES,
}


def check(cfg: UninformedStudentsConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, networks that do not exist, no students, clips, a missing or unsuitable teacher.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"uninformed_students: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    shape = patch_net.shape_of(cfg)
    patch_net.check(shape, cfg.patches, who="uninformed_students")
    if min(cfg.students, cfg.out_stride) < 1:
        raise ValueError(
            f"uninformed_students: students={cfg.students}, out_stride={cfg.out_stride}; expected at least 1. "
            "Pass --set students=3 --set out_stride=1."
        )
    if len(spec.image) != 3 or spec.image[-1] not in (1, 3):
        raise ValueError(
            f"uninformed_students: samples of shape {spec.image}; expected pictures of 1 or 3 channels. "
            "Load the data without clip, and with channels=3."
        )
    if cfg.calibration == "holdout" and "holdout" in spec.sizes and not spec.sizes["holdout"]:
        raise ValueError(
            "uninformed_students: calibration='holdout', but no normal pictures are held out; expected some. "
            "Pass --holdout 0.1 or --set calibration=train."
        )
    if cfg.teacher != "random":
        patch_teacher.load(cfg.teacher, cfg.patches, shape)


# --- networks -----------------------------------------------------------------------------------------------------


def name_of(patch: int) -> str:
    """The name of a scale in the state."""
    return f"p{patch}"


def network_of(cfg: UninformedStudentsConfig, patch: int) -> PatchNetwork:
    """The network of a scale."""
    return patch_net.network_of(patch, patch_net.shape_of(cfg), impl=cfg.conv_impl)


def describe(cfg: UninformedStudentsConfig, patch: int, params: Any, padded: Array) -> Array:
    """Descriptors (B, h, w, d) float32 of every `out_stride`-th pixel of padded pictures."""
    x = padded.astype(jnp.dtype(cfg.dtype))
    out = network_of(cfg, patch).apply({"params": params}, x, out_stride=cfg.out_stride, backend=cfg.backend)
    return jnp.asarray(out, jnp.float32)


def padded(cfg: UninformedStudentsConfig, patch: int, images: Array) -> Array:
    """Pictures (B, H, W, 1 or 3) in [0, 1], normalised and padded for a scale."""
    layers = network_of(cfg, patch).layers
    return patch_net.pad(patch_net.normalise(images), patch, layers, mode=cfg.padding, centre=cfg.centre_field)


def targets(cfg: UninformedStudentsConfig, patch: int, scale: Scale, x: Array) -> Array:
    """The teacher's standardised descriptors of padded pictures, (B, h, w, d): zero mean, unit variance on training."""
    return moments.standardise(describe(cfg, patch, scale.teacher, x), scale.target)


def init(key: Array, cfg: UninformedStudentsConfig, spec: Spec) -> UninformedStudentsState:
    """The untrained detector, with the teachers of `cfg.teacher`. Students differ by their random start alone."""
    teachers: dict[str, Any] = {}
    students = {}
    for index, patch in enumerate(cfg.patches):
        network, x = network_of(cfg, patch), jnp.zeros((1, patch, patch, 3))
        keys = jax.random.split(jax.random.fold_in(key, index), cfg.students + 1)
        drawn = jax.vmap(lambda k, n=network, x=x: init_flat(k, n, x)["params"])(keys)
        teachers[name_of(patch)] = jax.tree.map(lambda leaf: leaf[0], drawn)
        students[name_of(patch)] = jax.tree.map(lambda leaf: leaf[1:], drawn)
    if cfg.teacher != "random":
        teachers = _read_teachers(cfg, teachers)
    nothing, each = moments.empty(), jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, cfg.descriptor), moments.empty())
    scales = {name: Scale(teachers[name], students[name], each, nothing, nothing) for name in teachers}
    return UninformedStudentsState(cfg, scales, optax.scale_by_adam().init(students))


def _read_teachers(cfg: UninformedStudentsConfig, like: Any) -> Any:
    """The teachers of the file, read when the program runs: shapes alone, as for a restored detector, need no file."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like)
    read = functools.partial(patch_teacher.load, cfg.teacher, cfg.patches, patch_net.shape_of(cfg))
    return jax.pure_callback(read, shapes, vmap_method="sequential")


# --- training -----------------------------------------------------------------------------------------------------


def target_step(key: Array, state: UninformedStudentsState, batch: Batch):
    """Folds a batch into the mean and deviation of each component of the teachers' descriptors."""
    del key
    cfg, scales = state.cfg, dict(state.scales)
    for patch in cfg.patches:
        scale = scales[name_of(patch)]
        seen = describe(cfg, patch, scale.teacher, padded(cfg, patch, batch.image))
        target = jax.vmap(moments.add, in_axes=(0, -1, None))(scale.target, seen, batch.valid)
        scales[name_of(patch)] = scale._replace(target=target)
    deviation = [jnp.sqrt(s.target.squares / jnp.maximum(s.target.count, 1.0)).mean() for s in scales.values()]
    return state._replace(scales=scales), {"deviation": jnp.stack(deviation).mean()}


def student_loss(cfg: UninformedStudentsConfig, patch: int, params: Any, x: Array, target: Array) -> Array:
    """Squared distance of one student's descriptors to the targets, summed over components, mean over pixels."""
    return jnp.mean(jnp.sum((describe(cfg, patch, params, x) - target) ** 2, axis=-1))


def train_step(key: Array, state: UninformedStudentsState, batch: Batch):
    """One step of Adam for every student of every scale, each by itself."""
    del key
    cfg = state.cfg
    grads, losses = {}, {}
    for patch in cfg.patches:
        scale, x = state.scales[name_of(patch)], padded(cfg, patch, batch.image)
        target = targets(cfg, patch, scale, x)
        step = jax.value_and_grad(functools.partial(student_loss, cfg, patch))
        losses[patch], grads[name_of(patch)] = _per_student(cfg, step, scale.students, x, target)
    students = {name: scale.students for name, scale in state.scales.items()}
    grads = jax.tree.map(lambda g, p: g + cfg.weight_decay * p, grads, students)
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer)
    students = jax.tree.map(lambda p, u: p - cfg.learning_rate * u, students, updates)
    scales = {name: scale._replace(students=students[name]) for name, scale in state.scales.items()}
    each = {f"loss_p{patch}": values.mean() for patch, values in losses.items()}
    return state._replace(scales=scales, optimizer=optimizer), {"loss": jnp.stack([*each.values()]).mean(), **each}


def calibration_step(key: Array, state: UninformedStudentsState, batch: Batch):
    """Folds a batch of normal pictures into the statistics of error and variance, over all pixels."""
    del key
    scales = dict(state.scales)
    for patch in state.cfg.patches:
        scale = scales[name_of(patch)]
        error, variance = judge(state, patch, batch.image)
        folded = {"error": moments.add(scale.error, error, batch.valid)}
        folded["variance"] = moments.add(scale.variance, variance, batch.valid)
        scales[name_of(patch)] = scale._replace(**folded)
    found = {f"{part}_{name}": getattr(s, part).mean for name, s in scales.items() for part in ("error", "variance")}
    return state._replace(scales=scales), found


def phases(cfg: UninformedStudentsConfig) -> tuple[Phase, ...]:
    return (
        Phase("targets", target_step, batch_size=cfg.batch_size),
        Phase("students", train_step, steps=cfg.steps, batch_size=cfg.batch_size),
        Phase("calibrate", calibration_step, source=cfg.calibration, batch_size=cfg.batch_size),
    )


# --- the ensemble -------------------------------------------------------------------------------------------------


def _how(cfg: UninformedStudentsConfig) -> str:
    """One after the other: vmapped kernels become grouped convolutions (benchmarks/dense.py).

    XLA-CPU's convolutions are slow in a loop. The TPU compiler takes several times longer for networks that are there
    more than once, and each of their convolutions fills a chip (by its estimates). GPUs: not measured.
    """
    if cfg.ensemble == "auto":
        return "loop" if target_platform() == "tpu" else "unrolled"
    return cfg.ensemble


def _over_devices(cfg: UninformedStudentsConfig, function: Callable, shared: int, out_specs: Any) -> Callable:
    """`function(students, *shared)` with the students spread over as many devices as divide them."""
    count = math.gcd(cfg.students, jax.device_count())
    mesh = Mesh(np.array(jax.devices()[:count]), ("students",), axis_types=(AxisType.Auto,))
    in_specs = (PartitionSpec("students"), *(PartitionSpec(),) * shared)
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _per_student(cfg: UninformedStudentsConfig, function: Callable, students: Any, *shared: Array) -> Any:
    """`function(params, *shared)` of every student, results stacked along a leading axis M."""
    how = _how(cfg)
    if how == "vmap":
        return jax.vmap(function, in_axes=(0, *(None,) * len(shared)))(students, *shared)

    def in_turn(students, *shared):
        step = lambda _, params: (None, function(params, *shared))  # noqa: E731
        return jax.lax.scan(step, None, students, unroll=how != "loop")[1]

    if how != "shard":
        return in_turn(students, *shared)
    return _over_devices(cfg, in_turn, len(shared), PartitionSpec("students"))(students, *shared)


def votes_in_turn(function: Callable, students: Any, target: Array, *, unroll: bool = True) -> Votes:
    """Mean and scatter of what students say, one student after the other, by Welford's update: no cancellation, and
    never more than one student's descriptors in memory.

    Args:
      function: (params of one student) -> (B, h, w, d).
      students: params with a leading axis.
      target: (B, h, w, d), taken off first.
      unroll: whether the compiled program has each student's network, or one in a loop.
    """

    def hear(so_far, student):
        (mean, squares), (params, before) = so_far, student
        apart = function(params) - target - mean
        mean = mean + apart / (before + 1)
        return (mean, squares + jnp.sum(apart**2, axis=-1) * (before / (before + 1))), None

    count = jax.tree.leaves(students)[0].shape[0]
    start = jnp.zeros_like(target), jnp.zeros(target.shape[:-1])
    (mean, squares), _ = jax.lax.scan(hear, start, (students, jnp.arange(float(count))), unroll=unroll)
    return Votes(mean, squares, count)


def votes(cfg: UninformedStudentsConfig, patch: int, students: Any, x: Array, target: Array) -> Votes:
    """What all students of a scale say of padded pictures."""
    how = _how(cfg)
    if how == "vmap":
        each = jax.vmap(lambda params: describe(cfg, patch, params, x))(students) - target
        mean = each.mean(axis=0)
        return Votes(mean, jnp.sum((each - mean) ** 2, axis=(0, -1)), cfg.students)

    def in_turn(students, x, target):
        return votes_in_turn(lambda params: describe(cfg, patch, params, x), students, target, unroll=how != "loop")

    if how != "shard":
        return in_turn(students, x, target)

    def joined(students, x, target):
        mine = in_turn(students, x, target)
        mean = jax.lax.pmean(mine.mean, "students")
        apart = mine.students * jnp.sum((mine.mean - mean) ** 2, axis=-1)
        return Votes(mean, jax.lax.psum(mine.squares + apart, "students"), jax.lax.psum(mine.students, "students"))

    return _over_devices(cfg, joined, 2, PartitionSpec())(students, x, target)


def judge(state: UninformedStudentsState, patch: int, images: Array) -> tuple[Array, Array]:
    """Regression error and predictive variance of each pixel at a scale, both (B, h, w) and at least 0.

    The error is the squared distance of the students' mean to the target, the variance their mean squared distance
    from their mean.
    """
    cfg, scale = state.cfg, state.scales[name_of(patch)]
    x = padded(cfg, patch, images)
    found = votes(cfg, patch, scale.students, x, targets(cfg, patch, scale, x))
    return jnp.sum(found.mean**2, axis=-1), found.squares / found.students


# --- scoring ------------------------------------------------------------------------------------------------------


def score(state: UninformedStudentsState, images: Array) -> Scores:
    """Scores pictures: the mean over scales of standardised error plus standardised variance.

    Args:
      state: the detector.
      images: (B, H, W, C) in [0, 1].

    Returns:
      Scores: the map, and its maximum as the image score.
    """
    total: Any = 0.0
    for patch in state.cfg.patches:
        scale = state.scales[name_of(patch)]
        error, variance = judge(state, patch, images)
        total += moments.standardise(error, scale.error) + moments.standardise(variance, scale.variance)
    small = total / len(state.cfg.patches)
    map_ = patch_net.enlarge(small, (images.shape[1], images.shape[2]), out_stride=state.cfg.out_stride)
    return Scores(image=map_.max(axis=(1, 2)), map=map_)


PRESETS = {
    "paper": Preset(
        "256x256, three scales of three full-width students, 100 epochs of 188 pictures; pass a distilled teacher",
        data={"image_size": 256, "channels": 3},
    ),
    "cpu": Preset(
        "128x128, patches of 33, a quarter of the width, every fourth pixel, minutes on two cores (ours)",
        config={
            "patches": (33,),
            "width": 0.25,
            "out_stride": 4,
            "batch_size": 4,
            "steps": 600,
            "learning_rate": 1e-3,
        },
        data={"image_size": 128, "channels": 3},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32, patches of 17, seconds on two cores (ours)",
        config={
            "patches": (17,),
            "students": 2,
            "width": 0.0625,
            "descriptor": 16,
            "out_stride": 2,
            "batch_size": 8,
            "steps": 300,
            "learning_rate": 2e-3,
        },
        data={"image_size": 32, "channels": 3},
    ),
}

METHOD = Method(
    name="uninformed_students",
    config=UninformedStudentsConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
