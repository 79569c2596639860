"""What the verbs share: the application they register with, flags, and the table of measures."""

from __future__ import annotations

from typing import Any

import tyro

app = tyro.extras.SubcommandApp()
Flag = tyro.conf.FlagCreatePairsOff[bool]


def measures_of(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table that a verb prints."""
    names = {
        "image AUROC": "image_auroc",
        "image AP": "image_ap",
        "image F1-max": "image_f1max",
        "pixel AUROC": "pixel_auroc",
        "AUPRO": "aupro",
        "threshold": "threshold",
        "train s": "train_seconds",
        "compile s": "compile_seconds",
    }
    return {title: report.get(name) for title, name in names.items()}


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Pixels a side, or (height, width), of a flag. Raises ValueError for another form."""
    from jaxad import settings  # imports jax, which --help must not

    return settings.parse_size(text)
