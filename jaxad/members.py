"""Programs of one run as programs of the many members of a sweep.

A method is written for one run. Here a function of one run becomes one of K runs, its arguments stacked along a leading
axis, and is compiled once for all of them. How the axis is computed is decided here and nowhere else:

  * "vmap": the members side by side in each operation. What accelerators want.
  * "map": one member after the other inside the program. What XLA-CPU wants: members side by side leave its caches,
    and it has no fast convolution of vmapped kernels.

Either way the members are spread over the devices of the mesh's axis "run", which need not talk to each other. On a
CPU each core is made a device of its own (`use_all_cores`): a small network keeps one core busy, not many.

Measured as the time of 16 members of `tiny` and 8 of `demo` (memory autoencoder, 32x32 and 64x64) over that of the
same steps run one member after the other, jax 0.10.2, 2 cores, medians of 4: vmap 1.3 and 1.15, with XLA's grouped
convolutions 1.7; unrolled 1.0 (and 10 s of compiling); a call for each member 0.8 and 1.0, from two threads 0.6 and
0.9; map 0.8 and 0.8, spread over both cores 0.57 and 0.70.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxad.core import Source
from jaxad.cores import usable_cores
from jaxad.nn.conv import lowering_for

WAYS = ("vmap", "map")


@dataclasses.dataclass(frozen=True)
class Members:
    """How the members of a sweep are computed together."""

    count: int  # K, a multiple of the mesh's axis "run"
    way: str = "vmap"
    mesh: Mesh | None = None  # None: the default device


def default_way() -> str:
    """How to compute a model axis on this backend."""
    return "map" if jax.default_backend() == "cpu" else "vmap"


def use_all_cores(cores: int | None = None) -> None:
    """Makes every CPU core, or so many, a device. Without effect on accelerators, or once jax has started."""
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return  # the user's choice
    with contextlib.suppress(RuntimeError):  # jax runs already
        jax.config.update("jax_num_cpu_devices", cores or usable_cores())


def lift(function: Callable, axes: tuple, members: Members) -> Callable:
    """A function of one run as a function of K.

    Args:
      function: of one run.
      axes: for each argument 0 (stacked along a leading axis K), None (the same for all), or a tree of these.
      members: how.

    Returns:
      The function of stacked arguments; all its results have a leading axis K.
    """
    many = jax.vmap(function, in_axes=axes) if members.way == "vmap" else _one_by_one(function, axes)
    if members.mesh is None:
        return many
    specs = jax.tree.map(_spec, axes, is_leaf=_is_none)
    return jax.shard_map(
        many, mesh=members.mesh, in_specs=specs, out_specs=PartitionSpec("run"), axis_names={"run"}, check_vma=False
    )


def _one_by_one(function: Callable, axes: tuple) -> Callable:
    """vmap's meaning computed by `lax.map`."""

    def many(*args):
        leaves, tree = jax.tree.flatten(args)
        flags = jax.tree.leaves(
            jax.tree.map(lambda axis, arg: jax.tree.map(lambda _: axis == 0, arg), axes, args, is_leaf=_is_none)
        )

        def one(mine):
            mine = iter(mine)
            filled = [next(mine) if own else leaf for leaf, own in zip(leaves, flags, strict=True)]
            return function(*jax.tree.unflatten(tree, filled))

        return lax.map(one, [leaf for leaf, own in zip(leaves, flags, strict=True) if own])

    return many


def _is_none(axis: Any) -> bool:
    return axis is None


def _spec(axis: int | None) -> PartitionSpec:
    return PartitionSpec() if axis is None else PartitionSpec("run")


def axes_of(source: Any) -> Any:
    """Which parts of a source are stacked: the pictures are a pool that all members share, the choice of rows is not.

    Returns:
      0 or None for each part of a Source (`rows`, `start` and `size` may be stacked); None for anything else.
    """
    if not isinstance(source, Source):
        return None
    ranks = {"rows": 1, "start": 1, "size": 0}
    stacked = {name: getattr(source, name) is not None and getattr(source, name).ndim > ranks[name] for name in ranks}
    shared: dict[str, Any] = dict.fromkeys(("image", "label", "mask"))
    own: dict[str, Any] = {name: 0 if is_own else None for name, is_own in stacked.items()}
    return dataclasses.replace(source, **shared, **own)


def one_of(source: Any) -> Any:
    """A source as one member sees it, by shape."""
    axes = axes_of(source)
    if axes is None:
        return source
    own = {
        name: jax.eval_shape(lambda part: part[0], getattr(source, name))
        for name in ("rows", "start", "size")
        if getattr(axes, name) == 0
    }
    return dataclasses.replace(source, **own)


class Programs:
    """Compiles functions of one run ahead of time, for one run or for the members of a sweep, each only once.

    Args:
      members: None for a lone run.
      sharding: of all results, of a lone run; None: as it comes.
    """

    def __init__(self, members: Members | None = None, *, sharding: jax.sharding.Sharding | None = None):
        self.members, self.sharding = members, sharding
        self.bytes = 0  # that the largest program needs on a device
        self.seconds = 0.0  # spent compiling, in all
        self._taken = 0.0
        self._made: dict[tuple, Any] = {}

    def compile(self, label: tuple, function: Callable, axes: tuple, donate: tuple[int, ...], *args, looped=False):
        """The program of a function.

        Args:
          label: tells functions apart; a label with arguments of the same shapes is not compiled again.
          function: of one run.
          axes: as for `lift`; unused for a lone run.
          donate: arguments whose memory the results may take.
          *args: arguments, or their shapes and shardings; stacked, for members.
          looped: whether the function's heavy part is the body of a scan.
        """
        leaves, tree = jax.tree.flatten(args)
        key = (label, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
        if key not in self._made:
            began = time.perf_counter()
            whole = self._whole(function, axes, looped)
            program = jax.jit(whole, donate_argnums=donate, out_shardings=self.sharding)
            self._made[key] = program.lower(*args).compile()
            self.seconds += time.perf_counter() - began
            self.bytes = max(self.bytes, bytes_of(self._made[key]))
        return self._made[key]

    def _whole(self, function: Callable, axes: tuple, looped: bool) -> Callable:
        if self.members is None and not looped:
            return function
        way = self.members.way if self.members else None

        def traced(*args):
            with lowering_for(members=way == "vmap", looped=looped or way == "map"):
                return function(*args)

        return traced if self.members is None else lift(traced, axes, self.members)

    def each(self, function: Callable, tree: Any) -> Any:
        """A cheap function of one run, such as deriving a key, applied to every member."""
        return function(tree) if self.members is None else self.place(jax.vmap(function)(tree))

    def place(self, tree: Any, axes: Any = 0) -> Any:
        """Puts stacked (0) and shared (None) arrays where the programs want them; axes may be a tree of these."""
        if self.members is None or self.members.mesh is None:
            return jax.device_put(tree)
        mesh = self.members.mesh
        shardings = jax.tree.map(
            lambda axis, part: jax.tree.map(lambda _: NamedSharding(mesh, _spec(axis)), part),
            axes,
            tree,
            is_leaf=_is_none,
        )
        return jax.device_put(tree, shardings)

    def take_seconds(self) -> float:
        """Seconds spent compiling since the last call."""
        seconds, self._taken = self.seconds - self._taken, self.seconds
        return seconds


def bytes_of(compiled: Any) -> int:
    """Memory that a compiled program needs on each device: arguments, results and scratch; 0 if it does not tell."""
    facts = compiled.memory_analysis()
    if facts is None:
        return 0
    return (
        facts.argument_size_in_bytes + facts.output_size_in_bytes + facts.temp_size_in_bytes - facts.alias_size_in_bytes
    )
