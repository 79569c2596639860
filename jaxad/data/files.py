"""Where pictures come from: a folder, a ZIP, or arrays, all read by name.

A store has `names` (sorted, "/" between folders), `has(name)`, `read(name)` (the file's bytes, or a picture's array),
`stamp(name)` (text that changes when the content may have) and `where(name)` (for messages).
"""

from __future__ import annotations

import dataclasses
import errno
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from jaxad.data.dataset import DataError

_ENDINGS = "png jpg jpeg jpe jfif bmp tif tiff webp gif ppm pgm pbm pnm jp2 tga"
PICTURES = frozenset(f".{ending}" for ending in _ENDINGS.split(" "))
_LARGEST_FILE = 2**30  # bytes; a ZIP member's claimed size is checked before it is unpacked


def suffix(name: str) -> str:
    """The lower-case ending of a name, ".png"."""
    return pathlib.PurePosixPath(name).suffix.lower()


def composed(text: str) -> str:
    """Text in composed Unicode, so that names written on macOS equal those of Linux."""
    return unicodedata.normalize("NFC", text)


def stem(name: str) -> str:
    """A file's name without folders and ending, composed."""
    return composed(pathlib.PurePosixPath(name).stem)


def natural(name: str) -> tuple:
    """Sort key by which "frame10" follows "frame9"."""
    return tuple(
        (1, int(part), part) if part.isdecimal() else (0, 0, part) for part in re.split(r"(\d+)", name) if part
    )


def is_picture(name: str) -> bool:
    """Whether the ending is one of a picture file."""
    return suffix(name) in PICTURES and not is_junk(name)


def is_junk(name: str) -> bool:
    """Files that file managers leave behind, which nobody wants to hear about."""
    parts = name.split("/")
    return (
        "__MACOSX" in parts
        or any(part.startswith(".") for part in parts)
        or parts[-1].lower() in ("thumbs.db", "desktop.ini")
    )


class Folder:
    """The files below a folder, or below some of its entries. Links are followed, but not round in circles."""

    def __init__(self, root: str | os.PathLike, only: Sequence[str] = ()):
        self.root = pathlib.Path(root)
        self.problems: list[str] = []
        found: list[str] = []
        self._walk(self.root, "", found, frozenset(), only)
        self.names = sorted(found, key=natural)

    def _walk(
        self, folder: pathlib.Path, prefix: str, found: list[str], seen: frozenset[str], only: Sequence[str] = ()
    ) -> None:
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above it
            return
        try:
            entries = [entry for entry in os.scandir(folder) if not only or entry.name in only]
        except OSError as error:
            self.problems.append(_explain(folder, error))
            return
        for entry in entries:
            name = prefix + entry.name
            if not _is_text(entry.name):
                self.problems.append(f"{ascii(name)}: the name is not valid UTF-8. Rename it.")
            elif entry.is_dir():
                self._walk(folder / entry.name, f"{name}/", found, seen | {real})
            elif entry.is_file():
                found.append(name)
            elif is_picture(name):
                self.problems.append(f"{folder / entry.name}: neither a file nor a link to one. Remove or replace it.")

    def where(self, name: str) -> str:
        return str(self.root / name)

    def has(self, name: str) -> bool:
        return os.path.isfile(self.root / name)

    def stamp(self, name: str) -> str:
        facts = _guard(self.where(name), os.stat)
        return f"{facts.st_size}-{facts.st_mtime_ns}"

    def read(self, name: str) -> bytes:
        return _guard(self.where(name), _read)


class Loose:
    """Files anywhere, named by their paths."""

    def where(self, name: str) -> str:
        return name

    def read(self, name: str) -> bytes:
        return _guard(name, _read)


class Zip:
    """The members of a ZIP file. Reading is thread-safe."""

    def __init__(self, path: str | os.PathLike):
        import zipfile

        self.root = pathlib.Path(path)
        self.problems: list[str] = []
        try:
            self._zip = zipfile.ZipFile(_guard(str(path), lambda p: open(p, "rb")))  # noqa: SIM115 (lives as long as the store)
            members = [info for info in self._zip.infolist() if not info.is_dir()]
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not a ZIP file that can be read ({error}). Copy or download it again.") from None
        self._info: dict[str, zipfile.ZipInfo] = {}
        for info in members:
            if info.filename in self._info:
                self.problems.append(f"{self.where(info.filename)}: there are two members of this name. Remove one.")
            self._info[info.filename] = info
        self.names = sorted(self._info, key=natural)

    def where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def has(self, name: str) -> bool:
        return name in self._info

    def stamp(self, name: str) -> str:
        info = self._info[name]
        return f"{info.file_size}-{info.CRC}"

    def read(self, name: str) -> bytes:
        info = self._info[name]
        if info.file_size > _LARGEST_FILE:
            raise DataError(
                f"{self.where(name)}: unpacks to {info.file_size:,} bytes; at most {_LARGEST_FILE:,} are read."
            )
        try:
            return self._zip.read(info)
        except Exception as error:  # damaged and hostile archives raise a dozen types
            raise DataError(
                f"{self.where(name)}: cannot be unpacked ({error}). Repack the ZIP, without a password."
            ) from None


@dataclasses.dataclass
class Arrays:
    """Pictures that are in memory already: each name's uint8 array and what its stamp is made of."""

    pictures: Mapping[str, np.ndarray]
    origin: str
    made_of: str

    def __post_init__(self) -> None:
        self.problems: list[str] = []

    @property
    def names(self) -> list[str]:
        return list(self.pictures)

    def where(self, name: str) -> str:
        return f"{self.origin}/{name}"

    def has(self, name: str) -> bool:
        return name in self.pictures

    def stamp(self, name: str) -> str:
        return self.made_of

    def read(self, name: str) -> np.ndarray:
        return self.pictures[name]


class Below:
    """A store seen from one of its folders."""

    def __init__(self, store, prefix: str):
        self._store, self._prefix = store, prefix
        self.problems = store.problems
        self.names = [name[len(prefix) :] for name in store.names if name.startswith(prefix)]

    def where(self, name: str) -> str:
        return self._store.where(self._prefix + name)

    def has(self, name: str) -> bool:
        return self._store.has(self._prefix + name)

    def stamp(self, name: str) -> str:
        return self._store.stamp(self._prefix + name)

    def read(self, name: str) -> bytes:
        return self._store.read(self._prefix + name)


def text_of(store, name: str) -> str:
    """A text file of a store, whatever editor wrote it. Raises DataError if it is not text."""
    data = store.read(name)
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{store.where(name)}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None


def _read(path: str) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for, for ever
        raise DataError(f"{path}: not a regular file. Remove or replace it.")
    with open(path, "rb") as file:
        return file.read()


def _guard(path: str, action):
    try:
        return action(path)
    except OSError as error:
        raise DataError(_explain(path, error)) from None


def _explain(path: str | os.PathLike, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path}: no permission to read it. Change its permissions or run as another user."
    if error.errno == errno.ENOENT:
        return f"{path}: no such file or folder. Check the path."
    return f"{path}: cannot be read ({error.strerror or error})."


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
