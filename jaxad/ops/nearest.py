"""Exact nearest neighbours of many queries in a bank: tiled matrix products, then direct distances.

    ||q - b||^2 / 2 = ||q||^2 / 2 + (||b||^2 / 2 - <q, b>)

The bracket orders the rows of the bank for a query, and is a product and an addition. But it cancels where rows lie in
a tight cloud far from zero, so it only narrows the search:

  1. Bank and queries are moved by a centre of the bank, which leaves distances as they are.
  2. Tile after tile, products of bank rows and queries are reduced to the least bracket of every segment of 128 rows.
     No matrix of all queries and rows exists: a tile is made to stay in the cache (or in a budget of memory).
  3. The segments with the least brackets are gathered, and their distances computed directly from the vectors as given.
     The k nearest rows lie in k segments whose brackets are least; some more are searched, against rounding.

Tiles have bank rows on their outer axis, so that minima run along vectors of queries. On two cores (XLA-CPU, float32,
679,041 rows and 3,249 queries of 64 features) step 2 reaches 65-80 % of the rate of a square matrix product with tiles
of 512 rows; smaller blocks of queries lose a quarter. Finding the segments and step 3 take a tenth of the time.

Sizes in docstrings: Q queries, N bank rows, D features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxad.core import Array
from jaxad.ops.blocks import devices_of_rows, map_blocks

PRECISIONS = ("float32", "default", "bfloat16")
SEGMENT = 128  # rows whose least bracket is kept
_MORE = {"float32": 3, "default": 7, "bfloat16": 7}  # segments (or rows) searched again beyond k
_TILE_ROWS = {"cpu": 512}
_OTHER_TILE_ROWS = 8192
_QUERIES = 4096  # at once, on each device
_GATHERED_BYTES = {"cpu": 4 << 20}
_OTHER_GATHERED_BYTES = 128 << 20
_CENTRE_ROWS = 4096
_GROUP = 8  # tiles
_FEW = 16  # least values that are picked one by one rather than sorted


class Neighbours(NamedTuple):
    """The rows nearest to Q queries, ascending; of rows equally far the one that comes first."""

    distance: Array  # (Q, k) float32, Euclidean; inf where the bank has fewer valid rows
    index: Array  # (Q, k) int32 row of the bank


class _Plan(NamedTuple):
    """Sizes of one search."""

    tile: int  # bank rows in a product
    tiles: int
    turns: int  # of the loop over tiles; those beyond the last tile find nothing
    again: int  # segments, or rows where approximate, whose distances are computed directly
    queries: int  # at once
    gathered: int  # queries whose segments are gathered at once


def nearest(
    queries: Array,
    bank: Array,
    *,
    k: int = 1,
    valid: Array | None = None,
    precision: str = "float32",
    approximate: bool = False,
    recall: float = 0.95,
    tile_rows: int | None = None,
) -> Neighbours:
    """The k nearest rows of the bank for each query, by Euclidean distance. No gradient passes.

    Args:
      queries: (Q, D).
      bank: (N, D); whatever invalid rows hold must be finite.
      k: in [1, N].
      valid: (N,) bool, the rows that count; None: all.
      precision: of the products in step 2: "float32", "default" (the device's fast product of float32: TF32 on NVIDIA,
        bfloat16 on TPU) or "bfloat16". Distances are float32 always; the fast ones search more segments again.
      approximate: step 2 keeps single rows by `lax.approx_min_k`, which is fast on TPU alone, and may miss neighbours.
      recall: of `approximate`, within a tile; in (0, 1].
      tile_rows: bank rows in a product, a multiple of 128; None: by backend.

    Returns:
      `Neighbours`.

    Raises:
      ValueError: shapes that do not fit, an unknown precision, a k, recall or tile out of range.
    """
    _check(queries, bank, k, precision, recall, tile_rows)
    queries, bank = lax.stop_gradient((queries, bank))
    valid = jnp.ones(bank.shape[0], bool) if valid is None else valid
    if bank.shape[0] % SEGMENT and bank.shape[0] < _tile_rows(tile_rows):  # one tile, filled up
        missing = -bank.shape[0] % SEGMENT
        bank, valid = jnp.pad(bank, ((0, missing), (0, 0))), jnp.pad(valid, (0, missing))
    plan = _plan(queries.shape[0], *bank.shape, k=k, precision=precision, is_rows=approximate, tile_rows=tile_rows)
    centre = _centre(bank, valid)

    def search(block):
        moved = (centre - block.astype(jnp.float32)).T
        if approximate:
            rows = _promising_rows(moved, bank, valid, centre, plan, precision, recall)
            return _nearest_of(block, rows, 1, bank, valid, k, plan)
        starts = _promising_segments(moved, bank, valid, centre, plan, precision)
        return _nearest_of(block, starts, SEGMENT, bank, valid, k, plan)

    return Neighbours(*map_blocks(search, queries, rows=plan.queries))


def nearest_sharded(
    queries: Array, bank: Array, *, mesh: Mesh, axis: str, k: int = 1, valid: Array | None = None, **options
) -> Neighbours:
    """`nearest` in a bank whose rows are split over an axis of a mesh.

    Every device searches its own rows for all queries; devices exchange k distances and rows a query, no vectors.
    Splitting queries instead needs no function: `nearest` of queries that are sharded exchanges nothing at all.

    Args:
      queries: (Q, D), the same on all devices of the axis.
      bank: (N, D), N a multiple of the axis' devices.
      mesh, axis: where rows lie.
      k, valid, options: as for `nearest`; k at most the rows of a device.

    Raises:
      ValueError: as `nearest`, and rows that the devices do not divide.
    """
    devices = mesh.shape[axis]
    if bank.shape[0] % devices:
        raise ValueError(
            f"nearest: a bank of {bank.shape[0]} rows does not split over {devices} devices; expected a multiple. "
            "Give it a capacity that is one, and mark the rows beyond as not valid."
        )
    valid = jnp.ones(bank.shape[0], bool) if valid is None else valid
    rows = PartitionSpec(axis)

    def local(queries, bank, valid):
        found = nearest(queries, bank, k=k, valid=valid, **options)
        first = lax.axis_index(axis) * bank.shape[0]
        # (Q, devices * k): of equal distances the first is of the device that has the earlier rows.
        distance, index = (
            lax.all_gather(x, axis, axis=1, tiled=True) for x in (found.distance, found.index + first.astype(jnp.int32))
        )
        return _least(distance, index, k)

    split = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=PartitionSpec(),
        axis_names={axis},
        check_vma=False,
    )
    return Neighbours(*split(queries, bank, valid))


def working_bytes(num_queries: int, num_rows: int, features: int, *, k: int = 1, precision: str = "float32") -> int:
    """Memory that `nearest` needs beyond its arguments and results, on this backend; an upper bound.

    What grows with N are the least brackets of segments: N / 128 numbers for each of at most 4,096 queries, at that
    number half a float32 bank of 64 features. A tile of products and the gathered segments are bounded.
    """
    num_rows = max(num_rows, SEGMENT)
    plan = _plan(num_queries, num_rows, features, k=k, precision=precision)
    tile = 4 * plan.tile * (plan.queries + 2 * features)
    inside = plan.tile // SEGMENT
    in_full, gathered_groups = (1, 3) if plan.turns > _GROUP**2 else (3, 0)
    brackets = 4 * (in_full * plan.turns + gathered_groups * plan.again * _GROUP) * inside * plan.queries
    gathered = 2 * 4 * plan.gathered * plan.again * SEGMENT * (features + 4)
    small = 4 * num_rows if num_rows < plan.tile else num_rows
    return tile + brackets + gathered + small + 8 * (plan.queries + num_queries) * (features + 4 * k)


# --- sizes --------------------------------------------------------------------------------------------------------


def _tile_rows(asked: int | None) -> int:
    return asked or _TILE_ROWS.get(jax.default_backend(), _OTHER_TILE_ROWS)


def _plan(
    num_queries: int,
    num_rows: int,
    features: int,
    *,
    k: int,
    precision: str,
    is_rows: bool = False,
    tile_rows: int | None = None,
) -> _Plan:
    tile = min(_tile_rows(tile_rows), num_rows // SEGMENT * SEGMENT)
    tiles = -(-num_rows // tile)
    again = k + _MORE[precision]
    again = min(again, tile) if is_rows else min(again, tiles * (tile // SEGMENT))
    budget = _GATHERED_BYTES.get(jax.default_backend(), _OTHER_GATHERED_BYTES)
    fitting = max(1, budget // (4 * again * features * (1 if is_rows else SEGMENT)))
    devices = devices_of_rows()
    turns = -(-tiles // _GROUP) * _GROUP if tiles > _GROUP**2 else tiles
    return _Plan(tile, tiles, turns, again, _QUERIES * devices, fitting * devices)


# --- steps --------------------------------------------------------------------------------------------------------


def _centre(bank: Array, valid: Array) -> Array:
    """A point amid the bank, (D,) float32: the mean of some thousand rows. Any point would do; a mean rounds least."""
    stride = -(-bank.shape[0] // _CENTRE_ROWS)
    sample, weight = bank[::stride].astype(jnp.float32), valid[::stride, None].astype(jnp.float32)
    total = jnp.maximum(weight.sum(), 1.0)
    centre = jnp.sum(sample * weight, axis=0) / total
    return centre + jnp.sum((sample - centre) * weight, axis=0) / total  # once more, for what the sum rounded away


def _tile(start: Array, first: Array, bank: Array, valid: Array, centre: Array, plan: _Plan) -> tuple[Array, Array]:
    """Rows from `start` on, moved, and half their squared lengths: inf for those not valid, or before `first`."""
    rows = lax.dynamic_slice_in_dim(bank, start, plan.tile).astype(jnp.float32) - centre
    counts = lax.dynamic_slice_in_dim(valid, start, plan.tile) & (start + jnp.arange(plan.tile) >= first)
    return rows, jnp.where(counts, 0.5 * jnp.sum(rows * rows, axis=1), jnp.inf)


def _brackets(turn: Array, moved: Array, bank: Array, valid: Array, centre: Array, plan: _Plan, precision: str):
    """Brackets of a tile, (tile, Q). The last tile ends with the bank; rows before it are out."""
    start = jnp.minimum(turn * plan.tile, bank.shape[0] - plan.tile)
    rows, halves = _tile(start, turn * plan.tile, bank, valid, centre, plan)
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    product = lax.dot_general(
        rows.astype(dtype),
        moved.astype(dtype),
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if precision == "float32" else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
    return product + halves[:, None], start


def _promising_segments(moved, bank, valid, centre, plan: _Plan, precision: str) -> Array:
    """First rows of the segments with the least brackets, ascending: (Q, again) int32.

    Args:
      moved: (D, Q), the centre less the queries.
      bank, valid, centre, plan, precision: of the search.
    """
    inside = plan.tile // SEGMENT

    def least(turn):
        brackets, _ = _brackets(turn, moved, bank, valid, centre, plan, precision)
        return brackets.reshape(inside, SEGMENT, -1).min(axis=1)

    minima = lax.map(least, jnp.arange(plan.turns, dtype=jnp.int32)).reshape(plan.turns * inside, -1)
    segments = jnp.sort(_least_places(minima, plan.again, axis=0, group=_GROUP * inside), axis=0).T
    turn, place = segments // inside, segments % inside
    return jnp.minimum(turn * plan.tile, bank.shape[0] - plan.tile) + place * SEGMENT


def _promising_rows(moved, bank, valid, centre, plan: _Plan, precision: str, recall: float) -> Array:
    """Rows with about the least brackets: (Q, again) int32; arguments as for `_promising_segments`."""

    def least(turn):
        brackets, start = _brackets(turn, moved, bank, valid, centre, plan, precision)
        values, places = lax.approx_min_k(brackets, plan.again, reduction_dimension=0, recall_target=recall)
        return values, places + start

    values, rows = lax.map(least, jnp.arange(plan.tiles, dtype=jnp.int32))
    values, rows = (x.reshape(plan.tiles * plan.again, -1) for x in (values, rows))
    chosen = jnp.take_along_axis(rows, _least_places(values, plan.again, axis=0), axis=0)
    return jnp.sort(chosen, axis=0).T


def _nearest_of(queries, starts, length: int, bank, valid, k: int, plan: _Plan) -> tuple[Array, Array]:
    """The k nearest of runs of `length` rows that start at `starts` (Q, R), by distances computed directly."""

    def of_block(block):
        queries, starts = block
        rows = starts[..., None] + jnp.arange(length, dtype=jnp.int32)

        def run(start):
            return lax.dynamic_slice_in_dim(bank, start, length), lax.dynamic_slice_in_dim(valid, start, length)

        vectors, counts = jax.vmap(jax.vmap(run))(starts)
        # Runs of the last tile may overlap those before; a row that was seen before does not count.
        ends = lax.cummax(starts + length - 1, axis=1)
        seen = jnp.concatenate([jnp.full_like(starts[:, :1], -1), ends[:, :-1]], axis=1)
        counts &= rows > seen[..., None]
        difference = vectors.astype(jnp.float32) - queries.astype(jnp.float32)[:, None, None]
        distance = jnp.sqrt(jnp.sum(difference**2, axis=-1))
        shape = (queries.shape[0], -1)
        return _least(jnp.where(counts, distance, jnp.inf).reshape(shape), rows.reshape(shape), k)

    if isinstance(queries.shape[0], int):
        return map_blocks(of_block, (queries, starts), rows=plan.gathered)
    one = jax.tree.map(lambda x: x[:, None], (queries, starts))  # jax.export with any batch: one query after the other
    return jax.tree.map(lambda x: x[:, 0], lax.map(of_block, one))


def _least(distance: Array, index: Array, k: int) -> tuple[Array, Array]:
    """The k least of each row, ascending; of equal ones the first."""
    if distance.shape[1] < k:  # approximate search in a tiny bank
        distance = jnp.pad(distance, ((0, 0), (0, k - distance.shape[1])), constant_values=jnp.inf)
        index = jnp.pad(index, ((0, 0), (0, k - index.shape[1])))
    places = _least_places(distance, k, axis=1)
    return jnp.take_along_axis(distance, places, axis=1), jnp.take_along_axis(index, places, axis=1)


def _least_places(values: Array, count: int, *, axis: int, group: int = 0) -> Array:
    """Where along an axis the least values are, ascending; of equal ones the first.

    By minima, gathers and sorts, which devices that share the other axis compute each for its own part. XLA would bring
    all of it to every device for `lax.top_k`.

    Args:
      values: a matrix.
      count: how many, at most the axis' length.
      axis: 0 or 1.
      group: values in a first round that finds where to look; a divisor of the axis' length, or 0 for no such round.
    """
    length = values.shape[axis]
    if group and length % group == 0 and length // group > count:  # only for axis 0
        rounds = values.reshape(length // group, group, -1).min(axis=1)
        first = jnp.sort(_least_places(rounds, count, axis=0), axis=0) * group
        rows = (first[:, None] + jnp.arange(group, dtype=jnp.int32)[:, None]).reshape(count * group, -1)
        places = _least_places(jnp.take_along_axis(values, rows, axis=0), count, axis=0)
        return jnp.take_along_axis(rows, places, axis=0)
    places = lax.broadcasted_iota(jnp.int32, values.shape, axis)
    if count > _FEW:
        ordered = lax.sort((values, places), dimension=axis, num_keys=1)[1]
        return lax.slice_in_dim(ordered, 0, count, axis=axis)
    found = []
    for _ in range(count):
        least = values.min(axis=axis, keepdims=True)
        found.append(jnp.where(values == least, places, length - 1).min(axis=axis, keepdims=True))
        values = jnp.where(places == found[-1], jnp.inf, values)
    return jnp.concatenate(found, axis=axis)


def _check(queries: Array, bank: Array, k: int, precision: str, recall: float, tile_rows: int | None) -> None:
    if queries.ndim != 2 or bank.ndim != 2 or queries.shape[1] != bank.shape[1] or not bank.shape[0]:
        raise ValueError(
            f"nearest: queries and bank have shapes {queries.shape} and {bank.shape}; expected (Q, D) and (N, D) with "
            "N >= 1. Flatten the positions first: queries.reshape(-1, D)."
        )
    if not 1 <= k <= bank.shape[0]:
        raise ValueError(f"nearest: k={k} neighbours in a bank of {bank.shape[0]}; expected 1 to that many. Pass k=1.")
    if precision not in PRECISIONS:
        raise ValueError(
            f"nearest: precision={precision!r} is unknown; expected one of {PRECISIONS}. Pass precision='float32'."
        )
    if not 0 < recall <= 1:
        raise ValueError(f"nearest: recall={recall}; expected more than 0 and at most 1. Pass recall=0.95.")
    if tile_rows is not None and (tile_rows < SEGMENT or tile_rows % SEGMENT):
        raise ValueError(
            f"nearest: tile_rows={tile_rows}; expected a multiple of {SEGMENT}. "
            f"Pass tile_rows={max(math.ceil(tile_rows / SEGMENT), 1) * SEGMENT}."
        )
