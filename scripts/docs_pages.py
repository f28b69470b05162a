"""Write the generated parts of the docs: the command line, the analyses, columns of the schema, benchmarks.

A line ``<!-- generated: NAME -->`` of a page stands for a part. mkdocs.yml names this file as a hook, so that a build
of the site puts the parts there. Tables of benchmarks come from the JSON files in benches/results, and nothing else::

    python scripts/docs_pages.py "command line"     print one part, as Markdown
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
WALKTHROUGH = ROOT / "docs" / "walkthrough.ipynb"
_MARK = re.compile(r"^<!-- generated: ([\w ]+) -->$", re.M)
_COMMON = ("--help", "--quiet", "--threads")  # of every verb; the page says so once

Row = Sequence[Any]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs' hook: a page with its generated parts."""
    return _MARK.sub(lambda mark: part(mark[1]), markdown)


def part(name: str) -> str:
    """The Markdown that a mark stands for."""
    kind, _, of = name.partition(" ")
    if kind == "columns":
        return columns(of)
    return {"command line": command_line, "analyses": analyses, "benchmarks": benchmarks, "walkthrough": walkthrough}[
        name
    ]()


def main(argv: Sequence[str] | None = None) -> int:
    """Print one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "name", help="command line, analyses, benchmarks, walkthrough, or columns and a table of schema.py"
    )
    print(part(parser.parse_args(argv).name))
    return 0


def table(head: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


# ---- the command line ------------------------------------------------------------------------------------------------


def command_line() -> str:
    """Every verb: what it does, how it is typed, an example, its options by group."""
    return "\n\n".join(block for name, verb in verbs().items() for block in _verb(name, verb))


def verbs() -> dict[str, argparse.ArgumentParser]:
    """Parsers by verb, each with all of its options."""
    from actcache.cli import build_parser

    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    found: dict[str, argparse.ArgumentParser] = {}
    for name, parser in action.choices.items():
        steps = [one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
        found |= {name: parser, **{f"{name} {step}": one for below in steps for step, one in below.items()}}
    for parser in found.values():
        if hasattr(parser, "fill"):
            parser.fill()  # an analysis adds its own options when they are asked for
    return found


def _verb(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## actcache {name}"
    yield parser.description or ""
    if parser.epilog:
        yield f"```\n{parser.epilog.partition(': ')[2]}\n```"
    for group in parser._action_groups:
        rows = [_option(action) for action in group._group_actions if not {*_COMMON} & {*action.option_strings}]
        if rows:
            yield table([group.title, ""], rows)


def _option(action: argparse.Action) -> Row:
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else None)
    if value is None and action.nargs != 0:
        value = action.dest.upper()
    names = ", ".join(action.option_strings) or str(value)
    typed = f"`{names} {value}`" if action.option_strings and action.nargs != 0 else f"`{names}`"
    said = (action.help or "") % {"default": action.default, "prog": "actcache"}
    return typed, said + (" (required)" if action.option_strings and action.required else "")


# ---- analyses --------------------------------------------------------------------------------------------------------


def analyses() -> str:
    """Every analysis: its question, its definitions, its options, its files."""
    from actcache.analyses import EVERY

    return "\n\n".join(block for named in EVERY for block in _analysis(named, named.load()))


def _analysis(named: Any, analysis: Any) -> Iterator[str]:
    name, question, _ = named
    yield f"## {name.capitalize()}"
    yield f"*{question[0].upper()}{question[1:]}?*"
    described = sys.modules[type(analysis).__module__].__doc__ or ""
    yield described.partition("\n\n")[2].strip()  # its head is the question again
    options = [
        (
            f"`{entry.name}`",
            f"`{entry.default}`" if entry.default != "" else "",
            entry.metadata["help"] % {"default": entry.default},
        )
        for entry in fields(analysis.options)
    ]
    yield table(["option", "default", ""], options)
    stem = f"RUN/{named.stem}"
    files = f"`{stem}.json`" if named.of_cells else f"`{stem}.parquet` and `{stem}.json`"
    yield f"`actcache {name} RUN` or `run.analyse({name!r})` leaves {files}."
    if named.of_cells:
        yield f"`actcache {name} CELLS.parquet` answers it of a table of cells alone, and prints the answer."


# ---- columns ---------------------------------------------------------------------------------------------------------


def columns(of: str) -> str:
    """The columns of one table of schema.py."""
    from actcache import schema

    rows = [(f"`{one.name}`", one.type, one.unit, one.meaning) for one in getattr(schema, of)]
    return table(["column", "type", "unit", "says"], rows)


# ---- benchmarks ------------------------------------------------------------------------------------------------------


def benchmarks() -> str:
    """A section per file of benches/results: what ran where, and its tables."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    results = [one for content in found for one in (content if isinstance(content, list) else [content])]
    if not results:
        return "No result is on file."
    order = list(_TABLES)
    results.sort(key=lambda result: order.index(result["bench"]))
    return "\n\n".join(block for result in results for block in _result(result))


def _result(result: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {_TITLES[result['bench']]}"
    yield _about(result)
    yield _TABLES[result["bench"]](result)


def _about(result: Mapping[str, Any]) -> str:
    """Where, with what and of which commit."""
    used = [
        name for name in ("torch", "nnsight", "transformer-lens", "tensorstore", "zarr") if name in result["versions"]
    ]
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in used)
    where = f"{result['cpus']} CPUs of {result['machine']}; {versions}; commit {result['commit']}"
    sizes = [f"{result[name]:,} {name}" for name in ("prompts", "events", "tokens", "rows") if name in result]
    if {"blocks", "width"} <= result.keys():
        sizes.append(f"{result['blocks']} blocks of width {result['width']}")
    dtype = [result["dtype"]] if "dtype" in result else []
    packs = [result["in_packs"]] if "in_packs" in result else []
    return ". ".join([where, *([", ".join([*sizes, *dtype])] if sizes or dtype else []), *packs]) + "."


def _workloads(result: Mapping[str, Any]) -> str:
    """Times of the same results by several means; in bold, how many times longer than actcache each took. Where the
    bench counted them: passes of both, and the ratio that they are."""
    workloads, passes = result["workloads"], result.get("passes", {})
    means = list(dict.fromkeys(name for one in workloads for name in one["seconds"]))
    has_limit = any(one["percent_of_limit"] for one in workloads)
    rows = []
    for one in workloads:
        cells = []
        for name in means:
            seconds, ratio = one["seconds"].get(name), one["ratios"].get(name)
            time = "" if seconds is None else _seconds(seconds)
            cells.append(time + (f" (**{ratio:.3g}x**)" if ratio is not None else ""))
        limit = one["percent_of_limit"]
        shown = [] if not has_limit else [""] if limit is None else [f"{limit[0]:.0f}%"]
        counted = []
        if of := passes.get(one["name"]):
            bound = "" if of["bound"] is None else f"{of['bound']:.3g}x"
            counted = [f"{of['hooks']:.3g}", f"{of['actcache']:.2g}", bound]
        rows.append([f"{one['name']}, per {one['unit']}", *cells, *shown, *counted])
    heads = [*(["of the limit"] if has_limit else []), *(["passes of hooks", "of ours", "bound"] if passes else [])]
    said = [table(["", *means, *heads], rows)]
    if "largest_difference" in result:
        found = result["largest_difference"]  # of each workload, or of all
        largest = max(found.values()) if isinstance(found, dict) else found
        said.append(f"Before anything is timed, all margins are within {largest:.1e} logits.")
    if "peak_bytes" in result:
        peak = result["peak_bytes"]
        above = {name: peak[name] - peak["imports"] for name in peak if name != "imports"}
        memory = [(name, f"{n / 1e6:.0f} MB", f"{n / above['model']:.0%}") for name, n in above.items()]
        said += ["Peak memory above the imports, late stacks by their first block:"]
        said += [table(["", "peak", "of the whole model's"], memory)]
    return "\n\n".join(said)


def _store(result: Mapping[str, Any]) -> str:
    rates, ours = result["bytes_per_s"], result["bytes_per_s"]["actcache"]
    rows = []
    for name, of in rates.items():
        faster = "" if name == "actcache" else ", ".join(f"{ours[what] / of[what]:.2f}x" for what in of)
        rows.append([name, *(f"{of[what] / 1e9:.2f}" for what in ("write", "random", "sequential")), faster])
    disk, copy = (f"{result['ceilings'][name] / 1e9:.2f}" for name in ("disk", "copy"))
    rows.append(["ceiling", f"{disk} (one file, fsync)", f"{copy} (copy)", f"{copy} (copy)", ""])
    return table(["GB/s of states", "write", "random events", "sequential", "actcache is faster by"], rows)


def _open(result: Mapping[str, Any]) -> str:
    ways, imports = result["ways"], result["ways"]["nothing"]["peak_bytes"]
    near = [
        [name, _seconds(of["seconds"]), f"{(of['peak_bytes'] - imports) / 1e6:,.0f} MB"]
        for name, of in ways.items()
        if name != "nothing"
    ]
    far = [[name, _seconds(of["seconds"]), f"{of['requests']:,}"] for name, of in result["far"].items()]
    local = table([f"{result['segments']:,} segments on a disk", "time", "memory above the imports"], near)
    return f"{local}\n\n" + table([f"{result['far_segments']:,} segments on S3", "time", "requests"], far)


def _store_chunks(result: Mapping[str, Any]) -> str:
    rows = [
        [kib, f"{of['ratio']:.3f}", *(f"{of[what] / 1e9:.2f}" for what in ("write", "random", "sequential"))]
        for kib, of in result["chunk_kib"].items()
    ]
    return table(["chunk KiB", "ratio", "write GB/s", "random GB/s", "sequential GB/s"], rows)


def _stream(result: Mapping[str, Any]) -> str:
    rows = []
    for tokens, of in result["passes"].items():
        rate = result["block_bytes"] / 1e6 / of["cold"]
        rows.append([f"{int(tokens):,}", *(_seconds(of[name]) for name in _STREAMED), f"{rate:,.0f} MB/s"])
    said = f"{result['n_parameters'] / 1e9:.2f} billion parameters, {result['block_bytes'] / 1e9:.2f} GB of blocks."
    means = ["plain forward", "pass, files cached", "pass, from disk", "files read alone"]
    return f"{said}\n\n{table(['tokens', *means, 'of blocks, from disk'], rows)}"


_STREAMED = ("plain", "warm", "cold", "disk")


def _rates(of: Mapping[str, Mapping[str, Any]], ceiling: str) -> str:
    rows = [[name, f"{one['gb_s']:.2f}", f"{one[ceiling]:.0f}%"] for name, one in of.items()]
    return table(["", "GB/s", "of memcpy"], rows)


def _named_tables(result: Mapping[str, Any], name: str, draw: Callable[[Any], str]) -> str:
    return "\n\n".join(f"**{title}**\n\n{draw(of)}" for title, of in result[name].items())


def _codec(of: Mapping[str, Mapping[str, Any]]) -> str:
    rates = ("encode_gb_s", "decode_gb_s")
    rows = [[name, f"{one['ratio']:.3f}", *(f"{one[rate]:.2f}" for rate in rates)] for name, one in of.items()]
    return table(["", "ratio", "encode GB/s", "decode GB/s"], rows)


def _linear(result: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{one['rows']} rows, {one['n_in']} x {one['n_out']}",
            name,
            f"{way['multiply_adds_per_s'] / 1e9:.0f}",
            f"{way['times_torch']:.2f}x",
            f"{way['percent_of_ceiling']:.0f}%",
            f"{way['error']:.1e}",
        ]
        for one in result["products"]
        for name, way in one["ways"].items()
    ]
    return table(["product", "by", "G multiply-adds/s", "of torch", "of the ceiling", "error"], rows)


def _kernels(result: Mapping[str, Any]) -> str:
    """Replays with one kernel exchanged for a rival, beside those with our kernels."""
    seconds = {name: of for one in result["workloads"] for name, of in one["seconds"].items()}
    spread = {name: of for one in result["workloads"] for name, of in one["spread_s"].items()}
    rows = [["all of ours", "", *_replay_times("actcache", seconds, spread), "", ""]]
    for one in result["kernels"]:
        if "not_measured" in one:
            rows.append([one["kernel"], one["not_measured"], "", "", "", ""])
        else:
            times = f"{one['times']:.3f}x", f"{one['cpu_times']:.3f}x"
            rows.append([one["kernel"], one["rival"], *_replay_times(one["rival"], seconds, spread), *times])
    head = ["kernel exchanged", "for", "a replay", "fastest to slowest", "of ours", "CPU time"]
    load = result["load"]
    said = (
        f"Load of the machine: {load['before'][0]:.1f} before, {load['after'][0]:.1f} after; {result['repeat']} rounds."
    )
    return f"{table(head, rows)}\n\n{said}"


def _replay_times(name: str, seconds: Mapping[str, float], spread: Mapping[str, Sequence[float]]) -> tuple[str, str]:
    low, high = spread[name]
    return _seconds(seconds[name]), f"{_seconds(low)} to {_seconds(high)}"


def _feed(result: Mapping[str, Any]) -> str:
    copy = result["ceiling_rows_per_s"]["copy in memory"]["median"]
    rows = [
        [name, f"{one['median']:,.0f}", f"{one['min']:,.0f}-{one['max']:,.0f}", f"{one['median'] / copy:.0%}"]
        for name, one in (result["rows_per_s"] | result["ceiling_rows_per_s"]).items()
    ]
    return table(["", "rows/s", "spread", "of copying"], rows)


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


_TITLES = {
    "study": "Each analysis beside hooks",
    "sweep": "A study beside hooks, nnsight and TransformerLens",
    "map": "A patching map beside hooks, nnsight and TransformerLens",
    "replay": "Replay beside its multiply-adds",
    "store": "Writing and reading a store",
    "open": "Opening a store of many segments",
    "store_chunks": "Sizes of chunks",
    "codec": "Codecs on bf16 states",
    "gather": "Gathering rows",
    "linear": "Linear layers in float32",
    "kernels": "Kernels exchanged for short rivals",
    "feed": "Feeding a trainer",
    "stream": "Blocks read one at a time",
}
_TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "study": _workloads,
    "sweep": _workloads,
    "map": _workloads,
    "replay": _workloads,
    "store": _store,
    "open": _open,
    "store_chunks": _store_chunks,
    "codec": lambda result: _named_tables(result, "states", _codec),
    "gather": lambda result: _named_tables(result, "layouts", lambda of: _rates(of, "percent_of_memcpy")),
    "linear": _linear,
    "kernels": _kernels,
    "feed": _feed,
    "stream": _stream,
}


# ---- the notebook ----------------------------------------------------------------------------------------------------


def walkthrough() -> str:
    """The notebook as a page: its text, its code, and the text that the code printed."""
    blocks = []
    for cell in json.loads(WALKTHROUGH.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        blocks += [shown for output in cell.get("outputs", ()) for shown in _output(output)]
    return "\n\n".join(blocks)


def _output(output: Mapping[str, Any]) -> Iterator[str]:
    data = output.get("data", {})
    if "image/png" in data:
        yield f'<img alt="figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    elif "text/html" in data:
        yield "".join(data["text/html"])
    elif text := "".join(output.get("text", data.get("text/plain", ()))):
        yield f"```\n{text.rstrip()}\n```"


if __name__ == "__main__":
    sys.exit(main())
