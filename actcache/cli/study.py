"""The verb study: every analysis that a run can serve; what that takes first, the report last."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from actcache.cli.analyses import analyse
from actcache.cli.arguments import (
    Verbs,
    add_verb,
    holding_asked,
)
from actcache.cli.captured import add_captured_arguments, moved
from actcache.cli.runners import add_engine_arguments, add_part_argument, runner_asked
from actcache.cli.stages import write_report
from actcache.cli.terminal import clock, quiet_libraries, say
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.analyses.whole import Planned
    from actcache.study.analysis import Analysis
    from actcache.study.run import Run


def add_verbs(verbs: Verbs) -> None:
    """Add the verb of this module."""
    study = add_verb(
        verbs,
        "study",
        _study,
        "answer every question that the run can serve, and report; the same command resumes it",
        "actcache study RUN --also stability",
    )
    add_captured_arguments(study)
    study.add_argument("--only", type=_named, default=(), metavar="NAMES", help="analyses to answer, and no others")
    study.add_argument(
        "--also", type=_named, default=(), metavar="NAMES", help="analyses to answer beside the default set"
    )
    add_part_argument(study)
    add_engine_arguments(study)


def _named(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _study(args: argparse.Namespace) -> None:
    quiet_libraries()
    from actcache.analyses import whole
    from actcache.study.run import Run
    from actcache.study.runner import Runner

    folder = RunFolder(args.run)
    record = folder.record()
    holding = holding_asked(args, record.holding)
    checkpoints = moved(args, record)
    run = Run(folder.path, checkpoints=checkpoints, **asdict(holding))
    planned = whole.plan_study(run, args.only, args.also)
    print("\n".join(_described(run, planned)), flush=True)

    def answer(analysis: Analysis[Any]) -> dict[str, Any]:
        of = runner if analysis.has_parts or runner.is_elsewhere else Runner()
        return analyse(analysis, folder, holding, of, checkpoints=checkpoints, lineup=run.lineup)

    with closing(runner_asked(args, args.run, holding, checkpoints)) as runner:
        found = list(whole.answered(planned, answer))
    for before, after in zip(planned, found, strict=True):
        if after.refused is not None and before.refused is None:
            say(f"{after.analysis.name} is left out: {after.refused}")
        if after.waits is not None:
            say(f"{after.analysis.name}: {after.waits}")
    if any(one.waits is not None for one in found):
        return
    write_report(folder, folder.open_store())
    print(f"\nReport: {folder.report}")


def _described(run: Run, planned: Sequence[Planned]) -> list[str]:
    """What will be run, and what it takes."""
    from actcache.analyses import whole
    from actcache.study.finished import replay_rate
    from actcache.study.plan import measure_rate, shapes_of

    names = [one.analysis.name for one in planned]
    width = max(map(len, names), default=0)
    if any(one.jobs for one in planned):
        shapes = shapes_of(run.lineup)
        costs = whole.costs(planned, shapes)
        rate, at_least = replay_rate(run.folder.timings()), ""
        if rate is None:
            captured, shape = run.store.fingerprint, next(iter(shapes.values()))
            rate, at_least = (
                measure_rate(shape, captured.max_tokens, captured.dtype, run.placement.devices[0]),
                "at least ",
            )
    else:
        costs, rate, at_least = [(0, 0.0)] * len(planned), 1.0, ""

    def cost(n_replays: int, products: float, whole_models: bool = False) -> str:
        seconds = products / rate
        time = clock(seconds) if seconds >= 1 else f"{seconds:.1g} s"
        what, least = ("replays and sequences", "at least ") if whole_models else ("replays", at_least)
        return f"{n_replays:,} {what}, {products:.3g} multiply-adds, {least}about {time}"

    lines = []
    for name, one, (n_replays, products) in zip(names, planned, costs, strict=True):
        if one.refused is not None:
            said = f"left out: {one.refused}"
        elif one.content is not None:
            said = "answered already"
        elif one.jobs is None:
            said = "runs whole models, not replays: its cost is not told"
        else:
            said = cost(n_replays, products, one.runs_models) if n_replays else "no replay is missing"
        lines.append(f"{name:{width}}  {said}")
    if len(planned) > 1 and (n_replays := sum(n for n, _ in costs)):
        every = sum(products for _, products in costs)
        lines.append(f"{'together':{width}}  {cost(n_replays, every, any(one.runs_models for one in planned))}")
    if any(one.content is not None for one in planned):
        lines.append(f"'actcache NAME {run.path}' answers one again, under other options too")
    if further := whole.left_out(planned):
        lines.append(f"not asked for: {', '.join(further)}; --also NAME answers one, too")
    return lines
