"""Weights are read from safetensors, NumPy archives and torch files as numbers; whatever is more is refused."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from jaxad import importers
from jaxad.importers import WeightsError, read

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


def made():
    numbers = np.random.default_rng(0)
    return {"a.weight": numbers.normal(size=(2, 3, 4)).astype("f"), "a.bias": np.arange(3), "n": np.array(7, np.int32)}


def same(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_npz(tmp_path):
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "w.npz", **made())
        same(read(tmp_path / "w.npz"), made())


def test_safetensors(tmp_path):
    header, data = {"__metadata__": {"format": "pt"}}, b""
    names = {"float32": "F32", "int64": "I64", "int32": "I32"}
    for name, array in made().items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": names[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    same(read(write_safetensors(tmp_path / "w.safetensors", header, data)), made())


# --- torch files as torch writes them -----------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, zipped):
    """Every dtype; slices, transposes, tensors that share numbers; parameters; dicts in dicts; scalars and nothing."""
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    linear = torch.nn.Linear(3, 2)
    saved = {dtype: torch.tensor([[0, 1], [1, 3]]).to(getattr(torch, dtype)) for dtype in DTYPES}
    saved |= {"part": base[1:, 2:5:2], "turned": base.T, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
    saved |= {"model": linear.state_dict(), "parameter": linear.weight}
    torch.save(saved, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    flat = {k: v for k, v in saved.items() if k not in ("model", "parameter")}
    flat |= {"model.weight": linear.weight, "model.bias": linear.bias, "parameter": linear.weight}
    found = read(tmp_path / "w.pt")
    assert list(found) == list(flat)
    for name, tensor in flat.items():
        assert found[name].dtype.name == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found[name].astype("f"), tensor.detach().float().numpy())


def test_real_files(shared):
    folder = shared / "weights" / "patch_svdd"
    for path in sorted(folder.glob("*_enchier.pkl")):
        same(read(path), read(path.with_suffix(".npz")))
    assert len(read(shared / "weights" / "efficientnet_lite0_imagenet.npz")) > 200


# --- planted files ------------------------------------------------------------------------------------------------


class Runs:
    """Pickled, it calls os.system when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def torch_zip(path, described, **files):
    """A torch file in zip format around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", described)
        for name, content in files.items():
            archive.writestr(f"w/{name.replace('_', '/')}", content)
    return path


def legacy(path, *parts):
    path.write_bytes(b"".join(parts))
    return path


LEGACY = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_in_torch_files_does_not_run(tmp_path, protocol):
    described = pickle.dumps({"w": Runs(f"touch {tmp_path / 'ran'}")}, protocol)
    pickle.loads(described)
    assert (tmp_path / "ran").exists(), "the plant works"
    (tmp_path / "ran").unlink()
    for path in (
        torch_zip(tmp_path / "w.pt", described),
        legacy(tmp_path / "w.pkl", *LEGACY, described, pickle.dumps([], 2)),
    ):
        with pytest.raises(WeightsError, match=r"holds the name '(posix|nt).system'; expected tensors only"):
            read(path)
    assert not (tmp_path / "ran").exists()


def test_code_in_the_first_pickles_does_not_run(tmp_path):
    """The older format has four pickles before the numbers; each could hold code."""
    for place in range(2, 5):
        parts = [*LEGACY, pickle.dumps({}, 2), pickle.dumps([], 2)]
        parts[place] = pickle.dumps(Runs(f"touch {tmp_path / 'ran'}"), 2)
        with pytest.raises(WeightsError, match="system'; expected tensors only"):
            read(legacy(tmp_path / "w.pkl", *parts))
    assert not (tmp_path / "ran").exists()


def test_object_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", w=np.array([Runs(f"touch {tmp_path / 'ran'}")], object))
    with pytest.raises(WeightsError, match="entry 'w.npy' is no plain array .*expected arrays of numbers"):
        read(tmp_path / "w.npz")
    assert not (tmp_path / "ran").exists()


PERSIST = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK%ctQ"


def tensor(count=6, offset=b"K\x00", shape=b"K\x02K\x03\x86", strides=b"K\x03K\x01\x86"):
    """The instructions of a dict with one tensor "w", 2 x 3 numbers unless told otherwise."""
    storage = PERSIST % bytes([count])
    parts = b"(" + storage + offset + shape + strides + b"\x89}tR"
    return b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n" + parts + b"s."


def test_the_planted_tensor_is_sound(tmp_path):
    numbers = np.arange(6, dtype=np.float32)
    found = read(torch_zip(tmp_path / "w.pt", tensor(), data_0=numbers.tobytes()))
    np.testing.assert_array_equal(found["w"], numbers.reshape(2, 3))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (tensor(count=5), "shape .2, 3. beyond its storage of 5 numbers"),
        (tensor(offset=b"K\x01"), "beyond its storage"),
        (tensor(offset=b"J\xff\xff\xff\xff"), "beyond its storage"),
        (tensor(strides=b"K\x04K\x01\x86"), "beyond its storage"),
        (tensor(strides=b"J\xff\xff\xff\xffK\x01\x86"), "beyond its storage"),
        (tensor(shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", strides=b"K\x00K\x00\x86"), "beyond its storage"),
        (tensor(shape=b"K\x02\x85"), "damaged"),
        (tensor(shape=b"N"), "damaged"),
        (tensor(count=7), "24 bytes for 7 numbers of float32 in 'w'"),
        (tensor().replace(b"FloatStorage", b"DoubleStorage"), "24 bytes for 6 numbers of float64"),
        (tensor().replace(b"FloatStorage", b"UntypedStorage"), "holds the name 'torch.UntypedStorage'"),
        (tensor().replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001"), "no readable numbers for storage '1'"),
        (tensor()[:-3], "damaged|without an end"),
        (b"\x80\x02" + b"(" * 5, "damaged|without an end"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02]K\x01a.", "holds a list; expected tensors only"),
        (b"\x80\x02}X\x05\x00\x00\x00epochK\x03s.", "holds a int called 'epoch'"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "a dict in two places called 'a'"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x02tR.", "a call of 'OrderedDict' with other than"),
        (b"\x80\x02ctorch\nFloatStorage\n)R.", "a call of 'FloatStorage'"),
        (b"\x80\x02ctorch\nFloatStorage\n}b.", "attributes of a _Name"),
        (b"\x80\x02ctorch\nFloatStorage\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1"),
        (b"\x80\x02X\x01\x00\x00\x00wQ.", "a pointer to something other than numbers"),
    ],
)
def test_wrong_descriptions_are_refused(tmp_path, described, message):
    numbers = np.zeros(6, np.float32).tobytes()
    with pytest.raises(WeightsError, match=message):
        read(torch_zip(tmp_path / "w.pt", described, data_0=numbers))


def test_wrong_numbers_of_the_older_format_are_refused(tmp_path):
    count, numbers = struct.pack("<q", 6), np.arange(6, dtype=np.float32).tobytes()
    keys = pickle.dumps(["0"], 2)
    found = read(legacy(tmp_path / "w.pkl", *LEGACY, tensor(), keys, count, numbers))
    np.testing.assert_array_equal(found["w"].ravel(), np.arange(6))
    big = [*LEGACY[:2], pickle.dumps({"little_endian": False}, 2)]
    for parts, message in (
        ((*LEGACY, tensor(), keys, count, numbers[:-1]), "23 bytes for 6 numbers"),
        ((*LEGACY, tensor(), keys, struct.pack("<q", 7), numbers), "7 numbers for storage '0' of 6"),
        ((*LEGACY, tensor(), pickle.dumps(["1"], 2), count, numbers), "an unknown storage '1'"),
        ((*LEGACY, tensor(), pickle.dumps([], 2)), "0 bytes for 6 numbers"),
        ((*big, tensor(), keys, count, numbers), "not little-endian"),
        ((*LEGACY, tensor()), "damaged|without an end"),
    ):
        with pytest.raises(WeightsError, match=message):
            read(legacy(tmp_path / "w.pkl", *parts))


def test_big_endian_archives_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="not little-endian"):
        read(torch_zip(tmp_path / "w.pt", tensor(), byteorder=b"big", data_0=bytes(24)))


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(8), "does not fit its 8 bytes"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(8), "does not fit"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [8, 0]}}, bytes(8), "does not fit"),
        ({"w": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}}, bytes(8), "does not fit"),
        ({"w": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}, bytes(8), "the entry of 'w'"),
        ({"w": [1]}, bytes(8), "the entry of 'w'"),
        (b'{"w": ', b"", "no JSON"),
    ],
)
def test_wrong_safetensors_are_refused(tmp_path, header, data, message):
    with pytest.raises(WeightsError, match=message):
        read(write_safetensors(tmp_path / "w.safetensors", header, data))


def test_a_header_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(struct.pack("<Q", 2**62) + b'{"w": 1}')
    with pytest.raises(WeightsError, match="header claims 4611686018427387904 bytes of 16"):
        read(tmp_path / "w.safetensors")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", **made())
    whole = (tmp_path / "whole.npz").read_bytes()
    broken = bytearray(whole)
    broken[120] ^= 255  # a number: its checksum tells
    for content, message in (
        (whole[: len(whole) // 2], "cannot be read"),
        (bytes(broken), "CRC"),
        (b"", "no known format"),
        (pickle.dumps(made()), "no known format"),
        (pickle.dumps(Runs("true"), 0), "no known format"),
    ):
        (tmp_path / "w").write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            read(tmp_path / "w")
    with pytest.raises(WeightsError, match="nowhere.npz: cannot be read"):
        read(tmp_path / "nowhere.npz")


def test_more_bytes_than_wanted_are_refused(tmp_path):
    """Archives can unpack to far more than they weigh, and tensors can share numbers."""
    packed = io.BytesIO()
    np.savez_compressed(packed, w=np.zeros(10**6, np.uint8))
    (tmp_path / "w.npz").write_bytes(packed.getvalue())
    assert len(packed.getvalue()) < 10**4
    with pytest.raises(WeightsError, match="take 1000128 bytes; expected at most 100000. Pass max_bytes=1000128"):
        read(tmp_path / "w.npz", max_bytes=10**5)
    one = tensor()
    two = one[:-2] + b"s" + one[3:-2].replace(b"\x00w", b"\x00v") + b"s."
    path = torch_zip(tmp_path / "w.pt", two, data_0=bytes(24))
    assert list(read(path)) == ["w", "v"]
    with pytest.raises(WeightsError, match="take 48 bytes|expected at most"):
        read(path, max_bytes=40)


def test_take_names_what_is_wrong():
    arrays = {"a": np.zeros((2, 3))}
    assert importers.take(arrays, "a", (2, 3)) is arrays["a"]
    with pytest.raises(WeightsError, match="no array 'b'; expected one of shape .2,.*1 arrays such as a"):
        importers.take(arrays, "b", (2,))
    with pytest.raises(WeightsError, match="a has shape .2, 3.; expected .3, 2."):
        importers.take(arrays, "a", (3, 2))
