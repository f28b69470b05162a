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
from matplotlib.ticker import MaxNLocator

from actcache.report.visible import MINUS, signed
from actcache.schema import ROLES
from actcache.study.analysis import Lines

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
# From PT's colour through near-white to IT's: the side of zero that a cell is on is the token that it prefers.
_DIVERGING = LinearSegmentedColormap.from_list("pt_it", ["#8a4200", "#e9a35c", "#f7f4ef", "#7fb2ea", "#0b4a9e"])

Number = dict[str, Any]
Floats = npt.NDArray[np.float64]


def grid(cells: dict[str, Number], effects: dict[str, Number], labels: tuple[str, str], places: int) -> Markup:
    """The 2x2 grid as a heat map: upstream in rows, late in columns, and each row's late effect beside it."""
    numbers = [[cells[f"{upstream}_{late}"] for late in ROLES] for upstream in ROLES]
    figure = Figure(figsize=(5.2, 3.5))
    axes = figure.add_axes((0.22, 0.03, 0.53, 0.80))
    alt = _heat_map(axes, numbers, labels, places)
    for row, (name, key) in enumerate((("A", "late_from_pt"), ("B", "late_from_it"))):
        text = f"{name} = {signed(effects[key]['mean'], places)}"
        axes.text(2.08, row + 0.44, text, color=_INK, fontsize=11.5, fontweight="bold", va="center")
        axes.text(2.08, row + 0.62, "late effect", color=_MUTED, fontsize=9, va="center")
    return _svg(figure, "grid", f"Mean margin in each of the four cells. {alt}.")


def lineup(numbers: Sequence[Sequence[Number]], labels: Sequence[str], places: int) -> Markup:
    """The grid of K checkpoints as a heat map ``[K][K]``: upstream in rows, late in columns."""
    width, height = 2.0 + 1.4 * len(labels), 0.7 + 1.2 * len(labels)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((1.5 / width, 0.1 / height, 1.4 * len(labels) / width, 1 - 0.7 / height))
    alt = _heat_map(axes, numbers, labels, places)
    return _svg(figure, "lineup", f"Mean margin in each of the {len(labels) ** 2} cells. {alt}.")


def _heat_map(axes: Axes, numbers: Sequence[Sequence[Number]], labels: Sequence[str], places: int) -> str:
    """Draw mean margins with their intervals, in colours that part at 0; the same in words."""
    mean = np.array([[number["mean"] for number in row] for row in numbers])
    places_of = [(row, column) for row in range(len(labels)) for column in range(len(labels))]
    reach = float(np.abs(mean).max()) or 1.0
    norm = TwoSlopeNorm(0.0, -reach, reach)
    axes.pcolormesh(mean, cmap=_DIVERGING, norm=norm, edgecolor=_PAPER, linewidth=3)
    axes.invert_yaxis()
    for row, column in places_of:
        red, green, blue, _ = _DIVERGING(norm(mean[row, column]))
        ink = "#16181d" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#ffffff"
        at = (column + 0.5, row + 0.5)
        interval = _interval(numbers[row][column], places)
        axes.annotate(
            signed(mean[row, column], places),
            at,
            (0, 5 if interval else 0),
            textcoords="offset points",
            color=ink,
            ha="center",
            va="center",
            fontsize=17,
            fontweight="bold",
        )
        axes.annotate(
            interval, at, (0, -13), textcoords="offset points", color=ink, ha="center", va="center", fontsize=9
        )
    axes.set_xticks(np.arange(len(labels)) + 0.5, [f"late {_short(label)}" for label in labels])
    axes.set_yticks([])
    for row, label in enumerate(labels):
        axes.text(-0.07, row + 0.45, "upstream", color=_INK, fontsize=10, ha="right", va="center")
        axes.text(-0.07, row + 0.60, _short(label), color=_INK, fontsize=10, ha="right", va="center")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=10, labelcolor=_INK, pad=6)
    axes.spines[:].set_visible(False)
    return "; ".join(
        f"upstream {labels[row]}, late {labels[column]}: {signed(mean[row, column], places)} "
        f"{_interval(numbers[row][column], places)}".rstrip()
        for row, column in places_of
    )


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


def lines(figure: Lines, name: str) -> Markup:
    """Numbers with their intervals over whole numbers, a line with its band for each name."""
    drawn = Figure(figsize=(10.4, 3.3), layout="constrained")
    axes = drawn.subplots()
    axes.axhline(0, color=_MUTED, linewidth=1)
    if figure.marked is not None:
        axes.axvline(figure.marked, color=_RULE, linewidth=6, zorder=0)
    for i, (label, points) in enumerate(list(figure.lines.items())[: len(_SERIES)]):
        x, numbers = [x for x, _ in points], [number for _, number in points]
        _line(axes, i, label, x, numbers)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel(figure.x_label, color=_MUTED, fontsize=9)
    axes.set_ylabel(figure.y_label, color=_MUTED, fontsize=9)
    _plain_axes(axes, grid="y", spines=("bottom",))
    _legend(axes, len(figure.lines))
    return _svg(drawn, name, figure.alt)


def _line(axes: Axes, i: int, label: str, x: Sequence[int], numbers: Sequence[Mapping[str, Any]]) -> None:
    """The i-th line of some axes, with its band where it has intervals."""
    colour = _SERIES[i]
    if all(number["low"] is not None for number in numbers):
        low, high = ([number[end] for number in numbers] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    # Narrower and dashed from line to line: one that lies upon another leaves both to be seen.
    dashes = (0, (1 + 2 * i, i)) if i else "-"
    mean = [number["mean"] for number in numbers]
    axes.plot(x, mean, color=colour, linewidth=4 / (i + 1), linestyle=dashes)
    axes.plot(x, mean, _MARKERS[i], color=colour, markersize=8 - i, label=label)


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


def _interval(number: Number, places: int) -> str:
    if number["low"] is None:
        return ""
    return f"[{signed(number['low'], places)}, {signed(number['high'], places)}]"


def _short(label: str) -> str:
    """At most 13 characters, cut in the middle: labels of one lineup tend to differ at their end."""
    return label if len(label) <= 13 else f"{label[:5]}\u2026{label[-7:]}"


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
