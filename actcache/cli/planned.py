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
    from actcache.analyses.grid import GridSettings
    from actcache.models.lineup import Lineup
    from actcache.prompts import Prompt
    from actcache.study.plan import Assumptions, Study


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
    from actcache.analyses import STEPS, whole
    from actcache.analyses.grid import GridSettings
    from actcache.analyses.stability import StabilityOptions
    from actcache.models.devices import CUDA
    from actcache.study.dealt import Dealt
    from actcache.study.planned_store import PlannedStore

    if args.gpus > 1 and study.capture.device != CUDA:
        raise InputError("--gpus is a number of CUDA devices: give --device cuda too")
    store = PlannedStore.of(lineup, prompts, study.lengths, study.capture, assumed)
    settings = (grid or GridSettings(study.capture.boundaries)).of_pair(lineup.labels, lineup.pairs)
    planned = whole.plan_before(store, settings.of_depth(lineup.n_blocks))
    dealt = Dealt(study, assumed, estimated, args.gpus, apart=bool(held_asked(args)))
    analyses: list[dict[str, Any]] = []
    for one, jobs in zip(planned, whole.new_jobs(planned), strict=True):
        name, options = one.analysis.name, one.analysis.options()
        found: dict[str, Any] = {"name": name}
        if one.refused is not None:
            found["not_told"] = one.refused
        elif one.jobs is not None:
            found |= asdict(dealt.of_jobs(name, jobs)) if jobs else {"multiply_adds": 0.0}
        elif isinstance(options, StabilityOptions):
            found |= asdict(dealt.of_checks(name, list(options.samples.values())))
        else:
            found["not_told"] = "its work is no job that is known before it runs"
        analyses.append(found | {"opt_in": one.analysis.opt_in})
    analyses += [
        {"name": name, "not_told": "its work depends on a corpus and on what was trained before it", "opt_in": True}
        for name in STEPS
    ]
    is_default = [one for one in analyses if not one["opt_in"]]
    stages = [asdict(one) for one in dealt.stages()]
    together = {
        name: sum(one.get(name) or 0.0 for one in (*stages, *is_default))
        for name in ("multiply_adds", *(["time_s"] if assumed.rates else ()))
    }
    return {"gpus": args.gpus, "is_estimate": True, "stages": stages, "analyses": analyses, "together": together}


def study_lines(planned: Mapping[str, Any], at_least: bool) -> list[str]:
    """A table of it."""
    n = planned["gpus"]
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
        return f"{one['name']:18}" + "".join(f"{text:>15}" for text in shown) + f"{one.get('jobs', ''):>7}"

    said += [line(one) for one in (*planned["stages"], *(one for one in planned["analyses"] if not one["opt_in"]))]
    said += [
        line(planned["together"] | {"name": "together"}),
        "asked for by 'actcache study RUN --also', or by itself:",
    ]
    said += [line(one) for one in planned["analyses"] if one["opt_in"]]
    said.append(
        "jobs are independent: at most so many GPUs work at once. Time is as if they were dealt evenly, loads and what "
        "operations take beside multiply-adds apart; memory is at most, with what the host holds"
    )
    return said
