"""Groups of a sweep computed by worker processes over ray, on this machine or on a cluster.

A worker that dies loses the group it was computing, nothing else: ray starts it again elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from jaxad.console import Console
from jaxad.sweep.engine import Group, Limits
from jaxad.sweep.grid import Request

_RETRIES = 3  # of a group whose worker died


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
      request: of the sweep; workers make members and data of it, so paths must mean the same there.
      groups: to compute; large ones are shared out if there are fewer groups than workers.
      keep: called with the rows of each finished group, here.
      limits: how members are computed together in a worker; its mesh is each worker's own.
      workers: processes at a time.
      console: where to show progress.

    Raises:
      ValueError: ray is not installed, or the workers of some groups died again and again; the rest is computed.
    """
    ray = _start_ray()
    shares = share_out(groups, workers)
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
    needs = {"num_gpus": 1} if ray.cluster_resources().get("GPU", 0) >= 1 else {"num_cpus": cores}
    task = ray.remote(max_retries=_RETRIES, **needs)(compute_share)
    waiting = list(shares)
    running: dict[Any, list[int]] = {}
    lost: list[list[int]] = []
    done, total = 0, len(shares)
    console.say(f"{total} groups for {workers} workers over ray")
    console.progress("groups", 0, total)
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                share = waiting.pop(0)
                running[task.remote(request.to_json(), share, limits._replace(mesh=None), cores)] = share
            (finished,), _ = ray.wait(list(running), num_returns=1)
            share = running.pop(finished)
            try:
                keep(ray.get(finished))
            except ray.exceptions.RayTaskError:
                raise  # what the worker's own code raised, others would too
            except ray.exceptions.RayError as error:
                lost.append(share)
                console.say(f"members {share[0]} to {share[-1]} are lost with their worker: {type(error).__name__}")
            done += 1
            console.progress("groups", done, total)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    if lost:
        raise ValueError(
            f"the workers of {len(lost)} of {total} groups died {_RETRIES + 1} times, perhaps for want of memory; "
            "expected them to live. The other groups are kept: start the same command again, with fewer --workers or "
            "with --members to compute fewer at a time."
        )


def share_out(groups: Sequence[Group], workers: int) -> list[list[int]]:
    """The members of each group, groups cut into shares so that there is work for every worker."""
    parts = -(-workers // max(len(groups), 1))
    shares = []
    for group in groups:
        size = -(-len(group.members) // min(parts, len(group.members)))
        numbers = [member.index for member in group.members]
        shares += [numbers[first : first + size] for first in range(0, len(numbers), size)]
    return shares


def compute_share(request: dict[str, Any], numbers: list[int], limits: Limits, cores: int) -> list[dict[str, Any]]:
    """The rows of some members that can share a program: what one worker does.

    Args:
      request: as JSON.
      numbers: of the members.
      limits: see `compute_groups`.
      cores: of this process.
    """
    from jaxad import members, methods
    from jaxad.sweep import grid
    from jaxad.sweep.engine import compute_group
    from jaxad.sweep.stack import Library

    members.use_all_cores(cores)
    asked = grid.from_json(request)
    method = methods.get(asked.base.method)
    everyone = grid.members_of(method, asked)
    group = Group(0, [everyone[number] for number in numbers])
    return [row for part in compute_group(method, group, Library(), limits=limits) for row in part.rows]


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
