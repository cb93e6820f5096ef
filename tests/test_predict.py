"""Classes of image files by a trained network."""

import jax
import numpy as np
import pytest
from PIL import Image

from cnnfamily import predict
from cnnfamily.data import sources
from cnnfamily.data.preprocessing import imagenet_classes, preprocess
from cnnfamily.errors import UsageError
from cnnfamily.models import create_model, initialize
from cnnfamily.weights import save_weights


@pytest.fixture
def digit_files(tmp_path):
    """Twenty test digits as files of several kinds, four times their size; the class is the end of the name."""
    data = sources.load("digits", resolution=8, channels=1)
    for i in range(20):
        image = Image.fromarray(np.kron(data.test.images[i, :, :, 0], np.ones((4, 4), np.uint8)))
        mode, suffix = [("L", "png"), ("RGB", "bmp"), ("P", "gif"), ("RGBA", "png")][i % 4]
        image.convert(mode).save(tmp_path / f"{i:02d}_{data.test.labels[i]}.{suffix}")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_digits_is_recognised(finished, digit_files, capsys):
    """Whatever the file's kind: resizing up and down again blurs little."""
    predict.main([f"--workdir={finished[0]}", str(digit_files)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    right = sum(line.split(": ")[1][0] == line.split(".")[0][-1] for line in lines)
    assert right >= 17


def test_probabilities_are_sorted_and_of_the_known_classes(finished, digit_files):
    rows = predict.predict_images(finished[0], sorted(digit_files.glob("*.png"))[:2], top=10)
    for row in rows:
        probabilities = [probability for _, probability in row]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert {name for name, _ in row} == set("0123456789")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.png", None, "gone.png does not exist"),
        ("text.png", b"no image", "text.png cannot be read as an image"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\x00\x00", "cut.png cannot be read as an image"),
    ],
)
def test_bad_files_are_one_line(finished, tmp_path, name, content, message):
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        predict.main([f"--workdir={finished[0]}", str(tmp_path / name)])


def test_an_empty_folder_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="has no images"):
        predict.find_images([str(tmp_path)])


def test_published_weights_name_the_classes_of_imagenet(tmp_path, capsys):
    network = create_model("mobilenet_v3_small")
    variables = initialize(network, jax.random.key(0))
    save_weights(tmp_path / "w.safetensors", network, variables)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    predict.main(["--model=mobilenet_v3_small", f"--weights={tmp_path / 'w.safetensors'}", str(tmp_path / "x.png")])
    line = capsys.readouterr().out
    logits = jax.jit(network.apply)(variables, preprocess("mobilenet_v3_small")(pixels)[None])[0]
    best = np.argsort(-np.asarray(logits))[:5]
    assert [part.rsplit(" ", 1)[0] for part in line.split(": ", 1)[1].split(", ")] == [imagenet_classes()[i] for i in best]


@pytest.mark.parametrize(
    "arguments",
    [[], ["--workdir=x", "--model=resnet18"], ["--model=resnet18"], ["--weights=x"], ["--workdir=x", "--weights=x"]],
)
def test_a_run_or_published_weights_are_needed(arguments):
    with pytest.raises(UsageError, match="expected either --workdir=DIR, or --model=NAME with --weights=FILE"):
        predict.main([*arguments, "image.png"])
