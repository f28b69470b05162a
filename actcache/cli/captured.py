"""A captured run whose checkpoints are loaded again: where they are now, and that they are the ones captured."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from actcache.cli.arguments import check_device
from actcache.errors import IncompatibleError, InputError
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.models.lineup import Lineup
    from actcache.store import Store


def add_captured_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, and what may have moved since."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--pt", type=Path, help="where the PT checkpoint is now (default: where capture found it)")
    parser.add_argument("--it", type=Path, help="where the IT checkpoint is now")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: where capture ran")


def open_captured(args: argparse.Namespace) -> tuple[RunFolder, Lineup, str]:
    """The run that these arguments name, its checkpoints, and the device to load them on; no weights are read."""
    from actcache.models.lineup import Lineup

    folder = RunFolder(args.run)
    record = folder.record()
    device = args.device or record.device
    check_device(device)
    paths = record.checkpoints | {label: path for label in ("pt", "it") if (path := getattr(args, label))}
    return folder, Lineup.open(paths), device


def check_complete(store: Store) -> None:
    """Fewer prompts than were asked for would give other means, and nobody would see why."""
    found = len({*store.events["prompt_id"].to_pylist(), *store.excluded["prompt_id"].to_pylist()})
    store.fingerprint.check_captured()
    asked = store.fingerprint.n_prompts
    if found != asked:
        raise InputError(
            f"{store.path} holds {found} of {asked} prompts: give the capture command again until all are captured"
        )
    store.check_prompts()


def check_same_checkpoints(store: Store, lineup: Lineup) -> None:
    """Raise IncompatibleError, naming the field, where a checkpoint is not the one whose states are stored."""
    for label, captured in store.fingerprint.checkpoints.items():
        checkpoint = lineup.checkpoints[label]
        now = checkpoint.fingerprint
        field = captured.differs_in(now)
        if field is not None:
            raise IncompatibleError(
                f"checkpoint {label} at {checkpoint.path} is not the one captured: its {field} is "
                f"{str(getattr(now, field, None))[:12]}, the store has {captured.to_json()[field][:12]}; "
                f"point --{label} at the captured one",
                field=f"checkpoints.{label}.{field}",
            )
