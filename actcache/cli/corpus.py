"""Capture of a corpus: rows of plain texts by all checkpoints, for SAEs, crosscoders and probes; no events."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actcache.cli.arguments import capture_settings, checkpoints_given, holding_asked, positive, rendering_asked
from actcache.cli.memory import LESS_MODEL, enough_memory
from actcache.cli.runners import runner_asked
from actcache.cli.terminal import LiveLine, quiet_libraries, say
from actcache.errors import InputError
from actcache.study.run_folder import run_at

if TYPE_CHECKING:
    from actcache.models.lineup import Lineup
    from actcache.store import Store

# What only a search for events takes, by the name of its argument, and its default.
_OF_EVENTS = {
    "prompts": None,
    "events": None,
    "continuations": None,
    "pair": None,
    "max_new": None,
    "rollout_tokens": None,
    "support": "first_divergence",
    "rows": "prefix",
}


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """The texts, and how much of them is read."""
    parser.add_argument(
        "--corpus",
        type=Path,
        metavar="TEXTS.jsonl",
        help="texts whose rows are kept, without events: a file as of --prompts; --out is then a store, or a RUN for "
        "RUN/corpus",
    )
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="N",
        help="rows to keep of --corpus at least, special tokens not counted; no text is cut there (default: all)",
    )
    parser.add_argument(
        "--context", type=positive, metavar="N", help="tokens of each text of --corpus to read, at most (default 512)"
    )


def check_no_corpus(args: argparse.Namespace) -> None:
    """Raise InputError where what is said of a corpus stands without one."""
    for name in ("tokens", "context"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is of the texts of --corpus: give it, or leave --{name} out")


def capture_corpus(args: argparse.Namespace) -> None:
    """Capture the texts that the arguments name; resumed and extended by the same command."""
    from actcache.prompts import read_prompts

    for name, default in _OF_EVENTS.items():
        if getattr(args, name) != default:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"--corpus keeps rows of texts, without events: leave {flag} out")
    if args.boundary is None and not args.site:
        raise InputError("--corpus: say which rows to keep, such as --site mlp:29,30, or states by --boundary 18")
    run = run_at(args.out)
    place = args.store or (args.out if run is None else run.corpus)
    prompts = read_prompts(args.corpus, args.limit, args.shard_prompts)
    quiet_libraries()
    from actcache.capture.corpus import CONTEXT, Texts
    from actcache.store import open_store
    from actcache.study.capture import capture
    from actcache.study.held import Held

    lineup = _lineup(args)
    settings = capture_settings(args, lineup, say, corpus=place)
    rendering = rendering_asked(args, lineup)
    texts = Texts(lineup, prompts, rendering, say, context=args.context or CONTEXT, n_rows=args.tokens)
    less = "a lower --max-tokens or --shard-prompts, in a new store, needs less; so does --resident one, or --stream"
    with enough_memory("capture", less), LiveLine("capture") as line:

        def watch(label: str, load: Callable[[], Any]) -> Any:
            with enough_memory(f"loading {label}", LESS_MODEL), line.during(f"loading {label}"):
                return load()

        how: dict[str, Any] = {"rendering": rendering, "texts": texts, "part": args.part or (0, 1), "watch": watch}
        held = Held(lineup, holding_asked(args))
        beside = args.out.parent
        folder = beside if isinstance(beside, Path) and beside.is_dir() else None
        with closing(runner_asked(args, args.out, held.holding, {})) as runner:
            how["elsewhere"] = runner if runner.is_elsewhere else None
            capture(lineup, prompts, place, settings, **how, on_progress=line, say=say, held=held, folder=folder)
    say(_holds(open_store(place)))


def _lineup(args: argparse.Namespace) -> Lineup:
    """The checkpoints given, or those of the run that the corpus is for; one is enough."""
    from actcache.models.lineup import Lineup
    from actcache.store.layout import check_name

    run = run_at(args.out)
    paths = {**({} if run is None else run.record().checkpoints), **checkpoints_given(args)}
    if not paths:
        raise InputError("--corpus: give --checkpoint LABEL=DIR for each checkpoint, or the folder of a run as --out")
    for label in paths:
        check_name(label, "checkpoint label")
    return Lineup.open(paths, dequantize=args.dequantize)


def _holds(store: Store) -> str:
    """What a corpus holds, in words."""
    from actcache.store.corpus import held_out
    from actcache.store.rows import StoreRows

    texts = store.sequences["prompt_id"].to_pylist()
    n_held_out = sum(map(held_out, texts))
    return (
        f"{store.path} holds {StoreRows(store, 'all').n_rows:,} rows of {len(texts):,} texts, {n_held_out:,} of them "
        "held out"
    )
