"""Probe: does a model whose upstream is cut read the state at the boundary, and nothing else?

A late stack whose blocks also read the token embeddings, an earlier block's keys or a second residual stream would run,
and its numbers would be wrong. So every architecture is looked at while it runs, when a late stack is made of it.
Knows transformers modules; knows no files, no stores, no tokens.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import NotFiniteError, UnsupportedModelError
from actcache.finite import first_block, is_finite
from actcache.models.blocks import NoEmbedding, StateSource, UpstreamStandIn, cut_upstream, find_anatomy, shallow_clone

# What transformers' blocks may be given beside the hidden state: made from the positions alone, so that a late stack
# makes it again. A tensor under any other name carries something else past the boundary.
_FROM_POSITIONS = (
    *("attention_mask", "causal_mask", "mask", "conv_mask", "mamba_attention_mask"),
    *("position_ids", "position_embeddings", "cache_position", "position_bias", "alibi"),
    *("relative_distance", "sinusoidal_pos", "attention_scaling", "lang_ids"),
)
# Blocks leave these for later ones. Behind stand-ins only late blocks do, and a block that misses what an earlier one
# should have left raises by itself.
_FROM_LATE_BLOCKS = ("shared_kv_states", "prev_topk_indices")
_CARRIED = {
    "input_ids": "the token ids",
    "ple_input_ids": "the token ids",
    "per_layer_input": "per-layer inputs made from the token ids",
    "original_hidden_states": "the token embeddings",
    "shared_kv_states": "keys and values of earlier blocks",
    "block_states": "the outputs of earlier blocks",
    "prev_topk_indices": "the key positions that an earlier block chose",
    "prev_router_hidden_states": "the router state of the block before",
    "prev_attn_output": "a second residual stream",
}

# How far outputs may differ that must not depend on an input, relative to the largest value: rounding only, which is
# not always the same on a GPU.
_SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_N_PROBE_TOKENS = 5
_N_PROBE_IDS = 16


def check_replayable(model: PreTrainedModel, boundary: int) -> None:
    """Raise UnsupportedModelError (see :func:`probe_late_blocks`) unless a model can be cut here; it stays whole."""
    clone = shallow_clone(model, find_anatomy(model).blocks)
    probe_late_blocks(clone, boundary, cut_upstream(clone, boundary))


@torch.no_grad()
def check_text_alone(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError unless the decoder alone gives its first block, of token ids, what the whole model
    gives it: the same states, positions and mask. Blocks may be stand-ins: none is run.

    A model for images and text may do more to its token embeddings, or count positions otherwise.
    """
    anatomy = find_anatomy(model)
    decoder, block = model.get_submodule(anatomy.decoder), model.get_submodule(f"{anatomy.blocks}.0")
    device = model.get_output_embeddings().weight.device
    ids = torch.randint(_N_PROBE_IDS, (1, _N_PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    seen: list[dict[str, Any]] = []

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append({str(at): value for at, value in enumerate(args)} | kwargs)
        raise _ReachedError

    handle = block.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for part in (model, decoder):
            with suppress(_ReachedError):
                part(input_ids=ids, use_cache=False)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        raise UnsupportedModelError(f"{type(model).__name__}: it does not run on text alone; {said[:100]}") from error
    finally:
        handle.remove()
    if len(seen) != 2:
        raise UnsupportedModelError(f"{type(model).__name__}: given text alone, it does not call its first block")
    whole, alone = seen
    for name in (*whole, *alone):
        a, b = whole.get(name), alone.get(name)
        # Positions are told once more to kernels that look for packs in them.
        if not _same(a, b) and not (name == "position_ids" and (a is None or b is None)):
            raise UnsupportedModelError(
                f"{type(model).__name__}: given text alone, it hands its blocks another {_NAMED.get(name, name)} than "
                "its decoder does"
            )


@torch.no_grad()
def check_reads_back(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where what a model computes at a position depends on the tokens after it: it chooses
    no next token there."""
    decoder = model.get_submodule(find_anatomy(model).decoder)
    device = model.get_output_embeddings().weight.device
    ids = torch.randint(_N_PROBE_IDS - 1, (1, _N_PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    other = ids.clone()
    other[0, -1] += 1
    first, second = (decoder(input_ids=one, use_cache=False).last_hidden_state[0, :-1] for one in (ids, other))
    if (second - first).abs().max() > _SAME[first.dtype] * first.abs().max():  # what is no number is named elsewhere
        raise UnsupportedModelError(
            f"{type(model).__name__}: what it computes at a position depends on the tokens after it"
        )


_NAMED = {"0": "state", "hidden_states": "state"}


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments of a block hold equal tensors; what holds none counts for nothing."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return not _holds_tensor(a) and not _holds_tensor(b)


@torch.no_grad()
def probe_late_blocks(model: PreTrainedModel, boundary: int, source: StateSource) -> None:
    """Learn what a model expects its blocks to return (``source.in_tuple``, ``source.n_more``), and show that its late
    blocks read the state at the boundary and nothing else.

    Runs the cut model over a few random tokens and states and looks that one residual stream of width D enters the
    first block; that block ``boundary`` is given exactly the state; that each late block is called once, in order, with
    nothing beside the state but what is made from positions; that the final norm reads the last block's output and the
    decoder returns the norm's; and that other token ids or embeddings change nothing.

    Args:
        model: a causal LM after :func:`cut_upstream`, in eval mode, its weights loaded.
        boundary: index of the first late block.
        source: what :func:`cut_upstream` returned.

    Raises:
        UnsupportedModelError: one of these does not hold; the message says which.
        NotFiniteError: what the late blocks and the norm give is not finite; the message names the first block.
    """
    probe = _Probe(model, boundary, source)
    if boundary:
        probe.learn_block_output()
    else:
        probe.learn_from(shallow_clone(model, find_anatomy(model).blocks))
    probe.check_calls()
    probe.check_inputs()


@torch.no_grad()
def probe_frame(model: PreTrainedModel, source: StateSource) -> None:
    """Learn what a model expects its blocks to return, where all of them are stand-ins (errors as
    :func:`probe_late_blocks`)."""
    _Probe(model, 1, source).learn_block_output()


@torch.no_grad()
def probe_block(model: PreTrainedModel, index: int, source: StateSource, following: nn.Module | None) -> None:
    """Show that one block reads the state that enters it, and nothing else, and leaves no more than one to the block
    that follows it, where all others are stand-ins.

    Args:
        model, index, source: as :func:`probe_late_blocks`; what block 0 reads is the model's own, and not looked at.
        following: the next block, without weights; None for the last one.

    Raises:
        UnsupportedModelError, NotFiniteError: as :func:`probe_late_blocks`.
    """
    probe = _Probe(model, index, source, n=1)
    if following is not None:
        probe.check_left(following)
    if index:
        probe.check_calls()
        probe.check_inputs()


class _Probe:
    """Of ``n`` blocks from the boundary on; None for all of them."""

    def __init__(self, model: PreTrainedModel, boundary: int, source: StateSource, n: int | None = None) -> None:
        anatomy = find_anatomy(model)
        self.name = type(model).__name__
        self.source, self.boundary = source, boundary
        self.late = range(boundary, anatomy.n_blocks if n is None else boundary + n)
        self.reaches_norm = self.late.stop == anatomy.n_blocks
        self.decoder = model.get_submodule(anatomy.decoder)
        self.blocks: nn.ModuleList = model.get_submodule(anatomy.blocks)  # type: ignore[assignment]
        self.norm = model.get_submodule(anatomy.final_norm)
        self.embedding = model.get_input_embeddings()
        device = model.get_output_embeddings().weight.device
        generator = torch.Generator().manual_seed(0)
        shape = 1, _N_PROBE_TOKENS, anatomy.width
        self.state, self.embeds = (torch.randn(shape, generator=generator).to(device, model.dtype) for _ in range(2))
        self.ids = [torch.randint(_N_PROBE_IDS, shape[:2], generator=generator).to(device) for _ in range(2)]
        table = torch.randn(_N_PROBE_IDS, anatomy.width, generator=generator).to(device, model.dtype)
        self.small_embedding = nn.Embedding.from_pretrained(table)

    def learn_block_output(self) -> None:
        """Hand on a plain tensor, then tuples of growing length, until the first late block is given the state."""

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(iter((*args, *kwargs.values())), None)
            if not isinstance(given, torch.Tensor) or given.shape != self.state.shape:
                found = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
                self._refuse(f"its blocks are given {found}, not one residual stream {tuple(self.state.shape)}")

        def reach(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            stands_in = isinstance(block, UpstreamStandIn)
            state = next(iter((*args, *kwargs.values())), None) if stands_in else _arguments(block, args, kwargs)[0]
            raise _ReachedError(isinstance(state, torch.Tensor) and state.shape == self.state.shape)

        failure: Exception | None = None
        hooks = [
            self.blocks[0].register_forward_pre_hook(enter, with_kwargs=True),
            self.blocks[self.boundary].register_forward_pre_hook(reach, with_kwargs=True),
        ]
        try:
            for self.source.in_tuple, self.source.n_more in ((False, 0), (True, 0), (True, 1), (True, 2)):
                try:
                    self._forward(inputs_embeds=self.embeds)
                except _ReachedError as reached:
                    if reached.args[0]:
                        return
                except UnsupportedModelError:
                    raise
                except Exception as error:
                    failure = failure or error
        finally:
            for hook in hooks:
                hook.remove()
        self._cannot_run(failure)

    def learn_from(self, clone: PreTrainedModel) -> None:
        """The same where nothing stands before block 0: from a clone in which block 0 is a stand-in."""
        blocks: nn.ModuleList = clone.get_submodule(find_anatomy(clone).blocks)  # type: ignore[assignment]
        source = StateSource()
        blocks[0] = UpstreamStandIn(blocks[0], source)
        _Probe(clone, 1, source).learn_block_output()
        self.source.in_tuple, self.source.n_more = source.in_tuple, source.n_more

    def check_calls(self) -> None:
        """Each late block once and in order, from the state and positions alone; then the norm, and nothing after."""
        calls: list[int] = []
        beside: list[str] = []
        seen: dict[str, torch.Tensor] = {}
        n_norms = itertools.count()

        def enter(index: int) -> Callable[..., None]:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                state, others = _arguments(block, args, kwargs)
                seen.setdefault("state", state)
                calls.append(index)
                beside.extend(name for name, value in others.items() if _carries(name, value))

            return hook

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen["written"] = output if isinstance(output, torch.Tensor) else output[0]

        def norm(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            next(n_norms)
            seen["read"], seen["normed"] = args[0], output

        late = list(self.late)
        hooks = [self.blocks[i].register_forward_pre_hook(enter(i), with_kwargs=True) for i in late]
        hooks += [self.blocks[late[-1]].register_forward_hook(leave), self.norm.register_forward_hook(norm)]
        try:
            returned = self._forward(input_ids=self.ids[0])
        except Exception as error:
            self._cannot_run(error)
        finally:
            for hook in hooks:
                hook.remove()
        if not is_finite(returned if self.reaches_norm else seen["written"]):
            where = first_block(list(self.blocks), lambda: self._forward(input_ids=self.ids[0]), self.boundary)
            raise NotFiniteError(
                f"{self.name}: its late blocks, or its final norm, give values that are not finite; {where}: weights "
                "or buffers that nothing has set?"
            )
        if calls != late:
            self._refuse(f"its late blocks are called in the order {calls}, expected {late}")
        if beside:
            self._refuse(_more_than_state(beside))
        if not _equal(seen["state"], self.state):
            self._refuse("the state is changed between two of its blocks")
        if seen["written"].dtype != self.state.dtype:
            found = f"its residual stream is {seen['written'].dtype}, its weights are {self.state.dtype}"
            self._refuse(f"{found}; load it with dtype={seen['written'].dtype}")
        if not self.reaches_norm:
            return
        if next(n_norms) != 1:
            self._refuse("its final norm is not called once, after the last block")
        if not _equal(seen["read"], seen["written"]):
            self._refuse("its final norm does not read the last block's output")
        if not _equal(returned, seen["normed"]):
            self._refuse("it does not return what its final norm computes")

    def check_left(self, following: nn.Module) -> None:
        """The block after the last one looked at, which is a stand-in, is given nothing that only a block can leave
        (but what it would miss, and raise)."""
        left: list[str] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, others = _arguments(following, args, kwargs)
            left.extend(name for name, one in others.items() if _carries(name, one))

        hook = self.blocks[self.late.stop].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            self._forward(input_ids=self.ids[0])
        except Exception as error:
            self._cannot_run(error)
        finally:
            hook.remove()
        if left:
            self._refuse(_more_than_state(left))

    def check_inputs(self) -> None:
        """Other token ids, or embeddings, must change nothing."""
        written: list[torch.Tensor] = []

        def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            written.append(output if isinstance(output, torch.Tensor) else output[0])

        hook = self.blocks[self.late[-1]].register_forward_hook(leave)
        try:
            for given in (*({"input_ids": ids} for ids in self.ids), {"inputs_embeds": self.embeds}):
                self._forward(**given)
        finally:
            hook.remove()
        first, *others = written
        allowed = _SAME[first.dtype] * first.abs().max()
        if any(((other - first).abs() > allowed).any() for other in others):
            self._refuse(_more_than_state(["the token embeddings"]))

    def _forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        self.source.state = self.state
        if isinstance(self.embedding, NoEmbedding):
            self.embedding.__dict__["probe"] = self.small_embedding  # no submodule: it must not outlast the probe
        try:
            return self.decoder(**inputs, use_cache=False).last_hidden_state
        finally:
            self.source.state = None
            self.embedding.__dict__.pop("probe", None)

    def _cannot_run(self, error: Exception | None) -> NoReturn:
        inputs = {n for block in self.blocks[self.boundary :] for n in inspect.signature(block.forward).parameters}
        carried = [name for name in _CARRIED if name in inputs]
        said = "they are never reached" if error is None else f"{type(error).__name__}: {error}".split("\n", 1)[0]
        reason = _more_than_state(carried) if carried else "its late blocks do not run alone"
        raise UnsupportedModelError(f"{self.name}: {reason}; {said[:100]}") from error

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModelError(f"{self.name}: {reason}")


class _ReachedError(Exception):
    """Ends a probing forward at the first late block."""


def _more_than_state(names: Sequence[str]) -> str:
    what = dict.fromkeys(f"{name} ({_CARRIED[name]})" if name in _CARRIED else name for name in names)
    return f"its late blocks read more than the state at the boundary: {', '.join(what)}"


def _arguments(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The hidden states that a block is called with, and every other argument by name."""
    signature = inspect.signature(block.forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update(given.pop(name, {}))
    return given.pop(next(iter(given)), None), given


def _carries(name: str, value: Any) -> bool:
    """Whether an argument of a block can bring something past the boundary."""
    return name not in (*_FROM_POSITIONS, *_FROM_LATE_BLOCKS) and _holds_tensor(value)


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(_holds_tensor(item) for item in value)
    return isinstance(value, torch.Tensor)


def _equal(a: Any, b: torch.Tensor) -> bool:
    return isinstance(a, torch.Tensor) and a.numel() == b.numel() and torch.equal(a.reshape(b.shape), b)
