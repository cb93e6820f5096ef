"""The table of well-known sets."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from cnnfamily.data.known import KNOWN
from cnnfamily.data.sources import measure

SHARED = Path(__file__).parents[2] / "shared/data"


def test_sizes_and_names():
    sizes = {name: (known.train, known.test, known.size, known.channels, known.num_classes) for name, known in KNOWN.items()}
    assert sizes == {
        "mnist": (60_000, 10_000, 28, 1, 10),
        "fashion_mnist": (60_000, 10_000, 28, 1, 10),
        "cifar10": (50_000, 10_000, 32, 3, 10),
        "cifar100": (50_000, 10_000, 32, 3, 100),
        "svhn_cropped": (73_257, 26_032, 32, 3, 10),
        "imagenet2012": (1_281_167, 50_000, 0, 3, 1000),
    }
    for name, known in KNOWN.items():
        assert len(set(known.class_names)) >= known.num_classes - 2, name  # ImageNet has two cranes and two maillots
        assert len(known.std) == known.channels
    assert list(KNOWN["cifar100"].class_names) == sorted(KNOWN["cifar100"].class_names)
    assert KNOWN["cifar10"].class_names[3:6] == ("cat", "deer", "dog")


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_the_normalisation_of_mnist_is_that_of_its_pixels():
    content = gzip.decompress((SHARED / "mnist/train-images-idx3-ubyte.gz").read_bytes())
    mean, std = measure(np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28, 1))
    assert (round(mean[0], 4), round(std[0], 4)) == (KNOWN["mnist"].mean[0], KNOWN["mnist"].std[0])
