"""Search: propose where checkpoints choose different tokens after the same ones.

The first one, the *writer*, drafts a few tokens; each of the others reads them in one forward. The first token that it
would have chosen otherwise is where the two part. So a step costs one decode, of whatever number of checkpoints.
Drafts grow longer as the search goes on, as those that still agree tend to go on agreeing. What others say the
checkpoints wrote (``known``) is a draft too.

What comes out is only a proposal: a cached, padded decode rounds differently from the capture forward, which sees every
position and decides. Knows tokens; knows no text, no files and no rows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import torch

from actcache.capture.decode import CachedBatch, Decoding
from actcache.capture.forward import Forwarder, Pack, Resident, company
from actcache.capture.residency import Checkpoints
from actcache.errors import NotFiniteError
from actcache.models.packing import plan_packs
from actcache.models.regimes import Regimes

OnStep: TypeAlias = Callable[[int, int, int], object]  # tokens run, number of the step, sequences still searched

# Tokens of a draft. Where all checkpoints are in memory, the first choice after a prompt is compared before anything is
# drafted, and what is drafted behind a divergence costs decodes: drafts begin short. Where one is loaded for each
# draft, and another to read it, they begin long.
_FIRST_DRAFT, _LONGEST_DRAFT = 1, 8
FIRST_LOADED_DRAFT = 32

# A batch that begins has no more padding than one token in so many, once it has enough tokens to be worth its weights.
_PADDING, _ENOUGH = 8, 256


def n_drafted(n_shared: float) -> float:
    """How many tokens drafts have in all, on average, where so many of them are shared: about half of the last one is
    for nothing."""
    return n_shared + min(n_shared / 3, (_LONGEST_DRAFT - 1) / 2)


def n_drafts(n_tokens: float) -> float:
    """How many drafts have so many tokens in all."""
    growing = 2 * _LONGEST_DRAFT - 1  # 1 + 2 + 4 + ..., up to the longest
    return math.log2(1 + min(n_tokens, growing)) + max(0.0, n_tokens - growing) / _LONGEST_DRAFT


class Outcome(StrEnum):
    """Why a search ended; all but the first two exclude the prompt, and are the reason recorded."""

    DIVERGED = "diverged"
    OPEN = "open"  # still equal at the last length of a regime, or as far as others say: a forward decides
    ENDED = "both_ended"  # both chose the same end token
    NO_DIVERGENCE = "no_divergence"  # still equal after the last allowed token
    POSITION_LIMIT = "position_limit"  # still equal where the model's positions end


@dataclass
class Proposal:
    """Tokens that the first checkpoint chose after the given ids, up to where the search ended, and the one that it
    chose there; ``last`` is None where all others had diverged. ``parted`` says, for each of the others, after how many
    of these tokens it first chose another one."""

    outcome: Outcome
    shared: list[int] = field(default_factory=list)
    last: int | None = None
    parted: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class SearchLimits:
    """When a search gives up.

    Attributes:
        max_new: compare at most this many next-token choices.
        end_ids: token ids that end a generation.
        max_positions: longest sequence the models take, or None.
    """

    max_new: int
    end_ids: frozenset[int]
    max_positions: int | None

    def after_agreeing(self, token: int, length: int, n_compared: int) -> Outcome | None:
        """The outcome if the search must end once both chose ``token`` after ``length`` ids, the ``n_compared``-th
        choice compared; None to go on."""
        if token in self.end_ids:
            return Outcome.ENDED
        if n_compared >= self.max_new:
            return Outcome.NO_DIVERGENCE
        if self.max_positions is not None and length >= self.max_positions:
            return Outcome.POSITION_LIMIT
        return None


def propose(
    checkpoints: Checkpoints,
    labels: Sequence[str],
    sequences: Sequence[Sequence[int]],
    n_compared: Sequence[int],
    limits: SearchLimits,
    *,
    max_tokens: int = 4096,
    alone: bool = False,
    on_step: OnStep = lambda tokens, step, n_open: None,
    regimes: Regimes | None = None,
    names: Sequence[str] = (),
    known: Sequence[Mapping[str, Sequence[int]]] = (),
) -> list[Proposal]:
    """Continue every sequence as the first checkpoint does, until all others have once chosen another token, as far as
    its regime goes.

    Args:
        checkpoints: those that there are.
        labels: the two of a pair; or further ones, which read the first one's continuation too; or one alone, which
            nobody differs from: its own continuation.
        sequences: token ids to continue, of any lengths >= 1.
        n_compared: how many choices of each sequence were compared before (0 for a bare prompt).
        limits: when to give up.
        max_tokens: tokens of one forward: of the prompts of a padded batch, or of a pack.
        alone: whether a forward without a cache is over one sequence, as a strict capture's.
        on_step: called after each draft of a batch with the tokens that each checkpoint has run in it, its number from
            1 on, and how many sequences are searched further.
        regimes: in which the sequences are captured; by default those of these checkpoints.
        names: what an error calls each sequence; by default its number.
        known: what some of these checkpoints go on with, by label, after each sequence cut before its last
            ``n_compared`` tokens; not checked.

    Returns:
        One proposal a sequence, in the order given.

    Raises:
        NotFiniteError: a checkpoint computes NaN or infinity; names it, the sequence and the first block.
    """
    names = names or [f"sequence {number}" for number in range(len(sequences))]
    known = known or [{}] * len(sequences)
    if regimes is None:
        regimes = Regimes.joined(checkpoints.forwarder(label).regimes for label in labels)
    search = _Search(checkpoints, labels, limits, regimes, max_tokens, on_step, alone)
    walks = [
        _Walk(
            name, list(ids), n, Proposal(Outcome.DIVERGED, parted=[None] * (len(labels) - 1)), _own(labels, ids, n, of)
        )
        for name, ids, n, of in zip(names, sequences, n_compared, known, strict=True)
    ]
    search.run(sorted(walks, key=lambda walk: len(walk.ids)))  # like lengths together: little padding
    for walk in walks:
        if walk.is_told and walk.proposal.outcome is not Outcome.DIVERGED:
            walk.proposal.outcome = Outcome.OPEN
    return [walk.proposal for walk in walks]


def _own(
    labels: Sequence[str], ids: Sequence[int], n_compared: int, known: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """What is known of these checkpoints after a sequence, where that is a beginning of what they wrote."""
    shared = list(ids[len(ids) - n_compared :]) if n_compared else []
    own = {label: list(known[label]) for label in labels if label in known}
    return {label: tokens for label, tokens in own.items() if tokens[:n_compared] == shared}


@dataclass
class _Walk:
    """A sequence on its way.

    ``known`` holds what checkpoints write, by label, from the first compared choice on."""

    name: str
    ids: list[int]
    n_compared: int
    proposal: Proposal
    known: dict[str, list[int]] = field(default_factory=dict)
    is_open: bool = True
    is_told: bool = (
        False  # whether others have said some of it, so that a forward must decide whether there is no event
    )

    @property
    def sequence(self) -> list[int]:
        return self.ids + self.proposal.shared

    @property
    def n_shared(self) -> int:
        """Tokens that were compared and shared, before this search and in it."""
        return self.n_compared + len(self.proposal.shared)


def evenly(lengths: Sequence[int]) -> list[range]:
    """Sequences, in the order of their lengths, cut where padding them to the longest would cost more than beginning
    another batch."""
    parts, start, n_tokens = [], 0, 0
    for number, length in enumerate(lengths):
        n_tokens += length
        padding = (number + 1 - start) * length - n_tokens
        if padding * _PADDING > n_tokens >= _ENOUGH:
            parts.append(range(start, number))
            start, n_tokens = number, length
    return [*parts, range(start, len(lengths))]


class _Search:
    def __init__(
        self,
        checkpoints: Checkpoints,
        labels: Sequence[str],
        limits: SearchLimits,
        regimes: Regimes,
        max_tokens: int,
        on_step: OnStep,
        alone: bool,
    ) -> None:
        self.checkpoints, self.labels, self.limits = checkpoints, labels, limits
        self.regimes, self.max_tokens, self.on_step, self.alone = regimes, max_tokens, on_step, alone

    def run(self, walks: list[_Walk]) -> None:
        """Search them all, in their order."""
        self.known(walks)
        walks = [walk for walk in walks if walk.is_open]
        cached: list[_Walk] = []
        if walks and self.checkpoints.together:
            readers = [self.checkpoints.forwarder(label) for label in self.labels]
            residents = [reader for reader in readers if isinstance(reader, Resident)]
            if len(residents) == len(readers):
                cached = self.side_by_side(walks, residents)
        done = set(map(id, cached))
        self.in_turns([walk for walk in walks if id(walk) not in done])

    # ---- what was chosen ----

    def goes_on(self, walk: _Walk, choices: Sequence[int]) -> bool:
        """Take what each checkpoint chose after a walk's sequence; False where its search ends with it."""
        token, proposal = choices[0], walk.proposal
        for other, choice in enumerate(choices[1:]):
            if choice != token and proposal.parted[other] is None:
                proposal.parted[other] = len(proposal.shared)
        walk.is_open = False
        if proposal.parted and None not in proposal.parted:
            return False
        length = len(walk.ids) + len(proposal.shared)
        ended = self.limits.after_agreeing(token, length, walk.n_shared + 1)
        if ended is None and length == self.regimes.last(length):
            ended = Outcome.OPEN
        if ended is not None:
            proposal.outcome, proposal.last = ended, token
            return False
        proposal.shared.append(token)
        walk.is_open = True
        return True

    def take(self, walk: _Walk, draft: Sequence[int], choices: Sequence[Sequence[int]]) -> None:
        """Take what each checkpoint chose along a draft, up to where the walk ends or leaves it."""
        for step, token in enumerate(draft):
            if not self.goes_on(walk, [of[step] for of in choices]) or walk.proposal.shared[-1] != token:
                return

    def room(self, walk: _Walk) -> int:
        """How many tokens of a draft may be chosen after a walk's sequence."""
        length = len(walk.sequence)
        ends = [end for end in (self.limits.max_positions, self.regimes.last(length)) if end is not None]
        return min([self.limits.max_new - walk.n_shared, *(end - length + 1 for end in ends)])

    # ---- all in memory: each keeps a cache ----

    def side_by_side(self, walks: Sequence[_Walk], readers: Sequence[Resident]) -> list[_Walk]:
        """Search those that a cache serves; these."""
        order = list(Decoding)
        decoding = max((reader.decoding.decoding for reader in readers), key=order.index)
        most = self.regimes.longest_cached
        if decoding is Decoding.FULL:
            return []
        cached = [walk for walk in walks if most is None or len(walk.sequence) + self.limits.max_new <= most]
        even = decoding is Decoding.EVEN

        def kind(walk: _Walk) -> tuple[int, int]:
            length = len(walk.sequence)
            return company(self.regimes, length, length + self.limits.max_new, even=even)

        for (_, only_length), alike in itertools.groupby(cached, kind):
            self.company(
                list(alike), readers, joined=not only_length and all(reader.decoding.joins for reader in readers)
            )
        return cached

    @torch.no_grad()
    def company(self, waiting: list[_Walk], readers: Sequence[Resident], *, joined: bool) -> None:
        """Search walks that may share a left-padded batch. Each leaves it behind the draft in which its search ends,
        and makes room for those that wait, if they may be ``joined`` on their way."""
        walks: list[_Walk] = []
        batches: list[CachedBatch] = []
        n_draft, longest = _FIRST_DRAFT, _LONGEST_DRAFT if len(readers) > 1 else 1  # nobody reads what one alone drafts
        while waiting or walks:
            n = self.n_beginning(waiting, walks) if joined or not walks else 0
            if not n:
                walks = self.draft(walks, batches, readers, n_draft)
                n_draft = min(2 * n_draft, longest)
                continue
            for part in evenly([len(walk.sequence) for walk in waiting[:n]]) if joined else [range(n)]:
                beginning = [waiting[number] for number in part]
                begun = [CachedBatch(reader.backbone, [walk.sequence for walk in beginning]) for reader in readers]
                going_on = self.begin(beginning, begun)
                if going_on and walks:
                    for batch, others in zip(batches, begun, strict=True):
                        batch.join(others)
                elif going_on:
                    batches = begun
                walks = walks + going_on
            waiting, n_draft = waiting[n:], _FIRST_DRAFT

    def n_beginning(self, waiting: Sequence[_Walk], walks: Sequence[_Walk]) -> int:
        """How many of those that wait have room beside those on their way; none before they are as many, or the last
        ones: each time weights are read for them alone."""
        lengths = sorted(len(walk.sequence) for walk in walks) + [len(walk.sequence) for walk in waiting]
        n = len(plan_packs(lengths, self.max_tokens, padded=True)[0]) - len(walks)
        return n if n >= min(len(walks), len(waiting)) else 0

    def begin(self, walks: list[_Walk], batches: Sequence[CachedBatch]) -> list[_Walk]:
        """Compare what is chosen after what these walks begin with; those that go on."""
        choices = [
            self.choose(label, batch.begin()[:, None], walks) for label, batch in zip(self.labels, batches, strict=True)
        ]
        return self.settle(walks, batches, choices, sum(len(walk.sequence) for walk in walks))

    def draft(
        self, walks: list[_Walk], batches: Sequence[CachedBatch], readers: Sequence[Resident], n_draft: int
    ) -> list[_Walk]:
        """Have all draft as many tokens, or as far as they may; those walks that go on."""
        # A row that is at its end already is read on: no forward of the others may go where it must not.
        n = min(n_draft, *(self.room_of_row(walk) for walk in walks))
        drafts = torch.tensor([walk.proposal.shared[-1] for walk in walks])[:, None]
        written: list[list[list[int]]] = []
        for _ in range(n):
            hidden = batches[0].feed(drafts[:, -1:])
            written.append(self.choose(self.labels[0], hidden, walks))
            drafts = torch.cat([drafts, torch.tensor(written[-1])], dim=1)
        choices = [[[token for of in written for token in of[row]] for row in range(len(walks))]]
        for label, reader, batch in zip(self.labels[1:], readers[1:], batches[1:], strict=True):
            hidden = batch.feed(drafts[:, :-1], at_once=reader.decoding.in_chunks)
            choices.append(self.choose(label, hidden, walks))
        return self.settle(walks, batches, choices, n * len(walks))

    def settle(
        self,
        walks: list[_Walk],
        batches: Sequence[CachedBatch],
        choices: Sequence[Sequence[Sequence[int]]],
        n_tokens: int,
    ) -> list[_Walk]:
        """Take what each checkpoint chose, of each walk; those that go on stay in their batches."""
        for row, walk in enumerate(walks):
            self.take(walk, choices[0][row], [of[row] for of in choices])
        kept = [row for row, walk in enumerate(walks) if walk.is_open]
        self.on_step(n_tokens, max(walk.n_shared + (not walk.is_open) for walk in walks), len(kept))
        if kept and len(kept) < len(walks):
            for batch in batches:
                batch.keep(kept)
        return [walks[row] for row in kept]

    def room_of_row(self, walk: _Walk) -> int:
        """How many tokens a batch may read beside this walk: at least 1, as the walk goes on."""
        length = len(walk.sequence)
        ends = [end for end in (self.limits.max_positions, self.regimes.last(length)) if end is not None]
        return min([_LONGEST_DRAFT, *(end - length + 1 for end in ends)])

    def choose(self, label: str, hidden: torch.Tensor, walks: Sequence[_Walk]) -> list[list[int]]:
        """What a checkpoint chooses at ``hidden [B, n, D]``."""
        n = hidden.shape[1]
        reader = self.checkpoints.forwarder(label)
        try:
            return reader.readout.best(hidden.flatten(0, 1)).view(-1, n).tolist()
        except NotFiniteError as error:
            raise self.not_finite(label, reader, walks[(error.row or 0) // n]) from error

    def not_finite(self, label: str, reader: Forwarder, walk: _Walk) -> NotFiniteError:
        return reader.not_finite(f"checkpoint {label}, {walk.name}", "a logit at the end", walk.sequence)

    # ---- by whole sequences: one after another in memory, or without a cache ----

    def in_turns(self, walks: list[_Walk]) -> None:
        """The writer drafts for all, then each of the others reads all, and so on."""
        # Without a cache a drafted token costs a forward, whoever reads it.
        n_draft = 1 if self.checkpoints.together else FIRST_LOADED_DRAFT
        while walks:
            drafts, own = self.write(walks, [min(n_draft, self.room(walk)) for walk in walks])
            choices = [own, *(self.read(label, walks, drafts) for label in self.labels[1:])]
            n_tokens = sum(len(walk.sequence) + len(draft) - 1 for walk, draft in zip(walks, drafts, strict=True))
            for number, walk in enumerate(walks):
                self.take(walk, drafts[number], [of[number] for of in choices])
            n_compared = 1 + max(walk.n_shared for walk in walks)
            walks = [walk for walk in walks if walk.is_open]
            self.on_step(n_tokens, min(n_compared, self.limits.max_new), len(walks))
            n_draft = n_draft if self.checkpoints.together else 2 * n_draft

    def write(self, walks: Sequence[_Walk], n_new: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """What the writer drafts, and what it chooses there, which is the same unless it guesses."""
        writer = self.checkpoints.forwarder(self.labels[0])
        try:
            drafts = writer.write([walk.sequence for walk in walks], n_new, self.limits.end_ids)
        except NotFiniteError as error:
            raise self.not_finite(self.labels[0], writer, walks[error.row or 0]) from error
        return drafts, self.read(self.labels[0], walks, drafts) if writer.guesses else drafts

    def read(self, label: str, walks: Sequence[_Walk], drafts: Sequence[Sequence[int]]) -> list[list[int]]:
        """What a checkpoint chooses in place of each token of a draft; of one that has parted, nobody asks any more."""
        other = self.labels.index(label) - 1
        asked = [n for n, walk in enumerate(walks) if other < 0 or walk.proposal.parted[other] is None]
        if len(asked) < len(walks):
            found = list(map(list, drafts))
            if asked:
                of_asked = self.read(label, [walks[n] for n in asked], [drafts[n] for n in asked])
                for number, tokens in zip(asked, of_asked, strict=True):
                    found[number] = tokens
            return found
        if not walks:
            return []
        reader = self.checkpoints.forwarder(label)
        pack_tokens = 0 if self.alone or self.checkpoints.why_not_packable(label) else self.max_tokens
        sequences = [[*walk.sequence, *draft[:-1]] for walk, draft in zip(walks, drafts, strict=True)]
        order = sorted(range(len(walks)), key=lambda number: len(sequences[number]))
        found = [[] for _ in walks]
        packed = [
            [order[i] for i in pack]
            for pack in self.regimes.packs([len(sequences[number]) for number in order], pack_tokens)
        ]
        packs = [
            Pack.of(
                [sequences[number] for number in numbers],
                [[] for _ in numbers],
                [range(len(sequences[n]) - len(drafts[n]), len(sequences[n])) for n in numbers],
            )
            for numbers in packed
        ]
        for numbers, ran in zip(packed, reader.run(packs, ()), strict=True):
            owners = [number for number in numbers for _ in drafts[number]]
            try:
                best = reader.readout.best(ran.final).tolist()
            except NotFiniteError as error:
                raise self.not_finite(label, reader, walks[owners[error.row or 0]]) from error
            for number, token in zip(owners, best, strict=True):
                found[number].append(token)
        return found

    # ---- what others say ----

    def known(self, walks: list[_Walk]) -> None:
        """Go as far as what is known leads: one draft after another, and whoever's own is not known reads it."""
        step = 0
        while True:
            drafted = [(walk, *draft) for walk in walks if (draft := self.known_draft(walk))]
            if not drafted:
                return
            step += 1
            n_tokens = 0
            choices: list[list[list[int]]] = []
            for label in self.labels:
                of_label: list[list[int]] = [own.get(label, []) for _, _, own in drafted]
                missing = [number for number, (_, _, own) in enumerate(drafted) if label not in own]
                read = self.read(label, [drafted[n][0] for n in missing], [drafted[n][1] for n in missing])
                n_tokens += sum(map(len, read))
                for number, choices_read in zip(missing, read, strict=True):
                    of_label[number] = choices_read
                choices.append(of_label)
            for number, (walk, tokens, _) in enumerate(drafted):
                walk.is_told = True
                self.take(walk, tokens, [of[number] for of in choices])
            self.on_step(n_tokens, step, sum(walk.is_open for walk in walks))

    def known_draft(self, walk: _Walk) -> tuple[list[int], dict[str, list[int]]] | None:
        """The next tokens of a walk by what is known, and whose own choices along them are known."""
        if not walk.is_open:
            return None
        shared = walk.sequence[len(walk.sequence) - walk.n_shared :] if walk.n_shared else []
        room = self.room(walk)
        own = {label: of[len(shared) :][:room] for label, of in walk.known.items() if of[: len(shared)] == shared}
        own = {label: of for label, of in own.items() if of}
        if not own:
            return None
        drafter = next(label for label in self.labels if label in own)
        draft = own[drafter]
        for label, of in own.items():  # one that goes with the draft, and then says no more, says nothing of the rest
            if label != drafter and draft[: len(of)] == of:
                draft = draft[: len(of)]
        # Behind a token that is another one's, its choices are after other tokens; nobody takes them.
        return draft, {label: [*of, *[-1] * len(draft)][: len(draft)] for label, of in own.items()}
