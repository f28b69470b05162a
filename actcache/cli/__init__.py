"""The command line: a verb per stage and per analysis. Progress on stderr, data on stdout.

Exit codes: 0 done, 1 a check failed (a corrupt store, a replay that is not a no-op), 2 bad input, in one line. Each
module adds its own verbs; what a verb needs beside the command line is imported when it runs.
"""

from __future__ import annotations

import importlib.metadata
import shlex
import sys
from collections.abc import Sequence

from actcache.cli import across, analyses, bench, plan, stages, stores, study
from actcache.cli.parser import Parser
from actcache.cli.terminal import be_quiet, one_line, reader_is_gone, said_by_system, say
from actcache.cpus import settle_threads
from actcache.errors import ActcacheError, CheckError, CorruptFileError, CorruptStoreError, KernelError
from actcache.progress import PartDone

_FAILED_CHECKS = (CheckError, CorruptFileError, CorruptStoreError, KernelError)
_VERBS_OF = (stages, analyses, study, across, plan, stores, bench)  # in the order of the help


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        args = build_parser().parse_args(words)
        args.command = shlex.join(["actcache", *words])
        be_quiet(args.quiet)
        settle_threads(args.threads)
        code = args.verb(args) or 0
        sys.stdout.flush()
        return code
    except SystemExit:  # --help, or a command that is none
        reader_is_gone()
        raise
    except PartDone as done:
        say(str(done))
        return 0
    except ActcacheError as error:
        print(f"actcache: {one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, _FAILED_CHECKS) else 2
    except OSError as error:
        if reader_is_gone():
            return 0
        print(f"actcache: {said_by_system(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("actcache: interrupted; what is committed stays, and the same command goes on from it", file=sys.stderr)
        return 130


def build_parser() -> Parser:
    """The parser of all verbs; tests walk it."""
    parser = Parser(
        prog="actcache",
        description="Activation cache for comparing checkpoints: upstream layers run once, late layers are replayed.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("actcache"))
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for module in _VERBS_OF:
        module.add_verbs(verbs)
    return parser
