"""The page: what it says equals the effects, hostile text stays text, nothing is fetched, edge sizes read well."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pages import SCRIPT, SETTINGS, Page, page_of, run_tables

from actcache.analyses import find_analysis
from actcache.analyses.effects import effects, select_events
from actcache.errors import InputError
from actcache.report import build_report
from actcache.report.visible import Piece, decimals, percent, pieces, signed, tail

HOSTILE = [
    "</td></tr></table><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "<!-- ]]> --> {{ 7 * 7 }} {% raw %}",
    "\u202egnp.exe",
    "\u05e9\u05dc\u05d5\u05dd",
    "\ufffd",
    "line\r\nend\ttab\x00null",
    "",
]
NO_EXCLUDED = {"prompt_id": pa.array([], pa.string()), "reason": pa.array([], pa.string())}


@pytest.fixture(scope="module")
def tables():
    return run_tables()


@pytest.fixture(scope="module")
def plain(tables):
    """The page of the tables as they are."""
    return Page(page_of(tables))


def test_sections_and_their_order(plain):
    assert list(plain.by_section) == ["answer", "grid", "groups", "events", "examples", "excluded", "checks", "made"]
    assert "60 events from 30 prompts; 3 prompts without one" in "".join(plain.text)


def test_shares_of_means_that_differ_in_sign_are_told(tables, plain):
    cells, events, excluded = tables
    flipped = [
        row["margin"] - (4 if (row["upstream"], row["late"]) == ("pt", "it") else 0) for row in cells.to_pylist()
    ]
    opposed = cells.set_column(cells.column_names.index("margin"), "margin", pa.array(flipped))
    page = Page(page_of((opposed, events, excluded)))
    assert "A and B differ in sign: no share" in page.section("answer")
    assert "signs differ" in page.section("groups")
    assert "differ in sign" not in plain.section("answer")
    assert "signs differ" not in plain.section("groups")


def test_effects_whose_prompts_weigh_the_same_are_those_of_the_cells(tables):
    cells, events, excluded = tables
    keep = [row["event_id"] not in ("e00001", "e00007") for row in cells.to_pylist()]
    uneven = cells.filter(pa.array(keep))
    of = {weights: effects(uneven, draws=200, weights=weights) for weights in ("event", "prompt")}
    pages = {name: Page(build_report(uneven, found, events, excluded, SETTINGS)) for name, found in of.items()}
    assert pages["event"].section("answer") != pages["prompt"].section("answer")


def test_numbers_are_those_of_the_effects(tables):
    cells, events, excluded = tables
    result = effects(cells, draws=200)
    page = Page(build_report(cells, result, events, excluded, SETTINGS))
    main = next(group for group in result["groups"] if group["readout"] == "common_it")
    answer = page.section("answer")
    for name in ("late_from_pt", "late_from_it", "interaction"):
        mean, low, high = (signed(main[name][end], 2) for end in ("mean", "low", "high"))
        assert f"{mean} ({low} to {high})" in answer
    assert percent(main["portable_share"]["mean"]) in answer
    assert "boundary 18, scope prefix, readout common_it" in answer.lower()
    assert "do more on their own upstream state" in answer
    values = {float(value) for value in page.data_values if value}
    for group in result["groups"]:
        for name in ("late_from_pt", "late_from_it", "interaction", "portable_share", "native_shift"):
            assert set(group[name].values()) <= values
    for name, number in main["cells"].items():
        assert signed(number["mean"], 2) in page.section("grid"), name


def test_excluded_prompts_noop_and_settings(plain):
    assert "3 of 33 prompts gave none" in plain.section("excluded")
    assert plain.section("excluded").index("both stopped 2 6.1%") < plain.section("excluded").index("no divergence 1")
    assert "Over 240 cells the largest difference is 6e-05 logits" in plain.section("checks")
    assert "command actcache run --pt A --it B dtype bfloat16" in plain.section("made")


STABLE = {
    "dtype": "float32",
    "n_events": 60,
    "n_changed": 0,
    "gap_median": None,
    "gap_max": None,
    "n_not_as_stored": 0,
    "gap_median_vs_stored": None,
    "gap_max_vs_stored": None,
    "not_packable": None,
}
CHANGING = STABLE | {"dtype": "bfloat16", "n_changed": 3, "gap_median": 0.0312, "gap_max": 0.0625}
MOVED = {"n_not_as_stored": 11, "gap_median_vs_stored": 0.02, "gap_max_vs_stored": 0.41}


def with_stability(tables, *groups):
    answered = find_analysis("stability").answered({"groups": groups, "options": {}}, "RUN")
    return Page(page_of(tables, answers={"stability": answered}))


def test_events_that_rounding_would_change(tables):
    page = with_stability(tables, STABLE, CHANGING | MOVED)
    text = page.section("stability")
    assert "float32 60 0 - - 0 - -" in text
    assert "bfloat16 60 3 +0.06 +0.03 11 +0.41 +0.02" in text
    assert "that happened at gaps up to 0.062 logits" in text
    assert {"0.0625", "0.0312", "0.41"} <= set(page.data_values)


@pytest.mark.slow
def test_no_event_that_the_shape_would_change(tables):
    text = with_stability(tables, STABLE).section("stability")
    assert "None of the events checked hangs on the shape of its batch" in text
    refused = [STABLE | {"dtype": dtype, "not_packable": "<b> is no interface"} for dtype in ("float32", "bfloat16")]
    text = with_stability(tables, *refused).section("stability")
    assert "Packs of these checkpoints are not exact (<b> is no interface)" in text
    assert "bfloat16 60 never packed" in text
    assert "None of the events" not in text


def test_events_left_out(tables):
    cells, events, excluded = tables
    every = {"event_id": events["event_id"], "dtype": ["bfloat16"] * 60, "as_stored": [True] * 60}
    stability = pa.table(every | {"stable": [i % 20 != 3 for i in range(60)]})
    left, notes = select_events(cells, events, "bfloat16", stability=stability, min_gap=0.5)
    result = notes | effects(left, draws=50)
    html = build_report(left, result, events, excluded, SETTINGS)
    text = re.sub(r"\s+", " ", "".join(Page(html).text))
    n_left = 60 - notes["n_left_out"]
    assert notes["n_below_min_gap"] > 0
    assert f"{n_left} events from" in text
    assert (
        f"{notes['n_left_out']} more events are left out: 3 not decided the same under strict and packed numerics; "
        f"{notes['n_below_min_gap']} with a gap below 0.5 logits."
    ) in text
    # The events shown are those averaged, the prompts read are all.
    assert f"of {n_left} events for pt" in html
    assert "3 of 33 prompts gave none" in text
    with pytest.raises(InputError, match="effects are not those of these cells"):
        build_report(cells, result, events, excluded, SETTINGS)


def test_examples_span_the_interactions():
    cells, events, excluded = run_tables(100)
    page = Page(page_of((cells, events, excluded)))
    text = page.section("examples")
    assert [text.count(part) for part in ("Largest", "Around the median", "Smallest")] == [1, 1, 1]
    shown = re.findall(r"\be\d{5}\b", text)
    assert len(shown) == len(set(shown)) == 24
    y = {}
    for cell in cells.to_pylist():
        if cell["readout"] == "common_it":
            y.setdefault(cell["event_id"], []).append(cell["margin"])
    interaction = {event: m[3] - m[2] - m[1] + m[0] for event, m in y.items()}
    ranked = sorted(interaction, key=lambda event: (-interaction[event], event))
    assert shown == ranked[:8] + ranked[46:54] + ranked[-8:]
    assert "context 7" in text or "context 1" in text


@pytest.mark.usefixtures("drawn")
def test_hostile_text_stays_text():
    cells, events, excluded = run_tables(16, texts=HOSTILE)
    excluded = excluded.append_column("note", pa.array(HOSTILE[:3])).set_column(1, "reason", pa.array(HOSTILE[:3]))
    clean = Page(page_of(run_tables(16, texts=("a ",))))
    page = Page(page_of((cells, events, excluded), {HOSTILE[0]: HOSTILE[1], HOSTILE[2]: "\udcff path"}))
    assert page.scripts == clean.scripts == [SCRIPT]
    assert set(page.tags) <= set(clean.tags)
    assert {name for name, _ in page.attributes} <= {name for name, _ in clean.attributes}
    text = "".join(page.text)
    assert "<script>alert(1)</script>" in page.section("examples")
    assert "{{ 7 * 7 }} {% raw %}" in text
    assert "\u27e8U+202E\u27e9gnp.exe" in text
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "\u27e8U+DCFF\u27e9 path" in text
    assert "empty" in page.section("examples")
    assert "\u240d\u21b5end\u21e5tab\u2400null" in text


@pytest.mark.usefixtures("drawn")
def test_hostile_labels_and_readouts():
    cells, events, excluded = run_tables(8, readouts=(HOSTILE[0],))
    names = {"pt": "$a_1$ --> <b>", "it": HOSTILE[1]}
    for column in ("upstream", "late"):
        renamed = pa.array([names[label] for label in cells[column].to_pylist()])
        cells = cells.set_column(cells.column_names.index(column), column, renamed)
    result = effects(cells, pair=(names["pt"], names["it"]), draws=50)
    page = Page(build_report(cells, result, events, excluded, SETTINGS))
    assert page.scripts == [SCRIPT]
    assert "b" not in page.tags
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert names["pt"] in page.section("answer")


@pytest.mark.usefixtures("drawn")
def test_page_fetches_nothing(tables):
    html = page_of(tables)
    page = Page(html)
    carried = [value for name, value in page.attributes if name == "href" and value.startswith("data:")]
    bare = re.sub("|".join(map(re.escape, carried)), "", html).replace("http-equiv", "")
    assert "http" not in bare
    assert "@import" not in bare
    assert {"link", "img", "iframe", "object"}.isdisjoint(page.tags)
    assert not [value for name, value in page.attributes if name in ("src", "srcset", "action", "data")]
    links = [value for name, value in page.attributes if name == "href" and value not in carried]
    assert all(value.startswith("#") for value in links)
    assert re.search(r"fetch|XMLHttp|import|eval|innerHTML|document\.write|location", SCRIPT) is None
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


@pytest.mark.usefixtures("drawn")
def test_element_ids_are_unique_and_references_resolve():
    html = page_of(run_tables(40, boundaries=(5, 10, 18)))
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', html)) <= set(ids)


@pytest.mark.usefixtures("drawn")
def test_figures_have_alt_text():
    html = page_of(run_tables(40, boundaries=(5, 10, 18)))
    figures = re.findall(r'<svg [^>]*role="img"[^>]*>', html)
    assert len(figures) == html.count("<figure") == 6
    assert all(len(re.search(r'aria-label="([^"]*)"', figure)[1]) > 60 for figure in figures)
    assert "nan" not in re.sub(r"data:[^\"]*", "", html).lower().replace(SCRIPT.lower(), "").replace("nan_", "")


@pytest.mark.usefixtures("drawn")
@pytest.mark.slow
def test_same_arguments_same_bytes(tables):
    cells, events, excluded = tables
    shuffle = np.random.default_rng(1).permutation
    shuffled = [table.take(pa.array(shuffle(table.num_rows))) for table in (cells, events)]
    assert page_of(tables) == page_of(tables) == page_of((*shuffled, excluded))


@pytest.mark.slow
def test_boundaries_get_their_figure_and_the_nearest_leads(plain):
    swept = run_tables(20, boundaries=(5, 10, 18))
    for wished, leads in ((None, 10), (17, 18), (1, 5)):
        page = Page(page_of(swept, default_boundary=wished))
        assert f"Boundary {leads}, scope prefix" in page.section("answer")
        assert "Where the late stack starts" in page.section("boundaries")
    assert "boundaries" not in plain.by_section


def test_native_leads_without_a_common_readout():
    page = Page(page_of(run_tables(6, readouts=("common_pt", "native"))))
    assert "readout native" in page.section("answer")


@pytest.mark.parametrize(
    ("late_it", "sentence"),
    [([2.0, 2.1], "do more on their own"), ([-2.0, -2.1], "do less on their own"), ([-1.0, 1.0], "includes 0")],
)
def test_the_answer_in_words(late_it, sentence):
    cells, events, excluded = run_tables(20)
    rows = cells.to_pylist()
    for row in rows:
        both_it = row["upstream"] == row["late"] == "it"
        row["margin"] = late_it[int(row["prompt_id"][1:]) % 2] if both_it else 0.0
    assert sentence in Page(page_of((pa.Table.from_pylist(rows, cells.schema), events, excluded))).section("answer")


@pytest.mark.usefixtures("drawn")
def test_one_event():
    page = Page(page_of(run_tables(1)))
    assert "1 event from 1 prompt;" in "".join(page.text)
    assert "these are the means of 1 prompt. Fewer than 10 give no interval" in page.section("answer")
    assert "bootstrap" not in page.section("answer")
    assert "All events, largest interaction first" in page.section("examples")


@pytest.mark.parametrize(("n_prompts", "interval", "caution"), [(9, False, False), (10, True, True), (30, True, False)])
def test_few_prompts_are_said_to_be_few(n_prompts, interval, caution):
    answer = Page(page_of(run_tables(2 * n_prompts))).section("answer")
    assert f"these are the means of {n_prompts} prompts. Fewer than 10 give no interval" in answer or interval
    assert (f"Caution: {n_prompts} prompts are few" in answer) == caution
    assert ("percentile bootstrap over prompts" in answer) == interval


@pytest.mark.slow
def test_a_common_readout_is_not_the_checkpoints_as_they_are(tables):
    cells, events, excluded = tables
    result = effects(cells, draws=200)
    native, common = (next(g for g in result["groups"] if g["readout"] == name) for name in ("native", "common_it"))
    assert native["native_shift"]["mean"] != common["native_shift"]["mean"]
    page = Page(build_report(cells, result, events, excluded, SETTINGS))
    answer = page.section("answer")
    assert f"the two cells of the diagonal are {signed(common['native_shift']['mean'], 2)}" in answer
    assert (
        f"Unpatched, each read by its own head, the two checkpoints are {signed(native['native_shift']['mean'], 2)}"
        in (answer)
    )
    assert "read here by common_it and not by its own head" in page.section("grid")
    page = Page(page_of(run_tables(readouts=("common_pt", "native"))))
    assert "The diagonal is the two checkpoints as they are" in page.section("grid")
    page = Page(page_of(run_tables(readouts=("common_it",))))
    assert "Unpatched" not in page.section("answer")


@pytest.mark.slow
def test_equal_readouts_are_told_once():
    cells, events, excluded = run_tables(20, boundaries=(5, 10), readouts=("common_it",))
    at = cells.column_names.index("readout")
    same, other = (
        cells.set_column(at, "readout", pa.array([name] * cells.num_rows)) for name in ("native", "common_pt")
    )
    at = cells.column_names.index("margin")
    other = other.set_column(at, "margin", pc.add(other["margin"], 0.5))
    page = Page(page_of((pa.concat_tables([cells, same, other]), events, excluded)))
    table = page.section("groups")
    assert table.count("common_it = native") == 2
    assert table.count("common_pt") == 2
    assert "readout common_it = native" in page.section("answer")
    assert "read here by common_it and not" in page.section("grid")
    # Two that agree at one boundary only are two.
    apart = same.set_column(at, "margin", pc.if_else(pc.equal(same["boundary"], 5), same["margin"], other["margin"]))
    assert " = " not in Page(page_of((pa.concat_tables([cells, apart]), events, excluded))).section("groups")


@pytest.mark.slow
def test_choices_and_kl_are_shown(tables, plain):
    cells, events, excluded = tables
    assert "choices" not in plain.by_section
    rows = [row | {"y_pt": 1, "y_it": 2, "top1_id": 1 if row["late"] == "pt" else 3} for row in cells.to_pylist()]
    page = Page(page_of((pa.Table.from_pylist(rows), events, excluded)))
    assert "pt, pt 100.0% 0.0% 0.0%" in page.section("choices")
    assert "pt, it 0.0% 0.0% 100.0%" in page.section("choices")
    assert "KL" not in page.section("choices")
    rows = [row | {"kl": 0.25} for row in rows]
    page = Page(page_of((pa.Table.from_pylist(rows), events, excluded)))
    assert "it, it 0.0% 0.0% 100.0% 0.25" in page.section("choices")


@pytest.mark.slow
def test_special_tokens_are_marked(tables, plain):
    cells, events, excluded = tables
    assert "special" not in plain.section("examples")
    marked = events.append_column("special_pt", pa.array([0] * 60, pa.int32()))
    marked = marked.append_column("special_it", pa.array([int(i < 7) for i in range(60)], pa.int32()))
    html = page_of((cells, marked, excluded))
    assert "0 of the choices of pt and 7 of those of it are special" in Page(html).section("examples")
    every = marked.set_column(marked.column_names.index("special_it"), "special_it", pa.array([1] * 60, pa.int32()))
    html = page_of((cells, every, excluded))
    assert html.count('class="chip special" title="special token of it"') == 24
    assert 'title="special token of pt"' not in html
    assert re.findall(r"([^{}\n]*) { border: 3px double; }", html) == [".chip.special"], "nothing else is framed so"


def test_no_home_folder_is_shown(tables):
    home = {
        "command": "actcache run --pt /home/alice/models/pt --it=/Users/bob.s/it --out /data/home/runs",
        "prompts": f"{Path.home()}/p.jsonl (60 prompts)",
    }
    html = page_of(tables, home)
    made = Page(html).section("made")
    assert "--pt ~/models/pt --it=~/it --out /data/home/runs" in made
    assert "prompts ~/p.jsonl (60 prompts)" in made
    assert "alice" not in html
    assert "bob" not in html


def test_a_home_folder_behind_a_link_is_not_shown(tables, tmp_path, monkeypatch):
    (tmp_path / "disk" / "carol").mkdir(parents=True)
    (tmp_path / "carol").symlink_to(tmp_path / "disk" / "carol")
    monkeypatch.setenv("HOME", str(tmp_path / "carol"))
    paths = {"typed": f"{tmp_path}/carol/pt", "resolved": f"{tmp_path}/disk/carol/it"}
    made = Page(page_of(tables, paths)).section("made")
    assert "typed ~/pt resolved ~/it" in made


@pytest.mark.usefixtures("drawn")
def test_equal_events_with_zero_margins():
    cells, events, excluded = run_tables(4)
    zero = cells.set_column(cells.column_names.index("margin"), "margin", pa.array([0.0] * cells.num_rows))
    page = Page(page_of((zero, events, excluded)))
    assert "A / B, portable share of the late effect \u2013" in page.section("answer")


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("typed", [True, False])
def test_no_event(typed):
    cells, events, excluded = run_tables(2)
    cells, events = cells.slice(0, 0), events.slice(0, 0)
    if not typed:
        cells, events = (pa.table({name: [] for name in table.column_names}) for table in (cells, events))
    page = Page(page_of((cells, events, excluded)))
    text = re.sub(r"\s+", " ", "".join(page.text))
    assert "No divergence was found" in text
    assert "None of the 3 prompts gave an event" in page.section("answer")
    assert "both stopped 2 66.7%" in page.section("excluded")
    assert list(page.by_section) == ["answer", "excluded", "made"]


@pytest.mark.usefixtures("drawn")
def test_nothing_at_all():
    cells, events, _ = run_tables(2)
    page = Page(page_of((cells.slice(0, 0), events.slice(0, 0), pa.table({"prompt_id": [], "reason": []})), {}))
    assert "No prompt was read" in page.section("answer")
    assert "None was excluded" in page.section("excluded")


def test_no_noop_and_no_exclusions():
    cells, events, _ = run_tables(3)
    cells = cells.set_column(cells.column_names.index("noop_delta"), "noop_delta", pa.nulls(cells.num_rows))
    page = Page(page_of((cells, events, pa.table(NO_EXCLUDED))))
    assert "was not compared" in page.section("checks")
    assert "without one" not in "".join(page.text)


@pytest.mark.usefixtures("drawn")
@pytest.mark.slow
def test_size_does_not_grow_with_the_run():
    wide = run_tables(20, boundaries=tuple(range(1, 190)))
    html = page_of(wide)
    assert len(html.encode()) < 2_000_000
    assert "78 more groups are in effects.json" in Page(html).section("groups")
    many_events = len(page_of(run_tables(3000, readouts=("native",))).encode())
    assert many_events < 1.2 * len(page_of(run_tables(300, readouts=("native",))).encode())


def test_many_reasons_are_summed():
    cells, events, _ = run_tables(2)
    reasons = ["common"] * 5 + [f"reason {i:03d}" for i in range(100)]
    excluded = pa.table({"prompt_id": [f"x{i}" for i in range(105)], "reason": reasons})
    text = Page(page_of((cells, events, excluded))).section("excluded")
    assert "common 5" in text
    assert "71 other reasons 71" in text


def test_errors(tables):
    cells, events, excluded = tables
    result = effects(cells, draws=40)
    with pytest.raises(InputError, match="table of events has no column context"):
        build_report(cells, result, events.drop_columns(["context"]), excluded, SETTINGS)
    with pytest.raises(InputError, match="effects are not those of these cells"):
        build_report(cells, effects(run_tables(seed=1)[0], draws=40), events, excluded, SETTINGS)
    with pytest.raises(InputError, match="effects without groups"):
        build_report(cells, effects(cells.slice(0, 0)), events, excluded, SETTINGS)
    with pytest.raises(InputError, match="'e00000' of the cells is not among the 59 events"):
        build_report(cells, result, events.slice(1), excluded, SETTINGS)


@pytest.mark.slow
def test_every_character_is_visible_and_encodable():
    for first in range(0, 0x11_0000, 64):
        found = pieces("".join(map(chr, range(first, first + 64))), spaces=True)
        assert sum(1 if piece.mark else len(piece.text) for piece in found) == 64
        for piece in found:
            assert piece.text.encode()
            assert piece.text.isprintable()


def test_pieces_of_a_long_text_are_made_in_one_pass():
    """A run that was copied for each of its characters took hours for an id of a megabyte."""
    assert pieces("a" * 10**6 + "\n\n", spaces=False) == [Piece("a" * 10**6, False), *[Piece("\u21b5", True)] * 2]


def test_pieces_keep_runs_together():
    assert pieces("a b\nc", spaces=False) == [Piece("a b", False), Piece("\u21b5", True), Piece("c", False)]
    assert pieces(" a", spaces=True) == [Piece("\u00b7", True), Piece("a", False)]


@pytest.mark.parametrize(
    ("value", "places", "text"),
    [
        (1.684, 2, "+1.68"),
        (-0.5, 2, "\u22120.50"),
        (0.001, 2, "0.00"),
        (-1234.5, 1, "\u22121,234.5"),
        (None, 2, "\u2013"),
    ],
)
def test_signed(value, places, text):
    assert signed(value, places) == text


def test_percent_decimals_tail():
    assert [percent(x) for x in (0.311, -0.05, -0.0001, None)] == ["31.1%", "\u22125.0%", "0.0%", "\u2013"]
    assert [decimals(x) for x in ([], [None, 3.0], [0.05, 0.01], [1e-30])] == [2, 2, 3, 8]
    assert tail("short", 10) == "short"
    assert tail("one two three", 8) == "\u2026three"
    assert tail("x" * 50, 10) == "\u2026" + "x" * 10
