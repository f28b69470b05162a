"""What a run checks by itself: which of its events rounding would change."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from actcache.analyses import find_analysis
from actcache.cli.analyses import analyse
from actcache.cli.arguments import holding_asked, positive
from actcache.cli.terminal import say
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.models.lineup import Lineup
    from actcache.study.runner import Runner

DTYPES = ("float32", "bfloat16")


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


def check_run(args: argparse.Namespace, folder: RunFolder, lineup: Lineup, runner: Runner) -> None:
    """Check what the arguments of a run ask for, and say what was found."""
    if samples := samples_asked(args, folder.open_store().fingerprint.dtype):
        asked = ",".join(f"{dtype}={'all' if n is None else n}" for dtype, n in samples.items())
        analysis = find_analysis("stability")
        found = analyse(analysis, folder, holding_asked(args), runner, lineup=lineup, sample=asked)
        for line in analysis.lines(found) if found["groups"] else ():
            say(line)


def samples_asked(args: argparse.Namespace, dtype: str) -> dict[str, int | None]:
    """How many events a run in ``dtype`` with these arguments checks in each dtype; None for all."""
    samples = {} if args.stability == 0 else dict.fromkeys(DTYPES, args.stability)
    return samples | ({dtype: None} if args.stable_only else {})


def _sample_or_none(text: str) -> int | None:
    return 0 if text == "0" else None if text == "all" else positive(text)
