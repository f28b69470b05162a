"""Object stores: the files of a store below a prefix of S3, Google, Azure and their like. Knows bytes and keys.

An object store has neither locks nor renames. So each writer of a segment fills a folder of its own. Creating the
commit record, which names that folder, decides which one counts. An error is no answer there: what was asked for may
have been done, or be done later. So what one writer alone may create is asked for again until reading it back tells
whose it is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from obstore import parse_scheme
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import from_url

from actcache.errors import CorruptStoreError, InputError
from actcache.store.far_path import check_address, without_secrets
from actcache.store.patience import Patience
from actcache.store.storage import MAX_JSON_BYTES, Mark, Place, Publish, Ranges, Stamp, Storage, Write

if TYPE_CHECKING:
    from obstore.store import ObjectStore

T = TypeVar("T")

# Where a user gives credentials. Given none, obstore would ask the address at which clouds hand a machine its role's; a
# URL does not ask for that, so what it names is read without any. A role is taken where one of these names its address.
_CREDENTIALS = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_METADATA_ENDPOINT"),
        *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE"),
    ),
    "gcs": (
        *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"),
        *("GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_SKIP_SIGNATURE"),
    ),
    "azure": (
        *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY", "AZURE_STORAGE_TOKEN"),
        *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID"),
        *("AZURE_FEDERATED_TOKEN_FILE", "AZURE_USE_AZURE_CLI", "AZURE_MSI_ENDPOINT", "AZURE_IDENTITY_ENDPOINT"),
        "AZURE_SKIP_SIGNATURE",
    ),
}

# A server that says this will say it again. It has not said no where it gives another error (408, 429, 5xx), or none.
_REFUSED = re.compile(r"status code: (?!408|429)(?:4\d\d|501|505)\b|Received redirect")

_WORTH_A_REQUEST_BYTES = 2**20  # a gap between two ranges that is larger is not fetched with them; obstore's choice too


def open_objects(place: Place) -> Storage:
    """The storage at a URL or behind an obstore store (errors as ``open_storage``)."""
    if isinstance(place, ObjectStorage):
        return place
    if not isinstance(place, str):
        return ObjectStorage(place, without_secrets(str(place)))  # type: ignore[arg-type]
    check_address(place)
    try:
        return ObjectStorage(_at_url(place), place.rstrip("/"))
    except (BaseError, ValueError) as error:
        raise InputError(f"{place}: not an address of an object store ({_first_line(error)})") from error


def _at_url(url: str) -> ObjectStore:
    """The obstore store of a URL, with the credentials that the environment gives, or none."""
    names = _CREDENTIALS.get(parse_scheme(url), ())
    return from_url(url, skip_signature=True) if names and os.environ.keys().isdisjoint(names) else from_url(url)


class ObjectStorage:
    """A prefix of an object store that can create an object only if it is not there."""

    is_far = True
    parallel_reads = 16
    parallel_writes = 16

    def __init__(self, objects: ObjectStore, where: str, patience: Patience | None = None) -> None:
        """Ask nothing yet.

        Args:
            objects: the object store, which asks a server some times more by itself.
            where: what a person calls it.
            patience: with what a server neither does nor refuses.
        """
        self.objects = objects
        self.where = where
        self.patience = Patience() if patience is None else patience

    def __str__(self) -> str:
        return self.where

    def read(self, key: str, at_most: int | None = MAX_JSON_BYTES) -> bytes:
        return self.patience.ask(lambda: self._read(key, at_most), _NoAnswerError)

    def _read(self, key: str, at_most: int | None = MAX_JSON_BYTES) -> bytes:
        with _as_oserror(key):
            found = self.objects.get(key)
            if at_most is not None and found.meta["size"] > at_most:
                raise CorruptStoreError(f"{key}: {found.meta['size']} bytes, expected at most {at_most}")
            return bytes(found.bytes())

    def read_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        return self.patience.ask(lambda: self._read_inside(key, ranges), _NoAnswerError)

    def _read_inside(self, key: str, ranges: Ranges) -> list[bytes]:
        try:
            return self._read_ranges(key, ranges)
        except FileNotFoundError:
            raise
        except OSError:
            # Of a range that begins at the end or behind it a server gives an error, not no bytes.
            size = self._size(key)
            inside = [(offset, length) for offset, length in ranges if offset < size]
            if len(inside) == len(ranges):
                raise
            found = dict(zip(inside, self._read_ranges(key, inside), strict=True)) if inside else {}
            return [found.get(one, b"") for one in ranges]

    def _read_ranges(self, key: str, ranges: Ranges) -> list[bytes]:
        # obstore would merge neighbours too, but panics where what they are merged to comes back short.
        starts: list[int] = []
        ends: list[int] = []
        for offset, length in sorted(ranges):
            if ends and offset <= ends[-1] + _WORTH_A_REQUEST_BYTES:
                ends[-1] = max(ends[-1], offset + length)
            else:
                starts.append(offset)
                ends.append(offset + length)
        with _as_oserror(key):
            parts = [memoryview(part) for part in self.objects.get_ranges(key, starts=starts, ends=ends)]
        found = []
        for offset, length in ranges:
            part = bisect_right(starts, offset) - 1
            at = offset - starts[part]
            found.append(bytes(parts[part][at : at + length]))
        return found

    def size(self, key: str) -> int | None:
        try:
            return self.patience.ask(lambda: self._size(key), _NoAnswerError)
        except FileNotFoundError:
            return None

    def _size(self, key: str) -> int:
        with _as_oserror(key):
            return int(self.objects.head(key)["size"])

    def stamp(self, key: str) -> Stamp | None:
        try:
            found = self._ask(key, lambda: self.objects.head(key))
        except FileNotFoundError:
            return None
        time_s = found["last_modified"].timestamp()
        return Stamp(time_s, f"{found['e_tag']}-{time_s}")

    def names(self, folder: str) -> list[str]:
        found = self._ask(folder, lambda: self.objects.list_with_delimiter(folder))
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return sorted(path.rstrip("/").rpartition("/")[2] for path in paths)

    def marks(self, folder: str) -> dict[str, Mark]:
        found = self._ask(folder, lambda: self.objects.list_with_delimiter(folder))["objects"]
        return {
            entry["path"].rpartition("/")[2]: (entry.get("size", 0), entry.get("e_tag"))
            for entry in sorted(found, key=_path_of)
        }

    def sizes(self, folder: str) -> dict[str, int]:
        entries = self._ask(folder, lambda: self.objects.list(folder).collect())
        return {entry["path"].removeprefix(f"{folder}/"): entry["size"] for entry in sorted(entries, key=_path_of)}

    def prepare(self, folders: Iterable[str]) -> None:
        probe = f".probe-{secrets.token_hex(8)}"
        try:
            self._create(probe, b"1")
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            self.put(probe, b"1")  # which fails too, unless it is the condition that the server does not take
            self.remove(probe)
            raise self._unfit(f"creates nothing on condition that it is not there ({error.strerror})") from error
        try:
            with contextlib.suppress(FileExistsError):
                self._create(probe, b"2")
                raise self._unfit("ignores the condition of a put, so that writers would overwrite each other")
            if probe not in self.names(""):
                raise self._unfit("does not list what was just put, so that readers would miss segments")
        finally:
            with contextlib.suppress(PermissionError):  # a bucket may keep everything
                self.remove(probe)
        if self.size(probe) is None and probe in self.names(""):
            raise self._unfit("lists what was just deleted, so that readers would look for segments that are gone")

    def _unfit(self, why: str) -> InputError:
        return InputError(
            f"{self.where}: this server {why}; give a local folder, or a server with conditional puts and listings "
            "that are up to date"
        )

    def make_folder(self, folder: str) -> None:
        pass

    def put(self, key: str, data: bytes) -> None:
        self._ask(key, lambda: self.objects.put(key, data))

    def replace(self, key: str, data: bytes) -> None:
        self._ask(key, lambda: self.objects.put(key, data, use_multipart=False))

    @contextmanager
    def creating(self, key: str) -> Iterator[Publish]:
        yield partial(self._create, key)

    def _create(self, key: str, data: bytes) -> None:
        """Create an object, and stay until it is known who did.

        Raises:
            FileExistsError: another's is there.
            OSError: the server refuses, or nothing is known: it may still appear.
        """

        def create() -> None:
            try:
                with _as_oserror(key):
                    self.objects.put(key, data, mode="create", use_multipart=False)
            except (FileExistsError, _NoAnswerError) as error:
                # "It exists" (409, 412) may mean one's own, sent twice, and 409 also "try again".
                found = self._found(key)
                if found is None:
                    raise _NoAnswerError(error.errno, f"{error.strerror}; it may still appear", key) from error
                if found != data:
                    raise FileExistsError(errno.EEXIST, "another writer's is there", key) from error

        self.patience.ask(create, _NoAnswerError)

    def _found(self, key: str) -> bytes | None:
        """What is there, or None: nothing, or no answer."""
        try:
            return self._read(key)
        except OSError:
            return None

    @contextmanager
    def exclusively(self, key: str) -> Iterator[None]:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        mine = f"{os.getpid()} on {socket.gethostname()} since {since}, token {secrets.token_hex(8)}\n".encode()
        try:
            try:
                self._create(key, mine)
            except FileExistsError as error:
                holder = (self._found(key) or b"which has ended since").decode(errors="replace").strip()
                raise InputError(
                    f"{self.where}: {key} is held by another process ({holder[:200]}); wait for it, or delete that "
                    "object if it died"
                ) from error
            yield
        finally:
            self.patience.ask(lambda: self._release(key, mine), OSError)

    def _release(self, key: str, mine: bytes) -> None:
        """Delete what is one's own, and not what another put there since it was deleted."""
        with contextlib.suppress(FileNotFoundError), _as_oserror(key):
            if self._read(key) == mine:
                self.objects.delete([key])

    def _ask(self, key: str, act: Callable[[], T]) -> T:
        """The result of what may be done twice, asked for until there is an answer.

        Where a put or a delete says "it exists" (409), the server met another request for this key: it is to be sent
        again.
        """

        def once() -> T:
            with _as_oserror(key):
                return act()

        return self.patience.ask(once, _NoAnswerError, FileExistsError)

    @contextmanager
    def new_folder(self, folder: str, files: Sequence[str]) -> Iterator[Write]:
        def write(path: str, parts: Iterable[bytes]) -> int:
            data = b"".join(parts)
            durable.append(pool.submit(self.put, f"{folder}/{path}", data))
            return len(data)

        with ThreadPoolExecutor(self.parallel_writes) as pool:
            durable: list[Future[None]] = []
            yield write
            for done in durable:
                done.result()

    def folder_for(self, segment: str) -> str:
        return f"{segment}.{secrets.token_hex(6)}"

    def remove_files(self, folder: str, files: Iterable[str]) -> None:
        there = self.sizes(folder).keys()
        if keys := [f"{folder}/{file}" for file in files if file in there]:
            self._delete(folder, keys)

    def remove(self, key: str) -> None:
        self._delete(key, [key])

    def move(self, key: str, to: str) -> None:
        self.put(to, self.read(key))
        self.remove(key)

    def _delete(self, what: str, keys: Sequence[str]) -> None:
        with contextlib.suppress(FileNotFoundError):  # which some servers say
            self._ask(what, lambda: self.objects.delete(keys))

    def describe_drafts(self) -> list[str]:
        found = {"": self.names(""), "commits/": self.names("commits")}
        return [f"{folder}{name}" for folder, names in found.items() for name in names if name.startswith(".")]


class _NoAnswerError(OSError):
    """Neither done nor refused, as far as is known."""


def _path_of(entry: Any) -> str:
    return str(entry["path"])


@contextmanager
def _as_oserror(key: str) -> Iterator[None]:
    """obstore's errors as what they would be on a disk."""
    try:
        yield
    except NotImplementedError as error:
        raise OSError(errno.EOPNOTSUPP, _first_line(error), key) from error
    except AlreadyExistsError as error:
        raise FileExistsError(errno.EEXIST, _first_line(error), key) from error
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise PermissionError(errno.EACCES, _first_line(error), key) from error
    except GenericError as error:
        kind = OSError if _REFUSED.search(str(error)) else _NoAnswerError
        raise kind(errno.EIO, _first_line(error), key) from error
    except BaseError as error:
        raise OSError(errno.EIO, _first_line(error), key) from error


def _first_line(error: BaseException) -> str:
    return without_secrets(str(error).partition("\n")[0])[:200]
