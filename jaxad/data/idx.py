"""IDX files, plain or gzipped, as MNIST and its relatives come."""

from __future__ import annotations

import gzip
import io
import re
import zlib

import numpy as np

from jaxad.data import files
from jaxad.data.dataset import DataError
from jaxad.data.oneclass import choose, parse
from jaxad.data.records import Plan

_IMAGES = re.compile(r"(?P<part>[^/]*?)images[-.]idx3-ubyte(\.gz)?$")


def fits(store) -> bool:
    """Whether the store looks like this layout."""
    return any(_IMAGES.match(name) for name in store.names)


def plan(store, normal_class=None) -> Plan:
    """Train on the normal class of the training files, test on the test files; see `jaxad.data.oneclass`."""
    pictures: dict[str, np.ndarray] = {}
    parts: list[tuple[str, str, str]] = []
    used: list[str] = []
    for match in filter(None, map(_IMAGES.match, store.names)):
        name, part = match.string, match["part"]
        twin = next((n for n in store.names if re.match(rf"{re.escape(part)}labels[-.]idx1-ubyte(\.gz)?$", n)), None)
        if twin is None:
            raise DataError(
                f"{store.where(name)}: no labels for it; expected {part}labels-idx1-ubyte.gz beside it. Add that file."
            )
        images, labels = _read(store, name, 3), _read(store, twin, 1)
        if len(images) != len(labels):
            raise DataError(
                f"{store.where(twin)}: {len(labels)} labels for the {len(images)} pictures of {name}. Copy both again."
            )
        role = "train" if "train" in part else "test"
        names = [f"{name.split('.')[0]}/{i:05d}" for i in range(len(images))]
        pictures.update(zip(names, images, strict=True))
        parts += zip(names, [role] * len(names), map(str, labels.tolist()), strict=True)
        used += [name, twin]
    classes = sorted({kind for _, _, kind in parts}, key=int)
    protocol = parse(store.where("").rstrip("/"), normal_class, classes)
    stamps = " ".join(store.stamp(name) for name in used)
    result = Plan("idx", files.Arrays(pictures, store.where("").rstrip("/"), stamps), [])
    choose(result, parts, protocol)
    others = [name for name in store.names if name not in used and not files.is_junk(name)]
    if others:
        result.notes.append(f"{len(others)} other files are not used: {', '.join(others[:3])}.")
    return result


def _read(store, name: str, ndim: int) -> np.ndarray:
    """The uint8 array of an IDX file with `ndim` axes."""
    data, where = store.read(name), store.where(name)
    try:
        stream = gzip.GzipFile(fileobj=io.BytesIO(data)) if name.endswith(".gz") else io.BytesIO(data)
        head = stream.read(4 + 4 * ndim)
        if len(head) < 4 + 4 * ndim or head[:4] != bytes([0, 0, 8, ndim]):
            raise DataError(f"{where}: not an IDX file of bytes with {ndim} axes. Copy the original again.")
        shape = tuple(int(n) for n in np.frombuffer(head, ">u4", offset=4))
        size = int(np.prod(shape, dtype=np.int64))
        body = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: damaged ({error}). Copy the original again.") from None
    if len(body) != size:
        found = "more" if len(body) > size else f"{len(body):,} bytes"
        raise DataError(f"{where}: its header promises {size:,} bytes, it has {found}. Copy the original again.")
    return np.frombuffer(body, np.uint8).reshape(shape)
