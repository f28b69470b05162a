"""Prompts files: what is read, what is refused, and in which words."""

from __future__ import annotations

import csv
import datetime
import gzip
import hashlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import read_tree

from actcache import carried, prompt_files
from actcache import prompts as prompts_module
from actcache.carried import as_columns, encode
from actcache.cli import main
from actcache.errors import InputError
from actcache.models import prompt_ids
from actcache.models.lineup import Lineup
from actcache.prompts import Prompt, Prompts, digest, digests, n_messages, read_prompts
from actcache.store import open_store


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_further_keys_are_carried_and_blank_lines_skipped(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '{"id": "a", "prompt": " two\\nlines ", "category": "x", "n": 3}',
        "",
        '{"id": "b", "prompt": "\u00e9\u2028"}',
    )
    assert read_prompts(path) == [
        Prompt("a", " two\nlines ", {"category": "x", "n": 3}),
        Prompt("b", "\u00e9\u2028", {}),
    ]


def test_limit_takes_the_first_but_validates_all(tmp_path):
    path = write(tmp_path / "p.jsonl", *(json.dumps({"id": str(i), "prompt": "x"}) for i in range(5)))
    assert [prompt.id for prompt in read_prompts(path, limit=2)] == ["0", "1"]
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(InputError, match="line 6: not JSON"):
        read_prompts(path, limit=2)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "a JSON list, expected an object"),
        ('{"id": "b"}', "no 'prompt'"),
        ('{"prompt": "x"}', "no 'id'"),
        ('{"id": 7, "prompt": "x"}', "'id' is 7, expected text"),
        ('{"id": "b", "prompt": ["x"]}', "'prompt' is .*expected text"),
        ('{"id": "b", "prompt": ""}', "'prompt' is empty"),
        ('{"id": "b", "prompt": " \\n"}', "'prompt' is empty"),
        ('{"id": " ", "prompt": "x"}', "'id' is empty"),
        ('{"id": "a", "prompt": "x"}', "id 'a' is already the id of line 1"),
        ('{"id": "b", "prompt": "\\ud800"}', "lone surrogate"),
        ('{"id": "b\\udc00", "prompt": "x"}', r"'id' holds a lone surrogate at character 1"),
        ('{"id": "b", "prompt": "x", "margin": 1}', "key 'margin' is the name of a result column"),
        ('{"id": "b", "prompt": "x", "gap_pt": 1}', "key 'gap_pt' is the name of a result column"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = write(tmp_path / "p.jsonl", '{"id": "a", "prompt": "x"}', line)
    with pytest.raises(InputError, match=words) as caught:
        read_prompts(path)
    assert "line 2" in str(caught.value)
    assert "\n" not in str(caught.value)


def line_with(more: str) -> str:
    return f'{{"id": "b", "prompt": "x", {more}}}'


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (r'"note": "cut \ud83d"', r"'note' holds a lone surrogate at character 4"),
        (r'"meta": {"by": ["x", "a\udc00"]}', r"'meta'\['by'\]\[1\] holds a lone surrogate at character 1"),
        (r'"\ud83dkey": 1', r"key '.ud83dkey' holds a lone surrogate at character 0"),
        (r'"meta": {"\uD83Dkey": 1}', r"key '.ud83dkey' holds a lone surrogate"),
        (f'"n": {"9" * 5000}', "an integer of thousands of digits"),
        (f'"n": [{{"m": -{"9" * 5000}}}]', "an integer of thousands of digits"),
        ('"n": NaN', "NaN is not JSON"),
        ('"n": {"m": [-Infinity]}', "-Infinity is not JSON"),
        ('"n": 1e999', "the number 1e999 is beyond a float64"),
        (f'"n": {"[" * 64}{"]" * 64}', "lie more than 64 deep"),
        (f'"n": {"[" * 100_000}{"]" * 100_000}', "lie too deep"),
        ('"n": 1, "n": 2', "key 'n' stands twice in one object"),
        ('"prompt": "y"', "key 'prompt' stands twice in one object"),
        ('"meta": {"a": 1, "a": 1}', "key 'a' stands twice in one object"),
        ('"": 1', "key '' cannot be the name of a column"),
        (r'"a\u0000": 1', r"key 'a.x00' cannot be the name of a column"),
        (f'"{"k" * 1001}": 1', "key 'k+' cannot be the name of a column: .* more than 1000 characters"),
    ],
)
def test_what_cannot_be_carried_is_found_in_the_file(tmp_path, more, words):
    path = write(tmp_path / "p.jsonl", '{"id": "a", "prompt": "x"}', line_with(more))
    with pytest.raises(InputError, match=f"line 2: .*{words}") as caught:
        read_prompts(path, limit=1)
    assert len(str(caught.value)) < 300 + len(str(path))
    str(caught.value).encode()


@pytest.mark.parametrize(
    "more",
    [
        r'"note": "\ud83d\ude00"',
        f'"n": {"9" * 4000}',
        '"n": 1e308',
        f'"n": {"[" * 63}{"]" * 63}',
        '"meta": {"a": 1}, "a": 1',
        f'"{"k" * 1000}": 1',
    ],
    ids=["a whole character", "digits", "a large number", "as deep as allowed", "one key in two objects", "a long key"],
)
def test_what_a_store_and_its_tables_hold_is_carried(tmp_path, more):
    (prompt,) = read_prompts(write(tmp_path / "p.jsonl", line_with(more)))
    assert prompt.carried == json.loads(f"{{{more}}}")
    columns = as_columns([encode(prompt.carried)])
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    assert pq.read_table(tmp_path / "table.parquet").column_names == sorted(prompt.carried)


def test_the_number_of_carried_keys_is_that_of_all_prompts(tmp_path):
    rows = [{"id": str(i), "prompt": "x"} | {f"k{i // 2}_{k}": 1 for k in range(500)} for i in range(5)]
    path = write(tmp_path / "p.jsonl", *map(json.dumps, rows[:4]))
    assert len(read_prompts(path)) == 4
    path = write(path, *map(json.dumps, rows))
    with pytest.raises(InputError, match="line 5: the prompts to here carry 1500 distinct keys, at most 1000"):
        read_prompts(path, limit=1)


def test_carried_text_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(carried, "MAX_BYTES", 3000)
    rows = [{"id": str(i), "prompt": "x" * 5000, "document": "\u00e9" * 600} for i in range(3)]
    assert (
        len(read_prompts(write(tmp_path / "p.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows[:2])))) == 2
    )
    with pytest.raises(InputError, match="line 3: the prompts to here carry more than 3000 bytes"):
        read_prompts(write(tmp_path / "p.jsonl", *(json.dumps(row, ensure_ascii=False) for row in rows)))


def test_an_id_is_no_longer_than_a_path(tmp_path):
    path = write(tmp_path / "p.jsonl", json.dumps({"id": "i" * 1000, "prompt": "x"}))
    assert len(read_prompts(path)) == 1
    write(path, json.dumps({"id": "i" * 1001, "prompt": "x"}))
    with pytest.raises(InputError, match="'id' has 1001 characters, at most 1000 are read"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "Once upon a time\n", r"line 1: not JSON .*plain text, expected JSON Lines: one \{'id': str"),
        ("p.csv", 'id,"prompt\n', "line 1: not CSV"),
        ("p.csv", "prompt\n", "no prompts in it"),
        ("p.csv", "", "no prompts in it"),
        ("p.csv", '7,"x"\n8,y\n', "line 2: no 'prompt'"),
        ("p.csv", "id,prompt\na,b,c\n", "line 2: 3 cells, expected 2: id, prompt"),
        ("p.csv", "id,id\na,b\n", "expected distinct ones"),
        ("p.csv", "prompt,token_ids\n,1 2\n", "line 2: 'token_ids': not JSON"),
        ("p.csv", 'prompt\na\n"b\nc\0"\n', "line 4: a NUL byte, expected text; write the file again as UTF-8"),
        ("p.tsv", "prompt\0\na\n", "line 1: a NUL byte"),
        ("p.jsonl", '{"prompt": "a\0"}', "line 1: not JSON .*control character"),
        ("p.txt", "7\n", "line 1: a JSON int, expected an object .*plain text"),
        ("p.json", '[{"id": "a", "prompt": "x"}]', "line 1: a JSON list, .*JSON array, expected JSON Lines.*jq"),
        ("p.json", '[\n {"id": "a", "prompt": "x"}\n]', "line 1: not JSON .*JSON array, expected JSON Lines.*jq"),
        ("p.json", '{\n "id": "a",\n "prompt": "x"\n}', "line 1: not JSON .*an object stands on one line"),
        ("p.parquet", b"PAR1\xff\xff", "is no whole Parquet file"),
        ("p.parquet", b"{}", "is no whole Parquet file"),
        ("p.jsonl.gz", b"\x1f\x8b\x08\xff", "is no whole gzip file"),
        ("p.jsonl.zst", b"\x28\xb5\x2f\xfd", "compressed by zstd: unpack it"),
    ],
)
def test_another_kind_of_file_says_what_it_is_and_the_way_on(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words) as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(InputError, match="no such prompts file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="is a folder, not a prompts file; give a JSON Lines file"):
        read_prompts(tmp_path)
    with pytest.raises(InputError, match="is a pipe or a device, not a prompts file"):
        read_prompts("/dev/null")
    with pytest.raises(InputError, match="no prompts in it"):
        read_prompts(write(tmp_path / "e.jsonl", "", " "))
    (tmp_path / "b.jsonl").write_bytes(b'{"id": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(tmp_path / "b.jsonl")


@given(st.text(), st.text(), st.dictionaries(st.text(), st.none() | st.text() | st.lists(st.integers() | st.floats())))
def test_a_digest_is_of_json_lines(name, text, further):
    messages = [{"role": "user", "content": text}]
    for prompt, content in (
        (Prompt(name, text, further), text),
        (Prompt(name, "", further, messages=messages), {"messages": messages}),
        (Prompt(name, "", further, token_ids=[1, 2]), {"token_ids": [1, 2]}),
    ):
        line = json.dumps([name, content, further], sort_keys=True) + "\n"
        assert digest([prompt]) == hashlib.sha256(line.encode()).hexdigest()


def test_digest_sees_every_part_and_nothing_else():
    one = [Prompt("a", "x", {"k": 1, "l": 2})]
    assert digest(one) == digest([Prompt("a", "x", {"l": 2, "k": 1})])
    others = [[Prompt("b", "x", {"k": 1, "l": 2})], [Prompt("a", "y", {"k": 1, "l": 2})], [Prompt("a", "x", {"k": 1})]]
    assert len({digest(one), *map(digest, others), digest(one * 2)}) == 5


# ---- messages and token ids ----

ASKED = {"role": "user", "content": "Why?"}


def test_a_line_has_text_messages_or_token_ids(tmp_path):
    lines = [
        {"id": "a", "prompt": "x", "k": 1},
        {"id": "b", "messages": [ASKED], "k": 2},
        {"id": "c", "token_ids": [3, 0, 3]},
    ]
    found = read_prompts(write(tmp_path / "p.jsonl", *map(json.dumps, lines)))
    assert found == [
        Prompt("a", "x", {"k": 1}),
        Prompt("b", "", {"k": 2}, messages=[ASKED]),
        Prompt("c", "", token_ids=[3, 0, 3]),
    ]
    assert found[1].named == f"{tmp_path / 'p.jsonl'}, line 2: prompt 'b'"
    assert n_messages(found) == 1
    as_text = [Prompt(one.id, json.dumps(one.content), one.carried) for one in found]
    assert len({digest([one]) for one in (*found, *as_text)}) == 6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": "x", "messages": [ASKED]}, "'prompt' and 'messages'; a line has one of 'prompt', 'messages', 'tok"),
        ({"token_ids": [1], "messages": [ASKED]}, "'messages' and 'token_ids'"),
        ({"messages": []}, r"'messages' is \[\], expected"),
        ({"messages": "Why?"}, "'messages' is .Why.., expected"),
        ({"messages": ["Why?"]}, "message 1 of 1 is .Why.., expected"),
        ({"messages": [ASKED, {"role": "user"}]}, "message 2 of 2: 'content' is null, expected text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"'content' is \[.*expected text"),
        ({"messages": [{"role": "user", "content": " "}]}, "'content' is empty"),
        ({"messages": [{**ASKED, "tool_calls": []}]}, "has 'tool_calls', which is not rendered"),
        ({"messages": [ASKED, {"role": "assistant", "content": "So."}]}, "last message is the assistant's own"),
        ({"token_ids": []}, "'token_ids' is .., expected a list of whole numbers"),
        ({"token_ids": [1, -1]}, "'token_ids' is .*expected"),
        ({"token_ids": [1, True]}, "'token_ids' is .*expected"),
        ({"token_ids": [1, 2**31]}, "'token_ids' is .*expected"),
        ({"token_ids": "1 2"}, "'token_ids' is .*expected"),
    ],
)
def test_what_is_no_chat_and_no_ids_is_named(tmp_path, given, words):
    path = write(tmp_path / "p.jsonl", '{"id": "a", "prompt": "x"}', json.dumps({"id": "b", **given}))
    with pytest.raises(InputError, match=f"line 2: .*{words}|line 2: {words}") as caught:
        read_prompts(path)
    assert "\n" not in str(caught.value)


# ---- tables, and large files ----

FORMATS = ("jsonl", "jsonl.gz", "csv", "csv.gz", "tsv", "parquet")


def written(path: Path, rows: list[dict[str, str]], row_group_size: int = 3) -> Path:
    """A file of rows with the same keys, by the end of its name."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    if plain.suffix == ".parquet":
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
        return path
    with plain.open("w", encoding="utf-8", newline="") as file:
        if plain.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if plain.suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    if path != plain:
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    return path


ROWS = [
    {"id": f"p{i}", "prompt": 'one, "two"\n' + "\u00e9" * i + "\tthree", "category": "x,y"[: i + 1]} for i in range(8)
]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_prompts(tmp_path, name):
    found = read_prompts(written(tmp_path / f"p.{name}", ROWS))
    assert found == [Prompt(row["id"], row["prompt"], {"category": row["category"]}) for row in ROWS]
    kind = "row" if name == "parquet" else "line"
    assert all(f"p.{name}, {kind} " in prompt.where for prompt in found)


@pytest.mark.parametrize("name", ["csv", "parquet"])
def test_rows_of_a_table_may_have_no_ids(tmp_path, name):
    found = read_prompts(written(tmp_path / f"p.{name}", [{"prompt": "a"}, {"prompt": "b"}]))
    assert [(one.id, one.text) for one in found] == [("0", "a"), ("1", "b")]


def parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_a_parquet_table_has_lists_numbers_and_nulls(tmp_path):
    columns = {
        "id": [7, 8, 9],
        "prompt": [None, None, "x"],
        "token_ids": [[1, 2], None, None],
        "messages": [None, [{"role": "user", "content": "Why?", "name": None}], None],
        "n": [1, None, 3],
    }
    assert read_prompts(parquet(tmp_path / "p.parquet", **columns)) == [
        Prompt("7", "", {"n": 1}, token_ids=[1, 2]),
        Prompt("8", "", {}, messages=[ASKED]),
        Prompt("9", "x", {"n": 3}),
    ]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": ["a"]}, "row 1: no 'prompt' among its filled columns, 'text';"),
        ({"prompt": ["a", None]}, "row 2: no 'prompt'"),
        ({"prompt": ["a"], "at": [datetime.datetime(2024, 1, 1)]}, "row 1: 'at' is a datetime, which is not JSON"),
        ({"prompt": ["a"], "x": [float("nan")]}, "row 1: 'x' is nan, which is not JSON; make it null"),
        ({"prompt": ["a"], "margin": [1.0]}, "row 1: key 'margin' is the name of a result column"),
        ({"prompt": ["a", "b"], "id": [1, 1]}, "row 2: id '1' is already the id of row 1"),
        ({"prompt": []}, "no prompts in it"),
    ],
)
def test_a_row_of_a_table_that_is_none_is_named(tmp_path, columns, words):
    with pytest.raises(InputError, match=words):
        read_prompts(parquet(tmp_path / "p.parquet", **columns))


@pytest.fixture
def nothing_held(monkeypatch):
    monkeypatch.setattr(prompts_module, "MAX_HELD", 2)
    monkeypatch.setattr(prompts_module, "_STRIDE", 3)
    monkeypatch.setattr(prompt_ids, "N_SAMPLED", 2)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(FORMATS),
    st.lists(st.text('ab \n,"\t\u00e9', min_size=1).filter(str.strip), min_size=3, max_size=12),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4),
    st.integers(1, 5),
    st.none() | st.integers(3, 12),
)
def test_prompts_read_again_are_those_of_a_list(tmp_path, nothing_held, name, texts, parts, size, limit):
    """The slow twin: all of them in a list."""
    rows = [{"id": str(i), "prompt": text, "category": "x"} for i, text in enumerate(texts)]
    held = [Prompt(row["id"], row["prompt"], {"category": "x"}) for row in rows][:limit]
    found = read_prompts(written(tmp_path / f"p.{name}", rows), limit, size)
    assert isinstance(found, Prompts)
    assert len(found) == len(held)
    assert [found[i] for i in reversed(range(len(found)))] == held[::-1]
    assert list(found) == held
    assert found[-1] == held[-1]
    assert found[::2] == held[::2]
    for start, stop in parts:
        assert found[start:stop] == held[start:stop]
        assert digest(found, min(start, stop), min(max(start, stop), len(held))) == digest(
            held[min(start, stop) : max(start, stop)]
        )
    starts = range(0, len(held), size)
    assert [found.known.of(i, min(i + size, len(held))) for i in starts] == [digest(held[i : i + size]) for i in starts]
    assert digest(found) == digest(held) == [*digests(held)][-1]


@pytest.mark.parametrize("name", FORMATS)
def test_segment_after_segment_reads_a_file_once(tmp_path, nothing_held, name, monkeypatch):
    found, n_started = read_prompts(written(tmp_path / f"p.{name}", ROWS)), []
    for of, method in ((gzip._GzipReader, "_rewind"), (pq.ParquetFile, "iter_batches")):
        own = getattr(of, method)
        monkeypatch.setattr(of, method, lambda *a, own=own, **k: (n_started.append(1), own(*a, **k))[1])
    assert [one.id for start in range(0, 8, 3) for one in found[start : start + 3]] == [row["id"] for row in ROWS]
    assert len(n_started) == (name in ("jsonl.gz", "csv.gz", "parquet"))


@pytest.mark.parametrize("name", FORMATS)
def test_several_may_read_a_large_file_at_once(tmp_path, nothing_held, monkeypatch, name):
    monkeypatch.setattr(prompt_files, "_BYTES_AT_ONCE", 50)
    found = read_prompts(written(tmp_path / f"p.{name}", ROWS))
    both = zip(found, zip(itertools.islice(found, 2, None), found, strict=False), strict=False)
    assert [(a.id, b.id, c.id) for a, (b, c) in both] == [(f"p{i}", f"p{i + 2}", f"p{i}") for i in range(6)]


def test_a_large_file_that_changes_is_noticed(tmp_path, nothing_held):
    found = read_prompts(written(tmp_path / "p.jsonl", ROWS))
    assert found[3].id == "p3"
    written(tmp_path / "p.jsonl", ROWS[1:])
    with pytest.raises(InputError, match="has changed since it was read; start again"):
        found[3]


def test_ids_of_a_large_file_are_unique(tmp_path, nothing_held, monkeypatch):
    path = written(tmp_path / "p.jsonl", [*ROWS, {**ROWS[0], "id": "p5"}])
    with pytest.raises(InputError, match="line 9: id 'p5' is already the id of line 6"):
        read_prompts(path)
    monkeypatch.setattr(prompts_module, "hash", lambda text: 0, raising=False)  # all the same
    assert len(read_prompts(written(tmp_path / "p.jsonl", ROWS))) == len(ROWS)


@pytest.mark.slow
def test_a_large_file_gives_the_store_of_a_small_one_and_says_late_what_is_wrong(tmp_path, monkeypatch, capfd):
    pair = tiny.make_pair(tmp_path, "llama")
    path = tiny.write_prompts(tmp_path / "p.jsonl", 12)
    words = ["capture", "--pt", str(pair[0]), "--it", str(pair[1]), "--prompts", str(path), "--shard-prompts", "3"]
    words += ["--max-new", "8", "--strict"]
    assert main([*words, "--out", str(tmp_path / "small")]) == 0
    monkeypatch.setattr(prompts_module, "MAX_HELD", 2)
    monkeypatch.setattr(prompt_ids, "N_SAMPLED", 2)
    assert main([*words, "--out", str(tmp_path / "large")]) == 0
    small, large = (read_tree(tmp_path / name / "store") for name in ("small", "large"))
    assert small == large
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, *(json.dumps({"id": f"q{i}", "prompt": "many " * 300}) for i in range(2))]))
    capfd.readouterr()
    assert main([*words, "--out", str(tmp_path / "large")]) == 2
    assert f"{path}, line 13: prompt 'q0' has" in capfd.readouterr().err
    assert len(open_store(tmp_path / "large" / "store").segments) == 4
    path.write_text("\n".join([*lines, json.dumps({"id": "q0", "prompt": "fewer"})]))
    assert main([*words, "--out", str(tmp_path / "large")]) == 0
    assert len(open_store(tmp_path / "large" / "store").segments) == 5


class Encoded:
    """A lineup whose prompts have their own numbers as ids; it knows which it has encoded."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompts, say=None, rendering=None, longest=None):
        self.asked += [prompt.id for prompt in prompts]
        return [[int(prompt.id)] * (1 + int(prompt.id) % 3) for prompt in prompts]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 5), st.booleans(), st.data())
def test_a_part_encodes_its_own_prompts_alone(tmp_path, nothing_held, n, size, n_parts, is_large, data):
    rows = [{"id": str(i), "prompt": f"text {i}"} for i in range(n)]
    held = [Prompt(row["id"], row["prompt"]) for row in rows]
    prompts = read_prompts(written(tmp_path / "p.jsonl", rows)) if is_large and n > 2 else held
    part = data.draw(st.integers(0, n_parts - 1))
    own = [range(start, min(n, start + size)) for start in range(0, n, size)][part::n_parts]
    lineup = Encoded()
    ids = prompt_ids.PromptIds(lineup, prompts, own=own)
    mine = {str(number) for numbers in own for number in numbers}
    assert set(lineup.asked) <= mine
    if not isinstance(prompts, Prompts):
        assert sorted(lineup.asked) == sorted(mine), "each once"
    found = [ids.of(numbers.start, prompts[numbers.start : numbers.stop]) for numbers in own]
    assert found == [Encoded().encode(held[numbers.start : numbers.stop]) for numbers in own]
    assert set(lineup.asked) <= mine
    assert ids.of(0, held[:2]) == Encoded().encode(held[:2]), "others too, where they are asked for after all"
    if not ids.is_sampled:
        assert list(ids.lengths) == [len(one) for of in found for one in of]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["1/3", "3/3"])
def test_a_capture_of_a_part_encodes_no_other(part, tmp_path, monkeypatch):
    asked, pair = [], tiny.make_pair(tmp_path, "llama")
    path = tiny.write_prompts(tmp_path / "p.jsonl", 12)
    real = Lineup.encode
    monkeypatch.setattr(Lineup, "encode", lambda self, p, *a, **k: (asked.extend(p), real(self, p, *a, **k))[1])
    words = ["capture", "--pt", str(pair[0]), "--it", str(pair[1]), "--prompts", str(path), "--shard-prompts", "2"]
    assert main([*words, "--max-new", "4", "--out", str(tmp_path / "out"), "--part", part]) == 0
    first = 2 * (int(part[0]) - 1)
    ids = [prompt.id for prompt in read_prompts(path)]
    assert {prompt.id for prompt in asked} == {*ids[first : first + 2], *ids[first + 6 : first + 8]}


PEAK = """
import re, sys
from pathlib import Path
from actcache.prompts import Prompts, digest, read_prompts
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
prompts = read_prompts(sys.argv[1])
assert isinstance(prompts, Prompts) and len(prompts) == int(sys.argv[2])
assert len(prompts[-64:]) == 64
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("n", "length"), [(40_000, 50), (1_000, 100_000)], ids=["many", "long"])
def test_a_large_file_is_never_held(tmp_path, n, length):
    """In a process of its own: peak memory above the imports; the second file has 100 MB."""
    path = tmp_path / "p.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps({"id": f"p{i}", "prompt": "x" * length}) + "\n" for i in range(n))
    done = subprocess.run([sys.executable, "-c", PEAK, path, str(n)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.25 * prompts_module.MAX_HELD_BYTES
