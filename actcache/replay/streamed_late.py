"""StreamedLate: a late stack whose blocks are in memory one at a time, and many batches in one pass over them.

What is replayed goes through one block, then through the next one; the states in between lie in memory or in a
temporary file. Knows models and rows; knows no files of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from actcache.errors import InputError
from actcache.finite import first_no_state, said_of_block
from actcache.models.blocks import check_boundary
from actcache.models.checkpoint import Checkpoint
from actcache.models.streamed import Streamed
from actcache.replay.batch import Batch
from actcache.replay.edits import Rows
from actcache.replay.forwards import Forwards, Mode, site_in
from actcache.replay.late_stack import LateStack
from actcache.replay.modes import plan
from actcache.replay.passes import PackedPasses, Result, divide
from actcache.spill import Spill, Waiting


class StreamedLate(LateStack):
    """Blocks ``boundary..L-1`` of one checkpoint, read from its files by every call.

    It gives what the :class:`LateStack` gives that it stands for: bit for bit if ``strict``, to rounding otherwise.
    """

    def __init__(self, streamed: Streamed, boundary: int, mode: Mode, not_packable: str | None) -> None:
        """Of blocks whose mode is known."""
        self._streamed = streamed
        super().__init__(_Forwards(streamed, boundary), mode, not_packable)  # type: ignore[arg-type]

    @classmethod
    def open(
        cls,
        checkpoint: Checkpoint,
        boundary: int,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> StreamedLate:
        """Load the readout, and look at one block of each kind.

        Args:
            checkpoint: whose.
            boundary: first late block, ``0..L-1``.
            dtype: of weights and states; None keeps the checkpoint's own.
            device: where the blocks compute.

        Raises:
            InputError, UnsupportedModelError: as :meth:`LateStack.load`; here what the blocks read is looked at when
                they are there.
        """
        check_boundary(boundary, checkpoint.decoder_config.num_hidden_layers)
        streamed = Streamed(checkpoint, dtype, device, reads_ids=False)
        not_packable = streamed.why_not_packable()
        return cls(streamed, boundary, "single" if not_packable else "packed", not_packable)

    def at(self, boundary: int) -> StreamedLate:
        """The same stack from a later boundary on (errors as :meth:`LateStack.at`)."""
        check_boundary(boundary, self.n_blocks)
        if boundary < self.boundary:
            raise InputError(f"boundary {boundary} is before {self.boundary}, where this late stack begins")
        return StreamedLate(self._streamed, boundary, self.mode, self.not_packable)

    def _whole(self) -> Forwards:
        raise InputError("swapped modules and gradients need blocks that are all in memory: leave out --stream")

    @property
    def device(self) -> torch.device:
        """Where the late blocks are, when they are."""
        return self._streamed.device

    @torch.no_grad()
    def replay_all(
        self, batches: Sequence[Batch], doing: Callable[[str], object] = lambda words: None
    ) -> Iterator[tuple[int, Result]]:
        """Replay batches in one pass over the blocks, each from its boundary on.

        Args:
            batches: prepared by stacks of this checkpoint (:meth:`at`).
            doing: told what is under way (see :meth:`Streamed.pass_over`).

        Yields:
            the number of a batch, and a part of what it gives, as :meth:`LateStack.replay` does.

        Raises:
            NotFiniteError, InputError: see :meth:`LateStack.replay`.
        """
        runs = [run for number, batch in enumerate(batches) for run in self._runs(number, batch)]
        spill, states = Spill(), dict[int, Waiting]()
        first = min((batch.boundary for batch in batches), default=self.n_blocks)
        for index in self._streamed.pass_over(first, doing):
            for number, run in enumerate(runs):
                if run.batch.boundary <= index:
                    state = run.enter() if run.batch.boundary == index else states[number][:]
                    state = run.through(index, state, self._streamed)
                    states[number] = spill.put(state, over=states.get(number))
        for number, run in enumerate(runs):
            events, numbers, values = run.end(states[number][:])
            if not run.batch.sizes and (row := first_no_state(values)) is not None:
                raise self._not_finite(run.batch, int(events[row]), run.batch.variants[run.variant])
            yield run.of_batch, (events, numbers, values)

    def _iterate(self, batch: Batch) -> Iterator[Result]:
        for _, result in self.replay_all([batch]):
            yield result

    def _mode(self, strict: bool) -> Mode:
        return "single" if strict else self.mode

    def _where_not_finite(self, state: torch.Tensor) -> str:
        """In words, which block is the first whose output over one sequence's states ``[T, D]`` is not finite."""
        for index in self._streamed.pass_over(self.boundary):
            state = self._streamed.forward([0, len(state)], state)
            if first_no_state(state) is not None:
                return said_of_block(index)
        return said_of_block(None)

    def _runs(self, number: int, batch: Batch) -> Iterator[_Run]:
        """One for each pack and variant. Nothing branches off a pass here: blocks are read for all of it anyway."""
        regimes = self._streamed.regimes
        for work in divide(replace(batch, mode="single"), regimes):
            lengths = [len(one.rows) for one in work.passes]
            for pack in plan(lengths, batch.mode, regimes, batch.budget):
                packed = PackedPasses(self._forwards, batch, work.passes[pack.start : pack.stop])
                for variant in work.whole:
                    yield _Run(number, batch, packed, variant)


def load_late(
    checkpoint: Checkpoint, boundary: int, *, dtype: torch.dtype, device: str, stream: bool = False
) -> LateStack:
    """The late stack of a checkpoint, whole, or a block at a time if ``stream``."""
    how: dict[str, Any] = {"dtype": dtype, "device": device}
    return StreamedLate.open(checkpoint, boundary, **how) if stream else LateStack.load(checkpoint, boundary, **how)


@dataclass
class _Run:
    """A pack of passes under one variant, on its way."""

    of_batch: int
    batch: Batch
    packed: PackedPasses
    variant: int
    at: Rows | None = None

    def enter(self) -> torch.Tensor:
        """The states that it begins with, ``[T, D]``."""
        state, self.at = self.packed.edited(self.variant)
        return state

    def through(self, index: int, state: torch.Tensor, streamed: Streamed) -> torch.Tensor:
        """What the block that is there makes of ``state``, with the edits inside of it."""
        assert self.at is not None
        every = torch.arange(len(state))
        with self.packed.editing([(self.batch.variants[self.variant], every, self.at)], only=index):
            return streamed.forward(self.packed.bounds, state)

    def end(self, state: torch.Tensor) -> Result:
        """What it gives, from the last block's output."""
        if self.batch.sizes:
            return self.packed.sized(self.variant, state)
        events = self.packed.events
        return events, torch.full_like(events, self.variant), state[self.packed.ends]


class _Forwards:
    """As far as batches and passes ask of :class:`actcache.replay.forwards.Forwards`."""

    def __init__(self, streamed: Streamed, boundary: int) -> None:
        self.backbone, self.boundary = streamed.backbone, boundary

    @property
    def blocks(self) -> list[nn.Module]:
        """The one that is there."""
        return list(self.backbone.blocks)

    def site(self, layer: int, site: str) -> nn.Module:
        """Of the block that is there, which is ``layer``."""
        return site_in(self.backbone.blocks[0], site)
