"""Contrasts and intervals against planted grids and a bootstrap written as plain loops."""

import json
import math
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache.analyses.effects import effects
from actcache.cli import main
from actcache.errors import InputError
from actcache.study import statistics
from actcache.study.contrasts import CELLS, GROUP_COLUMNS, contrasts
from actcache.study.left_out import select_consistent, select_events

GRID = [("pt", "pt"), ("pt", "it"), ("it", "pt"), ("it", "it")]
QUANTITIES = [
    *("late_from_pt", "late_from_it", "interaction", "late_main", "upstream_main", "native_shift"),
    *("portable_share", "interaction_share", "matched_ratio"),
]


def cell_table(grids, prompts=None, labels=("pt", "it"), **group):
    """A table of cells from one (pt_pt, pt_it, it_pt, it_it) per event; prompt i for event i unless given."""
    prompts = prompts or [f"p{i:04d}" for i in range(len(grids))]
    plain = {"kind": "first_divergence", "boundary": 18, "scope": "prefix", "readout": "native", "variant": "none"}
    name_of = dict(zip(("pt", "it"), labels, strict=True))
    rows = []
    for i, (grid, prompt) in enumerate(zip(grids, prompts, strict=True)):
        for (upstream, late), margin in zip(GRID, grid, strict=True):
            cell = {"upstream": name_of[upstream], "late": name_of[late], "margin": float(margin)}
            rows.append({"event_id": f"e{i:04d}", "prompt_id": prompt, "step": i % 5} | plain | group | cell)
    return pa.Table.from_pylist(rows)


def random_grids(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal([-2.0, -1.2, -0.4, 2.0], 1.0, size=(n, 4))


def slow_effects(cells, draws, seed, level):
    """The specification as loops: draw prompts, pool every event of each drawn prompt, average, take percentiles."""
    margins, prompt_of = {}, {}
    for cell in cells.to_pylist():
        margins.setdefault(cell["event_id"], {})[cell["upstream"] + "_" + cell["late"]] = cell["margin"]
        prompt_of[cell["event_id"]] = cell["prompt_id"]
    prompts = sorted(set(prompt_of.values()))

    def quantities(events):
        mean = {name: sum(margins[event][name] for event in events) / len(events) for name in CELLS}
        a, b = mean["pt_it"] - mean["pt_pt"], mean["it_it"] - mean["it_pt"]
        shift = mean["it_it"] - mean["pt_pt"]
        upstream = (mean["it_pt"] - mean["pt_pt"] + mean["it_it"] - mean["pt_it"]) / 2
        linear, shares = (a, b, b - a, (a + b) / 2, upstream, shift), (a / b, (b - a) / shift, b / a)
        values = dict(zip(QUANTITIES, linear + shares, strict=True))
        return mean | values

    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(draws):
        picked = [prompts[i] for i in rng.integers(0, len(prompts), len(prompts))]
        drawn.append(quantities([event for prompt in picked for event in prompt_of if prompt_of[event] == prompt]))

    def percentile(name, q):
        ordered = sorted(draw[name] for draw in drawn)
        at = q * (len(ordered) - 1)
        left = math.floor(at)
        right = min(left + 1, len(ordered) - 1)
        return ordered[left] + (ordered[right] - ordered[left]) * (at - left)

    tail = (1 - level) / 2
    return {
        name: {"mean": mean, "low": percentile(name, tail), "high": percentile(name, 1 - tail)}
        for name, mean in quantities(list(prompt_of)).items()
    }


def flat(group):
    """One group's numbers by name: the four cells and the quantities."""
    return group["cells"] | {name: group[name] for name in QUANTITIES}


def width(number):
    return number["high"] - number["low"]


def test_contrasts_of_a_planted_grid():
    table = contrasts(cell_table([(-3.0, -2.0, -1.0, 4.0), (-1.0, 0.0, 0.5, 1.0)]))
    assert table.column_names == [
        *("event_id", "prompt_id", "kind", "pair", "step", "boundary", "scope", "readout", "variant"),
        *("y_pt_pt", "y_pt_it", "y_it_pt", "y_it_it"),
        *("late_from_pt", "late_from_it", "interaction", "late_main", "upstream_main", "native_shift"),
    ]
    first = table.to_pylist()[0]
    assert (first["event_id"], first["prompt_id"], first["step"], first["boundary"]) == ("e0000", "p0000", 0, 18)
    assert (first["late_from_pt"], first["late_from_it"]) == (1.0, 5.0)
    assert (first["interaction"], first["native_shift"]) == (4.0, 7.0)
    assert (first["late_main"], first["upstream_main"]) == (3.0, 4.0)


def test_effects_of_a_planted_grid():
    group = effects(cell_table([(-3.0, -2.0, -1.0, 4.0), (-1.0, 0.0, 0.5, 1.0)]), draws=40)["groups"][0]
    means = {name: number["mean"] for name, number in flat(group).items()}
    assert means["pt_pt"] == -2.0
    assert means["it_it"] == 2.5
    assert means["late_from_pt"] == 1.0
    assert means["late_from_it"] == 2.75
    assert means["interaction"] == 1.75
    assert means["native_shift"] == 4.5
    assert means["late_main"] == (1.0 + 2.75) / 2
    assert means["upstream_main"] == 4.5 - means["late_main"]
    assert means["matched_ratio"] == 2.75
    assert means["portable_share"] == 1.0 / 2.75
    assert means["interaction_share"] == 1.75 / 4.5
    assert (group["n_events"], group["n_prompts"]) == (2, 2)


def test_published_shares_follow_from_the_published_effects():
    # A +0.76, B +2.44, a native shift of 1.68 / 0.337: the shares printed beside them are 31.1% and 33.7%.
    shift = 1.68 / 0.337
    group = effects(cell_table([(0.0, 0.76, shift - 2.44, shift)] * 3), draws=40)["groups"][0]
    assert group["portable_share"]["mean"] == pytest.approx(0.311, abs=5e-4)
    assert group["interaction_share"]["mean"] == pytest.approx(0.337, abs=5e-4)


@pytest.mark.parametrize("per_pass", [1, 40, 1 << 21])
def test_equals_the_slow_twin(monkeypatch, per_pass):
    monkeypatch.setattr(statistics, "_DRAWN_PER_PASS", per_pass)
    prompts = ["p0", "p1", "p1", "p2", "p3", "p3", "p3", "p4", "p5", "p6", "p7", "p8", "p9"]
    cells = cell_table(random_grids(len(prompts)), prompts)
    expected = slow_effects(cells, draws=120, seed=3, level=0.9)
    group = effects(cells, draws=120, seed=3, level=0.9)["groups"][0]
    for name, number in flat(group).items():
        assert number == pytest.approx(expected[name], abs=1e-12), name


def test_groups_do_not_touch_each_other(monkeypatch):
    monkeypatch.setattr(statistics, "_GROUPS_PER_PASS", 2)
    parts = [
        cell_table(random_grids(12, seed), boundary=boundary, readout=readout)
        for seed, (boundary, readout) in enumerate([(5, "native"), (5, "common_it"), (20, "native"), (20, "common_it")])
    ]
    parts.append(cell_table(random_grids(4, 7), kind="later_disagreement"))
    together = effects(pa.concat_tables(parts), draws=50)["groups"]
    alone = [effects(part, draws=50)["groups"][0] for part in parts]
    assert together == sorted(alone, key=lambda group: [group[name] for name in GROUP_COLUMNS])


def test_row_order_does_not_matter():
    cells = pa.concat_tables([cell_table(random_grids(30, 1)), cell_table(random_grids(30, 2), boundary=5)])
    shuffled = cells.take(pa.array(np.random.default_rng(5).permutation(cells.num_rows)))
    assert contrasts(shuffled).equals(contrasts(cells))
    assert effects(shuffled, draws=100) == effects(cells, draws=100)


def test_column_types_do_not_matter():
    cells = cell_table(random_grids(6))
    encoded = cells
    for i, field in enumerate(cells.schema):
        if pa.types.is_string(field.type):
            encoded = encoded.set_column(i, field.name, cells[field.name].dictionary_encode())
    assert effects(encoded, draws=40) == effects(cells, draws=40)
    chunked = pa.concat_tables([encoded.slice(0, 7), encoded.slice(7)])
    assert effects(chunked, draws=40) == effects(cells, draws=40)


def retyped(cells, name, values):
    return cells.set_column(cells.column_names.index(name), name, values)


TEXT_TYPES = [pa.large_string(), pa.string_view(), pa.binary(), pa.dictionary(pa.int8(), pa.large_string())]
NUMBER_TYPES = {
    "boundary": [pa.uint8(), pa.int16(), pa.float32(), pa.decimal128(5, 1), pa.string()],
    "step": [pa.int8(), pa.float64(), pa.decimal256(7, 0)],
    "margin": [pa.float16(), pa.float32(), pa.int32(), pa.decimal128(12, 6), pa.dictionary(pa.int32(), pa.float64())],
}


TEXTS = ("event_id", "prompt_id", "kind", "scope", "readout", "variant", "upstream", "late")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        *((TEXTS, kind) for kind in TEXT_TYPES),
        *(((name,), kind) for name, kinds in NUMBER_TYPES.items() for kind in kinds),
    ],
)
def test_other_tools_types_are_read(names, kind):
    """Margins are whole here, which each type of number holds."""
    cells = other = cell_table(np.round(random_grids(12) * 4))
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    make = Decimal if pa.types.is_decimal(kind) else str if pa.types.is_string(kind) else lambda value: value
    for name in names:
        values = pa.array([make(value) for value in cells[name].to_pylist()]).cast(value_type)
        other = retyped(other, name, values if value_type == kind else values.dictionary_encode())
    assert effects(other, draws=40) == effects(cells, draws=40)


def test_values_of_another_kind_are_refused_by_column():
    cells = cell_table(random_grids(3))
    n = cells.num_rows
    cases = {
        "boundary": [pa.array([18.5] * n), pa.array(["late"] * n), pa.array([[18]] * n), pa.array([float("nan")] * n)],
        "step": [pa.array([{"a": 1}] * n), pa.array([2**63] * n, pa.uint64())],
        "margin": [pa.array(["1.5"] * n), pa.array([True] * n), pa.array([None] * n), pa.array([[1.0]] * n)],
        "event_id": [pa.array([["e"]] * n), pa.array([b"\xff"] * n), pa.array([None] * n)],
        "upstream": [pa.array([None] * n), pa.array(["pt", None] * (n // 2))],
        "variant": [pa.array([None] * n, pa.string())],
    }
    for name, kinds in cases.items():
        for values in kinds:
            with pytest.raises(InputError, match=f"column {name} of the cells (is|has)"):
                effects(retyped(cells, name, values), draws=40)
    with pytest.raises(InputError, match="2 columns margin"):
        effects(cells.append_column("margin", cells["margin"]), draws=40)


def test_integer_ids_sort_as_numbers():
    cells = cell_table(random_grids(12))
    numbered = cells.set_column(
        cells.column_names.index("event_id"), "event_id", pa.array([i // 4 for i in range(48)], pa.int64())
    )
    assert contrasts(numbered)["event_id"].to_pylist() == list(range(12))


def test_repeating_the_events_of_a_prompt_adds_no_certainty():
    grids = random_grids(40)
    once = effects(cell_table(grids))["groups"][0]
    prompts = [f"p{i:04d}" for i in range(40)]
    thrice = effects(cell_table(np.concatenate([grids] * 3), prompts * 3))["groups"][0]
    naive = effects(cell_table(np.concatenate([grids] * 3)))["groups"][0]
    assert (thrice["n_events"], thrice["n_prompts"]) == (120, 40)
    for name in ("late_from_pt", "interaction", "portable_share"):
        assert thrice[name] == pytest.approx(once[name], abs=1e-12)
        assert width(naive[name]) < 0.7 * width(once[name])


def test_means_are_over_events_not_over_prompts():
    group = effects(cell_table([(0, 0, 0, 1), (0, 0, 0, 1), (0, 0, 0, 4)], ["a", "a", "b"]), draws=40)["groups"][0]
    assert group["cells"]["it_it"]["mean"] == 2.0


@pytest.mark.parametrize(("n_prompts", "has_interval"), [(1, False), (2, False), (9, False), (10, True)])
def test_an_interval_needs_ten_prompts(n_prompts, has_interval):
    n_events = 3 * n_prompts
    prompts = [f"p{i % n_prompts}" for i in range(n_events)]
    group = effects(cell_table(random_grids(n_events), prompts))["groups"][0]
    assert group["n_prompts"] == n_prompts
    for name, number in flat(group).items():
        assert number["mean"] is not None
        if not name.endswith("_share"):
            assert (number["low"] is not None, number["high"] is not None) == (has_interval, has_interval)


def test_choices_and_kl_of_each_cell():
    grids = random_grids(12)
    cells = cell_table(grids)
    best = np.array([[7, 8, 8, 8], [7, 7, 9, 8], [7, 7, 7, 8]] * 4).ravel()
    with_best = (
        cells.append_column("y_pt", pa.array([7] * 48))
        .append_column("y_it", pa.array([8] * 48))
        .append_column("top1_id", pa.array(best))
    )
    group = effects(with_best, draws=40)["groups"][0]
    third = pytest.approx(1 / 3)
    assert group["choices"] == {
        "pt_pt": {"y_pt": 1, "y_it": 0, "other": 0},
        "pt_it": {"y_pt": pytest.approx(2 / 3), "y_it": third, "other": 0},
        "it_pt": {"y_pt": third, "y_it": third, "other": third},
        "it_it": {"y_pt": 0, "y_it": 1, "other": 0},
    }
    kl = np.arange(48) % 4 / 10
    group = effects(with_best.append_column("kl", pa.array(kl, pa.float32())), draws=40)["groups"][0]
    assert group["kl"] == pytest.approx({"pt_pt": 0, "pt_it": 0.1, "it_pt": 0.2, "it_it": 0.3}, abs=1e-6)
    # Variants that were not looked up have neither, and no group is told apart by what others have.
    unknown = pa.concat_tables(
        [with_best, with_best.set_column(cells.column_names.index("variant"), "variant", pa.array(["x"] * 48))]
    )
    at = unknown.column_names.index("top1_id")
    unknown = unknown.set_column(at, "top1_id", pa.array([*best.tolist(), *[None] * 48], pa.int64()))
    plain, variant = effects(unknown, draws=40)["groups"]
    assert "choices" in plain
    assert "choices" not in variant
    assert "kl" not in plain


def test_a_share_without_a_denominator_is_null():
    group = effects(cell_table([(-1, 0, 2, 2), (-1, 1, -1, -1)]), draws=50)["groups"][0]
    assert group["late_from_it"]["mean"] == 0
    assert group["portable_share"] == {"mean": None, "low": None, "high": None}
    assert group["interaction_share"]["mean"] is not None


def test_rounding_is_not_a_denominator():
    group = effects(cell_table([(0.1, 0.5, 0.1, 0.3), (0.2, 0.5, 0.5, 0.3)] * 3), draws=50)["groups"][0]
    assert 0 <= abs(group["late_from_it"]["mean"]) < 1e-15
    assert group["portable_share"]["mean"] is None


def test_a_share_whose_denominator_may_be_zero_has_no_interval():
    grids = [(0, 1, 0, b) for b in (-1.0, 1.5, -0.5, 0.7, -0.4, 0.2) * 2]
    group = effects(cell_table(grids))["groups"][0]
    assert group["late_from_it"]["low"] < 0 < group["late_from_it"]["high"]
    assert group["portable_share"]["mean"] == pytest.approx(12.0)
    assert group["portable_share"]["low"] is None


@pytest.mark.slow
def test_intervals_cover_the_truth_at_about_their_level():
    # 300 studies of 50 prompts with 1 to 4 correlated events each; a percentile interval of level 0.9 covers a little
    # less than 0.9 at this size. The binomial standard error is 0.017: the band is about three of them.
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(300):
        prompts, grids = [], []
        for p in range(50):
            of_prompt = rng.normal(0, 1)
            for _ in range(rng.integers(1, 5)):
                prompts.append(f"p{p:02d}")
                grids.append((0.0, 0.0, 0.0, 1.5 + of_prompt + rng.normal(0, 0.5)))
        interaction = effects(cell_table(grids, prompts), draws=200, level=0.9)["groups"][0]["interaction"]
        covered += interaction["low"] <= 1.5 <= interaction["high"]
    assert 0.84 <= covered / 300 <= 0.94


def test_seed_draws_and_level_do_what_they_say():
    cells = cell_table(random_grids(40))
    assert effects(cells) == effects(cells, draws=2000, seed=0, level=0.95)
    assert effects(cells, seed=1) != effects(cells, seed=0)
    narrow, wide = (effects(cells, level=level)["groups"][0]["interaction"] for level in (0.5, 0.99))
    assert wide["low"] < narrow["low"] < narrow["mean"] < narrow["high"] < wide["high"]


def test_other_pairs_of_a_lineup():
    # Both pairs hold (base, base); a lineup's grid has it once.
    pair, other = (cell_table(random_grids(5, seed), labels=("base", late)) for seed, late in enumerate(["sft", "dpo"]))
    lineup = pa.concat_tables([pair, other.filter(pa.array([i % 4 != 0 for i in range(20)]))])
    group = effects(lineup, pair=("base", "sft"), draws=40)["groups"][0]
    assert (group["pt"], group["it"]) == ("base", "sft")
    assert group == effects(pair, pair=("base", "sft"), draws=40)["groups"][0]
    swapped = effects(pair, pair=("sft", "base"), draws=40)["groups"][0]
    assert swapped["cells"]["pt_pt"] == group["cells"]["it_it"]


def test_empty_tables():
    full = cell_table(random_grids(2))
    assert effects(full.slice(0, 0)) == {"draws": 2000, "seed": 0, "level": 0.95, "groups": []}
    assert contrasts(full.slice(0, 0)).schema == contrasts(full).schema
    untyped = pa.table({name: [] for name in full.column_names})
    assert contrasts(untyped).num_rows == 0


def test_result_is_plain_json():
    result = effects(cell_table(random_grids(6)), draws=40)
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def without(cells, index):
    return cells.take(pa.array([i for i in range(cells.num_rows) if i != index]))


def with_value(cells, name, index, value):
    values = cells[name].to_pylist()
    values[index] = value
    return cells.set_column(cells.column_names.index(name), name, pa.array(values, cells.schema.field(name).type))


def test_missing_cell_names_event_and_cell():
    with pytest.raises(InputError, match=r"'e0001' .*boundary 18.*lacks the cell upstream pt, late it"):
        contrasts(without(cell_table(random_grids(3)), 5))


def test_duplicate_cell_names_event_and_cell():
    cells = cell_table(random_grids(3))
    with pytest.raises(InputError, match=r"'e0002' .*repeats the cell upstream it, late it \(2 times\)"):
        contrasts(pa.concat_tables([cells, cells.slice(11, 1)]))


def test_missing_and_duplicate_in_one_event():
    cells = cell_table(random_grids(2))
    with pytest.raises(InputError, match=r"lacks .* and repeats .*\(1 more like it\)"):
        contrasts(pa.concat_tables([without(cells, 0), cells.slice(1, 1), cells.slice(5, 1)]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 3.5e38])
def test_margin_that_is_not_finite(value):
    with pytest.raises(InputError, match=r"'e0001' .*upstream it, late pt; 1 of 8"):
        contrasts(with_value(cell_table(random_grids(2)), "margin", 6, value))


def test_numbers_of_all_sizes_that_margins_have():
    largest = float(np.finfo(np.float32).max)
    group = effects(cell_table([(-largest, largest, largest, -largest)] * 12))["groups"][0]
    assert group["interaction"]["mean"] == group["interaction"]["low"] == pytest.approx(-4 * largest)
    assert json.loads(json.dumps(group, allow_nan=False)) == group


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_other_numbers_that_are_not_finite(value):
    """KL of a cell, and margins of checkpoints that are not of the pair."""
    cells = cell_table(random_grids(12)).append_column("kl", pa.array([0.5] * 48))
    with pytest.raises(InputError, match=r"'e0002' .*has kl .*upstream pt, late it; 1 of 48 values of kl"):
        effects(with_value(cells, "kl", 9, value))
    labels = ("base", "sft", "dpo")
    plain = cell_table(random_grids(1)).to_pylist()[0] | {"pair": "base,sft"}
    lineup = pa.Table.from_pylist(
        [plain | {"upstream": up, "late": late, "margin": 1.0} for up in labels for late in labels]
    )
    assert effects(lineup)["groups"][0]["margins"]["dpo"]["sft"]["mean"] == 1.0
    with pytest.raises(InputError, match=r"has margin .*upstream dpo, late sft; 1 of 9 values of margin"):
        effects(with_value(lineup, "margin", 7, value))


@pytest.mark.parametrize("name", ["margin", "prompt_id", "event_id", "boundary"])
def test_null(name):
    with pytest.raises(InputError, match=f"column {name} of the cells has 1 nulls"):
        contrasts(with_value(cell_table(random_grids(2)), name, 3, None))


@pytest.mark.parametrize(("name", "value"), [("prompt_id", "another"), ("step", 99)])
def test_event_with_two_prompts_or_steps(name, value):
    with pytest.raises(InputError, match=f"'e0001' .*different {name} .*{value}"):
        contrasts(with_value(cell_table(random_grids(2)), name, 6, value))


def test_missing_column():
    with pytest.raises(InputError, match="no column readout, margin"):
        contrasts(cell_table(random_grids(2)).drop_columns(["readout", "margin"]))


def test_unknown_or_equal_labels():
    cells = cell_table(random_grids(2))
    with pytest.raises(InputError, match=r"pair 'sft', 'dpo': upstream labels are \['pt'\], late labels \['it'\]"):
        contrasts(cells.filter(pa.array([False, True, False, False] * 2)), pair=("sft", "dpo"))
    with pytest.raises(InputError, match="two different labels"):
        contrasts(cells, pair=("it", "it"))


def test_fewer_draws_than_an_interval_needs():
    cells = cell_table(random_grids(2))
    for draws, level, fewest in [(1, 0.95, 40), (39, 0.95, 40), (19, 0.9, 20), (199, 0.99, 200)]:
        with pytest.raises(InputError, match=rf"draws={draws}: an interval of {level} needs at least {fewest} draws"):
            effects(cells, draws=draws, level=level)
        effects(cells, draws=fewest, level=level)


@pytest.mark.parametrize("bad", [{"draws": 0}, {"seed": -1}, {"level": 0.0}, {"level": 1.0}])
def test_numbers_out_of_range(bad):
    with pytest.raises(InputError, match="expected draws >= 1"):
        effects(cell_table(random_grids(2)), **bad)


def event_table(gaps):
    """A table of events e0000, e0001, ... with their (gap_pt, gap_it)."""
    pt, it = (pa.array(values, pa.float32()) for values in zip(*gaps, strict=True))
    return pa.table({"event_id": [f"e{i:04d}" for i in range(len(gaps))], "gap_pt": pt, "gap_it": it})


def stability_table(n, dtype="bfloat16", unstable=(), moved=()):
    """A table of stability of n events: some change between strict and packed, some are not as stored."""
    columns = {
        "event_id": [f"e{i:04d}" for i in range(n)],
        "dtype": [dtype] * n,
        "stable": [i not in unstable for i in range(n)],
        "as_stored": [i not in moved for i in range(n)],
    }
    return pa.table(columns)


def events_of(cells):
    return sorted(set(cells["event_id"].to_pylist()))


def test_unstable_events_are_left_out():
    cells = pa.concat_tables([cell_table(random_grids(6, 1)), cell_table(random_grids(6, 2), boundary=5)])
    other = stability_table(6, "float32", unstable=range(6))
    own = stability_table(6, unstable=(1, 4), moved=(4, 5)).take(pa.array([5, 3, 0, 1, 2, 4]))
    stability = pa.concat_tables([other, own])
    left, notes = select_events(cells, event_table([(1, 1)] * 6), "bfloat16", stability=stability)
    assert events_of(left) == ["e0000", "e0002", "e0003"]
    assert notes == {"stable_only": True, "n_unstable": 3, "n_left_out": 3}
    assert left.equals(cells.filter(pa.array([i // 4 % 6 in (0, 2, 3) for i in range(48)])))
    assert effects(left, draws=40)["groups"][0]["n_events"] == 3


def test_events_with_a_small_or_unknown_gap_are_left_out():
    cells, events = cell_table(random_grids(5)), event_table([(1, 1), (0.25, 1), (1, 0.2), (None, 1), (0.3, 0.25)])
    left, notes = select_events(cells, events, "float32", min_gap=0.25)
    assert events_of(left) == ["e0000", "e0001", "e0004"]
    assert notes == {"min_gap": 0.25, "n_below_min_gap": 2, "n_left_out": 2}
    both, notes = select_events(
        cells, events, "float32", stability=stability_table(5, "float32", unstable=(2, 4)), min_gap=0.25
    )
    assert events_of(both) == ["e0000", "e0001"]
    assert (notes["n_unstable"], notes["n_below_min_gap"], notes["n_left_out"]) == (2, 2, 3)


def test_selecting_nothing_keeps_everything():
    cells, events = cell_table(random_grids(3)), event_table([(1, 1)] * 3)
    assert select_events(cells, events, "float32") == (cells, {"n_left_out": 0})
    assert select_events(cells, events, "float32", stability=stability_table(3, "float32"), min_gap=0)[0].equals(cells)
    empty, notes = select_events(
        cells.slice(0, 0), events.slice(0, 0), "float32", stability=stability_table(3).slice(0, 0)
    )
    assert (empty.num_rows, notes["n_unstable"]) == (0, 0)


def test_events_that_cannot_be_selected():
    cells, events = cell_table(random_grids(3)), event_table([(1, 1)] * 3)
    with pytest.raises(InputError, match="2 of 3 events have been checked for stability in bfloat16"):
        select_events(cells, events, "bfloat16", stability=stability_table(2))
    with pytest.raises(InputError, match="0 of 3 events have been checked for stability in float32"):
        select_events(cells, events, "float32", stability=stability_table(3))
    with pytest.raises(InputError, match="'e0002' of the cells is not among the 2 events"):
        select_events(cells, events.slice(0, 2), "float32", min_gap=0.1)
    unstable, small = stability_table(3, "float32", unstable=(0, 1)), event_table([(1, 1), (1, 1), (0.1, 1)])
    with pytest.raises(InputError, match=r"no event is left of 3: 2 unstable in float32, 1 with a gap below 0.5"):
        select_events(cells, small, "float32", stability=unstable, min_gap=0.5)
    for gap in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="give a number of logits, from 0 on"):
            select_events(cells, events, "float32", min_gap=gap)


# ---- weights, subsets, choices, nulls, pairs ----


def group_by(found, **names):
    (group,) = (one for one in found["groups"] if names.items() <= one.items())
    return group


def carrying(cells, name, of_events):
    """The cells with a column that their events carry; events are of four cells each."""
    return cells.append_column(name, pa.array([value for value in of_events for _ in range(4)]))


def test_prompts_with_one_event_and_with_twenty_weigh_the_same():
    grids = [(0, 0, 0, 1)] * 20 + [(0, 0, 0, 3)]
    cells = cell_table(grids, ["a"] * 20 + ["b"])
    assert group_by(effects(cells, draws=40, weights="prompt"))["interaction"]["mean"] == pytest.approx(2)
    assert group_by(effects(cells, draws=40, weights="event"))["interaction"]["mean"] == pytest.approx(23 / 21)
    with pytest.raises(InputError, match="weights 'events' are unknown; choose event or prompt"):
        effects(cells, weights="events")


@pytest.mark.parametrize(
    ("kind", "weights"),
    [("first_divergence", "event"), ("fixed", "event"), ("pt_rollout", "prompt"), ("pre_divergence", "prompt")],
)
def test_what_weighs_the_same_by_default(kind, weights):
    cells = cell_table(random_grids(12), ["a"] * 6 + list("bcdefg"), kind=kind)
    (group,) = effects(cells, draws=40)["groups"]
    assert group["weights"] == weights
    assert group == effects(cells, draws=40, weights=weights)["groups"][0]


def stepped(n=60):
    """Events at steps 0 to 11 of 12 prompts each; only those from step 3 on have an interaction, of 2."""
    steps = [i % 12 for i in range(n)]
    cells = cell_table([(-1, 0, 0, 3 if step >= 3 else 1) for step in steps], [f"p{i % 15:02d}" for i in range(n)])
    cells = cells.drop_columns(["step"])
    return carrying(carrying(cells, "step", steps), "category", [["code", "prose", None][i // 3 % 3] for i in range(n)])


def test_an_effect_from_a_step_on_is_seen_in_the_subsets():
    found = effects(stepped(), draws=40, by=["step"])
    rows = {group["subset"]: (group["interaction"]["mean"], group["share_of_events"]) for group in found["groups"]}
    assert list(rows) == ["all", "step=0", "step>=1", "step>=3", "step>=5", "step>=10"]
    assert rows["step=0"] == (0, pytest.approx(1 / 12))
    assert rows["step>=1"] == (pytest.approx(2 * 9 / 11), pytest.approx(11 / 12))
    assert rows["step>=3"] == (2, 0.75)
    assert rows["step>=10"] == (2, pytest.approx(1 / 6))
    assert rows["all"] == (1.5, 1.0)
    assert found["empty_subsets"] == []


@pytest.mark.parametrize("weights", ["event", "prompt"])
def test_a_subset_is_the_effects_of_its_events_alone(weights):
    cells = pa.concat_tables([stepped(), cell_like(stepped(36), kind="fixed")])
    found = effects(cells, draws=40, weights=weights, by=["step", "category"])
    names = [group["subset"] for group in found["groups"] if group["kind"] == "fixed"]
    assert names[:9] == [
        *("all", "step=0", "step>=1", "step>=3", "step>=5", "step>=10"),
        *("category=code", "category=null", "category=prose"),
    ]
    assert "step>=3, category=code" in names
    for name, keep in {
        "step>=5": lambda row: row["step"] >= 5,
        "category=null": lambda row: row["category"] is None,
        "step>=1, category=prose": lambda row: row["step"] >= 1 and row["category"] == "prose",
    }.items():
        alone = effects(cells.filter(pa.array([keep(row) for row in cells.to_pylist()])), draws=40, weights=weights)
        for group in alone["groups"]:
            subset = group_by(found, kind=group["kind"], subset=name)
            whole = group_by(found, kind=group["kind"], subset="all")
            assert subset["share_of_events"] == group["n_events"] / whole["n_events"]
            same = {"subset", "share_of_events", "label_swap"}
            assert {key: value for key, value in subset.items() if key not in same} == {
                key: value for key, value in group.items() if key not in same
            }


def cell_like(cells, **values):
    """The same cells with other values in some columns."""
    for name, value in values.items():
        at = cells.column_names.index(name)
        cells = cells.set_column(at, name, pa.array([value] * cells.num_rows))
    return cells


def test_columns_that_make_no_subsets():
    cells = carrying(cell_table(random_grids(60)), "number", list(range(60)))
    for name, said in {
        "colour": "column 'colour' is not carried by the prompts; there are step, number",
        "margin": "column 'margin' is not carried",
        "number": "column 'number' has 60 values; subsets are of at most 50",
    }.items():
        with pytest.raises(InputError, match=said):
            effects(cells, draws=40, by=[name])
    torn = cell_table(random_grids(3)).append_column("x", pa.array(["a"] * 5 + ["b"] + ["a"] * 6))
    with pytest.raises(InputError, match="the cells of event 'e0001' differ in 'x'"):
        effects(torn, draws=40, by=["x"])
    lists = cell_table(random_grids(1)).append_column("x", pa.array([["a"]] * 4))
    with pytest.raises(InputError, match=r"column 'x' is list.*subsets need texts or whole numbers"):
        effects(lists, draws=40, by=["x"])


def test_subsets_without_an_event_are_named():
    found = effects(cell_table(random_grids(5)), draws=40, by=["step"])  # steps 0 to 4
    assert found["empty_subsets"] == ["step>=5", "step>=10"]
    assert [group["subset"] for group in found["groups"]] == ["all", "step=0", "step>=1", "step>=3"]
    assert effects(cell_table(random_grids(5)).slice(0, 0), by=["step"])["groups"] == []


@pytest.mark.parametrize("weights", ["event", "prompt"])
def test_choice_rates_have_intervals(weights):
    prompts = [f"p{i % 11:02d}" for i in range(40)]
    cells, best = cell_table(random_grids(40), prompts), np.random.default_rng(3).integers(7, 10, 160)
    for name, values in {"y_pt": [7] * 160, "y_it": [8] * 160, "top1_id": best}.items():
        cells = cells.append_column(name, pa.array(values))
    (group,) = effects(cells, draws=80, seed=2, weights=weights)["groups"]
    for at, cell in enumerate(CELLS):
        of_cell = best.reshape(40, 4)[:, at]
        for name, token in (("y_pt", 7), ("y_it", 8), ("other", 9)):
            values = {"x": (of_cell == token).astype(float)}
            expected = statistics.Sample.of(prompts, values, weights=weights, draws=80, seed=2).mean("x")
            assert group["choice_rates"][cell][name] == pytest.approx(expected, abs=1e-12)
            assert group["choices"][cell][name] == group["choice_rates"][cell][name]["mean"]


@pytest.mark.parametrize("weights", ["event", "prompt"])
def test_plain_groups_have_a_label_swap_null(weights):
    prompts = [f"p{i % 11:02d}" for i in range(40)]
    plain, edited = (cell_table(random_grids(40, 1), prompts, variant=name) for name in ("none", "edited"))
    found = effects(pa.concat_tables([plain, edited]), draws=40, weights=weights, null_draws=500, by=["step"])
    assert [group["variant"] for group in found["groups"] if "label_swap" in group] == ["none"]
    group = group_by(found, variant="none", subset="all")
    interaction = {"x": contrasts(plain)["interaction"].to_numpy()}
    sample = statistics.Sample.of(prompts, interaction, weights=weights)
    expected = statistics.sign_flip_null(sample.of_prompts("x"), 500) | {"draws": 500, "seed": 23}
    assert group["label_swap"] == pytest.approx(expected, abs=1e-12)
    assert group["label_swap"]["observed"] == pytest.approx(group["interaction"]["mean"])
    assert "label_swap" not in effects(plain, draws=40, null_draws=0)["groups"][0]


def test_shares_whose_means_differ_in_sign_are_flagged():
    group = group_by(effects(cell_table([(0, -1, 0, 3)] * 12), draws=40))
    assert (group["portable_share"]["mean"], group["portable_share"]["low"]) == (pytest.approx(-1 / 3),) * 2
    assert group["flags"] == ["portable_share", "matched_ratio"]
    assert group_by(effects(cell_table([(0, 1, 0, 3)] * 12), draws=40))["flags"] == []


def test_variants_are_compared_with_the_plain_grid():
    """A variant halves every late effect: the ratio is exact, whatever the events are."""
    grids = random_grids(30, 4) + np.array([-2, 0, 0, 4])
    halved = np.stack([grids[:, 0], (grids[:, 0] + grids[:, 1]) / 2, grids[:, 2], (grids[:, 2] + grids[:, 3]) / 2], 1)
    cells = pa.concat_tables([cell_table(grids), cell_table(halved[:25], variant="half")])
    found = effects(cells, draws=100, paired=True)
    assert "paired" not in group_by(found, variant="none")
    paired = group_by(found, variant="half")["paired"]
    assert (paired["with"], paired["n_prompts"]) == ("variant none", 25)
    for name in ("late_from_pt", "late_from_it", "interaction"):
        assert list(paired[f"{name}_ratio"].values()) == pytest.approx([0.5] * 3, abs=1e-12)
    table = contrasts(cell_table(grids[:25]))["interaction"].to_numpy()
    assert paired["interaction_difference"]["mean"] == pytest.approx(-table.mean() / 2)
    assert all("paired" not in group for group in effects(cells, draws=100)["groups"])


def test_kinds_are_compared_with_first_divergences_on_the_prompts_of_both():
    first = cell_table([(0, 1, 0, 1 + i) for i in range(14)], [f"p{i:02d}" for i in range(14)])
    other = cell_table([(0, 1, 0, 1 + i / 2) for i in range(2, 16) for _ in range(2)],
                       [f"p{i:02d}" for i in range(2, 16) for _ in range(2)], kind="it_rollout")  # fmt: skip
    found = effects(pa.concat_tables([first, other]), draws=100, paired=True)
    paired = group_by(found, kind="it_rollout")["paired"]
    assert (paired["with"], paired["n_prompts"]) == ("kind first_divergence", 12)
    assert list(paired["interaction_ratio"].values()) == pytest.approx([0.5] * 3, abs=1e-12)
    assert paired["interaction_difference"]["mean"] == pytest.approx(-np.arange(2, 14).mean() / 2)


# ---- planted pairs ----


def test_a_change_of_late_blocks_alone_has_no_interaction():
    rng = np.random.default_rng(2)
    base, late, shift = rng.normal(-3, 1, 40), rng.normal(2, 0.3, 40), rng.normal(1, 1, 40)
    group = group_by(effects(cell_table(np.stack([base, base + late, base + shift, base + shift + late], 1))))
    assert group["interaction"]["mean"] == pytest.approx(0, abs=1e-12)
    assert list(group["portable_share"].values()) == pytest.approx([1] * 3, abs=1e-12)


def test_a_change_that_the_state_gates_is_interaction_alone():
    rng = np.random.default_rng(2)
    base, gain = rng.normal(-3, 1, 40), rng.normal(5, 1, 40)
    group = group_by(effects(cell_table(np.stack([base, base, base, base + gain], 1))))
    assert group["late_from_pt"]["mean"] == group["portable_share"]["mean"] == 0
    assert list(group["interaction_share"].values()) == pytest.approx([1] * 3, abs=1e-12)
    assert group["matched_ratio"]["mean"] is None


def test_equal_checkpoints_give_nothing():
    rng = np.random.default_rng(2)
    group = group_by(effects(cell_table(np.repeat(rng.normal(0, 1, (40, 1)), 4, axis=1)), draws=40))
    assert {group[name]["mean"] for name in QUANTITIES if not name.endswith(("share", "ratio"))} == {0}
    assert {group[name]["mean"] for name in ("portable_share", "interaction_share", "matched_ratio")} == {None}
    assert group["label_swap"]["p"] == 1


# ---- events that contradict their own checkpoints ----

TIES = [(-1, 0, 0, 1), (0, 0, 0, 1), (-1, 0, 0, 0), (0, 0, 0, -1), (1, 0, 0, 2), (-1, 0, 0, -2), (-2, 0, 0, 3)]


def test_ties_and_wrong_signs_are_left_out_and_counted():
    cells = cell_table(TIES)
    left, notes = select_consistent(cells)
    assert events_of(left) == ["e0000", "e0006"]
    assert notes == {"keep_ties": False, "n_ties": 3, "n_wrong_sign": 2}
    kept, notes = select_consistent(cells, keep=True)
    assert kept.equals(cells)
    assert notes == {"keep_ties": True, "n_ties": 3, "n_wrong_sign": 2}
    given = cell_table(TIES, kind="fixed")
    assert select_consistent(given) == (given, {"keep_ties": False, "n_ties": 0, "n_wrong_sign": 0})
    with pytest.raises(InputError, match=r"no event is left of 2: 1 have a tie and 1 the wrong sign .*--keep-ties"):
        select_consistent(cell_table(TIES[3:5]))


def test_an_event_is_judged_by_the_heads_of_its_own_checkpoints():
    """Another head, or another variant, may well see another order; of a table without native cells the common readout
    of a checkpoint is its own."""
    other = [
        cell_table(TIES[3:], readout="common_it"),
        cell_table(TIES[3:], variant="edited"),
        cell_table([(-1, 0, 0, 1)] * 4),
    ]
    assert select_consistent(pa.concat_tables(other))[1]["n_ties"] == 0
    left, notes = select_consistent(cell_table(TIES, readout="common_it"))
    assert events_of(left) == ["e0000", "e0001", "e0004", "e0006"], "nothing is known of pt's own"
    assert (notes["n_ties"], notes["n_wrong_sign"]) == (1, 2)
    both = [cell_table(TIES, readout=f"common_{label}") for label in ("pt", "it")]
    assert events_of(select_consistent(pa.concat_tables(both))[0]) == ["e0000", "e0006"]
    labels = cell_table(TIES, labels=("base", "dpo"), pair="base,dpo")
    assert select_consistent(labels)[1] == {"keep_ties": False, "n_ties": 3, "n_wrong_sign": 2}
    assert select_consistent(labels.drop_columns(["pair"]), ("base", "dpo"))[1]["n_ties"] == 3


# ---- the command, of a table ----


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "cells.parquet"
    pq.write_table(carrying(cell_table(TIES * 12), "category", ["a", "b"] * 42), path)
    return path


def printed(capsys, *words):
    assert main(["effects", *map(str, words), "--json"]) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_the_command_leaves_ties_out_or_keeps_them(table, capsys):
    strict, said = printed(capsys, table)
    assert strict["groups"][0]["n_events"] == 24
    assert "events left out: 60 (36 with a tie and 24 with the wrong sign)" in said
    kept, said = printed(capsys, table, "--keep-ties")
    assert kept["groups"][0]["n_events"] == 84
    assert "kept though their own checkpoints contradict them: 36 with a tie, 24 with the wrong sign" in said
    for found in (strict, kept):
        assert (found["n_ties"], found["n_wrong_sign"]) == (36, 24)
        assert found["options"]["keep_ties"] == found["keep_ties"]


def test_a_table_is_answered_without_torch(table):
    code = (
        "import sys; from actcache.cli import main; code = main(['effects', sys.argv[1], '--keep-ties', '--quiet']); "
        "print('torch' in sys.modules, code)"
    )
    said = subprocess.run([sys.executable, "-c", code, str(table)], capture_output=True, text=True)
    assert said.stdout.splitlines()[-1] == "False 0", said.stderr


def test_the_command_tells_subsets(table, capsys):
    found, said = printed(capsys, table, "--keep-ties", "--by", "step,category", "--null", "0", "--weights", "prompt")
    assert "no event is in 6 of the subsets, which are left out: step>=5; step>=10; step>=5, category=a" in said
    assert {group["weights"] for group in found["groups"]} == {"prompt"}
    assert group_by(found, subset="step>=3, category=a")["share_of_events"] == pytest.approx(16 / 84)
    assert not any("label_swap" in group for group in found["groups"])
    assert main(["effects", str(table), "--by", "category"]) == 0
    out = capsys.readouterr().out
    assert "category=a" in out
    assert "label swaps: p = " in out
    assert main(["effects", str(table), "--by", "colour"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "column 'colour' is not carried by the prompts; there are step, category" in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--null", "-1"], "-1 draws of the null: give 0 for none, or more"),
        (["--pair", "base"], "the pair is 'base'; pass two different labels"),
        (["--weights", "both"], "weights 'both' are unknown; choose event or prompt"),
    ],
)
def test_options_that_are_none(table, capsys, words, said):
    assert main(["effects", str(table), *words]) == 2
    assert said in capsys.readouterr().err
