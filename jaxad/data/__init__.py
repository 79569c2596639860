"""Data sets: recognised, decoded once to uint8, cached, handed over as device-ready sources."""

from jaxad.data.arrays import from_arrays
from jaxad.data.check import Report, check
from jaxad.data.dataset import DataError, Dataset, Rows
from jaxad.data.layouts import LAYOUTS
from jaxad.data.loading import load

__all__ = ["LAYOUTS", "DataError", "Dataset", "Report", "Rows", "check", "from_arrays", "load"]
