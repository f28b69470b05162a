"""Where a causal language model keeps its blocks and final norm, and the stand-ins that take the place of upstream
blocks.

Knows transformers modules; knows no files, no stores, no tokens.
"""

from __future__ import annotations

import copy
import inspect
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from actcache.counts import check_whole
from actcache.errors import InputError, UnsupportedModelError

# The names that transformers' decoders give to the norm after the last block, beside their list of blocks.
FINAL_NORM_NAMES = (
    *("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "layer_norm", "final_norm", "embedding_norm"),
    *("out_norm", "ln_out", "layernorm", "output_layernorm", "ln", "LayerNorm"),
)

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

# The names that attention gives to the linear layer that mixes what its heads give.
_PROJECTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "Wo", "wo")


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
    """Raise InputError unless ``0 <= boundary <= n_blocks - 1``; the state at 0 is what the embeddings give."""
    check_whole(boundary, "boundary")
    if not 0 <= boundary <= n_blocks - 1:
        raise InputError(f"boundary {boundary} is outside 0..{n_blocks - 1} (the model has {n_blocks} blocks)")


def block_of(given: int | float, n_blocks: int) -> int:
    """A block as people count: an index, a negative one from the end (-1 is the last), or a fraction of the depth
    (0.6, rounded). It may be out of range."""
    if isinstance(given, float):
        return round(given * n_blocks)
    return given + n_blocks if given < 0 else given


def span_of(given: int | float | str, n_blocks: int) -> tuple[int, int]:
    """The first and the last block that ``given`` names: a block, as :func:`block_of`, or a range such as ``0.9..-1``.

    Raises:
        InputError: it names none.
    """
    first, last = check_counted(given)
    return block_of(first, n_blocks), block_of(last, n_blocks)


def check_counted(given: Any) -> tuple[int | float, int | float]:
    """The two ends of what :func:`span_of` understands (InputError: it is none of that)."""
    match = _RANGE.fullmatch(given) if isinstance(given, str) else None
    ends = [float(end) if "." in end else int(end) for end in match.groups()] if match else [given, given]
    if not all(type(end) is int or (type(end) is float and 0 <= end <= 1) for end in ends):
        raise InputError(f"layer {given!r}: expected a block, -1 for the last, a fraction such as 0.9, or '0.9..-1'")
    return ends[0], ends[1]


_RANGE = re.compile(r"(-?\d{1,9}|\d\.\d+)\.\.(-?\d{1,9}|\d\.\d+)")


class StateSource:
    """The state at the boundary that the stand-ins of one late stack hand on; set before each forward.

    Attributes:
        state: ``[B, T, D]``, or None. Each thread has one of its own: several may run copies of one late stack at once.
        in_tuple: whether this architecture's blocks return ``(hidden_states, ...)``.
        n_more: how many values follow the hidden states in that tuple; the stand-ins return None for each.
    """

    def __init__(self) -> None:
        self._states: dict[int, torch.Tensor] = {}  # by thread
        self.in_tuple = False
        self.n_more = 0

    @property
    def state(self) -> torch.Tensor | None:
        """This thread's."""
        return self._states.get(threading.get_ident())

    @state.setter
    def state(self, state: torch.Tensor | None) -> None:
        if state is None:
            self._states.pop(threading.get_ident(), None)
        else:
            self._states[threading.get_ident()] = state


class Turns:
    """A lock under which threads take turns, and one thread may enter again; each copy of what holds it has its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Turns:
        return Turns()


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, for calls from the thread that asks for it; others pass by. A module may be another thread's, too."""
    own = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == own else None


class UpstreamStandIn(nn.Module):
    """Takes the place of one upstream block: ignores its input and hands on the state at the boundary.

    Keeps the plain attributes that a model's forward may read off a block, as its attention type. Keeps the computed
    buffers, too, that some models fill from outside of the block after loading. Holds no weights, computes nothing.
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
    """Replace blocks 0..boundary-1 (and untied token embeddings) in place; their parameters are dropped. At boundary 0
    block 0 is replaced by one that shares all with it, and reads the source's state in place of its input."""
    anatomy = find_anatomy(model)
    check_boundary(boundary, anatomy.n_blocks)
    source = StateSource()
    blocks: nn.ModuleList = model.get_submodule(anatomy.blocks)  # type: ignore[assignment]
    for index in range(boundary):
        blocks[index] = UpstreamStandIn(blocks[index], source)
    if not boundary:
        blocks[0] = entered_from(blocks[0], source)
    drop_embedding(model)
    return source


def entered_from(block: nn.Module, source: StateSource) -> nn.Module:
    """A block that shares all with this one, and reads the state that ``source`` hands on, where it has one, in place
    of its own input."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        state = source.state
        if state is None:
            return args, kwargs
        return ((state, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": state})

    own = _shallow(block)
    own._forward_pre_hooks = OrderedDict(block._forward_pre_hooks)
    own._forward_pre_hooks_with_kwargs = OrderedDict(block._forward_pre_hooks_with_kwargs)
    own.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
    return own


def drop_embedding(model: PreTrainedModel) -> None:
    """Replace token embeddings that the head does not share, in place."""
    embedding = model.get_input_embeddings()
    if model.get_output_embeddings().weight is not embedding.weight and not is_tied(model):
        path = next((path for path, module in model.named_modules() if module is embedding), None)
        if path is None:
            raise UnsupportedModelError(f"{type(model).__name__}: its token embeddings are not among its modules")
        replace(model, path, NoEmbedding())


def upstream_names(model: PreTrainedModel, boundary: int) -> list[str]:
    """Patterns of the names, whatever they begin with, that weight files give to what :func:`cut_upstream` drops."""
    anatomy = find_anatomy(model)
    upstream = "|".join(str(index) for index in range(boundary))
    embedding = next((path for path, part in model.named_modules() if part is model.get_input_embeddings()), "")
    names = [path.rpartition(".")[2] for path in (anatomy.blocks, embedding)]
    return [rf"(^|\.){names[0]}\.({upstream})\.", rf"(^|\.){names[1]}\.\w+$"]


_UNREAD = "_keys_to_ignore_on_load_unexpected"


def class_without(
    model_class: type[PreTrainedModel], cut: Callable[[PreTrainedModel], Iterable[str]], *, build: bool = True
) -> type[PreTrainedModel]:
    """A model class whose objects lack what ``cut`` takes away from them, which gives patterns of the names that weight
    files give to it; without ``build``, it makes them of an object that is not built at all."""

    class Part(model_class):  # type: ignore[misc,valid-type]
        # No annotation: transformers evaluates those of a class among the names of its module, which is not this one.
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            if build:
                super().__init__(config, *args, **kwargs)
            unread = cut(self)
            own = getattr(self, _UNREAD)  # None, a list or a set, by transformers' version
            own = [] if own is None else own
            setattr(self, _UNREAD, type(own)([*own, *unread]))

    # transformers loads a class that is not its own by other rules (and leaves some computed buffers unset).
    Part.__name__ = Part.__qualname__ = model_class.__name__
    Part.__module__ = model_class.__module__
    return Part


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


def is_wrapped(model: nn.Module) -> bool:
    """Whether somebody has wrapped the forward of a module: what wraps it may hold on to that very module, and would
    run it in place of its copies."""
    return any("forward" in vars(module) for module in model.modules())


def find_site(block: nn.Module, site: str) -> nn.Module:
    """The submodule of a block that is its attention or its MLP.

    Its output, or element 0 of it, is ``[B, T, D]``: before any later norm or scale, and before it is added to the
    residual stream.

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


def find_projection(block: nn.Module) -> nn.Module:
    """The linear layer of a block's attention that mixes its heads: what it reads are theirs side by side.

    Raises:
        UnsupportedModelError: as :func:`find_site`; or the attention has no such layer, or several.
    """
    attention = find_site(block, "attention")
    found = [part for path, part in attention.named_modules() if path.rpartition(".")[2] in _PROJECTION_NAMES]
    if len(found) != 1 or not isinstance(found[0], nn.Linear | Conv1D):
        children = ", ".join(child for child, _ in attention.named_children())
        raise UnsupportedModelError(
            f"{type(attention).__name__}: no single linear layer that mixes its heads was found; it has {children}"
        )
    return found[0]


def n_heads(config: PreTrainedConfig, width: int) -> int:
    """How many heads lie side by side in ``width`` values, by the config of the decoder.

    Raises:
        UnsupportedModelError: it names no heads that are so wide together.
    """
    heads = getattr(config, "num_attention_heads", None)
    if isinstance(heads, int) and heads > 0 and width % heads == 0:
        own = [getattr(config, name, None) for name in ("v_head_dim", "head_dim")]
        if next((size for size in own if size), width // heads) == width // heads:
            return heads
    raise UnsupportedModelError(f"{config.model_type}: its config names {heads} heads, which give {width} values")


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
