"""Streamed: a checkpoint whose blocks are in memory one at a time, the next one being loaded while one computes.

Its forward is cut at every block: states enter a block, and those that leave it enter the next one, when that is there.
All of it runs in the model's own forward, with stand-ins where the other blocks were, so that masks, positions and
whatever else a block is given are the model's. Knows checkpoints and tensors; knows no rows and no events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from actcache.models.backbone import Backbone
from actcache.models.blocks import StateSource, entered_from
from actcache.models.checkpoint import Checkpoint
from actcache.models.parts import Frame
from actcache.models.probe import check_text_alone, probe_block, probe_frame


class Streamed:
    """Embeddings and blocks of a causal LM, whose blocks are read from its files whenever they are run.

    In memory are what stands around the blocks, and two blocks: the one that computes and the next one. One thread at
    a time may use it.

    Attributes:
        checkpoint: whose.
        backbone: the decoder, whose ``blocks`` is the one block that is in its place.
        readout, regimes, n_blocks, width, dtype, max_positions, config: as of a :class:`Backbone`.
        n_bytes: bytes that have been read from the files for blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype | None,
        device: str | torch.device = "cpu",
        *,
        reads_ids: bool = True,
        proven: set[int] | None = None,
    ) -> None:
        """Load what stands around the blocks.

        Args:
            checkpoint: whose.
            dtype: of weights and states; None keeps the checkpoint's own.
            device: where to compute.
            reads_ids: whether the first block is run, from token ids; otherwise states are given to later ones only.
            proven: blocks that were looked at before, as this checkpoint was loaded; those looked at now are added.

        Raises:
            UnsupportedModelError: the model's blocks are not given one residual stream.
            InputError: see :func:`actcache.models.checkpoint.load_weights`.
        """
        self.checkpoint, self.device, self._reads_ids = checkpoint, torch.device(device), reads_ids
        self._frame = Frame.load(checkpoint, dtype, reads_ids=reads_ids)
        self._frame.model.to(self.device)  # type: ignore[arg-type]
        with checkpoint.named():
            if reads_ids:
                check_text_alone(self._frame.model)
            probe_frame(self._frame.model, self._frame.source)
            self.backbone = backbone = Backbone(self._frame.model)
        self.readout, self.regimes = backbone.readout, backbone.regimes
        self.n_blocks, self.width, self.dtype = backbone.n_blocks, backbone.width, backbone.dtype
        self.max_positions, self.config = backbone.max_positions, backbone.config
        self.n_bytes = 0
        self._entry = StateSource()  # of block 0, where it is given states
        self._sizes = self._frame.block_bytes()
        self._proven = set() if proven is None else proven

    def pass_over(self, first: int = 0, doing: Callable[[str], object] = lambda words: None) -> Iterator[int]:
        """Have each block in its place, from ``first`` on; each is gone when the next one is asked for.

        Args:
            first: block to begin with.
            doing: told, for people to read, which block is there, what has been read for the pass, and how fast.

        Yields:
            the number of the block that is there.

        Raises:
            UnsupportedModelError: a block reads more than the state that enters it.
            InputError: the files changed, or lack a weight.
        """
        start_s, n_before = time.monotonic(), self.n_bytes
        with ThreadPoolExecutor(1, thread_name_prefix="actcache-load") as pool:
            coming = pool.submit(self._load, first)
            try:
                for index in range(first, self.n_blocks):
                    self._put(index, coming.result())
                    coming = pool.submit(self._load, index + 1) if index + 1 < self.n_blocks else coming
                    self.n_bytes += self._sizes[index]
                    n_bytes, seconds = self.n_bytes - n_before, time.monotonic() - start_s
                    rate = f"{n_bytes / 1e9:.2f} GB read, {n_bytes / 1e6 / max(seconds, 1e-3):,.0f} MB/s"
                    doing(f"block {index + 1} of {self.n_blocks}, {rate}")
                    self._prove(index)
                    yield index
                    self._take_away(index)
            finally:
                coming.cancel()
                for index in range(first, self.n_blocks):
                    self._take_away(index)

    def empty_block(self, index: int) -> nn.Module:
        """A block without weights."""
        return self._frame.empty_block(index)

    @torch.no_grad()
    def forward(self, bounds: Sequence[int], given: torch.Tensor) -> torch.Tensor:
        """Run the block that is there over the sequences between ``bounds`` (``[n + 1]``).

        Args:
            bounds: where each sequence begins.
            given: the state that enters it, ``[T, D]``; or of the first block token ids ``[T]``.

        Returns:
            ``[T, D]``, the block's output. With one sequence, that of the model's own plain forward, bit for bit.
        """
        given = given[None].to(self.device)
        from_ids = not given.is_floating_point()
        state = torch.zeros(*given.shape, self.width, dtype=self.dtype, device=self.device) if from_ids else given
        inputs = {"input_ids": given} if from_ids else {"inputs_embeds": torch.zeros_like(state)}
        # A copy, as some blocks add to their input in place. What stands behind the block hands it on, too.
        self._frame.source.state = state.clone()
        self._entry.state = None if from_ids else state.clone()
        try:
            return self.backbone.forward(bounds, **inputs)
        finally:
            self._frame.source.state = self._entry.state = None

    @torch.no_grad()
    def why_not_packable(self) -> str | None:
        """The reason why packs of this model are not exact, or None (see :meth:`Backbone.why_not_packable`): one block
        of each kind is loaded and looked at."""
        empty = nn.ModuleList(self._frame.empty_block(index) for index in range(self.n_blocks))
        self.backbone.blocks = empty
        if self.backbone.not_packable is not None:
            return self.backbone.not_packable
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.readout.vocab_size, (10,), generator=generator)
        states = torch.randn(10, self.width, generator=generator).to(self.dtype)
        kinds = {_kind(block): index for index, block in reversed(list(enumerate(empty))) if index}
        # What is made of positions may be added before the first one.
        for index in (*((0,) if self._reads_ids else ()), *kinds.values()):
            self._put(index, self._load(index))
            try:
                self._prove(index)
                reason = self.backbone.why_packs_differ(states if index else ids, self.forward)
            finally:
                self._take_away(index)
            if reason is not None:
                return reason
        return None

    def _load(self, index: int) -> nn.Module:
        return self._frame.load_block(index).to(self.device)

    def _put(self, index: int, block: nn.Module) -> None:
        block = block if index else entered_from(block, self._entry)
        self._frame.put(index, block)
        self.backbone.blocks = nn.ModuleList([block])

    def _take_away(self, index: int) -> None:
        self._frame.put(index, None)
        self.backbone.blocks = nn.ModuleList()

    def _prove(self, index: int) -> None:
        if index not in self._proven:
            with self.checkpoint.named():
                following = self._frame.empty_block(index + 1) if index + 1 < self.n_blocks else None
                probe_block(self._frame.model, index, self._frame.source, following)
            self._proven.add(index)


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that compute alike: modules of the same classes and shapes, with the same words on them."""
    return tuple(
        (path, type(module), tuple(sorted((k, v) for k, v in vars(module).items() if isinstance(v, str | bool))))
        for path, module in block.named_modules()
    )
