"""What becomes of an encoded image: one file of each kind, and crops against Pillow and by hand."""

import io
import math
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from cnnfamily.data import preprocessing
from cnnfamily.data.decoding import BadImageError, CentreCrop, ScaleCrop, TrainCrop, crop_box, decode
from cnnfamily.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(20, 0).repeat(30, 1)
PICTURE = Image.fromarray(PIXELS)


def encoded(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def of_16_bits():
    return Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)


JPEG = encoded(PICTURE, "jpeg", quality=93)
MIDDLE = len(JPEG) // 2


@pytest.mark.parametrize(
    ("picture", "kind", "options"),
    [
        (PICTURE, "jpeg", {"quality": 93}),
        (PICTURE, "jpeg", {"progressive": True, "subsampling": 0}),
        (PICTURE.convert("L"), "jpeg", {}),
        (PICTURE.convert("CMYK"), "jpeg", {}),
        (PICTURE, "png", {}),
        (PICTURE.convert("P"), "png", {"transparency": bytes(range(256))}),
        (PICTURE.convert("LA"), "png", {}),
        (PICTURE.convert("RGBA"), "png", {}),
        (PICTURE.convert("1"), "png", {}),
        (PICTURE, "gif", {}),
        (PICTURE, "webp", {}),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_pillows(picture, kind, options, channels):
    data = encoded(picture, kind, **options)
    found, theirs = decode(data, channels), Image.open(io.BytesIO(data))
    if kind == "png" and theirs.mode == "P":
        theirs = theirs.convert("RGBA")  # as Pillow asks for such palettes, with a warning
    theirs = theirs.convert("RGB" if channels == 3 else "L")
    assert found.mode == theirs.mode
    np.testing.assert_array_equal(np.asarray(found), np.asarray(theirs))


def test_sixteen_bits_keep_their_range():
    """Pillow's own conversion makes nearly everything white."""
    np.testing.assert_array_equal(np.asarray(decode(encoded(of_16_bits(), "png"), 1)), PIXELS[:, :, 0])
    levels = Image.fromarray(np.array([[256, 257, 65279, 65535]], np.uint16))
    assert np.asarray(decode(encoded(levels, "png"), 1)).tolist() == [[0, 1, 254, 255]]


def test_exif_orientation_is_left_alone():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(PICTURE, "jpeg", exif=exif.tobytes())).size == PICTURE.size


def test_bytes_after_the_end_do_not_matter():
    np.testing.assert_array_equal(np.asarray(decode(JPEG + b"more")), np.asarray(decode(JPEG)))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is empty"),
        (b"<html>", "it is no image that Pillow knows"),
        (JPEG[:MIDDLE], "Premature end of JPEG file"),
        (JPEG[:-2], "Premature end of JPEG file"),
        (JPEG[:MIDDLE] + bytes(200) + JPEG[MIDDLE + 200 :], "Corrupt JPEG data"),  # which Pillow takes without a word
        (JPEG[:4], "JPEG"),
        (encoded(PICTURE, "png")[:-100], "truncated"),
        (encoded(Image.new("1", (20_000, 20_000)), "png"), "decompression bomb"),
        (encoded(Image.new("1", (10_000, 10_000)), "png"), "decompression bomb"),
        (encoded(Image.new("L", (9_500, 9_500)), "jpeg"), "9500 x 9500 pixels; expected at most"),
        (encoded(Image.new("F", (8, 8)), "tiff"), "mode 'F', 32 bits a pixel; expected 8 or 16"),
    ],
    ids=["empty", "html", "half", "end", "middle", "start", "png", "bomb", "smaller bomb", "jpeg bomb", "float"],
)
def test_bad_images_say_why(data, why):
    with pytest.raises(BadImageError, match=why):
        decode(data)


def test_a_bomb_that_pillow_only_warns_of_is_bad_outside_of_tests_too():
    """In them every warning is an error, whatever the package does."""
    program = """
import io
from PIL import Image
from cnnfamily.data.decoding import BadImageError, decode
file = io.BytesIO()
Image.new("1", (10_000, 10_000)).save(file, "png")
try:
    decode(file.getvalue())
except BadImageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "decompression bomb" in done.stdout


@pytest.mark.parametrize("crop", [CentreCrop(224), ScaleCrop(224, (256, 256))], ids=["centre", "scale"])
@pytest.mark.parametrize("size", [(1, 400_000), (30_000_000, 1)])
def test_a_strip_that_would_grow_beyond_the_limit_is_bad(crop, size):
    arguments = [np.random.default_rng(0)] if isinstance(crop, ScaleCrop) else []
    with pytest.raises(BadImageError, match=f"it has {size[0]} x {size[1]} pixels, and would have .* when it is cropped"):
        crop(Image.new("RGB", size), *arguments)


def test_colour_of_16_bits_is_divided_by_256():
    """Pillow does it, and has no picture of such a mode to make one from: the file is put together here."""
    pixels = np.array([[255, 256, 65535], [511, 512, 65279]], ">u2")
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0" + pixels.tobytes()))]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*parts, (b"IEND", b"")]
    )
    assert np.asarray(decode(png)).tolist() == [[[0, 1, 255], [1, 2, 254]]]


def test_a_damaged_cmyk_jpeg_is_bad_too():
    data = encoded(PICTURE.convert("CMYK"), "jpeg")
    middle = len(data) // 2
    with pytest.raises(BadImageError, match="Corrupt JPEG data"):
        decode(data[:middle] + bytes(200) + data[middle + 200 :])


def boxes(size, scale, ratio, count=2000):
    return np.array([crop_box(np.random.default_rng((0, i)), size, scale, ratio) for i in range(count)])


def test_random_crops_have_the_areas_ratios_and_places_asked_for():
    left, top, right, bottom = boxes((500, 375), (0.08, 1.0), (3 / 4, 4 / 3)).T
    width, height = right - left, bottom - top
    assert min(left.min(), top.min()) == 0
    assert (right.max(), bottom.max()) == (500, 375)
    share, ratio = width * height / (500 * 375), width / height
    assert share.min() > 0.079
    assert share.max() < 1.003  # rounded to pixels
    assert ratio.min() > 0.74
    assert ratio.max() < 1.35
    # What fits is uniform in area and in the logarithm of the ratio; small parts always fit.
    small = share < 0.5
    assert np.histogram(share[small], 3, (0.08, 0.5))[0].std() < 0.06 * small.sum()
    assert abs(np.log(ratio[small]).mean()) < 0.02
    assert np.log(ratio[small]).std() == pytest.approx(np.log(4 / 3) / 3**0.5, rel=0.05)
    free = (left / np.maximum(500 - width, 1))[small]
    assert abs(free.mean() - 0.5) < 0.02


def test_what_never_fits_is_the_largest_part_in_the_middle():
    assert boxes((100, 10), (0.9, 1.0), (0.5, 2.0), 1).tolist() == [[40, 0, 60, 10]]
    assert boxes((10, 100), (0.9, 1.0), (0.5, 2.0), 1).tolist() == [[0, 40, 10, 60]]
    assert boxes((30, 30), (1.0, 1.0), (1.0, 1.0), 1).tolist() == [[0, 0, 30, 30]]


def test_a_training_crop_is_cut_and_then_resized():
    """In this order as in torchvision: resizing with a box would mix in pixels from outside it."""
    crop = TrainCrop(20, (0.2, 0.5), interpolation="bicubic")
    box = crop_box(np.random.default_rng(5), PICTURE.size, (0.2, 0.5), (3 / 4, 4 / 3))
    expected = PICTURE.crop(box).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(crop(PICTURE, np.random.default_rng(5)), np.asarray(expected))
    assert crop(PICTURE.convert("L"), np.random.default_rng(5)).shape == (20, 20, 1)


def test_a_square_of_the_whole_image_at_a_random_scale():
    crop, seen = ScaleCrop(48, (50, 60)), set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shorter = int(rng.integers(50, 61))
        size = (240 * shorter // 160, shorter)
        left, top = (int(rng.integers(side - 47)) for side in size)
        expected = PICTURE.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + 48, top + 48))
        np.testing.assert_array_equal(crop(PICTURE, np.random.default_rng(seed)), np.asarray(expected))
        seen.add(shorter)
    assert seen == set(range(50, 61))


def test_an_evaluation_crop_is_that_of_published_weights():
    theirs = preprocessing.Preprocessing(64, 56, mean=(0.0,) * 3, std=(1 / 255,) * 3)(PICTURE)
    np.testing.assert_allclose(CentreCrop(56)(PICTURE), theirs, atol=1e-3)  # 8/7 of 56 is 64
    assert CentreCrop(56, 56)(PICTURE).shape == (56, 56, 3)
    assert not np.array_equal(CentreCrop(56, 56)(PICTURE), CentreCrop(56)(PICTURE))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda: TrainCrop(8, (0.0, 1.0)),
            "augment.crop_scale=(0.0, 1.0): expected two numbers above 0 and up to 1, the smaller",
        ),
        (lambda: TrainCrop(8, (0.5,)), "augment.crop_scale=(0.5,): expected two numbers"),
        (
            lambda: TrainCrop(8, ratio=(2.0, 1.0)),
            "augment.crop_ratio=(2.0, 1.0): expected two numbers above 0, the smaller first",
        ),
        (lambda: TrainCrop(8, (math.nan, 1.0)), "augment.crop_scale"),
        (lambda: TrainCrop(8, interpolation="linear"), "unknown data.interpolation 'linear'; did you mean 'bilinear'?"),
        (lambda: TrainCrop(0), "data.resolution is 0"),
        (lambda: ScaleCrop(8, (7, 9)), "augment.crop_shorter=(7, 9): expected two numbers of pixels from data.resolution=8"),
        (lambda: ScaleCrop(8, (9,)), "augment.crop_shorter=(9,)"),
        (lambda: CentreCrop(8, 7), "data.resize=7: expected 0 or at least data.resolution=8"),
    ],
)
def test_numbers_that_cannot_be(make, expected):
    with pytest.raises(UsageError) as error:
        make()
    assert expected in str(error.value)
