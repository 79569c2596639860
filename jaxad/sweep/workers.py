"""Groups of a sweep computed by worker processes over ray, on this machine or on a cluster.

A worker that dies loses the group it was computing, nothing else: ray starts it again elsewhere.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxad.console import Console
from jaxad.sweep import engine, memory
from jaxad.sweep.engine import Group, Limits
from jaxad.sweep.grid import Member, Request

_RETRIES = 3  # of a group whose worker died
_LOOK = 10.0  # seconds between looks at whether the cluster can still hold a worker


class Slot(NamedTuple):
    """What a worker has of its node."""

    cores: int
    gpus: int
    neighbours: int  # workers that a node may hold, this one included: they share its memory


class Share(NamedTuple):
    """Members that one worker computes, all in one program."""

    number: int
    members: list[int]


class Computed(NamedTuple):
    """What a worker hands back."""

    rows: list[dict[str, Any]]
    said: list[str]  # its remarks, such as how many members fit into memory: nobody sees its terminal


def compute_groups(
    request: Request,
    groups: Sequence[Group],
    keep: Callable[[list[dict[str, Any]]], None],
    *,
    limits: Limits,
    workers: int,
    console: Console,
) -> None:
    """Computes groups in worker processes and hands each one's rows to `keep`.

    Args:
      request: of the sweep; workers make members and data of it, so absolute paths must mean the same there.
      groups: to compute; large ones are shared out if there are fewer groups than workers.
      keep: called with the rows of each finished group, here.
      limits: how members are computed together in a worker; without a mesh, each worker spreads its members over all
        devices that it has.
      workers: processes at a time.
      console: where to show progress.

    Raises:
      ValueError: ray is not installed, its cluster cannot hold a worker, or the workers of some groups died again and
        again; the rest is computed.
      Exception: what the code of a worker raised; the groups that were being computed then are kept, none is begun.
    """
    ray = _start_ray()
    slot = slot_of(_living(ray), workers)
    task = ray.remote(max_retries=_RETRIES, num_cpus=slot.cores, num_gpus=slot.gpus)(compute_share)
    paths = {data: absolute(data) for data in request.data}
    waiting = share_out(groups, workers)
    running: dict[Any, Share] = {}
    lost: list[Share] = []
    failed: list[Any] = []
    done, total = 0, len(waiting)
    console.say(f"{total} groups for {workers} workers over ray")
    console.progress("groups", 0, total)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                share = waiting.pop(0)
                running[task.remote(request.to_json(), paths, share, limits, slot)] = share
            finished = _next(ray, list(running), slot)
            share = running.pop(finished)
            try:
                found = ray.get(finished)
            except ray.exceptions.RayTaskError as error:
                failed.append(error)
                waiting.clear()  # what the worker's own code raised, others may too
                others = f"; {len(running)} more are waited for" if running else ""
                console.say(f"group {share.number + 1} failed{others}")
            except ray.exceptions.RayError as error:
                lost.append(share)
                console.say(f"group {share.number + 1} is lost with its worker: {type(error).__name__}")
            else:
                for remark in found.said:
                    console.say(remark)
                keep(found.rows)
            done += 1
            console.progress("groups", done, total)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if failed:
        raise failed[0].cause from failed[0]
    if lost:
        raise ValueError(
            f"the workers of {len(lost)} of {total} groups died {_RETRIES + 1} times, perhaps for want of memory; "
            "expected them to live. The other groups are kept: start the same command again, with fewer --workers or "
            "with --members to compute fewer at a time."
        )


def share_out(groups: Sequence[Group], workers: int) -> list[Share]:
    """The members of each group, groups cut into shares so that there is work for every worker."""
    parts = -(-workers // max(len(groups), 1))
    shares: list[list[int]] = []
    for group in groups:
        size = -(-len(group.members) // min(parts, len(group.members)))
        numbers = [member.index for member in group.members]
        shares += [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return [Share(number, numbers) for number, numbers in enumerate(shares)]


# --- the cluster --------------------------------------------------------------------------------------------------


def slot_of(nodes: Sequence[Mapping[str, float]], workers: int) -> Slot:
    """The largest equal part of the nodes that all workers can have at once, in one piece: of GPUs, else of cores.

    Args:
      nodes: what each living node of the cluster has, such as {"CPU": 8.0, "GPU": 2.0}.
      workers: processes at a time; where there is not one core (or GPU) for each, some wait for others.

    Raises:
      ValueError: no node has a core, so that a worker would wait for ever.
    """
    usable = [node for node in nodes if node.get("CPU", 0) >= 1]
    if not usable:
        raise ValueError(
            f"--workers {workers}: none of the {len(nodes)} living nodes of the ray cluster has a CPU; expected one "
            "for each worker. Start nodes with ray start --num-cpus N, or leave --workers out to compute here."
        )
    gpus = [int(node.get("GPU", 0)) for node in usable]
    if any(gpus):
        slot = Slot(cores=1, gpus=_largest_part(gpus, workers), neighbours=1)
    else:
        slot = Slot(cores=_largest_part([int(node["CPU"]) for node in usable], workers), gpus=0, neighbours=1)
    return slot._replace(neighbours=max(min(workers, _room(node, slot)) for node in usable))


def _largest_part(sizes: Sequence[int], workers: int) -> int:
    """The largest part, at least 1, of which the sizes hold one for each worker."""
    fitting = (part for part in range(max(sizes), 1, -1) if sum(size // part for size in sizes) >= workers)
    return next(fitting, 1)


def _room(node: Mapping[str, float], slot: Slot) -> int:
    """How many workers a node can hold at once."""
    by_cores = int(node.get("CPU", 0)) // slot.cores
    return min(by_cores, int(node.get("GPU", 0)) // slot.gpus) if slot.gpus else by_cores


def _living(ray: Any) -> list[Mapping[str, float]]:
    """What each living node has in all."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _next(ray: Any, running: list[Any], slot: Slot) -> Any:
    """The first of the running tasks to finish. Raises ValueError if the nodes that can hold a worker have gone."""
    while True:
        finished, _ = ray.wait(running, num_returns=1, timeout=_LOOK)
        if finished:
            return finished[0]
        if not any(_room(node, slot) for node in _living(ray)):
            part = f"{slot.gpus} GPUs" if slot.gpus else f"{slot.cores} CPUs"
            raise ValueError(
                f"no living node of the ray cluster has the {part} of a worker any more; expected one. What is "
                "finished is kept: start the same command again."
            )


def absolute(data: str) -> str:
    """A path as workers, which may have been started in another folder, must be told it; names stay as they are."""
    is_name = data.partition(":")[0] == "synthetic" or data.startswith("tfds:")
    return data if is_name else os.path.abspath(data)


# --- a worker -----------------------------------------------------------------------------------------------------


class _Remarks(Console):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def compute_share(
    request: dict[str, Any], paths: Mapping[str, str], share: Share, limits: Limits, slot: Slot
) -> Computed:
    """What one worker does.

    Args:
      request: as JSON.
      paths: where the request's data are, see `absolute`.
      share: what to compute.
      limits: see `compute_groups`.
      slot: what this process has of its node.
    """
    from jaxad import members, methods
    from jaxad.sweep import grid
    from jaxad.sweep.stack import Library

    members.use_all_cores(slot.cores)
    asked = grid.from_json(request)
    method = methods.get(asked.base.method)
    everyone = grid.members_of(method, asked)  # of the paths as given: tables name data by them
    group = Group(share.number, [_at(everyone[number], paths) for number in share.members])
    limits, remarks = _share_memory(limits, len(group.members), slot.neighbours), _Remarks()
    parts = engine.compute_group(method, group, Library(), limits=limits, console=remarks)
    return Computed([row for part in parts for row in part.rows], remarks.said)


def _at(member: Member, paths: Mapping[str, str]) -> Member:
    """The member with its data where this process finds them."""
    chosen = member.settings
    return dataclasses.replace(member, settings=dataclasses.replace(chosen, data=paths[chosen.data]))


def _share_memory(limits: Limits, members: int, neighbours: int) -> Limits:
    """The limits of one of some neighbours: none may plan with memory that all of them find free."""
    if limits.budget is not None or jax.default_backend() != "cpu":  # an accelerator is one worker's own
        return limits
    free = memory.free_bytes(engine.default_mesh(min(members, limits.members or members)))
    return limits if free is None else limits._replace(budget=free // neighbours)


def _start_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--workers hands groups to processes over ray, which is not installed. Install it with: "
            "pip install 'jaxad[sweep]', or leave --workers out to compute here."
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:  # no cluster is running
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    return ray
