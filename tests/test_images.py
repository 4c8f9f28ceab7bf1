"""read_image: what each kind of image file becomes, and how bad ones are refused."""
import re
import struct
import sys
import zlib

import numpy as np
import pytest

from gpucnn.data import read_image
from gpucnn.errors import DataError

Image = pytest.importorskip("PIL.Image")

RGB = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]],
                [[10, 20, 30], [200, 100, 50], [255, 255, 255]]], np.uint8)  # (2, 3, 3)
GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)


def save(path, array_or_image, **options):
    image = array_or_image
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def luma(rgb):
    """Grey by ITU-R 601, as Pillow rounds it."""
    return np.round(rgb @ np.array([0.299, 0.587, 0.114]))


def check(path, expected, channels, size=(2, 3), tolerance=0.51):
    """expected: (h, w) or (h, w, 3), 0 to 255; the tolerance is in those units."""
    x = read_image(path, size, channels)
    assert x.dtype == np.float32
    assert x.shape == (*size, channels)
    expected = expected if expected.ndim == 3 else np.repeat(expected[..., None], channels, 2)
    np.testing.assert_allclose(255 * x, expected, atol=tolerance)


def test_grey_keeps_its_pixels(tmp_path):
    path = save(tmp_path / "grey.png", GREY)
    np.testing.assert_array_equal(read_image(path, (2, 3))[..., 0], GREY / np.float32(255))
    check(path, GREY, 3)


def test_rgb(tmp_path):
    path = save(tmp_path / "rgb.png", RGB)
    np.testing.assert_array_equal(read_image(path, (2, 3), 3), RGB / np.float32(255))
    check(path, luma(RGB), 1)


def test_row40_transparent_pixels_are_laid_on_white(tmp_path):
    alpha = np.array([[255, 0, 128], [255, 255, 0]], np.uint8)
    opacity = alpha[..., None] / 255
    expected = RGB * opacity + 255 * (1 - opacity)
    path = save(tmp_path / "rgba.png", np.dstack([RGB, alpha]))
    check(path, expected, 3, tolerance=1)
    check(path, luma(expected), 1, tolerance=1)
    check(save(tmp_path / "la.png", Image.fromarray(np.dstack([GREY, alpha]))),
          GREY * opacity[..., 0] + 255 * (1 - opacity[..., 0]), 1, tolerance=1)


def test_row40_a_transparent_colour_without_an_alpha_channel(tmp_path):
    expected = RGB.copy()
    expected[0, 0] = 255
    check(save(tmp_path / "trns.png", RGB, transparency=(255, 0, 0)), expected, 3)


def test_row40_palette(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    expected = RGB[0][[[0, 1, 2], [2, 1, 0]]]
    check(save(tmp_path / "palette.png", image), expected, 3)
    check(save(tmp_path / "palette2.png", image), luma(expected), 1)
    expected[0, 1] = expected[1, 1] = 255
    check(save(tmp_path / "palette.gif", image, transparency=1), expected, 3)


def test_row40_one_bit(tmp_path):
    check(save(tmp_path / "bits.png", GREY > 120), 255 * (GREY > 120), 1)


def test_row40_cmyk(tmp_path):
    expected = np.full((2, 3, 3), (255, 0, 0))
    image = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    check(save(tmp_path / "cmyk.tif", image), expected, 3)
    check(save(tmp_path / "cmyk1.tif", image), luma(expected), 1)


@pytest.mark.parametrize("name", ["16.png", "16.tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_row40_16_bit_grey(tmp_path, name, channels):
    deep = np.array([[0, 1, 257], [1000, 40000, 65535]], np.uint16)
    check(save(tmp_path / name, deep), deep / 257, channels, tolerance=1e-4)


def test_32_bit_integers_hold_at_most_16_bits(tmp_path):
    deep = np.array([[0, 1, 257], [1000, 40000, 65535]], np.int32)
    check(save(tmp_path / "i.tif", deep), deep / 257, 1, tolerance=1e-4)
    deep[0, 0] = 65536
    with pytest.raises(DataError, match=r"i\.tif: pixels of mode I lie outside 0 to 65535"):
        read_image(save(tmp_path / "i.tif", deep), (2, 3))


@pytest.mark.parametrize(("tag", "rotated"), [(1, GREY), (2, GREY[:, ::-1]), (3, GREY[::-1, ::-1]),
                                              (6, np.rot90(GREY, -1)), (8, np.rot90(GREY))])
def test_row40_exif_orientation_is_applied(tmp_path, tag, rotated):
    exif = Image.Exif()
    exif[0x0112] = tag
    path = save(tmp_path / "exif.png", GREY, exif=exif)
    check(path, rotated, 1, size=rotated.shape)


def test_row40_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.fromarray(g) for g in (GREY, 255 - GREY, GREY)]
    path = save(tmp_path / "moving.gif", frames[0], save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 3
    check(path, GREY, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_row11_nan_pixels_are_kept_for_the_caller_to_refuse(tmp_path, channels):
    pixels = np.array([[0, 0.25, 0.5], [np.nan, 0.75, 1]], np.float32)
    x = read_image(save(tmp_path / "nan.tif", pixels), (2, 3), channels)
    np.testing.assert_array_equal(x, np.repeat(pixels[..., None], channels, 2))
    assert np.isnan(read_image(tmp_path / "nan.tif", (1, 2))).any()


@pytest.mark.parametrize("value", [-0.1, 1.5, 255, np.inf])
def test_float_pixels_on_another_scale_are_refused(tmp_path, value):
    path = save(tmp_path / "f.tif", np.array([[0, value]], np.float32))
    with pytest.raises(DataError, match=r"f\.tif: pixels of mode F lie outside 0 to 1; rescale"):
        read_image(path, (1, 2))


def test_shrinking_averages_rather_than_picks(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    x = read_image(save(tmp_path / "board.png", board.astype(np.uint8)), (8, 8))
    np.testing.assert_allclose(x, 0.5, atol=0.01)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_size_is_height_then_width_and_nothing_overshoots(tmp_path, dtype):
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    edge = np.zeros((40, 30), dtype)
    edge[:, 15:] = top
    x = read_image(save(tmp_path / "edge.tif", edge), (28, 20))
    assert x.shape == (28, 20, 1)
    assert x.min() == 0
    assert x.max() == 1
    assert (np.diff(x, axis=1) >= 0).all()


# ---- refusals

def png_header(width, height):
    def chunk(kind, data):
        return (struct.pack(">I", len(data)) + kind + data
                + struct.pack(">I", zlib.crc32(kind + data)))
    return (b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"")))


@pytest.mark.parametrize(("size", "message"), [
    ((12000, 9000), "12000x9000 pixels exceeds the limit of 89 Mpx"),
    ((60000, 60000), "more than 178 Mpx exceeds the limit of 89 Mpx"),
])
def test_row39_image_bomb(tmp_path, size, message):
    path = tmp_path / "big.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: {message}')}; make the image"):
        read_image(path, (28, 28))


@pytest.fixture
def jpeg(tmp_path, rng):
    return save(tmp_path / "cat.jpg", rng.integers(0, 256, (64, 64, 3), np.uint8)).read_bytes()


@pytest.mark.parametrize(("damage", "cause"), [
    (lambda jpeg: b"", "empty file"),
    (lambda jpeg: b"hello", "no known format"),
    (lambda jpeg: jpeg[:100], "Truncated File Read"),
    (lambda jpeg: jpeg[:-500], "image file is truncated"),
    (lambda jpeg: png_header(8, 8), "image file is truncated|unrecognized data stream"),
    (lambda jpeg: b"\0\0\0\x18ftypheic" + bytes(99), "no known format"),
    (lambda jpeg: b"P6\n1\xb7 16\n255\n", "invalid literal"),
], ids=["empty", "text", "header cut", "end cut", "no pixels", "heic", "ppm of a wrong size"])
def test_row38_unreadable_images_are_named(tmp_path, jpeg, damage, cause):
    path = tmp_path / "cat.png"
    path.write_bytes(damage(jpeg))
    with pytest.raises(DataError, match=rf"cat\.png: not a readable image \(.*({cause}).*\)$") as e:
        read_image(path, (28, 28))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "bmp", "webp"])
def test_row38_flipped_bytes_give_an_image_or_a_data_error(tmp_path, rng, kind):
    whole = save(tmp_path / f"a.{kind}", rng.integers(0, 256, (16, 16, 3), np.uint8)).read_bytes()
    path = tmp_path / f"b.{kind}"
    refused = 0
    for _ in range(60):
        content = bytearray(whole)
        content[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        path.write_bytes(content)
        try:
            assert read_image(path, (8, 8)).shape == (8, 8, 1)
        except DataError:
            refused += 1
    assert refused > 30 or kind != "png"  # the others have no checksum


def test_row38_folder_and_missing_file(tmp_path):
    with pytest.raises(DataError, match=r": a folder; give the path of a file$"):
        read_image(tmp_path, (28, 28))
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        read_image(tmp_path / "none.png", (28, 28))


def test_other_numbers_of_channels_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"channels must be 1 \(grey\) or 3 \(RGB\), got 4"):
        read_image(tmp_path / "any.png", (28, 28), 4)


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"needs Pillow; pip install 'gpucnn\[images\]'$"):
        read_image(tmp_path / "any.png", (28, 28))
