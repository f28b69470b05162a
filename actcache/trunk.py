"""Trunk: a causal LM without its readout, run over packs of sequences or over one sequence at a time.

The same few lines serve the whole model (capture, search) and the cut one (replay), so that both see the same kernels.
Knows transformers modules; knows no files, no stores, no prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.blocks import find_anatomy, shallow_clone
from actcache.packing import offsets_of, packed_attention, restarting_positions, why_not_packable
from actcache.readout import Readout

# How far a packed sequence may be from the same sequence alone, relative to its largest value, for packing to be
# used at all: wide enough for rounding in either dtype, narrow beside what another neighbour's tokens would do.
_PACKING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Trunk:
    """Embeddings and blocks of a causal LM; its final norm is taken out, its readout stands beside it.

    The model given is not changed and shares its weights.

    Attributes:
        decoder: the transformers module, whose ``last_hidden_state`` is now the last block's output.
        blocks: the list of its L blocks.
        readout: final norm and head.
        n_blocks, width: L and D.
        dtype: of the weights and the residual stream.
        max_positions: longest sequence, or None.
        config: the model's.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        anatomy = find_anatomy(model)
        clone = shallow_clone(model, anatomy.final_norm.rpartition(".")[0])
        parent, _, norm = anatomy.final_norm.rpartition(".")
        clone.get_submodule(parent)._modules[norm] = nn.Identity()
        self.decoder = clone.get_submodule(anatomy.decoder)
        self.blocks: nn.ModuleList = clone.get_submodule(anatomy.blocks)  # type: ignore[assignment]
        self.readout = Readout(model)
        self.n_blocks, self.width = anatomy.n_blocks, anatomy.width
        self.dtype: torch.dtype = model.dtype
        self.max_positions: int | None = getattr(model.config, "max_position_embeddings", None)
        self.config = model.config

    @property
    def device(self) -> torch.device:
        """Where the last block is."""
        return next(self.blocks[-1].parameters()).device

    def forward(self, bounds: Sequence[int], **inputs: torch.Tensor) -> torch.Tensor:
        """Run the sequences that lie between ``bounds`` (``[n + 1]``) in one forward, without a key-value cache.

        Args:
            bounds: where each sequence begins; ``bounds[-1]`` is T.
            inputs: ``input_ids=[1, T]`` or ``inputs_embeds=[1, T, D]``.

        Returns:
            ``[T, D]``, last block's output. With one sequence this is the model's own plain forward, bit for bit.
        """
        if len(bounds) == 2:
            return self.decoder(**inputs, use_cache=False).last_hidden_state[0]
        with packed_attention(self.config, bounds):
            positions = restarting_positions(bounds, self.device)
            return self.decoder(**inputs, position_ids=positions, use_cache=False).last_hidden_state[0]

    @torch.no_grad()
    def why_not_packable(
        self, run: Callable[[Any, Sequence[int]], torch.Tensor], make: Callable[[int], Any]
    ) -> str | None:
        """The reason why packs of this model are not exact, or None.

        Runs two short sequences packed and alone, and packed again with the first one changed: the second must be what
        it is alone whatever its neighbour is, to rounding.

        Args:
            run: ``(input, bounds) -> [T, D]``.
            make: ``n_tokens -> input``, a random one each time, concatenable on its first dimension.
        """
        reason = why_not_packable(self.decoder)
        if reason is not None:
            return reason
        first, changed, second = make(3), make(3), make(4)
        bounds = offsets_of([3, 4]).tolist()
        alone = run(second, [0, 4]).float()
        allowed = _PACKING_TOLERANCE[self.dtype] * alone.abs().max().item()
        for neighbour in (first, changed):
            error = (run(torch.cat([neighbour, second]), bounds)[3:].float() - alone).abs().max().item()
            if not error <= allowed:
                return (
                    f"{type(self.decoder).__name__}: a packed sequence differs from the same one alone by {error:.2g}"
                )
        return None
