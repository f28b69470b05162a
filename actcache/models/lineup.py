"""Lineup: the checkpoints that are compared, aligned. Knows checkpoints and their tokenizers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import torch

from actcache.errors import IncompatibleError, InputError
from actcache.fingerprint import SHARED_TOKENS, Fingerprint
from actcache.models.checkpoint import DTYPES, Checkpoint
from actcache.models.templates import NONE, PLAIN, ChatTemplate, Rendering
from actcache.models.text_tower import placeholders
from actcache.models.vocabulary import Tokens, Vocabulary
from actcache.prompts import Prompt
from actcache.schema import ROLES, several_pairs

# What must be equal for states of one checkpoint to be read by the late blocks of another.
_ALIGNED_FIELDS = ("model_type", "hidden_size", "num_hidden_layers")


class Lineup:
    """One or more checkpoints of one architecture and tokenizer, in a fixed order, by label.

    Attributes:
        checkpoints: by label.
        pairs: each the labels in the roles pt and it, whose choices define events; by default one, of the first and the
            last checkpoint.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], pair: Sequence[str] | Sequence[Sequence[str]] | None = None
    ) -> None:
        self.checkpoints = {checkpoint.label: checkpoint for checkpoint in checkpoints}
        self.pairs = check_pairs(pair or (checkpoints[0].label, checkpoints[-1].label), self.labels)

    @classmethod
    def open(
        cls,
        paths: Mapping[str, str | Path],
        pair: Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        with_weights: bool = True,
        dequantize: bool = False,
    ) -> Lineup:
        """Open every folder (whether it holds weights or not, if told so; quantized ones, if they are to be
        dequantized) and check that they belong together.

        Raises:
            InputError: a folder is unusable (see :class:`Checkpoint`), or ``pair`` is neither two of the labels nor
                several such pairs.
            IncompatibleError: architecture, width, depth or tokenizer differ; names the field. Vocabularies may differ
                in their tail.
        """
        how = {"with_weights": with_weights, "dequantize": dequantize}
        opened = [Checkpoint.open(label, path, **how) for label, path in paths.items()]
        lineup = cls(opened, pair)
        first, *others = lineup.checkpoints.values()
        for other in others:
            for field in _ALIGNED_FIELDS:
                a, b = (getattr(checkpoint.decoder_config, field, None) for checkpoint in (first, other))
                if a != b:
                    raise IncompatibleError(
                        f"checkpoints {first.label} and {other.label} differ in {field}: {a} in {first.given}, "
                        f"{b} in {other.given}; they must be of one architecture",
                        field=field,
                    )
        lineup.ids.check()
        return lineup

    @property
    def labels(self) -> list[str]:
        """Labels in order."""
        return list(self.checkpoints)

    @property
    def pair(self) -> tuple[str, str]:
        """The first of the pairs."""
        return self.pairs[0]

    @property
    def paired(self) -> list[str]:
        """Labels of the checkpoints that are in a pair, in order."""
        return [label for label in self.labels if any(label in pair for pair in self.pairs)]

    @property
    def n_blocks(self) -> int:
        """L."""
        return self._first.decoder_config.num_hidden_layers

    @property
    def width(self) -> int:
        """D."""
        return self._first.decoder_config.hidden_size

    @cached_property
    def ids(self) -> Vocabulary:
        """Which ids there are, and which of them are shared."""
        tokens = [
            Tokens(
                label,
                one.given,
                one.encoder.token_of,
                one.tokenizer.get_added_vocab(),
                one.decoder_config.vocab_size,
            )
            for label, one in self.checkpoints.items()
        ]
        return Vocabulary(tokens, self.end_ids)

    @property
    def vocab_size(self) -> int:
        """V, rows that every checkpoint's embedding and head have."""
        return self.ids.n_rows

    @property
    def vocabulary(self) -> frozenset[int]:
        """Ids of the tokens that a tokenizer of the lineup has and every model can read and emit."""
        return self.ids.known

    @cached_property
    def rule(self) -> str | None:
        """Which ids are never chosen, as a fingerprint's ``vocabulary`` says it: that of a capture of today, unless
        told to :meth:`follow` another."""
        return self.ids.rule

    def follow(self, rule: str | None) -> Lineup:
        """Choose ids by the rule of a store from here on, which may be of an earlier version; returns itself."""
        self.rule = rule
        return self

    def check_captured(self, stored: Fingerprint) -> None:
        """Make sure that these are the checkpoints whose states a store holds.

        Raises:
            InputError: the store has no checkpoint of this label.
            IncompatibleError: one is another than was captured; names the field.
        """
        for label, checkpoint in self.checkpoints.items():
            captured, now = stored.checkpoints.get(label), checkpoint.fingerprint
            if captured is None:
                raise InputError(f"the store has no checkpoint {label!r}; it has {', '.join(stored.labels)}")
            field = captured.differs_in(now)
            if field is not None:
                raise IncompatibleError(
                    f"checkpoint {label} at {checkpoint.given} is not the one captured: its {field} is "
                    f"{str(getattr(now, field, None))[:12]}, the store has {str(getattr(captured, field, None))[:12]}; "
                    f"point --checkpoint {label}=DIR at the captured one",
                    field=f"checkpoints.{label}.{field}",
                )

    @property
    def has_tails(self) -> bool:
        """Whether vocabularies differ in their tail, which is never chosen."""
        return SHARED_TOKENS in (self.rule or "")

    @property
    def masked_ids(self) -> list[int]:
        """Ids that are never chosen, in order; some may be beyond a checkpoint's own rows."""
        return self.ids.masked(self.rule)

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end a generation of any checkpoint."""
        return frozenset().union(*(checkpoint.end_ids for checkpoint in self.checkpoints.values()))

    @cached_property
    def max_positions(self) -> int | None:
        """The shortest context of the lineup, in tokens; None when no config states one."""
        limits = [getattr(c.decoder_config, "max_position_embeddings", None) for c in self.checkpoints.values()]
        return min((limit for limit in limits if limit is not None), default=None)

    def own_dtype(self) -> tuple[str, str | None]:
        """The dtype that a run has unless it is told otherwise: of all checkpoints, or else float32, and why."""
        name_of = {torch_dtype: name for name, torch_dtype in DTYPES.items()}
        own = {label: checkpoint.own_dtype for label, checkpoint in self.checkpoints.items()}
        if len(set(own.values())) > 1:
            said = ", ".join(f"{label} {_name(dtype)}" for label, dtype in own.items())
            return "float32", f"the checkpoints differ ({said}); give --dtype to choose"
        (dtype,) = set(own.values())
        if dtype not in name_of:
            return "float32", f"the checkpoints are in {_name(dtype)}, and a run is in {' or '.join(DTYPES)}"
        return name_of[dtype], None

    @property
    def _first(self) -> Checkpoint:
        return next(iter(self.checkpoints.values()))

    def rendering(self, template: str | None = None, *, add_special_tokens: bool = True) -> Rendering:
        """How prompts become texts: by the chat template of a checkpoint, which all of them read alike.

        Args:
            template: a label, or a role of the pair; ``none``; None where no template is given.
            add_special_tokens: see :class:`Rendering`.

        Raises:
            InputError: it names no checkpoint, one without a template, or several.
        """
        if template is None or template == NONE:
            return Rendering(template, add_special_tokens)
        if "," in template:
            raise InputError(
                f"--template {template}: all checkpoints read the same ids, rendered by one template; with a template "
                "each, states would belong to different texts, and a swap of them would be another estimand"
            )
        roles = [dict(zip(ROLES, pair, strict=True)).get(template) for pair in self.pairs]
        label = template if template in self.checkpoints else roles[0]
        if label is None or (label != template and len(set(roles)) > 1):
            raise InputError(f"--template {template}: expected none, or one of {', '.join(self.labels)}")
        found = {one: ChatTemplate.of(one, checkpoint.tokenizer) for one, checkpoint in self.checkpoints.items()}
        if (of := found[label]) is None:
            having = [f"--template {one}" for one, known in found.items() if known]
            raise InputError(
                f"--template {template}: the tokenizer of checkpoint {label} ({self.checkpoints[label].given}) has no "
                f"chat template; {'give ' + ' or '.join(having) if having else 'nor has another one: write text'}"
            )
        return Rendering(of, add_special_tokens)

    def rendering_of(self, captured: Fingerprint) -> Rendering:
        """How the prompts of a store became texts.

        Raises:
            IncompatibleError: by another template than the checkpoint has.
        """
        label = captured.template.split(" ")[0] if captured.template else None
        found = self.rendering(label, add_special_tokens=captured.special_tokens is None)
        if found.identity != captured.template:
            raise IncompatibleError(
                f"the messages were rendered by template {captured.template}, checkpoint {label} has {found.identity}",
                field="template",
            )
        return found

    def encode(
        self,
        prompts: Sequence[Prompt],
        say: Callable[[str], None] = lambda line: None,
        rendering: Rendering = PLAIN,
        longest: int | None = None,
    ) -> list[list[int]]:
        """Prompt ids, the same from every checkpoint's tokenizer; they end with the text, or where an answer begins.

        Args:
            prompts: what to encode.
            say: told, in one line each, what the tokenizers would have done to texts and does not happen here.
            rendering: how prompts become texts; by default, those with messages are refused.
            longest: how many ids of each are kept at most; None for all.

        Raises:
            IncompatibleError: two tokenizers give different ids for a prompt.
            InputError: a prompt has no tokens, a second BOS, a token beyond the embeddings, ids that are not of every
                checkpoint, or more tokens than the model has positions; or see :meth:`Rendering.text_of`.
        """
        for line in self._left_undone():
            say(line)
        ids_of = [prompt.token_ids or [] for prompt in prompts]
        first, *others = self.checkpoints.values()
        others = [other for other in others if not first.encoder.is_equal(other.encoder)]
        for special in (True, False):
            adds = special and rendering.add_special_tokens
            own = [i for i, p in enumerate(prompts) if p.token_ids is None and rendering.is_whole(p) != special]
            texts = [rendering.text_of(prompts[i]) for i in own]
            found = first.encoder.encode(texts, add_special_tokens=adds)
            for other in others:
                for i, ids, theirs in zip(
                    own, found, other.encoder.encode(texts, add_special_tokens=adds), strict=True
                ):
                    if ids != theirs:
                        raise self._different_ids(prompts[i], first, ids, other, theirs)
            for i, ids in zip(own, found, strict=True):
                ids_of[i] = ids
        ids_of = [ids[:longest] for ids in ids_of]
        for prompt, ids in zip(prompts, ids_of, strict=True):
            self._check_ids(prompt, ids)
        return ids_of

    @cached_property
    def _placeholders(self) -> dict[int, str]:
        """Ids of tokens that stand for something else than text, and what a config calls them."""
        return {key: name for c in self.checkpoints.values() for key, name in placeholders(c.config).items()}

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that are special tokens of any of the tokenizers."""
        return frozenset().union(*(checkpoint.encoder.special_ids for checkpoint in self.checkpoints.values()))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, by a tokenizer that has them all, or else by the first."""
        encoders = [checkpoint.encoder for checkpoint in self.checkpoints.values()]
        knows = (encoder for encoder in encoders if encoder.token_of.keys() >= set(ids))
        return next(knows, encoders[0]).decode(ids)

    def _left_undone(self) -> Iterator[str]:
        labels_of: dict[str, list[str]] = {}
        for label, checkpoint in self.checkpoints.items():
            for line in checkpoint.left_undone():
                labels_of.setdefault(line, []).append(label)
        for line, labels in labels_of.items():
            yield f"checkpoint{'s' * (len(labels) > 1)} {', '.join(labels)}: {line}"

    def _check_ids(self, prompt: Prompt, ids: list[int]) -> None:
        encoder = self._first.encoder
        if not ids:
            raise InputError(f"{prompt.named} has no tokens")
        if self.max_positions is not None and len(ids) > self.max_positions:
            raise InputError(f"{prompt.named} has {len(ids)} tokens; the model has {self.max_positions} positions")
        if max(ids) >= self.vocab_size:
            beyond = encoder.describe(max(ids))
            raise InputError(
                f"{prompt.named}: token {beyond} is beyond the {self.vocab_size} rows of the embeddings; leave "
                "it out of the prompt, or resize the embeddings with the tokenizer"
            )
        if prompt.token_ids is not None and (unknown := [index for index in ids if index not in self.ids.shared]):
            raise InputError(
                f"{prompt.named}: token id {unknown[0]} is not the id of a token that every checkpoint has"
            )
        if placed := self._placeholders.keys() & set(ids):
            first = min(placed, key=ids.index)
            raise InputError(
                f"{prompt.named}: token {ids.index(first)} is {encoder.describe(first)}, "
                f"{self._placeholders[first]} of the config: prompts are text alone; leave it out"
            )
        if (at := encoder.second_start(ids)) is not None:
            raise InputError(
                f"{prompt.named}: token {at} is a second {encoder.describe(ids[at])}; text that a chat template "
                "has rendered begins with one already, which the tokenizer puts before every text: leave it out"
            )

    @staticmethod
    def _different_ids(
        prompt: Prompt, first: Checkpoint, ids: list[int], other: Checkpoint, theirs: list[int]
    ) -> IncompatibleError:
        at = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs)))
        here, there = (c.encoder.describe(*of[at : at + 1]) for c, of in ((first, ids), (other, theirs)))
        return IncompatibleError(
            f"{prompt.named}: the tokenizers of {first.label} and {other.label} give different ids from token "
            f"{at} on: {here} and {there}; leave out what only one of them knows, or give both folders one tokenizer",
            field="tokenizer",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_pairs(pairs: Sequence[str] | Sequence[Sequence[str]], labels: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """One pair, or several; InputError where one is none, or is there twice."""
    found = [check_pair(pair, labels) for pair in several_pairs(pairs)]
    if twice := [pair for pair, n in Counter(found).items() if n > 1]:
        raise InputError(f"the pair {','.join(twice[0])} is given twice; leave one of them out")
    return tuple(found)


def check_pair(pair: Sequence[str], labels: Sequence[str]) -> tuple[str, str]:
    """The pair, where it is two of the labels (one alone is paired with itself); InputError otherwise."""
    if len(pair) != 2 or not set(pair) <= set(labels) or (pair[0] == pair[1] and len(labels) > 1):
        raise InputError(f"the pair is {','.join(pair)}, expected two different labels of {', '.join(labels)}")
    return pair[0], pair[1]
