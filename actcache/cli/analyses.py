"""The verbs of the analyses, made from their options; each is answered and printed the same way."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING

from actcache.analyses import ANALYSES, Named
from actcache.cli.arguments import Verbs, add_verb, check_device
from actcache.cli.captured import add_captured_arguments, moved
from actcache.cli.memory import LESS_MODEL, enough_memory
from actcache.cli.parser import Parser
from actcache.cli.terminal import LiveLine, quiet_libraries, say
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.replay.late_stack import LateStack
    from actcache.store import Store
    from actcache.study.analysis import Section


def add_verbs(verbs: Verbs) -> None:
    """Add one verb per analysis."""
    for named in ANALYSES:
        parser = add_verb(verbs, named.name, partial(_answer, named), named.question, f"actcache {named.name} RUN")
        add_captured_arguments(parser)
        parser.later = partial(_add_options, named)
        parser.add_argument("--json", action="store_true", help="print JSON, as in the file")


def sections_of(folder: RunFolder, store: Store) -> dict[str, Section]:
    """What the report shows of the analyses that a run has answered; one of other cells is named and left out."""
    from actcache.study.analysis import read_answer

    sections = {}
    for named in ANALYSES:
        if (folder.path / f"{named.name}.json").is_file():
            analysis = named.load()
            found = read_answer(analysis, folder, store)
            if found is None:
                say(f"{analysis.path(folder)} is of other cells than the run's; 'actcache {named.name}' makes it again")
            elif found["groups"]:
                sections[named.name] = analysis.section(found["groups"])
    return sections


def _add_options(named: Named, parser: Parser) -> None:
    quiet_libraries()
    for entry in fields(named.load().options):
        flag = entry.metadata["flag"] or f"--{entry.name.replace('_', '-')}"
        parser.add_argument(
            flag,
            dest=entry.name,
            type=entry.metadata["type"],
            default=entry.default,
            help=entry.metadata["help"],
            metavar=flag.lstrip("-").upper(),
        )


def _answer(named: Named, args: argparse.Namespace) -> None:
    from actcache.sealed import json_bytes
    from actcache.study.run import Run

    analysis = named.load()
    options = {entry.name: getattr(args, entry.name) for entry in fields(analysis.options)}
    folder = RunFolder(args.run)
    record = folder.record()
    device = args.device or record.device
    check_device(device)
    run = Run(folder.path, checkpoints=moved(args, record))  # digests the weights once, when they are needed
    analysis.check(run.store, analysis.options_of(options))
    with enough_memory(named.name, "a run captured with --dtype bfloat16 needs less"), LiveLine(named.name) as line:

        def load_late(label: str, boundary: int) -> LateStack:
            what = f"loading {label} from block {boundary} on"
            with enough_memory(what, LESS_MODEL), line.during(what):
                return run.load_late(label, boundary, device)

        found = run.analyse(named.name, on_progress=line, load_late=load_late, **options)
    say(f"{analysis.path(folder)} holds them; next: actcache report {args.run}")
    if args.json:
        print(json_bytes(found, {}).decode(), end="")
    else:
        print("\n".join(_table(analysis.section(found["groups"])) if found["groups"] else ["no event to analyse"]))


def _table(section: Section) -> list[str]:
    """The rows of a section, in columns."""
    rows: list[Sequence[str]] = [list(section.columns)]
    rows += [[cell if isinstance(cell, str) else _number(cell) for cell in row] for row in section.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return [*lines, "", section.shows]


def _number(value: Mapping[str, float | None]) -> str:
    if value["mean"] is None:
        return "none"
    shown = f"{value['mean']:+.3f}"
    return shown if value["low"] is None else f"{shown} [{value['low']:+.3f}, {value['high']:+.3f}]"
