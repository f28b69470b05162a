"""Texts of a corpus, whose rows are kept: no search, and no events.

Each text is cut to a context. Where so many rows are asked for, the text with the last of these is the last one, and is
kept whole: so a corpus that grows has the rows of one captured at once. Knows prompts and what is asked of checkpoints;
writes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from actcache import carried
from actcache.capture.asks import Steps
from actcache.capture.decide import Decider
from actcache.capture.rerun import Named, rows_of
from actcache.errors import InputError
from actcache.models.lineup import Lineup
from actcache.models.prompt_ids import PromptIds
from actcache.models.templates import PLAIN, Rendering
from actcache.progress import Told
from actcache.prompts import Prompt
from actcache.store import SegmentData
from actcache.store.layout import STATE

CONTEXT = 512  # tokens of a text, unless told otherwise

_AT_ONCE = 1024  # texts that are counted


class Texts:
    """The texts of a corpus and their token ids.

    Attributes:
        prompts: the texts: the first of those given that have the rows that are asked for.
    """

    def __init__(
        self,
        lineup: Lineup,
        prompts: Sequence[Prompt],
        rendering: Rendering = PLAIN,
        say: Callable[[str], None] = lambda line: None,
        *,
        context: int = CONTEXT,
        n_rows: int | None = None,
    ) -> None:
        """Of these prompts.

        Args:
            lineup: whose tokenizers read them.
            prompts: validated ones.
            rendering: how prompts become texts.
            say: told, in one line, what a person should know.
            context: how many tokens of each are read at most; no more than the checkpoints have positions.
            n_rows: how many rows that count are wanted at least; None for those of all texts.

        Raises:
            InputError, IncompatibleError: see :class:`PromptIds`; or no token of any text counts.
        """
        self.context = min(context, lineup.max_positions or context)
        self._ids = PromptIds(lineup, prompts, rendering, say, longest=self.context)
        self.prompts = prompts
        if n_rows is None:
            return
        special, n_found = lineup.special_ids, 0
        for start in range(0, len(prompts), _AT_ONCE):
            part = prompts[start : start + _AT_ONCE]
            for number, ids in enumerate(self._ids.of(start, part), start):
                n_found += sum(token not in special for token in ids)
                if n_found >= n_rows:
                    self.prompts = prompts[: number + 1]
                    return
        if not n_found:
            raise InputError("no text of the corpus has a token that is not a special one; give other texts")
        say(f"the corpus has {n_found:,} tokens that are not special ones; {n_rows:,} were asked for")

    def of(self, start: int, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The ids of consecutive texts, the first of which has this number."""
        return self._ids.of(start, prompts)


def texts_captured(
    decider: Decider, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], told: Told
) -> Steps[SegmentData]:
    """Everything that one segment of texts holds: a row for every token, at every site that is asked for."""
    whose = [Named(f"prompt {prompt.id!r}", list(own)) for prompt, own in zip(prompts, ids, strict=True)]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    spans = itertools.pairwise(offsets.tolist())
    places = [(np.arange(stop - start), np.arange(start, stop)) for start, stop in spans]
    of_sites = decider.settings.places
    how = decider.labels, decider.no_rows, decider.regimes, decider.pack_tokens, told
    rows = yield from rows_of(whose, places, of_sites, *how)
    nothing = decider.segment([], [])
    return SegmentData(
        token_ids=np.array([token for own in ids for token in own], np.int32),
        sequence_offsets=offsets,
        states={(label, block): rows.pop((site, label, block)) for site, label, block in [*rows] if site == STATE},
        sites=rows,
        final=nothing.final,
        events=nothing.events,
        excluded=nothing.excluded,
        sequences=pa.table(
            {
                "prompt_id": pa.array([prompt.id for prompt in prompts], pa.string()),
                "carried": pa.array([carried.encode(prompt.carried) for prompt in prompts], pa.string()),
            }
        ),
    )
