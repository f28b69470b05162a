"""Make a prompts file of one whose keys have other names: of a study's own prompts, for example.

The input is what a run reads, too: JSON Lines, CSV, TSV or Parquet. Its id is taken from the first of ``id``,
``record_id``, ``prompt_id`` and ``example_id`` that it has, its text from the first of ``prompt``, ``question``,
``text`` and ``instruction``, and ``category`` is carried along where it is there. Where the keys are others, name them.
A key within an object has a path, as ``meta.topic``. A file without an id gets one for each row, ``row-000001`` and so
on, which is said::

    python scripts/convert_prompts.py THEIRS.jsonl --out prompts.jsonl
    python scripts/convert_prompts.py THEIRS.jsonl --out prompts.jsonl --id meta.uid --text formats.raw \\
        --keep category --keep meta.topic=topic --where category=GOV-CONV,SAFETY --first 600 --last 1199

``--keep KEY=NAME`` carries a value under another name, as a name of a column of the results must not be used.
``--where KEY=A,B`` takes the lines whose value is one of these. ``--first`` and ``--last`` count lines from 0, as names
of slices such as ``0600_1199`` do; both ends are taken.

Nothing is downloaded, and no text is changed. The result is read as a run would read it before it is kept. The last
line of stdout is one JSON object with the numbers of prompts by category.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from actcache.errors import InputError
from actcache.files import no_file
from actcache.prompt_files import open_prompt_file
from actcache.prompts import read_prompts

ID_KEYS = ("id", "record_id", "prompt_id", "example_id")
TEXT_KEYS = ("prompt", "question", "text", "instruction")
CATEGORY = "category"
_MISSING = object()


def main(argv: Sequence[str] | None = None) -> int:
    """Convert. Returns 0, or 2 after one line on stderr when an argument or a line is unusable."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("source", type=Path, help="file to read: JSON Lines, CSV, TSV or Parquet")
    parser.add_argument("--out", type=Path, required=True, help="prompts file to write")
    parser.add_argument(
        "--id", metavar="KEY", help=f"key of the id (first of {', '.join(ID_KEYS)}; else made of the row's number)"
    )
    parser.add_argument("--text", metavar="KEY", help=f"key of the text (first of {', '.join(TEXT_KEYS)})")
    parser.add_argument(
        "--keep", metavar="KEY[=NAME]", action="append", help="key to carry, under another name; may be repeated"
    )
    parser.add_argument("--where", metavar="KEY=A,B", action="append", default=[], help="take lines with these values")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="first line to take, from 0 (%(default)s)")
    parser.add_argument("--last", type=int, metavar="N", help="last line to take (the last there is)")
    args = parser.parse_args(argv)
    try:
        counts = convert(
            args.source, args.out, id_key=args.id, text_key=args.text, keep=args.keep, where=args.where,
            first=args.first, last=args.last,
        )  # fmt: skip
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"out": str(args.out), "n_prompts": sum(counts.values()), "by_category": counts}))
    return 0


def convert(
    source: Path,
    out: Path,
    *,
    id_key: str | None = None,
    text_key: str | None = None,
    keep: Sequence[str] | None = None,
    where: Sequence[str] = (),
    first: int = 0,
    last: int | None = None,
) -> dict[str, int]:
    """Write the prompts file; return how many prompts each category has.

    Args:
        source: file to read.
        out: prompts file to write.
        id_key, text_key: keys or paths of them; None for the first that is there of those known.
        keep: ``KEY`` or ``KEY=NAME``, which each line must have; None for the category where it is there.
        where: ``KEY=A,B``.
        first, last: numbers of lines, from 0, blank ones not counted; both are taken.

    Raises:
        InputError: a file or a key is not there, no line is taken, or the result is no prompts file.
    """
    if out.exists():
        raise InputError(f"{out} is already there; remove it or give another --out")
    wanted = [_parted(one, "--where KEY=A,B") for one in where]
    kept = [one.partition("=")[::2] for one in keep] if keep is not None else None
    prompts: list[dict[str, Any]] = []
    makes_ids = False
    for number, (place, record) in enumerate(_records(source)):
        if number < first or (last is not None and number > last):
            continue
        if any(str(_value(record, key, place)) not in values.split(",") for key, values in wanted):
            continue
        found = [key for key in ID_KEYS if key in record]
        if not prompts:
            makes_ids = id_key is None and not found
        elif makes_ids and found:
            raise InputError(f"{place}: it has {found[0]!r}, rows before it have none: give all rows one, or none")
        own_id = f"row-{number + 1:06}" if makes_ids else _text(record, [id_key] if id_key else ID_KEYS, place, "--id")
        prompt = {
            "id": own_id,
            "prompt": _text(record, [text_key] if text_key else TEXT_KEYS, place, "--text"),
        }
        if kept is None:
            prompt |= {CATEGORY: record[CATEGORY]} if CATEGORY in record else {}
        else:
            prompt |= {name or key: _value(record, key, place) for key, name in kept}
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"no line of {source} is taken; look at --where, --first and --last")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:  # OUT is there whole and readable, or not at all
        written = Path(scratch) / out.name
        written.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts), encoding="utf-8")
        try:
            read = read_prompts(written)
        except InputError as error:
            said = str(error).replace(str(written), "the result")
            raise InputError(f"what is taken of {source} is no prompts file: {said}") from error
        written.rename(out)
    if makes_ids:
        first = prompts[0]["id"]
        print(f"{source} has none of {', '.join(ID_KEYS)}: rows are named {first} and so on", file=sys.stderr)
    return dict(Counter(str(prompt.carried.get(CATEGORY, "")) for prompt in read))


def _records(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the file, and where it stands."""
    if not source.is_file():
        raise InputError(f"{no_file(source, 'file of prompts')}; give a JSON Lines, CSV or Parquet file")
    for row in open_prompt_file(source).rows():
        yield row.where, row.record


def _value(record: Mapping[str, Any], path: str, place: str) -> Any:
    value: Any = record
    for key in path.split("."):
        value = value.get(key, _MISSING) if isinstance(value, Mapping) else _MISSING
    if value is _MISSING:
        raise InputError(f"{place}: no {path!r}; it has {', '.join(record)}")
    return value


def _text(record: Mapping[str, Any], keys: Sequence[str], place: str, flag: str) -> str:
    """The value of the first key that is there, a whole number as text."""
    for key in keys:
        if len(keys) == 1 or key in record:
            value = _value(record, key, place)
            return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    raise InputError(f"{place}: none of {', '.join(keys)}; it has {', '.join(record)}: name one by {flag}")


def _parted(text: str, expected: str) -> tuple[str, str]:
    key, mark, values = text.partition("=")
    if not (key and mark and values):
        raise InputError(f"{text!r} is not {expected}")
    return key, values


if __name__ == "__main__":
    sys.exit(main())
