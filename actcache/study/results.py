"""Results: what finished jobs left in a folder, one sealed table for each, named by the job's key.

The *key* of a job is all that its rows depend on. It gives the file its name, so that two commands that run at once do
not write over each other's files, and it stands in the file. A job that ran again gives the same bytes in strict mode.
Knows keys and files; knows no models and no stores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import torch

from actcache.errors import CorruptFileError
from actcache.files import as_path, write_atomically
from actcache.progress import Told
from actcache.sealed import (
    NoSealError,
    Sealed,
    parquet_bytes,
    read_parquet,
    read_safetensors,
    safetensors_bytes,
)
from actcache.store.claims import Claims
from actcache.store.storage import Stamp, open_storage

# Earlier versions named files otherwise, and gave them no seal: what they hold is scored again.
_FILE = re.compile(r"(b[0-9]{3,}-)?[a-z_]+-[A-Za-z0-9_-]+\.[0-9a-f]{16}\.parquet")
_ADVICE = "remove it, and give the command again that scored it"
# Notes on how a job went, which its rows do not depend on: they do not name its file.
_NOTES = ("mode", "still", "apart", "tails", "decoding")


class _Job(Protocol):
    """What is known here of a job."""

    @property
    def key(self) -> dict[str, Any]: ...

    @property
    def n_units(self) -> int: ...


OneJob = TypeVar("OneJob", bound=_Job)


def file_name(key: Mapping[str, Any]) -> str:
    """Of the table of a job with this key, which is known before anything is computed."""
    made_from = {name: value for name, value in key.items() if name not in _NOTES}
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    place = [f"b{key['boundary']:03d}"] if "boundary" in key else []
    what = key["job"] if "job" in key else "_".join(scopes_of(key))
    return f"{'-'.join([*place, what, key['segment']])}.{digest}.parquet"


def scopes_of(key: Mapping[str, Any]) -> list[str]:
    """Of a job; earlier versions had one file for each scope."""
    return key["scopes"] if "scopes" in key else [key["scope"]]


def result_files(folder: str | Path) -> list[Path]:
    """The tables of jobs, finished by now, whatever they are of."""
    return sorted(path for path in as_path(folder).glob("*.parquet") if _FILE.fullmatch(path.name))


def has_earlier_files(folder: str | Path) -> bool:
    """Whether there are tables of an earlier version, which do not count any more."""
    return any(not _FILE.fullmatch(path.name) for path in as_path(folder).glob("b[0-9]*.parquet"))


def write_result(
    folder: str | Path, key: Mapping[str, Any], table: pa.Table, final: Mapping[str, torch.Tensor]
) -> None:
    """Publish what a job gave: its tensors first, so that a table that is there has them beside it."""
    path = as_path(folder) / file_name(key)
    if final:
        write_atomically(final_path(path), safetensors_bytes(final, {"key": dict(key)}))
    write_atomically(path, parquet_bytes(table, dict(key)))


def read_results(
    folder: str | Path, columns: list[str] | None = None
) -> Iterator[tuple[Path, Sealed | CorruptFileError | NoSealError]]:
    """Every finished table, or some columns of it, under its key; or what is wrong with its file."""
    for path in result_files(folder):
        try:
            yield path, read_result(path, columns)
        except (CorruptFileError, NoSealError) as error:
            yield path, error


def is_finished(folder: str | Path, key: Mapping[str, Any]) -> bool:
    """Whether the job with this key has left its table here."""
    return (as_path(folder) / file_name(key)).is_file()


@contextmanager
def shared(
    folder: str | Path, jobs: Sequence[OneJob], told: Told, before: Mapping[str, Stamp] = MappingProxyType({})
) -> Iterator[Iterator[Iterator[OneJob]]]:
    """A context that yields jobs in rounds, which this process and others share by claims: :meth:`Claims.rounds`.

    Args:
        folder: where their results lie.
        jobs: to run, in order.
        told: hears of units that others have done, and for whom this process waits.
        before: those of their tables that are here and do not count, so that the jobs run again.
    """
    storage = open_storage(folder)

    def name(job: OneJob) -> str:
        return file_name(job.key)

    def is_done(job: OneJob) -> bool:
        return storage.stamp(name(job)) not in (None, before.get(name(job)))

    with Claims(storage) as claims:
        yield claims.rounds(jobs, name, is_done, told, lambda job: told(found=job.n_units))


def read_result(path: Path, columns: list[str] | None = None) -> Sealed:
    """One table (errors as :func:`actcache.sealed.read_parquet`)."""
    return read_parquet(path, "cells", _ADVICE, columns=columns)


def final_path(path: Path) -> Path:
    """Where the final states of a table's plain cells are kept."""
    return path.with_suffix(".safetensors")


def read_final(path: Path) -> dict[str, torch.Tensor]:
    """The tensors beside a table: final states ``[E, D]`` by ``scope/upstream``, or the rows of a states job.

    Raises:
        CorruptFileError: they are damaged.
        FileNotFoundError: an earlier version, or somebody, left none.
    """
    found: dict[str, torch.Tensor] = read_safetensors(final_path(path), "final states", _ADVICE).content
    return found
