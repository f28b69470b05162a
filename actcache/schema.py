"""Schema: every column of the tables, and what identifies a store, each said once.

For whoever makes, reads or shows a table of events, cells or effects, and for whoever asks what a store was captured
from. Knows names, types, meanings and units; knows no files and no models.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any

from actcache.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

# ---- columns ---------------------------------------------------------------------------------------------------------

ROLES = PT, IT = "pt", "it"
"""The two roles of a pair, in its order. They end the names of columns that each of the two checkpoints has."""


FIRST_DIVERGENCE, PRE_DIVERGENCE = "first_divergence", "pre_divergence"
HISTORIES = {
    FIRST_DIVERGENCE: ROLES,
    **dict.fromkeys(("pt_rollout", "native_pt", "first_nonformat", "first_marker"), (PT,)),
    **dict.fromkeys(("it_rollout", "native_it"), (IT,)),
}
"""Kinds whose two tokens the pair itself chooses at the event, and who chose every token from the prompt to there."""

CHOSEN_KINDS = tuple(HISTORIES)
"""Those kinds: such an event never contradicts its own diagonal."""

SUPPORT_KINDS = (*(kind for kind in CHOSEN_KINDS if kind != FIRST_DIVERGENCE), PRE_DIVERGENCE)
"""Kinds that may have several events per prompt: every prompt weighs the same in their means."""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: of the column.
        type: ``string``, ``int32``, ``int64``, ``float32`` or ``float64``.
        meaning: what a value says.
        unit: of its values; empty for names and texts.
        required: whether every table has it, also one that another tool or an earlier version made.
    """

    name: str
    type: str
    meaning: str
    unit: str = ""
    required: bool = True


def of_roles(stem: str, type: str, meaning: str, unit: str = "", *, required: bool = True) -> tuple[Column, ...]:
    """A column for each role: ``stem_pt`` and ``stem_it``."""
    return tuple(Column(f"{stem}_{role}", type, f"{meaning} ({role})", unit, required) for role in ROLES)


EVENT_KEY = (
    Column("event_id", "string", "name of the event"),
    Column("prompt_id", "string", "name of the prompt"),
    Column("kind", "string", "how the event was chosen"),
    Column("step", "int32", "tokens between the prompt and the event", "tokens"),
    Column("position", "int64", "index in the sequence whose next token is compared", "tokens"),
    *of_roles("y", "int64", "token that the checkpoint in this role chose", "token id"),
)
"""The columns that cells repeat of their events."""

PAIR = Column("pair", "string", "labels in the roles pt and it, as 'base,dpo'", required=False)

OUTVOTED = of_roles(
    "outvoted", "int64", "token of the best logit, never chosen; -1 for none", "token id", required=False
)
"""Columns that events have where vocabularies differ in their tail."""

EVENTS = (
    *EVENT_KEY[:3],
    PAIR,
    EVENT_KEY[3],
    Column("proposed_step", "int32", "the step that the search first proposed", "tokens", required=False),
    Column("sequence", "int64", "index of the sequence in its segment"),
    *EVENT_KEY[4:],
    Column("context", "string", "text before the event", required=False),
    *of_roles("token", "string", "text of the chosen token", required=False),
    Column("carried", "string", "further keys of the prompt line, as a JSON object"),
    *of_roles("special", "int32", "1 where the chosen token is a special one", required=False),
    *of_roles("gap", "float32", "the best logit less the next one", "logits", required=False),
    *OUTVOTED,
    *of_roles("margin", "float32", "logit(y_it) - logit(y_pt) of the checkpoint itself", "logits", required=False),
)
"""One row per event. A column ``margin_LABEL`` per checkpoint may follow, and the reader adds ``segment``."""

EXCLUDED = (
    EVENT_KEY[1],
    Column("reason", "string", "why the prompt has no event, or one less"),
    Column("carried", "string", "further keys of the prompt line, as a JSON object"),
)
"""One row per prompt without an event."""

SEQUENCES = (
    EVENT_KEY[1],
    Column("carried", "string", "further keys of the prompt line, as a JSON object"),
)
"""One row per sequence, also of those without an event."""

SEGMENT = Column("segment", "string", "name of the segment that holds the row")

CELL_KEY = (
    Column("boundary", "int32", "index of the first late block"),
    Column("scope", "string", "whose positions the upstream gives: prefix or position"),
    Column("upstream", "string", "label of the checkpoint that gives the state"),
    Column("late", "string", "label of the checkpoint whose late blocks read it"),
    Column("readout", "string", "whose norm and head score: native (of late) or common_LABEL"),
    Column("variant", "string", "name of the edits; none for the plain grid"),
)
"""With an event, these name one cell."""

CELL_VALUES = (
    Column("margin", "float32", "logit(y_it) - logit(y_pt) of the cell", "logits"),
    Column("top1_id", "int64", "best token over the whole vocabulary", "token id", required=False),
    Column("noop_delta", "float32", "replayed margin less the captured one, on the diagonal", "logits", required=False),
    Column("kl", "float32", "KL(late's own || cell) of the next token", "nats", required=False),
)

CELLS = (*EVENT_KEY[:3], PAIR, *EVENT_KEY[3:], *CELL_KEY, *CELL_VALUES)
"""One row per cell. The prompts' further keys follow as columns."""

EFFECT_KEY = (EVENT_KEY[2], PAIR, *(column for column in CELL_KEY if column.name not in ("upstream", "late")))
"""The columns whose values together name one group of events that may be averaged."""

GRID = tuple(f"{upstream}_{late}" for upstream in ROLES for late in ROLES)
"""The four cells of a pair by role: upstream first, late second."""

GRID_MARGINS = tuple(Column(f"y_{cell}", "float64", f"margin of the cell {cell}", "logits") for cell in GRID)

CONTRASTS = (
    Column("late_from_pt", "float64", "A: what the late blocks of it add to the state of pt", "logits"),
    Column("late_from_it", "float64", "B: what the late blocks of it add to the state of it", "logits"),
    Column("interaction", "float64", "B - A: the part that needs the state of it", "logits"),
    Column("late_main", "float64", "(A + B) / 2: what the late blocks of it add on average", "logits"),
    Column("upstream_main", "float64", "what the state of it adds, on average over both late stacks", "logits"),
    Column("native_shift", "float64", "how far the two diagonal cells are apart", "logits"),
)
"""Differences of one event's four cells, and their means."""

SHARES = (
    Column("portable_share", "float64", "mean A / mean B", "share"),
    Column("matched_ratio", "float64", "mean B / mean A", "ratio"),
    Column("interaction_share", "float64", "mean interaction / mean native shift", "share"),
)

EFFECTS = (
    *EFFECT_KEY,
    Column("pt", "string", "label of the checkpoint that is contrasted as pt"),
    Column("it", "string", "label of the checkpoint that is contrasted as it"),
    Column("subset", "string", "all events of the group, or those of a step or of a value that prompts carry"),
    Column("share_of_events", "float64", "events of the subset / events of the whole group", "share"),
    Column("weights", "string", "which weigh the same in a mean: event or prompt"),
    Column("n_events", "int64", "events of the group", "events"),
    Column("n_prompts", "int64", "prompts that they come from", "prompts"),
    *CONTRASTS,
    *SHARES,
)
"""One group of ``effects.json``. Contrasts and shares are a mean with an interval."""


def names(columns: Iterable[Column]) -> tuple[str, ...]:
    """Names of columns, in their order."""
    return tuple(column.name for column in columns)


def types(columns: Iterable[Column]) -> dict[str, str]:
    """Types of columns by name, of those that every table has."""
    return {column.name: column.type for column in columns if column.required}


def arrow_type(type: str) -> pa.DataType:
    """The Arrow type that a column's ``type`` names."""
    import pyarrow as pa

    known = (pa.string(), pa.int32(), pa.int64(), pa.float32(), pa.float64())
    return dict(zip(("string", "int32", "int64", "float32", "float64"), known, strict=True))[type]


def margin_column(label: str) -> str:
    """The event column of what a checkpoint itself makes of the event's two tokens."""
    return f"margin_{label}"


PLAIN = "none"
"""Name of the variant that has no edit: the plain grid."""

NATIVE = "native"
"""The readout that is the late checkpoint's own final norm and head."""


def common_readout(label: str) -> str:
    """The readout that is this checkpoint's final norm and head for every cell."""
    return f"common_{label}"


def readouts_of(
    names: Iterable[str], labels: Sequence[str], pair: Sequence[str] | Sequence[Sequence[str]]
) -> tuple[str, ...]:
    """Readouts by label, each once, where a name may be a role's: ``common_it`` is the second checkpoint of the pair,
    or of each of several pairs, unless a checkpoint is called ``it``."""
    of_role: dict[str, list[str]] = {}
    for one in several_pairs(pair):
        for role, label in zip(ROLES, one, strict=True):
            if role not in labels:
                of_role.setdefault(common_readout(role), []).append(common_readout(label))
    return tuple(dict.fromkeys(readout for name in names for readout in of_role.get(name, [name])))


def several_pairs(pair: Sequence[str] | Sequence[Sequence[str]]) -> list[Sequence[str]]:
    """One pair of labels, or several, as several."""
    return [one for one in pair if not isinstance(one, str)] or [[one for one in pair if isinstance(one, str)]]


# A key of a prompt line becomes a column of these tables, so that it may have no name of theirs.
RESERVED_NAMES = frozenset(names((*EVENTS, *EXCLUDED, SEGMENT, *CELLS)))
RESERVED_PREFIXES = ("gap_", "margin_", "special_")


# ---- canonical JSON --------------------------------------------------------------------------------------------------


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values, equal bytes. InputError for what is no JSON, as NaN."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"not a JSON value: {error}") from error


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value)).hexdigest()


# ---- fingerprint -----------------------------------------------------------------------------------------------------

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
            raise InputError(f"the fingerprint's checkpoint {label!r} is {_short(content)}, expected an object")
        known, further = _split(cls, content)
        for name, value in known.items():
            if not isinstance(value, str):
                raise InputError(f"the fingerprint's {name} of {label!r} is {_short(value)}, expected text")
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
        support: ``fixed`` where the events are given, ``rollouts`` where they lie on rollouts; elsewhere they are first
            divergences.
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
            raise InputError(f"the fingerprint is {_short(content)}, expected an object")
        for name in _REQUIRED:
            if name not in content:
                raise InputError(f"the fingerprint has no {name!r}")
        known, further = _split(cls, content)
        for name, value in known.items():
            is_one, expected = _EXPECTED[name]
            if not is_one(value):
                raise InputError(f"the fingerprint's {name} is {_short(value)}, expected {expected}")
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on, below 2**48 as sums of such stay within 64 bits."""
    return type(value) is int and 0 <= value < 2**48


def check_whole(value: Any, what: str) -> None:
    """Raise InputError for what is no whole number, as True and 2.0 are none; ``what`` names it."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{what} is {_short(value)}, expected a whole number")


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value)) and len(set(value)) == len(value)


def _is_pairs(value: Any) -> bool:
    return _is_labels(value) and all(len(set(pair.split(","))) == pair.count(",") + 1 == 2 for pair in value)


def _is_boundaries(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_count, value)) and len(set(value)) == len(value)


_REQUIRED = ("checkpoints", "dtype", "boundaries", "row_selection", "width")
_TEXT, _COUNT = (_is_text, "text"), (is_count, "a count")
_EXPECTED = {
    "checkpoints": (lambda value: _is_object(value) and bool(value), "an object with a label each"),
    "boundaries": (_is_boundaries, "a list of distinct block indices"),
    "width": (lambda value: is_count(value) and value > 0, "a positive integer"),
    "pair": (_is_labels, "distinct labels"),
    "pairs": (_is_pairs, "distinct pairs such as base,dpo"),
    "lineup": (_is_labels, "distinct labels"),
    "strict": (_is_flag, "true or false"),
    "versions": (_is_object, "an object"),
    **dict.fromkeys(("dtype", "row_selection", "vocabulary", "support", "prompts", "codec"), _TEXT),
    **dict.fromkeys(("device", "processor", "template", "special_tokens"), _TEXT),
    **dict.fromkeys(("n_prompts", "n_blocks", "max_new", "max_tokens", "shard_prompts"), _COUNT),
}
