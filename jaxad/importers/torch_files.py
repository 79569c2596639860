"""Torch files, read as data.

A torch file is a pickle that describes tensors, and their numbers beside it. The pickle is a list of instructions;
`_Machine` follows those that build dicts, lists and tuples of plain values, and of functions and classes only the few
that say "a tensor of these numbers". None of them is imported or called: they become descriptions (`_Tensor`). Every
other instruction and every other name is refused.
"""

from __future__ import annotations

import math
import pathlib
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxad.importers.arrays import check_size
from jaxad.importers.errors import WeightsError

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of the older format start
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Name(NamedTuple):
    """A function or class that the file mentions: one of those allowed."""

    name: str


class _Storage(NamedTuple):
    """A run of numbers, by its key in the file."""

    key: str
    dtype: np.dtype
    length: int


class _Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {storage}" for storage in _STORAGES),
}
_MARK = object()


class _Machine:
    """Follows a pickle's instructions: `run` gives what it describes."""

    def __init__(self, origin: str):
        self.origin, self.stack, self.memo = origin, [], {}  # type: ignore[var-annotated]

    def run(self, source: bytes | BinaryIO) -> Any:
        """Reads one pickle, up to its end. Raises WeightsError for anything that no plain tensors need."""
        try:
            for opcode, argument, _ in pickletools.genops(source):
                if opcode.name == "STOP":
                    return self.stack.pop()
                self._follow(opcode.name, argument)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, WeightsError):
                raise
            reason = str(error) or type(error).__name__
            raise WeightsError(
                f"{self.origin}: its description of tensors is damaged ({reason}); expected what torch.save writes. "
                "Copy or save it again."
            ) from error
        raise self.refuse("a pickle without an end")

    def refuse(self, what: str) -> WeightsError:
        """The error for something that is no tensor."""
        return WeightsError(
            f"{self.origin}: holds {what}; expected tensors only, and nothing else is read from a torch file, since it "
            "could run code. Save model.state_dict() alone, or use safetensors."
        )

    def _follow(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name in _PUSH:
            self.stack.append(_PUSH[name](argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._mention(argument if name == "GLOBAL" else " ".join(reversed([self.stack.pop(), self.stack.pop()])))
        elif name in _STEPS:
            _STEPS[name](self)
        else:
            raise self.refuse(f"the instruction {name}")

    def _mention(self, name: str) -> None:
        if name not in _NAMES:
            raise self.refuse(f"the name {name.replace(' ', '.')!r}")
        self.stack.append(_Name(name.partition(" ")[2]))

    def since_mark(self) -> list[Any]:
        """Takes what was put on the stack since the last mark."""
        found: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            found.append(value)
        return found[::-1]

    def collect(self, count: int | None) -> None:
        """Makes a tuple of the last values: so many, or those since the mark."""
        values = self.since_mark() if count is None else [self.stack.pop() for _ in range(count)][::-1]
        self.stack.append(tuple(values))

    def set_items(self, values: list[Any]) -> None:
        """Puts pairs into the dict on top."""
        if not isinstance(self.stack[-1], dict):
            raise self.refuse(f"items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def extend(self, values: list[Any]) -> None:
        """Puts values into the list on top."""
        if not isinstance(self.stack[-1], list):
            raise self.refuse(f"entries of a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(values)

    def point(self) -> None:
        """Turns a pointer ("storage", class, key, device, count) into a storage."""
        pointer = self.stack.pop()
        is_storage = isinstance(pointer, tuple) and len(pointer) in (5, 6) and pointer[0] == "storage"
        if not is_storage or not isinstance(pointer[1], _Name) or pointer[1].name not in _STORAGES:
            raise self.refuse("a pointer to something other than numbers")
        _, kind, key, _, count = pointer[:5]
        if len(pointer) == 6 and pointer[5] is not None:
            raise self.refuse("a storage that is a view of another")
        if not _is_count(count):
            raise self.refuse(f"a storage of {count!r} numbers")
        self.stack.append(_Storage(str(key), np.dtype(_STORAGES[kind.name]), count))

    def call(self) -> None:
        """What a call of an allowed name would give, as a description."""
        arguments, function = self.stack.pop(), self.stack.pop()
        name = function.name if isinstance(function, _Name) else type(function).__name__
        if name == "OrderedDict" and arguments == ():
            self.stack.append({})
        elif name == "_rebuild_tensor_v2" and len(arguments) >= 4 and isinstance(arguments[0], _Storage):
            self.stack.append(self._tensor(*arguments[:4]))
        elif name == "_rebuild_parameter" and len(arguments) == 3 and isinstance(arguments[0], _Tensor):
            self.stack.append(arguments[0])
        else:
            raise self.refuse(f"a call of {name!r} with other than a tensor's parts")

    def _tensor(self, storage: _Storage, offset: Any, shape: Any, strides: Any) -> _Tensor:
        numbers = (offset, *shape, *strides)
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if _are_counts(numbers) else -1
        size = math.prod(shape) if last >= 0 or 0 in shape else -1
        if not 0 <= size <= storage.length or (size and last >= storage.length):
            raise self.refuse(f"a tensor of shape {shape} beyond its storage of {storage.length} numbers")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))

    def set_state(self) -> None:
        """Drops the attributes of a dict (torch notes versions there); nothing else may have any."""
        self.stack.pop()
        if not isinstance(self.stack[-1], dict):
            raise self.refuse(f"attributes of a {type(self.stack[-1]).__name__}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_counts(values: tuple) -> bool:
    return all(map(_is_count, values))


_PUSH: dict[str, Callable] = {
    "MARK": lambda _: _MARK,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_LIST": lambda _: [],
    "EMPTY_TUPLE": lambda _: (),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"), lambda value: value
    ),
}
_STEPS: dict[str, Callable[[_Machine], None]] = {
    "TUPLE": lambda machine: machine.collect(None),
    "TUPLE1": lambda machine: machine.collect(1),
    "TUPLE2": lambda machine: machine.collect(2),
    "TUPLE3": lambda machine: machine.collect(3),
    "SETITEM": lambda machine: machine.set_items([machine.stack.pop() for _ in range(2)][::-1]),
    "SETITEMS": lambda machine: machine.set_items(machine.since_mark()),
    "APPEND": lambda machine: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine: machine.extend(machine.since_mark()),
    "BINPERSID": _Machine.point,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.set_state,
}


# --- the two formats ----------------------------------------------------------------------------------------------


def is_torch(archive: zipfile.ZipFile) -> bool:
    """Whether a zip archive is a torch file rather than NumPy's."""
    return any(name.endswith("/data.pkl") for name in archive.namelist())


def read_zip(archive: zipfile.ZipFile, origin: str, max_bytes: int) -> dict[str, np.ndarray]:
    """The tensors of a torch file in zip format. Raises WeightsError."""
    entries = archive.infolist()
    check_size(sum(entry.file_size for entry in entries), max_bytes, origin)
    machine = _Machine(origin)
    top = next(entry.filename for entry in entries if entry.filename.endswith("/data.pkl")).removesuffix("data.pkl")
    if f"{top}byteorder" in archive.namelist() and archive.read(f"{top}byteorder") != b"little":
        raise machine.refuse("numbers whose bytes are not little-endian")
    described = machine.run(archive.read(f"{top}data.pkl"))

    def numbers(storage: _Storage) -> bytes:
        try:
            return archive.read(f"{top}data/{storage.key}")
        except (KeyError, RuntimeError, NotImplementedError) as error:
            raise machine.refuse(f"no readable numbers for storage {storage.key!r}") from error

    return _arrays(machine, described, numbers, max_bytes)


def read_legacy(path: pathlib.Path, max_bytes: int) -> dict[str, np.ndarray]:
    """The tensors of a torch file of before version 1.6: five pickles in a row, then the numbers. Raises WeightsError.

    The pickles are: a magic number, a version, facts of the machine, the tensors, the keys of storages in order.
    """
    check_size(path.stat().st_size, max_bytes, str(path))
    machine = _Machine(str(path))
    with path.open("rb") as file:
        _, _, system, described, keys = (_Machine(str(path)).run(file) for _ in range(5))
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise machine.refuse("numbers whose bytes are not little-endian")
        storages = {tensor.storage.key: tensor.storage for tensor in _flat(machine, described).values()}
        stored = {}
        for key in keys:
            if key not in storages:
                raise machine.refuse(f"numbers of an unknown storage {key!r}")
            count = int.from_bytes(file.read(8), "little")
            if count != storages[key].length:
                raise machine.refuse(f"{count} numbers for storage {key!r} of {storages[key].length}")
            stored[key] = file.read(count * storages[key].dtype.itemsize)
    return _arrays(machine, described, lambda storage: stored.get(storage.key, b""), max_bytes)


def _flat(machine: _Machine, described: Any) -> dict[str, _Tensor]:
    """The tensors in nested dicts, their names joined by dots. No dict is met twice: a few could spell out billions."""
    found: dict[str, _Tensor] = {}
    seen: set[int] = set()

    def visit(value: Any, name: str) -> None:
        if isinstance(value, _Tensor):
            found[name] = value
        elif isinstance(value, dict) and id(value) not in seen:
            seen.add(id(value))
            for key, inner in value.items():
                visit(inner, f"{name}.{key}" if name else str(key))
        else:
            what = "a dict in two places" if isinstance(value, dict) else f"a {type(value).__name__}"
            raise machine.refuse(f"{what}{f' called {name!r}' if name else ''}")

    visit(described, "")
    return found


def _arrays(
    machine: _Machine, described: Any, numbers: Callable[[_Storage], bytes], max_bytes: int
) -> dict[str, np.ndarray]:
    """Each tensor as an array of its own."""
    tensors = _flat(machine, described)
    check_size(sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values()), max_bytes, machine.origin)
    stored: dict[_Storage, np.ndarray] = {}
    found = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        if storage not in stored:
            raw = numbers(storage)
            if len(raw) != storage.length * storage.dtype.itemsize:
                raise machine.refuse(f"{len(raw)} bytes for {storage.length} numbers of {storage.dtype} in {name!r}")
            stored[storage] = np.frombuffer(raw, storage.dtype)
        whole = stored[storage][offset:]
        steps = tuple(s * whole.itemsize for s in strides)
        found[name] = np.lib.stride_tricks.as_strided(whole, shape, steps).copy()
    return found
