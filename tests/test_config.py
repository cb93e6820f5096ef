"""Overrides keep types and suggest names; a config survives JSON."""

import pytest

from cnnfamily import config as configs
from cnnfamily.errors import UsageError
from cnnfamily.models import model_config

B0 = "configs/efficientnet_b0.py:digits"


def test_found_from_any_working_directory(tmp_path, monkeypatch):
    expected = configs.load_config(B0)
    monkeypatch.chdir(tmp_path)
    assert configs.load_config(B0) == expected


def test_a_config_of_ones_own_may_import_its_neighbours(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from configs import default\ndef get_config(arg=''):\n    config = default.get_config('lenet5')\n"
        "    config.seed = 7\n    return config\n"
    )
    monkeypatch.chdir(tmp_path)
    config = configs.load_config("mine.py")
    assert (config.seed, config.model.name) == (7, "lenet5")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model.width", "1.4", 1.4),
        ("model.width", "2", 2.0),
        ("model.width", 2, 2.0),
        ("batch_size", "1e3", 1000),
        ("augment.flip", "true", True),
        ("augment.flip", "False", False),
        ("optim.boundaries_steps", "(10,20)", (10, 20)),
        ("optim.boundaries_steps", "10", (10,)),
        ("optim.boundaries_epochs", [1.5, 3.0], (1.5, 3.0)),
        ("data.source", "npz:a=b.npz", "npz:a=b.npz"),
        ("optim.name", "sgd", "sgd"),
    ],
)
def test_overrides_take_the_type_of_their_key(key, value, expected):
    config = configs.load_config(B0, {key: value})
    for part in key.split("."):
        config = config[part]
    assert config == expected
    assert type(config) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_sise", 3, "unknown config key 'batch_sise'; did you mean 'batch_size'?"),
        ("optim.nesterof", True, "unknown config key 'optim.nesterof'; did you mean 'optim.nesterov'?"),
        ("model.widht", 2.0, "unknown field of efficientnet_b0 'widht'; did you mean 'width'?"),
        ("batch_size", 1.5, "config.batch_size=1.5: expected int, as in 64"),
        ("batch_size", True, "config.batch_size=True: expected int"),
        ("batch_size", None, "config.batch_size=None: expected int"),
        ("augment.flip", "maybe", "config.augment.flip='maybe': expected bool"),
        ("optim.learning_rate", "nan", "expected float"),
        ("optim.learning_rate", float("nan"), "expected a finite number"),
        ("model", "lenet5", "it is a group; expected one of its keys"),
        ("seed.x", 1, "unknown config key 'seed.x'"),
        ("model.name", "efficientnet_b9", "did you mean 'efficientnet_b"),
    ],
)
def test_wrong_overrides_say_what_was_expected(key, value, message):
    with pytest.raises(UsageError) as error:
        configs.load_config(B0, {key: value})
    assert message in str(error.value)


def test_a_loaded_config_is_locked():
    with pytest.raises(AttributeError, match="width"):
        configs.load_config(B0).model.widht = 2.0


def test_another_network_brings_its_own_fields():
    """But for those of the data and the run; and fields of the new network can be set in the same breath, in any order."""
    config = configs.load_config(B0, {"model.shortcut": "A", "model.name": "resnet18", "model.dtype": "bfloat16"})
    expected = model_config("resnet18")
    expected.update({"num_classes": 10, "dtype": "bfloat16", "shortcut": "A"})
    assert config.model.to_dict() == expected.to_dict()


def test_another_network_averages_batch_statistics_as_the_run_asks():
    """`:digits` has 528 steps: MobileNetV1's own 0.99 would leave it at chance in a run a quarter as long, as a sweep found."""
    assert model_config("mobilenet_v1").norm_momentum == 0.99
    assert configs.load_config(B0, {"model.name": "mobilenet_v1"}).model.norm_momentum == 0.9


def test_what_cannot_change_a_result_or_came_later_and_is_off_is_no_part_of_a_run():
    """Else the rows of the committed studies were others with each new key."""
    plain = configs.identity(configs.load_config(B0))
    assert not {"keep_programs", "augment.flip_alternating", "onednn"} & plain.keys()
    alternating = configs.load_config(B0, {"augment.flip_alternating": True})
    assert configs.identity(alternating) == plain | {"augment.flip_alternating": True}
    assert configs.identity(configs.load_config(B0, {"onednn": True})) == plain | {"onednn": True}


def test_json_gives_the_config_back():
    config = configs.load_config(B0, {"optim.boundaries_steps": (1, 2)})
    again = configs.from_json(configs.to_json(config))
    assert again == config
    assert again.is_locked
    assert again.model.stages == config.model.stages
    assert isinstance(again.model.stages[0], tuple)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.weight_decay", -0.1, "expected 0 or more"),
        ("label_smoothing", 1.0, "expected less than 1"),
        ("evaluate.every_epochs", 0.0, "expected more than 0"),
        ("seed", 2**31, r"expected less than 2\*\*31"),
    ],
)
def test_impossible_numbers_are_refused(key, value, message):
    with pytest.raises(UsageError, match=rf"config\.{key}={value}: {message}"):
        configs.check(configs.load_config(B0, {key: value}))
