"""Work: what a replay job computes, as far as its cost depends on it, and that cost.

A plan is the sum of the costs of the jobs that are to come; the truth is the same sum over those that are finished.
Knows models' shapes; knows no stores and no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from actcache.models.cost import ModelShape, Numbers
from actcache.replay.edits import PLAIN
from actcache.study.results import scopes_of
from actcache.study.scores import whose_head


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of blocks and heads (see :class:`actcache.models.cost.ModelShape`), by part of a study.

    Attributes:
        parts: part -> multiply-adds, ``hooks`` those of forward hooks that score the same.
        shared: what several jobs need and one computes: name -> (part, multiply-adds).
    """

    parts: Mapping[str, float]
    shared: Mapping[tuple[str, ...], tuple[str, float]]


def total(costs: Iterable[Cost]) -> dict[str, float]:
    """The sum of costs by part, what is shared counted once."""
    parts: dict[str, float] = {}
    shared: dict[tuple[str, ...], tuple[str, float]] = {}
    for cost in costs:
        shared |= cost.shared
        for part, products in cost.parts.items():
            parts[part] = parts.get(part, 0.0) + products
    for part, products in shared.values():
        parts[part] = parts.get(part, 0.0) + products
    return parts


@dataclass(frozen=True)
class ReplayWork:
    """What a replay job computes, as far as its cost depends on it; a plan has no more of it, a file no less.

    Attributes:
        boundary: first late block.
        late: label of the late stack.
        scopes: in their order by name, as are the readouts.
        readouts: of ``native`` and ``common_<label>``.
        plain: whether cells are scored as they are.
        n_last: variants that change position p alone.
        n_whole: those that change more: each costs a replay of the sequence in every cell.
        top1: whether variants are read for their best token too.
        kl: whether every cell is compared with the late checkpoint's own distribution.
        mode: how sequences share a forward (``LateStack.mode``, or ``single`` where strict; ``kept`` where nothing was
            replayed). Where they are packed, what changes position p alone costs one token.
    """

    boundary: int
    late: str
    scopes: tuple[str, ...]
    readouts: tuple[str, ...]
    plain: bool = True
    n_last: int = 0
    n_whole: int = 0
    top1: bool = False
    kl: bool = False
    mode: str = "packed"

    @classmethod
    def of_key(cls, key: Mapping[str, Any], late: str, mode: str) -> ReplayWork:
        """Of a job's key; ``late`` is for one of an earlier version, which had all late stacks in one."""
        names = set(key["variants"]) - {PLAIN.name}
        return cls(
            key["boundary"],
            late,
            tuple(sorted(scopes_of(key))),
            tuple(sorted(key["readouts"])),
            plain=PLAIN.name in key["variants"],
            n_last=len(names - set(key["whole"])),
            n_whole=len(names & set(key["whole"])),
            top1=key["top1"] or key["kl"],
            kl=key["kl"],
            mode=mode,
        )

    @property
    def heads(self) -> set[str]:
        """Whose heads read what the late stack returns."""
        return {whose_head(name, self.late) for name in self.readouts}

    def n_bases(self, n_checkpoints: int) -> int:
        """Cells of an event that begin with a checkpoint's own rows: scope ``position`` replays the late one's alone,
        and on the diagonal both scopes are one and the same."""
        return n_checkpoints if "prefix" in self.scopes else 1

    def n_crossed(self, n_checkpoints: int) -> int:
        """Cells that scope ``position`` adds: those rows with another checkpoint's at position p."""
        return n_checkpoints - 1 if "position" in self.scopes else 0

    def n_cells(self, n_checkpoints: int) -> int:
        """Of an event, readouts and variants apart."""
        return self.n_bases(n_checkpoints) + self.n_crossed(n_checkpoints)

    def cost(self, shape: ModelShape, n_checkpoints: int, lengths: Numbers, share: float = 1.0) -> Cost:
        """What it takes over events.

        Args:
            shape: of the late stack's checkpoint.
            n_checkpoints: K.
            lengths: tokens of every event's sequence, up to position p.
            share: of these that are events.
        """
        n_events, n_heads = share * len(lengths), len(self.heads)
        n_cells, n_crossed = self.n_cells(n_checkpoints), self.n_crossed(n_checkpoints)
        whole = share * shape.products(lengths)
        replay = share * shape.products(lengths, first=self.boundary)
        step = share * shape.step_products(lengths - 1, first=self.boundary) if self.mode == "packed" else replay
        # A best token takes the whole vocabulary; what a cell is compared with, as much again.
        heads = n_events * n_cells * n_heads * shape.head_products
        n_variants = self.n_last + self.n_whole
        # Variants that share the earlier positions' keys and values need these of every base, also without plain cells.
        shares = self.mode == "packed" and self.n_last
        grid = self.n_bases(n_checkpoints) * replay if self.mode != "kept" and (self.plain or shares) else 0.0
        if self.plain:
            grid += (n_crossed * step if self.mode != "kept" else 0.0) + (2 if self.kl else 1) * heads
        variants = n_cells * (self.n_last * step + self.n_whole * replay) + self.top1 * n_variants * heads
        # A native pass of each checkpoint scores the diagonal; then one pass per further cell or variant.
        passes = self.plain * (n_cells - 1) + n_variants * n_cells
        one_pass = whole + n_events * shape.head_products
        # The stored final states are read once, to compare the diagonal.
        shared: dict[tuple[str, ...], tuple[str, float]] = {("own pass", self.late): ("hooks", one_pass)}
        shared |= {("native", self.late, head): ("grid", n_events * shape.head_products) for head in self.heads}
        return Cost({"grid": grid, "variants": variants, "hooks": passes * one_pass}, shared)
