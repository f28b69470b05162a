"""Descriptions of sweeps: the tensors that they name, and what tells their variants apart."""

from __future__ import annotations

import torch

WIDTH = 32
TENSORS = {
    "d": torch.linspace(-1, 1, WIDTH),
    "d2": torch.linspace(0, 1, WIDTH),
    "d3": torch.linspace(1, 0, WIDTH),
    "basis2": torch.eye(WIDTH)[:2],
    "basis3": torch.eye(WIDTH)[4:7],
    "narrow": torch.ones(5),
    "not orthonormal": torch.ones(2, WIDTH),
}


def digests(variants):
    """What tells each variant's results apart, by its name."""
    return {variant.name: variant.digest for variant in variants}


def one_edit(text):
    """A sweep of one variant, with an edit of these words."""
    return f'[[variants]]\nname = "v"\n[[variants.edits]]\n{text}'
