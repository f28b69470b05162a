"""The verb plan: what a run will take, and afterwards the estimate beside the truth."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.cli.arguments import (
    Verbs,
    add_capture_settings,
    add_grid_arguments,
    add_lineup_arguments,
    add_verb,
    capture_settings,
    checkpoints_given,
    grid_settings,
    held_asked,
    open_lineup,
    positive,
    rendering_asked,
)
from actcache.cli.captured import moved
from actcache.cli.parser import place
from actcache.cli.planned import cluster_lines, cluster_planned, study_lines, study_planned, taken_line
from actcache.cli.stability import add_run_arguments, samples_asked
from actcache.cli.terminal import amount, counted, quiet_libraries, say
from actcache.cli.timing import ON_RAY
from actcache.errors import IncompatibleError, InputError
from actcache.schema import ROLES
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.analyses.grid import GridSettings
    from actcache.capture.settings import CaptureSettings
    from actcache.models.lineup import Lineup
    from actcache.store import Store
    from actcache.study.cells import Finished
    from actcache.study.plan import Assumptions, Study
    from actcache.study.work import ReplayWork

_MEASURED_HERE = "a matrix product's, measured here: what a run reaches is less"
FAR = 0.2  # an estimate off by more than this share of the truth is marked
_FLOP_PER_MULTIPLY_ADD = 2
_UNITS = {"": 1.0} | {
    f"{prefix}FLOP/s": size / _FLOP_PER_MULTIPLY_ADD for prefix, size in (("G", 1e9), ("T", 1e12), ("P", 1e15))
}
_LABELS = {
    "prompts": "prompts",
    "prompt_tokens": "their tokens",
    "events": "events",
    "tokens": "tokens of their sequences",
    "rows": "rows stored",
    "raw_bytes": "states, raw",
    "stored_bytes": "states, stored",
    "search_multiply_adds": "multiply-adds: search",
    "capture_multiply_adds": "               capture",
    "stability_multiply_adds": "               stability",
    "grid_multiply_adds": "               grid",
    "variants_multiply_adds": "               variants",
    "multiply_adds": "               together",
    "hooks_multiply_adds": "               by hooks",
    "capture_memory_bytes": "memory: capture",
    "grid_memory_bytes": "        grid",
    "capture_passes": "passes: capture",
    "grid_passes": "        grid",
    "capture_loads": "loads: capture",
    "grid_loads": "       grid",
    "capture_read_bytes": "read: capture",
    "grid_read_bytes": "      grid",
    "capture_s": "time: capture",
    "stability_s": "      stability",
    "grid_s": "      grid",
}


def add_verbs(verbs: Verbs) -> None:
    """Add the verb of this module."""
    parser = add_verb(
        verbs,
        "plan",
        _plan,
        "tell what a run will take, or what a finished RUN took beside the estimate",
        "actcache plan --pt base --it tuned --prompts prompts.jsonl --pilot PILOT",
    )
    parser.add_argument("run", nargs="?", type=place, metavar="RUN", help="a finished run, instead of a pair")
    add_lineup_arguments(parser)
    add_capture_settings(parser)
    add_grid_arguments(parser)
    add_run_arguments(parser)
    parser.add_argument(
        "--variants",
        type=int,
        default=0,
        metavar="N",
        help="number of edits at the compared position, in every cell, beside those of a sweep (default 0)",
    )
    parser.add_argument(
        "--pilot", type=place, metavar="RUN", help="take the options below from an earlier small run of this pair"
    )
    parser.add_argument(
        "--event-share",
        type=_share,
        metavar="Y",
        help="share of prompts with an event, above 0 and at most 1 (default 1)",
    )
    parser.add_argument(
        "--shared-tokens",
        type=_not_negative,
        metavar="X",
        help="mean number of tokens that the pair shares before an event (default 10: two pairs tried had 6 and 14)",
    )
    parser.add_argument(
        "--rate",
        type=_rate,
        metavar="R",
        help="multiply-adds per second, as 5e10, or 0.1TFLOP/s at 2 FLOP each (default: the pilot's, else one "
        "measured here for a second)",
    )
    parser.add_argument(
        "--study", action="store_true", help="tell what every analysis will take too, with its default options"
    )
    parser.add_argument(
        "--gpus",
        type=positive,
        default=1,
        metavar="N",
        help="with --study, GPUs that jobs and checkpoints are dealt to; with --engine ray, a worker for each; --rate "
        "is of each (default 1)",
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="whether to tell what the stages take of the workers of a Ray cluster too (default %(default)s)",
    )
    parser.add_argument(
        "--corpus-tokens",
        type=positive,
        metavar="N",
        help="with --study, rows of the corpus that features are trained on (default 2000000)",
    )
    parser.add_argument(
        "--out", type=place, metavar="RUN", help="keep the plan where the run will be, for 'actcache plan RUN' later"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def _not_negative(text: str) -> float:
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return value


def _rate(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+(?:[eE][+-]?[0-9]+)?) ?([A-Z]?FLOP/s)?", text)
    unit = match and (match[2] or "")
    if not match or unit not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(
            f"{text} is not a number of multiply-adds per second, nor of {', '.join(name for name in _UNITS if name)}"
        )
    return float(match[1]) * _UNITS[unit]


def _plan(args: argparse.Namespace) -> None:
    quiet_libraries()
    if args.gpus > 1 and not args.study and args.engine == "local":
        raise InputError("--gpus is of the work of a study, or of a cluster: give --study or --engine ray too")
    if args.corpus_tokens is not None and not args.study:
        raise InputError("--corpus-tokens is of the work of a study: give --study too")
    if args.run is not None:
        if args.study:
            raise InputError("--study is planned before a run: give a pair instead of RUN, or 'actcache study RUN'")
        _compare(args)
        return
    given = checkpoints_given(args)
    missing = [f"--{role}" for role in ROLES if role not in given] if len(given) < 2 else []
    missing += [] if args.prompts else ["--prompts"]
    if missing:
        raise InputError(f"give {', '.join(missing)} to plan a run, or the folder of a finished one")
    from actcache.models.prompt_ids import N_SAMPLED, PromptIds
    from actcache.prompts import digest, read_prompts
    from actcache.study.plan import Study, as_json, shapes_of

    prompts = read_prompts(args.prompts, args.limit, args.shard_prompts)
    lineup = open_lineup(args, with_weights=False)
    capture = capture_settings(args, lineup, say)
    ids = PromptIds(lineup, prompts, rendering_asked(args, lineup), say)
    if ids.is_sampled:
        say(f"{len(prompts):,} prompts: their lengths are taken from every {len(prompts) // N_SAMPLED}th of them")
    grid = _grid_asked(args, lineup, capture)
    work = [] if grid is None else _work_asked(args, lineup, grid)
    checked = tuple(samples_asked(args, capture.dtype).values()) if work else ()  # a capture by itself checks nothing
    study = Study(shapes_of(lineup), ids.lengths, capture, work, checked, lineup.pairs)
    assumed = _assume(args, lineup, study)
    held = held_asked(args)
    found = {"assumed": as_json(assumed), "estimate": _estimate(study, assumed, held)}
    if args.out is not None:
        RunFolder(args.out).write_plan(found, digest(prompts))
    if args.study:
        found["study"] = study_planned(args, lineup, prompts, study, assumed, grid, found["estimate"])
    if args.engine == "ray":
        found["cluster"] = cluster_planned(args, study, assumed, found["estimate"])
    _print(args.json, study, assumed, found, held)


def _grid_asked(args: argparse.Namespace, lineup: Lineup, capture: CaptureSettings) -> GridSettings | None:
    """What the arguments, and the sweep that they name, ask to be scored of what is captured; None where no rows are
    kept that could be replayed."""
    from actcache.analyses.grid import check_servable

    if args.variants < 0:
        raise InputError(f"{args.variants} variants asked for; give 0 or more")
    if capture.row_selection != "prefix":
        if args.sweep or args.variants:
            raise InputError(
                f"--rows {capture.row_selection} keeps no rows to replay: leave out --sweep and --variants"
            )
        return None
    settings = grid_settings(args, None, capture.boundaries, lineup.width, lineup.n_blocks, lineup.labels, lineup.pairs)
    check_servable(settings, lineup.labels, capture.boundaries, lineup.n_blocks)
    return settings


def _work_asked(args: argparse.Namespace, lineup: Lineup, settings: GridSettings) -> list[ReplayWork]:
    """What is computed for it, with the variants that are counted alone."""
    from actcache.analyses.grid import planned_work

    return [replace(one, n_last=one.n_last + args.variants) for one in planned_work(settings, lineup.labels)]


def _assume(args: argparse.Namespace, lineup: Lineup, study: Study) -> Assumptions:
    """Defaults, then what a pilot tells, then what the command line says, then a rate measured here."""
    from actcache.study.finished import check_pilot, learn
    from actcache.study.plan import RATED, default_assumptions, measure_rate

    assumed = default_assumptions(study.capture, len(study.pairs))
    if args.pilot is not None:
        folder = RunFolder(args.pilot)
        record, store = folder.record(), folder.open_store()
        check_pilot(lineup, record.checkpoints, study.capture, store)
        pilot, finished = _study_of(folder, lineup, store, Path(record.prompts))
        assumed = learn(pilot, store, _timings_of(folder, finished), finished, f"pilot {args.pilot}")
    sources = dict(assumed.sources)
    for name in ("event_share", "shared_tokens"):
        if (value := getattr(args, name)) is not None:
            assumed = replace(assumed, **{name: value})
            sources[name] = "given"
    rate, source = args.rate, "given"
    if rate is None and not assumed.rates:
        from actcache.models.devices import placed

        device = placed(args.device, lineup.labels).devices[0]
        n_tokens = max(1, min(study.capture.max_tokens, study.capture.shard_prompts * max(study.lengths)))
        rate = measure_rate(study.shape, n_tokens, study.capture.dtype, device)
        source = _MEASURED_HERE
    if rate is not None:
        assumed = replace(assumed, rates=dict.fromkeys(RATED, rate), search_call_s=0.0)
        sources["rates"] = source
    return replace(assumed, sources=sources)


def _compare(args: argparse.Namespace) -> None:
    """A finished run: the estimate, under what its plan assumed, beside the truth."""
    from actcache.models.lineup import Lineup
    from actcache.study.finished import learn, truth
    from actcache.study.plan import as_json, assumptions_from_json

    folder = RunFolder(args.run)
    record, store = folder.record(), folder.open_store()
    lineup = Lineup.open({**record.checkpoints, **moved(args, record)}, dequantize=True)
    study, finished = _study_of(folder, lineup, store, args.prompts or Path(record.prompts))
    timings = _timings_of(folder, finished)
    if folder.plan.is_file():
        plan = folder.read_plan()
        if plan.made_from["prompts"] != store.fingerprint.prompts:
            raise InputError(f"{folder.plan} is a plan for other prompts than {folder.path} was made from; remove it")
        assumed = assumptions_from_json(plan.content["assumed"], str(folder.plan))
    else:
        assumed = learn(study, store, timings, finished, "the run itself")
    held = timings.get("capture", {}).get("held", "")
    found = {
        "assumed": as_json(assumed),
        "estimate": _estimate(study, assumed, held),
        "truth": truth(study, store, timings, finished),
        "untimed": _untimed(folder, timings),
        "on_ray": {name: taken for name, taken in timings.items() if name.endswith(ON_RAY)},
    }
    _print(args.json, study, assumed, found, held)


def _estimate(study: Study, assumed: Assumptions, held: str) -> dict[str, float]:
    """Where all checkpoints are in memory, or one of what ``held`` says (see :func:`held_asked`)."""
    from actcache.study.plan import estimate
    from actcache.study.reads import estimate_apart

    return estimate_apart(study, assumed, stream=held == "block") if held else estimate(study, assumed)


def _study_of(folder: RunFolder, lineup: Lineup, store: Store, prompts_path: Path) -> tuple[Study, Finished]:
    """What a run computed, and its finished jobs; where there is none, with the grid that would be scored."""
    from actcache.analyses.grid import GridSettings, planned_work
    from actcache.capture.growth import digests_of_segments
    from actcache.models.prompt_ids import PromptIds
    from actcache.prompts import digest, read_prompts
    from actcache.study.cells import finished_cells
    from actcache.study.finished import replays_of, settings_of
    from actcache.study.plan import Study, shapes_of

    fingerprint = store.fingerprint
    fingerprint.check_captured()
    for field, found in (("n_blocks", lineup.n_blocks), ("width", lineup.width)):
        if found != (captured := getattr(fingerprint, field)):
            raise IncompatibleError(
                f"the checkpoints have {field} {found}, the store of {folder.path} has {captured}; point "
                "--checkpoint at those captured",
                field=field,
            )
    prompts = read_prompts(prompts_path, store.n_prompts, fingerprint.shard_prompts)
    as_captured = store.prompts == digests_of_segments(prompts, fingerprint.shard_prompts, store.prompts)
    if not as_captured and digest(prompts) != fingerprint.prompts:
        raise InputError(
            f"{prompts_path} no longer holds the prompts that {folder.path} was made from; give theirs with --prompts"
        )
    capture = settings_of(store)
    finished = finished_cells(folder.cell_groups, store) if folder.cells.is_file() else {}
    work = list(dict.fromkeys(one for one, _ in replays_of(finished)))
    if not work and capture.row_selection == "prefix":
        default = GridSettings(capture.boundaries, strict=capture.strict)
        work = planned_work(default.of_pair(lineup.labels, fingerprint.event_pairs), lineup.labels)
    lengths = PromptIds(lineup, prompts, lineup.rendering_of(fingerprint)).lengths
    checked = folder.timings().get("stability", {}).get("n_events", ())
    return Study(shapes_of(lineup), lengths, capture, work, tuple(checked), fingerprint.event_pairs), finished


def _timings_of(folder: RunFolder, finished: Finished) -> dict[str, Any]:
    """What the run's stages took, but for a grid that scored other cells than the run now has."""
    from actcache.study.finished import digest_of_results

    timings = folder.timings()
    now = digest_of_results(finished)
    if timings.get("grid", {}).get("results", now) != now:  # an earlier version's does not say
        del timings["grid"]
    return timings


def _untimed(folder: RunFolder, timings: Mapping[str, Any]) -> dict[str, str]:
    """Why a stage that left something in the run has no time, by stage."""
    recorded = folder.timings()
    done = {"capture": "captured"}
    done |= {"stability": "checked"} if folder.stability.is_file() else {}
    done |= {"grid": "scored"} if folder.cells.is_file() else {}
    why = {}
    for stage, verb in done.items():
        if not recorded:
            why[stage] = f"{folder.timings_path.name} has no times of this store"
        elif f"{stage}{ON_RAY}" in recorded:
            why[stage] = "its workers' is told above"
        elif stage in recorded and stage not in timings:
            why[stage] = "it scored other cells than the run now has"
        elif stage not in timings:
            why[stage] = f"{verb} in more than one go"
    return why


def _print(as_json: bool, study: Study, assumed: Assumptions, found: dict[str, Any], held: str) -> None:
    """``held`` as :func:`held_asked` gives it."""
    estimated, true = found["estimate"], found.get("truth")
    if as_json:
        shape = study.shape
        model = {
            name: getattr(shape, name) for name in ("architecture", "n_blocks", "width", "vocab_size", "n_parameters")
        }
        ratios = {} if true is None else {"ratio": _ratios(estimated, true)}
        print(json.dumps({"model": model, **found, **ratios}, indent=1))
        return
    lines = _heading(study, assumed)
    if held:
        from actcache.study.reads import said

        lines.append(said(stream=held == "block"))
    print("\n".join([*lines, "", *_table(study, assumed, estimated, true, held)]))
    if planned := found.get("study"):
        print("\n".join(study_lines(planned, assumed.sources.get("rates") == _MEASURED_HERE)))
    if on_cluster := found.get("cluster"):
        print("\n".join(cluster_lines(on_cluster)))
    print("".join(taken_line(name, taken) + "\n" for name, taken in found.get("on_ray", {}).items()), end="")
    if untimed := found.get("untimed"):
        print("without a time: " + "; ".join(f"{stage}: {why}" for stage, why in untimed.items()))


def _ratios(estimated: Mapping[str, float], true: Mapping[str, float]) -> dict[str, float]:
    return {name: estimated[name] / true[name] for name in estimated if true.get(name)}


def _heading(study: Study, assumed: Assumptions) -> list[str]:
    shape, sources = study.shape, assumed.sources
    experts = shape.active_experts and f", {shape.active_experts[0]} of {shape.active_experts[1]} experts a token"
    lines = [
        f"{study.n_checkpoints} x {shape.architecture}: {shape.n_parameters:,} parameters, {shape.n_blocks} blocks of "
        f"width {shape.width}{experts or ''}; {study.capture.dtype}",
        f"assumed ({sources['event_share']}): {assumed.event_share:.1%} of prompts give an event",
        f"assumed ({sources['shared_tokens']}): {assumed.shared_tokens:.1f} tokens "
        + ("of each rollout" if study.capture.support == "rollouts" else "shared before one"),
        f"assumed ({sources['eventless_tokens']}): {assumed.eventless_tokens:.1f} tokens of a prompt without one",
        *(
            [f"assumed: {assumed.sequences:.1f} sequences per prompt, {assumed.events:.1f} events on each"]
            if assumed.sequences * assumed.events != 1
            else []
        ),
        f"assumed ({sources['compression']}): states shrink {assumed.compression:.2f} times",
    ]
    if assumed.rates:
        rates = ", ".join(f"{part} {rate:.3g}" for part, rate in assumed.rates.items())
        if len(set(assumed.rates.values())) == 1:
            rates = f"{next(iter(assumed.rates.values())):.3g}"
        calls = f", and {1000 * assumed.search_call_s:.3g} ms per step of a search" if assumed.search_call_s else ""
        lines.append(f"assumed ({sources['rates']}): {rates} multiply-adds per second{calls}")
    return lines


def _table(
    study: Study, assumed: Assumptions, estimated: Mapping[str, float], true: Mapping[str, float] | None, held: str
) -> list[str]:
    notes = _notes(study, assumed, held)
    at_least = assumed.sources.get("rates") == _MEASURED_HERE
    head = "" if true is None else f"{'truth':>12} {'ratio':>7}"
    lines = [f"{'':30}{'estimate':>12} {head}".rstrip()]
    for name, value in estimated.items():
        if name in ("variants_multiply_adds", "stability_multiply_adds", "stability_s") and not value:
            continue
        shown = amount(name, value)
        line = f"{_LABELS[name]:30}{f'>= {shown}' if at_least and name.endswith('_s') else shown:>12}"
        if true is not None:
            if name in true:
                ratio = f"{value / true[name]:7.2f}" if true[name] else f"{'':7}"
                far = " off" if abs(value - true[name]) > FAR * abs(true[name]) else ""
                line += f" {amount(name, true[name]):>12} {ratio}{far}"
            else:
                line += f" {'-':>12}" + (f"  {notes[name]}" if name in notes else "")
        elif name in notes:
            line += f"  {notes[name]}"
        lines.append(line)
    return lines


_HELD = {
    "": ("weights of all checkpoints", "late blocks and readouts of all checkpoints"),
    "checkpoint": ("weights of one checkpoint", "late blocks of one checkpoint, and heads"),
    "block": ("two blocks, embeddings and head", "two blocks, and heads"),
}


def _notes(study: Study, assumed: Assumptions, held: str) -> dict[str, str]:
    work, n_checkpoints = study.work, study.n_checkpoints
    notes = {
        "capture_memory_bytes": f"{_HELD[held][0]}, one batch, segments being written; above the imports",
        "grid_memory_bytes": f"{_HELD[held][1]}, one pack; above the imports",
    }
    if assumed.sources.get("rates") == _MEASURED_HERE:
        notes["capture_s"] = (
            "at least: what operations take beside multiply-adds, most of a small model's time, is not in"
        )
    if work:
        cells = [one.n_cells(n_checkpoints) for one in work]
        boundaries = len({one.boundary for one in work})
        readouts = len({name for one in work for name in one.readouts})
        notes["grid_multiply_adds"] = (
            f"per event: {counted(sum(cells), 'cell')} at {counted(boundaries, 'boundary')}, "
            f"{counted(readouts, 'readout')} each"
        )
        edited = {"one token": 0, "a few tokens": 0, "the sequence": 0}
        for one, n_cells in zip(work, cells, strict=True):
            edited["one token" if one.mode == "packed" else "the sequence"] += n_cells * one.n_last
            edited["a few tokens" if one.mode == "packed" else "the sequence"] += n_cells * len(one.tails)
            edited["the sequence"] += n_cells * one.n_whole
        replays = (f"{counted(number, 'replay')} of {what}" for what, number in edited.items() if number)
        notes["variants_multiply_adds"] = f"per event: {', '.join(replays)}"
        notes["hooks_multiply_adds"] = (
            "a full forward per event and cell, its search included; at batch one each takes far longer per "
            "multiply-add than a pack does"
        )
    return notes
