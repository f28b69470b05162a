"""A store on the object store with faults, for the schedules of ``schedules``."""

from __future__ import annotations

import random
from typing import Any

from faulty_objects import FAULTS, TOKEN, FaultyObjects
from schedules import Actor

from actcache.store import layout
from actcache.store.objects import ObjectStorage
from actcache.store.storage import Storage

_CALLS = ("put", "get", "get_ranges", "head", "list", "list_with_delimiter", "delete")


class TurnedObjects:
    """The object store as an actor calls it: a turn before each call, and one more before it learns of a put."""

    def __init__(self, objects: FaultyObjects, actor: Actor) -> None:
        self.objects, self.actor = objects, actor

    def __getattr__(self, name: str) -> Any:
        if name not in _CALLS:
            raise AttributeError(name)

        def call(key: Any, *args: Any, **options: Any) -> Any:
            what = TOKEN.sub("*", str(key))
            self.actor.turn(f"{name} {what}")
            n_met = sum(self.objects.met.values())
            try:
                return getattr(self.objects, name)(key, *args, **options)
            finally:
                if sum(self.objects.met.values()) > n_met:
                    self.actor.schedule.trace.append(f"{self.actor.role}: which goes wrong")
                if name == "put" and not self.actor.dead:
                    self.actor.turn(f"go on after {what}")

        return call


class SeededStorage(ObjectStorage):
    """Whose folders are called the same in each run of a schedule."""

    rng: random.Random

    def folder_for(self, segment: str) -> str:
        return f"{segment}.{self.rng.randbytes(6).hex()}"


class Far:
    """A place of a schedule: puts lose their answers, conflict, fail and land late, by the seed."""

    refusals: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        rates = {fault: rng.choice([0, 0, 0.02, 0.06]) for fault in FAULTS}
        self.objects = FaultyObjects(seed=seed, rates=rates, late_calls=rng.choice([3, 40, 2000]))

    def storage(self, actor: Actor | None) -> Storage:
        """Without pauses; of who looks when all is over, also without faults."""
        if actor is None:
            self.objects.land()
            self.objects.rates = {}
        objects = self.objects if actor is None else TurnedObjects(self.objects, actor)
        storage = SeededStorage(objects, "far")  # type: ignore[arg-type]
        storage.rng = actor.rng if actor is not None else random.Random(0)
        storage.waits_s = (0.0,) * 5  # type: ignore[misc]
        return storage

    def clear_locks(self) -> None:
        """A lock whose holder was killed, or whose put landed when it had been given back, says whose it is."""
        storage = self.storage(None)
        for key in storage.describe_drafts():
            assert key.startswith((".probe-", f"{layout.COMMITS}/.compaction"))
            storage.remove(key)

    def check(self) -> None:
        """Nothing lies outside of an object store's prefix."""
