"""Memory that is not there, as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from actcache.errors import NoMemoryError

LESS_MODEL = (
    "--resident one holds one checkpoint at a time, --stream one block; --dtype bfloat16 halves the weights; "
    "'actcache plan' tells what a run takes"
)
_REFUSED = "can't allocate memory"  # torch's allocator for the CPU raises a plain RuntimeError that says so


@contextmanager
def enough_memory(what: str, advice: str) -> Iterator[None]:
    """Name what was under way, and what needs less, where Python or torch gets no memory.

    Raises:
        NoMemoryError: in place of a MemoryError, ``torch.OutOfMemoryError``, or what torch's CPU allocator raises.
    """
    try:
        yield
    except MemoryError as error:
        raise NoMemoryError(f"{what}: out of memory; {advice}") from error
    except RuntimeError as error:
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            raise NoMemoryError(f"{what}: out of memory on the device; {advice}") from error
        if _REFUSED in str(error):
            raise NoMemoryError(f"{what}: out of memory; {advice}") from error
        raise
