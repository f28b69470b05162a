"""Finite: what a model computes must be numbers, before it is a state, a logit or a choice.

A state must be more: every norm squares it and sums the squares in float32. Where the sum overflows, the norm divides
by infinity, and what it hands on is zeros, which look like numbers. So a state whose squares leave float32 counts as
one that is not finite; logits, which no norm reads, need be finite alone.

The plain path pays one pass over what it keeps. Where that finds a value that is not finite, the one sequence is run
again, alone, to name the first block that gave it. Knows tensors and backbones; knows no files, no prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from actcache.errors import NotFiniteError


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN: one pass, without a copy."""
    return all(map(math.isfinite, _bounds(values)))


def are_states(rows: torch.Tensor) -> bool:
    """Whether rows ``[..., D]`` are finite, and so are their squares' sums in float32: one pass, without a copy.

    It looks at the largest value alone: D times its square must not leave float32.
    """
    most = _most(rows.shape[-1])
    return all(abs(bound) <= most for bound in _bounds(rows))


def first_not_finite(values: torch.Tensor) -> int | None:
    """The first index of dimension 0 at which something is not finite, or None."""
    if is_finite(values):
        return None
    return int(torch.isfinite(values).flatten(1).all(dim=1).logical_not().nonzero()[0])


def first_no_state(rows: torch.Tensor) -> int | None:
    """The first of rows ``[n, ..., D]`` that is no state (see :func:`are_states`), or None."""
    if are_states(rows):
        return None
    within = rows.abs().flatten(1).amax(dim=1).double() <= _most(rows.shape[-1])  # NaN is not
    return int(within.logical_not().nonzero()[0])


def _bounds(values: torch.Tensor) -> list[float]:
    """The least and the largest value; NaN where any is; none of no values."""
    return torch.stack(torch.aminmax(values)).tolist() if values.numel() else []


def _most(width: int) -> float:
    """The largest absolute value of which so many have squares whose sum is within float32."""
    return math.sqrt(torch.finfo(torch.float32).max / max(width, 1))


@torch.no_grad()
def first_block(blocks: Sequence[nn.Module], forward: Callable[[], Any], first: int = 0) -> str:
    """Where values that are not finite come from: the first block, from ``first`` on, that gives any in a forward."""
    found: list[int] = []

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not found and not are_states(output if isinstance(output, torch.Tensor) else output[0]):
                found.append(index)

        return hook

    hooks = [blocks[index].register_forward_hook(watch(index)) for index in range(first, len(blocks))]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return said_of_block(found[0] if found else None)


def not_finite(whose: str, what: str, backbone: Any, ids: Sequence[int]) -> NotFiniteError:
    """The error that names the first block; ``what`` is not finite of this sequence (token ids), by this backbone."""
    tokens = torch.tensor([list(ids)], device=backbone.device)
    where = first_block(backbone.blocks, lambda: backbone.forward([0, len(ids)], input_ids=tokens))
    return said_not_finite(whose, what, len(ids), where, backbone.dtype)


def said_not_finite(whose: str, what: str, n_tokens: int, where: str, dtype: torch.dtype) -> NotFiniteError:
    """The same where it is known where values come from (see :func:`first_block`)."""
    return NotFiniteError(
        f"{whose}: {what} of {n_tokens} tokens is not finite, or a state's squares are not; {where}: its weights "
        f"are damaged, or its dtype ({dtype}) does not hold its values"
    )


def said_of_block(index: int | None) -> str:
    """The first block whose output is not finite; None where no block's is."""
    return "each block's output is, of it alone" if index is None else f"block {index} is the first whose output is not"
