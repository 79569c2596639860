"""NumPy archives and safetensors files."""

from __future__ import annotations

import json
import math
import pathlib
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from jaxad.importers.errors import WeightsError

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_HEADER_LIMIT = 100 * 2**20  # bytes, as the format's own reader has it


def check_size(size: int, limit: int, origin: str) -> None:
    """Refuses more bytes than wanted. Raises WeightsError."""
    if size > limit:
        raise WeightsError(
            f"{origin}: its arrays take {size} bytes; expected at most {limit}. Pass max_bytes={size} to allow it."
        )


def read_npz(archive: zipfile.ZipFile, origin: str, max_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of an open NumPy archive; those of Python objects, which NumPy would unpickle, are refused."""
    entries = archive.infolist()
    check_size(sum(entry.file_size for entry in entries), max_bytes, origin)
    found = {}
    for entry in entries:
        try:
            with archive.open(entry) as file:
                found[entry.filename.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
        except (ValueError, zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
            raise WeightsError(
                f"{origin}: entry {entry.filename!r} is no plain array ({error}); expected arrays of numbers. "
                "Save them with numpy.savez."
            ) from error
    return found


def read_safetensors(path: pathlib.Path, max_bytes: int) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file: 8 bytes of header length, a JSON header, then the numbers."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _HEADER_LIMIT):
            raise _damaged(path, f"its header claims {length} bytes of {size}")
        header = _header(path, file.read(length))
        data = size - 8 - length
        check_size(data, max_bytes, str(path))
        found = {}
        for name, entry in header.items():
            dtype, shape, begin, end = _entry(path, name, entry, data)
            file.seek(8 + length + begin)
            found[name] = np.frombuffer(file.read(end - begin), dtype).reshape(shape).copy()
    return found


def _header(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"its header is a {type(header).__name__}")
    header.pop("__metadata__", None)
    return header


def _entry(path: pathlib.Path, name: str, entry: Any, data: int) -> tuple[Any, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of an array, checked against each other and the file's size."""
    try:
        dtype, shape, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the entry of {name!r} is {entry!r}") from error
    if not whole or not begin <= end <= data or end - begin != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"{name!r}, {entry!r}, does not fit its {data} bytes of numbers")
    return dtype, shape, begin, end


def _damaged(path: pathlib.Path, what: str) -> WeightsError:
    return WeightsError(f"{path}: {what}; expected a whole safetensors file. Copy or save it again.")
