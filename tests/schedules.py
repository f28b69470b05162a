"""Random schedules: writers, a reader, a compactor and a verifier upon one store, each killed at any step, by a seed.

Actors are threads of which one at a time has the *turn*. Each may hand it back before everything that it does to the
storage, and a seeded scheduler says whose turn is next, and for how many steps: so a seed gives the same schedule
again. A killed actor does nothing to the storage from some step on, whatever handlers it still runs.

Most steps read and write files of one segment, and most races are about commit records. So a turn mostly counts the
steps upon records alone: then a few change hands right after a listing, and a long one has room for a compaction.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from stores import make_fingerprint, make_segment

from actcache import RowFeed
from actcache.errors import AlreadyCommittedError, InputError
from actcache.files import draft_of
from actcache.store import Store, StoreWriter, compact, layout, open_store, shard, verify
from actcache.store.storage import LocalStorage, Publish, Storage, Write

FINGERPRINT = make_fingerprint(checkpoints={"pt": {}}, pair=["pt"], boundaries=[1], width=1)
SEGMENTS = {
    f"s-{i}": make_segment(FINGERPRINT, [3, 1 + i % 3], [(0, 2), (1, 0)][: 1 + i % 2], name=f"e{i}", seed=i)
    for i in range(6)
}
ARRAYS = ("states/pt/b001", "final/pt", "token_ids")
_STUCK_S = 120


class Killed(BaseException):
    """What an actor meets at each step after its death."""


class Actor(threading.Thread):
    """A thread that acts upon the storage in turns.

    Attributes:
        role: what it does, for the trace.
        dies_at: the step at which it is killed, or None.
    """

    def __init__(self, schedule: Schedule, role: str, act: Callable[[Actor], None], dies_at: int | None) -> None:
        super().__init__(name=role, daemon=True)
        self.schedule, self.role, self.act, self.dies_at = schedule, role, act, dies_at
        self.rng = random.Random(f"{schedule.seed} {role}")
        self.weight = self.rng.choice([1, 1, 3])  # of its chances to have the turn
        self.n_steps, self.dead, self.over = 0, False, False
        self.failure: BaseException | None = None
        self.until: Callable[[], bool] = _always  # it waits for this
        self.n_waiting = 0
        self.n_left, self.every_step = 0, True  # of its turn, and whether all its steps count

    def run(self) -> None:
        try:
            self.turn("begin")
            self.act(self)
        except Killed:
            pass
        except BaseException as error:
            self.failure = error
        with self.schedule.changed:
            self.over = True
            self.schedule.changed.notify_all()

    def turn(self, what: str) -> None:
        """What it does next: at once if its turn lasts, or else when it gets another."""
        self.n_left -= self.every_step or "segments/" not in what
        if self.n_left < 0:
            self._hand_back()
        if what.startswith(("names", "list")) and self.rng.random() < 0.5:
            self.n_left = 0  # so that others act before it reads what it has found
        self.n_steps += 1
        self.dead |= self.dies_at is not None and self.n_steps >= self.dies_at
        self.schedule.trace.append(f"{self.role}: {'killed before ' if self.dead else ''}{what}")
        if self.dead:
            raise Killed

    def wait(self, until: Callable[[], bool]) -> None:
        """Let others act until this is so, or until they all wait too."""
        if not until():
            self.until, self.n_left = until, 0
            self.turn("go on")
            self.until = _always

    def pause(self) -> None:
        """Let others act for some steps, or none."""
        at = len(self.schedule.trace) + self.rng.choice([0, self.rng.randrange(300)])
        self.wait(lambda: len(self.schedule.trace) >= at)

    def _hand_back(self) -> None:
        schedule = self.schedule
        with schedule.changed:
            if schedule.current is self:
                schedule.current = None
            self.n_waiting += 1
            schedule.changed.notify_all()
            if not schedule.changed.wait_for(lambda: schedule.granted is self, _STUCK_S):
                raise RuntimeError(f"{self.role} never got its turn")
            schedule.granted = None
            self.n_waiting -= 1

    def go(self, n_steps: int, *, every_step: bool) -> None:
        """Give the actor a turn of so many steps, counting all or those upon records; returns when it hands it back."""
        schedule = self.schedule
        self.n_left, self.every_step = n_steps - 1, every_step
        with schedule.changed:
            schedule.current = schedule.granted = self
            schedule.changed.notify_all()
            schedule.wait(lambda: schedule.current is not self or self.over)
            schedule.current = schedule.granted = None


def _always() -> bool:
    return True


class Place(Protocol):
    """Where a schedule's store lies."""

    refusals: tuple[type[Exception], ...]
    """What an act may meet there and do again."""

    def storage(self, actor: Actor | None) -> Storage:
        """The storage as an actor sees it, with a turn before each step; None is who looks when all is over."""

    def clear_locks(self) -> None:
        """What a person does who knows that no process runs any more."""

    def check(self) -> None:
        """That nothing outside was touched."""


class Schedule:
    """Actors, and whose turn it is.

    Attributes:
        seed: of all that is random.
        acknowledged: names of the segments whose ``append`` has returned: durable, whatever happens.
    """

    def __init__(self, seed: int, place: Place) -> None:
        self.seed, self.place = seed, place
        self.rng = random.Random(seed)
        self.acknowledged: set[str] = set()
        self.trace: list[str] = []
        self.changed = threading.Condition()
        self.current: Actor | None = None  # who acts
        self.granted: Actor | None = None  # who may begin to
        self.actors: list[Actor] = []
        self.n_deaths = 0

    def add(self, role: str, act: Callable[[Actor], None]) -> None:
        """Let an actor begin, who may have to die."""
        # Of the steps of a life, the first ones are as interesting as all others together.
        dies_at = self.rng.choice([None, self.rng.randrange(1, 40), self.rng.randrange(1, 900)])
        actor = Actor(self, f"{role}#{len(self.actors)}", act, dies_at if self.n_deaths < 6 else None)
        self.actors.append(actor)
        actor.start()
        with self.changed:
            self.wait(lambda: actor.n_waiting > 0 or actor.over)

    def wait(self, until: Callable[[], bool]) -> None:
        """Wait until the actor who has the turn hands it back."""
        if not self.changed.wait_for(until, _STUCK_S):
            raise RuntimeError("an actor neither goes on nor ends")

    def run(self) -> None:
        """Until all are done; the dead are followed by others who take up their work. Then look at what is left."""
        for i in range(self.rng.randint(2, 4)):
            self.add(f"writer {i}", self.write)
        for role, act in (("reader", self.read), ("compactor", self.compact), ("verifier", self.verify)):
            self.add(role, act)
        while living := [actor for actor in self.actors if not actor.over]:
            ready = [actor for actor in living if actor.until()] or living
            (actor,) = self.rng.choices(ready, [actor.weight for actor in ready])
            # Some go on for long while the others stand still: the races of slow machines.
            actor.go(self.rng.choice([1, 1, 3, 30, 200]), every_step=self.rng.random() < 0.2)
            if actor.failure is not None:
                raise actor.failure
            if actor.over and actor.dead:
                self.n_deaths += 1
                self.add(actor.role.partition("#")[0], actor.act)
        self.finish()

    def finish(self) -> None:
        """What was acknowledged is there, the rest can be written, merged and verified, and all of it is right."""
        storage = self.place.storage(None)
        check_store(open_store(storage), self.acknowledged, range(100))
        assert verify(storage) == []
        self.place.clear_locks()
        writer = StoreWriter(storage, FINGERPRINT)
        for name in sorted(SEGMENTS.keys() - writer.committed):
            writer.append(name, SEGMENTS[name])
        check_store(open_store(storage), SEGMENTS, range(100))
        compact(storage)
        store = open_store(storage)
        assert len(store.segments) == 1
        check_store(store, SEGMENTS, range(100))
        assert verify(storage) == []
        self.place.check()

    # ---- what actors do --------------------------------------------------------------------------------------------

    def all_written(self) -> bool:
        return all(actor.over for actor in self.actors if actor.act == self.write)

    def again(self, act: Callable[[], Any]) -> Any:
        """The result of an act; None where the place refused it."""
        try:
            return act()
        except FileNotFoundError:  # nothing that counts is ever gone
            raise
        except self.place.refusals:
            return None

    def write(self, actor: Actor) -> None:
        """Write what is missing of some segments, which other writers write too."""
        storage = self.place.storage(actor)
        names = actor.rng.sample(sorted(SEGMENTS), actor.rng.randint(2, len(SEGMENTS)))

        def write() -> bool:
            writer = StoreWriter(storage, FINGERPRINT)
            for name in names:
                if name not in writer.committed:
                    actor.pause()
                    try:
                        writer.append(name, SEGMENTS[name])
                    except AlreadyCommittedError:
                        continue
                    self.acknowledged.add(name)
            return True

        for _ in range(8):
            if self.again(write):
                break

    def read(self, actor: Actor) -> None:
        """Open stores and keep them: each stays what it was, and has what was acknowledged before it was opened."""
        storage = self.place.storage(actor)
        kept: list[tuple[Store, set[str]]] = []
        feeds: list[tuple[RowFeed, Iterator[Any], dict[int, bytes]]] = []

        def look() -> None:
            for _ in range(actor.rng.randrange(12)):
                expected = set(self.acknowledged)
                assert parts_of(open_store(storage)) >= expected, "lost"
            expected = set(self.acknowledged)
            kept.append((open_store(storage), expected))
            store, expected = actor.rng.choice(kept)
            n = len(store)
            check_store(store, expected, [actor.rng.randrange(n) for _ in range(4)] if n else [])
            if n:
                feed = RowFeed(store, batch_rows=2, memory_bytes=8 * RowFeed(store, batch_rows=2).row_bytes)
                feeds.append((feed, iter(feed), {}))
                feed, batches, seen = actor.rng.choice(feeds)
                for batch in batches:
                    check_batch(feed, batch, seen)

        for _ in range(8):
            actor.pause()
            try:
                self.again(look)
            except InputError as error:
                if "is not a store" not in str(error):
                    raise
                actor.wait(lambda: bool(self.acknowledged))

    def compact(self, actor: Actor) -> None:
        """Merge what there is, whenever there is more; at last, all."""
        storage = self.place.storage(actor)
        n_merged = 0
        for _ in range(20):
            n_wanted = n_merged + actor.rng.randint(1, 3)
            actor.wait(lambda n=n_wanted: len(self.acknowledged) >= n or self.all_written())
            n_merged, is_last = len(self.acknowledged), self.all_written()
            try:
                done = self.again(lambda: compact(storage, max_bytes=actor.rng.choice([40, 60, 2**20, 2**20])))
                if done and is_last:
                    break
            except InputError as error:
                if "is held by another process" in str(error):  # by one that was killed
                    self.again(lambda: storage.remove(f"{layout.COMMITS}/.compaction"))
                elif "is not a store" not in str(error):
                    raise

    def verify(self, actor: Actor) -> None:
        """No problem is ever found."""
        storage = self.place.storage(actor)
        for _ in range(3):
            actor.pause()
            try:
                assert self.again(lambda: verify(storage)) in ([], None)
            except InputError as error:
                if "is not a store" not in str(error):
                    raise
                actor.wait(lambda: bool(self.acknowledged))


# ---- what is right -------------------------------------------------------------------------------------------------


def _truth() -> dict[str, tuple[bytes, bytes, list[int]]]:
    """Of each event: its states, its final state and its tokens."""
    found = {}
    for segment in SEGMENTS.values():
        for i, event in enumerate(segment.events.to_pylist()):
            start = int(segment.sequence_offsets[event["sequence"]])
            stop = start + event["position"] + 1
            rows, final = segment.states["pt", 1][start:stop], segment.final["pt"][i]
            found[event["event_id"]] = bits(rows), bits(final), segment.token_ids[start:stop].tolist()
    return found


def bits(rows: torch.Tensor) -> bytes:
    return rows.contiguous().numpy().tobytes()


TRUTH = _truth()
EVENTS = {name: segment.events["event_id"].to_pylist() for name, segment in SEGMENTS.items()}
EXCLUDED = {name: segment.excluded["prompt_id"].to_pylist() for name, segment in SEGMENTS.items()}


def parts_of(store: Store) -> set[str]:
    """What writers committed of it."""
    return {part.segment for segment in store.segments for part in segment.parts}


def check_store(store: Store, acknowledged: Iterable[str], picked: Sequence[int]) -> None:
    """Whole segments, each once, those that were acknowledged among them, and every bit by its event's id."""
    ids = store.events["event_id"].to_pylist()
    there = {name for name, events in EVENTS.items() if set(events) & set(ids)}
    assert sorted(ids) == sorted(event for name in there for event in EVENTS[name]), "events twice, or not all"
    assert there >= set(acknowledged), "lost"
    excluded = [prompt for name in there for prompt in EXCLUDED[name]]
    assert sorted(store.excluded["prompt_id"].to_pylist()) == sorted(excluded)
    picked = [number for number in picked if number < len(ids)]
    rows, offsets = store.states("pt", 1, picked)
    final, (tokens, _) = store.final("pt", picked), store.token_ids(picked)
    for i, number in enumerate(picked):
        start, stop = offsets[i : i + 2].tolist()
        expected = TRUTH[ids[number]]
        assert (bits(rows[start:stop]), bits(final[i]), tokens[start:stop].tolist()) == expected, ids[number]


def check_batch(feed: RowFeed, batch: Any, seen: dict[int, bytes]) -> None:
    """Each row once, and that of its place."""
    places = feed.locate(batch.rows)
    for number, state, segment, sequence, position in zip(
        *map(np.asarray, (batch.rows, batch.states, *places[:3])), strict=True
    ):
        assert int(number) not in seen, "a row twice"
        seen[int(number)] = state.tobytes()
        store = feed.chosen.store
        parts = store.segments[int(segment)].parts
        before = 0
        for part in parts:
            if sequence < before + part.counts.n_sequences:
                data = SEGMENTS[part.segment]
                at = int(data.sequence_offsets[int(sequence) - before]) + int(position)
                assert state.tobytes() == bits(data.states["pt", 1][at]), "another row"
                break
            before += part.counts.n_sequences


# ---- a local disk --------------------------------------------------------------------------------------------------


class TurnedDisk(LocalStorage):
    """A disk upon which an actor takes turns."""

    def __init__(self, root: Path, actor: Actor, held: dict[str, Actor]) -> None:
        super().__init__(root)
        self.actor, self.held = actor, held

    def read(self, key: str) -> bytes:
        self.actor.turn(f"read {key}")
        return super().read(key)

    def read_ranges(self, key: str, ranges: Any) -> list[bytes]:
        self.actor.turn(f"read_ranges {key}")
        return super().read_ranges(key, ranges)

    def size(self, key: str) -> int | None:
        self.actor.turn(f"size {key}")
        return super().size(key)

    def names(self, folder: str) -> list[str]:
        """Of what comes or goes while a folder is listed, a listing may have any part."""
        self.actor.turn(f"names {folder}")
        before = set(super().names(folder))
        self.actor.turn(f"names {folder}, second half")
        after = set(super().names(folder))
        return sorted((before & after) | {name for name in sorted(before ^ after) if self.actor.rng.random() < 0.5})

    def sizes(self, folder: str) -> dict[str, int]:
        self.actor.turn(f"sizes {folder}")
        return super().sizes(folder)

    def prepare(self, folders: Iterable[str]) -> None:
        for folder in folders:
            self.actor.turn(f"prepare {folder}")
            super().prepare([folder])

    def put(self, key: str, data: bytes) -> None:
        self.actor.turn(f"put {key}")
        super().put(key, data)

    @contextmanager
    def creating(self, key: str) -> Iterator[Publish]:
        self.actor.turn(f"lock {key}")
        while not self.free(key):  # which flock would wait for
            self.actor.wait(lambda: self.free(key))
        self.held[key] = self.actor
        try:
            with super().creating(key) as publish:

                def publish_in_turn(data: bytes) -> None:
                    self.actor.turn(f"publish {key}")
                    publish(data)
                    self.actor.turn(f"go on after {key}")

                yield publish_in_turn
                self.actor.turn(f"unlock {key}")
        except Killed:
            draft_of(self.root / key).write_bytes(b'{"half": ')  # what a process that is gone leaves
            raise
        finally:
            del self.held[key]

    exclusively = creating

    def free(self, key: str) -> bool:
        holder = self.held.get(key)
        return holder is None or holder.over

    @contextmanager
    def new_folder(self, folder: str, files: Sequence[str]) -> Iterator[Write]:
        self.actor.turn(f"make {folder}")
        with super().new_folder(folder, files) as write:

            def write_in_turn(path: str, parts: Iterable[bytes]) -> int:
                data = b"".join(parts)
                try:
                    self.actor.turn(f"write {folder}/{path}")
                except Killed:
                    write(path, [data[: len(data) // 2]])
                    raise
                return write(path, [data])

            yield write_in_turn

    def remove_files(self, folder: str, files: Iterable[str]) -> None:
        for file in files:
            self.actor.turn(f"delete {folder}/{file}")
            super().remove_files(folder, [file])

    def remove(self, key: str) -> None:
        self.actor.turn(f"delete {key}")
        super().remove(key)

    def move(self, key: str, to: str) -> None:
        self.actor.turn(f"move {key} to {to}")
        super().move(key, to)


class Disk:
    """A store in a folder, with other folders around it."""

    refusals: tuple[type[Exception], ...] = ()

    def __init__(self, folder: Path) -> None:
        self.root = folder / "home/store"
        self.held: dict[str, Actor] = {}
        for name in ("segments", "commits", "s-0"):
            (folder / name).mkdir()
            (folder / name / "s-0.json").write_text("a user's")
        (folder / "home").mkdir()
        self.outside = {path: (path.stat(), path.read_text()) for path in folder.rglob("*.json")}

    def storage(self, actor: Actor | None) -> Storage:
        return LocalStorage(self.root) if actor is None else TurnedDisk(self.root, actor, self.held)

    def clear_locks(self) -> None:
        """flock ends with its process."""

    def check(self) -> None:
        for path, (before, text) in self.outside.items():
            assert (path.stat().st_ino, path.stat().st_mtime_ns, path.read_text()) == (
                before.st_ino,
                before.st_mtime_ns,
                text,
            )
        files = {layout.ROOT, layout.ROLLUP}
        allowed = files | {f".{name}.tmp" for name in files} | {layout.SEGMENTS, layout.COMMITS}
        assert {path.name for path in self.root.iterdir()} <= allowed


class OneThread(Executor):
    """What is submitted is done at once, by the thread that submits it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes what a pool of threads takes."""

    def submit(self, act: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(act(*args, **options))
        except BaseException as error:
            future.set_exception(error)
        return future


@contextmanager
def in_order() -> Iterator[None]:
    """An actor is one thread, so that its steps have one order."""
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(shard, "_coders_of", OneThread))  # whose pool outlives a schedule
        for name, module in [*sys.modules.items()]:
            if name.startswith("actcache.store.") and hasattr(module, "ThreadPoolExecutor"):
                patches.enter_context(mock.patch.object(module, "ThreadPoolExecutor", OneThread))
        yield


def run(seed: int, place: Place) -> None:
    """One schedule; whatever is not right is raised, with the seed and the last steps."""
    schedule = Schedule(seed, place)
    try:
        with in_order():
            schedule.run()
    except BaseException as error:
        steps = "\n".join(schedule.trace[-60:])
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}; its last steps:\n{steps}") from error
