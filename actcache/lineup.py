"""Lineup: the checkpoints that are compared, aligned. Knows checkpoints and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from actcache.checkpoint import Checkpoint
from actcache.errors import IncompatibleError, InputError
from actcache.prompts import Prompt

# What must be equal for states of one checkpoint to be read by the late blocks of another.
_ALIGNED_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class Lineup:
    """Two or more checkpoints of one architecture and tokenizer, in a fixed order, by label."""

    def __init__(self, checkpoints: Sequence[Checkpoint]) -> None:
        self.checkpoints = {checkpoint.label: checkpoint for checkpoint in checkpoints}

    @classmethod
    def open(cls, paths: Mapping[str, str | Path], *, with_weights: bool = True) -> Lineup:
        """Open every folder (whether it holds weights or not, if told so) and check that they belong together.

        Raises:
            InputError: a folder is unusable (see :class:`Checkpoint`).
            IncompatibleError: architecture, width, depth, vocabulary or tokenizer differ; names the field.
        """
        lineup = cls([Checkpoint.open(label, path, with_weights=with_weights) for label, path in paths.items()])
        first, *others = lineup.checkpoints.values()
        for other in others:
            for field in _ALIGNED_FIELDS:
                a, b = (getattr(checkpoint.decoder_config, field, None) for checkpoint in (first, other))
                if a != b:
                    raise IncompatibleError(
                        f"checkpoints {first.label} and {other.label} differ in {field}: {a} in {first.path}, "
                        f"{b} in {other.path}; they must be of one architecture",
                        field=field,
                    )
            _check_same_vocabulary(first, other)
        return lineup

    @property
    def labels(self) -> list[str]:
        """Labels in order."""
        return list(self.checkpoints)

    @property
    def n_blocks(self) -> int:
        """L."""
        return self._first.decoder_config.num_hidden_layers

    @property
    def width(self) -> int:
        """D."""
        return self._first.decoder_config.hidden_size

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that all checkpoints share."""
        return self._first.tokenizer

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a generation of any checkpoint."""
        return frozenset().union(*(checkpoint.end_ids for checkpoint in self.checkpoints.values()))

    @property
    def max_positions(self) -> int | None:
        """The shortest context of the lineup, in tokens; None when no config states one."""
        limits = [getattr(c.decoder_config, "max_position_embeddings", None) for c in self.checkpoints.values()]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def _first(self) -> Checkpoint:
        return next(iter(self.checkpoints.values()))

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Raw prompt ids (no chat template), the same from every checkpoint's tokenizer.

        Raises:
            IncompatibleError: two tokenizers give different ids for a prompt.
            InputError: a prompt has no tokens, or more than the model has positions.
        """
        encoded = {label: self._encode_with(label, prompts) for label in self.labels}
        ids_of = encoded[self._first.label]
        for label, others in encoded.items():
            for prompt, ids, other in zip(prompts, ids_of, others, strict=True):
                if ids != other:
                    at = next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), len(ids))
                    raise IncompatibleError(
                        f"prompt {prompt.id!r}: the tokenizers of {self._first.label} and {label} give different ids "
                        f"from token {at} on ({ids[at : at + 3]} and {other[at : at + 3]})",
                        field="tokenizer",
                    )
        for prompt, ids in zip(prompts, ids_of, strict=True):
            if not ids:
                raise InputError(f"prompt {prompt.id!r} has no tokens")
            if self.max_positions is not None and len(ids) > self.max_positions:
                raise InputError(
                    f"prompt {prompt.id!r} has {len(ids)} tokens; the model has {self.max_positions} positions"
                )
        return ids_of

    def _encode_with(self, label: str, prompts: Sequence[Prompt]) -> list[list[int]]:
        tokenizer = self.checkpoints[label].tokenizer
        return [list(ids) for ids in tokenizer([prompt.text for prompt in prompts], verbose=False)["input_ids"]]


def _check_same_vocabulary(first: Checkpoint, other: Checkpoint) -> None:
    """Both tokenizers must map ids to the same tokens; special tokens that only one of them adds are no conflict."""
    a, b = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
    if a == b:
        return
    added = set(first.tokenizer.get_added_vocab()) | set(other.tokenizer.get_added_vocab())
    by_id_a, by_id_b = ({index: token for token, index in vocab.items()} for vocab in (a, b))
    for index in sorted(by_id_a.keys() | by_id_b.keys()):
        token_a, token_b = by_id_a.get(index), by_id_b.get(index)
        if token_a != token_b and not (None in (token_a, token_b) and {token_a, token_b} & added):
            raise IncompatibleError(
                f"checkpoints {first.label} and {other.label} have different tokenizers: id {index} is {token_a!r} in "
                f"{first.path} and {token_b!r} in {other.path}",
                field="tokenizer",
            )


def as_fingerprint(lineup: Lineup, **settings: Any) -> dict[str, Any]:
    """What identifies a store: every checkpoint's digests, then the settings that its content depends on."""
    return {"checkpoints": {label: c.fingerprint for label, c in lineup.checkpoints.items()}, **settings}
