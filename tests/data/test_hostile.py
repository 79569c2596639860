"""Data that cannot be used: `load` raises one message that names the file, `check` lists all of them."""

import builtins
import os
import shutil
import struct
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
from made import mask, picture, pictures
from PIL import Image

from jaxad import data
from jaxad.data import pictures as loose


def bomb(path, side=20_000):
    """A PNG of some hundred bytes that claims to hold side x side pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def as_jpeg(path):
    Image.open(path).resize((64, 64)).save(path, "jpeg")
    path.write_bytes(path.read_bytes()[:-100])


HARM = {
    "truncated": (cut, "damaged or cut off"),
    "truncated jpeg": (as_jpeg, "damaged or cut off"),
    "zero bytes": (lambda path: path.write_bytes(b""), r"empty \(0 bytes\)"),
    "text": (lambda path: path.write_text("hello, world"), "not a picture.*it begins with 'hello, world'"),
    "web page": (lambda path: path.write_text("<html>\nmoved"), "not a picture"),
    "noise": (lambda path: path.write_bytes(bytes(range(256))), "not a picture"),
    "bomb": (bomb, "too large"),
    "smaller bomb": (lambda path: bomb(path, 10_500), "too large"),
    "broken link": (lambda path: (path.unlink(), path.symlink_to("nowhere")), "neither a file nor a link"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "neither a file nor a link"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("where", ["train/good/002.png", "test/crack/001.png", "ground_truth/crack/001_mask.png"])
@pytest.mark.parametrize("harm", HARM)
def test_a_harmed_file(mvtec, harm, where):
    action, expected = HARM[harm]
    action(mvtec / where)
    with pytest.raises(data.DataError, match=expected) as caught:
        data.load(mvtec, image_size=8)
    assert str(caught.value).startswith(str(mvtec / where)) and "\n" not in str(caught.value)
    report = data.check(mvtec)
    assert str(caught.value) in report.problems and str(mvtec / where) in str(report)


def test_check_lists_all_problems(mvtec):
    (mvtec / "train/good/000.png").write_bytes(b"")
    (mvtec / "train/good/004.png").write_text("no")
    cut(mvtec / "test/good/001.png")
    mask(mvtec / "ground_truth/crack/002_mask.png", size=(6, 8))
    mask(mvtec / "ground_truth/crack/009_mask.png")
    report = data.check(mvtec)
    assert len(report.problems) == 5 and str(report).endswith("5 problems")
    for name in ("good/000", "good/004", "good/001", "002_mask", "009_mask"):
        assert sum(name in problem for problem in report.problems) == 1
    assert report.counts["test"] == {"normal": 1, "anomalous": 2, "unknown": 0, "masks": 2}


def fails(where, match, **options):
    with pytest.raises(data.DataError, match=match) as caught:
        data.load(where, image_size=8, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value) in data.check(where, normal_class=options.get("normal_class")).problems
    return str(caught.value)


def test_mask_of_another_size(mvtec):
    mask(mvtec / "ground_truth/crack/001_mask.png", size=(6, 8))
    message = fails(mvtec, r"001_mask.png: the mask is 6 x 8, its picture .*test/crack/001.png is 8 x 6")
    assert message.startswith(str(mvtec / "ground_truth"))


def test_mask_without_its_picture(mvtec):
    mask(mvtec / "ground_truth/crack/077_mask.png")
    fails(mvtec, r"ground_truth/crack/077_mask.png: a mask without its picture")


def test_mask_of_a_normal_picture(mvtec):
    mask(mvtec / "ground_truth/good/001_mask.png")
    fails(mvtec, r"good/001_mask.png: marks 9 pixels, but .*test/good/001.png counts as normal")
    mask(mvtec / "ground_truth/good/001_mask.png", box=None)
    assert data.load(mvtec, image_size=8).notes == ()


def test_faint_mask(mvtec):
    mask(mvtec / "ground_truth/crack/001_mask.png", value=100)
    fails(mvtec, r"001_mask.png: mask values up to 100, none above 127")


def test_two_pictures_of_one_name(mvtec):
    picture(mvtec / "test/crack/001.bmp")
    fails(mvtec, r"test/crack/001.png: there is another picture of this name, test/crack/001.bmp|001.bmp: .*001.png")


def test_empty_folder(tmp_path):
    fails(tmp_path, "no pictures in it; found nothing")
    (tmp_path / "notes.txt").write_text("x")
    fails(tmp_path, "no pictures in it; found only notes.txt")
    fails(tmp_path / "absent", "absent: no such file or folder")
    fails(tmp_path / "notes.txt", "a single file; expected a folder")


def test_no_normal_picture(tmp_path):
    pictures(tmp_path / "train/good", 1)
    assert "pass holdout=0" in fails(tmp_path, "1 training pictures, too few to keep some apart")
    assert len(data.load(tmp_path, image_size=8, holdout=0).sources["train"]) == 1


def test_unreadable_file(mvtec, monkeypatch):
    """Root may read everything, so the refusal is simulated where the file is opened."""
    forbidden, real = str(mvtec / "test/good/001.png"), builtins.open

    def guarded(path, *args, **kwargs):
        if path == forbidden:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", guarded)
    fails(mvtec, r"test/good/001.png: no permission to read it")


def test_unreadable_folder(mvtec, monkeypatch):
    real = os.scandir

    def guarded(path):
        if str(path).endswith("train/good"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", guarded)
    fails(mvtec, r"train/good: no permission to read it")


NAMES = ["Großes Bild – 図 №1", "نص", "e\u0301te\u0301", "a b'c\"d", "1.2.3", "emoji 🔩"]


@pytest.mark.parametrize("name", NAMES)
def test_unicode_names(tmp_path, name):
    root = tmp_path / "Flächen 表面"
    pictures(root / "train/good", 2)
    picture(root / f"test/Kratzer ß/{name}.png")
    mask(root / f"ground_truth/Kratzer ß/{unicodedata.normalize('NFC', name)}_mask.png")
    found = data.load(root, image_size=8)
    assert found.rows["test"].files == (f"test/Kratzer ß/{name}.png",) and found.rows["test"].has_mask == (True,)
    assert found.rows["test"].defects == ("Kratzer ß",) and found.name == root.name
    assert not data.check(root).problems


def test_name_that_is_no_text(mvtec):
    shutil.copy(mvtec / "train/good/000.png", os.fsencode(mvtec) + b"/train/good/\xff\xfe.png")
    str(fails(mvtec, "the name is not valid UTF-8")).encode()  # printable


def test_links(mvtec):
    elsewhere = mvtec.parent / "elsewhere"
    (mvtec / "train/good").rename(elsewhere)
    (mvtec / "train/good").symlink_to(elsewhere)
    (mvtec / "train/loop").symlink_to(mvtec)
    assert len(data.load(mvtec, image_size=8).sources["train"]) == 5


def test_damaged_zip(mvtec):
    path = mvtec.parent / "set.zip"
    with zipfile.ZipFile(path, "w") as file:
        for name in sorted(mvtec.glob("**/*.png")):
            file.write(name, name.relative_to(mvtec).as_posix())
    whole = path.read_bytes()
    place = whole.index(b"IDAT") + 30
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
    fails(path, r"set.zip/ground_truth/.*cannot be unpacked \(Bad CRC")
    path.write_bytes(whole[:-40])
    fails(path, "set.zip: not a ZIP file that can be read")


MANIFESTS = {
    "image,split\na.png,train\na.png,test\n": r"a.png: listed twice, in lines 2 and 3",
    "image,split\na.png,trian\n": r"list.csv, line 2: split 'trian'; expected train",
    "image,split\nb.png,train\n": r"b.png: no such file \(line 2 of list.csv\)",
    "image,label\na.png,maybe\n": r"list.csv, line 2: label 'maybe'; expected 0",
    "image,label\na.png\n": r"list.csv, line 2: expected 2 columns",
    "image,label\n,0\n": r"list.csv, line 2: no image path",
    "image\na.png\n": r"list.csv: only paths; expected a column",
    "name,label\na.png,0\n": r"list.csv: no column 'image' \(it has name, label\)",
    "image,split\n": r"no normal picture to train on",
    "": r"list.csv: no column 'image' \(it has none\)",
}


@pytest.mark.parametrize("text", MANIFESTS)
def test_manifest(tmp_path, text):
    picture(tmp_path / "a.png")
    (tmp_path / "list.csv").write_text(text)
    fails(tmp_path / "list.csv", MANIFESTS[text])


def test_manifest_that_is_no_text(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"image,label\n\xff\xfa,0\n")
    fails(tmp_path / "list.csv", "list.csv: not UTF-8 text")
    (tmp_path / "list.jsonl").write_text('{"image": "a.png", "label": 0}\n{"image"\n')
    fails(tmp_path / "list.jsonl", "list.jsonl, line 2: not JSON")


def test_video_labels(tmp_path):
    pictures(tmp_path / "training/frames/01", 4)
    pictures(tmp_path / "testing/frames/01", 2)
    (tmp_path / "labels.csv").write_text("clip,frame,label\n01,000,0\n01,001,2\n01,002,1\n")
    report = data.check(tmp_path)
    assert [problem.partition(": ")[2] for problem in report.problems] == [
        "label '2'; expected 0 (normal) or 1 (anomalous). Correct it.",
        "no label for it in labels.csv. Add its line.",
        "clip 01 has no frame 2. Add the frame or remove the line.",
    ]


def test_clips_need_videos(mvtec):
    with pytest.raises(data.DataError, match="has no videos to cut clips from"):
        data.load(mvtec, image_size=8, clip=4)
    for other in ("synthetic", np.zeros((4, 8, 8), np.uint8)):
        with pytest.raises(data.DataError, match="no videos to cut clips from"):
            data.load(other, image_size=16, clip=4)


def test_check_of_what_has_no_files():
    assert "no files to check" in data.check("synthetic").problems[0]


@pytest.mark.parametrize(
    "options",
    [{"image_size": 0}, {"channels": 2}, {"holdout": 1.0}, {"clip": 4, "target": 4}, {"clip": 0}, {"holdout": -0.1}],
)
def test_options(mvtec, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        data.load(mvtec, **{"image_size": 8, **options})


def test_more_than_memory(mvtec):
    with pytest.raises(data.DataError, match="need .* GiB, this machine has"):
        data.load(mvtec, image_size=1_000_000)


def test_loose_pictures(mvtec):
    found = loose.find([mvtec / "test", mvtec / "train/good/000.png"])
    assert len(found) == 6 and loose.read(found, image_size=(4, 5), channels=1).shape == (6, 4, 5, 1)
    (mvtec / "test/good/000.png").write_text("x")
    with pytest.raises(data.DataError, match="good/000.png: not a picture"):
        loose.read(found, image_size=4)
    with pytest.raises(data.DataError, match="absent.png: no such file"):
        loose.read(["absent.png"], image_size=4)
    os.mkdir(mvtec / "void")
    with pytest.raises(data.DataError, match="void: no pictures"):
        loose.find([mvtec / "void"])
