"""Processes that share work by claims: none waits for one that is dead, and nothing is done twice while leases hold."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from actcache.store.claims import LEASE_S, Claims, is_gone
from actcache.store.storage import LocalStorage, Stamp

LEASE = 30.0


# ---- schedules in a simulated clock --------------------------------------------------------------------------------


class Killed(BaseException):
    """What an actor meets at each step after its death."""


class World:
    """Actors on machines of their own, one storage, and one clock, which only goes on between steps."""

    def __init__(self, seed: int, n_actors: int, n_units: int, *, trouble: bool) -> None:
        self.rng = random.Random(seed)
        self.time = self.rng.uniform(1e8, 2e9)
        self.resolution = self.rng.choice([0.0, 1.0])  # of the times of files: a disk's, an object store's
        self.files: dict[str, tuple[bytes, float, int]] = {}
        self.units = [f"unit-{i}" for i in range(n_units)]
        self.results: dict[str, str] = {}
        self.computed: dict[str, list[str]] = defaultdict(list)
        self.renewed: dict[tuple[str, str], float] = {}  # by actor and unit: when its claim was last written
        self.trouble, self.n_turns = trouble, 0
        self.actors = [Actor(self, f"actor-{i}") for i in range(n_actors)]
        self.dead: list[Actor] = []

    def run(self) -> None:
        """Until all are done; whoever is killed is followed by another."""
        for actor in self.actors:
            actor.start()
        while living := [actor for actor in self.actors if not actor.over]:
            self.n_turns += 1
            assert self.n_turns < 20_000, "nobody ends"
            ready = [actor for actor in living if actor.asleep_until <= self.time]
            if not ready:
                self.time = min(actor.asleep_until for actor in living)
                continue
            actor = self.rng.choice(ready)
            self.time += self.rng.choice([0.0, 0.01, 0.3])
            if self.trouble and len(self.dead) < 3 and self.rng.random() < 0.004:
                actor.dead = True
            elif self.trouble and self.rng.random() < 0.004:
                actor.asleep_until = self.time + self.rng.uniform(0, 4 * LEASE)  # stalls, and goes on
                continue
            actor.go()
            if actor.failure is not None:
                raise actor.failure
            if actor.over and actor.dead:
                self.dead.append(actor)
                self.actors.append(Actor(self, f"actor-{len(self.actors)}"))
                self.actors[-1].start()

    def begins(self, actor: Actor, unit: str) -> None:
        """What must hold when an actor begins to compute a unit."""
        assert unit not in self.results, f"{unit} was done, and is done again"
        for (other, of), written in self.renewed.items():
            if of == unit and other != actor.name and unit in actor.others_at_it(other):
                stalled = self.time - self.renewed[actor.name, unit] > LEASE  # and lost its own claim by that
                assert stalled or self.time - written > LEASE, f"{other} has claimed {unit}, {actor.name} begins it"


class Actor(threading.Thread):
    """A process that shares the units of its world."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.world, self.over, self.dead = world, False, False
        self.asleep_until = 0.0
        self.at_it: set[str] = set()
        self.failure: BaseException | None = None
        self.mine, self.theirs = threading.Semaphore(0), threading.Semaphore(0)

    def others_at_it(self, name: str) -> set[str]:
        return next(actor for actor in self.world.actors if actor.name == name).at_it

    def run(self) -> None:
        self.mine.acquire()
        try:
            self.act()
        except Killed:
            pass
        except BaseException as error:
            self.failure = error
        self.over = True
        self.theirs.release()

    def go(self) -> None:
        """Give it a turn, until it hands it back."""
        self.mine.release()
        assert self.theirs.acquire(timeout=60)

    def turn(self) -> None:
        """Hand the turn back, and go on with the next one."""
        self.theirs.release()
        self.mine.acquire()
        if self.dead:
            raise Killed

    def sleep(self, seconds: float) -> None:
        self.asleep_until = self.world.time + seconds
        self.turn()

    def act(self) -> None:
        world = self.world
        with Claims(Simulated(self), lease_s=LEASE, sleep=self.sleep, renews=False) as claims:  # type: ignore[arg-type]
            for free in claims.rounds(world.units, str, self.is_done):
                for unit in free:
                    world.begins(self, unit)
                    self.at_it.add(unit)
                    for _ in range(world.rng.randint(1, 4)):
                        self.sleep(world.rng.uniform(0, LEASE / 3))
                        claims.renew()
                    self.turn()
                    world.computed[unit].append(self.name)
                    world.results.setdefault(unit, self.name)
                    self.at_it.discard(unit)
        assert claims.held == []
        assert set(world.results) == set(world.units)

    def is_done(self, unit: str) -> bool:
        self.turn()
        return unit in self.world.results


class Simulated:
    """As much of a storage as claims need, with a turn before each call."""

    def __init__(self, actor: Actor) -> None:
        self.actor, self.world = actor, actor.world

    def _write(self, key: str, data: bytes) -> None:
        world = self.world
        time = world.time if not world.resolution else float(int(world.time))
        world.files[key] = data, time, world.n_turns
        world.renewed[self.actor.name, key.removeprefix("claims/").rpartition(".")[0]] = world.time

    def make_folder(self, folder: str) -> None:
        pass

    @contextmanager
    def creating(self, key: str) -> Iterator[Callable[[bytes], None]]:
        def publish(data: bytes) -> None:
            self.actor.turn()
            if key in self.world.files:
                raise FileExistsError(key)
            self._write(key, data)
            self.actor.turn()  # it is there, and its writer does not know yet

        yield publish

    def put(self, key: str, data: bytes) -> None:
        self.actor.turn()
        self._write(key, data)

    def size(self, key: str) -> int | None:
        self.actor.turn()
        return len(self.world.files[key][0]) if key in self.world.files else None

    def stamp(self, key: str) -> Stamp | None:
        self.actor.turn()
        if key not in self.world.files:
            return None
        _, time, version = self.world.files[key]
        return Stamp(time, str(version))

    def names(self, folder: str) -> list[str]:
        self.actor.turn()
        return sorted(key.removeprefix(f"{folder}/") for key in self.world.files)

    def read(self, key: str) -> bytes:
        self.actor.turn()
        if key not in self.world.files:
            raise FileNotFoundError(key)
        return self.world.files[key][0]

    def remove(self, key: str) -> None:
        self.actor.turn()
        self.world.files.pop(key, None)

    def remove_files(self, folder: str, files: list[str]) -> None:
        assert files == []


def check_schedule(seed: int, *, trouble: bool) -> World:
    rng = random.Random(f"size of {seed}")
    world = World(seed, rng.choice([2, 3]), rng.randint(1, 7), trouble=trouble)
    try:
        world.run()
    except BaseException as error:
        raise AssertionError(f"seed {seed}, trouble {trouble}") from error
    assert world.results.keys() == world.computed.keys() == set(world.units)
    left = {json.loads(data)["who"] if data else key for key, (data, *_) in world.files.items()}
    assert len(left) <= len(world.dead) + sum(".now-" in key for key in world.files)
    return world


def test_two_or_three_processes_do_each_unit_once():
    for seed in range(40):
        world = check_schedule(seed, trouble=False)
        assert {unit: len(by) for unit, by in world.computed.items()} == dict.fromkeys(world.units, 1)
        assert world.files == {}


def test_what_the_dead_and_the_stalled_left_is_done_by_others():
    worlds = [check_schedule(seed, trouble=True) for seed in range(100)]
    # Else this proves little.
    assert sum(len(world.dead) for world in worlds) > 10
    assert sum(len(by) > 1 for world in worlds for by in world.computed.values()) > 3


@pytest.mark.deep
@pytest.mark.parametrize("block", range(20))
def test_many_schedules(block):
    for seed in range(1000 + 150 * block, 1150 + 150 * block):
        check_schedule(seed, trouble=True)


# ---- a disk --------------------------------------------------------------------------------------------------------


def test_a_claim_of_a_process_that_is_gone_is_free_at_once(tmp_path):
    """On this machine nobody has to wait until a lease is over; of another machine's, nobody knows."""
    code = "\n".join(
        [
            "import os, pathlib, sys",
            "from actcache.store.claims import Claims",
            "from actcache.store.storage import LocalStorage",
            "print(Claims(LocalStorage(pathlib.Path(sys.argv[1]))).claim('unit'), flush=True)",
            "os.kill(os.getpid(), 9)",
        ]
    )
    child = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (child.stdout, child.returncode) == ("True\n", -signal.SIGKILL), child.stderr
    record = json.loads((tmp_path / "claims" / "unit.1").read_bytes())
    assert is_gone(record)
    assert not is_gone(record | {"machine": "another"})
    assert is_gone(record | {"pid": os.getppid(), "started": 1})  # another process has its number now
    assert not is_gone({})
    with Claims(LocalStorage(tmp_path)) as claims:
        assert claims.claim("unit")
        assert sorted(os.listdir(tmp_path / "claims")) == ["unit.1", "unit.2"]
        with Claims(LocalStorage(tmp_path)) as others:
            assert not others.claim("unit")
    assert os.listdir(tmp_path) == []


def test_a_lease_is_over_by_the_times_of_files(tmp_path):
    """Not by the clock of whoever looks: the file is made old, and the claim is free."""
    storage = LocalStorage(tmp_path)
    with Claims(storage, renews=False) as first, Claims(storage, renews=False) as second:
        assert first.claim("unit")
        path = tmp_path / "claims" / "unit.1"
        record = json.loads(path.read_bytes())
        assert record["lease_s"] == LEASE_S
        assert {"who", "host", "pid", "written"} <= record.keys()
        for age, free in ((LEASE_S - 1, False), (LEASE_S + 2, True)):
            os.utime(path, (path.stat().st_atime, second._now() - age))
            assert second.claim("unit", second._now()) == free
        first.renew()  # it does not know; the higher number counts
        with Claims(storage) as third:
            assert not third.claim("unit", third._now())
        second.let_go("unit")
        first.renew()
        assert first.held == []  # it went with the one that took it over


def test_what_fails_is_free_at_once(tmp_path):
    storage = LocalStorage(tmp_path)

    def fail() -> None:
        with Claims(storage) as claims:
            for free in claims.rounds(["a", "b"], str, lambda unit: False):
                for _ in free:
                    raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with Claims(storage) as claims:
        assert claims.claim("a")


def test_a_thread_renews_what_is_held(tmp_path):
    storage, renewed = LocalStorage(tmp_path), threading.Event()
    put = storage.put

    def notice(key: str, data: bytes) -> None:
        put(key, data)
        renewed.set()

    storage.put = notice  # type: ignore[method-assign]
    with Claims(storage, lease_s=0.03) as claims:
        assert claims.claim("unit")
        assert renewed.wait(30)
