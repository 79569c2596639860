"""Made pictures: the same from the same seed, masks that say what was changed, and how hard they are."""

import jax
import numpy as np
import pytest
from scipy import ndimage

import jaxad.data
from jaxad import metrics
from jaxad.data import synthetic

SHAPE = (32, 32, 3)
KEYS = jax.random.split(jax.random.key(11), 64)


def pairs(family, shape=SHAPE, keys=KEYS):
    """The pictures of some keys without and with a defect, masks and kinds."""
    return synthetic._draw(synthetic.normal, keys, family, shape), *synthetic._draw(
        synthetic.sample, keys, family, shape
    )


@pytest.fixture(scope="module", params=synthetic.FAMILIES)
def made(request):
    return request.param, *pairs(request.param)


def small(**options):
    return synthetic.load(
        **{"image_size": 32, "num_train": 20, "num_test_normal": 6, "num_test_anomalous": 10, **options}
    )


def test_masks_are_what_changed(made):
    """A mask is every pixel that differs from the twin's by the stated level, with gaps of up to 2 pixels closed."""
    _, normal, anomalous, masks, _ = made
    visible = np.abs(anomalous.astype(int) - normal).max(-1) >= synthetic.VISIBLE
    assert (visible.sum((1, 2)) >= 2).all()
    assert not (visible & (masks == 0)).any()
    closed = [ndimage.binary_closing(np.pad(v, 1), np.ones((3, 3)))[1:-1, 1:-1] for v in visible]
    np.testing.assert_array_equal(masks, closed)
    assert masks.dtype == np.uint8 and masks.mean() < 0.2


def test_every_kind_of_defect_occurs_near_the_middle(made):
    family, _, _, masks, kinds = made
    assert set(kinds) == set(range(6)) == set(range(len(set(synthetic.defects(family)))))
    away = [np.abs(np.argwhere(mask).mean(0) + 0.5 - 16).max() for mask in masks]
    assert max(away) < 0.45 * 32  # on the object, where there is one


def test_normal_pictures_vary_and_use_the_range(made):
    _, normal, *_ = made
    assert normal.dtype == np.uint8 and normal.shape == (64, *SHAPE)
    assert normal.mean((1, 2, 3)).std() > 5  # brightness
    assert normal.astype(float).std((1, 2)).mean() > 10  # structure
    assert np.mean((normal == 0) | (normal == 255)) < 0.02  # little is cut off


def test_families_differ():
    means = np.array([pairs(family)[0].mean(0) for family in synthetic.FAMILIES])
    apart = np.abs(means[:, None] - means[None]).mean((2, 3, 4))
    assert apart[~np.eye(len(means), dtype=bool)].min() > 8


def test_the_same_picture_at_every_size():
    large = pairs("object", (64, 64, 3), KEYS[:32])
    little = pairs("object", SHAPE, KEYS[:32])
    pooled = large[0].reshape(32, 32, 2, 32, 2, 3).mean((2, 4))
    noise_and_edges = np.abs(pooled - little[0]).mean()
    assert noise_and_edges < 6 < np.abs(pooled - np.roll(little[0], 1, axis=0)).mean()
    np.testing.assert_array_equal(large[3], little[3])


def test_grey_pictures_have_masks_of_their_own():
    normal, anomalous, masks, _ = pairs("brushed", (32, 24, 1))
    assert normal.shape == (64, 32, 24, 1) and masks.shape == (64, 32, 24)
    visible = np.abs(anomalous.astype(int) - normal)[..., 0] >= synthetic.VISIBLE
    assert (masks[visible] == 1).all() and (visible.sum((1, 2)) >= 2).all()


def test_load_packs_what_was_drawn():
    data = small(holdout=0.2)
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 16, "holdout": 4, "test": 16}
    test, rows = data.sources["test"], data.rows["test"]
    np.testing.assert_array_equal(test.label, [0] * 6 + [1] * 10)
    np.testing.assert_array_equal(np.asarray(test.mask).any((1, 2)), test.label == 1)
    assert all((defect == "good") == (label == 0) for defect, label in zip(rows.defects, test.label, strict=True))
    assert all(defect in file for defect, file in zip(rows.defects, rows.files, strict=True))
    files = [file for part in data.rows.values() for file in part.files]
    assert len(set(files)) == 36 and all(rows.has_mask)
    assert not np.asarray(data.sources["train"].label).any()
    pictures = np.concatenate([source.image for source in data.sources.values()])
    assert len(np.unique(pictures.reshape(36, -1), axis=0)) == 36


def test_the_seed_decides_every_byte():
    one, same, other = small(seed=3), small(seed=3), small(seed=4)
    jax.tree.map(np.testing.assert_array_equal, one.sources, same.sources)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert one.rows == same.rows
    more = small(seed=3, num_train=30)
    np.testing.assert_array_equal(more.sources["test"].image, one.sources["test"].image)


def test_load_by_name_and_without_a_holdout():
    assert list(synthetic.FAMILIES)[0] == "brushed"
    named, default = (jaxad.data.load(name, image_size=16, holdout=0) for name in ("synthetic:brushed", "synthetic"))
    assert named.fingerprint == default.fingerprint and set(named.sources) == {"train", "test"}
    assert jaxad.data.load("synthetic:wood", image_size=16, holdout=0).fingerprint != named.fingerprint
    assert len(named.sources["train"]) == 256 and len(named.sources["test"]) == 128


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "velvet"}, "synthetic:velvet is unknown; expected one of brushed, woven"),
        ({"image_size": 8}, "image_size=8 is too small"),
        ({"channels": 2}, "channels is 2"),
        ({"num_train": 1}, "num_train=1"),
        ({"num_test_anomalous": -1}, "num_test_anomalous=-1"),
    ],
)
def test_misuse_is_explained(options, words):
    with pytest.raises(ValueError, match=words):
        small(**options)


def test_grey_levels_tell_little_and_a_model_of_the_surface_much():
    """Chance is 0.5. A linear model of 16 components stands in for a trained autoencoder. 1.0 would leave no room."""
    data = synthetic.load(num_test_normal=96, num_test_anomalous=160, holdout=0)
    train, test = (np.asarray(data.sources[name].image) / 255.0 for name in ("train", "test"))
    label, mean = np.asarray(data.sources["test"].label), train.mean(0)

    def auroc(scores):
        return metrics.image_metrics(scores, label)["auroc"]

    for statistic in (np.mean, np.std, np.max, np.min):
        assert 0.35 < auroc(statistic(test, axis=(1, 2, 3))) < 0.65
    assert auroc(worst(test - mean)) < 0.75  # the distance to the mean picture
    flat = (test - mean).reshape(len(test), -1)
    basis = np.linalg.svd((train - mean).reshape(len(train), -1), full_matrices=False)[2][:16]
    residual = (flat - flat @ basis.T @ basis).reshape(test.shape)
    assert 0.88 < auroc(worst(residual)) < 0.99


def worst(residual):
    """The largest squared residual of each picture, smoothed. (N, H, W, C) -> (N,)"""
    return ndimage.gaussian_filter((residual**2).mean(-1), (0, 1, 1)).max((1, 2))
