"""Storage: where the files of a store lie, a local folder or a prefix of an object store. Knows bytes and keys.

A key is the path of a file from the store's root, with slashes. Both kinds give the same promise, on which the commit
protocol stands (see FORMAT.md): a file that appears under its key is whole, and of several writers that create the same
key at once, one succeeds. On a local disk the writer that holds the lock of a segment's commit record writes it, and
clears what a dead one left. Object stores, which have no locks, are in ``objects``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

from actcache.cpus import usable_cpus
from actcache.errors import CorruptStoreError, InputError
from actcache.files import check_own_folder, fsync, is_draft, make_folder, naming, sole_creator, write_durably
from actcache.store.far_path import FarPath

if TYPE_CHECKING:
    import obstore.store

Ranges = Sequence[tuple[int, int]]  # (offset, length) in bytes
Write = Callable[[str, Iterable[bytes]], int]
Publish = Callable[[bytes], None]
Mark: TypeAlias = "tuple[int, str | None]"  # bytes of a file, and what a later one of its key lacks
Place: TypeAlias = "str | Path | Storage | obstore.store.ObjectStore"  # what names a store

# JSON that a reader takes into memory before it can check it; a record names some hundred bytes a file.
MAX_JSON_BYTES = 16 * 2**20


class Stamp(NamedTuple):
    """When a file was written, by the storage's own clock, and what tells it from others under its key.

    Attributes:
        time: in seconds; object stores give whole ones.
        version: unlike that of a file that was there before, or is put there later.
    """

    time: float
    version: str


class Storage(Protocol):
    """The files of one store. FileNotFoundError where a key is missing, OSError where the disk or the net refuses."""

    is_far: bool
    """Whether a read waits for a net, so that small ones too are worth having under way at once."""

    parallel_reads: int
    """How many reads are worth having under way at once."""

    parallel_writes: int
    """How many files are worth being made durable at once: a disk merges what waits for it, a net has far to go."""

    def read(self, key: str, at_most: int | None = MAX_JSON_BYTES) -> bytes:
        """A whole file; CorruptStoreError if it is larger, unless ``at_most`` is None."""

    def read_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        """Ranges of a file; one that goes past its end comes back short."""

    def size(self, key: str) -> int | None:
        """Bytes of a file, or None where there is none."""

    def stamp(self, key: str) -> Stamp | None:
        """When a file was written, and which it is; None where there is none."""

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders that lie directly in a folder, sorted; none where there is no such folder.

        Raises:
            NotADirectoryError: it is a file.
        """

    def marks(self, folder: str) -> dict[str, Mark]:
        """The mark of each file that lies directly in a folder, by name: of an object its tag, of a file when it was
        written (errors as :meth:`names`)."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Every file below a folder, by path from it, and its bytes."""

    def prepare(self, folders: Iterable[str]) -> None:
        """Make the store's own folder and these below it, where folders exist at all.

        Raises:
            InputError: an object store does not keep the promise that the commit protocol stands on; says which.
        """

    def make_folder(self, folder: str) -> None:
        """Make a folder of the store, where folders exist at all."""

    def put(self, key: str, data: bytes) -> None:
        """Write a small file, durably, in place of what may be there; one that dies may leave it half."""

    def replace(self, key: str, data: bytes) -> None:
        """Write a file, durably, in place of what may be there: a reader sees the old one or this one, whole."""

    def creating(self, key: str) -> AbstractContextManager[Publish]:
        """A context that yields ``publish(data)``, which creates the file ``key``, whole and durable.

        ``publish`` raises FileExistsError where another writer was first. After any other error of a far storage the
        file may still appear, so what it names must stay. The block itself looks whether the file was there before.
        """

    def exclusively(self, key: str) -> AbstractContextManager[object]:
        """A context that one process at a time is in; waits for the others on a local disk.

        Raises:
            InputError: on an object store, another is in it, or died there; says whose, since when and what to do.
        """

    def new_folder(self, folder: str, files: Sequence[str]) -> AbstractContextManager[Write]:
        """A context that yields ``write(path, parts) -> bytes``, for any thread; when it ends, all is durable.

        Args:
            folder: to make.
            files: what may be written there; of these, what a writer that died left is deleted.

        Raises:
            InputError: the folder holds something else, or a link is in its place.
        """

    def folder_for(self, segment: str) -> str:
        """The name of the folder that a writer of this segment may fill."""

    def remove_files(self, folder: str, files: Iterable[str]) -> None:
        """Delete these files below a folder, and folders that this leaves empty: nothing else, and through no link."""

    def remove(self, key: str) -> None:
        """Delete a file, durably; no error where it is not there."""

    def move(self, key: str, to: str) -> None:
        """Give a file another key, durably."""

    def describe_drafts(self) -> list[str]:
        """Files that writers hold, or that died with them, while they create a key."""

    def __str__(self) -> str:
        """What a person calls it."""


def open_storage(place: Place) -> Storage:
    """The storage at a local path, a URL (``s3://bucket/prefix``, ``gs://``, ``az://``...) or an obstore store.

    Raises:
        InputError: a URL that obstore does not take, or obstore is not installed.
    """
    if isinstance(place, LocalStorage):
        return place
    if isinstance(place, FarPath):
        place = str(place)
    if isinstance(place, Path) or (isinstance(place, str) and "://" not in place):
        return LocalStorage(Path(place))
    try:
        from actcache.store import objects
    except ModuleNotFoundError as error:
        raise InputError(f"{place}: object stores need obstore; pip install 'actcache[s3]'") from error
    return objects.open_objects(place)


class LocalStorage:
    """A folder on a file system with POSIX rename and ``flock``."""

    is_far = False
    parallel_writes = 8

    def __init__(self, root: Path) -> None:
        # Without links: neither a change of the working folder nor of a link leads an open store elsewhere.
        self.root = Path(os.path.realpath(root))
        self.parallel_reads = usable_cpus()

    def __str__(self) -> str:
        return str(self.root)

    def read(self, key: str, at_most: int | None = MAX_JSON_BYTES) -> bytes:
        with self._open(key) as handle:
            size = os.fstat(handle).st_size
            if at_most is not None and size > at_most:
                raise CorruptStoreError(f"{key}: {size} bytes, expected at most {at_most}")
            return os.pread(handle, size, 0)

    def read_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        with self._open(key) as handle:
            return [os.pread(handle, length, offset) for offset, length in ranges]

    def size(self, key: str) -> int | None:
        path = self._at(key)
        return path.stat().st_size if path.is_file() else None

    def stamp(self, key: str) -> Stamp | None:
        try:
            found = self._at(key).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return Stamp(found.st_mtime, f"{found.st_ino}-{found.st_mtime_ns}") if stat.S_ISREG(found.st_mode) else None

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self._at(folder)))
        except FileNotFoundError:
            return []

    def marks(self, folder: str) -> dict[str, Mark]:
        found: dict[str, Mark] = {}
        top = os.path.join(self.root, folder)
        for name in self.names(folder):
            with suppress(OSError):  # deleted meanwhile, by a compaction; what cannot be read has no mark
                state = os.stat(os.path.join(top, name))
                found[name] = state.st_size, str(state.st_mtime_ns)
        return found

    def sizes(self, folder: str) -> dict[str, int]:
        top = self._at(folder)
        found: dict[str, int] = {}
        for parent, _, names in os.walk(top):
            for path in (Path(parent, name) for name in names):
                with suppress(FileNotFoundError):  # deleted meanwhile, by a compaction
                    found[path.relative_to(top).as_posix()] = path.lstat().st_size
        return dict(sorted(found.items()))

    def prepare(self, folders: Iterable[str]) -> None:
        for folder in ("", *folders):
            self.make_folder(folder)

    def make_folder(self, folder: str) -> None:
        make_folder(self._own(folder))

    def put(self, key: str, data: bytes) -> None:
        path = self._own(key)
        make_folder(path.parent)
        with naming(path):
            write_durably(path, data)
        fsync(path.parent)

    def replace(self, key: str, data: bytes) -> None:
        with self.creating(key) as publish:  # under its lock, so that a draft that a dead one left is taken up
            publish(data)

    def creating(self, key: str) -> AbstractContextManager[Publish]:
        return sole_creator(self._own(key))

    exclusively = creating  # of a key that nobody creates

    @contextmanager
    def new_folder(self, folder: str, files: Sequence[str]) -> Iterator[Write]:
        top = self._own(folder)
        if os.path.lexists(top):
            self.remove_files(folder, files)
        if os.path.lexists(top):
            raise InputError(f"{top} holds what no writer of this segment left there; move it away")
        folders: set[Path] = set()  # that are there

        def write(path: str, parts: Iterable[bytes]) -> int:
            file = top / path
            if file.parent not in folders:
                file.parent.mkdir(parents=True, exist_ok=True)
                folders.update(folder for folder in file.parents if folder.is_relative_to(top))
            with naming(file), open(file, "xb") as stream:
                n_bytes = sum(stream.write(part) for part in parts)
            durable.append(pool.submit(fsync, file))
            return n_bytes

        with ThreadPoolExecutor(self.parallel_writes) as pool:
            durable: list[Future[None]] = []
            yield write
            durable += [pool.submit(fsync, folder) for folder in folders]
            for done in durable:
                done.result()
        fsync(top.parent)

    def folder_for(self, segment: str) -> str:
        return segment

    def remove_files(self, folder: str, files: Iterable[str]) -> None:
        folders = {folder}
        for file in files:
            path = self._own(f"{folder}/{file}")
            folders |= {f"{folder}/{parent}" for parent in PurePosixPath(file).parents}
            with suppress(FileNotFoundError, IsADirectoryError, NotADirectoryError):
                path.unlink()
        for path in sorted(map(self._own, folders), key=lambda path: -len(path.parts)):
            with suppress(OSError):  # not empty, or not there
                path.rmdir()

    def remove(self, key: str) -> None:
        path = self._own(key)
        path.unlink(missing_ok=True)
        fsync(path.parent)

    def move(self, key: str, to: str) -> None:
        path, target = self._own(key), self._own(to)
        make_folder(target.parent)
        os.rename(path, target)
        for folder in (target.parent, path.parent):
            fsync(folder)

    def describe_drafts(self) -> list[str]:
        found = [path for folder in ("", "commits") for path in (self.root / folder).glob(".*") if is_draft(path)]
        return [path.relative_to(self.root).as_posix() for path in found]

    def _at(self, key: str) -> Path:
        """The path of a file or folder (errors as :meth:`_text_of`)."""
        return Path(self._text_of(key))

    def _text_of(self, key: str) -> str:
        """The same as text, which takes a third of the time, for every file of a segment.

        Raises:
            InputError: it does not lie below the root.
        """
        if key.startswith("/") or ".." in key.split("/"):
            raise InputError(f"{key!r} does not lie in {self.root}")
        return os.path.join(self.root, key)

    def _own(self, key: str) -> Path:
        """The path of what shall be changed, which lies in the store's own folders.

        Raises:
            InputError: it does not lie below the root, or a folder on the way is a link, which would lead elsewhere.
        """
        path, folder = self._at(key), str(self.root)
        for part in PurePosixPath(key).parts[:-1]:
            folder = os.path.join(folder, part)
            check_own_folder(folder)
        return path

    @contextmanager
    def _open(self, key: str) -> Iterator[int]:
        path = self._text_of(key)
        try:
            # Without waiting: a pipe in a file's place would keep a reader for ever.
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise
            raise FileNotFoundError(errno.ENOENT, "not an ordinary file", path) from error
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise FileNotFoundError(errno.ENOENT, "not an ordinary file", path)
            with naming(path):
                yield handle
        finally:
            os.close(handle)
