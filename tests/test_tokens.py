"""Token ids: those of the user's text, the same from every tokenizer of a lineup, and what is left off or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from stores import read_tree
from transformers import AutoTokenizer

from actcache.capture.settings import CaptureSettings
from actcache.errors import IncompatibleError, InputError
from actcache.models.lineup import Lineup
from actcache.prompts import Prompt
from actcache.store import open_store
from actcache.study.capture import capture, fingerprint

BOS, END = "<|bos|>", "<|end|>"
N_ROWS = tiny.VOCAB_SIZE + 4  # rows of the embeddings: some are of no token yet

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return tiny.make_pair(folder, "llama", vocab_size=N_ROWS)


def add(*tokens: str) -> Callable[[Path], None]:
    """Further special tokens, in the rows after the vocabulary."""

    def edit(folder: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        tokenizer.save_pretrained(folder)

    return edit


def put_around(front: list[str], end: list[str]) -> Callable[[Path], None]:
    """Make the tokenizer put these special tokens before and after every text."""

    def edit(folder: Path) -> None:
        add(*sorted({BOS, END, *front, *end}))(folder)
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        id_of = {token["content"]: token["id"] for token in content["added_tokens"]}

        def special(token: str) -> dict[str, Any]:
            return {"SpecialToken": {"id": token, "type_id": 0}}

        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [*map(special, front), {"Sequence": {"id": "A", "type_id": 0}}, *map(special, end)],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {t: {"id": t, "ids": [id_of[t]], "tokens": [t]} for t in (*front, *end)},
        }
        path.write_text(json.dumps(content))
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": BOS}))

    return edit


def store_limits(folder: Path) -> None:
    """Truncation to four tokens and padding to 32, as some tokenizer.json files come."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 1, "pad_type_id": 0, "pad_token": tiny.PAD}
    path.write_text(json.dumps(content))


@pytest.fixture
def lineup(pair, tmp_path):
    """``lineup(both, it=...)``: the pair with its tokenizers changed, that of ``it`` in its own way where given."""

    def make(both: Callable[[Path], None] | None = None, it: Callable[[Path], None] | None = None) -> Lineup:
        paths = {}
        for label, source in zip(("pt", "it"), pair, strict=True):
            paths[label] = shutil.copytree(source, tmp_path / label)
            edit = it if it is not None and label == "it" else both
            if edit is not None:
                edit(paths[label])
        return Lineup.open(paths)

    return make


def plain(lineup: Lineup, text: str) -> list[int]:
    return list(lineup.checkpoints["pt"].tokenizer(text, add_special_tokens=False)["input_ids"])


TEXT = "In the morning the baker opened the door and lit the oven."


@pytest.mark.parametrize("front", [[], [BOS], [tiny.PAD, BOS]], ids=["no start", "BOS", "two start tokens"])
def test_what_a_tokenizer_appends_is_left_off_and_said(lineup, front):
    found, said = lineup(put_around(front, [END])), []
    starts = [found.checkpoints["pt"].tokenizer.convert_tokens_to_ids(token) for token in front]
    assert found.encode([Prompt("a", TEXT)], said.append) == [[*starts, *plain(found, TEXT)]]
    (line,) = said
    assert line.startswith("checkpoints pt, it: the tokenizer appends '<|end|>'")
    assert found.checkpoints["pt"].fingerprint.left_off, "a store of an earlier version holds the end tokens"


def test_an_end_token_of_the_text_itself_stays(lineup):
    found = lineup(put_around([BOS], [END]))
    (ids,) = found.encode([Prompt("a", "Hi!" + END)])
    assert ids[1:] == plain(found, "Hi!" + END)
    assert found.decode(ids).endswith(END)


def test_stored_truncation_and_padding_are_switched_off_and_said(lineup):
    found, said = lineup(store_limits), []
    digest = found.checkpoints["pt"].fingerprint.tokenizer
    short, long = found.encode([Prompt("a", "Hi!"), Prompt("b", TEXT)], said.append)
    assert [short, long] == [plain(found, "Hi!"), plain(found, TEXT)]
    assert len(short) < 32
    assert len(long) > 4
    assert said == [
        "checkpoints pt, it: truncation and padding stored with the tokenizer: switched off, so that texts stay whole"
    ]
    again = Lineup.open({label: c.path for label, c in found.checkpoints.items()})
    assert again.checkpoints["pt"].fingerprint.tokenizer == digest, "it is the same before and after use"


def test_nothing_is_said_of_tokenizers_that_only_read(lineup):
    said: list[str] = []
    found = lineup(put_around([BOS], []))
    found.encode([Prompt("a", TEXT)], said.append)
    assert said == []
    assert fingerprint(found, [], CaptureSettings((1,))).vocabulary == "real tokens", "there are rows beyond them"
    assert found.checkpoints["pt"].fingerprint.left_off is None


@pytest.mark.parametrize(
    ("front", "text"),
    [
        ([BOS], BOS + "Hi!"),
        ([BOS], "\n " + BOS + "Hi!"),
        ([], BOS + BOS + "Hi!"),
        ([tiny.PAD, BOS], tiny.PAD + BOS + "Hi!"),
        ([tiny.PAD, BOS], BOS + "Hi!"),
    ],
    ids=["rendered", "after white space", "twice in the text", "two start tokens", "the second of two"],
)
def test_a_second_start_is_refused_by_prompt_and_token(lineup, front, text):
    found = lineup(put_around(front, []))
    with pytest.raises(InputError, match=r"^prompt 'chat': token \d is a second '<\|(bos|pad)\|>' \(\d+\)"):
        found.encode([Prompt("a", "Hi!"), Prompt("chat", text)])


@pytest.mark.parametrize("text", ["Hi!", "Hi!" + BOS + "Hi!"], ids=["none in the text", "between two turns"])
@pytest.mark.parametrize("front", [[], [BOS]], ids=["no start", "BOS"])
def test_starts_elsewhere_are_the_text_s_own(lineup, front, text):
    found = lineup(put_around(front, []))
    (ids,) = found.encode([Prompt("a", text)])
    assert ids[len(front) :] == plain(found, text)


def test_a_token_beyond_the_embeddings_is_named(lineup):
    found = lineup(add("<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|beyond|>"))
    assert found.encode([Prompt("a", "Hi!<|d|>")])[0][-1] == N_ROWS - 1
    with pytest.raises(InputError, match=rf"prompt 'b': token '<\|beyond\|>' \({N_ROWS}\) is beyond the {N_ROWS} rows"):
        found.encode([Prompt("a", "Hi!"), Prompt("b", "Hi!<|beyond|>Hi!")])
    assert max(found.vocabulary) == N_ROWS - 1


def test_prompts_that_only_one_tokenizer_reads_so_are_refused(lineup):
    found = lineup(it=add("<|turn|>"))
    assert found.encode([Prompt("a", "Hi!")]) == [plain(found, "Hi!")]
    with pytest.raises(
        IncompatibleError, match=rf"from token 0 on: '<' \(\d+\) and '<\|turn\|>' \({tiny.VOCAB_SIZE}\)"
    ):
        found.encode([Prompt("a", "<|turn|>Hi!")])


@pytest.mark.parametrize("swapped", [False, True], ids=["it has more", "pt has more"])
def test_both_tokenizers_count_alike(lineup, swapped):
    found = lineup(add("<|one|>"), add("<|one|>", "<|two|>"))
    if swapped:
        found = Lineup([found.checkpoints["it"], found.checkpoints["pt"]])
    assert found.vocabulary == frozenset(range(tiny.VOCAB_SIZE + 2))
    assert found.decode([tiny.VOCAB_SIZE + 1]) == "<|two|>"
    said = fingerprint(found, [], CaptureSettings((1,))).vocabulary
    assert said == f"{tiny.VOCAB_SIZE + 1} shared tokens, real tokens"


@pytest.mark.slow
def test_a_choice_that_only_one_tokenizer_has_is_never_an_event(tmp_path):
    """It was one by the rule of an earlier version, whose stores go on by it."""
    folders = tiny.make_pair(tmp_path, "llama", vocab_size=N_ROWS)
    add("<|one|>", "<|two|>", "<|three|>", "<|four|>")(folders[1])
    prompts = [Prompt(str(i), text) for i, text in enumerate(tiny.PROMPTS)]
    tail = set(range(tiny.VOCAB_SIZE, N_ROWS))

    def choices(place: Path, lineup: Lineup) -> set[int]:
        capture(lineup, prompts, place, CaptureSettings((3,), max_new=8))
        events = open_store(place).events
        return {token for role in ("pt", "it") for token in events[f"y_{role}"].to_pylist()}

    for pt, it in (folders, folders[::-1]):
        lineup, place = Lineup.open({"pt": pt, "it": it}), tmp_path / f"store-{pt.name}"
        assert not choices(place, lineup) & tail
        assert open_store(place).fingerprint.vocabulary == f"{tiny.VOCAB_SIZE} shared tokens"
    earlier = tmp_path / "earlier"
    assert (
        choices(earlier, Lineup.open(dict(zip(("pt", "it"), folders, strict=True))).follow("of any checkpoint")) & tail
    )
    before = read_tree(earlier)
    assert choices(earlier, Lineup.open(dict(zip(("pt", "it"), folders, strict=True)))) & tail
    assert read_tree(earlier) == before
    named = open_store(earlier).events.to_pylist()
    ones = {event[f"token_{role}"] for event in named for role in ("pt", "it") if event[f"special_{role}"]}
    assert ones & {"<|one|>", "<|two|>", "<|three|>", "<|four|>"}
