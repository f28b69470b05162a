"""The command line: one verb a stage. Progress on stderr, data on stdout.

Exit codes: 0 done, 1 a check failed (a corrupt store, a replay that is not a no-op), 2 bad input, in one line. Each
module adds its own verbs; what a verb needs beside the command line is imported when it runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence

from actcache.cli import bench, plan, stability, stages, stores
from actcache.cli.terminal import be_quiet, one_line
from actcache.errors import ActcacheError, CheckError, CorruptStoreError, KernelError

_FAILED_CHECKS = (CheckError, CorruptStoreError, KernelError)
_VERBS_OF = (stages, stability, plan, stores, bench)  # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    be_quiet(args.quiet)
    try:
        return args.verb(args) or 0
    except ActcacheError as error:
        print(f"actcache: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, _FAILED_CHECKS) else 2
    except OSError as error:
        print(f"actcache: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("actcache: interrupted; the same command goes on from the last committed shard", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; tests walk it."""
    parser = argparse.ArgumentParser(
        prog="actcache",
        description="Activation cache for comparing checkpoints: upstream layers run once, late layers are replayed.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("actcache"))
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for module in _VERBS_OF:
        module.add_verbs(verbs)
    return parser
