"""Token classes: whether a token is layout, steers the reply, or says something. Knows texts; knows no models.

A token has one of three classes, the first that fits:

- ``format``: no letter and no digit in its text (white space, punctuation, markup), or a special token.
- ``discourse``: a word that steers a reply more than it says something (*sure*, *however*, *first*, *please*).
- ``content``: every other one, parts of words too.

A *marker* is a token with which an assistant's reply begins (*Sure*, *Certainly*, *Here*, *I*), whatever its class.

The lists are English and short: they describe a support, and decide nothing else. A file of regular expressions takes
their place:

    format = ['^\\W*$']
    discourse = ['^(sure|well|so)$']

Each is searched in the token's text without the white space around it, without regard to case.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from actcache.errors import InputError
from actcache.files import no_file

FORMAT, DISCOURSE, CONTENT = "format", "discourse", "content"
CLASSES = (CONTENT, FORMAT, DISCOURSE)

_DISCOURSE = (
    "absolutely|actually|additionally|alright|also|although|anyway|apologies|basically|because|besides|but|certainly|"
    "consequently|definitely|finally|first|firstly|furthermore|great|hello|hence|here|hey|hi|hmm|however|indeed|instead|"
    "just|lastly|let|let's|likewise|maybe|meanwhile|moreover|nevertheless|next|nonetheless|no|now|obviously|ok|okay|"
    "otherwise|overall|perhaps|please|probably|rather|really|second|secondly|similarly|since|so|sorry|still|sure|thank|"
    "thanks|then|therefore|third|thirdly|though|thus|ultimately|unfortunately|welcome|well|whereas|while|yeah|yes|yet"
)
_MARKERS = (
    "absolutely|alright|apologies|as|certainly|definitely|dear|great|greetings|happy|hello|here|here's|hey|hi|i|i'd|"
    "i'll|i'm|let|let's|no|of|ok|okay|please|sorry|sure|thank|thanks|to|unfortunately|welcome|yes|you're"
)
_FORMAT_PATTERN = r"^[\W_]*$"


def is_marker(text: str) -> bool:
    """Whether a token's text is one with which an assistant's reply begins."""
    return re.fullmatch(_MARKERS, text.strip(), re.IGNORECASE) is not None


@dataclass(frozen=True)
class TokenClasses:
    """Which texts are of which class.

    Attributes:
        patterns: regular expressions by class, ``format`` before ``discourse``.
    """

    patterns: Mapping[str, Sequence[str]] = field(
        default_factory=lambda: {FORMAT: (_FORMAT_PATTERN,), DISCOURSE: (f"^({_DISCOURSE})$",)}
    )

    def of(self, text: str, *, special: bool = False) -> str:
        """The class of a token by its text; a special token is ``format``."""
        if special:
            return FORMAT
        for name in (FORMAT, DISCOURSE):
            if any(re.search(one, text.strip(), re.IGNORECASE) for one in self.patterns.get(name, ())):
                return name
        return CONTENT


def read_token_classes(path: str | Path) -> TokenClasses:
    """The classes that a TOML file describes; a class that it does not name keeps its own patterns.

    Raises:
        InputError: there is no such file, it is not TOML, it names another class, or a value is no list of regular
            expressions.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{no_file(path, 'file of token classes')}; give a TOML file with lists of patterns")
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not TOML ({str(error)[:200]})") from error
    for name, patterns in given.items():
        if name not in (FORMAT, DISCOURSE):
            raise InputError(f"{path}: {name[:40]!r} is no class of tokens; give {FORMAT} and {DISCOURSE}")
        if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
            raise InputError(f"{path}: {name} is not a list of regular expressions")
        for one in patterns:
            try:
                re.compile(one)
            except re.error as error:
                raise InputError(f"{path}: {one[:40]!r} of {name} is no regular expression: {error}") from error
    return TokenClasses({**TokenClasses().patterns, **given})
