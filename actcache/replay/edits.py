"""Edits: operations and where they happen, which compose into variants.

An :class:`Edit` is an operation with the place where it happens: a site, layers, positions. A :class:`Variant` is a
named list of edits, applied in order. The operations are in ``operations``, and are names of this module too. Knows
tensors; knows no models, no files, no stores.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch

from actcache import schema
from actcache.errors import InputError
from actcache.finite import are_states
from actcache.models.blocks import check_counted, span_of
from actcache.replay.operations import Add as Add
from actcache.replay.operations import Call as Call
from actcache.replay.operations import Inject as Inject
from actcache.replay.operations import Interpolate as Interpolate
from actcache.replay.operations import MatchedNorm as MatchedNorm
from actcache.replay.operations import Operation as Operation
from actcache.replay.operations import Project as Project
from actcache.replay.operations import Replace as Replace
from actcache.replay.operations import Rows as Rows
from actcache.replay.operations import SignedPermutation as SignedPermutation
from actcache.replay.operations import no_donor_inside, unfitting
from actcache.replay.vectors import EventVectors, InOneLine, bytes_of

Site = Literal["state", "attention", "mlp", "heads"]
HEADS: Site = "heads"
Positions = str | tuple[int, ...]  # "last", "all", or positions of the sequence; negative ones count from its end
Layer = int | float | str  # counted as boundaries are: negative from the last block, a fraction; or from..to of these


@dataclass(frozen=True, repr=False)
class Edit(InOneLine):
    """An operation and where it happens.

    Attributes:
        operation: what.
        positions: ``last`` (position p), ``all``, or positions of the sequence (negative: from its end, -1 is p).
        site: ``state`` (entering the boundary), or the output of a block's ``attention`` or ``mlp`` as that module
            returns it: before any norm, scale or residual that the block applies to it afterwards. Or its ``heads``:
            what the attention's output projection reads, all heads side by side.
        layers: blocks, for a site inside the stack, counted as boundaries are: an index, a negative one from the last
            block (-1), or a fraction of the depth (0.9); or a range of them, both ends included (``"0.9..-1"``).
    """

    operation: Operation
    positions: Positions = "last"
    site: Site = "state"
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        if self.site not in get_args(Site):
            raise InputError(f"site {self.site!r} is unknown; choose {', '.join(get_args(Site))}")
        if self.positions not in ("last", "all"):
            given = self.positions
            if not isinstance(given, Sequence) or not given or not all(type(number) is int for number in given):
                raise InputError(f"positions {given!r}: expected 'last', 'all' or numbers")
            object.__setattr__(self, "positions", "last" if tuple(given) == (-1,) else tuple(given))
        if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
            raise InputError(f"layers {self.layers!r}: expected a list of blocks")
        object.__setattr__(self, "layers", tuple(self.layers))
        for layer in self.layers:
            check_counted(layer)
        if (self.site == "state") != (not self.layers):
            raise InputError(f"an edit at site {self.site!r} {'takes no' if self.layers else 'needs'} layers")
        donor = getattr(self.operation, "donor", None)
        if self.site != "state" and donor is not None:
            raise InputError(no_donor_inside(donor))

    @property
    def at_last_only(self) -> bool:
        """Whether it leaves every position before p alone."""
        return self.positions == "last"

    def first(self, lengths: torch.Tensor) -> torch.Tensor:
        """The first position that it may change of sequences of these lengths ``[n]``: ``[n]`` int64, the last one
        where it changes none."""
        if self.positions == "all":
            return torch.zeros_like(lengths)
        found = lengths - 1
        for number in (-1,) if isinstance(self.positions, str) else self.positions:
            at = torch.full_like(lengths, number) if number >= 0 else lengths + number
            found = torch.where((at >= 0) & (at < found), at, found)
        return found

    @property
    def depends_on_event(self) -> bool:
        """Whether what it makes of a row, or which rows, may depend on the event: on its id, or on the position that is
        scored, beside the row and its place in the sequence."""
        is_fixed = self.positions == "all" or (not isinstance(self.positions, str) and min(self.positions) >= 0)
        return not is_fixed or getattr(self.operation, "depends_on_event", True)

    def where(self, at: Rows) -> torch.Tensor:
        """``[m]`` bool: the rows that it changes."""
        if self.positions == "all":
            return torch.ones(len(at), dtype=torch.bool)
        last = at.lengths[at.sequence] - 1
        numbers = (-1,) if isinstance(self.positions, str) else self.positions
        chosen = torch.zeros(len(at), dtype=torch.bool)
        for number in numbers:
            chosen |= at.position == (number if number >= 0 else last + 1 + number)
        return chosen

    def apply(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """``rows`` ``[m, D]`` with those it concerns changed; a new tensor where any is."""
        chosen = self.where(at).nonzero().flatten()
        if not len(chosen):
            return rows
        out = rows.clone()
        index = chosen.to(rows.device)
        before, there = rows[index], at.chosen(chosen)
        after = self.operation(before, there)
        if at.watch is not None:
            at.watch(self, there, before, after)
        out[index] = after
        return out

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """Which of ``rows`` ``[m, D]`` it may leave as they are, ``[m]`` bool or the same for all: its weight is 0, or
        source and host are equal. A row of any other that does not move is a mistake."""
        known = getattr(self.operation, "may_stay", None)
        return False if known is None else known(rows, at)

    def blocks(self, n_blocks: int) -> tuple[int, ...]:
        """Its layers as block indices of a model with so many, in order, each once; they may be out of range."""
        found: list[int] = []
        for layer in self.layers:
            first, last = span_of(layer, n_blocks)
            found += range(first, last + 1)
        return tuple(dict.fromkeys(found))

    def of_depth(self, n_blocks: int) -> Edit:
        """The same edit with its layers as block indices."""
        blocks = self.blocks(n_blocks)
        return self if blocks == self.layers else replace(self, layers=blocks)

    def check_layers(self, boundary: int, n_blocks: int, name: str) -> None:
        """Raise InputError, naming the variant, for a layer outside the late stack."""
        late = f"the late stack has blocks {boundary}..{n_blocks - 1}"
        for layer in self.layers:
            first, last = span_of(layer, n_blocks)
            if first > last or not boundary <= first <= last < n_blocks:
                there = "" if first == last == layer else f", which is {first if first == last else f'{first}..{last}'}"
                raise InputError(f"variant {name!r} edits layer {layer}{there}; {late}")

    def check_vectors(self, width: int, dtype: torch.dtype, keys: Sequence[str], name: str) -> None:
        """Raise InputError, naming the variant, for a vector of another width, for one that overflows in this dtype,
        and for an event, named by one of ``keys``, that has none."""
        for entry in fields(self.operation):  # type: ignore[arg-type]
            value = getattr(self.operation, entry.name)
            if isinstance(value, EventVectors):
                if (event := value.missing(keys)) is not None:
                    raise InputError(f"variant {name!r} has no vector for event {event!r}; it has {len(value.events)}")
                value = value.of_events(list(dict.fromkeys(keys)))
            if not isinstance(value, torch.Tensor):
                continue
            if value.shape[-1] != width and self.site != HEADS:  # whose width is found when they run
                raise InputError(f"variant {name!r}: {unfitting(value, width)}")
            if not are_states(value.to(dtype)):
                raise InputError(
                    f"variant {name!r}: a vector has values that {dtype} does not hold, or whose squares are not finite"
                )

    def check_positions(self, lengths: Sequence[int], name: str) -> None:
        """Raise InputError, naming the variant, for a position that some sequence does not have."""
        if isinstance(self.positions, tuple):
            shortest = min(lengths, default=0)
            for number in self.positions:
                if not -shortest <= number < shortest:
                    raise InputError(
                        f"variant {name!r} edits position {number}; the shortest sequence has {shortest} positions"
                    )


@dataclass(frozen=True, repr=False)
class Variant(InOneLine):
    """A named list of edits, applied in order.

    Attributes:
        name: what its cells are called.
        edits: the list.
        placebo: that an edit of it moves nothing is meant, and no mistake.
    """

    name: str
    edits: tuple[Edit, ...] = ()
    placebo: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "edits", tuple(self.edits))

    @property
    def at_last_only(self) -> bool:
        """Whether earlier positions keep their states, keys and values."""
        return all(edit.at_last_only for edit in self.edits)

    def first(self, lengths: torch.Tensor) -> torch.Tensor:
        """The position before which all states, keys and values stay, of sequences of these lengths ``[n]``: ``[n]``
        int64, at most the last one."""
        found = lengths - 1
        for edit in self.edits:
            found = torch.minimum(found, edit.first(lengths))
        return found

    @property
    def tail(self) -> int | None:
        """How many of the last positions it may change, where that does not depend on the sequence; else None."""
        first = -1
        for edit in self.edits:
            if isinstance(edit.positions, tuple):
                if max(edit.positions) >= 0:
                    return None
                first = min(first, *edit.positions)
            elif not edit.at_last_only:
                return None
        return -first

    @property
    def depends_on_event(self) -> bool:
        """Whether events of one sequence may need different rows before the scored position."""
        return any(edit.depends_on_event for edit in self.edits)

    def of_depth(self, n_blocks: int) -> Variant:
        """The same variant with all layers as block indices."""
        edits = tuple(edit.of_depth(n_blocks) for edit in self.edits)
        same = all(one is other for one, other in zip(edits, self.edits, strict=True))
        return self if same else replace(self, edits=edits)

    def inside(self) -> Iterable[tuple[int, Edit]]:
        """(layer, edit) of those inside the stack, of a variant that is :meth:`of_depth`."""
        return [(int(layer), edit) for edit in self.edits for layer in edit.layers]

    def edit_states(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """The states after all edits of them, ``[m, D]``."""
        for edit in self.edits:
            if edit.site == "state":
                rows = edit.apply(rows, at)
        return rows

    @property
    def digest(self) -> str:
        """SHA-256 of everything that its results depend on; its name, and whether it is a placebo, change none."""
        described = [[_described(e.operation), e.positions, e.site, e.layers] for e in self.edits]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()


PLAIN = Variant(schema.PLAIN)


def _described(operation: Operation) -> Any:
    if isinstance(operation, Call):
        return ["Call", operation.key]
    values: list[Any] = [type(operation).__name__]
    for entry in fields(operation):  # type: ignore[arg-type]
        value = getattr(operation, entry.name)
        if "later" in entry.metadata and value == entry.default:
            continue
        if isinstance(value, torch.Tensor):
            value = [str(value.dtype), list(value.shape), hashlib.sha256(bytes_of(value)).hexdigest()]
        elif isinstance(value, EventVectors):
            value = ["per event", str(value.vectors.dtype), list(value.vectors.shape), value.digest]
        values.append([entry.name, value])
    return values
