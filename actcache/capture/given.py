"""Given events: pairs of tokens at any positions of any sequences, from a file or from another run.

What a file's line says:

    {"prompt_id": "p7", "position": 11, "y_pt": 5, "y_it": 9}                    of a prompt of the prompts file
    {"id": "ioi-3", "prompt": "When Mary and John ...", "y_pt": 5, "y_it": 9}     a text of its own
    {"id": "x", "token_ids": [3, 1, 4], "position": 1, "y_pt": 5, "y_it": 9}      ids, whatever chose them

``position`` is the place whose next token is compared, by default the last one. ``kind`` (by default ``fixed``),
``step`` and, where the lineup has several pairs, ``pair`` (``"base,dpo"``, by default the first one) may be given;
further keys are carried to the event. The tokens are given: they need not be what a checkpoint
chooses, and ``kind`` says so. Of ``schema.CHOSEN_KINDS`` a capture checks that the pair itself chooses them. Knows
tokens and files; knows no forwards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actcache.canonical import canonical
from actcache.carried import MAX_KEYS
from actcache.errors import InputError
from actcache.files import no_file
from actcache.models.lineup import Lineup
from actcache.models.templates import PLAIN, Rendering
from actcache.prompts import MAX_ID, Prompt, check_carried
from actcache.store import Store
from actcache.strict_json import parse_object

FIXED = "fixed"
"""The kinds whose tokens the two checkpoints of the pair choose at the event's position."""

_KIND = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_KEYS = ("id", "prompt_id", "prompt", "token_ids", "position", "y_pt", "y_it", "kind", "step", "pair")


@dataclass(frozen=True)
class GivenEvent:
    """One event: the place in its sequence, the two tokens by role, its kind, and what its line carries; ``pair`` says
    whose roles these are, where it is not the first pair's."""

    position: int
    tokens: tuple[int, int]
    kind: str = FIXED
    step: int = 0
    carried: dict[str, Any] = field(default_factory=dict)
    pair: tuple[str, str] | None = None

    @property
    def said(self) -> list[Any]:
        """As JSON."""
        said = [self.position, self.tokens, self.kind, self.step, self.carried]
        return said if self.pair is None else [*said, self.pair]


@dataclass
class GivenPrompt:
    """The events of one prompt id, over one or more sequences of token ids that go on from it."""

    id: str
    sequences: list[tuple[list[int], list[GivenEvent]]] = field(default_factory=list)

    def add(self, ids: Sequence[int], event: GivenEvent) -> None:
        """Put an event on a sequence that begins as its own does, or on a further one."""
        for number, (known, events) in enumerate(self.sequences):
            n = min(len(known), len(ids))
            if known[:n] == list(ids[:n]):
                self.sequences[number] = (max(known, list(ids), key=len), [*events, event])
                return
        self.sequences.append((list(ids), [event]))

    def as_prompt(self) -> Prompt:
        """What stands for it where a store tells whether it was captured from the same."""
        said = [[ids, [one.said for one in events]] for ids, events in self.sequences]
        return Prompt(self.id, canonical(said).decode())


def read_given(
    path: str | Path,
    lineup: Lineup,
    prompts: Sequence[Prompt] = (),
    *,
    rendering: Rendering = PLAIN,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[GivenPrompt]:
    """The events of a JSON Lines file, by prompt, in the order in which the prompts first come.

    Args:
        path: of the file.
        lineup: whose tokenizers read the texts, and whose models know the tokens.
        prompts: those that lines may name by ``prompt_id``.
        rendering: how prompts become texts.
        limit: take the first prompts only.
        say: as in :meth:`Lineup.encode`.

    Raises:
        InputError: the file is missing or empty. Or a line is none, or names no sequence or prompt that there is, a
            position outside it, or a token that the models have not. Or it repeats another one. Names the line.
        IncompatibleError: see :meth:`Lineup.encode`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{no_file(path, 'file of events')}; give a JSON Lines file with one event per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    numbered = [(f"{path}, line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    records = [(where, parse_object(line, where)) for where, line in numbered]
    return _grouped(records, lineup, {prompt.id: prompt for prompt in prompts}, rendering, limit, say)


def given_by(
    store: Store,
    lineup: Lineup,
    *,
    limit: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[GivenPrompt]:
    """The events of a store, tokens and all (arguments and errors as :func:`read_given`)."""
    return _grouped(list(_records_of(store)), lineup, {}, PLAIN, limit, say)


def _records_of(store: Store) -> Iterator[tuple[str, dict[str, Any]]]:
    ids, offsets = store.token_ids()
    columns = store.events.column_names
    # The roles of a run's only pair are those of whichever pair it is given to.
    named = ["position", "y_pt", "y_it", "kind", "step", *(["pair"] if store.fingerprint.pairs else [])]
    carried = columns[columns.index("segment") + 1 :]
    for row, start, stop in zip(store.events.to_pylist(), offsets[:-1], offsets[1:], strict=True):
        of_event = {name: row[name] for name in named}
        further = {name: row[name] for name in carried if row[name] is not None}
        sequence = ids[int(start) : int(stop)].tolist()
        yield f"event {row['event_id']!r}", {"id": row["prompt_id"], "token_ids": sequence, **of_event, **further}


def _grouped(
    records: Sequence[tuple[str, dict[str, Any]]],
    lineup: Lineup,
    prompts: dict[str, Prompt],
    rendering: Rendering,
    limit: int | None,
    say: Callable[[str], None],
) -> list[GivenPrompt]:
    ids_of = _encoded(records, lineup, prompts, rendering, say)
    found: dict[str, GivenPrompt] = {}
    keys: set[str] = set()
    seen: dict[tuple[Any, ...], str] = {}
    for (where, record), (prompt_id, ids) in zip(records, ids_of, strict=True):
        event = _event(record, where, ids, lineup)
        if prompt_id in prompts:
            event = replace(event, carried=prompts[prompt_id].carried | event.carried)
        keys |= event.carried.keys()
        if len(keys) > MAX_KEYS:
            raise InputError(
                f"{where}: the events to here carry {len(keys)} distinct keys, at most {MAX_KEYS} are read"
            )
        ids = ids[: event.position + 1]
        place = (prompt_id, tuple(ids), event.tokens, event.kind, event.pair)
        if (first := seen.setdefault(place, where)) != where:
            raise InputError(f"{where}: the same event as {first}; leave one of them out")
        found.setdefault(prompt_id, GivenPrompt(prompt_id)).add(ids, event)
    if not found:
        raise InputError("no events are given; give one JSON object per line")
    return list(found.values())[:limit]


def _encoded(
    records: Iterable[tuple[str, dict[str, Any]]],
    lineup: Lineup,
    prompts: dict[str, Prompt],
    rendering: Rendering,
    say: Callable[[str], None],
) -> list[tuple[str, list[int]]]:
    """The prompt's id and the token ids of each line."""
    texts: dict[tuple[str, bytes], Prompt] = {}
    ways: list[tuple[str, Prompt | list[int]]] = []
    for where, record in records:
        named = [key for key in ("prompt_id", "prompt", "token_ids") if key in record]
        if len(named) != 1:
            raise InputError(
                f"{where}: an event is of a 'prompt_id', a 'prompt' or 'token_ids', one of these; this line has "
                f"{' and '.join(named) or 'none'}"
            )
        if named == ["prompt_id"]:
            if record["prompt_id"] not in prompts:
                raise InputError(f"{where}: no prompt {str(record['prompt_id'])[:40]!r} in the prompts file")
            prompt = prompts[record["prompt_id"]]
        else:
            name = _text(record, "id", where)
            if len(name) > MAX_ID:
                raise InputError(f"{where}: 'id' has {len(name)} characters, at most {MAX_ID} are read")
            if named == ["token_ids"]:
                ways.append((name, _token_ids(record["token_ids"], where, lineup)))
                continue
            prompt = Prompt(name, _text(record, "prompt", where))
        texts[prompt.id, canonical(prompt.content)] = prompt
        ways.append((prompt.id, prompt))
    encoded = lineup.encode(list(texts.values()), say, rendering) if texts else []
    ids_of = dict(zip(texts, encoded, strict=True))
    return [
        (name, list(ids_of[way.id, canonical(way.content)]) if isinstance(way, Prompt) else way) for name, way in ways
    ]


def _event(record: dict[str, Any], where: str, ids: Sequence[int], lineup: Lineup) -> GivenEvent:
    position = record.get("position", len(ids) - 1)
    if type(position) is not int or not 0 <= position < len(ids):
        raise InputError(
            f"{where}: position {json.dumps(position)[:40]} is not one of its {len(ids)} tokens, counted from 0; give "
            "'token_ids' for a position behind the prompt"
        )
    tokens = []
    for key in ("y_pt", "y_it"):
        token = record.get(key)
        if type(token) is not int or token not in lineup.vocabulary:
            raise InputError(f"{where}: {key} {json.dumps(token)[:40]} is not the id of a token of these checkpoints")
        tokens.append(token)
    if tokens[0] == tokens[1]:
        raise InputError(f"{where}: y_pt and y_it are both {tokens[0]}; an event is of two tokens")
    kind, step = record.get("kind", FIXED), record.get("step", 0)
    if not isinstance(kind, str) or not _KIND.fullmatch(kind):
        raise InputError(f"{where}: kind {json.dumps(kind)[:40]} is not made of letters, digits, '-' and '_'")
    if type(step) is not int or not 0 <= step <= position:
        raise InputError(f"{where}: step {json.dumps(step)[:40]} is not a number of tokens before the event")
    named = [pair for pair in lineup.pairs if ",".join(pair) == record.get("pair")]
    if "pair" in record and not named:
        raise InputError(
            f"{where}: pair {json.dumps(record['pair'])[:40]} is none of those captured: give --pair for each, here "
            f"{'; '.join(map(','.join, lineup.pairs))}"
        )
    further = {key: value for key, value in record.items() if key not in _KEYS}
    check_carried(further, where)
    pair = named[0] if named and named[0] != lineup.pair else None
    return GivenEvent(position, (tokens[0], tokens[1]), kind, step, further, pair)


def _token_ids(ids: Any, where: str, lineup: Lineup) -> list[int]:
    if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
        raise InputError(f"{where}: token_ids is {json.dumps(ids)[:40]}, expected a list of whole numbers")
    wrong = [one for one in ids if not 0 <= one < lineup.vocab_size]
    if wrong:
        raise InputError(f"{where}: token id {wrong[0]} is beyond the {lineup.vocab_size} rows of the embeddings")
    if lineup.max_positions is not None and len(ids) > lineup.max_positions:
        raise InputError(f"{where}: {len(ids)} tokens; the model has {lineup.max_positions} positions")
    return list(ids)


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {key!r} is {json.dumps(value)[:40]}, expected text")
    return value
