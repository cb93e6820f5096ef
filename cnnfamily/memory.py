"""Huge pages for a process's memory, without which a third of a step on a CPU goes into page faults."""

import os
import platform
import sys
from pathlib import Path

_TUNABLE = "glibc.malloc.hugetlb=1"
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts this command again, once, with huge pages for what its C library allocates, where Linux leaves that to programs.

    XLA allocates its buffers anew for every step on a CPU, glibc returns blocks this large to the kernel at once, and each step
    faults them in again: 45,000 faults of 4 kB a step for EfficientNet-B0 on the digits and 121 to 124 ms a step, against
    81 to 87 ms with pages of 2 MB (two Zen 5 cores, jaxlib 0.10.2, medians of 35 steps, six runs alternating). glibc reads the
    tunable at the start of a process only. Keeping freed memory instead (mallopt) needs no new start and gave 75 ms, but
    nothing in a process that has compiled the step itself, and its single heap slowed that compilation by a quarter.

    Call it first thing in a command: what ran before runs again. Elsewhere than on Linux with glibc it does nothing.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in tunables or platform.libc_ver()[0] != "glibc":
        return
    try:
        left_to_programs = "[madvise]" in _SETTING.read_text()
    except OSError:
        return
    if left_to_programs:
        os.environ["GLIBC_TUNABLES"] = f"{tunables}:{_TUNABLE}" if tunables else _TUNABLE
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
