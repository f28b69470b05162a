"""Prompts: JSON Lines in, validated prompts out. Knows text; knows no tokens and no models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actcache.errors import InputError

# Columns of the tables that prompts are carried into: a prompt key of the same name would be ambiguous there.
RESERVED_KEYS = frozenset(
    {
        "event_id",
        "prompt_id",
        "kind",
        "step",
        "proposed_step",
        "sequence",
        "position",
        "y_pt",
        "y_it",
        "boundary",
        "scope",
        "upstream",
        "late",
        "readout",
        "variant",
        "margin",
        "top1_id",
        "noop_delta",
        "kl",
        "context",
        "token_pt",
        "token_it",
        "carried",
        "reason",
        "segment",
    }
)
RESERVED_PREFIXES = ("gap_", "margin_", "special_")


@dataclass(frozen=True)
class Prompt:
    """One line of a prompts file: ``id``, the raw ``text``, and every further key, carried to the events."""

    id: str
    text: str
    carried: dict[str, Any] = field(default_factory=dict)


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """Read and validate a prompts file: one JSON object a line, ``{"id": str, "prompt": str, ...}``.

    The whole file is validated, also past ``limit``. Blank lines are skipped.

    Raises:
        InputError: the file is missing, not UTF-8 or empty; a line is not a JSON object, lacks ``id`` or ``prompt``,
            has one that is not text or is empty, repeats an id, or uses a key that names a column of the results.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such prompts file; give a JSON Lines file with one prompt a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prompt = _parse_line(line, f"{path}, line {number}")
        first = line_of_id.setdefault(prompt.id, number)
        if first != number:
            raise InputError(
                f"{path}, line {number}: id {prompt.id!r} is already the id of line {first}; ids are unique"
            )
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path}: no prompts in it; give one JSON object a line")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    return prompts[:limit]


def _parse_line(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, expected an object with 'id' and 'prompt'")
    for key in ("id", "prompt"):
        if key not in record:
            raise InputError(f"{where}: no {key!r}; a prompt line is {{'id': str, 'prompt': str, ...}}")
        if not isinstance(record[key], str):
            raise InputError(f"{where}: {key!r} is {json.dumps(record[key])[:40]}, expected text")
        if not record[key].strip():
            raise InputError(f"{where}: {key!r} is empty")
        try:
            record[key].encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: {key!r} holds a lone surrogate at character {error.start}") from error
    carried = {key: value for key, value in record.items() if key not in ("id", "prompt")}
    for key in carried:
        if key in RESERVED_KEYS or key.startswith(RESERVED_PREFIXES):
            raise InputError(f"{where}: key {key!r} is the name of a result column; rename it")
    return Prompt(record["id"], record["prompt"], carried)


def digest(prompts: Sequence[Prompt]) -> str:
    """SHA-256 over ids, texts and carried keys, in order: equal digests mean the same work."""
    sha = hashlib.sha256()
    for prompt in prompts:
        line = json.dumps([prompt.id, prompt.text, prompt.carried], sort_keys=True, ensure_ascii=True)
        sha.update(line.encode() + b"\n")
    return sha.hexdigest()
