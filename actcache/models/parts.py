"""Parts of a checkpoint, loaded alone: its late blocks, what stands around its blocks, its readout, and one block.

Each is the checkpoint's own model class with stand-ins where the other parts were, filled by the one loader: adapters,
dequantisation and transformers' conversion of weights apply as to whole models. Only the bytes of the part are read.
Knows checkpoints and transformers modules; knows no rows and no tokens.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from actcache.errors import UnsupportedModelError
from actcache.models import checkpoint_files as files
from actcache.models.blocks import (
    StateSource,
    UpstreamStandIn,
    class_without,
    cut_upstream,
    drop_embedding,
    find_anatomy,
    upstream_names,
)
from actcache.models.checkpoint import Checkpoint, load_weights
from actcache.models.readout import Readout


def load_late_blocks(
    checkpoint: Checkpoint, boundary: int, dtype: torch.dtype | None
) -> tuple[PreTrainedModel, StateSource]:
    """A model without its blocks before ``boundary``, and without token embeddings that nothing reads; and what the
    stand-ins hand on (errors as :func:`load_weights`)."""
    sources: list[StateSource] = []

    def cut(model: PreTrainedModel) -> list[str]:
        unread = upstream_names(model, boundary)
        sources.append(cut_upstream(model, boundary))
        return unread

    return _load(checkpoint, dtype, cut), sources[-1]


def load_readout(checkpoint: Checkpoint, dtype: torch.dtype | None, device: str = "cpu") -> Readout:
    """Final norm and head, without a block (errors as :class:`Frame` and :class:`Readout`)."""
    model = Frame.load(checkpoint, dtype, reads_ids=False).model
    with checkpoint.named():
        return Readout(model.to(device))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Frame:
    """A model without weights in its blocks: token embeddings, final norm, head and whatever else stands around them.

    Attributes:
        checkpoint: whose.
        model: the causal LM, with a stand-in for each block.
        source: what the stand-ins hand on.
        path: of the list of blocks in it.
    """

    checkpoint: Checkpoint
    model: PreTrainedModel
    source: StateSource
    path: str
    _blocks: tuple[nn.Module, ...]  # without weights, as transformers builds them
    _stand_ins: tuple[nn.Module, ...]

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype | None, *, reads_ids: bool = True) -> Frame:
        """Of this checkpoint, on the CPU (errors as :func:`load_weights`); without token embeddings that the head does
        not share, unless it ``reads_ids``.

        Raises:
            UnsupportedModelError: blocks share weights.
        """
        found: list[tuple[StateSource, str, tuple[nn.Module, ...], tuple[nn.Module, ...]]] = []

        def cut(model: PreTrainedModel) -> list[str]:
            path, source = find_anatomy(model).blocks, StateSource()
            shared = [name for name in model.all_tied_weights_keys if name.startswith(f"{path}.")]
            if shared:
                raise UnsupportedModelError(f"{type(model).__name__}: {shared[0]} is a weight of several of its blocks")
            blocks: Any = model.get_submodule(path)
            own = tuple(blocks)
            for index, block in enumerate(own):
                blocks[index] = UpstreamStandIn(block, source)
            found.append((source, path, own, tuple(blocks)))
            *_, of_embedding = upstream_names(model, 1)
            if not reads_ids:
                drop_embedding(model)
            return [rf"(^|\.){path.rpartition('.')[2]}\.\d+\.", *(() if reads_ids else (of_embedding,))]

        with checkpoint.named():
            model = _load(checkpoint, dtype, cut)
        return cls(checkpoint, model, *found[-1])

    @property
    def n_blocks(self) -> int:
        """L."""
        return len(self._blocks)

    def block_bytes(self) -> list[int]:
        """Bytes of each block in the files."""
        name = re.compile(rf"(^|\.){self.path.rpartition('.')[2]}\.(\d+)\.")
        quantized = self.checkpoint.quantization is not None
        n_bytes = [0] * self.n_blocks
        opened = files.open_tensors(files.weight_files(self.checkpoint.path), quantized=quantized)
        for found, tensor in opened.items():
            if (match := name.search(found)) is not None and int(match[2]) < self.n_blocks:
                bits = re.search(r"\d+", tensor.get_dtype())  # BF16, F8_E4M3, BOOL
                n_bytes[int(match[2])] += math.prod(tensor.get_shape()) * int(bits[0] if bits else 8) // 8
        return n_bytes

    def put(self, index: int, block: nn.Module | None) -> None:
        """Have a block stand in its place in the model; None for its stand-in again."""
        self.model.get_submodule(self.path)._modules[str(index)] = self._stand_ins[index] if block is None else block

    def empty_block(self, index: int) -> nn.Module:
        """As transformers builds it, on torch's meta device."""
        return self._blocks[index]

    def load_block(self, index: int) -> nn.Module:
        """A block with its weights, on the CPU, in memory of its own: nothing is left to be read later.

        Several threads may ask for blocks at once.

        Raises:
            InputError: as :func:`load_weights`.
        """
        keep = [*self.path.split("."), str(index)]

        def fill(model: PreTrainedModel, like: nn.Module, path: list[str]) -> None:
            vars(model).update(vars(_hollow(like, path, self._copy_of(index))))
            model.__dict__["all_tied_weights_keys"] = {}

        def start(model: PreTrainedModel) -> list[str]:
            fill(model, self.model, keep)
            return [rf"^(?!(.*\.)?{keep[-2]}\.{index}\.)"]

        block = _load(self.checkpoint, self.model.dtype, start, build=False).get_submodule(".".join(keep))
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data = _read(tensor.data)
        return block

    def _copy_of(self, index: int) -> nn.Module:
        """Without weights; its config is the model's own, as attention looks there for how it is to run."""
        block = self._blocks[index]
        configs = {id(own): own for module in block.modules() for own in vars(module).values() if _is_config(own)}
        return copy.deepcopy(block, configs)


_ALIGNMENT = 64  # bytes of a cache line, and of the widest registers


def _read(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own: what safetensors gives lies in the file, and is read when it is first touched.

    It begins as far behind a cache line as the tensor does. On some CPUs the product with a single row rounds by that,
    and a block alone shall compute what it computes in the whole model, whose weights lie in the file.
    """
    past_line = tensor.data_ptr() % _ALIGNMENT
    if past_line % tensor.itemsize or not tensor.numel():
        return tensor.clone()
    n_spanned = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    memory = torch.empty(n_spanned + 2 * _ALIGNMENT // tensor.itemsize, dtype=tensor.dtype)
    first = (past_line - memory.data_ptr()) % _ALIGNMENT // tensor.itemsize
    return memory.as_strided(tensor.shape, tensor.stride(), first).copy_(tensor)


def _is_config(value: Any) -> bool:
    return isinstance(value, PreTrainedConfig)


def _hollow(module: nn.Module, path: list[str], leaf: nn.Module) -> nn.Module:
    """A copy of the modules along ``path``, at whose end ``leaf`` stands; whatever stands beside them is absent."""
    if not path:
        return leaf
    hollow = copy.copy(module)
    hollow._parameters, hollow._buffers = {}, {}
    hollow._modules = {
        name: _hollow(child, path[1:], leaf) if name == path[0] else nn.Module()  # type: ignore[arg-type]
        for name, child in module._modules.items()
    }
    return hollow


def _load(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None,
    cut: Callable[[PreTrainedModel], Iterable[str]],
    *,
    build: bool = True,
) -> PreTrainedModel:
    """Fill what ``cut`` leaves of the checkpoint's model class, or what it makes of an object that is not built at all;
    it gives patterns of the names of tensors that are not read."""

    return load_weights(class_without(checkpoint.model_class, cut, build=build), checkpoint, dtype)
