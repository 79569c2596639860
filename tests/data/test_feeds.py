"""Streaming gives the batches that data on the device gives; array_record files give the pictures of their folder."""

import builtins
import subprocess
import sys

import jax
import numpy as np
import pytest
from made import mask, pictures

from jaxad import data
from jaxad.core import Phase, take
from jaxad.data import stream
from jaxad.train import batch_rows

PASS, SHUFFLED = Phase("pass", None, batch_size=4), Phase("shuffled", None, steps=7, batch_size=4)


@pytest.mark.parametrize("phase", [PASS, SHUFFLED], ids=lambda phase: phase.name)
@pytest.mark.parametrize("options", [{}, {"clip": 3, "target": 2, "channels": 1}], ids=["pictures", "clips"])
def test_stream_equals_device(mvtec, tmp_path, phase, options):
    root = mvtec
    if options:
        root = tmp_path / "walk"
        pictures(root / "Train/Train001", 12)
        pictures(root / "Test/Test001", 7)
        for i in range(7):
            mask(root / f"Test/Test001_gt/{i:03d}.bmp", box=(i, 0, 8, 3) if i % 2 else None)
    feeds, found = stream.feeds(root, image_size=5, **options), data.load(root, image_size=5, **options)
    assert set(feeds) == set(found.sources)
    key = jax.random.key(3)
    for name in ("train", "test"):
        source, feed = found.sources[name], feeds[name]
        assert len(feed) == len(source) and feed.sample_shape == source.sample_shape
        for step, batch in enumerate(feed.batches(key, phase, 1), 1):
            index, valid = batch_rows(key, phase, step, size=len(source))
            image, label, marks = take(jax.device_put(source), np.minimum(index, len(source) - 1))
            np.testing.assert_array_equal(batch.index, index)
            np.testing.assert_array_equal(batch.valid, valid)
            np.testing.assert_array_equal(batch.image, np.rint(image * 255))
            np.testing.assert_array_equal(batch.label, label)
            np.testing.assert_array_equal(batch.mask, marks)
        assert step == (7 if phase.steps else -(-len(source) // 4)) - 1


def test_stream_goes_on_where_it_was(mvtec):
    feed, key = stream.feeds(mvtec, image_size=5)["train"], jax.random.key(0)
    whole = list(feed.batches(key, SHUFFLED, 0))
    again = list(feed.batches(key, SHUFFLED, 4))
    assert len(whole) == 7 and len(again) == 3
    jax.tree.map(np.testing.assert_array_equal, whole[4:], again)
    reader = feed.batches(key, SHUFFLED, 0)
    next(reader), next(reader)
    other = feed.batches(key, SHUFFLED, 0)
    other.set_state(reader.get_state())
    jax.tree.map(np.testing.assert_array_equal, whole[2:], list(other))


def test_stream_names_the_damaged_file(mvtec):
    feeds = stream.feeds(mvtec, image_size=5)
    (mvtec / "test/good/001.png").write_bytes(b"")
    with pytest.raises(data.DataError, match=r"test/good/001.png: the file is empty"):
        list(feeds["test"].batches(jax.random.key(0), PASS, 0))


def test_stream_without_grain(mvtec, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "grain":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'jaxad\[stream\]'"):
        stream.feeds(mvtec)


TFDS = """
import sys
import numpy as np, jax
from jaxad import data
from jaxad.data import tfds
folder, records = sys.argv[1:3]
name = tfds.prepare(folder, data_dir=records)
one, two = data.load(folder, image_size=5), data.load(name, image_size=5)
assert one.rows == two.rows, (one.rows, two.rows)
jax.tree.map(np.testing.assert_array_equal, dict(one.sources), dict(two.sources))
assert "tensorflow" not in sys.modules
print(name)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder, and the name under which it can be loaded after it was written as array_record without TensorFlow."""
    root = tmp_path_factory.mktemp("tfds")
    for part, count in (("train/good", 6), ("test/good", 2), ("test/crack", 3), ("train/crack", 1)):
        pictures(root / "bottle" / part, count)
    for i in (0, 2):
        mask(root / f"bottle/ground_truth/crack/{i:03d}_mask.png")
    command = [sys.executable, "-c", TFDS, str(root / "bottle"), str(root / "records")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return root, done.stdout.split()[-1]


def test_tfds_without_tensorflow(written):
    root, name = written
    assert name == f"tfds:{root}/records/folder_ad/bottle/1.0.0"
    assert list((root / "records").glob("**/*.array_record*"))


def test_tfds_stream_and_check(written):
    root, name = written
    feeds, found = stream.feeds(name, image_size=5), data.load(root / "bottle", image_size=5)
    batch = next(feeds["test"].batches(jax.random.key(0), Phase("pass", None, batch_size=5), 0))
    np.testing.assert_array_equal(batch.image, found.sources["test"].image)
    np.testing.assert_array_equal(batch.mask, found.sources["test"].mask)
    report = data.check(name)
    assert report.counts["test"] == {"normal": 2, "anomalous": 3, "unknown": 0, "masks": 2} and not report.problems


def test_tfds_by_name(written, monkeypatch):
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(written[0] / "records"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(written[0] / "records"))
    assert len(data.load("tfds:folder_ad/bottle", image_size=5).sources["test"]) == 5
    with pytest.raises(data.DataError, match=r"folder_ad/other: not prepared .* jaxad.data.tfds.prepare\(FOLDER\)"):
        data.load("tfds:folder_ad/other")


def test_any_other_tfds_builder(tmp_path):
    """A classification set: class names, the one-class protocol, splits."""
    import tensorflow_datasets as tfds

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(names=["cat", "dog"])
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict({"picture": tfds.features.Image(shape=(6, 8, 3)), "kind": label}),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples("train"), "test": self._generate_examples("test")}

        def _generate_examples(self, role):
            for kind in ("cat", "dog"):
                pictures(tmp_path / role / kind, 3)
                for path in sorted((tmp_path / role / kind).iterdir()):
                    yield f"{kind}{path.name}", {"picture": str(path), "kind": kind}

    builder = Pets(data_dir=tmp_path / "records", file_format="array_record")
    builder.download_and_prepare()
    found = data.load(f"tfds:{builder.data_dir}", image_size=(6, 8), normal_class="dog")
    assert {name: len(source) for name, source in found.sources.items()} == {"train": 2, "holdout": 1, "test": 6}
    assert sorted(found.rows["test"].defects) == ["cat"] * 3 + ["good"] * 3
    from PIL import Image

    dogs = {np.asarray(Image.open(path)).tobytes() for path in (tmp_path / "train/dog").iterdir()}
    assert {picture.tobytes() for picture in found.sources["train"].image} < dogs
    with pytest.raises(data.DataError, match=r"2 classes \(cat, dog\)"):
        data.load(f"tfds:{builder.data_dir}")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("tfds:nosuchset", "nosuchset: no such builder is installed"),
        ("tfds:mnist", "mnist: not prepared in .*nothing is downloaded here"),
        ("tfds:{here}", "cannot be opened"),
    ],
)
def test_tfds_that_is_not_there(tmp_path, monkeypatch, name, match):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    name = name.replace("{here}", str(tmp_path))
    with pytest.raises(data.DataError, match=match) as caught:
        data.load(name)
    assert "\n" not in str(caught.value) and data.check(name).problems == (str(caught.value),)
