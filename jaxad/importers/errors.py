"""The error that every reader of weights raises."""

from __future__ import annotations


class WeightsError(ValueError):
    """A file of weights that cannot be read, or that holds something other than arrays."""
