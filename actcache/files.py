"""Files that are either the old whole or the new whole, whatever happens in between.

Local and network file systems with POSIX rename and ``flock``; not object stores.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actcache.errors import InputError


def write_atomically(path: str | Path, data: Any) -> None:
    """Write bytes-like ``data`` to ``path``: temporary file beside it, fsync, rename, fsync of the folder.

    On an OSError (full or read-only disk) the temporary file is removed and ``path`` is as it was.
    """
    path = as_path(path)
    if not isinstance(path, Path):
        path.write_atomically(data)
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            write_durably(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def as_path(given: str | Path) -> Path:
    """A path from its text; any other stays what it is, also one that is not on this disk."""
    return Path(given) if isinstance(given, str) else given


def digests_of_files(files: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 of the bytes of files, in hex, by the name that each path has here; of those that are there."""
    found = {name: Path(file) for name, file in files.items() if file}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items() if path.is_file()}


def write_durably(path: Path, data: Any) -> None:
    """Write bytes-like ``data`` to a new or emptied file, and fsync it (not its folder; errors as open_own)."""
    handle = open_own(path)
    os.ftruncate(handle, 0)
    with open(handle, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def naming(path: Path | str) -> Iterator[None]:
    """An OSError that names no file, as of a write to a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def open_own(path: Path) -> int:
    """Open a file to write or lock it, made where it is missing: the file itself, never what a link leads to.

    Raises:
        InputError: a link is in its place, a second name of another file, or no file.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _not_own(path) from error
    found = os.fstat(handle)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(handle)
        raise _not_own(path)
    return handle


def _not_own(path: Path) -> InputError:
    return InputError(f"{path} is a link, or no ordinary file: nothing is written there; remove it")


def check_own_folder(folder: Path | str) -> None:
    """Raise InputError where a link is in the place of a folder whose files shall change: it would lead elsewhere."""
    if os.path.islink(folder):
        raise InputError(f"{folder} is a link: nothing is changed through it; put the folder itself there")


def no_file(path: Path, what: str) -> str:
    """What there is, in words, where a file was expected and :meth:`Path.is_file` says no."""
    if path.is_dir():
        return f"{path} is a folder, not a {what}"
    return f"{path} is a pipe or a device, not a {what}" if path.exists() else f"{path}: no such {what}"


def make_folder(path: Path) -> None:
    """Make a folder, with parents, unless it is there; durable when this returns."""
    if not isinstance(path, Path):
        return  # on an object store, files bring their folders with them
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync(folder.parent)


def remove_tree(path: Path) -> None:
    """Delete a folder with all that is in it; what cannot be deleted stays."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.remove_tree()


def fsync(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def draft_of(path: Path) -> Path:
    """The file that :func:`sole_creator` locks, and fills before it gets its final name."""
    return path.with_name(f".{path.name}.tmp")


def is_draft(path: Path) -> bool:
    """Whether a file's name is one that :func:`draft_of` gives."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


@contextmanager
def sole_creator(path: Path) -> Iterator[Callable[[bytes], None]]:
    """The sole right to create ``path``, for as long as the block lasts; the block looks whether it exists already.

    Yields ``publish(data)``, which makes ``path`` appear with all of ``data``, durable, and ends the right.
    Waits while another process or thread is in such a block for the same path; one that dies is out of it.
    """
    draft = draft_of(path)
    handle = _lock(draft)

    def publish(data: bytes) -> None:
        with naming(path):
            write_durably(draft, data)
        os.rename(draft, path)
        fsync(path.parent)

    try:
        yield publish
    finally:
        if _is_open_at(handle, draft):
            draft.unlink()
        # A child forked meanwhile shares the open file: closing it here would not end the lock.
        fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _lock(path: Path) -> int:
    """Lock a file, which need not exist; a file and not the folder, because NFS locks only what can be written."""
    while True:
        handle = open_own(path)
        try:
            with naming(path):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if _is_open_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before removed or renamed it while this one waited


def _is_open_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False
