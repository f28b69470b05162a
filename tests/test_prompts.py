"""Prompts files: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache import carried
from actcache.carried import as_columns, encode
from actcache.errors import InputError
from actcache.prompts import Prompt, digest, read_prompts


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


def test_digest_sees_every_part_and_nothing_else():
    one = [Prompt("a", "x", {"k": 1, "l": 2})]
    assert digest(one) == digest([Prompt("a", "x", {"l": 2, "k": 1})])
    others = [[Prompt("b", "x", {"k": 1, "l": 2})], [Prompt("a", "y", {"k": 1, "l": 2})], [Prompt("a", "x", {"k": 1})]]
    assert len({digest(one), *map(digest, others), digest(one * 2)}) == 5
