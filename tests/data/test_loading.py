"""Splits, the cache, the fingerprint and the device."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from made import mask, picture, pictures

from jaxad import data
from jaxad.core import take
from jaxad.data import cache, decode


def test_holdout_is_a_stable_choice(tmp_path):
    pictures(tmp_path / "train/good", 40)
    held = [set(data.load(tmp_path, image_size=4, seed=seed).rows["holdout"].files) for seed in (0, 0, 1)]
    assert len(held[0]) == 4 and held[0] == held[1] != held[2]
    pictures(tmp_path / "train/good", 10, first=40)
    more = set(data.load(tmp_path, image_size=4, holdout=0.08).rows["holdout"].files)
    assert len(more & held[0]) >= 2  # a new picture displaces few old ones


def test_holdout_shares(mvtec):
    assert "holdout" not in data.load(mvtec, image_size=4, holdout=0).sources
    assert len(data.load(mvtec, image_size=4, holdout=0.001).sources["holdout"]) == 1
    assert len(data.load(mvtec, image_size=4, holdout=0.99).sources["train"]) == 1


def test_no_test_picture_is_trained_on(tmp_path):
    """Marked pictures: grey levels tell where each came from."""
    for role, level in (("train/good", 10), ("test/good", 200), ("test/crack", 250), ("train/crack", 90)):
        for i in range(12):
            picture(tmp_path / role / f"{i}.bmp", size=(1, 1), mode="L")
            (tmp_path / role / f"{i}.bmp").unlink()
            from PIL import Image

            Image.new("L", (3, 3), level).save(tmp_path / role / f"{i}.png")
    found = data.load(tmp_path, image_size=3)
    levels = {name: set(np.unique(source.image)) for name, source in found.sources.items()}
    assert levels == {"train": {10}, "holdout": {10}, "test": {200, 250}, "labelled": {90}}
    assert "source 'labelled'" in " ".join(found.notes)


def test_vanishing_and_empty_masks(mvtec):
    mask(mvtec / "ground_truth/crack/000_mask.png", box=(0, 0, 1, 1))
    mask(mvtec / "ground_truth/crack/001_mask.png", box=None)
    found = data.load(mvtec, image_size=(3, 4))
    assert found.rows["test"].has_mask == (False, False, True, True, True)
    assert found.notes == (
        "1 anomalous picture with an empty mask, left out of pixel metrics: test/crack/001.png.",
        "1 mask lost all pixels when resized, left out of pixel metrics: test/crack/000.png.",
    )


def test_sources_work_on_the_device(mvtec):
    found = data.load(mvtec, image_size=8).to_device()
    test = found.sources["test"]
    assert isinstance(test.image, jax.Array) and test.image.dtype == "uint8" and len(test) == 5
    image, label, marks = jax.jit(take)(test, np.array([0, 4]))
    assert image.shape == (2, 8, 8, 3) and marks[0].any() and not marks[1].any()
    np.testing.assert_array_equal(label, [1, 0])


@pytest.fixture
def cached(mvtec, tmp_path, monkeypatch):
    monkeypatch.setenv("JAXAD_CACHE", str(tmp_path / "cache"))
    read = []
    real = decode.open_picture
    monkeypatch.setattr(decode, "open_picture", lambda store, name: (read.append(name), real(store, name))[1])
    return mvtec, tmp_path / "cache/data", read


def same(one, two):
    assert one.rows == two.rows and one.fingerprint == two.fingerprint and one.notes == two.notes
    jax.tree.map(np.testing.assert_array_equal, dict(one.sources), dict(two.sources))


def test_second_load_reads_no_picture(cached):
    root, folder, read = cached
    first = data.load(root, image_size=8)
    assert len(read) == 14 and len(list(folder.iterdir())) == 1
    read.clear()
    same(first, data.load(root, image_size=8))
    data.load(root, image_size=8, holdout=0.5, seed=3)  # other roles, the same pictures
    assert not read


@pytest.mark.parametrize("options", [{"image_size": 9}, {"channels": 1}])
def test_other_settings_are_other_entries(cached, options):
    root, folder, read = cached
    data.load(root, image_size=8)
    read.clear()
    data.load(root, **{"image_size": 8, **options})
    assert len(read) == 14 and len(list(folder.iterdir())) == 2


def test_changed_file_is_read_again(cached):
    root, _, read = cached
    before = data.load(root, image_size=8)
    picture(root / "test/good/000.png", seed=99)
    read.clear()
    after = data.load(root, image_size=8)
    assert read and before.fingerprint != after.fingerprint
    assert (before.sources["test"].image != after.sources["test"].image).any()
    mask(root / "ground_truth/crack/000_mask.png", box=(0, 0, 2, 2))
    assert data.load(root, image_size=8).sources["test"].mask[0].sum() != after.sources["test"].mask[0].sum()


@pytest.mark.parametrize("name", ["image.npy", "facts.json"])
def test_damaged_entry_is_made_again(cached, name):
    root, folder, read = cached
    first = data.load(root, image_size=8)
    path = next(folder.glob(f"*/{name}"))
    path.write_bytes(path.read_bytes()[:50])
    read.clear()
    same(first, data.load(root, image_size=8))
    assert len(read) == 14
    read.clear()
    same(first, data.load(root, image_size=8))
    assert not read and not list(folder.glob("tmp-*"))


def test_cache_that_cannot_be_written(cached, monkeypatch):
    root, folder, _ = cached
    folder.parent.write_text("a file where the folder should be")
    assert len(data.load(root, image_size=8).sources["test"]) == 5


def test_full_disk_leaves_nothing_behind(cached, monkeypatch):
    root, folder, _ = cached
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert len(data.load(root, image_size=8).sources["test"]) == 5
    assert not list(folder.iterdir())


def test_old_entries_make_room(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXAD_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_LIMIT", 25_000)
    for i, key in enumerate("abc"):
        cache.write(key, {"x": np.zeros(10_000, np.uint8)}, i)
        os.utime(tmp_path / "data" / key, (i, i))
    assert cache.read("a") is None and cache.read("b")[1] == 1 and cache.read("c")[1] == 2


def test_cache_off(mvtec, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JAXAD_CACHE", "off")
    data.load(mvtec, image_size=8)
    assert not (tmp_path / "home").exists()
    monkeypatch.delenv("JAXAD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    data.load(mvtec, image_size=8)
    assert list((tmp_path / "home/.cache/jaxad/data").iterdir())


def test_fingerprint(mvtec, tmp_path):
    base = data.load(mvtec, image_size=8).fingerprint
    mvtec.rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere"
    assert data.load(moved, image_size=8).fingerprint == base
    for options in ({"image_size": 9}, {"channels": 1}, {"seed": 1}, {"holdout": 0.5}):
        assert data.load(moved, **{"image_size": 8, **options}).fingerprint != base
    (moved / "test/crack").rename(moved / "test/scratch")
    (moved / "ground_truth/crack").rename(moved / "ground_truth/scratch")
    assert data.load(moved, image_size=8).fingerprint != base


def test_check_agrees_with_load(mvtec):
    (mvtec / "ground_truth/crack/001_mask.png").unlink()
    report, found = data.check(mvtec), data.load(mvtec, image_size=8)
    assert report.layout == found.layout and report.notes == found.notes and report.problems == ()
    for name, source in found.sources.items():
        counts = report.counts[name]
        assert counts["normal"] == (source.label == 0).sum() and counts["anomalous"] == (source.label == 1).sum()
    assert report.counts["test"]["masks"] == 2 and report.defects == {"crack": 3}
    assert report.sizes == {(8, 6): 11} and report.modes == {"RGB": 11}
    text = str(report)
    assert "layout mvtec" in text and "8 x 6 (11)" in text and "RGB, 8 bits (11)" in text and "no problems" in text


def test_import_is_light():
    code = (
        "import sys, jaxad.data; print([m for m in ('jax', 'PIL', 'grain', 'tensorflow_datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
