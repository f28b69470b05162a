"""The verbs of a run: demo, run, and its stages capture, grid, effects and report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import closing
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.cli.arguments import (
    Verbs,
    add_capture_arguments,
    add_grid_arguments,
    add_strict_and_pack,
    add_verb,
    capture_settings,
    checkpoints_given,
    grid_settings,
    held_asked,
    holding_asked,
    open_lineup,
    rendering_asked,
)
from actcache.cli.captured import add_captured_arguments, moved, open_captured
from actcache.cli.corpus import add_corpus_arguments, capture_corpus, check_no_corpus
from actcache.cli.memory import LESS_MODEL, enough_memory
from actcache.cli.parser import place
from actcache.cli.runners import add_engine_arguments, add_part_argument, runner_asked
from actcache.cli.stability import add_run_arguments, check_run
from actcache.cli.terminal import LiveLine, quiet_libraries, say
from actcache.cli.timing import CaptureClock, GridClock, write_taken
from actcache.errors import InputError
from actcache.schema import ROLES
from actcache.study.run import check_complete
from actcache.study.run_folder import RunFolder, RunRecord, absolute_place, open_store

if TYPE_CHECKING:
    from actcache.capture.given import GivenPrompt
    from actcache.models.lineup import Lineup
    from actcache.models.readout import Readout
    from actcache.models.templates import Rendering
    from actcache.prompts import Prompt
    from actcache.replay.late_stack import LateStack
    from actcache.store import Store
    from actcache.study.holding import Holding
    from actcache.study.runner import Runner


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    demo = add_verb(
        verbs,
        "demo",
        _demo,
        "run everything on the pair that the package ships, without a network",
        "actcache demo --out actcache-demo",
    )
    demo.add_argument("--out", type=place, default=Path("actcache-demo"), metavar="RUN", help="folder of the run")

    run = add_verb(
        verbs,
        "run",
        _run,
        "capture, check, score and report a pair in one go; the same command resumes it",
        "actcache run --pt base --it tuned --prompts prompts.jsonl --out RUN",
    )
    add_all_arguments(run)

    capture = add_verb(
        verbs,
        "capture",
        _capture,
        "find the events of a pair, and store the states that their replay needs",
        "actcache capture --pt base --it tuned --prompts prompts.jsonl --out RUN --boundary 0.6,-3,-1",
    )
    add_capture_arguments(capture)
    add_strict_and_pack(capture)
    add_corpus_arguments(capture)
    add_part_argument(capture)
    add_engine_arguments(capture)

    grid = add_verb(
        verbs,
        "grid",
        _grid,
        "score the cells of a captured run by replaying its late stacks",
        "actcache grid RUN --scope prefix,position --sweep edits.toml",
    )
    add_captured_arguments(grid)
    grid.add_argument("--boundary", metavar="B", help="boundaries to score, of those captured (default: all of them)")
    add_grid_arguments(grid)
    add_part_argument(grid)
    add_engine_arguments(grid)

    report = add_verb(
        verbs, "report", _report, "write one self-contained HTML page about a run", "actcache report RUN --stable-only"
    )
    report.add_argument("run", type=place, metavar="RUN", help="folder of the run")
    _add_filters(report)


def _add_filters(parser: argparse.ArgumentParser) -> None:
    """What leaves events out of effects."""
    parser.add_argument(
        "--stable-only",
        action="store_true",
        help="leave out the events that rounding changes, as 'actcache stability' found",
    )
    parser.add_argument(
        "--min-gap", type=_logits, metavar="G", help="leave out the events whose gap_pt or gap_it is below G logits"
    )


def _logits(text: str) -> float:
    try:
        return float(text) + 0.0  # no negative zero, which would be another file's name
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of logits") from error


def add_all_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of ``actcache run``."""
    add_capture_arguments(parser)
    add_grid_arguments(parser)
    add_run_arguments(parser)
    add_engine_arguments(parser)


def run_study(args: argparse.Namespace) -> tuple[RunFolder, dict[str, Any]]:
    """Everything that ``actcache run`` does but to print: the folder of the run, and its effects."""
    if args.rows != "prefix":
        raise InputError(
            f"--rows {args.rows}: a run scores the grid, which needs prefix rows; "
            "'actcache capture --rows divergence' keeps the events' own rows alone"
        )
    prompts = _read_prompts(args)
    _check_grid_asked(args)
    folder, holding = RunFolder(args.out), holding_asked(args)
    with closing(runner_asked(args, args.out, holding, {})) as runner:
        lineup = _capture_lineup(args, prompts, runner)
        check_run(args, folder, lineup, runner)
        _score(folder, lineup, args, None, holding, runner)
    from actcache.analyses.effects import ANALYSIS, EffectsOptions

    store = folder.open_store()
    effects = ANALYSIS.of_run(folder, store, EffectsOptions(), say=say)
    if args.stable_only:
        effects = ANALYSIS.of_run(folder, store, EffectsOptions(stable_only=True), say=say)
    write_report(folder, store, stable_only=args.stable_only)
    return folder, effects.content


def _run(args: argparse.Namespace) -> None:
    from actcache.analyses.effects_text import answer

    folder, effects = run_study(args)
    print("\n".join([*answer(effects, folder.open_store()), "", f"Report: {folder.report}"]))


def _read_prompts(args: argparse.Namespace) -> Sequence[Prompt]:
    """What is wrong with the prompts is said before torch is loaded, which takes seconds."""
    from actcache.prompts import read_prompts

    checkpoints_given(args, fewest=2)
    holding_asked(args)
    events = args.events
    if (args.support == "fixed") != (events is not None):
        raise InputError("--support fixed and --events belong together: give both, or neither")
    if args.prompts is None and events is None:
        raise InputError("the following arguments are required: --prompts, or --support fixed with --events")
    if args.continuations is not None and events is not None:
        raise InputError("--continuations are proposals for a search, and --support fixed searches nothing: give one")
    if events is None:
        return read_prompts(args.prompts, args.limit, args.shard_prompts)
    return [] if args.prompts is None else read_prompts(args.prompts)


def _read_events(
    args: argparse.Namespace, lineup: Lineup, prompts: Sequence[Prompt], rendering: Rendering
) -> list[GivenPrompt] | None:
    """The events that the command names; None where a search finds them."""
    from actcache.capture.given import given_by, read_given
    from actcache.models.prompt_ids import check_template

    events = args.events
    if events is None:
        return None
    check_template(prompts, rendering, say)
    if events.is_dir():
        return given_by(open_store(events), lineup, limit=args.limit, say=say)
    return read_given(events, lineup, prompts, rendering=rendering, limit=args.limit, say=say)


def _check_grid_asked(args: argparse.Namespace) -> None:
    """What is wrong with the grid that is asked for is said before anything is captured."""
    quiet_libraries()
    from actcache.analyses.grid import check_servable

    lineup = open_lineup(args)
    captured = capture_settings(args, lineup).boundaries
    settings = grid_settings(args, None, captured, lineup.width, lineup.n_blocks, lineup.labels, lineup.pairs)
    check_servable(settings, lineup.labels, captured, lineup.n_blocks)


def _capture(args: argparse.Namespace) -> None:
    if args.corpus is not None:
        return capture_corpus(args)
    check_no_corpus(args)
    prompts = _read_prompts(args)
    with closing(runner_asked(args, args.out, holding_asked(args), {})) as runner:
        _capture_lineup(args, prompts, runner)
    say(f"{RunFolder(args.out).store} holds them; next: actcache grid {args.out}")


def _capture_lineup(args: argparse.Namespace, prompts: Sequence[Prompt], runner: Runner) -> Lineup:
    quiet_libraries()
    from actcache.models.devices import kind_of
    from actcache.study.capture import capture
    from actcache.study.held import Held

    lineup = open_lineup(args)
    held = Held(lineup, holding_asked(args))
    device = kind_of(args.device) if runner.is_elsewhere else held.placement.kind
    settings = capture_settings(args, lineup, say)
    rendering = rendering_asked(args, lineup)
    given = _read_events(args, lineup, prompts, rendering)
    known = None
    if args.continuations is not None:
        from actcache.capture.continuations import read_continuations

        known = read_continuations(args.continuations, lineup, prompts, limit=args.limit)
    folder = RunFolder(args.out)
    record = RunRecord(
        checkpoints={label: c.place for label, c in lineup.checkpoints.items()},
        prompts=str((args.prompts or args.events).resolve()),
        device=device,
        command=args.command,
        store=absolute_place(args.store),
        kept=held.holding.kept,
    )
    part = getattr(args, "part", None) or (0, 1)
    clock = CaptureClock(lineup, held_asked(args))
    less = "a lower --max-tokens or --shard-prompts, in a new RUN, needs less; so does --resident one, or --stream"
    with (
        folder.being_captured(record, alone=part[1] == 1),
        enough_memory("capture", less),
        LiveLine("capture") as line,
    ):

        def watch(label: str, load: Callable[[], Any]) -> Any:
            with enough_memory(f"loading {label}", LESS_MODEL), line.during(f"loading {label}"):
                return clock.watch(label, load)

        how: dict[str, Any] = {
            "held": held,
            "known": known,
            "folder": None if args.store else folder.on_disk,
            "rendering": rendering,
            "given": given,
            "part": part,
            "elsewhere": runner if runner.is_elsewhere else None,
            "watch": watch,
            "on_progress": line,
            "say": say,
        }
        searched = capture(lineup, prompts, folder.store, settings, **how)
    folder.bind_store(record, len(prompts if given is None else given))
    clock.write(folder, len(prompts if given is None else given), searched)
    write_taken(folder, "capture", runner)
    if known is not None:
        say(f"the capture forward corrected {searched.n_corrected} of {searched.n_known} prompts with continuations")
    store = folder.open_store()
    from actcache.analyses.effects_text import reasons_of, vocabulary_of

    each = ", by pair" if len(store.fingerprint.event_pairs) > 1 else ""
    say(f"{len(store)} events" + (f"; without one: {reasons_of(store)}{each}" if store.excluded.num_rows else ""))
    if store.fingerprint.shares_tokens:
        say(f"chosen were {vocabulary_of(store)}")
    return lineup


def _grid(args: argparse.Namespace) -> None:
    quiet_libraries()
    folder, lineup = open_captured(args)
    record = folder.record()
    holding = holding_asked(args, record.holding)
    with closing(runner_asked(args, args.run, holding, moved(args, record))) as runner:
        n_cells = _score(folder, lineup, args, args.boundary, holding, runner)
    say(f"{folder.cells} holds {n_cells:,} cells; next: actcache effects {args.run}")


def _score(
    folder: RunFolder,
    lineup: Lineup,
    args: argparse.Namespace,
    boundary: str | None,
    holding: Holding,
    runner: Runner,
) -> int:
    """Score what is not scored yet, with late stacks that are held so; how many cells there are now."""
    from actcache.analyses.grid import check_settings, run_grid
    from actcache.study.cells import publish_cells
    from actcache.study.held import Held

    store = folder.open_store()
    check_complete(store)
    captured = store.fingerprint
    settings = grid_settings(
        args, boundary, store.boundaries, store.width, captured.n_blocks, captured.labels, captured.event_pairs
    )
    check_settings(store, settings)
    lineup.check_captured(captured)
    held = Held.of(store, lineup, holding)
    together = runner.is_elsewhere or held.are_together(captured.dtype, min(settings.boundaries), say)
    clock = GridClock(folder, store, shared=not runner.has_every_job)

    less = "a lower --max-tokens needs less; so does --resident one, or --stream"
    fewer = (
        "--resident one holds one late stack at a time, --stream one block; a later --boundary has fewer late blocks; "
        "captured with --dtype bfloat16 they take half"
    )
    with enough_memory("grid", less), LiveLine("grid") as line:

        def load(label: str, boundary: int) -> LateStack:
            what = f"loading {label} from block {boundary} on"
            with enough_memory(what, fewer), clock.loading(), line.during(what):
                return held.late(label, boundary, store.dtype)

        def load_readout(label: str) -> Readout:
            what = f"loading the head of {label}"
            with enough_memory(what, fewer), clock.loading(), line.during(what):
                return held.readout(label, store.dtype)

        how: dict[str, Any] = {"load_readout": load_readout, "one_at_a_time": not together, "runner": runner}
        run_grid(store, load, folder.cell_groups, settings, **how, on_progress=clock.hearing(line), say=say)
    clock.write(lineup)
    write_taken(folder, "grid", runner)
    exactness: dict[str, Any] = {"strict": settings.strict, "max_tokens": settings.max_tokens}
    return publish_cells(folder.cells, folder.cell_groups, store, **exactness).num_rows


def _report(args: argparse.Namespace) -> None:
    folder = RunFolder(args.run)
    write_report(folder, folder.open_store(), stable_only=args.stable_only, min_gap=args.min_gap)
    print(folder.report)


def write_report(folder: RunFolder, store: Store, *, stable_only: bool = False, min_gap: float | None = None) -> None:
    """The page of a run; what a person should know of it goes to stderr."""
    from actcache.report import written

    written.write_report(folder, store, stable_only=stable_only, min_gap=min_gap, say=say)


def _demo(args: argparse.Namespace) -> None:
    print(
        "Two tiny checkpoints ship with actcache: a base model (pt) and its instruction-tuned descendant (it).\n"
        "Asked: at the first token where the two choose differently, how much of the difference do the late layers\n"
        "make on either model's upstream state, and how much needs the tuned model's own state?\n"
    )
    with as_file(files("actcache") / "demo") as demo:
        out = [word for role in ROLES for word in (f"--{role}", str(demo / role))]
        out += ["--prompts", str(demo / "prompts.jsonl")]
        parser = argparse.ArgumentParser()
        add_all_arguments(parser)
        given = parser.parse_args([*out, "--out", str(args.out), "--max-new", "48", "--dtype", "float32"])
        given.command = args.command
        _run(given)
