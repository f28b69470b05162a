"""Several events of one sequence: it is read and replayed once for all, as separate replays would score them."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import tiny
import torch

from actcache.analyses.grid import GridSettings, jobs_left, run_grid
from actcache.cli import main
from actcache.errors import InputError
from actcache.replay.edits import Add, Edit, Interpolate, MatchedNorm, Replace, SignedPermutation, Variant
from actcache.replay.late_stack import LateStack
from actcache.store import open_store
from actcache.study.engine import LocalEngine
from actcache.study.replay_job import States

pytestmark = pytest.mark.slow

BOUNDARY = 3
WIDTH = 32
# Positions of the events of each sequence: one, two, many in no order, two of them the same.
EVENTS = {"one": [9], "two": [11, 4], "many": [6, 13, 0, 1, 6]}
N_EVENTS = sum(map(len, EVENTS.values()))


def ids_of(name: str) -> list[int]:
    first = list(EVENTS).index(name)
    return [5 + (7 * position + 3 * first) % 90 for position in range(max(EVENTS[name]) + 1)]


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A store of these events in two segments, and the folders of its checkpoints."""
    folder = tmp_path_factory.mktemp("many")
    pt, it = tiny.make_pair(folder, "llama")
    lines = [
        {"id": name, "token_ids": ids_of(name), "position": position, "y_pt": 40, "y_it": 41 + number}
        for name, positions in EVENTS.items()
        for number, position in enumerate(positions)
    ]
    events = folder / "events.jsonl"
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["capture", "--pt", pt, "--it", it, "--out", folder / "run", "--boundary", BOUNDARY]
    words += ["--support", "fixed", "--events", events, "--strict", "--shard-prompts", 2]
    assert main([str(word) for word in words]) == 0
    store = open_store(folder / "run/store")
    assert [segment.n_sequences for segment in store.segments] == [2, 1]
    assert len(store) == N_EVENTS
    return store, {"pt": pt, "it": it}


class EventByEvent(LocalEngine):
    """The twin: it reads a sequence for each event, up to its position."""

    def states(self, job: Any) -> States:
        events = self.segment(job.segment).events
        rows = {label: self.store.states(label, job.boundary, events) for label in self.store.checkpoints}
        _, offsets = rows["pt"]
        last = offsets[1:] - offsets[:-1] - 1
        return States(
            *(self.events(job.segment)[name].to_pylist() for name in ("event_id", "prompt_id")),
            {label: one for label, (one, _) in rows.items()},
            offsets,
            torch.stack([torch.arange(len(last)), last], dim=1),
            {label: self.store.final(label, events) for label in self.store.checkpoints},
        )


def settings(**more: Any) -> GridSettings:
    shift = torch.linspace(-1, 1, WIDTH)
    variants = (
        Variant("last", (Edit(Add(shift)),)),
        Variant("drawn", (Edit(MatchedNorm(1, "it")),), placebo=True),
        Variant("all", (Edit(Interpolate("it", 0.5), "all"),), placebo=True),
        Variant("first", (Edit(Add(shift), (0,)),)),
        Variant("inside", (Edit(Replace(vector=shift), "last", "mlp", (-1,)),)),
        Variant("all, drawn", (Edit(MatchedNorm(2), "all"),)),
        Variant("all, of the prompt", (Edit(SignedPermutation(2, "it", "prompt"), "all"),), placebo=True),
    )
    given = {
        "boundaries": (BOUNDARY,),
        "scopes": ("prefix", "position"),
        "variants": variants,
        "top1": True,
        "kl": True,
    }
    return GridSettings(**given | more)


def tables(engine: LocalEngine, how: GridSettings) -> list[Any]:
    return [job.run(engine, job.read(engine)).table for job in jobs_left(engine.store, {}, how)]


@pytest.fixture(scope="module")
def apart(captured):
    """``apart(strict)``: what the twin gives, made once."""
    store, checkpoints = captured
    return functools.cache(lambda strict: tables(EventByEvent.of(store, checkpoints), settings(strict=strict)))


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("strict", [True, False])
def test_cells_are_those_of_separate_replays(captured, apart, strict):
    store, checkpoints = captured
    found, expected = tables(LocalEngine.of(store, checkpoints), settings(strict=strict)), apart(strict)
    assert sum(table.num_rows for table in found) == N_EVENTS * 2 * 4 * 8 * 3
    rounded = ["margin", "noop_delta", "kl"]
    for table, twin in zip(found, expected, strict=True):
        if strict:
            assert table.equals(twin)
            continue
        assert table.drop_columns(rounded).equals(twin.drop_columns(rounded))
        for name in rounded:
            pairs = zip(table[name].to_pylist(), twin[name].to_pylist(), strict=True)
            assert all(a == b or abs(a - b) < 1e-4 for a, b in pairs), name


def test_a_sequence_is_run_once_for_all_its_events(captured, tmp_path):
    store, checkpoints = captured
    n_tokens: list[int] = []

    def load(label: str, boundary: int) -> LateStack:
        late = LateStack.load(checkpoints[label], boundary, dtype=store.dtype)
        hook = late.blocks[0].mlp.register_forward_hook
        hook(lambda module, args, output: n_tokens.append(args[0].shape[:-1].numel()))
        return late

    def tokens(engine: type[LocalEngine] = LocalEngine, **how: Any) -> int:
        loaded = engine(store, load)
        jobs = jobs_left(store, {}, settings(scopes=("prefix",), **how))
        read = [(job, job.read(loaded)) for job in jobs]
        for job in jobs:
            loaded.late(job.late, job.boundary)
        n_tokens.clear()  # those of the probes
        for job, states in read:
            job.run(loaded, states)
        return sum(n_tokens)

    once = sum(max(positions) + 1 for positions in EVENTS.values())
    each = sum(position + 1 for positions in EVENTS.values() for position in positions)
    distinct = sum(position + 1 for positions in EVENTS.values() for position in set(positions))
    last = (Variant("last", (Edit(Add(torch.ones(WIDTH))),)),)
    assert tokens(variants=()) == 4 * once, "cells of the grid"
    assert tokens(EventByEvent, variants=()) == 4 * each
    assert tokens(variants=(), strict=True) == 4 * distinct, "a strict forward ends at the event"
    assert tokens(variants=last) == 4 * (once + 2 * N_EVENTS), "a branch for each of the grid's cells and the variant's"


def test_a_grid_reads_each_sequence_once(captured, tmp_path, monkeypatch):
    store, checkpoints = captured
    read = []
    whole = type(store).states
    monkeypatch.setattr(type(store), "states", lambda *args, **more: read.append(whole(*args, **more)) or read[-1])
    run_grid(store, lambda label, b: LateStack.load(checkpoints[label], b, dtype=store.dtype), tmp_path, settings())
    once = sum(max(positions) + 1 for positions in EVENTS.values())
    assert sum(len(rows) for rows, _ in read) == 2 * once, "of each of two checkpoints"


def test_one_event_in_each_sequence_is_replayed_as_ever(tiny_run):
    """Bit for bit, in packs too: they are the same ones."""
    run = tiny_run("llama", torch.float32)
    checkpoints = {"pt": run.pt, "it": run.it}
    found, expected = (tables(engine.of(run.store, checkpoints), settings()) for engine in (LocalEngine, EventByEvent))
    assert all(table.equals(twin) for table, twin in zip(found, expected, strict=True))
    for label in checkpoints:
        rows, offsets, positions = run.store.sequence_states(label, BOUNDARY)
        assert torch.equal(rows, run.store.states(label, BOUNDARY)[0])
        assert positions.tolist() == [[n, length - 1] for n, length in enumerate(offsets.diff().tolist())]


def test_a_store_of_event_rows_has_no_sequences(tiny_run, tmp_path):
    run = tiny_run("llama", torch.float32)
    words = [*run.arguments("capture"), "--rows", "divergence"]
    words[words.index("--out") + 1] = str(tmp_path / "run")
    assert main(words) == 0
    with pytest.raises(InputError, match="has the rows of events alone, not of sequences: read them by states"):
        open_store(tmp_path / "run/store").sequence_states("pt", BOUNDARY)
