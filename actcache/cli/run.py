"""The same study from Python: what ``actcache run`` does, by the same arguments."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from actcache.cli.parser import Parser
from actcache.cli.stages import add_all_arguments, run_study
from actcache.cli.terminal import be_quiet

if TYPE_CHECKING:
    from actcache.study.run import Run


def run(
    *,
    prompts: str | Path,
    out: str | Path,
    checkpoints: Mapping[str, str | Path] = MappingProxyType({}),
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Capture, grid, effects and report in one go; resumable by the same call.

    Args:
        prompts: file of prompts, one JSON object per line.
        out: folder of the run.
        checkpoints: folders by label, in the order of the lineup; the options ``pt`` and ``it`` are the short form.
        quiet: whether stderr shows no progress.
        options: those of ``actcache run``, dashes as underscores: ``pt="DIR"``, ``it="DIR"``, ``pair=("base", "dpo")``,
            ``boundary=18`` or ``[0.6, -3]``, ``dtype="bfloat16"``, ``max_new=64``, ``strict=True``,
            ``sweep="edits.toml"`` and so on.

    Returns:
        The run.

    Raises:
        InputError: an option that is none, or a value that it does not take; and as ``actcache run`` does.
    """
    from actcache.study.run import Run

    parser = Parser(prog="actcache.run")
    parser.raises = True
    add_all_arguments(parser)
    words = [f"--prompts={prompts}", f"--out={out}"]
    words += [f"--checkpoint={label}={path}" for label, path in checkpoints.items()]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words.append(f"{flag}={_text(value)}")
    be_quiet(quiet)
    args = parser.parse_args(words)
    args.command = shlex.join(["actcache", "run", *words])
    folder, _ = run_study(args)
    return Run(folder.path)


def _text(value: Any) -> str:
    several = isinstance(value, Iterable) and not isinstance(value, str | Path)
    return ",".join(str(one) for one in value) if several else str(value)
