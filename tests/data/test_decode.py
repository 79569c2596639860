"""Files of every kind become the right grey levels."""

import numpy as np
import pytest
from PIL import Image

from jaxad.data import DataError, decode, files


def read(path, size, channels=3):
    return decode.picture(files.Folder(path.parent), path.name, size, channels)


def ramp(height, width):
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def test_grey_and_colour(tmp_path):
    grey, colour = ramp(4, 5), np.stack([ramp(4, 5), 2 * ramp(4, 5), 3 * ramp(4, 5)], -1)
    Image.fromarray(grey).save(tmp_path / "g.png")
    Image.fromarray(colour).save(tmp_path / "c.png")
    np.testing.assert_array_equal(read(tmp_path / "g.png", (4, 5))[0], np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(read(tmp_path / "g.png", (4, 5), 1)[0], grey[..., None])
    np.testing.assert_array_equal(read(tmp_path / "c.png", (4, 5))[0], colour)
    luma = colour @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(read(tmp_path / "c.png", (4, 5), 1)[0][..., 0], luma, atol=1)  # rounding


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bits(tmp_path, ending):
    values = np.array([[0, 128, 257, 25700], [32896, 65535, 65278, 1000]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"x.{ending}")
    pixels, facts = read(tmp_path / f"x.{ending}", (2, 4), 1)
    np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257))
    assert facts.mode.startswith("I;16") and facts.remark == ""


def test_12_bits_in_16_are_remarked(tmp_path):
    Image.fromarray(np.full((2, 2), 4000, np.uint16)).save(tmp_path / "x.png")
    assert "12 bits" in read(tmp_path / "x.png", (2, 2))[1].remark


def test_floats(tmp_path):
    Image.fromarray(np.array([[0, 0.5], [0.25, 1]], np.float32)).save(tmp_path / "x.tif")
    np.testing.assert_array_equal(read(tmp_path / "x.tif", (2, 2), 1)[0][..., 0], [[0, 128], [64, 255]])
    for wrong in (7.0, np.nan, -1.0):
        Image.fromarray(np.array([[0, wrong]], np.float32)).save(tmp_path / "y.tif")
        with pytest.raises(DataError, match="y.tif: values from .* expected 0 to 1"):
            read(tmp_path / "y.tif", (1, 2))


def test_palette_bits_and_alpha(tmp_path):
    colour = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8))
    colour.quantize(2).save(tmp_path / "p.png")
    np.testing.assert_array_equal(read(tmp_path / "p.png", (1, 2))[0], np.asarray(colour))
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "b.png")
    np.testing.assert_array_equal(read(tmp_path / "b.png", (1, 2), 1)[0][..., 0], [[255, 0]])
    colour.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
    colour.save(tmp_path / "a.png")
    pixels, facts = read(tmp_path / "a.png", (1, 2))
    np.testing.assert_array_equal(pixels, [[[255, 0, 0], [0, 0, 255]]])
    assert "transparency" in facts.remark


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation):
    """By the standard the tag names the sides of the scene at which the stored row 0 and column 0 lie."""
    sides = {1: "top left", 2: "top right", 3: "bottom right", 4: "bottom left"}
    sides |= {5: "left top", 6: "right top", 7: "right bottom", 8: "left bottom"}
    upright = ramp(16, 24)
    stored = upright[:: -1 if "bottom" in sides[orientation] else 1, :: -1 if "right" in sides[orientation] else 1]
    stored = stored.T if orientation > 4 else stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    pixels, facts = read(tmp_path / "x.png", (16, 24), 1)
    assert facts.size == (16, 24)
    np.testing.assert_array_equal(pixels[..., 0], upright)


def test_resize_is_antialiased(tmp_path):
    checks = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(checks).save(tmp_path / "x.png")
    small = read(tmp_path / "x.png", (8, 8), 1)[0].astype(int)
    assert small.shape == (8, 8, 1) and np.abs(small - 128).max() < 20
    wide = np.repeat(np.array([[0, 255]], np.uint8), 32, 0).repeat(32, 1)
    Image.fromarray(wide).save(tmp_path / "y.png")
    pixels = read(tmp_path / "y.png", (4, 8), 1)[0][..., 0]
    assert pixels.shape == (4, 8) and (pixels[:, :3] == 0).all() and (pixels[:, 5:] == 255).all()


def test_several_pages_are_remarked(tmp_path):
    pages = [Image.fromarray(np.full((2, 2), value, np.uint8)) for value in (10, 200)]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    pixels, facts = read(tmp_path / "x.tif", (2, 2), 1)
    assert (pixels == 10).all() and "the first was read" in facts.remark


def marked(path, shape):
    return decode.mask(files.Folder(path.parent), [path.name], "its picture", shape)[0].astype(int)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("L", [0, 127, 128, 255], [0, 0, 1, 1]),
        ("L", [0, 1, 0, 1], [0, 1, 0, 1]),  # 0/1
        ("L", [0, 1, 2, 7], [0, 1, 1, 1]),  # numbered defects
        ("1", [0, 1, 0, 1], [0, 1, 0, 1]),
        ("I;16", [0, 32767, 32768, 65535], [0, 0, 1, 1]),
        ("RGB", [[0, 0, 0], [200, 0, 0], [0, 0, 255], [90, 90, 90]], [0, 1, 1, 0]),  # drawn in colours
    ],
)
def test_mask_values(tmp_path, mode, values, expected):
    kinds = {"1": bool, "I;16": np.uint16}
    Image.fromarray(np.array([values], kinds.get(mode, np.uint8))).save(tmp_path / "m.png")
    np.testing.assert_array_equal(marked(tmp_path / "m.png", (1, 4)), [expected])


def test_palette_mask(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2, 0]], np.uint8))
    image = image.convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(marked(tmp_path / "m.png", (1, 4)), [[0, 1, 1, 0]])


def test_jpeg_mask_noise_is_not_a_defect(tmp_path):
    array = np.zeros((16, 16), np.uint8)
    array[0, 0] = 20
    Image.fromarray(array).save(tmp_path / "m.jpg", quality=95)
    assert np.asarray(Image.open(tmp_path / "m.jpg")).any() and not marked(tmp_path / "m.jpg", (16, 16)).any()


def test_mask_is_resized_by_the_nearest_pixel():
    full = np.zeros((12, 8), bool)
    full[6:, 4:] = True
    np.testing.assert_array_equal(decode.shrink_mask(full, (4, 4)), np.kron([[0, 0], [0, 1]], np.ones((2, 2))))
    dots = np.zeros((9, 9), bool)
    dots[1, 4] = dots[5, 6] = True  # the middle of a 3 x 3 block, and the edge of one
    np.testing.assert_array_equal(decode.shrink_mask(dots, (3, 3)), [[0, 1, 0], [0, 0, 0], [0, 0, 0]])
