"""Where the jobs of a stage run, as a command says it: here, a part of them, or on a cluster."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.cli.arguments import positive
from actcache.cli.terminal import say
from actcache.errors import InputError

if TYPE_CHECKING:
    from actcache.study.holding import Holding
    from actcache.study.runner import Runner


def add_part_argument(parser: argparse.ArgumentParser) -> None:
    """Which segments are a process's own."""
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="work on segments I, I+N, I+2N and so on only, counted from 1; others run the other parts",
    )


def _part(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 1 <= I <= N")
    return int(i) - 1, int(n)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Where jobs run, and which are a process's own."""
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where jobs run: in this process, or by workers of a Ray cluster (default %(default)s)",
    )
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        help="Ray cluster of --engine ray, as HOST:6379 or auto (default: that of RAY_ADDRESS, else one begun here)",
    )
    parser.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="workers of --engine ray (default: one for each GPU, or for each machine where there is none)",
    )


def is_on_ray(args: argparse.Namespace) -> bool:
    """Whether the arguments ask for a cluster.

    Raises:
        InputError: they ask for something of a cluster, and for none; or for a part, which a cluster does not take.
    """
    on_ray = getattr(args, "engine", "local") == "ray"
    for flag in ("address", "workers"):
        if getattr(args, flag, None) is not None and not on_ray:
            raise InputError(f"--{flag} is of --engine ray: give both")
    if on_ray and getattr(args, "part", None) is not None:
        raise InputError("--engine ray shares the jobs by itself: leave out --part")
    return on_ray


def runner_asked(args: argparse.Namespace, run: Path, holding: Holding, moved: Mapping[str, str]) -> Runner:
    """Where the arguments have jobs run; close it.

    Args:
        args: of the command.
        run: folder of the run.
        holding: of the checkpoints.
        moved: where they are now, of those that moved.

    Raises:
        InputError: see :func:`is_on_ray`.
    """
    from actcache.study.part import Part
    from actcache.study.runner import Runner

    if is_on_ray(args):
        from actcache.study.cluster import Cluster

        how: dict[str, Any] = {"address": args.address, "workers": args.workers, "threads": args.threads, "say": say}
        return Cluster(run, holding, checkpoints=moved, **how)
    return Runner() if getattr(args, "part", None) is None else Part(*args.part)
