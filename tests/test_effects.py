"""Contrasts and intervals against planted grids and a bootstrap written as plain loops."""

import json
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from actcache.analyses.effects import CELLS, GROUP_COLUMNS, contrasts, effects, select_events
from actcache.errors import InputError
from actcache.study import statistics

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
