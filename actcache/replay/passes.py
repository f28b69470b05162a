"""Passes: runs through sequences that serve the events scored in them, for every variant. Knows forwards and edits.

An event is a sequence up to one of its positions, p. What a variant makes of it is what a replay of that sequence alone
gives, cut after p: ``last`` is p, and keys name the event. Three ways lead there, and differ by rounding:

- Variants that leave the first positions alone are *branches*: one pass leaves every block's keys and values, and each
  event of each variant costs the rows from the first position that it changes to p. That is one row through the late
  blocks, where p alone is changed. Variants that change so much that this would cost more take one of the other ways.
- Variants that change rows alike for every event are *whole*: one pass for each, read at every event's position.
- Of all others, and wherever a forward shall be that of one sequence, each event has a pass of its own.

Where each sequence is scored once, the last way is the second. Knows no models and no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from actcache.models.blocks import of_this_thread
from actcache.models.packing import offsets_of, plan_packs
from actcache.models.regimes import Regimes
from actcache.replay.around import Watch
from actcache.replay.batch import Batch
from actcache.replay.edits import HEADS, Edit, Rows, Variant
from actcache.replay.forwards import Forwards, Inside
from actcache.replay.sizes import sizes_of


@dataclass(frozen=True)
class Pass:
    """One run through a sequence, up to the last of the events that it serves.

    Attributes:
        rows: of the states.
        events: their indices, in the order of their positions.
    """

    rows: range
    events: Sequence[int]


@dataclass(frozen=True)
class Work:
    """Passes, and the variants that take them: those that each run them whole, and those that branch off one run."""

    passes: Sequence[Pass]
    whole: Sequence[int]
    branches: Sequence[int]


# Indices of events and variants, [m] each, and [m, D] on the CPU; or [m, 4] float64, where sizes are wanted; or
# [m, 1 + 2 k, D], where the residual stream around modules of k blocks is; or, where the states that enter a block are,
# one for each position of each event's sequence, in order.
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def divide(batch: Batch, regimes: Regimes) -> list[Work]:
    """Which passes a batch takes: events share one where that changes nothing but rounding, and no variant forbids."""
    if batch.mode == "single" and not batch.together:
        together = _passes(batch.spans, batch.spans)
    else:
        together = _passes(batch.spans, [(span.start, regimes.of(len(span))) for span in batch.spans])
    numbers = range(len(batch.variants))
    shares = len(together) < len(batch.spans)
    apart = {number for number in numbers if shares and batch.variants[number].depends_on_event}
    branches: list[int] = []
    # Where the place in the row counts, a row of branches is no place for the last position of a sequence.
    if batch.mode == "packed" and all(regimes.in_row(len(span)) for span in batch.spans):
        once, each = sum(len(one.rows) for one in together), int(batch.lengths.sum())
        of_branches = {n: int((batch.lengths - one.first(batch.lengths)).sum()) for n, one in enumerate(batch.variants)}
        saved = {number: (each if number in apart else once) - of_branches[number] for number in numbers}
        branches = [number for number in numbers if saved[number] > 0]
        if sum(saved[number] for number in branches) <= once:
            branches = []  # the pass that they branch off would cost more than they save
    whole = [number for number in numbers if number not in apart and number not in set(branches)]
    alone = sorted(apart - set(branches))
    works = Work(together, whole, branches), Work(_passes(batch.spans, range(len(batch.spans))), alone, [])
    return [work for work in works if work.whole or work.branches]


def _passes(spans: Sequence[range], of_event: Sequence[Hashable]) -> list[Pass]:
    """One for all events of which ``of_event`` is the same, in the order of their first."""
    groups: dict[Hashable, list[int]] = {}
    for event, group in enumerate(of_event):
        groups.setdefault(group, []).append(event)
    ordered = (sorted(events, key=lambda event: len(spans[event])) for events in groups.values())
    return [Pass(spans[events[-1]], events) for events in ordered]


@torch.no_grad()
def run_pack(forwards: Forwards, batch: Batch, work: Work, pack: range) -> Iterator[Result]:
    """Run some passes in one forward, for each of their variants: every pair of event and variant once."""
    run = PackedPasses(forwards, batch, work.passes[pack.start : pack.stop])
    for number in work.whole:
        yield run.whole(number)
    if work.branches:
        yield from run.branches(work.branches)


class PackedPasses:
    """Passes that share a forward.

    Attributes:
        state: ``[T, D]`` of all passes, which are cut at ``bounds``; ``at`` says where they stand, as rows of each
            pass's last event.
        events: ``[n]``; event i is scored at row ``ends[i]`` of ``state``, and its sequence begins at ``begins[i]``.
    """

    def __init__(self, forwards: Forwards, batch: Batch, passes: Sequence[Pass]) -> None:
        self.forwards, self.batch = forwards, batch
        lengths = torch.tensor([len(one.rows) for one in passes])
        self.bounds = offsets_of(lengths.tolist()).tolist()
        source = torch.cat([torch.arange(one.rows.start, one.rows.stop) for one in passes])
        adjoin = all(one.rows.stop == other.rows.start for one, other in itertools.pairwise(passes))
        rows = batch.rows[passes[0].rows.start : passes[-1].rows.stop] if adjoin else batch.rows[source]
        self.state = rows.to(forwards.backbone.device)
        first = torch.tensor([one.rows.start for one in passes])
        last = torch.tensor([one.events[-1] for one in passes])
        self.at = Rows(
            sequence=last.repeat_interleave(lengths),
            position=source - first.repeat_interleave(lengths),
            source=source,
            lengths=batch.lengths,
            keys=batch.keys,
            prompts=batch.prompts,
            donors=batch.donors,
        )
        self.events = torch.tensor([event for one in passes for event in one.events])
        n_events = torch.tensor([len(one.events) for one in passes])
        self.begins = torch.tensor(self.bounds[:-1]).repeat_interleave(n_events)
        self.ends = self.begins + self.at.lengths[self.events] - 1

    def whole(self, number: int) -> Result:
        """Run all passes with one variant."""
        state, at = self.edited(number)
        if self.batch.sizes:
            return self.sized(number, self.forwards.outputs(state, self.bounds, self.batch.mode))
        if self.batch.entering is not None:
            rows = self.forwards.entering(self.batch.entering, state, self.bounds, self.batch.mode)
            return self.at.sequence, torch.full_like(self.at.sequence, number), rows.cpu()
        distinct, of_event = self.ends.unique_consecutive(return_inverse=True)
        if self.batch.around is not None:
            watch = Watch(self.forwards, self.batch.around, distinct)
            final = self.forwards.final(state, self.bounds, distinct, self.batch.mode, watch.inside)
            hidden = torch.cat([final[:, None], watch.rows()], dim=1)
        else:
            inside = self._inside(self.batch.variants[number], at)
            hidden = self.forwards.final(state, self.bounds, distinct, self.batch.mode, inside)
        return self.events, torch.full_like(self.events, number), hidden[of_event.to(hidden.device)].cpu()

    def edited(self, number: int) -> tuple[torch.Tensor, Rows]:
        """The states that a variant's replay begins with, ``[T, D]``, and where they stand, with what watches its
        edits."""
        at = replace(self.at, watch=self.batch.moves.watch(number, self.events, self.at.sequence[self.ends]))
        return self.batch.variants[number].edit_states(self.state, at), at

    def sized(self, number: int, outputs: torch.Tensor) -> Result:
        """How large a variant's outputs ``[T, D]`` are."""
        spans = zip(self.begins.tolist(), (self.ends + 1).tolist(), strict=True)
        sizes = torch.stack([sizes_of(outputs[begin:end]) for begin, end in spans]).cpu()
        return self.events, torch.full_like(self.events, number), sizes

    def _inside(self, variant: Variant, at: Rows) -> Inside:
        return lambda rows, index: self.editing([(variant, index, at.chosen(rows))])

    def branches(self, numbers: Sequence[int]) -> Iterator[Result]:
        """Run all passes once, and some variants of some events at a time from there, each from the first position that
        it changes on."""
        _, prefix = self.forwards.to_last_keys(self.state, self.bounds, every_block=True)
        row = max(1, self.forwards.backbone.regimes.row(self.batch.budget))
        sequence_of = torch.bucketize(self.ends, torch.tensor(self.bounds[1:]), right=True)
        lengths = self.at.lengths[self.events]
        first = torch.stack([self.batch.variants[number].first(lengths) for number in numbers], dim=1)
        n_rows = lengths[:, None] - first  # [events, variants]
        for some in torch.arange(len(self.events)).split(max(1, row // int(n_rows.max()))):
            for lot in plan_packs(n_rows[some].sum(dim=0).tolist(), row):
                few, of_branches = numbers[lot.start : lot.stop], n_rows[some][:, lot.start : lot.stop]
                bounds = offsets_of(of_branches.flatten().tolist())
                branch = torch.arange(of_branches.numel()).repeat_interleave(of_branches.flatten())
                event, column = some[branch // len(few)], branch % len(few)
                position = first[event, column + lot.start] + torch.arange(len(branch)) - bounds[branch]
                rows = self.begins[event] + position
                at = replace(self.at.chosen(rows), sequence=self.events[event])
                state, events = self.state[rows.to(self.state.device)], self.events[some]
                parts = []
                of_variants = torch.argsort(column, stable=True).split(of_branches.sum(dim=0).tolist())
                for number, index in zip(few, of_variants, strict=True):
                    there = replace(at.chosen(index), watch=self.batch.moves.watch(number, events, events))
                    parts.append((self.batch.variants[number], index, there))
                    on_device = index.to(state.device)
                    state[on_device] = self.batch.variants[number].edit_states(state[on_device], there)
                with self.editing(parts):
                    sequences = sequence_of[event].tolist()
                    hidden = self.forwards.branches(prefix, sequences, position, state, bounds.tolist())
                last = hidden[bounds[1:].to(hidden.device) - 1].cpu()
                # No hook is there while the caller has the word.
                yield events.repeat_interleave(len(few)), torch.tensor(few).repeat(len(some)), last

    @contextmanager
    def editing(self, parts: Sequence[tuple[Variant, torch.Tensor, Rows]], only: int | None = None) -> Iterator[None]:
        """Within this context, forwards apply the edits inside the stack, or those in the block ``only``.

        Each part is a variant, which rows of the flattened batch are its own, and where those stand.
        """
        by_site: dict[tuple[int, str], list[tuple[Edit, torch.Tensor, Rows]]] = {}
        for variant, index, at in parts:
            for layer, edit in variant.inside():
                if only not in (None, layer):
                    continue
                by_site.setdefault((layer, edit.site), []).append((edit, index, replace(at, layer=layer)))
        with ExitStack() as hooks:
            for (layer, site), edits in by_site.items():
                module, hook = self.forwards.site(layer, site), _editing_hook(edits)
                if site == HEADS:
                    handle = module.register_forward_pre_hook(of_this_thread(lambda _, args, hook=hook: hook(args)))
                else:
                    handle = module.register_forward_hook(of_this_thread(lambda _, args, out, hook=hook: hook(out)))
                hooks.callback(handle.remove)
            yield


def _editing_hook(edits: Sequence[tuple[Edit, torch.Tensor, Rows]]) -> Callable[[Any], Any]:
    """What makes of a tensor, or of the first one of a tuple, the edited one."""

    def hook(given: Any) -> Any:
        own = given[0] if isinstance(given, tuple) else given
        flat = own.flatten(0, -2).clone()
        for edit, index, at in edits:
            index = index.to(flat.device)
            flat[index] = edit.apply(flat[index], at)
        edited = flat.view_as(own)
        return (edited, *given[1:]) if isinstance(given, tuple) else edited

    return hook
