"""Data sets: recognised, decoded once to uint8, cached, handed over as device-ready sources."""

from jaxad.data.dataset import DataError, Dataset, Rows
from jaxad.data.layouts import LAYOUTS
from jaxad.data.load import load

__all__ = ["LAYOUTS", "DataError", "Dataset", "Rows", "load"]
