"""What malloc does with memory: huge pages, without which a third of a step on a CPU is page faults, few arenas, and what is
freed is kept for the next step."""

import ctypes
import os
import platform
import sys
from pathlib import Path

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def malloc_tunables() -> dict[str, str]:
    """The tunables of glibc's malloc that serve training on this machine (`tune_malloc`); none without glibc."""
    if platform.libc_ver()[0] != "glibc":
        return {}
    tunables = {
        "glibc.malloc.arena_max": str(2 * len(os.sched_getaffinity(0))),
        "glibc.malloc.mmap_max": "0",
        "glibc.malloc.trim_threshold": str(2**40),
        "glibc.malloc.top_pad": str(2**26),
    }
    try:
        if "[madvise]" in _SETTING.read_text():
            tunables["glibc.malloc.hugetlb"] = "1"
    except OSError:
        pass
    return tunables


def tune_malloc() -> None:
    """Starts this command again, once, with the `malloc_tunables` that are not set yet; glibc reads them when a process starts.

    Huge pages, where Linux leaves them to programs: XLA allocates its buffers anew for every step on a CPU, and memory that
    comes from the kernel costs a fault a page: 45,000 faults of 4 kB a step for EfficientNet-B0 on the digits and 121 to 124 ms
    a step, against 81 to 87 ms with pages of 2 MB (two Zen 5 cores, jaxlib 0.10.2, medians of 35 steps, six runs alternating).

    Two arenas for every core: glibc lets each thread have its own, up to eight for every core, and each keeps what it frees
    between what it still holds, so that memory grows while the threads of XLA and of the feed take turns at allocating. MiB
    resident in 20 epochs of ResNet-20 on photographs of 32 pixels, least of the epochs named; beside it seconds of 60 steps of
    EfficientNet-B0 on the digits, compilation included, medians of three runs in turn (two Xeon cores, jaxlib 0.10.2):

        arenas   epochs 4 to 7   17 to 20   most at any time   seconds
        16                 790        860              1,003      38.3
        4                  539        580                724      37.9
        2                  538        562                706      46.1
        1                  503        508                657      51.2
        16, `return_freed` after each evaluation
                           478        502                675
        4, likewise        458        483                653

    Fewer make threads wait for each other. On a machine with more cores this was not measured.

    What is freed is kept: else the memory of a step's temporaries, one block, goes back to the kernel after each step, which
    clears it for the next. This needs two things at once. No block is mapped by itself (`mmap_max`), which glibc heeds in its
    first arena alone; so steps run in the thread that asks for them (`jax_cpu_enable_async_dispatch`), not in one of XLA's.
    `top_pad` leaves room behind the block, so that it more often fits where it lay. Milliseconds of a training step, least,
    median and most of 7 to 11 after the first two, and the most MiB resident at any time, 224 pixels, batch 16; a process each,
    one after the other (two Zen 5 cores of a virtual machine, jaxlib 0.10.2):

                                     returned                     kept
        ResNet-50, float32           1,655   1,690   2,489 3,179  1,488   1,514   1,551 3,278 to 5,065
        EfficientNet-B0, float32       445     456     674 2,942    381     390     408 4,142
        MobileNetV2, bfloat16          247     257     267 1,759    233     240     247 1,777

    EfficientNet-B0 on the digits went from 1,385 to 1,555 images/s and from 1,290 to 1,430 MiB; LeNet-5 stayed (three runs in
    turn).

    Virtual devices run in threads of their own, which get the memory of the last step back only where they happen to have the
    first arena. With `GLIBC_TUNABLES=glibc.malloc.arena_max=1` all have it: large steps gain, up to 1.3 times, small ones and
    compilation lose, and memory grows (`experiments/speed/README.md`), so it is no default.

    Call it first thing in a command: what ran before runs again. MALLOC_ARENA_MAX and what GLIBC_TUNABLES has keep their say:
    with glibc.malloc.mmap_max=65536 in it, malloc's own value, nothing is kept.
    """
    wanted, present = malloc_tunables(), os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_ARENA_MAX" in os.environ:
        wanted.pop("glibc.malloc.arena_max", None)
    missing = [f"{name}={value}" for name, value in wanted.items() if name not in present]
    if missing:
        os.environ["GLIBC_TUNABLES"] = ":".join(([present] if present else []) + missing)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    if "glibc.malloc.mmap_max=0" in present:
        import jax

        jax.config.update("jax_cpu_enable_async_dispatch", False)  # which no environment variable sets


def return_freed() -> None:
    """Hands freed memory that malloc keeps back to the kernel (1.5 ms where it was measured); nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
