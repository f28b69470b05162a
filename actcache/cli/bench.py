"""The verb bench: the side-by-side benchmarks, on this machine."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from actcache.cli.arguments import Verbs, add_verb
from actcache.errors import CheckError, InputError
from actcache.files import write_atomically

BENCHES = ("gather", "linear", "codec", "store", "feed")


def add_verbs(verbs: Verbs) -> None:
    """Add the verb of this module."""
    bench = add_verb(
        verbs,
        "bench",
        _bench,
        "measure gather, linear, codec, store and feed on this machine, beside their rivals",
        "actcache bench store feed --out results.json",
    )
    bench.add_argument(
        "names",
        nargs="*",
        type=_bench_name,
        metavar="NAME",
        help=f"benches to run: {', '.join(BENCHES)} (default: all)",
    )
    bench.add_argument(
        "--folder", type=Path, metavar="DIR", help="folder on the disk to measure (default: the system's temporary one)"
    )
    bench.add_argument("--out", type=Path, metavar="JSON", help="file for the figures, one object per bench")
    bench.add_argument("--smoke", action="store_true", help="use sizes of seconds, to see that everything runs")


def _bench(args: argparse.Namespace) -> int:
    package = Path(__file__).parent.parent
    # In a checkout the benches stand beside the package, in an installation inside it.
    folder = next(
        path for path in (package / "benches", package.parent / "benches") if (path / "bench_store.py").is_file()
    )
    environment = os.environ | ({"TMPDIR": str(args.folder)} if args.folder else {})
    if args.folder and not args.folder.is_dir():
        raise InputError(f"--folder {args.folder} is not a folder")
    if args.out and not args.out.absolute().parent.is_dir():
        raise InputError(f"--out {args.out}: its folder is not there; make it first")
    results = []
    for name in args.names or BENCHES:
        print(f"\n== {name} ==", flush=True)
        command = [sys.executable, str(folder / f"bench_{name}.py"), *(["--smoke"] if args.smoke else [])]
        lines: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as ran:
            for line in ran.stdout or ():
                lines.append(line)
                if not line.startswith("{"):
                    print(line, end="", flush=True)
        if ran.returncode:
            raise CheckError(f"bench {name} ended with exit code {ran.returncode}")
        results.append(json.loads(lines[-1]))
    if args.out:
        write_atomically(args.out, json.dumps(results, indent=1).encode() + b"\n")
    else:
        print()
        print(json.dumps(results))
    return 0


def _bench_name(text: str) -> str:
    if text not in BENCHES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(BENCHES)}")
    return text
