"""Figures of analyses: what is drawn is what was given, what has no room is said, a missing number leaves a gap."""

from __future__ import annotations

import re

import numpy as np
import pytest

from actcache.report.figures import draw
from actcache.study.section import Bars, Forest, Heat, Lines


def number(mean, half=None):
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


NONE = number(None)


def texts(svg):
    return [re.sub(r"\s+", " ", text).strip() for text in re.findall(r"<text[^>]*>(.*?)</text>", svg, re.DOTALL)]


def drawn(figure, places=2):
    svg = draw(figure, "one", places)
    assert svg == draw(figure, "one", places)
    assert "nan" not in svg.lower()
    return svg


def lines(n, x=float, n_lines=1):
    points = [(x(i), number(float(np.sin(i)), 0.1)) for i in range(n)]
    return Lines("weight", "logits", {f"line {i}": points for i in range(n_lines)}, None, "A line.")


def test_few_points_are_marked_and_many_are_a_curve():
    few, many = drawn(lines(10)), drawn(lines(200))
    assert few.count("<use") - many.count("<use") >= 9
    assert len(many) < 40_000


def test_the_axis_has_whole_numbers_where_all_are_and_the_points_where_they_are_few():
    weights = Lines("weight", "logits", {"a": [(w, number(w)) for w in (0.0, 0.25, 0.5, 1.0)]}, 0.5, "Weights.")
    assert [text for text in texts(drawn(weights)) if text in ("0", "0.25", "0.5", "1")] == ["0", "0.25", "0.5", "1"]
    assert not [text for text in texts(drawn(lines(4, int))) if re.fullmatch(r"[123]?\.5", text)]


def test_a_single_point_has_its_tick_and_its_interval():
    known, bare = (
        drawn(Lines("boundary", "logits", {"a": [(5, one)]}, 5, "One boundary.")) for one in (number(1, 0.5), number(1))
    )
    assert [text for text in texts(known) if text.startswith(("4", "5"))] == ["5"]
    assert ("stroke-opacity: 0.5" in known, "stroke-opacity: 0.5" in bare) == (True, False)


def test_a_point_that_is_none_leaves_a_gap():
    points = [(0, number(1.0, 0.5)), (1, NONE), (2, number(2.0))]
    drawn(Lines("boundary", "logits", {"a": points}, 1, "A gap."))
    drawn(Lines("boundary", "logits", {"a": [(0, NONE)]}, None, "Nothing."))


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_series_without_a_colour_are_counted(kind):
    bars = Bars("logits", {f"series {i}": [("a", number(1.0))] for i in range(8)}, None, "Bars.")
    found = texts(drawn(lines(3, n_lines=8) if kind == "lines" else bars))
    assert "and 2 more, in the table" in found
    assert len([text for text in found if text.startswith(("line ", "series "))]) == 6


def test_bars_show_their_numbers():
    figure = Bars(
        "share of the interaction",
        {"pt": [("first", number(1.0)), ("pre-divergence", number(-0.031, 0.02))], "it": [("first", NONE)]},
        1.0,
        "Bars.",
        shares=True,
    )
    found = texts(drawn(figure))
    assert {"first", "pre-divergence", "100.0%", "\u22123.1% [\u22125.1%, \u22121.1%]", "\u2013", "pt", "it"} <= set(
        found
    )


def test_a_single_series_has_no_legend():
    assert "" not in texts(drawn(Bars("logits", {"": [("a", number(1.0))]}, None, "One bar.")))


def test_forest_rows_and_totals():
    rows = [(f"family {i}", number(i / 3, 0.2)) for i in range(5)]
    found = texts(
        drawn(Forest("logits", rows, [("mean", number(0.667, 0.1)), ("median", number(0.6))], "Families."), 3)
    )
    assert [text for text in found if text.startswith(("family", "mean", "median"))] == [
        *(f"family {i}" for i in range(5)),
        *("mean", "median"),
    ]
    assert "+0.667 [+0.567, +0.767]" in found
    assert "+0.600" in found


def test_nothing_to_show_is_drawn_empty():
    for figure in (
        Lines("x", "y", {}, None, "Nothing."),
        Bars("y", {}, None, "Nothing."),
        Forest("x", [], [], "Nothing."),
    ):
        assert 'aria-label="Nothing.' in drawn(figure)


@pytest.mark.parametrize(("n", "legible"), [(2, True), (4, True), (10, True), (40, False)])
def test_maps_write_their_numbers_where_there_is_room(n, legible):
    names = [f"c{i}" for i in range(n)]
    numbers = [[number(float(i - j), 0.25) for j in range(n)] for i in range(n)]
    numbers[0][1] = NONE
    svg = drawn(Heat("Llama", "upstream", "late", names, names, numbers, "All cells."))
    assert ("+1.00" in texts(svg)) == legible
    few = "from \u221239.00 to +39.00."
    said = "upstream c0, late c0: 0.00 [\u22120.25, +0.25]; upstream c0, late c1: \u2013;"
    assert f"Llama All cells. {said if legible else few}" in svg
    assert float(re.search(r'width="(\d+)"', svg)[1]) < 1080
