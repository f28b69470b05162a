"""Operations: what edits do to rows, each a small typed change of a state or of what a block's attention or MLP adds.

Operations see rows and the rows of other checkpoints at the same positions (*donors*); random ones depend on their seed
and on the event, position and layer alone, never on what else is in the batch; and so does a vector that is given per
event. Knows tensors; knows no models, no files, no stores.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, ClassVar, Literal, Protocol

import torch

from actcache.errors import InputError
from actcache.replay.vectors import EventVectors, InOneLine, as_number, as_tensor, as_vector, take_vector

LATER = {"later": True}
"""Of a field that operations of earlier versions had not: at its default it is no part of their digests."""


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
        prompts: what names the prompt of each, for what is drawn once per prompt; None: each is its own.
    """

    sequence: torch.Tensor
    position: torch.Tensor
    source: torch.Tensor
    lengths: torch.Tensor
    keys: Sequence[str]
    donors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    layer: int | None = None
    watch: Callable[[Any, Rows, torch.Tensor, torch.Tensor], None] | None = None
    prompts: Sequence[str] | None = None

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
            raise InputError(no_donor_inside(label))
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
            generator = _generator(seed, self.keys[sequence], position, self.layer)
            torch.randn(width, generator=generator, out=out[row])
        return out

    def by_prompt(self) -> dict[str, torch.Tensor]:
        """The rows of each prompt, as indices ``[k]``."""
        names = self.keys if self.prompts is None else self.prompts
        found: dict[str, list[int]] = {}
        for row, sequence in enumerate(self.sequence.tolist()):
            found.setdefault(names[sequence], []).append(row)
        return {name: torch.tensor(rows) for name, rows in found.items()}


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
        object.__setattr__(self, "basis", _orthonormal(self.basis, "project"))
        if self.mean is not None:
            object.__setattr__(self, "mean", as_vector(self.mean, "project: the mean"))

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
class Inject(InOneLine):
    """A difference from the row, reduced to a subspace with its mean, and added: ``x + scale * r`` with
    ``r = m + P (delta - m)``, in float32, rounded once. B is the basis, m the mean, and P = B^T B.

    With a direction r is a control as long as that: along a random one, drawn for each (seed, event, position).

    Attributes:
        basis: ``[k, D]`` orthonormal rows, such as principal components of differences; None for all of delta.
        mean: ``[D]``, of these differences; with a basis only.
        scale: of what is added.
        donor: label of another checkpoint, whose state minus the row is delta.
        delta: in place of a donor's difference, one for each event.
        direction: None for r itself; ``random`` for any direction, ``in_span`` for one among the basis.
        seed: of the direction.
    """

    basis: torch.Tensor | None
    mean: torch.Tensor | None
    scale: float = 1.0
    donor: str | None = None
    delta: EventVectors | None = None
    direction: Literal["random", "in_span"] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.donor is None) == (self.delta is None):
            raise InputError("inject takes either a donor or delta")
        if (self.basis is None) != (self.mean is None) or (self.basis is None and self.direction == "in_span"):
            raise InputError("inject: basis and mean go together, and a direction in the span needs both")
        if self.direction not in (None, "random", "in_span"):
            raise InputError(f"inject: direction is {self.direction!r}; choose random or in_span, or leave it out")
        if self.basis is not None:
            object.__setattr__(self, "basis", _orthonormal(self.basis, "inject"))
            object.__setattr__(self, "mean", as_vector(self.mean, "inject: the mean"))
        object.__setattr__(self, "scale", as_number(self.scale, "inject: scale"))
        object.__setattr__(self, "seed", _seed(self.seed, "inject"))

    @property
    def depends_on_event(self) -> bool:
        """With a direction that is drawn, or a difference of each event's."""
        return self.direction is not None or self.delta is not None

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Add to every row what is made of its difference."""
        return (rows.float() + self.scale * self._added(rows, at)).to(rows.dtype)

    def may_stay(self, rows: torch.Tensor, at: Rows) -> torch.Tensor | bool:
        """With scale 0, and where there is nothing to add."""
        return self.scale == 0 or (self._added(rows, at) == 0).all(dim=1)

    def _added(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """``[m, D]`` float32."""
        if self.delta is not None:
            added = _fitting(self.delta, rows, at, "inject", torch.float32)
        else:
            assert self.donor is not None
            added = at.donor(self.donor, rows).float() - rows.float()
        basis = None
        if self.basis is not None and self.mean is not None:
            basis, mean = (_fitting(one, rows, at, "inject", torch.float32) for one in (self.basis, self.mean))
            added = mean + (added - mean) @ basis.T @ basis
        if self.direction is None:
            return added
        drawn = at.draws(self.seed, rows.shape[1]).to(rows.device)
        if basis is not None and self.direction == "in_span":
            drawn = drawn[:, : len(basis)] @ basis
        return added.norm(dim=1, keepdim=True) * torch.nn.functional.normalize(drawn, dim=1)


@dataclass(frozen=True, repr=False)
class SignedPermutation(InOneLine):
    """A control: the difference to the donor with its coordinates permuted and their signs flipped at random.

    ``x + S (donor - x)`` for one signed permutation S per seed, the same for all rows, or with ``per="prompt"`` for one
    per seed and prompt, the same at all of its positions: lengths, and angles between the differences of different
    rows, are kept; the direction means nothing. Without a donor it is ``S x``.
    """

    seed: int
    donor: str | None = None
    per: str | None = field(default=None, metadata=LATER)

    depends_on_event: ClassVar[bool] = False  # events of one sequence are of one prompt

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", _seed(self.seed, "signed_permutation"))
        if self.per not in (None, "prompt"):
            raise InputError(f"signed_permutation: per is {self.per!r}; leave it out, or choose 'prompt'")

    def __call__(self, rows: torch.Tensor, at: Rows) -> torch.Tensor:
        """Permute and flip every row's difference."""
        x = rows.float()
        given = x if self.donor is None else at.donor(self.donor, rows).float() - x
        if self.per is None:
            permuted = _permuted(given, torch.Generator().manual_seed(self.seed))
        else:
            permuted = torch.empty_like(given)
            for prompt, of_prompt in at.by_prompt().items():
                index = of_prompt.to(rows.device)
                permuted[index] = _permuted(given[index], _generator(self.seed, prompt))
        return (permuted if self.donor is None else x + permuted).to(rows.dtype)

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


def no_donor_inside(label: str) -> str:
    """What is said of an edit inside the late stack that names a donor."""
    return f"an edit inside the late stack names the donor {label!r}; donors have states only"


def unfitting(tensor: torch.Tensor, width: int) -> str:
    """What is said of a tensor for rows of another width."""
    return f"a tensor of shape {tuple(tensor.shape)} does not fit rows of width {width}"


def _fitting(
    given: torch.Tensor | EventVectors, rows: torch.Tensor, at: Rows, what: str, dtype: torch.dtype | None = None
) -> torch.Tensor:
    tensor = at.vectors(given) if isinstance(given, EventVectors) else given
    if tensor.shape[-1] != rows.shape[-1]:
        raise InputError(f"{what}: {unfitting(tensor, rows.shape[-1])}")
    return tensor.to(rows.device, dtype or rows.dtype)


def _orthonormal(given: Any, what: str) -> torch.Tensor:
    """A basis ``[k, D]`` (InputError: its rows are not orthonormal)."""
    tensor = as_tensor(given, f"{what}: the basis")
    if tensor.ndim != 2:
        raise InputError(f"{what}: the basis has shape {tuple(tensor.shape)}, expected [k, D]")
    basis = tensor.double().cpu()
    error = (basis @ basis.T - torch.eye(len(basis), dtype=torch.float64)).abs().max().item() if len(basis) else 0.0
    if not error < 1e-4:
        raise InputError(f"{what}: the rows of the basis are not orthonormal (off by {error:.2g}); use QR or SVD")
    return tensor


def _permuted(rows: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows ``[m, D]`` with their coordinates permuted, and the signs of these flipped, in one way for all."""
    order = torch.randperm(rows.shape[1], generator=generator).to(rows.device)
    signs = (torch.randint(2, (rows.shape[1],), generator=generator) * 2 - 1).to(rows.device)
    return rows[:, order] * signs


def _generator(*names: Any) -> torch.Generator:
    """Random numbers that depend on these names alone."""
    digest = hashlib.sha256(json.dumps(names).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


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
