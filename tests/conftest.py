"""The whole suite: eight virtual CPU devices, strict dtype promotion, one compilation cache for the run and its processes."""

import fcntl
import gc
import importlib.metadata
import os
import tempfile

# Less time to compile, which is most of the suite's: LLVM's first level takes a tenth less.
QUICK = "--xla_backend_optimization_level=1"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones end the process at a flag that they do not know
    # And XLA's older way to emit fused loops a quarter: the smoke tests and test_models 54 s, 73 s without these two.
    QUICK += " --xla_llvm_disable_expensive_passes=true --xla_cpu_use_fusion_emitters=false"

if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers take over the environment of the first process
    _CACHE = tempfile.TemporaryDirectory(prefix="cnnfamily_tests_")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # All set, so that no command starts itself again (see cnnfamily/memory.py).
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=4"

import jax  # reads the environment, so after it
import pytest
from jax.sharding import AxisType, Mesh

from cnnfamily import config as configs
from cnnfamily import train

LENET = "configs/lenet5_digits.py"
SHORT = {"total_epochs": 4.0, "evaluate.every_epochs": 1.0, "log.every_steps": 10, "optim.warmup_epochs": 0.5}

jax.config.update("jax_numpy_dtype_promotion", "strict")
# What JAX traced lives on in its caches: each look at all of a million objects takes half a second and finds next to nothing,
# 12 of 138 s of test_models, test_mobilenet_v3 and test_weights. Looking at the young ones 70 times less often, and at the old
# ones hardly ever, they took as much memory (1.9 GB).
gc.set_threshold(50_000, 20, 100)


# Modules that compare no program with another one compile without LLVM's optimisations: seven small networks and their
# gradients 13.7 s for 23.9 (test_every_parameter_is_used, two Zen 3 cores, once). Elsewhere three tests failed that find equal
# what two programs compute. In the one looked into, of one device and two, the images' normalisation in float32 rounded unlike:
# with what it gives cut to 8 bits, all was equal to 1e-15 again.
MODULES = "airbench alexnet augment batch_norm benchmark convolution convert efficientnet feed fold fuzz golden_logits"
MODULES += " googlenet initializers keras layers lenet losses mobilenet_v1 mobilenet_v2 mobilenet_v3 models nonfinite"
MODULES += " onednn onednn_forms optim photographs policies pooling preview resnet smoke speed_study stochastic_depth sweep"
MODULES += " vgg weights"
UNOPTIMISED = {f"test_{name}" for name in MODULES.split()}
# The same for processes of their own, where all that are compared have it.
UNOPTIMISED_PROCESS = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the fixtures, of which one of a module comes before all of a function: it has to compile as its tests do."""
    unoptimised = item.module.__name__.split(".")[-1] in UNOPTIMISED
    if unoptimised != jax.config.values["jax_disable_most_optimizations"]:
        jax.clear_caches()  # no program of the one kind in a test of the other, whatever ran before
        jax.config.update("jax_disable_most_optimizations", unoptimised)


def mesh_of(devices: int) -> Mesh:
    """A mesh of the first `devices` devices, as `parallel.data_mesh` makes one of all."""
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


@pytest.fixture
def x64():
    """64-bit floats for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def on_cpu():
    """Skips a test of what only a CPU gets, in the suite's run on a GPU."""
    if jax.default_backend() != "cpu":
        pytest.skip(f"of a CPU alone, and this is a {jax.default_backend()}")


def short_config(**overrides):
    """LeNet-5 on the digits for 88 steps; `group__key=value` sets `group.key`."""
    return configs.load_config(LENET, SHORT | {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.fixture
def dies_at_3(monkeypatch):
    """`dies_at_3(config, workdir)` trains until the third step, and dies there."""

    def die(self, step, *figures):
        if step == 3:
            raise ZeroDivisionError

    def run(config, workdir):
        with monkeypatch.context() as context, pytest.raises(ZeroDivisionError):
            context.setattr(train.Report, "update", die)
            train.run_training(config, workdir, quiet=True)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of `short_config` with averaged weights, which tests read and do not change: (workdir, result)."""
    assert not jax.config.values["jax_disable_most_optimizations"], "the modules that compare with it have optimisations"
    ours = tmp_path_factory.getbasetemp()
    shared = ours.parent if "PYTEST_XDIST_WORKER" in os.environ else ours
    with open(shared / "finished.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the worker that comes second finds the run finished
        return shared / "finished", train.run_training(short_config(ema__decay=0.95), shared / "finished", quiet=True)
