"""Steps of features, by hooks and by actcache: small crosscoders of the final blocks' MLPs, which both sides are given.

features rank       gradients of the margin at the final MLPs on both states, and every feature's attribution
features mediate    the interaction without the best 25 to 500 features, and without each of their controls
features gate-test  what the best 200 do on either state, and the same to first order
features rescue     the best 200 brought back on PT's states
features dial       ten features turned down, off and beyond
features handoff    what the best 200 hand on of the MLPs between the main boundary and the final blocks

The crosscoders are trained before anything is timed, on the bench's own prompts: a training belongs to no event. Nor
does a judgement of crosscoders ('gate', 'contexts'). All steps after the first begin with its ranking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import hooks
import numpy as np
import torch
from captured import Both, Captured, InMemory, Keyed, OfEvent
from hooks import HookEvent
from study_cells import PAIR, rows_of

from actcache.analyses import find_analysis
from actcache.analyses.features.crosscoder import Crosscoder
from actcache.analyses.features.edited import Moved, variants_of
from actcache.analyses.features.rank import crosscoder_blocks, gates, read_gradients, read_ranked
from actcache.analyses.features.ranked import Reading, reading_of
from actcache.analyses.features.step import load_crosscoders
from actcache.replay.edits import PLAIN, Edit, Rows, Variant
from actcache.replay.vectors import EventVectors
from actcache.store import Store

N_BLOCKS = 3
TRAINING: dict[str, Any] = {
    **{"width": 256, "k": 32, "k_start": 64, "steps": 100, "batch": 16, "learning_rate": 1e-3},
    **{"mean_batches": 4, "threshold_batches": 4, "save_steps": 1000},
}
"""Small: what is compared and timed is what is done with a crosscoder, good or not."""

_ALL: dict[str, Any] = {"tested": "all"}


def blocks_of(store: Store) -> range:
    """The final blocks, as far as there is one between the main boundary and them."""
    n_blocks = store.fingerprint.n_blocks
    return range(max(n_blocks - N_BLOCKS, store.main_boundary + 1), n_blocks)


def train(run: InMemory, corpus: Path) -> None:
    """A crosscoder of each of the final blocks, on the rows of a corpus."""
    run.analyse("features train", corpus=str(corpus), **TRAINING)


def _step(name: str, **options: Any) -> Callable[[InMemory], Any]:
    return lambda run: run.analyse(f"features {name}", **options)


class _Given:
    """What all events of a step share: a ranking, its crosscoders, and the edits of the step."""

    def __init__(self, captured: Captured, step: str, **options: Any) -> None:
        folder, store, analysis = captured.run.folder, captured.store, find_analysis(f"features {step}")
        ranked = read_ranked(folder, store)
        self.captured, self.reading, self.blocks = captured, ranked.reading, ranked.blocks
        self.crosscoders = load_crosscoders(folder)
        self.moved: list[Moved] = analysis.moved(ranked, analysis.options_of(options))  # type: ignore[attr-defined]
        # Features are read by IT's branch alone, so that edits are the same on both states.
        (self.variants,) = variants_of(self.moved, ranked, folder, store, PAIR[:1]).values()


class _Event:
    """One event behind IT's late blocks and head, by hooks."""

    def __init__(self, captured: Captured, boundary: int, blocks: Sequence[int], key: str, event: HookEvent) -> None:
        """Nothing is run before it is asked for."""
        self.captured, self.boundary, self.key, self.event = captured, boundary, key, event
        self.ids, self.model = torch.tensor([event.ids]), captured.models["it"]
        self.mlps = {block: captured.site("it", "mlp", block) for block in blocks}
        self._native: dict[str, Any] = {}

    def native(self, label: str) -> tuple[torch.Tensor, torch.Tensor]:
        """States at the boundary, and the last block's output: one forward, once."""
        if label not in self._native:
            self._native[label] = hooks.native(self.captured.models[label], self.ids, [self.boundary], whole=True)
        states, outputs = self._native[label]
        return states[self.boundary], outputs

    def margin(self, upstream: str, variant: Variant = PLAIN) -> float:
        """On the states of a checkpoint: a forward, but for IT's on its own, unedited, which is native."""
        if upstream == "it" and variant is PLAIN:
            return self.captured.margin("it", self.native("it")[1], self.event)
        return self.behind(None if upstream == "it" else self.native(upstream)[0], variant)

    def behind(self, states: torch.Tensor | None, variant: Variant) -> float:
        """On given states at the boundary, or IT's own: a forward."""
        with hooks.editing({self.mlps[int(edit.layers[0])]: self._change(edit) for edit in variant.edits}):
            if states is None:
                last = hooks.native(self.model, self.ids, [])[1]
            else:
                last = hooks.replay(self.model, self.ids, self.boundary, states)
        return float(hooks.margins(self.model, last, self.event))

    def interaction(self, y_pt_it: float) -> float:
        """Of the plain cells, of which this one is known: one forward more."""
        states, _ = self.native("it")
        crossed = hooks.replay(self.captured.models["pt"], self.ids, self.boundary, states, whole=True)
        of_pt = [self.captured.margin("it", outputs, self.event) for outputs in (crossed, self.native("pt")[1])]
        return self.margin("it") - of_pt[0] - y_pt_it + of_pt[1]

    def attributions(self, crosscoders: Mapping[int, Crosscoder]) -> dict[int, torch.Tensor]:
        """By block ``[F]``, those on IT's states less those on PT's: a forward and a backward of each."""
        found: dict[int, torch.Tensor] = {}
        for upstream, sign in (("it", 1), ("pt", -1)):
            state = None if upstream == "it" else (self.boundary, self.native(upstream)[0])
            of = hooks.gradients(self.model, self.ids, list(self.mlps.values()), self.event, state)
            for block, output, gradient in zip(self.mlps, *of, strict=True):
                active = crosscoders[block].encode_branch("it", output[None])[0]
                attributed = sign * active * (crosscoders[block].decoder_of("it") @ gradient.float())
                found[block] = found[block] + attributed if block in found else attributed
        return found

    def _change(self, edit: Edit) -> Callable[[torch.Tensor], torch.Tensor]:
        last = torch.tensor([len(self.event.ids) - 1])
        at = Rows(torch.zeros_like(last), last, last, last + 1, [self.key], layer=int(edit.layers[0]))
        return partial(edit.operation, at=at)


# ---- both ways, step by step ----


def _rank(captured: Captured) -> OfEvent:
    folder, store = captured.run.folder, captured.store
    blocks, crosscoders = crosscoder_blocks(folder), load_crosscoders(folder)
    boundary = _reading(store, blocks).boundary

    def of_event(row: Mapping[str, Any], event: HookEvent) -> Keyed:
        found = _Event(captured, boundary, blocks, row["event_id"], event).attributions(crosscoders)
        for block, attributed in found.items():
            for feature, value in enumerate(attributed.tolist()):
                yield (row["event_id"], block, feature), value

    return of_event


def _rank_found(run: InMemory) -> Keyed:
    """Of every feature, as the ranking's means are made of them."""
    blocks, ids = crosscoder_blocks(run.folder), run.store.events["event_id"].to_pylist()
    reading = _reading(run.store, blocks)
    gradients = read_gradients(run.folder, run.store, reading, blocks)
    for number, (block, crosscoder) in enumerate(load_crosscoders(run.folder).items()):
        of_events = gates(crosscoder, reading, gradients, number, range(len(ids)))
        for event, of_event in zip(ids, of_events.tolist(), strict=True):
            for feature, value in enumerate(of_event):
                yield (event, block, feature), value


def _reading(store: Store, blocks: Sequence[int]) -> Reading:
    return reading_of(store, blocks, "", "", "branch")


def _removing(step: str, name: str, **options: Any) -> Callable[[Captured], OfEvent]:
    """The drop of the interaction under every edit of a step, by the name of its column; and the interaction."""

    def prepared(captured: Captured) -> OfEvent:
        given = _Given(captured, step, **options)

        def of_event(row: Mapping[str, Any], event: HookEvent) -> Keyed:
            one = _Event(captured, given.reading.boundary, given.blocks, row["event_id"], event)
            plain = {upstream: one.margin(upstream) for upstream in PAIR}
            for moved, variant in zip(given.moved, given.variants, strict=True):
                lost = {upstream: margin - one.margin(upstream, variant) for upstream, margin in plain.items()}
                yield (*_key(row, moved), name), lost["it"] - lost["pt"]
            if name == "drop":
                interaction = one.interaction(plain["pt"])
                for moved in given.moved:
                    yield (*_key(row, moved), "interaction"), interaction
            else:
                attributed = one.attributions(given.crosscoders)
                for moved in given.moved:
                    if moved.instead is None:
                        of_set = sum(float(attributed[block][of].sum()) for block, of in moved.features.items())
                        yield (*_key(row, moved), "activation_gate"), of_set

        return of_event

    return prepared


def _rescue(captured: Captured) -> OfEvent:
    """What PT's states gain where features are set to what they are in IT's own forward, which is read there."""
    given = _Given(captured, "rescue")

    def of_event(row: Mapping[str, Any], event: HookEvent) -> Keyed:
        one = _Event(captured, given.reading.boundary, given.blocks, row["event_id"], event)
        own, last = hooks.taken(one.model, one.ids, {block: (mlp, False) for block, mlp in one.mlps.items()})
        plain = one.margin("pt")
        missing = float(hooks.margins(one.model, last, event)) - plain
        for moved, variant in zip(given.moved, given.variants, strict=True):
            gained = one.margin("pt", _onto(variant, own, row["event_id"])) - plain
            yield (*_key(row, moved), "gain"), gained
            yield (*_key(row, moved), "missing"), missing

    return of_event


def _onto(variant: Variant, rows: Mapping[int, torch.Tensor], event: str) -> Variant:
    """The variant with these rows as the target of what it moves."""
    edits = []
    for edit in variant.edits:
        target = EventVectors(rows[int(edit.layers[0])][None], (event,))
        edits.append(replace(edit, operation=replace(edit.operation, target=target)))  # type: ignore[type-var]
    return replace(variant, edits=tuple(edits))


def _handoff(captured: Captured) -> OfEvent:
    """Four hosts, with their own MLPs in the window and with the other's, hand their state to IT's final blocks."""
    given = _Given(captured, "gate-test")  # the same sets
    window = _window(captured.store)
    first = given.blocks[0]

    def of_event(row: Mapping[str, Any], event: HookEvent) -> Keyed:
        one = _Event(captured, first, given.blocks, row["event_id"], event)
        handed = {(host, False): one.native(host)[0] for host in PAIR}
        for host, source in (PAIR, PAIR[::-1]):
            with captured.swapped_mlps(host, source, window):
                handed[host, True] = hooks.native(captured.models[host], one.ids, [first])[0][first]
        margins = {
            at: [one.behind(states, variant) for variant in (PLAIN, *given.variants)] for at, states in handed.items()
        }
        base, descendant = (np.array(margins[host, False]) for host in PAIR)
        changes = {
            ("both", "entry"): descendant - base,
            ("rescue", WINDOW): np.array(margins["pt", True]) - base,
            ("degrade", WINDOW): descendant - np.array(margins["it", True]),
        }
        for (direction, window_name), change in changes.items():
            for moved, mediated in zip(given.moved, change[0] - change[1:], strict=True):
                key = row["event_id"], direction, window_name, moved.set, moved.k, moved.seed
                yield (*key, "change"), float(change[0])
                yield (*key, "mediated"), float(mediated)

    return of_event


WINDOW = "late_preterminal"


def _window(store: Store) -> range:
    return range(store.main_boundary, blocks_of(store)[0])


def _hand_off(run: InMemory) -> None:
    window = _window(run.store)
    run.analyse("features handoff", window=f"{WINDOW}={window.start}:{window.stop}", **_ALL)


def _handoff_found(run: InMemory) -> Keyed:
    columns = ("event_id", "direction", "window", "set", "k", "seed")
    return rows_of(run, "features/handoff", columns, ("change", "mediated"))


def _key(row: Mapping[str, Any], moved: Moved) -> tuple[Any, ...]:
    return row["event_id"], moved.set, moved.k, moved.amount, moved.seed


def _edited(step: str, by_hooks: Callable[[Captured], OfEvent], *values: str) -> Both:
    """A step that edits features, on all prompts."""
    columns = ("event_id", "set", "k", "amount", "seed")
    return Both("ranked", _step(step, **_ALL), by_hooks, lambda run: rows_of(run, f"features/{step}", columns, values))


BOTH = {
    "features rank": Both("trained", _step("rank"), _rank, _rank_found),
    "features mediate": _edited("mediate", _removing("mediate", "drop"), "drop", "interaction"),
    "features gate-test": _edited("gate-test", _removing("gate-test", "gate"), "gate", "activation_gate"),
    "features rescue": _edited("rescue", _rescue, "gain", "missing"),
    "features dial": _edited("dial", _removing("dial", "drop"), "drop", "interaction"),
    "features handoff": Both("ranked", _hand_off, _handoff, _handoff_found),
}
