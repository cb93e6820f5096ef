"""A command that asks for huge pages gets them, with its arguments, and starts again only once."""

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
    memory.use_huge_pages()
pages = 40 * 2**20 // os.sysconf("SC_PAGESIZE")
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.full(40 * 2**20, 1, np.uint8)
print(sys.argv[1:], (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (10 * pages))
"""


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
