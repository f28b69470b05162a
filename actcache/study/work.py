"""Work: what jobs compute, as far as their cost depends on it, and that cost.

A plan is the sum of the costs of what is to come; the truth is the same sum over what is finished. Multiply-adds are
those of blocks (see :class:`actcache.models.cost.ModelShape`), and of the head wherever the code asks for
whole-vocabulary logits; the two logits of an event's own tokens are not counted. The last block is counted whole,
though packed replay computes no more of it than keys and values but at the last position. Knows models' shapes; knows
no stores and no files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from actcache.capture.residency import TOGETHER
from actcache.capture.search import evenly, n_drafted, n_drafts
from actcache.capture.settings import CaptureSettings
from actcache.capture.supports import ROLLOUTS
from actcache.models.checkpoint import DTYPES
from actcache.models.cost import ModelShape, Numbers
from actcache.models.readout import MAX_LOGITS_AT_ONCE, head_at_once
from actcache.models.regimes import Regimes
from actcache.replay.edits import PLAIN
from actcache.replay.modes import MAX_TOKENS, TOKENS_OF_A_WORKER
from actcache.replay.workers import share_threads
from actcache.study.results import scopes_of
from actcache.study.scores import whose_head


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of blocks and heads, by part of a study.

    Attributes:
        parts: part -> multiply-adds, ``hooks`` those of forward hooks that score the same.
        shared: what several jobs need and one computes: name -> (part, multiply-adds).
    """

    parts: Mapping[str, float]
    shared: Mapping[tuple[str, ...], tuple[str, float]] = field(default_factory=dict)


def total(costs: Iterable[Cost]) -> dict[str, float]:
    """The sum of costs by part, what is shared counted once."""
    parts: dict[str, float] = {}
    shared: dict[tuple[str, ...], tuple[str, float]] = {}
    for cost in costs:
        shared |= cost.shared
        for part, products in cost.parts.items():
            parts[part] = parts.get(part, 0.0) + products
    for part, products in shared.values():
        parts[part] = parts.get(part, 0.0) + products
    return parts


# ---- capture ----

# Where nothing says otherwise. The two pairs tried at hand shared 6 tokens (the shipped one) and 14 (SmolLM2) before
# they diverged; that every prompt diverges is what costs most in all but the search.
SHARED_TOKENS = 10.0
EVENT_SHARE = 1.0
# Of rollouts of 64 tokens of the shipped pair: events and places of each, and steps of a place and of the last event.
ROLLOUT_EVENTS, ROLLOUT_PLACES = 3.6, 2.8
PLACE_SHARE, LAST_SHARE = 0.3, 0.6  # of the tokens of a rollout
# Bytes that a tokenizer takes for each token of its vocabulary, measured on SmolLM2's.
TOKENIZER_BYTES = 700


@dataclass(frozen=True)
class Expected:
    """How searches end, and what of the sequences that they leave is scored.

    Attributes:
        event_share: prompts with an event, of all.
        shared_tokens: mean number of tokens between a prompt and the end of its sequence: those that both checkpoints
            choose before a first divergence, or those of a rollout.
        eventless_tokens: the same for a prompt that has no event.
        sequences: of a prompt that has an event.
        events: of a sequence.
        places: of a sequence, at which its events are: two kinds may share one.
        place_tokens: mean number of tokens between the prompt and a place; None for all of the sequence's.
        last_tokens: the same for the last place of a sequence.
    """

    event_share: float
    shared_tokens: float
    eventless_tokens: float
    sequences: float = 1.0
    events: float = 1.0
    places: float = 1.0
    place_tokens: float | None = None
    last_tokens: float | None = None

    @classmethod
    def of(cls, settings: CaptureSettings, n_pairs: int = 1) -> Expected:
        """Where nothing is known yet."""
        longest = settings.max_new - 1.0
        if settings.support != ROLLOUTS:
            return cls(EVENT_SHARE, min(SHARED_TOKENS, longest), longest, events=n_pairs, places=n_pairs)
        steps = PLACE_SHARE * longest, LAST_SHARE * longest
        return cls(EVENT_SHARE, longest, longest, 2.0, n_pairs * ROLLOUT_EVENTS, n_pairs * ROLLOUT_PLACES, *steps)

    @property
    def all_sequences(self) -> float:
        """Of all prompts, those without an event too."""
        return self.event_share * self.sequences

    def searched_tokens(self, length: Callable[[float], float] = float) -> float:
        """Mean number of tokens that a search runs behind a prompt, where it runs ``length`` of those shared."""
        share = self.event_share
        return share * length(self.shared_tokens) + (1 - share) * length(self.eventless_tokens)

    def places_of(self, prompts: Numbers, name: str = "") -> Places:
        """What is replayed of prompts of so many tokens."""
        place, last = (self.shared_tokens if n is None else n for n in (self.place_tokens, self.last_tokens))
        n = self.all_sequences
        return Places(
            *(prompts + last, prompts + place, prompts + place), (n, n * self.places, n * self.events), name=name
        )


@dataclass(frozen=True)
class CaptureWork:
    """What capture jobs compute.

    Attributes:
        lengths: tokens of every prompt, in order; of given events, of every sequence.
        settings: of the capture.
        n_given: how many events are given; None where they are searched for.
        n_paired: checkpoints that are searched: those in pairs.
    """

    lengths: Sequence[int]
    settings: CaptureSettings
    n_given: int | None = None
    n_paired: int = 2
    _batches: dict[Regimes, list[list[list[tuple[int, int]]]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def cost(self, shapes: Mapping[str, ModelShape], expected: Expected) -> Cost:
        """What it takes with these checkpoints, the pair among them: searches, and a forward of each over every event's
        sequence, with whole-vocabulary logits wherever choices are compared."""
        shape, prompts = _first(shapes), np.asarray(self.lengths, np.float64)
        if self.n_given is not None:
            return Cost({"capture": forwards(shapes, prompts, self.n_given)})
        sequences = prompts + expected.shared_tokens
        # Rollouts go through all checkpoints whether they disagree or not.
        n = expected.sequences if self.settings.support == ROLLOUTS else expected.all_sequences
        return Cost(
            {
                "search": self._searches(shape, expected, self.beginnings(shapes), self.drafted),
                "capture": forwards(shapes, sequences, n * len(prompts) * (1 + expected.shared_tokens), n),
                "hooks": self._searches(shape, expected, [(length, 1) for length in self.lengths]),
            }
        )

    def drafted(self, n_shared: float) -> float:
        """Tokens that a search runs behind a prompt, of which so many are shared; a rollout is no search."""
        return n_shared if self.settings.support == ROLLOUTS else min(n_drafted(n_shared), self.settings.max_new - 1.0)

    def _searches(
        self,
        shape: ModelShape,
        expected: Expected,
        batches: Sequence[tuple[int, int]],
        length: Callable[[float], float] = float,
    ) -> float:
        """Multiply-adds of the searches: each prompt's tokens, padded to the longest of its batch, then as many as
        ``length`` says where so many are shared; whole-vocabulary logits each time."""
        steps = expected.searched_tokens(length)
        of_length: Counter[int] = Counter()
        for longest, n in batches:
            of_length[longest] += n
        products = 0.0
        for longest, n in of_length.items():
            products += n * shape.products(np.array([longest], np.float64))
            # What attention does grows with every step; the one half-way stands for all.
            products += n * steps * shape.step_products(np.array([longest + (steps - 1) / 2]))
            products += n * (1 + steps) * shape.head_products
        return self.n_paired * products

    def batches(self, shapes: Mapping[str, ModelShape]) -> list[tuple[int, int]]:
        """``(longest prompt, number of prompts)`` of every batch that the searches would fill one after another."""
        return [(parts[-1][0], sum(n for _, n in parts)) for of in self._together(shapes) for parts in of]

    def beginnings(self, shapes: Mapping[str, ModelShape]) -> list[tuple[int, int]]:
        """The same of what begins together, with little padding; rollouts, which are no searches, fill batches."""
        if self.settings.support == ROLLOUTS:
            return self.batches(shapes)
        return [part for of in self._together(shapes) for parts in of for part in parts]

    def _together(self, shapes: Mapping[str, ModelShape]) -> list[list[list[tuple[int, int]]]]:
        """Of the prompts that are searched together, the batches, and the parts that each begins in."""
        regimes = Regimes.joined(shape.regimes for shape in shapes.values())
        if regimes in self._batches:
            return self._batches[regimes]
        n = self.settings.shard_prompts
        together, n = [], n * max(1, TOGETHER // n)
        for start in range(0, len(self.lengths), n):
            ordered = sorted(self.lengths[start : start + n])
            batches = []
            for pack in regimes.packs(ordered, self.settings.max_tokens, padded=True):
                own = ordered[pack.start : pack.stop]
                batches.append([(own[part[-1]], len(part)) for part in evenly(own)])
            together.append(batches)
        self._batches[regimes] = together
        return together

    def search_calls(self, shapes: Mapping[str, ModelShape], shared_counts: Sequence[int]) -> float:
        """Expected number of forwards of all searches, where 0, 1, 2, ... tokens are shared so often. The next batch
        joins when half of one are decided; the last one goes on until the last of all prompts is. One checkpoint drafts
        token by token, the others read each draft."""
        counts = np.asarray(shared_counts, np.float64)
        if not counts.sum():
            return 0.0
        decided = np.cumsum(counts) / counts.sum()  # share of prompts that shared at most 0, 1, 2, ... tokens

        def longest(n: int) -> float:
            return self.drafted(float((1 - decided**n).sum()))

        if self.settings.support == ROLLOUTS:  # each writes its own
            return self.n_paired * sum(1 + longest(n) for _, n in self.batches(shapes))
        half = self.drafted(float(np.searchsorted(decided, 0.5)))
        drafted = []
        for batches in self._together(shapes):
            n = sum(n for parts in batches for _, n in parts)
            drafted += [half] * (len(batches) - 1) + [longest(n)]
        begun = self.n_paired * len(self.beginnings(shapes))
        return begun + sum(tokens + (self.n_paired - 1) * n_drafts(tokens) for tokens in drafted)

    def memory(self, shapes: Mapping[str, ModelShape], expected: Expected) -> float:
        """Bytes at most, above what the imports take: tokenizers, weights, the largest forward or the caches of a
        search, and the states of the segments on their way."""
        shape, size = _first(shapes), self.itemsize
        cache = max(n * (at + expected.shared_tokens) for at, n in self.batches(shapes))
        # A cache grows by a copy with every token, and leaves holes as large as itself behind.
        cached = 2 * self.n_paired * cache * shape.n_blocks * shape.cache_width * size
        # One segment is computed and concatenated while up to two are written.
        prefix = self.settings.row_selection == "prefix"
        kept = 4 * self.states(shapes, expected) * len(self.settings.boundaries) if prefix else 0
        weights = len(shapes) * shape.n_parameters * size
        return weights + max(cached, self.forward(shape, expected)) + kept + self.around(shapes, expected)

    # What a replay of its sequences needs to know, too.

    @property
    def itemsize(self) -> int:
        """Bytes of one value of a state or weight."""
        return DTYPES[self.settings.dtype].itemsize

    def longest(self, expected: Expected) -> float:
        """Tokens of the longest sequence."""
        return max(self.lengths) + expected.shared_tokens

    def segment_tokens(self, expected: Expected) -> float:
        """Tokens of the sequences of a segment."""
        n_prompts = min(len(self.lengths), self.settings.shard_prompts)
        return n_prompts * expected.sequences * (float(np.mean(self.lengths)) + expected.shared_tokens)

    def pack_tokens(self, expected: Expected) -> float:
        """Tokens of the largest forward."""
        packed = 0 if self.settings.strict else min(self.settings.max_tokens, self.segment_tokens(expected))
        return max(self.longest(expected), packed)

    def forward(self, shape: ModelShape, expected: Expected) -> float:
        """Bytes of the largest forward: residual stream, its norm and the attention's input and output; an MLP's gate,
        input and their product."""
        return self.pack_tokens(expected) * (4 * shape.width + 3 * shape.widest_side) * self.itemsize

    def states(self, shapes: Mapping[str, ModelShape], expected: Expected) -> float:
        """Bytes of a segment's rows at one boundary."""
        return self.segment_tokens(expected) * len(shapes) * _first(shapes).width * self.itemsize

    def around(self, shapes: Mapping[str, ModelShape], expected: Expected) -> float:
        """Bytes beside weights and activations: tokenizers, logits, which are float32 whatever the model is, and the
        piece of the head that makes them."""
        shape = _first(shapes)
        logits = 4 * min(MAX_LOGITS_AT_ONCE, max(self.pack_tokens(expected), 1) * shape.vocab_size)
        head = 0 if self.itemsize == 4 else 4 * min(head_at_once(self.settings.device), shape.head_products)
        return len(shapes) * TOKENIZER_BYTES * shape.vocab_size + logits + head


def _first(shapes: Mapping[str, ModelShape]) -> ModelShape:
    """Of every checkpoint: all are of one architecture."""
    return next(iter(shapes.values()))


def forwards(shapes: Mapping[str, ModelShape], sequences: Numbers, n_choices: float, share: float = 1.0) -> float:
    """Multiply-adds of every checkpoint over ``share`` of these sequences, with ``n_choices`` compared in all."""
    shape = _first(shapes)
    return len(shapes) * (share * shape.products(sequences) + n_choices * shape.head_products)


def checks(
    capture: Cost, n_checkpoints: int, samples: Sequence[int | None], n_sequences: float, n_paired: int = 2
) -> Cost:
    """What the checks of stability take: the forwards of the capture by the checkpoints in pairs, strict and packed,
    over the sequences of so many events in each dtype, None for all: events that are few lie on as many sequences."""
    n_checks = sum(n_sequences if n is None else min(n, n_sequences) for n in samples)
    share = n_checks / n_sequences if n_sequences else 0.0
    return Cost({"stability": 2 * n_paired / n_checkpoints * capture.parts["capture"] * share})


# ---- replay ----


@dataclass(frozen=True, eq=False)
class Places:
    """What is replayed: sequences, and the places of them at which events are scored. Each is told by its tokens, up to
    the position scored.

    Attributes:
        sequences: every sequence, up to its last event.
        places: every distinct position of a sequence that has an event.
        events: every event.
        weights: how many sequences, places and events an entry of these stands for: one each, but in a plan.
        name: names the events: what two jobs over the same ones need counts once.
    """

    sequences: Numbers
    places: Numbers
    events: Numbers
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    name: str = ""

    @classmethod
    def of(cls, lengths: npt.ArrayLike, sequences: npt.ArrayLike, name: str = "") -> Places:
        """Of events: tokens up to each, and the number of its sequence."""
        events, numbers = np.asarray(lengths, np.float64), np.asarray(sequences, np.int64)
        places = np.unique(np.stack([numbers, events.astype(np.int64)], axis=1), axis=0)  # in order, the last one last
        ends = np.append(np.diff(places[:, 0]) > 0, True)[: len(places)]
        ends_of, places_of = (rows[:, 1].astype(np.float64) for rows in (places[ends], places))
        return cls(ends_of, places_of, events, name=name)

    @property
    def n_events(self) -> float:
        """E."""
        return self.weights[2] * len(self.events)


@dataclass(frozen=True)
class ReplayWork:
    """What a replay job computes, as far as its cost depends on it; a plan has no more of it, a file no less.

    Attributes:
        boundary: first late block.
        late: label of the late stack.
        scopes: in their order by name, as are the readouts.
        readouts: of ``native`` and ``common_<label>``.
        plain: whether cells are scored as they are.
        n_last: variants that change position p alone.
        tails: those that change some of the last positions, by how many.
        n_whole: those that change more: each costs a replay of the sequence in every cell.
        n_apart: of these, those that change rows otherwise for each event: they cost a replay for each event.
        top1: whether variants are read for their best token too.
        kl: whether every cell is compared with the late checkpoint's own distribution.
        mode: how sequences share a forward (``LateStack.mode``, or ``single`` where strict; ``kept`` where nothing was
            replayed). Where they are packed, what changes the last positions alone costs as many tokens.
    """

    boundary: int
    late: str
    scopes: tuple[str, ...]
    readouts: tuple[str, ...]
    plain: bool = True
    n_last: int = 0
    tails: tuple[int, ...] = ()
    n_whole: int = 0
    n_apart: int = 0
    top1: bool = False
    kl: bool = False
    mode: str = "packed"

    @classmethod
    def of_key(cls, key: Mapping[str, Any], late: str, mode: str) -> ReplayWork:
        """Of a job's key; ``late`` is for one of an earlier version, which had all late stacks in one."""
        names, tails = set(key["variants"]) - {PLAIN.name}, key.get("tails", {})
        whole = set(key["whole"]) - set(tails)
        return cls(
            key["boundary"],
            late,
            tuple(sorted(scopes_of(key))),
            tuple(sorted(key["readouts"])),
            plain=PLAIN.name in key["variants"],
            n_last=len(names - set(key["whole"])),
            tails=tuple(sorted(tails.values())),
            n_whole=len(names & whole),
            n_apart=len(whole & set(key.get("apart", ()))),
            top1=key["top1"] or key["kl"],
            kl=key["kl"],
            mode=mode,
        )

    @property
    def heads(self) -> set[str]:
        """Whose heads read what the late stack returns."""
        return {whose_head(name, self.late) for name in self.readouts}

    def n_bases(self, n_checkpoints: int) -> int:
        """Cells of an event that begin with a checkpoint's own rows: scope ``position`` replays the late one's alone,
        and on the diagonal both scopes are one and the same."""
        return n_checkpoints if "prefix" in self.scopes else 1

    def n_crossed(self, n_checkpoints: int) -> int:
        """Cells that scope ``position`` adds: those rows with another checkpoint's at position p."""
        return n_checkpoints - 1 if "position" in self.scopes else 0

    def n_cells(self, n_checkpoints: int) -> int:
        """Of an event, readouts and variants apart."""
        return self.n_bases(n_checkpoints) + self.n_crossed(n_checkpoints)

    def cost(self, shape: ModelShape, n_checkpoints: int, scored: Places) -> Cost:
        """What it takes.

        Args:
            shape: of the late stack's checkpoint.
            n_checkpoints: K.
            scored: over which events.
        """
        n_events, n_heads = scored.n_events, len(self.heads)
        n_cells, n_crossed = self.n_cells(n_checkpoints), self.n_crossed(n_checkpoints)
        of_sequences, of_places, of_events = (
            weight * shape.products(lengths, first=self.boundary)
            for weight, lengths in zip(scored.weights, (scored.sequences, scored.places, scored.events), strict=True)
        )
        # A strict replay ends at each place of its own. Others serve all events of a sequence, or those for which
        # nothing before p is another.
        replay = of_places if self.mode == "single" else of_sequences
        step = {
            "packed": scored.weights[2] * shape.step_products(scored.events - 1, first=self.boundary),
            "single": of_places,
        }.get(self.mode, of_events)
        # A best token takes the whole vocabulary; what a cell is compared with, as much again.
        heads = n_events * n_cells * n_heads * shape.head_products
        n_variants = self.n_last + len(self.tails) + self.n_whole
        # Variants that share the earlier positions' keys and values need these of every base, also without plain cells.
        shares = self.mode == "packed" and (self.n_last or self.tails)
        grid = self.n_bases(n_checkpoints) * replay if self.mode != "kept" and (self.plain or shares) else 0.0
        if self.plain:
            grid += (n_crossed * step if self.mode != "kept" else 0.0) + (2 if self.kl else 1) * heads
        n_shared = self.n_whole - self.n_apart
        replays = self.n_last * step + n_shared * replay + self.n_apart * of_events
        for n in self.tails:
            tail = scored.weights[2] * shape.tail_products(scored.events, n, first=self.boundary)
            replays += {"packed": tail, "single": of_places}.get(self.mode, of_events)
        variants = n_cells * replays + self.top1 * n_variants * heads
        # A native pass of each checkpoint scores the diagonal; then one pass per further cell or variant.
        passes = self.plain * (n_cells - 1) + n_variants * n_cells
        one_pass = scored.weights[2] * shape.products(scored.events) + n_events * shape.head_products
        # The stored final states are read once, to compare the diagonal.
        shared: dict[tuple[str, ...], tuple[str, float]] = {("own pass", scored.name, self.late): ("hooks", one_pass)}
        native = n_events * shape.head_products
        shared |= {("native", scored.name, self.late, head): ("grid", native) for head in self.heads}
        return Cost({"grid": grid, "variants": variants, "hooks": passes * one_pass}, shared)


def replay_memory(
    work: Sequence[ReplayWork], captured: CaptureWork, shapes: Mapping[str, ModelShape], expected: Expected
) -> float:
    """Bytes at most of replays over what was captured, above what the imports take: late stacks, the packs that run at
    once, the states that are replayed and those read ahead."""
    shape, device = _first(shapes), captured.settings.device
    first = min(one.boundary for one in work)
    late = sum(shape.block_parameters[first:]) + shape.readout_parameters
    longest, in_segment = captured.longest(expected), captured.segment_tokens(expected)
    n_workers = share_threads(round(in_segment) // TOKENS_OF_A_WORKER)[0] if device == "cpu" else 1
    at_once = min(n_workers * MAX_TOKENS[device], in_segment)
    replayed = longest if all(one.mode == "single" for one in work) else max(longest, at_once)
    forward = captured.forward(shape, expected) * replayed / captured.pack_tokens(expected)
    # Cells and variants that differ at position p alone share the late keys and values of a pack.
    shared = any(one.mode == "packed" and (one.n_last or one.tails or one.n_crossed(len(shapes))) for one in work)
    keys = shared * replayed * (shape.n_blocks - first) * shape.cache_width * captured.itemsize
    weights = len(shapes) * late * captured.itemsize
    return weights + forward + keys + captured.around(shapes, expected) + 2 * captured.states(shapes, expected)
