"""Replay: run only the late blocks, from stored states. Knows models and rows, no files of ours.

A :class:`LateStack` is the model's own causal LM with stand-ins where the upstream blocks were: its forward still makes
masks, rotary angles and whatever else the late blocks expect, for positions that restart at 0 in every sequence.

Nobody reads what the last block makes of any position but p. So a pack runs up to the last block's keys and values, and
that block runs on for the rows at p alone. The same two steps serve variants that change nothing before p: the pack
runs once, leaving every block's keys and values, and each variant costs one row through the late blocks.

Every call runs copies of the stack, which share its weights: threads may call at once, and the model that a stack was
made of stays as it is, also during a call. On the CPU several packs run at once, each by a copy on its own part of
torch's threads (workers.py).
"""

from __future__ import annotations

import copy
import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import ActcacheError, InputError, NotFiniteError
from actcache.finite import first_block, first_no_state
from actcache.models.backbone import FAILURES, Backbone, rounding_of, why_failed
from actcache.models.blocks import (
    StateSource,
    Turns,
    apart,
    check_boundary,
    cut_upstream,
    find_anatomy,
    find_site,
    is_wrapped,
    of_this_thread,
    shallow_clone,
    upstream_names,
)
from actcache.models.checkpoint import Checkpoint, load_weights
from actcache.models.linear import fast_products
from actcache.models.packing import Prefix, offsets_of, plan_evenly, plan_packs
from actcache.models.probe import probe_late_blocks
from actcache.models.readout import Readout
from actcache.replay.copies import share_threads, side_by_side
from actcache.replay.edits import PLAIN, Edit, Rows, Variant
from actcache.replay.moves import Moves

Mode = Literal["packed", "padded", "single"]

# Tokens of one pack. On the CPU few enough that a block's activations stay in the caches, enough for matrix products at
# the machine's rate; a GPU wants more.
MAX_TOKENS = {"cpu": 1024, "cuda": 8192}

# A pack of one sequence shorter than this is a strict replay: a second step would cost more calls than it saves.
_IN_TWO_STEPS_FROM = 64

# Fewer tokens than this are not worth a worker: every one reads all the weights.
TOKENS_OF_A_WORKER = 256


@dataclass(frozen=True)
class _Batch:
    """What one call replays, and how: everything that its packs have in common."""

    rows: torch.Tensor  # [N, D]
    bounds: list[int]
    places: Rows  # of all rows
    variants: Sequence[Variant]
    moves: Moves
    shared: frozenset[int]  # the variants that go through one replay of the earlier positions together
    mode: Mode
    budget: int  # tokens of one forward


# A variant, and what is to be told of its edits.
_Watched = tuple[Variant, Callable[[Edit, Rows, torch.Tensor, torch.Tensor], None]]

# Indices of sequences and variants, [m] each, and [m, D] on the CPU.
_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class LateStack:
    """Blocks ``boundary..L-1`` of one checkpoint, with its readout.

    Attributes:
        boundary: index of the first late block.
        n_blocks: L of the whole model.
        width: D.
        dtype: dtype of weights and states.
        readout: the checkpoint's own final norm and head.
        mode: how sequences share a forward when not ``strict``, the first of these that probes at load find exact to
            rounding: ``packed`` (concatenated, no padding), ``padded`` on the right, ``single`` (not at all).
        not_packable: why the mode is not ``packed``; None where it is.
    """

    def __init__(
        self, model: PreTrainedModel, source: StateSource, boundary: int, like: LateStack | None = None
    ) -> None:
        """Take over a model whose upstream is cut (see :meth:`load`); ``like`` has probed the same blocks before."""
        if like:
            source.in_tuple, source.n_more = like._source.in_tuple, like._source.n_more
        else:
            anatomy = find_anatomy(model)
            hooked = {*model.get_submodule(anatomy.blocks).children(), model.get_submodule(anatomy.final_norm)}
            probed = model if is_wrapped(model) else apart(model, [model], 1, hooked=hooked)[0]
            probe_late_blocks(probed, boundary, source)
        self._model = model
        self._source: StateSource = source
        self._backbone = Backbone(model, like.readout if like else None)
        self.boundary = boundary
        self.n_blocks, self.width, self.dtype = self._backbone.n_blocks, self._backbone.width, self._backbone.dtype
        self.readout: Readout = self._backbone.readout
        self._cutting: Turns = like._cutting if like else Turns()
        self._views: dict[int, LateStack] = like._views if like else {}
        self._views[boundary] = self
        self.mode: Mode = like.mode if like else "packed"
        self.not_packable: str | None = like.not_packable if like else None
        if like is None:
            self._probe_modes()
            self._views = {boundary: self}  # those that the probes made do not know the mode

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
        token embeddings that are not tied to the head) are never read. A model in memory shares its weights and stays
        as it is, also while it is probed and replayed; it must be in eval mode.

        Args:
            path_or_model: model folder (safetensors), or a causal LM.
            boundary: first late block, ``1..L-1``.
            dtype: of weights and states; None keeps the checkpoint's own. Ignored for a model in memory.
            device: where to put the weights. Ignored for a model in memory.

        Raises:
            InputError: boundary out of range, folder unusable, model in training mode.
            UnsupportedModelError: the architecture cannot be cut, or its late blocks read more than the state.
        """
        if isinstance(path_or_model, PreTrainedModel):
            if path_or_model.training:
                raise InputError("the model is in training mode; call model.eval() first")
            anatomy = find_anatomy(path_or_model)
            model = shallow_clone(path_or_model, anatomy.blocks)
            return cls(model, cut_upstream(model, boundary), boundary)
        checkpoint = Checkpoint.open("late", path_or_model)
        check_boundary(boundary, checkpoint.decoder_config.num_hidden_layers)
        cut: list[StateSource] = []

        class Late(checkpoint.model_class):  # type: ignore[name-defined]
            _keys_to_ignore_on_load_unexpected: Any

            def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
                super().__init__(config, *args, **kwargs)
                own = self._keys_to_ignore_on_load_unexpected  # None, a list or a set, by transformers' version
                own = [] if own is None else own
                self._keys_to_ignore_on_load_unexpected = type(own)([*own, *upstream_names(self, boundary)])
                cut.append(cut_upstream(self, boundary))

        # transformers loads a class that is not its own by other rules (and leaves some computed buffers unset).
        Late.__name__ = Late.__qualname__ = checkpoint.model_class.__name__
        Late.__module__ = checkpoint.model_class.__module__
        model = load_weights(Late, checkpoint, dtype).to(device)  # type: ignore[arg-type]
        with checkpoint.named():
            return cls(model, cut[-1], boundary)

    def at(self, boundary: int) -> LateStack:
        """The same stack from a later boundary on; weights are shared, nothing is loaded.

        Raises:
            InputError: the boundary is before this stack's own, or beyond the last block.
        """
        check_boundary(boundary, self.n_blocks)
        with self._cutting:
            first = min(self._views)
            if boundary < first:
                raise InputError(
                    f"boundary {boundary} is before {first}, where this late stack begins: load it from there"
                )
            if boundary not in self._views:
                whole = self._views[first]  # this one may lack blocks from that boundary on
                model = shallow_clone(whole._model, find_anatomy(whole._model).blocks)
                LateStack(model, cut_upstream(model, boundary), boundary, like=whole)
            return self._views[boundary]

    def __repr__(self) -> str:
        kind = type(self._backbone.decoder).__name__
        return (
            f"<LateStack of {kind}: blocks {self.boundary}..{self.n_blocks - 1}, "
            f"{str(self.dtype).removeprefix('torch.')}, width {self.width}, on {self.device}, {self.mode}>"
        )

    @property
    def blocks(self) -> list[nn.Module]:
        """The late blocks themselves. What is hooked to them may be called from several threads, on copies of them."""
        return list(self._backbone.blocks)[self.boundary :]

    @property
    def device(self) -> torch.device:
        """Where the late blocks are."""
        return self._backbone.device

    def run(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        *,
        strict: bool = False,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """Replay sequences from their states at the boundary.

        Args:
            rows: ``[N, D]`` states at the boundary, all positions of every sequence, in this stack's dtype.
            offsets: ``[n + 1]``; sequence i is ``rows[offsets[i]:offsets[i + 1]]``, none empty.
            strict: one sequence a forward with the model's own attention: bit-identical to a full forward whose state
                at the boundary is overwritten. Otherwise as :attr:`mode` says, which differs by rounding only.
            max_tokens: tokens of one forward, of which several may run at once on the CPU (unless ``strict``); None
                for what suits the device.

        Returns:
            ``[n, D]``: last block's output (before the final norm) at the last position of each sequence, on the
            CPU, in this stack's dtype.

        Raises:
            InputError: dtype, width or offsets do not fit, a row is not finite, or its squares are not, or a sequence
                is longer than the model's positions.
        """
        return self.run_variants(rows, offsets, [PLAIN], strict=strict, max_tokens=max_tokens)[:, 0]

    def run_variants(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        variants: Sequence[Variant],
        *,
        donors: Mapping[str, torch.Tensor] | None = None,
        keys: Sequence[str] | None = None,
        strict: bool = False,
        max_tokens: int | None = None,
        moves: Moves | None = None,
    ) -> torch.Tensor:
        """Replay sequences once for each variant (see :meth:`iterate_variants`): ``[n, n_variants, D]``."""
        bounds = self._check(rows, offsets)
        out = torch.empty(len(bounds) - 1, len(variants), self.width, dtype=self.dtype)
        given = {"donors": donors, "keys": keys, "strict": strict, "max_tokens": max_tokens, "moves": moves}
        for sequences, numbers, hidden in self.iterate_variants(rows, offsets, variants, **given):  # type: ignore[arg-type]
            out[sequences, numbers] = hidden
        return out

    @torch.no_grad()
    def iterate_variants(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        variants: Sequence[Variant],
        *,
        donors: Mapping[str, torch.Tensor] | None = None,
        keys: Sequence[str] | None = None,
        strict: bool = False,
        max_tokens: int | None = None,
        moves: Moves | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Replay sequences once for each variant, a few at a time, so that memory stays bounded.

        Where the mode is ``packed``, variants that change position p alone share the keys and values of the earlier
        positions: each costs one row through the late blocks. All others cost a replay of the sequence.

        Args:
            rows, offsets, strict, max_tokens: as :meth:`run`.
            variants: what to change.
            donors: label -> rows of other checkpoints beside ``rows``, ``[N, D]``, for edits that name one.
            keys: what names each sequence, for random edits and vectors per event: the event ids, or by default its
                number here.
            moves: is told which edits moved something.

        Yields:
            sequences ``[m]`` and variants ``[m]`` (indices, int64) and their last block's output at p, ``[m, D]`` on
            the CPU, each pair once, in no fixed order.

        Raises:
            InputError: as :meth:`run`; donors that do not match ``rows``; an edit of a layer or position that does
                not exist; a vector that does not fit, or is missing for a key; an edit that moves nothing (see
                :class:`actcache.replay.moves.Moves`).
            UnsupportedModelError: an edit inside the stack of an architecture that has no such site.
            NotFiniteError: finite rows become NaN or infinity, or their squares do, in a block, which it names;
                InputError, where the edits of a variant do that.
        """
        bounds = self._check(rows, offsets)
        lengths = [b - a for a, b in itertools.pairwise(bounds)]
        donors = donors or {}
        for label, other in donors.items():
            if other.shape != rows.shape:
                raise InputError(f"donor {label!r} has shape {tuple(other.shape)}, the rows have {tuple(rows.shape)}")
            if other.dtype != rows.dtype:
                raise InputError(f"donor {label!r} is {other.dtype}, the rows are {rows.dtype}")
            if other is not rows:
                _check_finite(f"donor {label!r}", other, bounds)
        if keys is not None and len(keys) != len(lengths):
            raise InputError(f"{len(keys)} keys are given for {len(lengths)} sequences")
        keys = [str(number) for number in range(len(lengths))] if keys is None else list(keys)
        for variant in variants:
            for edit in variant.edits:
                edit.check_layers(self.boundary, self.n_blocks, variant.name)
                edit.check_positions(lengths, variant.name)
                edit.check_vectors(self.width, self.dtype, keys, variant.name)
        variants = [variant.of_depth(self.n_blocks) for variant in variants]
        moves = moves or Moves()
        moves.begin(variants, keys)
        every = Rows(
            sequence=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64)),
            position=torch.cat([torch.arange(0), *(torch.arange(length) for length in lengths)]),
            source=torch.arange(len(rows)),
            lengths=torch.tensor(lengths, dtype=torch.int64),
            keys=keys,
            donors=donors,
        )
        mode, budget = self._how(strict, max_tokens)
        # Where the place in the row counts, a row of branches is no place for the last position of a sequence.
        branching = mode == "packed" and all(map(self._backbone.regimes.in_row, lengths))
        shared = [i for i, v in enumerate(variants) if v.at_last_only] if branching else []
        if len(shared) < 2:  # nothing to share
            shared = []
        batch = _Batch(rows, bounds, every, variants, moves, frozenset(shared), mode, budget)
        packs = self.packs(lengths, strict=strict, max_tokens=max_tokens)
        n_workers, n_threads = self._share_threads(mode, len(rows))
        copies = self._copies(n_workers, variants)
        if n_workers == 1:
            for pack in packs:
                yield from self._checked(batch, copies[0]._iterate_pack(batch, pack))
            return

        def run(pack: range, worker: int) -> Iterator[_Result]:
            return copies[worker]._iterate_pack(batch, pack)

        results = side_by_side([partial(run, pack) for pack in packs], n_workers, n_threads)
        yield from self._checked(batch, results)

    def _checked(self, batch: _Batch, results: Iterable[_Result]) -> Iterator[_Result]:
        """What comes out of finite rows is finite, or an error that names sequence, and variant or block."""
        for sequences, numbers, hidden in results:
            if (row := first_no_state(hidden)) is not None:
                raise self._not_finite(batch, int(sequences[row]), batch.variants[int(numbers[row])])
            yield sequences, numbers, hidden

    def _not_finite(self, batch: _Batch, sequence: int, variant: Variant) -> ActcacheError:
        key = batch.places.keys[sequence]
        if variant.name != PLAIN.name:
            return InputError(
                f"variant {variant.name!r}: what its edits make of sequence {key!r} is not finite in {self.dtype}, "
                "or its squares are not in float32; leave it out, or make its values smaller"
            )
        (late,) = self._copies(1, [])
        state = batch.rows[batch.bounds[sequence] : batch.bounds[sequence + 1]].to(self.device)
        where = first_block(list(late._backbone.blocks), lambda: late._forward(state[None]), self.boundary)
        return NotFiniteError(
            f"the replay of sequence {key!r} from finite states is not finite, or its squares are not; {where}"
        )

    def packs(self, lengths: Sequence[int], *, strict: bool = False, max_tokens: int | None = None) -> list[range]:
        """How :meth:`run` cuts sequences of these lengths into forwards."""
        mode, budget = self._how(strict, max_tokens)
        n_workers, _ = self._share_threads(mode, sum(lengths))
        if n_workers == 1:
            return self._plan(lengths, mode, budget)
        return plan_evenly(lambda tokens: self._plan(lengths, mode, tokens), budget, n_workers)

    # ---- who runs it ----

    def _how(self, strict: bool, max_tokens: int | None) -> tuple[Mode, int]:
        mode: Mode = "single" if strict or is_wrapped(self._model) else self.mode
        if max_tokens is None:
            max_tokens = MAX_TOKENS.get(self.device.type, MAX_TOKENS["cuda"])
        return mode, max_tokens

    def _share_threads(self, mode: Mode, n_tokens: int) -> tuple[int, int]:
        """How many packs run at once, on how many threads each. One that shall be what a plain forward is takes all."""
        if mode == "single" or self.device.type != "cpu":
            return 1, torch.get_num_threads()
        return share_threads(n_tokens // TOKENS_OF_A_WORKER)

    def _copies(self, n: int, variants: Sequence[Variant]) -> list[LateStack]:
        """This stack n times over, each with modules and config of its own, on which a forward sets switches and hooks:
        the model itself, and whoever else runs it, sees none of them.

        Made anew for every call, so that whatever was done to the blocks since is in them. One whose forward somebody
        has wrapped is run itself, a sequence at a time, which switches nothing.
        """
        if is_wrapped(self._model):
            return [self]
        views: dict[int, LateStack] = {}
        for boundary in (self.boundary, self.n_blocks - 1):
            views[boundary] = copy.copy(self.at(boundary))
            views[boundary]._views = views
        sites = {(layer, edit.site) for variant in variants for layer, edit in variant.inside()}
        hooked = {*self.blocks, *(self._module_at(layer, site) for layer, site in sites)}
        models = [view._model for view in views.values()]
        return apart(views[self.boundary], models, n, hooked=hooked, share=[self.readout])

    # ---- one pack ----

    def _plan(self, lengths: Sequence[int], mode: Mode, budget: int) -> list[range]:
        if mode == "single":
            return plan_packs(lengths, 0)
        return self._backbone.regimes.packs(lengths, budget, padded=mode == "padded")

    @torch.no_grad()
    def _iterate_pack(self, batch: _Batch, pack: range) -> Iterator[_Result]:
        """All variants of a pack's sequences, as :meth:`iterate_variants` yields them."""
        first, last = batch.bounds[pack.start], batch.bounds[pack.stop]
        at = batch.places.chosen(torch.arange(first, last))
        state = batch.rows[first:last].to(self.device)
        bounds = [bound - first for bound in batch.bounds[pack.start : pack.stop + 1]]
        sequences = torch.arange(pack.start, pack.stop)
        for number, variant in enumerate(batch.variants):
            if number not in batch.shared:
                watched = replace(at, watch=batch.moves.watch(number))
                hidden = self._run_pack(state, bounds, watched, variant, batch.mode)
                yield sequences, torch.full_like(sequences, number), hidden.cpu()
        if batch.shared:
            shared = sorted(batch.shared)
            variants = [(batch.variants[i], batch.moves.watch(i)) for i in shared]
            for some, hidden in self._run_shared(state, bounds, at, variants, batch.budget):
                numbers = torch.tensor([shared[i] for i in some])
                yield sequences.repeat_interleave(len(numbers)), numbers.repeat(len(sequences)), hidden.cpu()

    def _run_pack(
        self, state: torch.Tensor, bounds: Sequence[int], at: Rows, variant: Variant, mode: Mode
    ) -> torch.Tensor:
        """``[T, D]`` states of the sequences cut at ``bounds`` -> ``[n, D]`` last block's output at their ends."""
        state = variant.edit_states(state, at)
        last = torch.tensor(bounds[1:]) - 1
        two_steps = len(last) > 1 or (len(state) >= _IN_TWO_STEPS_FROM and self._backbone.regimes.in_row(len(state)))
        if mode == "packed" and two_steps:
            with self._editing([(variant, torch.arange(len(at)), at)]):
                entering, prefix = self._forward_to_last_keys(state, bounds, every_block=False)
            ends = at.chosen(last)
            with self._editing([(variant, torch.arange(len(ends)), ends)]):
                tail = self.at(self.n_blocks - 1)
                return tail._forward_branches(prefix, range(len(ends)), ends.position, entering[last.to(self.device)])
        if mode == "padded":
            index = self._padded_index(bounds)
            with self._editing([(variant, index, at)]):
                return self._forward_padded(state, bounds)[index[last].to(self.device)]
        with self._editing([(variant, torch.arange(len(at)), at)]):
            return self._forward(state[None])[0][last.to(self.device)]

    def _run_shared(
        self, state: torch.Tensor, bounds: Sequence[int], at: Rows, variants: Sequence[_Watched], budget: int
    ) -> Iterator[tuple[range, torch.Tensor]]:
        """Variants of the last position alone: some of them at a time, and ``[n * n_some, D]``, by sequence first."""
        _, prefix = self._forward_to_last_keys(state, bounds, every_block=True)
        last = torch.tensor(bounds[1:]) - 1
        ends, end_rows = at.chosen(last), state[last.to(self.device)]
        n = len(last)
        step = max(1, self._backbone.regimes.row(budget) // n)
        for first in range(0, len(variants), step):
            some = range(first, min(first + step, len(variants)))
            watched = [(variants[i][0], replace(ends, watch=variants[i][1])) for i in some]
            edited = torch.stack([variant.edit_states(end_rows, at_ends) for variant, at_ends in watched], dim=1)
            tokens = torch.arange(n * len(some)).view(n, len(some))
            parts = [(variant, tokens[:, column], at_ends) for column, (variant, at_ends) in enumerate(watched)]
            with self._editing(parts):
                hidden = self._forward_branches(
                    prefix,
                    torch.arange(n).repeat_interleave(len(some)).tolist(),
                    ends.position.repeat_interleave(len(some)),
                    edited.flatten(0, 1),
                )
            yield some, hidden  # no hook is there while the caller has the word

    @contextmanager
    def _editing(self, parts: Sequence[tuple[Variant, torch.Tensor, Rows]]) -> Iterator[None]:
        """Within this block, forwards apply the edits inside the stack.

        Each part is a variant, which rows of the (flattened) batch are its own, and where those stand.
        """
        by_site: dict[tuple[int, str], list[tuple[Any, torch.Tensor, Rows]]] = {}
        for variant, index, at in parts:
            for layer, edit in variant.inside():
                by_site.setdefault((layer, edit.site), []).append((edit, index, replace(at, layer=layer)))
        with ExitStack() as hooks:
            for (layer, site), edits in by_site.items():
                module = self._module_at(layer, site)
                hook = of_this_thread(_editing_hook(edits))
                hooks.callback(module.register_forward_hook(hook).remove)
            yield

    def _module_at(self, layer: int, site: str) -> nn.Module:
        return find_site(self._backbone.blocks[layer], site)  # type: ignore[arg-type]

    def _forward(self, state: torch.Tensor) -> torch.Tensor:
        """A plain forward over ``[B, T, D]`` states -> ``[B, T, D]`` last block's output."""
        with self._handing_on(state):
            return self._backbone.run(inputs_embeds=torch.zeros_like(state), use_cache=False)

    def _forward_padded(self, state: torch.Tensor, bounds: Sequence[int]) -> torch.Tensor:
        """Right-padded, without a mask: no position sees a later one. ``[T, D]`` -> ``[B * Tmax, D]``."""
        n, longest = len(bounds) - 1, max(b - a for a, b in itertools.pairwise(bounds))
        padded = state.new_zeros(n * longest, state.shape[1])
        padded[self._padded_index(bounds).to(state.device)] = state
        with fast_products(self._backbone.blocks):
            return self._forward(padded.view(n, longest, -1)).flatten(0, 1)

    @staticmethod
    def _padded_index(bounds: Sequence[int]) -> torch.Tensor:
        """``[T]``: where each row lies in the flattened padded batch."""
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        spans = itertools.pairwise(bounds)
        return torch.cat([torch.arange(b - a) + number * longest for number, (a, b) in enumerate(spans)])

    def _forward_to_last_keys(
        self, state: torch.Tensor, bounds: Sequence[int], *, every_block: bool
    ) -> tuple[torch.Tensor, Prefix]:
        with self._handing_on(state[None]):
            inputs = torch.zeros_like(state)[None]
            return self._backbone.forward_to_last_keys(bounds, every_block=every_block, inputs_embeds=inputs)

    def _forward_branches(
        self, prefix: Prefix, sequence_of: Sequence[int], positions: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        with self._handing_on(rows[None]):
            inputs = torch.zeros_like(rows)[None]
            return self._backbone.forward_branches(prefix, sequence_of, positions.to(self.device), inputs_embeds=inputs)

    @contextmanager
    def _handing_on(self, state: torch.Tensor) -> Iterator[None]:
        # A copy, as some blocks add to their input in place. The stand-ins ignore what the model makes of the
        # embeddings that it is given; it reads their shape, dtype and device.
        self._source.state = state.clone()
        try:
            yield
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
            if self._backbone.max_positions is not None and stop - start > self._backbone.max_positions:
                raise InputError(
                    f"sequence {index} has {stop - start} rows; the model has {self._backbone.max_positions} positions"
                )
        _check_finite("the states given", rows, bounds)
        return bounds

    # ---- probes at load ----

    @torch.no_grad()
    def _probe_modes(self) -> None:
        """Learn how sequences may share a forward."""
        generator = torch.Generator().manual_seed(0)
        first, changed, second = (  # the second is padded, where there is padding
            torch.randn(n_tokens, self.width, generator=generator).to(self.device, self.dtype) for n_tokens in (5, 5, 4)
        )
        if is_wrapped(self._model):
            self.mode = "single"
            self.not_packable = f"{type(self._backbone.decoder).__name__}: the forward of one of its modules is wrapped"
            return
        (late,) = self._copies(1, [])
        self.not_packable = self._backbone.not_packable or late._why_not("packed", first, changed, second)
        if self.not_packable:
            self.mode = "single" if late._why_not("padded", first, changed, second) else "padded"

    def _why_not(self, mode: Mode, first: torch.Tensor, changed: torch.Tensor, second: torch.Tensor) -> str | None:
        """The reason why sequences that share a forward in this mode are not what each is alone, or None.

        The second sequence must give what it gives alone, to rounding, behind the first, behind a changed one, before
        it, and (where the mode is ``packed``) as a variant of another that differs at its last position.
        """
        name = type(self._backbone.decoder).__name__
        n = len(second)
        alone = self._forward(second[None])[0, -1].float()
        allowed = rounding_of(self.dtype) * alone.abs().max().item()

        def place(lengths: Sequence[int]) -> Rows:
            sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
            position = torch.cat([torch.arange(length) for length in lengths])
            return Rows(sequence, position, torch.arange(len(sequence)), torch.tensor(lengths), [])

        found = []
        for order, index in (((first, second), 1), ((changed, second), 1), ((second, first), 0)):
            lengths = [len(part) for part in order]
            bounds = offsets_of(lengths).tolist()
            try:
                found.append(self._run_pack(torch.cat(order), bounds, place(lengths), PLAIN, mode)[index])
            except FAILURES as error:
                return why_failed(self._backbone.decoder, mode, error)
        if mode == "packed":
            bounds = offsets_of([n, n]).tolist()
            mixed = torch.cat([first[: n - 1], second[-1:], second[:-1], first[-1:]])
            _, prefix = self._forward_to_last_keys(mixed, bounds, every_block=True)
            ends = torch.tensor([n - 1, n - 1, n - 1])
            rows = torch.stack([changed[0], second[-1], changed[1]])
            try:
                found.append(self._forward_branches(prefix, [0, 1, 1], ends, rows)[1])
            except FAILURES as error:
                return why_failed(self._backbone.decoder, mode, error)
        off = max((one.float() - alone).abs().max().item() for one in found)
        if not off <= allowed:
            return f"{name}: a {mode} sequence differs from the same one alone by {off:.2g}"
        return None


def _check_finite(what: str, rows: torch.Tensor, bounds: Sequence[int]) -> None:
    if (row := first_no_state(rows)) is not None:
        sequence = bisect_right(bounds, row) - 1
        raise InputError(
            f"{what}: row {row} (sequence {sequence}, position {row - bounds[sequence]}) holds values that are not "
            "finite, or whose squares are not; a store of an earlier version that does must be captured again"
        )


def _editing_hook(edits: Sequence[tuple[Any, torch.Tensor, Rows]]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        flat = own.flatten(0, -2).clone()
        for edit, index, at in edits:
            index = index.to(flat.device)
            flat[index] = edit.apply(flat[index], at)
        edited = flat.view_as(own)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    return hook
