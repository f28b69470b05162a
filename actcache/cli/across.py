"""The verb across: several families on one page."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.cli.analyses import add_options
from actcache.cli.arguments import Verbs, add_verb
from actcache.cli.parser import Parser, place
from actcache.cli.tables import read_cells
from actcache.cli.terminal import quiet_libraries, say
from actcache.errors import InputError
from actcache.files import write_atomically
from actcache.sealed import html_bytes, json_bytes
from actcache.store.far_path import path_at
from actcache.study.run_folder import run_at

if TYPE_CHECKING:
    from actcache.analyses.across import Family


def add_verbs(verbs: Verbs) -> None:
    """Add the verb of this module."""
    parser = add_verb(
        verbs,
        "across",
        _across,
        "put the runs of several families together, each family with the same weight",
        "actcache across RUN_A qwen=RUN_B --out ALL",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|CELLS.parquet",
        help="folders of runs or tables of cells, one for each family; NAME=RUN gives a family its name",
    )
    parser.add_argument("--out", type=place, required=True, metavar="DIR", help="folder of the answer and its page")
    parser.add_argument("--json", action="store_true", help="print JSON, as in DIR/across.json")
    parser.later = _add_options


def _add_options(parser: Parser) -> None:
    quiet_libraries()
    from actcache.analyses.across import AcrossOptions

    add_options(parser, AcrossOptions)


def _across(args: argparse.Namespace) -> None:
    from actcache.analyses.across import AcrossOptions, across
    from actcache.report import build_families_report
    from actcache.report.families import lead, sections_of
    from actcache.study.section import lines_of

    _check_out(args.out)
    options = AcrossOptions(**{entry.name: getattr(args, entry.name) for entry in fields(AcrossOptions)})
    families = [_family(text) for text in args.runs]
    cautions: list[str] = []
    found = across(families, options, say=cautions.append)
    for line in cautions:
        say(line)
    made_from = {"cells": {family.name: family.cells.seal for family in families}}
    args.out.mkdir(parents=True, exist_ok=True)
    file = json_bytes(found, made_from)
    write_atomically(args.out / "across.json", file)
    page = build_families_report(found, args.command, cautions, _settings(args.command, found))
    write_atomically(args.out / "report.html", html_bytes(page, made_from))
    say(f"{args.out / 'across.json'} holds them; {args.out / 'report.html'} shows them")
    if args.json:
        print(file.decode(), end="")
    else:
        section, _ = sections_of(found)["families"]
        print("\n".join([lead(found), "", *lines_of(section)]))


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a folder for the answer")
    if run_at(out) is not None:
        raise InputError(f"{out} holds a run; give a folder of its own for several")
    if out.is_dir() and any(out.iterdir()) and not (out / "across.json").is_file():
        raise InputError(f"{out} is not empty and holds no across.json; give a new folder")


def _family(text: str) -> Family:
    """A family by ``PATH``, which names it, or ``NAME=PATH``."""
    from actcache.analyses.across import Family

    name, separator, given = text.partition("=")
    if not separator or "://" in name or Path(text).exists():
        name, given = "", text
    path = path_at(given)
    if path.is_dir():
        return Family.of_run(name or path.resolve().name, path)
    return Family.of_table(name or path.name.removesuffix(".parquet").removesuffix(".cells"), path, read_cells(path))


def _settings(command: str, found: dict[str, Any]) -> dict[str, str]:
    shown = {"command": command}
    for family in found["families"]:
        blocks = "" if family["n_blocks"] is None else f" of {family['n_blocks']} blocks"
        n = sum(group["n_events"] for group in family["groups"] if group["subset"] == "all")
        shown[family["name"]] = (
            f"{family['source']}: {n:,} events of {family['pt']} and {family['it']}, boundary {family['boundary']}"
            f"{blocks}, readout {family['readout']}; {family['n_ties']} with a tie and {family['n_wrong_sign']} with "
            f"the wrong sign, {'kept' if family['keep_ties'] else 'left out'}"
        )
    return shown
