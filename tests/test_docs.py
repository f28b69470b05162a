"""What README and the documents say to type, typed: on a pair of bfloat16 checkpoints, with prompts like a chat's.

A block in ``sh``, ``python``, ``toml``, ``json`` or ``jsonl``, and one with a line that begins with ``$``, runs. Else a
comment before it says what it needs that a test has not: ``<!-- not run: needs ... -->``. Those are listed as skipped.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import forked
import pytest
import tiny
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import actcache
from actcache.analyses import ANALYSES
from actcache.cli import build_parser, main
from actcache.cli.arguments import choices_compared
from actcache.cli.stability import add_run_arguments
from actcache.replay.edits import Add, Edit, Project, Variant

ROOT = Path(__file__).parent.parent
PAGES = [path for pattern in ("*.md", "docs/**/*.md") for path in sorted(ROOT.glob(pattern))]
DOCUMENTS = [*PAGES, *sorted(ROOT.glob("actcache/**/*.md"))]
LONGEST_SENTENCE = 30  # words
N_PROMPTS = 12  # enough for intervals
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


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def sentences_of(path: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)


BLOCKS = {path: blocks_of(path) for path in DOCUMENTS}
NOT_RUN = [block for blocks in BLOCKS.values() for block in blocks if block.needs]


def end_sooner(folder):
    """Have a checkpoint end its answers after some tokens, as a chat's does, and not at the limit of each command."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][tiny.EOS_ID] *= 1.7
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """As deep as SmolLM2's pair, a checkpoint half way, prompts, and a run of the pair."""
    place = tmp_path_factory.mktemp("pair")
    pt, it = tiny.make_pair(place, "llama", dtype=torch.bfloat16, num_hidden_layers=30, boundary=18)
    half_way = tiny.make_pair(place / "half", "llama", dtype=torch.bfloat16, num_hidden_layers=30, eps=tiny.EPS / 2)[1]
    for made, name in ((pt, "PT_FOLDER"), (half_way, "SFT_FOLDER"), (it, "IT_FOLDER")):
        end_sooner(made)
        made.rename(place / name)
    lines = [
        {"id": f"chat-{i}", "prompt": f"User: {text}\nAssistant:"} for i, text in enumerate(tiny.PROMPTS[:N_PROMPTS])
    ]
    (place / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--pt", place / "PT_FOLDER", "--it", place / "IT_FOLDER", "--prompts", place / "prompts.jsonl"]
    words += ["--out", place / "RUN", "--dtype", "float32", "--stability", "0"]
    assert main([str(word) for word in ["run", *words]]) == 0
    return place


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """What a script makes for pages, hardly trained, with some of its prompts."""
    out = tmp_path_factory.mktemp("examples") / "EXAMPLES"
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(ROOT / "scripts")
        import make_example_checkpoints as script

        patched.setattr(script, "NEW_TOKENS", 2)
        script.main(["--out", str(out), "--steps", "2"])
    for name in ("prompts.jsonl", "messages.jsonl"):
        lines = (out / name).read_text().splitlines(keepends=True)
        (out / name).write_text("".join(lines[:N_PROMPTS]))
    return out


def checks_no_rounding(parser):
    """What a run checks by itself takes half of its time here, and nothing on a page reads it."""
    add_run_arguments(parser)
    parser.set_defaults(stability=0)


@pytest.fixture
def folder(pair, tmp_path, monkeypatch, request):
    """Where a reader is: with a pair, its prompts and what the checkout has; README's makes the run as it says."""
    for name in ("PT_FOLDER", "SFT_FOLDER", "IT_FOLDER", "prompts.jsonl"):
        (tmp_path / name).symlink_to(pair / name)
    if request.node.callspec.params["path"].name != "README.md":
        shutil.copytree(pair / "RUN", tmp_path / "RUN")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("actcache.cli.stages.add_run_arguments", checks_no_rounding)
    if request.node.callspec.params["path"].name in ("checkpoints.md", "prompts.md"):
        shutil.copytree(request.getfixturevalue("examples"), "EXAMPLES", symlinks=True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", "EXAMPLES/hub")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if BLOCKS[path]], ids=name_of)
def test_every_block_runs_as_written(path, folder, capsys):
    """One after another: later Python goes on with the names of earlier ones."""
    names = {"__name__": "__main__"}
    for block in BLOCKS[path]:
        if block.needs:
            continue
        try:
            if block.kind == "python":
                exec(compile(block.text, block.where, "exec"), names)
            elif block.kind in ("json", "jsonl"):
                for text in block.text.splitlines() if block.kind == "jsonl" else [block.text]:
                    json.loads(text)
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


def test_commands_that_are_not_run_are_none_that_fail_at_once():
    """They parse, and give no two options that exclude each other."""
    text = "\n".join(block.text.replace("\\\n", " ") for block in NOT_RUN)
    commands = re.findall(r"^(?:\$ )?(actcache .+)$", text, re.M)
    assert len(commands) > 50
    for command in commands:
        args = build_parser().parse_args(shlex.split(command, comments=True)[1:])
        if "rollout_tokens" in args:
            choices_compared(args)


def test_every_kind_of_block_is_known():
    for blocks in BLOCKS.values():
        assert {block.kind for block in blocks} <= {"sh", "python", "toml", "json", "jsonl", "yaml"}
    assert any(block.kind == "python" and not block.needs for block in BLOCKS[ROOT / "README.md"])


def inline_commands():
    text = "\n".join(sentences_of(path) for path in PAGES)
    return dict.fromkeys(match.replace("\n", " ") for match in re.findall(r"`(actcache [a-z][^`]*)`", text))


@pytest.mark.parametrize("command", inline_commands())
def test_commands_within_sentences_are_none_that_fail(command, capsys):
    """Those that are written out parse; those that name a verb and an option name ones that there are."""
    words = shlex.split(command.replace("...", ""))[1:]
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parser = action.choices[words[0]]
    steps = [one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if steps and words[1] != "STEP":
        parser = steps[0][words[1].partition("|")[0]]
    parser.fill()
    options = parser._option_string_actions
    for word in words[1:]:
        assert not word.startswith("--") or word in options, command


def test_scripts_within_sentences_are_there_with_their_options():
    text = "\n".join(sentences_of(path) for path in PAGES)
    commands = [match.replace("\n", " ").split() for match in re.findall(r"`python (\w[^`]+\.py[^`]*)`", text)]
    assert len(commands) > 5
    for script, *words in commands:
        path = ROOT / script
        said = path.read_text()
        if path.parent.name == "benches":
            said += (path.parent / "study.py").read_text()  # the options that several benches share
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in said, f"{script} has no {word}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_files_that_are_named_are_there(path):
    for name in re.findall(
        r"`(test_\w+\.py|(?:actcache|tests|benches|scripts|examples|docs|csrc)/[\w./]+)`", path.read_text()
    ):
        place = ROOT / "tests" if name.startswith("test_") else ROOT
        assert "NAME" in name or (place / name).exists(), name


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", sentences_of(path)):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_sentence_is_long(path):
    """Thirty words at most; a cell of a table, an item of a list and what follows a colon or semicolon count alone."""
    text = re.sub(r"^(?:#|:::|--8<--|<!--).*$|^ {4,}\w+:.*$", "", sentences_of(path), flags=re.M)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    for sentence in re.split(r"[.!?:;](?:\s|$)|\n\s*\n|\||\n\s*(?:[-*]|\d+\.) ", text):
        assert len(sentence.split()) <= LONGEST_SENTENCE, " ".join(sentence.split())


def test_every_extra_is_named_where_it_is_needed():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = (ROOT / "docs" / "install.md").read_text()
    for name in extras.keys() - {"test", "check"}:
        assert f"pip install '.[{name}]'" in text, name


def test_generated_parts_are_made(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import docs_pages

    pages = {path.name: docs_pages.on_page_markdown(path.read_text(encoding="utf-8")) for path in PAGES}
    assert not [name for name, page in pages.items() if "<!-- generated" in page]
    for verb, parser in docs_pages.verbs().items():
        assert f"## actcache {verb}\n" in pages["command-line.md"]
        for action in parser._actions:
            assert action.dest in ("help", "quiet", "threads") or action.help % vars(action) in pages["command-line.md"]
    for named in ANALYSES:
        assert f"## {named.name.capitalize()}\n" in pages["analyses.md"]
    n_results = len([*docs_pages.RESULTS.glob("*.json")])
    assert pages["benchmarks.md"].count("; commit ") == n_results > 0
    assert "| `noop_delta` | float32 | logits |" in pages["run.md"]
    assert "## One event, taken apart" in pages["walkthrough.md"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = forked.run(command, cwd=ROOT)
    assert built.returncode == 0, built.stderr
    for page in ("index.html", "walkthrough.html", "command-line.html", "api.html", "formats/store.html"):
        assert (tmp_path / "site" / page).is_file()


@pytest.mark.slow
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
    assert "<th>events</th><td>24</td>" in store._repr_html_()
    assert "<th>state of blocks</th><td>3</td>" in store._repr_html_()
    assert repr(feed) in repr(actcache.ActivationBuffer(feed))
    vector = torch.zeros(4096)
    steered = Variant("steered", (Edit(Add(vector, 4.0), positions="all"), Edit(Project(torch.eye(4096)[:2]))))
    assert repr(steered) == (
        "Variant(name='steered', edits=(Edit(operation=Add(vector=<[4096] float32>, scale=4.0), positions='all'), "
        "Edit(operation=Project(basis=<[2, 4096] float32>))))"
    )
    per_event = Add({f"e{i}": vector for i in range(99)}, per="event")
    assert repr(per_event) == "Add(vector=EventVectors(vectors=<[99, 4096] float32>, events=<99 values>))"
