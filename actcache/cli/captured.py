"""A captured run whose checkpoints are loaded again: where they are now, and how they are held in memory."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from actcache.cli.arguments import add_checkpoint_arguments, add_holding_arguments, checkpoints_given
from actcache.cli.parser import place
from actcache.errors import InputError
from actcache.study.run_folder import RunFolder, RunRecord

if TYPE_CHECKING:
    from actcache.models.lineup import Lineup


def add_captured_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, what may have moved since, and how its checkpoints are held."""
    parser.add_argument("run", type=place, metavar="RUN", help="folder of the run")
    add_checkpoint_arguments(parser, "present folder of a checkpoint, by its label (default: that of the capture)")
    add_holding_arguments(parser, "late stacks")


def open_captured(args: argparse.Namespace) -> tuple[RunFolder, Lineup]:
    """The run that these arguments name, and its checkpoints; no weights are read.

    What was dequantized for the capture is dequantized again: the store's fingerprint says whether it is the same.
    """
    from actcache.models.lineup import Lineup

    folder = RunFolder(args.run)
    record = folder.record()
    return folder, Lineup.open({**record.checkpoints, **moved(args, record)}, dequantize=True)


def moved(args: argparse.Namespace, record: RunRecord) -> dict[str, str]:
    """Where checkpoints are now, of those that the arguments say moved.

    Raises:
        InputError: the arguments name a checkpoint that the run does not have.
    """
    given = checkpoints_given(args)
    if unknown := sorted(given.keys() - record.checkpoints.keys()):
        raise InputError(f"checkpoint {unknown[0]} is not in the run; it has {', '.join(record.checkpoints)}")
    return given
