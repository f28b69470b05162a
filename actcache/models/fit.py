"""Fit: whether the weights of several checkpoints are in memory at once, or those of one after another.

Knows shapes of models and what is free on devices; loads nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from actcache.models.checkpoint import DTYPES
from actcache.models.cost import ModelShape
from actcache.models.lineup import Lineup
from actcache.room import free_bytes

# The share of the memory that is free which weights may take: the rest is for a batch.
FOR_WEIGHTS = 0.8


def are_together(
    resident: str,
    lineup: Lineup,
    dtype: str,
    devices: Mapping[str, str],
    *,
    first: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> bool:
    """Whether all checkpoints are in memory at once.

    Args:
        resident: ``one``, ``all``, or ``auto``, which is all if they fit.
        lineup: the checkpoints.
        dtype: of their weights.
        devices: of each, by label.
        first: block from which on they are loaded: of late stacks, their boundary.
        say: told, in one line, which do not fit.
    """
    if resident != "auto":
        return resident == "all"
    for device in dict.fromkeys(devices.values()):
        labels = [label for label in lineup.labels if devices[label] == device]
        shapes = (ModelShape.of_checkpoint(lineup.checkpoints[label]) for label in labels)
        needed, free = sum(_n_weights(shape, first) for shape in shapes) * DTYPES[dtype].itemsize, free_bytes(device)
        if needed > FOR_WEIGHTS * free:
            what = f"blocks {first} to {lineup.n_blocks - 1}" if first else "the weights"
            say(
                f"one checkpoint in memory at a time: on {device} {what} of {', '.join(labels)} take "
                f"{needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB that are free; --resident all loads all"
            )
            return False
    return True


def _n_weights(shape: ModelShape, first: int) -> int:
    return sum(shape.block_parameters[first:]) + shape.readout_parameters if first else shape.n_parameters
