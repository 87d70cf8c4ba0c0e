"""How this process computes and holds memory: settled before PyTorch is loaded, and before training on a CPU.

What the user's environment says already stays.
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""

_NEVER, _OLD_LIMIT = 2**31 - 1, 2**25
"""Bytes: the largest number that mallopt takes, and what older versions take at most as the mmap threshold."""


def settle_environment() -> None:
    """Set what PyTorch reads when it is imported; processes started later inherit it."""
    # the same sums in the same order on any number of threads, so that a resumed run draws the same samples
    os.environ.setdefault("MKL_CBWR", "AUTO")
    # threads that wait for the next operation spin for microseconds, then sleep: sleeping at once is slow on a quiet
    # machine, spinning for long keeps others' work from the cores of a busy one (docs/log.md)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    # large tensors in pages of 2 MiB: a hundredth of the page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next tensors: the system would give it back page by page, zeroed.

    Returns whether it does: only glibc can, and a user's own settings of it stay.
    """
    set_already = any(name.startswith("MALLOC_") for name in os.environ)
    set_already = set_already or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    libc = ctypes.CDLL(None)
    if set_already or not hasattr(libc, "mallopt"):
        return False
    # a trim threshold alone would fix the other one where it is, at 128 KiB: every tensor would be mapped anew
    if not (libc.mallopt(_MMAP_THRESHOLD, _NEVER) or libc.mallopt(_MMAP_THRESHOLD, _OLD_LIMIT)):
        return False
    return bool(libc.mallopt(_TRIM_THRESHOLD, _NEVER))


def return_freed_memory() -> None:
    """Give the system what was kept."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
