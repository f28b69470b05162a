"""Tokens: the ids that a checkpoint's tokenizer gives for a text, and no others. Knows tokenizers; knows no models.

Tokenizers do more than read text: they append end tokens, cut and pad as their files say, and put a BOS before text
that a chat template has given one already. What is compared is what follows the user's text, so all of this is left
off and said, or refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from actcache.errors import InputError

_TEXTS_AT_ONCE = 1024  # a tokenizer keeps far more of each text than its ids until all are done


@dataclass(frozen=True)
class Encoder:
    """A tokenizer without truncation, padding and appended tokens.

    Attributes:
        tokenizer: of the folder, with truncation and padding off.
        switched_off: which of the two its files had on.
    """

    tokenizer: PreTrainedTokenizerBase
    switched_off: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Switch off what the files of a tokenizer just loaded have on; its texts stay whole from here on."""
        backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        stored = [name for name in ("truncation", "padding") if getattr(backend, name, None) is not None]
        if stored:
            backend.no_truncation()
            backend.no_padding()
        return cls(tokenizer, tuple(stored))

    @cached_property
    def token_of(self) -> dict[int, str]:
        """Every token of the vocabulary, added ones too, by id."""
        return {index: token for token, index in self.tokenizer.get_vocab().items()}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text of their own, such as the end of a text or of a turn."""
        added = self.tokenizer.added_tokens_decoder.items()
        return frozenset(self.tokenizer.all_special_ids) | {index for index, token in added if token.special}

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and after every text."""
        # A text without special tokens; an alphabet without that letter (of proteins, say) has one of its own.
        own = (self.decode([index]) for index in sorted(self.token_of))
        for text in itertools.chain(["a"], own):
            plain, whole = (list(self.tokenizer(text, add_special_tokens=add)["input_ids"]) for add in (False, True))
            if plain and not set(plain) & set(self.tokenizer.all_special_ids):
                for at in range(len(whole) - len(plain) + 1):
                    if whole[at : at + len(plain)] == plain:
                        return whole[:at], whole[at + len(plain) :]
        raise InputError(f"the tokenizer of {self.tokenizer.name_or_path} changes a text's own ids by adding tokens")

    @property
    def left_off(self) -> list[int]:
        """Ids that the tokenizer appends to every text and :meth:`encode` does not."""
        return self.around[1]

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text, after those that the tokenizer puts before every one unless told not to."""
        front, end = self.around
        front, by_hand = (front, bool(end)) if add_special_tokens else ([], True)
        ids: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            batch = list(texts[start : start + _TEXTS_AT_ONCE])
            found: Any = self.tokenizer(
                batch,
                add_special_tokens=not by_hand,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            ids += ([*front, *own] if by_hand else list(own) for own in found["input_ids"])
        return ids

    @cached_property
    def starts(self) -> frozenset[int]:
        """Ids that stand before a text and not within it."""
        bos = self.tokenizer.bos_token_id
        return frozenset(self.around[0] if bos is None else [*self.around[0], bos])

    def second_start(self, ids: Sequence[int]) -> int | None:
        """Where a prompt's ids have a start token after the first, with white space between them at most."""
        front = self.around[0]
        first = max(1, len(front)) if list(ids[: len(front)]) == front else 1
        if self.starts.isdisjoint(ids[first:]):
            return None
        at = next(i for i, index in enumerate(ids) if i >= first and index in self.starts)
        between = [index for index in ids[:at] if index not in self.starts]
        return at if len(between) < at and not self.decode(between).strip() else None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens too."""
        return str(self.tokenizer.decode(list(ids)))

    def left_undone(self) -> Iterator[str]:
        """What the tokenizer would do to every text and does not here, a line each."""
        if self.left_off:
            tokens = ", ".join(map(self.describe, self.left_off))
            yield f"the tokenizer appends {tokens} to every text: left off, so that prompts end with their text"
        if self.switched_off:
            yield f"{' and '.join(self.switched_off)} stored with the tokenizer: switched off, so that texts stay whole"

    def is_equal(self, other: Encoder) -> bool:
        """Whether both surely give the same ids for every text: they are one class with the same content."""
        mine, theirs = self.tokenizer, other.tokenizer
        if type(mine) is not type(theirs) or mine.split_special_tokens != theirs.split_special_tokens:
            return False
        backends: list[Any] = [getattr(one, "backend_tokenizer", None) for one in (mine, theirs)]
        return None not in backends and backends[0].to_str() == backends[1].to_str()

    def describe(self, index: int | None = None) -> str:
        """A token and its id, for messages."""
        return "its end" if index is None else f"{self.token_of.get(index, '')!r} ({index})"
