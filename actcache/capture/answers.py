"""Answers: what checkpoints say to what segments ask, one segment after another or many at once.

Where all checkpoints are in memory, what is asked is computed at once, pack by pack. Where they are not, everything
that segments ask of one checkpoint is answered while it is there, and their rows wait on disk. The answers are the
same. Knows checkpoints and rows; knows no events.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from actcache.capture.asks import Ask, Forward, GoOn, Ran, Score, Steps, T, Whose
from actcache.capture.events import Scored
from actcache.capture.forward import Forwarder, Pack, PackRows, Places, first_wrong, said_of_site
from actcache.capture.residency import Checkpoints
from actcache.capture.search import Proposal, SearchLimits, propose
from actcache.errors import NotFiniteError
from actcache.finite import first_no_state
from actcache.models.regimes import Regimes
from actcache.progress import Told, nobody_told
from actcache.spill import Spill


class _Packed(NamedTuple):
    """A pack, its sequences, and the ask that it is of."""

    pack: Pack
    whose: Sequence[Whose]
    ask: Forward


def _tell_step(told: Told, doing: Callable[[int, int], str], tokens: int, step: int, n_open: int) -> None:
    told(tokens=tokens, doing=doing(step, n_open))


class Answers:
    """Answers steps by these checkpoints."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        limits: SearchLimits,
        regimes: Regimes,
        max_tokens: int,
        between: Callable[[], None] = lambda: None,
        folder: Path | None = None,
        *,
        has_tails: bool = False,
        alone: bool = False,
    ) -> None:
        """By these.

        Args:
            checkpoints: in memory or not.
            limits, regimes, max_tokens: of searches.
            between: called before each forward; may raise.
            folder: where rows wait; None for the system's temporary one.
            has_tails: whether vocabularies differ, so that a masked token may have the best logit.
            alone: see :func:`propose`.
        """
        self._has_tails, self._alone = has_tails, alone
        self.checkpoints, self._limits, self._regimes = checkpoints, limits, regimes
        self._max_tokens, self._between, self._folder = max_tokens, between, folder
        self.n_sequences = self.n_choices = 0  # gone on from, and compared of each checkpoint, in searches

    def complete(self, steps: Sequence[Steps[T]], told: Told = nobody_told) -> Iterator[tuple[int, T]]:
        """Bring these to their ends: the number of each and what it returns, as soon as it is there.

        Raises:
            NotFiniteError: a checkpoint computes NaN or infinity; names it, the sequence and the first block.
            OSError: the disk refuses rows that wait.
        """
        answers: dict[int, Any] = dict.fromkeys(range(len(steps)))
        waiting: dict[int, Ask] = {}
        while answers or waiting:
            for number in list(answers):
                try:
                    waiting[number] = steps[number].send(answers.pop(number))
                except StopIteration as stop:
                    yield number, stop.value
            # What ends a segment comes first, then what all segments have come to.
            for kind in (Score, Forward, GoOn):
                asked = {number: ask for number, ask in waiting.items() if isinstance(ask, kind)}
                if kind is Forward and self.checkpoints.together:  # the rows of one segment at a time
                    asked = dict(itertools.islice(asked.items(), 1))
                if asked:
                    for number, answer in zip(asked, self._answer(kind, list(asked.values()), told), strict=True):
                        del waiting[number]
                        answers[number] = answer
                    break

    def _answer(self, kind: type, asks: list[Any], told: Told) -> list[Any]:
        if kind is Score:
            return self._scored(asks)
        if kind is GoOn:
            return self._proposed(asks, told)
        if self.checkpoints.together:
            return [self._as_read(ask, told) for ask in asks]
        return self._all_packs(asks, told)

    # ---- how sequences go on ----

    def _proposed(self, asks: list[GoOn], told: Told) -> list[list[Proposal]]:
        """Those of one writer and the same readers together."""
        found: list[list[Proposal]] = [[] for _ in asks]
        for labels in dict.fromkeys(ask.labels for ask in asks):
            own = [number for number, ask in enumerate(asks) if ask.labels == labels]
            on_step = partial(_tell_step, told, asks[own[0]].doing)
            proposals = propose(
                self.checkpoints,
                labels,
                [ids for number in own for ids in asks[number].sequences],
                [n for number in own for n in asks[number].n_compared],
                self._limits,
                max_tokens=self._max_tokens,
                alone=self._alone,
                on_step=on_step,
                regimes=self._regimes,
                names=[name for number in own for name in asks[number].names],
                known=[of for number in own for of in asks[number].known],
            )
            self.n_sequences += len(proposals)
            self.n_choices += sum(len(proposal.shared) + 1 for proposal in proposals)
            in_order = iter(proposals)
            for number in own:
                found[number] = list(itertools.islice(in_order, len(asks[number].sequences)))
        return found

    # ---- what forwards make of packs ----

    def _as_read(self, ask: Forward, told: Told) -> Iterator[Ran]:
        """Pack by pack, through every checkpoint."""
        labels = self.checkpoints.labels
        running = {label: self.checkpoints.forwarder(label).run(ask.packs, ask.places) for label in labels}
        for pack, whose in zip(ask.packs, ask.whose, strict=True):
            self._between()
            ran = Ran({}, {}, {})
            for label, of_packs in running.items():
                reader, packed = self.checkpoints.forwarder(label), _Packed(pack, whose, ask)
                found = self._checked(label, reader, packed, next(of_packs))
                ran.rows.update({(site, label, block): rows for (site, block), rows in found.rows.items()})
                ran.final[label] = found.final.cpu()
                if label in ask.read:
                    ran.best[label] = self._best(label, reader, packed, found.final)
            told(tokens=pack.ids.shape[1])
            yield ran

    def _all_packs(self, asks: list[Forward], told: Told) -> list[list[Ran]]:
        """All packs through one checkpoint after another; meanwhile the rows wait on disk."""
        found = [[Ran({}, {}, {}) for _ in ask.packs] for ask in asks]
        of_places: dict[tuple[tuple[str, int], ...], list[tuple[int, int]]] = {}
        for number, ask in enumerate(asks):
            of_places.setdefault(tuple(ask.places), []).extend((number, at) for at in range(len(ask.packs)))
        for label in self._resident_first():
            spill = Spill(self._folder, in_memory=0)
            for places, at in of_places.items():
                packed = [_Packed(asks[n].packs[i], asks[n].whose[i], asks[n]) for n, i in at]
                self._run_all(label, packed, places, [found[n][i] for n, i in at], spill, told)
        self.checkpoints.rest()
        told(tokens=sum(pack.ids.shape[1] for ask in asks for pack in ask.packs))
        return found

    def _run_all(
        self, label: str, packed: Sequence[_Packed], places: Places, found: Sequence[Ran], spill: Spill, told: Told
    ) -> None:
        """One checkpoint over packs; nothing here keeps it when another one is loaded."""
        reader = self.checkpoints.forwarder(label)
        running = reader.run([one.pack for one in packed], places)
        for one, ran in zip(packed, found, strict=True):
            self._between()
            of_pack = self._checked(label, reader, one, next(running))
            if label in one.ask.read:
                ran.best[label] = self._best(label, reader, one, of_pack.final)
            for (site, block), rows in of_pack.rows.items():
                ran.rows[site, label, block] = spill.put(rows)
            ran.final[label] = spill.put(of_pack.final)
            told(doing=f"{label} runs: {one.pack.ids.shape[1]:,} tokens")

    def _resident_first(self) -> list[str]:
        """All labels, the one that costs no load first."""
        return sorted(self.checkpoints.labels, key=lambda label: label != self.checkpoints.resident)

    def _checked(self, label: str, reader: Forwarder, packed: _Packed, found: PackRows) -> PackRows:
        for (site, block), rows in found.rows.items():
            if (row := first_wrong(site, rows)) is not None:
                raise self._not_finite(label, reader, said_of_site(site, block), packed, packed.pack.kept, row)
        if (row := first_no_state(found.final)) is not None:
            raise self._not_finite(label, reader, "the final state", packed, packed.pack.compared, row)
        return found

    def _best(
        self, label: str, reader: Forwarder, packed: _Packed, final: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a checkpoint chooses: the two best tokens and their logits, ``[n, 2]``."""
        try:
            return reader.readout.top2(final)
        except NotFiniteError as error:
            raise self._not_finite(label, reader, "a logit", packed, packed.pack.compared, error.row or 0) from error

    @staticmethod
    def _not_finite(
        label: str, reader: Forwarder, what: str, packed: _Packed, positions: torch.Tensor, row: int
    ) -> NotFiniteError:
        """``row`` counts in these positions of the pack."""
        whose = packed.whose[bisect_right(packed.pack.bounds, int(positions[row])) - 1]
        return reader.not_finite(f"checkpoint {label}, {whose.name}", what, whose.sequence)

    # ---- what pairs of tokens score ----

    def _scored(self, asks: list[Score]) -> list[list[Scored]]:
        """``logit(second) - logit(first)`` of each pair of tokens, and what was never to be chosen there."""
        scored = [[Scored({}, {}) for _ in ask.tokens] for ask in asks]
        tokens = torch.tensor([pair for ask in asks for pair in ask.tokens])
        for label in self._resident_first():
            scores, outvoted = self._scored_by(label, torch.cat([ask.final[label] for ask in asks]), tokens)
            own, own_outvoted = iter((scores[:, 1] - scores[:, 0]).tolist()), iter(outvoted)
            for ask, of_ask in zip(asks, scored, strict=True):
                for whose, of_pair in zip(ask.whose, of_ask, strict=True):
                    of_pair.margins[label] = next(own)
                    if not math.isfinite(of_pair.margins[label]):
                        reader = self.checkpoints.forwarder(label)
                        raise reader.not_finite(f"checkpoint {label}, {whose.name}", "a scored logit", whose.sequence)
                    if self._has_tails:
                        of_pair.outvoted[label] = next(own_outvoted)
        self.checkpoints.rest()
        labels = self.checkpoints.labels
        return [
            [Scored({label: one.margins[label] for label in labels}, one.outvoted) for one in of_ask]
            for of_ask in scored
        ]

    def _scored_by(self, label: str, final: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """Logits of pairs of tokens ``[n, 2]``, and what was never to be chosen (see :class:`Scored`)."""
        readout = self.checkpoints.readout(label)
        # One by one, so that it does not depend on what else is asked for.
        outvoted = torch.cat([readout.outvoted(row) for row in final.split(1)]).tolist() if self._has_tails else []
        return readout.scores(final, tokens), outvoted
