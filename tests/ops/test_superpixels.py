"""SLIC: on what pictures its superpixels are known, what holds on any picture, and what is read off the labels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.ops import superpixels

slic = superpixels.slic


def home(height, width, rows, columns):
    """The label of each pixel's home cell."""
    y, x = np.indices((height, width))
    return y // (height // rows) * columns + x // (width // columns)


def textures(size, seed=0):
    """Smooth colours, hard edges and noise: (3, size, size, 3)."""
    numbers = np.random.default_rng(seed)
    y, x = np.indices((size, size)) / size
    smooth = np.stack([np.sin(5 * y + c) * np.cos(4 * x - c) for c in range(3)], axis=-1) / 2 + 0.5
    blocks = np.kron(numbers.uniform(size=(size // 8, size // 8, 3)), np.ones((8, 8, 1)))
    return np.stack([smooth, blocks, numbers.uniform(size=(size, size, 3))]).astype(np.float32)


def reference(image, rows, columns, compactness, iterations):
    """SLIC pixel by pixel and superpixel by superpixel, in float64; the colours are scikit-image's."""
    from skimage.color import rgb2lab

    lab = rgb2lab(np.asarray(image, np.float64))
    height, width, _ = lab.shape
    y, x = np.indices((height, width))
    weight = compactness / np.sqrt(height * width / (rows * columns))
    features = np.concatenate([lab, weight * np.stack([y, x], axis=-1)], axis=-1)
    cell_y, cell_x = y // (height // rows), x // (width // columns)
    labels = cell_y * columns + cell_x
    centres = np.zeros((rows * columns, 5))
    for _ in range(iterations):
        for k in range(rows * columns):
            if (labels == k).any():
                centres[k] = features[labels == k].mean(axis=0)
        distance, near = np.full((height, width), np.inf), labels.copy()
        for k in range(rows * columns):
            beside = (abs(cell_y - k // columns) <= 1) & (abs(cell_x - k % columns) <= 1)
            own = ((features - centres[k]) ** 2).sum(axis=-1)
            near = np.where(beside & (own < distance), k, near)
            distance = np.where(beside, np.minimum(own, distance), distance)
        labels = near
    return labels


@pytest.mark.parametrize("shape, grid", [((32, 32), 4), ((24, 40), (3, 5)), ((16, 16), 1)])
def test_a_picture_of_one_colour_keeps_its_home_cells(shape, grid):
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    labels = slic(jnp.full((2, *shape, 3), 0.4), grid=grid)
    np.testing.assert_array_equal(labels[1], home(*shape, rows, columns))


def test_no_superpixel_spans_a_hard_edge():
    """An edge within, beside and on a border of cells, at three contrasts; 256x256, as the sizes of cells matter."""
    pictures, halves = [], []
    for column in (120, 121, 127, 128, 133):
        for low, high in ((0.4, 0.6), (0.25, 0.78), (0.1, 0.93)):  # L differs by about 20, 50 and 80
            is_right = np.arange(256) >= column
            pictures.append(np.broadcast_to(np.where(is_right, high, low)[None, :, None], (256, 256, 3)))
            halves.append(np.broadcast_to(is_right, (256, 256)))
    labels = np.asarray(slic(jnp.asarray(np.stack(pictures), jnp.float32), grid=16))
    for own, is_right in zip(labels, halves, strict=True):
        assert not set(own[is_right]) & set(own[~is_right])


@pytest.mark.parametrize("grid", [4, 8])
def test_labels_stay_beside_home_and_count_every_pixel(grid):
    labels = np.asarray(slic(jnp.asarray(textures(64)), grid=grid))
    own = home(64, 64, grid, grid)
    assert labels.min() >= 0 and labels.max() < grid**2
    assert (abs(labels // grid - own // grid) <= 1).all() and (abs(labels % grid - own % grid) <= 1).all()
    sizes = superpixels.segment_means(jnp.ones(labels.shape), jnp.asarray(labels), grid=grid)[1]
    np.testing.assert_array_equal(sizes.sum(axis=1), 64 * 64)
    assert (labels[2] != own).mean() > 0.05  # they did move


def test_labels_are_those_of_the_slow_version():
    """All but the few pixels that are as near to another superpixel, but for rounding."""
    pytest.importorskip("skimage")
    images = textures(48)[:, :, :36]
    labels = np.asarray(slic(jnp.asarray(images), grid=(4, 3), iterations=4))
    for own, image in zip(labels, images, strict=True):
        assert (own == reference(image, 4, 3, 10.0, 4)).mean() > 0.995


def test_pictures_do_not_see_each_other_and_grey_ones_are_taken():
    images = jnp.asarray(textures(32))
    together = slic(images, grid=4)
    for row in range(3):
        np.testing.assert_array_equal(slic(images[row : row + 1], grid=4)[0], together[row])
    grey = images[..., :1]
    np.testing.assert_array_equal(slic(grey, grid=4), slic(jnp.repeat(grey, 3, axis=-1), grid=4))


def test_compactness_may_be_traced_and_draws_superpixels_to_the_grid():
    images = jnp.asarray(textures(64)[2:])
    loose, tight = (np.asarray(slic(images, grid=8, compactness=c)) for c in (1.0, 1000.0))
    own = home(64, 64, 8, 8)
    assert (tight == own).mean() > 0.95 > 0.6 > (loose == own).mean()


def test_agrees_with_scikit_image_on_where_colours_change():
    """Not label by label: of the pixels beside which the picture's colour jumps, both put a border at nearly all."""
    segmentation = pytest.importorskip("skimage.segmentation")
    image = np.kron(np.random.default_rng(3).uniform(size=(4, 4, 3)), np.ones((24, 24, 1))).astype(np.float32)
    theirs = segmentation.slic(image, n_segments=64, compactness=10, max_num_iter=10, start_label=0)
    ours = np.asarray(slic(jnp.asarray(image[None]), grid=8))[0]
    jumps = (image[:, 1:] != image[:, :-1]).any(axis=-1)
    for labels in (theirs, ours):
        assert (labels[:, 1:] != labels[:, :-1])[jumps].mean() > 0.95


def parts_of(mask):
    label = pytest.importorskip("scipy.ndimage").label
    return label(mask)[1]


def test_the_largest_parts_are_kept_and_the_others_given_away():
    """A 1 in two parts and a 2 around them: the small part is given to what it touches."""
    torn = np.full((6, 8), 2)
    torn[1:3, 1:5], torn[4, 6], torn[5] = 1, 1, 0
    whole = superpixels.keep_largest(jnp.asarray(torn, jnp.int32), count=4)
    expected = np.where((torn == 1) & (np.indices((6, 8))[0] == 4), 2, torn)
    np.testing.assert_array_equal(whole, expected)


def test_connected_superpixels_of_noise():
    images = jnp.asarray(textures(64)[2:])
    torn = np.asarray(slic(images, grid=8, compactness=3.0))[0]
    whole = np.asarray(slic(images, grid=8, compactness=3.0, connectivity="largest"))[0]
    assert max(parts_of(torn == k) for k in range(64)) > 3
    assert max(parts_of(whole == k) for k in range(64)) == 1 and set(np.unique(whole)) == set(np.unique(torn))
    assert (torn != whole).any() and all(((torn == k) & (whole == k)).any() for k in np.unique(torn))


def test_colours_divide_the_picture():
    labels = slic(jnp.asarray(textures(64)), grid=8)
    for colours in (2, 3, 4):
        classes = np.asarray(superpixels.colour_classes(labels, grid=8, colours=colours))
        assert set(np.unique(classes)) == set(range(colours**2))
        for k in range(64):
            expected = k // 8 % colours * colours + k % 8 % colours
            assert (classes[np.asarray(labels) == k] == expected).all()


def test_three_colours_leave_two_cells_between_superpixels_of_one_class():
    """Exact where superpixels are their home cells: the nearest hidden pixels are 2S + 1 apart."""
    labels = jnp.asarray(home(32, 32, 8, 8))[None]
    classes = np.asarray(superpixels.colour_classes(labels, grid=8, colours=3))[0]
    columns = np.flatnonzero(classes[0] == classes[0, 0])
    assert np.diff(columns).max() == 2 * 4 + 1


def test_means_over_superpixels_and_back():
    numbers = np.random.default_rng(0)
    labels = numbers.integers(0, 15, (2, 6, 10)).astype(np.int32)
    labels[labels == 7] = 3  # an empty one
    values = numbers.normal(size=(2, 6, 10)).astype(np.float32)
    means, sizes = superpixels.segment_means(jnp.asarray(values), jnp.asarray(labels), grid=(3, 5))
    for row in range(2):
        for k in range(15):
            mine = values[row][labels[row] == k]
            assert sizes[row, k] == mine.size
            np.testing.assert_allclose(means[row, k], mine.mean() if mine.size else 0, atol=1e-6)
    painted = superpixels.paint(means, jnp.asarray(labels))
    np.testing.assert_array_equal(painted[1, 2, 3], means[1, labels[1, 2, 3]])


@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_masks_grow_by_a_square(pixels):
    mask = np.random.default_rng(1).uniform(size=(2, 9, 11)) < 0.05
    wide = np.asarray(superpixels.dilate(jnp.asarray(mask), pixels=pixels))
    for picture, y, x in np.ndindex(mask.shape):
        near = mask[picture, max(y - pixels, 0) : y + pixels + 1, max(x - pixels, 0) : x + pixels + 1]
        assert wide[picture, y, x] == near.any()


@pytest.mark.parametrize(
    "options, shape, message",
    [
        ({"grid": 5}, (1, 32, 32, 3), "a grid of 5x5 does not divide pictures of 32x32.*of 35x35"),
        ({"grid": 0}, (1, 32, 32, 3), "a grid of 0x0"),
        ({"grid": 4}, (1, 32, 32, 2), "images have 2 channels; expected 3"),
        ({"grid": 4, "connectivity": "all"}, (1, 32, 32, 3), "connectivity='all' is unknown"),
    ],
)
def test_what_cannot_work_is_refused(options, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(slic, **options), jnp.zeros(shape))
