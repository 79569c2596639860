"""SynthCP's settings, state and networks; the method itself is `jaxad.methods.synthcp`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxad.core import Array, Batch, Scores, Spec, config, static
from jaxad.nn import pretrained, spade
from jaxad.nn.comparison import DiscrepancyNet, FailureNet
from jaxad.nn.segmenter import Segmenter
from jaxad.ops.compare import top_share
from jaxad.ops.moments import Moments

_TOP = 0.01  # share of the pixels that make the image score
_MOMENTUM = 0.9  # of the segmenter's SGD


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
    compare_features: str = static("segmenter")  # given labels: "segmenter" (paper) | "image": SSIM, of any segmenter
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
    "compare_features": ("segmenter", "image"),
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
    if cfg.labels == "given" and spec.masked is not None and "train" not in spec.masked:
        raise ValueError(
            "synthcp: labels='given' learns from the class of every pixel, and the training pictures have no masks; "
            "expected a source whose masks are classes, as jaxad.data.from_arrays(..., train_classes=...) makes. "
            "Without classes pass --preset industrial or --set labels=clusters."
        )
    blocks = len(cfg.generator_widths)
    if not spade.fits(blocks, cfg.upsamplings):
        raise ValueError(
            f"synthcp: {blocks} blocks with upsamplings={cfg.upsamplings}; expected {blocks - 1}, or {blocks - 2} of "
            f"three blocks and more. Pass --set upsamplings={blocks - 1}."
        )
    height, width = spec.image[:2]
    step = math.lcm(2**cfg.upsamplings, 4 if cfg.labels == "clusters" or cfg.compare_features == "image" else 1)
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
    if cfg.compare_features != "segmenter" and (cfg.labels != "given" or cfg.comparator != "feature"):
        raise ValueError(
            f"synthcp: compare_features={cfg.compare_features!r} with labels={cfg.labels!r} and "
            f"comparator={cfg.comparator!r}; expected labels='given' and comparator='feature', nothing else reads it. "
            "Pass --set compare_features=segmenter; of pseudo-classes, --set image_weight=1 weighs the image."
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


def maps_of(cfg: SynthCPConfig, variables: Any, images: Array) -> list[Array]:
    """The backbone's maps of pictures in [0, 1], fine to coarse."""
    return pretrained.maps_of(cfg.backbone, variables, images)


def train_apply(state: SynthCPState, name: str, params: Any, *arguments, shape, **options):
    """A network in training mode: (what it gives, its other variables afterwards)."""
    network, others = networks(state.cfg, shape)[name], state.others[name]
    return network.apply({"params": params, **others}, *arguments, train=True, mutable=list(others), **options)


def apply(state: SynthCPState, name: str, *arguments, shape, **options) -> Any:
    """A network with the weights of the state; `shape` is the pictures', (H, W, C)."""
    network = networks(state.cfg, shape)[name]
    return network.apply({"params": state.params[name], **state.others[name]}, *arguments, **options)


def updated(state: SynthCPState, name: str, grads: Any, rate: Array | float, others: Any) -> SynthCPState:
    """The state after a step of a network's optimizer at a rate, with the network's other variables."""
    updates, optimizer = optimisers()[name].update(grads, state.optimizer[name])
    params = jax.tree.map(lambda p, u: p - rate * u, state.params[name], updates)
    return state._replace(
        params={**state.params, name: params},
        others={**state.others, name: others},
        optimizer={**state.optimizer, name: optimizer},
        done={**state.done, name: state.done[name] + 1},
    )


def synthesise(state: SynthCPState, labels: Array, shape: tuple[int, ...]) -> Array:
    """Pictures (B, H, W, C) in [0, 1] of labels (B, h, w) int32; `shape` is (H, W, C)."""
    made = (apply(state, "generator", labels, shape=shape, train=False) + 1) / 2
    return jnp.round(made * 255) / 255 if state.cfg.quantise_recon else made


def flipped(key: Array, cfg: SynthCPConfig, batch: Batch) -> Batch:
    """The batch with pictures and masks flipped left to right at random, where `augment` permits."""
    if cfg.augment == "none":
        return batch
    turn = jax.random.bernoulli(key, shape=(batch.image.shape[0],))
    image = jnp.where(turn[:, None, None, None], batch.image[:, :, ::-1], batch.image)
    return batch._replace(image=image, mask=jnp.where(turn[:, None, None], batch.mask[:, :, ::-1], batch.mask))


def scores_of(pixel_map: Array) -> Scores:
    """The map (B, H, W) with the mean of its highest hundredth as the image score."""
    return Scores(image=top_share(pixel_map, _TOP), map=pixel_map)
