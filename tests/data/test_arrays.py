"""Data sets from arrays."""

import numpy as np
import pytest

from jaxad import data

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (10, 6, 8, 3), np.uint8)


def test_arrays():
    mask = np.zeros((4, 6, 8), bool)
    mask[1, 2:4, 3:5] = True
    found = data.from_arrays(PICTURES, test=PICTURES[:4], test_mask=mask, names=["a", "b", "c", "d"], holdout=0.2)
    assert {name: len(source) for name, source in found.sources.items()} == {"train": 8, "holdout": 2, "test": 4}
    np.testing.assert_array_equal(found.sources["test"].image, PICTURES[:4])
    np.testing.assert_array_equal(found.sources["test"].label, [0, 1, 0, 0])
    np.testing.assert_array_equal(found.sources["test"].mask, mask)
    assert found.rows["test"].files == ("a", "b", "c", "d")
    trained = [int(name[-5:]) for name in found.rows["train"].files]
    np.testing.assert_array_equal(found.sources["train"].image, PICTURES[trained])


def test_floats_and_grey():
    floats = PICTURES[..., :1] / np.float32(255)
    found = data.from_arrays(floats, test=PICTURES[..., 0], test_label=[0, 1] * 5, holdout=PICTURES[..., 1])
    assert found.sources["train"].image.shape == (10, 6, 8, 1) and len(found.sources["holdout"]) == 10
    np.testing.assert_array_equal(found.sources["train"].image, PICTURES[..., :1])
    np.testing.assert_array_equal(found.sources["test"].image, found.sources["train"].image)


def test_classes_of_pixels_follow_their_pictures():
    classes = RNG.integers(0, 256, (10, 6, 8))
    found = data.from_arrays(PICTURES, train_classes=classes, holdout=0.2)
    trained = [int(name[-5:]) for name in found.rows["train"].files]
    np.testing.assert_array_equal(found.sources["train"].mask, classes[trained])
    assert found.sources["train"].mask.dtype == np.uint8 and found.sources["holdout"].mask is None
    half = data.from_arrays(PICTURES, train_classes=classes, holdout=PICTURES[:2], image_size=(3, 4))
    np.testing.assert_array_equal(half.sources["train"].mask, classes[:, 1::2, 1::2])  # never a mean of two classes
    other = data.from_arrays(PICTURES, train_classes=classes[::-1], holdout=0.2)
    assert len({found.fingerprint, other.fingerprint, data.from_arrays(PICTURES, holdout=0.2).fingerprint}) == 3
    for wrong, message in (
        (classes[:9], r"train_classes has shape \(9, 6, 8\); expected \(10, 6, 8\)"),
        (classes / 255, "train_classes has float64 .* expected whole numbers"),
        (classes - 300, "expected whole numbers in .0, 255."),
    ):
        with pytest.raises(data.DataError, match=message):
            data.from_arrays(PICTURES, train_classes=wrong)


def test_load_takes_arrays_and_resizes_them():
    found = data.load(
        {"train": PICTURES, "labelled": PICTURES[:2], "labelled_mask": np.ones((2, 6, 8))}, image_size=(3, 4)
    )
    own = data.load({"train": PICTURES, "holdout": PICTURES[:3]}, image_size=4)
    assert len(own.sources["train"]) == 10 and len(own.sources["holdout"]) == 3
    assert found.sources["train"].image.shape == (9, 3, 4, 3) and found.sources["labelled"].mask.all()
    assert data.load(PICTURES, image_size=4, channels=1).sources["train"].image.shape == (9, 4, 4, 1)


def test_content_makes_the_fingerprint():
    changed = PICTURES.copy()
    changed[3, 2, 1, 0] ^= 1
    prints = [data.from_arrays(array).fingerprint for array in (PICTURES, PICTURES.copy(), changed)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"train": PICTURES[0, 0]}, r"train has shape \(8, 3\); expected .*array\[None\]"),
        ({"train": PICTURES.transpose(0, 3, 1, 2)}, r"train has shape \(10, 3, 6, 8\).*transpose\(0, 2, 3, 1\)"),
        ({"train": PICTURES[:0]}, "N > 0"),
        ({"train": PICTURES.astype(np.int64)}, "train has type int64; expected uint8"),
        ({"train": PICTURES.astype(float)}, r"train has floats from 0 to 255; expected \[0, 1\]"),
        ({"train": PICTURES / 255 * np.nan}, "train has floats"),
        ({"train": PICTURES, "test": PICTURES[:, :5]}, "differ in picture size"),
        ({"train": PICTURES, "test": PICTURES, "test_label": [0, 1]}, r"test_label has shape \(2,\); expected \(10,\)"),
        ({"train": PICTURES, "test": PICTURES, "test_label": [2] * 10}, "of 0, 1 and -1"),
        ({"train": PICTURES, "test": PICTURES, "test_mask": PICTURES[..., 0][:3]}, r"test_mask has shape \(3, 6, 8\)"),
        ({"train": PICTURES, "test": PICTURES, "names": ["a"] * 10}, "names has 10 entries, 1 different"),
    ],
)
def test_wrong_arrays(arguments, match):
    with pytest.raises(data.DataError, match=match):
        data.from_arrays(**arguments)
