"""Forwards: the late blocks of a cut model, run over states. Knows models and tensors; knows no variants and no files.

The model is its own causal LM with stand-ins where the upstream blocks were: its forward still makes masks, rotary
angles and whatever else the late blocks expect, for positions that restart at 0 in every sequence.

Nobody reads what the last block makes of any position but the scored ones. So a pack runs up to the last block's keys
and values, and that block runs on for the scored rows alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import UnsupportedModelError
from actcache.finite import first_block
from actcache.models.backbone import Backbone
from actcache.models.blocks import StateSource, UpstreamStandIn, find_projection, find_site, of_this_thread
from actcache.models.linear import fast_products
from actcache.models.packing import Prefix
from actcache.models.readout import Readout
from actcache.replay.edits import HEADS

Mode = Literal["packed", "padded", "single"]

# Given rows of the states and the rows of the flattened batch where they lie, both [m]: within this context, whatever
# changes those rows inside the stack is in place.
Inside = Callable[[torch.Tensor, torch.Tensor], AbstractContextManager[None]]

# A pack of one sequence shorter than this is a strict replay: a second step would cost more calls than it saves.
_IN_TWO_STEPS_FROM = 64


class _StoppedError(Exception):
    """Ends a forward where a block begins."""


def nothing_inside(rows: torch.Tensor, index: torch.Tensor) -> AbstractContextManager[None]:
    """Changes nothing inside the stack."""
    return nullcontext()


class Forwards:
    """Blocks ``boundary..L-1`` of a cut model.

    All but :meth:`plain` switch modules or replace them, so the model shall be nobody else's (see copies.py).

    Attributes:
        model: the causal LM after :func:`actcache.models.blocks.cut_upstream`.
        source: what that returned.
        backbone: the model without its readout.
        boundary: index of the first late block.
    """

    def __init__(
        self, model: PreTrainedModel, source: StateSource, boundary: int, readout: Readout | None = None
    ) -> None:
        """Take over a cut model; ``readout`` is its final norm and head, where there is one already."""
        self.model, self.source, self.boundary = model, source, boundary
        self.backbone = Backbone(model, readout)
        self.passed = [UpstreamStandIn(block, source) for block in self.blocks[:-1]]

    @property
    def blocks(self) -> list[nn.Module]:
        """The late blocks."""
        return list(self.backbone.blocks)[self.boundary :]

    def site(self, layer: int, site: str) -> nn.Module:
        """The module whose output a site is, or whose input the heads are (UnsupportedModelError: the block has no such
        module)."""
        return site_in(self.backbone.blocks[layer], site)

    def plain(self, state: torch.Tensor) -> torch.Tensor:
        """The model's own forward over ``[B, T, D]`` states -> ``[B, T, D]`` last block's output."""
        with self.handing_on(state):
            return self.backbone.run(inputs_embeds=torch.zeros_like(state), use_cache=False)

    def final(
        self,
        state: torch.Tensor,
        bounds: Sequence[int],
        scored: torch.Tensor,
        mode: Mode,
        inside: Inside = nothing_inside,
    ) -> torch.Tensor:
        """Run sequences to the end of the stack, as far as their scored positions need.

        Args:
            state: ``[T, D]``, of all sequences.
            bounds: ``[n + 1]``, where each begins.
            scored: ``[m]`` int64, rows of ``state``, in order and each once.
            mode: how the sequences share the forward.
            inside: places what changes rows inside the stack.

        Returns:
            ``[m, D]``, last block's output at the scored rows.
        """
        every, on_device = torch.arange(len(state)), scored.to(state.device)
        is_long = len(state) >= _IN_TWO_STEPS_FROM and self.backbone.regimes.in_row(len(state))
        if mode == "packed" and (len(bounds) > 2 or is_long):
            with inside(every, every):
                entering, prefix = self.to_last_keys(state, bounds, every_block=False)
            sequence_of = torch.bucketize(scored, torch.tensor(bounds[1:]), right=True)
            positions = scored - torch.tensor(bounds)[sequence_of]
            with inside(scored, torch.arange(len(scored))), self._last_block_alone():
                return self.branches(prefix, sequence_of.tolist(), positions, entering[on_device])
        if mode == "padded":
            index = _padded_index(bounds)
            with inside(every, index):
                return self._padded(state, bounds, index)[index.to(state.device)[on_device]]
        with inside(every, every):
            return self.plain(state[None])[0][on_device]

    def outputs(self, state: torch.Tensor, bounds: Sequence[int], mode: Mode) -> torch.Tensor:
        """Run sequences to the end of the stack (arguments as :meth:`final`): ``[T, D]``, last block's output at every
        position."""
        if mode != "packed":
            return self.final(state, bounds, torch.arange(len(state)), mode)
        with self.handing_on(state[None]):
            return self.backbone.forward(bounds, inputs_embeds=torch.zeros_like(state)[None])

    def entering(self, block: int, state: torch.Tensor, bounds: Sequence[int], mode: Mode) -> torch.Tensor:
        """Run sequences as far as a block after the first (arguments as :meth:`final`): ``[T, D]``, the state that
        enters it at every position."""
        seen: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((args[0] if args else kwargs["hidden_states"]).flatten(0, -2))
            raise _StoppedError

        handle = self.backbone.blocks[block].register_forward_pre_hook(of_this_thread(stop), with_kwargs=True)
        try:
            self.outputs(state, bounds, mode)
        except _StoppedError:
            index = _padded_index(bounds) if mode == "padded" else torch.arange(len(state))
            return seen[0][index.to(state.device)]
        finally:
            handle.remove()
        raise UnsupportedModelError(f"{type(self.backbone.decoder).__name__}: it never calls its block {block}")

    def to_last_keys(
        self, state: torch.Tensor, bounds: Sequence[int], *, every_block: bool
    ) -> tuple[torch.Tensor, Prefix]:
        """Run a pack up to the last block's keys and values (see :meth:`Backbone.forward_to_last_keys`)."""
        with self.handing_on(state[None]):
            inputs = torch.zeros_like(state)[None]
            return self.backbone.forward_to_last_keys(bounds, every_block=every_block, inputs_embeds=inputs)

    def branches(
        self,
        prefix: Prefix,
        sequence_of: Sequence[int],
        positions: torch.Tensor,
        rows: torch.Tensor,
        bounds: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Run rows ``[n, D]`` that stand at ``positions`` ``[n]`` of sequences whose prefix is known, cut into branches
        at ``bounds`` (see :meth:`Backbone.forward_branches`) -> ``[n, D]`` last block's output."""
        with self.handing_on(rows[None]):
            inputs = torch.zeros_like(rows)[None]
            return self.backbone.forward_branches(prefix, sequence_of, positions, bounds, inputs_embeds=inputs)

    def first_not_finite(self, state: torch.Tensor) -> str:
        """Which block is the first whose output is not finite, of one sequence's states ``[T, D]``, in words."""
        return first_block(list(self.backbone.blocks), lambda: self.plain(state[None]), self.boundary)

    @contextmanager
    def handing_on(self, state: torch.Tensor) -> Iterator[None]:
        """Within this context the stand-ins hand on this state, in forwards of this thread."""
        # A copy, as some blocks add to their input in place. The stand-ins ignore what the model makes of the
        # embeddings that it is given; it reads their shape, dtype and device.
        self.source.state = state.clone()
        try:
            yield
        finally:
            self.source.state = None

    def _padded(self, state: torch.Tensor, bounds: Sequence[int], index: torch.Tensor) -> torch.Tensor:
        """Right-padded, without a mask: no position sees a later one. ``[T, D]`` -> ``[B * Tmax, D]``."""
        n, longest = len(bounds) - 1, max(b - a for a, b in itertools.pairwise(bounds))
        padded = state.new_zeros(n * longest, state.shape[1])
        padded[index.to(state.device)] = state
        with fast_products(self.backbone.blocks):
            return self.plain(padded.view(n, longest, -1)).flatten(0, 1)

    @contextmanager
    def _last_block_alone(self) -> Iterator[None]:
        """Within this context a forward passes every block but the last one by."""
        modules = self.backbone.blocks._modules
        own = dict(modules)
        names = list(own)[self.boundary : -1]
        modules.update(zip(names, self.passed, strict=True))
        try:
            yield
        finally:
            modules.update(own)


def site_in(block: nn.Module, site: str) -> nn.Module:
    """See :meth:`Forwards.site`."""
    return find_projection(block) if site == HEADS else find_site(block, site)


def _padded_index(bounds: Sequence[int]) -> torch.Tensor:
    """``[T]``: where each row lies in the flattened padded batch."""
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    spans = itertools.pairwise(bounds)
    return torch.cat([torch.arange(b - a) + number * longest for number, (a, b) in enumerate(spans)])
