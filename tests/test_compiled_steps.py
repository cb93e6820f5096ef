"""A guard of speed that is no clock: what XLA counts in the compiled step of three networks, against what was recorded."""

import json

import jaxlib
import pytest
from compiled_steps import DTYPES, NETWORKS, RECORD, compiled_step, measure

from cnnfamily import config as configs
from cnnfamily import create_model, optim

RECORDED = json.loads(RECORD.read_text())
# A change of a few per cent is a fusion that fell otherwise. Batch norm left to autodiff had 1.1 to 1.6 times the bytes.
MARGIN = 0.05
QUICK = {("efficientnet_b0", "float32"), ("mobilenet_v2", "bfloat16"), ("resnet50", "bfloat16")}


@pytest.mark.skipif(jaxlib.__version__ not in RECORDED, reason=f"recorded for jaxlib {', '.join(RECORDED)} alone")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else [pytest.mark.full])
        for name in NETWORKS
        for dtype in DTYPES
    ],
)
def test_operations_bytes_and_memory_of_a_step(name, dtype):
    """A better figure fails too: `python tests/compiled_steps.py` records it, and the difference stands in the commit."""
    found, expected = measure(name, dtype), RECORDED[jaxlib.__version__][f"{name} {dtype}"]
    assert found == pytest.approx(expected, rel=MARGIN)


def test_what_all_parameters_have_in_common_is_computed_once(on_cpu):
    """The learning rate, and whether loss and gradient are finite; as scalars they are computed anew for each parameter."""
    config = configs.load_config("configs/lenet5_digits.py", {"optim.schedule": "cosine", "optim.name": "adamw"}).optim
    schedule = optim.learning_rate_schedule(config, total_steps=100, steps_per_epoch=10, batch_size=8)
    text = compiled_step(create_model("lenet5"), optim.make_optimizer(config, schedule), side=32, channels=1).as_text()
    assert (text.count(" cosine("), text.count(" is-finite(")) == (1, 1)
