"""Capture: one forward per checkpoint over packs of sequences decides the events and gathers the rows they need.

The search proposes where the pair diverges; the forward whose states are stored sees every position and decides. Its
own argmaxes name the two tokens, so an event cannot contradict its own diagonal. Where it disagrees with the proposal,
one of three things happens. The event moves to where the pair does diverge, and is captured again over exactly its own
sequence. The search goes on from what the forward chose. Or the prompt is excluded, with the reason recorded.
"""

from __future__ import annotations

import functools
import itertools
import math
import platform
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Protocol

import torch

from actcache import prompts as prompts_module
from actcache.capture.events import Captured, Event, segment_of
from actcache.capture.forward import first_wrong, forward_and_gather, said_of_site
from actcache.capture.given import FIXED, GivenEvent, GivenPrompt
from actcache.capture.growth import (
    digests_of_segments,
    existing,
    joined,
    missing_of,
    name_of_addition,
    said_of_sites,
    segments_of,
    sites_of_store,
)
from actcache.capture.rerun import rows_to_add
from actcache.capture.search import Decoding, Outcome, SearchLimits, find_decoding, propose
from actcache.capture.settings import CaptureSettings
from actcache.errors import InputError, NotFiniteError
from actcache.finite import first_no_state, not_finite
from actcache.models.backbone import Backbone
from actcache.models.blocks import check_boundary, find_site
from actcache.models.checkpoint import DTYPES
from actcache.models.gather import gather_rows
from actcache.models.lineup import Lineup
from actcache.models.packing import offsets_of
from actcache.models.probe import check_replayable
from actcache.models.regimes import Regimes
from actcache.progress import OnProgress, Tally, untold
from actcache.prompts import Prompt
from actcache.schema import CHOSEN_KINDS, Fingerprint, order_of_labels
from actcache.store import BackgroundWriter, Place, Segment, SegmentData, StoreWriter, open_store
from actcache.store.layout import Sites
from actcache.store.segment_data import SiteRows

KIND = "first_divergence"
MAX_ROUNDS = 4  # a search that the capture forward contradicts this often in a row hangs on rounding alone


def capture(
    lineup: Lineup,
    prompts: Sequence[Prompt],
    store: Place,
    settings: CaptureSettings,
    *,
    given: Sequence[GivenPrompt] | None = None,
    part: tuple[int, int] = (0, 1),
    load: Callable[[str], Backbone] | None = None,
    on_progress: OnProgress = untold,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Find the events of every prompt and store what their replay needs; resumable by the same call.

    A store grows by it too. Prompts that follow those it was made from become new segments. For boundaries or sites
    that it lacks, its sequences run again, without a search. What it has stays as it is.

    Args:
        lineup: the checkpoints. Its pair defines the events; the states of all are stored.
        prompts: validated prompts; of no account where events are given.
        store: where the store is or shall be, as in ``open_store``; new, or left by an earlier run of the same capture.
        settings: what to compute.
        given: events to store instead of those that a search finds (see :mod:`actcache.capture.given`).
        part: ``(i, n)`` leaves all segments but every n-th, from the i-th on, to others that capture at the same time.
        load: gives the backbone of a checkpoint by label; by default :func:`load_backbone`.
        on_progress: told of prompts decided (or found committed), after every step of a search and every pack; then
            of sequences that run again.
        say: told, in one line, what a person should know (packing not possible, for example).

    Raises:
        InputError: see :meth:`Lineup.encode`, a boundary out of range, or a lineup of one checkpoint.
        IncompatibleError: the store belongs to another run; names the field. Prompts may have changed since, those that
            are not captured yet.
        UnsupportedModelError: see :func:`load_backbone`.
        OSError: the disk refuses; nothing half-written stays. Writing goes on beside the forwards, up to two segments
            behind; its failure stops them before the next one.
    """
    for boundary in settings.boundaries:
        check_boundary(boundary, lineup.n_blocks)
    if len(lineup.labels) < 2:
        raise InputError(f"events need two checkpoints, there is {lineup.labels[0]} alone: give another one")
    prompt_ids = lineup.encode(prompts, say) if given is None else []
    prompts = prompts if given is None else [one.as_prompt() for one in given]
    found = replace(fingerprint(lineup, prompts, settings), support=None if given is None else FIXED)
    before = existing(store)
    captured = before.prompts if before else {}
    segments = segments_of(prompts, settings.shard_prompts, captured)
    writer = StoreWriter(store, found, digests_of_segments(prompts, settings.shard_prompts, captured))
    if before is not None:
        stored, asked = sites_of_store(before), settings.wanted
        kept = {
            site: [block for block in blocks if block not in asked.get(site, ())] for site, blocks in stored.items()
        }
        if any(kept.values()):
            say(f"the store has {said_of_sites(kept)} too, which stay")
        settings = settings.with_sites(joined(stored, asked))
    load = load or (lambda label: load_backbone(lineup, label, settings))
    job: _Capture | None = None

    def get_job() -> _Capture:
        nonlocal job
        if job is None:  # weights are not loaded where nothing is left to do
            job = _Capture(lineup, {label: load(label) for label in lineup.labels}, settings, say)
        return job

    shards = list(segments.items())[part[0] :: part[1]]
    committed = writer.committed
    tally = Tally(sum(len(shard) for _, shard in shards), "prompts", on_progress)
    tally.add(found=sum(len(shard) for name, shard in shards if name in committed))
    with BackgroundWriter(writer) as background:
        for name, shard in [(name, shard) for name, shard in shards if name not in committed]:
            if name in writer.committed:  # by another process meanwhile
                tally.add(found=len(shard))
                continue
            own, check = slice(shard.start, shard.stop), background.check
            if given is None:
                segment = get_job().shard(prompts[own], prompt_ids[own], tally, check)
            else:
                segment = get_job().given(given[own], tally, check)
            background.append(name, segment)
    stored_segments = list(open_store(store).segments)[part[0] :: part[1]]
    lacking = [one for one in stored_segments if missing_of(one, settings.wanted)]
    if not lacking:
        return
    added = functools.reduce(joined, (missing_of(one, settings.wanted) for one in lacking))
    say(f"the store gains {said_of_sites(added)}: stored sequences run again, without a search")
    tally = Tally(sum(one.n_sequences for one in lacking), "sequences", on_progress)
    with BackgroundWriter(writer) as background:
        for one in lacking:
            sites = missing_of(one, settings.wanted)
            rows = get_job().rerun(one, sites, tally, background.check)
            background.add_rows(name_of_addition(one, sites), one.record, rows)


def load_backbone(lineup: Lineup, label: str, settings: CaptureSettings) -> Backbone:
    """A checkpoint's backbone, from its folder; one that could not be replayed is refused before anything is captured.

    Raises:
        UnsupportedModelError: the architecture cannot be replayed from its states, and prefix rows are asked for; or it
            has no such site.
    """
    checkpoint = lineup.checkpoints[label]
    model = checkpoint.load(DTYPES[settings.dtype], settings.device)
    with checkpoint.named():
        if settings.row_selection == "prefix":
            for boundary in sorted({min(settings.boundaries), max(settings.boundaries)}):
                check_replayable(model, boundary)
        backbone = Backbone(model)
        for site, block in settings.sites:
            find_site(backbone.blocks[block], site)
        return backbone


def fingerprint(lineup: Lineup, prompts: Sequence[Prompt], settings: CaptureSettings) -> Fingerprint:
    """Everything that the bytes of the store depend on; two equal fingerprints name the same work."""
    return Fingerprint(
        checkpoints={label: checkpoint.fingerprint for label, checkpoint in lineup.checkpoints.items()},
        pair=lineup.pair,
        lineup=order_of_labels(lineup.labels, lineup.pair),
        # Only where the store would differ from one of an earlier version, which resumes otherwise.
        vocabulary=None if lineup.has_one_vocabulary else "of any checkpoint",
        prompts=prompts_module.digest(prompts),
        n_prompts=len(prompts),
        dtype=settings.dtype,
        boundaries=settings.boundaries,
        row_selection=settings.row_selection,
        width=lineup.width,
        n_blocks=lineup.n_blocks,
        max_new=settings.max_new,
        strict=settings.strict,
        max_tokens=settings.max_tokens,
        shard_prompts=settings.shard_prompts,
        codec=settings.codec,
        device=settings.device,
        processor=platform.machine(),
        versions={name: version(name) for name in ("actcache", "torch", "transformers")},
    )


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


class _Run(Protocol):
    """A sequence of a pack, and whose it is."""

    @property
    def prompt(self) -> Prompt | GivenPrompt: ...

    @property
    def sequence(self) -> list[int]: ...


class _Capture:
    def __init__(
        self,
        lineup: Lineup,
        backbones: dict[str, Backbone],
        settings: CaptureSettings,
        say: Callable[[str], None],
    ) -> None:
        self.backbones, self.pair = backbones, lineup.pair
        self.tally = Tally(0, "prompts", untold)
        self.settings = settings
        self.decode = lineup.decode
        self.vocabulary = lineup.vocabulary
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
        return _common_decoding([self.backbones[label] for label in self.pair], self._say)

    def rerun(self, segment: Segment, sites: Sites, tally: Tally, between: Callable[[], None]) -> SiteRows:
        """Rows of further sites of a stored segment; calls ``between`` as :meth:`shard`."""
        return rows_to_add(segment, sites, self.backbones, self.regimes, self.pack_tokens, tally, between)

    def shard(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[list[int]],
        tally: Tally,
        between: Callable[[], None],
    ) -> SegmentData:
        """Everything that one segment holds; calls ``between`` before each forward, which may raise."""
        self.tally = tally
        searches = [_Search(i, p, ids, []) for i, (p, ids) in enumerate(zip(prompts, prompt_ids, strict=True))]
        captured: list[Captured] = []
        excluded: dict[int, str] = {}
        n_decided = 0
        while searches:
            proposed = self._propose(searches, excluded)
            searches = []
            for pack in self.regimes.packs([len(search.sequence) for search in proposed], self.pack_tokens):
                between()
                for search, result in self._run_pack([proposed[i] for i in pack]):
                    if isinstance(result, Captured):
                        captured.append(result)
                    elif isinstance(result, _Search) and result.n_rounds < MAX_ROUNDS:
                        searches.append(result)
                    else:
                        excluded[search.index] = "undecided" if isinstance(result, _Search) else result
                self.tally.add(
                    len(captured) + len(excluded) - n_decided,
                    tokens=sum(map(len, (proposed[i].sequence for i in pack))),
                )
                n_decided = len(captured) + len(excluded)
        self.tally.add(len(prompts) - n_decided)
        return self._segment(captured, [(prompts[index], reason) for index, reason in sorted(excluded.items())])

    def _propose(self, searches: list[_Search], excluded: dict[int, str]) -> list[_Search]:
        """Search from where each prompt stands; those that end without divergence are excluded, the others are what the
        capture forward is to decide on, those of one regime together."""
        open_ended = [search for search in searches if not search.proposed]
        proposals = propose(
            [self.backbones[label] for label in self.pair],
            [search.sequence for search in open_ended],
            [len(search.shared) for search in open_ended],
            self.limits,
            max_tokens=self.settings.max_tokens,
            on_step=lambda tokens, step, n_open: self.tally.add(
                tokens=tokens,
                doing=f"searching: step {step} of at most {self.limits.max_new}, {n_open} still alike",
            ),
            decoding=self.decoding,
            pack_tokens=self.pack_tokens,
            regimes=self.regimes,
            names=[f"prompt {search.prompt.id!r}" for search in open_ended],
            labels=self.pair,
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
        states, final = self._forward(pack, bounds, kept, compared)
        best = [self._best(label, final[label], pack, compared) for label in self.pair]
        rows_of = _consecutive([len(rows) for rows in kept])
        compared_of = _consecutive([len(rows) for rows in compared])
        for search, rows, choices in zip(pack, rows_of, compared_of, strict=True):
            decided = self._decide(search, *(ids[choices.start : choices.stop, 0].tolist() for ids, _ in best))
            if decided is not None:
                yield search, decided
                continue
            last = choices.stop - 1
            tokens = tuple(int(ids[last, 0]) for ids, _ in best)
            of_event = {label: hidden[last : last + 1] for label, hidden in final.items()}
            (margins,) = self._margins(of_event, [tokens], [search], [choices])
            if not margins[self.pair[0]] < 0 < margins[self.pair[1]]:
                yield search, "tie"
            elif not self.vocabulary.issuperset(tokens):
                yield search, "token_outside_vocabulary"
            else:
                gaps = tuple(float(logits[last, 0] - logits[last, 1]) for _, logits in best)
                own_states = {key: kept_rows[rows.start : rows.stop] for key, kept_rows in states.items()}
                own_final = {label: hidden[last].cpu() for label, hidden in final.items()}
                step = len(search.shared)
                proposed = step if search.first_step is None else search.first_step  # a capture forward may be first
                position = len(search.sequence) - 1
                event = Event(position, KIND, tokens, gaps, margins, own_final, step, proposed, search.prompt.carried)
                yield search, Captured(search.index, search.prompt.id, search.sequence, [event], own_states)

    def given(self, prompts: Sequence[GivenPrompt], tally: Tally, between: Callable[[], None]) -> SegmentData:
        """Everything that one segment of given events holds; calls ``between`` as :meth:`shard`."""
        self.tally = tally
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
        excluded: list[tuple[Prompt, str]] = []
        for pack in self.regimes.packs([len(run.sequence) for run in runs], self.pack_tokens):
            between()
            packed = [runs[i] for i in pack]
            captured += self._given_pack(packed, excluded)
            self.tally.add(tokens=sum(len(run.sequence) for run in packed))
        self.tally.add(len(prompts))
        return self._segment(captured, excluded)

    @torch.no_grad()
    def _given_pack(self, pack: list[_Given], excluded: list[tuple[Prompt, str]]) -> Iterable[Captured]:
        """One forward of every checkpoint over these sequences, and what each of their events is; those that contradict
        their kind are excluded."""
        bounds = offsets_of([len(run.sequence) for run in pack]).tolist()
        compared = [[start + one.position for one in run.events] for run, start in zip(pack, bounds, strict=False)]
        prefix = self.settings.row_selection == "prefix"
        kept: list[Sequence[int]] = [range(*span) for span in itertools.pairwise(bounds)] if prefix else [*compared]
        states, final = self._forward(pack, bounds, kept, compared)
        best = [self._best(label, final[label], pack, compared) for label in self.pair]
        given = [one for run in pack for one in run.events]
        margins = self._margins(final, [one.tokens for one in given], pack, compared)
        rows_of = _consecutive([len(rows) for rows in kept])
        for run, rows, at in zip(pack, rows_of, _consecutive([len(rows) for rows in compared]), strict=True):
            events: list[Event] = []
            own_rows: list[int] = []
            for one, row in zip(run.events, at, strict=True):
                first, second = (margins[row][label] for label in self.pair)
                if one.kind in CHOSEN_KINDS and not (
                    first < 0 < second and one.tokens == tuple(int(ids[row, 0]) for ids, _ in best)
                ):
                    excluded.append((Prompt(run.prompt.id, "", one.carried), "contradicts_its_kind"))
                    continue
                gaps = tuple(float(logits[row, 0] - logits[row, 1]) for _, logits in best)
                own_final = {label: hidden[row].cpu() for label, hidden in final.items()}
                events.append(
                    Event(
                        *(one.position, one.kind, one.tokens, gaps, margins[row], own_final),
                        *(one.step, one.step, one.carried),
                    )
                )
                own_rows.append(rows.start + row - at.start)
            if events:
                chosen: slice | list[int] = slice(rows.start, rows.stop) if prefix else own_rows
                own_states = {key: values[chosen] for key, values in states.items()}
                yield Captured(run.order, run.prompt.id, run.sequence, events, own_states)

    def _forward(
        self, pack: Sequence[_Run], bounds: list[int], kept: Sequence[Sequence[int]], compared: Sequence[Sequence[int]]
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
        pack: Sequence[_Run],
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

    def _best(
        self, label: str, final: torch.Tensor, pack: Sequence[_Run], compared: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return self.backbones[label].readout.top2(final)
        except NotFiniteError as error:
            raise self._not_finite(label, "a logit", pack, compared, error.row or 0) from error

    def _not_finite(
        self, label: str, what: str, pack: Sequence[_Run], rows: Sequence[Sequence[int]], row: int
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

    def _margins(
        self,
        final: dict[str, torch.Tensor],
        tokens: Sequence[tuple[int, ...]],
        pack: Sequence[_Run],
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

    def _segment(self, captured: list[Captured], excluded: Sequence[tuple[Prompt, str]]) -> SegmentData:
        width, dtype = next(iter(self.backbones.values())).width, DTYPES[self.settings.dtype]
        return segment_of(
            sorted(captured, key=lambda one: one.order),
            excluded,
            pair=self.pair,
            labels=list(self.backbones),
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


def _consecutive(lengths: Sequence[int]) -> list[range]:
    """Where parts of these lengths lie when they are put one after another."""
    bounds = offsets_of(lengths).tolist()
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
