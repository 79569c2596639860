"""Neural Batch Sampler: how an autoencoder's error falls tells anomalies; an agent picks the patches that it trains on.

Wen-Hsuan Chu, Kris M. Kitani. "Neural Batch Sampling with Reinforcement Learning for Semi-Supervised Anomaly
Detection". ECCV 2020. https://doi.org/10.1007/978-3-030-58574-7_45 (thesis CMU-RI-TR-20-09)

An autoencoder of patches is trained from scratch for K steps, again and again. The errors of a pixel after T of these
steps, the last or every so many, are its loss profile. A small network, the predictor, classifies pixels from their
profiles; it learns from a few pictures whose masks are known (the source "labelled"). The patches of every step are
picked by walkers on the training pictures; their policy is trained by REINFORCE, and at the end of a cycle it is paid
minus the predictor's loss.

What is whose. The paper's text could not be obtained, nor any code of its authors; stored copies end after the
abstract. So nothing here is "the paper's value", and nothing compares with its tables:
  * Read in the abstract, or in sentences of the paper quoted elsewhere: loss profiles and why they tell; that a sampler
    picks a sequence of patches and is paid at its end; that minus the predictor's loss is part of the pay; few labels.
  * Read in the code of a later system of the same name (arXiv 2511.20270, not the authors'), whose numbers we take
    where the paper's are unknown: picture, patch, crop and step of 256, 64, 128 and 24 pixels, nine actions, K=20,
    T=10, 32 patches a step, Adam at 1e-3, the layers of all three networks, L1 profiles of an autoencoder trained with
    L2, the hand-made rewards of coverage and edges and their weight, which falls to 0, five labelled pictures a type.
    That system's sampler gets no gradient at all; ours does, and tests hold it to that.
  * From memory, unverified: that the autoencoder is started anew, and that the agent sees picture, loss and history.
  * Ours: everything else. Errors in tiles of a patch (that system runs the autoencoder over the whole picture, where
    its code layer adds up to 64 codes and errors mean nothing); no skip connection; `walkers` in parallel, each
    credited with its own hand-made rewards; action 0 jumps to a new picture and takes a patch there, so that shapes are
    static; each cycle's pool is `batch_size / episodes` normal pictures and the labelled ones, drawn as if from all;
    the baseline of the other episodes; rewards before the predictor sees the profiles; the mean over actions in the
    policy's loss (a sum would drown the entropy bonus), and advantages of a root mean square of 1; the class balance;
    normal pictures as further negatives; the schedule; every preset but `full`.
  * Ours, and needed before profiles were worth more than their last error (`benchmarks/ACCURACY.md`): patches reach the
    border of a picture (`reach`; that system keeps the crop inside it, so that the outer eighth is never trained on
    and has the largest errors of all); batch normalisation judges by the statistics of the last patches, not by a
    running mean over the weights of all steps; a profile may be spread over the whole training (`profile_stride`); the
    predictor reads cosines over time of log errors, standardised.
  * Test pictures take no part in training: their profiles come from the autoencoders that `eval_cycles` cycles with the
    trained sampler leave behind. With `transductive` these cycles walk on the source "aux", to which the pictures to be
    scored may belong. `predictor="none"` needs no labels: the score is the mean of the profile.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxad.core import Array, Batch, Method, Phase, Scores, Spec
from jaxad.methods.neural_batch_config import PRESETS, NeuralBatchConfig, check
from jaxad.nn.conv import lowering_for
from jaxad.nn.glimpse import GlimpsePolicy
from jaxad.nn.init import init_flat
from jaxad.nn.patch_autoencoder import PatchAutoencoder
from jaxad.nn.pixel_classifier import PixelClassifier
from jaxad.ops import walkers
from jaxad.ops.blocks import devices_of_rows, map_blocks, rows_over
from jaxad.ops.edges import edge_strength
from jaxad.ops.policy_gradient import entropy_of, leave_one_out, policy_loss, returns_to_go

_ACTIONS = len(walkers.MOVES)
_MOMENTUM = 0.9  # of the predictor's running statistics
_TILES = 64  # of each autoencoder, seen at a time
_PIXELS = 2**21  # that the predictor judges at a time: 32 pictures of 256x256
_LANES = 128  # of an array's last axis on TPUs
_FLOOR = 0.01  # of errors, before their logarithm
_TOP = 1000  # "top" is the mean of one pixel in so many


class Labelled(NamedTuple):
    """The labelled pictures, L of them."""

    image: Array  # (L, H, W, C) uint8
    mask: Array  # (L, H, W) uint8
    positive: Array  # () pixels
    negative: Array  # () pixels
    share: Array  # () of all pictures of the pool


class Weights(NamedTuple):
    """An autoencoder as two arrays: a step of Adam is then one operation, whatever the number of layers.

    Snapshots after the last T steps of a cycle are (T, ...), oldest first; a state has those of all `eval_cycles`.
    """

    params: Array  # (P, 128), leaf by leaf, each filled up to whole rows
    batch_stats: Array  # (Q, 128), likewise; of the last patches


class NeuralBatchState(NamedTuple):
    """A detector, trained or in training."""

    cfg: NeuralBatchConfig
    params: dict[str, Any]  # "policy", "predictor"
    batch_stats: Any  # of the predictor
    optimizer: dict[str, optax.OptState]
    updates: Array  # () int32
    labelled: Labelled | None  # None: no predictor
    snapshots: Weights


class Pool(NamedTuple):
    """Pictures that the walkers of an episode walk on, n normal ones before l labelled ones; with a leading axis E.

    All have a margin, so that the sampler's crop may reach beyond the picture where its patch reaches the border.
    """

    image: Array  # (n + l, H, W * C), as `walkers.crop_pixels` wants it
    edges: Array  # (n + l, S, S) mean edge strength of cells
    anomalous: Array  # (n + l, S, S) anomalous share of cells


class Rollout(NamedTuple):
    """What W walkers did at a move; with leading axes of episodes, steps and moves."""

    image: Array  # (W,) int32, where they stood
    centre: Array  # (W, 2) int32
    error: Array | None  # (W, C, C) of the autoencoder, as they saw it; None: nobody looked
    visits: Array | None  # (W, c, c) cells
    action: Array  # (W,) int32
    clone: Array  # (W,) reward for edges in the patch taken
    cover: Array  # (W,) reward, the higher the less the patch has been visited
    anomalous: Array  # (W,) anomalous share of the patch taken


class Numbers(NamedTuple):
    """All that is drawn for an episode, uniform in (0, 1)."""

    start: Array  # (W, 4): labelled or not, picture, row, column
    moves: Array  # (K, B / W, W, A + 4): for the action, and where to go on leaving


# --- networks -----------------------------------------------------------------------------------------------------


def autoencoder_of(cfg: NeuralBatchConfig, *, impl: str = "gemm") -> PatchAutoencoder:
    """The autoencoder. As products by default: episodes have weights of their own."""
    return PatchAutoencoder(cfg.ae_features, cfg.ae_code, cfg.ae_skip, impl=impl, dtype=jnp.dtype(cfg.dtype))


def predictor_of(cfg: NeuralBatchConfig) -> PixelClassifier:
    """The network that classifies profiles."""
    return PixelClassifier(cfg.predictor_features, _MOMENTUM, impl=cfg.conv_impl, dtype=jnp.dtype(cfg.dtype))


def policy_of(cfg: NeuralBatchConfig) -> GlimpsePolicy:
    """The sampler's network."""
    return GlimpsePolicy(cfg.policy_features, _ACTIONS, cfg.policy_hidden, impl=cfg.conv_impl)


def init(key: Array, cfg: NeuralBatchConfig, spec: Spec) -> NeuralBatchState:
    """The untrained detector; its snapshots are empty until the last phase."""
    height, width, channels = spec.image
    keys = jax.random.split(key)
    crops = jnp.zeros((1, 2 * cfg.patch, 2 * cfg.patch, channels + 2))
    policy = init_flat(keys[0], policy_of(cfg), crops)["params"]
    predictor = init_flat(keys[1], predictor_of(cfg), jnp.zeros((1, 8, 8, cfg.profile_length)), train=True)
    labelled = None
    if cfg.predictor == "learned":
        rows = spec.sizes["labelled"]
        empty = jnp.zeros((rows, height, width, channels), jnp.uint8), jnp.zeros((rows, height, width), jnp.uint8)
        share = rows / (rows + spec.sizes["train"]) if cfg.pool == "all" else 0.0
        labelled = Labelled(*empty, jnp.float32(0), jnp.float32(0), jnp.float32(share))
    fresh = jax.eval_shape(lambda: fresh_weights(keys[0], cfg, channels))
    kept = (cfg.eval_cycles, cfg.profile_length)
    snapshots = jax.tree.map(lambda leaf: jnp.zeros((*kept, *leaf.shape)), fresh)
    params = {"policy": policy, "predictor": predictor["params"]}
    return NeuralBatchState(
        cfg=cfg,
        params=params,
        batch_stats=predictor["batch_stats"],
        optimizer={name: optax.scale_by_adam().init(part) for name, part in params.items()},
        updates=jnp.int32(0),
        labelled=labelled,
        snapshots=snapshots,
    )


def _variables(cfg: NeuralBatchConfig, channels: int) -> Weights:
    """Shapes of the autoencoder's variables, as trees."""
    patches = jnp.zeros((1, cfg.patch, cfg.patch, channels))
    shapes = jax.eval_shape(lambda: autoencoder_of(cfg).init(jax.random.key(0), patches, train=True))
    return Weights(shapes["params"], shapes["batch_stats"])


def fresh_weights(key: Array, cfg: NeuralBatchConfig, channels: int) -> Weights:
    """An autoencoder that has seen nothing."""
    patches = jnp.zeros((1, cfg.patch, cfg.patch, channels))
    drawn = init_flat(key, autoencoder_of(cfg), patches, train=True)
    return Weights(*(_join(drawn[part]) for part in Weights._fields))


def variables_of(cfg: NeuralBatchConfig, weights: Weights, channels: int) -> dict[str, Any]:
    """What the autoencoder's `apply` takes."""
    shapes = _variables(cfg, channels)
    return {part: _part(getattr(weights, part), getattr(shapes, part)) for part in Weights._fields}


def _join(tree: Any) -> Array:
    """All leaves in one array (rows, 128), each filled up with zeros to whole rows.

    One array, since an operation for each leaf costs more than the work where networks are small. Rows of 128, since
    the TPU compiler laid a stack of long vectors out along the stack, and filled that axis up to 128.
    """
    rows = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    rows = [jnp.pad(leaf, (0, -leaf.size % _LANES)).reshape(-1, _LANES) for leaf in rows]
    return jnp.concatenate(rows)


def _part(joined: Array, shapes: Any) -> Any:
    """The inverse of `_join`."""
    leaves, structure = jax.tree.flatten(shapes)
    rows = [-(-leaf.size // _LANES) for leaf in leaves]
    parts = jnp.split(joined, list(itertools.accumulate(rows))[:-1])
    cut = [part.ravel()[: leaf.size].reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]
    return jax.tree.unflatten(structure, cut)


def corrected(batch_stats: Any, begun: Any, steps: Array) -> Any:
    """Running statistics freed of their start, which a few steps do not forget.

    Args:
      batch_stats: after `steps` steps, as a tree or a vector.
      begun: what they were before the first, of the same shape.
      steps: () int32; 0 leaves them as they are.
    """
    kept = jnp.where(steps > 0, _MOMENTUM ** steps.astype(jnp.float32), 0.0)
    return jax.tree.map(lambda leaf, start: (leaf - kept * start) / (1 - kept), batch_stats, begun)


def starts_of(shapes: Any) -> Any:
    """What running statistics are before the first step, as NumPy arrays: means 0, variances 1."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full(leaf.shape, path[-1].key == "var", np.float32), shapes
    )


# --- errors and profiles ------------------------------------------------------------------------------------------


def loss_map(cfg: NeuralBatchConfig, weights: Weights, images: Array, *, impl: str = "gemm") -> Array:
    """Absolute reconstruction error, mean over channels, tile by tile.

    Args:
      cfg: the config.
      weights: of one autoencoder.
      images: (B, H, W, C); borders are repeated where tiles reach beyond them.
      impl: of the convolutions; "gemm" where `weights` is vmapped.

    Returns:
      (B, H, W).
    """
    variables = variables_of(cfg, weights, images.shape[-1])
    shifts = [i * cfg.patch // cfg.tile_shifts for i in range(cfg.tile_shifts)]
    maps = [_tiled(cfg, variables, images, shift, impl) for shift in itertools.product(shifts, shifts)]
    return maps[0] if len(maps) == 1 else jnp.stack(maps).mean(axis=0)


def _tiled(cfg: NeuralBatchConfig, variables: Any, images: Array, shift: tuple[int, int], impl: str) -> Array:
    """The map of one tiling, which begins `shift` pixels above and left of the picture."""
    side, (height, width, channels) = cfg.patch, images.shape[1:]
    around = [(s, -(n + s) % side) for n, s in zip((height, width), shift, strict=True)]
    padded = jnp.pad(images, [(0, 0), *around, (0, 0)], mode="edge") if any(map(any, around)) else images
    rows, columns = (n // side for n in padded.shape[1:3])

    def error(folded):
        tiles = folded.reshape(-1, rows, side, columns, side, channels).swapaxes(2, 3)
        tiles = tiles.reshape(-1, side, side, channels)
        rebuilt = autoencoder_of(cfg, impl=impl).apply(variables, tiles, train=False)
        found = jnp.abs(tiles - rebuilt).mean(axis=-1).reshape(-1, rows, columns, side, side)
        return found.swapaxes(2, 3).reshape(-1, rows * side, columns * side)

    folded = padded.reshape(*padded.shape[:2], -1)  # as in `Pool`: TPUs fill an axis of three up to 128
    found = map_blocks(error, folded, rows=max(1, _TILES // (rows * columns)) * devices_of_rows())
    return found[:, shift[0] : shift[0] + height, shift[1] : shift[1] + width]


def profile(cfg: NeuralBatchConfig, snapshots: Weights, images: Array, *, impl: str = "gemm") -> Array:
    """Loss profiles: the error of each pixel under T snapshots, oldest first. (B, H, W, C) -> (B, T, H, W).

    Profiles are kept with pixels last: TPUs fill a last axis up to 128, which for T = 10 takes 13 times the memory.
    """
    with lowering_for(looped=True):
        maps = lax.map(lambda snapshot: loss_map(cfg, snapshot, images, impl=impl), snapshots)
    return jnp.moveaxis(maps, 0, 1)


def shape_of(profiles: Array) -> Array:
    """What the predictor reads: cosines over time of log errors, from their level to their quickest changes.

    Errors of a pixel after neighbouring steps hardly differ, so that a network has to learn for long before it reads
    anything but their level; cosines, each standardised by the network, put what differs beside it.

    Args:
      profiles: (..., T, H, W).

    Returns:
      (..., T, H, W), the orthonormal discrete cosine transform of log(error + 0.01).
    """
    length = profiles.shape[-3]
    times, waves = np.arange(length) + 0.5, np.arange(length)
    basis = np.cos(np.pi / length * times[:, None] * waves) * np.sqrt(np.where(waves, 2, 1) / length)
    return jnp.einsum("...thw,ts->...shw", jnp.log(profiles + _FLOOR), jnp.asarray(basis, jnp.float32))


# --- a cycle ------------------------------------------------------------------------------------------------------


def draw_numbers(key: Array, cfg: NeuralBatchConfig) -> Numbers:
    """What an episode draws, in one go: each new shape of a random draw costs seconds of compile time on CPU."""
    moves = (cfg.ae_steps, cfg.ae_batch // cfg.walkers, cfg.walkers, _ACTIONS + 4)
    flat = jax.random.uniform(key, (4 * cfg.walkers + math.prod(moves),), minval=1e-7)
    return Numbers(flat[: 4 * cfg.walkers].reshape(-1, 4), flat[4 * cfg.walkers :].reshape(moves))


def _arrive(cfg: NeuralBatchConfig, pool: Pool, normals: int, share: Array, drawn: Array) -> tuple[Array, Array]:
    """A picture and a place in it for each walker, from drawn numbers (W, 4): uniform over all pictures and places."""
    labelled = pool.image.shape[0] - normals
    image = jnp.minimum((drawn[:, 1] * normals).astype(jnp.int32), normals - 1)
    if labelled:
        other = normals + jnp.minimum((drawn[:, 1] * labelled).astype(jnp.int32), labelled - 1)
        image = jnp.where(drawn[:, 0] < share, other, image)
    first, last = walkers.centres(pool.edges.shape[1:], 2 * cfg.patch // cfg.grid)
    places = first + (drawn[:, 2:] * (last - first + 1)).astype(jnp.int32)
    return image, jnp.minimum(places, last)


def _cut(cfg: NeuralBatchConfig, pool: Pool, image: Array, centre: Array, pixels: int) -> Array:
    """Squares of the pool's pictures, (W, pixels, pixels, C)."""
    where = {"size": pixels // cfg.grid, "grid": cfg.grid, "channels": channels_of(cfg, pool)}
    return walkers.crop_pixels(pool.image, image, centre, **where)


def channels_of(cfg: NeuralBatchConfig, pool: Pool) -> int:
    """C of the pool's pictures."""
    return pool.image.shape[-1] // (pool.edges.shape[-1] * cfg.grid)


def observe(cfg: NeuralBatchConfig, pool: Pool, image: Array, centre: Array, error: Array, visits: Array) -> Array:
    """What walkers see: picture, error and visits of the crop. -> (W, 2P, 2P, C + 2)."""
    colours = _cut(cfg, pool, image, centre, 2 * cfg.patch)
    counts = jnp.repeat(jnp.repeat(visits, cfg.grid, axis=1), cfg.grid, axis=2)
    return jnp.concatenate([colours, error[..., None], counts[..., None]], axis=-1)


def _move(cfg: NeuralBatchConfig, policy: Any, pool: Pool, normals: int, share: Array, weights: Weights):
    """The body of the scan over moves: all walkers look, act, and take a patch."""
    cells, size = 2 * cfg.patch // cfg.grid, cfg.patch // cfg.grid
    first, last = walkers.centres(pool.edges.shape[1:], cells)

    def body(carry, drawn):
        image, centre, visits = carry
        error = seen = None
        logits: Array | float = 0.0
        if cfg.sampler == "learned":
            error = loss_map(cfg, weights, _cut(cfg, pool, image, centre, 2 * cfg.patch))
            seen = walkers.crop(visits, image, centre, size=cells)
            logits = policy_of(cfg).apply({"params": policy}, observe(cfg, pool, image, centre, error, seen))
        action = jnp.argmax(logits - jnp.log(-jnp.log(drawn[:, :_ACTIONS])), axis=-1).astype(jnp.int32)
        moved = walkers.move(centre, action, step=cfg.stride // cfg.grid, first=first, last=last)
        other, place = _arrive(cfg, pool, normals, share, drawn[:, _ACTIONS:])
        leaves = action == walkers.LEAVE
        image_after = jnp.where(leaves, other, image)
        centre_after = jnp.where(leaves[:, None], place, moved)

        def mean_of(maps):
            return walkers.crop(maps, image_after, centre_after, size=size).mean(axis=(1, 2))

        found = Rollout(
            image=image,
            centre=centre,
            error=error,
            visits=seen,
            action=action,
            clone=jax.nn.sigmoid(mean_of(pool.edges)),
            cover=-jax.nn.sigmoid(mean_of(visits)),
            anomalous=mean_of(pool.anomalous),
        )
        patches = _cut(cfg, pool, image_after, centre_after, cfg.patch)
        visits = walkers.visit(visits, image_after, centre_after, size=size)
        return (image_after, centre_after, visits), (found, patches)

    return body


class Cycle(NamedTuple):
    """What a cycle leaves behind."""

    rollout: Rollout  # (K, B / W, W, ...)
    snapshots: Weights  # (T, ...)
    loss: Array  # () of the autoencoder at its last step
    coverage: Array  # () share of the pool's cells that were visited


def cycle(key: Array, cfg: NeuralBatchConfig, policy: Any, pool: Pool, normals: int, share: Array) -> Cycle:
    """Trains an autoencoder from scratch on patches that walkers pick.

    Args:
      key: of the episode.
      cfg: the config.
      policy: params of the sampler.
      pool: of the episode; its first `normals` pictures are normal.
      normals: how many.
      share: () of labelled pictures among those that a walker goes to.
    """
    key_weights, key_numbers = jax.random.split(key)
    numbers = draw_numbers(key_numbers, cfg)
    network, channels = autoencoder_of(cfg), channels_of(cfg, pool)
    fresh = fresh_weights(key_weights, cfg, channels)
    history = jax.tree.map(lambda leaf: jnp.zeros((cfg.profile_length, *leaf.shape)), fresh)
    begin = cfg.ae_steps - 1 - (cfg.profile_length - 1) * cfg.profile_stride

    def loss_of(params, batch_stats, patches):
        variables = variables_of(cfg, Weights(params, batch_stats), channels)
        rebuilt, updated = network.apply(variables, patches, train=True, mutable=["batch_stats"])
        return jnp.mean((rebuilt - patches) ** 2), _join(updated["batch_stats"])

    def step(carry, drawn):
        t, weights, optimizer, places, history = carry
        places, (rollout, patches) = lax.scan(_move(cfg, policy, pool, normals, share, weights), places, drawn)
        patches = patches.reshape(-1, *patches.shape[2:])
        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(*weights, patches)
        updates, optimizer = optax.scale_by_adam().update(grads, optimizer)
        params = weights.params - cfg.ae_learning_rate * updates
        weights = Weights(params, loss_of(params, weights.batch_stats, patches)[1])  # as the step has left it
        slot = jnp.maximum(-((begin - t) // cfg.profile_stride), 0)  # of the next to keep, which overwrites
        history = jax.tree.map(lambda h, leaf: lax.dynamic_update_index_in_dim(h, leaf, slot, 0), history, weights)
        return (t + 1, weights, optimizer, places, history), (rollout, loss)

    places = (*_arrive(cfg, pool, normals, share, numbers.start), jnp.zeros_like(pool.edges))
    carry = (jnp.int32(0), fresh, optax.scale_by_adam().init(fresh.params), places, history)
    with lowering_for(looped=True):
        (*_, (_, _, visits), snapshots), (rollout, losses) = lax.scan(step, carry, numbers.moves)
    cells = margin(cfg) // cfg.grid
    return Cycle(rollout, snapshots, losses[-1], jnp.mean(_inside(visits[None], cells, cells) > 0))


class Cycles(NamedTuple):
    """E cycles side by side and what they walked on."""

    pool: Pool  # (E, ...)
    cycle: Cycle  # (E, ...)
    rows: Array | None  # (l,) labelled pictures in the pool
    normals: int  # n, of each episode


def run_cycles(key: Array, state: NeuralBatchState, images: Array, *, episodes: int) -> Cycles:
    """Episodes side by side, each on its share of the pictures (B, H, W, C) and the same labelled ones."""
    cfg, rows = state.cfg, None
    normals = images.shape[0] // episodes
    own = images[: episodes * normals].reshape(episodes, normals, *images.shape[1:])
    key_rows, key_episodes = jax.random.split(key)
    pool, share = _pool_of(cfg, own, jnp.zeros(own.shape[:-1])), jnp.float32(0)
    if state.labelled is not None:
        rows = choose_rows(key_rows, state.labelled.image.shape[0], cfg.profile_pictures)
        marked = state.labelled.image[rows].astype(jnp.float32) / 255, state.labelled.mask[rows].astype(jnp.float32)
        more = jax.tree.map(lambda leaf: leaf[0], _pool_of(cfg, *(a[None] for a in marked)))
        join = jax.vmap(lambda a, b: jnp.concatenate([a, b]), in_axes=(0, None))
        pool, share = jax.tree.map(join, pool, more), state.labelled.share
    keys = jax.vmap(lambda e: jax.random.fold_in(key_episodes, e))(jnp.arange(episodes))
    run = jax.vmap(lambda k, p: cycle(k, cfg, state.params["policy"], p, normals, share))
    with rows_over(1):  # devices share the episodes, not the tiles of one
        return Cycles(pool, run(keys, pool), rows, normals)


def choose_rows(key: Array, size: int, count: int) -> Array:
    """`count` of `size` rows, each at most once; all in order if there are no more."""
    if count >= size:
        return jnp.arange(size)
    return jnp.argsort(jax.random.uniform(key, (size,)))[:count]


def _pool_of(cfg: NeuralBatchConfig, images: Array, masks: Array) -> Pool:
    """(E, n, H, W, C) and (E, n, H, W) as a pool."""
    edges, around = jax.vmap(edge_strength)(images), margin(cfg)
    cells = [jax.vmap(lambda m: walkers.cell_means(m, grid=cfg.grid))(maps) for maps in (edges, masks)]
    narrow = [(0, 0), (0, 0), *((around // cfg.grid,) * 2,) * 2]
    channels, flat = images.shape[-1], images.reshape(*images.shape[:3], -1)
    sides = (jnp.tile(edge, around) for edge in (flat[..., :channels], flat[..., -channels:]))
    wide = jnp.concatenate([next(sides), flat, next(sides)], axis=-1)
    wide = jnp.pad(wide, [(0, 0), (0, 0), (around, around), (0, 0)], mode="edge")
    return Pool(wide, *(jnp.pad(maps, narrow) for maps in cells))


def margin(cfg: NeuralBatchConfig) -> int:
    """Pixels of the pool beyond each border of its pictures."""
    return cfg.patch // 2 if cfg.reach == "picture" else 0


def _inside(maps: Array, rows: int, columns: int) -> Array:
    """(E, n, H, W) without a margin."""
    return maps[:, :, rows : maps.shape[2] - rows, columns : maps.shape[3] - columns]


# --- the predictor ------------------------------------------------------------------------------------------------


def pixel_loss(logits: Array, masks: Array, alpha: Array) -> Array:
    """Cross entropy of each pixel, normal ones weighed by `alpha`: -(y log q + alpha (1 - y) log(1 - q))."""
    return -(masks * jax.nn.log_sigmoid(logits) + alpha * (1 - masks) * jax.nn.log_sigmoid(-logits))


def balance(state: NeuralBatchState) -> Array:
    """alpha, the weight of normal pixels."""
    cfg, labelled = state.cfg, state.labelled
    if cfg.alpha_schedule == "linear_decay":
        return 1 - state.updates / cfg.steps
    assert labelled is not None
    return jnp.clip(labelled.positive / jnp.maximum(labelled.negative, 1.0), 0.01, 1.0)


def classify(state: NeuralBatchState, profiles: Array) -> Array:
    """Logits of pixels by the predictor as it stands, from what `shape_of` gives. (B, T, H, W) -> (B, H, W)."""
    steps = state.updates * state.cfg.predictor_steps
    batch_stats = corrected(state.batch_stats, starts_of(state.batch_stats), steps)
    variables = {"params": state.params["predictor"], "batch_stats": batch_stats}

    def judge(block):
        return predictor_of(state.cfg).apply(variables, jnp.moveaxis(block, 1, -1), train=False)

    rows = max(1, _PIXELS // math.prod(profiles.shape[2:]))
    return map_blocks(judge, profiles, rows=rows * devices_of_rows())


def fit_predictor(key: Array, state: NeuralBatchState, profiles: Array, masks: Array):
    """Some steps of Adam on stored profiles as `shape_of` gives them, turned and mirrored at random.

    Args:
      key: of the choice of profiles.
      state: the detector.
      profiles: (E, N, T, H, W); a step takes some of each episode, so that none has to move between devices.
      masks: (E, N, H, W).

    Returns:
      (state, mean loss).
    """
    cfg, alpha = state.cfg, balance(state)
    square = profiles.shape[3] == profiles.shape[4]
    drawn = jax.random.uniform(key, (cfg.predictor_steps, profiles.shape[0], cfg.predictor_batch, 4))

    def loss_of(params, batch_stats, x, y):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = predictor_of(cfg).apply(variables, x, train=True, mutable=["batch_stats"])
        return pixel_loss(logits, y, alpha).mean(), updated["batch_stats"]

    def step(carry, numbers):
        params, batch_stats, optimizer = carry
        rows = jnp.minimum((numbers[..., 0] * profiles.shape[1]).astype(jnp.int32), profiles.shape[1] - 1)
        picked = jax.vmap(lambda a, r: a[r])(profiles, rows), jax.vmap(lambda a, r: a[r])(masks, rows)
        x, y = (a.reshape(-1, *a.shape[2:]) for a in picked)
        turns = numbers[..., 1:].reshape(-1, 3) < 0.5
        x, y = _turn(jnp.moveaxis(x, 1, -1), turns, square), _turn(y[..., None], turns, square)[..., 0]
        (loss, batch_stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch_stats, x, y)
        updates, optimizer = optax.scale_by_adam().update(grads, optimizer)
        params = jax.tree.map(lambda p, u: p - cfg.predictor_learning_rate * u, params, updates)
        return (params, batch_stats, optimizer), loss

    carry = state.params["predictor"], state.batch_stats, state.optimizer["predictor"]
    with lowering_for(looped=True):
        (params, batch_stats, optimizer), losses = lax.scan(step, carry, drawn)
    fitted = state._replace(
        params={**state.params, "predictor": params},
        batch_stats=batch_stats,
        optimizer={**state.optimizer, "predictor": optimizer},
    )
    return fitted, losses.mean()


def _turn(x: Array, turns: Array, square: bool) -> Array:
    """Mirrors (B, H, W, T) up and down, left and right, and along the diagonal where `turns` (B, 3) says so."""
    by = turns[:, :, None, None, None]
    x = jnp.where(by[:, 0], x[:, ::-1], x)
    x = jnp.where(by[:, 1], x[:, :, ::-1], x)
    return jnp.where(by[:, 2], x.swapaxes(1, 2), x) if square else x


# --- the sampler --------------------------------------------------------------------------------------------------


def advantages_of(rollout: Rollout, end: Array, *, beta: Array, leave_cost: Array | float) -> Array:
    """Returns less their baseline: hand-made rewards to come, weighed by beta, and the reward at the end.

    They are divided by their root mean square: the predictor's loss differs by thousandths between episodes, and the
    entropy bonus should weigh as much against it as against hand-made rewards.

    Args:
      rollout: (E, K, B / W, W) entries.
      end: (E,) reward at the end of each episode.
      beta: () weight of hand-made rewards.
      leave_cost: of leaving a picture.

    Returns:
      (E, K * B / W, W).
    """
    leaves = rollout.action == walkers.LEAVE
    made = rollout.clone + rollout.cover - leave_cost * leaves
    made = made.reshape(made.shape[0], -1, made.shape[-1])
    returns = returns_to_go(beta * made / made.shape[1], (1 - beta) * end)
    advantages = returns - leave_one_out(returns.mean(axis=-1, keepdims=True))
    return advantages / jnp.sqrt(jnp.mean(advantages**2) + 1e-12)


def fit_sampler(state: NeuralBatchState, cycles: Cycles, advantages: Array):
    """A step of Adam along the policy gradient, from the observations of the rollout, AE step by AE step.

    Returns:
      (state, norm of the gradient, mean entropy).
    """
    cfg, rollout = state.cfg, cycles.cycle.rollout
    chunks = rollout._replace(clone=None, cover=None, anomalous=None)
    chunks = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), chunks)  # (K, E, B / W, W, ...)
    steps, episodes = cfg.ae_steps, advantages.shape[0]
    gains = jnp.moveaxis(advantages.reshape(episodes, steps, -1), 1, 0)

    def loss_of(policy, chunk, gain):
        flat = jax.tree.map(lambda leaf: leaf.reshape(episodes, -1, *leaf.shape[3:]), chunk)
        see = jax.vmap(lambda pool, *walk: observe(cfg, pool, *walk))
        seen = see(cycles.pool, flat.image, flat.centre, flat.error, flat.visits)
        logits = policy_of(cfg).apply({"params": policy}, seen.reshape(-1, *seen.shape[2:]))
        weight = cfg.entropy_weight
        loss = policy_loss(logits, flat.action.reshape(-1), gain.reshape(-1), entropy_weight=weight)
        return loss, entropy_of(logits).mean()

    def add(carry, chunk):
        grads, entropy = jax.grad(loss_of, has_aux=True)(state.params["policy"], *chunk)
        return jax.tree.map(lambda a, b: a + b / steps, carry, (grads, entropy)), None

    start = jax.tree.map(jnp.zeros_like, state.params["policy"]), jnp.float32(0)
    with lowering_for(looped=True):
        (grads, entropy), _ = lax.scan(add, start, (chunks, gains))
    norm = optax.global_norm(grads)
    grads = jax.tree.map(lambda g: g / jnp.maximum(norm, 1.0), grads)
    updates, optimizer = optax.scale_by_adam().update(grads, state.optimizer["policy"])
    policy = jax.tree.map(lambda p, u: p - cfg.learning_rate * u, state.params["policy"], updates)
    params = {**state.params, "policy": policy}
    return state._replace(params=params, optimizer={**state.optimizer, "policy": optimizer}), norm, entropy


# --- phases -------------------------------------------------------------------------------------------------------


def labels_step(key: Array, state: NeuralBatchState, batch: Batch):
    """Keeps the labelled pictures, and counts their pixels."""
    del key
    old = state.labelled
    assert old is not None
    row = jnp.where(batch.valid, batch.index, old.image.shape[0])  # padding falls off the end
    weight = batch.valid[:, None, None].astype(jnp.float32)
    labelled = old._replace(
        image=old.image.at[row].set(jnp.round(batch.image * 255).astype(jnp.uint8), mode="drop"),
        mask=old.mask.at[row].set(batch.mask.astype(jnp.uint8), mode="drop"),
        positive=old.positive + jnp.sum(weight * batch.mask),
        negative=old.negative + jnp.sum(weight * (1 - batch.mask)),
    )
    return state._replace(labelled=labelled), {"anomalous_pixels": labelled.positive}


def sampler_step(key: Array, state: NeuralBatchState, batch: Batch):
    """A meta-iteration: E cycles, rewards, one update of the sampler, some of the predictor.

    A batch larger than `batch_size` has more episodes, not more pictures in each, so that more devices can share it.
    """
    cfg = state.cfg
    episodes = batch.image.shape[0] // (cfg.batch_size // cfg.episodes)
    key_cycles, key_fit = jax.random.split(key)
    cycles = run_cycles(key_cycles, state, batch.image, episodes=episodes)
    rollout = cycles.cycle.rollout
    beta, end = jnp.float32(1), jnp.zeros(episodes)
    found = {
        "ae_loss": cycles.cycle.loss.mean(),
        "coverage": cycles.cycle.coverage.mean(),
        "anomalous": rollout.anomalous.mean(),
        "clone": rollout.clone.mean(),
        "cover": rollout.cover.mean(),
        **{f"action_{a}": jnp.mean(rollout.action == a) for a in range(_ACTIONS)},
    }
    fitted = state
    if cfg.predictor == "learned":
        beta = jnp.maximum(1 - state.updates / (cfg.shaping * cfg.steps), 0.0)
        profiles, masks, end = judge(state, cycles)
        fitted, loss = fit_predictor(key_fit, state, profiles, masks)
        found |= {"loss": -end.mean(), "predictor_loss": loss, "reward_spread": end.std()}
    if cfg.sampler == "learned":
        advantages = advantages_of(rollout, end, beta=beta, leave_cost=cfg.leave_cost)
        fitted, norm, entropy = fit_sampler(fitted, cycles, advantages)
        found |= {"policy_gradient": norm, "entropy": entropy, "beta": beta}
    return fitted._replace(updates=state.updates + 1), found


def judge(state: NeuralBatchState, cycles: Cycles) -> tuple[Array, Array, Array]:
    """Shapes of the profiles of labelled and of as many normal pictures (E, N, T, H, W), their masks, and the reward
    (E,): minus the predictor's loss on the labelled ones, before it has seen these profiles."""
    cfg, pool, rows = state.cfg, cycles.pool, cycles.rows
    assert state.labelled is not None and rows is not None
    count = rows.shape[0]
    normals = min(count, cycles.normals) if cfg.predictor_negatives == "labelled+normal" else 0
    episodes = pool.image.shape[0]
    images = jnp.concatenate([pool.image[:, cycles.normals :], pool.image[:, :normals]], axis=1)
    channels = channels_of(cfg, pool)
    images = _inside(images, margin(cfg), channels * margin(cfg))
    images = images.reshape(*images.shape[:3], -1, channels)
    with rows_over(1):  # as in `run_cycles`
        profiles = jax.vmap(lambda snapshots, x: profile(cfg, snapshots, x))(cycles.cycle.snapshots, images)
    profiles = shape_of(profiles)
    known = state.labelled.mask[rows].astype(jnp.float32)
    known = jnp.concatenate([known, jnp.zeros((normals, *known.shape[1:]))])
    masks = jnp.broadcast_to(known, (episodes, *known.shape))
    marked = profiles[:, :count].reshape(-1, *profiles.shape[2:])
    logits = classify(state, marked).reshape(episodes, count, *known.shape[1:])
    end = -pixel_loss(logits, masks[:, :count], balance(state)).mean(axis=(1, 2, 3))
    return profiles, masks, end


def profile_step(key: Array, state: NeuralBatchState, batch: Batch):
    """Cycles with the sampler as it stands; their autoencoders stay in the state, for scoring."""
    cycles = run_cycles(key, state, batch.image, episodes=state.cfg.eval_cycles)
    found = {"ae_loss": cycles.cycle.loss.mean(), "coverage": cycles.cycle.coverage.mean()}
    return state._replace(snapshots=cycles.cycle.snapshots), found


def phases(cfg: NeuralBatchConfig) -> tuple[Phase, ...]:
    labels = Phase("labels", labels_step, source="labelled", batch_size=cfg.batch_size)
    sampler = Phase("sampler", sampler_step, steps=cfg.steps, batch_size=cfg.batch_size)
    size = cfg.eval_cycles * (cfg.batch_size // cfg.episodes)
    last = Phase("profile", profile_step, source="aux" if cfg.transductive else "train", steps=1, batch_size=size)
    if cfg.predictor == "learned":
        return labels, sampler, last
    return (last,) if cfg.sampler == "random" else (sampler, last)


# --- scoring ------------------------------------------------------------------------------------------------------


def score(state: NeuralBatchState, images: Array) -> Scores:
    """Scores pictures: what the predictor makes of their profiles, mean over `eval_cycles` cycles.

    Args:
      state: the detector.
      images: (B, H, W, C) in [0, 1].

    Returns:
      Scores: the map, in (0, 1), or without a predictor the mean of the profile, an absolute error; its maximum, or
      the mean of its top 0.1 %, as the image score.
    """
    cfg = state.cfg

    profiles = lax.map(lambda snapshots: profile(cfg, snapshots, images, impl=cfg.conv_impl), state.snapshots)
    maps = profiles.mean(axis=(0, 2))
    if cfg.predictor == "learned":
        shapes = shape_of(profiles).reshape(-1, *profiles.shape[2:])
        logits = classify(state, shapes)  # not in the loop: faster on CPU
        maps = jax.nn.sigmoid(logits).reshape(len(profiles), *maps.shape).mean(axis=0)
    flat = maps.reshape(maps.shape[0], -1)
    if cfg.image_score == "max":
        return Scores(image=flat.max(axis=1), map=maps)
    return Scores(image=lax.top_k(flat, max(1, flat.shape[1] // _TOP))[0].mean(axis=1), map=maps)


METHOD = Method(
    name="neural_batch",
    config=NeuralBatchConfig,
    init=init,
    phases=phases,
    score=score,
    presets=PRESETS,
    check=check,
)
