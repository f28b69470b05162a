"""Divergence: propose, by cached lockstep greedy decoding, where checkpoints choose different tokens.

All read the same tokens, step by step, which the first one chooses. What comes out is only a proposal: a cached,
padded decode rounds differently from the capture forward, which sees every position and decides.
Knows tokens; knows no text, no files and no rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeAlias

import torch
from transformers import DynamicCache

from actcache.capture.decode import Decoding, decode, leave, left_padded
from actcache.errors import NotFiniteError
from actcache.finite import not_finite
from actcache.models.backbone import Backbone
from actcache.models.packing import offsets_of, plan_packs
from actcache.models.regimes import Regimes

OnStep: TypeAlias = Callable[[int, int, int], object]  # tokens run, number of the step, sequences still searched


class Outcome(StrEnum):
    """Why a search ended; all but the first two exclude the prompt, and are the reason recorded."""

    DIVERGED = "diverged"
    OPEN = "open"  # still equal at the last length of a regime: whatever comes then is of other forwards
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
    backbones: Sequence[Backbone],
    sequences: Sequence[Sequence[int]],
    n_compared: Sequence[int],
    limits: SearchLimits,
    *,
    max_tokens: int = 4096,
    on_step: OnStep = lambda tokens, step, n_open: None,
    decoding: Decoding = Decoding.PADDED,
    pack_tokens: int = 0,
    regimes: Regimes | None = None,
    names: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> list[Proposal]:
    """Continue every sequence as the first checkpoint does, until all others have once chosen another token, as far as
    its regime goes.

    Args:
        backbones: the two checkpoints of a pair; or further ones, which read the first one's continuation too; or one
            alone, which nobody differs from: its own continuation.
        sequences: token ids to continue, of any lengths >= 1.
        n_compared: how many choices of each sequence were compared before (0 for a bare prompt).
        limits: when to give up.
        max_tokens: padded prompt tokens of one batch.
        on_step: called after each step of a batch with the tokens that each checkpoint has run in it, the step's
            number from 1 on, and how many sequences are searched further.
        decoding: see :func:`find_decoding`.
        pack_tokens: tokens of one full forward, where the decoding is by those; 0 for one sequence each.
        regimes: in which the sequences are captured; by default those of these backbones.
        names: what an error calls each sequence; by default its number.
        labels: what it calls each checkpoint.

    Returns:
        One proposal a sequence, in the order given.

    Raises:
        NotFiniteError: a checkpoint computes NaN or infinity; names it, the sequence and the first block.
    """
    names = names or [f"sequence {number}" for number in range(len(sequences))]
    labels = labels or [str(number) for number in range(len(backbones))]
    search = _Search(backbones, labels, limits, regimes or Regimes.joined(one.regimes for one in backbones), on_step)
    walks = [
        _Walk(name, list(ids), n, Proposal(Outcome.DIVERGED, parted=[None] * (len(backbones) - 1)))
        for name, ids, n in zip(names, sequences, n_compared, strict=True)
    ]
    in_order = sorted(walks, key=lambda walk: len(walk.ids))  # like lengths together: little padding
    cached = [walk for walk in in_order if decoding is not Decoding.FULL and search.stays_cached(walk)]
    lengths = [len(walk.ids) for walk in cached]
    kinds = [search.company(walk, even=decoding is Decoding.EVEN) for walk in cached]
    for batch in plan_packs(lengths, max_tokens, padded=True, kinds=kinds):
        search.lockstep([cached[i] for i in batch])
    search.by_full_forwards(in_order[len(cached) :], pack_tokens)  # the shortest are cached, if any are
    return [walk.proposal for walk in walks]


@dataclass
class _Walk:
    """A sequence on its way."""

    name: str
    ids: list[int]
    n_compared: int
    proposal: Proposal

    @property
    def sequence(self) -> list[int]:
        return self.ids + self.proposal.shared


class _Search:
    def __init__(
        self,
        backbones: Sequence[Backbone],
        labels: Sequence[str],
        limits: SearchLimits,
        regimes: Regimes,
        on_step: OnStep,
    ) -> None:
        self.backbones, self.labels, self.limits = backbones, labels, limits
        self.regimes, self.on_step = regimes, on_step

    def stays_cached(self, walk: _Walk) -> bool:
        most = self.regimes.longest_cached
        return most is None or len(walk.ids) + self.limits.max_new <= most

    def company(self, walk: _Walk, *, even: bool) -> tuple[int, int]:
        """Walks of one company may share a padded batch."""
        length = len(walk.ids)
        return self.regimes.of(length), length if even or not self.regimes.in_row(length + self.limits.max_new) else 0

    def goes_on(self, walk: _Walk, choices: Sequence[int]) -> bool:
        """Take what each checkpoint chose after a walk's sequence; False where its search ends with it."""
        token, proposal = choices[0], walk.proposal
        for other, choice in enumerate(choices[1:]):
            if choice != token and proposal.parted[other] is None:
                proposal.parted[other] = len(proposal.shared)
        if proposal.parted and None not in proposal.parted:
            return False
        length = len(walk.ids) + len(proposal.shared)
        ended = self.limits.after_agreeing(token, length, walk.n_compared + len(proposal.shared) + 1)
        if ended is None and length == self.regimes.last(length):
            ended = Outcome.OPEN
        if ended is not None:
            proposal.outcome, proposal.last = ended, token
            return False
        proposal.shared.append(token)
        return True

    @torch.no_grad()
    def lockstep(self, walks: list[_Walk]) -> None:
        """Decode one left-padded batch in lockstep; a sequence leaves the batch as soon as its search ends."""
        tokens, mask = left_padded([walk.ids for walk in walks])
        caches = [DynamicCache(config=backbone.config) for backbone in self.backbones]
        n_tokens = sum(len(walk.ids) for walk in walks)
        for step in itertools.count(1):
            hidden = [
                decode(backbone, tokens, mask, cache) for backbone, cache in zip(self.backbones, caches, strict=True)
            ]
            kept = self._choose(walks, hidden)
            if len(kept) < len(walks):
                rows = torch.tensor(kept, dtype=torch.int64)
                walks = [walks[row] for row in kept]
                mask = mask[rows]
                for backbone, cache in zip(self.backbones, caches, strict=True):
                    leave(cache, rows.to(backbone.device))
            self.on_step(n_tokens, step, len(walks))
            if not walks:
                return
            n_tokens = len(walks)
            tokens = torch.tensor([walk.proposal.shared[-1] for walk in walks], dtype=torch.int64)[:, None]
            mask = torch.cat([mask, torch.ones(len(walks), 1, dtype=torch.int64)], dim=1)

    @torch.no_grad()
    def by_full_forwards(self, walks: list[_Walk], pack_tokens: int) -> None:
        """A forward over whole sequences for every token; packed, if they may be."""
        step = 0
        while walks:
            n_tokens, step = sum(len(walk.sequence) for walk in walks), step + 1
            walks.sort(key=lambda walk: len(walk.sequence))
            going: list[_Walk] = []
            for pack in self.regimes.packs([len(walk.sequence) for walk in walks], pack_tokens):
                packed = [walks[i] for i in pack]
                bounds = offsets_of([len(walk.sequence) for walk in packed])
                ids = torch.tensor([token for walk in packed for token in walk.sequence])[None]
                last = bounds[1:] - 1
                hidden = [
                    backbone.forward(bounds.tolist(), input_ids=ids.to(backbone.device))[last.to(backbone.device)]
                    for backbone in self.backbones
                ]
                going += [packed[row] for row in self._choose(packed, hidden)]
            walks = going
            self.on_step(n_tokens, step, len(walks))

    def _choose(self, walks: Sequence[_Walk], hidden: Sequence[torch.Tensor]) -> list[int]:
        """Indices of the walks that go on after the choices from each backbone's ``hidden``, ``[n, D]``."""
        best = []
        for label, backbone, one in zip(self.labels, self.backbones, hidden, strict=True):
            try:
                best.append(backbone.readout.top2(one)[0][:, 0].tolist())
            except NotFiniteError as error:
                walk = walks[error.row or 0]
                whose = f"checkpoint {label}, {walk.name}"
                raise not_finite(whose, "a logit at the end", backbone, walk.sequence) from error
        return [row for row, choices in enumerate(zip(*best, strict=True)) if self.goes_on(walks[row], choices)]
