"""Schema: every column of the tables, said once.

For whoever makes, reads or shows a table of events, cells or effects. Knows names, types, meanings and units; knows no
files and no models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

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
