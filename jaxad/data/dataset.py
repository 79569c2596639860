"""What a loaded data set is: sources for the device, facts about each sample for the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxad.core import Source


class DataError(ValueError):
    """Data that cannot be used as it is. The message names the file and says what to do."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Facts about the N samples of one source, in the order of the source."""

    files: tuple[str, ...]  # unique; path relative to the data's root (for clips: the target frame's)
    defects: tuple[str, ...]  # "good" for normal samples, else the defect type; "" unknown
    groups: tuple[str, ...]  # the video of a frame or clip; "" elsewhere
    has_mask: tuple[bool, ...]  # whether pixel metrics may use the sample

    def __len__(self) -> int:
        return len(self.files)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The sources of one data set ("train", "holdout", "test", perhaps "aux", "labelled") and their rows."""

    name: str
    layout: str
    sources: Mapping[str, Source]  # NumPy arrays inside until `to_device`
    rows: Mapping[str, Rows]
    notes: tuple[str, ...]  # what was skipped or assumed, a sentence each
    fingerprint: str  # hash of the files' content, their roles and the settings

    def to_device(self, device: Any = None) -> Dataset:
        """Puts all arrays on a device (a device, a sharding, or None for the default one)."""
        import jax

        return dataclasses.replace(self, sources={k: jax.device_put(s, device) for k, s in self.sources.items()})
