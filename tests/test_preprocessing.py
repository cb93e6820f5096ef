"""Preprocessing of published weights: against torchvision (`-m parity`), against pixels it made, and rounding by hand."""

import json

import golden_preprocessing as golden
import numpy as np
import pytest
from PIL import Image

import cnnfamily
from cnnfamily.data.preprocessing import WEIGHTS, Preprocessing, crop_corner, imagenet_classes, preprocess, resized_size
from cnnfamily.errors import UsageError

NAMES = [f"{network}.{weights}" for network, rows in WEIGHTS.items() for weights in rows]
GOLDEN = json.loads(golden.FILE.read_text())
# (width, height): landscape, portrait, square, odd, of the longer side's exact size, smaller than every crop, one thin strip.
SIZES = [(500, 375), (375, 500), (256, 256), (333, 501), (640, 232), (50, 37), (97, 223), (1001, 700), (300, 20)]


def grey_levels(found, expected, std):
    """The largest difference of two normalised images, in levels of 0 to 255."""
    return float(np.abs((np.float64(found) - np.float64(expected)) * np.float64(std) * 255).max())


@pytest.mark.parametrize("name", GOLDEN["pixels"])
def test_pixels_are_torchvisions(name):
    row = GOLDEN["pixels"][name]
    output = preprocess(name)(golden.synthetic_image(*row["size"]))
    np.testing.assert_allclose(golden.some_pixels(output), row["pixels"], rtol=1e-6, atol=1e-6)


def test_the_table_is_torchvisions():
    assert list(GOLDEN["table"]) == NAMES
    for name, (resize, crop, interpolation, mean, std) in GOLDEN["table"].items():
        assert preprocess(name) == Preprocessing(resize, crop, interpolation, tuple(mean), tuple(std))


@pytest.mark.parametrize(
    ("size", "shorter", "expected"),
    [
        ((500, 375), 256, (341, 256)),  # 341.33
        ((375, 500), 256, (256, 341)),
        ((333, 501), 232, (232, 349)),  # 349.05
        ((1, 2), 255, (255, 510)),
        ((600, 601), 600, (600, 601)),
        ((112, 115), 224, (224, 230)),  # 229.99... where the quotient comes first
        ((99, 100), 256, (256, 258)),  # 258.59: down, not to the nearest
        ((10, 10), 224, (224, 224)),
    ],
)
def test_resized_sizes_by_hand(size, shorter, expected):
    assert resized_size(size, shorter) == expected


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ((256, 341), 224, (16, 58)),  # 58.5 to the even 58
        ((256, 343), 224, (16, 60)),  # 59.5 to the even 60
        ((255, 240), 240, (8, 0)),  # 7.5 to the even 8
        ((229, 232), 224, (2, 4)),  # 2.5 to the even 2
        ((224, 224), 224, (0, 0)),
    ],
)
def test_crop_corners_by_hand(size, crop, expected):
    assert crop_corner(size, crop) == expected


def test_normalisation_by_hand():
    image = np.full((4, 4, 3), 51, np.uint8)  # 0.2
    output = Preprocessing(4, 2, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))(image)
    assert output.dtype == np.float32
    np.testing.assert_allclose(output, np.broadcast_to([0.2, 0.0, -0.05], (2, 2, 3)), atol=1e-7)
    black = preprocess("vgg16.IMAGENET1K_FEATURES")(np.zeros((9, 9, 3), np.uint8))
    np.testing.assert_allclose(black[0, 0], [-0.48235 * 255, -0.45882 * 255, -0.40784 * 255], rtol=1e-6)


def test_the_crop_is_the_middle():
    image = np.zeros((8, 4, 3), np.uint8)
    image[3:5] = 255  # rows 3 and 4 of 8: all of a crop of two rows
    assert Preprocessing(4, 2, mean=(0, 0, 0), std=(1, 1, 1))(image).min() == 1


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = Image.fromarray(golden.synthetic_image(40, 30))
    resnet = cnnfamily.preprocess("resnet50")
    np.testing.assert_array_equal(resnet(rgb), resnet(np.asarray(rgb)))
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        image = rgb.convert(mode)
        np.testing.assert_array_equal(resnet(image), resnet(image.convert("RGB")))
        assert resnet(image).shape == (224, 224, 3)
    rgb.save(tmp_path / "image.png")
    with Image.open(tmp_path / "image.png") as image:
        np.testing.assert_array_equal(resnet(image), resnet(rgb))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((5, 5, 3), np.float32), r"float32 \[5, 5, 3\]; expected uint8"),
        (np.zeros((5, 5), np.uint8), r"uint8 \[5, 5\]; expected uint8 \[height, width, 3\]"),
        (np.zeros((1, 5, 5, 3), np.uint8), r"\[1, 5, 5, 3\]"),
        (np.zeros((3, 5, 5), np.uint8), r"\[3, 5, 5\]"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]"),
        (Image.new("I;16", (5, 5)), "mode 'I;16'; expected 8 bits"),
        (Image.new("F", (5, 5)), "mode 'F'"),
    ],
)
def test_what_is_no_image_is_one_line(image, message):
    with pytest.raises(UsageError, match=message):
        preprocess("resnet18")(image)


def test_names():
    assert len(WEIGHTS) == 31
    assert len(NAMES) == 42
    assert preprocess("resnet50") == preprocess("resnet50.IMAGENET1K_V1") == Preprocessing(256, 224)
    assert preprocess("resnet50.IMAGENET1K_V2") == Preprocessing(232, 224)
    for name, message in {
        "resnt50": "unknown network with published weights 'resnt50'; did you mean 'resnet50'?",
        "resnt50.IMAGENET1K_V2": "unknown network with published weights 'resnt50'; did you mean 'resnet50'?",
        "resnet50.IMAGENET1K_V3": "unknown weights of resnet50 'IMAGENET1K_V3'; did you mean 'IMAGENET1K_V",
        "resnet50.": "unknown weights of resnet50 ''; known: IMAGENET1K_V1, IMAGENET1K_V2",
        "lenet5": "unknown network with published weights 'lenet5'",
    }.items():
        with pytest.raises(UsageError) as error:
            preprocess(name)
        assert str(error.value).startswith(message)
        assert "\n" not in str(error.value)


def test_class_names():
    names = imagenet_classes()
    assert len(names) == len(set(names)) == 1000
    assert (names[0], names[207], names[281], names[999]) == ("tench", "golden retriever", "tabby", "toilet tissue")
    assert all(name == name.strip() and name for name in names)


@pytest.fixture(scope="module")
def models():
    pytest.importorskip("torch")
    return pytest.importorskip("torchvision.models")


@pytest.mark.parity
def test_the_table_is_that_of_the_torchvision_installed(models):
    for network, rows in WEIGHTS.items():
        published = models.get_model_weights(network)
        assert [weights.name for weights in published] == list(rows)
        for weights in published:
            preset, ours = weights.transforms(), rows[weights.name]
            assert ([ours.resize], [ours.crop]) == (preset.resize_size, preset.crop_size)
            assert (list(ours.mean), list(ours.std)) == (preset.mean, preset.std)
            assert (ours.interpolation, preset.antialias) == (preset.interpolation.value, True)
            assert weights.meta["categories"] in (list(imagenet_classes()), None)


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_images_are_torchvisions(models, name):
    """Measured: equal to the last bit for all 42 weights and 9 sizes."""
    network, weights = name.split(".")
    preset, ours = models.get_model_weights(network)[weights].transforms(), preprocess(name)
    rng = np.random.default_rng(0)
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = preset(image).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(ours(image), expected, err_msg=f"{width}x{height}")


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "low", "high", "most"),
    [("resnet50", 0, 256, 1), ("efficientnet_b7", 64, 192, 1), ("efficientnet_b7", 0, 256, 26)],
)
def test_tensors_differ_from_images_in_torchvision_itself(models, name, low, high, most):
    """Measured, in grey levels: torchvision resizes tensors without Pillow.

    One where nothing overshoots. Bicubic on black and white noise, where Pillow clips to 0..255 after each of its two passes
    and torchvision once at the end: 26 at the worst pixel.
    """
    torch = pytest.importorskip("torch")
    preset, ours = models.get_model_weights(name)["IMAGENET1K_V1"].transforms(), preprocess(name)
    rng = np.random.default_rng(0)
    differences = []
    for width, height in SIZES:
        image = rng.integers(low, high, (height, width, 3), dtype=np.uint8)
        tensor = preset(torch.from_numpy(image).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        differences.append(grey_levels(ours(image), tensor, ours.std))
    assert round(max(differences)) == most
