"""The real sets, as published: their counts are known."""

import collections

import numpy as np
import pytest

from jaxad import data


def counts(found):
    return {name: len(source) for name, source in found.sources.items()}


def test_mvtec_bottle(shared):
    found = data.load(shared / "data/mvtec/bottle", image_size=32)
    assert counts(found) == {"train": 188, "holdout": 21, "test": 83}
    kinds = {"good": 20, "broken_large": 20, "broken_small": 22, "contamination": 21}
    assert collections.Counter(found.rows["test"].defects) == kinds
    assert found.sources["test"].label.sum() == 63 and found.sources["test"].mask[:63].any(axis=(1, 2)).all()
    assert found.notes == ("2 files skipped, not pictures: license.txt, readme.txt.",)


def test_mvtec_screw_is_grey(shared):
    found = data.load(shared / "data/mvtec/screw", image_size=256)
    assert counts(found) == {"train": 288, "holdout": 32, "test": 160} and all(found.rows["test"].has_mask)
    image = found.sources["test"].image
    assert image.shape == (160, 256, 256, 3) and (image[..., 0] == image[..., 2]).all()
    assert min(mask.sum() for mask in found.sources["test"].mask if mask.any()) == 65


def test_mvtec_at_full_size(shared):
    found = data.load(shared / "data/mvtec_fullres_sample/bottle", image_size=128)
    assert counts(found) == {"train": 1, "holdout": 1, "test": 3} and found.sources["test"].mask.sum() > 100


def test_mvtec_with_few_masks(shared):
    found = data.load(shared / "data/mvtec_leather_sample", image_size=32)
    assert found.layout == "mvtec" and counts(found) == {"train": 3, "holdout": 1, "test": 24}
    assert sum(found.rows["test"].has_mask) == 11 + 4 and "9 anomalous pictures without a mask" in found.notes[0]


def test_magnetic_tile(shared):
    found = data.load(shared / "data/magnetic_tile/split.csv", image_size=128)
    assert found.layout == "manifest" and counts(found) == {"train": 270, "holdout": 30, "test": 452}
    kinds = {"MT_Blowhole": 115, "MT_Break": 85, "MT_Crack": 57, "MT_Fray": 32, "MT_Uneven": 103, "good": 60}
    assert collections.Counter(found.rows["test"].defects) == kinds
    rows = found.rows["test"]
    bare = {file.split("/")[-1][:-4] for file, has in zip(rows.files, rows.has_mask, strict=True) if not has}
    assert bare >= {"exp3_num_45042", "exp4_num_124690", "exp4_num_352527", "exp4_num_45057"} and len(bare) <= 6


def test_mnist(shared):
    found = data.load(shared / "data/mnist", image_size=28, channels=1, normal_class=8, holdout=0.1)
    assert counts(found) == {"train": 5266, "holdout": 585, "test": 10_000}  # 5,851 eights to train on, 974 to test
    assert (found.sources["test"].label == 0).sum() == 974 and found.rows["test"].defects[0] == "7"
    assert found.sources["test"].image[0].sum() == 18_454  # the first test picture, as everyone has it


def test_cifar_in_a_zip(shared):
    found = data.load(shared / "data/cifar10_jpeg", image_size=32, normal_class="frog")
    assert found.layout == "classes" and counts(found) == {"train": 360, "holdout": 40, "test": 2000}
    assert (found.sources["test"].label == 0).sum() == 200


@pytest.mark.parametrize("clip", [None, 16])
def test_ucsd_ped2(shared, clip):
    found = data.load(shared / "data/ucsd_ped2", image_size=32, channels=1, clip=clip, target=8 if clip else 0)
    frames = {name: len(source.image) for name, source in found.sources.items()}
    assert frames["train"] + frames["holdout"] == 540 and frames["test"] == 540
    assert (found.sources["test"].label == 1).sum() == 356
    lost = {name: len(set(rows.groups)) * 15 if clip else 0 for name, rows in found.rows.items()}
    assert counts(found) == {name: frames[name] - lost[name] for name in frames}
    if clip:
        test, rows = found.sources["test"], found.rows["test"]
        targets = [f"testing/frames/01/{i:03d}.jpg" for i in range(8, 173)]
        assert list(rows.files[:165]) == targets
        named = np.array(rows.defects) == "anomalous"
        np.testing.assert_array_equal(test.label[test.start + test.target], named)


@pytest.mark.parametrize("name", ["mvtec/bottle", "mvtec/screw", "magnetic_tile", "ucsd_ped2", "mvtec_leather_sample"])
def test_check_finds_nothing_wrong(shared, name):
    assert data.check(shared / "data" / name).problems == ()


def test_hint_for_the_folder_above(shared):
    with pytest.raises(data.DataError, match=r"mvtec: holds 2 data sets \(bottle, screw\)"):
        data.load(shared / "data/mvtec")
