"""What is settled for a process, each in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

SETTLE = """
import os
from anchored.process import settle_environment
settle_environment()
print(*(os.environ.get(name) for name in ("MKL_CBWR", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE")))
"""

FAULTS = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: some machines give pages of 2 MB unasked
from anchored.process import keep_freed_memory
print(keep_freed_memory())
def touch():
    b'x' * 2**26
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(program: str, **changes: str) -> list[str]:
    ours = ("MKL_CBWR", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "GLIBC_TUNABLES")
    environment = {name: value for name, value in os.environ.items() if name not in ours and "MALLOC" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | changes, capture_output=True, text=True, check=True
    )
    return done.stdout.split()


def test_what_the_user_has_set_stays() -> None:
    assert run(SETTLE) == ["AUTO", "5000", "1"]
    assert run(SETTLE, OMP_WAIT_POLICY="active") == ["AUTO", "None", "1"]
    assert run(SETTLE, MKL_CBWR="COMPATIBLE", GOMP_SPINCOUNT="7", THP_MEM_ALLOC_ENABLE="0") == ["COMPATIBLE", "7", "0"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_freed_memory_is_used_again_without_page_faults_unless_the_user_has_set_malloc() -> None:
    kept, faults = run(FAULTS)
    usual, usual_faults = run(FAULTS, MALLOC_ARENA_MAX="4")
    tuned, _ = run(FAULTS, GLIBC_TUNABLES="glibc.malloc.arena_max=4")
    assert (kept, usual, tuned) == ("True", "False", "False")
    # 16384 pages each time, where they are not kept
    assert int(faults) < 1000
    assert int(usual_faults) > 100_000
