"""Pallas TPU kernels of the memory read: `forward` and `backward`, called by `jaxad.ops.memory.read_memory`.

A kernel holds one block of queries and one block of items, so the fast memory of the chip bounds neither T nor N. The
forward kernel sweeps the items twice: first for the largest logit and the sum of the softmax, then for the read. The
backward pass is two kernels, since the gradients of queries and of items sum over different blocks; both compute the
weights again. On CPU the kernels are interpreted. They do not lower for GPU.

Sizes in docstrings: T queries, N memory items, C features.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxad.ops.memory import Read, RowStats, add_to_tables, finish_read, logits_of, product, read_gradients, read_part

# With C = 256 a step needs some 4 MiB of the 16 MiB of fast memory that the smaller TPUs have.
_MAX_QUERIES = 256
_MAX_ITEMS = 512
_NO_ITEM = -1e30  # logit of padding; finite, since 0 * inf in the gradient would be NaN


def forward(queries, tables, threshold, use_top1, rows):
    """The read, the largest logits and the softmax sums, as the fused form in `jaxad.ops.memory` returns them."""
    num_queries, num_items = queries.shape[0], tables[0].shape[0]
    q_rows, m_rows = _block_sizes(num_queries, num_items, rows)
    queries, tables = _pad(queries, q_rows), tuple(_pad(table.astype(queries.dtype), m_rows) for table in tables)
    num_blocks, items_padded = queries.shape[0] // q_rows, tables[0].shape[0]
    by_query = lambda width: pl.BlockSpec((q_rows, width), lambda i, sweep, j: (i, 0))  # noqa: E731
    by_item = pl.BlockSpec((m_rows, queries.shape[1]), lambda i, sweep, j: (j, 0))
    numbers = jax.ShapeDtypeStruct((queries.shape[0], 1), jnp.float32)
    value, kept, shifted, num_active, top, total, usage = _call(
        functools.partial(_forward_kernel, num_queries, num_items, use_top1),
        grid=(num_blocks, 2, items_padded // m_rows),
        in_specs=[
            pl.BlockSpec((1, 1), lambda i, sweep, j: (0, 0)),
            by_query(queries.shape[1]),
            (by_item,) * len(tables),
        ],
        out_specs=[
            by_query(queries.shape[1]),
            *[by_query(1)] * 5,
            # Written in the second sweep; in the first it stays on the block that the second begins with.
            pl.BlockSpec((1, 1, m_rows), lambda i, sweep, j: (i, 0, sweep * j)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct(queries.shape, jnp.float32),
            *[numbers] * 5,
            jax.ShapeDtypeStruct((num_blocks, 1, items_padded), jnp.float32),
        ],
    )(threshold.reshape(1, 1), queries, tables)
    value, entropy, top_weight = finish_read(value, kept, shifted)
    read = Read(
        value=value[:num_queries].astype(queries.dtype),
        entropy=entropy[:num_queries, 0],
        top_weight=top_weight[:num_queries, 0],
        num_active=num_active[:num_queries, 0].astype(jnp.int32),
        usage=jnp.sum(usage, axis=(0, 1))[:num_items].astype(jnp.int32),
    )
    return read, top[:num_queries], total[:num_queries]


def _forward_kernel(num_queries, num_items, use_top1, threshold, queries, tables, *outputs):
    value, kept, shifted, num_active, top, total, usage = outputs
    i, sweep, j = (pl.program_id(axis) for axis in range(3))
    logits = _block_logits(queries, tables, j, num_items)

    @pl.when((sweep == 0) & (j == 0))
    def start():
        top[...] = jnp.full_like(top, -jnp.inf)
        for sums in (value, kept, shifted, num_active, total):
            sums[...] = jnp.zeros_like(sums)

    @pl.when(sweep == 0)
    def sum_softmax():
        higher = jnp.maximum(top[...], jnp.max(logits, axis=-1, keepdims=True))
        new = jnp.sum(jnp.exp(logits - higher), axis=-1, keepdims=True)
        total[...] = total[...] * jnp.exp(top[...] - higher) + new
        top[...] = higher

    @pl.when(sweep == 1)
    def read():
        part = read_part(logits, top[...], total[...], threshold[...], use_top1)
        is_read = (part > 0).astype(jnp.float32)
        is_query = i * part.shape[0] + lax.broadcasted_iota(jnp.int32, (part.shape[0], 1), 0) < num_queries
        value[...] += product(part.astype(queries.dtype), tables[-1][...], (1, 0))
        kept[...] += jnp.sum(part, axis=-1, keepdims=True)
        shifted[...] += jnp.sum(part * (logits - top[...]), axis=-1, keepdims=True)
        num_active[...] += jnp.sum(is_read, axis=-1, keepdims=True)
        usage[...] = jnp.sum(jnp.where(is_query, is_read, 0.0), axis=0)[None, None]


def backward(queries, d_value, row, tables, threshold, use_top1, rows):
    """Gradients of the queries and of the tables, as the fused form in `jaxad.ops.memory` returns them."""
    (num_queries, features), num_items = queries.shape, tables[0].shape[0]
    q_rows, m_rows = _block_sizes(num_queries, num_items, rows)
    tables = tuple(_pad(table.astype(queries.dtype), m_rows) for table in tables)
    # Padding rows are all zero, top weight and d_value included: their weights and gradients vanish.
    arrays = threshold.reshape(1, 1), tables, *jax.tree.map(lambda x: _pad(x, q_rows), (queries, d_value, row))
    num_blocks = arrays[2].shape[0] // q_rows, tables[0].shape[0] // m_rows

    def specs(query_axis):  # the grid is (query blocks, item blocks) or the other way round
        by_query = lambda width: pl.BlockSpec((q_rows, width), lambda *ij: (ij[query_axis], 0))  # noqa: E731
        by_item = (pl.BlockSpec((m_rows, features), lambda *ij: (ij[1 - query_axis], 0)),) * len(tables)
        one = pl.BlockSpec((1, 1), lambda *ij: (0, 0))
        stats = jax.tree.map(lambda _: by_query(1), row)
        return [one, by_item, by_query(features), by_query(features), stats]

    d_queries = _call(
        functools.partial(_queries_gradient_kernel, num_items, use_top1),
        grid=num_blocks,
        in_specs=specs(0),
        out_specs=specs(0)[2],
        out_shape=jax.ShapeDtypeStruct(arrays[2].shape, jnp.float32),
    )(*arrays)
    d_tables = _call(
        functools.partial(_tables_gradient_kernel, num_items, use_top1),
        grid=num_blocks[::-1],
        in_specs=specs(1),
        out_specs=specs(1)[1],
        out_shape=tuple(jax.ShapeDtypeStruct(table.shape, jnp.float32) for table in tables),
    )(*arrays)
    return d_queries[:num_queries].astype(queries.dtype), tuple(d[:num_items] for d in d_tables)


def _queries_gradient_kernel(num_items, use_top1, threshold, tables, queries, d_value, row, d_queries):
    j = pl.program_id(1)
    _, d_logits = _block_gradients(threshold, tables, queries, d_value, row, j, num_items, use_top1)

    @pl.when(j == 0)
    def start():
        d_queries[...] = jnp.zeros_like(d_queries)

    d_queries[...] += product(d_logits, tables[0][...], (1, 0))


def _tables_gradient_kernel(num_items, use_top1, threshold, tables, queries, d_value, row, *d_tables):
    j, i = pl.program_id(0), pl.program_id(1)
    weights, d_logits = _block_gradients(threshold, tables, queries, d_value, row, j, num_items, use_top1)

    @pl.when(i == 0)
    def start():
        for d_table in d_tables:
            d_table[...] = jnp.zeros_like(d_table)

    d_keys, d_items = product(d_logits, queries[...], (0, 0)), product(weights, d_value[...], (0, 0))
    for d_table, new in zip(d_tables, add_to_tables(tuple(d[...] for d in d_tables), d_keys, d_items), strict=True):
        d_table[...] = new


def _block_logits(queries, tables, j, num_items):
    """Logits of a block, those of padding items out of reach."""
    logits = logits_of(queries[...], tables[0][...])
    column = j * logits.shape[1] + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(column < num_items, logits, _NO_ITEM)


def _block_gradients(threshold, tables, queries, d_value, row, j, num_items, use_top1):
    logits = _block_logits(queries, tables, j, num_items)
    row = RowStats(*(x[...] for x in row))
    d_weights = product(d_value[...], tables[-1][...], (1, 1))
    weights, d_logits = read_gradients(logits, d_weights, row, threshold[...], use_top1)
    return weights.astype(queries.dtype), d_logits.astype(queries.dtype)


def _call(kernel: Callable, **specs: Any) -> Callable:
    """A `pallas_call`, interpreted where it is lowered for CPU; so a CPU machine can still compile it for a TPU."""
    on_cpu, on_tpu = (pl.pallas_call(kernel, interpret=interpret, **specs) for interpret in (True, False))
    return lambda *arrays: lax.platform_dependent(*arrays, cpu=on_cpu, tpu=on_tpu)


def _block_sizes(num_queries: int, num_items: int, rows: int) -> tuple[int, int]:
    """Queries and items of a block: multiples of the (16, 128) tiles of a TPU."""
    round_up = lambda x, multiple: -(-x // multiple) * multiple  # noqa: E731
    return min(round_up(min(num_queries, rows), 16), _MAX_QUERIES), min(round_up(num_items, 128), _MAX_ITEMS)


def _pad(x, multiple):
    return jnp.pad(x, [(0, -x.shape[0] % multiple), (0, 0)])
