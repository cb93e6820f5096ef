"""Decodes "CIFAR-10, JPEG q75" into the arrays that `npz:PATH` reads.

The set is all 60,000 images of CIFAR-10, each saved once as a JPEG of quality 75. The loss is visible: networks trained
on the true pixels lose about ten points of accuracy on it. So train and test on it only against itself, and call it
"CIFAR-10, JPEG q75" wherever a number is quoted. The output (184 MB) belongs in no commit.

Input: `header`, `class_names`, and for train and test `*_bodies`, `*_offsets`, `*_labels`; image i is the JPEG file
`header + bodies[offsets[i]:offsets[i + 1]]`.

    python experiments/cifar10_jpeg75_to_npz.py cifar10_jpeg75.npz decoded.npz
"""

import argparse
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image


def decode(header: bytes, bodies: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint8 [n, 32, 32, 3]."""
    images = np.empty((len(offsets) - 1, 32, 32, 3), np.uint8)

    def decode_one(i: int) -> None:
        body = bodies[offsets[i] : offsets[i + 1]].tobytes()
        images[i] = np.asarray(Image.open(io.BytesIO(header + body)).convert("RGB"))

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(decode_one, range(len(images))):
            pass
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="the .npz with JPEG bodies")
    parser.add_argument("output", help="the .npz to write")
    arguments = parser.parse_args()
    arrays = {}
    with np.load(arguments.input, allow_pickle=False) as archive:
        header = archive["header"].tobytes()
        arrays["class_names"] = archive["class_names"]
        for split in ("train", "test"):
            arrays[f"{split}_images"] = decode(header, archive[f"{split}_bodies"], archive[f"{split}_offsets"])
            arrays[f"{split}_labels"] = archive[f"{split}_labels"].astype(np.int32)
    np.savez(arguments.output, **arrays)
    for key, array in arrays.items():
        print(key, array.dtype, array.shape)


if __name__ == "__main__":
    main()
