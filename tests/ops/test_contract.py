"""Sums of products over rows: the same whichever side is narrower and however rows are grouped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops.contract import contract_rows


def arrays(*columns, rows=(2, 1024)):
    return [jnp.float32(np.random.default_rng(n).normal(size=(*rows, n))) for n in columns]


@pytest.mark.parametrize("columns", [(3, 7), (7, 3), (20, 17)])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_rows_are_contracted_from_either_side_in_any_number_of_groups(columns, groups):
    left, right = arrays(*columns)
    got = contract_rows(left, right, groups=groups)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.einsum("brm,brn->mn", left, right), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "columns, rows, groups, expected",
    [
        ((3, 40), (2, 1024), 2, 2),
        ((40, 3), (2, 1024), 2, 2),
        ((25, 40), (2, 1024), 2, 1),  # wide enough for one product
        ((3, 40), (2, 1024), 3, 1),  # three do not divide 2048
        ((3, 40), (2, 500), 2, 1),  # few rows
    ],
)
def test_many_rows_of_narrow_products_are_grouped(columns, rows, groups, expected):
    made = jax.make_jaxpr(lambda a, b: contract_rows(a, b, groups=groups))(*arrays(*columns, rows=rows))
    (product,) = (e for e in made.eqns if e.primitive.name == "dot_general")
    groups = (expected,) if expected > 1 else ()
    assert product.outvars[0].aval.shape == (*groups, min(columns), max(columns))
