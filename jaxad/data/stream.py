"""Data sets larger than memory: batches read from files or array_record by Grain, in the order `fit` would use."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxad.data import decode, loading, split, video
from jaxad.data.build import Settings
from jaxad.data.dataset import DataError
from jaxad.data.records import ROLES, Plan

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxad.train import Feed


def feeds(
    where: str | os.PathLike,
    *,
    image_size: int | tuple[int, int] = 256,
    layout: str | None = None,
    channels: int = 3,
    normal_class: int | str | None = None,
    holdout: float = 0.1,
    clip: int | None = None,
    clip_stride: int = 1,
    target: int = 0,
    seed: int = 0,
    threads: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Feed]:
    """Opens a data set for `jaxad.train.fit_stream`; pictures are read while training runs and never kept.

    Batches, their order and hence the trained state are those of `jaxad.data.load` with the same arguments. A feed
    starts at any step, so a resumed run goes on where it was.

    Args:
      where, image_size, layout, channels, normal_class, holdout, clip, clip_stride, target, seed: as for
        `jaxad.data.load`; of names only "tfds:NAME".
      threads: that read ahead, a batch each; None: one a core, at most 8.
      mesh: devices over which `fit_stream` splits batches; each process reads the rows of its own devices only.

    Returns:
      A Feed for each source.

    Raises:
      DataError: as `jaxad.data.load`; for what is wrong inside a file, when its batch is read.
      ImportError: Grain is not installed.
    """
    _grain()
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    settings = Settings(size, channels, holdout, clip, clip_stride, target, seed)
    plan = loading.plan(where, layout=layout, normal_class=normal_class)
    if plan.problems:
        raise DataError(plan.problems[0])
    open_label = next((r.file for r in plan.records if r.label is None and r.role != "test"), None)
    if open_label is not None:
        raise DataError(
            f"{plan.store.where(open_label)}: only its mask tells its role. Add a column 'split' or 'label'."
        )
    origin = plan.store.where("").rstrip("/")
    roles, _ = split.roles(plan.records, holdout=holdout, seed=seed, clip=clip or 1, origin=origin)
    threads = threads or min(8, os.cpu_count() or 1)
    samples = {role: _Samples(plan, [i for i, r in enumerate(roles) if r == role], settings) for role in ROLES}
    return {role: _feed(reader, threads, mesh) for role, reader in samples.items() if len(reader)}


class _Samples:
    """Samples of one source, read when asked for."""

    def __init__(self, plan: Plan, chosen: list[int], settings: Settings):
        self._store, self._settings = plan.store, settings
        self._records = [plan.records[i] for i in chosen]
        self._starts = np.arange(len(chosen))
        if settings.clip is not None:
            groups = [record.group for record in self._records]
            self._starts, _ = video.starts(groups, settings.clip, settings.clip_stride)

    def __len__(self) -> int:
        return len(self._starts)

    @property
    def shape(self) -> tuple[int, ...]:
        picture = (*self._settings.size, self._settings.channels)
        return picture if self._settings.clip is None else (self._settings.clip, *picture)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Picture or clip uint8, label, mask (H, W) uint8."""
        first, clip = int(self._starts[row]), self._settings.clip
        frames = range(first, first + (clip or 1))
        read = [
            decode.picture(self._store, self._records[i].file, self._settings.size, self._settings.channels)
            for i in frames
        ]
        place = self._settings.target if clip else 0
        record, facts = self._records[frames[place]], read[place][1]
        marked, _ = decode.mask(self._store, record.masks, self._store.where(record.file), facts.size)
        label = int(marked.any()) if record.label is None else record.label
        image = np.stack([pixels for pixels, _ in read]) if clip else read[0][0]
        return image, label, decode.shrink_mask(marked, self._settings.size)


def _feed(samples: _Samples, threads: int, mesh: Mesh | None) -> Feed:
    from jaxad.train import Feed

    def batches(key: Any, phase: Any, first: int) -> Iterator:
        batches = iter(_batches(samples, threads, key, phase, first, mesh))
        return batches if mesh is None else map(functools.partial(_on_mesh, mesh, phase.batch_size), batches)

    return Feed(sample_shape=samples.shape, size=len(samples), batches=batches)


def _on_mesh(mesh: Mesh, batch_size: int, batch: Any) -> Any:
    """A batch split over the mesh, of which this process has its own rows."""
    import jax

    from jaxad import shard

    where = shard.batch_sharding(mesh, batch_size)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(where, rows, (batch_size, *rows.shape[1:])), batch
    )


def _batches(samples: _Samples, threads: int, key: Any, phase: Any, first: int, mesh: Mesh | None):
    """A Grain data set of the batches from step `first` on; with a mesh, of this process's rows of them."""
    import jax

    from jaxad import shard
    from jaxad.core import Batch
    from jaxad.train import batch_rows, num_steps

    size = len(samples)
    # several processes compute it each for itself: data of one device, whatever the key lies on
    words: Any = np.asarray(jax.random.key_data(key))
    key = jax.random.wrap_key_data(words, impl=jax.random.key_impl(key))
    mine = slice(None) if mesh is None else shard.local_rows(mesh, phase.batch_size)
    rows_at = jax.jit(lambda step: tuple(part[mine] for part in batch_rows(key, phase, step, size=size)))

    def read(step: int) -> Batch:
        index, valid = (np.asarray(array) for array in rows_at(np.int32(step)))
        image, label, mask = zip(*(samples[int(row)] for row in np.minimum(index, size - 1)), strict=True)
        arrays: Any = (np.stack(image), np.asarray(label, np.int32), np.stack(mask), index, valid)
        return Batch(*arrays)

    grain = _grain()
    steps = grain.MapDataset.range(first, num_steps(phase, size)).map(read)
    return steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads))


def _grain() -> Any:
    try:
        import grain
    except ImportError:
        raise ImportError("streaming needs Grain, which is not installed. Run: pip install 'jaxad[stream]'") from None
    return grain
