"""Backbone: a causal LM without its readout, run over packs of sequences or over one sequence at a time.

The same few lines serve the whole model (capture, search) and the cut one (replay), so that both see the same kernels.
Knows transformers modules; knows no files, no stores, no prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import UnsupportedModelError
from actcache.models.blocks import Turns, find_anatomy, mixes_tokens, of_this_thread, text_config
from actcache.models.linear import fast_products, without_queries
from actcache.models.packing import (
    PackStoppedError,
    Prefix,
    branched_attention,
    packed_attention,
    restarting_positions,
    why_not_packable,
)
from actcache.models.readout import Readout
from actcache.models.regimes import Regimes


def rounding_of(dtype: torch.dtype) -> float:
    """How far a packed sequence may be from the same sequence alone, relative to its largest value, for packing to be
    used at all: wide enough for rounding, narrow beside what another neighbour's tokens would do."""
    return {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]


# glibc gives freed memory back to the system, to be faulted in again page by page, unless it has seen a larger block
# freed before; beyond this size it always does (M_MMAP_THRESHOLD in mallopt(3)).
_LARGEST_KEPT = (32 << 20) - (64 << 10)


def _keep_freed_memory() -> None:
    """Have activations take the place of those freed before them: else a tenth of a forward may be page faults."""
    torch.empty(_LARGEST_KEPT, dtype=torch.uint8)


class Backbone:
    """Embeddings and blocks of a causal LM, whose readout stands beside it.

    During a forward of a pack the model given is switched over, so it shall be nobody else's; afterwards it is as
    before. Threads take turns.

    Attributes:
        decoder: the transformers module that runs them.
        blocks: the list of its L blocks.
        readout: final norm and head.
        n_blocks, width: L and D.
        dtype: of the weights and the residual stream.
        max_positions: longest sequence, or None.
        config: the model's.
        regimes: which sequences may share a forward, or a cache, at all.
        is_probed: whether it is being looked at, so that its forwards are no part of a study.
    """

    def __init__(self, model: PreTrainedModel, readout: Readout | None = None) -> None:
        """Take a model apart; ``readout`` is the model's, if there is one already."""
        _keep_freed_memory()
        self._turns = Turns()
        anatomy = find_anatomy(model)
        self.decoder = model.get_submodule(anatomy.decoder)
        self.blocks: nn.ModuleList = model.get_submodule(anatomy.blocks)  # type: ignore[assignment]
        self.readout = readout or Readout(model)
        self.n_blocks, self.width = anatomy.n_blocks, anatomy.width
        self.dtype: torch.dtype = model.dtype
        self.config = text_config(model.config)
        self.max_positions: int | None = getattr(self.config, "max_position_embeddings", None)
        self.regimes = Regimes.of_config(self.config)
        self.is_probed = False

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.readout.device

    @contextmanager
    def being_probed(self) -> Iterator[None]:
        """Within this block, forwards are looked at, and not counted."""
        self.is_probed = True
        try:
            yield
        finally:
            self.is_probed = False

    def forward(self, bounds: Sequence[int], **inputs: torch.Tensor) -> torch.Tensor:
        """Run the sequences that lie between ``bounds`` (``[n + 1]``) in one forward, without a key-value cache.

        Args:
            bounds: where each sequence begins; ``bounds[-1]`` is T.
            inputs: ``input_ids=[1, T]`` or ``inputs_embeds=[1, T, D]``.

        Returns:
            ``[T, D]``, last block's output. With one sequence this is the model's own plain forward, bit for bit.
        """
        if len(bounds) == 2:
            return self.run(**inputs, use_cache=False)[0]
        with self._turns, packed_attention(self.config, bounds), fast_products(self.blocks):
            positions = restarting_positions(bounds, self.device)
            return self.run(**inputs, position_ids=positions, use_cache=False)[0]

    def run(self, **inputs: Any) -> torch.Tensor:
        """The decoder's own forward with these arguments -> the last block's output, ``[B, T, D]``, before any norm."""
        outputs: list[torch.Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs.append(output if isinstance(output, torch.Tensor) else output[0])

        with self._turns:
            handle = self.blocks[-1].register_forward_hook(of_this_thread(keep))
            try:
                self.decoder(**inputs)
            finally:
                handle.remove()
        return outputs[0]

    def run_cached(self, **inputs: Any) -> torch.Tensor:
        """As :meth:`run`, with a key-value cache among the arguments: differs from a plain forward by rounding."""
        with self._turns, fast_products(self.blocks):
            return self.run(**inputs, use_cache=True)

    def forward_to_last_keys(
        self, bounds: Sequence[int], *, every_block: bool, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, Prefix]:
        """Run a pack up to the last block's keys and values, and no further; its queries are left out, where they are
        made by a layer of their own.

        Args:
            bounds: as :meth:`forward`.
            every_block: keep the keys and values of all blocks that run, not only the last one's.
            inputs: as :meth:`forward`.

        Returns:
            the state entering the last block, ``[T, D]``, and the prefix of every sequence.
        """
        prefix = Prefix()
        entering: list[torch.Tensor] = []
        with self._turns, packed_attention(self.config, bounds, prefix if every_block else None) as pack:

            def stop_inside(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                entering.append((args[0] if args else kwargs["hidden_states"])[0])
                pack.prefix, pack.stop = prefix, True

            handle = self.blocks[-1].register_forward_pre_hook(stop_inside, with_kwargs=True)
            try:
                positions = restarting_positions(bounds, self.device)
                with without_queries(self.blocks[-1]), fast_products(self.blocks):
                    self.decoder(**inputs, position_ids=positions, use_cache=False)
            except PackStoppedError:
                return entering[0], prefix
            finally:
                handle.remove()
        raise UnsupportedModelError(f"{type(self.decoder).__name__}: its last block never called attention")

    def forward_branches(
        self,
        prefix: Prefix,
        sequence_of: Sequence[int],
        positions: torch.Tensor,
        bounds: Sequence[int] | None = None,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """Run branches: tokens that stand at positions of sequences whose prefix is known, one or several in a row.

        A token sees the positions before its branch, and those of its branch up to itself.

        Args:
            prefix: as :meth:`forward_to_last_keys` left it, with the keys of every block that runs here.
            sequence_of: ``[n]``, each token's sequence in that pack; those of one sequence together.
            positions: ``[n]`` int64 on the CPU, each token's position in it.
            bounds: ``[m + 1]``, where each branch begins; None where every token is one.
            inputs: ``inputs_embeds=[1, n, D]``.

        Returns:
            ``[n, D]``, last block's output.
        """
        attention = branched_attention(self.config, prefix, sequence_of, positions.tolist(), bounds)
        with self._turns, attention, fast_products(self.blocks):
            return self.run(**inputs, position_ids=positions[None].to(self.device), use_cache=False)[0]

    @property
    def not_packable(self) -> str | None:
        """Why packs cannot be run at all, or None; whether they are exact, callers probe (:meth:`why_not_packable`)."""
        mixers = (path for block in self.blocks if (path := mixes_tokens(block)) is not None)
        if (mixer := next(mixers, None)) is not None:
            return f"{type(self.decoder).__name__}: tokens meet in its blocks' {mixer}, which knows no bounds"
        return why_not_packable(self.decoder)

    @torch.no_grad()
    def why_not_packable(self) -> str | None:
        """The reason why packs of this model are not exact, or None.

        Runs two short random sequences packed and alone, and packed again with the first one changed: the second must
        be what it is alone whatever its neighbour is, to rounding.
        """
        if self.not_packable is not None:
            return self.not_packable

        ids = torch.randint(self.readout.vocab_size, (10,), generator=torch.Generator().manual_seed(0))
        return self.why_packs_differ(ids.to(self.device), lambda bounds, own: self.forward(bounds, input_ids=own[None]))

    def why_packs_differ(
        self, tokens: torch.Tensor, run: Callable[[Sequence[int], torch.Tensor], torch.Tensor]
    ) -> str | None:
        """Why a sequence in a pack is not what it is alone, or None.

        Args:
            tokens: ten ids or states.
            run: gives the output over some of them, ``[t, D]``, cut at bounds.
        """
        first, changed, second = tokens.split([3, 3, 4])
        alone = run([0, 4], second).float()
        allowed = rounding_of(self.dtype) * alone.abs().max().item()
        for neighbour in (first, changed):
            try:
                packed = run([0, 3, 7], torch.cat([neighbour, second]))[3:].float()
            except FAILURES as error:
                return why_failed(self.decoder, "packed", error)
            off = (packed - alone).abs().max().item()
            if not off <= allowed:
                return f"{type(self.decoder).__name__}: a packed sequence differs from the same one alone by {off:.2g}"
        return None


# What a model's forward raises when a batch is not of the form that its code expects.
FAILURES = (TypeError, ValueError, AttributeError, LookupError, RuntimeError, UnsupportedModelError)


def why_failed(decoder: nn.Module, what: str, error: Exception) -> str:
    """The reason why a decoder's batches of this form are not used, in one line."""
    said = str(error).splitlines()
    return f"{type(decoder).__name__} fails on a {what} batch ({type(error).__name__}: {said[0] if said else ''})"
