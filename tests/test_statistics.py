"""Statistics against loops, exact fractions and scipy; weights, pairs, regressions, sign flips and families."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest

from actcache.errors import InputError
from actcache.study import statistics
from actcache.study.families import balanced, balanced_draws, half_width, leave_one_out, trimmed_mean
from actcache.study.regression import ols, regress
from actcache.study.statistics import (
    Sample,
    draw_together,
    sign_flip_null,
)

PROMPTS = ["p0", "p1", "p1", "p2", "p3", "p3", "p3", "p4", "p5", "p6", "p7", "p8", "p9"]


def values_of(n=13, seed=0):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(1.0, 1.0, n), "b": rng.normal(5.0, 1.0, n)}


def slow_means(values, events_of, picked, weights):
    """Pool the events of the picked prompts, or average their means."""
    if weights == "event":
        events = [event for prompt in picked for event in events_of[prompt]]
        return {name: sum(of[event] for event in events) / len(events) for name, of in values.items()}
    return {
        name: sum(sum(of[event] for event in events_of[prompt]) / len(events_of[prompt]) for prompt in picked)
        / len(picked)
        for name, of in values.items()
    }


def percentile(values, q):
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    left = math.floor(at)
    right = min(left + 1, len(ordered) - 1)
    return ordered[left] + (ordered[right] - ordered[left]) * (at - left)


def slow_sample(prompts, values, weights, function, draws=120, seed=3, level=0.9):
    """The specification as loops: draw prompts, average, apply the function, take percentiles."""
    events_of = {}
    for event, prompt in enumerate(prompts):
        events_of.setdefault(prompt, []).append(event)
    names = sorted(events_of)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        picked = [names[i] for i in rng.integers(0, len(names), len(names))]
        drawn.append(function(slow_means(values, events_of, picked, weights)))
    tail = (1 - level) / 2
    mean = function(slow_means(values, events_of, names, weights))
    return {"mean": mean, "low": percentile(drawn, tail), "high": percentile(drawn, 1 - tail)}


FUNCTIONS = {
    "mean": (lambda sample: sample.mean("a"), lambda m: m["a"]),
    "difference": (lambda sample: sample.number(lambda m: m["b"] - m["a"]), lambda m: m["b"] - m["a"]),
    "ratio": (lambda sample: sample.ratio("a", "b"), lambda m: m["a"] / m["b"]),
    "ratio of functions": (
        lambda sample: sample.ratio(lambda m: m["b"] - m["a"], lambda m: m["b"] + m["a"]),
        lambda m: (m["b"] - m["a"]) / (m["b"] + m["a"]),
    ),
    "any function": (
        lambda sample: sample.number(lambda m: np.sqrt(m["b"]) * m["a"]),
        lambda m: m["b"] ** 0.5 * m["a"],
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("weights", ["event", "prompt"])
@pytest.mark.parametrize("per_pass", [1, 40, 1 << 21])
def test_equals_the_slow_twin(monkeypatch, weights, name, per_pass):
    monkeypatch.setattr(statistics, "_DRAWN_PER_PASS", per_pass)
    ours, theirs = FUNCTIONS[name]
    sample = Sample.of(PROMPTS, values_of(), weights=weights, draws=120, seed=3, level=0.9)
    assert ours(sample) == pytest.approx(slow_sample(PROMPTS, values_of(), weights, theirs), abs=1e-12)
    assert (sample.n_events, sample.n_prompts) == (13, 10)


def test_a_prompt_of_twenty_events_weighs_as_one_of_one():
    prompts, values = ["a"] * 20 + ["b"], np.array([1.0] * 20 + [3.0])
    assert Sample.of(prompts, {"x": values}, weights="prompt").mean("x")["mean"] == 2.0
    assert Sample.of(prompts, {"x": values}, weights="event").mean("x")["mean"] == pytest.approx(23 / 21)
    assert Sample.of(prompts, {"x": values}).mean("x")["mean"] == 2.0, "prompts weigh the same by default"


def test_one_event_per_prompt_is_the_same_either_way():
    prompts = [f"p{i:02d}" for i in range(30)]
    both = [Sample.of(prompts, values_of(30), weights=weights) for weights in ("event", "prompt")]
    assert both[0].ratio("a", "b") == pytest.approx(both[1].ratio("a", "b"), abs=1e-12)


@pytest.mark.parametrize(
    "ids", [np.array(PROMPTS), pa.array(PROMPTS), pa.chunked_array([PROMPTS[:4], PROMPTS[4:]]),
            pa.array(PROMPTS).dictionary_encode(), [int(prompt[1:]) for prompt in PROMPTS]]
)  # fmt: skip
def test_ids_of_any_type_and_events_in_any_order(ids):
    expected = Sample.of(PROMPTS, values_of()).ratio("a", "b")
    assert Sample.of(ids, values_of()).ratio("a", "b") == expected
    order = np.random.default_rng(1).permutation(len(PROMPTS))
    shuffled = {name: of[order] for name, of in values_of().items()}
    moved = Sample.of([PROMPTS[i] for i in order], shuffled).ratio("a", "b")
    assert moved == pytest.approx(expected, abs=1e-12)


def test_samples_drawn_together_are_as_each_alone(monkeypatch):
    monkeypatch.setattr(statistics, "_GROUPS_PER_PASS", 2)
    makings = [(PROMPTS, 1), (PROMPTS[:12], 2), (PROMPTS, 3), (PROMPTS, 4), (PROMPTS[:3], 5)]
    together = [Sample.of(prompts, values_of(len(prompts), seed)) for prompts, seed in makings]
    draw_together(together)
    draw_together([])
    for (prompts, seed), sample in zip(makings, together, strict=True):
        alone = Sample.of(prompts, values_of(len(prompts), seed))
        assert sample.mean("a") == pytest.approx(alone.mean("a"), abs=1e-12)


def test_fewer_than_ten_prompts_and_none():
    few = Sample.of(PROMPTS[:-1], values_of(12))
    assert few.n_prompts == 9
    assert (few.mean("a")["low"], few.ratio("a", "b")["high"], few.draws_of("a")) == (None, None, None)
    assert few.mean("a")["mean"] is not None
    none = Sample.of([], {"a": [], "b": []})
    nothing = {"mean": None, "low": None, "high": None}
    assert (none.n_events, none.n_prompts, none.mean("a"), none.ratio("a", "b")) == (0, 0, nothing, nothing)
    assert not none.opposed("a", "b")


def test_a_ratio_is_flagged_and_never_clipped():
    prompts = [f"p{i}" for i in range(12)]
    sample = Sample.of(prompts, {"a": [-2.0] * 12, "b": [1.0] * 12, "zero": [1.0, -1.0] * 6})
    assert sample.ratio("a", "b") == {"mean": -2.0, "low": -2.0, "high": -2.0}
    assert sample.opposed("a", "b")
    assert not sample.opposed("b", "b")
    assert sample.ratio("a", "zero") == {"mean": None, "low": None, "high": None}


def test_a_function_that_is_not_finite_has_no_number():
    prompts = [f"p{i}" for i in range(12)]
    sample = Sample.of(prompts, {"a": [1.0] * 11 + [-1.0], "zero": [0.0] * 12})
    assert sample.number(lambda m: m["a"] / m["zero"]) == {"mean": None, "low": None, "high": None}
    often = sample.number(lambda m: np.log(m["a"] - 0.5))
    assert (often["mean"], often["low"]) == (pytest.approx(math.log(10 / 12 - 0.5)), None)


@pytest.mark.parametrize("weights", ["event", "prompt"])
def test_pairs_are_of_the_prompts_that_both_have(weights):
    """Two groups share prompts and not events; a common swing of the prompts cancels in their difference."""
    rng = np.random.default_rng(2)
    swing = {f"p{i:02d}": rng.normal(0, 5) for i in range(20)}
    one = [(f"p{i:02d}", swing[f"p{i:02d}"] + 2 + rng.normal(0, 0.01)) for i in range(18) for _ in range(1 + i % 2)]
    two = [(f"p{i:02d}", swing[f"p{i:02d}"] + 1 + rng.normal(0, 0.01)) for i in range(4, 20)]
    sides = {
        name: ([prompt for prompt, _ in of], {"x": [value for _, value in of]})
        for name, of in (("one", one), ("two", two))
    }
    sample = Sample.paired(sides, weights=weights)
    assert sample.n_prompts == 14
    assert sample.n_events == sum("p04" <= prompt < "p18" for prompt, _ in [*one, *two])
    for name, of in (("one", one), ("two", two)):
        kept = [(prompt, value) for prompt, value in of if "p04" <= prompt < "p18"]
        alone = Sample.of([prompt for prompt, _ in kept], {"x": [value for _, value in kept]}, weights=weights)
        assert sample.mean(f"{name}.x") == pytest.approx(alone.mean("x"), abs=1e-12), "the draws are the same"
    if weights == "prompt":
        difference = sample.number(lambda m: m["one.x"] - m["two.x"])
        assert difference["high"] - difference["low"] < 0.1
        assert difference["mean"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"weights": "events"}, "weights 'events' are unknown; choose event or prompt"),
        ({"draws": 3}, "draws=3: an interval of 0.95 needs at least 40 draws"),
        ({"seed": -1}, "expected draws >= 1, seed >= 0"),
        ({"values": {"a": [1.0, math.nan]}}, "value 1 of a is nan"),
        ({"values": {"a": [1.0]}}, r"a has shape \(1,\); expected 2 numbers, one per event"),
        ({"prompt_ids": ["p", None]}, "1 of 2 prompt ids are null"),
    ],
)
def test_what_makes_no_sample(words, said):
    given = {"prompt_ids": ["p", "q"], "values": {"a": [1.0, 2.0]}} | words
    with pytest.raises(InputError, match=said):
        Sample.of(given.pop("prompt_ids"), given.pop("values"), **given)


# ---- regressions ----


def exact_least_squares(x, y, weights):
    """The normal equations in fractions, eliminated."""
    k = len(x[0])
    rows = [[Fraction(float(value)) for value in row] for row in x]
    ys, ws = [Fraction(float(value)) for value in y], [Fraction(value) for value in weights]
    matrix = [
        [sum(w * row[i] * row[j] for w, row in zip(ws, rows, strict=True)) for j in range(k)]
        + [sum(w * row[i] * value for w, row, value in zip(ws, rows, ys, strict=True))]
        for i in range(k)
    ]
    for i in range(k):
        pivot = next(row for row in range(i, k) if matrix[row][i])
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        matrix[i] = [value / matrix[i][i] for value in matrix[i]]
        for row in range(k):
            if row != i:
                matrix[row] = [a - matrix[row][i] * b for a, b in zip(matrix[row], matrix[i], strict=True)]
    return [float(matrix[i][k]) for i in range(k)]


def regression(n=60, seed=4):
    rng = np.random.default_rng(seed)
    controls = {
        "margin": rng.normal(0, 1, n),
        "category": [["code", "math", "prose"][i % 3] for i in range(n)],
        "tuned": rng.random(n) < 0.5,
    }
    y = 1 + 2 * controls["margin"] + 3 * (np.arange(n) % 3 == 1) - controls["tuned"] + rng.normal(0, 0.3, n)
    one = np.ones(n)
    code = [np.array([value == level for value in controls["category"]], float) for level in ("math", "prose")]
    x = np.stack([one, controls["margin"], *code, controls["tuned"]], axis=1)
    return y, controls, x, [f"q{i // 2:02d}" for i in range(n)]


def test_least_squares_equal_exact_fractions():
    y, controls, x, _ = regression()
    found = ols(y, controls)
    assert list(found) == ["intercept", "margin", "category=math", "category=prose", "tuned"]
    assert list(found.values()) == pytest.approx(exact_least_squares(x, y, [1] * len(y)), abs=1e-12)


def test_least_squares_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    y, controls, *_ = regression()
    theirs = stats.linregress(controls["margin"], y)
    ours = ols(y, {"margin": controls["margin"]})
    assert (ours["margin"], ours["intercept"]) == pytest.approx((theirs.slope, theirs.intercept), abs=1e-12)


def test_regression_draws_prompts_and_weighs_them():
    y, controls, x, prompts = regression()
    prompts = prompts[:-10] + ["q00"] * 10
    names = sorted(set(prompts))
    events_of = {name: [i for i, prompt in enumerate(prompts) if prompt == name] for name in names}
    weight = [1 / len(events_of[prompt]) for prompt in prompts]
    found = regress(prompts, y, controls, draws=40, seed=5)
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(40):
        times = np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names))
        of_event = np.array([times[names.index(prompt)] * w for prompt, w in zip(prompts, weight, strict=True)])
        root = np.sqrt(of_event)[:, None]
        drawn.append(np.linalg.lstsq(x * root, y * root[:, 0], rcond=None)[0])
    expected = exact_least_squares(x, y, weight)
    for at, (_, number) in enumerate(found.items()):
        assert number["mean"] == pytest.approx(expected[at], abs=1e-12)
        low, high = np.percentile([of[at] for of in drawn], [2.5, 97.5])
        assert (number["low"], number["high"]) == pytest.approx((low, high), abs=1e-9)


def test_a_coefficient_that_the_events_do_not_tell():
    y, controls, _, prompts = regression()
    twice = controls | {"again": controls["margin"] * 2, "nothing": np.zeros(len(y))}
    found = ols(y, twice)
    assert (found["margin"], found["again"], found["nothing"]) == (None, None, None)
    assert found["tuned"] == pytest.approx(ols(y, controls)["tuned"])
    spread = regress(prompts, y, twice)
    assert spread["again"]["mean"] is None
    assert spread["tuned"]["low"] is not None
    rare = controls | {"category": ["code"] * 59 + ["math"]}
    of_rare = regress(prompts, y, rare)
    assert (of_rare["category=math"]["mean"] is None, of_rare["category=math"]["low"]) == (False, None)
    assert of_rare["margin"]["low"] is not None
    assert regress([], [], {"margin": []})["margin"]["mean"] is None


def test_controls_that_are_none():
    with pytest.raises(InputError, match=r"control a has shape \(2,\); expected 3 values"):
        ols([1, 2, 3], {"a": [1, 2]})
    with pytest.raises(InputError, match="value 1 of a is inf"):
        ols([1, 2, 3], {"a": [1, math.inf, 2]})


# ---- sign flips ----


def slow_flips(values, draws, rng):
    """One draw after another: bit p of the draw's words tells whether prompt p keeps its sign."""
    n_words = -(-len(values) // 64)
    means = []
    for _ in range(draws):
        words = [int(word) for word in rng.integers(0, 2**64, size=n_words, dtype=np.uint64)]
        raw = b"".join(word.to_bytes(8, "little") for word in words)
        keeps = [raw[p // 8] >> (7 - p % 8) & 1 for p in range(len(values))]
        means.append(sum(value if keep else -value for value, keep in zip(values, keeps, strict=True)) / len(values))
    return means


@pytest.mark.parametrize("per_pass", [1, 1000, 1 << 21])
def test_sign_flips_equal_the_slow_twin(monkeypatch, per_pass):
    monkeypatch.setattr(statistics, "_DRAWN_PER_PASS", per_pass)
    rng = np.random.default_rng(8)
    families = {"b": rng.normal(0.3, 1, 70), "a": rng.normal(0.1, 1, 12)}
    found = sign_flip_null(families, draws=200, seed=6)
    signs = np.random.default_rng(6)
    null = [
        (one + two) / 2 for one, two in zip(*(slow_flips(families[name], 200, signs) for name in "ab"), strict=True)
    ]
    observed = (families["a"].mean() + families["b"].mean()) / 2
    expected = {
        "observed": observed,
        "p": (1 + sum(value >= observed for value in null)) / 201,
        "null_mean": np.mean(null),
        "null_sd": np.std(null),
        "null_q99.9": percentile(null, 0.999),
        "null_max": max(null),
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_a_null_is_exact_where_all_signs_can_be_listed():
    """Of 2^6 sign patterns, how many reach the observed mean: among them always the one that turns none."""
    values = np.array([0.3, 0.1, 0.5, -0.2, 0.7, 0.4])
    signs = np.array([[1 if bit >> i & 1 else -1 for i in range(6)] for bit in range(64)])
    reach = (signs @ values >= values.sum() - 1e-9).mean()
    found = sign_flip_null(values)
    assert found["p"] == pytest.approx(reach, abs=4 * math.sqrt(reach / 20_000))
    assert found["null_sd"] == pytest.approx(math.sqrt((values**2).sum()) / 6, rel=0.02)
    assert found["null_max"] == pytest.approx(np.abs(values).sum() / 6)


@pytest.mark.parametrize("weights", ["event", "prompt"])
def test_what_prompts_add_has_the_mean_as_its_mean(weights):
    sample = Sample.of(PROMPTS, values_of(), weights=weights)
    assert sign_flip_null(sample.of_prompts("a"))["observed"] == pytest.approx(sample.mean("a")["mean"], abs=1e-12)


def test_no_prompt_has_no_null():
    for nothing in ([], {}, {"a": [1.0], "b": []}):
        with pytest.raises(InputError, match="at least one prompt per family"):
            sign_flip_null(nothing)


# ---- over families ----

CORE = [(1.0, 0.9, 1.1), (2.0, 1.7, 2.4), (3.5, 3.0, 3.9), (0.2, -0.1, 0.4), (1.3, 1.2, 1.5)]


def test_balanced_follows_the_intervals_as_reported():
    numbers = [dict(zip(("mean", "low", "high"), one, strict=True)) for one in CORE]
    z = 1.959964
    errors = [(high - low) / (2 * z) for _, low, high in CORE]
    error = math.sqrt(sum(one**2 for one in errors)) / 5
    mean = sum(one for one, *_ in CORE) / 5
    expected = {"mean": mean, "low": mean - z * error, "high": mean + z * error}
    assert balanced(numbers) == pytest.approx(expected, abs=1e-12)
    assert half_width(numbers[0]) == pytest.approx(0.1)
    bare = {"mean": 1.0, "low": None, "high": None}
    assert balanced([*numbers[:4], bare])["low"] is None
    assert balanced([*numbers, bare | {"mean": None}]) == balanced([]) == {"mean": None, "low": None, "high": None}


def test_balanced_draws_are_means_of_draws():
    assert balanced_draws([np.array([1.0, 2.0]), np.array([3.0, 6.0])]).tolist() == [2.0, 4.0]
    assert balanced_draws([np.array([1.0]), None]) is None
    assert balanced_draws([]) is None


def test_means_without_some():
    assert trimmed_mean([5.0, 1.0, 2.0, 9.0]) == 3.5
    assert trimmed_mean([1.0, 2.0]) is None
    assert leave_one_out({"a": 1.0, "b": 2.0, "c": 6.0}) == {"a": 4.0, "b": 3.5, "c": 1.5}
    assert leave_one_out({"a": 1.0}) == {}
