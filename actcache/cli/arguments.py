"""Arguments that several verbs share, and the types of their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from actcache.cli.parser import Parser
from actcache.errors import InputError

if TYPE_CHECKING:
    from actcache.analyses.grid import GridSettings
    from actcache.capture.capture import CaptureSettings

READOUTS = "native,common_it,common_pt"
Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def add_verb(
    verbs: Verbs, name: str, run: Callable[[argparse.Namespace], int | None], summary: str, example: str
) -> Parser:
    """Give the parser a verb; ``run`` gets its arguments and returns the exit code (None: 0)."""
    description = summary[0].upper() + summary[1:] + "."
    parser: Parser = verbs.add_parser(name, help=summary, description=description, epilog=f"example: {example}")
    parser.add_argument("--quiet", action="store_true", help="print errors only on stderr, no progress and no notes")
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="threads of the CPU (default: torch's own number, or fewer where this process may use fewer CPUs)",
    )
    parser.set_defaults(verb=run)
    return parser


def add_capture_arguments(parser: argparse.ArgumentParser) -> None:
    """What a capture needs: the pair, the prompts, where to, and what to compute."""
    add_pair_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument("--store", metavar="URL", help="place of the store, as s3://bucket/prefix (default RUN/store)")
    add_capture_settings(parser)


def add_pair_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """The pair and its prompts."""
    parser.add_argument(
        "--pt", type=Path, required=required, metavar="DIR", help="model folder of the pretrained checkpoint"
    )
    parser.add_argument(
        "--it", type=Path, required=required, metavar="DIR", help="model folder of its tuned descendant"
    )
    parser.add_argument(
        "--prompts", type=Path, required=required, metavar="P.jsonl", help="prompts, one JSON object per line"
    )


def add_capture_settings(parser: argparse.ArgumentParser) -> None:
    """What a capture computes; :func:`capture_settings` reads it, with ``--strict`` and ``--max-tokens``."""
    parser.add_argument(
        "--boundary",
        default="0.6",
        metavar="B",
        help="first late block: 18, 0.6 of the depth, -3 from the end, a list of these, or all (default %(default)s)",
    )
    parser.add_argument(
        "--site",
        action="append",
        default=[],
        metavar="SITE:BLOCKS",
        help="further rows to keep, of what attention or MLP gives: mlp:29,30 or attention:all; repeat for more",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="dtype of weights and states (default %(default)s)",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="device to run on (default %(default)s)"
    )
    parser.add_argument(
        "--max-new",
        type=positive,
        default=128,
        metavar="N",
        help="number of choices to compare per prompt, at most (default %(default)s)",
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


def capture_settings(args: argparse.Namespace, n_blocks: int) -> CaptureSettings:
    """What the arguments ask of a capture.

    Raises:
        InputError: a boundary is not one of a model of so many blocks.
    """
    from actcache.capture.capture import CaptureSettings, parse_boundaries, parse_sites

    return CaptureSettings(
        boundaries=parse_boundaries(args.boundary, n_blocks),
        dtype=args.dtype,
        device=args.device,
        max_new=args.max_new,
        row_selection=args.rows,
        strict=args.strict,
        max_tokens=CaptureSettings.max_tokens if args.max_tokens is None else args.max_tokens,
        shard_prompts=args.shard_prompts,
        codec=args.codec,
        sites=parse_sites(args.site, n_blocks),
    )


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
        help="final norm and head that score: a list of native, common_it, common_pt (default: all)",
    )
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE",
        help="file of boundaries, scopes, readouts and edits to score, .toml or .py",
    )
    add_strict_and_pack(parser)


def grid_settings(
    args: argparse.Namespace, boundary: str | None, captured: Sequence[int], width: int, n_blocks: int
) -> GridSettings:
    """What the arguments, and the sweep that they name, ask of a grid over a store with these boundaries, of which
    ``boundary`` names some if the command did.

    Raises:
        InputError: the sweep cannot be read, says what an argument says too, or a boundary is not one of the model's.
    """
    from actcache.analyses.grid import GridSettings
    from actcache.capture.capture import parse_boundaries
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
    return GridSettings(
        boundaries,
        _names("prefix" if args.scope is None else args.scope) if sweep.scopes is None else sweep.scopes,
        _names(READOUTS if args.readout is None else args.readout) if sweep.readouts is None else sweep.readouts,
        sweep.variants_at,
        top1=sweep.top1,
        kl=sweep.kl,
        strict=args.strict,
        max_tokens=args.max_tokens,
    )


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


def check_device(device: str) -> None:
    """Raise InputError where ``cuda`` is asked and there is none."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("--device cuda: this torch sees no CUDA device; use --device cpu")
