"""Sections of analyses on the page: counts, tables that fold and sort, the command, files that it carries; sweeps."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import subprocess

import pytest
from pages import SCRIPT, SETTINGS, Page, page_of, run_tables

from actcache.analyses import find_analysis
from actcache.analyses.effects import effects
from actcache.errors import InputError
from actcache.report import build_report
from actcache.report.sections import MAX_DOWNLOAD, OPEN_ROWS, counted, downloads
from actcache.report.variants import figures_of, parameters
from actcache.study.analysis import Answered
from actcache.study.section import Bars, Forest, Lines, Section, in_words


def number(mean, half=None):
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half}


def group(n_events=60, n_prompts=30, mean=0.5, **names):
    return {
        "kind": "first_divergence",
        **names,
        "n_events": n_events,
        "n_prompts": n_prompts,
        "slope": number(mean, 0.25),
    }


def answered(n_rows=2, groups=None, rows=None):
    rows = rows or [[f"row {i}", 1000 + i, number(i / 7, 0.1), number(i / 100, 0.01), 5e-05] for i in range(n_rows)]
    section = Section(
        title="A question",
        figures=[Bars("logits", {"": [("a", number(1.0, 0.5))]}, None, "One bar, one logit long, in a figure.")],
        columns=["name", "events", "slope", "share", "p"],
        rows=rows,
        shows="What it shows.",
        does_not_show="What it does not.",
        shares={"share"},
    )
    return Answered(section, groups or [group()], "actcache question RUN --scope=position")


def html_with(one, **tables):
    return page_of(run_tables(20, **tables), answers={"question": one})


def test_a_section_has_all_its_parts():
    page = Page(html_with(answered()))
    text = page.section("question")
    assert text.startswith(" A question 60 events of 30 prompts ")
    assert "name events slope share p row 0 1,000 0.00[\u22120.10, +0.10] 0.0%[\u22121.0%, 1.0%] 5e-05" in text
    assert "Shows. What it shows." in text
    assert "Does not show. What it does not." in text
    assert "Made by actcache question RUN --scope=position; its numbers: CSV, JSON." in text
    assert {"1001", "0.14285714285714285", "5e-05"} <= set(page.data_values)


@pytest.mark.slow
def test_a_long_table_is_folded():
    assert "details" not in Page(html_with(answered(OPEN_ROWS))).tags
    page = Page(html_with(answered(600)))
    assert page.tags.count("details") == 1
    assert "Table of 600 rows" in page.section("question")
    assert page.section("question").count("row ") == 600


def test_counts_are_a_range():
    found = counted([group(64, 50), group(1200, 40)])
    assert (found["events"], found["prompts"]) == ("64 to 1,200", "40 to 50")
    assert counted([group(1, 1)])["one"]
    assert counted([]) is counted([{"kind": "a"}]) is None


@pytest.mark.parametrize(
    ("n_prompts", "said"),
    [
        (1, "1 event of 1 prompt; below 10 there is no interval"),
        (12, "12 events of 12 prompts; below 30 prompts an interval is narrower than it should be"),
    ],
)
def test_few_prompts_are_said(n_prompts, said):
    assert said in Page(html_with(answered(groups=[group(n_prompts, n_prompts)]))).section("question")


def test_what_the_page_carries_is_what_was_found():
    groups = [group(kind='a "quoted", kind', mean=0.1 + 0.2), group(kind="b\nline", boundary=7)]
    carried = {name: value for name, value in Page(html_with(answered(groups=groups))).attributes if name == "download"}
    assert carried
    found = {
        one["file"]: base64.b64decode(one["link"].partition("base64,")[2]).decode() for one in downloads("q", groups)
    }
    assert json.loads(found["q.json"])["groups"] == groups
    rows = list(csv.DictReader(io.StringIO(found["q.csv"])))
    assert [row["kind"] for row in rows] == [one["kind"] for one in groups]
    assert float(rows[0]["slope"]) == 0.1 + 0.2
    assert [row["boundary"] for row in rows] == ["", "7"]
    assert {"slope_low", "slope_high", "n_events"} <= rows[0].keys()


def test_what_is_too_large_is_named():
    (found,) = downloads("q", [group(name="x" * 100 + str(i)) for i in range(3000)])
    assert (found["file"], found["link"]) == ("q.json", None)
    assert found["n_bytes"] > MAX_DOWNLOAD
    html = html_with(answered(groups=[group(name="x" * 100 + str(i)) for i in range(3000)]))
    assert "its numbers: question.json beside this page, 0.8 MB." in Page(html).section("question")
    assert len(html) < 1_000_000


def test_hostile_names_in_sections_stay_text():
    hostile = "</td><script>alert(1)</script>\u202e\udcff"
    one = answered(rows=[[hostile, 1, number(1.0), number(0.5), 0.5]], groups=[group(category=hostile)])
    page = Page(page_of(run_tables(20), answers={"question": one}))
    assert page.scripts == [SCRIPT]
    assert "<script>alert(1)</script>\u27e8U+202E\u27e9" in page.section("question")


# ---- options and command ----


def test_the_command_says_what_is_not_the_default():
    depth = find_analysis("depth")
    assert depth.command("RUN", {"boundaries": "all", "scope": "prefix", "draws": 2000}) == "actcache depth RUN"
    options = {"boundaries": "18,-3", "readout": "a b", "seed": 7}
    assert depth.command("my run", options) == "actcache depth 'my run' --boundary=18,-3 '--readout=a b' --seed=7"


def test_options_from_python_are_read_as_those_of_the_command_line():
    depth = find_analysis("depth")
    assert depth.options_of({"boundaries": [2, 3], "draws": 100.0 and "100"}) == depth.options("2,3", draws=100)
    assert depth.options_of({"boundaries": 2}) == depth.options("2")
    for given, said in (
        ({"boundaries": True}, "depth: boundaries is True, which --boundary does not take"),
        ({"draws": 2.5}, "depth: draws is 2.5, which --draws does not take"),
        ({"draws": None}, "depth: draws is None, which --draws does not take"),
        ({"bounds": 2}, "depth has no option 'bounds'; it has boundaries, scope"),
    ):
        with pytest.raises(InputError, match=said):
            depth.options_of(given)


def test_cells_in_words():
    cells = [("a", False), (1234, False), (5e-05, False), (number(0.5, 0.25), False), (number(0.5, 0.25), True)]
    assert [in_words(*cell) for cell in [*cells, (number(None), True)]] == [
        *("a", "1,234", "5e-05", "+0.500 [+0.250, +0.750]", "50.0% [25.0%, 75.0%]", "none")
    ]


# ---- what edits leave ----


@pytest.mark.parametrize(
    ("name", "base", "given"),
    [
        ("interpolate[weight=0.25]", "interpolate", {"weight": "0.25"}),
        ("a b[layers=[1, 2],scale=-1e-3]", "a b", {"layers": "[1, 2]", "scale": "-1e-3"}),
        ("plain", "plain", {}),
        ("odd[", "odd[", {}),
        ("list[3]", "list[3]", {}),
    ],
)
def test_what_a_variants_name_says(name, base, given):
    assert parameters(name) == (base, given)


def swept(n, name="interpolate[weight={}]", mean=lambda i: float(i)):
    return {name.format(i / n if "weight" in name else i): number(mean(i), 0.1) for i in range(n)}


def test_numbers_that_are_swept_are_a_curve():
    (figure,) = figures_of(swept(100), number(3.0), 2)
    assert isinstance(figure, Lines)
    assert figure.x_label == "weight"
    assert [x for x, _ in figure.lines["interpolate"]] == [i / 100 for i in range(100)]
    assert [x for x, _ in figure.lines["no edit"]] == [0.0, 0.99]
    assert "interpolate: from 0.00 at 0 to +99.00 at 0.99" in figure.alt


def test_what_else_differs_is_another_line_and_a_seed_is_no_axis():
    variants = {f"add[scale={scale},donor={donor}]": number(scale) for donor in ("pt", "it") for scale in (2, 0, 1)}
    variants |= swept(5, "permute[seed={}]")
    curves, rows = figures_of(variants, None, 2)
    assert list(curves.lines) == ["add, donor=pt", "add, donor=it"]
    assert [x for x, _ in curves.lines["add, donor=pt"]] == [0, 1, 2]
    assert isinstance(rows, Forest)
    assert [name for name, _ in rows.rows] == [f"permute[seed={i}]" for i in range(5)]
    assert rows.totals == []


def test_many_variants_of_no_sweep_are_ranked():
    variants = swept(60, "feature {}", lambda i: float((i * 37) % 60)) | {"broken": number(None)}
    (figure,) = figures_of(variants, number(0.0), 2)
    assert isinstance(figure, Lines)
    means = [of["mean"] for _, of in figure.lines["variants"]]
    assert means == [*(float(i) for i in range(59, -1, -1)), None]
    assert figures_of({}, number(0.0), 2) == []


def sweep_tables(names):
    cells, events, excluded = run_tables(20, readouts=("common_it",))
    import pyarrow as pa

    at = cells.column_names.index("variant")
    parts = [cells.set_column(at, "variant", pa.array([name] * cells.num_rows)) for name in ("none", *names)]
    return pa.concat_tables(parts), events, excluded


@pytest.mark.slow
def test_a_sweep_is_a_curve_and_a_folded_table():
    tables = sweep_tables([f"interpolate[weight={i / 100}]" for i in range(100)])
    html = page_of(tables)
    page = Page(html)
    assert "What edits leave of it" in page.section("variants")
    assert html.count('role="img"') == 6
    assert page.tags.count("details") == 1
    open_rows = html[html.index('<section id="groups">') : html.index("<details>")]
    assert open_rows.count("<tr") == 1 + 1
    assert "100 more groups" in page.section("groups")
    few = Page(page_of(sweep_tables(["one", "two"])))
    assert "details" not in few.tags
    assert "two" in few.section("variants")
    assert "variants" not in Page(page_of(run_tables(20))).by_section


# ---- in a browser ----


@pytest.mark.slow
def test_a_click_sorts(tmp_path):
    """Down, up, as it was; what is no number comes last. The policy of the page lets its own script run alone."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    rows = [
        [name, 1, value, number(0.5), 0.5] for name, value in zip("abcd", map(number, (2, None, -3, 10)), strict=True)
    ]
    html = html_with(answered(rows=rows))
    click = """<script>
      const table = document.querySelector("#question table"), button = table.tHead.rows[0].cells[2].firstChild;
      const found = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join("");
      const orders = [found()];
      for (let i = 0; i < 3; i++) { button.click(); orders.push(found()); }
      document.title = orders.join(" ");
    </script></body>"""

    def title(html):
        (tmp_path / "page.html").write_text(html.replace("</body>", click))
        words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        dom = subprocess.run(
            [*words, "--dump-dom", f"file://{tmp_path / 'page.html'}"], capture_output=True, text=True, timeout=120
        ).stdout
        assert "<button" in dom
        return dom.partition("<title>")[2].partition("</title>")[0]

    assert title(html) == "First divergence: pt and it", "a script that is not the page's own does not run"
    policy = html[html.index("<meta http-equiv") : html.index('<meta name="viewport"')]
    assert title(html.replace(policy, "")) == "abcd dacb cadb abcd"


def test_the_effects_are_carried_once():
    cells, events, excluded = run_tables(20)
    result = effects(cells, draws=50)
    page = Page(build_report(cells, result, events, excluded, SETTINGS))
    links = [value for name, value in page.attributes if name == "href" and value[0] != "#"]
    assert [link[: link.index(";")] for link in links] == ["data:text/csv", "data:application/json"]
    assert json.loads(base64.b64decode(links[1].partition("base64,")[2]))["groups"] == result["groups"]
    answers = {"effects": answered(groups=result["groups"])}
    page = Page(build_report(cells, result, events, excluded, SETTINGS, answers=answers))
    assert sum(name == "download" for name, _ in page.attributes) == 2
    assert "as files" not in page.section("groups")
