"""Sizes: how large the last block's outputs of a sequence are, in all and at its scored position. Knows tensors alone.

What a hybrid of two checkpoints computes may lie far from what either computes. These four numbers are what the study
holds against those of unpatched forwards.
"""

from __future__ import annotations

import torch

SIZES = ("rms", "rms_p", "std", "std_p")
"""Root mean square and standard deviation, of all values of a sequence up to p, and of those at p."""


def sizes_of(outputs: torch.Tensor) -> torch.Tensor:
    """Last block's outputs ``[T, D]`` up to p -> ``[4]`` float64, in the order of ``SIZES``; the standard deviation is
    that of all values around their mean, divided by their number."""
    every = outputs.double()
    rms = [of.square().mean().sqrt() for of in (every, every[-1])]
    std = [of.std(correction=0) for of in (every, every[-1])]
    return torch.stack([*rms, *std])
