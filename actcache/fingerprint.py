"""Fingerprint: what identifies a store, everything that its bytes depend on.

For whoever asks what a store was captured from, and whether two stores are of the same work. Knows names and their
values; knows no files and no models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from actcache.canonical import canonical, digest_of
from actcache.counts import is_count, short
from actcache.errors import InputError
from actcache.schema import FIRST_DIVERGENCE

ANY_CHECKPOINT, REAL_TOKENS, SHARED_TOKENS = "of any checkpoint", "real tokens", "shared tokens"
"""What ``vocabulary`` of a fingerprint may say. Only earlier versions let an event have a token of any checkpoint."""

# A field of a fingerprint that this store does not record: an earlier version wrote it, or a tool that is no capture.
# Typed as nothing in particular, so that what a capture records has its own type everywhere.
_NOT_RECORDED: Any = None


class _AsJson:
    """Fields as a JSON object, and back. ``further`` keeps what this version does not know, as it was."""

    further: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is stored; the fields that are not recorded are not in it."""
        known = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "further"}  # type: ignore[arg-type]
        return {**self.further, **{name: _plain(value) for name, value in known.items() if value is not None}}

    def __eq__(self, other: object) -> bool:
        # As bytes, which is what a digest sees: 1, 1.0 and True are equal in Python only.
        return type(other) is type(self) and canonical(self.to_json()) == canonical(other.to_json())

    def __hash__(self) -> int:
        return hash(canonical(self.to_json()))


@dataclass(frozen=True, eq=False)
class CheckpointFingerprint(_AsJson):
    """What identifies one checkpoint of a store.

    Attributes:
        architecture: ``model_type`` of its config.
        weights: SHA-256 of its weights.
        config: SHA-256 of its config.
        tokenizer: SHA-256 of its tokenizer.
        attention: the attention implementation that it runs under.
        end_ids: ids that end a generation, as ``0,5``.
        left_off: ids that the tokenizer appends to a text, and that are left off.
        quantization: how its weights are quantized, and what was made of them; None of plain weights.
        adapter: SHA-256 of the adapter that is merged into its weights; None where there is none.
        further: what else was recorded.
    """

    architecture: str = _NOT_RECORDED
    weights: str = _NOT_RECORDED
    config: str = _NOT_RECORDED
    tokenizer: str = _NOT_RECORDED
    attention: str = _NOT_RECORDED
    end_ids: str | None = None
    left_off: str | None = None
    quantization: str | None = None
    adapter: str | None = None
    further: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, label: str, content: Any) -> CheckpointFingerprint:
        """The part that JSON has of a label.

        Raises:
            InputError: it is not an object, or a field is not text.
        """
        if not isinstance(content, dict):
            raise InputError(f"the fingerprint's checkpoint {label!r} is {short(content)}, expected an object")
        known, further = _split(cls, content)
        for name, value in known.items():
            if not isinstance(value, str):
                raise InputError(f"the fingerprint's {name} of {label!r} is {short(value)}, expected text")
        return cls(**known, further=further)

    def differs_in(self, now: CheckpointFingerprint) -> str | None:
        """The first field that is recorded here and is another in ``now``; earlier versions recorded fewer.

        They knew no adapters: where none is recorded, there was none.
        """
        if self.adapter != now.adapter:
            return "adapter"
        found = now.to_json()
        return next((name for name, value in self.to_json().items() if found.get(name) != value), None)


@dataclass(frozen=True, eq=False)
class Fingerprint(_AsJson):
    """Everything that the bytes of a store depend on. Two equal fingerprints name the same work.

    The layout needs the first five fields. A capture records all but those that are None by default, which stand only
    where they say something; ``check_captured`` names what a store of another origin lacks.

    Attributes:
        checkpoints: what identifies each checkpoint, by label.
        dtype: of states and final states.
        boundaries: whose states are stored.
        row_selection: ``prefix`` (rows of every position) or ``divergence`` (rows of the events' positions).
        width: D.
        pair: the labels in the roles pt and it, whose choices define events; the first of several pairs.
        pairs: all pairs, each as ``base,dpo``, where there are several.
        lineup: labels in the order in which they were given, where that is not the pair alone.
        support: ``fixed`` where the events are given, ``rollouts`` where they lie on rollouts, ``corpus`` where there
            are none; elsewhere they are first divergences.
        vocabulary: ``32000 shared tokens`` where tokenizers or embeddings differ in their tail, and no more than these
            are chosen; ``real tokens`` where ids that stand for none are never chosen; ``of any checkpoint`` where an
            an earlier version let a token that only one tokenizer has be an event's.
        prompts: digest of the prompts, as they were when the store was created.
        template: of messages: the label of the checkpoint whose chat template rendered them, the SHA-256 of the
            template, and the day that it was told where it asks for one.
        special_tokens: ``no`` where nothing was put before plain text that the tokenizer puts before every text.
        n_prompts: how many prompts were asked for.
        n_blocks: L.
        max_new: how many choices were compared per prompt, or per rollout, at most.
        context: of a corpus, how many tokens of each text were read at most.
        dropped: of a corpus, the ids of special tokens, whose rows count for nothing.
        held_out: of a corpus, the rule by which a prompt is held out.
        strict: whether each forward ran one sequence.
        max_tokens: tokens of one pack.
        shard_prompts: prompts per segment.
        codec: of the stored states; ``blosc`` where it is not recorded.
        device: where the forwards ran.
        processor: kind of CPU.
        versions: of libraries, by name.
        further: what else was recorded.
    """

    checkpoints: Mapping[str, CheckpointFingerprint]
    dtype: str
    boundaries: tuple[int, ...]
    row_selection: str
    width: int
    pair: tuple[str, ...] = _NOT_RECORDED
    pairs: tuple[str, ...] | None = None
    lineup: tuple[str, ...] | None = None
    vocabulary: str | None = None
    support: str | None = None
    prompts: str = _NOT_RECORDED
    template: str | None = None
    special_tokens: str | None = None
    n_prompts: int = _NOT_RECORDED
    n_blocks: int = _NOT_RECORDED
    max_new: int = _NOT_RECORDED
    context: int | None = None
    dropped: tuple[int, ...] | None = None
    held_out: str | None = None
    strict: bool = _NOT_RECORDED
    max_tokens: int = _NOT_RECORDED
    shard_prompts: int = _NOT_RECORDED
    codec: str | None = None
    device: str = _NOT_RECORDED
    processor: str = _NOT_RECORDED
    versions: Mapping[str, str] = _NOT_RECORDED
    further: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_json(cls, content: Any) -> Fingerprint:
        """The fingerprint that a JSON object is.

        Raises:
            InputError: a field that the layout needs is missing, or one is of another type; names it.
        """
        if not isinstance(content, dict):
            raise InputError(f"the fingerprint is {short(content)}, expected an object")
        for name in _REQUIRED:
            if name not in content:
                raise InputError(f"the fingerprint has no {name!r}")
        known, further = _split(cls, content)
        for name, value in known.items():
            is_one, expected = _EXPECTED[name]
            if not is_one(value):
                raise InputError(f"the fingerprint's {name} is {short(value)}, expected {expected}")
        parts = {label: CheckpointFingerprint.from_json(label, part) for label, part in known["checkpoints"].items()}
        lists = {name: tuple(value) for name, value in known.items() if isinstance(value, list)}
        found = cls(**known | lists | {"checkpoints": parts}, further=further)
        of_pairs = {label for pair in found.event_pairs for label in pair}
        for name, labels in {
            "pair": set(found.pair or ()),
            "lineup": set(found.lineup or ()),
            "pairs": of_pairs,
        }.items():
            if not labels <= parts.keys():
                raise InputError(f"the fingerprint's {name} is {known[name]}, expected labels of {', '.join(parts)}")
        return found

    @property
    def shares_tokens(self) -> bool:
        """Whether vocabularies differ in their tail, so that a token that is never chosen might have been the best."""
        return SHARED_TOKENS in (self.vocabulary or "")

    @property
    def event_pairs(self) -> list[tuple[str, ...]]:
        """The pairs whose choices define events, each two labels in the roles pt and it."""
        return [tuple(one.split(",")) for one in self.pairs] if self.pairs else [tuple(self.pair or ())]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON: what commit records, runs and tables name a store by."""
        return digest_of(self.to_json())

    @property
    def labels(self) -> list[str]:
        """Labels in the order of the lineup: as recorded, else the pair's and then the others by name."""
        first = [*(self.lineup or ()), *(self.pair or ())]
        return list(dict.fromkeys([*first, *sorted(self.checkpoints)]))

    @property
    def has_prefix_rows(self) -> bool:
        """Whether there is a row for every position, which a replay needs."""
        return self.row_selection == "prefix"

    def check_captured(self) -> None:
        """Raise InputError, naming a field, where a store lacks what every capture records."""
        for name in ("pair", "n_blocks", "n_prompts", "prompts", "max_new", "strict", "max_tokens", "shard_prompts"):
            if getattr(self, name) is None:
                raise InputError(f"the store does not record its {name}; a store of 'actcache capture' does")

    def as_grown_from(self, stored: Fingerprint) -> Fingerprint:
        """The same work, had it been asked for the prompts and boundaries that a store was created with.

        A store may gain more of these; its commit records tell what it has.
        """
        kept = {name: getattr(stored, name) for name in ("prompts", "n_prompts") if getattr(stored, name) is not None}
        return replace(self, boundaries=stored.boundaries, **kept)

    def differences(self, other: Fingerprint) -> Iterator[tuple[str, Any, Any]]:
        """Each field that differs, in order, its value here and in ``other``; a field of a checkpoint has its path,
        as ``checkpoints.it.weights``, and ``MISSING`` stands for a value that is not recorded."""
        yield from _differences(self.to_json(), other.to_json())


MISSING = object()
"""Stands for the value of a field that is not recorded, in :meth:`Fingerprint.differences`."""

UNSAID = {
    "template": "none",
    "special_tokens": "yes",
    "support": FIRST_DIVERGENCE,
    "codec": "blosc",
    "adapter": "none",
}
"""What a fingerprint means that leaves out one of these fields, also one of an earlier version; by the field's name."""


def order_of_labels(labels: Sequence[str], pair: Sequence[str]) -> tuple[str, ...] | None:
    """What a fingerprint records as ``lineup``: None where the pair is all there is, as in earlier versions."""
    return None if tuple(labels) == tuple(pair) else tuple(labels)


def _differences(here: dict[str, Any], there: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(here.keys() | there.keys()):
        a, b = here.get(name, MISSING), there.get(name, MISSING)
        if MISSING not in (a, b) and canonical(a) == canonical(b):
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", a, b


def _split(cls: type, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries that are fields of a class, and the others; a null is one of the others, and is kept as it is."""
    known = {one.name for one in fields(cls)} - {"further"}
    mine = {name: value for name, value in content.items() if name in known and value is not None}
    return mine, {name: value for name, value in content.items() if name not in mine}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, _AsJson):
        return value.to_json()
    return list(value) if isinstance(value, tuple) else value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_pairs(value: Any) -> bool:
    return _is_labels(value) and all(len(set(pair.split(","))) == pair.count(",") + 1 == 2 for pair in value)


def _is_distinct(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value)) and len(set(value)) == len(value)


_REQUIRED = ("checkpoints", "dtype", "boundaries", "row_selection", "width")
_TEXT, _COUNT = (_is_text, "text"), (is_count, "a count")
_EXPECTED = {
    "checkpoints": (lambda value: _is_object(value) and bool(value), "an object with a label each"),
    "boundaries": (_is_distinct, "a list of distinct block indices"),
    "dropped": (_is_distinct, "a list of distinct token ids"),
    "width": (lambda value: is_count(value) and value > 0, "a positive integer"),
    "pair": (_is_labels, "distinct labels"),
    "pairs": (_is_pairs, "distinct pairs such as base,dpo"),
    "lineup": (_is_labels, "distinct labels"),
    "strict": (_is_flag, "true or false"),
    "versions": (_is_object, "an object"),
    **dict.fromkeys(("dtype", "row_selection", "vocabulary", "support", "prompts", "codec", "held_out"), _TEXT),
    **dict.fromkeys(("device", "processor", "template", "special_tokens"), _TEXT),
    **dict.fromkeys(("n_prompts", "n_blocks", "max_new", "max_tokens", "shard_prompts", "context"), _COUNT),
}
