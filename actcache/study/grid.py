"""Grid: the cells of a store, scored by replaying late stacks over its states.

A cell group is one segment at one boundary and scope: every upstream crossed with every late stack, scored by every
readout, plain or under variants. A finished group is one file (cells.py), so a killed grid goes on where it stopped.
Late stacks are loaded once, from the first boundary on; the states of one segment at one boundary are read once, while
the ones before are being replayed, and serve every late stack, scope, readout and variant. Knows store, replay and
tables; loads no models itself.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from actcache.errors import CheckError, InputError, NotFiniteError
from actcache.files import check_own_folder
from actcache.progress import OnProgress, Tally, untold
from actcache.replay.edits import PLAIN, Edit, Replace, Variant
from actcache.replay.late_stack import LateStack, Mode
from actcache.replay.moves import Moves
from actcache.replay.sweep import SCOPES, VariantsAt
from actcache.store import Segment, Store
from actcache.study.cells import (
    Finished,
    FinishedGroup,
    by_segment,
    check_every_cell,
    file_name,
    find_groups,
    finished_groups,
    gather_cells,
    has_earlier_files,
    write_group,
)
from actcache.study.scores import Scores, ScoreTable, score

_COMMON = "common_"  # readout name prefix: common_it is IT's own norm and head for every cell

# How far a replayed diagonal margin may lie from the native one: absolute, and per unit of the larger of the two
# logits, whose rounding it is. float32 leaves two decimal digits of room over what was seen; bfloat16 keeps 8 bits of
# each state, and a margin is a difference of two sums over D of them.
NOOP_TOLERANCE = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.1, 0.05), torch.float16: (0.02, 0.01)}


@dataclass(frozen=True)
class GridSettings:
    """What to score.

    Attributes:
        boundaries: a subset of the store's.
        scopes: of ``prefix`` (every position's state comes from U) and ``position`` (only position p's does).
        readouts: ``native``, ``common_<label>``.
        variants: scored beside the plain grid; the same at every boundary, or a function of the boundary. Their edits
            change the rows that the cell replays, and name checkpoints of the store as donors.
        top1: whether variants get ``top1_id``, which takes the whole vocabulary, too; plain cells always do.
        kl: whether cells get ``kl``, how far their next-token distribution is from what the late checkpoint makes of
            its own states (read by the same readout): KL(own || cell) in nats. Variants then get ``top1_id`` too.
        strict: one sequence a forward; bit-identical to a hooked full forward, whatever else is scored with it.
        max_tokens: tokens of one forward otherwise; None for what suits the device.
    """

    boundaries: tuple[int, ...]
    scopes: tuple[str, ...] = ("prefix",)
    readouts: tuple[str, ...] = ("native", "common_it", "common_pt")
    variants: Sequence[Variant] | VariantsAt = ()
    top1: bool = False
    kl: bool = False
    strict: bool = False
    max_tokens: int | None = None

    @property
    def wants_top1(self) -> bool:
        """Whether variants are scored by the whole vocabulary."""
        return self.top1 or self.kl

    def variants_at(self, boundary: int) -> tuple[Variant, ...]:
        """Everything to score at a boundary, the plain grid first."""
        return (PLAIN, *(self.variants(boundary) if callable(self.variants) else self.variants))

    def of_depth(self, n_blocks: int) -> GridSettings:
        """The same settings with the layers of all variants as block indices."""

        @functools.cache
        def variants_at(boundary: int) -> tuple[Variant, ...]:
            return tuple(variant.of_depth(n_blocks) for variant in self.variants_at(boundary)[1:])

        return replace(self, variants=variants_at)


def run_grid(
    store: Store,
    load_late: Callable[[str, int], LateStack],
    folder: str | Path,
    settings: GridSettings,
    *,
    on_progress: OnProgress = untold,
    say: Callable[[str], None] = lambda line: None,
) -> pa.Table:
    """Score every cell that is not scored yet.

    Args:
        store: with prefix rows.
        load_late: gives the late stack of a checkpoint, by label, from a boundary on, in the store's dtype; called
            once a label.
        folder: where finished groups lie; created.
        settings: what to score.
        on_progress: told of replays, an (event, scope, upstream, late, variant) each, after every pack.
        say: told, in one line, what a person should know.

    Returns:
        The cells of all groups in ``folder``, these settings' and earlier ones', one row per cell. On the plain
        diagonal ``margin`` is the capture forward's own and ``noop_delta`` is the replayed one minus it; elsewhere
        ``noop_delta`` is null. Every event that the store had at the start has every cell asked for.

    Raises:
        InputError: settings that the store cannot serve; a variant whose name stands for other edits in ``folder``; an
            edit that moves nothing (see :class:`actcache.replay.moves.Moves`).
        CheckError: a replayed diagonal margin is off its native one by more than rounding, or that is off the one that
            capture stored; a cell asked for is missing at the end, as files of finished groups went away meanwhile.
        CorruptFileError: the file of a finished group is damaged, and not one that is scored again here.
    """
    check_settings(store, settings)
    settings = settings.of_depth(store.fingerprint.n_blocks)
    folder = Path(folder)
    check_own_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finished, damaged = find_groups(folder, store)
    _check_names(finished, settings)
    if has_earlier_files(folder):
        say(f"cells of an earlier version in {folder} have no checksum: they are scored again where they are asked for")
    tally = Tally(count_replays(store, settings), "replays", on_progress)
    todo = []
    for segment, of_segment in by_segment(finished, store):
        for boundary in settings.boundaries:
            work = _Work(store, segment, boundary, settings, folder, of_segment)
            tally.add(found=work.n_done)
            if work.groups:
                todo.append(work)
    replaced = {name for work in todo for name in work.files}
    for name, error in damaged.items():
        if name not in replaced:
            raise error
        say(f"{folder / name} is damaged; its cells are scored again")
    if todo:
        first = min(work.boundary for work in todo)
        lates = {label: load_late(label, first) for label in store.checkpoints}
        for late in lates.values():
            if late.not_packable and not settings.strict:
                say(f"{late.mode} sequences, not packed: {late.not_packable}")
                break
        natives: _Natives = {}
        for work, states in _read_ahead(todo):
            work.score({label: late.at(work.boundary) for label, late in lates.items()}, states, natives, tally)
    cells = gather_cells(folder, store, strict=settings.strict, max_tokens=settings.max_tokens)
    asked = (
        (boundary, scope, [variant.name for variant in settings.variants_at(boundary)])
        for boundary in settings.boundaries
        for scope in settings.scopes
    )
    check_every_cell(cells, store, asked, settings.readouts)
    if (line := _without_displacement(finished_groups(folder, store), store, settings)) is not None:
        say(line)
    return cells


def readout_names(checkpoints: Sequence[str]) -> list[str]:
    """All readouts that there are for these checkpoints."""
    return ["native", *(_COMMON + label for label in checkpoints)]


def whose_head(readout: str, late: str) -> str:
    """The checkpoint whose final norm and head a readout is, behind the late stack of this one."""
    return late if readout == "native" else readout.removeprefix(_COMMON)


def count_replays(store: Store, settings: GridSettings) -> int:
    """How many (event, scope, upstream, late, variant) combinations a grid scores."""
    n_variants = sum(len(settings.variants_at(boundary)) for boundary in settings.boundaries)
    return len(store) * len(settings.scopes) * len(store.checkpoints) ** 2 * n_variants


def check_settings(store: Store, settings: GridSettings) -> None:
    """Raise InputError for a boundary, scope, readout or variant that the store cannot serve."""
    if settings.kl and "kl" in store.events.column_names:
        raise InputError("the prompts of this store carry a column 'kl', which would be the cells': leave kl out")
    if not store.fingerprint.has_prefix_rows:
        raise InputError("the store keeps rows of event positions only; the grid needs prefix rows: capture again")
    check_servable(settings, store.checkpoints, store.boundaries, store.fingerprint.n_blocks)
    lengths = [position + 1 for position in store.events["position"].to_pylist()]
    events = store.events["event_id"].to_pylist()
    for variant in (variant for boundary in settings.boundaries for variant in settings.variants_at(boundary)):
        for edit in variant.edits if lengths else ():
            edit.check_positions(lengths, variant.name)
            edit.check_vectors(store.width, store.dtype, events, variant.name)


def check_servable(
    settings: GridSettings, checkpoints: Sequence[str], boundaries: Sequence[int], n_blocks: int
) -> None:
    """Raise InputError for what no capture of these checkpoints at these boundaries can serve."""
    for boundary in settings.boundaries:
        if boundary not in boundaries:
            raise InputError(f"boundary {boundary} is not in the store; it has {_listed(boundaries)}")
    for scope in settings.scopes:
        if scope not in SCOPES:
            raise InputError(f"scope {scope!r} is unknown; choose {' or '.join(SCOPES)}")
    known = readout_names(checkpoints)
    for readout in settings.readouts:
        if readout not in known:
            raise InputError(f"readout {readout!r} is unknown; choose from {', '.join(known)}")
    for boundary in settings.boundaries:
        variants = settings.variants_at(boundary)
        twice = [name for name, count in Counter(variant.name for variant in variants).items() if count > 1]
        if twice:
            raise InputError(
                f"two variants at boundary {boundary} are named {twice[0]!r}; each needs a name of its own"
            )
        for variant in variants:
            for edit in variant.edits:
                donor = getattr(edit.operation, "donor", None)
                if donor is not None and donor not in checkpoints:
                    raise InputError(
                        f"variant {variant.name!r} names the donor {donor!r}; the store has {', '.join(checkpoints)}"
                    )
                edit.check_layers(boundary, n_blocks, variant.name)


def _check_names(finished: Finished, settings: GridSettings) -> None:
    """A name that stands for one thing in some groups and for another in others would be averaged over both."""
    for boundary in settings.boundaries:
        digests = {variant.name: variant.digest for variant in settings.variants_at(boundary)}
        for (of_boundary, _), groups in finished.items():
            for group in groups if of_boundary == boundary else ():
                for name, digest in group.key["variants"].items():
                    if digests.get(name, digest) != digest:
                        raise InputError(
                            f"variant {name!r} at boundary {boundary} has been scored with other edits ({group.path}); "
                            "give it another name, or move that file away"
                        )


def _without_displacement(finished: Finished, store: Store, settings: GridSettings) -> str | None:
    """One line: in how many (event, scope, upstream, late) of all boundaries variants moved nothing; None if none did
    nowhere."""
    still: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for (boundary, scope), groups in finished.items():
        if boundary in settings.boundaries and scope in settings.scopes:
            for name in {variant.name for variant in settings.variants_at(boundary)[1:]}:
                of_events: Counter[int] = Counter()  # by the first one: the same may be scored in several files
                for group in groups:
                    first, n_still = int(group.events[0]), group.key["still"].get(name, 0)
                    of_events[first] = max(of_events[first], n_still)
                still[name] += of_events.total()
                asked[name] += len(store) * len(store.checkpoints) ** 2
    moved_less = [f"{name!r} {n} of {asked[name]}" for name, n in still.most_common() if n]
    if not moved_less:
        return None
    some = ", ".join(moved_less[:3]) + (f" and {len(moved_less) - 3} more variants" if len(moved_less) > 3 else "")
    return f"cells without displacement (weight 0, a placebo, or rows that are their source's already): {some}"


@dataclass(frozen=True)
class _States:
    """What one piece of work reads from the store, all in the order of its segment's events."""

    rows: dict[str, torch.Tensor]  # by checkpoint, [N, D]
    offsets: torch.Tensor
    final: dict[str, torch.Tensor]  # by checkpoint, [n, D]


@dataclass(frozen=True)
class _Replay:
    """One replay of all events of a segment, and the cells that it serves: (scope, upstream)."""

    variant: Variant  # as it is replayed
    name: str  # of the variant asked for
    base: str  # whose rows it starts from
    cells: tuple[tuple[str, str], ...]
    n_of_scope: int = 0  # how many of its first edits are the scope's own, not the variant's


class _Work:
    """One segment at one boundary: the groups of all scopes that are not scored yet."""

    def __init__(
        self,
        store: Store,
        segment: Segment,
        boundary: int,
        settings: GridSettings,
        folder: Path,
        finished: Finished,
    ) -> None:
        self.store, self.segment, self.boundary, self.settings = store, segment, boundary, settings
        self._folder = folder
        self.groups: dict[str, tuple[tuple[Variant, ...], tuple[str, ...]]] = {}  # scope -> variants, readouts
        self.top1, self.kl = settings.wants_top1, settings.kl
        self.n_done = 0
        variants = settings.variants_at(boundary)
        columns = {variant.name: column for column, variant in enumerate(variants)}
        for scope in settings.scopes:
            scored = np.zeros((segment.n_events, len(variants)), bool)
            readouts = set(settings.readouts)
            for group in finished.get((boundary, scope), []):
                if any(group.key[name] != value for name, value in self._depends_on.items()):
                    continue
                found = self._enough(group)
                events = group.events[np.isin(group.events, np.array(segment.events))] - segment.events.start
                scored[np.ix_(events, np.array([columns[name] for name in found & columns.keys()], np.int64))] = True
                if columns.keys() & (group.names - found):  # scored again with all it has, so that nothing is lost
                    readouts |= set(group.key["readouts"])
                    self.top1 |= group.has("top1")
                    self.kl |= group.has("kl")
            left = tuple(variant for variant in variants if not scored[:, columns[variant.name]].all())
            self.n_done += (len(variants) - len(left)) * self._n_replays
            if left:
                known = (*settings.readouts, *sorted(readouts - set(settings.readouts)))
                self.groups[scope] = left, known

    def _enough(self, group: FinishedGroup) -> frozenset[str]:
        """The variants of a finished group that have all that is asked."""
        asked = self.settings
        if not set(asked.readouts) <= set(group.key["readouts"]) or (asked.kl and not group.has("kl")):
            return frozenset()
        return group.names if group.has("top1") or not asked.wants_top1 else group.names & {PLAIN.name}

    @property
    def files(self) -> set[str]:
        """Names of the files that will be published."""
        return {file_name(self._key(scope)) for scope in self.groups}

    @property
    def _n_replays(self) -> int:
        return self.segment.n_events * len(self.store.checkpoints) ** 2

    @property
    def _depends_on(self) -> dict[str, Any]:
        """What cells depend on beside their events; in packs, their rounding depends on the segment too."""
        return {"strict": self.settings.strict, "max_tokens": self.settings.max_tokens}

    def _key(self, scope: str) -> dict[str, Any]:
        """What the file of a group is made from."""
        variants, readouts = self.groups[scope]
        return {
            "store": self.store.fingerprint.digest,
            "segment": self.segment.name,
            "boundary": self.boundary,
            "scope": scope,
            **self._depends_on,
            "readouts": sorted(readouts),
            "variants": {variant.name: variant.digest for variant in variants},
            "top1": self.top1,
            "kl": self.kl,
            "whole": sorted(variant.name for variant in variants if not variant.at_last_only),
        }

    @property
    def _indices(self) -> range:
        return range(self.segment.events.start, self.segment.events.stop)

    def read(self) -> _States:
        """Read everything that scoring needs; may run beside the replay of other work."""
        read = {label: self.store.states(label, self.boundary, self._indices) for label in self.store.checkpoints}
        final = {label: self.store.final(label, self._indices) for label in self.store.checkpoints}
        return _States({label: rows for label, (rows, _) in read.items()}, next(iter(read.values()))[1], final)

    def score(self, lates: dict[str, LateStack], states: _States, natives: _Natives, tally: Tally) -> None:
        """Replay and score every cell; publish the files. ``natives`` is filled with what other boundaries need too."""
        events = self.store.events.slice(self._indices.start, len(self._indices))
        pair_ids = torch.tensor([events["y_pt"].to_pylist(), events["y_it"].to_pylist()]).T
        names = list(dict.fromkeys(name for _, names in self.groups.values() for name in names))
        columns: dict[str, list[dict[str, Any]]] = {scope: [] for scope in self.groups}
        n_still: dict[str, Counter[str]] = {scope: Counter() for scope in self.groups}
        for label, late in lates.items():
            whose = {name: whose_head(name, label) for name in names}
            readouts = {one: lates[one].readout for one in whose.values()}  # one head may go by two names
            for one, readout in readouts.items():
                if (self.segment.name, label, one) not in natives:
                    natives[self.segment.name, label, one] = score(readout, states.final[label], pair_ids)
                    if one == label:
                        self._check_capture(events, label, natives[self.segment.name, label, one])
            for base in lates:
                replays = self._replays(base, label, list(lates))
                table = ScoreTable(
                    len(replays),
                    readouts,
                    pair_ids,
                    whole=[n for n, replay in enumerate(replays) if replay.name == PLAIN.name or self.top1],
                    one_by_one=self.settings.strict,
                    own=states.final[label] if self.kl else None,
                )
                moves = Moves()
                try:
                    for sequences, numbers, hidden in late.iterate_variants(
                        states.rows[base],
                        states.offsets,
                        [replay.variant for replay in replays],
                        donors=states.rows,
                        keys=events["event_id"].to_pylist(),
                        strict=self.settings.strict,
                        max_tokens=self.settings.max_tokens,
                        moves=moves,
                    ):
                        table.add(sequences, numbers, hidden)
                        tally.add(sum(len(replays[number].cells) for number in numbers.tolist()))
                    table.finish()
                except NotFiniteError as error:
                    place = f"late stack of checkpoint {label}, states of {base} at boundary {self.boundary}"
                    variant = "" if error.row is None else f", variant {replays[error.row].name!r}"
                    raise NotFiniteError(f"{place}{variant}: {error}") from error
                for number, replay in enumerate(replays):
                    for scope, _ in replay.cells if replay.name != PLAIN.name else ():
                        n_still[scope][replay.name] += int(moves.still(number, after=replay.n_of_scope).sum())
                for number, scope, upstream, name in self._cells(replays):
                    scored, noop = table.scores(number, whose[name]), None
                    if upstream == label and replays[number].name == PLAIN.name:
                        native = natives[self.segment.name, label, whose[name]]
                        noop = scored.margin - native.margin
                        self._check_noop(events, label, name, native, noop)
                        scored = native
                    column = {"boundary": self.boundary, "scope": scope, "upstream": upstream, "late": label}
                    column |= {"readout": name, "variant": replays[number].name, "kl": scored.kl}
                    columns[scope].append(
                        column | {"margin": scored.margin, "top1_id": scored.top1, "noop_delta": noop}
                    )
        mode = "single" if self.settings.strict else next(iter(lates.values())).mode
        for scope in self.groups:
            self._publish(scope, events, columns[scope], mode, n_still[scope])

    def _cells(self, replays: Sequence[_Replay]) -> Iterator[tuple[int, str, str, str]]:
        """Number of the replay, scope, upstream and readout of every cell that these replays serve."""
        for number, replay in enumerate(replays):
            for scope, upstream in replay.cells:
                for name in self.groups[scope][1]:
                    yield number, scope, upstream, name

    def _replays(self, base: str, late: str, labels: Sequence[str]) -> list[_Replay]:
        """What is replayed through one late stack from one checkpoint's rows.

        Scope ``prefix`` replays the upstream's rows. Scope ``position`` replays the late checkpoint's own rows with
        row p replaced: an edit of the last position like any other, which shares the keys and values of the rest. On
        the diagonal both are one and the same.
        """
        replays: list[_Replay] = []
        by_name: dict[str, dict[str, Variant]] = {}
        for scope, (variants, _) in self.groups.items():
            for variant in variants:
                by_name.setdefault(variant.name, {})[scope] = variant
        for name, of_scope in by_name.items():
            variant = next(iter(of_scope.values()))
            own = [(scope, base) for scope in of_scope if scope == "prefix" or base == late]
            if own:
                replays.append(_Replay(variant, name, base, tuple(own)))
            if "position" in of_scope and base == late:
                for upstream in labels:
                    if upstream != late:
                        edits = (Edit(Replace(upstream), positions="last"), *variant.edits)
                        edited = Variant(name, edits, variant.placebo)
                        replays.append(_Replay(edited, name, base, (("position", upstream),), 1))
        return replays

    def _publish(
        self, scope: str, events: pa.Table, columns: Sequence[dict[str, Any]], mode: Mode, n_still: Counter[str]
    ) -> None:
        variants, readouts = self.groups[scope]
        names, labels = {variant.name: number for number, variant in enumerate(variants)}, self.store.checkpoints

        def place(column: dict[str, Any]) -> tuple[int, ...]:
            at = names[column["variant"]], labels.index(column["upstream"]), labels.index(column["late"])
            return (*at, readouts.index(column["readout"]))

        key = self._key(scope) | {"mode": mode, "still": {name: n for name, n in sorted(n_still.items()) if n}}
        write_group(self._folder, key, events, sorted(columns, key=place))

    def _check_capture(self, events: pa.Table, label: str, native: Scores) -> None:
        """What a checkpoint's head makes of its stored final states is what it made of them when they were captured."""
        captured = torch.tensor(events[f"margin_{label}"].to_pylist(), dtype=torch.float32)
        absolute, relative = NOOP_TOLERANCE[self.store.dtype]
        allowed = absolute + relative * native.logits.abs().amax(dim=1)
        wrong = torch.nonzero(~((native.margin - captured).abs() <= allowed)).flatten().tolist()
        if wrong:
            first = wrong[0]
            raise CheckError(
                f"the final norm and head of {label} are not those of the capture: event {events['event_id'][first]} "
                f"has a margin of {native.margin[first]:.6g}, captured was {captured[first]:.6g} (allowed "
                f"{allowed[first]:.2g} apart); {len(wrong)} of {len(captured)} events are; use the captured checkpoint"
            )

    def _check_noop(self, events: pa.Table, label: str, readout: str, native: Scores, noop: torch.Tensor) -> None:
        absolute, relative = NOOP_TOLERANCE[self.store.dtype]
        allowed = absolute + relative * native.logits.abs().amax(dim=1)
        wrong = torch.nonzero(~(noop.abs() <= allowed)).flatten().tolist()
        if wrong:
            first = wrong[0]
            raise CheckError(
                f"replaying {label} over its own states is not a no-op: event {events['event_id'][first]} at boundary "
                f"{self.boundary}, readout {readout}, is off its native margin {native.margin[first]:.6g} by "
                f"{noop[first]:.3g} (allowed {allowed[first]:.2g}); {len(wrong)} of {len(noop)} events are"
            )


_Natives = dict[tuple[str, str, str], Scores]  # of the capture's own final states: segment, checkpoint, whose readout


def _read_ahead(todo: Sequence[_Work]) -> Iterator[tuple[_Work, _States]]:
    """Each piece of work with its states, which are read while the piece before it is replayed."""
    with ThreadPoolExecutor(1, thread_name_prefix="actcache-read") as pool:
        coming = pool.submit(todo[0].read)
        for number, work in enumerate(todo):
            states = coming.result()
            if number + 1 < len(todo):
                coming = pool.submit(todo[number + 1].read)
            yield work, states


def _listed(boundaries: Sequence[int]) -> str:
    return ", ".join(str(boundary) for boundary in boundaries)
