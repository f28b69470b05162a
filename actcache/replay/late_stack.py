"""LateStack: the late blocks of one checkpoint, loaded alone, and replays of stored states through them.

Every call runs copies of the stack, which share its weights (copies.py): threads may call at once, and the model that a
stack was made of stays as it is, also during a call. On the CPU several packs run at once, each by a copy on its own
part of torch's threads (workers.py). Knows models and rows; knows no files of ours.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from actcache.errors import ActcacheError, InputError, NotFiniteError
from actcache.finite import first_no_state
from actcache.models.blocks import (
    StateSource,
    check_boundary,
    cut_upstream,
    find_anatomy,
    is_wrapped,
    shallow_clone,
)
from actcache.models.checkpoint import Checkpoint
from actcache.models.parts import load_late_blocks
from actcache.models.probe import probe_late_blocks
from actcache.models.readout import Readout
from actcache.progress import Told, nobody_told
from actcache.replay.around import Added, Around, find_added
from actcache.replay.batch import Batch, Positions
from actcache.replay.copies import apart, copies_of
from actcache.replay.edits import PLAIN, Variant
from actcache.replay.forwards import Forwards, Mode
from actcache.replay.gradients import Gradients, gradients_of
from actcache.replay.modes import find_mode, plan, share_work, tokens_of_pack
from actcache.replay.moves import Moves
from actcache.replay.passes import Result, Work, divide, run_pack
from actcache.replay.sizes import SIZES
from actcache.replay.swap import Module, Swap, with_swapped
from actcache.replay.workers import side_by_side


class LateStack:
    """Blocks ``boundary..L-1`` of one checkpoint, with its readout. Made by :meth:`load`.

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
        self, forwards: Forwards, mode: Mode, not_packable: str | None, first: LateStack | None = None
    ) -> None:
        """Of forwards whose mode is known; ``first`` is the stack that this one is a later part of."""
        self._forwards, self._first = forwards, first
        self._later: dict[int, LateStack] = {}
        self._added: dict[tuple[Module, int], Added | None] = {} if first is None else first._added
        self._cutting = threading.Lock()
        backbone = forwards.backbone
        self.boundary, self.n_blocks = forwards.boundary, backbone.n_blocks
        self.width, self.dtype, self.readout = backbone.width, backbone.dtype, backbone.readout
        self.mode, self.not_packable = mode, not_packable

    @classmethod
    def _of(cls, model: PreTrainedModel, source: StateSource, boundary: int) -> LateStack:
        """Of a model whose upstream is cut, after probes."""
        anatomy = find_anatomy(model)
        hooked = {*model.get_submodule(anatomy.blocks).children(), model.get_submodule(anatomy.final_norm)}
        probed = model if is_wrapped(model) else apart(model, [model], 1, hooked=hooked)[0]
        probe_late_blocks(probed, boundary, source)
        forwards = Forwards(model, source, boundary)
        return cls(forwards, *find_mode(forwards))

    @classmethod
    def load(
        cls,
        path_or_model: str | Path | Checkpoint | PreTrainedModel,
        boundary: int,
        *,
        dtype: torch.dtype | None = None,
        device: str = "cpu",
        dequantize: bool = False,
    ) -> LateStack:
        """Load the late blocks and the readout only, or take them from a model in memory.

        From a folder, transformers' own loader fills a model that has no upstream parameters: upstream weights (and
        token embeddings that are not tied to the head) are never read. A model in memory shares its weights and stays
        as it is, also while it is probed and replayed; it must be in eval mode.

        Args:
            path_or_model: model folder (safetensors), id of the Hub, BASE+ADAPTER, a checkpoint, or a causal LM.
            boundary: first late block, ``0..L-1``.
            dtype: of weights and states; None keeps the checkpoint's own. Ignored for a model in memory.
            device: where to put the weights. Ignored for a model in memory.
            dequantize: whether a checkpoint of quantized weights may be dequantized. Ignored for a model in memory.

        Raises:
            InputError: boundary out of range, folder unusable, model in training mode.
            UnsupportedModelError: the architecture cannot be cut, or its late blocks read more than the state.
        """
        if isinstance(path_or_model, PreTrainedModel):
            if path_or_model.training:
                raise InputError("the model is in training mode; call model.eval() first")
            anatomy = find_anatomy(path_or_model)
            model = shallow_clone(path_or_model, anatomy.blocks)
            return cls._of(model, cut_upstream(model, boundary), boundary)
        checkpoint = path_or_model
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open("late", checkpoint, dequantize=dequantize)
        check_boundary(boundary, checkpoint.decoder_config.num_hidden_layers)
        model, source = load_late_blocks(checkpoint, boundary, dtype)
        model.to(device)  # type: ignore[arg-type]
        with checkpoint.named():
            return cls._of(model, source, boundary)

    def at(self, boundary: int) -> LateStack:
        """The same stack from a later boundary on; weights are shared, nothing is loaded.

        Raises:
            InputError: the boundary is before this stack's own, or beyond the last block.
        """
        check_boundary(boundary, self.n_blocks)
        first = self._first or self
        if boundary < first.boundary:
            raise InputError(
                f"boundary {boundary} is before {first.boundary}, where this late stack begins: load it from there"
            )
        if boundary == first.boundary:
            return first
        with first._cutting:
            if boundary not in first._later:
                first._later[boundary] = first._cut(boundary)
            return first._later[boundary]

    def _cut(self, boundary: int) -> LateStack:
        own = self._forwards
        model = shallow_clone(own.model, find_anatomy(own.model).blocks)
        source = cut_upstream(model, boundary)
        source.in_tuple, source.n_more = own.source.in_tuple, own.source.n_more
        later = Forwards(model, source, boundary, self.readout)
        return LateStack(later, self.mode, self.not_packable, first=self)

    def swapped(self, source: LateStack, swap: Swap) -> LateStack:
        """This stack with some modules of another checkpoint's, which is a stack from the same boundary or an earlier
        one; weights are shared, nothing is loaded or copied. The readout stays.

        Raises:
            InputError: the blocks of the swap are not in both stacks, their weights do not have the same shapes, or one
                of the stacks has one block in memory at a time.
            UnsupportedModelError: the blocks have no such module.
        """
        first = max(self.boundary, source.boundary)
        if swap.first < first or swap.stop > self.n_blocks:
            raise InputError(
                f"a swap of blocks {swap.first}..{swap.stop - 1}: the late stacks have {first}..{self.n_blocks - 1}"
            )
        own, other = self._whole(), source._whole()
        model = with_swapped(own.model, other.model, swap)
        found = LateStack(Forwards(model, own.source, self.boundary, self.readout), self.mode, self.not_packable)
        found._added = self._added  # the architecture's
        return found

    def _whole(self) -> Forwards:
        """The forwards of all blocks, which are in memory."""
        return self._forwards

    def __repr__(self) -> str:
        kind = type(self._forwards.backbone.decoder).__name__
        return (
            f"<LateStack of {kind}: blocks {self.boundary}..{self.n_blocks - 1}, "
            f"{str(self.dtype).removeprefix('torch.')}, width {self.width}, on {self.device}, {self.mode}>"
        )

    @property
    def config(self) -> PreTrainedConfig:
        """The decoder's."""
        return self._forwards.backbone.config

    @property
    def blocks(self) -> list[nn.Module]:
        """The late blocks themselves. What is hooked to them may be called from several threads, on copies of them."""
        return self._forwards.blocks

    @property
    def device(self) -> torch.device:
        """Where the late blocks are."""
        return self._forwards.backbone.device

    def run(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        *,
        positions: Positions | None = None,
        strict: bool = False,
        max_tokens: int | None = None,
        together: bool = False,
    ) -> torch.Tensor:
        """Replay sequences from their states at the boundary.

        A sequence may be scored at several positions, which share one run through it: ``positions`` names each event's
        sequence and position. An event's final state is what a replay of its sequence alone gives, cut after its
        position: bit for bit if ``strict`` (each distinct one is then a forward of its own), to rounding otherwise.

        Args:
            rows: ``[N, D]`` states at the boundary, all positions of every sequence, in this stack's dtype.
            offsets: ``[n + 1]``; sequence i is ``rows[offsets[i]:offsets[i + 1]]``, none empty.
            positions: ``[m, 2]`` whole numbers, in any order: the sequence and the position in it of each event. None:
                each sequence's last position, so that event i is sequence i and m is n.
            strict: one sequence per forward with the model's own attention: bit-identical to a full forward whose state
                at the boundary is overwritten. Otherwise as :attr:`mode` says, which differs by rounding only.
            max_tokens: tokens of one forward, of which several may run at once on the CPU (unless ``strict``); None
                for what suits the device.
            together: whether positions of one sequence share its forward if ``strict``, too: each is then read from the
                forward over the sequence up to the last of them.

        Returns:
            ``[m, D]``: last block's output (before the final norm) at the position of each event, on the CPU, in this
            stack's dtype.

        Raises:
            InputError: dtype, width, offsets or positions do not fit, a row is not finite, or its squares are not, or a
                sequence is longer than the model's positions.
        """
        given = {"positions": positions, "strict": strict, "max_tokens": max_tokens, "together": together}
        return self.run_variants(rows, offsets, [PLAIN], **given)[:, 0]  # type: ignore[arg-type]

    @torch.no_grad()
    def sizes(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        *,
        positions: Positions | None = None,
        strict: bool = False,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """How large the last block's outputs are when sequences are replayed: over all positions up to each event's,
        and there (arguments and errors as :meth:`run`).

        Returns:
            ``[m, 4]`` float64: root mean square over the sequence, at the event's position, then the standard
            deviation over both (see :data:`actcache.replay.sizes.SIZES`), before the final norm.
        """
        given = rows, offsets, [PLAIN], positions, None, None, None, None
        batch = Batch.of(self._forwards, self._mode(strict), max_tokens, *given, sizes=True)
        out = torch.empty(len(batch.spans), len(SIZES), dtype=torch.float64)
        for events, _, sizes in self._iterate(batch):
            out[events] = sizes
        return out

    def gradients(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        tokens: torch.Tensor,
        layers: Sequence[int],
        *,
        positions: Positions | None = None,
        site: str = "mlp",
        readout: Readout | None = None,
        told: Told = nobody_told,
    ) -> Gradients:
        """How each event's margin changes with what modules give at its position: one forward of its sequence alone,
        and one backward to all of the modules (arguments and errors also as :meth:`run`).

        Args:
            rows, offsets, positions: as there.
            tokens: ``[m, 2]`` int64, whose logits the margin is of: the second one's less the first one's.
            layers: block indices, ascending.
            site: ``mlp`` or ``attention``: the modules, as edits name them.
            readout: reads the last block's output; None for this stack's own.
            told: hears of every event.

        Raises:
            InputError: a block has one in memory at a time, or is not of this stack.
            UnsupportedModelError: a block has no such module.
        """
        whole, reader = self._whole(), readout or self.readout
        batch = Batch.of(whole, "single", None, rows, offsets, [PLAIN], positions, None, None, None, None)
        if wrong := [layer for layer in layers if not self.boundary <= layer < self.n_blocks]:
            raise InputError(f"block {wrong[0]}: the late stack has blocks {self.boundary}..{self.n_blocks - 1}")
        (own,) = copies_of(whole, 1, [whole.site(layer, site) for layer in layers])
        sites = [own.site(layer, site) for layer in layers]
        shape = len(batch.spans), len(layers), self.width
        found = Gradients(torch.empty(shape[0]), *(torch.empty(shape, dtype=self.dtype) for _ in range(2)))
        for event, span in enumerate(batch.spans):
            state = batch.rows[span.start : span.stop].to(self.device)
            of_event = gradients_of(own, state, sites, partial(reader.margins, token_ids=tokens[event : event + 1]))
            for every, one in zip(found, of_event, strict=True):
                every[event] = one[0]
            told(1)
        return found

    @torch.no_grad()
    def states(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        boundary: int,
        *,
        strict: bool = False,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """The states at a later boundary, ``[N, D]`` on the CPU, at every position of sequences that begin with these
        rows (arguments and errors as :meth:`run`): of a stack with another checkpoint's modules, what these make of
        the host's states.

        Raises:
            InputError: also where no such boundary lies behind this stack's, or blocks are in memory one at a time.
        """
        whole = self._whole()
        if not self.boundary < boundary < self.n_blocks:
            raise InputError(f"boundary {boundary} is none of {self.boundary + 1}..{self.n_blocks - 1}")
        given = rows, offsets, [PLAIN], None, None, None, None, None
        batch = Batch.of(whole, self._mode(strict), max_tokens, *given, entering=boundary)
        out = torch.empty_like(rows, device="cpu")
        for sequences, _, values in self._iterate(batch):
            spans = [batch.spans[one] for one in sequences.unique_consecutive().tolist()]
            out[torch.cat([torch.arange(span.start, span.stop) for span in spans])] = values
        return out

    @torch.no_grad()
    def around(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        module: Module,
        layers: Sequence[int],
        *,
        positions: Positions | None = None,
        strict: bool = False,
        max_tokens: int | None = None,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Replay sequences, and look at the residual stream around a module of some blocks, at each event's position
        (arguments and errors as :meth:`run`).

        Args:
            module: ``mlp``, ``attention`` or ``block``.
            layers: indices of k late blocks, each once.

        Yields:
            events ``[m']``, and ``[m', 1 + 2 k, D]`` on the CPU: the last block's output, then of each block the
            residual stream before the module adds to it, and after; each event once, in no fixed order.

        Raises:
            InputError: the stack has no such block, or its blocks are in memory one at a time.
            UnsupportedModelError: what the module adds is unknown (see :func:`actcache.replay.around.find_added`).
        """
        whole = self._whole()
        if wrong := [layer for layer in layers if not self.boundary <= layer < self.n_blocks]:
            raise InputError(f"block {wrong[0]} is none of {self.boundary}..{self.n_blocks - 1}, which this stack has")
        if unknown := [layer for layer in layers if (module, layer) not in self._added]:
            found = find_added(whole, module, unknown)
            self._added.update({(module, layer): one for layer, one in found.items()})
        wanted = Around(module, {layer: self._added[module, layer] for layer in layers})
        given = rows, offsets, [PLAIN], positions, None, None, None, None
        batch = Batch.of(whole, self._mode(strict), max_tokens, *given, around=wanted)
        for events, _, values in self._iterate(batch):
            yield events, values

    @torch.no_grad()
    def run_variants(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        variants: Sequence[Variant],
        *,
        positions: Positions | None = None,
        donors: Mapping[str, torch.Tensor] | None = None,
        keys: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        strict: bool = False,
        max_tokens: int | None = None,
        together: bool = False,
        moves: Moves | None = None,
    ) -> torch.Tensor:
        """Replay sequences once for each variant: ``[m, n_variants, D]`` (arguments as :meth:`prepare` and :meth:`run`,
        errors also of :meth:`replay`)."""
        given = rows, offsets, variants, positions, donors, keys, prompts, moves
        batch = Batch.of(self._forwards, self._mode(strict), max_tokens, *given, together=together)
        out = torch.empty(len(batch.spans), len(variants), self.width, dtype=self.dtype)
        for events, numbers, hidden in self._iterate(batch):
            out[events, numbers] = hidden
        return out

    def prepare(
        self,
        rows: torch.Tensor,
        offsets: torch.Tensor | Sequence[int],
        variants: Sequence[Variant],
        *,
        positions: Positions | None = None,
        donors: Mapping[str, torch.Tensor] | None = None,
        keys: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
        strict: bool = False,
        max_tokens: int | None = None,
        moves: Moves | None = None,
    ) -> Batch:
        """Check what is to be replayed, each sequence once for each variant; :meth:`replay` does it.

        Each event counts as a sequence of its own, cut after its position. So to an edit, ``last`` and -1 are the
        event's position, and ``all`` ends with it; what random edits draw, and a vector per event, is the event's.

        Where the mode is ``packed``, variants that leave the first positions alone share the keys and values of these,
        with the other events of the sequence too: each costs the rows from the first position that it changes to the
        event's through the late blocks, one where it changes the event's alone. Of all others, variants that change
        rows whatever the event is cost a replay of the sequence for all of its events, the rest one for each event.

        Args:
            rows, offsets, positions, strict, max_tokens: as :meth:`run`.
            variants: what to change.
            donors: label -> rows of other checkpoints beside ``rows``, ``[N, D]``, for edits that name one.
            keys: what names each event, for random edits and vectors per event: the event ids, or by default its
                number here.
            prompts: what names each event's prompt, ``[m]``, for edits that are drawn once per prompt: the prompt ids,
                or by default the number of its sequence. Events of one sequence are of one prompt.
            moves: is told which edits moved something.

        Raises:
            InputError: as :meth:`run`; donors that do not match ``rows``; a sequence of two prompts; an edit of a layer
                or position that does not exist; a vector that does not fit, or is missing for a key.
        """
        given = rows, offsets, variants, positions, donors, keys, prompts, moves
        return Batch.of(self._forwards, self._mode(strict), max_tokens, *given)

    @torch.no_grad()
    def replay(self, batch: Batch) -> Iterator[Result]:
        """Replay what was prepared by this stack, a few sequences and variants at a time, so that memory stays bounded.

        Yields:
            events ``[m']`` and variants ``[m']`` (indices, int64) and their last block's output at p, ``[m', D]`` on
            the CPU, each pair once, in no fixed order.

        Raises:
            InputError: an edit that moves nothing (see :class:`actcache.replay.moves.Moves`).
            UnsupportedModelError: an edit inside the stack of an architecture that has no such site.
            NotFiniteError: finite rows become NaN or infinity, or their squares do, in a block, which it names;
                InputError, where the edits of a variant do that.
        """
        yield from self._iterate(batch)

    def packs(self, lengths: Sequence[int], *, strict: bool = False, max_tokens: int | None = None) -> list[range]:
        """How :meth:`run` cuts sequences of these lengths into forwards."""
        mode = self._mode(strict)
        n_workers, _ = share_work(mode, self.device, sum(lengths))
        budget = tokens_of_pack(self.device, max_tokens)
        return plan(lengths, mode, self._forwards.backbone.regimes, budget, n_workers)

    def _mode(self, strict: bool) -> Mode:
        return "single" if strict or is_wrapped(self._forwards.model) else self.mode

    @torch.no_grad()
    def _iterate(self, batch: Batch) -> Iterator[Result]:
        regimes = self._forwards.backbone.regimes
        works = divide(batch, regimes)
        lengths = [[len(one.rows) for one in work.passes] for work in works]
        n_workers, n_threads = share_work(batch.mode, self.device, sum(map(sum, lengths)))
        sites = {(layer, edit.site) for variant in batch.variants for layer, edit in variant.inside()}
        hooked = [self._forwards.site(*place) for place in sites]
        hooked += [] if batch.around is None else batch.around.parts(self._forwards)
        copies = copies_of(self._forwards, n_workers, hooked)
        packs = [
            (work, pack)
            for work, of_passes in zip(works, lengths, strict=True)
            for pack in plan(of_passes, batch.mode, regimes, batch.budget, n_workers)
        ]
        if n_workers == 1:
            for pack in packs:
                yield from self._checked(batch, run_pack(copies[0], batch, *pack))
            return

        def run(work: Work, pack: range, worker: int) -> Iterator[Result]:
            return run_pack(copies[worker], batch, work, pack)

        yield from self._checked(batch, side_by_side([partial(run, *pack) for pack in packs], n_workers, n_threads))

    def _checked(self, batch: Batch, results: Iterable[Result]) -> Iterator[Result]:
        """What comes out of finite rows is finite, or an error that names event, and variant or block."""
        for events, numbers, hidden in results:
            if (row := first_no_state(hidden)) is not None:
                raise self._not_finite(batch, int(events[row]), batch.variants[int(numbers[row])])
            yield events, numbers, hidden

    def _not_finite(self, batch: Batch, event: int, variant: Variant) -> ActcacheError:
        key, span = batch.keys[event], batch.spans[event]
        if variant.name != PLAIN.name:
            return InputError(
                f"variant {variant.name!r}: what its edits make of sequence {key!r} is not finite in {self.dtype}, "
                "or its squares are not in float32; leave it out, or make its values smaller"
            )
        where = self._where_not_finite(batch.rows[span.start : span.stop].to(self.device))
        return NotFiniteError(
            f"the replay of sequence {key!r} from finite states is not finite, or its squares are not; {where}"
        )

    def _where_not_finite(self, state: torch.Tensor) -> str:
        """In words, which block is the first whose output over one sequence's states ``[T, D]`` is not finite."""
        (own,) = copies_of(self._forwards, 1)
        return own.first_not_finite(state)
