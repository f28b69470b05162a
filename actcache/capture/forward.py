"""What a capture asks of one checkpoint: plain forwards over packs of sequences, and the rows gathered on their way.

A checkpoint that is in memory runs pack after pack. One that is not may bring all packs through one block after
another. Both give the same rows: a capture does not know which it has. Knows backbones and rows; knows no events and no
files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from actcache.capture.decode import CachedBatch, Decoding, Found, decoding_of
from actcache.errors import NotFiniteError
from actcache.finite import first_no_state, first_not_finite, not_finite
from actcache.models.backbone import Backbone
from actcache.models.blocks import find_site
from actcache.models.gather import gather_rows
from actcache.models.packing import plan_packs
from actcache.models.readout import Readout
from actcache.models.regimes import Regimes
from actcache.store.layout import STATE

Places = Sequence[tuple[str, int]]
"""Sites and their blocks: the block's input, or what its attention or MLP gives."""


@dataclass(frozen=True)
class Pack:
    """Sequences that share one forward.

    Attributes:
        ids: ``[1, T]`` int64 on the CPU, one sequence after another.
        bounds: ``[n + 1]``, where each sequence begins.
        kept: ``[n_kept]`` int64 on the CPU: positions in the pack whose rows are wanted at each site.
        compared: ``[n_compared]`` int64 on the CPU: those whose final state is wanted.
    """

    ids: torch.Tensor
    bounds: list[int]
    kept: torch.Tensor
    compared: torch.Tensor

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]], kept: Sequence[Sequence[int]], compared: Sequence[Sequence[int]]
    ) -> Pack:
        """Of sequences (token ids); ``kept`` and ``compared`` give the positions of each, counted in itself."""
        bounds = [0]
        for sequence in sequences:
            bounds.append(bounds[-1] + len(sequence))

        def placed(positions: Sequence[Sequence[int]]) -> torch.Tensor:
            every = [start + one for start, own in zip(bounds, positions, strict=False) for one in own]
            return torch.tensor(every, dtype=torch.int64)

        ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
        return cls(ids[None], bounds, placed(kept), placed(compared))


@dataclass(frozen=True)
class PackRows:
    """What one checkpoint makes of a pack.

    Attributes:
        rows: by site and block: ``[n_kept, D]`` on the CPU, in the checkpoint's dtype.
        final: ``[n_compared, D]``, the last block's output before the final norm; where the checkpoint computes.
    """

    rows: dict[tuple[str, int], torch.Tensor]
    final: torch.Tensor


class Forwarder(Protocol):
    """One checkpoint, as a capture runs it."""

    @property
    def readout(self) -> Readout:
        """Final norm and head."""

    @property
    def regimes(self) -> Regimes:
        """Which sequences may share a forward."""

    @property
    def backbone(self) -> Backbone | None:
        """All of its blocks, where they are in memory at once: what decodes with a cache."""

    @property
    def guesses(self) -> bool:
        """Whether what it writes are guesses, which it must read itself."""

    def why_not_packable(self) -> str | None:
        """The reason why packs of several sequences are not exact, or None; found by forwards."""

    def run(self, packs: Sequence[Pack], places: Places) -> Iterator[PackRows]:
        """A plain forward over each pack, in order; ``final`` is the model's own, bit for bit, of a pack of one."""

    def write(
        self, sequences: Sequence[Sequence[int]], n_new: Sequence[int], end_ids: frozenset[int]
    ) -> list[list[int]]:
        """What it greedily goes on with after each sequence, as a proposal: at least one token, and as many as are
        cheap at once, of the ``n_new`` (1 or more) that are asked for; none after one of ``end_ids``.

        Raises:
            NotFiniteError: a logit is not finite; ``row`` is the sequence's number.
        """

    def not_finite(self, whose: str, what: str, ids: Sequence[int]) -> NotFiniteError:
        """The error that names the first block of which ``what`` is not finite for this sequence."""


class Resident:
    """A checkpoint whose blocks are all in memory."""

    guesses = False

    def __init__(
        self, backbone: Backbone, max_tokens: int = 4096, say: Callable[[str], object] = lambda line: None
    ) -> None:
        """Of this backbone, which decodes batches of at most so many prompt tokens, padding among them; ``say`` is told
        where it cannot decode in padded batches."""
        self.backbone, self._max_tokens, self._say = backbone, max_tokens, say
        self.readout, self.regimes = backbone.readout, backbone.regimes

    @functools.cached_property
    def decoding(self) -> Found:
        """How it decodes; found by forwards."""
        found = decoding_of(self.backbone)
        if found.decoding is Decoding.EVEN:
            self._say(f"searches share a batch where their prompts are of one length: {found.reason}")
        elif found.decoding is Decoding.FULL:
            self._say(f"the search goes by full forwards: {found.reason}")
        return found

    def why_not_packable(self) -> str | None:
        """As :class:`Forwarder`."""
        return self.backbone.why_not_packable()

    def run(self, packs: Sequence[Pack], places: Places) -> Iterator[PackRows]:
        """As :class:`Forwarder`: one after another, each as it is asked for."""
        for pack in packs:
            rows, hidden = forward_and_gather(self.backbone, pack.ids, pack.bounds, places, pack.kept)
            yield PackRows(rows, gather_rows(hidden, pack.compared))

    def write(
        self, sequences: Sequence[Sequence[int]], n_new: Sequence[int], end_ids: frozenset[int]
    ) -> list[list[int]]:
        """As :class:`Forwarder`: all that is asked for."""
        written: list[list[int]] = [[] for _ in sequences]
        lengths = [len(ids) + n for ids, n in zip(sequences, n_new, strict=True)]
        order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
        cached = [number for number in order if self._stays_cached(lengths[number])]
        first = [len(sequences[number]) for number in cached]
        even = self.decoding.decoding is Decoding.EVEN
        kinds = [company(self.regimes, len(sequences[n]), lengths[n], even=even) for n in cached]
        for batch in plan_packs(first, self._max_tokens, padded=True, kinds=kinds):
            self._write_cached([cached[i] for i in batch], sequences, n_new, end_ids, written)
        for number in order:
            if not self._stays_cached(lengths[number]):
                self._write_alone(number, sequences[number], n_new[number], end_ids, written[number])
        return written

    def not_finite(self, whose: str, what: str, ids: Sequence[int]) -> NotFiniteError:
        """As :class:`Forwarder`."""
        return not_finite(whose, what, self.backbone, ids)

    def _stays_cached(self, length: int) -> bool:
        most = self.regimes.longest_cached
        return self.decoding.decoding is not Decoding.FULL and (most is None or length <= most)

    @torch.no_grad()
    def _write_cached(
        self,
        numbers: list[int],
        sequences: Sequence[Sequence[int]],
        n_new: Sequence[int],
        end_ids: frozenset[int],
        written: list[list[int]],
    ) -> None:
        """One batch; a sequence leaves it with its last token."""
        batch = CachedBatch(self.backbone, [sequences[number] for number in numbers])
        hidden = batch.begin()
        while True:
            tokens = self._choose(hidden, numbers)
            for number, token in zip(numbers, tokens, strict=True):
                written[number].append(token)
            kept = [
                row
                for row, (number, token) in enumerate(zip(numbers, tokens, strict=True))
                if token not in end_ids and len(written[number]) < n_new[number]
            ]
            if not kept:
                return
            if len(kept) < len(numbers):
                batch.keep(kept)
                numbers = [numbers[row] for row in kept]
            hidden = batch.feed(torch.tensor([tokens[row] for row in kept])[:, None])[:, 0]

    def _write_alone(
        self, number: int, sequence: Sequence[int], n_new: int, end_ids: frozenset[int], written: list[int]
    ) -> None:
        """A forward over the whole sequence for each token."""
        while len(written) < n_new and not (written and written[-1] in end_ids):
            ids = [*sequence, *written]
            pack = Pack.of([ids], [[]], [[len(ids) - 1]])
            (rows,) = self.run([pack], ())
            written += self._choose(rows.final, [number])

    def _choose(self, hidden: torch.Tensor, numbers: Sequence[int]) -> list[int]:
        try:
            return self.readout.best(hidden).tolist()
        except NotFiniteError as error:
            raise NotFiniteError(str(error), row=numbers[error.row or 0]) from error


def company(regimes: Regimes, first: int, last: int, *, even: bool) -> tuple[int, int]:
    """Sequences of one company may share a padded batch while they grow from ``first`` to ``last`` tokens; those that
    must be ``even`` have one length."""
    return regimes.of(first), first if even or not regimes.in_row(last) else 0


def first_wrong(site: str, rows: torch.Tensor) -> int | None:
    """The first row that is not finite, or of states is none (see :func:`actcache.finite.are_states`)."""
    return first_no_state(rows) if site == STATE else first_not_finite(rows)


def said_of_site(site: str, block: int) -> str:
    """What an error calls a row."""
    return f"the state at boundary {block}" if site == STATE else f"the {site} of block {block}"


@torch.no_grad()
def forward_and_gather(
    backbone: Backbone,
    ids: torch.Tensor,
    bounds: Sequence[int],
    places: Places,
    row_ids: torch.Tensor,
) -> tuple[dict[tuple[str, int], torch.Tensor], torch.Tensor]:
    """One plain forward; the rows at each site are gathered as its block is entered, or its module is left.

    Args:
        backbone: the checkpoint.
        ids: ``[1, T]`` int64.
        bounds: ``[n + 1]``, where each sequence begins.
        places: each a site and a block.
        row_ids: ``[n_rows]`` int64 on the CPU, rows of the ``[T, D]`` state.

    Returns:
        rows of every site, ``[n_rows, D]`` on the CPU, and the last block's output ``[T, D]`` on the device.
    """
    with gathering(lambda block: backbone.blocks[block], places, row_ids, backbone.device) as gathered:
        hidden = backbone.forward(bounds, input_ids=ids.to(backbone.device))
    return gathered, hidden


@contextmanager
def gathering(
    block_at: Callable[[int], nn.Module], places: Places, row_ids: torch.Tensor, device: torch.device
) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """Within this context a forward leaves the rows at these places in what is yielded; they are there at its end.

    Args:
        block_at: gives a block by its number.
        places, row_ids: as :func:`forward_and_gather`.
        device: where the blocks are.
    """
    gathered: dict[tuple[str, int], torch.Tensor] = {}
    on_cuda = device.type == "cuda"

    def keep(place: tuple[str, int], values: torch.Tensor) -> None:
        # Straight into page-locked memory on CUDA: the copy is queued on the stream and the forward goes on.
        rows = values[0]
        out = torch.empty(len(row_ids), rows.shape[1], dtype=rows.dtype, pin_memory=on_cuda)
        gathered[place] = gather_rows(rows, row_ids, out)

    def hooked(place: tuple[str, int]) -> RemovableHandle:
        site, block = place
        if site == STATE:
            return block_at(block).register_forward_pre_hook(
                lambda module, args, kwargs: keep(place, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        return find_site(block_at(block), site).register_forward_hook(
            lambda module, args, output: keep(place, output if isinstance(output, torch.Tensor) else output[0])
        )

    handles = [hooked(place) for place in places]
    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()
    if on_cuda:
        torch.cuda.current_stream(device).synchronize()
