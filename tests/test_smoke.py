"""The `:smoke` form of the config files trains, evaluates, and goes on where it died: one a family; with `-m full` all."""

import numpy as np
import pytest

from cnnfamily import config as configs
from cnnfamily import runlog, train

FILES = sorted(path.stem for path in (configs.REPOSITORY / "configs").glob("*.py") if path.stem != "default")
# LeNet's and EfficientNet's are in test_train.py, with more of what a run can do.
FAMILIES = ("alexnet_2012", "vgg11_bn", "googlenet_paper", "se_resnet18", "mobilenet_v1", "mobilenet_v2", "mobilenet_v3_small")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAMILIES else [pytest.mark.full]) for n in FILES])
def test_smoke(name, tmp_path, monkeypatch):
    config = configs.load_config(f"configs/{name}.py:smoke")

    def die_at_3(self, step, *figures):
        if step == 3:
            raise ZeroDivisionError

    with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):
        context.setattr(train.Report, "update", die_at_3)
        train.run_training(config, tmp_path / "run", quiet=True)
    result = train.run_training(config, tmp_path / "run", quiet=True)
    assert runlog.read_manifest(tmp_path / "run")["sessions"][-1]["first_step"] == 2
    assert (result.step, result.metrics["test_examples"]) == (4, 16)
    rows = runlog.read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "test_loss" in row] == [2, 4]
    assert all(np.isfinite(row["train_loss"]) for row in rows if "train_loss" in row)
