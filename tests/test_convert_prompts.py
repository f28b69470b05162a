"""The converter: prompts files of files whose keys have other names."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from actcache.prompts import read_prompts

SCRIPT = Path(__file__).parent.parent / "scripts" / "convert_prompts.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_prompts", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def convert(script, tmp_path, capsys):
    """``convert(lines, *words)``: exit code, the prompts that were made, and what was said."""

    def run(lines, *words):
        source, out = tmp_path / "theirs.jsonl", tmp_path / "out" / "prompts.jsonl"
        source.write_text("".join(f"{json.dumps(line)}\n\n" for line in lines))
        code = script.main([str(source), "--out", str(out), *words])
        said = capsys.readouterr()
        return code, read_prompts(out) if out.exists() else None, said.out + said.err

    return run


def test_known_names_are_found(convert):
    lines = [
        {"record_id": "a1", "question": "Where is the mill?", "category": "FACT", "answer": "by the river"},
        {"id": 7, "prompt": "Say hello.", "question": "unused"},
    ]
    code, prompts, said = convert(lines)
    assert code == 0
    assert [(one.id, one.text, one.carried) for one in prompts] == [
        ("a1", "Where is the mill?", {"category": "FACT"}),
        ("7", "Say hello.", {}),
    ]
    assert json.loads(said)["by_category"] == {"FACT": 1, "": 1}


def test_names_paths_and_slices_can_be_given(convert):
    lines = [
        {"meta": {"uid": f"u{at}", "topic": "t"}, "formats": {"raw": f"text {at}"}, "kind": "ab"[at % 2], "n": at}
        for at in range(10)
    ]
    words = ["--id", "meta.uid", "--text", "formats.raw", "--keep", "meta.topic=topic", "--keep", "kind=category"]
    code, prompts, said = convert(lines, *words, "--keep", "n", "--where", "kind=b,c", "--first", "2", "--last", "7")
    assert code == 0
    assert [one.id for one in prompts] == ["u3", "u5", "u7"]
    assert prompts[0].carried == {"topic": "t", "category": "b", "n": 3}
    assert json.loads(said) | {"out": ""} == {"out": "", "n_prompts": 3, "by_category": {"b": 3}}


def test_rows_without_ids_are_named_by_their_numbers_and_this_is_said(convert):
    lines = [{"question": f"text {at}", "kind": "ab"[at % 2]} for at in range(5)]
    code, prompts, said = convert(lines, "--where", "kind=b")
    assert code == 0
    assert [(one.id, one.text) for one in prompts] == [("row-000002", "text 1"), ("row-000004", "text 3")]
    assert "theirs.jsonl has none of id, record_id, prompt_id, example_id: rows are named row-000002 and so on" in said


@pytest.mark.parametrize(
    ("lines", "words", "said"),
    [
        ([{"id": "a", "body": "x"}], [], "line 1: none of prompt, question, text, instruction; it has id, body: name"),
        ([{"id": "a", "prompt": "x"}, {"prompt": "y"}], [], "line 3: none of id, record_id"),
        ([{"prompt": "x"}, {"record_id": "a", "prompt": "y"}], [], "line 3: it has 'record_id', rows before it have"),
        ([{"prompt": "x"}], ["--id", "name"], "line 1: no 'name'; it has prompt"),
        ([{"id": "a", "prompt": "x"}], ["--keep", "topic"], "line 1: no 'topic'; it has id, prompt"),
        ([{"id": "a", "prompt": {"raw": "x"}}], ["--text", "prompt.chat"], "line 1: no 'prompt.chat'"),
        ([{"id": "a", "prompt": {"raw": "x"}}], [], "'prompt' is {"),
        ([{"id": "a", "prompt": "x", "step": 1}], ["--keep", "step"], "'step' is the name of a result column"),
        (
            [{"id": "a", "prompt": "x"}] * 2,
            [],
            "theirs.jsonl is no prompts file: the result, line 2: id 'a' is already the id of line 1",
        ),
        ([{"id": "a", "prompt": "x"}], ["--first", "1"], "no line of"),
        ([{"id": "a", "prompt": "x"}], ["--where", "id"], "'id' is not --where KEY=A,B"),
        (["text"], [], "line 1: a JSON str, expected an object"),
    ],
)
def test_what_is_no_prompt_is_one_clear_line(convert, lines, words, said):
    code, prompts, found = convert(lines, *words)
    assert code == 2
    assert prompts is None
    assert said in found
    assert len(found.strip().splitlines()) == 1


def test_a_file_that_is_there_is_kept(convert):
    lines = [{"id": "a", "prompt": "x"}]
    assert convert(lines)[0] == 0
    code, prompts, said = convert([{"id": "b", "prompt": "y"}])
    assert code == 2
    assert "is already there" in said
    assert [one.id for one in prompts] == ["a"]
