"""Edits by hooks: what each does to one row, and a full forward with everything changed row by row."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from actcache.replay.edits import (
    Add,
    Call,
    Edit,
    Interpolate,
    Replace,
    SignedPermutation,
)
from twins import reference


def draw(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Change:
    """What one edit does to one row, written twice: as the edit, and as a function of the row alone."""

    edit: Edit
    row: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (row [D], the donor's row [D]) -> row [D]
    positions: Any = "last"

    def touches(self, position, length):
        if self.positions == "all":
            return True
        numbers = (-1,) if self.positions == "last" else self.positions
        return position in [number % length for number in numbers]


@dataclass
class Study:
    """A pair of tiny models, some sequences, and the states of one at the boundary."""

    late: Any
    sequences: list[list[int]]
    states: list[torch.Tensor]  # [T, D] each, of the upstream checkpoint
    donor: list[torch.Tensor]  # of the late checkpoint
    boundary: int = 2

    @property
    def rows(self):
        return torch.cat(self.states)

    @property
    def offsets(self):
        return [0, *itertools.accumulate(len(ids) for ids in self.sequences)]

    @property
    def given(self):
        return {"donors": {"it": torch.cat(self.donor)}, "keys": [f"event {i}" for i in range(len(self.sequences))]}


def site_of(model, layer, site):
    """By hand: GPT-2 calls its attention otherwise."""
    block = reference.parts(model).blocks[layer]
    return block.mlp if site == "mlp" else getattr(block, "attn", None) or block.self_attn


def hooked(study, number, changes):
    """The last block's output at the last position: a full forward with everything changed by hooks, row by row."""
    ids, state, donor = study.sequences[number], study.states[number].clone(), study.donor[number]
    handles = []

    def change(row_of, rows, other):
        for position in range(len(ids)):
            if row_of.touches(position, len(ids)):
                rows[position] = row_of.row(rows[position], other[position])

    for one in changes:
        if one.edit.site == "state":
            change(one, state, donor)
        for layer in one.edit.layers:

            def hook(module, args, output, one=one):
                own = output[0] if isinstance(output, tuple) else output
                rows = own.clone()
                change(one, rows.view(len(ids), -1), donor)
                return (rows, *output[1:]) if isinstance(output, tuple) else rows

            handles.append(site_of(study.late, layer, one.edit.site).register_forward_hook(hook))
    try:
        return reference.overwritten(study.late, ids, study.boundary, state)[-1]
    finally:
        for handle in handles:
            handle.remove()


class Changes:
    """Writes changes for rows of one width."""

    def __init__(self, width):
        self.width = width

    def add(self, seed, scale=1.0, positions="last", **place):
        return self.add_vector(draw(self.width, seed=seed), scale, positions, **place)

    def add_vector(self, vector, scale=1.0, positions="last", **place):
        return Change(
            Edit(Add(vector, scale), positions, **place),
            lambda x, _: (x.float() + scale * vector).to(x.dtype),
            positions,
        )

    def zero(self, positions="last", **place):
        edit = Edit(Replace(vector=torch.zeros(self.width)), positions, **place)
        return Change(edit, lambda x, _: torch.zeros_like(x), positions)

    def replace(self, positions="last"):
        return Change(Edit(Replace("it"), positions), lambda _, donor: donor, positions)

    def towards(self, weight, positions="last"):
        return Change(
            Edit(Interpolate("it", weight), positions),
            lambda x, donor: torch.lerp(x.float(), donor.float(), weight).to(x.dtype),
            positions,
        )

    def permuted(self, seed, positions="last", prompt=None):
        """By one permutation of all rows, or by that of this prompt."""
        number = seed
        if prompt is not None:
            number = int.from_bytes(hashlib.sha256(json.dumps([seed, prompt]).encode()).digest()[:7], "big")
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(self.width, generator=generator)
        signs = torch.randint(2, (self.width,), generator=generator) * 2 - 1
        return Change(
            Edit(SignedPermutation(seed, "it", None if prompt is None else "prompt"), positions),
            lambda x, donor: (x.float() + signs * (donor.float() - x.float())[order]).to(x.dtype),
            positions,
        )

    def doubled(self, positions="last", **place):
        return Change(Edit(Call(lambda rows, _: rows * 2, "double"), positions, **place), lambda x, _: x * 2, positions)

    def negated(self, positions="last", **place):
        return Change(Edit(Call(lambda rows, _: -rows, "negate"), positions, **place), lambda x, _: -x, positions)
