"""Written: the page of a run, made of its files. Knows the folder of a run, its store and its analyses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from actcache.analyses import EVERY
from actcache.analyses.effects import ANALYSIS as EFFECTS
from actcache.analyses.effects import EffectsOptions, selected_cells
from actcache.analyses.effects_text import vocabulary_of
from actcache.files import write_atomically
from actcache.report.page import build_report
from actcache.sealed import html_bytes
from actcache.store import Store
from actcache.study.analysis import Answered
from actcache.study.cells import identity
from actcache.study.run_folder import RunFolder, RunRecord


def write_report(
    folder: RunFolder,
    store: Store,
    *,
    stable_only: bool = False,
    min_gap: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write ``RUN/report.html``; effects that are not there, or of other cells, are made again.

    Args:
        folder: of the run.
        store: of the run.
        stable_only: whether events that rounding changes are left out of the effects.
        min_gap: smallest gap of an event, in logits; None for any.
        say: told what was made again, and what the page leaves out.

    Raises:
        InputError: there are no cells, or no event stays.
    """
    options = EffectsOptions(stable_only=stable_only, min_gap=min_gap)
    effects = EFFECTS.current(folder, store, options, say=say)
    keep_ties = effects.content["keep_ties"]
    cells, _, made_from = selected_cells(folder, store, replace(options, keep_ties=keep_ties))
    page = build_report(
        cells,
        effects.content,
        store.events,
        store.excluded,
        _settings_shown(folder.record(), store),
        checkpoints=store.checkpoints,
        default_boundary=store.main_boundary,
        answers=answers_of(folder, store, {EFFECTS.name: effects.content}, say=say),
    )
    write_atomically(folder.report, html_bytes(page, {**identity(store), **made_from, "effects": effects.seal}))


def answers_of(
    folder: RunFolder,
    store: Store,
    known: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    *,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Answered]:
    """What the report shows of the analyses that a run has answered; one of other cells is named and left out.

    Args:
        folder: of the run.
        store: of the run.
        known: what the files of some hold, by name, where they were read already.
        say: told which were left out.
    """
    answers = {}
    for named in EVERY:
        if any((folder.path / f"{named.stem}.{suffix}").is_file() for suffix in ("json", "parquet")):
            analysis = named.load()
            content = known.get(named.name) or analysis.read(folder, store)
            if content is None:
                path, again = analysis.path(folder), f"'actcache {named.name}' makes it again"
                say(f"{path} is of other cells than the run's, or lacks its table; {again}")
            elif content["groups"]:
                answers[named.name] = analysis.answered(content, folder.path.name)
    return answers


def _settings_shown(record: RunRecord, store: Store) -> dict[str, str]:
    fingerprint = store.fingerprint
    shown = {"command": record.command}
    for label, path in record.checkpoints.items():
        captured = fingerprint.checkpoints[label]
        digests = {"weights": captured.weights, "adapter": captured.adapter, "tokenizer": captured.tokenizer}
        said = ", ".join(f"{name} {found[:12]}" for name, found in digests.items() if found is not None)
        shown[f"checkpoint {label}"] = f"{path} ({said})"
        shown["architecture"] = f"{captured.architecture}, {fingerprint.n_blocks} blocks of width {store.width}"
        shown["attention"] = captured.attention
    shown |= {
        "prompts": f"{record.prompts} ({store.n_prompts} prompts, digest {fingerprint.prompts[:12]})",
        **({"vocabulary": said} if (said := vocabulary_of(store)) else {}),
        **({"template": fingerprint.template} if fingerprint.template else {}),
        "dtype": fingerprint.dtype,
        "boundaries": ", ".join(str(boundary) for boundary in store.boundaries),
        "choices compared a prompt": f"at most {fingerprint.max_new}",
        "capture": "strict, one sequence per forward" if fingerprint.strict else "packed",
        "device": fingerprint.device,
        "versions": ", ".join(f"{name} {number}" for name, number in fingerprint.versions.items()),
    }
    return shown
