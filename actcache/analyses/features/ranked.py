"""Ranked: what ``features rank`` found, and the sets of features that the later steps take from it.

Knows tables and crosscoders; knows no files and replays nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actcache.analyses.features.before import Before
from actcache.analyses.features.crosscoder import Crosscoder
from actcache.analyses.grid import one_boundary, pairs_of
from actcache.errors import InputError
from actcache.schema import common_readout
from actcache.store import Store
from actcache.study.statistics import Floats, Ints

ENCODINGS = ("branch", "joint")
NEIGHBOURS = 50
"""How many features a random control is drawn among: those nearest in activity times attribution."""

_NUMBERS = ("score", "active_rate", "mean_abs_attribution", "mean_activation")
_DRAWN = 1000  # features of each block of a ranking to come

Features = Mapping[int, Ints]
"""Block -> features of its crosscoder, ascending."""


def only(crosscoder: Crosscoder, features: Ints) -> Crosscoder:
    """A crosscoder of some of its features: the activations of these stay what they are."""
    at = torch.from_numpy(features)
    encoder, decoder = crosscoder.encoder[:, :, at], crosscoder.decoder[at]
    return replace(crosscoder, encoder=encoder, b_enc=crosscoder.b_enc[at], decoder=decoder)


@dataclass(frozen=True)
class Reading:
    """How rows are read: whose, where, and by which encoding.

    Attributes:
        pair: labels in the roles pt and it.
        boundary: of the cells.
        encoding: ``branch`` (the descendant's branch alone) or ``joint``.
    """

    pair: tuple[str, str]
    boundary: int
    encoding: str

    @property
    def readout(self) -> str:
        """The descendant's."""
        return common_readout(self.pair[1])

    def activations(self, crosscoder: Crosscoder, own: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
        """``[n, F]``, of rows ``[n, D]`` of the descendant; and of the base, where they are read jointly."""
        pt, it = self.pair
        if other is None:
            return crosscoder.encode_branch(it, own)
        of = {pt: other, it: own}
        return crosscoder.encode(torch.stack([of[label] for label in crosscoder.labels], dim=1))


def reading_of(store: Store, blocks: Sequence[int], pair: str, boundary: str, encoding: str) -> Reading:
    """What options name; by default the main pair, and the last boundary that is captured at or before all blocks.

    Raises:
        InputError: the store has no such pair or boundary, or none before the blocks; or the encoding is unknown.
    """
    if encoding not in ENCODINGS:
        raise InputError(f"encoding {encoding!r} is unknown; choose {' or '.join(ENCODINGS)}")
    pairs = pairs_of(store)
    if pair and tuple(pair.split(",")) not in pairs:
        raise InputError(f"the run has no events of the pair {pair!r}; it has {'; '.join(map(','.join, pairs))}")
    main = tuple(store.fingerprint.event_pairs[0])
    chosen = tuple(pair.split(",")) if pair else main if main in pairs else pairs[0]
    before = [one for one in store.boundaries if one <= blocks[0]]
    if boundary:
        at = one_boundary(store, boundary)
        if at not in before:
            raise InputError(
                f"boundary {at} is not one that was captured at or before block {blocks[0]}, the first with a "
                f"crosscoder; choose among {', '.join(map(str, before)) or 'none'}"
            )
    elif not before:
        raise InputError(
            f"the run has no boundary at or before block {blocks[0]}, the first with a crosscoder: capture with "
            f"--boundary {blocks[0]}"
        )
    else:
        at = max(before)
    return Reading((chosen[0], chosen[1]), at, encoding)


def ranking_prompts(prompts: Iterable[str], rule: str) -> set[str]:
    """The prompts whose events rank.

    Args:
        prompts: ids of all that have an event of the pair, in their order.
        rule: a share of them, those whose ids have the lowest hashes; or a whole number, so many from the first on.

    Raises:
        InputError: the rule is neither.
    """
    every = list(dict.fromkeys(prompts))
    try:
        number = float(rule)
    except ValueError:
        number = math.nan
    if rule.isdecimal() and int(rule) > 0:
        return set(every[: int(rule)])
    if not 0 < number < 1:
        raise InputError(f"ranking is {rule!r}; expected a share of the prompts, as 0.25, or how many of the first")
    by_hash = sorted(every, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    return set(by_hash[: math.ceil(number * len(every))])


@dataclass(frozen=True)
class Ranked:
    """A ranking.

    Attributes:
        reading: how rows were read for it, and are for all that follows.
        prompts: ids of those that ranked.
        table: ``ranking.parquet``, best first.
        made: what tells it from every other.
    """

    reading: Reading
    prompts: set[str]
    table: pa.Table
    made: str

    @classmethod
    def before(cls, before: Before) -> Ranked:
        """One to come, with the default options: which features are best is drawn, of so many as any set asks for."""
        reading, n = reading_of(before.store, before.blocks, "", "", ENCODINGS[0]), min(before.n_features, _DRAWN)
        drawn = np.random.default_rng(0)
        columns: dict[str, Any] = {name: drawn.random(n * len(before.blocks)) for name in _NUMBERS}
        columns["block"] = np.repeat(np.array(before.blocks, np.int32), n)
        columns["feature"] = np.tile(np.arange(n, dtype=np.int32), len(before.blocks))
        order = drawn.permutation(len(columns["block"]))
        return cls(reading, set(), pa.table({name: column[order] for name, column in columns.items()}), "to come")

    @cached_property
    def _columns(self) -> dict[str, Any]:
        return {name: self.table[name].to_numpy() for name in self.table.column_names}

    @property
    def blocks(self) -> list[int]:
        """That have a crosscoder."""
        return sorted(set(self._columns["block"].tolist()))

    def capped(self, ks: Sequence[int]) -> list[int]:
        """Sizes of sets, those beyond all features as many as there are; each once, ascending."""
        return sorted({min(k, len(self.table)) for k in ks})

    def top(self, k: int) -> Ints:
        """The rows of the table of the k best."""
        return np.arange(min(k, len(self.table)))

    def matched(self, rows: Ints, seed: int) -> Ints:
        """As many others, each of the block of one of ``rows`` and drawn among its nearest neighbours in active rate
        times mean absolute attribution; fewer where a block has no more."""
        block, weight = self._columns["block"], self._columns["active_rate"] * self._columns["mean_abs_attribution"]
        free, rng = np.ones(len(block), bool), np.random.default_rng(seed)
        free[rows] = False
        own = {int(one): np.flatnonzero(block == one) for one in np.unique(block[rows])}
        found = []
        for row in rows.tolist():
            left = own[int(block[row])]
            left = left[free[left]]
            nearest = left[_smallest(np.abs(weight[left] - weight[row]), NEIGHBOURS)]
            if len(nearest):
                found.append(int(rng.choice(nearest)))
                free[found[-1]] = False
        return np.sort(np.array(found, np.int64))

    def most_active(self, rows: Ints) -> Ints:
        """As many others of each block: the most active of that half of them whose score is nearest to 0."""
        block, score, mean = (self._columns[name] for name in ("block", "score", "mean_activation"))
        others = np.ones(len(block), bool)
        others[rows] = False
        found: list[int] = []
        for one in np.unique(block[rows]):
            left = np.flatnonzero(others & (block == one))
            idle = left[np.argsort(np.abs(score[left]), kind="stable")[: (len(left) + 1) // 2]]
            n = int((block[rows] == one).sum())
            found += idle[np.argsort(-mean[idle], kind="stable")[:n]].tolist()
        return np.sort(np.array(found, np.int64))

    def features(self, rows: Ints) -> dict[int, Ints]:
        """By block, the features of some rows of the table."""
        block, feature = self._columns["block"][rows], self._columns["feature"][rows]
        return {int(one): np.sort(feature[block == one]).astype(np.int64) for one in np.unique(block)}

    def rows_of(self, named: Sequence[str]) -> Ints:
        """The rows of features named ``block:feature``.

        Raises:
            InputError: one is none, or named twice.
        """
        named = [name.strip() for name in named]
        places = zip(self._columns["block"].tolist(), self._columns["feature"].tolist(), strict=True)
        at = {f"{block}:{feature}": row for row, (block, feature) in enumerate(places)}
        if unknown := [name for name in named if name not in at]:
            raise InputError(f"there is no feature {unknown[0]!r}; expected BLOCK:FEATURE, as {next(iter(at))}")
        if twice := [name for number, name in enumerate(named) if name in named[:number]]:
            raise InputError(f"feature {twice[0]} is named twice; name each once")
        return np.sort(np.array([at[name] for name in named], np.int64))


def _smallest(values: Floats, n: int) -> Ints:
    """Where the n smallest are, in their order, of equal ones the first; without sorting all."""
    if len(values) <= n:
        return np.argsort(values, kind="stable")
    few = np.flatnonzero(values <= np.partition(values, n - 1)[n - 1])
    return few[np.argsort(values[few], kind="stable")[:n]]
