"""Plan: what a study will take, before it runs: tokens, bytes, multiply-adds, memory and time.

From configs, the tokenizer and a prompts file alone; a model is built without weights, on torch's meta device, to count
its parameters exactly. What no config tells, such as how many tokens a pair shares before it diverges, is a stated
assumption, or taken from a small earlier run of the pair (finished.py). Knows models' shapes; knows no stores, no
command line and no folders of runs.

Multiply-adds are those of blocks (see :class:`ModelShape`), and of the head wherever the code asks for whole-vocabulary
logits; the two logits of an event's own tokens are not counted. The last block is counted whole, though packed replay
computes no more of it than keys and values but at the last position.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from actcache.capture.settings import CaptureSettings
from actcache.errors import InputError
from actcache.models.checkpoint import DTYPES
from actcache.models.cost import ModelShape, Numbers
from actcache.models.lineup import Lineup
from actcache.models.readout import MAX_LOGITS_AT_ONCE
from actcache.models.regimes import ONE_REGIME, Regimes
from actcache.replay.modes import MAX_TOKENS, TOKENS_OF_A_WORKER
from actcache.replay.workers import share_threads
from actcache.study.work import Cost, ReplayWork, total

# Where no pilot says otherwise. The two pairs tried at hand shared 6 tokens (the shipped one) and 14 (SmolLM2) before
# they diverged; that every prompt diverges is what costs most in all but the search.
SHARED_TOKENS = 10.0
EVENT_SHARE = 1.0
# Raw bytes over stored ones, as measured on the states of SmolLM2 and Gemma 3.
COMPRESSION = {
    ("float32", "blosc"): 1.09,
    ("bfloat16", "blosc"): 1.23,
    ("bfloat16", "actcache.bf16_planes"): 1.49,
}
# Bytes that a tokenizer takes for each token of its vocabulary, measured on SmolLM2's.
TOKENIZER_BYTES = 700
STAGES = ("capture", "stability", "grid")
_PARTS_OF = {"capture": ("search", "capture"), "stability": ("stability",), "grid": ("grid", "variants")}
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

N_SEARCHED = 2  # checkpoints that a search and a check of stability run: the pair

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
    """

    shapes: Mapping[str, ModelShape]
    lengths: Sequence[int]
    capture: CaptureSettings
    work: Sequence[ReplayWork] = ()
    stability: Sequence[int | None] = ()

    @property
    def shape(self) -> ModelShape:
        """Of every checkpoint."""
        return next(iter(self.shapes.values()))

    @cached_property
    def search_batches(self) -> list[tuple[int, int]]:
        """See :func:`search_batches`."""
        regimes = Regimes.joined(shape.regimes for shape in self.shapes.values())
        return search_batches(self.lengths, self.capture, regimes)

    @property
    def itemsize(self) -> int:
        """Bytes of one value of a state or weight."""
        return DTYPES[self.capture.dtype].itemsize

    @property
    def n_checkpoints(self) -> int:
        """K."""
        return len(self.shapes)


@dataclass(frozen=True)
class Assumptions:
    """What configs and prompts do not tell.

    Attributes:
        event_share: prompts with an event, of all.
        shared_tokens: mean number of tokens that both checkpoints choose before an event.
        eventless_tokens: the same for a prompt that has none.
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


def default_assumptions(capture: CaptureSettings) -> Assumptions:
    """Those for a pair of which nothing is known yet; ``rates`` are left to the caller."""
    longest = capture.max_new - 1.0
    return Assumptions(
        event_share=EVENT_SHARE,
        shared_tokens=min(SHARED_TOKENS, longest),
        eventless_tokens=longest,
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
    sequences = prompts + assumed.shared_tokens
    share = assumed.event_share
    rows: dict[str, float] = {
        "prompts": len(prompts),
        "prompt_tokens": float(prompts.sum()),
        "events": share * len(prompts),
        "tokens": share * float(sequences.sum()),
    }
    rows |= _stored(study, rows["tokens"], rows["events"])
    rows["stored_bytes"] = rows["raw_bytes"] / assumed.compression
    rows["search_multiply_adds"] = _search(study, assumed, study.search_batches)
    replays = [one.cost(study.shape, study.n_checkpoints, sequences, share) for one in study.work]
    n_choices = rows["events"] * (1 + assumed.shared_tokens)
    rows |= multiply_adds_of(study, sequences, share, n_choices, replays, rows["events"])
    rows["multiply_adds"] = together(rows)
    rows["hooks_multiply_adds"] += _search(study, assumed, [(length, 1) for length in study.lengths])
    rows |= _memory(study, assumed)
    for stage in assumed.rates and STAGES:
        rows[f"{stage}_s"] = assumed.load_s.get(stage, 0.0) + sum(
            rows[f"{part}_multiply_adds"] / assumed.rates["grid" if part == "variants" else part]
            for part in _PARTS_OF[stage]
        )
    if assumed.rates:
        rows["capture_s"] += assumed.search_call_s * _search_calls(study, assumed)
    return {name: rows[name] for name in ESTIMATED if name in rows}


def _stored(study: Study, n_tokens: float, n_events: float) -> dict[str, float]:
    kept = n_tokens if study.capture.row_selection == "prefix" else n_events
    rows = round(kept) * study.n_checkpoints * len(study.capture.boundaries)
    return {"rows": rows, "raw_bytes": rows * study.shape.width * study.itemsize}


def _search(study: Study, assumed: Assumptions, batches: Sequence[tuple[int, int]]) -> float:
    """Multiply-adds of the pair's searches: each prompt's tokens, padded to the longest of its batch, then one
    token a step; whole-vocabulary logits each time."""
    steps = assumed.event_share * assumed.shared_tokens + (1 - assumed.event_share) * assumed.eventless_tokens
    total, shape = 0.0, study.shape
    for longest, n in batches:
        total += n * shape.products(np.array([longest], np.float64))
        # What attention does grows with every step; the one half-way stands for all.
        total += n * steps * shape.step_products(np.array([longest + (steps - 1) / 2]))
        total += n * (1 + steps) * shape.head_products
    return N_SEARCHED * total


def _search_calls(study: Study, assumed: Assumptions) -> float:
    """Expected number of forwards of all searches: a batch goes on until the last of its prompts is decided."""
    counts = np.asarray(assumed.shared_counts, np.float64)
    if not counts.sum():
        return 0.0
    decided = np.cumsum(counts) / counts.sum()  # share of prompts that shared at most 0, 1, 2, ... tokens
    batches = study.search_batches
    return N_SEARCHED * sum(1 + float((1 - decided**n).sum()) for _, n in batches)


def search_batches(
    lengths: Sequence[int], capture: CaptureSettings, regimes: Regimes = ONE_REGIME
) -> list[tuple[int, int]]:
    """``(longest prompt, number of prompts)`` of every batch that the searches begin with."""
    batches = []
    for start in range(0, len(lengths), capture.shard_prompts):
        ordered = sorted(lengths[start : start + capture.shard_prompts])
        packs = regimes.packs(ordered, capture.max_tokens, padded=True)
        batches += [(ordered[pack[-1]], len(pack)) for pack in packs]
    return batches


def multiply_adds_of(
    study: Study, sequences: Numbers, share: float, n_choices: float, replays: Iterable[Cost], n_events: float
) -> dict[str, float]:
    """Of capture, stability, grid, variants and of forward hooks that score the same cells: over ``share`` of these
    sequences, with ``n_choices`` compared in all, and replays that cost so much."""
    shape, n_checkpoints = study.shape, study.n_checkpoints
    forwards = n_checkpoints * (share * shape.products(sequences) + n_choices * shape.head_products)
    # Strict and packed, over the part of the events that is checked in each dtype.
    n_checks = sum(n_events if n is None else min(n, n_events) for n in study.stability)
    parts = {
        "capture": forwards,
        "stability": 2 * N_SEARCHED / n_checkpoints * forwards * n_checks / n_events if n_events else 0.0,
        **dict.fromkeys(("grid", "variants", "hooks"), 0.0),
    }
    parts |= total(replays)
    return {f"{part}_multiply_adds": products for part, products in parts.items()}


def together(rows: Mapping[str, float]) -> float:
    """Multiply-adds of all parts of a study."""
    return sum(rows[f"{part}_multiply_adds"] for part in ("search", "capture", "stability", "grid", "variants"))


def _memory(study: Study, assumed: Assumptions) -> dict[str, float]:
    """Bytes above what the imports take: tokenizers, weights, the largest forward, and the states of the segments on
    their way."""
    shape, capture, size = study.shape, study.capture, study.itemsize
    longest = max(study.lengths) + assumed.shared_tokens
    segment_tokens = min(len(study.lengths), capture.shard_prompts) * (
        float(np.mean(study.lengths)) + assumed.shared_tokens
    )
    pack_tokens = max(longest, 0 if capture.strict else min(capture.max_tokens, segment_tokens))
    # Residual stream, its norm and the attention's input and output; an MLP's gate, input and their product.
    forward = pack_tokens * (4 * shape.width + 3 * shape.widest_side) * size
    # Logits are float32 whatever the model is, and so is the copy of the head that makes them.
    logits = 4 * min(MAX_LOGITS_AT_ONCE, max(pack_tokens, 1) * shape.vocab_size)
    head = 0 if size == 4 else 4 * shape.head_products
    cache = max(n * (at + assumed.shared_tokens) for at, n in study.search_batches)
    # A cache grows by a copy with every token, and leaves holes as large as itself behind.
    cached = 2 * N_SEARCHED * cache * shape.n_blocks * shape.cache_width * size
    tokenizers = study.n_checkpoints * TOKENIZER_BYTES * shape.vocab_size
    states = segment_tokens * study.n_checkpoints * shape.width * size
    # One segment is computed and concatenated while up to two are written.
    kept = 4 * states * len(capture.boundaries) if capture.row_selection == "prefix" else 0
    out = {
        "capture_memory_bytes": tokenizers
        + study.n_checkpoints * shape.n_parameters * size
        + max(cached, forward)
        + logits
        + head
        + kept
    }
    if study.work:
        first = min(one.boundary for one in study.work)
        late = sum(shape.block_parameters[first:]) + shape.readout_parameters
        on_cpu = capture.device == "cpu"
        n_workers = share_threads(round(segment_tokens) // TOKENS_OF_A_WORKER)[0] if on_cpu else 1
        at_once = min(n_workers * MAX_TOKENS[capture.device], segment_tokens)
        single = all(one.mode == "single" for one in study.work)
        replayed = longest if single else max(longest, at_once)
        forwards = forward * replayed / pack_tokens
        # Cells and variants that differ at position p alone share the late keys and values of a pack.
        shared = any(one.mode == "packed" and (one.n_last or one.n_crossed(study.n_checkpoints)) for one in study.work)
        keys = shared * replayed * (shape.n_blocks - first) * shape.cache_width * size
        weights = study.n_checkpoints * late * size
        out["grid_memory_bytes"] = tokenizers + weights + forwards + keys + logits + head + 2 * states
    return out


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
        numbers += [assumed.search_call_s, *assumed.shared_counts, *assumed.rates.values(), *assumed.load_s.values()]
        if assumed.rates and assumed.rates.keys() != set(RATED):
            raise ValueError(f"its rates are of {', '.join(assumed.rates)}, not of {', '.join(RATED)}")
        if not all(isinstance(number, float | int) and number >= 0 for number in numbers):
            raise ValueError("a number in it is none, or negative")
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where} is not a plan: {error}; make it anew with 'actcache plan --out RUN'") from error
    return assumed
