"""Every method keeps what style.md section 8 asks of it."""

import pytest
import toy
from conformance import (
    CLOSE,
    Case,
    check_cuts,
    check_leaves,
    check_passes,
    check_recompiles,
    check_rows,
    check_saved,
    check_seeds,
    check_sharded,
    check_structure,
    make_data,
)

from jaxad import methods

# What a method needs beyond its preset "tiny" to run in seconds: a smaller picture, a few steps.
SMALL = {
    "gradcon": {"steps": 5, "batch_size": 8, "encoder": (8, 12), "decoder": (8,)},
    "memae": {
        "steps": 5,
        "batch_size": 8,
        "encoder": (8, 16),
        "decoder": (8,),
        "num_items": 20,
        "shrink_threshold": 0.04,
    },
    "mnad": {
        "steps": 5,
        "learning_rate": 2e-5,  # Adam takes whole steps where a gradient is zero but for rounding; queries turn
        "batch_size": 8,
        "widths": (8, 12),
        "num_items": 4,
        "image_score": "combined",  # the one that reads the leaf psnr_weight
        "conv_impl": "gemm",  # as members are computed: dividing by the spread of scores enlarges rounding
    },
    "patch_svdd": {"steps": 5, "batch_size": 8, "widths": (), "features": 4, "hidden": 8},  # patches of 4 and 8
    "uninformed_students": {"steps": 5, "width": 0.04, "descriptor": 5},
    "ognet": {
        "steps": 3,
        "batch_size": 8,
        "widths": (4, 6),
        "taps": 3,
        "patch": 6,
        "stride": 2,
        "refine_steps": 6,
        "refine_block": 3,
        "refine_rate": 0.01,
        "conv_impl": "conv",
    },
    "neural_batch": {
        "patch": 4,
        "stride": 2,
        "grid": 2,
        "ae_features": (4,),
        "ae_code": 4,
        "ae_steps": 3,
        "profile_length": 2,
        "ae_batch": 8,
        "walkers": 4,
        "episodes": 4,
        "eval_cycles": 2,
        "batch_size": 8,
        "steps": 4,
        "predictor": "learned",
        "profile_pictures": 5,
        "predictor_features": (4,),
        "predictor_steps": 2,
        "predictor_batch": 1,
        "policy_features": (4,),
        "policy_hidden": 4,
        "learning_rate": 0.03,
        "predictor_learning_rate": 0.03,
    },
    "smai": {
        "steps": 4,
        "batch_size": 8,
        "widths": (6,),
        "grids": (4,),
        "residual": "gms",
        "learning_rate": 0.01,
        "conv_impl": "conv",
    },
    "synthcp": {
        "steps": 4,
        "batch_size": 8,
        "num_labels": 4,
        "generator_widths": (4,),
        "upsamplings": 0,
        "spade_hidden": 4,
        "discriminator_widths": (4,),
        "gate": "quantile",  # the one that reads the leaf msp_threshold
        "conv_impl": "gemm",  # as members are computed: dividing by the spread of normal pictures enlarges rounding
    },
}
CHANGE = {
    "neural_batch": {"entropy_weight": 10.0, "leave_cost": 20.0, "shaping": 100.0},
    "gradcon": {"smooth_sigma": 60.0},
    "memae": {"smooth_sigma": 60.0},
    "mnad": {"smooth_sigma": 60.0, "gate": 10.0},
    "patch_svdd": {"svdd_weight": 10.0, "colour_noise": 1.0, "pixel_noise": 1.0},
    "uninformed_students": {"weight_decay": 10.0},
    "ognet": {"smooth_sigma": 60.0, "low_weight": 0.001, "real_weight": 0.9},
    "smai": {"compactness": 1000.0},
    "synthcp": {"smooth_sigma": 60.0},
}
# Dividing by the spread of scores, which is small among these pictures, enlarges rounding.
WIDER = {"mnad": {"rtol": 0.02, "atol": 0.05}}  # of maps that span 5


@pytest.fixture(scope="module", params=["toy", *methods.METHODS])
def case(request):
    if request.param == "toy":
        return Case(toy.METHOD, toy.ToyConfig(), make_data((8, 8, 3)))
    method = methods.get(request.param)
    cfg = method.config(**{**method.presets["tiny"].config, **SMALL.get(request.param, {})})
    return Case(method, cfg, make_data((8, 8, 3)), CHANGE.get(request.param, {}), CLOSE | WIDER.get(request.param, {}))


@pytest.mark.parametrize(
    "check",
    [
        check_structure,
        check_cuts,
        check_seeds,
        check_leaves,
        check_recompiles,
        check_rows,
        check_passes,
        check_sharded,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
def test_conformance(case, check):
    check(case)


def test_saved(case, tmp_path):
    check_saved(case, tmp_path)
