"""Continuation and forced branches by plain forwards and hooks: one token, one cell, one sequence at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from twins import reference


def next_token(model: PreTrainedModel, ids: Sequence[int]) -> int:
    """What a model chooses after a sequence."""
    return int(reference.readout(model, reference.final_hidden(model, ids)[-1]).argmax())


def greedy(model: PreTrainedModel, ids: Sequence[int], n: int, ends: Collection[int]) -> list[int]:
    """Up to ``n`` tokens that a model writes after a sequence, an end token included; none after an end token."""
    ids, written = list(ids), []
    while len(written) < n and ids[-1] not in ends:
        written.append(next_token(model, ids))
        ids.append(written[-1])
    return written


def log_probs(
    upstream: PreTrainedModel,
    late: PreTrainedModel,
    readout: PreTrainedModel,
    prefix: Sequence[int],
    candidate: Sequence[int],
    boundary: int,
) -> list[float]:
    """The log-probability of each token of a candidate behind a sequence, teacher-forced through a cell, which has the
    upstream's state at every position of the whole extended sequence."""
    ids = [*prefix, *candidate]
    hidden = reference.overwritten(late, ids, boundary, reference.states(upstream, ids, boundary))
    every: Tensor = reference.readout(readout, hidden).double().log_softmax(dim=-1)
    return [float(every[len(prefix) - 1 + n, token]) for n, token in enumerate(candidate)]


def n_valid(candidate: Sequence[int], ends: Collection[int], special: Collection[int]) -> int:
    """How many tokens of a candidate count: none behind one that ends a text, none from another special one on."""
    for n, token in enumerate(candidate):
        if token in special and token not in ends:
            return n
        if token in ends:
            return n + 1
    return len(candidate)
