"""Gives memory that loading has freed back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def return_freed_memory() -> None:
    """Takes about a millisecond. Does nothing where the C library isn't glibc.

    Packing a matrix frees its row-major form, and glibc keeps such holes: 120 MB after the benchmark model's 28 layers.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    return trim
