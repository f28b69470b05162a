"""Text and numbers as a reader can see them: white space, control and direction characters made visible.

Tokens are fragments: they start with spaces, are line ends, hold control characters or characters that reorder the
text around them. Knows strings and numbers, no HTML: escaping is the template's work.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

MINUS = "\u2212"
_NAMED = {" ": "\u00b7", "\n": "\u21b5", "\r": "\u240d", "\t": "\u21e5", "\x7f": "\u2421"}
_HOME = re.compile(r"(?<![\w/])/(home|Users)/[^/\s'\":,]+")
# Part of ordinary writing (Persian and Indic words, emoji), so running text keeps them: space and the two joiners.
_TEXT_ONLY = " \u200c\u200d"


class Piece(NamedTuple):
    """A run of text to show: ``mark`` tells a symbol that stands for a character from the character itself."""

    text: str
    mark: bool


def pieces(text: str, *, spaces: bool) -> list[Piece]:
    """Cut ``text`` into plain runs and marks, so that no character is invisible or acts on its surroundings.

    Line ends, tabs and control characters become one-character symbols; everything else that does not print
    (direction overrides, other spaces, lone surrogates, unassigned and private code points) becomes its code point in
    angle brackets. Spaces and joiners become marks with ``spaces`` only: tokens yes, running text no. The result can
    be encoded as UTF-8, whatever the text.
    """
    found: list[Piece] = []
    for mark, run in itertools.groupby(text, lambda character: _symbol(character, spaces)):
        characters = "".join(run)
        found += [Piece(characters, mark=False)] if mark is None else [Piece(mark, mark=True)] * len(characters)
    return found


def plain(text: str) -> str:
    """``text`` as one string with the symbols of :func:`pieces` in place, spaces kept."""
    return "".join(piece.text for piece in pieces(text, spaces=False))


def without_home(text: str) -> str:
    """``text`` with every home folder in a path as ``~``: a page is made to be shared, a person's name is not."""
    for home in {Path.home(), Path.home().resolve()} - {Path("/")}:
        text = text.replace(str(home), "~")
    return _HOME.sub("~", text)


def head(text: str, limit: int) -> str:
    """The first ``limit`` characters, with an ellipsis where more follow."""
    return text if len(text) <= limit else text[:limit] + "\u2026"


def tail(text: str, limit: int) -> str:
    """The last ``limit`` characters at most, from the start of a word, with an ellipsis where more came before."""
    if len(text) <= limit:
        return text
    last = text[-limit:]
    # A word longer than this is cut anyway: text without spaces must not vanish.
    cut = last.find(" ", 0, 24)
    return "\u2026" + last[cut + 1 :]


def decimals(values: Iterable[float | None]) -> int:
    """How many decimals one column of logits needs: two, more where its largest value is small."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest == 0 or largest >= 0.2:
        return 2
    return min(8, 1 - math.floor(math.log10(largest)))


def signed(value: float | None, places: int) -> str:
    """+1.68, or with a true minus sign; zero has no sign, and None is a dash."""
    if value is None:
        return "\u2013"
    rounded = f"{abs(value):,.{places}f}"
    if not any(digit in "123456789" for digit in rounded):
        return rounded
    return ("+" if value > 0 else MINUS) + rounded


def percent(value: float | None) -> str:
    """A share as 31.1%, or a dash for None."""
    if value is None:
        return "\u2013"
    rounded = f"{100 * abs(value):,.1f}%"
    return MINUS + rounded if value < 0 and rounded != "0.0%" else rounded


def _symbol(character: str, spaces: bool) -> str | None:
    if not spaces and character in _TEXT_ONLY:
        return None
    if character in _NAMED:
        return _NAMED[character]
    if character < " ":
        return chr(0x2400 + ord(character))
    return None if character.isprintable() else f"\u27e8U+{ord(character):04X}\u27e9"
