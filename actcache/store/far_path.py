"""Far paths: a file or folder of a run on an object store, with the methods of ``pathlib.Path`` that runs need.

What is written appears whole, in place of what was there. A folder is where files are: it is neither made nor removed.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NoReturn, cast

from actcache.errors import InputError

if TYPE_CHECKING:
    from actcache.store.storage import Storage


def path_at(given: str | Path) -> Path:
    """The path of a local file or folder, or of one on an object store, where ``s3://bucket/prefix`` or its like is
    given. Nothing is asked of a server yet.

    The type says what it is used as. A :class:`FarPath` is no ``Path``: what it does not have fails by name.

    Raises:
        InputError: see :func:`check_address`.
    """
    if isinstance(given, str) and "://" in given:
        check_address(given)
        return cast(Path, FarPath(given.rstrip("/")))
    return Path(given) if isinstance(given, str) else given


def check_address(url: str) -> None:
    """Raise InputError for an address that holds a user's name, a password or a signature: it is put down in records,
    and shown in messages and reports. This message does not show it."""
    scheme, _, rest = url.partition("://")
    before, is_user, _ = rest.partition("/")[0].rpartition("@")
    # Azure's addresses may name a container in that place.
    if "?" in url or "#" in url or (is_user and (":" in before or not scheme.startswith("abfs"))):
        raise InputError(
            f"this {scheme[:10]}:// address has a user's name, a password or a query, which records would show; "
            "give SCHEME://BUCKET/PREFIX alone, and credentials by the environment"
        )


def without_secrets(text: str) -> str:
    """A text in whose addresses the names of users, passwords and queries, which hold signatures, are three dots."""
    text = re.sub(r"(\w+://)[^\s/@\"'<>]*:[^\s/@\"'<>]*@", r"\1...@", text)
    return re.sub(r"(\w+://[^\s?\"'<>]*)\?[^\s\"'<>]*", r"\1?...", text)


class FarPath:
    """A key of an object store, below the place that was given first."""

    def __init__(self, root: str, key: str | PurePosixPath = "", storage: Storage | None = None) -> None:
        """A key below the URL ``root``; ``storage`` is what is there, if it was opened before."""
        self._root, self._key, self._storage = root, PurePosixPath(key), storage

    def __str__(self) -> str:
        return f"{self._root}/{self._key}" if self._key.parts else self._root

    def __repr__(self) -> str:
        return f"FarPath({str(self)!r})"

    def __reduce__(self) -> tuple[type[FarPath], tuple[str, str]]:
        return FarPath, (self._root, str(self._key))

    def __fspath__(self) -> NoReturn:
        raise InputError(f"{self} is on an object store; this needs a file or folder of a disk")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FarPath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: FarPath) -> bool:
        return str(self) < str(other)

    def __truediv__(self, key: str | PurePosixPath) -> FarPath:
        if PurePosixPath(key).is_absolute() or ".." in PurePosixPath(key).parts:
            raise InputError(f"{str(key)!r} does not lie in {self}")
        return self._at(self._key / key)

    def _at(self, key: PurePosixPath) -> FarPath:
        return FarPath(self._root, key, self.storage)

    @functools.cached_property
    def storage(self) -> Storage:
        """What the root's files are in.

        Raises:
            InputError: see :func:`actcache.store.storage.open_storage`.
        """
        from actcache.store.storage import open_storage

        return open_storage(self._root) if self._storage is None else self._storage

    @property
    def name(self) -> str:
        """The last part, also of the root."""
        return PurePosixPath(str(self)).name

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self._key.stem

    @property
    def suffix(self) -> str:
        """What follows the last dot of the name, with it."""
        return self._key.suffix

    @property
    def parent(self) -> FarPath:
        """The folder that this is in; of the root, the root."""
        return self._at(self._key.parent)

    def with_name(self, name: str) -> FarPath:
        """Of another name."""
        return self._at(self._key.with_name(name))

    def with_suffix(self, suffix: str) -> FarPath:
        """Of another suffix."""
        return self._at(self._key.with_suffix(suffix))

    def with_stem(self, stem: str) -> FarPath:
        """Of another stem."""
        return self._at(self._key.with_stem(stem))

    def is_file(self) -> bool:
        """Whether there is such a file."""
        return bool(self._key.parts) and self.storage.size(str(self._key)) is not None

    def is_dir(self) -> bool:
        """Whether there are files below it."""
        return bool(self._names())

    def exists(self) -> bool:
        """Whether there is such a file, or files below it."""
        return self.is_file() or self.is_dir()

    def resolve(self) -> FarPath:
        """Itself: no link leads elsewhere."""
        return self

    def relative_to(self, other: FarPath) -> PurePosixPath:
        """The way here from a folder above."""
        return self._key.relative_to(other._key)

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def iterdir(self) -> Iterator[FarPath]:
        """What is directly in it, by name."""
        return (self / name for name in self._names())

    def glob(self, pattern: str) -> Iterator[FarPath]:
        """What is below it by these names: ``*`` and ``[0-9]`` stand for parts of one; a slash at the end asks for
        folders."""
        found = [self]
        for part in PurePosixPath(pattern).parts:
            listed = any(sign in part for sign in "*?[")
            if listed:
                found = [one / name for one in found for name in one._names() if fnmatch.fnmatchcase(name, part)]
            else:
                found = [one / part for one in found]
        if pattern.endswith("/"):
            return (one for one in found if one.is_dir())
        return iter(found) if listed else (one for one in found if one.exists())

    def read_bytes(self) -> bytes:
        """All of it.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return self.storage.read(str(self._key), at_most=None)

    def read_text(self, encoding: str = "utf-8") -> str:
        """All of it, as text (errors as :meth:`read_bytes`)."""
        return self.read_bytes().decode(encoding)

    def write_atomically(self, data: bytes) -> None:
        """Put a whole file here, in place of what was there."""
        self.storage.put(str(self._key), data)

    def mkdir(self, mode: int = 0o777, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: a file brings its folder with it."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file; no error where it is not there."""
        self.storage.remove(str(self._key))

    def remove_tree(self) -> None:
        """Delete all files below it."""
        for name in self.storage.sizes(str(self._key)):
            (self / name).unlink()

    def _names(self) -> list[str]:
        return self.storage.names(str(self._key) if self._key.parts else "")
