"""Messages: rendered by one checkpoint's chat template for all, to the ids that transformers gives; what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
from test_tokens import BOS, put_around
from transformers import AutoTokenizer

import actcache
from actcache.cli import main
from actcache.errors import IncompatibleError, InputError
from actcache.models.lineup import Lineup
from actcache.models.prompt_ids import PromptIds
from actcache.models.templates import PLAIN
from actcache.prompts import Prompt

TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}[assistant] {% endif %}"
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}\n{% endfor %}"
REFUSES = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHAT
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHAT

SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = {"role": "user", "content": " What is the capital? "}
TALK = [ASKED, {"role": "assistant", "content": "The sea"}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two checkpoints whose tokenizers put a BOS before every text; no template."""
    folders = tiny.make_pair(tmp_path_factory.mktemp("pair"), "llama", vocab_size=tiny.VOCAB_SIZE + 4)
    for folder in folders:
        put_around([BOS], [])(folder)
    return folders


@pytest.fixture
def templated(pair, tmp_path):
    """``templated(pt=..., it=...)``: the pair's folders with these templates."""

    def make(**templates: str) -> dict[str, Path]:
        folders = {}
        for label, source in zip(("pt", "it"), pair, strict=True):
            folders[label] = shutil.copytree(source, tmp_path / label, dirs_exist_ok=True)
            if label in templates:
                (folders[label] / "chat_template.jinja").write_text(templates[label])
        return folders

    return make


def chat(*messages: dict[str, str], name: str = "a") -> Prompt:
    return Prompt(name, "", messages=list(messages))


@pytest.mark.parametrize("template", [CHAT, BOS + CHAT], ids=["no BOS of its own", "its own BOS"])
@pytest.mark.parametrize("messages", [[ASKED], [SYSTEM, ASKED], TALK, [ASKED, ASKED]], ids=len)
def test_ids_are_those_of_transformers(templated, template, messages):
    folders = templated(it=template)
    lineup = Lineup.open(folders)
    for asked in ("it", lineup.pair[1]):
        found = lineup.encode([chat(*messages), Prompt("b", "Hi!")], rendering=lineup.rendering(asked))
        own = AutoTokenizer.from_pretrained(folders["it"])
        assert found[0] == own.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found[1] == own("Hi!")["input_ids"], "text is never wrapped"


def test_special_tokens_before_text_may_be_left_out(templated):
    lineup = Lineup.open(templated(it=CHAT))
    (bos, *ids), (plain,) = (lineup.encode([Prompt("a", "Hi!")])[0], lineup.encode(
        [Prompt("a", "Hi!")], rendering=lineup.rendering(add_special_tokens=False)
    ))  # fmt: skip
    assert lineup.decode([bos]) == BOS
    assert ids == plain


def test_a_single_message_may_be_read_as_text(templated):
    lineup = Lineup.open(templated())
    none = lineup.rendering("none")
    assert lineup.encode([chat(ASKED)], rendering=none) == lineup.encode([Prompt("a", ASKED["content"])])
    with pytest.raises(InputError, match="prompt 'a' has 3 messages, whose turns plain text does not show"):
        lineup.encode([chat(*TALK)], rendering=none)


def test_token_ids_are_used_as_they_are(templated):
    lineup = Lineup.open(templated())
    (ids,) = lineup.encode([Prompt("a", "Hi!")])
    assert lineup.encode([Prompt("b", "", token_ids=ids[1:])]) == [ids[1:]]
    assert lineup.encode([Prompt("b", "", token_ids=ids)]) == [ids]
    for wrong, said in (
        ([5, tiny.VOCAB_SIZE + 4], "is beyond the 124 rows"),
        ([5, tiny.VOCAB_SIZE + 3], "token id 123 is not the id of a token that every checkpoint has"),
        ([ids[0], *ids], "token 1 is a second '<|bos|>'"),
    ):
        with pytest.raises(InputError) as caught:
            lineup.encode([Prompt("b", "", token_ids=wrong, where="p.jsonl, line 7")])
        assert str(caught.value).startswith("p.jsonl, line 7: prompt 'b': token")
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (NO_SYSTEM, [SYSTEM, ASKED], "leaves out what its system message says, 'Be brief.'"),
        (REFUSES, [SYSTEM, ASKED], "does not render it: no system here"),
        (CHAT.replace("trim", "upper"), [ASKED], "leaves out what its user message says, 'What is the capital?', or"),
        (CHAT.replace("messages", "messages[1:]"), [ASKED, ASKED], "leaves out what its user message says"),
        (BOS + " " + BOS + CHAT, [ASKED], "token 2 is a second '<|bos|>'"),
        ("{{ nowhere.to_be }}", [ASKED], "does not render it: 'nowhere' is undefined"),
        (
            "U: a{{ messages[-1]['content'] }}",
            [{"role": "system", "content": "a"}, {"role": "user", "content": "ba"}],
            "leaves out what a system message says in a chat like this",
        ),
    ],
    ids=["drops", "refuses", "changes", "drops one of two", "two BOS", "broken", "drops what its own words are"],
)
def test_what_a_template_does_not_render_whole_is_refused_by_prompt(templated, template, messages, said):
    lineup = Lineup.open(templated(it=template))
    with pytest.raises(InputError) as caught:
        lineup.encode([chat(*messages, name="chat")], rendering=lineup.rendering("it"))
    assert said in str(caught.value)
    assert str(caught.value).startswith("prompt 'chat': ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("pt", "the tokenizer of checkpoint pt .* has no chat template; give --template it"),
        ("pt,it", "another estimand"),
        ("dpo", "expected none, or one of pt, it"),
    ],
)
def test_a_template_that_is_none_is_refused(templated, given, said):
    with pytest.raises(InputError, match=f"--template {given}: .*{said}"):
        Lineup.open(templated(it=CHAT)).rendering(given)


def test_roles_name_the_pairs_checkpoints(templated):
    folders = templated(pt=CHAT, it=NO_SYSTEM)
    lineup = Lineup.open({"base": folders["pt"], "dpo": folders["it"]})
    assert lineup.rendering("it").identity == lineup.rendering("dpo").identity
    assert lineup.rendering("pt").identity != lineup.rendering("it").identity
    assert lineup.rendering("it").identity.startswith("dpo ")


def test_a_template_that_asks_for_the_date_renders_alike_on_every_day(templated):
    lineup, said = Lineup.open(templated(it=DATED)), []
    rendering = lineup.rendering("it")
    ids = PromptIds(lineup, [chat(ASKED)], rendering, said.append)
    assert lineup.decode(ids.of(0, [chat(ASKED)])[0]).startswith("26 Jul 2024\n[user]")
    assert said == ["the template of it asks for the date: it is told that of 26 July 2024, always"]
    assert rendering.identity.endswith(" 2024-07-26")


@pytest.mark.parametrize("start", ["", "\n", "  \n", " {% if true %} {% endif %}", "{%- set x = 1 %}\n\n"])
def test_the_day_changes_nothing_else_of_a_text(templated, start):
    """As the same template with its date written out."""
    template = start + "{% if strftime_now is defined %}{{ strftime_now('%A, %d %b %Y') }}{% endif %}\n" + CHAT
    written = template.replace("strftime_now is defined", "true").replace(
        "strftime_now('%A, %d %b %Y')", "'Friday, 26 Jul 2024'"
    )
    assert "strftime" not in written
    texts = []
    for one in (template, written):
        rendering = Lineup.open(templated(it=one)).rendering("it")
        texts.append(rendering.text_of(chat(SYSTEM, ASKED)))
    assert texts[0] == texts[1]
    assert "Friday, 26 Jul 2024[system] Be brief." in texts[0]


def test_messages_and_templates_belong_together(templated):
    lineup, said = Lineup.open(templated(it=CHAT)), []
    with pytest.raises(InputError, match="prompt 'a' has messages: say by --template"):
        PromptIds(lineup, [chat(ASKED)], PLAIN)
    with pytest.raises(InputError, match="would render nothing: no prompt has messages, and text is never wrapped"):
        PromptIds(lineup, [Prompt("a", "x")], lineup.rendering("it"))
    PromptIds(lineup, [Prompt("a", "x"), chat(ASKED)], lineup.rendering("it"), said.append)
    assert said == ["1 of 2 prompts have no messages: read as they are, without the template"]


def test_a_tokenizer_that_does_not_know_the_templates_tokens_is_refused(templated):
    from test_tokens import add

    folders = templated(it="<|turn|>" + CHAT)
    add("<|turn|>")(folders["it"])
    lineup = Lineup.open(folders)
    with pytest.raises(IncompatibleError, match="give different ids from token 0 on"):
        lineup.encode([chat(ASKED)], rendering=lineup.rendering("it"))


@pytest.mark.slow
def test_a_run_of_messages_is_that_of_their_ids(templated, tmp_path, capfd):
    """The same events as of the ids given; the fingerprint tells the template; a resume with another is refused."""
    folders = templated(pt=NO_SYSTEM, it=CHAT)
    lineup = Lineup.open(folders)
    prompts = [chat({"role": "user", "content": text}, name=f"p{i}") for i, text in enumerate(tiny.PROMPTS[:6])]
    ids = lineup.encode(prompts, rendering=lineup.rendering("it"))
    lines = {
        "messages": [{"id": one.id, "messages": one.messages} for one in prompts],
        "token_ids": [{"id": one.id, "token_ids": of} for one, of in zip(prompts, ids, strict=True)],
    }
    given = [word for label, folder in folders.items() for word in (f"--{label}", str(folder))]
    stores = {}
    for form, rows in lines.items():
        (tmp_path / f"{form}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        words = ["capture", *given, "--prompts", str(tmp_path / f"{form}.jsonl"), "--out", str(tmp_path / form)]
        assert main([*words, *(["--template", "it"] if form == "messages" else [])]) == 0
        stores[form] = actcache.open_store(tmp_path / form)
        assert main([*words, *(["--template", "pt"] if form == "messages" else ["--template", "none"])]) == (
            2 if form == "messages" else 0
        )
    identity = lineup.rendering("it").identity
    assert f"its template is {identity}, this run's is pt " in capfd.readouterr().err
    for form, template, found, asked in (("messages", "none", identity, "none"), ("token_ids", "it", "none", "it ")):
        words = ["capture", *given, "--prompts", str(tmp_path / "messages.jsonl"), "--template", template]
        assert main([*words, "--out", str(tmp_path / form)]) == 2
        said = capfd.readouterr().err
        assert f"the store belongs to another run: its template is {found}, this run's is {asked}" in said
    first, second = stores.values()
    assert len(first) > 3
    assert first.events.equals(second.events)
    assert (first.token_ids()[0] == second.token_ids()[0]).all()
    assert first.fingerprint.template == identity
    assert second.fingerprint.template is None
    words = ["plan", *given, "--prompts", str(tmp_path / "messages.jsonl"), "--template", "it", "--rate", "1e9"]
    assert main(words) == 0
    assert main(["plan", str(tmp_path / "messages")]) in (0, 2)
