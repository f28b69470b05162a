"""A captured run whose checkpoints are loaded again: where they are now, and that they are the ones captured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.cli.arguments import add_checkpoint_arguments, check_device, checkpoints_given
from actcache.errors import InputError
from actcache.study.run_folder import RunFolder, RunRecord

if TYPE_CHECKING:
    from actcache.models.lineup import Lineup


def add_captured_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and what may have moved since."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    add_checkpoint_arguments(parser, "present folder of a checkpoint, by its label (default: that of the capture)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="device to run on (default: that of the capture)")


def open_captured(args: argparse.Namespace) -> tuple[RunFolder, Lineup, str]:
    """The run that these arguments name, its checkpoints, and the device to load them on; no weights are read.

    What was dequantized for the capture is dequantized again: the store's fingerprint says whether it is the same.
    """
    from actcache.models.lineup import Lineup

    folder = RunFolder(args.run)
    record = folder.record()
    device = args.device or record.device
    check_device(device)
    return folder, Lineup.open({**record.checkpoints, **moved(args, record)}, dequantize=True), device


def moved(args: argparse.Namespace, record: RunRecord) -> dict[str, str]:
    """Where checkpoints are now, of those that the arguments say moved.

    Raises:
        InputError: the arguments name a checkpoint that the run does not have.
    """
    given = checkpoints_given(args)
    if unknown := sorted(given.keys() - record.checkpoints.keys()):
        raise InputError(f"checkpoint {unknown[0]} is not in the run; it has {', '.join(record.checkpoints)}")
    return given
