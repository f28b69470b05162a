"""The verb stability, and what the other stages ask of it: which events rounding would change."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actcache.cli.arguments import Verbs, add_verb, positive
from actcache.cli.captured import add_captured_arguments, open_captured
from actcache.cli.memory import LESS_MODEL, enough_memory
from actcache.cli.terminal import LiveLine, quiet_libraries, say
from actcache.cli.timing import StabilityClock
from actcache.study.run import check_complete, check_same_checkpoints
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    import torch

    from actcache.models.backbone import Backbone
    from actcache.models.lineup import Lineup

DTYPES = ("float32", "bfloat16")


def add_verbs(verbs: Verbs) -> None:
    """Add the verb of this module."""
    parser = add_verb(
        verbs,
        "stability",
        _stability,
        "count the events that other rounding would change: another shape of the batch, or another dtype",
        "actcache stability RUN --sample 100",
    )
    add_captured_arguments(parser)
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        default=DTYPES,
        metavar="LIST",
        help="dtypes to decide in: a list of float32, bfloat16 (default: both)",
    )
    parser.add_argument(
        "--sample", type=_sample, metavar="N|all", help="number of events to decide anew, evenly spread (default: all)"
    )
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="tokens per pack (default: as captured)")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run checks by itself, and what it leaves out of its effects."""
    parser.add_argument(
        "--stability",
        type=_sample_or_none,
        default=16,
        metavar="N|all|0",
        help="number of events, evenly spread, to check for changes by rounding (default %(default)s)",
    )
    parser.add_argument(
        "--stable-only",
        action="store_true",
        help="check all events, and leave out of the effects those that rounding changes in the run's dtype",
    )


def check_run(args: argparse.Namespace, folder: RunFolder, lineup: Lineup) -> None:
    """Check what the arguments of a run ask for, and say what was found."""
    if samples := samples_asked(args):
        for line in _check(folder, lineup, samples, None, args.device):
            say(line)


def samples_asked(args: argparse.Namespace) -> dict[str, int | None]:
    """How many events a run with these arguments checks in each dtype; None for all."""
    samples = {} if args.stability == 0 else dict.fromkeys(DTYPES, args.stability)
    return samples | ({args.dtype: None} if args.stable_only else {})


def summaries_of(folder: RunFolder) -> list[dict[str, Any]]:
    """What the report shows of the run's table; empty where there is none of its events."""
    from actcache.analyses.stability import read_stability, summarise

    return summarise(read_stability(folder.open_store(), folder.stability))


def _stability(args: argparse.Namespace) -> None:
    quiet_libraries()
    folder, lineup, device = open_captured(args)
    lines = _check(folder, lineup, dict.fromkeys(args.dtype, args.sample), args.max_tokens, device)
    print("\n".join(lines or ["no event to check"]))
    say(f"{folder.stability} holds them; 'actcache effects {args.run} --stable-only' leaves changed events out")


def _check(
    folder: RunFolder, lineup: Lineup, samples: Mapping[str, int | None], max_tokens: int | None, device: str
) -> list[str]:
    from actcache.analyses.stability import chosen_events, describe, run_stability, summarise
    from actcache.models.backbone import Backbone

    store = folder.open_store()
    check_complete(store)
    check_same_checkpoints(store, lineup)

    clock = StabilityClock(folder)
    with enough_memory("stability", "a lower --max-tokens needs less"), LiveLine("stability") as line:

        def load(label: str, dtype: torch.dtype) -> Backbone:
            loading = f"loading {label} in {str(dtype).removeprefix('torch.')}"
            with clock.loading(), enough_memory(loading, LESS_MODEL), line.during(loading):
                model = lineup.checkpoints[label].load(dtype, device)
                with lineup.checkpoints[label].named():
                    return Backbone(model)

        table = run_stability(
            store,
            load,
            folder.stability,
            samples,
            max_tokens=store.fingerprint.max_tokens if max_tokens is None else max_tokens,
            device=device,
            on_progress=line,
            say=say,
        )
    n_chosen = len(chosen_events(store))
    clock.write([n_chosen if n is None else min(n, n_chosen) for n in samples.values()])
    return describe(summarise(table), store.fingerprint.dtype)


def _sample(text: str) -> int | None:
    return None if text == "all" else positive(text)


def _sample_or_none(text: str) -> int | None:
    return 0 if text == "0" else _sample(text)


def _dtypes(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(DTYPES)}")
    return list(dict.fromkeys(names))
