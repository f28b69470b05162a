"""Ragged batches without padding: many sequences concatenated into one row of tokens, attention kept apart.

A *pack* is one forward over ``[1, T]`` tokens that belong to several sequences; ``offsets`` (``[n + 1]``) says where
each begins. Everything but attention works on tokens one by one, so only attention has to know. The registered
attention function cuts queries, keys and values at the offsets. It hands each sequence to the model's *own* attention
implementation, with the mask that the model's own mask builder makes: windows, soft-caps, scales, grouped heads and
sinks stay the model's. Positions restart at 0 in every sequence. Packs whose masks are causal, or causal
within a window, go to one kernel instead: torch's varlen attention on CUDA, the native core's on the CPU.

A pack can leave behind its :class:`Prefix`: the keys and values of all positions but the last of every sequence. A
second forward over *branches* then reads them: a branch is one token or several in a row that stand at positions of a
sequence, and sees those before its first one. A thousand variants of one state cost a thousand tokens, not a thousand
sequences.

Knows tensors, transformers' attention registry and the native core; knows no model, no tokens, no files.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from actcache.native import native

varlen_attn: Callable[..., Any] | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

IMPLEMENTATION = "actcache_packed"

# Beyond this many tokens torch's attention, which cuts keys into tiles, is as fast as the core's.
_LONGEST_IN_CORE = 1024

# Tokens of one sequence's branches that one attention call takes: each sees the keys of its own branch only, so those
# of the others are masked work, which grows with their number, while the calls grow with its inverse.
_BRANCHED_AT_ONCE = 64

Mask = torch.Tensor | None  # [1, 1 or H, T, T], boolean or additive; None is plain causal


def plan_packs(
    lengths: Sequence[int], max_tokens: int, *, padded: bool = False, kinds: Sequence[Hashable] | None = None
) -> list[range]:
    """Cut sequences, in order, into packs of at most ``max_tokens`` tokens; a longer sequence is a pack by itself.

    If ``padded``, each sequence takes as many tokens as the longest of its pack. Different ``kinds`` share no pack."""
    packs: list[range] = []
    start, n_tokens, longest = 0, 0, 0
    for index, length in enumerate(lengths):
        longest = max(longest, length)
        n_tokens = (index - start + 1) * longest if padded else n_tokens + length
        if index > start and (n_tokens > max_tokens or (kinds is not None and kinds[index] != kinds[start])):
            packs.append(range(start, index))
            start, n_tokens, longest = index, length, length
    if start < len(lengths):
        packs.append(range(start, len(lengths)))
    return packs


def plan_evenly(plan: Callable[[int], list[range]], max_tokens: int, n_workers: int) -> list[range]:
    """``plan(budget)`` at the lowest budget that takes no more rounds than ``max_tokens`` does, where ``n_workers``
    packs run in a round: the same work for every worker, as near as sequences in their order allow."""
    n_rounds = -(-len(plan(max_tokens)) // n_workers)
    enough, too_few = max_tokens, 0
    while enough - too_few > 1:
        budget = (enough + too_few) // 2
        if len(plan(budget)) <= n_rounds * n_workers:
            enough = budget
        else:
            too_few = budget
    return plan(enough)


def offsets_of(lengths: Sequence[int]) -> torch.Tensor:
    """``[n + 1]`` int64: where each sequence of these lengths begins when they are concatenated."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(torch.tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
    return offsets


def restarting_positions(bounds: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """``[1, T]`` int64: 0, 1, 2, ... within every sequence."""
    return torch.cat([torch.arange(b - a, device=device) for a, b in itertools.pairwise(bounds)])[None]


def why_not_packable(decoder: torch.nn.Module) -> str | None:
    """The reason why packs cannot be run through this decoder, or None. Static; callers also probe the numbers."""
    if not getattr(decoder, "_supports_attention_backend", False):
        return f"{type(decoder).__name__} does not use transformers' attention interface"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        return f"{type(decoder).__name__} takes no position_ids"
    return None


@dataclass
class Prefix:
    """What a pack leaves behind for tokens that stand at positions of its sequences.

    Attributes:
        layers: of every attention module that was reached, one entry per sequence: keys and values
            ``[1, H_kv, T - 1, d]`` of all positions but the last, and the model's mask ``[1, 1 or H, T, T]``, or None
            where it is plain causal.
    """

    layers: dict[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor, Mask]]] = field(default_factory=dict)


class PackStoppedError(Exception):
    """Ends a forward at the attention it was asked to stop at; not an error."""


class _Mode(Protocol):
    """What attention does with a batch within one of the two context managers below."""

    def masks(self, local_size: int | None, use_vmap: bool, builder_arguments: dict[str, Any]) -> Any: ...

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        masks: Any,
        arguments: dict[str, Any],
    ) -> torch.Tensor: ...


_current: ContextVar[_Mode | None] = ContextVar("actcache_pack", default=None)


@contextmanager
def packed_attention(
    config: PretrainedConfig, bounds: Sequence[int], prefix: Prefix | None = None
) -> Iterator[PackedSequences]:
    """Within this block, models that share ``config`` treat a ``[1, T]`` batch as sequences cut at ``bounds``.

    ``prefix`` is filled if given. The switch is on the config object, which the attention modules read at every call:
    for a model that no other thread runs meanwhile.
    """
    mode = PackedSequences(tuple(bounds), config._attn_implementation, prefix)
    with _switched(config, mode):
        yield mode


@contextmanager
def branched_attention(
    config: PretrainedConfig,
    prefix: Prefix,
    sequence_of: Sequence[int],
    positions: Sequence[int],
    bounds: Sequence[int] | None = None,
) -> Iterator[None]:
    """Within this block, token i of a ``[1, n]`` batch stands at ``positions[i]`` of sequence ``sequence_of[i]`` of the
    pack that left ``prefix``. The batch is cut into branches at ``bounds``, or into tokens if None; those of a branch
    stand at positions of one sequence that follow one another. A token sees the sequence's positions before its branch,
    and those of its branch up to itself, as far as the model's mask lets it; no other token of the batch. Branches of
    one sequence shall stand together. (Threads: as :func:`packed_attention`.)"""
    bounds = range(len(positions) + 1) if bounds is None else bounds
    with _switched(config, _Branches(prefix, sequence_of, positions, bounds, config._attn_implementation)):
        yield


@contextmanager
def _switched(config: PretrainedConfig, mode: _Mode) -> Iterator[None]:
    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _masks)
    own = config._attn_implementation
    token = _current.set(mode)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = own
        _current.reset(token)


def _mode() -> _Mode:
    mode = _current.get()
    if mode is None:
        raise RuntimeError("packed attention was called outside of packed_attention()")
    return mode


def _masks(*, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any) -> Any:
    """Mask builder of the registry; what it returns goes untouched to :func:`_attention`."""
    return _mode().masks(local_size, use_vmap, kwargs)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of the registry: query ``[1, H, T, d]``, key and value ``[1, H_kv, T, d]`` -> ``[1, T, H, d]``."""
    return _mode().attend(module, query, key, value, attention_mask, kwargs), None


class PackedSequences:
    """Sequences that lie between ``bounds``, each with the model's own attention.

    Attributes:
        prefix: what attention leaves its keys and values in, if anything.
        stop: set by the caller when the next attention is only wanted for its keys and values: it fills the prefix
            and raises PackStoppedError.
    """

    def __init__(self, bounds: tuple[int, ...], implementation: str, prefix: Prefix | None) -> None:
        self._bounds = bounds
        self._implementation = implementation  # the model's own attention, which serves each sequence
        self.prefix = prefix
        self.stop = False

    def masks(self, local_size: int | None, use_vmap: bool, builder_arguments: dict[str, Any]) -> list[Mask]:
        """One mask for each sequence, made by the model's own builder."""
        masks: list[Mask] = []
        for start, stop in itertools.pairwise(self._bounds):
            length = stop - start
            # The skip (mask None, kernel told "causal") was switched off for the whole pack only because positions
            # restart in it. One sequence alone is plain causal unless a window shorter than it, or an overlay, says
            # otherwise.
            plain = not use_vmap and (local_size is None or length <= local_size)
            if self._implementation == "sdpa" and plain:
                masks.append(None)
                continue
            place = {"q_length": length, "kv_length": length, "q_offset": start, "kv_offset": start}
            given = builder_arguments | place | {"use_vmap": use_vmap, "local_size": local_size}
            build = ALL_MASK_ATTENTION_FUNCTIONS[self._implementation]
            masks.append(build(**given | {"allow_is_causal_skip": plain}))
        return masks

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        masks: list[Mask],
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Attention within each sequence; leaves keys and values in the prefix."""
        spans = list(itertools.pairwise(self._bounds))
        if self.prefix is not None:
            self.prefix.layers[module] = [
                (key[:, :, start : stop - 1], value[:, :, start : stop - 1], mask)
                for (start, stop), mask in zip(spans, masks, strict=True)
            ]
            if self.stop:
                raise PackStoppedError
        if takes_varlen(module, query, key, value, masks, arguments):
            return attend_varlen(query, key, value, self._bounds, arguments)
        lengths = [stop - start for start, stop in spans]
        if max(lengths) <= _LONGEST_IN_CORE and takes_core(module, query, key, value, masks, arguments):
            # Where no mask was made the model's own attention, too, takes no notice of a window.
            window = arguments.get("sliding_window") if any(mask is not None for mask in masks) else None
            return attend_in_core(query, key, value, self._bounds, arguments.get("scaling"), window)
        attend = _own_attention(module, self._implementation)
        parts = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
        outputs = [attend(module, q, k, v, mask, **arguments)[0] for q, k, v, mask in zip(*parts, masks, strict=True)]
        return torch.cat(outputs, dim=1)


class _Branches:
    """Tokens at positions of sequences whose earlier keys and values are known."""

    def __init__(
        self,
        prefix: Prefix,
        sequence_of: Sequence[int],
        positions: Sequence[int],
        bounds: Sequence[int],
        implementation: str,
    ) -> None:
        self._prefix, self._positions = prefix, positions
        self._implementation = implementation
        # Of every token, its branch, told by where that begins, and how many positions come before it.
        self._branch = [start for start, stop in itertools.pairwise(bounds) for _ in range(stop - start)]
        self._known = [positions[start] for start in self._branch]
        self._runs: list[tuple[int, slice]] = []  # a sequence, and tokens of it that one attention call takes
        for sequence, of in itertools.groupby(itertools.pairwise(bounds), key=lambda branch: sequence_of[branch[0]]):
            begin = end = None
            for start, stop in of:
                if begin is None or stop - begin > _BRANCHED_AT_ONCE:
                    if begin is not None:
                        self._runs.append((sequence, slice(begin, end)))
                    begin = start
                end = stop
            self._runs.append((sequence, slice(begin, end)))
        self._masks: dict[tuple[int, int], Mask] = {}  # by the first token of a run and the sequence's mask

    def masks(self, local_size: int | None, use_vmap: bool, builder_arguments: dict[str, Any]) -> None:
        """The prefix holds the masks."""

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        masks: None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """Attention of every branch to the positions of its sequence before it and to itself."""
        attend = _own_attention(module, self._implementation)
        entries = self._prefix.layers[module]
        outputs = []
        for sequence, run in self._runs:
            known_keys, known_values, mask = entries[sequence]
            known = self._known[run]
            n_known = max(known)
            keys = torch.cat([known_keys[:, :, :n_known], key[:, :, run]], dim=2)
            values = torch.cat([known_values[:, :, :n_known], value[:, :, run]], dim=2)
            place = run.start, id(mask)  # most layers have the same mask
            if place not in self._masks:
                where = self._positions[run], known, self._branch[run]
                self._masks[place] = _branch_mask(mask, *where, key.device)
            outputs.append(attend(module, query[:, :, run], keys, values, self._masks[place], **arguments)[0])
        return torch.cat(outputs, dim=1)


def _branch_mask(
    mask: Mask, positions: Sequence[int], known: Sequence[int], branches: Sequence[int], device: torch.device
) -> Mask:
    """``[1, 1 or H, n, m + n]`` for tokens at these positions, with the keys of the m positions before the latest
    branch and their own: each one's row of the model's mask, as far as its branch goes; None where a single token sees
    everything.

    Args:
        mask: the model's, of the sequence.
        positions: ``[n]``, where the tokens stand.
        known: ``[n]``, how many positions come before each one's branch.
        branches: ``[n]``, what tells each one's branch from the others.
    """
    n, m = len(positions), max(known)
    if mask is None and n == 1:
        return None
    at, n_before, branch = (torch.tensor(of, device=device) for of in (positions, known, branches))
    width = max(positions) + 1
    rows = torch.ones(1, 1, n, width, dtype=torch.bool, device=device) if mask is None else mask[:, :, at]
    hidden = False if rows.dtype == torch.bool else torch.finfo(rows.dtype).min
    own = rows.gather(-1, at.expand(*rows.shape[:2], n, n))
    before = torch.arange(m, device=device) < n_before[:, None]
    beside = (branch[:, None] == branch) & (at <= at[:, None])
    parts = ((rows[..., :m], before), (own, beside))
    return torch.cat([part.masked_fill(~seen, hidden) for part, seen in parts], dim=-1)


def _own_attention(module: torch.nn.Module, implementation: str) -> Callable[..., tuple[torch.Tensor, Any]]:
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def takes_varlen(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: Sequence[Mask],
    arguments: dict[str, Any],
) -> bool:
    """Whether torch's varlen kernel computes this attention: CUDA, half precision, no soft-cap, sink or bias, and masks
    that are causal, or causal within the window that the module names."""
    if varlen_attn is None or not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return False
    return _is_plain(module, masks, arguments)


def takes_core(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    masks: Sequence[Mask],
    arguments: dict[str, Any],
) -> bool:
    """Whether the native core computes this attention: float32 on a CPU with AVX2, outside of autograd, otherwise as
    :func:`takes_varlen`."""
    if torch.is_grad_enabled() or any(one.device.type != "cpu" for one in (query, key, value)):
        return False
    if any(one.dtype != torch.float32 for one in (query, key, value)) or len(query) != 1:
        return False
    if native("cpu")[0] is None:
        return False
    from actcache import _core

    return _core.isa() > 0 and _is_plain(module, masks, arguments)


def _is_plain(module: torch.nn.Module, masks: Sequence[Mask], arguments: dict[str, Any]) -> bool:
    """Whether this is softmax attention, causal or causal within the window that the module names, and nothing else."""
    known = {"scaling", "sliding_window", "dropout", "is_causal", "position_ids", "softcap", "s_aux"}
    # Models hand these through to attention, where nothing reads them.
    known |= {"use_cache", "output_attentions", "output_router_logits"}
    if getattr(module, "sinks", None) is not None or not getattr(module, "is_causal", True):
        return False
    if any(value is not None for name, value in arguments.items() if name not in known) or arguments.get("dropout"):
        return False
    if arguments.get("softcap") is not None or arguments.get("s_aux") is not None:
        return False
    if arguments.get("is_causal") is False:
        return False
    return all(_is_window(mask, arguments.get("sliding_window")) for mask in masks if mask is not None)


def _is_window(mask: torch.Tensor, window: int | None) -> bool:
    if mask.dtype != torch.bool or window is None:
        return False
    at = torch.arange(mask.shape[-1], device=mask.device)
    distance = at[:, None] - at[None, :]
    return bool((mask == ((distance >= 0) & (distance < window))).all())


def attend_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Sequence[int], arguments: dict[str, Any]
) -> torch.Tensor:
    """One varlen kernel over the whole pack: query ``[1, H, T, d]``, key and value ``[1, H_kv, T, d]`` ->
    ``[1, T, H, d]``."""
    offsets = torch.tensor(bounds, dtype=torch.int32, device=query.device)
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    window = arguments.get("sliding_window")
    # The kernel counts a window by the keys to the left of the query, the model by those including it.
    left = -1 if window is None else window - 1
    q, k, v = (tensor.squeeze(0).transpose(0, 1).contiguous() for tensor in (query, key, value))
    options: dict[str, Any] = {"scale": arguments.get("scaling"), "window_size": (left, 0)}
    options["enable_gqa"] = q.shape[1] != k.shape[1]
    assert varlen_attn is not None, "takes_varlen() said so"
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, **options).unsqueeze(0)


def attend_in_core(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: Sequence[int],
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """The native core's attention over the whole pack: query ``[1, H, T, d]``, key ``[1, H_kv, T, d]`` and value
    ``[1, H_kv, T, d_v]`` -> ``[1, T, H, d_v]``."""
    query, key, value = (one if one.stride(-1) == 1 else one.contiguous() for one in (query, key, value))
    n_tokens, width = query.shape[2:]
    out = query.new_empty(1, n_tokens, query.shape[1], value.shape[-1])
    offsets = torch.tensor(bounds, dtype=torch.int64)
    from actcache import _core  # takes_core() said that it is there

    _core.attend(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.numpy(),
        offsets.data_ptr(),
        n_sequences=len(bounds) - 1,
        n_tokens=n_tokens,
        n_heads=(query.shape[1], key.shape[1]),
        widths=(width, value.shape[-1]),
        query_strides=(query.stride(2), query.stride(1)),
        key_strides=(key.stride(2), key.stride(1)),
        value_strides=(value.stride(2), value.stride(1)),
        window=n_tokens if window is None else window,
        scale=width**-0.5 if scaling is None else scaling,
        n_threads=torch.get_num_threads(),
    )
    return out
