"""Decide: one forward per checkpoint over packs of sequences decides the events and gathers the rows they need.

The search proposes where the pair diverges; the forward whose states are stored sees every position and decides. Its
own argmaxes name the two tokens, so an event cannot contradict its own diagonal. Where it disagrees with the proposal,
one of three things happens. The event moves to where the pair does diverge, and is captured again over exactly its own
sequence. The search goes on from what the forward chose. Or the prompt is excluded, with the reason recorded.
"""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from actcache.capture.decode import Decoding, find_decoding
from actcache.capture.events import Captured, Event, Excluded, segment_of
from actcache.capture.forward import first_wrong, forward_and_gather, said_of_site
from actcache.capture.given import GivenEvent, GivenPrompt
from actcache.capture.rerun import rows_to_add
from actcache.capture.search import Outcome, Proposal, SearchLimits, propose
from actcache.capture.settings import CaptureSettings
from actcache.errors import NotFiniteError
from actcache.finite import first_no_state, not_finite
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import DTYPES
from actcache.models.gather import gather_rows
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


class Run(Protocol):
    """A sequence of a pack, and whose it is."""

    @property
    def prompt(self) -> Prompt | GivenPrompt:
        """Whose it is."""

    @property
    def sequence(self) -> list[int]:
        """Its token ids."""


class Decider:
    """What all segments of a capture are computed with."""

    def __init__(
        self,
        lineup: Lineup,
        backbones: dict[str, Backbone],
        settings: CaptureSettings,
        say: Callable[[str], None] = lambda line: None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """With these models.

        Args:
            lineup: the checkpoints.
            backbones: of all of them, by label.
            settings: what to compute.
            say: told, in one line, what a person should know (packing not possible, for example).
            between: called before each forward; may raise.
        """
        self.backbones, self.pair, self.pairs, self.paired = backbones, lineup.pair, lineup.pairs, lineup.paired
        self.told: Told = nobody_told
        self.between = between
        self.settings = settings
        self.decode = lineup.decode
        self.special = lineup.special_ids
        self.limits = SearchLimits(settings.max_new, lineup.end_ids, lineup.max_positions)
        self.regimes = Regimes.joined(backbone.regimes for backbone in backbones.values())
        self._say = say
        self.pack_tokens = settings.max_tokens
        if not settings.strict:
            reasons = [reason for backbone in backbones.values() if (reason := backbone.why_not_packable())]
            if reasons:
                say(f"one sequence per forward: {reasons[0]}")
                self.pack_tokens = 0
        else:
            self.pack_tokens = 0

    @functools.cached_property
    def decoding(self) -> Decoding:
        """How searches decode; found by forwards, where there is something to search."""
        return _common_decoding([self.backbones[label] for label in self.paired], self._say)

    def rerun(self, segment: Segment, sites: Sites, told: Told) -> SiteRows:
        """Rows of further sites of a stored segment."""
        return rows_to_add(segment, sites, self.backbones, self.regimes, self.pack_tokens, told, self.between)

    def searched(self, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]], told: Told) -> SegmentData:
        """Everything that one segment holds, its events found by a search: the first divergences of one pair."""
        self.told = told
        searches = [_Search(i, p, list(ids), []) for i, (p, ids) in enumerate(zip(prompts, prompt_ids, strict=True))]
        captured: list[Captured] = []
        excluded: dict[int, str] = {}
        n_decided = 0
        while searches:
            proposed = self._propose(searches, excluded)
            searches = []
            for pack in self.regimes.packs([len(search.sequence) for search in proposed], self.pack_tokens):
                self.between()
                for search, result in self._run_pack([proposed[i] for i in pack]):
                    if isinstance(result, Captured):
                        captured.append(result)
                    elif isinstance(result, _Search) and result.n_rounds < MAX_ROUNDS:
                        searches.append(result)
                    else:
                        excluded[search.index] = "undecided" if isinstance(result, _Search) else result
                self.told(
                    len(captured) + len(excluded) - n_decided,
                    tokens=sum(map(len, (proposed[i].sequence for i in pack))),
                )
                n_decided = len(captured) + len(excluded)
        self.told(len(prompts) - n_decided)
        left_out = [Excluded(prompts[index], reason, self.pair) for index, reason in sorted(excluded.items())]
        return self.segment(captured, left_out)

    def propose(
        self,
        labels: Sequence[str],
        sequences: Sequence[list[int]],
        n_compared: Sequence[int],
        prompts: Sequence[Prompt],
        doing: Callable[[int, int], str],
    ) -> list[Proposal]:
        """How these checkpoints go on from sequences, each of a prompt (see :func:`actcache.capture.search.propose`).

        Args:
            labels: of the checkpoints, the one that writes first.
            sequences: token ids.
            n_compared: how many choices of each were compared before.
            prompts: of each.
            doing: says what is done at a step, with so many sequences open.
        """
        return propose(
            [self.backbones[label] for label in labels],
            sequences,
            n_compared,
            self.limits,
            max_tokens=self.settings.max_tokens,
            on_step=lambda tokens, step, n_open: self.told(tokens=tokens, doing=doing(step, n_open)),
            decoding=self.decoding,
            pack_tokens=self.pack_tokens,
            regimes=self.regimes,
            names=[f"prompt {prompt.id!r}" for prompt in prompts],
            labels=labels,
        )

    def _propose(self, searches: list[_Search], excluded: dict[int, str]) -> list[_Search]:
        """Search from where each prompt stands; those that end without divergence are excluded, the others are what the
        capture forward is to decide on, those of one regime together."""
        open_ended = [search for search in searches if not search.proposed]
        proposals = self.propose(
            self.pair,
            [search.sequence for search in open_ended],
            [len(search.shared) for search in open_ended],
            [search.prompt for search in open_ended],
            lambda step, n_open: f"searching: step {step} of at most {self.limits.max_new}, {n_open} still alike",
        )
        going = [search for search in searches if search.proposed]
        for search, proposal in zip(open_ended, proposals, strict=True):
            diverged = proposal.outcome is Outcome.DIVERGED
            if diverged or proposal.outcome is Outcome.OPEN:
                going.append(search.go_on(search.shared + proposal.shared, proposed=diverged))
            else:
                excluded[search.index] = proposal.outcome.value
        going = [
            s if s.first_step is not None or not s.proposed else replace(s, first_step=len(s.shared)) for s in going
        ]
        return sorted(going, key=lambda search: (self.regimes.of(len(search.sequence)), search.index))

    @torch.no_grad()
    def _run_pack(self, pack: list[_Search]) -> Iterable[tuple[_Search, Captured | _Search | str]]:
        """One forward of every checkpoint over these sequences; for each of them an event, where to search on, or the
        reason why the prompt is excluded."""
        bounds = offsets_of([len(search.sequence) for search in pack]).tolist()
        # Positions whose next token is compared: from the last prompt token, or the first one of this regime, to the
        # end of each sequence.
        compared = [
            range(start + len(search.ids) + search.decided - 1, stop)
            for search, start, stop in zip(pack, bounds[:-1], bounds[1:], strict=True)
        ]
        prefix = self.settings.row_selection == "prefix"
        kept = [range(start, stop) if prefix else range(stop - 1, stop) for start, stop in itertools.pairwise(bounds)]
        states, final = self.forward(pack, bounds, kept, compared)
        best = [self.best(label, final[label], pack, compared) for label in self.pair]
        rows_of = consecutive([len(rows) for rows in kept])
        compared_of = consecutive([len(rows) for rows in compared])
        for search, rows, choices in zip(pack, rows_of, compared_of, strict=True):
            decided = self._decide(search, *(ids[choices.start : choices.stop, 0].tolist() for ids, _ in best))
            if decided is not None:
                yield search, decided
                continue
            last = choices.stop - 1
            tokens = tuple(int(ids[last, 0]) for ids, _ in best)
            of_event = {label: hidden[last : last + 1] for label, hidden in final.items()}
            (margins,) = self.margins(of_event, [tokens], [search], [choices])
            if not margins[self.pair[0]] < 0 < margins[self.pair[1]]:
                yield search, "tie"
            else:
                gaps = tuple(float(logits[last, 0] - logits[last, 1]) for _, logits in best)
                own_states = {key: kept_rows[rows.start : rows.stop] for key, kept_rows in states.items()}
                own_final = {label: hidden[last].cpu() for label, hidden in final.items()}
                step = len(search.shared)
                proposed = step if search.first_step is None else search.first_step  # a capture forward may be first
                position = len(search.sequence) - 1
                of_choice = (position, FIRST_DIVERGENCE, self.pair, tokens, gaps, margins, own_final)
                event = Event(*of_choice, step, proposed, search.prompt.carried)
                yield search, Captured(search.index, search.prompt.id, search.sequence, [event], own_states)

    def given(self, prompts: Sequence[GivenPrompt], told: Told) -> SegmentData:
        """Everything that one segment of given events holds."""
        self.told = told
        runs: list[_Given] = []
        for order, prompt in enumerate(prompts):
            for ids, events in prompt.sequences:
                # A state depends on its sequence's regime: events of two regimes are of two sequences.
                of_regime: dict[int, list[GivenEvent]] = {}
                for event in sorted(events, key=lambda one: one.position):
                    of_regime.setdefault(self.regimes.of(event.position + 1), []).append(event)
                runs += [_Given(order, prompt, ids[: own[-1].position + 1], own) for own in of_regime.values()]
        runs.sort(key=lambda run: self.regimes.of(len(run.sequence)))
        captured: list[Captured] = []
        excluded: list[Excluded] = []
        for pack in self.regimes.packs([len(run.sequence) for run in runs], self.pack_tokens):
            self.between()
            packed = [runs[i] for i in pack]
            captured += self._given_pack(packed, excluded)
            self.told(tokens=sum(len(run.sequence) for run in packed))
        self.told(len(prompts))
        return self.segment(captured, excluded)

    @torch.no_grad()
    def _given_pack(self, pack: list[_Given], excluded: list[Excluded]) -> Iterable[Captured]:
        """One forward of every checkpoint over these sequences, and what each of their events is; those that contradict
        their kind are excluded."""
        bounds = offsets_of([len(run.sequence) for run in pack]).tolist()
        compared = [[start + one.position for one in run.events] for run, start in zip(pack, bounds, strict=False)]
        prefix = self.settings.row_selection == "prefix"
        kept: list[Sequence[int]] = [range(*span) for span in itertools.pairwise(bounds)] if prefix else [*compared]
        states, final = self.forward(pack, bounds, kept, compared)
        best = {label: self.best(label, final[label], pack, compared) for label in self.paired}
        given = [one for run in pack for one in run.events]
        margins = self.margins(final, [one.tokens for one in given], pack, compared)
        rows_of = consecutive([len(rows) for rows in kept])
        for run, rows, at in zip(pack, rows_of, consecutive([len(rows) for rows in compared]), strict=True):
            events: list[Event] = []
            own_rows: list[int] = []
            for one, row in zip(run.events, at, strict=True):
                pair = one.pair or self.pair
                first, second = (margins[row][label] for label in pair)
                ids, logits = zip(*(best[label] for label in pair), strict=True)
                if one.kind in CHOSEN_KINDS and not (
                    first < 0 < second and one.tokens == tuple(int(of[row, 0]) for of in ids)
                ):
                    prompt = Prompt(run.prompt.id, "", one.carried)
                    excluded.append(Excluded(prompt, "contradicts_its_kind", pair))
                    continue
                gaps = tuple(float(of[row, 0] - of[row, 1]) for of in logits)
                own_final = {label: hidden[row].cpu() for label, hidden in final.items()}
                events.append(
                    Event(
                        *(one.position, one.kind, pair, one.tokens, gaps, margins[row], own_final),
                        *(one.step, one.step, one.carried),
                    )
                )
                own_rows.append(rows.start + row - at.start)
            if events:
                chosen: slice | list[int] = slice(rows.start, rows.stop) if prefix else own_rows
                own_states = {key: values[chosen] for key, values in states.items()}
                yield Captured(run.order, run.prompt.id, run.sequence, events, own_states)

    def forward(
        self, pack: Sequence[Run], bounds: list[int], kept: Sequence[Sequence[int]], compared: Sequence[Sequence[int]]
    ) -> tuple[SiteRows, dict[str, torch.Tensor]]:
        """One forward of every checkpoint: the rows that are kept, and final states where choices are compared."""
        ids = torch.tensor([token for run in pack for token in run.sequence])[None]
        states: SiteRows = {}
        final: dict[str, torch.Tensor] = {}
        for label, backbone in self.backbones.items():
            gathered, hidden = forward_and_gather(backbone, ids, bounds, self.settings.places, _concatenated(kept))
            states.update({(site, label, block): rows for (site, block), rows in gathered.items()})
            final[label] = gather_rows(hidden, _concatenated(compared))
        self._check_finite(pack, states, kept, final, compared)
        return states, final

    def _check_finite(
        self,
        pack: Sequence[Run],
        states: SiteRows,
        kept: Sequence[Sequence[int]],
        final: dict[str, torch.Tensor],
        compared: Sequence[Sequence[int]],
    ) -> None:
        for (site, label, block), rows in states.items():
            if (row := first_wrong(site, rows)) is not None:
                raise self._not_finite(label, said_of_site(site, block), pack, kept, row)
        for label, rows in final.items():
            if (row := first_no_state(rows)) is not None:
                raise self._not_finite(label, "the final state", pack, compared, row)

    def best(
        self, label: str, final: torch.Tensor, pack: Sequence[Run], compared: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a checkpoint chooses where choices are compared: the two best tokens and their logits, ``[n, 2]``."""
        try:
            return self.backbones[label].readout.top2(final)
        except NotFiniteError as error:
            raise self._not_finite(label, "a logit", pack, compared, error.row or 0) from error

    def _not_finite(
        self, label: str, what: str, pack: Sequence[Run], rows: Sequence[Sequence[int]], row: int
    ) -> NotFiniteError:
        """``row`` counts in ``rows`` of the pack's sequences, one after another."""
        run = pack[bisect_right(list(itertools.accumulate(map(len, rows))), row)]
        whose = f"checkpoint {label}, prompt {run.prompt.id!r}"
        return not_finite(whose, what, self.backbones[label], run.sequence)

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

    def margins(
        self,
        final: dict[str, torch.Tensor],
        tokens: Sequence[tuple[int, ...]],
        pack: Sequence[Run],
        compared: Sequence[Sequence[int]],
    ) -> list[dict[str, float]]:
        """What each checkpoint makes of each pair of tokens, by label; ``final`` has a row per pair."""
        margins: list[dict[str, float]] = [{} for _ in tokens]
        for label, hidden in final.items():
            scores = self.backbones[label].readout.scores(hidden, torch.tensor(list(tokens)))
            for row, margin in enumerate((scores[:, 1] - scores[:, 0]).tolist()):
                if not math.isfinite(margin):
                    raise self._not_finite(label, "a scored logit", pack, compared, row)
                margins[row][label] = margin
        return margins

    def segment(self, captured: list[Captured], excluded: Sequence[Excluded]) -> SegmentData:
        """These sequences, and what was left out, as a segment of the store."""
        width, dtype = next(iter(self.backbones.values())).width, DTYPES[self.settings.dtype]
        return segment_of(
            sorted(captured, key=lambda one: one.order),
            excluded,
            labels=list(self.backbones),
            of_pairs=len(self.pairs) > 1,
            sites=self.settings.places,
            empty=torch.empty(0, width, dtype=dtype),
            decode=self.decode,
            special=self.special,
        )


def _common_decoding(pair: Sequence[Backbone], say: Callable[[str], None]) -> Decoding:
    """How searches of this pair decode: as both may."""
    order = list(Decoding)
    decoding, reason = max((find_decoding(backbone) for backbone in pair), key=lambda found: order.index(found[0]))
    if decoding is Decoding.EVEN:
        say(f"searches share a batch where their prompts are of one length: {reason}")
    elif decoding is Decoding.FULL:
        say(f"the search goes by full forwards: {reason}")
    return decoding


def _concatenated(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([row for part in rows for row in part], dtype=torch.int64)


def consecutive(lengths: Sequence[int]) -> list[range]:
    """Where parts of these lengths lie when they are put one after another."""
    bounds = offsets_of(lengths).tolist()
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
