"""Figures of a run again, from its directory alone."""

import json

import numpy as np
import pytest

from cnnfamily import evaluate
from cnnfamily.data import augment, feed
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --workdir"),
        (["--workdir=nowhere"], "nowhere is no run directory"),
        (["--workdir=nowhere", "--checkpoint=last"], "invalid choice: 'last'"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message):
    with pytest.raises(UsageError, match=message):
        evaluate.main(arguments)
