"""Freed memory goes back to the system while a training runs.

Steps of adaptive length free tensors of sizes that hardly ever return. glibc keeps the holes between those that live:
of 2.9 GiB of heap 0.7 were in use after three minutes at N = 256, and it went on growing (docs/performance.md).
"""

import ctypes
import functools
import time
from collections.abc import Callable

SECONDS_BETWEEN = 30.0  # a call takes 0.1 to 0.2 seconds


class HeapTrim:
    """Gives back what is free, when asked and not too often."""

    def __init__(self, seconds_between: float = SECONDS_BETWEEN) -> None:
        self._between, self._due = seconds_between, time.monotonic() + seconds_between

    def __call__(self) -> bool:
        """Give back, unless the last time is too near; whether it did. Nothing happens where there is no glibc."""
        trim = _malloc_trim()
        if trim is None or time.monotonic() < self._due:
            return False
        trim(0)
        self._due = time.monotonic() + self._between
        return True


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):  # another system, or another libc
        return None
    return found
