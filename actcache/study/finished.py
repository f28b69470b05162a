"""Finished: what a run took, to put beside its plan, and what it tells the plan of another run of its pair.

The same arithmetic as the plan's, over what the store holds and what the stages recorded of themselves. Knows plans and
stores; knows no command line and no folders of runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.capture.given import FIXED
from actcache.capture.search import Outcome
from actcache.capture.settings import CaptureSettings
from actcache.capture.supports import ROLLOUTS
from actcache.errors import IncompatibleError, InputError
from actcache.models.cost import ModelShape
from actcache.models.lineup import Lineup
from actcache.store import Store
from actcache.study.cells import Finished
from actcache.study.plan import ESTIMATED, STAGES, Assumptions, Study, multiply_adds_of
from actcache.study.work import Cost, Places, ReplayWork, checks, forwards

Ints = npt.NDArray[np.int64]

# Settings that what a pilot tells depends on.
_ALIKE = ("support", "dtype", "codec", "max_new", "device", "strict")


@dataclass(frozen=True)
class Stored:
    """The sequences of a store, and where their events are.

    Attributes:
        lengths: ``[S]``, tokens of each sequence.
        written: ``[S]``, how many of them come after the prompt.
        sequences: ``[E]``, the number of each event's sequence.
        ends: ``[E]``, tokens up to each event.
    """

    lengths: Ints
    written: Ints
    sequences: Ints
    ends: Ints

    @classmethod
    def of(cls, store: Store) -> Stored:
        """Of all segments; sequences without an event are left out."""
        lengths, sequences, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for segment in store.segments:
            own = store.events["sequence"].slice(segment.events.start, segment.n_events).to_numpy()
            numbers, of_event = np.unique(own, return_inverse=True)
            lengths.append(np.diff(segment.row_offsets)[numbers])
            sequences.append(before + of_event)
            before += len(numbers)
        every, of_events = np.concatenate(lengths), np.concatenate(sequences)
        ends = store.events["position"].to_numpy() + 1
        first = np.zeros(len(every), np.int64)
        first[of_events] = ends - store.events["step"].to_numpy()
        return cls(every, every - first, of_events, ends)


def settings_of(store: Store) -> CaptureSettings:
    """The settings that a store was captured with."""
    store.fingerprint.check_captured()
    given = {one.name: getattr(store.fingerprint, one.name, None) for one in fields(CaptureSettings)}
    return CaptureSettings(**{name: value for name, value in given.items() if value is not None})


def replays_of(finished: Finished) -> list[tuple[ReplayWork, Ints]]:
    """What each finished job of a run computed, and of which events."""
    found: dict[tuple[Path, str], tuple[ReplayWork, Ints]] = {}
    for (_, _, late), scored in sorted(finished.items()):
        for one in scored:  # a file of several scopes stands in several places
            found[one.path, late] = ReplayWork.of_key(one.key, late, one.key["mode"]), one.events
    return list(found.values())


def replay_costs(shape: ModelShape, store: Store, finished: Finished) -> list[Cost]:
    """What each finished job of a run took, all checkpoints being of this shape."""
    stored, n_checkpoints = Stored.of(store), len(store.checkpoints)
    return [
        work.cost(shape, n_checkpoints, Places.of(stored.ends[events], stored.sequences[events], str(events[:1])))
        for work, events in replays_of(finished)
    ]


def replay_rate(timings: Mapping[str, Any]) -> float | None:
    """Multiply-adds per second of the run's grid, its loads apart; None where that is not known."""
    grid = timings.get("grid", {})
    took_s = grid.get("elapsed_s", 0.0) - grid.get("load_s", 0.0)
    return grid["multiply_adds"] / took_s if grid.get("multiply_adds") and took_s > 0 else None


def digest_of_results(finished: Finished) -> str:
    """What a run's finished jobs are, by the names of their files."""
    names = sorted({one.path.name for scored in finished.values() for one in scored})
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def truth(study: Study, store: Store, timings: Mapping[str, Any], finished: Finished) -> dict[str, float]:
    """What a finished run took, under the names of :func:`actcache.study.plan.estimate`, as far as it is known.

    Args:
        study: of the run.
        store: the run's.
        timings: what its stages recorded of themselves (see ``RunFolder.timings``).
        finished: its finished jobs. Without one it is not known what was scored.
    """
    stored = Stored.of(store)
    summary = store.summary()
    captured = timings.get("capture", {})
    rows: dict[str, float] = {
        "prompts": store.n_prompts,
        "prompt_tokens": float(sum(study.lengths)),
        "events": len(store),
        "tokens": float(stored.lengths.sum()),
        "rows": summary["rows"],
        "raw_bytes": summary["state_bytes"]["raw"],
        "stored_bytes": summary["state_bytes"]["stored"],
    }
    n_choices = len(store) if study.capture.support == FIXED else int((1 + stored.written).sum())
    shape, n_checkpoints = study.shape, study.n_checkpoints
    replays = replay_costs(shape, store, finished)
    capture = Cost({"capture": forwards(study.shapes, stored.lengths.astype(np.float64), n_choices)})
    checked = checks(capture, n_checkpoints, study.stability, len(stored.lengths), study.n_paired)
    rows |= multiply_adds_of([capture, checked, *replays])
    rows["search_multiply_adds"] = captured.get("search_multiply_adds", np.nan)
    rows["multiply_adds"] += rows["search_multiply_adds"]
    del rows["hooks_multiply_adds"]  # nobody did that
    if not replays:
        for name in ("grid_multiply_adds", "variants_multiply_adds", "multiply_adds"):
            rows[name] = np.nan
    for stage in STAGES:
        rows[f"{stage}_s"] = timings.get(stage, {}).get("elapsed_s", np.nan)
    return {name: rows[name] for name in ESTIMATED if name in rows and not np.isnan(rows[name])}


def learn(study: Study, store: Store, timings: Mapping[str, Any], finished: Finished, source: str) -> Assumptions:
    """Assumptions from a finished run, under which an estimate for its own prompts is near the truth.

    Args:
        study: of that run.
        store: the run's, with at least one event.
        timings: what its stages recorded of themselves.
        finished: its finished jobs.
        source: the run, in words.

    Raises:
        InputError: the store holds no event, or not all prompts.
    """
    n_prompts, stored = store.n_prompts, Stored.of(store)
    with_event = set(store.events["prompt_id"].to_pylist())
    n_eventless = len(set(store.excluded["prompt_id"].to_pylist()) - with_event)
    if len(store) == 0 or len(with_event) + n_eventless != n_prompts:
        raise InputError(
            f"{store.path} holds {len(store)} events and {n_eventless} prompts without one, of {n_prompts} prompts: "
            "to learn from it, it must be complete and have an event"
        )
    steps = stored.written
    known = truth(study, store, timings, finished)
    captured, longest = timings.get("capture", {}), store.fingerprint.max_new - 1.0
    sources = dict.fromkeys(("event_share", "shared_tokens", "eventless_tokens", "compression"), source)
    if len(steps) > 1:
        sources["shared_tokens"] += (
            f", {len(steps)} sequences, standard error {steps.std(ddof=1) / len(steps) ** 0.5:.1f}"
        )
    eventless = longest
    if study.capture.support == ROLLOUTS:  # those that agree are as long as others
        eventless = float(steps.mean())
    elif n_eventless and captured.get("search_choices"):  # none where searches went by full forwards
        # Each search chooses one token more than it shares.
        eventless = (captured["search_choices"] - captured["n_searches"] - int(steps.sum())) / n_eventless
        eventless = min(max(eventless, 0.0), longest)
    elif set(store.excluded["reason"].to_pylist()) - {Outcome.NO_DIVERGENCE.value}:
        sources["eventless_tokens"] = "at most"
    rates, load_s = _rates(timings, known)
    sources |= {"rates": source} if rates else {}
    places = Places.of(stored.ends, stored.sequences)
    first = stored.lengths - stored.written  # tokens of each prompt
    return Assumptions(
        event_share=len(with_event) / n_prompts,
        shared_tokens=float(steps.mean()),
        eventless_tokens=eventless,
        sequences=len(steps) / len(with_event),
        events=len(store) / len(steps),
        places=len(places.places) / len(steps),
        place_tokens=float((stored.ends - first[stored.sequences]).mean()),
        last_tokens=float((places.sequences - first).mean()),
        compression=known["raw_bytes"] / known["stored_bytes"],
        rates=rates,
        search_call_s=captured["search_call_s"] if rates else 0.0,
        shared_counts=_shared_counts(store, steps, n_eventless, eventless),
        load_s=load_s,
        sources=sources,
    )


def _shared_counts(store: Store, steps: Ints, n_eventless: int, eventless: float) -> list[int]:
    """How many prompts of a run shared 0, 1, 2, ... tokens: so many of those with an event as ``steps`` has, and of the
    others ``eventless`` on average."""
    longest = store.fingerprint.max_new - 1
    n_longest = min(n_eventless, store.excluded["reason"].to_pylist().count(Outcome.NO_DIVERGENCE.value))
    n_others = n_eventless - n_longest
    others = (eventless * n_eventless - longest * n_longest) / max(n_others, 1)
    lengths = [*steps.tolist(), *[longest] * n_longest, *[max(0, round(others))] * n_others]
    counts: list[int] = np.bincount(lengths).tolist()
    return counts


def _rates(timings: Mapping[str, Any], known: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """The rates and loads of a run whose stages were all timed; nothing otherwise."""
    if "search_rate" not in timings.get("capture", {}) or "grid" not in timings:
        return {}, {}
    capture, grid = timings["capture"], timings["grid"]
    forwards_s = capture["elapsed_s"] - capture["load_s"] - capture["search_s"]
    replays_s = grid["elapsed_s"] - grid["load_s"]
    replayed = known.get("grid_multiply_adds", 0.0) + known.get("variants_multiply_adds", 0.0)
    if not (forwards_s > 0 and replays_s > 0 and replayed > 0):
        return {}, {}
    rates = {
        "search": capture["search_rate"],
        "capture": known["capture_multiply_adds"] / forwards_s,
        "grid": replayed / replays_s,
    }
    checks_s = timings["stability"]["elapsed_s"] - timings["stability"]["load_s"] if "stability" in timings else 0.0
    # A run that checked nothing tells nothing of it; the same forwards as the capture's are the nearest.
    rates["stability"] = known["stability_multiply_adds"] / checks_s if checks_s > 0 else rates["capture"]
    return rates, {stage: timings[stage]["load_s"] for stage in STAGES if stage in timings}


def check_pilot(lineup: Lineup, paths: Mapping[str, str], capture: CaptureSettings, store: Store) -> None:
    """Whether a run tells anything about what is planned.

    Weights are only read (to digest them) where the run found a checkpoint in another folder than this.

    Args:
        lineup: the pair that is planned for.
        paths: where the run found its checkpoints, by label.
        capture: what is planned.
        store: the run's.

    Raises:
        IncompatibleError: the run is of another pair.
        InputError: the run was made with other settings that its numbers depend on.
    """
    for label, checkpoint in lineup.checkpoints.items():
        found = store.fingerprint.checkpoints.get(label)
        same_place = paths.get(label) == checkpoint.place
        same = found is not None and same_place and found.architecture == checkpoint.config.model_type
        if not same and (found is None or found.differs_in(checkpoint.fingerprint)):
            raise IncompatibleError(
                f"the pilot is of another pair: its {label} is {paths.get(label)}, the plan's {checkpoint.given}; "
                "make a pilot of this pair with 'actcache run --limit 40'",
                field=f"checkpoints.{label}",
            )
    pilot = settings_of(store)
    settings = {name: (getattr(pilot, name), getattr(capture, name)) for name in _ALIKE}
    pairs = ("; ".join(",".join(pair) for pair in of) for of in (store.fingerprint.event_pairs, lineup.pairs))
    for name, (told, planned) in (settings | {"pair": tuple(pairs)}).items():
        if told != planned:
            raise InputError(
                f"the pilot was made with {name} {told}, the plan has {planned}; its numbers depend on it: make a "
                "pilot with the plan's, or plan with the pilot's"
            )
