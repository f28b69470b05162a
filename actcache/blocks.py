"""Where a causal language model keeps its blocks and final norm, the stand-ins that take the place of upstream blocks,
and the probe that the blocks behind them read the state at the boundary and nothing else.

Knows transformers modules; knows no files, no stores, no tokens.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from actcache.errors import InputError, UnsupportedModelError

# The names that transformers' decoders give to the norm after the last block, beside their list of blocks.
FINAL_NORM_NAMES = (
    *("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "final_norm", "embedding_norm"),
    *("out_norm", "ln_out", "layernorm", "output_layernorm", "ln", "LayerNorm"),
)

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

# The names that blocks give to their two parts.
_SITE_NAMES = {
    "attention": (
        *("self_attn", "attn", "attention", "self_attention", "linear_attn", "multi_head_attention"),
        *("norm_attn_norm.attn", "mixer", "temporal_block"),
    ),
    "mlp": ("mlp", "feed_forward", "ffn", "mlp_block", "block_sparse_moe", "shared_mlp", "fc2", "mixer"),
}
# What goes by these names is either part, or a recurrence, depending on the block: the name of its class decides.
_AMBIGUOUS_NAMES = ("mixer", "temporal_block")
_SITE_CLASSES = {"attention": ("attention",), "mlp": ("mlp", "moe")}


@dataclass(frozen=True)
class Anatomy:
    """Dotted module names, relative to the causal LM.

    Attributes:
        decoder: the module that runs embeddings, blocks and final norm (``model``, ``transformer``...).
        blocks: the ``ModuleList`` of the L blocks.
        final_norm: the norm that reads the last block's output.
        n_blocks: L.
        width: D.
    """

    decoder: str
    blocks: str
    final_norm: str
    n_blocks: int
    width: int


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder: of a model for text and images, its ``text_config``."""
    return config.get_text_config(decoder=True)


def find_anatomy(model: PreTrainedModel) -> Anatomy:
    """Locate decoder, blocks and final norm by structure.

    The decoder is the innermost transformers model around the blocks: of a model with towers for images or sound, the
    part that reads text.

    Raises:
        UnsupportedModelError: no unique list of ``num_hidden_layers`` blocks, no final norm beside it, no head, or a
            head that reads another width than the blocks write.
    """
    name = type(model).__name__
    weight = getattr(model.get_output_embeddings(), "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise UnsupportedModelError(f"{name}: it is no decoder with one language-model head on top")
    config = text_config(model.config)
    n_blocks, width = getattr(config, "num_hidden_layers", None), getattr(config, "hidden_size", None)
    if n_blocks is None or width is None:
        raise UnsupportedModelError(f"{name}: its config names no num_hidden_layers and hidden_size of one decoder")
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks:
            decoder = _innermost_model(model, path)
            if decoder and model.get_submodule(decoder).config is config and path.count(".") <= decoder.count(".") + 2:
                found.append((decoder, path))
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name}: {len(found)} lists of num_hidden_layers = {n_blocks} blocks found, expected one"
        )
    decoder, blocks = found[0]
    norm = _final_norm(model, decoder, blocks)
    if norm is None:
        raise UnsupportedModelError(f"{name}: no norm found after the last block, beside {blocks}; expected one")
    if weight.shape[1] != width:
        raise UnsupportedModelError(f"{name}: its head reads {weight.shape[1]} values, its blocks write {width}")
    return Anatomy(decoder, blocks, norm, n_blocks, width)


def _innermost_model(model: PreTrainedModel, path: str) -> str:
    """The longest proper prefix of ``path`` that is a transformers model; empty when only ``model`` itself is."""
    prefix = path.rpartition(".")[0]
    while prefix and not isinstance(model.get_submodule(prefix), PreTrainedModel):
        prefix = prefix.rpartition(".")[0]
    return prefix


def _final_norm(model: PreTrainedModel, decoder: str, blocks: str) -> str | None:
    """The one norm beside the blocks, or beside the module that holds nothing but them."""
    parent = blocks.rpartition(".")[0]
    while True:
        module = model.get_submodule(parent)
        names = [name for name in FINAL_NORM_NAMES if isinstance(getattr(module, name, None), nn.Module)]
        if len(names) == 1:
            return f"{parent}.{names[0]}"
        if names or parent == decoder:
            return None
        parent = parent.rpartition(".")[0]


def check_boundary(boundary: int, n_blocks: int) -> None:
    """Raise InputError unless ``1 <= boundary <= n_blocks - 1``."""
    if not 1 <= boundary <= n_blocks - 1:
        raise InputError(f"boundary {boundary} is outside 1..{n_blocks - 1} (the model has {n_blocks} blocks)")


class StateSource:
    """The state at the boundary that the stand-ins of one late stack hand on; set before each forward.

    Attributes:
        state: ``[B, T, D]``.
        in_tuple: whether this architecture's blocks return ``(hidden_states, ...)``.
        n_more: how many values follow the hidden states in that tuple; the stand-ins return None for each.
    """

    def __init__(self) -> None:
        self.state: torch.Tensor | None = None
        self.in_tuple = False
        self.n_more = 0


class UpstreamStandIn(nn.Module):
    """Takes the place of one upstream block: ignores its input and hands on the state at the boundary.

    Keeps the plain attributes that a model's forward may read off a block (its attention type, for example), and the
    computed buffers that some models fill from outside of the block after loading. Holds no weights, computes nothing.
    """

    def __init__(self, block: nn.Module, source: StateSource) -> None:
        super().__init__()
        self._source = source
        for name, value in vars(block).items():
            # A wrapped forward is an attribute of the block, too.
            if not name.startswith("_") and name not in ("training", "forward"):
                setattr(self, name, value)
        self._modules.update(_buffers_of(block)._modules)

    def __getattr__(self, name: str) -> Any:
        if name in self._modules:
            return self._modules[name]
        raise AttributeError(f"the model reads {name!r} off an upstream block, which is not there")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's state, in the type that a real block returns."""
        source = self._source
        return (source.state, *[None] * source.n_more) if source.in_tuple else source.state


def _buffers_of(module: nn.Module) -> nn.Module:
    """A plain module tree with those buffers of ``module`` that are computed, not saved with its weights."""
    hollow = nn.Module()
    for name, buffer in module._buffers.items():
        if name in module._non_persistent_buffers_set:
            hollow.register_buffer(name, buffer, persistent=False)
    for name, child in module.named_children():
        inner = _buffers_of(child)
        if inner._modules or inner._buffers:
            hollow._modules[name] = inner
    return hollow


class NoEmbedding(nn.Module):
    """Takes the place of token embeddings that nothing reads (the head has its own weights)."""

    probe: nn.Embedding | None = None  # a small one, while a probe looks whether token ids matter

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Replay passes states, never token ids."""
        if self.probe is None:
            raise RuntimeError("the late stack was given token ids; it reads states")
        return self.probe(ids)

    @property
    def weight(self) -> torch.Tensor | None:
        """Where some models look for the device of their token ids."""
        return None if self.probe is None else self.probe.weight


def cut_upstream(model: PreTrainedModel, boundary: int) -> StateSource:
    """Replace blocks 0..boundary-1 (and untied token embeddings) in place; their parameters are dropped."""
    anatomy = find_anatomy(model)
    check_boundary(boundary, anatomy.n_blocks)
    source = StateSource()
    blocks = model.get_submodule(anatomy.blocks)
    for index in range(boundary):
        blocks[index] = UpstreamStandIn(blocks[index], source)  # type: ignore[index,operator]
    embedding = model.get_input_embeddings()
    if model.get_output_embeddings().weight is not embedding.weight and not is_tied(model):
        path = next((path for path, module in model.named_modules() if module is embedding), None)
        if path is None:
            raise UnsupportedModelError(f"{type(model).__name__}: its token embeddings are not among its modules")
        replace(model, path, NoEmbedding())
    return source


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head's weight is the token embedding's."""
    configs = model.config, text_config(model.config)
    return any(bool(getattr(config, "tie_word_embeddings", False)) for config in configs)


def shallow_clone(model: PreTrainedModel, *paths: str) -> PreTrainedModel:
    """A copy of the module tree along ``paths`` that shares everything else: submodules on these paths may be replaced
    in the clone without touching ``model``."""
    clone = _shallow(model)
    for path in paths:
        _reclone(clone, path)
    return clone


def replace(clone: PreTrainedModel, path: str, module: nn.Module) -> None:
    """Put ``module`` at ``path`` of a clone; modules that it shares with its original are copied on the way there."""
    parent, _, name = path.rpartition(".")
    _reclone(clone, parent)._modules[name] = module


def _reclone(clone: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else []:
        child = _shallow(getattr(clone, name))
        clone._modules[name] = child
        clone = child
    return clone


def _shallow(module: nn.Module) -> Any:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


def find_site(block: nn.Module, site: Literal["attention", "mlp"]) -> nn.Module:
    """The submodule of a block whose output (or its element 0), ``[B, T, D]``, is what the attention or the MLP
    computes, before any later norm or scale and before it is added to the residual stream.

    Raises:
        UnsupportedModelError: the block has no such submodule, or several, or its output already includes the residual
            stream.
    """
    name, parts = type(block).__name__, dict(block.named_modules())
    found = [path for path in _SITE_NAMES[site] if path in parts]
    found = [path for path in found if path not in _AMBIGUOUS_NAMES or _is_named(parts[path], _SITE_CLASSES[site])]
    children = ", ".join(child for child, _ in block.named_children())
    if not found:
        raise UnsupportedModelError(f"{name} has no submodule that is its {site}; it has {children}")
    if len(found) > 1:
        raise UnsupportedModelError(f"{name} adds up {' and '.join(found)} where one {site} was expected")
    module = parts[found[0]]
    if _adds_residual(module):
        raise UnsupportedModelError(f"{name}: what its {found[0]} returns already includes the residual stream")
    return module


def _is_named(module: nn.Module, words: tuple[str, ...]) -> bool:
    return any(word in type(module).__name__.lower() for word in words)


def _adds_residual(module: nn.Module) -> bool:
    """Whether a module is given the residual stream to add it itself (as BLOOM's and BERT's are)."""
    inner = getattr(module, "output", None)  # BERT's attention hands its own input to its output part
    return any(
        name in ("residual", "input_tensor")
        for part in (module, inner)
        if isinstance(part, nn.Module)
        for name in inspect.signature(part.forward).parameters
    )


def mixes_tokens(block: nn.Module) -> str | None:
    """The path of a submodule through which tokens meet outside of attention, or None.

    A convolution, or an indexer that chooses which keys a query may see: these know no bounds between packed sequences.
    An indexer shows only beyond the number of keys that it keeps, so numbers from a few tokens cannot tell.
    """
    for path, module in block.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) or _is_named(module, ("indexer",)):
            return path
    return None


# How far outputs may differ that must not depend on an input, relative to the largest value: rounding only, which is
# not always the same on a GPU.
_SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
_N_PROBE_TOKENS = 5
_N_PROBE_IDS = 16


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
    """
    probe = _LateProbe(model, boundary, source)
    probe.learn_block_output()
    probe.check_calls()
    probe.check_inputs()


class _LateProbe:
    def __init__(self, model: PreTrainedModel, boundary: int, source: StateSource) -> None:
        anatomy = find_anatomy(model)
        self.name = type(model).__name__
        self.source, self.boundary = source, boundary
        self.decoder = model.get_submodule(anatomy.decoder)
        self.blocks: nn.ModuleList = model.get_submodule(anatomy.blocks)  # type: ignore[assignment]
        self.norm = model.get_submodule(anatomy.final_norm)
        self.embedding = model.get_input_embeddings()
        device = next(self.blocks[-1].parameters()).device
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
            state, _ = _arguments(block, args, kwargs)
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

        late = list(range(self.boundary, len(self.blocks)))
        hooks = [self.blocks[i].register_forward_pre_hook(enter(i), with_kwargs=True) for i in late]
        hooks += [self.blocks[-1].register_forward_hook(leave), self.norm.register_forward_hook(norm)]
        try:
            returned = self._forward(input_ids=self.ids[0])
        except Exception as error:
            self._cannot_run(error)
        finally:
            for hook in hooks:
                hook.remove()
        if not torch.isfinite(returned).all():
            self._refuse("its late blocks give values that are not finite: weights or buffers that nothing has set?")
        if calls != late:
            self._refuse(f"its late blocks are called in the order {calls}, expected {late}")
        if beside:
            self._refuse(_more_than_state(beside))
        if not _equal(seen["state"], self.state):
            self._refuse("the state is changed between two of its blocks")
        if seen["written"].dtype != self.state.dtype:
            found = f"its residual stream is {seen['written'].dtype}, its weights are {self.state.dtype}"
            self._refuse(f"{found}; load it with dtype={seen['written'].dtype}")
        if next(n_norms) != 1:
            self._refuse("its final norm is not called once, after the last block")
        if not _equal(seen["read"], seen["written"]):
            self._refuse("its final norm does not read the last block's output")
        if not _equal(returned, seen["normed"]):
            self._refuse("it does not return what its final norm computes")

    def check_inputs(self) -> None:
        """Other token ids, or embeddings, must change nothing."""
        inputs = [{"input_ids": ids} for ids in self.ids] + [{"inputs_embeds": self.embeds}]
        first, *others = (self._forward(**given) for given in inputs)
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
