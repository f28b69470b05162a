"""A parser that says in one line what is wrong with a command, and what was probably meant."""

from __future__ import annotations

import argparse
import difflib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from actcache.errors import InputError
from actcache.store.far_path import path_at

# Groups of the help, in its order; an option that no group names is one of WHAT.
WHAT = "what to compute"
GROUPS = {
    "pair, run or store": (
        *("run", "source", "store", "--pt", "--it", "--checkpoint", "--pair", "--prompts", "--corpus", "--limit"),
    ),
    WHAT: (),
    "exactness": (
        *("--dtype", "--strict", "--max-tokens", "--stability", "--stable-only", "--min-gap", "--sample"),
        *("--keep-ties", "--null", "--draws", "--seed"),
    ),
    "where": (
        "--out",
        "--store",
        "--part",
        "--engine",
        "--address",
        "--workers",
        "--shard-prompts",
        "--device",
        "--threads",
        "--folder",
        "--json",
        "--quiet",
    ),
    "help": ("-h", "--version"),
}
_GROUP_OF = {name: title for title, names in GROUPS.items() for name in names}
_NEGATIVE_LIST = re.compile(r"-[0-9.]+(,-?[0-9.]+)*")


class _Formatter(argparse.HelpFormatter):
    """Keeps an example on a line of its own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        kind, _, command = text.partition(": ")
        return f"{kind}:\n  {command}" if kind == "example" else super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser that puts each option into its group of the help, and looks for mistyped verbs and options first.

    argparse finds these last, and may say before that another argument is missing.
    """

    raises = False
    later: Callable[[Parser], None] | None = None
    """Adds the arguments, when they are needed: what they follow from takes long to import."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**{"formatter_class": _Formatter, **more})

    def add_argument(self, *names: Any, **more: Any) -> argparse.Action:
        """As argparse's, in the option's group."""
        return self._group(_GROUP_OF.get(names[0], WHAT)).add_argument(*names, **more)

    def _group(self, title: str) -> argparse._ArgumentGroup:
        for group in self._action_groups:
            if group.title == title:
                return group
        group, order = self.add_argument_group(title), list(GROUPS)
        self._action_groups.sort(key=lambda one: order.index(one.title) if one.title in order else -1)
        return group

    def fill(self) -> None:
        """Add the arguments that were left for later."""
        if self.later is not None:
            later, self.later = self.later, None
            later(self)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Check the words, then parse them; exits with 2 where one is unknown."""
        self.fill()
        words = list(sys.argv[1:] if args is None else args)
        verbs = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        if verbs and words and not words[0].startswith("-"):
            known, kind = verbs[0].choices, str(verbs[0].metavar).lower()
            if words[0] not in known:
                self.error(f"there is no {kind} {words[0]!r}{_meant(words[0], known)}")
        elif not verbs:
            for word in itertools.takewhile(lambda word: word != "--", words):
                name = word.partition("=")[0]
                options = self._option_string_actions
                if name.startswith("--") and not any(option.startswith(name) for option in options):
                    self.error(f"there is no option {name}{_meant(name, options)}")
        return super().parse_known_args(self._with_negative_lists(words), namespace)

    def _with_negative_lists(self, words: Sequence[str]) -> list[str]:
        """``--boundary -3,-1`` as ``--boundary=-3,-1``: argparse takes what begins with a minus for an option."""
        joined: list[str] = []
        for word in words:
            before = self._option_string_actions.get(joined[-1]) if joined else None
            if before is not None and before.nargs != 0 and _NEGATIVE_LIST.fullmatch(word):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined

    def error(self, message: str) -> NoReturn:
        """One line, and exit code 2; InputError where the words are a program's."""
        if self.raises:
            raise InputError(message)
        self.exit(2, f"{self.prog}: {message}; '{self.prog} --help' lists what there is\n")


def _meant(word: str, known: Iterable[str]) -> str:
    bare = {name.lstrip("-"): name for name in known}  # what all have in common makes none alike
    close = difflib.get_close_matches(word.lstrip("-"), bare, n=1)
    return f"; did you mean {bare[close[0]]}?" if close else ""


def place(text: str) -> Path:
    """A folder or file of a disk or an object store; an address with a password is refused without being shown."""
    try:
        return path_at(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
