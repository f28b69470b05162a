"""Decide: one forward per checkpoint over packs of sequences decides the events and gathers the rows they need.

The search proposes where the pair diverges; the forward whose states are stored sees every position and decides. Its
own argmaxes name the two tokens, so an event cannot contradict its own diagonal. Where it disagrees with the proposal,
one of three things happens. The event moves to where the pair does diverge, and is captured again over exactly its own
sequence. The search goes on from what the forward chose. Or the prompt is excluded, with the reason recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actcache.capture.answers import Answers
from actcache.capture.asks import Forward, GoOn, Ran, Score, Steps, T, Whose, proposals, ran, scored
from actcache.capture.continuations import Known
from actcache.capture.events import Captured, Event, Excluded, Scored, segment_of
from actcache.capture.forward import Pack
from actcache.capture.given import GivenEvent, GivenPrompt
from actcache.capture.rerun import rows_to_add
from actcache.capture.residency import Checkpoints
from actcache.capture.search import Outcome, SearchLimits
from actcache.capture.settings import CaptureSettings
from actcache.models.blocks import text_config
from actcache.models.checkpoint import DTYPES
from actcache.models.lineup import Lineup
from actcache.models.packing import offsets_of
from actcache.models.regimes import Regimes
from actcache.progress import Told, nobody_told
from actcache.prompts import Prompt
from actcache.schema import CHOSEN_KINDS, FIRST_DIVERGENCE
from actcache.store import Segment, SegmentData
from actcache.store.layout import Sites
from actcache.store.segment_data import SiteRows

MAX_ROUNDS = 4  # a search that the capture forward contradicts this often in a row hangs on rounding alone


class Searched(NamedTuple):
    """What a capture's searches did.

    Attributes:
        n_sequences: that were gone on from.
        n_choices: of each checkpoint, that were compared.
        n_known: prompts of which others said what checkpoints write, among those captured now.
        n_corrected: of these, where a capture forward decided otherwise.
    """

    n_sequences: int = 0
    n_choices: int = 0
    n_known: int = 0
    n_corrected: int = 0


@dataclass(frozen=True)
class _Search:
    """A prompt on its way to an event: its ids, and the tokens that both checkpoints chose after them."""

    index: int
    prompt: Prompt
    ids: list[int]
    shared: list[int]
    proposed: bool = False  # that the pair diverges right after ``shared``
    first_step: int | None = None  # where the search first proposed it
    decided: int = 0  # how many of ``shared`` capture forwards of earlier regimes have decided for good
    n_rounds: int = 0  # how often in a row the capture forward has contradicted the search

    @property
    def name(self) -> str:
        return f"prompt {self.prompt.id!r}"

    @property
    def sequence(self) -> list[int]:
        return self.ids + self.shared

    def go_on(self, shared: list[int], *, proposed: bool) -> _Search:
        return replace(self, shared=shared, proposed=proposed)


@dataclass(frozen=True)
class _Given:
    """A sequence with events that are given, of one regime: it ends at the last of them."""

    order: int
    prompt: GivenPrompt
    sequence: list[int]
    events: list[GivenEvent]

    @property
    def name(self) -> str:
        return f"prompt {self.prompt.id!r}"


@dataclass(frozen=True)
class _Decided:
    """An event that only its margins can still undo, and the forward that decided it: its rows among those kept, and
    its choice among those compared."""

    search: _Search
    ran: Ran
    rows: range
    row: int

    def tokens(self, pair: tuple[str, str]) -> tuple[int, ...]:
        return tuple(int(self.ran.best[label][0][self.row, 0]) for label in pair)


class Decider:
    """What all segments of a capture are computed with."""

    def __init__(
        self,
        lineup: Lineup,
        checkpoints: Checkpoints,
        settings: CaptureSettings,
        say: Callable[[str], None] = lambda line: None,
        between: Callable[[], None] = lambda: None,
        *,
        known: Known | None = None,
        folder: Path | None = None,
    ) -> None:
        """With these models.

        Args:
            lineup: the checkpoints.
            checkpoints: the same, to be run.
            settings: what to compute.
            say: told, in one line, what a person should know (packing not possible, for example).
            between: called before each forward; may raise.
            known: what others say that the checkpoints write, which the search then takes for a proposal.
            folder: where rows wait if not all checkpoints are in memory; None for the system's temporary one.
        """
        self._has_tails = lineup.has_tails
        self.pair, self.pairs, self.paired, self.labels = lineup.pair, lineup.pairs, lineup.paired, lineup.labels
        self.checkpoints, self.settings, self.known = checkpoints, settings, known or {}
        self.decode, self.special, self._width = lineup.decode, lineup.special_ids, lineup.width
        self.limits = SearchLimits(settings.max_new, lineup.end_ids, lineup.max_positions)
        self.regimes = Regimes.joined(
            Regimes.of_config(text_config(checkpoint.config)) for checkpoint in lineup.checkpoints.values()
        )
        self.pack_tokens = 0 if settings.strict else settings.max_tokens
        if not settings.strict:
            reasons = (reason for label in self.labels if (reason := checkpoints.why_not_packable(label)))
            if (reason := next(reasons, None)) is not None:
                say(f"one sequence per forward: {reason}")
                self.pack_tokens = 0
        self._answers = Answers(
            *(checkpoints, self.limits, self.regimes, settings.max_tokens, between, folder),
            has_tails=self._has_tails,
            alone=settings.strict,
        )
        self._named: set[str] = set()  # prompts of which something is known
        self._corrected: set[str] = set()  # those of them where a capture forward has contradicted what was proposed

    @property
    def searches(self) -> Searched:
        """What the searches did so far."""
        counted = self._answers.n_sequences, self._answers.n_choices
        return Searched(*counted, len(self._named), len(self._corrected))

    def complete(self, steps: Sequence[Steps[T]], told: Told = nobody_told) -> Iterator[tuple[int, T]]:
        """Bring steps to their ends (see :meth:`actcache.capture.answers.Answers.complete`)."""
        return self._answers.complete(steps, told)

    def rerun(self, segment: Segment, sites: Sites, told: Told) -> Steps[SiteRows]:
        """Rows of further sites of a stored segment."""
        return rows_to_add(segment, sites, self.labels, self.regimes, self.pack_tokens, told)

    def searched(
        self, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]], told: Told
    ) -> Steps[SegmentData]:
        """Everything that one segment holds, its events found by a search: the first divergences of one pair."""
        searches = [
            _Search(i, p, list(ids), [], n_rounds=self.first_round(p))
            for i, (p, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
        ]
        captured: list[Captured] = []
        excluded: dict[int, str] = {}
        n_done = 0
        while searches:
            proposed = yield from self._propose(searches, excluded)
            searches = []
            decided: list[_Decided] = []
            packed = [
                [proposed[i] for i in pack]
                for pack in self.regimes.packs([len(search.sequence) for search in proposed], self.pack_tokens)
            ]
            found = yield from self._forward(packed)
            for pack, of_pack in zip(packed, found, strict=True):
                for search, result in self._decide_pack(pack, of_pack):
                    if isinstance(result, _Decided):
                        decided.append(result)
                    elif isinstance(result, _Search) and result.n_rounds < MAX_ROUNDS:
                        searches.append(result)
                    else:
                        excluded[search.index] = "undecided" if isinstance(result, _Search) else result
            final = {label: self._stacked(decided, label) for label in self.labels}
            tokens = [one.tokens(self.pair) for one in decided]
            of_each = yield from scored(Score(final, tokens, [one.search for one in decided]))
            for one, of_one in zip(decided, of_each, strict=True):
                if not of_one.margins[self.pair[0]] < 0 < of_one.margins[self.pair[1]]:
                    excluded[one.search.index] = "tie"
                else:
                    captured.append(self._captured(one, of_one))
            told(len(captured) + len(excluded) - n_done)
            n_done = len(captured) + len(excluded)
        left_out = [Excluded(prompts[index], reason, self.pair) for index, reason in sorted(excluded.items())]
        return self.segment(captured, left_out)

    def first_round(self, prompt: Prompt) -> int:
        """The number of the first round: what others say of each checkpoint may be wrong, and that is no rounding."""
        if prompt.id in self.known:
            self._named.add(prompt.id)
        return -len(self.known.get(prompt.id, ()))

    def correct(self, prompt: Prompt) -> None:
        """Count that a capture forward contradicts what was proposed of a prompt."""
        if prompt.id in self.known:
            self._corrected.add(prompt.id)

    def going_on(
        self,
        labels: Sequence[str],
        sequences: Sequence[list[int]],
        n_compared: Sequence[int],
        prompts: Sequence[Prompt],
        doing: Callable[[int, int], str],
    ) -> GoOn:
        """The question how these checkpoints go on from sequences, each of a prompt."""
        names = [f"prompt {prompt.id!r}" for prompt in prompts]
        known = [self.known.get(prompt.id, {}) for prompt in prompts]
        return GoOn(tuple(labels), sequences, n_compared, names, known, doing)

    def _propose(self, searches: list[_Search], excluded: dict[int, str]) -> Steps[list[_Search]]:
        """Search from where each prompt stands; those that end without divergence are excluded, the others are what the
        capture forward is to decide on, those of one regime together."""
        open_ended = [search for search in searches if not search.proposed]
        found = yield from proposals(
            self.going_on(
                self.pair,
                [search.sequence for search in open_ended],
                [len(search.shared) for search in open_ended],
                [search.prompt for search in open_ended],
                lambda step, n_open: f"searching: step {step} of at most {self.limits.max_new}, {n_open} still alike",
            )
        )
        going = [search for search in searches if search.proposed]
        for search, proposal in zip(open_ended, found, strict=True):
            diverged = proposal.outcome is Outcome.DIVERGED
            if diverged or proposal.outcome is Outcome.OPEN:
                going.append(search.go_on(search.shared + proposal.shared, proposed=diverged))
            else:
                excluded[search.index] = proposal.outcome.value
        going = [
            s if s.first_step is not None or not s.proposed else replace(s, first_step=len(s.shared)) for s in going
        ]
        return sorted(going, key=lambda search: (self.regimes.of(len(search.sequence)), search.index))

    def _forward(self, packed: Sequence[Sequence[_Search]]) -> Steps[Any]:
        """One forward of every checkpoint over each of these packs."""
        prefix = self.settings.row_selection == "prefix"
        packs = [
            Pack.of(
                [search.sequence for search in pack],
                [range(n) if prefix else [n - 1] for search in pack for n in [len(search.sequence)]],
                # Positions whose next token is compared: from the last prompt token, or the first one of this regime,
                # to the end of each sequence.
                [range(len(search.ids) + search.decided - 1, len(search.sequence)) for search in pack],
            )
            for pack in packed
        ]
        return (yield from ran(Forward(packs, packed, self.settings.places, self.pair)))

    def _decide_pack(self, pack: Sequence[_Search], found: Ran) -> Iterator[tuple[_Search, _Decided | _Search | str]]:
        """For each of these sequences an event, where to search on, or the reason why the prompt is excluded."""
        prefix = self.settings.row_selection == "prefix"
        rows_of = consecutive([len(search.sequence) if prefix else 1 for search in pack])
        compared_of = consecutive([len(search.shared) + 1 - search.decided for search in pack])
        best = [found.best[label][0][:, 0].tolist() for label in self.pair]
        for search, rows, choices in zip(pack, rows_of, compared_of, strict=True):
            decided = self._decide(search, *(ids[choices.start : choices.stop] for ids in best))
            went_on = isinstance(decided, _Search) and not search.proposed and decided.shared[:-1] == search.shared
            ended = isinstance(decided, str) and not search.proposed
            if not (decided is None or went_on or ended):
                self.correct(search.prompt)
            yield search, _Decided(search, found, rows, choices.stop - 1) if decided is None else decided

    @property
    def no_rows(self) -> torch.Tensor:
        """``[0, D]`` in the dtype of the rows."""
        return torch.empty(0, self._width, dtype=DTYPES[self.settings.dtype])

    def _stacked(self, decided: Sequence[_Decided], label: str) -> torch.Tensor:
        """Their final states, ``[n, D]``."""
        return torch.cat([self.no_rows, *(one.ran.final[label][one.row : one.row + 1] for one in decided)])

    def _captured(self, one: _Decided, of_event: Scored) -> Captured:
        search, found, row = one.search, one.ran, one.row
        logits = [found.best[label][1] for label in self.pair]
        gaps = tuple(float(of[row, 0] - of[row, 1]) for of in logits)
        step = len(search.shared)
        proposed = step if search.first_step is None else search.first_step  # a capture forward may be first
        position = len(search.sequence) - 1
        event = Event(
            *(position, FIRST_DIVERGENCE, self.pair, one.tokens(self.pair), gaps, of_event, found.final_of(row)),
            *(step, proposed, search.prompt.carried),
        )
        return Captured(search.index, search.prompt.id, search.sequence, [event], found.rows_of(one.rows))

    def given(self, prompts: Sequence[GivenPrompt], told: Told) -> Steps[SegmentData]:
        """Everything that one segment of given events holds."""
        runs: list[_Given] = []
        for order, prompt in enumerate(prompts):
            for ids, events in prompt.sequences:
                # A state depends on its sequence's regime: events of two regimes are of two sequences.
                of_regime: dict[int, list[GivenEvent]] = {}
                for event in sorted(events, key=lambda one: one.position):
                    of_regime.setdefault(self.regimes.of(event.position + 1), []).append(event)
                runs += [_Given(order, prompt, ids[: own[-1].position + 1], own) for own in of_regime.values()]
        runs.sort(key=lambda run: self.regimes.of(len(run.sequence)))
        packed = [
            [runs[i] for i in pack]
            for pack in self.regimes.packs([len(run.sequence) for run in runs], self.pack_tokens)
        ]
        prefix = self.settings.row_selection == "prefix"
        packs = []
        for pack in packed:
            compared = [[one.position for one in run.events] for run in pack]
            kept: list[Sequence[int]] = [range(len(run.sequence)) for run in pack] if prefix else [*compared]
            packs.append(Pack.of([run.sequence for run in pack], kept, compared))
        found = list((yield from ran(Forward(packs, packed, self.settings.places, self.paired))))
        everyone: list[Whose] = [run for pack in packed for run in pack for _ in run.events]
        tokens = [one.tokens for pack in packed for run in pack for one in run.events]
        final = {label: torch.cat([of_pack.final[label][:] for of_pack in found]) for label in self.labels if found}
        of_each = iter((yield from scored(Score(final, tokens, everyone))))
        captured: list[Captured] = []
        excluded: list[Excluded] = []
        for pack, of_pack in zip(packed, found, strict=True):
            own = list(itertools.islice(of_each, sum(len(run.events) for run in pack)))
            captured += self._given_pack(pack, of_pack, own, excluded)
        told(len(prompts))
        return self.segment(captured, excluded)

    def _given_pack(
        self, pack: list[_Given], found: Ran, of_each: list[Scored], excluded: list[Excluded]
    ) -> Iterator[Captured]:
        """What each of the events of these sequences is; those that contradict their kind are excluded."""
        prefix = self.settings.row_selection == "prefix"
        compared_of = consecutive([len(run.events) for run in pack])
        rows_of = consecutive([len(run.sequence) for run in pack]) if prefix else compared_of
        for run, rows, at in zip(pack, rows_of, compared_of, strict=True):
            events: list[Event] = []
            own_rows: list[int] = []
            for one, row in zip(run.events, at, strict=True):
                pair = one.pair or self.pair
                first, second = (of_each[row].margins[label] for label in pair)
                ids, logits = zip(*(found.best[label] for label in pair), strict=True)
                if one.kind in CHOSEN_KINDS and not (
                    first < 0 < second and one.tokens == tuple(int(of[row, 0]) for of in ids)
                ):
                    prompt = Prompt(run.prompt.id, "", one.carried)
                    excluded.append(Excluded(prompt, "contradicts_its_kind", pair))
                    continue
                gaps = tuple(float(of[row, 0] - of[row, 1]) for of in logits)
                events.append(
                    Event(
                        *(one.position, one.kind, pair, one.tokens, gaps, of_each[row], found.final_of(row)),
                        *(one.step, one.step, one.carried),
                    )
                )
                own_rows.append(row - at.start)
            if events:
                of_events = found.rows_of(rows, None if prefix else own_rows)
                yield Captured(run.order, run.prompt.id, run.sequence, events, of_events)

    def _decide(self, search: _Search, first: list[int], second: list[int]) -> _Search | str | None:
        """None where the pair shares exactly ``search.shared`` and then differs. Otherwise, the capture forward has
        contradicted the search, or its regime ends: where to go on from, or why the prompt is excluded."""
        search = replace(search, n_rounds=search.n_rounds + 1)
        for step, (a, b) in enumerate(zip(first, second, strict=True), start=search.decided):
            if a != b:
                # Differing before the end, the event moves; it is taken from a forward over its own sequence.
                moved = search.go_on(search.shared[:step], proposed=True)
                return None if step == len(search.shared) else moved
            if step < len(search.shared) and a == search.shared[step]:
                continue
            length = len(search.ids) + step
            ended = self.limits.after_agreeing(a, length, step + 1)
            if ended is not None:
                return ended.value
            if length == self.regimes.last(length):
                search = replace(search, decided=step + 1, n_rounds=0)
            return search.go_on([*search.shared[:step], a], proposed=False)
        raise AssertionError("the choice after the last shared token always decides")

    def segment(self, captured: list[Captured], excluded: Sequence[Excluded]) -> SegmentData:
        """These sequences, and what was left out, as a segment of the store."""
        return segment_of(
            sorted(captured, key=lambda one: one.order),
            excluded,
            labels=self.labels,
            of_pairs=len(self.pairs) > 1,
            has_tails=self._has_tails,
            sites=self.settings.places,
            empty=self.no_rows,
            decode=self.decode,
            special=self.special,
        )


def consecutive(lengths: Sequence[int]) -> list[range]:
    """Where parts of these lengths lie when they are put one after another."""
    bounds = offsets_of(lengths).tolist()
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
