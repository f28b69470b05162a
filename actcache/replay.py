"""Replay: run only the late blocks, from stored states. Knows models and rows, no files of ours.

A :class:`LateStack` is the model's own causal LM with stand-ins where the upstream blocks were: its forward still makes
masks, rotary angles and whatever else the late blocks expect, for positions that restart at 0 in every sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.blocks import StateSource, check_boundary, cut_upstream, find_anatomy, shallow_clone
from actcache.errors import InputError, UnsupportedModelError
from actcache.lineup import Checkpoint, load_weights
from actcache.packing import plan_packs
from actcache.trunk import Trunk

MAX_TOKENS = 4096  # of one pack: enough for matrix products at the machine's rate, small beside the weights


class LateStack:
    """Blocks ``boundary..L-1`` of one checkpoint, with its readout.

    Attributes:
        boundary: index of the first late block.
        n_blocks: L of the whole model.
        width: D.
        dtype: dtype of weights and states.
        readout: the checkpoint's own final norm and head.
        not_packable: why sequences are run one at a time even when not ``strict``; None when packs are exact.
    """

    def __init__(self, model: PreTrainedModel, source: StateSource, boundary: int) -> None:
        """Take over a model whose upstream is cut (see :meth:`load`)."""
        self._trunk = Trunk(model)
        self._source = source
        self.boundary = boundary
        self.n_blocks, self.width, self.dtype = self._trunk.n_blocks, self._trunk.width, self._trunk.dtype
        self.readout = self._trunk.readout
        self._detect_block_output()
        generator = torch.Generator().manual_seed(0)
        self.not_packable = self._trunk.why_not_packable(
            self._forward,
            lambda n: torch.randn(n, self.width, generator=generator).to(self.device, self.dtype),
        )

    @classmethod
    def load(
        cls,
        path_or_model: str | Path | PreTrainedModel,
        boundary: int,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
    ) -> LateStack:
        """Load the late blocks and the readout only, or take them from a model in memory.

        From a folder, transformers' own loader fills a model that has no upstream parameters: upstream weights (and
        token embeddings that are not tied to the head) are never read. A model in memory is not changed and shares
        its weights; it must be in eval mode.

        Args:
            path_or_model: model folder (safetensors), or a causal LM.
            boundary: first late block, ``1..L-1``.
            dtype: of weights and states; None keeps the checkpoint's own. Ignored for a model in memory.
            device: where to put the weights. Ignored for a model in memory.

        Raises:
            InputError: boundary out of range, folder unusable, model in training mode.
            UnsupportedModelError: the architecture cannot be cut.
        """
        if isinstance(path_or_model, PreTrainedModel):
            if path_or_model.training:
                raise InputError("the model is in training mode; call model.eval() first")
            anatomy = find_anatomy(path_or_model)
            model = shallow_clone(path_or_model, anatomy.blocks)
            return cls(model, cut_upstream(model, boundary), boundary)
        checkpoint = Checkpoint.open("late", path_or_model)
        check_boundary(boundary, checkpoint.config.num_hidden_layers)
        cut: list[StateSource] = []

        class Late(checkpoint.model_class):  # type: ignore[name-defined]
            _keys_to_ignore_on_load_unexpected = (r".",)  # the upstream weights in the files

            def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
                super().__init__(config, *args, **kwargs)
                cut.append(cut_upstream(self, boundary))

        Late.__name__ = Late.__qualname__ = checkpoint.model_class.__name__
        model = load_weights(Late, checkpoint.path, dtype or "auto").to(device)  # type: ignore[arg-type]
        return cls(model, cut[-1], boundary)

    @property
    def blocks(self) -> list[nn.Module]:
        """The late blocks themselves."""
        return list(self._trunk.blocks)[self.boundary :]

    @property
    def device(self) -> torch.device:
        """Where the late blocks are."""
        return self._trunk.device

    @torch.no_grad()
    def run(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        *,
        strict: bool = False,
        max_tokens: int = MAX_TOKENS,
    ) -> torch.Tensor:
        """Replay sequences from their states at the boundary.

        Args:
            rows: ``[N, D]`` states at the boundary, all positions of every sequence, in this stack's dtype.
            offsets: ``[n + 1]``; sequence i is ``rows[offsets[i]:offsets[i + 1]]``, none empty.
            strict: one sequence a forward with the model's own attention: bit-identical to a full forward whose state
                at the boundary is overwritten. Otherwise packs, which differ by rounding only.
            max_tokens: tokens of one pack.

        Returns:
            ``[n, D]``: last block's output (before the final norm) at the last position of each sequence, on the
            CPU, in this stack's dtype.

        Raises:
            InputError: dtype, width or offsets do not fit, or a sequence is longer than the model's positions.
        """
        bounds = self._check(rows, offsets)
        lengths = [b - a for a, b in itertools.pairwise(bounds)]
        one_at_a_time = strict or self.not_packable is not None
        out = torch.empty(len(lengths), self.width, dtype=self.dtype)
        for pack in plan_packs(lengths, 0 if one_at_a_time else max_tokens):
            start, stop = bounds[pack.start], bounds[pack.stop]
            local = [bound - start for bound in bounds[pack.start : pack.stop + 1]]
            hidden = self._forward(rows[start:stop].to(self.device, copy=True), local)
            last = torch.tensor(local[1:], device=hidden.device) - 1
            out[pack.start : pack.stop] = hidden[last].cpu()
        return out

    def _forward(self, state: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        """``[T, D]`` states of the sequences cut at ``bounds`` -> ``[T, D]`` last block's output."""
        self._source.state = state[None]
        try:
            # The stand-ins ignore what the model makes of these embeddings; it reads their shape, dtype and device.
            return self._trunk.forward(bounds, inputs_embeds=torch.zeros_like(state)[None])
        finally:
            self._source.state = None

    def _check(self, rows: torch.Tensor, offsets: torch.Tensor | Sequence[int]) -> list[int]:
        bounds = [int(offset) for offset in offsets]
        if rows.dtype != self.dtype:
            raise InputError(f"rows are {rows.dtype}, this late stack is {self.dtype}; load it with dtype={rows.dtype}")
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise InputError(f"rows have shape {tuple(rows.shape)}, expected [N, {self.width}]")
        if not bounds or bounds[0] != 0 or bounds[-1] != len(rows):
            raise InputError(
                f"offsets must run from 0 to the number of rows, {len(rows)}; found {bounds[:1]}..{bounds[-1:]}"
            )
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            if stop <= start:
                raise InputError(f"sequence {index} has {stop - start} rows; each needs at least one")
            if self._trunk.max_positions is not None and stop - start > self._trunk.max_positions:
                raise InputError(
                    f"sequence {index} has {stop - start} rows; the model has {self._trunk.max_positions} positions"
                )
        return bounds

    @torch.no_grad()
    def _detect_block_output(self) -> None:
        """Learn whether the model expects ``(hidden_states, ...)`` from its blocks: with plain tensors handed on, a
        model that takes element 0 delivers the first late block a state without its batch dimension."""

        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._source.in_tuple = (args[0] if args else kwargs["hidden_states"]).ndim == 2
            raise _LookedError

        handle = self._trunk.blocks[self.boundary].register_forward_pre_hook(look, with_kwargs=True)
        try:
            self._forward(torch.zeros(2, self.width, dtype=self.dtype, device=self.device), [0, 2])
        except _LookedError:
            return
        finally:
            handle.remove()
        raise UnsupportedModelError(f"{type(self._trunk.decoder).__name__} did not call its block {self.boundary}")


class _LookedError(Exception):
    """Ends the detecting forward at the first late block."""
