"""Analyses of cells and of states, by hooks and by actcache: those that neither decode nor read features.

grid, effects   the four cells by three readouts, and their contrasts
depth           the grid again at three blocks before the end, and at the last one
windows         the MLPs of one checkpoint in each window of the other that begins late, and their margin supports
controls        interpolated, permuted, equally long random and unmoved states behind both late stacks, and the sizes of
                final states over whole sequences
commitment      what a head makes of the states at the boundary
closure         what is added to PT's state at p, of every rank and scale, and its controls
supports        the four cells of events along both checkpoints' own rollouts
lineage         all cells of three checkpoints, by two readouts
recipes         the four cells of two descendants of one base, each on its own events
map             states at the last four positions of every boundary, and each late block's attention and MLP at p
path            what each late block's attention and MLP adds to the final state, exchanged
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hooks
import pyarrow.parquet as pq
import torch
from captured import Both, Captured, InMemory, Keyed, OfEvent, directly
from hooks import HookEvent
from study import READOUTS
from torch import nn

from actcache.analyses.closure import ANALYSIS as CLOSURE
from actcache.analyses.closure import injected
from actcache.analyses.controls import ANALYSIS as CONTROLS
from actcache.analyses.controls import controlled
from actcache.analyses.grid import GridSettings, run_grid
from actcache.analyses.windows import windows_of
from actcache.replay.edits import Rows
from actcache.replay.sizes import SIZES, sizes_of
from actcache.study.cells import publish_cells

PAIR = ("pt", "it")
_HOSTS = (PAIR, PAIR[::-1])  # (host, source)
_WINDOW_COLUMNS = ("margin", "margin_support", "own_margin_support")


def analysing(name: str) -> Callable[[InMemory], Any]:
    """An analysis with its default options."""
    return lambda run: run.analyse(name)


def rows_of(run: InMemory, stem: str, columns: Sequence[str], values: Sequence[str]) -> Keyed:
    """The values of a table: each under those of some columns, and its own column's name where there are several."""
    for row in pq.read_table(run.path / f"{stem}.parquet").to_pylist():
        key = tuple(row[column] for column in columns)
        for value in values:
            yield (*key, value) if len(values) > 1 else key, row[value]


# ---- the grid ----


def score_grid(run: InMemory) -> None:
    """The plain cells of the main boundary, as a table."""
    store, folder = run.store, run.folder
    settings = GridSettings(tuple(store.boundaries[:1]), readouts=READOUTS)
    run_grid(store, run.load_late, folder.cell_groups, settings, load_readout=run.load_readout)
    publish_cells(folder.cells, folder.cell_groups, store, strict=False, max_tokens=None)


def _grid_and_effects(run: InMemory) -> None:
    score_grid(run)
    run.analyse("effects")


def _cells(run: InMemory, name: str = "cells") -> Keyed:
    key = ("event_id", "boundary", "upstream", "late", "readout", "variant")
    for row in pq.read_table(run.path / f"{name}.parquet").to_pylist():
        yield tuple(row[column] for column in key), row["margin"] + (row["noop_delta"] or 0.0)
        if row.get("rms") is not None:
            for size in SIZES:
                yield (*(row[column] for column in key[:4]), size), row[size]


def _grid_by_hooks(
    captured: Captured,
    row: Mapping[str, Any],
    event: HookEvent,
    *,
    boundaries: Sequence[int],
    readouts: Sequence[str],
    labels: Sequence[str] = PAIR,
) -> Keyed:
    """All cells of these checkpoints: a native forward of each, and one forward per crossed cell."""
    ids = torch.tensor([event.ids])
    native = {label: hooks.native(captured.models[label], ids, boundaries, whole=True) for label in labels}
    for boundary in boundaries:
        for upstream in labels:
            for late in labels:
                states, outputs = native[upstream]
                if upstream != late:
                    outputs = hooks.replay(captured.models[late], ids, boundary, states[boundary], whole=True)
                for readout in readouts:
                    head = late if readout == "native" else readout.removeprefix("common_")
                    key = row["event_id"], boundary, upstream, late, readout, "none"
                    yield key, captured.margin(head, outputs, event)


def _grid(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    return _grid_by_hooks(captured, row, event, boundaries=captured.store.boundaries[:1], readouts=READOUTS)


def _depth(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    return _grid_by_hooks(captured, row, event, boundaries=captured.store.boundaries[1:], readouts=["common_it"])


def _supports(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    return _grid_by_hooks(captured, row, event, boundaries=captured.store.boundaries, readouts=["common_it"])


def _lineage(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    how: dict[str, Any] = {"boundaries": captured.store.boundaries, "labels": captured.labels}
    return _grid_by_hooks(captured, row, event, readouts=["common_it", "native"], **how)


def _recipes(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    how: dict[str, Any] = {"boundaries": captured.store.boundaries, "labels": row["pair"].split(",")}
    return _grid_by_hooks(captured, row, event, readouts=["common_it"], **how)


# ---- what is done to states ----


def _places(row: Mapping[str, Any], event: HookEvent, donor: torch.Tensor) -> Rows:
    """Where the rows of one sequence stand, and IT's beside them."""
    places = torch.arange(len(event.ids))
    of = torch.zeros_like(places), places, places, torch.tensor([len(places)]), [row["event_id"]], {"it": donor}
    return Rows(*of, prompts=[row["prompt_id"]])


def _controls(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    """Variants of PT's states, and the sizes of all four cells."""
    boundary, ids = captured.store.boundaries[0], torch.tensor([event.ids])
    native = captured.native(event, [boundary])
    at = _places(row, event, native["it"][0][boundary][0])
    for late, model in captured.models.items():
        for upstream, (states, outputs) in native.items():
            if upstream != late:
                outputs = hooks.replay(model, ids, boundary, states[boundary], whole=True)
            for name, size in zip(SIZES, sizes_of(outputs[0]).tolist(), strict=True):
                yield (row["event_id"], boundary, upstream, late, name), size
        for variant in controlled(captured.store, CONTROLS.options(), PAIR):
            states = variant.edit_states(native["pt"][0][boundary][0], at)[None]
            outputs = hooks.replay(model, ids, boundary, states, whole=True)
            key = row["event_id"], boundary, "pt", late, "common_it", variant.name
            yield key, captured.margin("it", outputs, event)


def _closure(captured: Captured) -> OfEvent:
    """What is added to PT's state at p, behind IT's late blocks, beside that state itself. The components are fitted
    once."""
    boundaries, model = captured.store.boundaries, captured.models["it"]
    every = {boundary: injected(captured.store, boundary, PAIR, CLOSURE.options()) for boundary in boundaries}

    def of_event(row: Mapping[str, Any], event: HookEvent) -> Keyed:
        ids = torch.tensor([event.ids])
        native = captured.native(event, boundaries)
        for boundary, (variants, meant) in every.items():
            own, donor = (native[label][0][boundary][0] for label in PAIR)
            at = _places(row, event, donor)

            def margin(states: torch.Tensor, boundary: int = boundary) -> float:
                outputs = hooks.replay(model, ids, boundary, states[None], whole=True)
                return captured.margin("it", outputs, event)

            floor = margin(own)
            for variant in variants:
                yield (row["event_id"], boundary, *meant[variant.name]), margin(variant.edit_states(own, at)) - floor

    return of_event


def _closure_found(run: InMemory) -> Keyed:
    return rows_of(run, "closure", ("event_id", "boundary", "what", "rank", "scale"), ["gain"])


def _commitment(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    boundary = captured.store.boundaries[0]
    for label, (states, _) in captured.native(event, [boundary]).items():
        yield (row["event_id"], f"boundary_margin_{label}"), captured.margin("it", states[boundary], event)


def _commitment_found(run: InMemory) -> Keyed:
    return rows_of(run, "commitment", ["event_id"], [f"boundary_margin_{label}" for label in PAIR])


# ---- what modules do ----


def _windows(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    """Each host as it is, then with the source's MLPs in each window."""
    for host, source in _HOSTS:
        _, own = _mlp_supports(captured, host, event)
        for name, first, stop in windows_of(captured.store, ""):
            with captured.swapped_mlps(host, source, range(first, stop)):
                margin, given = _mlp_supports(captured, host, event)
            values = margin, float(given[first:stop].mean()), float(own[first:stop].mean())
            for column, value in zip(_WINDOW_COLUMNS, values, strict=True):
                yield (row["event_id"], host, name, column), value


def _mlp_supports(captured: Captured, label: str, event: HookEvent) -> tuple[float, torch.Tensor]:
    """The margin, and of each block the margin of what it writes less that without what its MLP added."""
    model = captured.models[label]
    added: list[torch.Tensor] = []
    written: list[torch.Tensor] = []

    def keeping(kept: list[torch.Tensor]) -> Any:
        return lambda _, args, out: kept.append((out[0] if isinstance(out, tuple) else out)[0, -1])

    handles = []
    for block in captured.blocks(label):
        last = getattr(block, "post_feedforward_layernorm", block.mlp)
        handles += [last.register_forward_hook(keeping(added)), block.register_forward_hook(keeping(written))]
    try:
        hooks.native(model, torch.tensor([event.ids]), [])
    finally:
        for handle in handles:
            handle.remove()
    after, before = torch.stack(written), torch.stack(written) - torch.stack(added)
    margins = [hooks.margins(model, states, event) for states in (after, before)]
    return float(margins[0][-1]), margins[0] - margins[1]


def _windows_found(run: InMemory) -> Keyed:
    return rows_of(run, "windows", ("event_id", "host", "window"), _WINDOW_COLUMNS)


def _parts(captured: Captured, label: str) -> dict[tuple[str, int], nn.Module]:
    """Attention and MLP of each block from the main boundary on."""
    late = range(captured.store.boundaries[0], len(captured.blocks(label)))
    return {(site, block): captured.site(label, site, block) for site in ("attention", "mlp") for block in late}


def _taken(captured: Captured, event: HookEvent) -> dict[str, Any]:
    """Of every checkpoint: what these give at p, and the final state there."""
    ids = torch.tensor([event.ids])
    found = {}
    for label, model in captured.models.items():
        found[label] = hooks.taken(model, ids, {name: (of, False) for name, of in _parts(captured, label).items()})
    return found


def _map(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    """One forward per patch, after two of each checkpoint: for its states, and for what its parts give."""
    boundaries, ids = captured.store.boundaries, torch.tensor([event.ids])
    native, taken = captured.native(event, boundaries), _taken(captured, event)
    for host, source in _HOSTS:
        model = captured.models[host]
        for boundary in boundaries:
            for back in range(min(4, len(event.ids))):
                states = native[host][0][boundary].clone()
                states[0, -1 - back] = native[source][0][boundary][0, -1 - back]
                outputs = hooks.replay(model, ids, boundary, states, whole=True)
                yield (row["event_id"], host, "state", boundary, -back), captured.margin(host, outputs, event)
        for (site, block), module in _parts(captured, host).items():
            last = hooks.put(model, ids, module, taken[source][0][site, block], slice(None), False)
            yield (row["event_id"], host, site, block, 0), float(hooks.margins(model, last, event))


def _map_found(run: InMemory) -> Keyed:
    return rows_of(run, "map", ("event_id", "host", "site", "boundary", "offset"), ["margin"])


def _path(captured: Captured, row: Mapping[str, Any], event: HookEvent) -> Keyed:
    taken = _taken(captured, event)
    for host, source in _HOSTS:
        given, final = taken[host]
        for (site, block), own in given.items():
            exchanged = final - own + taken[source][0][site, block]
            key = row["event_id"], host, site, block
            yield key, float(hooks.margins(captured.models[host], exchanged, event))


def _path_found(run: InMemory) -> Keyed:
    return rows_of(run, "path", ("event_id", "host", "site", "boundary"), ["margin"])


BOTH = {
    "grid, effects": Both("bare", _grid_and_effects, directly(_grid), _cells),
    "depth": Both("pair", analysing("depth"), directly(_depth), _cells),
    "windows": Both("pair", analysing("windows"), directly(_windows), _windows_found),
    "controls": Both("pair", analysing("controls"), directly(_controls), lambda run: _cells(run, "controls")),
    "commitment": Both("pair", analysing("commitment"), directly(_commitment), _commitment_found),
    "closure": Both("pair", analysing("closure"), _closure, _closure_found),
    "supports": Both("rollouts", analysing("supports"), directly(_supports), _cells),
    "lineage": Both("three", analysing("lineage"), directly(_lineage), _cells),
    "recipes": Both("three", analysing("recipes"), directly(_recipes), _cells),
    "map": Both("pair", analysing("map"), directly(_map), _map_found),
    "path": Both("pair", analysing("path"), directly(_path), _path_found),
}
