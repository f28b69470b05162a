"""Vocabulary: which ids the checkpoints of a lineup share, and which of them are never chosen.

Tokenizers and embeddings may differ in their tail: tokens that only some of them have, and rows that pad a vocabulary.
What is compared is shared by all. Knows tokens by id and counts of rows; knows no models and no texts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from actcache.errors import IncompatibleError
from actcache.fingerprint import REAL_TOKENS, SHARED_TOKENS

# Names of tokens that stand for no text: they wait for a use that no training has given them.
_RESERVED = re.compile(r"[<\[]\|?(unused|reserved(_special)?(_token)?)_?[0-9]+\|?[>\]]", re.IGNORECASE)


@dataclass(frozen=True)
class Tokens:
    """What one checkpoint has.

    Attributes:
        label: of the checkpoint.
        path: where it is from, for errors.
        of: every token by id, added ones too.
        added: those that were added to the tokenizer's own.
        n_rows: rows of its embedding and head.
    """

    label: str
    path: str
    of: Mapping[int, str]
    added: Collection[str]
    n_rows: int


@dataclass(frozen=True)
class Vocabulary:
    """The ids of several checkpoints.

    Attributes:
        tokens: of each checkpoint.
        end_ids: ids that end a generation of any of them.
    """

    tokens: Sequence[Tokens]
    end_ids: frozenset[int]

    @cached_property
    def n_rows(self) -> int:
        """How many ids every model can read and emit."""
        return min(one.n_rows for one in self.tokens)

    @cached_property
    def known(self) -> frozenset[int]:
        """Ids below :attr:`n_rows` that stand for one token wherever a tokenizer has them."""
        every = set[int]().union(*(one.of for one in self.tokens))
        names = {i: {one.of.get(i) for one in self.tokens} - {None} for i in every if i < self.n_rows}
        return frozenset(i for i, found in names.items() if len(found) == 1)

    @cached_property
    def shared(self) -> frozenset[int]:
        """Ids of the tokens that every tokenizer has and every model can read and emit."""
        return frozenset(i for i in self.known if all(i in one.of for one in self.tokens))

    @cached_property
    def rule(self) -> str | None:
        """What a fingerprint says of a capture of today (see :meth:`masked`)."""
        unshared = any(i not in self.shared for one in self.tokens for i in one.of if i < self.n_rows)
        rules = []
        if unshared or any(one.n_rows != self.n_rows for one in self.tokens):
            rules.append(f"{len(self.shared)} {SHARED_TOKENS}")
        if self.masked(REAL_TOKENS):
            rules.append(REAL_TOKENS)
        return ", ".join(rules) or None

    def masked(self, rule: str | None) -> list[int]:
        """Ids that are never chosen, in order.

        Args:
            rule: what a fingerprint says. ``real tokens``: those without a token, or with one that is named as reserved
                (``<unused7>``, ``<|reserved_special_token_7|>``), but for those that end a generation. ``shared
                tokens``: those of tokens that not every tokenizer has, and those that not every model has a row of.
        """
        rule, found = rule or "", set[int]()
        if REAL_TOKENS in rule:
            names = [one.of for one in self.tokens]
            real = {i for i in self.known if not any(_RESERVED.fullmatch(of.get(i, "")) for of in names)}
            found |= set(range(self.n_rows)) - real - self.end_ids
        if SHARED_TOKENS in rule:
            found |= {i for one in self.tokens for i in one.of} - self.shared
            found |= set(range(self.n_rows, max(one.n_rows for one in self.tokens)))
        return sorted(i for i in found if i < max(one.n_rows for one in self.tokens))

    def check(self) -> None:
        """Raise IncompatibleError unless the tokenizers differ in their tail only; names the first token elsewhere.

        A tail is made of tokens that were added, or that lie behind all that the other tokenizer has.
        """
        for first, other in itertools.combinations(self.tokens, 2):
            if first.of == other.of:
                continue
            ends = [
                max((i for i, token in one.of.items() if token not in one.added), default=-1) for one in (first, other)
            ]
            for i in sorted(first.of.keys() | other.of.keys()):
                a, b = first.of.get(i), other.of.get(i)
                if a == b or (None not in (a, b) and i > max(ends)):
                    continue
                having, lacking = (other, first) if a is None else (first, other)
                if None in (a, b) and (having.of[i] in having.added or i > max(lacking.of)):
                    continue
                raise IncompatibleError(
                    f"checkpoints {first.label} and {other.label} have different tokenizers: id {i} is {a!r} in "
                    f"{first.path} and {b!r} in {other.path}; only tokens at the end, or added ones, may differ",
                    field="tokenizer",
                )
