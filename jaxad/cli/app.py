"""What the verbs share: the application they register with, flags, and the table of measures."""

from __future__ import annotations

from typing import Any

import tyro

app = tyro.extras.SubcommandApp()
Flag = tyro.conf.FlagCreatePairsOff[bool]


def measures_of(report: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table that a verb prints; one more for a detector that adapts along videos."""
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
    in_order = {"AUROC in order": report["ordered_auroc"]} if "ordered_auroc" in report else {}
    return {title: report.get(name) for title, name in names.items()} | in_order


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Pixels a side, or (height, width), of a flag. Raises ValueError for another form."""
    from jaxad import settings  # imports jax, which --help must not

    return settings.parse_size(text)
