"""The pair, prompts and store that the replay benches work on, what actcache computes there, and what bounds it.

Everything that a bench asks of actcache's replay is asked through :class:`Ours`; the same questions are put to the
rivals (rivals.py) by the benches themselves.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hooks import HookEvent
from measure import Work
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

import actcache
from actcache.analyses.grid import GridSettings, run_grid
from actcache.capture.settings import CaptureSettings
from actcache.models.backbone import Backbone
from actcache.models.blocks import find_anatomy
from actcache.models.checkpoint import DTYPES
from actcache.models.lineup import Lineup
from actcache.models.packing import plan_packs
from actcache.prompts import Prompt, read_prompts
from actcache.replay.edits import Add, Edit, Interpolate, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.modes import MAX_TOKENS
from actcache.store import Store, open_store
from actcache.study.capture import capture

CROSSED = (("pt", "it"), ("it", "pt"))  # (upstream, late)
REPLAY_TARGET = 1.15  # times the limit
READOUTS = GridSettings.readouts
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}  # of a margin, between two ways to compute it
DEMO = Path(actcache.__file__).parent / "demo"
SMOKE_PROMPTS, SMOKE_MAX_NEW = 4, 8


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """Which pair, prompts and precision."""
    parser.add_argument("--pt", type=Path, help="model folder; with --smoke, by default the pair that actcache ships")
    parser.add_argument("--it", type=Path)
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, help="of prompts (default all, with --smoke 4)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--max-new", type=int, help="choices to compare a prompt (default 64, with --smoke 8)")
    parser.add_argument("--smoke", action="store_true", help="sizes of seconds, whatever the pair")


@dataclass
class Study:
    """A pair in memory, and prompts for it."""

    lineup: Lineup
    prompts: Sequence[Prompt]
    prompt_ids: list[list[int]]
    models: dict[str, PreTrainedModel]
    dtype: str
    max_new: int

    @classmethod
    def open(cls, args: argparse.Namespace) -> Study:
        """Load the pair that ``add_pair_arguments`` names, touch every weight; exits where none is named."""
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        if args.smoke and args.pt is None:
            args.pt, args.it, args.prompts = DEMO / "pt", DEMO / "it", DEMO / "prompts.jsonl"
        args.max_new = args.max_new or (SMOKE_MAX_NEW if args.smoke else 64)
        if args.smoke:
            args.limit = args.limit or SMOKE_PROMPTS
        if not (args.pt and args.it and args.prompts):
            sys.exit("--pt, --it and --prompts name the pair; only --smoke does without")
        lineup = Lineup.open({"pt": args.pt, "it": args.it})
        prompts = read_prompts(args.prompts, args.limit)
        models = {label: c.load(DTYPES[args.dtype]) for label, c in lineup.checkpoints.items()}
        study = cls(lineup, prompts, lineup.encode(prompts), models, args.dtype, args.max_new)
        for checkpoint in lineup.checkpoints.values():
            _ = checkpoint.fingerprint  # digests are made once and cached, as in 'actcache run'
        with torch.no_grad():
            for model in models.values():
                model(input_ids=torch.tensor([study.prompt_ids[0]]))
        return study

    @property
    def folders(self) -> dict[str, Path]:
        """Where the checkpoints lie."""
        return {label: checkpoint.path for label, checkpoint in self.lineup.checkpoints.items()}

    @property
    def n_blocks(self) -> int:
        """L."""
        return self.lineup.n_blocks

    def capture(self, folder: Path, boundaries: Sequence[int]) -> Store:
        """Search and capture, from models in memory to a store in ``folder``."""
        settings = CaptureSettings(tuple(sorted(boundaries)), dtype=self.dtype, max_new=self.max_new)
        backbones = {label: Backbone(model) for label, model in self.models.items()}
        capture(self.lineup, self.prompts, folder, settings, watch=lambda label, load: backbones[label])
        store = open_store(folder)
        if not len(store):
            sys.exit(f"no event on {len(self.prompts)} prompts within {self.max_new} choices: give more, or --max-new")
        return store

    def matrices(self, boundary: int = 0) -> Counter[tuple[int, int]]:
        """``(n_in, n_out)`` of every matrix of the blocks from ``boundary`` on, counted."""
        model = self.models["pt"]
        blocks: Any = model.get_submodule(find_anatomy(model).blocks)
        return Counter(shape for block in blocks[boundary:] for shape in _shapes(block))

    @property
    def head(self) -> Counter[tuple[int, int]]:
        """``(n_in, n_out)`` of the head."""
        n_out, n_in = self.models["pt"].get_output_embeddings().weight.shape
        return Counter([(n_in, n_out)])


def segment_lengths(store: Store) -> list[list[int]]:
    """Of the events' sequences, segment by segment."""
    bounds = store.token_ids()[1].tolist()
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    return [lengths[s.events.start : s.events.stop] for s in store.segments if s.n_events]


def events_of(store: Store) -> dict[str, HookEvent]:
    """By prompt id."""
    ids, offsets = store.token_ids()
    return {
        event["prompt_id"]: HookEvent(ids[offsets[i] : offsets[i + 1]].tolist(), event["y_pt"], event["y_it"])
        for i, event in enumerate(store.events.to_pylist())
    }


def _shapes(block: nn.Module) -> Iterable[tuple[int, int]]:
    for module in block.modules():
        for matrix in module.parameters(recurse=False):
            if matrix.ndim == 2:
                a, b = matrix.shape
                yield (a, b) if isinstance(module, Conv1D) else (b, a)


@dataclass(frozen=True)
class PositionEdit:
    """What becomes of the state at an event's own position: a step of ``weight`` towards the other checkpoint's state
    there, then ``vector`` added."""

    weight: float = 0.0
    vector: torch.Tensor | None = None

    def apply(self, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """``[1, T, D]`` states of both checkpoints -> ``own``, edited at the last position."""
        edited = own.clone()
        edited[0, -1] = torch.lerp(own[0, -1], other[0, -1], self.weight)
        if self.vector is not None:
            edited[0, -1] += self.vector
        return edited


def position_edits(n: int, scale: float, width: int, dtype: torch.dtype) -> list[PositionEdit]:
    """Half of them interpolations, half random vectors of length ``scale`` added; always the same."""
    generator = torch.Generator().manual_seed(0)
    steps = [PositionEdit(weight=(i + 1) / (n - n // 2)) for i in range(n - n // 2)]
    vectors = torch.nn.functional.normalize(torch.randn(n // 2, width, generator=generator), dim=1) * scale
    return [*steps, *(PositionEdit(vector=vector) for vector in vectors.to(dtype))]


class Ours:
    """actcache's side of the benches: everything from the store, segment by segment, margins in the order of events."""

    def __init__(self, study: Study, store: Store) -> None:
        self.study, self.store = study, store
        self._load = cache(lambda label: LateStack.load(study.models[label], min(store.boundaries)))
        self.segments = [segment for segment in store.segments if segment.n_events]
        events = store.events
        self.pair_ids = torch.tensor([events["y_pt"].to_pylist(), events["y_it"].to_pylist()]).T

    def late(self, label: str, boundary: int) -> LateStack:
        """The late stack of a checkpoint; those of several boundaries share one."""
        return self._load(label).at(boundary)

    def grid(self, boundary: int, folder: Path, readouts: Sequence[str] = READOUTS) -> Any:
        """Every cell, as a table; its file lies in ``folder``."""
        settings, own = GridSettings((boundary,), readouts=tuple(readouts)), min(self.store.boundaries)
        return run_grid(
            self.store, self.late, folder, settings, load_readout=lambda label: self.late(label, own).readout
        )

    def read(self, boundary: int) -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Rows and offsets of both checkpoints, segment by segment."""
        return [
            {label: self.store.states(label, boundary, segment.events) for label in self.store.checkpoints}
            for segment in self.segments
        ]

    def replay(
        self, boundary: int, states: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]
    ) -> dict[tuple[str, str], torch.Tensor]:
        """(upstream, late) -> ``[E, D]`` final hidden states."""
        labels = self.store.checkpoints
        return {
            (upstream, late): torch.cat([self.late(late, boundary).run(*of[upstream]) for of in states])
            for upstream in labels
            for late in labels
        }

    def replay_work(self, boundary: int, n_replays: int) -> list[Work]:
        """The multiply-adds of replaying every event ``n_replays`` times, in packs."""
        return [
            Work(self.study.matrices(boundary), self._packs(boundary, lengths), n_replays)
            for lengths in segment_lengths(self.store)
        ]

    def forward_work(self) -> list[Work]:
        """Those of a plain forward of both checkpoints over every event's sequence."""
        max_tokens = self.store.fingerprint.max_tokens
        return [
            Work(self.study.matrices(), [sum(lengths[i] for i in pack) for pack in plan_packs(lengths, max_tokens)], 2)
            for lengths in segment_lengths(self.store)
        ]

    def cold_work(self, boundary: int) -> list[Work]:
        """Those of that forward, and of four replays."""
        return self.forward_work() + self.replay_work(boundary, 4)

    def edits_work(self, boundary: int, n_variants: int) -> list[Work]:
        """Those of position edits: every sequence once, up to its last position, and that position once a variant."""
        works = []
        for lengths in segment_lengths(self.store):
            earlier = self._packs(boundary, [length - 1 for length in lengths if length > 1])
            rows = [len(pack) * n_variants for pack in plan_packs([n_variants] * len(lengths), MAX_TOKENS["cpu"])]
            works.append(Work(self.study.matrices(boundary), [*earlier, *rows]))
        return works

    def _packs(self, boundary: int, lengths: Sequence[int]) -> list[int]:
        """Rows of the packs that sequences of these lengths are replayed in."""
        return [sum(lengths[i] for i in pack) for pack in self.late("it", boundary).packs(lengths)]

    def margins(self, late: str, boundary: int, final_hidden: torch.Tensor) -> torch.Tensor:
        """``[E]`` margins of final states of all events, by a late stack's own readout."""
        logits = self.late(late, boundary).readout.scores(final_hidden, self.pair_ids)
        return logits[:, 1] - logits[:, 0]

    def prefix_edit(self, boundary: int, vector: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
        """(upstream, late) -> ``[E]`` margins of the crossed cells with ``vector`` added at every position."""
        variant = Variant("added", (Edit(Add(vector), positions="all"),))
        return {(u, late): self._margins(u, late, boundary, [variant])[:, 0] for u, late in CROSSED}

    def position_edits(self, boundary: int, edits: Sequence[PositionEdit]) -> torch.Tensor:
        """``[E, n]`` margins: upstream PT, each edit at the event's position, late IT; the other state is IT's."""
        variants = [self._variant(i, edit) for i, edit in enumerate(edits)]
        return self._margins("pt", "it", boundary, variants, donor="it")

    def _margins(
        self, upstream: str, late: str, boundary: int, variants: Sequence[Variant], donor: str | None = None
    ) -> torch.Tensor:
        """``[E, n_variants]``, by the late stack's own readout."""
        stack = self.late(late, boundary)
        margins = torch.empty(len(self.store), len(variants))
        for segment in self.segments:
            rows, offsets = self.store.states(upstream, boundary, segment.events)
            donors = {donor: self.store.states(donor, boundary, segment.events)[0]} if donor else {}
            for sequences, numbers, final_hidden in stack.replay(stack.prepare(rows, offsets, variants, donors=donors)):
                events = segment.events.start + sequences
                logits = stack.readout.scores(final_hidden, self.pair_ids[events])
                margins[events, numbers] = logits[:, 1] - logits[:, 0]
        return margins

    def _variant(self, index: int, edit: PositionEdit) -> Variant:
        what = Interpolate("it", edit.weight) if edit.vector is None else Add(edit.vector)
        return Variant(str(index), (Edit(what, positions="last"),))
