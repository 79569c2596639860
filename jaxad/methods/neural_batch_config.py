"""Settings of the Neural Batch Sampler: what they are, which of them go together, and the presets."""

from __future__ import annotations

import math

from jaxad.core import Preset, Spec, config, static


@config
class NeuralBatchConfig:
    """Settings of the Neural Batch Sampler. Fields marked static force a new compilation; others may be vmapped."""

    patch: int = static(64)  # P, pixels a side; the sampler sees a crop of 2P
    stride: int = static(24)  # pixels a move
    grid: int = static(8)  # pixels; centres of patches lie on it, visits are counted on it
    ae_features: tuple[int, ...] = static((64, 128, 256))  # of the autoencoder's stages
    ae_code: int = static(200)
    ae_skip: bool = static(False)  # a skip connection around the code
    ae_steps: int = static(20)  # K, of a cycle
    profile_length: int = static(10)  # T, errors
    profile_stride: int = static(1)  # steps from one of them to the next; the last is that after the last step
    ae_batch: int = static(32)  # patches of a step
    walkers: int = static(32)  # that pick them, in parallel
    episodes: int = static(8)  # E, cycles of an update of the sampler
    steps: int = static(300)  # U, updates
    batch_size: int = static(256)  # normal pictures of an update, split among its episodes
    profile_pictures: int = static(16)  # labelled pictures of an update, all of them if there are fewer
    predictor: str = static("learned")  # | "none": no labels, the score is the mean of the profile
    predictor_features: tuple[int, ...] = static((32, 16, 8, 4))
    predictor_steps: int = static(176)  # of an update
    predictor_batch: int = static(10)  # profiles of each episode in such a step
    predictor_negatives: str = static("labelled+normal")  # | "labelled": only normal pixels of labelled pictures
    alpha_schedule: str = static("const")  # weight of normal pixels: class balance | "linear_decay": from 1 to 0
    sampler: str = static("learned")  # | "random": uniform actions
    policy_features: tuple[int, ...] = static((16, 32, 32, 64, 64))
    policy_hidden: int = static(256)
    reach: str = static("picture")  # patches go up to the border | "crop": no further than the sampler's crop
    pool: str = static("all")  # pictures that patches come from | "normal": no labelled ones
    eval_cycles: int = static(1)  # whose autoencoders score
    transductive: bool = static(False)  # those cycles walk on the source "aux"
    tile_shifts: int = static(1)  # tilings an axis that are averaged
    image_score: str = static("max")  # of the map | "top": mean of its top 0.1 %
    dtype: str = static("float32")  # of the autoencoder and the predictor: "float32" | "bfloat16"
    conv_impl: str = static("auto")  # "auto" | "conv" | "gemm"
    learning_rate: float = 1e-3  # Adam, of the sampler
    predictor_learning_rate: float = 1e-3  # Adam
    ae_learning_rate: float = 1e-3  # Adam
    entropy_weight: float = 0.01  # of the bonus, where advantages are about 1
    leave_cost: float = 0.1  # of action 0, among the hand-made rewards
    shaping: float = 0.55  # share of the updates over which hand-made rewards give way to the predictor's


_CHOICES = {
    "predictor": ("learned", "none"),
    "predictor_negatives": ("labelled+normal", "labelled"),
    "alpha_schedule": ("const", "linear_decay"),
    "sampler": ("learned", "random"),
    "reach": ("picture", "crop"),
    "pool": ("all", "normal"),
    "image_score": ("max", "top"),
    "dtype": ("float32", "bfloat16"),
}


def check(cfg: NeuralBatchConfig, spec: Spec) -> None:
    """Refuses settings that cannot work.

    Raises:
      ValueError: unknown choices, sizes that do not divide each other, pictures too small, no labelled pictures.
    """
    for field, allowed in _CHOICES.items():
        if getattr(cfg, field) not in allowed:
            raise ValueError(
                f"neural_batch: {field}={getattr(cfg, field)!r} is unknown; expected one of {allowed}. "
                f"Pass --set {field}={allowed[0]}."
            )
    if len(spec.image) != 3:
        raise ValueError(f"neural_batch: samples of shape {spec.image}; expected pictures. Load the data without clip.")
    _check_sizes(cfg, spec)
    if cfg.episodes < 2 or cfg.batch_size % cfg.episodes or cfg.ae_batch % cfg.walkers:
        raise ValueError(
            f"neural_batch: episodes={cfg.episodes}, batch_size={cfg.batch_size}, ae_batch={cfg.ae_batch}, "
            f"walkers={cfg.walkers}; expected at least 2 episodes (each is compared with the others) that divide the "
            "batch, and walkers that divide ae_batch. Pass --set episodes=8 --set batch_size=64 --set walkers=8."
        )
    length, stride = cfg.profile_length, cfg.profile_stride
    if length < 1 or stride < 1 or (length - 1) * stride >= cfg.ae_steps:
        raise ValueError(
            f"neural_batch: profile_length={length}, profile_stride={stride}, ae_steps={cfg.ae_steps}; expected at "
            "least one error of those after each step. "
            f"Pass --set profile_length={max(1, cfg.ae_steps // 2)} --set profile_stride=1."
        )
    if cfg.tile_shifts < 1 or cfg.patch % cfg.tile_shifts:
        raise ValueError(
            f"neural_batch: tile_shifts={cfg.tile_shifts}; expected a divisor of patch={cfg.patch}. "
            "Pass --set tile_shifts=1."
        )
    if cfg.predictor == "learned" and not spec.sizes.get("labelled"):
        raise ValueError(
            "neural_batch: predictor='learned' learns from a few anomalous pictures with masks, and the data has no "
            "source 'labelled'; expected at least one. Pass --labels-per-type 5 to take them out of the test set, or "
            "--set predictor=none to do without."
        )
    if cfg.transductive and not spec.sizes.get("aux"):
        raise ValueError(
            "neural_batch: transductive=true walks on the source 'aux', which the data does not have; expected the "
            "pictures to be scored, without labels. Pass {..., 'aux': Source(...)}, or --set transductive=false."
        )


def _check_sizes(cfg: NeuralBatchConfig, spec: Spec) -> None:
    height, width = spec.image[:2]
    unit = 2 * cfg.grid
    least = 2 ** len(cfg.ae_features)
    if cfg.patch % unit or cfg.stride % cfg.grid or cfg.stride < 1 or cfg.patch % least:
        raise ValueError(
            f"neural_batch: patch={cfg.patch}, stride={cfg.stride}, grid={cfg.grid}, {len(cfg.ae_features)} stages; "
            f"expected a patch divisible by {math.lcm(unit, least)} and a stride by {cfg.grid}. "
            f"Pass --set grid={max(1, math.gcd(cfg.patch // 2, cfg.stride))}."
        )
    if height % cfg.grid or width % cfg.grid or min(height, width) < 2 * cfg.patch:
        size = max(2 * cfg.patch, cfg.grid * (min(height, width) // cfg.grid))
        raise ValueError(
            f"neural_batch: pictures of {height}x{width}; expected multiples of grid={cfg.grid}, at least "
            f"{2 * cfg.patch}, two patches. Pass --image-size {size}."
        )


PRESETS = {
    "full": Preset(
        "256x256, sizes and schedule as far as they are known, else ours; 2400 cycles, for an accelerator",
        data={"image_size": 256, "channels": 3, "labels_per_type": 5},
    ),
    "small": Preset(
        "64x64 with patches of 16, minutes on two cores (ours)",
        config={
            "patch": 16,
            "stride": 8,
            "grid": 4,
            "ae_features": (8, 16),
            "ae_code": 16,
            "ae_steps": 26,
            "profile_length": 6,
            "profile_stride": 5,
            "ae_batch": 16,
            "walkers": 16,
            "steps": 20,
            "batch_size": 32,
            "profile_pictures": 8,
            "predictor_features": (16, 8, 8, 4),
            "predictor_steps": 24,
            "predictor_batch": 1,
            "policy_features": (8, 16, 16, 32),
            "policy_hidden": 32,
            "eval_cycles": 4,
            "ae_learning_rate": 5e-3,
            "learning_rate": 3e-3,
            "predictor_learning_rate": 3e-3,
            "entropy_weight": 0.05,
        },
        data={"image_size": 64, "channels": 3, "labels_per_type": 5},
    ),
    "tiny": Preset(
        "for tests and first looks: 32x32 with patches of 8, without labels, seconds on two cores (ours)",
        config={
            "patch": 8,
            "stride": 4,
            "grid": 4,
            "ae_features": (8, 16),
            "ae_code": 8,
            "ae_steps": 100,
            "profile_length": 4,
            "ae_batch": 16,
            "walkers": 8,
            "episodes": 8,
            "steps": 3,
            "batch_size": 64,
            "predictor": "none",
            "policy_features": (8, 8),
            "policy_hidden": 16,
            "eval_cycles": 8,
            "ae_learning_rate": 5e-3,
            "entropy_weight": 0.1,
        },
        data={"image_size": 32, "channels": 3},
    ),
}
