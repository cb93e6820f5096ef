"""Images a second from JPEG files of 500 x 375 pixels to random crops of 224, beside the bare decoder doing the same.

    python experiments/speed/decoding.py [--rounds=7] [--images=256]

The files are scikit-learn's two photographs, cut in pieces of 500 x 375 at different places and saved with quality 93, on
disk. In turn, with one and two threads: the bare loop (read, decode with simplejpeg, crop and resize with Pillow), the same
with Pillow's decoder, and training batches of `folder:` through `TrainFeed`, which also draws the crops, sorts, copies and puts
the batches on the device. Where Grain is installed, also its threads and its worker processes, with our decoder and crops. Of
both, as many images as in the other rounds, after what they keep ready has been taken away. Prints a Markdown table; seconds
are those of the wall, rates are per thread.
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import io
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from cnnfamily import config as configs
from cnnfamily import parallel
from cnnfamily.data import feed
from cnnfamily.data.decoding import TrainCrop, crop_box, decode


def write_files(root: Path, count: int) -> list[Path]:
    from sklearn.datasets import load_sample_images

    rng, paths = np.random.default_rng(0), []
    photographs = load_sample_images().images
    for i in range(count):
        whole = Image.fromarray(photographs[i % 2])  # 640 x 427
        left, top = rng.integers(whole.width - 500 + 1), rng.integers(whole.height - 375 + 1)
        path = root / ("train" if i < count - 2 else "val") / "ab"[i % 2] / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.crop((left, top, left + 500, top + 375)).save(path, quality=93)
        paths.append(path)
    return paths[:-2]


def bare(paths: list[Path], decode, threads: int) -> None:
    boxes = [crop_box(np.random.default_rng(i), (500, 375), (0.08, 1.0), (3 / 4, 4 / 3)) for i in range(len(paths))]

    def one(i: int) -> np.ndarray:
        picture = decode(paths[i].read_bytes())
        return np.asarray(picture.crop(boxes[i]).resize((224, 224), Image.Resampling.BILINEAR))

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(len(paths))))


def with_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def with_simplejpeg(data: bytes) -> Image.Image:
    return Image.fromarray(simplejpeg.decode_jpeg(data))


def cut(path: Path, rng: np.random.Generator) -> np.ndarray:
    """What a worker of Grain does of one image; at the top level, for it is sent to other processes."""
    return TrainCrop(224)(decode(path.read_bytes()), rng)


def with_feed(train: feed.TrainFeed, count: int) -> float:
    """Seconds for `count` images in batches of 32 on the device, when nothing is ready any more; as `with_grain`."""
    first = with_feed.step
    for step in range(first, first + 4):
        train.batch(step)["images"].block_until_ready()
    start = time.perf_counter()
    for step in range(first + 4, first + 4 + count // 32):
        train.batch(step)["images"].block_until_ready()
    seconds = time.perf_counter() - start
    concurrent.futures.wait(train.batch._futures.values())  # else they would be made while the next way is measured
    with_feed.step = step + 100
    return seconds


with_feed.step = 0


def with_grain(paths: list[Path], workers: int, *, processes: bool) -> float:
    """Seconds for `len(paths)` images in batches of 32, from started workers that have nothing ready any more."""
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # it asks for a flag of its own before it starts a process
    images = grain.MapDataset.source(paths).seed(0).shuffle().repeat().random_map(cut)
    threads = grain.ReadOptions(num_threads=1 if processes else workers, prefetch_buffer_size=32)
    batches = images.to_iter_dataset(threads).batch(32)
    if processes:
        options = grain.multiprocessing.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(options)
    batches = iter(batches)
    for _ in range(4 * workers):
        next(batches)
    start = time.perf_counter()
    for _ in range(len(paths) // 32):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()  # else it would make further ones while the next way is measured
    return seconds


def measure(rounds: int, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(Path(folder), count + 2)
        sizes = statistics.mean(path.stat().st_size for path in paths)
        print(f"{len(paths)} files of {sizes / 1000:.0f} kB; {rounds} rounds in turn, medians (smallest to largest)")
        packages = ("simplejpeg", "pillow", "jax", "numpy", *["grain"] * bool(importlib.util.find_spec("grain")))
        print(
            f"{os.cpu_count()} cores; Python {platform.python_version()}, " + ", ".join(f"{p} {version(p)}" for p in packages)
        )
        print("\n| threads | what | images/s a thread | share of the bare decoder |\n|---|---|---|---|")
        for threads in (1, 2):
            overrides = {
                "data.source": f"folder:{folder}",
                "data.workers": threads,
                "batch_size": 32,
                "model.num_classes": 2,
            }
            config = configs.load_config("configs/resnet50_imagenet.py", overrides)
            train = feed.TrainFeed(feed.load_data(config), config, parallel.local_mesh())
            ways = {
                "bare, simplejpeg": lambda threads=threads: bare(paths, with_simplejpeg, threads),
                "bare, Pillow": lambda threads=threads: bare(paths, with_pillow, threads),
                "`TrainFeed`": functools.partial(with_feed, train, len(paths)),
            }
            if importlib.util.find_spec("grain"):
                for kind in ("threads", "processes"):
                    ways[f"Grain, {kind}"] = functools.partial(with_grain, paths, threads, processes=kind == "processes")
            rates = {name: [] for name in ways}
            for i in range(rounds + 1):  # the first one warms up
                for name, way in ways.items():
                    start = time.perf_counter()
                    measured = way()
                    seconds = measured or time.perf_counter() - start
                    if i:
                        rates[name].append(len(paths) / threads / seconds)
            train.close()
            for name, found in rates.items():
                shares = [one / other for one, other in zip(found, rates["bare, simplejpeg"], strict=True)]
                share = f"{statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})"
                print(
                    f"| {threads} | {name} | {statistics.median(found):.0f} ({min(found):.0f} to {max(found):.0f}) | {share} |"
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    measure(arguments.rounds, arguments.images)
