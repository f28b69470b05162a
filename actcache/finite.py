"""Finite: what a model computes must be numbers, before it is a state, a logit or a choice.

The plain path pays one pass over what it keeps. Where that finds a value that is not finite, the one sequence is run
again, alone, to name the first block that gave it. Knows tensors and trunks; knows no files, no prompts.
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
    if not values.numel():
        return True
    return all(math.isfinite(bound) for bound in torch.stack(torch.aminmax(values)).tolist())


def first_not_finite(values: torch.Tensor) -> int | None:
    """The first index of dimension 0 at which something is not finite, or None."""
    if is_finite(values):
        return None
    return int(torch.isfinite(values).flatten(1).all(dim=1).logical_not().nonzero()[0])


@torch.no_grad()
def first_block(blocks: Sequence[nn.Module], forward: Callable[[], Any], first: int = 0) -> str:
    """Where values that are not finite come from: the first block, from ``first`` on, that gives any in a forward."""
    found: list[int] = []

    def watch(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not found and not is_finite(output if isinstance(output, torch.Tensor) else output[0]):
                found.append(index)

        return hook

    hooks = [blocks[index].register_forward_hook(watch(index)) for index in range(first, len(blocks))]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return f"block {found[0]} is the first whose output is not" if found else "each block's output is, of it alone"


def not_finite(whose: str, what: str, trunk: Any, ids: Sequence[int]) -> NotFiniteError:
    """The error that names the first block; ``what`` is not finite of this sequence (token ids), by this trunk."""
    tokens = torch.tensor([list(ids)], device=trunk.device)
    where = first_block(trunk.blocks, lambda: trunk.forward([0, len(ids)], input_ids=tokens))
    return NotFiniteError(
        f"{whose}: {what} of {len(ids)} tokens is not finite; {where}: its weights are damaged, or its dtype "
        f"({trunk.dtype}) does not hold its values"
    )
