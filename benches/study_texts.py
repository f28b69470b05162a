"""Analyses in which whole checkpoints write, by hooks and by actcache.

continuation    three tails per event, and the log-probabilities of all candidates in the four cells
forced          four forced tokens per event, and what IT writes behind each

Hooks decode one sequence at a time, with a key-value cache. A candidate with another prompt's tail takes it as it was
written for that prompt.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import hooks
import pyarrow.parquet as pq
import torch
from captured import Both, Captured, InMemory, Keyed, OfEvent
from hooks import HookEvent
from study_cells import PAIR, analysing, rows_of

from actcache.analyses.continuation import ANALYSIS as CONTINUATION
from actcache.analyses.forced import alternatives
from actcache.capture.token_class import TokenClasses
from actcache.progress import untold
from actcache.study.analysis import exactness_of
from actcache.study.continuation_job import CANDIDATES, CONTRASTS, ContinuationJob

FORCED_TOKENS = 16
"""What a reply has at most: a tenth of the study's, as nothing changes but how long both sides decode."""


def _continuation(captured: Captured) -> OfEvent:
    lineup, boundary = captured.run.lineup, captured.store.main_boundary
    options, ends, special, never = CONTINUATION.options(), lineup.end_ids, lineup.special_ids, lineup.masked_ids
    n, shuffled = options.steps[-1] + 1, _shuffled(captured)

    def tail(label: str, event: HookEvent, token: int) -> tuple[int, ...]:
        """What counts of a token and of what a checkpoint goes on with: all before the first special token that ends no
        text."""
        written = [token, *hooks.greedy(captured.models[label], [*event.ids, token], n - 1, ends, never)]
        plain = next((at for at, one in enumerate(written) if one in special - ends), len(written))
        return tuple(written[:plain])

    def sums(event: HookEvent, candidate: Sequence[int]) -> dict[tuple[str, str], list[float]]:
        """By cell, the log-probability of the first token of a candidate, of the first two, and so on."""
        ids, positions = torch.tensor([[*event.ids, *candidate[:-1]]]), range(-len(candidate), 0)
        native = {label: hooks.native(captured.models[label], ids, [boundary], whole=True) for label in PAIR}
        found = {}
        for upstream, late in product(PAIR, PAIR):
            states, outputs = native[upstream]
            if upstream != late:
                outputs = hooks.replay(captured.models[late], ids, boundary, states[boundary], whole=True)
            log_probs = hooks.log_probs(captured.models["it"], outputs[0, -len(candidate) :], never)
            chosen = log_probs[list(range(len(positions))), list(candidate)]
            found[upstream, late] = chosen.cumsum(0).tolist()
        return found

    def of_event(row: Mapping[str, Any], event: HookEvent) -> Keyed:
        tails = ("it", event.y_it), ("pt", event.y_pt), ("pt", event.y_it)
        of = dict(zip(CANDIDATES, [*(tail(label, event, token) for label, token in tails)], strict=False))
        of[CANDIDATES[-1]] = shuffled.get(row["event_id"], ())
        every = {candidate: sums(event, candidate) for candidate in dict.fromkeys(of.values()) if candidate}
        for (contrast, (one, other)), (upstream, late) in product(CONTRASTS.items(), product(PAIR, PAIR)):
            length = min(len(of[one]), len(of[other]))
            for step in (step for step in options.steps if step < length):
                y = every[of[one]][upstream, late][step] - every[of[other]][upstream, late][step]
                yield (row["event_id"], upstream, late, contrast, step), y

    return of_event


def _shuffled(captured: Captured) -> dict[str, tuple[int, ...]]:
    """By event, the candidate with another prompt's tail: as actcache chooses that prompt."""
    run = captured.copy(captured.path.with_name("candidates"))
    CONTINUATION.prepare(run, run.store, CONTINUATION.options(), untold)
    (jobs,) = CONTINUATION.own_jobs(run.folder, run.store, CONTINUATION.options(), exactness_of(run.folder)).values()
    starts = {segment.name: segment.events.start for segment in run.store.segments}
    ids, found = run.store.events["event_id"].to_pylist(), {}
    for job in jobs:
        assert isinstance(job, ContinuationJob)
        for event, candidates in zip(job.events, job.candidates, strict=True):
            found[ids[starts[job.segment] + event]] = candidates[-1]
    return found


def _continuation_found(run: InMemory) -> Keyed:
    return rows_of(run, "continuation", ("event_id", "upstream", "late", "contrast", "n"), ["y"])


def _forced(captured: Captured) -> OfEvent:
    lineup, model, classes = captured.run.lineup, captured.models["it"], TokenClasses()
    encoder, ends, special, masked = (
        lineup.checkpoints["it"].encoder,
        lineup.end_ids,
        lineup.special_ids,
        lineup.masked_ids,
    )

    @functools.cache
    def may_be(token: int) -> bool:
        if token in special or token in masked or token not in encoder.token_of:
            return False
        return encoder.encode([encoder.decode([token])], add_special_tokens=False) == [[token]]

    class_of = functools.cache(lambda token: classes.of(encoder.decode([token])))

    def of_event(row: Mapping[str, Any], event: HookEvent) -> Keyed:
        if not (may_be(event.y_it) and may_be(event.y_pt)):
            return
        last = hooks.native(model, torch.tensor([event.ids]), [])[1]
        log_probs = hooks.log_probs(model, last, masked)[0]
        chosen = {"y_it": event.y_it, "y_pt": event.y_pt}
        chosen |= alternatives(log_probs, event.y_it, event.y_pt, may_be, class_of)
        for branch, token in chosen.items():
            written = hooks.greedy(model, [*event.ids, token], FORCED_TOKENS, ends, masked)
            text = encoder.decode(plain) if (plain := [one for one in written if one not in special]) else ""
            values = float(token), float(log_probs[token]), float(len(written)), _digest(text)
            for name, value in zip(("token_id", "log_prob", "n_tokens", "text"), values, strict=True):
                yield (row["event_id"], branch, name), value

    return of_event


def _forced_found(run: InMemory) -> Keyed:
    for row in pq.read_table(run.path / "forced.parquet").to_pylist():
        if row["view"] == "suffix":
            for name in ("token_id", "log_prob", "n_tokens"):
                yield (row["event_id"], row["branch"], name), float(row[name])
            yield (row["event_id"], row["branch"], "text"), _digest(row["text"])


def _digest(text: str) -> float:
    return float(zlib.crc32(text.encode()))


BOTH = {
    "continuation": Both("pair", analysing("continuation"), _continuation, _continuation_found),
    "forced": Both("pair", lambda run: run.analyse("forced", max_new=str(FORCED_TOKENS)), _forced, _forced_found),
}
