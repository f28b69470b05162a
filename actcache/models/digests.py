"""Digests: SHA-256 of weight files, each read once and remembered in the user's cache folder.

What is remembered counts while size, times and number of the file are the same. Where the cache cannot be read or
written, the file is read again: nothing depends on it but time. A file of the Hub's cache is named by its digest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from actcache.errors import InputError
from actcache.files import write_atomically

SMALLEST = 1 << 20  # bytes: a smaller file is read as fast as what is remembered of it
SETTLED = 2.0  # seconds: a file that changed since may change again without another time
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_folder() -> Path:
    """Where what is remembered lies: ``ACTCACHE_CACHE``, or a folder among the caches of the user."""
    if own := os.environ.get("ACTCACHE_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        caches = Path("~/Library/Caches").expanduser()
    else:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "actcache"


def digest(file: Path) -> bytes:
    """SHA-256 of a file's bytes."""
    real = Path(os.path.realpath(file))
    if (named := _name_of_blob(file, real)) is not None:
        return named
    before = _state(real)
    if before.size < SMALLEST:
        return _read(real)
    memo = cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(real)).hexdigest()}.json"
    if (remembered := _remembered(memo, before)) is not None:
        return remembered
    found = _read(real)
    if _state(real) == before and time.time_ns() - max(before.mtime_ns, before.ctime_ns) > SETTLED * 1e9:
        _remember(memo, before._asdict() | {"sha256": found.hex()})
    return found


def _name_of_blob(file: Path, real: Path) -> bytes | None:
    """What names a file that a snapshot of the Hub's cache links to, where that is its SHA-256: of those in LFS.

    The link is made when the file is whole. One that was written to since is no longer what its name says.
    """
    blobs = real.parent
    inside = file.is_symlink() and blobs.name == "blobs" and blobs.parent.name.startswith("models--")
    if not inside or not _SHA256.fullmatch(real.name):
        return None
    if max((blob := real.stat()).st_mtime_ns, blob.st_ctime_ns) <= file.lstat().st_ctime_ns:
        return bytes.fromhex(real.name)
    return None


class _State(NamedTuple):
    """While all of these are the same, so are the bytes."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def _state(real: Path) -> _State:
    found = real.stat()
    return _State(str(real), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def _remembered(memo: Path, state: _State) -> bytes | None:
    try:
        content = json.loads(memo.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or any(content.get(name) != value for name, value in state._asdict().items()):
        return None
    found = content.get("sha256")
    return bytes.fromhex(found) if isinstance(found, str) and _SHA256.fullmatch(found) else None


def _remember(memo: Path, content: dict[str, Any]) -> None:
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memo, json.dumps(content).encode())
    except (OSError, InputError):  # full, read-only, or no folder
        return


def _read(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
