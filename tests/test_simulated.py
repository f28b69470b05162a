"""The object store that misbehaves, and processes in turns: they do what they say, and the same again."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("obstore")

from obstore.exceptions import AlreadyExistsError, GenericError
from obstore.store import MemoryStore

import actcache.testing
from actcache.testing import KINDS, PROMISES, Clock, Faults, MemoryObjects, ProcessObjects, Schedule, SimulatedObjects
from actcache.testing.faults import OF_DELETES, OF_READS


def test_importing_it_does_no_work():
    heavy = ("torch", "pyarrow", "numpy", "obstore", "actcache.store")
    code = f"import sys, actcache.testing; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    assert dir(actcache.testing) == sorted(actcache.testing.__all__)
    for name in actcache.testing.__all__:
        assert getattr(actcache.testing, name) is not None


# ---- an object store in memory, against obstore's ------------------------------------------------------------------

KEYS = st.sampled_from(["a", "a/b", "a/b/c", "ab", "b/a", "b/c", "b/c/d"])
CALLS = st.one_of(
    st.tuples(st.just("put"), KEYS, st.binary(max_size=5), st.sampled_from(["overwrite", "create"])),
    st.tuples(st.just("replace"), KEYS, st.binary(max_size=5), st.booleans()),
    st.tuples(st.sampled_from(["get", "head", "delete"]), KEYS),
    st.tuples(st.just("get_ranges"), KEYS, st.lists(st.integers(0, 6), min_size=1, max_size=1)),
    st.tuples(st.sampled_from(["list", "list_with_delimiter"]), st.sampled_from(["", "a", "b", "b/c", "x"])),
)


def outcome(objects: Any, call: tuple[Any, ...]) -> Any:
    """What a call gives, but for times and for what tags and errors are called."""
    method, key, *rest = call
    try:
        if method == "put":
            objects.put(key, rest[0], mode=rest[1])
        elif method == "replace":
            objects.put(key, rest[0], mode={"e_tag": objects.head(key)["e_tag"] if rest[1] else "another"})
        elif method == "get":
            found = objects.get(key)
            return bytes(found.bytes()), found.meta["size"]
        elif method == "get_ranges":
            return [*map(bytes, objects.get_ranges(key, starts=rest[0], ends=[start + 2 for start in rest[0]]))]
        elif method == "head":
            return objects.head(key)["size"]
        elif method == "delete":
            objects.delete([key])
        elif method == "list":
            return sorted((one["path"], one["size"]) for one in objects.list(key).collect())
        else:
            found = objects.list_with_delimiter(key)
            return sorted(found["common_prefixes"]), sorted(one["path"] for one in found["objects"])
    except Exception as error:
        return type(error).__name__
    return None


@given(st.lists(CALLS, max_size=25))
def test_memory_does_what_obstore_s_does(calls):
    ours, twin = MemoryObjects(), MemoryStore()
    for call in calls:
        assert outcome(ours, call) == outcome(twin, call), call


def test_a_tag_is_of_one_put_and_a_time_of_the_clock():
    objects = MemoryObjects(clock := Clock())
    first = objects.put("a", b"1")
    clock.sleep(61.5)
    second = objects.put("a", b"1")
    assert first["e_tag"] != second["e_tag"] == objects.head("a")["e_tag"]
    assert objects.head("a")["last_modified"].timestamp() == int(clock.now())


# ---- faults --------------------------------------------------------------------------------------------------------


def met(fault: str, mode: str = "create") -> tuple[SimulatedObjects, str]:
    """A store after a put that met a fault, and the error."""
    objects = SimulatedObjects(Faults(planned={("put", "k"): [fault]}), late_calls=3)
    with pytest.raises((AlreadyExistsError, GenericError)) as error:
        objects.put("k", b"12", mode=mode)
    return objects, f"{type(error.value).__name__} {error.value}"


def test_each_fault_of_a_put():
    errors = {}
    there = {}
    for fault in KINDS:
        objects, errors[fault] = met(fault)
        there[fault] = objects.there()
    assert there == {fault: ["k"] if fault in ("lost", "twice") else [] for fault in KINDS}
    assert {fault for fault, said in errors.items() if said.startswith("AlreadyExists")} == {"twice", "conflict"}
    assert "409" in errors["conflict"]
    assert "412" in errors["twice"]
    assert "503" in errors["busy"]
    assert all("timed out" in errors[fault] for fault in ("lost", "late", "failed", "torn"))


def test_a_late_put_lands_behind_those_that_came_later():
    objects, _ = met("late", "overwrite")
    objects.put("k", b"later")
    objects.head("k")
    assert objects.inner.get("k").bytes() == b"later"
    objects.head("k")
    assert objects.inner.get("k").bytes() == b"12"
    objects, _ = met("late", "create")
    objects.put("k", b"later", mode="create")
    objects.land()
    assert objects.inner.get("k").bytes() == b"later"


def test_a_torn_put_leaves_half_unless_it_was_on_a_condition():
    assert met("torn", "overwrite")[0].inner.get("k").bytes() == b"1"
    assert met("torn", "create")[0].there() == []


def test_a_busy_server_does_nothing_for_a_while():
    objects, _ = met("busy")
    for _ in range(3):
        with pytest.raises(GenericError, match="503"):
            objects.get("other")
    objects.clock.sleep(objects.busy_s)
    objects.put("k", b"1", mode="create")


def test_random_faults_come_at_their_rates_and_depend_on_no_order():
    rates = dict.fromkeys(KINDS, 0.05)
    keys = [f"k{i}" for i in range(40)]
    drawn = []
    for order in (keys, keys[::-1]):
        faults = Faults(3, rates)
        found = {key: [faults.next("put", key) for _ in range(25)] for key in order}
        assert faults.met == Counter(one for key in keys for one in found[key] if one)
        drawn.append(found)
    assert drawn[0] == drawn[1]
    counts = Counter(one for key in keys for one in drawn[0][key])
    assert all(20 < counts[fault] < 80 for fault in KINDS)
    assert {Faults(3, rates).next("get", f"k{i}") for i in range(400)} == {None, *OF_READS}
    assert {Faults(3, rates).next("delete", f"k{i}") for i in range(400)} == {None, *OF_DELETES}
    assert {Faults(4, rates).next("put", key) for key in keys} - {None}
    assert sum(Faults(3, rates).next("put", f"a/b/{i}") is not None for i in range(1000)) < 40


@pytest.mark.parametrize("promise", PROMISES)
def test_each_promise_can_be_broken(promise):
    objects = SimulatedObjects(broken={promise}, lists_late=2)
    before = {f"k{i}": bytes([i, 1]) for i in range(30)}
    for key, data in before.items():
        objects.put(key, data, mode="create")
    if promise == "conditions":
        objects.put("k0", b"another", mode="create")
        assert objects.get("k0").bytes() == b"another"
    elif promise == "listings":
        assert len(objects.list().collect()) == 29
    elif promise == "durability":
        assert 0 < 30 - len(objects.there()) < 20
    elif promise == "wholeness":
        assert 0 < sum(objects.get(key).bytes() == data[:1] for key, data in before.items()) < 20
    else:
        found = [objects.get(key).bytes() == data for key, data in before.items()]
        found += [objects.get_ranges(key, starts=[0], ends=[2]) == [data] for key, data in before.items()]
        assert 0 < found.count(False) < 40


# ---- processes in turns --------------------------------------------------------------------------------------------


def count_up(objects: Any) -> None:
    """Add one to a number, without losing what others add: a put on condition of the tag that was read."""
    from obstore.exceptions import PreconditionError

    while True:
        found = objects.get("number")
        try:
            objects.put("number", b"%d" % (int(found.bytes()) + 1), mode={"e_tag": found.meta["e_tag"]})
        except PreconditionError:
            continue
        return


def careless(objects: Any) -> None:
    objects.put("number", b"%d" % (int(objects.get("number").bytes()) + 1))


def counted(seed: int, add: Any) -> tuple[int, Schedule]:
    objects = SimulatedObjects()
    objects.put("number", b"0")
    schedule = Schedule(seed, clock=objects.clock, max_deaths=0)
    for i in range(3):
        schedule.add(f"adder {i}", lambda process: add(ProcessObjects(objects, process)))
    schedule.run()
    return int(objects.get("number").bytes()), schedule


def test_seeds_find_a_lost_update_and_give_it_again():
    assert [counted(seed, count_up)[0] for seed in range(30)] == [3] * 30
    found = [counted(seed, careless) for seed in range(30)]
    assert {number for number, _ in found} >= {2, 3}
    assert [schedule.trace for _, schedule in found] == [counted(seed, careless)[1].trace for seed in range(30)]


def test_whoever_is_killed_is_followed_by_another_and_acts_no_more():
    for seed in range(30):
        objects = SimulatedObjects()
        schedule = Schedule(seed, clock=objects.clock, max_deaths=3, life=20)

        def act(process: Any, objects: SimulatedObjects = objects) -> None:
            view = ProcessObjects(objects, process)
            try:
                for i in range(30):
                    view.put(f"{process.role}/{i}", b"1")
            finally:
                if process.dead:
                    with pytest.raises(actcache.testing.schedule.Killed):
                        view.put("a dead one's", b"1")

        schedule.add("worker", act)
        schedule.run()
        there = objects.there()
        assert "a dead one's" not in there
        assert len(schedule.processes) == schedule.n_deaths + 1
        assert f"worker#{schedule.n_deaths}/29" in there
    assert schedule.n_deaths <= 3


def test_who_sleeps_wakes_in_order_and_the_clock_goes_on_at_once():
    schedule = Schedule(0, max_deaths=0)
    began, woken = schedule.clock.now(), []

    def act(process: Any) -> None:
        process.turn("begin")
        for _ in range(3):
            process.sleep(process.rng.uniform(1, 1e6))
            woken.append(schedule.clock.now())

    for i in range(4):
        schedule.add(f"sleeper {i}", act)
    schedule.run()
    assert len(woken) == 12
    assert all(earlier <= later for earlier, later in pairwise(woken))
    assert woken[-1] > began + 1e5


def test_what_a_process_raises_is_raised_with_the_seed_and_the_last_steps():
    schedule = Schedule(11)

    def fail(process: Any) -> None:
        process.turn("look")
        raise ValueError("not so")

    def go_on(process: Any) -> None:
        while True:
            process.turn("go on")

    schedule.add("fails", fail)
    schedule.add("goes on", go_on)
    with pytest.raises(AssertionError, match=r"(?s)^seed 11: ValueError: not so.*fails#0: look") as error:
        schedule.run()
    assert isinstance(error.value.__cause__, ValueError)
    assert all(process.over for process in schedule.processes)
    for process in schedule.processes:
        process.join(10)
        assert not process.is_alive()


def test_a_slow_listing_has_any_page_as_it_was_then():
    """A key that is put meanwhile may be missed, or not; one that was there all the time is never missed."""
    found = Counter()
    for seed in range(60):
        objects = SimulatedObjects()
        for key in ("a", "m", "z"):
            objects.put(f"f/{key}", b"1")
        schedule = Schedule(seed, clock=objects.clock, max_deaths=0)

        def look(process: Any, objects: SimulatedObjects = objects) -> None:
            for _ in range(4):
                listed = ProcessObjects(objects, process).list_with_delimiter("f")["objects"]
                found["".join(one["path"][2:] for one in listed)] += 1

        def change(process: Any, objects: SimulatedObjects = objects) -> None:
            view = ProcessObjects(objects, process)
            view.put("f/b", b"1")
            view.put("f/y", b"1")

        schedule.add("looks", look)
        schedule.add("changes", change)
        schedule.run()
    assert all({*"amz"} <= {*listed} for listed in found)
    assert {"amz", "abmz", "abmyz", "amyz"} <= found.keys()  # the last: y was put later than b, and b is missed
