"""Continuations from elsewhere: what some other engine had checkpoints write, for the search to propose.

What a file's line says:

    {"prompt_id": "p7", "label": "it", "token_ids": [311, 7, 92]}

``id`` will do for ``prompt_id``. ``label`` names the checkpoint that wrote the tokens. They begin where the prompt
ends; an end token may be the last one. Nothing is believed of them. Where those of both checkpoints of a pair are
there, the first mismatch is a proposal. Where one's are, the other reads them. The capture forward decides. Knows
tokens and files; knows no forwards.
"""

from __future__ import annotations

import itertools
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import InputError
from actcache.files import no_file
from actcache.models.lineup import Lineup
from actcache.prompts import Prompt
from actcache.strict_json import parse_object

Known = Mapping[str, Mapping[str, Sequence[int]]]
"""What others say that checkpoints write: by prompt id, and by label."""

_TELLING = 4  # tokens of a prompt that is not repeated by chance
N_COMPARED = 256  # prompts whose ids are looked for at the beginnings of continuations


def read_continuations(
    path: str | Path, lineup: Lineup, prompts: Sequence[Prompt], *, limit: int | None = None
) -> Known:
    """The continuations of a JSON Lines file.

    Args:
        path: of the file.
        lineup: whose checkpoints wrote them.
        prompts: those that lines may name.
        limit: whether these are the first prompts of a file only, so that lines of others are left out.

    Raises:
        InputError: the file is missing, or a line is none, names no prompt or checkpoint that there is, or holds a
            token that the checkpoints have not. Or it repeats another one. Names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{no_file(path, 'file of continuations')}; give a JSON Lines file with one per line")
    ids = {prompt.id for prompt in prompts}
    known: dict[str, dict[str, array[int]]] = {}
    lines: dict[tuple[str, str], int] = {}
    other: str | None = None  # the first prompt that is not among these
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                prompt_id, label, tokens = _read(parse_object(line, where), where, lineup)
                if prompt_id not in ids:
                    if limit is not None:
                        other = prompt_id if other is None else other
                        continue
                    raise InputError(f"{where}: no prompt {prompt_id[:40]!r} in the prompts file")
                if (first := lines.setdefault((prompt_id, label), number)) != number:
                    raise InputError(
                        f"{where}: a second continuation of prompt {prompt_id[:40]!r} by {label}, after line {first}; "
                        "leave one of them out"
                    )
                if tokens:
                    known.setdefault(prompt_id, {})[label] = tokens
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not known:
        unknown = f"; its first line is of {other[:40]!r}, which is none of them" if other is not None else ""
        raise InputError(
            f"{path}: no continuation of any of these prompts is in it{unknown}; give one JSON object per line"
        )
    return known


def check_beginnings(known: Known, prompts: Sequence[Prompt], prompt_ids: Sequence[Sequence[int]]) -> None:
    """Raise InputError where continuations begin with the prompts themselves.

    A checkpoint may repeat a prompt; more than half of all prompts, none does. Prompts of a few tokens say nothing.
    """
    whole: dict[str, list[str]] = {}
    n_of: dict[str, int] = {}
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        for label, tokens in known.get(prompt.id, {}).items() if len(ids) >= _TELLING else ():
            n_of[label] = n_of.get(label, 0) + 1
            if list(tokens[: len(ids)]) == list(ids):
                whole.setdefault(label, []).append(prompt.id)
    for label, found in whole.items():
        if 2 * len(found) > n_of[label]:
            raise InputError(
                f"the continuation of prompt {found[0][:40]!r} by {label} begins with the prompt's own ids, as do "
                f"{len(found)} of {n_of[label]}: give the tokens after the prompt alone"
            )


def _read(record: dict[str, Any], where: str, lineup: Lineup) -> tuple[str, str, array[int]]:
    """The prompt's id, the label and the tokens of a line."""
    named = [key for key in ("prompt_id", "id") if key in record]
    if len(named) != 1 or not isinstance(record[named[0]], str):
        raise InputError(f"{where}: a continuation names its prompt by 'prompt_id', a text")
    label, tokens = record.get("label"), record.get("token_ids")
    if label not in lineup.labels:
        raise InputError(
            f"{where}: label {json.dumps(label)[:40]} is no checkpoint of these; give one of {', '.join(lineup.labels)}"
        )
    if not isinstance(tokens, list) or not tokens or not all(type(one) is int for one in tokens):
        raise InputError(f"{where}: token_ids is {json.dumps(tokens)[:40]}, expected a list of whole numbers")
    n_rows = max(one.n_rows for one in lineup.ids.tokens)
    wrong = [one for one in tokens if not 0 <= one < n_rows]
    if wrong:
        raise InputError(f"{where}: token id {wrong[0]} is beyond the {n_rows} rows of the embeddings")
    if lineup.has_tails:  # what not every checkpoint has is never chosen, and what follows it is another text
        tokens = list(itertools.takewhile(lineup.ids.shared.__contains__, tokens))
    return record[named[0]], str(label), array("i", tokens)
