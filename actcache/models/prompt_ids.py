"""Prompt ids: the token ids of the prompts of a file, all at once of a small one, part by part of a large one.

Knows prompts and lineups; knows no jobs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from actcache.errors import InputError
from actcache.models.lineup import Lineup
from actcache.models.templates import PLAIN, ChatTemplate, Rendering
from actcache.prompts import Prompt, Prompts, n_messages

N_SAMPLED = 2000  # prompts of a large file that are encoded before anything runs
_AT_ONCE = 1024


def _silent(line: str) -> None:
    """What was said once is not said again."""


class PromptIds:
    """What the tokenizers of a lineup make of some prompts.

    What is wrong with a prompt is said at once where they are a list. Of a large file, it is said of a sample at once,
    and of the others when they are reached.
    """

    def __init__(
        self,
        lineup: Lineup,
        prompts: Sequence[Prompt],
        rendering: Rendering = PLAIN,
        say: Callable[[str], None] = lambda line: None,
        longest: int | None = None,
        own: Sequence[range] | None = None,
    ) -> None:
        """Of these prompts (arguments and errors as :meth:`Lineup.encode`).

        Args:
            own: which of the prompts are asked for, in order; the others are encoded only if they are asked for after
                all. None for all.

        Raises:
            InputError: besides, see :func:`check_template`.
        """
        check_template(prompts, rendering, say)
        self._lineup, self._rendering, self._longest = lineup, rendering, longest
        self._own = np.concatenate([np.arange(0), *own]) if own is not None else np.arange(len(prompts))
        step = max(1, len(self._own) // N_SAMPLED) if isinstance(prompts, Prompts) else 1
        found, counts = array("i"), array("i")  # as lists of numbers, ids would take ten times as much
        for start in range(0, len(self._own), step * _AT_ONCE):
            numbers = self._own[start : start + step * _AT_ONCE : step].tolist()
            for ids in lineup.encode([prompts[number] for number in numbers], say, rendering, longest):
                found.extend(ids)
                counts.append(len(ids))
            say = _silent
        self._ids, self._counts = np.frombuffer(found, np.int32), np.frombuffer(counts, np.int32)
        self._offsets = np.cumsum([0, *counts])

    def of(self, start: int, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Of consecutive prompts, the first of which has this number."""
        first = int(np.searchsorted(self._own, start))
        numbers = self._own[first : first + len(prompts)]
        if self.is_sampled or not np.array_equal(numbers, np.arange(start, start + len(prompts))):
            return self._lineup.encode(prompts, rendering=self._rendering, longest=self._longest)
        spans = pairwise(self._offsets[first : first + len(prompts) + 1].tolist())
        return [self._ids[lo:hi].tolist() for lo, hi in spans]

    @property
    def is_sampled(self) -> bool:
        """Whether there are more prompts than were encoded at once."""
        return len(self._counts) < len(self._own)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of every prompt asked for; of a large file, each has the number of the sampled one before it."""
        at = np.arange(len(self._own)) * len(self._counts) // max(1, len(self._own))
        return self._counts[at].tolist() if self.is_sampled else self._counts.tolist()


def check_template(
    prompts: Sequence[Prompt], rendering: Rendering, say: Callable[[str], None] = lambda line: None
) -> None:
    """Raise InputError where a chat template is given and no prompt has messages; say what else a person may not
    expect of it."""
    template = rendering.template
    if not isinstance(template, ChatTemplate):
        return
    n_plain = len(prompts) - n_messages(prompts)
    if n_plain == len(prompts):
        raise InputError(
            f"the template of {template.label} would render nothing: no prompt has messages, and text is never "
            "wrapped; write [{'role': 'user', 'content': TEXT}] as 'messages', or leave --template out"
        )
    if n_plain:
        say(f"{n_plain:,} of {len(prompts):,} prompts have no messages: read as they are, without the template")
    if template.is_dated:
        say(f"the template of {template.label} asks for the date: it is told that of {template.day}, always")
