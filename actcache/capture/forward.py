"""One plain forward of a checkpoint over packed sequences, and the rows that are gathered on its way.

Knows backbones and rows; knows no events and no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.utils.hooks import RemovableHandle

from actcache.finite import first_no_state, first_not_finite
from actcache.models.backbone import Backbone
from actcache.models.blocks import find_site
from actcache.models.gather import gather_rows
from actcache.store.layout import STATE


def first_wrong(site: str, rows: torch.Tensor) -> int | None:
    """The first row that is not finite, or of states is none (see :func:`actcache.finite.are_states`)."""
    return first_no_state(rows) if site == STATE else first_not_finite(rows)


def said_of_site(site: str, block: int) -> str:
    """What an error calls a row."""
    return f"the state at boundary {block}" if site == STATE else f"the {site} of block {block}"


def forward_and_gather(
    backbone: Backbone,
    ids: torch.Tensor,
    bounds: Sequence[int],
    sites: Sequence[tuple[str, int]],
    row_ids: torch.Tensor,
) -> tuple[dict[tuple[str, int], torch.Tensor], torch.Tensor]:
    """One plain forward; the rows at each site are gathered as its block is entered, or its module is left.

    Args:
        backbone: the checkpoint.
        ids: ``[1, T]`` int64.
        bounds: ``[n + 1]``, where each sequence begins.
        sites: each a site and a block: the block's input, or what its attention or MLP gives.
        row_ids: ``[n_rows]`` int64 on the CPU, rows of the ``[T, D]`` state.

    Returns:
        rows of every site, ``[n_rows, D]`` on the CPU, and the last block's output ``[T, D]`` on the device.
    """
    gathered: dict[tuple[str, int], torch.Tensor] = {}
    on_cuda = backbone.device.type == "cuda"

    def keep(place: tuple[str, int], values: torch.Tensor) -> None:
        # Straight into page-locked memory on CUDA: the copy is queued on the stream and the forward goes on.
        rows = values[0]
        out = torch.empty(len(row_ids), rows.shape[1], dtype=rows.dtype, pin_memory=on_cuda)
        gathered[place] = gather_rows(rows, row_ids, out)

    def hooked(place: tuple[str, int]) -> RemovableHandle:
        site, block = place
        if site == STATE:
            return backbone.blocks[block].register_forward_pre_hook(
                lambda module, args, kwargs: keep(place, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        return find_site(backbone.blocks[block], site).register_forward_hook(
            lambda module, args, output: keep(place, output if isinstance(output, torch.Tensor) else output[0])
        )

    handles = [hooked(place) for place in sites]
    try:
        hidden = backbone.forward(bounds, input_ids=ids.to(backbone.device))
    finally:
        for handle in handles:
            handle.remove()
    if on_cuda:
        torch.cuda.current_stream(backbone.device).synchronize()
    return gathered, hidden
