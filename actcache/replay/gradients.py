"""Gradients: how the margin of an event changes with what modules of late blocks give at its position.

One forward of the event's sequence alone, by the model's own attention, and one backward from the margin to all of the
modules at once. What a module gives reaches the margin through every later block, and not by itself alone. Knows
forwards; knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from actcache.models.blocks import of_this_thread
from actcache.replay.forwards import Forwards


class Gradients(NamedTuple):
    """Of n events, at k modules.

    Attributes:
        margins: ``[n]`` float32, logit(y_it) - logit(y_pt).
        outputs: ``[n, k, D]``, what each module gives at the event's position, in the stack's dtype.
        gradients: ``[n, k, D]``, of the margin by that.
    """

    margins: torch.Tensor
    outputs: torch.Tensor
    gradients: torch.Tensor


def gradients_of(
    forwards: Forwards, state: torch.Tensor, sites: Sequence[nn.Module], margin: Callable[[torch.Tensor], torch.Tensor]
) -> Gradients:
    """Of one sequence's states ``[T, D]``, scored at its last position.

    Args:
        forwards: nobody else's.
        state: at the boundary.
        sites: modules of the late blocks, in their order.
        margin: of last block's outputs ``[1, D]``: ``[1]``.
    """
    outputs: list[torch.Tensor] = []
    # The gradient of a margin by what is added to a row is that by the row.
    added = [torch.zeros(1, state.shape[1], dtype=state.dtype, device=state.device) for _ in sites]

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        own = output[0] if isinstance(output, tuple) else output
        rows = own.flatten(0, -2)
        outputs.append(rows[-1:].detach())
        changed = torch.cat([rows[:-1], rows[-1:] + added[len(outputs) - 1]]).view_as(own)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with ExitStack() as hooks, torch.enable_grad():
        for one in added:
            one.requires_grad_(True)
        for site in sites:
            hooks.callback(site.register_forward_hook(of_this_thread(hook)).remove)
        found = margin(forwards.plain(state[None])[0, -1:])
        gradients = torch.autograd.grad(found.sum(), added)
    return Gradients(found.detach().float().cpu(), *(torch.stack(rows, dim=1).cpu() for rows in (outputs, gradients)))
