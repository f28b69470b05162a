"""Windows: which depth decides the token, and which gives the margin, by one module of a window of blocks.

Two checkpoints are a *host* and a *source*, either way round. In a *window* of blocks, the host runs the source's MLPs
on what it hands to its own, at every position. It is a swap of weights, not a patch of stored outputs: attention,
norms, readout and all other blocks stay the host's. A replay begins with the host's own states, at the last boundary
that was captured at the window's first block or before it.

- *Identity transfer* is the share of events whose best token becomes the source's. The others keep the host's, or
  choose a third one.
- The *margin support* of a block's MLP is what it adds to the margin: the host's final norm and head read the residual
  stream before it is added, and after. That of a window is the mean over its blocks, not their sum.
- The *gain* is the margin support of IT's MLPs in PT, less that of PT's own. The *loss* is the margin support of IT's
  own MLPs, less that of PT's in IT. The *source interaction* is the loss less the gain.

With `module` it is the attention, or whole blocks, and their margin support. Of the windows of the study, those are
left out that begin before every captured boundary: `early` begins at 0. In arXiv 2605.07284 (four families), IT's MLPs
in PT transfer identity on 25.6% of the events in the middle, and on 18.8% late.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from actcache.analyses.grid import events_of_pair, pairs_of
from actcache.errors import InputError
from actcache.models.blocks import block_of
from actcache.progress import OnProgress, untold
from actcache.replay.swap import Module, Swap
from actcache.schema import FIRST_DIVERGENCE, ROLES
from actcache.store import Store
from actcache.study.analysis import CellAnalysis, Numbers, exactness_of, option
from actcache.study.cells import Finished, finished_cells
from actcache.study.replay_job import ReplayJob
from actcache.study.results import file_name
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Interval, Section
from actcache.study.statistics import DRAWS, SEED, Floats, Sample, check_draws, check_weights
from actcache.study.window_job import Found, Windowed

if TYPE_CHECKING:
    from actcache.study.engine import LateJob
    from actcache.study.run import Run

_MODULES: tuple[Module, ...] = get_args(Module)


class Window(NamedTuple):
    """Blocks ``first..stop-1``, by name."""

    name: str
    first: int
    stop: int


@dataclass(frozen=True)
class WindowsOptions:
    """Which blocks, and which of their modules."""

    window: str = option(
        "",
        "windows as NAME=FIRST:STOP, with commas between; no STOP is L (default: early, mid, late, final_three and "
        "final_one, as far as states are captured)",
        repeats=True,
    )
    module: str = option("mlp", "what the source gives: mlp, attention or block (default %(default)s)")
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)


class Windows(CellAnalysis[WindowsOptions]):
    """Identity transfer and margin support by window."""

    name = "windows"
    options = WindowsOptions

    def check(self, store: Store, options: WindowsOptions) -> None:
        """Windows, module, weights, and that the store has states to begin with."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        if options.module not in _MODULES:
            raise InputError(f"module {options.module!r} is unknown; choose {', '.join(_MODULES)}")
        if not store.fingerprint.has_prefix_rows:
            raise InputError("the store keeps rows of event positions only; windows need prefix rows: capture again")
        windows_of(store, options.window)

    def jobs(
        self, store: Store, finished: Finished, options: WindowsOptions, exactness: Mapping[str, Any]
    ) -> list[ReplayJob]:
        """No cell: what the checkpoints make of their own states is captured."""
        return []

    def own_jobs(
        self, folder: RunFolder, store: Store, options: WindowsOptions, exactness: Mapping[str, Any]
    ) -> Mapping[Path, Sequence[LateJob]]:
        """Of every pair, each host as it is, and with the source's modules in each window. Jobs that read the same
        states follow one another."""
        jobs: dict[Path, Sequence[LateJob]] = {}
        order = {segment.name: number for number, segment in enumerate(store.segments)}
        for pair in pairs_of(store):
            place = _place(folder, pair)
            finished = finished_cells(place, store)
            asked = [_asked(store, options, exactness, pair, host) for host in pair]
            left = [job for of in asked for one in of.values() for job in one.jobs(store, finished)]
            distinct = {file_name(job.key): job for job in left}  # two windows may be the same blocks
            jobs[place] = sorted(distinct.values(), key=lambda job: (order[job.segment], job.boundary))
        return jobs

    def leaves_out(self, store: Store, options: WindowsOptions) -> str:
        """Windows that begin before every boundary."""
        return (
            "" if options.window else not_served(store, study_windows(store.fingerprint.n_blocks, store.main_boundary))
        )

    def answer(
        self,
        run: Run,
        options: WindowsOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`CellAnalysis.answer`; what a replay of each window takes is said first.

        Raises:
            InputError: also where one checkpoint is in memory at a time.
        """
        store = run.folder.open_store()
        self.check(store, options)
        check_together(run)
        n_blocks = store.fingerprint.n_blocks
        begins = {window: begin(store, window) for window in windows_of(store, options.window)}
        parts = ", ".join(f"{window.name} {1 - at / n_blocks:.0%}" for window, at in begins.items())
        say(f"of a forward's blocks a replay takes: {parts}")
        return super().answer(run, options, on_progress=on_progress, say=say)

    def numbers(self, cells: pa.Table, run: Run, options: WindowsOptions) -> Numbers:
        """One row per event, host and window; one group per kind, pair and window."""
        store, exactness = run.store, exactness_of(run.folder)
        windows = windows_of(store, options.window)
        tables = [_table(store, [], "", "", Window("", 0, 1), 0, options.module, None, None)]
        groups: list[dict[str, Any]] = []
        for pair in pairs_of(store):
            place = _place(run.folder, pair)
            finished = finished_cells(place, store)
            of_pair: dict[Window, list[pa.Table]] = {window: [] for window in windows}
            for host, source in (pair, pair[::-1]):
                asked = _asked(store, options, exactness, pair, host)
                own = asked.pop(None)
                alone = own.read(finished, place)
                for window, one in asked.items():
                    assert window is not None
                    columns = [own.layers.index(layer) for layer in one.layers]
                    native = alone._replace(support=alone.support[:, columns])
                    given = one.read(finished, place)
                    table = _table(store, one.events, host, source, window, one.boundary, options.module, given, native)
                    of_pair[window].append(table)
            for window, both in of_pair.items():
                tables += both
                groups += _groups(both, window, options)
        order = [("event_id", "ascending"), ("host", "ascending"), ("first", "ascending"), ("window", "ascending")]
        ordered = sorted(groups, key=lambda group: (group["kind"], group["pair"]))
        return Numbers(pa.concat_tables(tables).sort_by(order), ordered)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Identity transfer and gains by window."""
        several = [name for name in ("kind", "pair") if len({one[name] for one in groups}) > 1]
        kinds = [one["kind"] for one in groups]
        drawn = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else kinds[0]  # others are in the table
        module, earliest = groups[0]["module"], min(one["first"] for one in groups)

        def of_whom(group: Mapping[str, Any]) -> str:
            return ", ".join(group[name] for name in several)

        def bars(**quantities: str) -> dict[str, list[tuple[str, Interval]]]:
            found: dict[str, list[tuple[str, Interval]]] = {}
            for one in groups:
                if one["kind"] == drawn:
                    for quantity, text in quantities.items():
                        series = f"{text}, {one['pair']}" if "pair" in several else text
                        found.setdefault(series, []).append((one["window"], one[quantity]))
            return found

        parts = {"mlp": "the MLPs", "attention": "the attention", "block": "the blocks"}
        later = f" No window here begins before block {earliest}." if earliest else ""
        return Section(
            title="Depth windows",
            figures=[
                Bars(
                    "events that choose the source's token",
                    bars(transfer_pt="PT host", transfer_it="IT host"),
                    0.0,
                    f"Identity transfer by {parts[module]} of each window.",
                    shares=True,
                ),
                Bars(
                    "margin support per block, logits",
                    bars(gain="gain: IT's in PT", loss="loss: PT's in IT", source_interaction="source interaction"),
                    0.0,
                    f"What {parts[module]} of each window add to the margin, over the host's own.",
                ),
            ],
            columns=[
                *("window", "blocks", "events", "prompts", "transfer, PT host", "transfer, IT host"),
                *("margin support in PT", "in IT", "gain", "loss", "source interaction"),
            ],
            rows=[
                [
                    ": ".join(part for part in (of_whom(one), one["window"]) if part),
                    f"{one['first']}..{one['stop'] - 1}",
                    one["n_events"],
                    one["n_prompts"],
                    *(one[name] for name in ("transfer_pt", "transfer_it", "margin_support_pt", "margin_support_it")),
                    *(one[name] for name in ("gain", "loss", "source_interaction")),
                ]
                for one in groups
            ],
            shows=(
                f"A window transfers identity where {parts[module]} of the source, on what the host hands them, make "
                "its best token the source's. The source interaction is what they support in their own checkpoint "
                "beyond what they support in the other."
            ),
            does_not_show=(
                "Margin support is read by a lens at each block: what a module adds for later blocks to use is no part "
                f"of it. Windows of different lengths are not alike: a short one changes less.{later}"
            ),
            shares=("transfer, PT host", "transfer, IT host"),
        )


def check_together(run: Run) -> None:
    """Raise InputError where a run has one checkpoint in memory at a time."""
    if run.one_at_a_time:
        raise InputError(
            "modules of one checkpoint run among the blocks of another, so that both are in memory: give "
            "--resident all, and leave out --stream"
        )


def windows_of(store: Store, given: str) -> list[Window]:
    """The windows that a text names, or those of the study that the store serves.

    Raises:
        InputError: the text is not of that form, names a window twice or one that has no block, or one that begins
            before every boundary of the store.
    """
    n_blocks = store.fingerprint.n_blocks
    if not given:
        return [one for one in study_windows(n_blocks, store.main_boundary) if _captured(store, one)]
    found: dict[str, Window] = {}
    for part in given.split(","):
        name, _, span = part.strip().partition("=")
        first, colon, stop = span.partition(":")
        try:
            ends = [_end(first, n_blocks), _end(stop, n_blocks) if stop else n_blocks]
        except ValueError:
            ends = []
        if not (name and colon and ends) or name in found:
            raise InputError(f"window {part.strip()!r}: expected NAME=FIRST:STOP, such as mid=9:22, each name once")
        if not 0 <= ends[0] < ends[1] <= n_blocks:
            raise InputError(f"window {name} is {ends[0]}:{ends[1]}; expected 0 <= FIRST < STOP <= {n_blocks}")
        found[name] = window = Window(name, *ends)
        if not _captured(store, window):
            boundaries = ",".join(map(str, (*store.boundaries, window.first)))
            raise InputError(
                f"window {name} begins at block {window.first}, before every boundary of the store: give the command "
                f"that captured it again with --boundary {boundaries}, which adds those states"
            )
    return list(found.values())


def study_windows(n_blocks: int, main_boundary: int) -> list[Window]:
    """Those of the study: early, of 0.4 L blocks, mid, of as many, late, and the final three blocks and the last."""
    length = max(1, round(0.4 * n_blocks))
    mid = (n_blocks - length) // 2
    return [
        Window("early", 0, length),
        Window("mid", mid, mid + length),
        Window("late", main_boundary, n_blocks),
        Window("final_three", max(0, n_blocks - 3), n_blocks),
        Window("final_one", n_blocks - 1, n_blocks),
    ]


def begin(store: Store, window: Window) -> int:
    """The boundary at which a replay of a window begins: the last one at its first block or before."""
    return max(_captured(store, window))


def not_served(store: Store, windows: Sequence[Window]) -> str:
    """Which of these begin before every boundary, in words, and what would serve them; nothing where none does."""
    early = [one for one in windows if not _captured(store, one)]
    if not early:
        return ""
    boundaries = ",".join(map(str, (*store.boundaries, min(one.first for one in early))))
    names = ", ".join(one.name for one in early)
    return f"no state is captured before {names}: --boundary {boundaries} serves all"


def _captured(store: Store, window: Window) -> list[int]:
    return [boundary for boundary in store.boundaries if boundary <= window.first]


def _end(text: str, n_blocks: int) -> int:
    return block_of(float(text) if "." in text else int(text), n_blocks)


def _place(folder: RunFolder, pair: Sequence[str]) -> Path:
    """Where the results of a pair's jobs are."""
    return folder.path / Windows.name / ",".join(pair)


def _asked(
    store: Store, options: WindowsOptions, exactness: Mapping[str, Any], pair: tuple[str, str], host: str
) -> dict[Window | None, Windowed]:
    """What is asked of one host on a pair's events: as it is (None), and each window with the source's modules."""
    windows = windows_of(store, options.window)
    (source,) = (label for label in pair if label != host)
    (module,) = (one for one in _MODULES if one == options.module)
    events = events_of_pair(store, pair)
    every = sorted({layer for window in windows for layer in range(window.first, window.stop)})
    earliest = min(windows, key=lambda window: window.first)

    def of(at: int, swap: Swap | None, layers: Sequence[int]) -> Windowed:
        return Windowed(events, host, at, swap, module, tuple(layers), **exactness)

    found: dict[Window | None, Windowed] = {None: of(begin(store, earliest), None, every)}
    for window in windows:
        swap = Swap(source, module, window.first, window.stop)
        found[window] = of(begin(store, window), swap, range(window.first, window.stop))
    return found


def _table(
    store: Store,
    events: Sequence[int],
    host: str,
    source: str,
    window: Window,
    boundary: int,
    module: str,
    given: Found | None,
    native: Found | None,
) -> pa.Table:
    """One row per event of a host with a source's modules in a window: ``given``, and the host as it is: ``native``."""
    of, n = store.events.take(pa.array(events, pa.int64())), len(events)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {name: of[name] for name in ("event_id", "prompt_id")}
    columns |= {name: pa.array([text] * n, pa.string()) for name, text in (("host", host), ("source", source))}
    columns["window"] = pa.array([window.name] * n, pa.string())
    for stem, found in (("", given), ("own_", native)):
        columns[f"{stem}margin"] = pa.array(() if found is None else found.margin, pa.float32())
        columns[f"{stem}top1_id"] = pa.array(() if found is None else found.top1, pa.int64())
    for stem, found in (("", given), ("own_", native)):
        columns[f"{stem}margin_support"] = pa.array(() if found is None else found.support.mean(axis=1), pa.float64())
    columns |= {name: of[name] for name in ("kind", "pair", *(f"y_{role}" for role in ROLES))}
    columns["module"] = pa.array([module] * n, pa.string())
    places = (("first", window.first), ("stop", window.stop), ("boundary", boundary))
    return pa.table(columns | {name: pa.array([at] * n, pa.int32()) for name, at in places})


def _groups(both: Sequence[pa.Table], window: Window, options: WindowsOptions) -> Iterator[dict[str, Any]]:
    """Of one window, a group per kind, of the tables of the two hosts: PT and IT."""
    for kind in sorted(pc.unique(both[0]["kind"]).to_pylist()):
        hosts = dict(zip(ROLES, (one.filter(pc.equal(one["kind"], kind)) for one in both), strict=True))
        values: dict[str, Floats] = {}
        for role, other in zip(ROLES, ROLES[::-1], strict=True):
            values |= _of_host(hosts[role], role, other)
        of = hosts["pt"]
        sample = Sample.of(of["prompt_id"], values, weights=options.weights, draws=options.draws, seed=options.seed)

        def gain(means: Mapping[str, Floats]) -> Floats:
            return means["swapped_margin_support_pt"] - means["margin_support_pt"]

        def loss(means: Mapping[str, Floats]) -> Floats:
            return means["margin_support_it"] - means["swapped_margin_support_it"]

        yield {
            "kind": kind,
            "pair": of["pair"][0].as_py(),
            "module": options.module,
            "window": window.name,
            **{name: of[name][0].as_py() for name in ("first", "stop", "boundary")},
            "n_events": sample.n_events,
            "n_prompts": sample.n_prompts,
            **{name: sample.mean(name) for name in values},
            "gain": sample.number(gain),
            "loss": sample.number(loss),
            "source_interaction": sample.number(lambda means: loss(means) - gain(means)),
        }


def _of_host(table: pa.Table, role: str, other: str) -> dict[str, Floats]:
    """What is averaged of one host, which has this role; the source has the other."""
    top1, own = table["top1_id"].to_numpy(), table["own_top1_id"].to_numpy()
    host, source = (table[f"y_{one}"].to_numpy() for one in (role, other))
    return {
        f"transfer_{role}": ((top1 == source) & (own != source)).astype(np.float64),
        f"kept_{role}": (top1 == host).astype(np.float64),
        f"other_{role}": ((top1 != host) & (top1 != source)).astype(np.float64),
        f"margin_change_{role}": table["margin"].to_numpy().astype(np.float64) - table["own_margin"].to_numpy(),
        f"margin_support_{role}": table["own_margin_support"].to_numpy(),
        f"swapped_margin_support_{role}": table["margin_support"].to_numpy(),
    }


ANALYSIS = Windows()
