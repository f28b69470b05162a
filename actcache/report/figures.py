"""The figures of the page as inline SVG: deterministic, no scripts, no fonts or files from elsewhere.

Each function takes numbers and returns one ``<svg>`` element. Text stays text (the page's own font, selectable).
Colours that must follow the page's light or dark scheme are drawn in placeholder colours and replaced by the page's
CSS variables. Knows matplotlib's object interface; knows no tables.
"""

from __future__ import annotations

import io
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from actcache.report.visible import MINUS, percent, signed
from actcache.schema import ROLES
from actcache.study.section import Bars, Forest, Heat, Lines
from actcache.study.section import Figure as Described

NEAR_TIE = 0.125
"""Top-1 minus top-2 gap, in logits, below which an event counts as a near tie: one bfloat16 step of logits that lie
between 16 and 32, so rounding the logits to bfloat16 could have changed the choice."""

# Placeholder colour -> CSS variable of the page. None of them may be #000000, which SVG leaves out.
_INK, _MUTED, _RULE, _PT, _IT, _PAPER = "#010101", "#010102", "#010103", "#010104", "#010105", "#010106"
_SERIES = ("#010111", "#010112", "#010113", "#010114", "#010115", "#010116")
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _RULE: "--rule", _PT: "--pt", _IT: "--it", _PAPER: "--paper"} | {
    colour: f"--s{i}" for i, colour in enumerate(_SERIES, 1)
}
_MARKERS = "osD^v*"
_MARKED_POINTS = 30  # of a line at most; a longer one is a curve
_LEGIBLE = 0.36  # of a cell's full width: numbers are written into it from here on
# From PT's colour through near-white to IT's: the side of zero that a cell is on is the token that it prefers.
_DIVERGING = LinearSegmentedColormap.from_list("pt_it", ["#8a4200", "#e9a35c", "#f7f4ef", "#7fb2ea", "#0b4a9e"])

Number = Mapping[str, Any]
Floats = npt.NDArray[np.float64]


def draw(figure: Described, name: str, places: int) -> Markup:
    """A figure of an analysis; ``name`` is its own on the page, ``places`` the decimals of what is no share."""
    if isinstance(figure, Lines):
        return _lines(figure, name)
    if isinstance(figure, Heat):
        return _heat(figure, name, places)
    if isinstance(figure, Bars):
        return _bars(figure, name, places)
    return _forest(figure, name, places)


def grid(cells: dict[str, Number], effects: dict[str, Number], labels: tuple[str, str], places: int) -> Markup:
    """The 2x2 grid as a heat map: upstream in rows, late in columns, and each row's late effect beside it."""
    numbers = [[cells[f"{upstream}_{late}"] for late in ROLES] for upstream in ROLES]
    figure = Figure(figsize=(5.2, 3.5))
    axes = figure.add_axes((0.22, 0.03, 0.53, 0.80))
    alt, _ = _heat_map(axes, _crossed(numbers, labels), places)
    for row, (name, key) in enumerate((("A", "late_from_pt"), ("B", "late_from_it"))):
        text = f"{name} = {signed(effects[key]['mean'], places)}"
        axes.text(2.08, row + 0.44, text, color=_INK, fontsize=11.5, fontweight="bold", va="center")
        axes.text(2.08, row + 0.62, "late effect", color=_MUTED, fontsize=9, va="center")
    return _svg(figure, "grid", f"Mean margin in each of the four cells. {alt}.")


def lineup(numbers: Sequence[Sequence[Number]], labels: Sequence[str], places: int) -> Markup:
    """The grid of K checkpoints as a heat map ``[K][K]``: upstream in rows, late in columns."""
    said = f"Mean margin in each of the {len(labels) ** 2} cells."
    return _heat(_crossed(numbers, labels, said), "lineup", places)


def _crossed(numbers: Sequence[Sequence[Number]], labels: Sequence[str], alt: str = "") -> Heat:
    return Heat("", "upstream", "late", labels, labels, numbers, alt)


def _heat(figure: Heat, name: str, places: int) -> Markup:
    """Numbers as a map."""
    n_columns = len(figure.columns)
    wide = min(1.4, 8.2 / max(1, n_columns))
    tall = min(1.2, 0.86 * wide) if wide > 0.3 else max(0.18, wide)
    above, left = 0.7 + 0.3 * bool(figure.title), 1.5
    width, height = left + 0.6 + wide * n_columns, above + 0.1 + tall * len(figure.rows)
    drawn = Figure(figsize=(width, height))
    axes = drawn.add_axes((left / width, 0.1 / height, wide * n_columns / width, tall * len(figure.rows) / height))
    if figure.title:
        drawn.text(left / width, 1 - 0.2 / height, _short(figure.title, 28), color=_INK, fontsize=11, fontweight="bold")
    said, reach = _heat_map(axes, figure, places, scale=wide / 1.4)
    if wide / 1.4 < _LEGIBLE:
        beside = drawn.add_axes((1 - 0.42 / width, axes.get_position().y0, 0.1 / width, min(1.5 / height, 0.8)))
        shades = np.linspace(-reach, reach, 21)
        beside.pcolormesh([0, 1], shades, shades[:-1, None], cmap=_DIVERGING, norm=TwoSlopeNorm(0.0, -reach, reach))
        beside.set_xticks([])
        beside.set_yticks([-reach, 0, reach], [_text(end, places, figure.shares) for end in (-reach, 0.0, reach)])
        beside.yaxis.tick_right()
        beside.tick_params(labelsize=8, labelcolor=_INK, length=0)
        beside.spines[:].set_visible(False)
    return _svg(drawn, name, " ".join(filter(None, (figure.title, figure.alt, f"{said}."))))


def _heat_map(axes: Axes, figure: Heat, places: int, scale: float = 1.0) -> tuple[str, float]:
    """Draw numbers with their intervals, in colours that part at 0; the same in words, and the largest size."""
    mean = _floats([number["mean"] for row in figure.numbers for number in row])
    mean = mean.reshape(len(figure.rows), len(figure.columns))
    reach = float(np.nanmax(np.abs(mean), initial=0.0)) or 1.0
    norm = TwoSlopeNorm(0.0, -reach, reach)
    axes.pcolormesh(np.ma.masked_invalid(mean), cmap=_DIVERGING, norm=norm, edgecolor=_PAPER, linewidth=3 * scale)
    axes.invert_yaxis()
    said = []
    for row, column in np.ndindex(mean.shape):
        number = figure.numbers[row][column]
        text, interval = _text(number["mean"], places, figure.shares), _interval(number, places, figure.shares)
        cell = f"{figure.row_label} {figure.rows[row]}, {figure.column_label} {figure.columns[column]}"
        said.append(f"{cell}: {text} {interval}".rstrip())
        if scale < _LEGIBLE:
            continue
        ink = _INK
        if number["mean"] is not None:
            red, green, blue, _ = _DIVERGING(norm(mean[row, column]))
            ink = "#16181d" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
        at, show = (column + 0.5, row + 0.5), interval and scale > 0.7
        large: dict[str, Any] = {"color": ink, "ha": "center", "va": "center", "textcoords": "offset points"}
        axes.annotate(text, at, (0, 5 if show else 0), fontsize=max(8, 17 * scale), fontweight="bold", **large)
        if show:
            axes.annotate(interval, at, (0, -13), fontsize=9, **large)
    small = 10 if scale > 0.5 else 8
    heads = [f"{figure.column_label} {_short(label)}" for label in figure.columns]
    if scale <= 0.7:  # no room for the word in every head
        heads = [_short(label) for label in figure.columns]
    turned = scale < 0.5 and max(map(len, heads)) > 3
    axes.set_xticks(np.arange(len(heads)) + 0.5, heads, rotation=90 if turned else 0)
    axes.set_yticks([])
    for row, label in enumerate(figure.rows):
        if scale > 0.7:
            axes.text(-0.07, row + 0.45, figure.row_label, color=_INK, fontsize=10, ha="right", va="center")
            axes.text(-0.07, row + 0.60, _short(label), color=_INK, fontsize=10, ha="right", va="center")
        else:
            axes.text(-0.15, row + 0.5, f"{figure.row_label} {_short(label)}", color=_INK, fontsize=small)
            axes.texts[-1].set(ha="right", va="center")
    axes.xaxis.tick_top()
    if scale <= 0.7:
        axes.xaxis.set_label_position("top")
        axes.set_xlabel(figure.column_label, color=_MUTED, fontsize=9)
    axes.tick_params(length=0, labelsize=small, labelcolor=_INK, pad=6)
    axes.spines[:].set_visible(False)
    if scale < _LEGIBLE:
        said = [_text(float(of(mean)), places, figure.shares) for of in (np.nanmin, np.nanmax)]
        return f"from {' to '.join(said)}", reach
    return "; ".join(said), reach


def late_effects(groups: Sequence[dict[str, Any]], it: str, places: int) -> Markup:
    """A, B and B - A with intervals, one dot per readout: ``groups`` differ in nothing but their readout."""
    names = {"late_from_pt": "A", "late_from_it": "B", "interaction": f"B {MINUS} A"}
    groups = groups[: len(_SERIES)]
    n_rows = len(groups) + 0.9
    above, below, rows_inch = 0.36 if len(groups) > 1 else 0.12, 0.52, max(2.0, 0.26 * n_rows * 3)
    height = above + rows_inch + below
    figure = Figure(figsize=(5.2, height))
    axes = figure.add_axes((0.11, below / height, 0.57, rows_inch / height))
    axes.axvline(0, color=_MUTED, linewidth=1)
    for block, (key, name) in enumerate(names.items()):
        axes.text(-0.03, block * n_rows + (len(groups) - 1) / 2, name, transform=axes.get_yaxis_transform(), color=_INK)
        axes.texts[-1].set(ha="right", va="center", fontsize=11.5, fontweight="bold")
        for i, group in enumerate(groups):
            number, y = group[key], block * n_rows + i
            if number["low"] is not None:
                axes.plot([number["low"], number["high"]], [y, y], color=_SERIES[i], linewidth=2.2)
            label = group["readout"] if block == 0 else None
            axes.plot([number["mean"]], [y], "o", color=_SERIES[i], markersize=6.5, label=label)
            text = f"{signed(number['mean'], places)}  {_interval(number, places)}"
            axes.text(1.03, y, text, transform=axes.get_yaxis_transform(), color=_INK, fontsize=9, va="center")
    axes.set_ylim(3 * n_rows - 1.2, -0.8)
    axes.set_yticks([])
    axes.set_xlabel(f"logits towards the token of {_short(it)}", color=_MUTED, fontsize=9)
    _plain_axes(axes, grid="x", spines=("bottom",))
    if len(groups) > 1:
        _legend(axes, len(groups))
    said = []
    for group in groups:
        numbers = [
            f"{name} {signed(group[k]['mean'], places)} {_interval(group[k], places)}" for k, name in names.items()
        ]
        said.append(f"{group['readout']}: {', '.join(numbers)}")
    return _svg(figure, "late-effects", f"Late effects and their interaction with intervals. {'; '.join(said)}.")


def over_boundaries(
    panels: Sequence[tuple[str, Sequence[tuple[str, Sequence[dict[str, Any]]]]]], chosen: int, places: int
) -> Markup:
    """The interaction at each boundary, a panel per scope, a line with its band per readout.

    ``panels`` holds (scope, lines), a line (readout, groups sorted by boundary); ``chosen`` is marked.
    """
    figure = Figure(figsize=(10.4, 3.3), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    said = []
    for axes, (scope, of_scope) in zip(all_axes, panels, strict=True):
        axes.axhline(0, color=_MUTED, linewidth=1)
        axes.axvline(chosen, color=_RULE, linewidth=6, zorder=0)
        for i, (readout, groups) in enumerate(of_scope[: len(_SERIES)]):
            boundary = [group["boundary"] for group in groups]
            _line(axes, i, readout, boundary, [group["interaction"] for group in groups])
            peak = max(groups, key=lambda group: group["interaction"]["mean"])
            value = signed(peak["interaction"]["mean"], places)
            said.append(f"scope {scope}, {readout}: largest {value} at boundary {peak['boundary']}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.set_xlabel(f"boundary (first late block), scope {scope}", color=_MUTED, fontsize=9)
        _plain_axes(axes, grid="y", spines=("bottom",))
        _legend(axes, len(of_scope))
    all_axes[0].set_ylabel(f"interaction B {MINUS} A, logits", color=_MUTED, fontsize=9)
    return _svg(figure, "boundaries", f"Interaction at each boundary. {'; '.join(said)}.")


def _lines(figure: Lines, name: str) -> Markup:
    """Numbers with their intervals over numbers, a line with its band for each name."""
    drawn = Figure(figsize=(10.4, 3.3), layout="constrained")
    axes = drawn.subplots()
    axes.axhline(0, color=_MUTED, linewidth=1)
    if figure.marked is not None:
        axes.axvline(figure.marked, color=_RULE, linewidth=6, zorder=0)
    shown = list(figure.lines.items())[: len(_SERIES)]
    for i, (label, points) in enumerate(shown):
        _line(axes, i, label, [x for x, _ in points], [number for _, number in points])
    at = sorted({float(x) for _, points in shown for x, _ in points})
    if 1 <= len(at) <= 9 and np.diff(at).min(initial=np.inf) > 0.06 * (at[-1] - at[0]):
        axes.set_xticks(at, [f"{x:g}" for x in at])
    elif all(x.is_integer() for x in at):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    if figure.shares:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(figure.x_label, color=_MUTED, fontsize=9)
    axes.set_ylabel(figure.y_label, color=_MUTED, fontsize=9)
    _plain_axes(axes, grid="y", spines=("bottom",))
    _say_hidden(axes, len(figure.lines) - len(shown))
    if any(figure.lines):
        _legend(axes, 4)
    return _svg(drawn, name, figure.alt)


def _line(axes: Axes, i: int, label: str, x: Sequence[float], numbers: Sequence[Mapping[str, Any]]) -> None:
    """The i-th line of some axes, with its band where it has intervals."""
    colour = _SERIES[i]
    mean, low, high = (_floats([number[end] for number in numbers]) for end in ("mean", "low", "high"))
    known = not np.isnan(low).all()
    if known and len(x) == 1:
        axes.vlines(x, low, high, color=colour, alpha=0.5, linewidth=2)
    elif known:
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    # Narrower and dashed from line to line: one that lies upon another leaves both to be seen.
    dashes = (0, (1 + 2 * i, i)) if i else "-"
    few = len(x) <= _MARKED_POINTS
    axes.plot(x, mean, color=colour, linewidth=4 / (i + 1), linestyle=dashes, label=None if few else _short(label, 40))
    if few:
        axes.plot(x, mean, _MARKERS[i], color=colour, markersize=8 - i, label=_short(label, 40))


def _bars(figure: Bars, name: str, places: int) -> Markup:
    """Named bars with their intervals and numbers, those of several series below each other."""
    shown = list(figure.bars.items())[: len(_SERIES)]
    names = list(dict.fromkeys(bar for _, bars in shown for bar, _ in bars))
    numbers = [dict(bars) for _, bars in shown]
    thick = 0.8 / max(1, len(shown))
    drawn, axes = _rows(len(names) * max(1.0, 0.72 * len(shown)), names, range(len(names)), figure.marked)
    for i, ((label, _), of) in enumerate(zip(shown, numbers, strict=True)):
        for row, bar in enumerate(names):
            if bar not in of:
                continue
            y = row + (i - (len(shown) - 1) / 2) * thick
            if (mean := of[bar]["mean"]) is not None:
                axes.barh([y], [mean], 0.86 * thick, color=_SERIES[i], alpha=0.45)
            _whisker(axes, y, of[bar], _SERIES[i], places, figure.shares, dot=False)
        axes.barh([np.nan], [0.0], color=_SERIES[i], alpha=0.45, label=_short(label, 40))
    _finish_rows(axes, len(names), figure.label, figure.shares)
    _say_hidden(axes, len(figure.bars) - len(shown))
    if any(figure.bars):
        _legend(axes, 3)
    return _svg(drawn, name, figure.alt)


def _forest(figure: Forest, name: str, places: int) -> Markup:
    """A dot and its interval for each row, those of the totals below a rule."""
    at = [*range(len(figure.rows)), *(len(figure.rows) + 0.4 + i for i in range(len(figure.totals)))]
    rows = [*figure.rows, *figure.totals]
    drawn, axes = _rows(len(rows) + 0.4, [row for row, _ in rows], at, None)
    for number, (y, (_, of)) in enumerate(zip(at, rows, strict=True)):
        total = number >= len(figure.rows)
        _whisker(axes, y, of, _SERIES[1] if total else _SERIES[0], places, figure.shares, total=total)
    if figure.rows and figure.totals:
        axes.axhline(len(figure.rows) - 0.3, color=_RULE, linewidth=1)
    for tick in axes.get_yticklabels()[len(figure.rows) :]:
        tick.set_fontweight("bold")
    _finish_rows(axes, at[-1] + 1 if at else 1, figure.label, figure.shares)
    return _svg(drawn, name, figure.alt)


def _rows(height: float, names: Sequence[str], at: Sequence[float], marked: float | None) -> tuple[Figure, Axes]:
    """Axes of named rows."""
    drawn = Figure(figsize=(8.6, 0.75 + 0.31 * height), layout="constrained")
    axes = drawn.subplots()
    axes.axvline(0, color=_MUTED, linewidth=1)
    if marked is not None:
        axes.axvline(marked, color=_RULE, linewidth=6, zorder=0)
    axes.set_yticks(list(at), [_short(row, 34) for row in names])
    return drawn, axes


def _whisker(
    axes: Axes, y: float, number: Mapping[str, Any], colour: str, places: int, shares: bool, *, dot: bool = True,
    total: bool = False,
) -> None:  # fmt: skip
    """An interval at a height, with a dot at its mean, and the same as text at the right."""
    if number["low"] is not None:
        axes.plot([number["low"], number["high"]], [y, y], color=colour, linewidth=3 if total else 2.2)
    if number["mean"] is not None and dot:
        axes.plot([number["mean"]], [y], "D" if total else "o", color=colour, markersize=7 if total else 6.5)
    text = f"{_text(number['mean'], places, shares)}  {_interval(number, places, shares)}".rstrip()
    axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), color=_INK, fontsize=9, va="center")
    axes.texts[-1].set_fontweight("bold" if total else "normal")


def _finish_rows(axes: Axes, height: float, label: str, shares: bool) -> None:
    axes.set_ylim(height - 0.4, -0.6)
    axes.set_xlabel(label, color=_MUTED, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    if shares:
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    _plain_axes(axes, grid="x", spines=("bottom",))
    axes.tick_params(axis="y", labelcolor=_INK)


def _say_hidden(axes: Axes, n_hidden: int) -> None:
    """Name in the legend how many series have no colour left."""
    if n_hidden > 0:
        axes.plot([], [], " ", label=f"and {n_hidden} more, in the table")


def steps(step: npt.NDArray[np.int64]) -> Markup:
    """How many shared tokens were generated before the divergence, one bar per step or per few steps."""
    figure, axes = _small()
    wide = max(1, -(-(int(step.max()) + 1) // 40))
    counts, edges = np.histogram(step, np.arange(0, int(step.max()) + wide + 1, wide))
    axes.bar(edges[:-1] + (wide - 1) / 2, counts, width=0.86 * wide, color=_SERIES[2])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("generated tokens before it", color=_MUTED, fontsize=9)
    axes.set_xlim(-0.7 * wide, edges[-1] - 1 + 0.7 * wide)
    _counts_axis(axes)
    return _svg(
        figure,
        "steps",
        f"Histogram of the step of the divergence over {step.size} events: median {np.median(step):g}, "
        f"smallest {step.min()}, largest {step.max()}.",
    )


def gaps(gap_pt: Floats, gap_it: Floats, labels: tuple[str, str]) -> Markup:
    """Top-1 minus top-2 of each checkpoint's own logits, on a log axis, near ties shaded."""
    figure, axes = _small()
    both = np.concatenate([gap_pt, gap_it])
    # An exact tie has no place on a log axis; it is counted in the first bin.
    low, high = 1e-3, max(10.0, float(both.max()) * 1.05)
    edges = np.geomspace(low, high, 36)
    axes.axvspan(low, NEAR_TIE, color=_RULE, alpha=0.7, linewidth=0)
    for gap, colour, label in ((gap_pt, _PT, labels[0]), (gap_it, _IT, labels[1])):
        counts, _ = np.histogram(np.clip(gap, low, high), edges)
        axes.stairs(counts, edges, fill=True, color=colour, alpha=0.22)
        axes.stairs(counts, edges, color=colour, linewidth=1.6, label=_short(label))
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks([0.001, 0.01, 0.1, 1, 10], ["0.001", "0.01", "0.1", "1", "10"], minor=False)
    axes.minorticks_off()
    axes.text(0.02, 0.96, "near ties", transform=axes.transAxes, color=_MUTED, fontsize=9, va="top")
    axes.set_xlabel("top-1 minus top-2, logits", color=_MUTED, fontsize=9)
    _counts_axis(axes)
    _legend(axes, 2)
    ties = [int((gap < NEAR_TIE).sum()) for gap in (gap_pt, gap_it)]
    return _svg(
        figure,
        "gaps",
        f"Histogram of the gap between the two highest logits. Below {NEAR_TIE}: {ties[0]} of {gap_pt.size} events for "
        f"{labels[0]}, {ties[1]} for {labels[1]}.",
    )


def interactions(interaction: Floats, places: int) -> Markup:
    """The interaction of each single event; the outermost bins also hold what lies beyond the axis."""
    figure, axes = _small()
    low, high = np.quantile(interaction, [0.005, 0.995])
    low, high = min(low, 0.0), max(high, 0.0)
    # Zero is an edge, so that no bar mixes the two signs.
    wide = (high - low) / 40 or 0.05
    edges = wide * np.arange(np.floor(low / wide) - 1, np.ceil(high / wide) + 2)
    counts, _ = np.histogram(np.clip(interaction, edges[0], edges[-1]), edges)
    middle = (edges[1:] + edges[:-1]) / 2
    axes.bar(middle, counts, width=0.9 * wide, color=[_IT if x > 0 else _PT for x in middle], alpha=0.75)
    axes.axvline(0, color=_MUTED, linewidth=1)
    mean = float(interaction.mean())
    axes.axvline(mean, color=_INK, linewidth=1.4, linestyle=(0, (4, 2)), label=f"mean {signed(mean, places)}")
    axes.set_xlabel(f"interaction B {MINUS} A of one event, logits", color=_MUTED, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7))
    _counts_axis(axes)
    _legend(axes, 1)
    return _svg(
        figure,
        "interactions",
        f"Histogram of the interaction of single events: mean {signed(mean, places)}, median "
        f"{signed(float(np.median(interaction)), places)}, positive in {int((interaction > 0).sum())} of "
        f"{interaction.size}.",
    )


def _floats(values: Sequence[float | None]) -> Floats:
    """NaN where there is none."""
    return np.array(values, np.float64)


def _text(value: float | None, places: int, shares: bool = False) -> str:
    return percent(value) if shares else signed(value, places)


def _interval(number: Mapping[str, Any], places: int, shares: bool = False) -> str:
    if number["low"] is None:
        return ""
    return f"[{_text(number['low'], places, shares)}, {_text(number['high'], places, shares)}]"


def _short(label: str, most: int = 13) -> str:
    """At most so many characters, cut in the middle: labels of one lineup tend to differ at their end."""
    if len(label) <= most:
        return label
    before = 2 * most // 5
    return f"{label[:before]}\u2026{label[before + 1 - most :]}"


def _small() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(3.55, 2.5), layout="constrained")
    return figure, figure.add_subplot()


def _plain_axes(axes: Axes, *, grid: Literal["x", "y"], spines: tuple[str, ...]) -> None:
    axes.grid(axis=grid, color=_RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in spines)
        spine.set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelcolor=_MUTED, labelsize=9, length=3)
    if "left" not in spines:
        axes.tick_params(axis="y", length=0)


def _counts_axis(axes: Axes) -> None:
    axes.set_ylabel("events", color=_MUTED, fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axes.yaxis.set_major_formatter(lambda count, _: f"{count:,.0f}")
    _plain_axes(axes, grid="y", spines=("bottom",))


def _legend(axes: Axes, n_columns: int) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=n_columns,
        frameon=False,
        fontsize=9,
        labelcolor=_INK,
        handlelength=1.4,
        columnspacing=1.4,
        borderpad=0.2,
    )


def _svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as one element to put into the page, with ``alt`` as its text for people who do not see it.

    ``name`` salts the element ids: the same figure gets the same bytes, two figures of a page share no id.
    """
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ET.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style element would apply to the whole page; the metadata only holds addresses.
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = {value.lstrip("#") for element in root.iter() for key, value in element.items() if key.endswith("}href")}
    used |= {element.get("clip-path", "")[len("url(#") : -1] for element in root.iter()}
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        if element.tag == "text":
            kept = [part for part in attributes.get("style", "").split("; ") if not part.startswith("font-family")]
            attributes["style"] = "; ".join(kept)
        for placeholder, variable in _VARIABLES.items():
            if "style" in attributes:
                attributes["style"] = attributes["style"].replace(placeholder, f"var({variable})")
        element.attrib.clear()
        element.attrib.update(attributes)
    width, height = figure.get_size_inches() * 96
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "width": f"{width:.0f}",
        "height": f"{height:.0f}",
        "role": "img",
        "aria-label": alt,
    }
    return Markup(ET.tostring(root, encoding="unicode"))
