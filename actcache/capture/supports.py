"""Supports: which disagreements of a pair along a rollout become events, and of which kind. Knows tokens; runs nothing.

A *rollout* is what one checkpoint of a pair, its writer, writes greedily after a prompt. Both checkpoints read it. At
step s, after s of its tokens, each chooses the next one; where the two choices differ, they disagree. Their histories
are equal by then, whatever the other one would have written.

====================  =======================  ====================================================================
kind                  on the rollout of        which step
====================  =======================  ====================================================================
``first_divergence``  pt                       the first disagreement
``pre_divergence``    pt                       one at which both agree, drawn from 0..s-2 where the first disagreement
                                               is at s >= 3; scored with the two tokens of s: a *future* pair
``pt_rollout``        pt                       the first disagreement among 8 steps that are drawn, all but step 0 and
``it_rollout``        it                       the first disagreement of the rollout
``native_pt``         pt                       each disagreement at a horizon: step 0, 1, 2, 4, 8, 16, 32
``native_it``         it
``first_nonformat``   pt                       the first disagreement where the token of it is no layout
``first_marker``      pt                       the first disagreement where the token of it opens an assistant's reply
====================  =======================  ====================================================================

Kinds do not exclude one another: the first divergence may be at a horizon, and then there are two events. A horizon
counts where the writer chose a token there, its end token included. Random draws are the order of SHA-256 over kind,
prompt and step, so they are the same wherever they are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from actcache.canonical import digest_of
from actcache.schema import FIRST_DIVERGENCE, IT, PRE_DIVERGENCE

ROLLOUTS = "rollouts"
"""The support of events on the rollouts of both checkpoints of a pair."""

ROLLOUT_TOKENS = 64
HORIZONS = (0, 1, 2, 4, 8, 16, 32)
N_CANDIDATES = 8
FEWEST_BEFORE = 3  # a first divergence has a step before it that is drawn from here on


@dataclass(frozen=True)
class Chosen:
    """An event to be: its kind, its step, and the two tokens by role."""

    kind: str
    step: int
    tokens: tuple[int, int]


def first_disagreement(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first step at which two lists of choices differ."""
    return next((step for step, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), None)


def choose(
    writer: str,
    prompt_id: str,
    first: Sequence[int],
    second: Sequence[int],
    *,
    n_history: int,
    is_format: Callable[[int], bool],
    is_marker: Callable[[int], bool],
) -> list[Chosen]:
    """The events of one rollout, by kind in the order of this module's table.

    Args:
        writer: the role whose rollout it is: ``pt`` or ``it``.
        prompt_id: of the prompt, on which the draws depend.
        first, second: what pt and it choose at steps 0..n of a rollout of n tokens.
        n_history: at how many steps the writer chose a token for its rollout: n, or n + 1 where the last one is the end
            token, which is no token of the rollout.
        is_format, is_marker: what the text of a token is.
    """
    at = first_disagreement(first, second)
    if at is None:
        return []

    def chosen(kind: str, steps: Iterator[int] | Sequence[int]) -> list[Chosen]:
        return [Chosen(kind, step, (first[step], second[step])) for step in steps]

    differing = [step for step in range(at, len(first)) if first[step] != second[step]]
    kind = f"{writer}_rollout"
    candidates = drawn(kind, prompt_id, [step for step in range(1, len(first)) if step != at])[:N_CANDIDATES]
    later = [step for step in candidates if step in differing][:1]
    at_horizons = [step for step in HORIZONS if step < n_history and step in differing]
    if writer == IT:
        return [*chosen(kind, later), *chosen(f"native_{writer}", at_horizons)]
    events = chosen(FIRST_DIVERGENCE, [at])
    if at >= FEWEST_BEFORE:
        events.append(Chosen(PRE_DIVERGENCE, before_divergence(prompt_id, at), (first[at], second[at])))
    events += [*chosen(kind, later), *chosen(f"native_{writer}", at_horizons)]
    for name, fits in (("first_nonformat", lambda token: not is_format(token)), ("first_marker", is_marker)):
        events += chosen(name, [step for step in differing if fits(second[step])][:1])
    return events


def before_divergence(prompt_id: str, step: int) -> int:
    """The step that is drawn for a prompt before its first divergence at ``step``, at least ``FEWEST_BEFORE``."""
    return drawn(PRE_DIVERGENCE, prompt_id, range(step - 1))[0]


def drawn(kind: str, prompt_id: str, steps: Sequence[int]) -> list[int]:
    """These steps in an order that depends on nothing but them, the kind and the prompt."""
    return sorted(steps, key=lambda step: digest_of([kind, prompt_id, step]))
