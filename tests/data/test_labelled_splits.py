"""Labelled pictures: drawn by name and seed, given to training, and never tested on."""

import dataclasses

import numpy as np
import pytest
from made import mask, pictures

from jaxad import data, settings
from jaxad.data.arrays import from_arrays
from jaxad.data.labels import move_labelled


@pytest.fixture
def kinds(mvtec):
    """Three cracks and four dents with masks, five scratches without."""
    pictures(mvtec / "test/dent", 4)
    for i in range(4):
        mask(mvtec / f"ground_truth/dent/{i:03d}_mask.png", box=(0, 0, 1 + i, 2))
    return mvtec


def load(where, **options):
    return data.load(where, image_size=(6, 8), holdout=0, **options)


def test_labelled_pictures_leave_the_test_set_with_their_masks(kinds):
    whole, found = load(kinds), load(kinds, labels_per_type=2)
    labelled, test = found.rows["labelled"], found.rows["test"]
    assert sorted(labelled.defects) == ["crack"] * 2 + ["dent"] * 2 and sorted(test.files) == sorted(
        set(whole.rows["test"].files) - set(labelled.files)
    )
    for role in ("labelled", "test"):
        source, rows = found.sources[role], found.rows[role]
        where = [whole.rows["test"].files.index(name) for name in rows.files]
        for part in ("image", "label", "mask"):
            np.testing.assert_array_equal(getattr(source, part), getattr(whole.sources["test"], part)[where])
        assert rows.has_mask == tuple(whole.rows["test"].has_mask[i] for i in where)
    np.testing.assert_array_equal(found.sources["train"].image, whole.sources["train"].image)
    assert found.sources["labelled"].mask.any(axis=(1, 2)).all() and (found.sources["labelled"].label == 1).all()
    assert found.fingerprint != whole.fingerprint and "4 anomalous test pictures of 2 types" in found.notes[-1]


def test_the_draw_follows_names_and_seed_only(kinds):
    drawn = [load(kinds, labels_per_type=1, seed=seed).rows["labelled"].files for seed in range(6)]
    assert len(set(drawn)) > 1 and drawn[0] == load(kinds, labels_per_type=1, seed=0).rows["labelled"].files
    assert drawn[0] == data.load(kinds, image_size=4, channels=1, labels_per_type=1).rows["labelled"].files
    more = load(kinds, labels_per_type=2, seed=0).rows["labelled"].files
    assert set(drawn[0]) < set(more)


def test_a_picture_of_each_type_stays_to_be_tested(kinds):
    found = load(kinds, labels_per_type=50)
    assert sorted(found.rows["labelled"].defects) == ["crack"] * 2 + ["dent"] * 3
    assert sorted(d for d in found.rows["test"].defects if d != "good") == ["crack", "dent"]


def test_a_total_is_spread_over_the_types(kinds):
    assert sorted(load(kinds, labels_total=2).rows["labelled"].defects) == ["crack", "dent"]
    assert len(load(kinds, labels_total=3).rows["labelled"]) == 3
    assert len(load(kinds, labels_total=99).rows["labelled"]) == 5
    assert len(load(kinds, labels_per_type=1, labels_total=99).rows["labelled"]) == 2


def test_nothing_moves_where_nothing_can(kinds):
    whole = load(kinds)
    assert "labelled" not in whole.sources and load(kinds, labels_total=0).fingerprint == whole.fingerprint
    pixels = np.zeros((4, 6, 8, 3), np.uint8)
    own = from_arrays(pixels, test=pixels, test_mask=np.ones((4, 6, 8)), labelled=pixels[:1])
    assert move_labelled(own, per_type=2) is own
    unmarked = from_arrays(pixels, test=pixels, test_label=[0, 1, 1, 1])
    assert move_labelled(unmarked, per_type=2) is unmarked
    marked = from_arrays(pixels, test=pixels, test_mask=np.ones((4, 6, 8)))
    assert len(move_labelled(marked, per_type=2).rows["labelled"]) == 2
    clips = dataclasses.replace(marked.sources["test"], start=np.arange(3), clip=2)
    videos = dataclasses.replace(marked, sources={**marked.sources, "test": clips})
    assert move_labelled(videos, per_type=2) is videos
    with pytest.raises(ValueError, match=r"labels_per_type=-1, labels_total=None; expected at least 0"):
        load(kinds, labels_per_type=-1)


def test_settings_know_them():
    chosen = settings.from_json({"method": "memae", "labels_per_type": 3})
    assert chosen.load_arguments() == {"labels_per_type": 3}
    with pytest.raises(ValueError, match="labels_total is 'all'; expected a whole number"):
        settings.from_json({"method": "memae", "labels_total": "all"})
