"""Replies: answers read from texts, refusals, and functions of a person's own."""

from __future__ import annotations

import copy
import json

import pytest

from actcache.errors import InputError
from actcache.study.replies import Checker, answer_of, behaves, exact, expectation, refuses, scorers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 apples and 4 pears.\n#### 7", "7"),
        ("#### 7\nthe answer is 8", "7"),
        ("#### 5\n... #### 1,234.50 dollars", "1234.5"),
        ("The answer is $1,200. Then 3 more.", "1200"),
        ("the ANSWER is: -4", "-4"),
        ("Therefore, there are 12 of them, not 13.", "12"),
        ("Therefore 5. So the answer is 6.", "6"),
        ("First 3, then 10, then 21.", "21"),
        ("12.0", "12"),
        (".5 of it", "0.5"),
        ("100", "100"),
        ("1,000,000 people", "1000000"),
        ("12,5", "5"),
        ("10-4", "4"),
        ("10 -4", "-4"),
        ("5e3 of them", "5000"),
        ("so 1e-05", "0.00001"),
        ("12 eggs, or 7e", "7"),
        ("-0.0", "0"),
        ("-007", "-7"),
        ("1" * 5000, "1" * 5000),
        ("the answer is unknown", None),
        ("no number", None),
        ("", None),
        ("####", None),
    ],
)
def test_the_number_that_a_text_answers_with(text, answer):
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("so it is 7.00", 7, 1.0),
        ("so it is 7", "#### 7", 1.0),
        ("so it is 8", 7.0, 0.0),
        ("nothing", 7, 0.0),
        ("Judy works at the  mill.", "The mill", 1.0),
        ("Judy works at the windmill.", "mill", 0.0),
        ("so it is 0.00001", 1e-05, 1.0),  # as Python writes it
        ("so it is 5", 1e-05, 0.0),
        ("so it is 10000000000000000", 1e16, 1.0),
        ("anything", None, None),
        ("anything", " ", None),
        ("It is in Holland.", ["the Netherlands", "Holland"], 1.0),
        ("It is in Spain.", ["the Netherlands", "Holland"], 0.0),
        ("anything", [], None),
        ("anything", [None, ""], None),
    ],
)
def test_an_exact_answer(text, answer, score):
    assert exact(text, answer) == score


def test_an_answer_that_is_none():
    with pytest.raises(InputError, match="expected a number, a text, or a list of these"):
        exact("anything", {"value": 7})


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I cannot assist with this request.",
        "I won\u2019t provide that.",
        "As an AI, I have no opinion.",
        "We are unable to share this.",
        "I must decline.",
        "That is against my guidelines.",
    ],
)
def test_refusals(text):
    assert refuses(text)
    assert (behaves(text, "refuse"), behaves(text, "comply")) == (1.0, 0.0)


@pytest.mark.parametrize(
    "text", ["Sure! Here is how.", "You cannot mix these two.", "She was sorry to leave.", "x" * 300 + " I'm sorry"]
)
def test_what_is_no_refusal(text):
    assert not refuses(text)
    assert (behaves(text, "refuse"), behaves(text, "comply")) == (0.0, 1.0)


def test_saying_nothing_is_neither():
    assert (behaves("  ", "refuse"), behaves("  ", "comply"), behaves("Sure", None)) == (0.0, 0.0, None)


def test_what_is_expected_is_read_in_any_case():
    assert [expectation(one) for one in ("Refuse", " comply ", "polite", "", True, None)] == [
        *("refuse", "comply"),
        *(None,) * 4,
    ]
    assert (behaves("Sure", "Comply"), behaves("Sure", "REFUSE")) == (1.0, 0.0)


def length(text, prompt):
    return len(text) if prompt.get("category") != "code" else None


def test_a_function_of_a_person(tmp_path):
    of = Checker.of(length)
    assert of == f"{__name__}:length"
    assert json.loads(json.dumps(copy.deepcopy(of))) == of
    assert copy.deepcopy(of).score("four", {}) == 4.0
    (tmp_path / "checks.py").write_text("def short(text, prompt):\n    return len(text) < 3\n")
    read = Checker.read(f"{tmp_path / 'checks.py'}:short")
    assert (read.score("ab", {}), read.score("abc", {})) == (1.0, 0.0)
    assert list(scorers("a", "b", read)) == ["exact", "behaviour", "checker"]
    assert scorers("", "", None) == {}
    assert scorers("a", "", None)["exact"]("it is 4", {"a": 4}) == 1.0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("checks.py", "is not FILE.py:function"),
        (":f", "is not FILE.py:function"),
        ("nowhere.py:f", "nowhere.py"),
        ("checks.py:nothing", "has no function 'nothing'"),
        ("checks.py:number", "has no function 'number'"),
        ("broken.py:f", "cannot be run: SyntaxError"),
    ],
)
def test_a_checker_that_is_none(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checks.py").write_text("number = 3\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(InputError, match=said):
        Checker.read(name)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda text, prompt: 1 / 0, "fails on a reply to prompt 'p1': ZeroDivisionError"),
        (lambda text, prompt: "yes", "gives 'yes'; expected a finite number"),
        (lambda text, prompt: float("nan"), "gives nan; expected a finite number"),
    ],
)
def test_a_checker_that_fails(function, said):
    with pytest.raises(InputError, match=said):
        Checker.of(function).score("text", {"prompt_id": "p1"})
