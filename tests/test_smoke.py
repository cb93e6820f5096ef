"""The `:smoke` form of the config files trains, evaluates, and goes on where it died: of some here, with `-m full` of all."""

import numpy as np
import pytest
from conftest import mesh_of
from PIL import Image

from cnnfamily import config as configs
from cnnfamily import parallel, runlog, train

FILES = sorted(path.stem for path in (configs.REPOSITORY / "configs").glob("*.py") if path.stem != "default")
# EfficientNet's blocks are the MobileNets' too. LeNet's is in test_train.py, with more of what a run can do; what is
# GoogLeNet's alone, its auxiliary classifiers, in test_googlenet.py.
FAMILIES = ("efficientnet_b0",)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAMILIES else [pytest.mark.full]) for n in FILES])
def test_smoke(name, dies_at_3, tmp_path):
    trains_dies_and_goes_on(configs.load_config(f"configs/{name}.py:smoke"), dies_at_3, tmp_path / "run")


def trains_dies_and_goes_on(config, dies_at_3, workdir):
    dies_at_3(config, workdir)
    result = train.run_training(config, workdir, quiet=True)
    assert runlog.read_manifest(workdir)["sessions"][-1]["first_step"] == 2
    assert (result.step, result.metrics["test_examples"]) == (4, 16)
    rows = runlog.read_metrics(workdir)
    assert [row["step"] for row in rows if "test_loss" in row] == [2, 4]
    assert all(np.isfinite(row["train_loss"]) for row in rows if "train_loss" in row)


@pytest.mark.full
def test_efficientnet_with_everything_on(dies_at_3, tmp_path, monkeypatch):
    """Averages, accumulation, groups over several devices, AutoAugment, stochastic depth, dropout, bfloat16."""
    monkeypatch.setattr(parallel, "data_mesh", lambda: mesh_of(8))
    overrides = {
        "accumulate_steps": 2,
        "model.norm_group": 4,
        "model.dtype": "bfloat16",
        "model.stages": ((6, 32, 1, 1, 5),),  # one residual block
    }
    config = configs.load_config("configs/efficientnet_b0.py:smoke", overrides)
    trains_dies_and_goes_on(config, dies_at_3, tmp_path / "run")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Photographs in ImageNet's shape: folders of synsets, files of 500 x 375 pixels ending in .JPEG; 64 and 16, 4 classes."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, count in (("train", 16), ("val", 4)):
        for label, synset in enumerate(("n01440764", "n01443537", "n02099601", "n03000684")):
            (root / split / synset).mkdir(parents=True)
            for i in range(count):
                coarse = np.random.default_rng((count, label, i)).integers(0, 256, (6, 8, 3), np.uint8)
                picture = Image.fromarray(coarse).resize((500, 375) if i % 4 else (375, 500), Image.Resampling.BICUBIC)
                picture.save(root / split / synset / f"{synset}_{i}.JPEG", quality=90)
    return root


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Eight compile longer, and what they change is tested elsewhere."""
    monkeypatch.setattr(parallel, "data_mesh", lambda: mesh_of(1))


RECIPES = [name for name in FILES if configs.load_config(f"configs/{name}.py").data.source == "tfds:imagenet2012"]


@pytest.mark.full  # a folder of photographs trains in test_photographs.py
@pytest.mark.parametrize("name", RECIPES)
def test_recipe_on_photographs(name, imagenet, tmp_path):
    """What it cuts out, changes and mixes is the recipe's; only network, images and duration are small."""
    recipe, config = (configs.load_config(f"configs/{name}.py{form}") for form in ("", ":smoke"))
    source = {"data.source": f"folder:{imagenet}", "data.fit": "crop", "evaluate.crops": recipe.evaluate.crops}
    configs.override(config, source)
    shrunken = {"mix_group": 2, "repeats": {3: 2}.get(recipe.augment.repeats, recipe.augment.repeats)}
    assert (config.augment.to_dict(), config.loss) == (recipe.augment.to_dict() | shrunken, recipe.loss)
    result = train.run_training(config, tmp_path / "run", quiet=True)
    assert (result.step, result.metrics["test_examples"]) == (4, 16)
    rows = runlog.read_metrics(tmp_path / "run")
    assert all(np.isfinite(row["train_loss"]) for row in rows if "train_loss" in row)
