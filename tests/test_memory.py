"""A command that tunes malloc gets huge pages, few arenas, keeps what it frees, and starts again once, with its arguments."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CODE = """
import os, resource, sys
os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"  # NumPy asks for huge pages by itself
import numpy as np
from cnnfamily import memory
if sys.argv[1] == "huge":
    memory.tune_malloc()
pages = 40 * 2**20 // os.sysconf("SC_PAGESIZE")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.full(40 * 2**20, 1, np.uint8)
print(sys.argv[1:], (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (10 * pages))
"""


@pytest.mark.full
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="needs Linux with glibc that leaves huge pages to programs",
)
def test_large_blocks_cost_few_page_faults():
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    faults = {}
    for how in ("small", "huge"):
        command = [sys.executable, "-c", CODE, how, "two words"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        arguments, faults[how] = done.stdout.rsplit(" ", 1)
        assert arguments == f"['{how}', 'two words']"
    assert float(faults["small"]) > 0.9
    assert float(faults["huge"]) < 0.1


KEPT = """
import os, resource
from cnnfamily import memory
memory.tune_malloc()
import jax, jax.numpy as jnp
@jax.jit
@jax.vmap
def step(x):  # with a temporary of 64 MiB; without a loop so small a program is run by the caller anyway
    return jax.lax.fori_loop(0, 2, lambda i, x: x + 1, jnp.sin(x @ x.T) @ x)
mesh = jax.make_mesh((jax.device_count(),), ("batch",))
x = jax.device_put(jnp.ones((jax.device_count(), 4096, 64)), jax.NamedSharding(mesh, jax.P("batch")))
for _ in range(8):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    step(x).block_until_ready()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * os.sysconf("SC_PAGESIZE") / 2**20 / 40 / jax.device_count())
"""


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
@pytest.mark.parametrize(("devices", "arenas"), [(1, ""), (2, ":glibc.malloc.arena_max=1")])
def test_the_temporaries_of_a_step_are_kept_for_the_next(devices, arenas):
    small = f"glibc.malloc.hugetlb=0{arenas}"  # small pages, so that faults tell how much came from the kernel
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment, megabytes = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}, {}
    for how, given in (("kept", small), ("returned", f"{small}:glibc.malloc.mmap_max=65536")):
        command = [sys.executable, "-c", KEPT]
        tunables = {"GLIBC_TUNABLES": given}
        done = subprocess.run(command, capture_output=True, text=True, env=environment | tunables, check=True)
        megabytes[how] = float(done.stdout)
    assert megabytes["kept"] < 16  # a place for the block may be found anew a few times
    assert megabytes["returned"] > 60  # what the test rests on, and that a setting of one's own stays


ARENAS = """
import ctypes, sys, threading
from cnnfamily import memory
memory.tune_malloc()
barrier = threading.Barrier(20)
def allocate():
    held = [bytearray(2000) for _ in range(100)]
    barrier.wait()  # a thread that ends leaves its arena to the next
threads = [threading.Thread(target=allocate) for _ in range(20)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, ctypes.c_void_p(file))
libc.fclose(ctypes.c_void_p(file))
"""


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
def test_threads_share_two_arenas_for_every_core(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX")}
    expected = min(21, 2 * len(os.sched_getaffinity(0)))  # 20 threads and the first
    for given, arenas in (({}, expected), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}, 3), ({"MALLOC_ARENA_MAX": "5"}, 5)):
        subprocess.run([sys.executable, "-c", ARENAS, str(tmp_path / "info")], env=environment | given, check=True)
        found = (tmp_path / "info").read_text().count("<heap nr=")
        assert found == arenas, given


FREED = """
from pathlib import Path
from cnnfamily import memory
def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024
blocks = [bytearray(100_000) for _ in range(2000)]  # each smaller than what malloc maps by itself
held = blocks[-1]  # so that what lies below it is not at the end of the heap
full = resident()
del blocks
kept = resident()
memory.return_freed()
print(full, kept, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs Linux with glibc")
def test_freed_memory_goes_back():
    environment = os.environ | {"GLIBC_TUNABLES": ""}
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, env=environment, check=True)
    full, kept, left = map(int, done.stdout.split())
    assert kept > full - 50  # what the test rests on: 190 MiB are free, and malloc keeps them
    assert left < full - 150
