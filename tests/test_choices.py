"""Which disagreements along a rollout become events, and what kind of word a token is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from twins.supports import events_of

from actcache.capture.supports import HORIZONS, N_CANDIDATES, choose, drawn
from actcache.capture.token_class import TokenClasses, is_marker, read_token_classes
from actcache.errors import InputError
from actcache.schema import CHOSEN_KINDS, HISTORIES

few_tokens = st.integers(0, 3)
rollouts = st.integers(0, 40).flatmap(
    lambda n: st.tuples(
        st.lists(few_tokens, min_size=n + 1, max_size=n + 1),
        st.lists(few_tokens, min_size=n + 1, max_size=n + 1),
        st.sampled_from([n, n + 1]),
    )
)


def chosen(writer, prompt_id, first, second, n_history):
    events = choose(
        writer,
        prompt_id,
        first,
        second,
        n_history=n_history,
        is_format=lambda token: token == 1,
        is_marker=lambda token: token == 2,
    )
    found = {(one.kind, one.step, *one.tokens) for one in events}
    assert len(found) == len(events)
    return found


@given(rollouts, st.sampled_from(["pt", "it"]), st.text(max_size=4))
def test_what_is_chosen_is_what_the_rules_say(rollout, writer, prompt_id):
    found = chosen(writer, prompt_id, *rollout)
    rules = events_of(writer, prompt_id, *rollout, lambda token: token == 1, lambda token: token == 2)
    assert found == rules
    first, second, _ = rollout
    for kind, step, y_pt, y_it in found:
        assert y_pt != y_it
        if kind in CHOSEN_KINDS:
            assert (first[step], second[step]) == (y_pt, y_it)
            assert writer in HISTORIES[kind]
        else:
            assert kind == "pre_divergence"
            assert first[step] == second[step]


def test_choices_that_agree_give_no_event():
    assert chosen("pt", "a", [5, 6, 7], [5, 6, 7], 2) == set()
    assert chosen("it", "a", [5], [5], 0) == set()


def test_every_horizon_and_every_kind():
    """Both disagree everywhere from step 3 on: one first divergence, one drawn later, all horizons from there on."""
    first, second = [0] * 65, [0, 0, 0, *([1, 2, 3] * 21)[:62]]
    found = chosen("pt", "a", first, second, 64)
    steps: dict[str, list[int]] = {}
    for kind, step, *_ in sorted(found):
        steps.setdefault(kind, []).append(step)
    assert steps["first_divergence"] == [3]
    assert steps["native_pt"] == [horizon for horizon in HORIZONS if horizon >= 3]
    assert steps["first_nonformat"] == steps["first_marker"] == [4], "step 3 is layout"
    assert steps["pre_divergence"][0] in (0, 1)
    assert steps["pt_rollout"][0] > 3
    assert {kind for kind, *_ in chosen("it", "a", first, second, 64)} == {"it_rollout", "native_it"}


def test_draws_depend_on_kind_prompt_and_step_alone():
    steps = range(1, 64)
    assert drawn("pt_rollout", "a", steps) == drawn("pt_rollout", "a", list(reversed(steps)))
    assert drawn("pt_rollout", "a", steps) != drawn("it_rollout", "a", steps)
    assert drawn("pt_rollout", "a", steps) != drawn("pt_rollout", "b", steps)
    assert drawn("pt_rollout", "a", range(1, 9)) == [8, 7, 4, 6, 2, 1, 5, 3], "the same in every version"
    # No step is preferred: each of 63 is among 8 of 2,000 draws about 254 times.
    counts = dict.fromkeys(steps, 0)
    for prompt in range(2000):
        for step in drawn("pt_rollout", str(prompt), steps)[:N_CANDIDATES]:
            counts[step] += 1
    assert max(abs(n - 2000 * N_CANDIDATES / 63) for n in counts.values()) < 4 * (2000 * N_CANDIDATES / 63) ** 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "format") for text in ("", " ", "\n\n", "**", " -", "```", ":", "—", "_", "1.".replace("1", ""))),
        *((text, "discourse") for text in ("Sure", " however", "Here", "FIRST", "okay ")),
        *((text, "content") for text in ("cat", " 12", "ing", "surely", "Paris", "日本")),
    ],
)
def test_classes_of_tokens(text, expected):
    assert TokenClasses().of(text) == expected


def test_special_tokens_are_layout_and_markers_open_a_reply():
    assert TokenClasses().of("<|endoftext|>", special=True) == "format"
    assert [is_marker(text) for text in ("Sure", " Certainly", "I", "i'm", "surely", "", "cat")] == [True] * 4 + [
        False
    ] * 3


def test_classes_of_one_s_own(tmp_path):
    file = tmp_path / "classes.toml"
    file.write_text("discourse = ['^ca', 'z$']\n")
    classes = read_token_classes(file)
    assert [classes.of(text) for text in (" Cat", "fizz", "sure", "\n")] == [
        "discourse",
        "discourse",
        "content",
        "format",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("discourse = [", "not TOML"),
        ("content = ['a']", "'content' is no class of tokens; give format and discourse"),
        ("format = 'a'", "format is not a list of regular expressions"),
        ("format = [1]", "format is not a list of regular expressions"),
        ("format = ['(']", r"'\(' of format is no regular expression"),
        (None, "no such file of token classes"),
    ],
)
def test_a_file_that_describes_no_classes(tmp_path, text, said):
    file = tmp_path / "classes.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=said):
        read_token_classes(file)
