"""Every layout is recognised, and each of its pictures gets its role, label, defect and mask."""

import csv
import gzip
import json
import zipfile

import numpy as np
import pytest
from made import mask, picture, pictures, seed_of

from jaxad import data


def sizes(found):
    return {name: len(source) for name, source in found.sources.items()}


def load(where, **options):
    return data.load(where, image_size=(6, 8), **options)


def table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_mvtec(mvtec):
    found = load(mvtec)
    assert (found.name, found.layout, found.notes) == ("bottle", "mvtec", ())
    assert sizes(found) == {"train": 5, "holdout": 1, "test": 5}
    test, rows = found.sources["test"], found.rows["test"]
    assert rows.files == tuple([f"test/crack/00{i}.png" for i in range(3)] + [f"test/good/00{i}.png" for i in range(2)])
    assert rows.defects == ("crack", "crack", "crack", "good", "good") and rows.has_mask == (True,) * 5
    np.testing.assert_array_equal(test.label, [1, 1, 1, 0, 0])
    box = np.zeros((6, 8))
    box[1:4, 2:5] = 1
    np.testing.assert_array_equal(test.mask, [box] * 3 + [np.zeros((6, 8))] * 2)
    assert found.sources["train"].mask is None and not any(found.rows["train"].has_mask)
    held = set(found.rows["holdout"].files) | set(found.rows["train"].files)
    assert held == {f"train/good/00{i}.png" for i in range(6)}


def test_pictures_arrive_in_the_order_of_their_rows(mvtec):
    found = load(mvtec)
    for name, source in found.sources.items():
        for file, pixels in zip(found.rows[name].files, source.image, strict=True):
            folder, number = mvtec.joinpath(file).parent.name, int(file[-7:-4])
            np.testing.assert_array_equal(pixels, picture(mvtec / "again.png", seed=seed_of(folder, number)))


def test_mvtec_without_masks(mvtec):
    for path in mvtec.glob("ground_truth/crack/*"):
        path.unlink()
    found = load(mvtec)
    assert found.sources["test"].mask is None and not any(found.rows["test"].has_mask)
    np.testing.assert_array_equal(found.sources["test"].label, [1, 1, 1, 0, 0])


def test_mvtec_with_a_mask_missing(mvtec):
    (mvtec / "ground_truth/crack/001_mask.png").unlink()
    found = load(mvtec)
    assert found.rows["test"].has_mask == (True, False, True, True, True)
    assert not found.sources["test"].mask[1].any()
    assert found.notes == ("1 anomalous picture without a mask, left out of pixel metrics: test/crack/001.png.",)


def test_only_normal_pictures(tmp_path):
    pictures(tmp_path / "train/good", 4)
    found = load(tmp_path)
    assert sizes(found) == {"train": 3, "holdout": 1} and "no test part" in " ".join(found.notes)


def test_flat_folder_is_normal(tmp_path):
    pictures(tmp_path, 4)
    found = load(tmp_path)
    assert sizes(found) == {"train": 3, "holdout": 1} and "taken as normal" in found.notes[0]


def test_one_folder_around_the_data_set(mvtec):
    found = load(mvtec.parent)
    assert found.layout == "mvtec" and len(found.sources["test"]) == 5


def test_several_data_sets_name_themselves(mvtec):
    pictures(mvtec.parent / "cable/train/good", 2)
    with pytest.raises(data.DataError, match=r"holds 2 data sets \(bottle, cable\)"):
        load(mvtec.parent)


def test_loco(mvtec):
    pictures(mvtec / "validation/good", 3)
    (mvtec / "ground_truth/crack/000_mask.png").unlink()
    first = mask(mvtec / "ground_truth/crack/000/000.png", box=(0, 0, 1, 1))
    second = mask(mvtec / "ground_truth/crack/000/001.png", box=(6, 4, 8, 6))
    found = load(mvtec)
    assert found.layout == "loco"
    assert sizes(found) == {"train": 6, "holdout": 3, "test": 5}  # its own validation part wins
    np.testing.assert_array_equal(found.sources["test"].mask[0] * 255, first + second)


def visa(root):
    rows = []
    for kind in ("candle", "pcb1"):
        for i in range(5):
            name = f"{kind}/Data/Images/Normal/{i:04d}.JPG"
            picture(root / name, seed=i)
            rows.append([kind, "train" if i < 3 else "test", "normal", name, ""])
        name, truth = f"{kind}/Data/Images/Anomaly/000.JPG", f"{kind}/Data/Masks/Anomaly/000.png"
        picture(root / name)
        mask(root / truth, value=2)  # VisA numbers its defects
        rows.append([kind, "test", "anomaly", name, truth])
    table(root / "split_csv/1cls.csv", ["object", "split", "label", "image", "mask"], rows)


def test_visa(tmp_path):
    visa(tmp_path)
    found = load(tmp_path / "pcb1")
    assert (found.name, found.layout) == ("pcb1", "visa") and sizes(found) == {"train": 2, "holdout": 1, "test": 3}
    assert found.sources["test"].mask.sum() == 9 and found.sources["test"].label.sum() == 1
    assert all(file.startswith("pcb1/") for rows in found.rows.values() for file in rows.files)
    with pytest.raises(data.DataError, match=r"several objects, here are candle, pcb1"):
        load(tmp_path)


def test_folder(tmp_path):
    pictures(tmp_path / "normal", 10)
    pictures(tmp_path / "abnormal", 3)
    mask(tmp_path / "masks/000.png")
    mask(tmp_path / "masks/abnormal/002_mask.png")
    mask(tmp_path / "masks/normal/001.png", box=None)
    found = load(tmp_path)
    assert found.layout == "folder" and sizes(found) == {"train": 7, "holdout": 1, "test": 5}
    rows = found.rows["test"]
    assert dict(zip(rows.files, rows.has_mask, strict=True)) == {
        "abnormal/000.png": True,
        "abnormal/001.png": False,
        "abnormal/002.png": True,
        **{file: True for file in rows.files if file.startswith("normal")},
    }
    files = [file for other in found.rows.values() for file in other.files]
    assert len(set(files)) == len(files) == 13
    assert "chosen by seed" in " ".join(found.notes)


def test_folder_with_defect_types(tmp_path):
    pictures(tmp_path / "good", 5)
    pictures(tmp_path / "crack", 1)
    pictures(tmp_path / "bad/scratch", 2)
    mask(tmp_path / "masks/crack/000.png")
    found = load(tmp_path)
    assert found.layout == "folder"
    assert sorted(found.rows["test"].defects) == ["crack", "good", "scratch", "scratch"]
    assert dict(zip(found.rows["test"].files, found.rows["test"].has_mask, strict=True))["crack/000.png"]


def test_manifest_with_classes(tmp_path):
    """The derivation that magnetic_tile/split.csv needs: classes seen in training are normal."""
    for i in range(6):
        picture(tmp_path / f"Free/Imgs/{i}.jpg")
        mask(tmp_path / f"Free/Imgs/{i}.png", box=None)
    picture(tmp_path / "Crack/Imgs/0.jpg")
    mask(tmp_path / "Crack/Imgs/0.png")
    rows = [[f"Free/Imgs/{i}.jpg", f"Free/Imgs/{i}.png", "train" if i < 4 else "test", "Free"] for i in range(6)]
    rows.append([r".\Crack\Imgs\0.jpg", "Crack/Imgs/0.png", "test", "Crack"])
    table(tmp_path / "split.csv", ["image", "mask", "split", "class"], rows)
    for where in (tmp_path / "split.csv", tmp_path):
        found = load(where)
        assert found.layout == "manifest" and sizes(found) == {"train": 3, "holdout": 1, "test": 3}
        np.testing.assert_array_equal(found.sources["test"].label, [0, 0, 1])
        assert found.rows["test"].defects == ("good", "good", "Crack")
        assert found.sources["train"].mask is None and found.sources["test"].mask[2].sum() == 9


def test_manifest_as_json_lines(tmp_path):
    rows = [
        ("a", "train", 0),
        ("b", "val", 0),
        ("c", "test", 1),
        ("d", "test", -1),
        ("e", "train", "bad"),
        ("f", "train", ""),
    ]
    for name, _, _ in rows:
        picture(tmp_path / f"{name}.png")
    lines = [json.dumps({"path": f"{name}.png", "split": role, "label": label}) for name, role, label in rows]
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n\n")
    found = load(tmp_path / "list.jsonl")
    assert {name: rows.files for name, rows in found.rows.items()} == {
        "train": ("a.png", "f.png"),
        "holdout": ("b.png",),
        "test": ("c.png", "d.png"),
        "labelled": ("e.png",),
    }
    np.testing.assert_array_equal(found.sources["test"].label, [1, -1])
    np.testing.assert_array_equal(found.sources["train"].label, [0, 0])
    assert found.rows["test"].defects == ("anomalous", "")


def test_manifest_where_the_mask_decides(tmp_path):
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    mask(tmp_path / "c_mask.png")
    mask(tmp_path / "d_mask.png", box=None)
    rows = [["a.png", "train", ""], ["b.png", "train", ""]]
    rows += [["c.png", "test", "c_mask.png"], ["d.png", "test", "d_mask.png"]]
    table(tmp_path / "list.csv", ["image", "split", "mask"], rows)
    found = load(tmp_path / "list.csv")
    np.testing.assert_array_equal(found.sources["test"].label, [1, 0])
    assert found.rows["test"].defects == ("anomalous", "good")


def video(root, labels=True):
    pictures(root / "training/frames/01", 9)
    pictures(root / "training/frames/02", 30)
    pictures(root / "testing/frames/01", 5)
    pictures(root / "testing/frames/02", 4)
    if labels:
        rows = [["01", f"{i:03d}", int(i > 2)] for i in range(5)] + [["02", i, 0] for i in range(4)]
        table(root / "labels.csv", ["clip", "frame", "label"], rows)


def test_video_frames(tmp_path):
    video(tmp_path)
    found = load(tmp_path)
    assert found.layout == "video" and sum(sizes(found).values()) == 48
    np.testing.assert_array_equal(found.sources["test"].label, [0, 0, 0, 1, 1, 0, 0, 0, 0])
    assert found.rows["test"].groups == ("01",) * 5 + ("02",) * 4
    assert len(set(found.rows["train"].groups)) == len(set(found.rows["holdout"].groups)) == 1  # whole videos
    assert set(found.rows["train"].groups) != set(found.rows["holdout"].groups)


def test_clips_stay_within_their_videos(tmp_path):
    video(tmp_path)
    found = load(tmp_path, clip=3, target=1)
    test, rows = found.sources["test"], found.rows["test"]
    np.testing.assert_array_equal(test.start, [0, 1, 2, 5, 6])
    assert test.clip == 3 and test.target == 1 and test.sample_shape == (3, 6, 8, 3) and len(rows) == len(test) == 5
    assert rows.files == tuple(
        [f"testing/frames/01/00{i}.png" for i in (1, 2, 3)] + [f"testing/frames/02/00{i}.png" for i in (1, 2)]
    )
    assert rows.defects == ("good", "good", "anomalous", "good", "good")
    np.testing.assert_array_equal(load(tmp_path, clip=3, clip_stride=2).sources["test"].start, [0, 2, 5])


def test_frames_are_ordered_by_number(tmp_path):
    for i in (1, 2, 10, 9):
        picture(tmp_path / f"training/frames/a/{i}.png")
        picture(tmp_path / f"testing/frames/a/f{i}.png")
    found = load(tmp_path, holdout=0)
    assert found.rows["train"].files == tuple(f"training/frames/a/{i}.png" for i in (1, 2, 9, 10))
    assert found.rows["test"].files == tuple(f"testing/frames/a/f{i}.png" for i in (1, 2, 9, 10))


def test_clips_of_short_videos(tmp_path):
    video(tmp_path)
    found = load(tmp_path, clip=5)
    assert len(found.sources["test"]) == 1 and "fewer than 5 frames are left out: 02" in " ".join(found.notes)
    with pytest.raises(data.DataError, match="no video of test has 9 frames"):
        load(tmp_path, clip=9)


def test_one_video_holds_out_its_end(tmp_path):
    pictures(tmp_path / "Train/Train001", 20)
    pictures(tmp_path / "Test/Test001", 4)
    found = load(tmp_path)
    assert found.layout == "video" and found.rows["holdout"].files == (
        "Train/Train001/018.png",
        "Train/Train001/019.png",
    )
    assert "clips Test001" in " ".join(found.notes)
    np.testing.assert_array_equal(found.sources["test"].label, -1)
    clips = load(tmp_path, clip=4)
    assert len(clips.sources["holdout"]) == 1 and len(clips.sources["train"]) == 13  # no frame in both


def test_video_masks_are_labels(tmp_path):
    pictures(tmp_path / "Train/Train001", 4, ending="tif")
    pictures(tmp_path / "Test/Test001", 3, ending="tif")
    for i in range(3):
        mask(tmp_path / f"Test/Test001_gt/{i:03d}.bmp", box=(0, 0, 2, 2) if i == 1 else None)
    found = load(tmp_path)
    np.testing.assert_array_equal(found.sources["test"].label, [0, 1, 0])
    assert found.sources["test"].mask[1].sum() == 4 and found.rows["test"].defects == ("good", "anomalous", "good")


def idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()) if path.suffix == ".gz" else head + array.tobytes())


@pytest.fixture
def digits(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {part: rng.integers(0, 256, (count, 6, 8), np.uint8) for part, count in (("train", 12), ("t10k", 6))}
    idx(tmp_path / "train-images-idx3-ubyte.gz", arrays["train"])
    idx(tmp_path / "train-labels-idx1-ubyte.gz", np.arange(12, dtype=np.uint8) % 3)
    idx(tmp_path / "t10k-images-idx3-ubyte", arrays["t10k"])
    idx(tmp_path / "t10k-labels-idx1-ubyte", np.arange(6, dtype=np.uint8) % 3)
    return tmp_path, arrays


@pytest.mark.parametrize("normal", [1, "1"])
def test_idx(digits, normal):
    root, arrays = digits
    found = load(root, channels=1, normal_class=normal, holdout=0.25)
    assert found.layout == "idx" and sizes(found) == {"train": 3, "holdout": 1, "test": 6}
    np.testing.assert_array_equal(found.sources["test"].label, [1, 0, 1, 1, 0, 1])
    assert found.rows["test"].defects == ("0", "good", "2", "0", "good", "2")
    np.testing.assert_array_equal(found.sources["test"].image[..., 0], arrays["t10k"])
    chosen = [int(file[-5:]) for file in found.rows["train"].files]
    assert set(chosen) < {1, 4, 7, 10}
    np.testing.assert_array_equal(found.sources["train"].image[..., 0], arrays["train"][chosen])


def test_normal_class_is_asked_for(digits):
    with pytest.raises(data.DataError, match=r"3 classes \(0, 1, 2\).*--normal-class"):
        load(digits[0])
    with pytest.raises(data.DataError, match=r"no class 7; expected one of 0, 1, 2"):
        load(digits[0], normal_class=7)


def test_idx_damaged(digits):
    path = digits[0] / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(data.DataError, match=r"t10k-images-idx3-ubyte: its header promises 288 bytes, it has 287"):
        load(digits[0], normal_class=0)
    path.unlink()
    zipped = digits[0] / "train-images-idx3-ubyte.gz"
    zipped.write_bytes(zipped.read_bytes()[:200])
    with pytest.raises(data.DataError, match=r"train-images-idx3-ubyte.gz: damaged"):
        load(digits[0], normal_class=0)


def test_classes_in_a_zip(tmp_path):
    for role, count in (("train", 4), ("test", 2)):
        for kind in ("cat", "dog"):
            pictures(tmp_path / "raw" / role / kind, count)
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as file:
        for path in sorted(tmp_path.glob("raw/**/*.png")):
            file.write(path, path.relative_to(tmp_path / "raw").as_posix())
    zipped, plain = (load(tmp_path / name, normal_class="dog") for name in ("pets.zip", "raw"))
    assert zipped.layout == plain.layout == "classes"
    assert sizes(zipped) == sizes(plain) == {"train": 3, "holdout": 1, "test": 4}
    assert zipped.rows == plain.rows and zipped.rows["test"].defects == ("cat", "cat", "good", "good")
    np.testing.assert_array_equal(zipped.sources["test"].image, plain.sources["test"].image)
    assert zipped.fingerprint == plain.fingerprint
    with pytest.raises(data.DataError, match="Did you mean 'dog'"):
        load(tmp_path / "raw", normal_class="dogs")


def test_layout_by_name(mvtec):
    assert load(mvtec, layout="mvtec").layout == "mvtec"
    with pytest.raises(data.DataError, match="'mvtek' is not known.*Did you mean 'mvtec'"):
        load(mvtec, layout="mvtek")
    with pytest.raises(data.DataError, match="fit no known layout. Expected video"):
        load(mvtec, layout="video")


def test_pictures_outside_the_layout_are_named(mvtec):
    picture(mvtec / "extra/x.png")
    (mvtec / "readme.txt").write_text("hello")
    (mvtec / ".DS_Store").write_text("")
    (mvtec / "train/good/._000.png").write_bytes(b"mac")
    assert load(mvtec).notes == (
        "1 picture outside the layout 'mvtec', not used: extra/x.png.",
        "1 file skipped, not pictures: readme.txt.",
    )
