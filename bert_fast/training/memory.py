"""Memory that one step frees and the next one wants again."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

#: Names that glibc's <malloc.h> gives to what `mallopt` sets.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4

#: What glibc begins with; and where its own adjustments of the threshold end.
_MMAP_MAX_DEFAULT, _TRIM_THRESHOLD_DEFAULT = 65536, 64 * 2**20


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it the process keeps what it frees, and returns it to the system at the end.

    A step frees its gradients and activations, hundreds of megabytes, and the next step asks for as much. Where the C
    library has given them back meanwhile, the system hands them out anew, one zeroed page after the other: up to a
    quarter of a step's time on a CPU. `bert_fast.training.Trainer` trains within this; wrap a loop of your own in it.

    It changes nothing about a GPU's memory, and nothing at all where the C library is not glibc.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, _MMAP_MAX_DEFAULT)
        library.mallopt(_TRIM_THRESHOLD, _TRIM_THRESHOLD_DEFAULT)
        library.malloc_trim(0)
