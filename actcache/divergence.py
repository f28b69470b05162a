"""Divergence: propose, by cached lockstep greedy decoding, where two checkpoints choose different tokens.

Both checkpoints read the same tokens, step by step, as long as they choose the same next one. What comes out is only a
proposal: a cached, padded decode rounds differently from the capture forward, which sees every position and decides.
Knows tokens; knows no text, no files and no rows.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

import torch
from transformers import DynamicCache

from actcache.packing import plan_packs
from actcache.trunk import Trunk

OnStep: TypeAlias = Callable[[int, int, int], object]  # tokens run, number of the step, sequences still searched


class Outcome(StrEnum):
    """Why a search ended; every outcome but DIVERGED excludes the prompt, and is the reason recorded."""

    DIVERGED = "diverged"
    ENDED = "both_ended"  # both chose the same end token
    NO_DIVERGENCE = "no_divergence"  # still equal after the last allowed token
    POSITION_LIMIT = "position_limit"  # still equal where the model's positions end


@dataclass
class Proposal:
    """Tokens that both checkpoints chose after the given ids, up to where the search ended."""

    outcome: Outcome
    shared: list[int] = field(default_factory=list)


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
    trunks: Sequence[Trunk],
    sequences: Sequence[Sequence[int]],
    n_compared: Sequence[int],
    limits: SearchLimits,
    *,
    max_tokens: int = 4096,
    on_step: OnStep = lambda tokens, step, n_open: None,
) -> list[Proposal]:
    """Search every sequence for the first token at which the two checkpoints differ.

    Args:
        trunks: the two checkpoints of the pair.
        sequences: token ids to continue, of any lengths >= 1.
        n_compared: how many choices of each sequence were compared before (0 for a bare prompt).
        limits: when to give up.
        max_tokens: padded prompt tokens of one batch.
        on_step: called after each step of a batch with the tokens that each checkpoint has run in it, the step's
            number from 1 on, and how many sequences are searched further.

    Returns:
        One proposal a sequence, in the order given.
    """
    proposals: list[Proposal | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # like lengths together: little padding
    for batch in plan_packs([len(sequences[i]) for i in order], max_tokens, padded=True):
        members = [order[k] for k in batch]
        found = _lockstep(trunks, [sequences[i] for i in members], [n_compared[i] for i in members], limits, on_step)
        for index, proposal in zip(members, found, strict=True):
            proposals[index] = proposal
    return [proposal for proposal in proposals if proposal is not None]


@torch.no_grad()
def _lockstep(
    trunks: Sequence[Trunk],
    sequences: Sequence[Sequence[int]],
    n_compared: Sequence[int],
    limits: SearchLimits,
    on_step: OnStep,
) -> list[Proposal]:
    """Decode one left-padded batch in lockstep; a sequence leaves the batch as soon as its search ends."""
    proposals = [Proposal(Outcome.DIVERGED) for _ in sequences]
    longest = max(len(ids) for ids in sequences)
    tokens = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        tokens[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    caches = [DynamicCache(config=trunk.config) for trunk in trunks]
    active = list(range(len(sequences)))
    n_tokens = sum(map(len, sequences))
    for step in itertools.count(1):
        choices = [_choose(trunk, tokens, mask, cache) for trunk, cache in zip(trunks, caches, strict=True)]
        keep, chosen = [], []
        for row, index in enumerate(active):
            token = choices[0][row]
            if any(choice[row] != token for choice in choices[1:]):
                continue
            proposal = proposals[index]
            length = len(sequences[index]) + len(proposal.shared)
            ended = limits.after_agreeing(token, length, n_compared[index] + len(proposal.shared) + 1)
            if ended is not None:
                proposal.outcome = ended
                continue
            proposal.shared.append(token)
            keep.append(row)
            chosen.append(token)
        if len(keep) < len(active):
            rows = torch.tensor(keep, dtype=torch.int64)
            active = [active[row] for row in keep]
            mask = mask[rows]
            for trunk, cache in zip(trunks, caches, strict=True):
                cache.batch_select_indices(rows.to(trunk.device))
        on_step(n_tokens, step, len(active))
        if not active:
            break
        n_tokens = len(active)
        tokens = torch.tensor(chosen, dtype=torch.int64)[:, None]
        mask = torch.cat([mask, torch.ones(len(active), 1, dtype=torch.int64)], dim=1)
    return proposals


def _choose(trunk: Trunk, tokens: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> list[int]:
    """Greedy next tokens after ``tokens [B, t]``, the newest columns of a left-padded batch with ``mask [B, T]``."""
    device = trunk.device
    taken = inspect.signature(trunk.decoder.forward).parameters
    inputs: dict[str, Any] = {"input_ids": tokens.to(device), "attention_mask": mask.to(device)}
    inputs["cache" if "cache" in taken else "past_key_values"] = cache  # renamed in transformers 5.24
    if "position_ids" in taken:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        inputs["position_ids"] = positions.to(device)
    hidden = trunk.run(**inputs, use_cache=True)[:, -1]
    ids, _ = trunk.readout.top2(hidden)
    return ids[:, 0].tolist()
