"""How often, how fast and for how long a server is asked again, and what it is not asked again for."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("obstore")

from obstore import exceptions

from actcache.store.objects import ObjectStorage
from actcache.store.patience import Patience
from actcache.testing import Clock, MemoryObjects


class Failing:
    """Every call fails, with the same error."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.times_s, self.clock = error, [], Clock()

    def call(self, *args: Any, **options: Any) -> Any:
        self.times_s.append(self.clock.now())
        raise self.error

    put = get = get_ranges = head = list = list_with_delimiter = delete = call

    @property
    def storage(self) -> ObjectStorage:
        patience = Patience(now=self.clock.now, sleep=self.clock.sleep, between=lambda low, high: high)
        return ObjectStorage(self, "a server", patience)


def create(storage: ObjectStorage) -> None:
    with storage.creating("key") as publish:
        publish(b"1")


CALLS = {
    "read": lambda storage: storage.read("key"),
    "read_ranges": lambda storage: storage.read_ranges("key", [(0, 1)]),
    "size": lambda storage: storage.size("key"),
    "names": lambda storage: storage.names("key"),
    "sizes": lambda storage: storage.sizes("key"),
    "put": lambda storage: storage.put("key", b"1"),
    "create": create,
    "remove": lambda storage: storage.remove("key"),
}
NO_ANSWER = [
    "HTTP error: error sending request",
    "HTTP error: operation timed out",
    *(f"Server returned non-2xx status code: {code}: " for code in (408, 429, 500, 502, 503, 504)),
]
REFUSED = [
    *(exceptions.GenericError(f"Server returned non-2xx status code: {code}: ") for code in (400, 405, 416, 501, 505)),
    exceptions.GenericError("Received redirect without LOCATION, this normally indicates an incorrectly configured"),
    exceptions.PermissionDeniedError("403"),
    exceptions.UnauthenticatedError("401"),
    exceptions.InvalidPathError("no path"),
    exceptions.NotSupportedError("no such thing"),
    NotImplementedError("put with mode Create is not implemented"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("said", NO_ANSWER)
def test_what_has_no_answer_is_asked_for_until_patience_ends(said, call):
    objects = Failing(exceptions.GenericError(f"Error performing PUT http://127.0.0.1:4003/404: {said}"))
    with pytest.raises(OSError, match=r"given up after (\d+) tries in \d+ s") as found:
        CALLS[call](objects.storage)
    assert found.value.filename == "key"
    times_s = sorted(set(objects.times_s))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times_s)]
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, *[15.0] * 6], abs=1e-5)
    assert f"after {len(times_s)} tries in {sum(pauses):.0f} s" in str(found.value)
    assert Patience.total_s - Patience.longest_s < sum(pauses) <= Patience.total_s


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", REFUSED, ids=str)
def test_what_is_refused_is_not_asked_for_again(error, call):
    objects = Failing(error)
    with pytest.raises(OSError, match=r"^(?!.*given up)"):
        CALLS[call](objects.storage)
    assert len(set(objects.times_s)) == 1
    assert len(objects.times_s) <= 2  # a read that fails looks whether the object is shorter than was asked for


@pytest.mark.parametrize("call", CALLS)
def test_what_is_not_there_is_not_asked_for_again(call):
    objects = Failing(FileNotFoundError("404"))
    if call in ("size", "remove"):
        CALLS[call](objects.storage)
    else:
        with pytest.raises(FileNotFoundError):
            CALLS[call](objects.storage)
    assert len(objects.times_s) == 1


def test_pauses_are_cut_at_random():
    """Else all processes come back together to a server that is busy."""
    asked = []

    def between(low: float, high: float) -> float:
        asked.append((low, high))
        return low

    clock = Clock()

    def fail() -> None:
        raise OSError(5, "no answer")

    with pytest.raises(OSError, match="given up after 23 tries in 118 s"):
        Patience(now=clock.now, sleep=clock.sleep, between=between).ask(fail, OSError)
    assert asked[:3] == [(0.05, 0.1), (0.1, 0.2), (0.2, 0.4)]
    assert asked[-1] == (7.5, 15.0)
    assert all(low == high / 2 for low, high in asked)


def test_a_try_that_takes_long_counts():
    """A client that has tried for minutes by itself is not asked to do so ten times."""
    clock, n_tries = Clock(), 0

    def fail() -> None:
        nonlocal n_tries
        n_tries += 1
        clock.sleep(70)
        raise TimeoutError(110, "timed out")

    with pytest.raises(TimeoutError, match=r"given up after 2 tries in 14[01] s"):
        Patience(now=clock.now, sleep=clock.sleep).ask(fail, OSError)
    assert n_tries == 2


def test_an_answer_at_last_is_given():
    storage = Failing(exceptions.GenericError("503")).storage
    answers = iter([storage.objects.get, storage.objects.get, MemoryObjects().get])
    storage.objects.get = lambda path: next(answers)(path)  # type: ignore[method-assign]
    with pytest.raises(FileNotFoundError):
        storage.read("key")
    assert next(answers, None) is None
