"""The picture of what a network sees: the very images of the step, beside their originals."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_photographs import folder, training_config  # noqa: F401  (a fixture)

from cnnfamily import config as configs
from cnnfamily import parallel
from cnnfamily.data import feed, preview
from cnnfamily.errors import UsageError
from cnnfamily.models import build
from cnnfamily.step import Objective


def test_the_images_are_those_of_the_step():
    fields = {"batch_size": 32, "augment.mixup": 0.2, "augment.cutmix": 1.0, "seed": 5}
    config = configs.load_config("configs/lenet5_digits.py", fields)
    images, originals, names = preview.preview(config, step=3, count=8)
    data = feed.load_data(config)
    with contextlib.closing(feed.TrainFeed(data, config, parallel.local_mesh())) as train:
        batch = {name: array[0] for name, array in train.batch(3).items()}
        objective = Objective(build(config.model), train.view(32), 5, train.mix)
        inputs = jax.jit(objective.inputs, static_argnums=3)
        seen, _, choices = inputs(jnp.asarray(3), batch, train.store, jnp.float32)
    expected = (np.asarray(seen)[:8] * data.std + data.mean) * 255
    np.testing.assert_allclose(images, np.clip(expected, 0, 255), atol=0.51)
    np.testing.assert_array_equal(originals, data.train.images[np.asarray(batch["index"])[:8]])
    shares = np.asarray(choices["mix"]["share"])[:8]
    for name, label, share in zip(names, np.asarray(choices["labels"]), shares, strict=False):
        assert str(label) in name
        if 0.01 < share < 0.99 and "," in name:
            assert f"{max(share, 1 - share):.0%}" in name


@pytest.mark.full
def test_a_picture_of_photographs(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    config = training_config(f"folder:{folder}", **{"augment.policy": "randaugment"})
    monkeypatch.setattr(configs, "load_config", lambda path, overrides: config)
    file = tmp_path / "seen.png"
    preview.main(["--config=x", f"--output={file}", "--count=5"])
    assert capsys.readouterr().out == f"5 images of step 0, each beside its original: {file}\n"
    with Image.open(file) as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--step=-1"], "--step=-1 and --count=24: expected 0 or more, and 1 or more"),
        (["--count=0"], "--count=0"),
        (["--output=none/x.png"], "--output=none/x.png: its folder does not exist"),
        (["x"], "argument 'x': expected --config=, --output=, --step=, --count= or --config.KEY=VALUE"),
    ],
)
def test_what_cannot_be_drawn(arguments, expected):
    with pytest.raises(UsageError) as error:
        preview.main(["--config=configs/lenet5_digits.py", *arguments])
    assert expected in str(error.value)
