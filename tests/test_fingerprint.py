"""Fingerprint: it is its JSON, whatever else that holds."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.errors import InputError
from actcache.fingerprint import MISSING, CheckpointFingerprint, Fingerprint, order_of_labels

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*/*/zarr.json"))
LABELS = st.sampled_from(["pt", "it", "base", "sft", "dpo"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
OF_TYPE: dict[str, st.SearchStrategy[Any]] = {
    "strict": st.booleans(),
    "versions": st.dictionaries(st.text(), st.text(), max_size=2),
    **dict.fromkeys(("vocabulary", "prompts", "codec", "device", "processor"), st.text(max_size=5)),
    **dict.fromkeys(("n_prompts", "n_blocks", "max_new", "max_tokens", "shard_prompts"), st.integers(0, 2**40)),
}


@st.composite
def contents(draw: st.DrawFn) -> dict[str, Any]:
    """JSON objects that are fingerprints: what the layout needs, some of what a capture records, and anything else."""
    digests = st.fixed_dictionaries({}, optional={"weights": st.text(), "end_ids": st.text(), "more": JSON})
    checkpoints = draw(st.dictionaries(LABELS, digests, min_size=1, max_size=4))
    labels = st.lists(st.sampled_from(sorted(checkpoints)), unique=True)
    content = {
        "checkpoints": checkpoints,
        "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "boundaries": draw(st.lists(st.integers(0, 99), unique=True)),
        "row_selection": draw(st.sampled_from(["prefix", "divergence"])),
        "width": draw(st.integers(1, 2**20)),
    }
    optional = {**OF_TYPE, "pair": labels, "lineup": labels}
    known = draw(st.fixed_dictionaries({}, optional=optional))
    names = {one.name for one in fields(Fingerprint)}
    further = draw(st.dictionaries(st.text().filter(lambda name: name not in names), JSON, max_size=3))
    return {**further, **known, **content}


@pytest.mark.slow
@given(contents())
def test_a_fingerprint_is_its_json(content):
    found = Fingerprint.from_json(content)
    assert json.dumps(found.to_json(), sort_keys=True) == json.dumps(content, sort_keys=True)
    as_stored = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    assert found.digest == hashlib.sha256(as_stored).hexdigest()
    assert pickle.loads(pickle.dumps(found)) == found
    assert list(found.differences(found)) == []
    assert sorted(found.labels) == sorted(content["checkpoints"])
    for name, value in content.items():
        if name in OF_TYPE:
            assert getattr(found, name) == value


@pytest.mark.slow
@given(contents(), contents())
def test_two_fingerprints_are_equal_where_their_json_is(content, other):
    a, b = Fingerprint.from_json(content), Fingerprint.from_json(other)
    same = json.dumps(content, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (a == b) == same == (a.digest == b.digest) == (not list(a.differences(b)))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}")
def test_digests_of_earlier_versions_stay(path):
    content = json.loads(path.read_text())["attributes"]["actcache"]
    assert Fingerprint.from_json(content["fingerprint"]).digest == content["fingerprint_sha256"]


def content_of(**changes: Any) -> dict[str, Any]:
    given = {"checkpoints": {"a": {}, "b": {}, "c": {}}, "pair": ["c", "a"], "dtype": "float32", "boundaries": [1]}
    return {**given, "row_selection": "prefix", "width": 3, **changes}


def test_differences_name_the_field_and_both_values():
    here = Fingerprint.from_json(content_of(seed=0, checkpoints={"a": {"weights": "x"}, "b": {}, "c": {}}))
    other = {"a": {"weights": "y"}, "b": {}, "c": {}}
    there = Fingerprint.from_json(content_of(seed=False, checkpoints=other, width=4))
    assert list(here.differences(there)) == [("checkpoints.a.weights", "x", "y"), ("seed", 0, False), ("width", 3, 4)]
    assert list(here.differences(Fingerprint.from_json(content_of(checkpoints=here.to_json()["checkpoints"])))) == [
        ("seed", 0, MISSING)
    ]


def test_labels_come_in_the_order_of_the_lineup():
    assert Fingerprint.from_json(content_of()).labels == ["c", "a", "b"], "the pair, then the others by name"
    assert Fingerprint.from_json(content_of(lineup=["a", "b", "c"])).labels == ["a", "b", "c"]
    assert order_of_labels(["c", "a", "b"], ("c", "a")) == ("c", "a", "b")
    assert order_of_labels(["a", "b"], ("b", "a")) == ("a", "b")
    assert order_of_labels(["pt", "it"], ("pt", "it")) is None, "a fingerprint of a pair is as it was"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": 3}, "dtype is 3, expected text"),
        ({"boundaries": [1, True]}, "boundaries"),
        ({"pair": ["a", "x"]}, r"pair is \['a', 'x'\], expected labels of a, b, c"),
        ({"lineup": "abc"}, "lineup is 'abc'"),
        ({"n_blocks": 3.0}, "n_blocks is 3.0, expected a count"),
        ({"strict": 1}, "strict is 1, expected true or false"),
        ({"checkpoints": {"a": {"weights": 1}}, "pair": []}, "weights of 'a' is 1, expected text"),
        ({"checkpoints": {"a": "x"}, "pair": []}, "checkpoint 'a' is 'x', expected an object"),
    ],
)
def test_a_field_of_another_type_is_named(change, said):
    with pytest.raises(InputError, match=said):
        Fingerprint.from_json(content_of(**change))
    with pytest.raises(InputError, match="expected an object"):
        Fingerprint.from_json("checkpoints dtype boundaries row_selection width")


def test_a_store_of_no_capture_is_told_what_it_lacks():
    with pytest.raises(InputError, match="does not record its n_blocks"):
        Fingerprint.from_json(content_of()).check_captured()


def test_earlier_versions_recorded_less_of_a_checkpoint():
    earlier = CheckpointFingerprint(weights="x")
    assert earlier.differs_in(CheckpointFingerprint(weights="x", end_ids="0")) is None
    assert CheckpointFingerprint(weights="x", end_ids="0").differs_in(earlier) == "end_ids"
