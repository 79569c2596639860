"""Rows in blocks: the same as at once, and on several devices each goes through its own rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad import shard
from jaxad.ops.blocks import fold_blocks, map_blocks, rows_over


@pytest.mark.parametrize("rows", [1, 3, 5, 12, 13, 100])
def test_blocks_give_what_all_rows_give(rows):
    x = jnp.arange(13.0 * 2).reshape(13, 2)
    seen = []

    def step(total, block):
        seen.append(block.shape[0])
        return total + block.sum(), {"double": 2 * block}

    total, found = fold_blocks(step, jnp.float32(0), x, rows=rows)
    np.testing.assert_array_equal(found["double"], 2 * x)
    assert total == x.sum() and max(seen) <= rows


@pytest.mark.parametrize("own", [16, 19])
def test_devices_go_through_their_own_rows(own):
    """Nothing is exchanged, and a block has rows of every device; 19 rows make no equal blocks and are filled up."""
    mesh = shard.data_mesh()
    x = jax.device_put(jnp.arange(own * 4 * 8.0).reshape(own * 4, 8), shard.split(mesh))

    def run(x):
        with rows_over(mesh.size):
            return map_blocks(lambda block: jnp.sin(block) @ jnp.ones((8, 8)), x, rows=4 * mesh.size)

    compiled = jax.jit(run, out_shardings=shard.split(mesh)).lower(x).compile()
    assert shard.collectives(compiled) == {} and mesh.size == 4
    assert "while" in compiled.as_text()
    np.testing.assert_allclose(compiled(x), jnp.sin(x) @ jnp.ones((8, 8)), rtol=1e-5, atol=1e-5)
