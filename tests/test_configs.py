"""Every config file: it loads in each form, says how it is run, and its numbers are the papers'."""

import ast
import re
from pathlib import Path

import pytest

from cnnfamily import config as configs
from cnnfamily import models, optim
from cnnfamily.data import feed
from cnnfamily.errors import UsageError

FILES = sorted(path for path in (configs.REPOSITORY / "configs").glob("*.py") if path.stem != "default")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("argument", ["", "digits", "smoke"])
def test_every_form_loads_and_builds(file, argument):
    config = configs.load_config(f"{file}:{argument}")
    configs.check(config)
    models.build(config.model)
    optim.learning_rate_schedule(config.optim, total_steps=10_000, steps_per_epoch=20, batch_size=config.batch_size)
    if argument == "digits":
        assert (config.data.source, config.model.num_classes) == ("digits", 10)


@pytest.mark.parametrize(
    ("argument", "model", "classes"),
    [
        ("", "efficientnet_b0", 1000),
        ("digits", "efficientnet_b0", 10),
        ("smoke", "efficientnet_b0", 10),
        ("resnet18", "resnet18", 1000),
    ],
)
def test_the_defaults_are_a_config_themselves(argument, model, classes):
    config = configs.load_config(f"configs/default.py:{argument}")
    assert (config.model.name, config.model.num_classes, config.data.source[:4]) == (
        model,
        classes,
        "fake" if argument == "smoke" else "digi",
    )
    with pytest.raises(UsageError, match="did you mean 'resnet18'"):
        configs.load_config("configs/default.py:resnt18")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_docstrings_have_a_source_and_commands(file):
    text = ast.get_docstring(ast.parse(file.read_text()))
    assert f"python -m cnnfamily.train --config=configs/{file.name}" in text


def test_every_default_key_has_a_reason():
    source = (configs.REPOSITORY / "configs/default.py").read_text().split("def choose")[0].split('"""', 2)[2]
    for line in source.splitlines():
        name, equals, _ = line.strip().partition(" = ")
        group = line.endswith("ConfigDict()") or name.endswith(("_epochs", "_steps", "data.std"))
        if name.startswith("config.") and equals and not group:
            assert "  # " in line, f"no reason: {line}"


@pytest.mark.parametrize(
    ("name", "width", "depth", "resolution", "dropout"),
    [  # efficientnet_builder.py of the authors' code
        ("b0", 1.0, 1.0, 224, 0.2), ("b1", 1.0, 1.1, 240, 0.2), ("b2", 1.1, 1.2, 260, 0.3), ("b3", 1.2, 1.4, 300, 0.3),
        ("b4", 1.4, 1.8, 380, 0.4), ("b5", 1.6, 2.2, 456, 0.4), ("b6", 1.8, 2.6, 528, 0.5), ("b7", 2.0, 3.1, 600, 0.5),
    ],
)  # fmt: skip
def test_efficientnet_has_the_settings_of_its_paper(name, width, depth, resolution, dropout):
    """Section 5.2: RMSProp 0.9, 0.9; 0.256 at 4096 falling by 0.97 every 2.4 epochs; decay 1e-5; batch norm 0.99."""
    config = configs.load_config(f"configs/efficientnet_{name}.py")
    model = config.model
    assert (model.width, model.depth, model.resolution, model.dropout) == (width, depth, resolution, dropout)
    assert (model.stochastic_depth, model.stochastic_depth_schedule, model.norm_momentum) == (0.2, "i/N", 0.99)
    assert (config.optim.name, config.optim.momentum, config.optim.beta2, config.optim.epsilon) == ("rmsprop", 0.9, 0.9, 1e-3)
    assert (config.optim.weight_decay, config.label_smoothing, config.ema.decay) == (1e-5, 0.1, 0.9999)
    steps = 1_281_167 // 4096
    rate = optim.learning_rate_schedule(config.optim, total_steps=350 * steps, steps_per_epoch=steps, batch_size=4096)
    assert float(rate(5 * steps)) == pytest.approx(0.256 * 0.97**2, rel=1e-5)
    assert float(rate(round(2.4 * steps * 10) + 1)) == pytest.approx(0.256 * 0.97**10, rel=1e-5)


@pytest.mark.parametrize("layers", [20, 32, 44, 56, 110])
def test_cifar_resnets_have_the_settings_of_their_paper(layers):
    """Section 4.2: batch 128, 64,000 steps, 0.1 divided by 10 at 32,000 and 48,000, decay 1e-4, pad 4, flip."""
    config = configs.load_config(f"configs/resnet{layers}_cifar10.py")
    assert (config.model.stage_sizes, config.model.shortcut) == (((layers - 2) // 6,) * 3, "A")
    assert (config.batch_size, config.total_steps, config.optim.weight_decay) == (128, 64_000, 1e-4)
    assert (config.augment.crop_padding, config.augment.flip, config.optim.nesterov) == (4, True, False)
    rate = optim.learning_rate_schedule(config.optim, total_steps=64_000, steps_per_epoch=390, batch_size=128)
    assert [float(rate(step)) for step in (31_999, 32_001, 48_001)] == pytest.approx([0.1, 0.01, 0.001])
    assert float(rate(200)) == pytest.approx(0.05 if layers == 110 else 0.1)


def test_the_fast_recipe_has_the_settings_of_its_code():
    """airbench94_muon.py: batches of 2000 for 8 epochs, Muon at 0.24 and 0.6, linear to 0, smoothing 0.2, 2 pixels."""
    config = configs.load_config("configs/cifar10_fast.py")
    assert (config.model.name, config.model.norm_momentum, config.model.norm_epsilon) == ("airbench94", 0.6, 1e-12)
    assert (config.batch_size, config.total_epochs, config.label_smoothing, config.evaluate.crops) == (2000, 8.0, 0.2, 2)
    assert (config.optim.name, config.optim.momentum, config.optim.nesterov) == ("muon", 0.6, True)
    assert (config.augment.shift, config.augment.flip, config.augment.flip_alternating) == (2, False, True)
    rate = optim.learning_rate_schedule(config.optim, total_steps=200, steps_per_epoch=25, batch_size=2000)
    assert [float(rate(step)) for step in (0, 50, 200)] == pytest.approx([0.24, 0.18, 0.0])


# Batch, epochs, optimizer, peak rate for so many examples, momentum, decay, and the share of the rate left after some epochs.
PAPERS = {
    # Krizhevsky et al. 2012, section 5: "reduced three times", "roughly 90 cycles"; the epochs are ours.
    "alexnet": (128, 90, "sgd", 0.01, 128, 0.9, 5e-4, {29.9: 1, 30.1: 0.1, 60.1: 0.01, 89.9: 0.001}),
    # Simonyan and Zisserman 2014, section 3.1: "decreased 3 times", 74 epochs; the epochs are ours.
    "vgg16": (256, 74, "sgd", 0.01, 256, 0.9, 5e-4, {24.9: 1, 25.1: 0.1, 45.1: 0.01, 73.9: 0.001}),
    # Szegedy et al. 2014, section 6: 4 % every 8 epochs; rate, batch, decay and epochs are ours.
    "googlenet": (256, 250, "sgd", 0.01, 32, 0.9, 1e-4, {8.1: 0.96, 16.1: 0.96**2, 80.1: 0.96**10}),
    # Goyal et al. 2017, section 5.1.
    "resnet50_imagenet": (1024, 90, "sgd", 0.1, 256, 0.9, 1e-4, {29.9: 1, 30.1: 0.1, 60.1: 0.01, 80.1: 0.001}),
    # https://github.com/pytorch/vision/issues/3995: 8 workers of 128; warm-up of 5 epochs, then half a cosine.
    "resnet50_2021": (1024, 600, "sgd", 0.5, 1024, 0.9, 2e-5, {2.5: 0.5, 5: 1, 302.5: 0.5, 599.99: 0}),
    # Wightman et al. 2021, table 2, A2; the batch is a multiple of three.
    "resnet50_a2": (2304, 300, "lamb", 5e-3, 0, 0.9, 0.02, {2.5: 0.5, 5: 1, 152.5: 0.5, 299.99: 0}),
    # rn50_16_epochs.yaml and train_imagenet.py of libffcv/ffcv-imagenet; its issue 4: 512 on each of 8 devices.
    "resnet50_fast": (4096, 16, "sgd", 1.7, 4096, 0.9, 1e-4, {1: 0.5, 2: 1, 9: 0.5, 15.3: 0.05}),
    # Hu et al. 2018, section 5.
    "se_resnet50": (1024, 100, "sgd", 0.6, 1024, 0.9, 1e-4, {29.9: 1, 30.1: 0.1, 60.1: 0.01, 90.1: 0.001}),
}
FOLLOWERS = {
    "alexnet": ("alexnet_2012",),
    "vgg16": ("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16_bn", "vgg19", "vgg19_bn"),
    "googlenet": ("googlenet_paper",),
    "resnet50_imagenet": (
        *("resnet18_imagenet", "resnet34_imagenet", "resnet101_imagenet", "resnet152_imagenet"),
        *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
    ),
    "se_resnet50": ("se_resnet18", "se_resnet34", "se_resnet101", "se_resnet152"),
}


@pytest.mark.parametrize(
    ("source", "file"), [(source, file) for source in PAPERS for file in (source, *FOLLOWERS.get(source, ()))]
)
def test_recipes_have_the_settings_of_their_papers(source, file):
    batch, epochs, name, rate, reference, momentum, decay, shares = PAPERS[source]
    config = configs.load_config(f"configs/{file}.py")
    assert config.model.name == re.sub("_(imagenet|2021|fast|a2)", "", file)
    assert (config.batch_size, config.total_epochs, config.data.source) == (batch, epochs, "tfds:imagenet2012")
    assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == (name, momentum, decay)
    steps = 1000  # an epoch
    schedule = optim.learning_rate_schedule(
        config.optim, total_steps=int(epochs * steps), steps_per_epoch=steps, batch_size=reference
    )
    assert {epoch: float(schedule(int(epoch * steps))) for epoch in shares} == pytest.approx(
        {epoch: rate * share for epoch, share in shares.items()}, rel=1e-5, abs=1e-8
    )


def test_the_auxiliary_classifiers_have_the_weight_of_their_paper():
    """Szegedy et al. 2014, section 5: 0.3; dropout 40 % before the classifier and 70 % in the auxiliary ones."""
    config = configs.load_config("configs/googlenet_paper.py")
    assert (config.model.aux, config.aux_weight, config.model.dropout, config.model.aux_dropout) == (True, 0.3, 0.4, 0.7)


def test_stochastic_depth_has_the_settings_of_its_code():
    config = configs.load_config("configs/resnet110_stochastic_depth.py")
    assert (config.model.stochastic_depth, config.model.stochastic_depth_schedule) == (0.5, "l/L")
    assert (config.model.stochastic_depth_form, config.model.stochastic_depth_scaling) == ("batch", "test")
    assert (config.total_epochs, config.optim.boundaries_epochs, config.optim.nesterov) == (500.0, (250.0, 375.0), True)


# Family, what is cut from an image, interpolation, and what changes it, with the place that says so.
CHANGES = {
    "alexnet": ((256, 256), "bilinear", {"light": 0.1}),  # Krizhevsky et al. 2012, section 4.1
    "alexnet_2012": ((256, 256), "bilinear", {"light": 0.1}),
    "vgg11": ((256, 512), "bilinear", {"light": 0.1}),  # Simonyan and Zisserman 2014, section 3.1.1
    "vgg19_bn": ((256, 512), "bilinear", {"light": 0.1}),
    "googlenet": ((0.08, 1.0), "bilinear", {"jitter": 0.4}),  # Szegedy et al. 2014, section 6; the amount is ours
    "resnet50_imagenet": ((0.08, 1.0), "bilinear", {}),  # Goyal et al. 2017, section 5.1
    "resnet50_2021": (  # https://github.com/pytorch/vision/issues/3995
        (0.08, 1.0),
        "bilinear",
        {"repeats": 4, "policy": "trivialaugment", "erasing": 0.1, "mixup": 0.2, "cutmix": 1.0},
    ),
    "resnet50_fast": ((0.08, 1.0), "bilinear", {}),
    "resnet50_a2": ((0.08, 1.0), "bicubic", {"repeats": 3, "policy": "randaugment", "mixup": 0.1, "cutmix": 1.0}),
    "resnext101_64x4d": ((0.08, 1.0), "bilinear", {}),
    "se_resnet50": ((0.08, 1.0), "bilinear", {}),  # Hu et al. 2018, section 5: "standard practices"
    "mobilenet_v1": ((0.08, 1.0), "bilinear", {"jitter": 0.4}),  # slim's inception_preprocessing; the amount is ours
    "mobilenet_v2": ((0.08, 1.0), "bilinear", {"jitter": 0.4}),
    # torchvision's references/classification: --auto-augment imagenet --random-erase 0.2
    "mobilenet_v3_large": ((0.08, 1.0), "bilinear", {"policy": "autoaugment", "erasing": 0.2}),
    "mobilenet_v3_small": ((0.08, 1.0), "bilinear", {"policy": "autoaugment", "erasing": 0.2}),
    # Tan and Le 2019, section 5.2; bicubic in the authors' preprocessing.py
    "efficientnet_b0": ((0.08, 1.0), "bicubic", {"policy": "autoaugment"}),
    "efficientnet_b7": ((0.08, 1.0), "bicubic", {"policy": "autoaugment"}),
}


@pytest.mark.parametrize("file", CHANGES)
def test_images_are_changed_as_the_papers_say(file):
    part, interpolation, changes = CHANGES[file]
    config = configs.load_config(f"configs/{file}.py")
    crop = feed.training_crop(config, feed.resolution_of(config))
    assert part == (crop.shorter if config.augment.crop_shorter else crop.scale)
    assert config.augment.crop_shorter or crop.ratio == (3 / 4, 4 / 3)
    assert (config.data.fit, crop.interpolation) == ("crop", interpolation)
    changes = {"repeats": 1, **changes}
    names = (
        "repeats",
        "crop_padding",
        "shift",
        "flip",
        "policy",
        "jitter",
        "light",
        "erasing",
        "cutout_side",
        "mixup",
        "cutmix",
    )
    assert {name: config.augment[name] for name in names if config.augment[name]} == {"flip": True} | changes


# Side in evaluation, the shorter side before that is cut out, views, and sides in training by epoch; else 224, 256, 1, 224.
SIZES = {
    "alexnet_2012": (227, 256, 1, {0: 227}),
    "resnet50_2021": (224, 232, 1, {0: 176}),  # --val-resize-size 232 --train-crop-size 176
    "resnet50_a2": (224, 236, 1, {0: 224}),  # a test crop ratio of 0.95
    # preprocessing.py of the authors' code: a margin of 32 pixels in all
    "efficientnet_b0": (224, 256, 1, {0: 224}),
    "efficientnet_b4": (380, 412, 1, {0: 380}),
    "efficientnet_b7": (600, 632, 1, {0: 600}),
    "resnet50_fast": (256, 293, 2, {0: 160, 12: 192}),  # 256 of 8/7 so many; lr_tta; start_ramp 11, end_ramp 13
}


@pytest.mark.parametrize("file", {**CHANGES, **SIZES})
def test_images_have_the_sizes_of_the_papers(file):
    config = configs.load_config(f"configs/{file}.py")
    side, shorter, crops, training = SIZES.get(file, (224, 256, 1, {0: 224}))
    crop = feed.evaluation_crop(config)
    assert (crop.resolution, crop.resize or round(crop.resolution * 8 / 7), config.evaluate.crops) == (side, shorter, crops)
    assert feed.training_resolutions(config) == training


def test_the_a2_recipe_says_yes_or_no():
    config = configs.load_config("configs/resnet50_a2.py")
    assert (config.loss, config.label_smoothing, config.ema.decay) == ("binary_cross_entropy", 0.0, 0.0)
    assert (config.model.stochastic_depth, config.augment.policy_magnitude, config.optim.clip_norm) == (0.05, 7, 0.0)


def test_averages_of_the_2021_recipe():
    """Every 32 steps by 2e-5 * 1024 * 32 / 600, as train.py of references/classification adjusts it."""
    config = configs.load_config("configs/resnet50_2021.py")
    assert config.ema.decay**32 == pytest.approx(1 - 2e-5 * 1024 * 32 / 600, abs=1e-5)
    assert (config.label_smoothing, config.loss, config.ema.warmup) == (0.1, "cross_entropy", False)


IMAGENET = 1_281_167


def test_mobilenet_v1_has_the_settings_of_its_code():
    """mobilenet_v1_train.py and mobilenet_v1.py: SGD, 0.045 for 64 times 0.94 every 2.5 epochs; decay 4e-5; dropout 0.001."""
    config = configs.load_config("configs/mobilenet_v1.py")
    assert (config.optim.name, config.optim.momentum, config.optim.weight_decay) == ("sgd", 0.0, 4e-5)
    assert (config.model.dropout, config.model.norm_epsilon, config.model.padding) == (0.001, 1e-3, "same")
    steps = IMAGENET // 64
    rate = optim.learning_rate_schedule(config.optim, total_steps=200 * steps, steps_per_epoch=steps, batch_size=64)
    assert [float(rate(epoch * steps)) for epoch in (0, 2, 3, 6)] == pytest.approx([0.045 * 0.94**i for i in (0, 0, 1, 2)])


def test_mobilenet_v2_has_the_settings_of_its_paper():
    """Section 6.1: RMSProp 0.9, 0.9; 0.045 for a worker's batch of 96; decay 4e-5. slim's README: 8 workers, 0.98 every 2.5
    epochs, 700,000 steps, label smoothing 0.1, averages 0.9999; its train_image_classifier.py has epsilon 1.0."""
    config = configs.load_config("configs/mobilenet_v2.py")
    assert (config.optim.name, config.optim.momentum, config.optim.beta2, config.optim.epsilon) == ("rmsprop", 0.9, 0.9, 1.0)
    assert (config.optim.weight_decay, config.label_smoothing, config.ema.decay) == (4e-5, 0.1, 0.9999)
    assert (config.batch_size, config.model.norm_group, config.model.dropout) == (8 * 96, 96, 0.2)
    steps = IMAGENET // 768
    assert config.total_epochs * steps == pytest.approx(700_000, rel=1e-2)
    rate = optim.learning_rate_schedule(config.optim, total_steps=420 * steps, steps_per_epoch=steps, batch_size=768)
    assert [float(rate(epoch * steps)) for epoch in (0, 2, 3, 6)] == pytest.approx([0.36 * 0.98**i for i in (0, 0, 1, 2)])


@pytest.mark.parametrize("size", ["large", "small"])
def test_mobilenet_v3_has_the_settings_of_torchvision(size):
    """references/classification/README.md: 8 workers of 128, RMSProp, 0.064 times 0.973 every 2 epochs, decay 1e-5; train.py
    has momentum 0.9, alpha 0.9 and epsilon 0.0316 outside the root, which is 0.001 inside."""
    config = configs.load_config(f"configs/mobilenet_v3_{size}.py")
    assert (config.model.name, config.model.norm_momentum, config.model.dropout) == (f"mobilenet_v3_{size}", 0.99, 0.2)
    assert (config.optim.name, config.optim.momentum, config.optim.beta2, config.optim.epsilon) == ("rmsprop", 0.9, 0.9, 1e-3)
    assert (config.optim.weight_decay, config.batch_size, config.model.norm_group) == (1e-5, 8 * 128, 128)
    steps = IMAGENET // 1024
    rate = optim.learning_rate_schedule(config.optim, total_steps=600 * steps, steps_per_epoch=steps, batch_size=1024)
    assert [float(rate(epoch * steps)) for epoch in (0, 1, 2, 5)] == pytest.approx([0.064 * 0.973**i for i in (0, 0, 1, 2)])


def test_a_config_holds_only_what_differs():
    """A file that copied the defaults would not follow them."""
    for file in FILES:
        assert len(Path(file).read_text().splitlines()) < 70, file
