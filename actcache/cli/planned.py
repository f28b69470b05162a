"""What every stage and analysis of a study will take before any of it ran, as data and as a table."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from actcache.cli.arguments import held_asked
from actcache.cli.terminal import amount, counted
from actcache.errors import InputError

if TYPE_CHECKING:
    from actcache.analyses.features.before import Before
    from actcache.analyses.grid import GridSettings
    from actcache.analyses.whole import Planned
    from actcache.models.lineup import Lineup
    from actcache.prompts import Prompt
    from actcache.study.cells import Finished
    from actcache.study.dealt import Dealt
    from actcache.study.engine import LateJob
    from actcache.study.plan import Assumptions, Study
    from actcache.study.run_folder import RunFolder
    from actcache.study.whole_models import ModelJob


def study_planned(
    args: argparse.Namespace,
    lineup: Lineup,
    prompts: Sequence[Prompt],
    study: Study,
    assumed: Assumptions,
    grid: GridSettings | None,
    estimated: Mapping[str, float],
) -> dict[str, Any]:
    """What each stage and every analysis will take of each GPU."""
    from actcache.analyses import whole
    from actcache.analyses.features.before import TOKENS, Before
    from actcache.analyses.features.step import Step
    from actcache.analyses.features.train import TrainOptions
    from actcache.analyses.grid import GridSettings
    from actcache.models.devices import CUDA
    from actcache.study.dealt import Dealt
    from actcache.study.planned_store import PlannedStore

    if args.gpus > 1 and study.capture.device != CUDA:
        raise InputError("--gpus is a number of CUDA devices: give --device cuda too")
    store = PlannedStore.of(lineup, prompts, study.lengths, study.capture, assumed)
    settings = (grid or GridSettings(study.capture.boundaries)).of_pair(lineup.labels, lineup.pairs)
    before = Before(store, args.corpus_tokens or TOKENS, TrainOptions().recipe(store.width).n_features)
    with whole.to_come(store, settings.of_depth(lineup.n_blocks)) as (folder, finished):
        planned = [*whole.plan_before(folder, store, finished), *_steps(before, folder, finished)]
    dealt = Dealt(study, assumed, estimated, args.gpus, apart=bool(held_asked(args)))
    analyses, steps = [], [asdict(dealt.of_outlay("capture --corpus", before.corpus(study.shapes)))]
    for one, jobs in zip(planned, whole.new_jobs(planned), strict=True):
        analysis, found = one.analysis, _taken(one, jobs, dealt, before)
        if said := analysis.leaves_out(store, analysis.options()):
            found["leaves_out"] = said
        if isinstance(analysis, Step):
            steps.append(found)
        else:
            analyses.append(found | {"opt_in": analysis.opt_in})
    is_default = [one for one in analyses if not one["opt_in"]]
    stages = [asdict(one) for one in dealt.stages()]
    together = {
        name: sum(one.get(name) or 0.0 for one in (*stages, *is_default))
        for name in ("multiply_adds", *(["time_s"] if assumed.rates else ()))
    }
    return {
        "gpus": args.gpus,
        "is_estimate": True,
        "stages": stages,
        "analyses": analyses,
        "together": together,
        "steps": steps,
        "features": {"tokens": before.n_rows, "blocks": before.blocks, "width": before.n_features},
    }


def _steps(before: Before, folder: RunFolder, finished: Finished) -> list[Planned]:
    """The steps of features."""
    from actcache.analyses import STEPS
    from actcache.analyses.features.step import Step
    from actcache.analyses.whole import Planned
    from actcache.study.dealt import Outlay

    found = []
    for named in STEPS["features"]:
        step = named.load()
        assert isinstance(step, Step)
        try:
            work = step.planned(before, folder, finished)
        except InputError as error:
            found.append(Planned(step, refused=str(error)))
            continue
        if isinstance(work, Outlay):
            found.append(Planned(step, outlay=work))
        else:
            found.append(Planned(step, jobs=[(place, job) for place, jobs in work.items() for job in jobs]))
    return found


def _taken(one: Planned, jobs: Sequence[LateJob | ModelJob], dealt: Dealt, before: Before) -> dict[str, Any]:
    """What one analysis will take."""
    from actcache.analyses.features.step import Step
    from actcache.analyses.stability import StabilityOptions

    name, options = one.analysis.name, one.analysis.options()
    found: dict[str, Any] = {"name": name}
    if one.refused is not None:
        return found | {"not_told": one.refused}
    if one.outlay is not None:
        return asdict(dealt.of_outlay(name, one.outlay))
    if one.jobs is not None:
        beside = before.crosscoder_bytes if isinstance(one.analysis, Step) else 0.0
        return asdict(dealt.of_jobs(name, jobs, beside)) if jobs else found | {"multiply_adds": 0.0}
    if isinstance(options, StabilityOptions):
        return asdict(dealt.of_checks(name, list(options.samples.values())))
    return found | {"not_told": "its work is no job that is known before it runs"}


def study_lines(planned: Mapping[str, Any], at_least: bool) -> list[str]:
    """A table of it."""
    n, of = planned["gpus"], planned["features"]
    columns = ("multiply_adds", "time_s", "memory_bytes", "stored_bytes", "read_bytes")
    heads = ("multiply-adds", f"time on {n}", "memory each", "stored", "read")
    said = [
        "",
        f"estimates for {counted(n, 'GPU' if n > 1 else 'device')}, weights unread: a stage or analysis, and what it "
        "takes with default options after those before it",
        "estimate" + " " * 10 + "".join(f"{head:>15}" for head in heads) + f"{'jobs':>7}",
    ]

    def line(one: Mapping[str, Any]) -> str:
        if "not_told" in one:
            return f"{one['name']:18}  not told: {one['not_told']}"
        if not one["multiply_adds"]:
            return f"{one['name']:18}  nothing more: it is made of cells that are there"
        shown = [
            "-"
            if one.get(name) is None or (name == "stored_bytes" and not one[name])
            else f"{'>= ' if at_least and name == 'time_s' else ''}{amount(name, one[name])}"
            for name in columns
        ]
        return (f"{one['name']:18}" + "".join(f"{text:>15}" for text in shown) + f"{one.get('jobs', ''):>7}").rstrip()

    analyses, steps = planned["analyses"], planned["steps"]
    said += [line(one) for one in (*planned["stages"], *(one for one in analyses if not one["opt_in"]))]
    said += [
        line(planned["together"] | {"name": "together"}),
        "asked for by 'actcache study RUN --also', or by itself:",
    ]
    said += [line(one) for one in analyses if one["opt_in"]]
    said.append(
        f"features of blocks {', '.join(map(str, of['blocks']))}, one step after another: {of['width']:,} of each, on "
        f"a corpus of {of['tokens']:,} rows:"
    )
    said += [line(one) for one in steps]
    said += [f"not in {one['name']}: {one['leaves_out']}" for one in (*analyses, *steps) if "leaves_out" in one]
    said.append(
        "jobs are independent: at most so many GPUs work at once. Time is as if they were dealt evenly, loads and what "
        "operations take beside multiply-adds apart; memory is at most, with what the host holds"
    )
    return said


def cluster_planned(
    args: argparse.Namespace, study: Study, assumed: Assumptions, estimated: Mapping[str, float]
) -> dict[str, Any]:
    """What capture and grid will take of the workers of a cluster, one for each GPU."""
    from actcache.models.devices import CUDA
    from actcache.study.dealt import Dealt
    from actcache.study.planned_cluster import on_workers

    if args.gpus > 1 and study.capture.device != CUDA:
        raise InputError("--gpus is a number of CUDA devices: give --device cuda too")
    stages = on_workers(Dealt(study, assumed, estimated, apart=bool(held_asked(args))), args.gpus)
    return {"gpus": args.gpus, "is_estimate": True, "stages": [asdict(one) for one in stages]}


def cluster_lines(planned: Mapping[str, Any]) -> list[str]:
    """A table of it."""
    heads = ("tasks", "time", "GPU-hours", "busy", "held by each", "read", "written")
    said = [
        "",
        f"estimates for a Ray cluster with {counted(planned['gpus'], 'worker')}, a GPU each:",
        f"{'estimate':10}" + "".join(f"{head:>14}" for head in heads),
    ]
    for one in planned["stages"]:
        timed = one["time_s"] is not None
        shown = [
            f"{one['tasks']:,}",
            amount("time_s", one["time_s"]) if timed else "-",
            f"{one['gpu_hours']:,.3g}" if timed else "-",
            f"{one['busy']:.1%}" if timed else "-",
            *(amount(name, one[name]) for name in ("held_bytes", "read_bytes", "written_bytes")),
        ]
        said.append(f"{one['name']:10}" + "".join(f"{text:>14}" for text in shown))
    said.append(
        "held: in a capture all checkpoints, in a grid one late stack and all heads. read and written go over the "
        "network where the store or the folders are far; in a grid every late stack reads the rows of all checkpoints"
    )
    return said


def taken_line(name: str, taken: Mapping[str, Any]) -> str:
    """What a stage took on a cluster."""
    elapsed_s, workers = taken["elapsed_s"], taken["workers"]
    hours = f", {taken['gpus'] * elapsed_s / 3600:.3g} GPU-hours" if taken["gpus"] else ""
    busy = taken["busy_s"] / (workers * elapsed_s) if elapsed_s else 1.0
    return (
        f"{name}: {taken['tasks']:,} tasks by {counted(workers, 'worker')} in {amount('time_s', elapsed_s)}, "
        f"{busy:.1%} of it busy{hours}, {taken['requeued']} requeued"
    )
