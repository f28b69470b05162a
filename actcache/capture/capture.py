"""Capture: one forward a checkpoint over packs of sequences decides the events and gathers the rows they need.

The search proposes where the pair diverges; the forward whose states are stored sees every position and decides. Its
own argmaxes name the two tokens, so an event cannot contradict its own diagonal. Where it disagrees with the proposal,
the event moves to where it does diverge (and is captured again, over exactly its own sequence), or the search goes on
from what it chose, or the prompt is excluded with the reason recorded.
"""

from __future__ import annotations

import itertools
import math
import platform
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actcache import carried
from actcache import prompts as prompts_module
from actcache.capture.search import Decoding, Outcome, SearchLimits, find_decoding, propose
from actcache.errors import InputError, NotFiniteError
from actcache.finite import first_no_state, not_finite
from actcache.models.backbone import Backbone
from actcache.models.blocks import block_of, check_boundary
from actcache.models.checkpoint import DTYPES
from actcache.models.gather import gather_rows
from actcache.models.lineup import Lineup
from actcache.models.packing import offsets_of
from actcache.models.probe import check_replayable
from actcache.models.regimes import Regimes
from actcache.progress import OnProgress, Tally, untold
from actcache.prompts import Prompt
from actcache.schema import Fingerprint
from actcache.store import BackgroundWriter, Place, SegmentData, StoreWriter

PAIR = ("pt", "it")
KIND = "first_divergence"
MAX_ROUNDS = 4  # a search that the capture forward contradicts this often in a row hangs on rounding alone
CONTEXT_TOKENS = 48  # of text kept with an event, for people to read


@dataclass(frozen=True)
class CaptureSettings:
    """What a capture computes. Everything here is part of the store's fingerprint.

    Attributes:
        boundaries: b of every state to keep, each in 1..L-1.
        dtype: ``float32`` or ``bfloat16``, of weights and states.
        device: ``cpu`` or ``cuda``.
        max_new: compare at most this many choices a prompt.
        row_selection: ``prefix`` keeps every position's rows (the grid needs them), ``divergence`` the event's alone.
        strict: one sequence a forward, with the model's own attention.
        max_tokens: tokens of one pack.
        shard_prompts: prompts of one segment, the unit that a killed run loses at most.
        codec: of the stored states: ``blosc``, which any Zarr reader has, or ``actcache.bf16_planes`` for bfloat16.
    """

    boundaries: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    max_new: int = 128
    row_selection: str = "prefix"
    strict: bool = False
    max_tokens: int = 4096
    shard_prompts: int = 64
    codec: str = "blosc"


def parse_boundaries(text: str, n_blocks: int) -> tuple[int, ...]:
    """``18``, ``-3`` (of L), a fraction of the depth such as ``0.6``, a list ``5,10,20`` of these, or ``all``.

    Raises:
        InputError: not of that form, or outside 1..L-1.
    """
    if text.strip() == "all":
        return tuple(range(1, n_blocks))
    boundaries = set()
    for part in text.split(","):
        try:
            boundary = block_of(float(part) if "." in part else int(part), n_blocks)
        except ValueError as error:
            raise InputError(f"boundary {part!r} is not a block index, a fraction such as 0.6, or 'all'") from error
        check_boundary(boundary, n_blocks)
        boundaries.add(boundary)
    return tuple(sorted(boundaries))


def capture(
    lineup: Lineup,
    prompts: Sequence[Prompt],
    store: Place,
    settings: CaptureSettings,
    *,
    part: tuple[int, int] = (0, 1),
    load: Callable[[str], Backbone] | None = None,
    on_progress: OnProgress = untold,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Find the events of every prompt and store what their replay needs; resumable by the same call.

    Args:
        lineup: the checkpoints; events are defined on ``pt`` and ``it``.
        prompts: validated prompts.
        store: where the store is or shall be, as in ``open_store``; new, or left by an earlier run of the same capture.
        settings: what to compute.
        part: ``(i, n)`` leaves all segments but every n-th, from the i-th on, to others that capture at the same time.
        load: gives the backbone of a checkpoint by label; by default :func:`load_backbone`.
        on_progress: told of prompts decided (or found committed), after every step of a search and every pack.
        say: told, in one line, what a person should know (packing not possible, for example).

    Raises:
        InputError: see :meth:`Lineup.encode`, or a boundary out of range.
        IncompatibleError: the store belongs to another run; names the field. Prompts may have changed since, those that
            are not captured yet.
        UnsupportedModelError: see :func:`load_backbone`.
        OSError: the disk refuses; nothing half-written stays. Writing goes on beside the forwards, up to two segments
            behind; its failure stops them before the next one.
    """
    for boundary in settings.boundaries:
        check_boundary(boundary, lineup.n_blocks)
    prompt_ids = lineup.encode(prompts, say)
    found = fingerprint(lineup, prompts, settings)
    writer = StoreWriter(store, found, digests_of_segments(prompts, settings.shard_prompts))
    shards = list(_shards(len(prompts), settings.shard_prompts))[part[0] :: part[1]]
    committed = writer.committed
    tally = Tally(sum(len(shard) for _, shard in shards), "prompts", on_progress)
    tally.add(found=sum(len(shard) for name, shard in shards if name in committed))
    left = [(name, shard) for name, shard in shards if name not in committed]
    if not left:
        return
    load = load or (lambda label: load_backbone(lineup, label, settings))
    job = _Capture(lineup, {label: load(label) for label in lineup.labels}, settings, tally, say)
    with BackgroundWriter(writer) as background:
        for name, shard in left:
            if name in writer.committed:  # by another process meanwhile
                tally.add(found=len(shard))
                continue
            segment = job.shard([prompts[i] for i in shard], [prompt_ids[i] for i in shard], background.check)
            background.append(name, segment)


def load_backbone(lineup: Lineup, label: str, settings: CaptureSettings) -> Backbone:
    """A checkpoint's backbone, from its folder; one that could not be replayed is refused before anything is captured.

    Raises:
        UnsupportedModelError: the architecture cannot be replayed from its states, and prefix rows are asked for.
    """
    checkpoint = lineup.checkpoints[label]
    model = checkpoint.load(DTYPES[settings.dtype], settings.device)
    with checkpoint.named():
        if settings.row_selection == "prefix":
            for boundary in sorted({min(settings.boundaries), max(settings.boundaries)}):
                check_replayable(model, boundary)
        return Backbone(model)


def fingerprint(lineup: Lineup, prompts: Sequence[Prompt], settings: CaptureSettings) -> Fingerprint:
    """Everything that the bytes of the store depend on; two equal fingerprints name the same work."""
    return Fingerprint(
        checkpoints={label: checkpoint.fingerprint for label, checkpoint in lineup.checkpoints.items()},
        pair=PAIR,
        # Only where the store would differ from one of an earlier version, which resumes otherwise.
        vocabulary=None if lineup.has_one_vocabulary else "of any checkpoint",
        prompts=prompts_module.digest(prompts),
        n_prompts=len(prompts),
        dtype=settings.dtype,
        boundaries=settings.boundaries,
        row_selection=settings.row_selection,
        width=lineup.width,
        n_blocks=lineup.n_blocks,
        max_new=settings.max_new,
        strict=settings.strict,
        max_tokens=settings.max_tokens,
        shard_prompts=settings.shard_prompts,
        codec=settings.codec,
        device=settings.device,
        processor=platform.machine(),
        versions={name: version(name) for name in ("actcache", "torch", "transformers")},
    )


def digests_of_segments(prompts: Sequence[Prompt], shard_prompts: int) -> dict[str, str]:
    """A digest of the prompts of each segment, by its name."""
    shards = _shards(len(prompts), shard_prompts)
    return {name: prompts_module.digest(prompts[shard.start : shard.stop]) for name, shard in shards}


def _shards(n_prompts: int, shard_prompts: int) -> Iterable[tuple[str, range]]:
    for index, start in enumerate(range(0, n_prompts, shard_prompts)):
        yield f"shard-{index:06d}", range(start, min(start + shard_prompts, n_prompts))


@dataclass(frozen=True)
class _Search:
    """A prompt on its way to an event: its ids, and the tokens that both checkpoints chose after them."""

    index: int
    prompt: Prompt
    ids: list[int]
    shared: list[int]
    proposed: bool = False  # that the pair diverges right after ``shared``
    first_step: int | None = None  # where the search first proposed it
    decided: int = 0  # how many of ``shared`` capture forwards of earlier regimes have decided for good
    n_rounds: int = 0  # how often in a row the capture forward has contradicted the search

    @property
    def sequence(self) -> list[int]:
        return self.ids + self.shared

    def go_on(self, shared: list[int], *, proposed: bool) -> _Search:
        return replace(self, shared=shared, proposed=proposed)


@dataclass(frozen=True)
class _Captured:
    """One event with its rows; the capture forward ran over exactly ``search.sequence``."""

    search: _Search
    tokens: dict[str, int]  # the pair's choices
    gaps: dict[str, float]
    margins: dict[str, float]
    states: dict[tuple[str, int], torch.Tensor]
    final: dict[str, torch.Tensor]

    @property
    def sequence(self) -> list[int]:
        return self.search.sequence

    @property
    def position(self) -> int:
        return len(self.sequence) - 1

    @property
    def proposed_step(self) -> int:
        """Where the search first proposed it; the capture forward may have been the first."""
        step = self.search.first_step
        return len(self.search.shared) if step is None else step


class _Capture:
    def __init__(
        self,
        lineup: Lineup,
        backbones: dict[str, Backbone],
        settings: CaptureSettings,
        tally: Tally,
        say: Callable[[str], None],
    ) -> None:
        self.backbones = backbones
        self.tally = tally
        self.settings = settings
        self.decode = lineup.decode
        self.vocabulary = lineup.vocabulary
        self.special = lineup.special_ids
        self.limits = SearchLimits(settings.max_new, lineup.end_ids, lineup.max_positions)
        self.regimes = Regimes.joined(backbone.regimes for backbone in backbones.values())
        self.decoding = _common_decoding([backbones[label] for label in PAIR], say)
        self.pack_tokens = settings.max_tokens
        if not settings.strict:
            reasons = [reason for backbone in backbones.values() if (reason := backbone.why_not_packable())]
            if reasons:
                say(f"one sequence a forward: {reasons[0]}")
                self.pack_tokens = 0
        else:
            self.pack_tokens = 0

    def shard(
        self, prompts: Sequence[Prompt], prompt_ids: Sequence[list[int]], between: Callable[[], None]
    ) -> SegmentData:
        """Everything that one segment holds; calls ``between`` before each forward, which may raise."""
        searches = [_Search(i, p, ids, []) for i, (p, ids) in enumerate(zip(prompts, prompt_ids, strict=True))]
        captured: list[_Captured] = []
        excluded: dict[int, str] = {}
        n_decided = 0
        while searches:
            proposed = self._propose(searches, excluded)
            searches = []
            for pack in self.regimes.packs([len(search.sequence) for search in proposed], self.pack_tokens):
                between()
                for search, result in self._run_pack([proposed[i] for i in pack]):
                    if isinstance(result, _Captured):
                        captured.append(result)
                    elif isinstance(result, _Search) and result.n_rounds < MAX_ROUNDS:
                        searches.append(result)
                    else:
                        excluded[search.index] = "undecided" if isinstance(result, _Search) else result
                self.tally.add(
                    len(captured) + len(excluded) - n_decided,
                    tokens=sum(map(len, (proposed[i].sequence for i in pack))),
                )
                n_decided = len(captured) + len(excluded)
        self.tally.add(len(prompts) - n_decided)
        captured.sort(key=lambda event: event.search.index)
        return self._segment(captured, [(prompts[index], reason) for index, reason in sorted(excluded.items())])

    def _propose(self, searches: list[_Search], excluded: dict[int, str]) -> list[_Search]:
        """Search from where each prompt stands; those that end without divergence are excluded, the others are what the
        capture forward is to decide on, those of one regime together."""
        open_ended = [search for search in searches if not search.proposed]
        proposals = propose(
            [self.backbones[label] for label in PAIR],
            [search.sequence for search in open_ended],
            [len(search.shared) for search in open_ended],
            self.limits,
            max_tokens=self.settings.max_tokens,
            on_step=lambda tokens, step, n_open: self.tally.add(
                tokens=tokens,
                doing=f"searching: step {step} of at most {self.limits.max_new}, {n_open} still alike",
            ),
            decoding=self.decoding,
            pack_tokens=self.pack_tokens,
            regimes=self.regimes,
            names=[f"prompt {search.prompt.id!r}" for search in open_ended],
            labels=PAIR,
        )
        going = [search for search in searches if search.proposed]
        for search, proposal in zip(open_ended, proposals, strict=True):
            diverged = proposal.outcome is Outcome.DIVERGED
            if diverged or proposal.outcome is Outcome.OPEN:
                going.append(search.go_on(search.shared + proposal.shared, proposed=diverged))
            else:
                excluded[search.index] = proposal.outcome.value
        going = [
            s if s.first_step is not None or not s.proposed else replace(s, first_step=len(s.shared)) for s in going
        ]
        return sorted(going, key=lambda search: (self.regimes.of(len(search.sequence)), search.index))

    @torch.no_grad()
    def _run_pack(self, pack: list[_Search]) -> Iterable[tuple[_Search, _Captured | _Search | str]]:
        """One forward of every checkpoint over these sequences; for each of them an event, where to search on, or the
        reason why the prompt is excluded."""
        bounds = offsets_of([len(search.sequence) for search in pack]).tolist()
        ids = torch.tensor([token for search in pack for token in search.sequence])[None]
        # Positions whose next token is compared: from the last prompt token, or the first one of this regime, to the
        # end of each sequence.
        compared = [
            range(start + len(search.ids) + search.decided - 1, stop)
            for search, start, stop in zip(pack, bounds[:-1], bounds[1:], strict=True)
        ]
        prefix = self.settings.row_selection == "prefix"
        kept = [range(start, stop) if prefix else range(stop - 1, stop) for start, stop in itertools.pairwise(bounds)]
        states: dict[tuple[str, int], torch.Tensor] = {}
        final: dict[str, torch.Tensor] = {}
        for label, backbone in self.backbones.items():
            gathered, hidden = forward_and_gather(backbone, ids, bounds, self.settings.boundaries, _concatenated(kept))
            states.update({(label, boundary): rows for boundary, rows in gathered.items()})
            final[label] = gather_rows(hidden, _concatenated(compared))
        self._check_finite(pack, states, kept, final, compared)
        best = {label: self._best(label, final[label], pack, compared) for label in PAIR}
        rows_of = _consecutive([len(rows) for rows in kept])
        compared_of = _consecutive([len(rows) for rows in compared])
        for search, rows, choices in zip(pack, rows_of, compared_of, strict=True):
            decided = self._decide(
                search, *(best[label][0][choices.start : choices.stop, 0].tolist() for label in PAIR)
            )
            if decided is not None:
                yield search, decided
                continue
            last = choices.stop - 1
            tokens = {label: int(best[label][0][last, 0]) for label in PAIR}
            margins = self._margins({label: final[label][last : last + 1] for label in final}, tokens)
            if (wrong := next((one for one, margin in margins.items() if not math.isfinite(margin)), None)) is not None:
                raise self._not_finite(wrong, "a scored logit", [search], [choices], 0)
            if not margins["pt"] < 0 < margins["it"]:
                yield search, "tie"
            elif not self.vocabulary.issuperset(tokens.values()):
                yield search, "token_outside_vocabulary"
            else:
                gaps = {label: float(best[label][1][last, 0] - best[label][1][last, 1]) for label in PAIR}
                own_states = {key: kept_rows[rows.start : rows.stop] for key, kept_rows in states.items()}
                own_final = {label: hidden[last].cpu() for label, hidden in final.items()}
                yield search, _Captured(search, tokens, gaps, margins, own_states, own_final)

    def _check_finite(
        self,
        pack: Sequence[_Search],
        states: dict[tuple[str, int], torch.Tensor],
        kept: Sequence[range],
        final: dict[str, torch.Tensor],
        compared: Sequence[range],
    ) -> None:
        for (label, boundary), rows in states.items():
            if (row := first_no_state(rows)) is not None:
                raise self._not_finite(label, f"the state at boundary {boundary}", pack, kept, row)
        for label, rows in final.items():
            if (row := first_no_state(rows)) is not None:
                raise self._not_finite(label, "the final state", pack, compared, row)

    def _best(
        self, label: str, final: torch.Tensor, pack: Sequence[_Search], compared: Sequence[range]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            return self.backbones[label].readout.top2(final)
        except NotFiniteError as error:
            raise self._not_finite(label, "a logit", pack, compared, error.row or 0) from error

    def _not_finite(
        self, label: str, what: str, pack: Sequence[_Search], rows: Sequence[range], row: int
    ) -> NotFiniteError:
        """``row`` counts in ``rows`` of the pack's sequences, one after another."""
        search = pack[bisect_right(list(itertools.accumulate(map(len, rows))), row)]
        whose = f"checkpoint {label}, prompt {search.prompt.id!r}"
        return not_finite(whose, what, self.backbones[label], search.sequence)

    def _decide(self, search: _Search, pt: list[int], it: list[int]) -> _Search | str | None:
        """None where the pair shares exactly ``search.shared`` and then differs. Otherwise, the capture forward has
        contradicted the search, or its regime ends: where to go on from, or why the prompt is excluded."""
        search = replace(search, n_rounds=search.n_rounds + 1)
        for step, (a, b) in enumerate(zip(pt, it, strict=True), start=search.decided):
            if a != b:
                # Differing before the end, the event moves; it is taken from a forward over its own sequence.
                moved = search.go_on(search.shared[:step], proposed=True)
                return None if step == len(search.shared) else moved
            if step < len(search.shared) and a == search.shared[step]:
                continue
            length = len(search.ids) + step
            ended = self.limits.after_agreeing(a, length, step + 1)
            if ended is not None:
                return ended.value
            if length == self.regimes.last(length):
                search = replace(search, decided=step + 1, n_rounds=0)
            return search.go_on([*search.shared[:step], a], proposed=False)
        raise AssertionError("the choice after the last shared token always decides")

    def _margins(self, final: dict[str, torch.Tensor], tokens: dict[str, int]) -> dict[str, float]:
        pair_ids = torch.tensor([[tokens["pt"], tokens["it"]]])
        scores = {label: self.backbones[label].readout.scores(hidden, pair_ids)[0] for label, hidden in final.items()}
        return {label: float(score[1] - score[0]) for label, score in scores.items()}

    def _segment(self, captured: list[_Captured], excluded: list[tuple[Prompt, str]]) -> SegmentData:
        width, dtype = next(iter(self.backbones.values())).width, DTYPES[self.settings.dtype]
        lengths = [len(event.sequence) for event in captured]
        keys = [(label, boundary) for label in self.backbones for boundary in self.settings.boundaries]
        empty = torch.empty(0, width, dtype=dtype)
        return SegmentData(
            token_ids=np.array([token for event in captured for token in event.sequence], dtype=np.int32),
            sequence_offsets=offsets_of(lengths).numpy(),
            states={key: torch.cat([empty, *(event.states[key] for event in captured)]) for key in keys},
            final={
                label: torch.cat([empty, *(event.final[label][None] for event in captured)]) for label in self.backbones
            },
            events=self._event_table(captured),
            excluded=pa.table(
                {
                    "prompt_id": pa.array([p.id for p, _ in excluded], pa.string()),
                    "reason": pa.array([reason for _, reason in excluded], pa.string()),
                    "carried": pa.array([carried.encode(p.carried) for p, _ in excluded], pa.string()),
                }
            ),
        )

    def _event_table(self, captured: list[_Captured]) -> pa.Table:
        def column(values: Iterable[Any], kind: pa.DataType) -> pa.Array:
            return pa.array(list(values), kind)

        columns = {
            "event_id": column((f"{e.search.prompt.id}@{e.position}" for e in captured), pa.string()),
            "prompt_id": column((e.search.prompt.id for e in captured), pa.string()),
            "kind": column((KIND for _ in captured), pa.string()),
            "step": column((len(e.search.shared) for e in captured), pa.int32()),
            "proposed_step": column((e.proposed_step for e in captured), pa.int32()),
            "sequence": column(range(len(captured)), pa.int64()),
            "position": column((e.position for e in captured), pa.int64()),
            "y_pt": column((e.tokens["pt"] for e in captured), pa.int64()),
            "y_it": column((e.tokens["it"] for e in captured), pa.int64()),
            "context": column((self.decode(e.sequence[-CONTEXT_TOKENS:]) for e in captured), pa.string()),
            "token_pt": column((self.decode([e.tokens["pt"]]) for e in captured), pa.string()),
            "token_it": column((self.decode([e.tokens["it"]]) for e in captured), pa.string()),
            "carried": column((carried.encode(e.search.prompt.carried) for e in captured), pa.string()),
        }
        for label in PAIR:
            columns[f"special_{label}"] = column((int(e.tokens[label] in self.special) for e in captured), pa.int32())
            columns[f"gap_{label}"] = column((e.gaps[label] for e in captured), pa.float32())
        for label in self.backbones:
            columns[f"margin_{label}"] = column((e.margins[label] for e in captured), pa.float32())
        return pa.table(columns)


def forward_and_gather(
    backbone: Backbone,
    ids: torch.Tensor,
    bounds: Sequence[int],
    boundaries: Sequence[int],
    row_ids: torch.Tensor,
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """One plain forward; the rows at each boundary are gathered as the blocks are entered.

    Args:
        backbone: the checkpoint.
        ids: ``[1, T]`` int64.
        bounds: ``[n + 1]``, where each sequence begins.
        boundaries: blocks whose input is gathered.
        row_ids: ``[n_rows]`` int64 on the CPU, rows of the ``[T, D]`` state.

    Returns:
        rows of every boundary, ``[n_rows, D]`` on the CPU, and the last block's output ``[T, D]`` on the device.
    """
    gathered: dict[int, torch.Tensor] = {}
    on_cuda = backbone.device.type == "cuda"

    def hook_for(boundary: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            state = (args[0] if args else kwargs["hidden_states"])[0]
            # Straight into page-locked memory on CUDA: the copy is queued on the stream and the forward goes on.
            out = torch.empty(len(row_ids), state.shape[1], dtype=state.dtype, pin_memory=on_cuda)
            gathered[boundary] = gather_rows(state, row_ids, out)

        return hook

    handles = [backbone.blocks[b].register_forward_pre_hook(hook_for(b), with_kwargs=True) for b in boundaries]
    try:
        hidden = backbone.forward(bounds, input_ids=ids.to(backbone.device))
    finally:
        for handle in handles:
            handle.remove()
    if on_cuda:
        torch.cuda.current_stream(backbone.device).synchronize()
    return gathered, hidden


def _common_decoding(pair: Sequence[Backbone], say: Callable[[str], None]) -> Decoding:
    """How searches of this pair decode: as both may."""
    order = list(Decoding)
    decoding, reason = max((find_decoding(backbone) for backbone in pair), key=lambda found: order.index(found[0]))
    if decoding is Decoding.EVEN:
        say(f"searches share a batch where their prompts are of one length: {reason}")
    elif decoding is Decoding.FULL:
        say(f"the search goes by full forwards: {reason}")
    return decoding


def _concatenated(rows: Sequence[range]) -> torch.Tensor:
    return torch.tensor([row for part in rows for row in part], dtype=torch.int64)


def _consecutive(lengths: Sequence[int]) -> list[range]:
    """Where parts of these lengths lie when they are put one after another."""
    bounds = offsets_of(lengths).tolist()
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]
