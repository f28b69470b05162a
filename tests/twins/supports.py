"""The slow obvious twin of the choice of events: rollouts token by token, and every rule written out by itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from twins.reference import final_hidden, readout

Event = tuple[str, int, int, int]  # kind, step, y_pt, y_it


def choices(model: PreTrainedModel, ids: Sequence[int], prompt_length: int) -> list[int]:
    """The greedy next token after the prompt, and after each further token of `ids`."""
    logits = readout(model, final_hidden(model, ids))
    return logits.argmax(dim=-1).tolist()[prompt_length - 1 :]


def rollout(
    model: PreTrainedModel, ids: Sequence[int], n_tokens: int, end_ids: Sequence[int]
) -> tuple[list[int], bool]:
    """What a model writes after `ids`, a full forward for each token; and whether it chose an end token."""
    written: list[int] = []
    while len(written) < n_tokens:
        with torch.no_grad():
            token = choices(model, [*ids, *written], len(ids) + len(written))[0]
        if token in end_ids:
            return written, True
        written.append(token)
    return written, choices(model, [*ids, *written], len(ids) + len(written))[0] in end_ids


def order(kind: str, prompt_id: str, steps: Sequence[int]) -> list[int]:
    keys = {
        s: hashlib.sha256(json.dumps([kind, prompt_id, s], separators=(",", ":")).encode()).hexdigest() for s in steps
    }
    return sorted(steps, key=lambda step: keys[step])


def events_of(
    writer: str,
    prompt_id: str,
    pt: Sequence[int],
    it: Sequence[int],
    n_history: int,
    is_format: Callable[[int], bool],
    is_marker: Callable[[int], bool],
) -> set[Event]:
    """All events on one rollout, whose n tokens leave n + 1 choices `pt` and as many `it`."""
    steps = range(len(pt))
    disagreements = [step for step in steps if pt[step] != it[step]]
    found: set[Event] = set()
    if not disagreements:
        return found
    divergence = disagreements[0]

    if writer == "pt":
        found.add(("first_divergence", divergence, pt[divergence], it[divergence]))
        if divergence >= 3:
            earlier = [step for step in steps if step <= divergence - 2]
            found.add(
                ("pre_divergence", order("pre_divergence", prompt_id, earlier)[0], pt[divergence], it[divergence])
            )

    candidates = [step for step in steps if step >= 1 and step != divergence]
    for number, step in enumerate(order(f"{writer}_rollout", prompt_id, candidates)):
        if number < 8 and pt[step] != it[step]:
            found.add((f"{writer}_rollout", step, pt[step], it[step]))
            break

    for horizon in (0, 1, 2, 4, 8, 16, 32):
        if horizon < n_history and horizon < len(pt) and pt[horizon] != it[horizon]:
            found.add((f"native_{writer}", horizon, pt[horizon], it[horizon]))

    if writer == "pt":
        for step in disagreements:
            if not is_format(it[step]):
                found.add(("first_nonformat", step, pt[step], it[step]))
                break
        for step in disagreements:
            if is_marker(it[step]):
                found.add(("first_marker", step, pt[step], it[step]))
                break
    return found


def support(
    pt: PreTrainedModel,
    it: PreTrainedModel,
    prompt_id: str,
    ids: Sequence[int],
    n_tokens: int,
    end_ids: Sequence[int],
    is_format: Callable[[int], bool],
    is_marker: Callable[[int], bool],
) -> dict[str, Any]:
    """Per writer: its sequence and its events."""
    found = {}
    for writer, model in (("pt", pt), ("it", it)):
        written, ended = rollout(model, ids, n_tokens, end_ids)
        sequence = [*ids, *written]
        chosen = [choices(one, sequence, len(ids)) for one in (pt, it)]
        events = events_of(writer, prompt_id, *chosen, len(written) + ended, is_format, is_marker)
        found[writer] = (sequence, events)
    return found
