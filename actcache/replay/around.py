"""Around: the residual stream at scored positions, before and after what a module of a block adds to it.

A block adds what its attention and its MLP give: as it is, through a norm of its own, or times a constant; one after
the other, or both to one input. Which of its modules gives exactly what is added is found by running the block. Knows
modules and tensors; knows no rows of stores, and no readout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from actcache.errors import UnsupportedModelError
from actcache.models.blocks import find_site, of_this_thread
from actcache.replay.copies import copies_of
from actcache.replay.forwards import Forwards
from actcache.replay.swap import Module, path_in

_PARTS = ("attention", "mlp")
_N_PROBE_TOKENS = 5
# How far a sum may be from what a block writes, in units of what its dtype rounds the largest value by: it adds twice.
_ROUNDINGS = 4


class Added(NamedTuple):
    """What a module of a block adds: ``scale`` times what the submodule at ``path`` of the block returns."""

    path: str
    scale: float


@dataclass(frozen=True)
class Around:
    """What is looked at.

    Attributes:
        module: ``mlp``, ``attention`` or ``block``.
        added: by block, what it adds; None for the whole block.
    """

    module: Module
    added: Mapping[int, Added | None]

    def parts(self, forwards: Forwards) -> list[nn.Module]:
        """The submodules of blocks that are looked at."""
        blocks = forwards.backbone.blocks
        return [blocks[layer].get_submodule(one.path) for layer, one in self.added.items() if one is not None]


@torch.no_grad()
def find_added(forwards: Forwards, module: Module, layers: Iterable[int]) -> dict[int, Added | None]:
    """What the module adds in each of these blocks, by running the stack over a few random states.

    Raises:
        UnsupportedModelError: a block has no such module, or does more than add what its attention and its MLP give,
            each through a submodule, times one constant.
    """
    if module == "block":
        return dict.fromkeys(layers)
    chosen, blocks = list(layers), forwards.backbone.blocks
    sites = [forwards.site(layer, part) for layer in chosen for part in _PARTS]
    (own,) = copies_of(forwards, 1, [*sites, *(child for layer in chosen for child in blocks[layer].children())])
    backbone = own.backbone
    state = torch.randn(1, _N_PROBE_TOKENS, backbone.width, generator=torch.Generator().manual_seed(0))
    with ExitStack() as hooks:
        seen = {layer: _Seen(backbone.blocks[layer], hooks) for layer in chosen}
        own.plain(state.to(backbone.device, backbone.dtype))
    return {layer: one.added(module) for layer, one in seen.items()}


class _Seen:
    """What a block and its parts were given and returned in one forward."""

    def __init__(self, block: nn.Module, hooks: ExitStack) -> None:
        self.block = block
        self.sites = {part: path_in(block, find_site(block, part)) for part in _PARTS}
        self.calls: list[tuple[str, torch.Tensor]] = []
        self.given = self.written = torch.empty(0)
        paths = dict.fromkeys([*(name for name, _ in block.named_children()), *self.sites.values()])
        for path in paths:
            hooks.callback(block.get_submodule(path).register_forward_hook(self._keeping(path)).remove)
        hooks.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
        hooks.callback(block.register_forward_hook(self._leave).remove)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = _rows(_given(args, kwargs)).double()

    def _leave(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.written = _rows(output).double()

    def _keeping(self, path: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor) and first.shape[-1:] == self.given.shape[-1:]:
                rows = _rows(first)
                if rows.shape == self.given.shape:
                    self.calls.append((path, rows.double()))

        return keep

    def added(self, module: Module) -> Added:
        """The two submodules, the last one of which returns before the block does, whose sum times a constant is
        nearest to what the block adds; of them, the module's."""
        paths = [path for path, _ in self.calls]
        once = [path for path in paths if paths.count(path) == 1]
        outputs = dict(self.calls)
        behind = {part: once[once.index(site) :] if site in once else [] for part, site in self.sites.items()}
        change = self.written - self.given
        found: list[tuple[float, float, dict[str, str]]] = []
        for attention in behind["attention"]:
            for mlp in behind["mlp"]:
                both = outputs[attention] + outputs[mlp]
                if attention == mlp or not (norm := both.square().sum()):
                    continue
                scale = float((change * both).sum() / norm)
                off = float((change - scale * both).abs().max())
                found.append((off, scale, {"attention": attention, "mlp": mlp}))
        rounding = torch.finfo(next(self.block.parameters()).dtype).eps * _ROUNDINGS
        off, scale, of = min(found, key=lambda one: one[0], default=(torch.inf, 1.0, {}))
        summed = (self.given, self.written, *(scale * outputs[path] for path in of.values()))
        if not off <= rounding * max(float(one.abs().max()) for one in summed):
            parts = " and ".join(self.sites.values())
            raise UnsupportedModelError(
                f"{type(self.block).__name__} does more than add what its {parts} give to the residual stream: what "
                f"its {module} adds is unknown"
            )
        return Added(of[module], 1.0 if abs(scale - 1) <= rounding else scale)


class Watch:
    """Takes the rows around modules while a pack runs, at the rows ``scored`` of its states, in order, each once."""

    def __init__(self, forwards: Forwards, around: Around, scored: torch.Tensor) -> None:
        self._forwards, self._around, self._scored = forwards, around, scored
        self._seen: dict[tuple[int, str], torch.Tensor] = {}

    @contextmanager
    def inside(self, rows: torch.Tensor, index: torch.Tensor) -> Iterator[None]:
        """Within this context, forwards run ``rows`` of the states, which lie at ``index`` of the flattened batch."""
        at = index[torch.isin(rows, self._scored)]

        def keeping(layer: int, what: str) -> Callable[..., None]:
            def keep(_: nn.Module, args: tuple[Any, ...], of: Any) -> None:
                flat = _rows(_given(args, of) if what == "given" else of)
                self._seen[layer, what] = flat[at.to(flat.device)]

            return of_this_thread(keep)

        with ExitStack() as hooks:
            for layer, added in self._around.added.items():
                block = self._forwards.backbone.blocks[layer]
                if self._around.module != "mlp":
                    enter = keeping(layer, "given")
                    hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if self._around.module != "attention":
                    hooks.callback(block.register_forward_hook(keeping(layer, "written")).remove)
                if added is not None:
                    part = block.get_submodule(added.path)
                    hooks.callback(part.register_forward_hook(keeping(layer, "added")).remove)
            yield

    def rows(self) -> torch.Tensor:
        """``[n, 2 k, D]``: of each block, in order, the residual stream before the module adds to it, and after."""
        found = []
        for layer, added in self._around.added.items():
            given, written = (self._seen.get((layer, what)) for what in ("given", "written"))
            if added is not None:
                of_module = added.scale * self._seen[layer, "added"].float()
                if written is None and given is not None:
                    written = (given.float() + of_module).to(given.dtype)
                elif given is None and written is not None:
                    given = (written.float() - of_module).to(written.dtype)
            assert given is not None
            assert written is not None
            found += [given, written]
        return torch.stack(found, dim=1)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _rows(output: Any) -> torch.Tensor:
    """The first tensor of what a module returns, ``[B * T, D]``."""
    first: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return first.flatten(0, -2)
