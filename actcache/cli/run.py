"""The same study from Python: what ``actcache run`` does, by the same arguments."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from actcache.cli.arguments import add_process_arguments
from actcache.cli.parser import Parser
from actcache.cli.stages import add_all_arguments, run_study
from actcache.cli.terminal import be_quiet
from actcache.cpus import settle_threads

if TYPE_CHECKING:
    from actcache.study.run import Run


def run(
    *,
    prompts: str | Path | None = None,
    out: str | Path,
    pt: str | Path | None = None,
    it: str | Path | None = None,
    checkpoints: Mapping[str, str | Path] = MappingProxyType({}),
    pair: str | Sequence[str] | Sequence[tuple[str, str]] | None = None,
    support: str | None = None,
    rollout_tokens: int | None = None,
    events: str | Path | None = None,
    continuations: str | Path | None = None,
    store: str | None = None,
    boundary: str | float | Iterable[float] | None = None,
    sites: str | Mapping[str, str | int | Iterable[int]] | Iterable[str] = (),
    dtype: str | None = None,
    dequantize: bool = False,
    device: str | Iterable[str] | None = None,
    stream: bool = False,
    template: str | None = None,
    add_special_tokens: bool = True,
    max_new: int | None = None,
    limit: int | None = None,
    rows: str | None = None,
    codec: str | None = None,
    shard_prompts: int | None = None,
    scope: str | Iterable[str] | None = None,
    readout: str | Iterable[str] | None = None,
    sweep: str | Path | None = None,
    strict: bool = False,
    max_tokens: int | None = None,
    stability: int | str | None = None,
    stable_only: bool = False,
    resident: str | None = None,
    engine: str | None = None,
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Capture, grid, effects and report in one go; resumable by the same call.

    Each argument is an option of ``actcache run``, dashes as underscores; None leaves the option out, so that it has
    its default.

    Args:
        prompts: file of prompts, one JSON object per line, or a table.
        out: folder of the run.
        pt, it: folders of the checkpoints of a pair: short for ``checkpoints={"pt": ..., "it": ...}``.
        checkpoints: folders by label, in the order of the lineup.
        pair: the two labels whose choices define events: ``("base", "dpo")``; or several pairs, as a list of these.
        support: how events are chosen: ``first_divergence``, ``rollouts`` or ``fixed``.
        rollout_tokens: tokens of each rollout, at most.
        events: file of events, or folder of another run, of ``fixed``.
        continuations: file of what another engine had checkpoints write, for the search to propose.
        store: place of the store, as ``s3://bucket/prefix``.
        boundary: first late block: ``18``, ``0.6`` of the depth, ``[0.6, -3]`` or ``"all"``.
        sites: further rows to keep: ``{"mlp": [29, 30], "attention": "all"}``, or texts as ``--site`` takes them.
        dtype: of weights and states; ``auto``, the default, is the checkpoints' own.
        dequantize: whether quantized weights may be dequantized.
        device: to run on: ``cpu``, ``cuda``, ``["cuda:0", "cuda:1"]`` or ``auto``.
        stream: whether one block at a time is read from the files, for models larger than the memory.
        template: label of the checkpoint whose chat template renders messages, or ``none``.
        add_special_tokens: whether tokenizers put a BOS and its like before plain text.
        max_new: choices to compare per prompt, at most.
        limit: how many of the first prompts to use.
        rows: ``prefix``, which a run needs.
        codec: of the stored states.
        shard_prompts: prompts per segment.
        scope: ``prefix``, ``position`` or both.
        readout: final norms and heads that score: ``["native", "common_it"]``.
        sweep: file of boundaries, scopes, readouts and edits to score.
        strict: whether each sequence has a forward of its own.
        max_tokens: tokens per forward.
        stability: how many events to check for changes by rounding, or ``"all"``.
        stable_only: whether to leave out of the effects what rounding changes.
        resident: checkpoints in memory at once: ``one``, ``all``, or ``auto``, the default: all if they fit.
        engine: ``local``, or ``ray`` for workers of a Ray cluster.
        address: of that cluster.
        workers: how many of them.
        threads: of the CPU.
        quiet: whether stderr shows no progress.
        options: none; a name that is no option is an InputError, which says which one was probably meant.

    Returns:
        The run.

    Raises:
        InputError: an option that is none, or a value that it does not take; and as ``actcache run`` does.
    """
    apart = ("checkpoints", "pair", "sites", "options", "add_special_tokens")
    named = {name: value for name, value in locals().items() if name not in ("apart", *apart)}
    words = []
    for name, value in (named | options).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False and value is not None:
            words.append(f"{flag}={_text(value)}")
    words += [] if add_special_tokens else ["--add-special-tokens=no"]
    words += [f"--checkpoint={label}={path}" for label, path in checkpoints.items()]
    words += [f"--pair={_text(one)}" for one in _pairs(pair)]
    words += [f"--site={site}" for site in _sites(sites)]
    parser = Parser(prog="actcache.run")
    parser.raises = True
    add_all_arguments(parser)
    add_process_arguments(parser)
    args = parser.parse_args(words)
    args.command = shlex.join(["actcache", "run", *words])
    be_quiet(args.quiet)
    if args.threads is not None:
        settle_threads(args.threads)
    folder, _ = run_study(args)
    from actcache.study.run import Run  # here, so that the arguments are checked before torch is loaded

    return Run(folder.path)


def _sites(sites: str | Mapping[str, Any] | Iterable[str]) -> list[str]:
    """As ``--site`` takes them, one text for each."""
    if isinstance(sites, str):
        return [sites]
    return [f"{site}:{_text(blocks)}" for site, blocks in sites.items()] if isinstance(sites, Mapping) else [*sites]


def _pairs(pair: str | Sequence[str] | Sequence[tuple[str, str]] | None) -> Sequence[Any]:
    """Each as ``--pair`` takes it: one, or several."""
    if pair is None:
        return []
    return [pair] if isinstance(pair, str) or all(isinstance(one, str) and "," not in one for one in pair) else pair


def _text(value: Any) -> str:
    several = isinstance(value, Iterable) and not isinstance(value, str | Path)
    return ",".join(str(one) for one in value) if several else str(value)
