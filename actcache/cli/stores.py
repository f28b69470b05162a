"""The verbs upon a store: inspect, verify, export and compact."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from actcache.analyses import EVERY
from actcache.cli.arguments import Verbs, add_verb, numbers, positive
from actcache.cli.memory import enough_memory
from actcache.cli.terminal import LiveLine, one_line, printable
from actcache.errors import InputError
from actcache.study.run_folder import CheckedFiles, RunFolder, open_store, run_at, store_place


def add_verbs(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    inspect = add_verb(
        verbs,
        "inspect",
        _inspect,
        "show what a store holds, or what gathers and multiplies here",
        "actcache inspect RUN",
    )
    inspect.add_argument("store", nargs="?", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    inspect.add_argument(
        "--engine", action="store_true", help="show what gathers rows on each device, and what multiplies in packs"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = add_verb(
        verbs,
        "verify",
        _verify,
        "read a whole store again, and name everything that is not as committed",
        "actcache verify RUN",
    )
    verify.add_argument("store", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="set damaged segments aside, so that the others can be read and these captured again",
    )

    export = add_verb(
        verbs,
        "export",
        _export,
        "write states, token ids and events as files for other tools",
        "actcache export RUN --to npy --out states --checkpoint it --events 0:100",
    )
    export.add_argument("store", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    export.add_argument("--to", required=True, choices=["safetensors", "npy", "arrow"], help="format of the files")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    export.add_argument(
        "--checkpoint", action="append", metavar="LABEL", help="checkpoint to export; repeat for more (default: all)"
    )
    export.add_argument(
        "--boundary", type=numbers, metavar="5,10", help="boundaries to export, of those stored (default: all)"
    )
    export.add_argument(
        "--site",
        choices=["state", "attention", "mlp"],
        default="state",
        help="site of the rows; --boundary names blocks of attention or mlp (default %(default)s)",
    )
    export.add_argument(
        "--events", metavar="0,5,9|100:200", help="events to export: numbers, or a range (default: all)"
    )

    compact = add_verb(
        verbs,
        "compact",
        _compact,
        "merge small segments of a store into larger ones, while readers go on",
        "actcache compact RUN --max-mb 512",
    )
    compact.add_argument("store", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    compact.add_argument(
        "--max-mb",
        type=positive,
        default=1024,
        metavar="MB",
        help="size of a merged segment's states, uncompressed, at most (default %(default)s)",
    )


def _inspect(args: argparse.Namespace) -> None:
    if args.engine:
        from actcache.models.gather import describe_engines
        from actcache.models.linear import describe_products

        print(*describe_engines(), describe_products(), sep="\n")
    if args.store is None:
        if not args.engine:
            raise InputError("give a store or the folder of a run, or --engine")
        return
    summary = open_store(args.store).summary()
    if args.json:
        print(json.dumps(summary, indent=1))
        return
    for name, value in _flat(summary):
        print(f"{name:32} {value}")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            line for key, inner in value.items() for line in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(str(item) for item in value))]
    return [(prefix, value)]


def _verify(args: argparse.Namespace) -> int:
    from actcache.store import repair, verify

    place = store_place(args.store)
    with LiveLine("verify") as line:
        problems = (repair if args.repair else verify)(place, line)
    for problem in problems:
        print(printable(str(problem)))
    if args.repair:
        left = verify(place)
        dropped = sorted({problem.segment for problem in problems} - {problem.segment for problem in left})
        if dropped:
            print(f"set aside: {', '.join(dropped)}; give the same capture command to write them anew")
        problems = left
    run = run_at(args.store)
    n_damaged = 0
    if run is not None:
        files = run.check_files([named.stem for named in EVERY])
        n_damaged = len(files.wrong)
        for error in files.wrong:
            print(one_line(error))
        print(printable(_said_of_files(run, files)))
    if problems or n_damaged:
        print(f"{args.store}: {len(problems) + n_damaged} problems", file=sys.stderr)
        return 1
    print(f"{place}: every committed byte is as written")
    return 0


def _said_of_files(run: RunFolder, files: CheckedFiles) -> str:
    """Which files of a run are as written, and which cannot be checked, in one line."""

    def named(paths: list[Path]) -> str:
        names = [path.name for path in paths if path.parent == run.path]
        folders = Counter(path.parent.relative_to(run.path) for path in paths if path.parent != run.path)
        return ", ".join([*names, *(f"{n} of {folder}/" for folder, n in folders.items())]) or "none"

    said = f"{run.path}: as written are {named(files.whole)}"
    if files.without_seal:
        said += f"; an earlier version's, which cannot be checked: {named(files.without_seal)}"
    return said


def _export(args: argparse.Namespace) -> None:
    from actcache.store.export import export, parse_events

    store = open_store(args.store)
    events = None if args.events is None else parse_events(args.events)
    with LiveLine("export") as line:
        export(
            store,
            args.out,
            args.to,
            checkpoints=args.checkpoint,
            boundaries=args.boundary,
            site=args.site,
            events=events,
            on_progress=line,
        )
    print(args.out)


def _compact(args: argparse.Namespace) -> None:
    from actcache.store import compact

    place = store_place(args.store)
    less = "a lower --max-mb needs less: one merged segment is in memory at a time"
    with enough_memory("compact", less), LiveLine("compact") as line:
        before, after = compact(place, args.max_mb * 2**20, on_progress=line)
    print(f"{place}: {before} segments before, {after} now")
