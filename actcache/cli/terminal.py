"""What a person sees: progress and notes on stderr, one line for an error."""

from __future__ import annotations

import sys

from tqdm import tqdm


def quiet_libraries() -> None:
    """transformers logs and draws bars of its own; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress(stage: str, unit: str, total: int) -> tqdm:
    """A bar on stderr; a context manager."""
    return tqdm(desc=stage, unit=f" {unit}", total=total, file=sys.stderr, dynamic_ncols=True, mininterval=0.5)


def say(line: str) -> None:
    """A note on stderr, above any bar."""
    tqdm.write(f"actcache: {line}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return printable(" ".join(str(error).split()))


def printable(text: str) -> str:
    """Text in which a file's name neither steers the terminal nor fails to be written."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
