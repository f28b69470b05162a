"""Edits: small typed changes of a state, or of what a block's attention or MLP adds to it, that compose into variants.

An :class:`Edit` is an operation with the place where it happens: a site, layers, positions. A :class:`Variant` is a
named list of edits, applied in order. Operations see rows and the rows of other checkpoints at the same positions
(*donors*); random ones depend on their seed and on the event, position and layer alone, never on what else is in the
batch; and so does a vector that is given per event. Knows tensors; knows no models, no files, no stores.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch

from actcache.errors import InputError
from actcache.finite import are_states
from actcache.models.blocks import check_counted, span_of
from actcache.replay.vectors import EventVectors, InOneLine, as_number, as_tensor, as_vector, bytes_of, take_vector

Site = Literal["state", "attention", "mlp"]
Positions = str | tuple[int, ...]  # "last", "all", or positions of the sequence; negative ones count from its end
Layer = int | float | str  # counted as boundaries are: negative from the last block, a fraction; or from..to of these


@dataclass(frozen=True)
class Rows:
    """Where rows of a tensor stand.

    Attributes:
        sequence: ``[m]`` int64, index of each row's sequence among those scored. A sequence that is scored at several
            positions is several: one up to each of them.
        position: ``[m]`` int64, its position in that sequence.
        source: ``[m]`` int64, its row among the rows given: of the states, and of every donor.
        lengths: ``[n]`` int64, of the sequences scored: the last position is the scored one.
        keys: what names each of these, for random draws.
        donors: label -> rows of another checkpoint, beside the states.
        layer: index of the block whose site this is; None at the state.
        watch: told of every edit that is applied: the edit, the rows that it concerns, and what they were and became.
    """

    sequence: torch.Tensor
    position: torch.Tensor
    source: torch.Tensor
    lengths: torch.Tensor
    keys: Sequence[str]
    donors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    layer: int | None = None
    watch: Callable[[Edit, Rows, torch.Tensor, torch.Tensor], None] | None = None

    def __len__(self) -> int:
        return len(self.sequence)

    def chosen(self, which: torch.Tensor) -> Rows:
        """The rows that a boolean mask ``[m]`` or indices choose."""
        return replace(self, sequence=self.sequence[which], position=self.position[which], source=self.source[which])

    def donor(self, label: str, like: torch.Tensor) -> torch.Tensor:
        """The other checkpoint's states at these rows, ``[m, D]``, on the device of ``like``.

        Raises:
            InputError: there is no such donor, or the edit is inside the stack, where states of others do not belong.
        """
        if self.layer is not None:
            raise InputError(_no_donor_inside(label))
        if label not in self.donors:
            raise InputError(f"an edit names the donor {label!r}; there are {', '.join(self.donors) or 'none'}")
        return self.donors[label][self.source].to(like.device)

    def vectors(self, of_event: EventVectors) -> torch.Tensor:
        """``[m, D]``: each row's event's."""
        distinct, which = self.sequence.unique(return_inverse=True)
        vectors = of_event.of_events([self.keys[sequence] for sequence in distinct.tolist()])
        return vectors[which.to(vectors.device)]

    def draws(self, seed: int, width: int) -> torch.Tensor:
        """``[m, width]`` float32 standard normal: each row depends on seed, sequence key, position and layer alone."""
        out = torch.empty(len(self), width)
        for row, (sequence, position) in enumerate(zip(self.sequence.tolist(), self.position.tolist(), strict=True)):
            name = json.dumps([seed, self.keys[sequence], position, self.layer])
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
            torch.randn(width, generator=torch.Generator().manual_seed(number), out=out[row])
        return out


class Operation(Protocol):
    """What an edit does to rows: ``[m, D]`` in any float dtype and device -> the same."""

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """The rows after it, ``[m, D]``; the ones given are left as they are."""
        ...


@dataclass(frozen=True, repr=False)
class Replace(InOneLine):
    """The donor's state instead, bit for bit; or a fixed vector (zeros knock a component out), or one per event.

    Attributes:
        donor: label of the donor, or None.
        vector: ``[D]``, or with ``per="event"`` a mapping from event id to ``[D]``, or ``[E, D]`` with ids ``events``.
    """

    donor: str | None = None
    vector: Any = None
    per: InitVar[str | None] = None
    events: InitVar[Sequence[str] | None] = None

    def __post_init__(self, per: str | None, events: Sequence[str] | None) -> None:
        if (self.donor is None) == (self.vector is None):
            raise InputError("replace takes either a donor or a vector")
        if self.vector is not None:
            object.__setattr__(self, "vector", take_vector(self.vector, per, events, "replace: the vector"))

    @property
    def depends_on_event(self) -> bool:
        """With a vector per event."""
        return isinstance(self.vector, EventVectors)

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Of ``rows``, only the shape is used."""
        if self.donor is not None:
            return at.donor(self.donor, rows)
        return _fitting(self.vector, rows, at, "replace").expand_as(rows)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """A row that does not move is the donor's, or the vector, already."""
        return True


@dataclass(frozen=True, repr=False)
class Add(InOneLine):
    """``x + scale * vector``, in float32, rounded once.

    Attributes:
        vector: ``[D]``, or with ``per="event"`` a mapping from event id to ``[D]``, or ``[E, D]`` with ids ``events``.
        scale: a number.
    """

    vector: Any
    scale: float = 1.0
    per: InitVar[str | None] = None
    events: InitVar[Sequence[str] | None] = None

    def __post_init__(self, per: str | None, events: Sequence[str] | None) -> None:
        object.__setattr__(self, "vector", take_vector(self.vector, per, events, "add: the vector"))
        object.__setattr__(self, "scale", as_number(self.scale, "add: scale"))

    @property
    def depends_on_event(self) -> bool:
        """With a vector per event."""
        return isinstance(self.vector, EventVectors)

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Add the vector to every row."""
        vector = _fitting(self.vector, rows, at, "add", torch.float32)
        return (rows.float() + self.scale * vector).to(rows.dtype)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """With scale 0."""
        return self.scale == 0


@dataclass(frozen=True, repr=False)
class Interpolate(InOneLine):
    """``(1 - weight) * x + weight * donor``, in float32, rounded once; weights 0 and 1 give either bit for bit."""

    donor: str
    weight: float

    depends_on_event: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", as_number(self.weight, "interpolate: weight"))

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Move every row towards the donor's (or beyond it, for weights outside 0..1)."""
        donor = at.donor(self.donor, rows)
        if self.weight in (0, 1):  # arithmetic would lose the sign of a zero, and overflow between large values
            return donor if self.weight else rows
        return torch.lerp(rows.float(), donor.float(), self.weight).to(rows.dtype)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """With weight 0, and rows that are the donor's already."""
        return self.weight == 0 or _same(rows, at.donor(self.donor, rows))


@dataclass(frozen=True, repr=False)
class Project(InOneLine):
    """The part of a row that lies in a subspace (of a PCA, say), in float32, rounded once.

    With B the basis, m the mean and P = B^T B:

    * ``keep``: m + P (x - m), the subspace alone;
    * ``remove``: x - P (x - m), everything else;
    * ``swap``: x + P (donor - x), the donor's part in the subspace and x's own elsewhere.

    Attributes:
        basis: ``[k, D]`` orthonormal rows.
        how: which of the three.
        mean: ``[D]``; zeros if None.
        donor: for ``swap``.
    """

    basis: torch.Tensor
    how: Literal["keep", "remove", "swap"] = "keep"
    mean: torch.Tensor | None = None
    donor: str | None = None

    depends_on_event: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.how not in ("keep", "remove", "swap"):
            raise InputError(f"project: how is {self.how!r}; choose keep, remove or swap")
        if (self.how == "swap") != (self.donor is not None):
            raise InputError("project: a donor goes with how='swap', and only with it")
        object.__setattr__(self, "basis", as_tensor(self.basis, "project: the basis"))
        if self.basis.ndim != 2:
            raise InputError(f"project: the basis has shape {tuple(self.basis.shape)}, expected [k, D]")
        if self.mean is not None:
            object.__setattr__(self, "mean", as_vector(self.mean, "project: the mean"))
        basis = self.basis.double().cpu()
        error = (basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max().item() if len(basis) else 0.0
        if not error < 1e-4:
            raise InputError(f"project: the rows of the basis are not orthonormal (off by {error:.2g}); use QR or SVD")

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Project every row."""
        basis = _fitting(self.basis, rows, at, "project", torch.float32)
        x = rows.float()
        if self.donor is not None:
            other = at.donor(self.donor, rows).float()
            return (x + (other - x) @ basis.T @ basis).to(rows.dtype)
        mean = 0.0 if self.mean is None else _fitting(self.mean, rows, at, "project", torch.float32)
        part = (x - mean) @ basis.T @ basis
        return (mean + part if self.how == "keep" else x - part).to(rows.dtype)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """Where a donor's part is put into rows that are the donor's already."""
        return self.donor is not None and _same(rows, at.donor(self.donor, rows))


@dataclass(frozen=True, repr=False)
class SignedPermutation(InOneLine):
    """A control: the difference to the donor with its coordinates permuted and their signs flipped at random.

    ``x + S (donor - x)`` for one signed permutation S per seed, the same for all rows: lengths, and angles between the
    differences of different rows, are kept; the direction means nothing. Without a donor it is ``S x``.
    """

    seed: int
    donor: str | None = None

    depends_on_event: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _seed(self.seed, "signed_permutation"))

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Permute and flip every row's difference."""
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(rows.shape[1], generator=generator).to(rows.device)
        signs = (torch.randint(2, (rows.shape[1],), generator=generator) * 2 - 1).to(rows.device)
        x = rows.float()
        if self.donor is None:
            return (x[:, order] * signs).to(rows.dtype)
        return (x + (at.donor(self.donor, rows).float() - x)[:, order] * signs).to(rows.dtype)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """Rows without a difference to permute."""
        return _same(rows, at.donor(self.donor, rows) if self.donor is not None else torch.zeros_like(rows))


@dataclass(frozen=True, repr=False)
class MatchedNorm(InOneLine):
    """A control: a random direction as long as the difference to the donor.

    ``x + |donor - x| u`` with u uniform on the sphere, drawn for each (seed, event, position, layer). Without a donor
    it is ``|x| u``.
    """

    seed: int
    donor: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _seed(self.seed, "matched_norm"))

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Add (or put) a random direction in every row."""
        direction = torch.nn.functional.normalize(at.draws(self.seed, rows.shape[1]), dim=1).to(rows.device)
        x = rows.float()
        if self.donor is None:
            return (x.norm(dim=1, keepdim=True) * direction).to(rows.dtype)
        length = (at.donor(self.donor, rows).float() - x).norm(dim=1, keepdim=True)
        return (x + length * direction).to(rows.dtype)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """Rows without a difference to be as long as."""
        return _same(rows, at.donor(self.donor, rows) if self.donor is not None else torch.zeros_like(rows))


@dataclass(frozen=True, repr=False)
class Call(InOneLine):
    """Any function of rows ``[m, D]`` and where they stand, row by row.

    Attributes:
        function: ``(rows, at) -> rows``; a row of the result must depend on that row (and its place) alone. Replay may
            call it from several threads at once.
        key: what it is, for resuming: cells are reused as long as the key is the same, so change it with the function.
    """

    function: Callable[[torch.Tensor, Rows], torch.Tensor]
    key: str

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Call the function.

        Raises:
            InputError: it returned something else than a tensor of real numbers, or another shape.
        """
        out = self.function(rows.clone(), at)
        if isinstance(out, torch.Tensor) and out.shape == rows.shape and not out.is_complex():
            return out.to(rows)
        made: Any = type(out).__name__
        if isinstance(out, torch.Tensor):
            made = tuple(out.shape) if out.shape != rows.shape else str(out.dtype).removeprefix("torch.")
        raise InputError(
            f"edit {self.key!r} made {made} of rows {tuple(rows.shape)}, expected a tensor of real numbers of "
            "their shape"
        )


@dataclass(frozen=True, repr=False)
class Edit(InOneLine):
    """An operation and where it happens.

    Attributes:
        operation: what.
        positions: ``last`` (position p), ``all``, or positions of the sequence (negative: from its end, -1 is p).
        site: ``state`` (entering the boundary), or the output of a block's ``attention`` or ``mlp`` as that module
            returns it: before any norm, scale or residual that the block applies to it afterwards.
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
            raise InputError(_no_donor_inside(donor))

    @property
    def at_last_only(self) -> bool:
        """Whether it leaves every position before p alone."""
        return self.positions == "last"

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
            if value.shape[-1] != width:
                raise InputError(f"variant {name!r}: {_unfitting(value, width)}")
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


PLAIN = Variant("none")


def _described(operation: Operation) -> Any:
    if isinstance(operation, Call):
        return ["Call", operation.key]
    values: list[Any] = [type(operation).__name__]
    for entry in fields(operation):  # type: ignore[arg-type]
        value = getattr(operation, entry.name)
        if isinstance(value, torch.Tensor):
            value = [str(value.dtype), list(value.shape), hashlib.sha256(bytes_of(value)).hexdigest()]
        elif isinstance(value, EventVectors):
            value = ["per event", str(value.vectors.dtype), list(value.vectors.shape), value.digest]
        values.append([entry.name, value])
    return values


def _no_donor_inside(label: str) -> str:
    return f"an edit inside the late stack names the donor {label!r}; donors have states only"


def _unfitting(tensor: torch.Tensor, width: int) -> str:
    return f"a tensor of shape {tuple(tensor.shape)} does not fit rows of width {width}"


def _fitting(
    given: torch.Tensor | EventVectors, rows: torch.Tensor, at: Rows, what: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    tensor = at.vectors(given) if isinstance(given, EventVectors) else given
    if tensor.shape[-1] != rows.shape[-1]:
        raise InputError(f"{what}: {_unfitting(tensor, rows.shape[-1])}")
    return tensor.to(rows.device, dtype or rows.dtype)


def _same(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``[m]`` bool: the rows that are the same in both."""
    return (rows == others).all(dim=1)


def _seed(given: Any, what: str) -> int:
    try:
        seed = operator.index(given)
    except TypeError:
        seed = None
    if seed is None or isinstance(given, bool) or abs(seed) >= 2**63:
        raise InputError(f"{what}: seed is {given!r}, expected a whole number of 63 bits")
    return seed
