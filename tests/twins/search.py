"""The slow twin of search.py: all checkpoints decode in lockstep, one token at a time, and nobody drafts."""

import itertools
from collections.abc import Sequence

import torch

from actcache.capture.decode import CachedBatch
from actcache.capture.search import Outcome, Proposal, SearchLimits
from actcache.models.backbone import Backbone
from actcache.models.regimes import Regimes


def choices(backbone: Backbone, hidden: torch.Tensor) -> list[int]:
    return backbone.readout.top2(hidden)[0][:, 0].tolist()


@torch.no_grad()
def in_lockstep(backbones: Sequence[Backbone], sequences: Sequence[list[int]], limits: SearchLimits) -> list[Proposal]:
    """What the first checkpoint writes after each sequence until all others have once chosen otherwise."""
    regimes = Regimes.joined(backbone.regimes for backbone in backbones)
    return [_walk(backbones, list(ids), limits, regimes) for ids in sequences]


def _walk(backbones: Sequence[Backbone], ids: list[int], limits: SearchLimits, regimes: Regimes) -> Proposal:
    batches = [CachedBatch(backbone, [ids]) for backbone in backbones]
    hidden = [batch.begin() for batch in batches]
    proposal = Proposal(Outcome.DIVERGED, parted=[None] * (len(backbones) - 1))
    for step in itertools.count():
        token, *others = (choices(backbone, one)[0] for backbone, one in zip(backbones, hidden, strict=True))
        for number, other in enumerate(others):
            if other != token and proposal.parted[number] is None:
                proposal.parted[number] = step
        if others and None not in proposal.parted:
            return proposal
        ended = limits.after_agreeing(token, len(ids) + step, step + 1)
        if ended is None and len(ids) + step == regimes.last(len(ids) + step):
            ended = Outcome.OPEN
        if ended is not None:
            proposal.outcome, proposal.last = ended, token
            return proposal
        proposal.shared.append(token)
        hidden = [batch.feed(torch.tensor([[token]]))[:, 0] for batch in batches]
