"""The command line: one verb a stage. Progress on stderr, data on stdout.

Exit codes: 0 done, 1 a check failed (a corrupt store, a replay that is not a no-op), 2 bad input, in one line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from actcache.errors import ActcacheError, CheckError, CorruptStoreError, IncompatibleError, InputError, KernelError
from actcache.files import write_atomically
from actcache.run_folder import RunFolder, RunRecord

if TYPE_CHECKING:
    from actcache.capture import CaptureSettings
    from actcache.grid import GridSettings
    from actcache.lineup import Lineup
    from actcache.store import Store

BENCHES = ("gather", "codec", "store", "feed")
_FAILED_CHECKS = (CheckError, CorruptStoreError, KernelError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        return args.verb(args) or 0
    except ActcacheError as error:
        print(f"actcache: {_one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, _FAILED_CHECKS) else 2
    except OSError as error:
        print(f"actcache: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("actcache: interrupted; the same command goes on from the last committed shard", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; tests walk it."""
    parser = argparse.ArgumentParser(
        prog="actcache",
        description="Activation cache for comparing checkpoints: upstream layers run once, late layers are replayed.",
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("actcache"))
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int | None], summary: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        sub.set_defaults(verb=run)
        return sub

    demo = verb("demo", _demo, "the whole flow on the pair that the package ships; no network")
    demo.add_argument("--out", type=Path, default=Path("actcache-demo"), metavar="RUN", help="folder of the run")

    run = verb("run", _run, "capture, grid, effects and report in one go; resumable by the same command")
    _add_capture_arguments(run)
    _add_grid_arguments(run)

    capture = verb("capture", _capture, "find the events of a pair and store the states that their replay needs")
    _add_capture_arguments(capture)
    _add_strict_and_pack(capture)
    capture.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="every N-th segment from the I-th (from 1) on only"
    )

    grid = verb("grid", _grid, "score the cells of a captured run by replaying its late stacks")
    grid.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    grid.add_argument("--boundary", help="boundaries to score, of those captured (default: all captured)")
    grid.add_argument("--pt", type=Path, help="where the PT checkpoint is now (default: where capture found it)")
    grid.add_argument("--it", type=Path, help="where the IT checkpoint is now")
    grid.add_argument("--device", choices=["cpu", "cuda"], help="default: where capture ran")
    _add_grid_arguments(grid)

    effects = verb("effects", _effects, "contrasts with bootstrap intervals, from a run or a table of cells")
    effects.add_argument("source", type=Path, metavar="RUN|CELLS.parquet", help="folder of a run, or a table of cells")
    effects.add_argument("--draws", type=int, default=2000, help="bootstrap draws over prompts (default %(default)s)")
    effects.add_argument("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")

    report = verb("report", _report, "one self-contained HTML page about a run")
    report.add_argument("run", type=Path, metavar="RUN", help="folder of the run")

    inspect = verb("inspect", _inspect, "what a store holds, or which engine gathers rows here")
    inspect.add_argument("store", nargs="?", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    inspect.add_argument("--engine", action="store_true", help="say which engine gathers rows on each device")
    inspect.add_argument("--json", action="store_true", help="print JSON")

    verify = verb("verify", _verify, "re-read a whole store and name everything that is not as committed")
    verify.add_argument("store", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="set damaged segments aside, so that the rest reads and they can be redone",
    )

    export = verb("export", _export, "states, token ids and events as files that other tools read")
    export.add_argument("store", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    export.add_argument("--to", required=True, choices=["safetensors", "npy", "arrow"], help="format of the files")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    export.add_argument("--checkpoint", action="append", metavar="LABEL", help="one of the store's; repeat for more")
    export.add_argument("--boundary", type=_numbers, metavar="5,10", help="of those stored (default: all)")
    export.add_argument("--events", metavar="0,5,9|100:200", help="numbers, or a range of them (default: all)")

    compact = verb("compact", _compact, "merge small segments of a store into larger ones, while readers go on")
    compact.add_argument("store", metavar="STORE", help="a store (folder or URL), or the folder of a run")
    compact.add_argument(
        "--max-mb", type=_positive, default=1024, help="states of a merged segment, uncompressed (default %(default)s)"
    )
    bench = verb("bench", _bench, "measure gather, codec, store and feed on this machine and disk, beside their rivals")
    bench.add_argument(
        "names", nargs="*", type=_bench_name, metavar="NAME", help=f"of {', '.join(BENCHES)}; default all"
    )
    bench.add_argument("--folder", type=Path, help="on which disk (default: the system's temporary folder)")
    bench.add_argument("--out", type=Path, metavar="JSON", help="also write the figures here, one object a bench")
    bench.add_argument("--smoke", action="store_true", help="sizes of seconds, to see that everything runs")
    return parser


def _add_capture_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pt", type=Path, required=True, metavar="DIR", help="model folder of the pretrained checkpoint"
    )
    parser.add_argument("--it", type=Path, required=True, metavar="DIR", help="model folder of its tuned descendant")
    parser.add_argument("--prompts", type=Path, required=True, metavar="P.jsonl", help="one JSON object a line")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--store", metavar="URL", help="where the store goes (default RUN/store), s3://bucket/prefix say"
    )
    parser.add_argument(
        "--boundary", default="0.6", help="first late block: 18, a fraction of the depth, a list, or all (default 0.6)"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default %(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default %(default)s")
    parser.add_argument(
        "--max-new", type=_positive, default=128, help="choices to compare a prompt (default %(default)s)"
    )
    parser.add_argument("--limit", type=_positive, help="use the first N prompts only")
    parser.add_argument(
        "--rows",
        choices=["prefix", "divergence"],
        default="prefix",
        help="keep every position's rows, as the grid needs, or the event's alone (default %(default)s)",
    )
    parser.add_argument(
        "--codec",
        choices=["blosc", "actcache.bf16_planes"],
        default="blosc",
        help="of the stored states: any Zarr reader has blosc; the planes, for bfloat16, are smaller and faster "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--shard-prompts", type=_positive, default=64, help="prompts of a segment (default %(default)s)"
    )


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--scope",
        choices=["prefix", "position"],
        default="prefix",
        help="whose state the upstream gives: every position's, or the compared one's only (default %(default)s)",
    )
    parser.add_argument(
        "--readout",
        default="native,common_it,common_pt",
        help="whose final norm and head score: a list of native, common_it, common_pt (default: all)",
    )
    _add_strict_and_pack(parser)


def _add_strict_and_pack(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict", action="store_true", help="one sequence a forward: bit-identical to a hooked forward"
    )
    parser.add_argument("--max-tokens", type=_positive, default=4096, help="tokens of one pack (default %(default)s)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _numbers(text: str) -> list[int] | None:
    if text == "all":
        return None
    return [int(part) for part in text.split(",")]


def _bench_name(text: str) -> str:
    if text not in BENCHES:
        raise argparse.ArgumentTypeError(f"{text} is not one of {', '.join(BENCHES)}")
    return text


def _part(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with 1 <= I <= N")
    return int(i) - 1, int(n)


def _run(args: argparse.Namespace) -> None:
    if args.rows != "prefix":
        raise InputError(
            f"--rows {args.rows}: a run scores the grid, which needs prefix rows; "
            "'actcache capture --rows divergence' keeps the events' own rows alone"
        )
    lineup = _capture_lineup(args)
    folder = RunFolder(args.out)
    _score(folder, lineup, _grid_settings(args, None), args.device)
    effects = _write_effects(folder)
    _write_report(folder)
    _print_answer(folder, effects)


def _capture(args: argparse.Namespace) -> None:
    _capture_lineup(args)


def _capture_lineup(args: argparse.Namespace) -> Lineup:
    _quiet_libraries()
    from actcache.capture import CaptureSettings, capture, parse_boundaries
    from actcache.lineup import Lineup
    from actcache.prompts import read_prompts

    _check_device(args.device)
    prompts = read_prompts(args.prompts, args.limit)
    lineup = Lineup.open({"pt": args.pt, "it": args.it})
    settings: CaptureSettings = CaptureSettings(
        boundaries=parse_boundaries(args.boundary, lineup.n_blocks),
        dtype=args.dtype,
        device=args.device,
        max_new=args.max_new,
        row_selection=args.rows,
        strict=args.strict,
        max_tokens=args.max_tokens,
        shard_prompts=args.shard_prompts,
        codec=args.codec,
    )
    folder = RunFolder(args.out)
    record = RunRecord(
        checkpoints={label: str(c.path.resolve()) for label, c in lineup.checkpoints.items()},
        prompts=str(args.prompts.resolve()),
        device=args.device,
        command=shlex.join(["actcache", *sys.argv[1:]]),
        store=args.store,
    )
    part = getattr(args, "part", (0, 1))
    firsts = range(0, len(prompts), settings.shard_prompts)[part[0] :: part[1]]
    n_prompts = sum(len(prompts[first : first + settings.shard_prompts]) for first in firsts)
    with (
        folder.being_captured(record, alone=part[1] == 1),
        _progress("capture", "prompt", n_prompts) as bar,
    ):
        capture(lineup, prompts, folder.store, settings, part=part, on_prompts=bar.update, say=_say)
    _say_excluded(folder)
    return lineup


def _grid(args: argparse.Namespace) -> None:
    _quiet_libraries()
    from actcache.lineup import Lineup

    folder = RunFolder(args.run)
    record = folder.record()
    device = args.device or record.device
    _check_device(device)
    paths = record.checkpoints | {label: path for label in ("pt", "it") if (path := getattr(args, label))}
    _score(folder, Lineup.open(paths), _grid_settings(args, folder), device)


def _grid_settings(args: argparse.Namespace, folder: RunFolder | None) -> Callable[[Store], GridSettings]:
    def settings(store: Store) -> GridSettings:
        from actcache.capture import parse_boundaries
        from actcache.grid import GridSettings

        boundaries = tuple(store.boundaries)
        if args.boundary not in (None, "all"):
            boundaries = parse_boundaries(args.boundary, store.fingerprint["n_blocks"])
        readouts = tuple(dict.fromkeys(name.strip() for name in args.readout.split(",")))
        return GridSettings(boundaries, args.scope, readouts, args.strict, args.max_tokens)

    return settings


def _score(folder: RunFolder, lineup: Lineup, settings_for: Callable[[Store], GridSettings], device: str) -> None:
    from actcache.grid import check_settings, run_grid
    from actcache.replay import LateStack
    from actcache.store import open_store

    store = open_store(folder.store)
    _check_complete(store)
    settings = settings_for(store)
    check_settings(store, settings)
    _check_same_checkpoints(store, lineup)

    def load_late(label: str, boundary: int) -> LateStack:
        return LateStack.load(lineup.checkpoints[label].path, boundary, dtype=store.dtype, device=device)

    total = len(store) * len(store.checkpoints) ** 2 * len(settings.boundaries)
    with _progress("grid", "replay", total) as bar:
        cells = run_grid(store, load_late, folder.cell_groups, settings, on_cells=bar.update, say=_say)
    _write_parquet(folder.cells, cells)


def _check_complete(store: Store) -> None:
    """Fewer prompts than were asked for would give other means, and nobody would see why."""
    found = len({*store.events["prompt_id"].to_pylist(), *store.excluded["prompt_id"].to_pylist()})
    asked = store.fingerprint["n_prompts"]
    if found != asked:
        raise InputError(
            f"{store.path} holds {found} of {asked} prompts: give the capture command again until all are captured"
        )


def _check_same_checkpoints(store: Store, lineup: Lineup) -> None:
    for label, captured in store.fingerprint["checkpoints"].items():
        now = lineup.checkpoints[label].fingerprint
        for field, value in captured.items():
            if now.get(field) != value:
                raise IncompatibleError(
                    f"checkpoint {label} at {lineup.checkpoints[label].path} is not the one captured: its {field} is "
                    f"{str(now.get(field))[:12]}, the store has {value[:12]}; point --{label} at the captured one",
                    field=f"checkpoints.{label}.{field}",
                )


def _effects(args: argparse.Namespace) -> None:
    from actcache.effects import effects

    if args.draws < 1:
        raise InputError(f"draws is {args.draws}; it must be at least 1")
    if args.source.is_dir():
        result = _write_effects(RunFolder(args.source), draws=args.draws, seed=args.seed)
    else:
        result = effects(_read_cells(args.source), draws=args.draws, seed=args.seed)
    print(json.dumps(result, indent=1))


def _write_effects(folder: RunFolder, *, draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    from actcache.effects import effects

    result = effects(_read_cells(folder.cells), draws=draws, seed=seed)
    write_atomically(folder.effects, json.dumps(result, indent=1).encode() + b"\n")
    return result


def _read_cells(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise InputError(f"{path}: no such table of cells; 'actcache grid RUN' makes one")
    try:
        return pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet table: {_one_line(error)}") from error


def _write_parquet(path: Path, table: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(path, sink.getvalue())


def _report(args: argparse.Namespace) -> None:
    folder = RunFolder(args.run)
    _write_report(folder)
    print(folder.report)


def _write_report(folder: RunFolder) -> None:
    from actcache.report import build_report
    from actcache.store import open_store

    if not folder.effects.is_file():
        _write_effects(folder)
    store = open_store(folder.store)
    effects = json.loads(folder.effects.read_text())
    n_blocks = store.fingerprint["n_blocks"]
    page = build_report(
        _read_cells(folder.cells),
        effects,
        store.events,
        store.excluded,
        _settings_shown(folder.record(), store),
        default_boundary=round(0.6 * n_blocks),
    )
    write_atomically(folder.report, page.encode())


def _settings_shown(record: RunRecord, store: Store) -> dict[str, str]:
    fingerprint = store.fingerprint
    shown = {"command": record.command}
    for label, path in record.checkpoints.items():
        digests = fingerprint["checkpoints"][label]
        shown[f"checkpoint {label}"] = (
            f"{path} (weights {digests['weights'][:12]}, tokenizer {digests['tokenizer'][:12]})"
        )
        shown["architecture"] = f"{digests['architecture']}, {fingerprint['n_blocks']} blocks of width {store.width}"
        shown["attention"] = digests["attention"]
    shown |= {
        "prompts": f"{record.prompts} ({fingerprint['n_prompts']} prompts, digest {fingerprint['prompts'][:12]})",
        "dtype": fingerprint["dtype"],
        "boundaries": ", ".join(str(boundary) for boundary in store.boundaries),
        "choices compared a prompt": f"at most {fingerprint['max_new']}",
        "capture": "strict, one sequence a forward" if fingerprint["strict"] else "packed",
        "device": fingerprint["device"],
        "versions": ", ".join(f"{name} {number}" for name, number in fingerprint["versions"].items()),
    }
    return shown


def _inspect(args: argparse.Namespace) -> None:
    from actcache.store import open_store

    if args.engine:
        from actcache.gather import describe_engines

        print("\n".join(describe_engines()))
    if args.store is None:
        if not args.engine:
            raise InputError("give a store or the folder of a run, or --engine")
        return
    summary = open_store(_store_place(args.store)).summary()
    if args.json:
        print(json.dumps(summary, indent=1))
        return
    for name, value in _flat(summary):
        print(f"{name:32} {value}")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [
            line for key, inner in value.items() for line in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list | tuple):
        return [(prefix, ", ".join(str(item) for item in value))]
    return [(prefix, value)]


def _verify(args: argparse.Namespace) -> int:
    from actcache.store import repair, verify

    place = _store_place(args.store)
    problems = repair(place) if args.repair else verify(place)
    for problem in problems:
        print(_printable(str(problem)))
    if args.repair:
        left = verify(place)
        dropped = sorted({problem.segment for problem in problems} - {problem.segment for problem in left})
        if dropped:
            print(f"set aside: {', '.join(dropped)}; give the same capture command to write them anew")
        problems = left
    if problems:
        print(f"{place}: {len(problems)} problems", file=sys.stderr)
        return 1
    print(f"{place}: every committed byte is as written")
    return 0


def _export(args: argparse.Namespace) -> None:
    from actcache.export import export, parse_events
    from actcache.store import open_store

    store = open_store(_store_place(args.store))
    events = None if args.events is None else parse_events(args.events)
    with _progress("export", "event", 0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        export(
            store,
            args.out,
            args.to,
            checkpoints=args.checkpoint,
            boundaries=args.boundary,
            events=events,
            on_progress=show,
        )
    print(args.out)


def _compact(args: argparse.Namespace) -> None:
    from actcache.store import compact, open_store

    place = _store_place(args.store)
    with _progress("compact", "segment", len(open_store(place).segments)) as bar:
        before, after = compact(place, args.max_mb * 2**20, on_segments=bar.update)
    print(f"{place}: {before} segments before, {after} now")


def _bench(args: argparse.Namespace) -> int:
    here = Path(__file__).parent
    # In a checkout the benches stand beside the package, in an installation inside it.
    folder = next(path for path in (here / "benches", here.parent / "benches") if (path / "bench_store.py").is_file())
    environment = os.environ | ({"TMPDIR": str(args.folder)} if args.folder else {})
    if args.folder and not args.folder.is_dir():
        raise InputError(f"--folder {args.folder} is not a folder")
    results = []
    for name in args.names or BENCHES:
        print(f"\n== {name} ==", flush=True)
        command = [sys.executable, str(folder / f"bench_{name}.py"), *(["--smoke"] if args.smoke else [])]
        lines: list[str] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as ran:
            for line in ran.stdout or ():
                lines.append(line)
                if not line.startswith("{"):
                    print(line, end="", flush=True)
        if ran.returncode:
            raise CheckError(f"bench {name} ended with exit code {ran.returncode}")
        results.append(json.loads(lines[-1]))
    if args.out:
        write_atomically(args.out, json.dumps(results, indent=1).encode() + b"\n")
    else:
        print()
        print(json.dumps(results))
    return 0


def _store_place(given: str) -> str | Path:
    run = RunFolder(given)
    return run.store if "://" not in given and run.record_path.is_file() else given


def _demo(args: argparse.Namespace) -> None:
    print(
        "Two tiny checkpoints ship with actcache: a base model (pt) and its instruction-tuned descendant (it).\n"
        "Asked: at the first token where the two choose differently, how much of the difference do the late layers\n"
        "make on either model's upstream state, and how much needs the tuned model's own state?\n"
    )
    with as_file(files("actcache") / "demo") as demo:
        out = ["--pt", str(demo / "pt"), "--it", str(demo / "it"), "--prompts", str(demo / "prompts.jsonl")]
        _run(build_parser().parse_args(["run", *out, "--out", str(args.out), "--max-new", "48"]))


def _print_answer(folder: RunFolder, effects: dict[str, Any]) -> None:
    """The main group as a 2x2 and three effects, in words."""
    from actcache.store import open_store

    store = open_store(folder.store)
    n_excluded = store.excluded.num_rows
    if not effects["groups"]:
        print(f"No event: the two checkpoints chose the same tokens on all {n_excluded} prompts ({_reasons(store)}).")
        print(f"Report: {folder.report}")
        return
    for group in effects["groups"]:
        if group["variant"] != "none" or group["readout"] not in ("common_it", "native"):
            continue
        if group["readout"] == "native" and any(
            other["readout"] == "common_it"
            and other["boundary"] == group["boundary"]
            and other["scope"] == group["scope"]
            for other in effects["groups"]
        ):
            continue
        print(
            f"{group['n_events']} events of {group['n_prompts']} prompts ({n_excluded} prompts without one); boundary "
            f"{group['boundary']} of {store.fingerprint['n_blocks']} blocks, scope {group['scope']}, "
            f"readout {group['readout']}"
        )
        print("\nmean margin logit(y_it) - logit(y_pt)        late PT      late IT")
        for upstream in ("pt", "it"):
            row = [group["cells"][f"{upstream}_{late}"]["mean"] for late in ("pt", "it")]
            print(f"  upstream {upstream.upper():32} {row[0]:+9.3f}    {row[1]:+9.3f}")
        print()
        for name, words in (
            ("late_from_pt", "late effect from PT upstream   A    "),
            ("late_from_it", "late effect from IT upstream   B    "),
            ("interaction", "interaction                    B - A"),
        ):
            value = group[name]
            interval = "" if value["low"] is None else f"   95% [{value['low']:+.3f}, {value['high']:+.3f}]"
            print(f"  {words}  {value['mean']:+9.3f}{interval}")
        print()
    print(f"Report: {folder.report}")


def _say_excluded(folder: RunFolder) -> None:
    from actcache.store import open_store

    store = open_store(folder.store)
    reasons = f"; without one: {_reasons(store)}" if store.excluded.num_rows else ""
    _say(f"{len(store)} events{reasons}")


def _reasons(store: Store) -> str:
    counts: dict[str, int] = {}
    for reason in store.excluded["reason"].to_pylist():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def _check_device(device: str) -> None:
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("--device cuda: this torch sees no CUDA device; use --device cpu")


def _quiet_libraries() -> None:
    """transformers logs and draws bars of its own; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _progress(stage: str, unit: str, total: int) -> tqdm:
    return tqdm(desc=stage, unit=f" {unit}", total=total, file=sys.stderr, dynamic_ncols=True, mininterval=0.5)


def _say(line: str) -> None:
    tqdm.write(f"actcache: {line}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return _printable(" ".join(str(error).split()))


def _printable(text: str) -> str:
    """Text in which a file's name neither steers the terminal nor fails to be written."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


if __name__ == "__main__":
    sys.exit(main())
