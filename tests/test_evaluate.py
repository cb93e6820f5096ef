"""Figures of a run again, from its directory alone."""

import json

import jax
import numpy as np
import pytest

from cnnfamily import evaluate, models, weights
from cnnfamily.data import augment, feed, sources
from cnnfamily.errors import UsageError


def test_evaluation_gives_the_last_figure_again(finished, capsys):
    workdir, result = finished
    evaluate.main([f"--workdir={workdir}"])
    assert json.loads(capsys.readouterr().out) == {"step": 88, **result.metrics}


def test_load_run_gives_the_averaged_network(finished):
    workdir, result = finished
    network, variables, config = evaluate.load_run(workdir)
    data = feed.load_data(config)
    images = augment.normalize(data.test.images, data.mean, data.std)
    hits = np.argmax(network.apply(variables, images), axis=1) == data.test.labels
    assert hits.mean() == pytest.approx(result.metrics["ema_test_top1"])


def test_the_best_checkpoint_has_the_best_figure(finished):
    workdir, result = finished
    best = evaluate.evaluate_run(workdir, which="best")
    assert best["ema_test_top1"] >= result.metrics["ema_test_top1"]


def test_weights_of_a_file_are_evaluated_on_a_configs_data(tmp_path, capsys):
    """On the digits, by the figures of the network itself."""
    network = models.create_model("resnet20_cifar", in_channels=1)
    variables = models.initialize(network, jax.random.key(3), resolution=8)
    weights.save_weights(tmp_path / "x.safetensors", network, variables)
    config = ["--config=configs/default.py:digits", "--config.model.in_channels=1", "--config.data.resolution=8"]
    evaluate.main(["--model=resnet20_cifar", f"--weights={tmp_path / 'x.safetensors'}", *config])
    found = json.loads(capsys.readouterr().out)
    data = sources.load("digits", resolution=8, channels=1)
    logits = jax.jit(network.apply)(variables, augment.normalize(data.test.images, data.mean, data.std))
    assert found["test_examples"] == 360
    assert found["test_top1"] == pytest.approx(float(np.mean(np.argmax(logits, axis=1) == data.test.labels)), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --workdir, or --model, --weights and --config"),
        (["--model=resnet18", "--weights=x"], "expected --workdir, or --model, --weights and --config"),
        (["--workdir=nowhere", "--weights=x"], "expected --workdir, or --model, --weights and --config"),
        (["--workdir=nowhere", "--fast"], "unrecognized argument --fast"),
        (["--model=resnet18", "--weights=gone.pth", "--config=configs/default.py:digits"], r"gone\.pth does not exist"),
        (["--workdir=nowhere"], "nowhere is no run directory"),
        (["--workdir=nowhere", "--checkpoint=last"], "invalid choice: 'last'"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message):
    with pytest.raises(UsageError, match=message):
        evaluate.main(arguments)
