"""Vectors of edits: whatever holds finite real numbers is taken as it is meant, anything else is one line."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch

from actcache.errors import InputError
from actcache.replay.edits import Add, MatchedNorm, Project, Replace, Rows, SignedPermutation, Variant
from actcache.replay.vectors import EventVectors, as_tensor

NUMBERS = [1.0, -2.0, 3.0, 0.5]
WIDTH = len(NUMBERS)
WHOLE = [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.tensor(NUMBERS), NUMBERS),
        (torch.tensor(NUMBERS, dtype=torch.bfloat16), NUMBERS),
        (torch.tensor(NUMBERS, dtype=torch.float16), NUMBERS),
        (torch.tensor(NUMBERS, dtype=torch.float64), NUMBERS),
        (torch.tensor(NUMBERS).to(torch.float8_e4m3fn), NUMBERS),
        (torch.nn.Parameter(torch.tensor(NUMBERS)), NUMBERS),
        (torch.tensor(NUMBERS, requires_grad=True) * 1, NUMBERS),
        (torch.tensor([NUMBERS, NUMBERS]).T[:, 1], NUMBERS),
        (torch.tensor(WHOLE), WHOLE),
        (torch.tensor(WHOLE, dtype=torch.uint8), WHOLE),
        (np.array(NUMBERS), NUMBERS),
        (np.array(NUMBERS, np.float32), NUMBERS),
        (np.array(NUMBERS, np.float16), NUMBERS),
        (np.array(NUMBERS, ">f4"), NUMBERS),
        (np.array(NUMBERS[::-1])[::-1], NUMBERS),
        (np.frombuffer(np.array(NUMBERS).tobytes()), NUMBERS),  # read-only
        (np.array(WHOLE), WHOLE),
        (np.array(WHOLE, np.uint64), WHOLE),
        (NUMBERS, NUMBERS),
        (tuple(WHOLE), WHOLE),
        ([torch.tensor(number) for number in NUMBERS], NUMBERS),
    ],
)
def test_what_holds_numbers_is_taken_as_they_are(given, expected):
    at = Rows(torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.arange(3), torch.tensor([3]), ["a"])
    x = torch.ones(3, WIDTH)
    add, put = Add(given), Replace(vector=given)
    assert not add.vector.requires_grad
    assert torch.equal(add(x, at), x + torch.tensor(expected))
    assert torch.equal(put(x, at), torch.tensor(expected, dtype=torch.float32).expand(3, -1))
    assert len(Variant("v").digest) == 64


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.tensor(NUMBERS, dtype=torch.complex64), "the vector is complex64, expected real numbers"),
        (np.array(NUMBERS, complex), "the vector is complex128, expected real numbers"),
        ([1.0, 2j], "the vector is complex64, expected real numbers"),
        (torch.tensor([True, False]), "the vector is bool, expected real numbers"),
        (np.array([True, False]), "the vector is bool, expected real numbers"),
        (torch.tensor(2.0), r"the vector has shape \[\], expected \[D\]"),
        (3, r"the vector has shape \[\], expected \[D\]"),
        (np.float32(3), r"the vector has shape \[\], expected \[D\]"),
        (
            torch.ones(1, WIDTH),
            r"the vector has shape \[1, 4\], expected \[D\]; one vector per event needs per='event'",
        ),
        (torch.ones(2, WIDTH), r"the vector has shape \[2, 4\], expected \[D\]"),
        (np.ones((WIDTH, 1)), r"the vector has shape \[4, 1\], expected \[D\]"),
        ([[1.0], [1.0, 2.0]], "the vector is list .*, expected a tensor, an array or a list of numbers"),
        (["a", "b"], "the vector is list .*, expected a tensor"),
        (np.array(["a"]), "the vector is ndarray .*, expected a tensor"),
        (np.array([None]), "the vector is ndarray .*, expected a tensor"),
        ("zeros", "the vector is str 'zeros', expected a tensor"),
        ({"a": NUMBERS}, "one vector per event needs per='event'"),
        (torch.tensor([1.0, torch.nan]), "the vector holds values that are not finite"),
        ([1.0, float("inf")], "the vector holds values that are not finite"),
        (np.array([-np.inf]), "the vector holds values that are not finite"),
        (np.ma.masked_array(NUMBERS, [0, 1, 0, 0]), "the vector is a masked array, expected one without a mask"),
        (torch.ones(WIDTH).to_sparse(), "the vector is a sparse, quantized or meta tensor"),
        (torch.ones(WIDTH, device="meta"), "the vector is a sparse, quantized or meta tensor"),
    ],
)
@pytest.mark.parametrize("make", [Add, lambda vector: Replace(vector=vector)])
def test_what_is_no_vector_is_one_line(given, words, make):
    with pytest.raises(InputError, match=words) as caught:
        make(given)
    assert "\n" not in str(caught.value)


def test_a_basis_is_taken_like_a_vector():
    for basis in (np.eye(WIDTH)[:2], np.eye(WIDTH, dtype=int)[:2], [[1, 0, 0, 0], [0, 1, 0, 0]]):
        assert torch.equal(Project(basis).basis.float(), torch.eye(WIDTH)[:2])
    for given, words in ((torch.eye(2) * 1j, "complex64"), (np.eye(2) > 0, "bool"), ("x", "expected a tensor")):
        with pytest.raises(InputError, match=f"project: the basis is .*{words}"):
            Project(given)
    with pytest.raises(InputError, match=r"project: the mean has shape \[1, 4\], expected \[D\]"):
        Project(np.eye(WIDTH), mean=np.ones((1, WIDTH)))


@pytest.mark.parametrize("scale", [True, "2", None, 2j, float("nan"), -float("inf"), [1.0, 2.0], torch.ones(2)])
def test_a_scale_is_a_finite_number(scale):
    with pytest.raises(InputError, match=r"add: scale is .*, expected a finite number"):
        Add(NUMBERS, scale)
    assert Add(NUMBERS, np.float32(0.5)).scale == Add(NUMBERS, torch.tensor(0.5)).scale == 0.5


@pytest.mark.parametrize("seed", [0.5, True, "3", None, 2**63, -(2**63), 10**30])
def test_a_seed_is_a_whole_number(seed):
    for kind in (MatchedNorm, SignedPermutation):
        with pytest.raises(InputError, match=r"seed is .*, expected a whole number of 63 bits"):
            kind(seed)
        assert kind(np.int64(3)) == kind(3)


IDS = ["a@3", "b@0", "c@7"]


def test_vectors_per_event_are_the_same_by_whatever_they_are_given():
    table = torch.arange(12.0).view(3, WIDTH)
    whole = EventVectors.of(table, IDS, "v")
    others = [
        EventVectors.of(table[[2, 0, 1]], [IDS[i] for i in (2, 0, 1)], "v"),
        EventVectors.of(dict(zip(IDS, table, strict=True)), None, "v"),
        EventVectors.of(table.numpy(), np.array(IDS), "v"),
        Add(table, per="event", events=IDS).vector,
        Replace(vector=dict(zip(IDS, table.numpy(), strict=True)), per="event").vector,
        pickle.loads(pickle.dumps(whole)),
        copy.deepcopy(whole),
    ]
    for other in others:
        assert torch.equal(other.of_events(["c@7", "a@3", "c@7"]), table[[2, 0, 2]])
        assert other.digest == whole.digest
        assert (other.missing(IDS), other.missing(["a@3", "d@1"])) == (None, "d@1")
    changed = table.clone()
    changed[1, 2] += 1
    assert EventVectors.of(changed, IDS, "v").digest != whole.digest
    assert EventVectors.of(table, ["b@0", "a@3", "c@7"], "v").digest != whole.digest
    mixed = EventVectors.of({"a": [1, 2], "b": torch.tensor([0.5, 0.25])}, None, "v")
    assert mixed.of_events(["b", "a"]).tolist() == [[0.5, 0.25], [1, 2]]


@pytest.mark.parametrize(
    ("given", "events", "words"),
    [
        ({}, None, "expected a vector"),
        ({"a": NUMBERS, "b": [1.0]}, None, "all of one width"),
        ({"a": [NUMBERS]}, None, r"the vector of event 'a' has shape \[1, 4\]"),
        ({"a": [1.0, float("nan")]}, None, "the vector of event 'a' holds values that are not finite"),
        ({0: NUMBERS}, None, "event 0 is no id, expected a text"),
        ({"a": NUMBERS}, ["a"], "whose keys are the event ids"),
        (torch.ones(3, WIDTH), None, "is a mapping from event id to vector, or needs 'events'"),
        (torch.ones(3, WIDTH), ["a", "b"], r"has shape \[3, 4\], expected \[2, D\] for its events"),
        (torch.ones(WIDTH), ["a"], r"has shape \[4\], expected \[1, D\]"),
        (torch.ones(2, WIDTH), ["a", "a"], "has two vectors for event 'a'"),
        (torch.ones(1, WIDTH), [0], "event 0 is no id"),
        (torch.full((1, WIDTH), torch.inf), ["a"], "not finite"),
    ],
)
def test_vectors_per_event_that_cannot_be_are_one_line(given, events, words):
    with pytest.raises(InputError, match=words):
        Add(given, per="event", events=events)


def test_the_option_is_named_rightly():
    with pytest.raises(InputError, match="per is 'token'; leave it out for one vector"):
        Add(torch.ones(2), per="token")
    with pytest.raises(InputError, match="one vector per event needs per='event'"):
        Replace(vector=torch.ones(1, 2), events=["a"])


def test_every_row_of_a_large_table_is_looked_at():
    table = torch.zeros(40_000, 2)
    table[-1, -1] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        as_tensor(table, "v")
