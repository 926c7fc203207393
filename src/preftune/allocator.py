"""Allocator settings that must stand in the environment before the process starts.

By default glibc gives every large tensor's memory back to the system when it is freed, and asks for
it again at the next step: on a virtual machine each page then costs a fault (docs/performance.md has
what was measured). The settings keep the memory. Whoever has set one of them is left alone.
"""

import os
import platform
import sys

SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456",
}


def keep_memory() -> None:
    """Start this very process anew (same id) with the settings, where they would help."""
    if any(name in os.environ for name in SETTINGS) or platform.libc_ver()[0] != "glibc":
        return
    if not sys.orig_argv or not sys.executable:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **SETTINGS})
