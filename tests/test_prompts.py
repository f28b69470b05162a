"""Prompts files: what is read, what is refused, and in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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


def test_missing_empty_and_binary_files(tmp_path):
    with pytest.raises(InputError, match="no such prompts file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="no such prompts file"):
        read_prompts(tmp_path)
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
