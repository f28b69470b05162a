"""A search's batches: walks that wait join those on their way, and nothing else changes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ClassVar
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from twins.search import in_lockstep

from actcache.capture import search
from actcache.capture.decode import CachedBatch, Decoding, Found, find_decoding
from actcache.capture.forward import Resident
from actcache.capture.residency import AllResident
from actcache.capture.search import Outcome, Proposal, SearchLimits, evenly, propose
from actcache.models.backbone import Backbone
from actcache.models.lineup import Lineup
from actcache.models.regimes import ONE_REGIME, Regimes

# ---- planted checkpoints: what each writes is known, and no model runs ----

END, N_NEW = 0, 9


class Head:
    """The one value of a final state is the token that is chosen."""

    def best(self, final: torch.Tensor) -> torch.Tensor:
        return final[:, 0].long()


class Planted(Resident):
    """A checkpoint that chooses what a function says."""

    decoding = Found(Decoding.PADDED, None, True, True)

    def __init__(self, chosen: Callable[[Sequence[int]], int], regimes: Regimes) -> None:
        self.backbone, self.readout, self.regimes = chosen, Head(), regimes


class PlantedBatch:
    """A cached batch of such a checkpoint, without a cache."""

    begun: ClassVar[list[PlantedBatch]] = []
    joined: ClassVar[list[tuple[int, int]]] = []

    def __init__(self, chosen: Callable[[Sequence[int]], int], sequences: Sequence[Sequence[int]]) -> None:
        self.chosen, self.ids = chosen, [list(ids) for ids in sequences]
        self.begun.append(self)

    def begin(self) -> torch.Tensor:
        return torch.tensor([[float(self.chosen(ids))] for ids in self.ids])

    def feed(self, tokens: torch.Tensor, *, at_once: bool = True) -> torch.Tensor:
        hidden = []
        for column in tokens.T.tolist():
            for ids, token in zip(self.ids, column, strict=True):
                ids.append(token)
            hidden.append(self.begin())
        return torch.stack(hidden, dim=1)

    def keep(self, rows: Sequence[int]) -> None:
        self.ids = [self.ids[row] for row in rows]

    def join(self, other: PlantedBatch) -> None:
        self.joined.append((len(self.ids), len(other.ids)))
        self.ids += other.ids


def planted(
    steps: Sequence[int | None], ends: Sequence[int | None], lengths: Sequence[int], n_labels: int, regimes: Regimes
) -> dict[str, Planted]:
    """Checkpoints that share what follows prompt i, but that all others part from the first one at ``steps[i]``, and
    that end at ``ends[i]``, if they come so far."""

    def of(number: int) -> Callable[[Sequence[int]], int]:
        def chosen(sequence: Sequence[int]) -> int:
            prompt = sequence[0] - 100
            step = len(sequence) - lengths[prompt]
            if list(sequence[lengths[prompt] :]) != [10 + (prompt + at) % 5 for at in range(step)]:
                return 50 + number
            if number and step == steps[prompt]:
                return 60 + number
            return END if step == ends[prompt] else 10 + (prompt + step) % 5

        return chosen

    return {f"c{number}": Planted(of(number), regimes) for number in range(n_labels)}


def expected(step: int | None, end: int | None, prompt: int, length: int, n_others: int, regimes: Regimes) -> Proposal:
    """What is proposed of one such prompt."""
    for at in range(N_NEW):
        if at == step:
            return Proposal(Outcome.DIVERGED, [10 + (prompt + i) % 5 for i in range(at)], None, [at] * n_others)
        token = END if at == end else 10 + (prompt + at) % 5
        outcome = (
            Outcome.ENDED
            if token == END
            else Outcome.NO_DIVERGENCE
            if at == N_NEW - 1
            else Outcome.OPEN
            if length + at == regimes.last(length + at)
            else None
        )
        if outcome is not None:
            return Proposal(outcome, [10 + (prompt + i) % 5 for i in range(at)], token, [None] * n_others)
    raise AssertionError


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[int | None], list[int | None], list[int], int, int, Regimes]:
    n = draw(st.integers(1, 12))
    at = st.none() | st.integers(0, N_NEW)
    steps, ends = (draw(st.lists(at, min_size=n, max_size=n)) for _ in range(2))
    lengths = draw(st.lists(st.integers(1, 9), min_size=n, max_size=n))
    regimes = draw(st.sampled_from([ONE_REGIME, Regimes(switches=(6,)), Regimes(longest_row=14)]))
    return steps, ends, lengths, draw(st.integers(2, 3)), draw(st.sampled_from([1, 12, 20, 40, 1000])), regimes


@settings(max_examples=150, deadline=None)
@given(cases(), st.booleans(), st.sampled_from([1, 10, 1000]))
def test_whoever_joins_whom_each_search_ends_as_it_was_planted(case, joins, enough):
    steps, ends, lengths, n_labels, max_tokens, regimes = case
    models = planted(steps, ends, lengths, n_labels, regimes)
    for model in models.values():
        model.decoding = model.decoding._replace(joins=joins)
    sequences = [[100 + i, *[1] * (length - 1)] for i, length in enumerate(lengths)]
    PlantedBatch.begun, PlantedBatch.joined = [], []
    even = mock.patch.object(search, "_ENOUGH", enough)
    told: list[tuple[int, int, int]] = []
    with mock.patch.object(search, "CachedBatch", PlantedBatch), even:
        found = propose(
            *(
                AllResident(models),
                list(models),
                sequences,
                [0] * len(steps),
                SearchLimits(N_NEW, frozenset({END}), None),
            ),
            max_tokens=max_tokens,
            on_step=lambda tokens, step, n_open: told.append((tokens, step, n_open)),
        )
    assert found == [
        expected(step, end, i, length, n_labels - 1, regimes)
        for i, (step, end, length) in enumerate(zip(steps, ends, lengths, strict=True))
    ]
    assert all(1 <= step <= N_NEW for _, step, _ in told)
    assert joins or not PlantedBatch.joined
    for batch in PlantedBatch.begun:  # the longest of one regime share a row of the model's own kind
        assert len({regimes.of(len(ids)) for ids in batch.ids}) <= 1


def test_those_that_wait_begin_as_soon_as_as_many_have_left():
    """Four of one token each fill a batch; two of the first four leave at once."""
    steps, lengths = [0, 5, 0, 5, 2, 2, 2], [10] * 7
    models = planted(steps, [None] * 7, lengths, 2, ONE_REGIME)
    sequences = [[100 + i, *[1] * 9] for i in range(7)]
    PlantedBatch.begun, PlantedBatch.joined = [], []
    n_open: list[int] = []
    with mock.patch.object(search, "CachedBatch", PlantedBatch):
        propose(
            *(AllResident(models), ["c0", "c1"], sequences, [0] * 7, SearchLimits(N_NEW, frozenset({END}), None)),
            max_tokens=44,
            on_step=lambda tokens, step, left: n_open.append(left),
        )
    assert PlantedBatch.joined == [(2, 2), (2, 2), (2, 1), (2, 1)]  # of both checkpoints, each time
    assert n_open[:2] == [2, 2]


def test_prompts_of_like_lengths_begin_together():
    even = evenly([40] * 5 + [45] * 5 + [60] * 3)
    assert even == [range(10), range(10, 13)]  # 25 tokens of padding on 425, and then 15 for each token more
    assert evenly([1, 9, 17, 64]) == [range(4)], "as many weights are read for a few"
    assert evenly([]) == [range(0)]


@given(st.lists(st.integers(1, 90), max_size=60).map(sorted))
def test_no_batch_that_begins_is_mostly_padding(lengths):
    parts = evenly(lengths)
    assert [number for part in parts for number in part] == [*range(len(lengths))]
    for part in parts:
        own = [lengths[number] for number in part]
        assert sum(own[:-1]) < 256 or max(own) * len(own) <= 9 / 8 * sum(own)


# ---- real checkpoints ----


@functools.cache
def backbones(arch: str, folder: str) -> list[Backbone]:
    paths = tiny.make_pair(folder, arch)
    lineup = Lineup.open(dict(zip(("pt", "it"), paths, strict=True)))
    return [Backbone(checkpoint.load(torch.float32)) for checkpoint in lineup.checkpoints.values()]


@pytest.fixture(params=["llama", "gpt2", "gemma3", "mistral"])
def pair(request, tmp_path_factory) -> list[Backbone]:
    return backbones(request.param, str(tmp_path_factory.getbasetemp() / request.param))


def random_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, tiny.VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [((3, 11), (14, 2)), ((14, 2), (3, 11)), ((1,), (20, 20)), ((9, 4), (9, 9))])
def test_a_joined_batch_goes_on_as_each_sequence_does_alone(pair, lengths):
    """With windows of 6 and 9 tokens among them; the longest of the first batch leaves before it is joined."""
    first, second = (random_ids(*of, seed=seed) for seed, of in enumerate(lengths))
    more = random_ids(*[6] * 9, seed=7)
    leaving = random_ids(17)[0]
    batch, other = CachedBatch(pair[0], [leaving, *first]), CachedBatch(pair[0], second)
    batch.begin()
    batch.feed(torch.tensor(more[: 1 + len(first)])[:, :4])
    batch.keep(range(1, 1 + len(first)))
    other.begin()
    assert find_decoding(pair[0]).joins
    batch.join(other)
    sequences = [*([*ids, *fed[:4]] for ids, fed in zip(first, more[1:], strict=False)), *second]
    fed = torch.tensor(more[-len(sequences) :])
    found = torch.cat([batch.feed(fed[:, :1]), batch.feed(fed[:, 1:])], dim=1)
    batch.keep([len(sequences) - 1])
    last = batch.feed(fed[-1:, :1])
    for ids, tokens, states in zip(sequences, fed.tolist(), found, strict=True):
        whole = torch.tensor([ids + tokens])
        alone = pair[0].forward([0, whole.shape[1]], input_ids=whole)[len(ids) :]
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)
    whole = torch.tensor([[*sequences[-1], *fed[-1].tolist(), int(fed[-1, 0])]])
    alone = pair[0].forward([0, whole.shape[1]], input_ids=whole)
    torch.testing.assert_close(last[0], alone[-1:], rtol=1e-4, atol=1e-4)


def test_how_a_backbone_decodes_is_found_once(pair):
    """By forwards: not by each of the many jobs that decode with it."""
    first = Resident(pair[1]).decoding
    with mock.patch.object(pair[1].decoder, "forward", side_effect=AssertionError):
        assert Resident(pair[1]).decoding is first
    assert first == find_decoding(pair[1])


@pytest.mark.slow
@settings(max_examples=5, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=7), st.sampled_from([30, 60, 120]), st.integers(0, 99))
def test_joined_searches_propose_what_each_does_in_lockstep(tmp_path_factory, lengths, max_tokens, seed):
    pair = backbones("gemma3", str(tmp_path_factory.getbasetemp() / "gemma3"))
    limits = SearchLimits(12, frozenset({tiny.EOS_ID}), tiny.MAX_POSITIONS)
    ids = random_ids(*lengths, seed=seed)
    residents = dict(zip(("pt", "it"), map(Resident, pair), strict=True))
    found = propose(AllResident(residents), ["pt", "it"], ids, [0] * len(ids), limits, max_tokens=max_tokens)
    assert found == in_lockstep(pair, ids, limits)
