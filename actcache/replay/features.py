"""Features: an operation that reads sparse features off a module's output while it runs, and moves some of them.

What a row holds of a feature is its activation by an encoder, times its decoder row. Each activation depends on the row
and on its own threshold alone, so that an edit carries no more of a dictionary than the features that it moves. Knows
tensors; knows no dictionary's files and no models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from actcache.errors import InputError
from actcache.replay.operations import Rows
from actcache.replay.vectors import EventVectors, InOneLine, as_number

Instead = Literal["random", "orthogonal"]


@dataclass(frozen=True, repr=False)
class MoveFeatures(InOneLine):
    """``x + amount * (target - f(x)) @ decoder``, in float32, rounded once; without a target the features are removed.

    ``f(x) = relu((x - mean) @ encoder.T + bias)``, kept where ``f * scale > threshold``. Where the encoding has another
    branch, ``(y - other_mean) @ other_encoder.T`` is added before the relu; its rows y are given per event.

    Attributes:
        encoder: ``[n, D]``, a row for each of n features.
        decoder: ``[n, D]``.
        mean: ``[D]``.
        bias: n numbers.
        scale: n numbers.
        threshold: at which a feature is on.
        amount: 1 removes the features, or moves them onto the target; 2 goes as far again.
        target: for each event a row ``[D]`` whose activations shall be there; None for zeros.
        other_encoder: ``[n, D]``, of the other branch; None for none, and so is the rest of it.
        other_mean: ``[D]``.
        other: for each event, the other branch's row ``[D]``.
        target_other: for each event, the other branch's row of the target.
        instead: a control: ``random`` goes as far in a random direction, drawn for each (seed, event, position, layer);
            ``orthogonal`` in one that is orthogonal to the decoder rows.
        seed: of the draws.
    """

    encoder: torch.Tensor
    decoder: torch.Tensor
    mean: torch.Tensor
    bias: tuple[float, ...]
    scale: tuple[float, ...]
    threshold: float
    amount: float = 1.0
    target: EventVectors | None = None
    other_encoder: torch.Tensor | None = None
    other_mean: torch.Tensor | None = None
    other: EventVectors | None = None
    target_other: EventVectors | None = None
    instead: Instead | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "amount", as_number(self.amount, "features: amount"))
        n = {len(self.encoder), len(self.decoder), len(self.bias), len(self.scale)}
        if len(n) != 1:
            raise InputError(f"features: encoder, decoder, bias and scale are of {sorted(n)} features; expected one n")
        if len({given is None for given in (self.other_encoder, self.other_mean, self.other)}) != 1:
            raise InputError("features: another branch needs an encoder, a mean and a row for each event")
        if (self.target_other is None) != (self.target is None or self.other is None):
            raise InputError("features: a target of two branches has a row of each for each event")
        if self.instead not in (None, *get_args(Instead)):
            raise InputError(f"features: instead is {self.instead!r}; choose {' or '.join(get_args(Instead))}")

    @property
    def depends_on_event(self) -> bool:
        """With a row per event, and with random directions."""
        return self.target is not None or self.other is not None or self.instead is not None

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Move the features of every row."""
        change = -self._activations(rows, at, self.other)
        if self.target is not None:
            change += self._activations(at.vectors(self.target).to(rows.device), at, self.target_other)
        step = change @ self.decoder.to(rows.device, torch.float32)
        if self.instead is not None:
            step = step.norm(dim=1, keepdim=True) * self._directions(at).to(rows.device)
        return (rows.float() + self.amount * step).to(rows.dtype)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """A row in which none of the features is on, or all are where they shall be, stays as it is."""
        return True

    def _activations(self, rows: torch.Tensor, at: Rows, other: EventVectors | None) -> torch.Tensor:
        """``[m, n]`` float32."""

        def there(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(rows.device, torch.float32)

        bias, scale = (torch.tensor(numbers, device=rows.device) for numbers in (self.bias, self.scale))
        raw = torch.addmm(bias, rows.float() - there(self.mean), there(self.encoder).T)
        if other is not None and self.other_encoder is not None and self.other_mean is not None:
            raw += (there(at.vectors(other)) - there(self.other_mean)) @ there(self.other_encoder).T
        raw = raw.relu_()
        return torch.where(raw * scale > self.threshold, raw, 0.0)

    def _directions(self, at: Rows) -> torch.Tensor:
        """``[m, D]`` of length 1, or 0 where the decoder rows leave none that is orthogonal to them."""
        drawn = at.draws(self.seed, self.decoder.shape[1])
        if self.instead == "orthogonal":
            own = self.decoder.float().cpu()
            _, sizes, directions = torch.linalg.svd(own, full_matrices=False)
            kept = directions[sizes > sizes.max() * 1e-5]
            length = drawn.norm(dim=1, keepdim=True)
            drawn = drawn - drawn @ kept.T @ kept
            drawn = torch.where(drawn.norm(dim=1, keepdim=True) > 1e-4 * length, drawn, 0.0)
        return torch.nn.functional.normalize(drawn, dim=1)
