"""Where jaxad keeps what it can make again: decoded pictures and compiled programs."""

from __future__ import annotations

import os
import pathlib


def folder(name: str) -> pathlib.Path | None:
    """The folder for one kind of thing, below $JAXAD_CACHE or the user's cache folder; None if JAXAD_CACHE=off."""
    setting = os.environ.get("JAXAD_CACHE", "")
    if setting.lower() in ("off", "0", "none"):
        return None
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return pathlib.Path(setting or os.path.join(user, "jaxad")) / name
