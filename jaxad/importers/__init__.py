"""Weights from files of other programs, read without running anything that is in them.

`read` knows a file by its first bytes: safetensors, NumPy archives (.npz), and torch files, zip format and the older
one. Torch files hold a pickle, a program for a stack machine that can call any function of any module; it is never
given to `pickle`. `torch_files` walks through its instructions and knows only those that describe tensors.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from jaxad.importers import arrays, torch_files
from jaxad.importers.errors import WeightsError

__all__ = ["WeightsError", "read", "take"]


def read(path: str | os.PathLike, *, max_bytes: int = 4 * 2**30) -> dict[str, np.ndarray]:
    """Reads a file of weights.

    Args:
      path: a safetensors file, a NumPy archive, or what `torch.save(model.state_dict(), path)` writes.
      max_bytes: of all arrays together; a small file can claim to unpack to much more.

    Returns:
      Arrays by name, in the file's order; names inside nested dicts of torch files are joined by dots.

    Raises:
      WeightsError: no such file, a damaged or an unknown one, or one that holds anything but arrays.
    """
    path = pathlib.Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(32)
        if start[:4] == b"PK\x03\x04":
            with zipfile.ZipFile(path) as opened:
                kind = torch_files.read_zip if torch_files.is_torch(opened) else arrays.read_npz
                return kind(opened, str(path), max_bytes)
        if start.startswith(torch_files.MAGIC):
            return torch_files.read_legacy(path, max_bytes)
        if start[8:9] == b"{":
            return arrays.read_safetensors(path, max_bytes)
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        raise WeightsError(
            f"{path}: cannot be read ({error}); expected a whole file of weights. Check the path, or copy it again."
        ) from error
    raise WeightsError(
        f"{path}: starts with {start[:8]!r}, no known format; expected safetensors, npz or a torch file. "
        "Save the weights with numpy.savez or safetensors."
    )


def take(arrays: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], *, origin: str = "weights") -> np.ndarray:
    """One array of a file, checked. Raises WeightsError if it is missing or has another shape."""
    if name not in arrays:
        some = ", ".join(list(arrays)[:3])
        raise WeightsError(
            f"{origin}: has no array {name!r}; expected one of shape {shape}. "
            f"Pass weights of that network; this file holds {len(arrays)} arrays such as {some}."
        )
    if arrays[name].shape != shape:
        raise WeightsError(
            f"{origin}: {name} has shape {arrays[name].shape}; expected {shape}. Pass weights of that network."
        )
    return arrays[name]
