"""Passes: runs through sequences that serve the events scored in them, for every variant. Knows forwards and edits.

An event is a sequence up to one of its positions, p. What a variant makes of it is what a replay of that sequence alone
gives, cut after p: ``last`` is p, and keys name the event. Three ways lead there, and differ by rounding:

- Variants that change nothing before p are *branches*: one pass leaves every block's keys and values, and each event of
  each variant costs one row through the late blocks.
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
from torch import nn

from actcache.models.blocks import of_this_thread
from actcache.models.packing import offsets_of
from actcache.models.regimes import Regimes
from actcache.replay.batch import Batch
from actcache.replay.edits import Edit, Rows, Variant
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


# Indices of events and variants, [m] each, and [m, D] on the CPU; or [m, 4] float64, where sizes are wanted.
Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def divide(batch: Batch, regimes: Regimes) -> list[Work]:
    """Which passes a batch takes: events share one where that changes nothing but rounding, and no variant forbids."""
    if batch.mode == "single":
        together = _passes(batch.spans, batch.spans)
    else:
        together = _passes(batch.spans, [(span.start, regimes.of(len(span))) for span in batch.spans])
    numbers = range(len(batch.variants))
    shares = len(together) < len(batch.spans)
    branches: list[int] = []
    # Where the place in the row counts, a row of branches is no place for the last position of a sequence.
    if batch.mode == "packed" and all(regimes.in_row(len(span)) for span in batch.spans):
        branches = [number for number in numbers if batch.variants[number].at_last_only]
        if len(branches) < 2 and not (shares and any(batch.variants[number].edits for number in branches)):
            branches = []  # nothing to share
    others = [number for number in numbers if number not in set(branches)]
    apart = [number for number in others if shares and batch.variants[number].depends_on_event]
    whole = [number for number in others if number not in set(apart)]
    works = Work(together, whole, branches), Work(_passes(batch.spans, range(len(batch.spans))), apart, [])
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
        distinct, of_event = self.ends.unique_consecutive(return_inverse=True)
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
        """Run all passes once, and some variants of some events' last positions at a time from there."""
        _, prefix = self.forwards.to_last_keys(self.state, self.bounds, every_block=True)
        row = max(1, self.forwards.backbone.regimes.row(self.batch.budget))
        sequence_of = torch.bucketize(self.ends, torch.tensor(self.bounds[1:]), right=True)
        for some in torch.arange(len(self.events)).split(row):
            events, ends = self.events[some], self.ends[some]
            at = replace(self.at.chosen(ends), sequence=events)
            end_rows = self.state[ends.to(self.state.device)]
            step = max(1, row // len(some))
            for few in (numbers[first : first + step] for first in range(0, len(numbers), step)):
                places = [replace(at, watch=self.batch.moves.watch(number, events, events)) for number in few]
                variants = [self.batch.variants[number] for number in few]
                edited = [variant.edit_states(end_rows, place) for variant, place in zip(variants, places, strict=True)]
                tokens = torch.arange(len(some) * len(few)).view(len(some), len(few))
                with self.editing(list(zip(variants, tokens.T, places, strict=True))):
                    hidden = self.forwards.branches(
                        prefix,
                        sequence_of[some].repeat_interleave(len(few)).tolist(),
                        at.position.repeat_interleave(len(few)),
                        torch.stack(edited, dim=1).flatten(0, 1),
                    )
                # No hook is there while the caller has the word.
                yield events.repeat_interleave(len(few)), torch.tensor(few).repeat(len(some)), hidden.cpu()

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
                hook = of_this_thread(_editing_hook(edits))
                hooks.callback(self.forwards.site(layer, site).register_forward_hook(hook).remove)
            yield


def _editing_hook(edits: Sequence[tuple[Edit, torch.Tensor, Rows]]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        flat = own.flatten(0, -2).clone()
        for edit, index, at in edits:
            index = index.to(flat.device)
            flat[index] = edit.apply(flat[index], at)
        edited = flat.view_as(own)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook
