"""What is measured on a GPU, a row a step, in the order of its worth: first what takes minutes, then what takes long.

In a command {device} is the machine's name (h100), {cores} the processor's cores, {jobs} how many small networks train at
once, {measured} what `compare.py` wrote, {cifar} and {flowers} the data. On a CPU `small` is tried in its place: no number of
it is worth anything.
"""

import dataclasses

SPEED = "python experiments/speed"
SWEEP = "python -m cnnfamily.sweep --retry --jobs={jobs}"
CIFAR = "--config.data.source=npz:{cifar}"
# A side of four processes has to fit beside the others in 80 GB.
COMPARE = f"{SPEED}/compare.py --out=experiments/speed/results/gpu_{{device}}.json "
COMPARE_SMALL = f"{COMPARE} --rounds=1 --seconds=0.05 --batch=2 --models=lenet5"
COMPARE += "--rounds=3 --seconds=0.7 --batch=128 --start-timeout=400"
CANDIDATES = f"{SPEED}/candidates.py --out=experiments/speed/results/candidates_{{device}}.json "
FIRST = "resnet50,efficientnet_b0,mobilenet_v2,mobilenet_v3_large"
OTHERS = "alexnet,vgg16,googlenet,mobilenet_v1,lenet5"
SPEED_RESULTS = tuple(
    f"experiments/speed/results/{name}_*"
    for name in ("gpu", "profile-gpu", "candidates", "stochastic_depth", "determinism", "batch")
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command of the list. `seconds` is its share of a session's time; the longer ones go on with what others leave."""

    label: str
    item: str  # of the list in README.md
    what: str
    command: str
    small: str
    seconds: int = 240
    least: int = 60  # with less time left it is not begun
    grace: int = 30  # seconds to save and end in, when time is up
    results: tuple[str, ...] = ()  # globs of files that come back
    run: str = ""  # a run directory, whose metrics and curves come back as results/LABEL/
    needs: tuple[str, ...] = ()  # data: cifar, flowers
    after: tuple[str, ...] = ()  # steps that have to be done
    file: str = ""  # that has to exist in the repository
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


def sweep(label: str, item: str, what: str, study: str, form: str, small: str, source: str = CIFAR, **fields) -> Step:
    """A study of `experiments/`, whose rows train several at once."""
    command, smoke = (
        f"{SWEEP} --sweep=experiments/{study}/sweep.py{name and ':'}{name} --workdir=runs/gpu/{label} {source}"
        for name in (form, small)
    )
    written = tuple(f"experiments/{study}/results{name and '-'}{name}.jsonl" for name in (form, small))
    fields = {"results": written, "needs": ("cifar",)} | fields
    return Step(label, item, what, command, smoke, **fields)


STEPS = [
    Step(
        "tests",
        "1",
        "the test suite, on the processor",
        "python -m pytest -n {cores} -p no:cacheprovider",
        "python -m pytest -n 0 -p no:cacheprovider tests/test_rng.py",
        seconds=300,
        environment={"JAX_PLATFORMS": "cpu"},
    ),
    Step(
        "tests-gpu",
        "1",
        "the tests of layers and of the step, on the GPU in full float32",
        "python -m pytest -n 4 -p no:cacheprovider tests/test_convolution.py tests/test_batch_norm.py tests/test_pooling.py "
        "tests/test_layers.py tests/test_recompute.py tests/test_losses.py",
        "python -m pytest -n 0 -p no:cacheprovider tests/test_losses.py",
        seconds=120,
        environment={"JAX_DEFAULT_MATMUL_PRECISION": "highest", "NVIDIA_TF32_OVERRIDE": "0"},
    ),
    Step(
        "digits",
        "1",
        "EfficientNet-B0 on the embedded digits",
        "python -m cnnfamily.train --config=configs/efficientnet_b0.py:digits --workdir=runs/gpu/digits",
        "python -m cnnfamily.train --config=configs/lenet5_digits.py --workdir=runs/gpu/digits --config.total_epochs=4.0",
        seconds=150,
        run="runs/gpu/digits",
    ),
    Step(
        "speed",
        "2",
        "ours, plain Flax, torch eager and compiled: training of four networks in bfloat16",
        f"{COMPARE} --modes=train --dtypes=bfloat16 --together=2 --models={FIRST}",
        f"{COMPARE_SMALL} --modes=train --dtypes=bfloat16,float32 --together=2 --sides=ours,plain,eager",
        seconds=330,
        least=150,
        results=SPEED_RESULTS,
    ),
    Step(
        "profile",
        "2",
        "where the time goes in the three furthest behind torch",
        f"{SPEED}/furthest.py {{measured}}",
        f"{SPEED}/furthest.py {{measured}} --seconds=0.1",
        after=("speed",),
        results=SPEED_RESULTS,
    ),
    Step(
        "speed-float32",
        "2",
        "the same in float32",
        f"{COMPARE} --modes=train --dtypes=float32 --models={FIRST}",
        f"{COMPARE_SMALL} --modes=train --dtypes=float32 --sides=ours,plain,eager",
        least=150,
        results=SPEED_RESULTS,
    ),
    Step(
        "candidates",
        "2",
        "forms of depthwise convolutions, batch norm and the stem, what is computed anew, flags, in bfloat16",
        f"{CANDIDATES} --rounds=3 --seconds=0.7 --batch=96 --start-timeout=200",  # eleven processes in 80 GB
        f"{CANDIDATES} --rounds=1 --seconds=0.05 --batch=2 --resolution=32 --models=lenet5",
        seconds=300,
        least=150,
        results=SPEED_RESULTS,
    ),
    Step(
        "depth-time",
        "3",
        "what the forms of stochastic depth cost: ResNet-110, one process alone",
        f"{SPEED}/stochastic_depth.py --out=experiments/speed/results/stochastic_depth_{{device}}.md",
        f"{SPEED}/stochastic_depth.py --model=resnet20_cifar --rounds=1 --steps=1 "
        "--out=experiments/speed/results/stochastic_depth_{device}.md",
        least=120,
        results=SPEED_RESULTS,
    ),
    sweep("cifar-short", "3", "ResNet-20 to 110, a tenth of the paper's schedule", "cifar_resnet", "short", "smoke"),
    sweep(
        "depth-short",
        "3",
        "ResNet-110 with stochastic depth, as many steps",
        "cifar_resnet",
        "stochastic_depth_short",
        "stochastic_depth_smoke",
    ),
    sweep("scaling-short", "4", "the scaling study at 32 pixels, one seed", "scaling", "cifar10_short", "cifar10_smoke"),
    sweep(
        "flowers",
        "5",
        "EfficientNet-B0 to B3 and ResNet-50 on the flowers",
        "flowers",
        "",
        "smoke",
        source="--config.data.source=folder:{flowers}",
        needs=("flowers",),
    ),
    Step(
        "fast",
        "6",
        "CIFAR-10 fast",
        "python -m cnnfamily.train --config=configs/cifar10_fast.py --workdir=runs/gpu/fast " + CIFAR,
        "python -m cnnfamily.train --config=configs/cifar10_fast.py:smoke --workdir=runs/gpu/fast",
        run="runs/gpu/fast",
        needs=("cifar",),
        file="configs/cifar10_fast.py",
    ),
    Step(
        "determinism",
        "7",
        "two equal runs equal to the bit, and what that costs",
        f"{SPEED}/determinism.py --rounds=3 --out=experiments/speed/results/determinism_{{device}}.json",
        f"{SPEED}/determinism.py --rounds=1 --steps=2 --batch=2 --resolution=32 --models=lenet5 --dtypes=float32 "
        "--out=experiments/speed/results/determinism_{device}.json",
        results=SPEED_RESULTS,
    ),
    Step(
        "batch",
        "7",
        "images/s against the batch until memory is full",
        f"{SPEED}/scale.py efficientnet_b0 --resolution=224 --dtype=bfloat16 --lines=batch --smallest-batch=32 --seconds=1.5 "
        "--out=experiments/speed/results/batch_{device}.json",
        f"{SPEED}/scale.py resnet20_cifar --resolution=32 --lines=batch --largest-batch=2 --seconds=0.05 "
        "--out=experiments/speed/results/batch_{device}.json",
        results=SPEED_RESULTS,
        environment={"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"},
    ),
    Step(
        "speed-rest",
        "2, whole",
        "the other networks, and inference",
        f"{COMPARE} --modes=train,infer,infer_folded --models={FIRST},{OTHERS}",
        f"{COMPARE_SMALL} --modes=train,infer,infer_folded --dtypes=float32 --sides=ours,plain,eager",
        seconds=600,
        least=150,
        results=SPEED_RESULTS,
    ),
    Step(
        "profile-rest",
        "2, whole",
        "where the time goes in the three furthest behind torch of all",
        f"{SPEED}/furthest.py {{measured}}",
        f"{SPEED}/furthest.py {{measured}} --seconds=0.1",
        after=("speed-rest",),
        results=SPEED_RESULTS,
    ),
    sweep("cifar", "3, whole", "ResNet-20 to 110 with the paper's schedule", "cifar_resnet", "", "smoke", seconds=600),
    sweep(
        "depth",
        "3, whole",
        "ResNet-110 with stochastic depth, the paper's 500 epochs",
        "cifar_resnet",
        "stochastic_depth",
        "stochastic_depth_smoke",
        seconds=600,
    ),
    sweep(
        "scaling",
        "4, whole",
        "the scaling study at 32 pixels, three seeds",
        "scaling",
        "cifar10",
        "cifar10_smoke",
        seconds=600,
    ),
]
