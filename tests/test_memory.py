"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

CODE = """
import os, platform, resource, sys
os.environ["NUMPY_MADVISE_HUGEPAGE"] = "0"  # which would hide the faults
import numpy as np
from cnnfamily import memory
if platform.libc_ver()[0] != "glibc":
    sys.exit("no glibc")
if sys.argv[1] == "keep":
    assert memory.keep_freed_memory()
pages = 40 * 2**20 // os.sysconf("SC_PAGESIZE")
np.full(40 * 2**20, 1, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.full(40 * 2**20, 1, np.uint8)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / (10 * pages))
"""


def faults_a_page(how: str) -> float:
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True)
    if done.returncode and "no glibc" in done.stderr:
        pytest.skip("the C library is not glibc")
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_a_freed_block_is_used_again_without_page_faults():
    assert faults_a_page("keep") < 0.05
    assert faults_a_page("return") > 0.9, "glibc does so by itself now: keep_freed_memory has no purpose"
