"""Every error that actcache raises on purpose, by who must act.

One base class, so that a caller can catch the library and nothing else. ``OSError`` (a full or read-only disk) is
never wrapped: it passes through as it is.
"""

from __future__ import annotations

import copyreg
from typing import Any


class ActcacheError(Exception):
    """Base of all errors below. Each comes out of another process, or a copy, as what it was."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are made again by calling their class with ``args``, which knows no keywords.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class InputError(ActcacheError, ValueError):
    """The caller's argument or file is wrong: the message says what was found, what was expected and what to do."""


class AlreadyCommittedError(InputError):
    """A segment of this name is committed; it is immutable, and the one that was given has not been written."""


class IncompatibleError(ActcacheError):
    """Two things that must agree do not: checkpoints of a lineup, or a store and the model, dtype or prompts given.

    Attributes:
        field: the name of the first field that differs.
    """

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class UnsupportedModelError(ActcacheError):
    """The architecture cannot be cut into blocks, or fails a probe that the result depends on."""


class NotFiniteError(UnsupportedModelError):
    """A model, given finite values, computed NaN or infinity: its weights are damaged, or its dtype is too narrow. Who
    chose the checkpoint and the dtype must act. (Of an edit that makes such values, it is an InputError.)

    Attributes:
        row: the first row of those computed together, where its caller may know more of it; None otherwise.
    """

    def __init__(self, message: str, *, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


class CorruptStoreError(ActcacheError):
    """Stored bytes are not the bytes that were committed: names the segment, the array and the chunk where known."""


class CorruptFileError(ActcacheError):
    """The bytes of a run's file are not those that were written: names the file and what to do."""


class FormatVersionError(ActcacheError):
    """The store was written in a format that this version does not read."""


class NoMemoryError(ActcacheError):
    """There is not the memory that a stage needs: the message says which stage, and what needs less."""


class CheckError(ActcacheError):
    """A number that must hold did not (the replayed diagonal is off its native margin, for example)."""


class KernelError(ActcacheError):
    """A native kernel failed: the message carries its name and the error code."""
