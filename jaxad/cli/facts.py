"""The verbs that only look: info, data, list."""

from __future__ import annotations

import sys
from typing import Literal

import tyro

from jaxad import cache
from jaxad.cli.app import Flag, app


@app.command(name="info")
def info(*, env: Flag = False) -> None:
    """Show version, device, caches, and the processes where a cluster runs several of this command.

    Args:
      env: all that a run records of its environment, as JSON.
    """
    import json

    from jaxad import distributed, files

    with distributed.session() as several:
        facts = files.environment()
        if not distributed.is_first():
            return
        if env:
            print(json.dumps(facts, indent=2))
            return
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        print(f"{versions}\nPython {facts['python']}, {facts['platform']}")
        print(f"device: {facts['device']} x {facts['devices']}\ncache: {cache.folder('xla') or 'off'}")
        if several:
            print(f"processes: {facts['processes']}")


@app.command(name="data")
def data(
    action: tyro.conf.Positional[Literal["check"]],
    path: tyro.conf.Positional[str],
    *,
    layout: str | None = None,
    normal_class: str | None = None,
    holdout: float = 0.1,
) -> None:
    """Look through data without training: counts, sizes, roles, what is skipped and why. Fails on problems.

    Args:
      action: check.
      path: folder, ZIP or table of pictures.
      layout: how the pictures are arranged, if it is not recognised.
      normal_class: the class that is normal, for sets of classes.
      holdout: share of the normal training pictures kept for the threshold.
    """
    del action
    from jaxad.data import check

    report = check(path, layout=layout, normal_class=normal_class, holdout=holdout)
    print(report)
    if report.problems:
        sys.exit(1)


@app.command(name="list")
def list_methods() -> None:
    """List the methods and their presets."""
    from jaxad import methods

    for name in methods.METHODS:
        print(f"{name}: {methods.summary(name)}")
        for preset, facts in methods.get(name).presets.items():
            print(f"    {preset:10} {facts.doc}")
