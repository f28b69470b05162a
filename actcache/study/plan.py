"""Plan: what a study will take, before it runs: tokens, bytes, multiply-adds, memory and time.

From configs, the tokenizer and a prompts file alone; a model is built without weights, on torch's meta device, to count
its parameters exactly. The estimate is the sum of what the jobs to come cost (work.py). What no config tells, such as
how many tokens a pair shares before it diverges, is a stated assumption, or taken from a small earlier run of the pair
(finished.py). Knows models' shapes; knows no stores, no command line and no folders of runs.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch

from actcache.capture.settings import CaptureSettings
from actcache.errors import InputError
from actcache.models.checkpoint import DTYPES
from actcache.models.cost import ModelShape
from actcache.models.lineup import Lineup
from actcache.schema import ROLES
from actcache.study.work import CaptureWork, Cost, Expected, ReplayWork, checks, replay_memory, total

# Raw bytes over stored ones, as measured on the states of SmolLM2 and Gemma 3.
COMPRESSION = {
    ("float32", "blosc"): 1.09,
    ("bfloat16", "blosc"): 1.23,
    ("bfloat16", "actcache.bf16_planes"): 1.49,
}
STAGES = ("capture", "stability", "grid")
_PARTS_OF = {"capture": ("search", "capture"), "stability": ("stability",), "grid": ("grid", "variants")}
PARTS = tuple(part for parts in _PARTS_OF.values() for part in parts)
RATED = ("search", "capture", "stability", "grid")  # variants run at the grid's rate
# Rows of these are counts, bytes and seconds, in the order in which they are shown.
ESTIMATED = (
    "prompts",
    "prompt_tokens",
    "events",
    "tokens",
    "rows",
    "raw_bytes",
    "stored_bytes",
    "search_multiply_adds",
    "capture_multiply_adds",
    "stability_multiply_adds",
    "grid_multiply_adds",
    "variants_multiply_adds",
    "multiply_adds",
    "hooks_multiply_adds",
    "capture_memory_bytes",
    "grid_memory_bytes",
    "capture_s",
    "stability_s",
    "grid_s",
)

# ---- what is planned ----


@dataclass(frozen=True)
class Study:
    """One pair, its prompts and everything that shall be computed over them.

    Attributes:
        shapes: by label; all of one architecture.
        lengths: tokens of every prompt, in order.
        capture: settings of the capture.
        work: cells to score.
        stability: for each dtype that stability is checked in, how many events, None for all.
        pairs: labels of the checkpoints whose choices define events, each two.
    """

    shapes: Mapping[str, ModelShape]
    lengths: Sequence[int]
    capture: CaptureSettings
    work: Sequence[ReplayWork] = ()
    stability: Sequence[int | None] = ()
    pairs: Sequence[Sequence[str]] = (ROLES,)

    @property
    def shape(self) -> ModelShape:
        """Of every checkpoint."""
        return next(iter(self.shapes.values()))

    @functools.cached_property
    def captured(self) -> CaptureWork:
        """What the capture computes."""
        return CaptureWork(self.lengths, self.capture, n_paired=self.n_paired)

    @property
    def n_paired(self) -> int:
        """How many checkpoints are in pairs."""
        return len({label for pair in self.pairs for label in pair})

    @property
    def n_checkpoints(self) -> int:
        """K."""
        return len(self.shapes)


@dataclass(frozen=True)
class Assumptions:
    """What configs and prompts do not tell.

    Attributes:
        event_share, shared_tokens, eventless_tokens, sequences, events, places, place_tokens, last_tokens: see
            :class:`actcache.study.work.Expected`.
        compression: raw bytes of states over stored ones.
        rates: multiply-adds per second of the parts ``RATED``.
        search_call_s: seconds that a search's forward takes beside its multiply-adds; where few sequences are left in
            a batch, it is the weights that take time.
        shared_counts: how many prompts shared 0, 1, 2, ... tokens, which says how long a batch of searches lasts.
        load_s: seconds to load what a stage runs, by stage.
        sources: where each of these is from, in words, by name.
    """

    event_share: float
    shared_tokens: float
    eventless_tokens: float
    compression: float
    rates: Mapping[str, float] = field(default_factory=dict)
    search_call_s: float = 0.0
    shared_counts: Sequence[int] = ()
    load_s: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    sequences: float = 1.0
    events: float = 1.0
    places: float = 1.0
    place_tokens: float | None = None
    last_tokens: float | None = None

    @property
    def expected(self) -> Expected:
        """How searches end."""
        return Expected(**{one.name: getattr(self, one.name) for one in fields(Expected)})


def default_assumptions(capture: CaptureSettings, n_pairs: int = 1) -> Assumptions:
    """Those for pairs of which nothing is known yet; ``rates`` are left to the caller."""
    return Assumptions(
        **asdict(Expected.of(capture, n_pairs)),
        compression=COMPRESSION.get((capture.dtype, capture.codec), 1.0),
        sources=dict.fromkeys(("event_share", "shared_tokens", "eventless_tokens", "compression"), "default"),
    )


def shapes_of(lineup: Lineup) -> dict[str, ModelShape]:
    """The shape of every checkpoint, by label."""
    return {label: ModelShape.of_checkpoint(checkpoint) for label, checkpoint in lineup.checkpoints.items()}


# ---- the estimate ----


def estimate(study: Study, assumed: Assumptions) -> dict[str, float]:
    """Expected values of the rows ``ESTIMATED``; those of time are left out without rates."""
    prompts = np.asarray(study.lengths, np.float64)
    expected = assumed.expected
    n_sequences = expected.all_sequences * len(prompts)
    n_events = expected.events * n_sequences
    n_tokens = expected.all_sequences * float((prompts + assumed.shared_tokens).sum())
    rows: dict[str, float] = {
        "prompts": len(prompts),
        "prompt_tokens": float(prompts.sum()),
        "events": n_events,
        "tokens": n_tokens,
        **stored_of(study, n_tokens, n_events),
    }
    rows["stored_bytes"] = rows["raw_bytes"] / assumed.compression
    capture = study.captured.cost(study.shapes, expected)
    replays = [one.cost(study.shape, study.n_checkpoints, expected.places_of(prompts)) for one in study.work]
    checked = checks(capture, study.n_checkpoints, study.stability, n_sequences, study.n_paired)
    rows |= multiply_adds_of([capture, checked, *replays])
    rows["capture_memory_bytes"] = study.captured.memory(study.shapes, expected)
    if study.work:
        rows["grid_memory_bytes"] = replay_memory(study.work, study.captured, study.shapes, expected)
    for stage in assumed.rates and STAGES:
        rows[f"{stage}_s"] = assumed.load_s.get(stage, 0.0) + sum(
            rows[f"{part}_multiply_adds"] / assumed.rates["grid" if part == "variants" else part]
            for part in _PARTS_OF[stage]
        )
    if assumed.rates:
        rows["capture_s"] += assumed.search_call_s * study.captured.search_calls(study.shapes, assumed.shared_counts)
    return {name: rows[name] for name in ESTIMATED if name in rows}


def stored_of(study: Study, n_tokens: float, n_events: float) -> dict[str, float]:
    """Rows of a study, and their bytes."""
    kept = n_tokens if study.capture.row_selection == "prefix" else n_events
    rows = round(kept) * study.n_checkpoints * len(study.capture.boundaries)
    return {"rows": rows, "raw_bytes": rows * study.shape.width * DTYPES[study.capture.dtype].itemsize}


def multiply_adds_of(costs: Iterable[Cost]) -> dict[str, float]:
    """The sum of costs by part, and of the parts; by forward hooks, too."""
    parts = dict.fromkeys((*PARTS, "hooks"), 0.0) | total(costs)
    together = sum(parts[part] for part in PARTS)
    return {f"{part}_multiply_adds": products for part, products in parts.items()} | {"multiply_adds": together}


# ---- the machine ----


def measure_rate(shape: ModelShape, n_tokens: int, dtype: str, device: str, seconds: float = 1.0) -> float:
    """Multiply-adds per second of this machine's matrix product: ``n_tokens`` rows with the model's widest matrix."""
    n_rows, n_columns = shape.widest
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(n_tokens, n_columns, generator=generator).to(device, DTYPES[dtype])
    right = torch.randn(n_columns, n_rows, generator=generator).to(device, DTYPES[dtype])
    times: list[float] = []
    end = time.perf_counter() + seconds
    for number in itertools.count():
        start = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        stop = time.perf_counter()
        if number:  # the first one warms up
            times.append(stop - start)
        if stop > end and times:
            break
    return n_tokens * n_rows * n_columns / float(np.median(times))


def as_json(assumed: Assumptions) -> dict[str, Any]:
    """Plain values; :func:`assumptions_from_json` is the way back."""
    return asdict(assumed)


def assumptions_from_json(value: Any, where: str) -> Assumptions:
    """Raise InputError where this is not what :func:`as_json` gave."""
    try:
        assumed = Assumptions(**value)
        if assumed.rates and "stability" not in assumed.rates:  # earlier versions left this stage out
            assumed = replace(assumed, rates={**assumed.rates, "stability": assumed.rates["capture"]})
        numbers = [assumed.event_share, assumed.shared_tokens, assumed.eventless_tokens, assumed.compression]
        numbers += [assumed.sequences, assumed.events, assumed.places, assumed.place_tokens or 0]
        numbers += [
            assumed.last_tokens or 0,
            assumed.search_call_s,
            *assumed.shared_counts,
            *assumed.rates.values(),
            *assumed.load_s.values(),
        ]
        if assumed.rates and assumed.rates.keys() != set(RATED):
            raise ValueError(f"its rates are of {', '.join(assumed.rates)}, not of {', '.join(RATED)}")
        if not all(isinstance(number, float | int) and number >= 0 for number in numbers):
            raise ValueError("a number in it is none, or negative")
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} is not a plan: {error}; make it anew with 'actcache plan --out RUN'") from error
    return assumed
