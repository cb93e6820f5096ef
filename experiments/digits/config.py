"""One recipe for every network on the embedded digits: `--config=experiments/digits/config.py:NAME`, see README.md."""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str) -> ConfigDict:
    config = default.get_config(arg)
    default.digits(config, epochs=8.0)
    config.evaluate.every_epochs = 4.0
    return config
