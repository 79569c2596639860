"""Data sets: recognised, decoded once to uint8, cached, handed over as device-ready sources."""

from jaxad.data.dataset import DataError, Dataset, Rows

__all__ = ["DataError", "Dataset", "Rows"]
