"""MobileNet (V1). Howard et al. 2017, https://arxiv.org/abs/1704.04861, section 3.3, with the numbers of the authors' code,
https://github.com/tensorflow/models/blob/master/research/slim/nets/mobilenet_v1_train.py.

    python -m cnnfamily.train --config=configs/mobilenet_v1.py:digits   # the embedded digits at 32 pixels
    python -m cnnfamily.train --config=configs/mobilenet_v1.py:smoke    # a shrunken network, seconds
    python -m cnnfamily.train --config=configs/mobilenet_v1.py          # ImageNet, once it is prepared (README)

`:digits` gives 99.2 % of the 360 test digits (seed 0 alone) after 24 epochs.

The paper has 70.6 % top-1 on ImageNet: 68.4, 63.7 and 50.6 % with `model.width` 0.75, 0.5 and 0.25; 69.1, 67.2 and 64.4 % with
`data.resolution` 192, 160 and 128, which is its resolution multiplier times 224.

The paper names RMSProp and asynchronous workers but no numbers; the code has plain SGD. What differs from the code: the weights
of depthwise kernels decay as well, batch norm keeps 0.99 (theirs 0.9997), the activation is the paper's ReLU (theirs ReLU6),
and the length, which neither states, is ours. Crops and changes of
colour are Inception's, the latter as jitter of 0.4 (theirs moves the hue too).
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = "") -> ConfigDict:
    config = default.get_config("mobilenet_v1")
    config.update(
        {
            "batch_size": 64,
            "total_epochs": 200.0,
            "model": {"dropout": 0.001},
            "data": default.IMAGENET | {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
            "augment": {"flip": True, "jitter": 0.4},
            "optim": {
                "name": "sgd",
                "learning_rate": 0.045,
                "reference_batch": 64,
                "momentum": 0.0,
                "nesterov": False,
                "weight_decay": 4e-5,
                "schedule": "exponential",
                "decay_factor": 0.94,
                "decay_epochs": 2.5,
            },
        }
    )
    return default.choose(config, arg, digits_epochs=24.0)
