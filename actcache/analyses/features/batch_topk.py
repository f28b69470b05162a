"""BatchTopK: of all activations of a batch, the largest ones are kept, ``k`` per row on average.

So one row may have many features and another few. The least activation that is kept is the batch's *cutoff*.
"""

from __future__ import annotations

import torch


def batch_topk(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Which scores of a batch are kept, ``[n, F]`` bool.

    Args:
        scores: ``[n, F]``, at least 0.
        k: how many are kept per row, on average; fewer where fewer are above 0.
    """
    flat = scores.flatten()
    values, at = flat.topk(min(k * len(scores), flat.numel()), sorted=False)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[at] = values > 0
    return kept.view_as(scores)


def cutoff(scores: torch.Tensor, kept: torch.Tensor) -> float:
    """The least score that is kept; 0 where none is."""
    least = torch.where(kept, scores, torch.inf).min()
    return float(least) if torch.isfinite(least) else 0.0
