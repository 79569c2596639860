"""Memory addressing: sparse attention of queries over a matrix of memory items.

A query reads item n with softmax weight w_n. Weights that do not exceed a threshold are cut to zero and the others are
divided by their sum. With logits l and A = {n : w_n > threshold}, that is softmax attention restricted to A:

    a_n = exp(l_n) / sum_{j in A} exp(l_j) for n in A, else 0;    value = sum_n a_n m_n;    entropy = -sum_n a_n ln a_n

A query without any weight above the threshold addresses nothing: an empty row.

The fused form goes through the queries in blocks. Each block has its whole rows of logits, so the softmax needs no
running maximum, and the backward pass computes them again instead of storing them.

Sizes in docstrings: T queries, N memory items, C features.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxad.ops.blocks import devices_of_rows, fold_blocks

Array = jax.Array

# Bytes of one block of logits. On CPU, of 2 to 16 MiB, 8 and 16 were fastest or level with the fastest, by up to a
# seventh (T = 1024 to 16384, N = 500 and 2000, 2 cores); 8 take less memory. Elsewhere a block should fill the device;
# not tuned.
_BLOCK_BYTES = {"cpu": 8 << 20}
_OTHER_BLOCK_BYTES = 32 << 20
_MIN_ROWS = 128  # thinner matrix products are slow


class Read(NamedTuple):
    """What T queries read from N items. `value` and `entropy` are differentiable, the others are for monitoring."""

    value: Array  # (T, C) in the dtype of the queries; zero on empty rows
    entropy: Array  # (T,) float32 in nats; 0 on empty rows and where one item is read
    top_weight: Array  # (T,) float32, the largest weight; 0 on empty rows
    num_active: Array  # (T,) int32, items with a weight above zero; 0 on empty rows
    usage: Array  # (N,) int32, queries in which the item has a weight above zero


def read_memory(
    queries: Array,
    memory: Array,
    *,
    threshold: float | Array,
    similarity: str = "dot",
    temperature: float | Array = 1.0,
    empty_policy: str = "zero",
    impl: str = "fused",
    block_rows: int | None = None,
) -> Read:
    """Reads a sparse convex combination of memory items for every query.

    "naive" stores the T x N weights. "fused" never does: temporary memory is a few blocks of logits, and the backward
    pass keeps a handful of numbers per query. "pallas" does the same in TPU kernels, interpreted on CPU. "fused" is the
    default because it needs a third to a fourteenth of the memory at 1.0 to 1.1 times the time of "naive" on CPU
    (benchmarks/RESULTS.md); where all queries fit in one block it is the same arithmetic without a loop. Logits,
    weights and sums are float32 whatever the dtype of the inputs; how exactly float32 inputs are multiplied is up to
    `jax.default_matmul_precision`.

    Reverse-mode differentiable in queries, memory and temperature. The gradient of the threshold is zero.

    Args:
      queries: (T, C) float32 or bfloat16.
      memory: (N, C) float32 or bfloat16; cast to the dtype of the queries for the matrix products.
      threshold: scalar in [0, 1), may be traced; 1/N to 3/N is advised. 0: no cut and no division.
      similarity: "dot" or "cosine".
      temperature: scalar above 0 that divides the similarity, may be traced.
      empty_policy: what an empty row reads. "zero": the zero vector, and no gradient. "top1": its best item, as if that
        alone were above the threshold, so the item gets a gradient and the query none. Equally good items are averaged.
      impl: "fused", "naive" or "pallas".
      block_rows: queries per block of "fused" and "pallas"; None: chosen from N.

    Returns:
      A `Read`.

    Raises:
      ValueError: shapes that do not fit, an unknown option, a Python number out of its range, or "pallas" on a GPU or
        over several TPUs.
    """
    queries, memory = jnp.asarray(queries), jnp.asarray(memory)
    _check(queries, memory, threshold, similarity, temperature, empty_policy)
    if impl not in ("fused", "naive", "pallas"):
        raise ValueError(f"impl={impl!r} is unknown; expected 'fused', 'naive' or 'pallas'. Pass impl='fused'.")
    if impl == "pallas" and jax.default_backend() == "gpu":
        raise ValueError("impl='pallas' has kernels for TPU only; got the GPU backend. Pass impl='fused'.")
    if impl == "pallas" and jax.default_backend() == "tpu" and devices_of_rows() > 1:
        raise ValueError(
            "impl='pallas' has kernels for one device, which XLA cannot split; got queries split over "
            f"{devices_of_rows()}. Pass impl='fused'."
        )
    if block_rows is not None and block_rows < 1:
        raise ValueError(f"block_rows={block_rows} is not positive; expected None or at least 1. Leave it out.")
    scaled, tables = _factors(queries, memory, similarity, temperature)
    threshold, use_top1 = jnp.asarray(threshold, jnp.float32), empty_policy == "top1"
    if impl == "naive" or not isinstance(queries.shape[0], int):  # jax.export with any batch: no blocks to count
        return _read_naive(_address(logits_of(scaled, tables[0]), threshold, use_top1), memory, queries.dtype)
    rows = block_rows or _default_rows(memory.shape[0])
    return _attend(scaled, tables, threshold, use_top1, impl, rows)


def addressing(
    queries: Array,
    memory: Array,
    *,
    threshold: float | Array,
    similarity: str = "dot",
    temperature: float | Array = 1.0,
    empty_policy: str = "zero",
) -> Array:
    """The (T, N) float32 weights that `read_memory` applies, for inspection. Arguments and errors as there."""
    queries, memory = jnp.asarray(queries), jnp.asarray(memory)
    _check(queries, memory, threshold, similarity, temperature, empty_policy)
    scaled, tables = _factors(queries, memory, similarity, temperature)
    return _address(logits_of(scaled, tables[0]), jnp.asarray(threshold, jnp.float32), empty_policy == "top1")


def shrink(weights: Array, *, threshold: float | Array) -> Array:
    """Cuts addressing weights that do not exceed a threshold and divides the others by their sum.

    Args:
      weights: (..., N) non-negative, summing to 1 over N.
      threshold: scalar in [0, 1), may be traced. 0: the weights are returned as they are.

    Returns:
      (..., N), summing to 1, or all zero where no weight exceeds the threshold.
    """
    return _renormalise(weights, _is_above(weights, threshold), threshold)


def cosine_weight_bound(num_items: int, *, temperature: float = 1.0) -> float:
    """The weight a cosine addressing cannot exceed: one item at similarity 1, the others at -1.

    A threshold at or above it empties every row; without a temperature it is below 7.39 / num_items.
    """
    return 1 / (1 + (num_items - 1) * math.exp(-2 / temperature))


def product(x: Array, y: Array, over: tuple[int, int]) -> Array:
    """Matrix product that sums axis `over[0]` of x against `over[1]` of y, in float32."""
    return lax.dot_general(x, y, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def logits_of(queries: Array, keys: Array) -> Array:
    """(T, N) float32 products of queries and keys, in the dtype of the queries."""
    return product(queries, keys.astype(queries.dtype), (1, 1))


def _factors(queries, memory, similarity, temperature) -> tuple[Array, tuple[Array, ...]]:
    """Queries and tables for `_attend`: products of the queries with the first table are logits, the last is read."""
    wide = queries.astype(jnp.float32)
    if similarity == "dot":
        return (wide / temperature).astype(queries.dtype), (memory,)
    return (_unit(wide) / temperature).astype(queries.dtype), (_unit(memory.astype(jnp.float32)), memory)


def _unit(x: Array) -> Array:
    # The floor keeps value and gradient of a zero vector finite.
    return x * lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def _address(logits: Array, threshold: Array, use_top1: bool) -> Array:
    weights = jax.nn.softmax(logits, axis=-1)
    active = _is_above(weights, threshold)
    if use_top1:
        is_empty = ~jnp.any(active, axis=-1, keepdims=True)
        active |= is_empty & (logits == jnp.max(logits, axis=-1, keepdims=True))
    return _renormalise(weights, active, threshold)


def _is_above(weights: Array, threshold: Array | float) -> Array:
    return ~(weights <= threshold)  # and not ">": a row of NaN must stay NaN, not turn into an empty one


def _renormalise(weights: Array, active: Array, threshold: Array | float) -> Array:
    kept = jnp.where(active, weights, 0.0)
    kept = kept / jnp.maximum(jnp.sum(kept, axis=-1, keepdims=True), 1e-12)
    return jnp.where(jnp.asarray(threshold) > 0, kept, weights)


def _read_naive(weights: Array, memory: Array, dtype: Any) -> Read:
    return Read(
        value=product(weights.astype(dtype), memory.astype(dtype), (1, 0)).astype(dtype),
        entropy=-jnp.sum(weights * jnp.log(weights + 1e-12), axis=-1),
        top_weight=lax.stop_gradient(jnp.max(weights, axis=-1)),
        num_active=jnp.sum(weights > 0, axis=-1, dtype=jnp.int32),
        usage=jnp.sum(weights > 0, axis=0, dtype=jnp.int32),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(queries, tables, threshold, use_top1, impl, rows) -> Read:
    return _attend_forward(queries, tables, threshold, use_top1, impl, rows)[0]


def _attend_forward(queries, tables, threshold, use_top1, impl, rows):
    forward, _ = _passes(impl)
    read, top, total = forward(queries, tables, threshold, use_top1, rows)
    return read, (queries, tables, threshold, read, top, total)


def _attend_backward(use_top1, impl, rows, residuals, cotangent):
    queries, tables, threshold, read, top, total = residuals
    _, backward = _passes(impl)
    d_value, d_entropy, top_weight = cotangent.value, cotangent.entropy[:, None], read.top_weight[:, None]
    # What the gradients of all logits of a row have in common.
    shared = jnp.sum(d_value.astype(jnp.float32) * read.value.astype(jnp.float32), axis=-1, keepdims=True)
    shared += d_entropy * (read.entropy[:, None] + _log_or_zero(top_weight))
    row = RowStats(top, total, top_weight, d_entropy, shared)
    d_queries, d_tables = backward(queries, d_value, row, tables, threshold, use_top1, rows)
    d_tables = tuple(d.astype(table.dtype) for d, table in zip(d_tables, tables, strict=True))
    return d_queries, d_tables, jnp.zeros_like(threshold)


_attend.defvjp(_attend_forward, _attend_backward)


def _passes(impl: str) -> tuple[Callable, Callable]:
    if impl == "pallas":
        from jaxad.ops.kernels import memory as kernels  # Pallas is slow to import

        return kernels.forward, kernels.backward
    return _forward_blocks, _backward_blocks


class RowStats(NamedTuple):
    """What a backward pass knows of each query, (T, 1) float32, to compute its weights and their gradient again."""

    top: Array  # largest logit
    total: Array  # sum of exp(logit - top) over all items
    top_weight: Array  # 1 / (that sum over the active items); 0, as are the weights, on empty and padding rows
    d_entropy: Array
    shared: Array


def read_part(logits: Array, top: Array, total: Array, threshold: Array, use_top1: bool) -> Array:
    """exp(logits - top) where the item is read, else 0: the weights up to a factor per row. (T, N)."""
    unnormalised = jnp.exp(logits - top)
    # Divided as in a softmax, so that the same rounding decides the comparison in every form.
    active = _is_above(unnormalised / total, threshold)
    if use_top1:
        active |= (1 / total <= threshold) & (logits == top)  # 1 / total is the largest weight
    return jnp.where(active, unnormalised, 0.0)


def finish_read(value: Array, kept: Array, shifted: Array) -> tuple[Array, Array, Array]:
    """Value, entropy and top weight from the sums of part * item (T, C), part, and part * (logit - top) (T, 1)."""
    top_weight = jnp.where(kept == 0, 0.0, 1 / jnp.where(kept == 0, 1.0, kept))
    return value * top_weight, -_log_or_zero(top_weight) - shifted * top_weight, top_weight


def read_gradients(logits: Array, d_weights: Array, row: RowStats, threshold: Array, use_top1: bool):
    """The weights, and the gradient of the logits given d_weights = <d_value, item>; all (T, N)."""
    weights = read_part(logits, row.top, row.total, threshold, use_top1) * row.top_weight
    return weights, weights * (d_weights - row.d_entropy * (logits - row.top) - row.shared)


def _log_or_zero(x: Array) -> Array:
    return jnp.log(jnp.where(x == 0, 1.0, x))


def _forward_blocks(queries, tables, threshold, use_top1, rows):
    tables = tuple(table.astype(queries.dtype) for table in tables)

    def block(usage, x):
        queries, is_query = x
        logits = logits_of(queries, tables[0])
        top = jnp.max(logits, axis=-1, keepdims=True)
        total = jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)
        part = read_part(logits, top, total, threshold, use_top1)
        kept = jnp.sum(part, axis=-1, keepdims=True)
        shifted = jnp.sum(part * (logits - top), axis=-1, keepdims=True)
        value, entropy, top_weight = finish_read(product(part.astype(queries.dtype), tables[-1], (1, 0)), kept, shifted)
        num_active = jnp.sum(part > 0, axis=-1, keepdims=True, dtype=jnp.int32)
        usage = usage + jnp.sum((part > 0) & is_query, axis=0, dtype=jnp.int32)
        return usage, (value.astype(queries.dtype), entropy, top_weight, num_active, top, total)

    is_query = jnp.ones((queries.shape[0], 1), bool)  # False where the last block is padded
    usage = jnp.zeros(tables[0].shape[0], jnp.int32)
    usage, outputs = fold_blocks(block, usage, (queries, is_query), rows=rows)
    value, entropy, top_weight, num_active, top, total = outputs
    return Read(value, entropy[:, 0], top_weight[:, 0], num_active[:, 0], usage), top, total


def _backward_blocks(queries, d_value, row, tables, threshold, use_top1, rows):
    keys, items = tables[0].astype(queries.dtype), tables[-1].astype(queries.dtype)

    def block(d_tables, x):
        queries, d_value, row = x
        d_weights = product(d_value, items, (1, 1))
        weights, d_logits = read_gradients(logits_of(queries, keys), d_weights, row, threshold, use_top1)
        weights, d_logits = weights.astype(queries.dtype), d_logits.astype(queries.dtype)
        d_tables = add_to_tables(d_tables, product(d_logits, queries, (0, 0)), product(weights, d_value, (0, 0)))
        return d_tables, product(d_logits, keys, (1, 0)).astype(queries.dtype)

    zeros = tuple(jnp.zeros(table.shape, jnp.float32) for table in tables)
    d_tables, d_queries = fold_blocks(block, zeros, (queries, d_value, row), rows=rows)
    return d_queries, d_tables


def add_to_tables(d_tables: tuple[Array, ...], d_keys: Array, d_items: Array) -> tuple[Array, ...]:
    """Sums gradients of keys and items, which are one table where the similarity is the plain product."""
    if len(d_tables) == 1:
        return (d_tables[0] + (d_keys + d_items),)
    return d_tables[0] + d_keys, d_tables[1] + d_items


def _default_rows(num_items: int) -> int:
    rows = _BLOCK_BYTES.get(jax.default_backend(), _OTHER_BLOCK_BYTES) // (4 * num_items)
    return max(rows, _MIN_ROWS) * devices_of_rows()


def _check(queries, memory, threshold, similarity, temperature, empty_policy) -> None:
    if queries.ndim != 2 or memory.ndim != 2 or queries.shape[1] != memory.shape[1] or 0 in memory.shape:
        raise ValueError(
            f"queries {queries.shape} and memory {memory.shape} do not fit; expected (T, C) and (N, C) with one C and "
            "N >= 1. Flatten the positions first: queries.reshape(-1, C)."
        )
    if similarity not in ("dot", "cosine"):
        raise ValueError(f"similarity={similarity!r} is unknown; expected 'dot' or 'cosine'. Pass one of them.")
    if empty_policy not in ("zero", "top1"):
        raise ValueError(f"empty_policy={empty_policy!r} is unknown; expected 'zero' or 'top1'. Pass one of them.")
    num_items, is_number = memory.shape[0], isinstance(threshold, int | float)
    if is_number and not 0 <= threshold < 1:
        raise ValueError(f"threshold={threshold} is out of range; expected [0, 1). Pass threshold={1 / num_items:.2g}.")
    if not isinstance(temperature, int | float):
        return
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not positive; expected above 0. Pass temperature=1.0.")
    bound = cosine_weight_bound(num_items, temperature=temperature)
    if is_number and similarity == "cosine" and threshold >= bound:
        raise ValueError(
            f"threshold={threshold} with cosine similarity at temperature={temperature} empties every row: no weight "
            f"exceeds {bound:.2g} with {num_items} items. Pass threshold={1 / num_items:.2g} or temperature=0.1."
        )
