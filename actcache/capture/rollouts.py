"""Rollouts: what checkpoints write after prompts, forwarded through all of them, and the events that lie on it.

A checkpoint of a pair writes; a capture forward of every checkpoint over what it wrote decides. Where the writer's own
choices in that forward are others than the tokens proposed, it goes on from what it chose there. So one sequence per
prompt and writer serves all events on it:

- of the support ``rollouts`` (supports.py), where pt and it each write a fixed number of tokens;
- of first divergences of several pairs, where the pt of each pair writes until all of its partners have diverged: a
  base that is common to all pairs runs once per prompt.

Sequences of one prompt have their beginning in common, up to where the writers part. It is stored with each of them: a
reader, a replay or a compaction takes a sequence as one run of rows, and packs round the two beginnings differently.
Where a model computes longer sequences otherwise (models/regimes.py), each regime has a sequence of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from actcache.capture.asks import Forward, Ran, Score, Steps, proposals, ran, scored
from actcache.capture.decide import MAX_ROUNDS, Decider, consecutive
from actcache.capture.events import Captured, Event, Excluded, Scored
from actcache.capture.forward import Pack
from actcache.capture.search import Outcome
from actcache.capture.supports import ROLLOUTS, Chosen, choose, first_disagreement
from actcache.capture.token_class import FORMAT, TokenClasses, is_marker
from actcache.progress import Told
from actcache.prompts import Prompt
from actcache.schema import CHOSEN_KINDS, FIRST_DIVERGENCE, ROLES
from actcache.store import SegmentData

_DIVERGED, _UNDECIDED = Outcome.DIVERGED.value, "undecided"


@dataclass(frozen=True, eq=False)
class _Leg:
    """A capture forward over a rollout, or the beginning of one, which decides its last steps: those of one regime.

    Attributes:
        sequence: token ids.
        first: the first of these steps.
        choices: of the checkpoints in pairs, by label: a token for each step.
        gaps: by which its logit leads.
        ran: the forward, of whose kept rows ``rows`` are of the sequence, or of these steps alone where no others are
            kept, and of whose final states those from ``compared`` on are of these steps.
    """

    sequence: list[int]
    first: int
    choices: dict[str, list[int]]
    gaps: dict[str, list[float]]
    ran: Ran
    rows: range
    compared: int

    def final_of(self, row: int) -> dict[str, torch.Tensor]:
        """The last block's output of every checkpoint at one of these steps, ``[D]`` by label."""
        return self.ran.final_of(self.compared + row)


@dataclass(frozen=True, eq=False)
class _Rollout:
    """What one checkpoint writes after one prompt, on its way.

    Attributes:
        index: of the prompt.
        written: the writer's tokens so far.
        legs: forwards that decided for good, one for each regime.
        parted: the writer's partners that have chosen otherwise once, in these legs.
        is_open: whether the writer goes on before the next forward.
        expected: partners that the next forward should see part from the writer: those that the last one saw part from
            what is kept of it, and those that the search says.
        limit: why the search goes no further, where it said so.
        n_rounds: how often in a row the forward has contradicted what was proposed.
        ended: why it ended; None until then.
    """

    index: int
    prompt: Prompt
    ids: list[int]
    writer: str
    written: list[int] = field(default_factory=list)
    legs: tuple[_Leg, ...] = ()
    parted: frozenset[str] = frozenset()
    is_open: bool = True
    expected: frozenset[str] = frozenset()
    limit: str | None = None
    n_rounds: int = 0
    ended: str | None = None

    @property
    def name(self) -> str:
        return f"prompt {self.prompt.id!r}"

    @property
    def sequence(self) -> list[int]:
        return self.ids + self.written

    @property
    def decided(self) -> int:
        """How many steps the legs have decided."""
        return sum(len(leg.choices[self.writer]) for leg in self.legs)

    def choices(self, label: str) -> list[int]:
        """A checkpoint's at every step that is decided."""
        return [token for leg in self.legs for token in leg.choices[label]]

    def leg_of(self, step: int) -> _Leg:
        return next(leg for leg in reversed(self.legs) if leg.first <= step)


@dataclass(frozen=True)
class _Placed:
    """An event to be, where it is."""

    rollout: _Rollout
    pair: tuple[str, str]
    chosen: Chosen

    @property
    def leg(self) -> _Leg:
        return self.rollout.leg_of(self.chosen.step)

    @property
    def row(self) -> int:
        """Of its leg's steps."""
        return self.chosen.step - self.leg.first

    # What an error names it by.

    @property
    def name(self) -> str:
        return self.rollout.name

    @property
    def sequence(self) -> list[int]:
        return self.leg.sequence


class Rollouts:
    """The rollouts of the prompts of a segment, by a capture's models."""

    def __init__(self, decider: Decider) -> None:
        """With these models; its settings tell which support."""
        self._decider, self._limits, self._regimes = decider, decider.limits, decider.regimes
        self._of_both = decider.settings.support == ROLLOUTS
        writers = (label for pair in decider.pairs for label in (pair if self._of_both else pair[:1]))
        self._writers = list(dict.fromkeys(writers))
        # Whom a writer writes until they have parted from it; nobody's choice ends the rollouts of a fixed length.
        self._partners = {
            writer: () if self._of_both else tuple(pair[1] for pair in decider.pairs if pair[0] == writer)
            for writer in self._writers
        }
        self._classes = TokenClasses()
        self._text = functools.cache(lambda token: decider.decode([token]))

    def run(self, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]], told: Told) -> Steps[SegmentData]:
        """Everything that one segment holds."""
        going = [
            _Rollout(index, prompt, list(ids), writer, n_rounds=self._decider.first_round(prompt))
            for index, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
            for writer in self._writers
        ]
        done: list[_Rollout] = []
        n_left = [len(self._writers)] * len(prompts)
        while going:
            proposed = yield from self._propose(going)
            decided = [rollout for rollout in proposed if rollout.ended is not None]
            proposed = [rollout for rollout in proposed if rollout.ended is None]
            packed = [
                [proposed[i] for i in pack]
                for pack in self._regimes.packs([len(one.sequence) for one in proposed], self._decider.pack_tokens)
            ]
            found = yield from self._forward(packed)
            for pack, of_pack in zip(packed, found, strict=True):
                decided += self._decide_pack(pack, of_pack)
            going = [rollout for rollout in decided if rollout.ended is None]
            for rollout in decided:
                if rollout.ended is not None:
                    done.append(rollout)
                    n_left[rollout.index] -= 1
                    told(int(n_left[rollout.index] == 0))
        done.sort(key=lambda one: (one.index, self._writers.index(one.writer)))
        return (yield from self._segment(done))

    # ---- what is written ----

    def _propose(self, rollouts: Iterable[_Rollout]) -> Steps[list[_Rollout]]:
        """Have the writers of open rollouts go on; all of them, those of one regime together."""
        found: list[_Rollout] = []
        together: dict[tuple[str, ...], list[_Rollout]] = {}
        for rollout in rollouts:
            if rollout.is_open:
                known = rollout.parted | rollout.expected
                partners = [label for label in self._partners[rollout.writer] if label not in known]
                together.setdefault((rollout.writer, *partners), []).append(rollout)
            else:
                found.append(rollout)
        for labels, own in together.items():
            found += yield from self._written(labels, own)
        return sorted(
            found,
            key=lambda one: (self._regimes.of(len(one.sequence)), one.index, self._writers.index(one.writer)),
        )

    def _written(self, labels: tuple[str, ...], rollouts: list[_Rollout]) -> Steps[list[_Rollout]]:
        writer, *partners = labels
        proposed = yield from proposals(
            self._decider.going_on(
                labels,
                [rollout.sequence for rollout in rollouts],
                [len(rollout.written) for rollout in rollouts],
                [rollout.prompt for rollout in rollouts],
                lambda step, n_open: f"{writer} writes: step {step} of at most {self._limits.max_new}, {n_open} go on",
            )
        )
        found: list[_Rollout] = []
        for rollout, proposal in zip(rollouts, proposed, strict=True):
            parted = {label: n for label, n in zip(partners, proposal.parted, strict=True) if n is not None}
            expected, shared, limit = rollout.expected | parted.keys(), proposal.shared, None
            if partners and proposal.outcome not in (Outcome.DIVERGED, Outcome.OPEN):
                limit = proposal.outcome.value
                if not expected:
                    found.append(replace(rollout, ended=limit))
                    continue
                shared = shared[: max(parted.values(), default=0)]  # what follows the last divergence serves no event
            written = [*rollout.written, *shared]
            found.append(replace(rollout, written=written, is_open=False, expected=expected, limit=limit))
        return found

    # ---- what the capture forward decides ----

    def _forward(self, packed: Sequence[Sequence[_Rollout]]) -> Steps[Any]:
        """One forward of every checkpoint over each of these packs."""
        prefix = self._decider.settings.row_selection == "prefix"
        packs = []
        for pack in packed:
            # Positions whose next token is compared: from the last prompt token, or the first one of this regime, on.
            compared = [range(len(one.ids) + one.decided - 1, len(one.sequence)) for one in pack]
            kept = [range(len(one.sequence)) for one in pack] if prefix else compared
            packs.append(Pack.of([one.sequence for one in pack], kept, compared))
        decider = self._decider
        return (yield from ran(Forward(packs, packed, decider.settings.places, decider.paired)))

    def _decide_pack(self, pack: Sequence[_Rollout], found: Ran) -> list[_Rollout]:
        """How each of these rollouts goes on."""
        compared_of = consecutive([len(one.written) + 1 - one.decided for one in pack])
        prefix = self._decider.settings.row_selection == "prefix"
        rows_of = consecutive([len(one.sequence) for one in pack]) if prefix else compared_of
        decided = []
        for rollout, rows, steps in zip(pack, rows_of, compared_of, strict=True):
            own = slice(steps.start, steps.stop)
            gaps = {label: logits[own, 0] - logits[own, 1] for label, (_, logits) in found.best.items()}
            leg = _Leg(
                rollout.sequence,
                rollout.decided,
                {label: ids[own, 0].tolist() for label, (ids, _) in found.best.items()},
                {label: gap.tolist() for label, gap in gaps.items()},
                *(found, rows, steps.start),
            )
            decided.append(self._decide(rollout, leg))
        return decided

    def _decide(self, rollout: _Rollout, leg: _Leg) -> _Rollout:
        """The rollout with this leg, ended or to be gone on with in the next regime; or without it, where the forward
        contradicts what was proposed."""
        own, n = leg.choices[rollout.writer], len(rollout.written)
        partners = self._partners[rollout.writer]

        def parted_by(n_steps: int) -> frozenset[str]:
            return frozenset(label for label in partners if leg.choices[label][:n_steps] != own[:n_steps])

        outcome = None
        for step, token in enumerate(own, start=rollout.decided):
            if step < n and token == rollout.written[step]:
                continue
            outcome = self._limits.after_agreeing(token, len(rollout.ids) + step, step + 1)
            if step < n:
                self._decider.correct(rollout.prompt)
                seen = parted_by(step - rollout.decided + 1)
                return self._again(rollout, rollout.written[:step], token if outcome is None else None, seen)
        parted = rollout.parted | parted_by(len(own))
        confirmed = replace(rollout, legs=(*rollout.legs, leg), parted=parted)
        if partners and parted.issuperset(partners):
            return replace(confirmed, ended=_DIVERGED)
        if outcome is not None:
            return replace(confirmed, ended=outcome.value)
        if rollout.n_rounds >= MAX_ROUNDS:
            return replace(confirmed, ended=_UNDECIDED)
        if rollout.limit is not None and rollout.expected <= parted:
            return replace(confirmed, ended=rollout.limit)
        length = len(leg.sequence)
        if length == self._regimes.last(length):
            onwards = replace(confirmed, expected=frozenset(), limit=None, n_rounds=0)
            return replace(onwards, written=[*rollout.written, own[-1]], is_open=True)
        return self._again(rollout, rollout.written, own[-1], parted_by(len(own)))

    def _again(self, rollout: _Rollout, written: list[int], token: int | None, seen: frozenset[str]) -> _Rollout:
        """Another round: from what the forward chose; or over what it confirmed, where that is the end, or where
        rounding has contradicted it so often that it would go on for ever."""
        n_rounds, partners = rollout.n_rounds + 1, self._partners[rollout.writer]
        has_all = bool(partners) and (rollout.parted | seen).issuperset(partners)
        goes_on = token is not None and n_rounds < MAX_ROUNDS and not has_all
        more = [token] if goes_on and token is not None else []
        again = replace(rollout, expected=seen, limit=None, n_rounds=n_rounds)
        return replace(again, written=[*written, *more], is_open=goes_on)

    # ---- which events there are ----

    def _segment(self, rollouts: list[_Rollout]) -> Steps[SegmentData]:
        placed = [
            _Placed(rollout, pair, chosen)
            for rollout in rollouts
            for pair in self._decider.pairs
            if rollout.legs
            for chosen in self._chosen(rollout, pair)
        ]
        of_each = yield from self._scored(placed)
        excluded: dict[int, list[Excluded]] = {}
        events: dict[int, list[tuple[_Placed, Event]]] = {}
        for one, of_event in zip(placed, of_each, strict=True):
            rollout, pair = one.rollout, one.pair
            if one.chosen.kind in CHOSEN_KINDS and not of_event.margins[pair[0]] < 0 < of_event.margins[pair[1]]:
                excluded.setdefault(rollout.index, []).append(Excluded(rollout.prompt, "tie", pair))
            else:
                events.setdefault(rollout.index, []).append((one, self._event(one, of_event)))
        for rollout in rollouts:
            found = {one.pair for one, _ in events.get(rollout.index, ())}
            found |= {one.pair for one in excluded.get(rollout.index, ())}
            for pair in self._decider.pairs:
                if pair[0] == rollout.writer and pair not in found:
                    left_out = Excluded(rollout.prompt, rollout.ended or _UNDECIDED, pair)
                    excluded.setdefault(rollout.index, []).append(left_out)
        captured = [
            self._captured(rollout, leg, own)
            for rollout in rollouts
            for leg in rollout.legs
            if (own := [event for one, event in events.get(rollout.index, ()) if one.leg is leg])
        ]
        return self._decider.segment(captured, [one for _, of in sorted(excluded.items()) for one in of])

    def _chosen(self, rollout: _Rollout, pair: tuple[str, str]) -> list[Chosen]:
        """The events of a pair on a rollout, which another pair may own."""
        if rollout.writer not in (pair if self._of_both else pair[:1]):
            return []
        first, second = (rollout.choices(label) for label in pair)
        if not self._of_both:
            at = first_disagreement(first, second)
            return [] if at is None else [Chosen(FIRST_DIVERGENCE, at, (first[at], second[at]))]
        return choose(
            ROLES[pair.index(rollout.writer)],
            rollout.prompt.id,
            first,
            second,
            n_history=len(rollout.written) + (rollout.ended == Outcome.ENDED.value),
            is_format=lambda token: self._classes.of(self._text(token), special=self._is_special(token)) == FORMAT,
            is_marker=lambda token: is_marker(self._text(token)),
        )

    def _is_special(self, token: int) -> bool:
        return token in self._decider.special

    def _scored(self, placed: list[_Placed]) -> Steps[list[Scored]]:
        """What every checkpoint makes of each event's two tokens."""
        if not placed:
            return []
        states = [one.leg.final_of(one.row) for one in placed]
        final = {label: torch.stack([state[label] for state in states]) for label in self._decider.labels}
        return (yield from scored(Score(final, [one.chosen.tokens for one in placed], placed)))

    @staticmethod
    def _event(one: _Placed, of_event: Scored) -> Event:
        rollout, chosen, leg = one.rollout, one.chosen, one.leg
        return Event(
            position=len(rollout.ids) - 1 + chosen.step,
            kind=chosen.kind,
            pair=one.pair,
            tokens=chosen.tokens,
            gaps=tuple(leg.gaps[label][one.row] for label in one.pair),
            scored=of_event,
            final=leg.final_of(one.row),
            step=chosen.step,
            proposed_step=chosen.step,
            carried=rollout.prompt.carried,
        )

    def _captured(self, rollout: _Rollout, leg: _Leg, events: list[Event]) -> Captured:
        events.sort(key=lambda event: event.position)
        prefix = self._decider.settings.row_selection == "prefix"
        own = None if prefix else [event.step - leg.first for event in events]
        rows = leg.ran.rows_of(leg.rows, own)
        return Captured(rollout.index, rollout.prompt.id, leg.sequence, events, rows)
