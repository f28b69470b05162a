"""Arguments that several verbs share, and the types of their values."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from actcache.cli.parser import Parser, place
from actcache.errors import InputError
from actcache.schema import ROLES
from actcache.study.holding import Holding

if TYPE_CHECKING:
    from actcache.analyses.grid import GridSettings
    from actcache.capture.settings import CaptureSettings
    from actcache.models.lineup import Lineup
    from actcache.models.templates import Rendering

READOUTS = "native,common_it,common_pt"
BOUNDARY = "0.6"
Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, example: str
) -> Parser:
    """Give the parser a verb; ``run`` gets its arguments and returns the exit code (None: 0)."""
    description = summary[0].upper() + summary[1:] + "."
    parser: Parser = verbs.add_parser(name, help=summary, description=description, epilog=f"example: {example}")
    add_process_arguments(parser)
    parser.set_defaults(verb=run)
    return parser


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """What every verb takes: how much it says, and how many threads it has."""
    parser.add_argument("--quiet", action="store_true", help="print errors only on stderr, no progress and no notes")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads of the CPU (default: torch's own number, or fewer where this process may use fewer CPUs)",
    )


def add_capture_arguments(parser: argparse.ArgumentParser) -> None:
    """What a capture needs: the checkpoints, the prompts or events, where to, and what to compute."""
    add_lineup_arguments(parser)
    parser.add_argument(
        "--events",
        type=place,
        metavar="FILE.jsonl|RUN",
        help="events of --support fixed: per line prompt_id, prompt or token_ids, position, y_pt and y_it; "
        "or those of another run",
    )
    parser.add_argument(
        "--continuations",
        type=Path,
        metavar="FILE.jsonl",
        help="what another engine had checkpoints write, taken for proposals in place of a search: per line prompt_id, "
        "label and token_ids",
    )
    parser.add_argument(
        "--out", type=place, required=True, metavar="RUN", help="folder of the run, or s3://bucket/prefix"
    )
    parser.add_argument("--store", metavar="URL", help="place of the store, as s3://bucket/prefix (default RUN/store)")
    add_capture_settings(parser, fixed=True)


def add_lineup_arguments(parser: argparse.ArgumentParser) -> None:
    """The checkpoints, which pairs of them define events, and the prompts."""
    add_checkpoint_arguments(
        parser,
        "checkpoint under a label: a model folder, an id of the Hub (ORG/NAME[@REVISION]), or BASE+ADAPTER; repeat for "
        "each, in their order",
    )
    parser.add_argument(
        "--pair",
        type=pair,
        action="append",
        metavar="A,B",
        help="labels of the two checkpoints whose choices define events (default: the first and the last); repeat for "
        "the events of several pairs",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="P.jsonl",
        help="prompts, one JSON object per line, or a CSV or Parquet table with a column prompt",
    )
    parser.add_argument(
        "--template",
        metavar="LABEL",
        help="checkpoint whose chat template renders the messages of prompts, for all checkpoints: a label, pt or it; "
        "none takes the content of a single message as it is",
    )
    parser.add_argument(
        "--add-special-tokens",
        choices=["yes", "no"],
        default="yes",
        help="whether tokenizers put before a plain text what they put before every text, such as a BOS (default "
        "%(default)s); a template puts its own",
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser, summary: str) -> None:
    """Where checkpoints are, by label; :func:`checkpoints_given` reads them."""
    parser.add_argument("--checkpoint", type=_labelled, action="append", metavar="LABEL=DIR", help=summary)
    for role, words in zip(ROLES, ("pretrained checkpoint, the first", "tuned checkpoint, the last"), strict=True):
        parser.add_argument(f"--{role}", metavar="DIR", help=f"short for --checkpoint {role}=DIR: the {words}")


def checkpoints_given(args: argparse.Namespace, *, fewest: int = 0) -> dict[str, str]:
    """What is given for each checkpoint, by label, in the order of the lineup.

    Raises:
        InputError: a label is given twice, or fewer are given.
    """
    first, last = ([(role, path)] if (path := getattr(args, role)) else [] for role in ROLES)
    given = [*first, *(args.checkpoint or ()), *last]
    twice = [label for label, n in Counter(label for label, _ in given).items() if n > 1]
    if twice:
        raise InputError(f"checkpoint {twice[0]} is given twice; give each checkpoint a label of its own")
    if len(given) < fewest:
        missing = ", ".join(f"--{role}" for role in ROLES if getattr(args, role) is None)
        raise InputError(
            f"the following arguments are required: {missing}, or --checkpoint LABEL=DIR for each of two or more"
        )
    return dict(given)


def open_lineup(args: argparse.Namespace, *, with_weights: bool = True) -> Lineup:
    """The checkpoints that a command names, opened and aligned.

    Raises:
        InputError: fewer than two are given, a label cannot be a folder's name, or see ``Lineup.open``.
        IncompatibleError: see there.
    """
    from actcache.models.lineup import Lineup
    from actcache.store.layout import check_name

    paths = checkpoints_given(args, fewest=2)
    for label in paths:
        check_name(label, "checkpoint label")
    return Lineup.open(paths, args.pair, with_weights=with_weights, dequantize=args.dequantize)


def rendering_asked(args: argparse.Namespace, lineup: Lineup) -> Rendering:
    """How the arguments ask prompts to become texts (errors as ``Lineup.rendering``)."""
    return lineup.rendering(args.template, add_special_tokens=args.add_special_tokens == "yes")


def _labelled(text: str) -> tuple[str, str]:
    label, separator, path = text.partition("=")
    if not (label and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=DIR, such as base=models/base")
    return label, path


def pair(text: str) -> tuple[str, str]:
    """``base,dpo``: two labels."""
    first, separator, second = text.partition(",")
    if not (first.strip() and separator and second.strip()) or "," in second:
        raise argparse.ArgumentTypeError(f"{text!r} is not two labels, such as base,dpo")
    return first.strip(), second.strip()


def add_capture_settings(parser: argparse.ArgumentParser, *, fixed: bool = False) -> None:
    """What a capture computes; :func:`capture_settings` reads it, with ``--strict`` and ``--max-tokens``.

    ``fixed`` says whether events may be given.
    """
    others = ", or fixed by --events" if fixed else ""
    parser.add_argument(
        "--support",
        choices=["first_divergence", "rollouts", *(["fixed"] if fixed else [])],
        default="first_divergence",
        help="way to choose events: where a pair first diverges, along the greedy rollouts of both of its checkpoints"
        f"{others} (default %(default)s)",
    )
    parser.add_argument(
        "--rollout-tokens",
        type=positive,
        metavar="N",
        help="tokens of each rollout of --support rollouts, at most (default 64)",
    )
    parser.add_argument(
        "--boundary",
        metavar="B",
        help=f"first late block: 18, 0.6 of the depth, -3 from the end, a list of these, or all (default {BOUNDARY})",
    )
    parser.add_argument(
        "--site",
        action="append",
        default=[],
        metavar="SITE:BLOCKS",
        help="further rows to keep, of what attention or MLP gives: mlp:29,30 or attention:all, or of states: state:5; "
        "repeat for more",
    )
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="dtype of weights and states; auto: that of the run where there is one, else the checkpoints' own, or "
        "float32 where they differ (default %(default)s)",
    )
    parser.add_argument(
        "--dequantize",
        action="store_true",
        help="read quantized weights (fp8, mxfp8, mxfp4) as numbers of the run's dtype, on every device",
    )
    add_holding_arguments(parser, "checkpoints", "cpu")
    parser.add_argument(
        "--max-new",
        type=positive,
        metavar="N",
        help="number of choices to compare per prompt, at most (default 128)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use the first N prompts only")
    parser.add_argument(
        "--rows",
        choices=["prefix", "divergence"],
        default="prefix",
        help="positions whose rows are kept: all, as the grid needs, or the event's (default %(default)s)",
    )
    parser.add_argument(
        "--codec",
        choices=["blosc", "actcache.bf16_planes"],
        default="blosc",
        help="codec of the stored states: any Zarr reader has blosc; the planes are smaller and faster, for bfloat16 "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--shard-prompts",
        type=positive,
        default=64,
        metavar="N",
        help="prompts per segment of the store (default %(default)s)",
    )


def capture_settings(
    args: argparse.Namespace,
    lineup: Lineup,
    say: Callable[[str], None] = lambda line: None,
    *,
    corpus: str | Path | None = None,
) -> CaptureSettings:
    """What the arguments ask of a capture of these checkpoints.

    ``say`` is told, in one line each, what a person should know of the numbers that weights become. ``corpus`` is the
    store of one, which has no boundary unless it is asked for.

    Raises:
        InputError: a boundary is not one of the model; or lengths are given of another support.
    """
    from actcache.capture.settings import CaptureSettings, parse_boundaries, parse_sites
    from actcache.models.devices import kind_of
    from actcache.store.layout import STATE

    max_new = choices_compared(args)
    dtype = _dtype_asked(args, lineup, say, corpus)
    for label, checkpoint in lineup.checkpoints.items():
        if checkpoint.quantization is not None:
            say(f"checkpoint {label}: its weights in {checkpoint.quantization.method} are dequantized to {dtype}")
    boundary = BOUNDARY if args.boundary is None and corpus is None else args.boundary
    boundaries = () if boundary is None else parse_boundaries(boundary, lineup.n_blocks)
    sites = parse_sites(args.site, lineup.n_blocks)
    return CaptureSettings(
        boundaries=tuple(dict.fromkeys([*boundaries, *(block for site, block in sites if site == STATE)])),
        dtype=dtype,
        device=kind_of(args.device),
        max_new=max_new,
        row_selection=args.rows,
        strict=args.strict,
        max_tokens=CaptureSettings.max_tokens if args.max_tokens is None else args.max_tokens,
        shard_prompts=args.shard_prompts,
        codec=args.codec,
        support=args.support,
        sites=tuple(one for one in sites if one[0] != STATE),
    )


def choices_compared(args: argparse.Namespace) -> int:
    """How many choices per prompt are compared, at most.

    Raises:
        InputError: a length is given that belongs to another support.
    """
    from actcache.capture.settings import CaptureSettings
    from actcache.capture.supports import ROLLOUT_TOKENS, ROLLOUTS

    if args.support == ROLLOUTS:
        if args.max_new is not None:
            raise InputError("--max-new is how far first divergences are searched: give --rollout-tokens instead")
        return 1 + (ROLLOUT_TOKENS if args.rollout_tokens is None else args.rollout_tokens)
    if args.rollout_tokens is not None:
        raise InputError("--rollout-tokens belongs to --support rollouts: give both, or neither")
    return CaptureSettings.max_new if args.max_new is None else args.max_new


def _dtype_asked(
    args: argparse.Namespace, lineup: Lineup, say: Callable[[str], None], corpus: str | Path | None
) -> str:
    """What the arguments say; or that of what has been captured; or the checkpoints' own."""
    if args.dtype != "auto":
        return str(args.dtype)
    from actcache.capture.growth import existing

    if args.out is not None:
        captured = existing(corpus or getattr(args, "store", None) or args.out / "store")
        if captured is not None and captured.fingerprint.dtype is not None:
            return captured.fingerprint.dtype
    dtype, why = lineup.own_dtype()
    if why:
        say(f"dtype {dtype}: {why}")
    return dtype


def add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    """What is scored, and how it is replayed."""
    parser.add_argument(
        "--scope",
        metavar="S",
        help="positions whose state comes from upstream: prefix (all, the default), position (the compared one), or "
        "both as a list",
    )
    parser.add_argument(
        "--readout",
        metavar="R",
        help="final norm and head that score: a list of native and common_LABEL; common_pt and common_it also name the "
        "pair (default: native,common_it,common_pt)",
    )
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="file of boundaries, scopes, readouts and edits to score, .toml or .py",
    )
    add_strict_and_pack(parser)


def grid_settings(
    args: argparse.Namespace,
    boundary: str | None,
    captured: Sequence[int],
    width: int,
    n_blocks: int,
    labels: Sequence[str],
    pairs: Sequence[Sequence[str]],
) -> GridSettings:
    """What the arguments, and the sweep that they name, ask of a grid.

    Args:
        args: of the command.
        boundary: what it says of boundaries, if anything.
        captured: boundaries of the store.
        width: D.
        n_blocks: L.
        labels: of the checkpoints.
        pairs: each two of them in the roles pt and it, which a readout may name by role.

    Raises:
        InputError: the sweep cannot be read, says what an argument says too, or a boundary is not one of the model's.
    """
    from actcache.analyses.grid import GridSettings
    from actcache.capture.settings import parse_boundaries
    from actcache.replay.sweep import Sweep, read_sweep

    sweep = read_sweep(args.sweep, width) if args.sweep else Sweep()
    given: dict[str, tuple[Any, Any]] = {
        "--scope": (args.scope, sweep.scopes),
        "--readout": (args.readout, sweep.readouts),
        "--boundary": (boundary, sweep.boundaries),
    }
    for name, (argument, of_sweep) in given.items():
        if argument is not None and of_sweep is not None:
            raise InputError(f"{name} is given twice: by the command, and by {args.sweep}; leave one of them out")
    boundaries = tuple(captured)
    asked = boundary if sweep.boundaries is None else sweep.boundaries
    if asked not in (None, "all"):
        boundaries = parse_boundaries(asked, n_blocks)
    readouts = _names(READOUTS if args.readout is None else args.readout) if sweep.readouts is None else sweep.readouts
    return GridSettings(
        boundaries,
        _names("prefix" if args.scope is None else args.scope) if sweep.scopes is None else sweep.scopes,
        readouts,
        sweep.variants_at,
        top1=sweep.top1,
        kl=sweep.kl,
        strict=args.strict,
        max_tokens=args.max_tokens,
    ).of_pair(labels, pairs)


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def add_strict_and_pack(parser: argparse.ArgumentParser) -> None:
    """How sequences share forwards."""
    parser.add_argument(
        "--strict", action="store_true", help="run one sequence per forward, bit-identical to a hooked forward"
    )
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="tokens per forward (default: what suits the device)"
    )


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isdecimal() and text.isascii() and len(text) < 20 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def numbers(text: str) -> list[int] | None:
    """``5,10``; None for ``all``."""
    if text == "all":
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, such as 5,10, nor all") from error


def add_holding_arguments(parser: argparse.ArgumentParser, what: str, device: str | None = None) -> None:
    """How checkpoints are held: where, how many at once, and whether whole.

    Args:
        parser: to add them to.
        what: is in memory.
        device: the default one; None where the defaults are those of the capture.
    """
    fits = "all if their weights fit"
    device_said, resident_said = (device, "auto") if device else ("that of the capture", "as in the capture")
    devices = "where to compute: cpu, cuda, cuda:1, a list such as cuda:0,cuda:1 to deal the checkpoints to, or auto"
    parser.add_argument("--device", default=device, metavar="DEVICES", help=f"{devices} (default: {device_said})")
    parser.add_argument(
        "--resident",
        choices=["auto", "one", "all"],
        help=f"{what} in memory at once: one after another, all, or {fits} (default: {resident_said})",
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read one block at a time from the files whenever it runs, for models larger than the memory",
    )


def held_asked(args: argparse.Namespace) -> str:
    """Of which the arguments ask that one is in memory at a time: a ``block``, a ``checkpoint``, or of neither."""
    return "block" if args.stream else "checkpoint" if args.resident == "one" else ""


def holding_asked(args: argparse.Namespace, of_capture: Holding | None = None) -> Holding:
    """How the arguments have checkpoints held: where they say nothing, as ``of_capture``.

    Raises:
        InputError: all checkpoints are to be in memory, and one block.
    """
    return (of_capture or Holding()).but(args.device, args.resident, args.stream or None)
