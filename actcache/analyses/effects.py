"""Effects: which part of the network makes a divergence? Contrasts of cells, averaged, with intervals over prompts.

The margins of an event's four cells give its contrasts (contrasts.py): A and B, the late effects from PT's and from
IT's state, and their interaction B - A. Here they are averaged per group, and divided:

- `portable_share`: mean(A) / mean(B), the part of the late effect that PT's state suffices for.
- `matched_ratio`: mean(B) / mean(A), how many times more IT's late stack adds to its own state.
- `interaction_share`: mean(B - A) / mean(native_shift), the part of the native shift that is interaction.

A ratio is one of means, neither clipped nor hidden; `flags` names those whose two means differ in sign. The first and
the last are the ratios that arXiv 2605.07284 reports (A +0.76, B +2.44: portable share 31.1%; the interaction +1.68 is
33.7% of the native shift). Beside them stand subsets of events, what each cell chooses, and the *label-swap null*:
swapping the two late labels of a prompt turns the sign of its interaction, so that its p-value tells how often random
signs reach what was observed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actcache import schema
from actcache.analyses import effects_text
from actcache.analyses.averages import effects
from actcache.errors import CorruptFileError, InputError
from actcache.files import write_atomically
from actcache.progress import OnProgress, untold
from actcache.sealed import NoSealError, Sealed, json_bytes, read_json, seal_of
from actcache.study.analysis import Analysis, option
from actcache.study.contrasts import CELLS, GROUP_COLUMNS, contrasted, contrasts
from actcache.study.left_out import select_consistent, select_events
from actcache.study.run import read_run_cells
from actcache.study.section import Section
from actcache.study.statistics import (
    CAUTION_PROMPTS,
    DRAWS,
    FEWEST_PROMPTS,
    NULL_DRAWS,
    SEED,
    check_draws,
    check_weights,
)

if TYPE_CHECKING:
    from actcache.store import Store
    from actcache.study.run import Run
    from actcache.study.run_folder import RunFolder

# What tables of cells are averaged with, for whoever has such a table.
__all__ = ["ANALYSIS", "CELLS", "GROUP_COLUMNS", "Effects", "EffectsOptions", "contrasts", "effects", "select_events"]


def _gap(text: str) -> float:
    return float(text) + 0.0  # no negative zero, which would be another file's name


@dataclass(frozen=True)
class EffectsOptions:
    """Which cells to average, and how."""

    pair: str | None = option(None, "labels of two checkpoints to contrast, as A,B (default: the pair of the events)")
    weights: str | None = option(
        None,
        "event or prompt: which of them weigh the same in a mean (default: event; prompt for the kinds of further "
        "supports)",
    )
    by: str | None = option(
        None, "further groups: by step (0, and at least 1, 3, 5, 10), a column that prompts carry, or a list of these"
    )
    paired: bool = option(
        False, "compare variants with the plain grid, and kinds with first divergences, on the prompts of both"
    )
    null: int = option(NULL_DRAWS, "draws of the label-swap null; 0 for none (default %(default)s)", type=int)
    keep_ties: bool = option(
        False, "keep the events that their own checkpoints contradict by a tie or the wrong sign, as the study does"
    )
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)
    stable_only: bool = option(False, "leave out the events that rounding changes, as 'actcache stability' found")
    min_gap: float | None = option(
        None, "leave out the events whose gap_pt or gap_it is below so many logits", type=_gap
    )

    @property
    def labels(self) -> tuple[str, str] | None:
        """The pair as two labels; InputError where it is none."""
        return None if self.pair is None else contrasted(self.pair)


class Effects(Analysis[EffectsOptions]):
    """Contrasts of cells, averaged."""

    name = "effects"
    options = EffectsOptions

    def check(self, store: Store, options: EffectsOptions) -> None:
        """Pair, weights and draws."""
        _check(options)
        for label in options.labels or ():
            if label not in store.checkpoints:
                raise InputError(
                    f"checkpoint {label!r} of the pair is not in the run; it has {', '.join(store.checkpoints)}"
                )

    def answer(
        self,
        run: Run,
        options: EffectsOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`Analysis.answer`; nothing is replayed. The file also has ``draws``, ``seed``, ``level`` and what
        was left out. Effects that leave events out, or contrast another pair, go into a file of their own."""
        return self.of_run(run.folder, run.folder.open_store(), options, say=say).content

    def of_run(
        self,
        folder: RunFolder,
        store: Store,
        options: EffectsOptions,
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> Sealed:
        """Average the cells of a run, and write the file; see :meth:`answer`."""
        self.check(store, options)
        options = _plain(store, options)
        cells, notes, made_from = selected_cells(folder, store, options)
        content = self._content(cells, notes, options, say)
        write_atomically(self.path(folder, options), json_bytes(content, made_from))
        return _sealed(content, made_from)

    def of_table(
        self, cells: Sealed, options: EffectsOptions, *, say: Callable[[str], None] = lambda line: None
    ) -> Sealed:
        """Average a table of cells that is no run's; nothing is written.

        Raises:
            InputError: the options need a run, or the table has no such cells.
        """
        _check(options)
        if options.stable_only or options.min_gap is not None:
            raise InputError("a table of cells is no run: --stable-only and --min-gap need the folder of a run, RUN")
        table, notes = select_consistent(cells.content, options.labels, keep=options.keep_ties)
        content = self._content(table, _counted(notes), options, say)
        return _sealed(content, {"cells": cells.seal})

    def current(
        self,
        folder: RunFolder,
        store: Store,
        options: EffectsOptions,
        *,
        say: Callable[[str], None] = lambda line: None,
    ) -> Sealed:
        """The effects on file, made again with the options that they had if they were not made from what they should
        be.

        Args:
            folder: of the run.
            store: of the run.
            options: of which those count that name the file.
            say: told why they are made again.
        """
        path, cells = self.path(folder, options), read_run_cells(folder, store)
        try:
            found = read_json(path, "effects", "it is made again")
        except FileNotFoundError:
            return self.of_run(folder, store, options, say=say)
        except (NoSealError, CorruptFileError) as error:
            say(str(error))
            return self.of_run(folder, store, options, say=say)
        content = found.content
        given = {name: content[name] for name in ("draws", "seed")} | content.get("options", {})
        options = replace(options, **{one.name: given[one.name] for one in fields(options) if one.name in given})
        # An earlier version's groups have fewer numbers, and do not say whose events they are of.
        wanted = set(schema.names(schema.EFFECTS))
        if (
            found.made_from == selected_cells(folder, store, options, cells)[2]
            and content.get("version") == self.version
            and all(wanted <= group.keys() for group in content["groups"])
        ):
            return found
        say(f"{path} is of other cells than {folder.cells} now holds; it is made again")
        return self.of_run(folder, store, options, say=say)

    def path(self, folder: RunFolder, options: EffectsOptions | None = None) -> Path:
        """``RUN/effects.json``, or another where events are left out, or another pair is contrasted."""
        options = options or EffectsOptions()
        return folder.effects_of(stable_only=options.stable_only, min_gap=options.min_gap, pair=options.labels)

    def what_next(self, folder: RunFolder, options: EffectsOptions) -> str:
        """A report that leaves the same events out; it shows the events' own pairs alone."""
        shown = self.path(folder, replace(options, pair=None))
        if self.path(folder, options) != shown:
            return f"{self.path(folder, options)} holds them"
        return f"{super().what_next(folder, options)}{folder.filters_of(shown)}"

    def read(self, folder: RunFolder, store: Store) -> dict[str, Any] | None:
        """See :meth:`Analysis.read`; None also where the file is an earlier version's."""
        try:
            content, made_from, _ = read_json(folder.effects, "effects", f"'actcache effects {folder.path}' makes it")
        except FileNotFoundError:
            return None
        found: dict[str, Any] = content
        current = made_from == {"cells": read_run_cells(folder, store).seal}
        return found if current and found.get("version") == self.version else None

    def notes(self, found: Mapping[str, Any]) -> list[str]:
        """How many events were left out, or kept though they contradict their checkpoints."""
        return effects_text.said_of_events(found)

    def lines(self, found: Mapping[str, Any], store: Store | None = None) -> list[str]:
        """One group as a 2x2 in words, several as one table."""
        return effects_text.described(found, store)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Label swaps, flags and subsets of the plain groups."""
        return effects_text.section(groups)

    def _content(
        self, cells: pa.Table, notes: dict[str, Any], options: EffectsOptions, say: Callable[[str], None]
    ) -> dict[str, Any]:
        found = effects(
            cells,
            pair=options.labels,
            draws=options.draws,
            seed=options.seed,
            weights=options.weights,
            by=_names(options.by),
            paired=options.paired,
            null_draws=options.null,
        )
        few = [one["n_prompts"] for one in found["groups"] if FEWEST_PROMPTS <= one["n_prompts"] < CAUTION_PROMPTS]
        if few:
            n = f"{min(few)} prompts" if min(few) == max(few) else f"{min(few)} to {max(few)} prompts"
            say(f"intervals of {n} are narrower than they should be: see them as a hint")
        if empty := found.get("empty_subsets"):
            say(f"no event is in {len(empty)} of the subsets, which are left out: {'; '.join(empty[:5])}")
        return {"analysis": self.name, "version": self.version, "options": asdict(options)} | notes | found


def selected_cells(
    folder: RunFolder, store: Store, options: EffectsOptions, found: Sealed | None = None
) -> tuple[pa.Table, dict[str, Any], dict[str, Any]]:
    """The cells of a run whose events are averaged, what to say of those left out, and what both were made from;
    ``found`` are all cells of the run, where they are read already.

    Raises:
        InputError, IncompatibleError, CorruptFileError: see :func:`actcache.study.run.read_run_cells`; no event is
            left; or stability was not checked for all.
    """
    found = found or read_run_cells(folder, store)
    cells, notes = select_consistent(found.content, keep=options.keep_ties)
    notes, made_from = _counted(notes), {"cells": found.seal}
    if options.stable_only or options.min_gap is not None:
        stability = _stability(folder, store) if options.stable_only else None
        cells, left_out = select_events(
            cells,
            store.events,
            store.fingerprint.dtype,
            stability=stability and stability.content,
            min_gap=options.min_gap,
        )
        notes |= left_out | {"n_left_out": left_out["n_left_out"] + notes.get("n_left_out", 0)}
        made_from |= {"stability": stability.seal} if stability else {}
    return cells, notes, made_from


def _stability(folder: RunFolder, store: Store) -> Sealed:
    from actcache.analyses.stability import read_sealed  # which takes seconds, as it imports models

    return read_sealed(store, folder.stability)


def _counted(notes: dict[str, Any]) -> dict[str, Any]:
    """What contradicts its own checkpoints, with the number of events left out where there are any."""
    n = notes["n_ties"] + notes["n_wrong_sign"]
    return notes | ({"n_left_out": n} if n and not notes["keep_ties"] else {})


def _check(options: EffectsOptions) -> None:
    check_draws(options.draws, options.seed)
    if options.weights is not None:
        check_weights(options.weights)
    if options.null < 0:
        raise InputError(f"{options.null} draws of the null: give 0 for none, or more")
    _ = options.labels


def _plain(store: Store, options: EffectsOptions) -> EffectsOptions:
    """The same options; without a pair where it is that of all events."""
    return replace(options, pair=None) if store.fingerprint.event_pairs == [options.labels] else options


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",")] if text else []


def _sealed(content: dict[str, Any], made_from: dict[str, Any]) -> Sealed:
    return Sealed(content, made_from, seal_of(json_bytes(content, made_from)))


ANALYSIS = Effects()
