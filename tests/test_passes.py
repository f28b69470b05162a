"""Passes: several positions of a sequence scored in one run, against separate replays of what is cut there."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import tiny
import torch
from conftest import first_quick
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from twins import reference
from twins.replay import BOUNDARY, LENGTHS, N_BLOCKS, SHIFT, WIDTH, Sequences, build, separate

from actcache.errors import InputError
from actcache.models.regimes import ONE_REGIME, Regimes
from actcache.replay.batch import Batch
from actcache.replay.edits import (
    PLAIN,
    Add,
    Call,
    Edit,
    Interpolate,
    MatchedNorm,
    Project,
    Replace,
    SignedPermutation,
    Variant,
)
from actcache.replay.late_stack import LateStack
from actcache.replay.moves import Moves
from actcache.replay.passes import divide

# Events of LENGTHS in no order: two of one position, every position of a sequence, and a sequence that has none.
EVENTS = [(2, 11), (0, 3), (2, 4), (4, 8), (2, 4), (1, 0), *((0, position) for position in range(7)), (4, 0), (2, 5)]
IDS = [f"event {number}" for number in range(len(EVENTS))]


class MeanOfRow(nn.Module):
    """An MLP that adds the mean of all tokens of the batch row: no position is what it is when cut there."""

    def __init__(self, mlp):
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden):
        return self.mlp(hidden) + hidden.mean(dim=1, keepdim=True)


MODES = {
    **dict.fromkeys(("llama", "gpt2", "gptj", "deepseek_v3", "phi3 longrope"), "packed"),
    **dict.fromkeys(("bloom", "mamba"), "padded"),
    "mean of the row": "single",
}


@functools.cache
def model_of(name):
    model = build("llama" if name == "mean of the row" else name)
    if name == "mean of the row":
        layer = reference.parts(model).blocks[BOUNDARY]
        layer.mlp = MeanOfRow(layer.mlp)
    return model


@functools.cache
def late_of(name):
    late = LateStack.load(model_of(name), BOUNDARY)
    assert late.mode == MODES[name]
    return late


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edits_of(kind, width, ids):
    """Edits of each way to depend on the event, or not to."""
    shift = draw(width, seed=5)
    vectors = {event: draw(width, seed=10 + number) for number, event in enumerate(ids)}
    return {
        "plain": [],
        "last": [Edit(Add(shift))],
        "last, of a donor": [Edit(Replace("other")), Edit(Add(shift, -1.0), (-1,))],
        "last, drawn": [Edit(MatchedNorm(1, "other"))],
        "last, of the event": [Edit(Add(vectors, per="event"))],
        "last, inside": [Edit(Add(shift), site="mlp", layers=(-2, -1)), Edit(Add(shift, 0.5))],
        "last, heads": [Edit(Call(lambda rows, at: -rows, "turned"), site="heads", layers=(-2, -1))],
        "all": [Edit(Interpolate("other", 0.5), "all")],
        "all, permuted": [Edit(SignedPermutation(2, "other"), "all"), Edit(Add(shift), (0,))],
        "all, permuted per prompt": [Edit(SignedPermutation(2, "other", "prompt"), "all")],
        "all, inside": [Edit(Replace(vector=shift), "all", "mlp", ("-2..-1",))],
        "all, drawn": [Edit(MatchedNorm(3), "all", "attention", (-2,))],
        "all, of the event": [Edit(Add(vectors, per="event"), "all")],
        "first and last": [Edit(Add(shift), (0, -1))],
        "called": [Edit(Call(lambda rows, at: rows * (1 + at.lengths[at.sequence])[:, None], "by length"), "all")],
    }[kind]


KINDS = [
    *("plain", "last", "last, of a donor", "last, drawn", "last, of the event", "last, inside", "last, heads", "all"),
    *(
        "all, permuted",
        "all, permuted per prompt",
        "all, inside",
        "all, drawn",
        "all, of the event",
        "first and last",
        "called",
    ),
]
# What BLOOM's parts return includes the residual stream, and Mamba's blocks have no attention.
OUTSIDE = [kind for kind in KINDS if kind not in ("last, inside", "last, heads", "all, inside", "all, drawn")]


@st.composite
def scored(draw_one):
    """Lengths of sequences, and positions of theirs in any order, some more than once."""
    lengths = draw_one(st.lists(st.integers(1, 14), min_size=1, max_size=4))
    event = st.sampled_from([(s, p) for s, length in enumerate(lengths) for p in range(length)])
    return lengths, draw_one(st.lists(event, min_size=1, max_size=8))


# Three workers share out what a mode and its regimes make of the events, whatever the model.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [
        *((name, "alone") for name in MODES),
        *((name, "three workers") for name in ("llama", "phi3 longrope", "bloom", "mean of the row")),
    ],
    indirect=["workers"],
)
def test_events_of_a_sequence_are_what_separate_replays_give(name, workers):
    late = late_of(name)
    kinds = OUTSIDE if MODES[name] == "padded" else KINDS

    @given(scored(), st.lists(st.sampled_from(kinds), min_size=1, max_size=4), st.sampled_from([None, 30, 1]))
    @settings(max_examples=10)
    def check(given_scored, chosen, max_tokens):
        lengths, positions = given_scored
        rows, other = draw(sum(lengths), late.width, seed=len(lengths)), draw(sum(lengths), late.width, seed=20)
        offsets, ids = [0, *itertools.accumulate(lengths)], IDS[: len(positions)]
        variants = [Variant(f"{i}", edits_of(kind, late.width, ids)) for i, kind in enumerate(chosen)]
        one = {"donors": {"other": other}, "keys": ids}
        exact = separate(late, rows, offsets, positions, variants, strict=True, **one)
        strict = late.run_variants(rows, offsets, variants, positions=positions, strict=True, **one)
        assert torch.equal(strict, exact)
        found = late.run_variants(rows, offsets, variants, positions=positions, max_tokens=max_tokens, **one)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)

    check()


def late_edits(width, ids):
    """Edits that leave the first positions alone, as far as each says."""
    shift = draw(width, seed=5)
    vectors = {event: draw(width, seed=10 + number) for number, event in enumerate(ids)}
    return {
        "third last": [Edit(Replace("other"), (-3,))],
        "second last and inside": [Edit(Add(shift), (-2,)), Edit(Add(shift), (-3, -1), "mlp", (-1,))],
        "inside, third last": [Edit(Add(shift), (-3,), "attention", (-2, -1))],
        "of the event": [Edit(Add(vectors, per="event"), (-2,))],
        "second": [Edit(Add(shift), (1,))],
        "second and last": [Edit(MatchedNorm(1, "other"), (1, -1))],
        "last": [Edit(Replace("other"))],
        "plain": [],
        "all": [Edit(Interpolate("other", 0.5), "all")],
    }


@pytest.mark.parametrize("name", first_quick(("llama", "phi3 longrope", "gpt2", "gptj", "deepseek_v3", "bloom")))
@pytest.mark.parametrize("workers", ["alone"], indirect=True)
def test_variants_of_the_last_positions_are_what_separate_replays_give(name, workers):
    """Also where events of a sequence share a run, in any order, and variants of all kinds are mixed."""
    late = late_of(name)
    kinds = [kind for kind in late_edits(WIDTH, IDS) if MODES[name] == "packed" or "inside" not in kind]

    @given(
        st.lists(st.integers(3, 14), min_size=1, max_size=4),
        st.lists(st.tuples(st.integers(0, 3), st.integers(2, 13)), min_size=1, max_size=8),
        st.lists(st.sampled_from(kinds), min_size=1, max_size=5),
        st.sampled_from([None, 30, 1]),
    )
    @settings(max_examples=15)
    def check(lengths, drawn, chosen, max_tokens):
        positions = [(s % len(lengths), min(p, lengths[s % len(lengths)] - 1)) for s, p in drawn]
        rows, other = draw(sum(lengths), late.width, seed=len(lengths)), draw(sum(lengths), late.width, seed=20)
        offsets, ids = [0, *itertools.accumulate(lengths)], IDS[: len(positions)]
        edits = late_edits(late.width, ids)
        variants = [Variant(f"{i}", edits[kind]) for i, kind in enumerate(chosen)]
        one = {"donors": {"other": other}, "keys": ids}
        exact = separate(late, rows, offsets, positions, variants, strict=True, **one)
        found = late.run_variants(rows, offsets, variants, positions=positions, max_tokens=max_tokens, **one)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)

    check()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "arch"), enumerate([*tiny.ALL_ARCHS, "phi3", "llama4"]))
def test_windows_chunks_caps_and_switches_are_those_of_the_cut_sequence(number, arch, tmp_path):
    """Sequences longer and shorter than windows, chunks and the lengths at which some models compute otherwise. An
    architecture takes every other kind of edit, and the next one the others."""
    kinds = KINDS[number % 2 :: 2]
    late = LateStack.load(tiny.make_checkpoint(tmp_path, arch), 2)
    assert late.mode == "packed"
    lengths = (30, 3, tiny.LIMIT + 1, 90)
    rows, other = draw(sum(lengths), late.width, seed=0), draw(sum(lengths), late.width, seed=1)
    offsets = [0, *itertools.accumulate(lengths)]
    positions = [(s, p) for s, length in enumerate(lengths) for p in {0, 5, 11, 12, 13, 40, length - 1} if p < length]
    ids = [f"event {number}" for number in range(len(positions))]
    variants = [Variant(kind, edits_of(kind, late.width, ids)) for kind in kinds]
    one = {"donors": {"other": other}, "keys": ids}
    exact = separate(late, rows, offsets, positions, variants, strict=True, **one)
    assert torch.equal(late.run_variants(rows, offsets, variants, positions=positions, strict=True, **one), exact)
    for max_tokens in (None, 50):
        found = late.run_variants(rows, offsets, variants, positions=positions, max_tokens=max_tokens, **one)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["llama", "bloom", "mean of the row"])
def test_plain_events_are_what_hooks_give_of_the_cut_sequence(name):
    late = late_of(name)
    sequences = Sequences(model_of(name))
    expected = torch.stack(
        [
            reference.overwritten(sequences.model, sequences.ids[s][: p + 1], BOUNDARY, sequences.states[s][: p + 1])[
                -1
            ]
            for s, p in EVENTS
        ]
    )
    found = late.run(sequences.rows, sequences.offsets, positions=EVENTS, strict=True)
    assert torch.equal(found, expected)
    for given_as in (EVENTS, torch.tensor(EVENTS), np.array(EVENTS), torch.tensor(EVENTS, dtype=torch.int32)):
        found = late.run(sequences.rows, sequences.offsets, positions=given_as)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    last = [(number, length - 1) for number, length in enumerate(LENGTHS)]
    for strict in (True, False):
        found = late.run(sequences.rows, sequences.offsets, positions=last, strict=strict)
        assert torch.equal(found, late.run(sequences.rows, sequences.offsets, strict=strict))


def test_a_strict_forward_is_read_at_several_positions_where_that_is_asked():
    late, sequences = late_of("llama"), Sequences(model_of("llama"))
    last = {sequence: max(p for s, p in EVENTS if s == sequence) for sequence, _ in EVENTS}
    hooked = {
        s: reference.overwritten(sequences.model, sequences.ids[s][: p + 1], BOUNDARY, sequences.states[s][: p + 1])
        for s, p in last.items()
    }
    found = late.run(sequences.rows, sequences.offsets, positions=EVENTS, strict=True, together=True)
    assert torch.equal(found, torch.stack([hooked[s][p] for s, p in EVENTS]))
    packed = late.run(sequences.rows, sequences.offsets, positions=EVENTS, together=True)
    assert torch.equal(packed, late.run(sequences.rows, sequences.offsets, positions=EVENTS))


# ---- what is shared ----


def divided(spans, variants, mode="packed", regimes=ONE_REGIME):
    """``(rows and events of each pass, whole variants, branches)`` of each part of the work."""
    keys = [str(number) for number in range(len(spans))]
    works = divide(Batch(torch.zeros(20, WIDTH), spans, keys, keys, {}, variants, Moves(), mode, 1024), regimes)
    return [([(one.rows, one.events) for one in work.passes], work.whole, work.branches) for work in works]


def test_events_share_a_pass_as_far_as_mode_regime_and_variant_let_them():
    ids = [str(number) for number in range(4)]
    plain, last, everywhere, of_event = (
        Variant(kind, edits_of(kind, WIDTH, ids)) for kind in ("plain", "last", "all", "all, of the event")
    )
    spans = [range(12), range(12, 15), range(3), range(12)]
    together = [(range(12), [2, 0, 3]), (range(12, 15), [1])]
    alone = [(span, [event]) for event, span in enumerate(spans)]
    assert divided(spans, [plain]) == [(together, [0], [])]
    assert divided(spans, [last]) == [(together, [], [0])]
    assert divided(spans, [everywhere, of_event, plain]) == [(together, [0, 2], []), (alone, [1], [])]
    assert divided(spans, [last, of_event, plain]) == [(together, [], [0, 2]), (alone, [1], [])]
    assert divided(spans[:2], [last, of_event]) == [(alone[:2], [0, 1], [])]  # one event in each sequence
    assert divided(spans[:2], [last, of_event, plain]) == [(alone[:2], [1], [0, 2])]
    assert divided(spans, [last, plain], "padded") == [(together, [1], []), (alone, [0], [])]
    same = [(range(12), [0, 3]), (range(12, 15), [1]), (range(3), [2])]
    assert divided(spans, [last, plain], "single") == [(same, [1], []), (alone, [0], [])]
    apart = [(range(12), [0, 3]), (range(12, 15), [1]), (range(3), [2])]
    assert divided(spans, [plain, last], regimes=Regimes((8,))) == [(apart, [], [0, 1])]
    assert divided(spans, [plain, last], regimes=Regimes(longest_row=8)) == [(together, [0], []), (alone, [1], [])]
    assert divided(spans, []) == []
    near, early = (Variant(f"{at}", [Edit(Add(SHIFT), (at,))]) for at in (-3, 2))
    assert divided(spans, [near]) == [(together, [], [0])]  # 15 rows and 4 x 3, against 30
    assert divided(spans, [near, last, plain]) == [(together, [], [0, 1, 2])]
    assert divided(spans[:2], [near, last, plain]) == [(alone[:2], [], [0, 1, 2])]
    assert divided(spans, [early, plain]) == [(together, [0, 1], [])]  # 10 + 1 + 1 + 10 rows, against 15
    assert divided([range(12)], [early, last, plain]) == [([(range(12), [0])], [], [0, 1, 2])]  # 12 and 10 + 1 + 1
    assert divided(spans, [near, last], "single")[-1] == (alone, [0, 1], [])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_events_of_a_sequence_cost_one_run_through_it(name):
    model = build(name)
    late, sequences, calls = LateStack.load(model, BOUNDARY), Sequences(model), []
    blocks = reference.parts(model).blocks

    def count(what):
        return lambda module, args, output: calls.append((what, args[0].shape[:-1].numel()))

    blocks[BOUNDARY].mlp.register_forward_hook(count("first"))
    blocks[N_BLOCKS - 1].mlp.register_forward_hook(count("last"))

    def tokens(kinds, **how):
        calls.clear()
        variants = [Variant(f"{number}", edits_of(kind, WIDTH, IDS)) for number, kind in enumerate(kinds)]
        donors = {"other": draw(*sequences.rows.shape, seed=3)}
        given_here = {"positions": EVENTS, "keys": IDS, "donors": donors, **how}
        late.run_variants(sequences.rows, sequences.offsets, variants, **given_here)
        return tuple(sum(n for called, n in calls if called == what) for what in ("first", "last"))

    once = 7 + 1 + 12 + 9  # up to the last event of each sequence; one has none
    distinct, cut = len(set(EVENTS)), sum(position + 1 for _, position in EVENTS)
    assert tokens(["plain"]) == (once, distinct)
    assert tokens(["all"]) == (once, distinct)
    assert tokens(["plain", "all", "all, permuted"]) == (3 * once, 3 * distinct)
    assert tokens(["last"]) == (once + len(EVENTS), len(EVENTS))
    assert tokens(["last", "last, of the event", "plain"]) == (once + 3 * len(EVENTS), 3 * len(EVENTS))
    assert tokens(["all, of the event"]) == (cut, len(EVENTS))
    each = sum(position + 1 for _, position in set(EVENTS))
    assert tokens(["plain"], strict=True) == (each, each)


# ---- what is told, and what is refused ----


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("strict", [True, False])
def test_an_edit_moves_an_event_by_rows_up_to_its_position_alone(strict):
    late, sequences = late_of("llama"), Sequences(model_of("llama"))
    rows, half = sequences.rows.clone(), torch.eye(WIDTH)[: WIDTH // 2]
    rows[:4, WIDTH // 2 :] = 0  # of sequence 0: in the half already
    other = draw(*rows.shape, seed=4)
    other[:4] = rows[:4]
    variants = [
        Variant("donor's", [Edit(Interpolate("other", 0.5), "all")]),
        Variant("first", [Edit(Replace("other"), (0,))]),
        Variant("half", [Edit(Project(half), "all")], placebo=True),
    ]
    moves = Moves()
    how = {"positions": EVENTS, "keys": IDS, "donors": {"other": other}, "strict": strict}
    late.run_variants(rows, sequences.offsets, variants, moves=moves, **how)
    early = [event for event, (sequence, position) in enumerate(EVENTS) if sequence == 0 and position < 4]
    for number, still in enumerate([early, [e for e, (sequence, _) in enumerate(EVENTS) if sequence == 0], early]):
        assert moves.still(number).nonzero().flatten().tolist() == still
    half = [Variant("half", [Edit(Project(half), "all")])]
    late.run_variants(rows, sequences.offsets, half, positions=[(0, 6), (0, 4)], strict=strict)
    with pytest.raises(InputError, match="variant 'half': its edit Project of the state moves nothing at 'early'"):
        late.run_variants(
            rows, sequences.offsets, half, positions=[(0, 6), (0, 2)], keys=["late", "early"], strict=strict
        )


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([(5, 0)], "event 0 is in sequence 5; there are 5, from 0 on"),
        ([(0, 1), (-1, 0)], "event 1 is in sequence -1; there are 5"),
        ([(0, 1), (0, 7)], "event 1 is at position 7 of sequence 0, which has 7, from 0 on"),
        ([(0, -1)], "event 0 is at position -1 of sequence 0"),
        ([0, 1], r"positions have shape \[2\] and dtype torch.int64, expected \[m, 2\] whole numbers"),
        ([(0, 1, 2)], r"positions have shape \[1, 3\]"),
        ([(0.0, 1.0)], "dtype torch.float32, expected"),
        ([(True, False)], "dtype torch.bool, expected"),
        ([(0, 1), (0,)], r"positions are \[\(0, 1\), \(0,\)\], expected"),
        ("last", "positions are last, expected"),
    ],
)
def test_positions_that_no_sequence_has_are_refused(positions, words):
    late, sequences = late_of("llama"), Sequences(model_of("llama"))
    with pytest.raises(InputError, match=words):
        late.run(sequences.rows, sequences.offsets, positions=positions)


@pytest.mark.parametrize("strict", [True, False])
def test_each_event_is_a_sequence_to_variants_and_keys(strict):
    late, sequences = late_of("llama"), Sequences(model_of("llama"))
    given_here = sequences.rows, sequences.offsets
    with pytest.raises(InputError, match="5 keys are given for 2 positions"):
        late.run_variants(*given_here, [PLAIN], positions=EVENTS[:2], keys=IDS[:5], strict=strict)
    second = [Variant("v", [Edit(Add(SHIFT), (1,))])]
    late.run_variants(*given_here, second, positions=[(0, 1), (2, 5)], strict=strict)
    with pytest.raises(InputError, match="variant 'v' edits position 1; the shortest sequence has 1 positions"):
        late.run_variants(*given_here, second, positions=[(0, 0), (2, 5)], strict=strict)
    assert late.run_variants(*given_here, [PLAIN], positions=[], strict=strict).shape == (0, 1, WIDTH)
    assert late.run(*given_here, positions=torch.empty(0, 2, dtype=torch.int64), strict=strict).shape == (0, WIDTH)


def test_every_pair_of_event_and_variant_comes_once_in_bounded_parts():
    late, sequences = late_of("llama"), Sequences(model_of("llama"))
    variants = [Variant(f"{n}", edits_of(kind, WIDTH, IDS)) for n, kind in enumerate(["last", "plain", "called"] * 3)]
    for max_tokens in (1, 12, 1024):
        pairs = []
        given = sequences.rows, sequences.offsets, variants
        for events, numbers, hidden in late.replay(
            late.prepare(*given, positions=EVENTS, keys=IDS, max_tokens=max_tokens)
        ):
            assert len(events) == len(numbers) == len(hidden) <= max(max_tokens, len(EVENTS))
            pairs += zip(events.tolist(), numbers.tolist(), strict=True)
        assert sorted(pairs) == list(itertools.product(range(len(EVENTS)), range(len(variants))))
