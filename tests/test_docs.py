"""What README and the documents say to type, typed: on a pair of bfloat16 checkpoints, with prompts like a chat's.

A block in ``sh``, ``python`` or ``toml``, and one with a line that begins with ``$``, runs, or says in a comment before
it what it needs that a test has not: ``<!-- not run: needs ... -->``. Those are listed as skipped.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

import actcache
from actcache.cli import build_parser, main
from actcache.replay.edits import Add, Edit, Project, Variant

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path for pattern in ("README.md", "docs/**/*.md", "actcache/**/*.md") for path in sorted(ROOT.glob(pattern))
]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<needs>needs [^\n]+) -->\n)?```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One block to type."""

    where: str
    kind: str
    text: str
    needs: str | None


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        where = f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
        typed = match["kind"] or re.search(r"^\$ ", match["text"], re.M)
        if typed:
            found.append(Block(where, match["kind"] or "sh", match["text"], match["needs"]))
    return found


BLOCKS = {path: blocks_of(path) for path in DOCUMENTS}
NOT_RUN = [block for blocks in BLOCKS.values() for block in blocks if block.needs]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader is: with a pair as deep as SmolLM2's, its prompts, and what the checkout has."""
    pt, it = tiny.make_pair(tmp_path, "llama", dtype=torch.bfloat16, num_hidden_layers=30, boundary=18)
    pt.rename(tmp_path / "PT_FOLDER")
    it.rename(tmp_path / "IT_FOLDER")
    lines = [{"id": f"chat-{i}", "prompt": f"User: {text}\nAssistant:"} for i, text in enumerate(tiny.PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if BLOCKS[path]], ids=lambda path: path.name)
def test_every_block_runs_as_written(path, folder, capsys):
    """One after another: later Python goes on with the names of earlier ones."""
    names = {"__name__": "__main__"}
    for block in BLOCKS[path]:
        if block.needs:
            continue
        try:
            if block.kind == "python":
                exec(compile(block.text, block.where, "exec"), names)
            elif block.kind == "toml":
                (folder / "sweep.toml").write_text(block.text)
                assert main(["grid", "RUN", "--sweep", "sweep.toml"]) == 0
            else:
                run_lines(block)
        except BaseException as error:
            raise AssertionError(f"{block.where} does not run as written: {error!r}") from error


def run_lines(block):
    for line in block.text.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line, comments=True) or [""]
        if program:
            assert program == "actcache", f"{block.where}: {program} is not run here; say what it needs"
            assert main(words) == 0, line


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.where)
def test_what_is_not_run(block):
    pytest.skip(f"{block.where} {block.needs}")


def test_every_kind_of_block_is_known():
    for blocks in BLOCKS.values():
        assert {block.kind for block in blocks} <= {"sh", "python", "toml"}
    assert any(block.kind == "python" and not block.needs for block in BLOCKS[ROOT / "README.md"])


def inline_commands():
    text = re.sub(r"^```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    return dict.fromkeys(match.replace("\n", " ") for match in re.findall(r"`(actcache [a-z][^`]*)`", text))


@pytest.mark.parametrize("command", inline_commands())
def test_commands_within_sentences_are_none_that_fail(command, capsys):
    """Those that are written out parse; those that name a verb and an option name ones that there are."""
    words = shlex.split(command.replace("...", ""))[1:]
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    options = action.choices[words[0]]._option_string_actions
    for word in words[1:]:
        assert not word.startswith("--") or word in options, command


def test_scripts_within_sentences_are_there_with_their_options():
    text = (ROOT / "README.md").read_text()
    commands = [match.replace("\n", " ").split() for match in re.findall(r"`python ([^`]+\.py[^`]*)`", text)]
    assert len(commands) > 5
    for script, *words in commands:
        path = ROOT / script
        said = path.read_text()
        if path.parent.name == "benches":
            said += (path.parent / "study.py").read_text()  # the options that several benches share
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in said, f"{script} has no {word}"


def test_every_extra_is_named_where_it_is_needed():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "README.md").read_text()
    for name in extras.keys() - {"test", "check"}:
        assert f"pip install '.[{name}]'" in text, name


def test_a_run_is_a_place_of_a_store(tiny_run):
    run = tiny_run("llama", torch.float32)
    assert actcache.open_store(run.out).events.equals(actcache.open_store(run.out / "store").events)
    assert actcache.open_store(str(run.out)).fingerprint == run.store.fingerprint


def test_the_public_names_are_what_dir_lists():
    assert dir(actcache) == sorted(actcache.__all__) == actcache.__all__
    for name in dir(actcache):
        assert getattr(actcache, name).__doc__


def test_what_is_printed_is_one_useful_line(tiny_run):
    run = tiny_run("llama", torch.float32)
    store = run.store
    late = actcache.LateStack.load(run.it, boundary=3, dtype=store.dtype)
    feed = actcache.RowFeed(store, batch_rows=32)
    shown = {
        store: f"<Store {store.path}: 24 events, states of pt, it at 3, float32, width 32>",
        late: "<LateStack of LlamaModel: blocks 3..4, float32, width 32, on cpu, packed>",
        feed: f"<RowFeed: {feed.chosen.n_rows} rows of pt, it at 3, batches of 32, shuffle blocks, epoch 0>",
    }
    for thing, line in shown.items():
        assert repr(thing) == line
    assert repr(feed) in repr(actcache.ActivationBuffer(feed))
    vector = torch.zeros(4096)
    steered = Variant("steered", (Edit(Add(vector, 4.0), positions="all"), Edit(Project(torch.eye(4096)[:2]))))
    assert repr(steered) == (
        "Variant(name='steered', edits=(Edit(operation=Add(vector=<[4096] float32>, scale=4.0), positions='all'), "
        "Edit(operation=Project(basis=<[2, 4096] float32>))))"
    )
    per_event = Add({f"e{i}": vector for i in range(99)}, per="event")
    assert repr(per_event) == "Add(vector=EventVectors(vectors=<[99, 4096] float32>, events=<99 values>))"
