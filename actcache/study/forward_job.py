"""Forward job: a full model over given sequences, and what it chooses after some of their positions.

For analyses that ask what a checkpoint does beyond its stored rows, such as whether other rounding would choose the
same tokens. Sequences may come from a store or from anywhere. Knows backbones through an engine alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import torch

from actcache.canonical import digest_of
from actcache.capture.forward import Forwarder, Pack
from actcache.errors import NotFiniteError
from actcache.models.backbone import Backbone
from actcache.models.cost import ModelShape
from actcache.models.regimes import Regimes
from actcache.progress import Told, nobody_told
from actcache.study.jobs import Result
from actcache.study.work import Cost

CHOICES = pa.schema(
    [("sequence", pa.int64()), ("position", pa.int64()), ("top1_id", pa.int64()), ("gap", pa.float32())]
)


class ModelEngine(Protocol):
    """What a job over a full model asks of what it is run with."""

    def backbone(self, label: str, dtype: str) -> Backbone:
        """The backbone of a checkpoint, in ``float32`` or ``bfloat16``."""

    def forwarder(self, label: str, dtype: str) -> Forwarder:
        """What runs sequences through a checkpoint, whether all of its blocks are in memory or not."""


@dataclass(frozen=True)
class ForwardJob:
    """What a checkpoint chooses after positions of given sequences.

    Attributes:
        checkpoint: digest of the checkpoint's fingerprint.
        label: by which an engine knows the checkpoint.
        dtype: of weights and states.
        sequences: token ids of each.
        first: of each, the first position whose next token is compared; all after it are compared too.
        strict: one sequence per forward.
        max_tokens: tokens per forward otherwise. Packs hold the sequences in this order.
        names: what an error calls each sequence; by default its number.
    """

    checkpoint: str
    label: str
    dtype: str
    sequences: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    strict: bool
    max_tokens: int
    names: tuple[str, ...] = ()

    @property
    def key(self) -> dict[str, Any]:
        """All that its rows depend on."""
        packs = {"strict": self.strict, "max_tokens": None if self.strict else self.max_tokens}
        sequences = digest_of([self.sequences, self.first])
        return {"checkpoint": self.checkpoint, "dtype": self.dtype, "sequences": sequences, **packs}

    @property
    def n_units(self) -> int:
        """Sequences."""
        return len(self.sequences)

    @property
    def n_compared(self) -> int:
        """Positions whose next token is compared."""
        return sum(len(ids) - first for ids, first in zip(self.sequences, self.first, strict=True))

    def cost(self, shapes: Mapping[str, ModelShape]) -> Cost:
        """What it takes: the blocks over every sequence once, and a row of whole-vocabulary logits per position."""
        shape, lengths = shapes[self.label], np.array([len(ids) for ids in self.sequences], np.float64)
        return Cost({"forward": shape.products(lengths) + self.n_compared * shape.head_products})

    def read(self, engine: ModelEngine) -> None:
        """Nothing: the job has its sequences."""

    @torch.no_grad()
    def run(self, engine: ModelEngine, read: None = None, told: Told = nobody_told) -> Result:
        """Run every sequence.

        Returns:
            One row per compared position, in order: the number of its sequence, the position, ``top1_id``, and ``gap``,
            how far that logit lies above the second (float32). The note ``not_packable`` says why packs are not exact
            with this model, or is None; each sequence then has a forward of its own.

        Raises:
            NotFiniteError: a logit is NaN or infinite; names the sequence and the first block.
        """
        reader = engine.forwarder(self.label, self.dtype)
        reason = None if self.strict else reader.why_not_packable()
        pack_tokens = 0 if self.strict or reason else self.max_tokens
        legs = list(self._legs(reader.regimes))
        tokens, gaps = [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]
        packed = [[legs[i] for i in pack] for pack in reader.regimes.packs([leg.length for leg in legs], pack_tokens)]
        packs = [
            Pack.of(
                [self.sequences[leg.sequence][: leg.length] for leg in members],
                [[] for _ in members],
                [range(leg.length - leg.n_compared, leg.length) for leg in members],
            )
            for members in packed
        ]
        for members, ran in zip(packed, reader.run(packs, ()), strict=True):
            try:
                best, logits = reader.readout.top2(ran.final)
            except NotFiniteError as error:
                raise self._not_finite(reader, members, error.row or 0) from error
            tokens.append(best[:, 0])
            gaps.append(logits[:, 0] - logits[:, 1])
            told(sum(leg.is_last for leg in members), tokens=sum(leg.length for leg in members))
        places = [range(first, len(ids)) for ids, first in zip(self.sequences, self.first, strict=True)]
        columns = [
            pa.array(np.repeat(np.arange(len(places)), [len(of) for of in places])),
            pa.array([position for of in places for position in of], pa.int64()),
            pa.array(torch.cat(tokens).numpy()),
            pa.array(torch.cat(gaps).numpy()),
        ]
        return Result(pa.table(columns, schema=CHOICES), {"not_packable": reason}, {})

    def _legs(self, regimes: Regimes) -> Iterator[_Leg]:
        """Every sequence, once for each regime that its compared positions are in: as its own choices are made."""
        for number, (ids, first) in enumerate(zip(self.sequences, self.first, strict=True)):
            for shortest, longest in regimes.legs(first + 1, len(ids)):
                yield _Leg(number, longest, longest - shortest + 1, longest == len(ids))

    def _not_finite(self, reader: Forwarder, pack: Sequence[_Leg], row: int) -> NotFiniteError:
        at = bisect_right(np.cumsum([leg.n_compared for leg in pack]).tolist(), row)
        ids = list(self.sequences[pack[at].sequence][: pack[at].length])
        name = self.names[pack[at].sequence] if self.names else f"sequence {pack[at].sequence}"
        return reader.not_finite(f"checkpoint {self.label} in {self.dtype}, {name}", "a logit", ids)


class _Leg(NamedTuple):
    """The beginning of a sequence, whose last positions are compared: those of one regime."""

    sequence: int
    length: int
    n_compared: int
    is_last: bool  # of its sequence
