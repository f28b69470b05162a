"""Sections of analyses, made fit to show: figures drawn, tables with what sorts them, counts, command and downloads.

Knows sections and groups of numbers; holds no HTML.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from actcache.report import figures, visible
from actcache.study.analysis import Answered
from actcache.study.run import flat
from actcache.study.statistics import CAUTION_PROMPTS, FEWEST_PROMPTS

OPEN_ROWS = 24
"""Rows of a table that stands open; a longer one is folded."""
MAX_DOWNLOAD = 300_000
"""Bytes of a file that the page carries; a larger one is named."""


def shown(name: str, answered: Answered) -> dict[str, Any]:
    """What the template shows of a section."""
    section, name = answered.section, name.replace(" ", "-")
    shares = [column in section.shares for column in section.columns]
    logits = [
        cell["mean"]
        for row in section.rows
        for cell, share in zip(row, shares, strict=True)
        if isinstance(cell, Mapping) and not share
    ]
    places = visible.decimals(logits)
    return {
        "name": name,
        "title": section.title,
        "counted": counted(answered.groups),
        "figures": [figures.draw(figure, f"{name}{number}", places) for number, figure in enumerate(section.figures)],
        "columns": section.columns,
        "rows": [[visible.plain(cell) if isinstance(cell, str) else cell for cell in row] for row in section.rows],
        "shares": shares,
        "folded": len(section.rows) > OPEN_ROWS,
        "places": places,
        "shows": visible.plain(section.shows),
        "does_not_show": visible.plain(section.does_not_show),
        "command": visible.plain(answered.command),
        "files": downloads(name, answered.groups),
    }


def counted(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many events and prompts the groups have, the fewest and the most; None where they do not say."""
    if not groups or any(not {"n_events", "n_prompts"} <= group.keys() for group in groups):
        return None
    events, prompts = ([group[name] for group in groups] for name in ("n_events", "n_prompts"))
    return {
        "events": _range(events),
        "prompts": _range(prompts),
        "one": max(events) == 1,
        "one_prompt": max(prompts) == 1,
        "too_few": min(prompts) < FEWEST_PROMPTS,
        "few": FEWEST_PROMPTS <= min(prompts) < CAUTION_PROMPTS,
    }


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def downloads(name: str, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups as CSV and as JSON, to be saved from the page; of a larger file its name alone."""
    texts = {
        "csv": ("text/csv", _as_csv(groups)),
        "json": ("application/json", json.dumps({"groups": groups}, indent=1)),
    }
    found: list[dict[str, Any]] = []
    for suffix, (kind, text) in texts.items():
        data = text.encode("utf-8", "backslashreplace")
        link = f"data:{kind};charset=utf-8;base64,{base64.b64encode(data).decode()}"
        fits = len(data) <= MAX_DOWNLOAD
        one = {"kind": suffix.upper(), "file": f"{name}.{suffix}", "link": link if fits else None, "n_bytes": len(data)}
        found += [one] if fits or suffix == "json" else []  # no CSV lies beside the page
    return found if groups else []


def _as_csv(groups: Sequence[Mapping[str, Any]]) -> str:
    rows = [flat(group) for group in groups]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
