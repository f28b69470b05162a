"""Events by number, id, mask and expression: each names the same events to all that take events."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from stores import bits, make_fingerprint, make_segment, write_store
from twins.store import Twin

from actcache.errors import IncompatibleError, InputError
from actcache.store import Store, open_store
from actcache.store.feed import ActivationBuffer, RowFeed

FINGERPRINT = make_fingerprint(width=3)
SITES = [("mlp", 4), ("mlp", 0), ("attention", 4)]
SEGMENTS = {
    "a": make_segment(
        FINGERPRINT,
        [5, 9, 1],
        [(1, 8), (0, 2), (1, 3), (2, 0)],
        name="a",
        seed=1,
        carried=[{"topic": "sea"}, {"topic": None}, {}, {"topic": "mill"}],
        sites=SITES,
    ),
    "b": make_segment(FINGERPRINT, [2], [], name="b", seed=2, sites=SITES),
    "c": make_segment(FINGERPRINT, [4, 6], [(1, 3)], name="c", seed=3, carried=[{"topic": "sea"}], sites=SITES),
}
E = 5


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return open_store(write_store(tmp_path_factory.mktemp("store") / "store", FINGERPRINT, SEGMENTS))


MASK = [True, False, True, True, False]


@pytest.mark.parametrize(
    ("asked", "numbers"),
    [
        (["c-0", "a-2", "a-2"], [4, 2, 2]),
        ([pa.scalar("c-0"), pa.scalar("a-2")], [4, 2]),
        (("a-1",), [1]),
        (np.array(["a-3", "a-0"]), [3, 0]),
        (pa.array(["a-3", "a-0"]), [3, 0]),
        (MASK, [0, 2, 3]),
        (np.array(MASK), [0, 2, 3]),
        (torch.tensor(MASK), [0, 2, 3]),
        (pa.array(MASK), [0, 2, 3]),
        (pa.chunked_array([MASK[:2], MASK[2:]]), [0, 2, 3]),
        ([False] * E, []),
        (np.array(MASK, object), [0, 2, 3]),
        (pc.field("kind") == "later", [0, 3, 4]),
        (pc.field("topic") == "sea", [0, 4]),
        (pc.is_null(pc.field("topic")), [1, 2]),
        ((pc.field("step") > 0) & (pc.field("segment") == "a"), [1, 2, 3]),
        (pc.field("step") > 99, []),
    ],
)
def test_ids_masks_and_expressions(store, asked, numbers):
    found = store.numbers(asked)
    assert (found.dtype, found.tolist()) == (np.int64, numbers)
    Twin(FINGERPRINT, SEGMENTS).check(store, numbers)
    assert bits(store.states("it", 2, asked)[0]) == bits(store.states("it", 2, numbers)[0])
    assert bits(store.final("it", asked)) == bits(store.final("it", numbers))
    assert store.token_ids(asked)[0].tolist() == store.token_ids(numbers)[0].tolist()


def test_columns_of_pandas(store):
    pd = pytest.importorskip("pandas")
    events = store.events.to_pandas()
    assert store.numbers(events["kind"] == "later").tolist() == [0, 3, 4]
    assert store.numbers(pd.Series(MASK, dtype="boolean")).tolist() == [0, 2, 3]
    assert store.numbers(events["event_id"][[4, 2]]).tolist() == [4, 2]
    assert store.numbers(events.index[events["step"] > 1]).tolist() == [2, 3]
    with pytest.raises(InputError, match="events mix NAType and truth values"):
        store.numbers(pd.Series([True, None, True, True, False], dtype="boolean"))


def test_a_mask_made_of_the_events(store):
    assert store.numbers(pc.equal(store.events["kind"], "later")).tolist() == [0, 3, 4]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (MASK[:-1], "the mask of events has 4 values, expected 5: one per event"),
        (np.array([True] * 6), "the mask of events has 6 values, expected 5"),
        (pa.array([True, None, True, True, False]), "events mix NoneType and truth values; give numbers, ids, or"),
        (["a-0", "b-0"], "event 'b-0' is not in the store; it has 5 events, with ids such as 'a-0'"),
        ("a-0", r"events are the text 'a-0', expected a list: of ids, \['a-0'\]"),
        ([True, 2], "events mix numbers and truth values"),
        (["a-0", 2], "events mix ids and numbers"),
        ([0.5], "events are float64, expected integers"),
        ({0, 1}, r"events are a set, expected a list of numbers or ids; sorted\(...\) gives their order"),
        (
            (number for number in (0, 1)),
            r"events are a generator, expected a list of numbers or ids; list\(.*\) makes",
        ),
        ({"a-0": 1}, "events are a dict, expected a list of numbers or ids; list"),
        (3, r"events are the number 3, expected a list: \[3\]"),
        (True, "events are the number True, expected a list"),
        (np.array([0, 1, 1, 0, 1], np.uint8), "events are uint8, all 0 or 1, one per event: give a mask as bool"),
        (np.array([[0, 1], [2, 3]]), r"events have the shape \[2, 2\], expected one value after another"),
        (torch.tensor([1.0], dtype=torch.bfloat16), "events cannot be read as numbers, ids or a mask"),
        (slice(None, None, 0), "events are slice"),
        (slice(0, 1.5), "events are slice"),
        (
            pc.field("sort") == "later",
            "the expression .* does not choose events: .*sort.*; their columns are event_",
        ),
        (pc.field("step"), "the expression step does not choose events: "),
        (pc.field("step") == "x", "the expression .* does not choose events: "),
    ],
)
def test_what_chooses_nothing_is_said(store, asked, said):
    with pytest.raises(InputError, match=said):
        store.states("pt", 1, asked)


def test_a_key_of_the_prompts_is_no_number(tmp_path):
    carried = [{"number of the event": 7}]
    path = write_store(
        tmp_path / "store", FINGERPRINT, {"a": make_segment(FINGERPRINT, [3], [(0, 1)], carried=carried)}
    )
    assert open_store(path).numbers(pc.field("number of the event") == 7).tolist() == [0]


def test_what_a_store_has_is_said_by_site(store):
    with pytest.raises(
        InputError, match="boundary 3 is not in the store; it has boundaries 1, 2; attention of block 4; mlp of"
    ):
        store.states("pt", 3)


@pytest.mark.parametrize("block", [True, 2.0, "2", None])
def test_a_block_is_a_whole_number(store, block):
    """True is 1 and 2.0 is 2, where such a block is looked up."""
    with pytest.raises(InputError, match=r"boundary is .*, expected a whole number"):
        store.states("pt", block)
    with pytest.raises(InputError, match=r"boundary .* is not in the store; it has 1, 2"):
        RowFeed(store, boundaries=[block])
    assert store.states("pt", np.int64(2))[0].equal(store.states("pt", 2)[0])


@pytest.mark.parametrize("selection", ["prefix", "divergence"])
def test_the_row_at_each_events_position(tmp_path, selection):
    fingerprint = make_fingerprint(row_selection=selection)
    twin = Twin(fingerprint, {"a": make_segment(fingerprint, [5, 9], [(1, 8), (0, 2), (1, 3)], sites=[("mlp", 4)])})
    store = open_store(write_store(tmp_path / "store", fingerprint, twin.segments))
    for numbers in ([2, 0, 2], []):
        for site, block in (("state", 2), ("mlp", 4)):
            want = twin.rows(lambda s, key=(site, "it", block): s.rows[key], selection, numbers)
            rows, offsets = store.states("it", block, numbers, site=site, positions="event")
            assert bits(rows) == bits(torch.cat([torch.empty(0, 3), *(one[-1:] for one in want)]))
            assert offsets.tolist() == list(range(len(numbers) + 1))
    with pytest.raises(InputError, match="positions is 'last', expected 'all' or 'event'"):
        store.states("it", 2, positions="last")


# ---- feeds -----------------------------------------------------------------------------------------------------------


def places_of(feed: RowFeed) -> list[tuple[int, int, int]]:
    """Segment, sequence and position of every row that is fed."""
    places = feed.locate(torch.cat([batch.rows for batch in feed]))
    return sorted(zip(*(column.tolist() for column in places[:3]), strict=True))


@pytest.mark.parametrize(
    ("events", "positions", "places"),
    [
        # Events 1 and 2 are at position 2 of sequence 0 and position 3 of sequence 1; event 0 is further on in 1.
        ([1, 2], "all", [(0, 0, p) for p in range(3)] + [(0, 1, p) for p in range(4)]),
        (["a-2", "a-0", "a-2"], "all", [(0, 1, p) for p in range(9)]),
        ([1, 2], "event", [(0, 0, 2), (0, 1, 3)]),
        (pc.field("topic") == "sea", "event", [(0, 1, 8), (2, 1, 3)]),
        ([1, 2], [0, -2, 3], [(0, 0, 0), (0, 1, 0), (0, 1, 3)]),
        ([False, True, False, False, True], lambda places: places.position > 1, [(0, 0, 2), (2, 1, 2), (2, 1, 3)]),
    ],
)
def test_a_feed_of_some_events(store, events, positions, places):
    feed = RowFeed(store, events=events, positions=positions, batch_rows=4)
    assert places_of(feed) == places
    assert len(next(ActivationBuffer(feed))) == min(4, len(places))


def test_a_feed_of_some_events_of_their_own_rows_alone(tmp_path):
    fingerprint = make_fingerprint(row_selection="divergence")
    segment = make_segment(fingerprint, [5, 9], [(1, 8), (0, 2), (1, 3)])
    store = open_store(write_store(tmp_path / "store", fingerprint, {"a": segment}))
    for positions in ("all", "event"):
        assert places_of(RowFeed(store, events=["s-2", "s-0"], positions=positions)) == [(0, 1, 3), (0, 1, 8)]


def test_a_feed_of_no_events(store):
    with pytest.raises(InputError, match=r"no row of .* is chosen"):
        RowFeed(store, events=[])
    with pytest.raises(InputError, match="the mask of events has 1 values"):
        RowFeed(store, events=[True])


def test_a_feed_of_another_site(store):
    feed = RowFeed(store, site="mlp", boundaries=[0, 4], labels=["it"], batch_rows=7, shuffle=False)
    whole = [torch.cat([segment.rows["mlp", "it", b] for segment in SEGMENTS.values()]) for b in (0, 4)]
    assert bits(torch.cat([batch.states for batch in feed])) == bits(torch.stack(whole, 1)[:, None])
    assert RowFeed(store, site="attention").boundaries == [4]
    assert RowFeed(store, site="mlp").boundaries == [4, 0]
    assert "rows of it at mlp of blocks 0, 4" in repr(feed)


def test_where_a_feed_of_a_site_stood_is_no_place_in_another(store):
    at = {site: RowFeed(store, site=site, boundaries=[4]).state_dict() for site in ("mlp", "attention")}
    with pytest.raises(IncompatibleError, match="this feed's site is 'mlp', that of the state 'attention'"):
        RowFeed(store, site="mlp", boundaries=[4]).load_state_dict(at["attention"])
    state = RowFeed(store, boundaries=[1])
    earlier = state.state_dict()
    del earlier["feed"]["site"], earlier["feed"]["order"]  # as an earlier version wrote it
    with pytest.raises(IncompatibleError, match="of another version of actcache, whose epochs have another order"):
        state.load_state_dict(earlier)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"site": "mpl"}, "site is 'mpl', expected one of state, attention, mlp"),
        ({"site": "mlp", "boundaries": [1]}, "mlp of block 1 is not in the store; it has .*4, 0"),
        ({"site": "mlp", "boundaries": [True]}, "mlp of block (is )?True"),
    ],
)
def test_sites_that_are_not_there(store, changes, said):
    with pytest.raises(InputError, match=said):
        RowFeed(store, **changes)
    with pytest.raises(InputError, match=said):
        store.states("pt", changes.get("boundaries", [1])[0], site=changes["site"])
