"""The verbs of the analyses, made from their options; each is answered and printed the same way."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from actcache.analyses import ANALYSES, STEPS, STEPS_IN_WORDS, Named
from actcache.cli.arguments import Verbs, add_verb, holding_asked
from actcache.cli.captured import add_captured_arguments, moved
from actcache.cli.memory import enough_memory
from actcache.cli.parser import WHAT, Parser, place
from actcache.cli.runners import add_engine_arguments, add_part_argument, runner_asked
from actcache.cli.terminal import LiveLine, quiet_libraries, say
from actcache.cli.timing import AnalysisClock, write_taken
from actcache.study.holding import Holding
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.models.lineup import Lineup
    from actcache.store import Store
    from actcache.study.analysis import Analysis
    from actcache.study.runner import Runner


def add_verbs(verbs: Verbs) -> None:
    """Add one verb per analysis; one of several steps has a verb per step below its own."""
    for named in ANALYSES:
        _add_verb_of(verbs, named)
    for name, steps in STEPS.items():
        summary = STEPS_IN_WORDS[name]
        description = f"{summary[0].upper()}{summary[1:]}."
        epilog = f"example: {_example(steps[0])}"
        parser = verbs.add_parser(name, help=summary, description=description, epilog=epilog)
        below = parser.add_subparsers(title=WHAT, required=True, metavar="STEP", help="step to take")
        for named in steps:
            _add_verb_of(below, named)


def _example(named: Named) -> str:
    return f"actcache {named.name} RUN"


def _add_verb_of(verbs: Verbs, named: Named) -> None:
    answer = partial(_answer_of_cells if named.of_cells else _answer, named)
    parser = add_verb(verbs, named.name.rpartition(" ")[2], answer, named.question, _example(named))
    if named.of_cells:
        words = "folder of a run, or a table of cells"
        parser.add_argument("source", type=place, metavar="RUN|CELLS.parquet", help=words)
    else:
        add_captured_arguments(parser)
    parser.later = partial(_add_options, named)
    parser.add_argument("--json", action="store_true", help="print JSON, as in the file")


def _add_options(named: Named, parser: Parser) -> None:
    quiet_libraries()
    analysis = named.load()
    add_options(parser, analysis.options)
    if analysis.has_parts:
        add_part_argument(parser)
    if not named.of_cells:
        add_engine_arguments(parser)


def add_options(parser: Parser, options: Any) -> None:
    """Flags of the fields of a dataclass of options."""
    from actcache.study.analysis import flag_of

    for entry in fields(options):
        flag = flag_of(entry)
        how: dict[str, Any] = {"dest": entry.name, "default": entry.default, "help": entry.metadata["help"]}
        if entry.default is False:
            how |= {"action": "store_true"}
        else:
            how |= {"type": entry.metadata["type"], "metavar": flag.lstrip("-").upper()}
            how |= {"action": _Listed} if entry.metadata["repeats"] else {}
        parser.add_argument(flag, **how)


class _Listed(argparse.Action):
    """A text that lists things: of a flag that is given several times, all of them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def _answer(named: Named, args: argparse.Namespace) -> None:
    analysis = named.load()
    options = _options(analysis, args)
    folder = RunFolder(args.run)
    record = folder.record()
    holding = holding_asked(args, record.holding)
    checkpoints = moved(args, record)
    with closing(runner_asked(args, args.run, holding, checkpoints)) as runner:
        found = analyse(analysis, folder, holding, runner, checkpoints=checkpoints, **options)
    _print_of_run(analysis, folder, found, args)


def _answer_of_cells(named: Named, args: argparse.Namespace) -> None:
    """Of a run, or of a table whose answer is printed and not kept."""
    from actcache.cli.tables import read_cells
    from actcache.sealed import json_bytes

    analysis = named.load()
    options = _options(analysis, args)
    if args.source.is_dir():
        from actcache.study.run import Run

        run = Run(args.source)
        found = analysis.answer(run, analysis.options_of(options), say=say)
        _print_of_run(analysis, run.folder, found, args)
    else:
        content, made_from, _ = analysis.of_table(read_cells(args.source), analysis.options_of(options), say=say)
        _print(analysis, content, json_bytes(content, made_from).decode() if args.json else None)


def _options(analysis: Analysis[Any], args: argparse.Namespace) -> dict[str, Any]:
    return {entry.name: getattr(args, entry.name) for entry in fields(analysis.options)}


def _print_of_run(
    analysis: Analysis[Any], folder: RunFolder, found: Mapping[str, Any], args: argparse.Namespace
) -> None:
    options = analysis.options_of(found["options"])  # a pair that is the events' own is not named there
    say(analysis.what_next(folder, options))
    file = analysis.path(folder, options).read_text(encoding="utf-8") if args.json else None
    _print(analysis, found, file, folder.open_store())


def _print(analysis: Analysis[Any], found: Mapping[str, Any], file: str | None, store: Store | None = None) -> None:
    """The file as it is, with its notes on stderr; or what it holds, in words."""
    if file is None:
        print("\n".join(analysis.lines(found, store)))
    else:
        for note in analysis.notes(found):
            say(note)
        print(file, end="")


def analyse(
    analysis: Analysis[Any],
    folder: RunFolder,
    holding: Holding,
    runner: Runner,
    *,
    checkpoints: Mapping[str, str] = MappingProxyType({}),
    lineup: Lineup | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer a question of a run, its progress on stderr, and record what that took.

    Args:
        analysis: which.
        folder: of the run.
        holding: of the checkpoints.
        runner: where jobs run.
        checkpoints: where they are now, of those that moved.
        lineup: the checkpoints, where they are open already.
        options: of the analysis.
    """
    from actcache.cli.watched import WatchedRun

    clock = AnalysisClock(folder, analysis, shared=not runner.has_every_job)
    line = LiveLine(analysis.name)
    run = WatchedRun(folder.path, clock, line, checkpoints=checkpoints, **asdict(holding))
    run.runner = runner
    if not runner.is_elsewhere:
        _ = run.placement
    if lineup is not None:
        run.lineup = lineup
    analysis.check(run.store, analysis.options_of(options))
    with enough_memory(analysis.name, analysis.needs_less), line:
        found = run.analyse(analysis.name, on_progress=clock.hearing(line), say=say, **options)
    clock.write(found["groups"])
    write_taken(folder, analysis.name, runner)
    return found
