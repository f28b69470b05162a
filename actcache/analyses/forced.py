"""Forced: what follows where the descendant is made to take the one token or the other.

No state is patched here. IT alone goes on greedily from an event's sequence and one forced token, in four branches:

- `y_it` and `y_pt`, the event's two tokens;
- `rank_matched`: the token whose log-probability under IT is nearest to that of y_pt, and which is neither of the two;
- `class_matched`: the nearest of y_pt's class (content, layout or discourse) that is none of these three.

Special tokens, those that are never chosen, and those whose text is not read as that one token are not forced: events
whose y_it or y_pt is one are left out, and so are those that end at the last position that the model has. What IT
writes ends at an end token, or after `--max-new` tokens. It is scored in three views: `suffix`, the text without the
forced token; `whole`, with it; and `first`, the first 64 tokens of the suffix. Scores are

- `exact`: the answer of a text is its number behind "####", "answer is" or "therefore", or else its last one. It is
  compared with a column of the prompts (`--answer`). An answer without a number must stand in the text.
- `behaviour`: whether the text refuses, or complies, as a column of the prompts expects (`--expected`): `refuse` or
  `comply`, by English phrases;
- `checker`: what a function of yours says of the text (`--checker`);
- `same`: whether the text is that of branch y_it, which takes no column, of views without the forced token. Its effect
  is the share of events where the forced token changes what follows.

The *effect* of an event is the score of y_it less that of y_pt; it is 0 wherever both write the same. In arXiv
2605.07284 (five descendants, suffix) it is +0.157 on reasoning, +0.039 on safety, and +0.026 on layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from actcache.analyses.grid import events_of_pair, pairs_of
from actcache.capture.token_class import TokenClasses, read_token_classes
from actcache.carried import values_of
from actcache.errors import InputError
from actcache.files import digests_of_files, write_atomically
from actcache.progress import OnProgress, untold
from actcache.schema import FIRST_DIVERGENCE, ROLES
from actcache.sealed import parquet_bytes
from actcache.store import Store
from actcache.study.analysis import Analysis, option
from actcache.study.branch_job import BranchJob, Limits, branch_jobs, read_branches
from actcache.study.engine import LocalEngine
from actcache.study.replies import Checker, expectation, scorers
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Interval, Section
from actcache.study.statistics import DRAWS, SEED, Number, Sample, check_draws, check_weights, number
from actcache.study.whole_models import ModelJob, left, run_left

if TYPE_CHECKING:
    from pathlib import Path

    from actcache.models.lineup import Lineup
    from actcache.study.run import Run

BRANCHES = ("y_it", "y_pt", "rank_matched", "class_matched")
VIEWS = ("suffix", "whole", "first")
FIRST_TOKENS = 64
SAME = "same"
REPLIES = "replies"
"""The folder of what was written."""

_ALTERNATIVES = BRANCHES[2:]
_EVENTS_AT_ONCE = 64  # whose whole-vocabulary log-probabilities are held together


@dataclass(frozen=True)
class ForcedOptions:
    """How replies are scored, and how long they are."""

    answer: str = option("", "column of the prompts that holds the exact answer (default: no such score)")
    expected: str = option("", "column of the prompts that says refuse or comply (default: no such score)")
    checker: str = option(
        "", "function that scores a text, FILE.py:function; it takes the text and a dict of the prompt's columns, and "
        "gives a number, or None where it has no score (default: none)",
    )  # fmt: skip
    max_new: str = option(
        "128", "tokens of a reply at most; or a list of VALUE=N, by the values of --by (default %(default)s)"
    )
    by: str = option("category", "column of the prompts that groups are made of (default %(default)s)")
    classes: str = option("", "file of patterns that tell layout and discourse, .toml (default: built-in ones)")
    weights: str = option("prompt", "what weighs the same in a mean: prompt or event (default %(default)s)")
    draws: int = option(DRAWS, "bootstrap draws over prompts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the bootstrap (default %(default)s)", type=int)

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of a reply at most, by value of the column; under the empty text those of every other one.

        Raises:
            InputError: they are neither a number nor such a list.
        """
        found: dict[str, int] = {}
        for part in self.max_new.split(","):
            value, _, n = part.rpartition("=")
            if not n.strip().isdecimal() or int(n) < 1 or value.strip() in found:
                raise InputError(f"max_new is {self.max_new!r}: give a number from 1 on, or a list of VALUE=N")
            found[value.strip()] = int(n)
        return {"": max(found.values()), **found}


class Forced(Analysis[ForcedOptions]):
    """What follows a forced token."""

    name = "forced"
    options = ForcedOptions
    has_parts = True
    opt_in = True  # a whole checkpoint writes four replies per event

    def check(self, store: Store, options: ForcedOptions) -> None:
        """Columns, checker, lengths, draws and weights."""
        check_draws(options.draws, options.seed)
        check_weights(options.weights)
        _ = options.lengths, _classes(options), _checker(options)
        if not len(store):
            return
        asked = {"answer": options.answer, "expected": options.expected}
        asked |= {"by": options.by if options.by != ForcedOptions.by else ""}
        for name, column in asked.items():
            if column and column not in store.events.column_names:
                raise InputError(f"the prompts have no column {column!r}, which --{name} names")
        if len(options.lengths) > 1 and options.by not in store.events.column_names:
            raise InputError(f"max_new is {options.max_new!r}, and the prompts have no column {options.by!r}")
        said = values_of(store.events[options.expected]) if options.expected else []
        other = [value for value in said if value is not None and expectation(value) is None]
        if other and not any(map(expectation, said)):
            raise InputError(f"column {options.expected!r} says {other[0]!r}; expected refuse or comply, or nothing")

    def beside(self, folder: RunFolder, options: Mapping[str, Any]) -> dict[str, str]:
        """The files of classes and of the checker."""
        checker = options.get("checker", "").rpartition(":")[0]
        return digests_of_files({"classes": options.get("classes", ""), "checker": checker})

    def options_of(self, given: Mapping[str, Any]) -> ForcedOptions:
        """As of every analysis; the checker may be a function."""
        checker = given.get("checker")
        if checker is None or isinstance(checker, str):
            return super().options_of(given)
        if not callable(checker):
            raise InputError(f"forced: checker is {checker!r}, expected a function, or FILE.py:function")
        plain = super().options_of({name: value for name, value in given.items() if name != "checker"})
        return replace(plain, checker=Checker.of(checker))

    def model_jobs(self, folder: RunFolder, store: Store, options: ForcedOptions) -> Mapping[Path, Sequence[ModelJob]]:
        """Four branches of every event, as if none were left out."""
        place = folder.path / self.name / REPLIES
        columns = {role: store.events[f"y_{role}"].to_pylist() for role in ROLES}
        jobs: list[BranchJob] = []
        for pair in pairs_of(store) if len(store) else ():
            for branch in BRANCHES:
                of_role = columns[ROLES[0] if branch == "y_pt" else ROLES[1]]
                tokens = {event: of_role[event] for event in events_of_pair(store, pair)}
                jobs += _jobs(store, options, pair, branch, tokens, Limits())
        return {place: left(place, jobs)}

    def answer(
        self,
        run: Run,
        options: ForcedOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`Analysis.answer`."""
        folder = run.folder
        store = folder.open_store()
        self.check(store, options)
        beside = self.beside(folder, asdict(options))
        place = folder.path / self.name / REPLIES
        tables, groups, n_left_out = [REPLY.empty_table()], [], 0
        for pair in pairs_of(store) if len(store) else ():
            branches = _branches(store, run, options, pair)
            n_left_out += len(events_of_pair(store, pair)) - len(branches["y_it"])
            jobs = {
                branch: _jobs(store, options, pair, branch, {event: one.token for event, one in of.items()}, limits)
                for limits in (Limits.of(run.lineup),)
                for branch, of in branches.items()
            }
            engine = LocalEngine(store, load_backbone=run.load_blocks)
            every = [job for of in jobs.values() for job in of]
            run_left(every, place, engine, on_progress, run.runner)
            run.runner.check_all({place: every})
            table = _scored(store, run.lineup, options, pair, branches, place, jobs)
            tables.append(table)
            groups += list(groups_of(table, store, options))
        if n_left_out:
            say(
                f"{n_left_out} of {len(store)} events are left out: a token of theirs is special, or not read as one, "
                "or no position is left for another"
            )
        if len(store) and (unknown := sorted(options.lengths.keys() - {"", *_values(store, options)})):
            say(f"max_new: no event has {options.by} {unknown[0]!r}")
        made_from = self.made_with(folder, store, beside)
        notes = made_from | {"options": asdict(options)}
        write_atomically(self.table_path(folder), parquet_bytes(pa.concat_tables(tables), notes))
        return self.write(folder, options, groups, made_from)

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Effects on the suffix, and all scores."""
        several = [name for name in ("kind", "pair") if len({one[name] for one in groups}) > 1]

        def named(one: Mapping[str, Any]) -> str:
            of = [one[name] for name in several] + ([] if one["subset"] == "all" else [one["subset"]])
            return ", ".join([one["score"], *of])

        kinds = sorted({one["kind"] for one in groups}, key=lambda kind: (kind != FIRST_DIVERGENCE, kind))
        drawn = [one for one in groups if one["view"] == VIEWS[0] and one["kind"] == kinds[0]]
        bars: dict[str, list[tuple[str, Interval]]] = {}
        for name, quantity in _EFFECTS.items():
            bars[name] = [(named(one), one[quantity]) for one in drawn]
        said = "; ".join(f"{named(one)} {one['effect']['mean']:+.3f}" for one in drawn)
        return Section(
            title="Forced tokens",
            figures=[Bars("score of y_it less that of the other branch", bars, 0.0, f"Effects on the suffix: {said}.")],
            columns=["score, view", "events", "prompts", *BRANCHES, *_EFFECTS],
            rows=[
                [
                    f"{named(one)}, {one['view']}",
                    one["n_events"],
                    one["n_prompts"],
                    *(one[name] for name in (*BRANCHES, *_EFFECTS.values())),
                ]
                for one in groups
            ],
            shows=(
                "IT alone goes on behind either token. An effect on the suffix, which has no forced token in it, is "
                "what taking y_it in place of y_pt does to the rest. The two matched branches say what any token as "
                "unlikely as y_pt would do."
            ),
            does_not_show=(
                "Nothing is patched here: the effect is of the token, not of a state or of blocks. Scores are rules "
                "over texts; what they take for an answer or a refusal may be none."
            ),
        )


_EFFECTS = {
    "y_it - y_pt": "effect",
    "y_it - rank matched": "effect_rank_matched",
    "y_it - class matched": "effect_class_matched",
}


def _jobs(
    store: Store, options: ForcedOptions, pair: tuple[str, str], branch: str, tokens: Mapping[int, int], limits: Limits
) -> list[BranchJob]:
    """The jobs of one branch, for each length of a reply."""
    lengths, values = options.lengths, _values(store, options)
    by_length: dict[int, dict[int, int]] = {}
    for event, token in tokens.items():
        by_length.setdefault(lengths.get(values[event], lengths[""]), {})[event] = token
    return [
        job
        for max_new, of in sorted(by_length.items())
        for job in branch_jobs(store, branch, of, pair[1], max_new, limits)
    ]


def _values(store: Store, options: ForcedOptions) -> list[str]:
    """Of each event, the value of the column that groups are made of."""
    if options.by not in store.events.column_names:
        return [""] * len(store)
    return ["" if value is None else str(value) for value in values_of(store.events[options.by])]


class _Forced(NamedTuple):
    """One token, and its log-probability under IT."""

    token: int
    log_prob: float


class _Tokens:
    """Which tokens may be forced, and of which class they are."""

    def __init__(self, lineup: Lineup, label: str, classes: TokenClasses) -> None:
        """As the tokenizer of this checkpoint reads them."""
        self._encoder, self._classes = lineup.checkpoints[label].encoder, classes
        self.never = frozenset(lineup.special_ids) | frozenset(lineup.masked_ids)
        self.may_be = functools.cache(self._may_be)
        self.class_of = functools.cache(self._class_of)

    def _may_be(self, token: int) -> bool:
        if token in self.never or token not in self._encoder.token_of:
            return False
        return self._encoder.encode([self._encoder.decode([token])], add_special_tokens=False) == [[token]]

    def _class_of(self, token: int) -> str:
        return self._classes.of(self._encoder.decode([token]))


def _branches(store: Store, run: Run, options: ForcedOptions, pair: tuple[str, str]) -> dict[str, dict[int, _Forced]]:
    """The tokens of each branch, by the event's number; of an event that has both of its own."""
    tokens = _Tokens(run.lineup, pair[1], _classes(options))
    y_pt, y_it = (store.events[f"y_{role}"].to_pylist() for role in ROLES)
    positions, most = store.events["position"].to_pylist(), run.lineup.max_positions
    own = [
        event
        for event in events_of_pair(store, pair)
        if tokens.may_be(y_pt[event]) and tokens.may_be(y_it[event]) and (most is None or positions[event] + 1 < most)
    ]
    found: dict[str, dict[int, _Forced]] = {branch: {} for branch in BRANCHES}
    readout = run.load_readout(pair[1]) if own else None
    for start in range(0, len(own) if readout is not None else 0, _EVENTS_AT_ONCE):
        events = own[start : start + _EVENTS_AT_ONCE]
        every = readout.logits(store.final(pair[1], events)).double().log_softmax(dim=-1)  # type: ignore[union-attr]
        for event, log_probs in zip(events, every, strict=True):
            chosen = {"y_it": y_it[event], "y_pt": y_pt[event]}
            chosen |= alternatives(log_probs, y_it[event], y_pt[event], tokens.may_be, tokens.class_of)
            for branch, token in chosen.items():
                found[branch][event] = _Forced(token, float(log_probs[token]))
    return found


def alternatives(
    log_probs: torch.Tensor,
    y_it: int,
    y_pt: int,
    may_be: Callable[[int], bool],
    class_of: Callable[[int], str],
) -> dict[str, int]:
    """The tokens of the two matched branches, as far as there are such.

    Args:
        log_probs: ``[V]``, of the next token; -inf of those that are never chosen.
        y_it, y_pt: the event's tokens.
        may_be: whether a token may be forced.
        class_of: of a token.

    Returns:
        By branch; of equally near tokens the lower one.
    """
    order = (log_probs - log_probs[y_pt]).abs().argsort(stable=True)
    candidates = (token for token in order.tolist() if token not in (y_it, y_pt) and torch.isfinite(log_probs[token]))
    found: dict[str, int] = {}
    for token in candidates:
        if not may_be(token):
            continue
        if "rank_matched" not in found:
            found["rank_matched"] = token
        elif class_of(token) == class_of(y_pt):
            found["class_matched"] = token
            break
    return found


# ---- scores ----

REPLY = pa.schema(
    [
        ("event_id", pa.string()),
        ("prompt_id", pa.string()),
        ("kind", pa.string()),
        ("pair", pa.string()),
        ("branch", pa.string()),
        ("token_id", pa.int64()),
        ("log_prob", pa.float64()),
        ("ended_by", pa.string()),
        ("n_tokens", pa.int64()),
        ("view", pa.string()),
        ("text", pa.string()),
        ("exact", pa.float64()),
        ("behaviour", pa.float64()),
        ("checker", pa.float64()),
        (SAME, pa.float64()),
    ]
)
SCORES = REPLY.names[-4:]


def _scored(
    store: Store,
    lineup: Lineup,
    options: ForcedOptions,
    pair: tuple[str, str],
    branches: Mapping[str, Mapping[int, _Forced]],
    place: Path,
    jobs: Mapping[str, Sequence[BranchJob]],
) -> pa.Table:
    """One row per event, branch and view, in the order of the store."""
    special, encoder = lineup.special_ids, lineup.checkpoints[pair[1]].encoder
    replies = {
        branch: {row["event_id"]: row for row in read_branches(place, of).to_pylist()} for branch, of in jobs.items()
    }
    by = scorers(options.answer, options.expected, _checker(options))
    rows: list[dict[str, Any]] = []
    columns = {name: values_of(store.events[name]) for name in store.events.column_names}
    for event in branches["y_it"]:
        prompt = {name: values[event] for name, values in columns.items()}
        score = functools.cache(lambda name, text, prompt=prompt: by[name](text, prompt))  # equal texts, equal scores
        texts: dict[str, str] = {}  # of branch y_it, which is the first
        of_branches = (one for one in product(BRANCHES, VIEWS) if event in branches[one[0]])
        for branch, view in of_branches:
            forced, reply = branches[branch][event], replies[branch][prompt["event_id"]]
            suffix = [token for token in reply["tail"] if token not in special]
            ids = {"suffix": suffix, "whole": [forced.token, *suffix], "first": suffix[:FIRST_TOKENS]}[view]
            text = encoder.decode(ids) if ids else ""
            row = {name: prompt[name] for name in REPLY.names[:4]}
            row |= {"branch": branch, "token_id": forced.token, "log_prob": forced.log_prob}
            row |= {"ended_by": reply["ended_by"], "n_tokens": len(reply["tail"]), "view": view, "text": text}
            row |= {name: score(name, text) for name in by}
            row[SAME] = None if view == "whole" else float(text == texts.setdefault(view, text))
            rows.append(row)
    return pa.Table.from_pylist(rows, REPLY)


def groups_of(table: pa.Table, store: Store, options: ForcedOptions) -> Iterator[dict[str, Any]]:
    """The groups of the replies of one pair: by kind, score, value of the column, and view."""
    values = dict(zip(store.events["event_id"].to_pylist(), _values(store, options), strict=True))
    subsets = pa.array([values[event] for event in table["event_id"].to_pylist()], pa.string())
    for kind in sorted(set(table["kind"].to_pylist())):
        of_kind = pc.equal(table["kind"], kind)
        names = sorted(
            {one for one, kept in zip(subsets.to_pylist(), of_kind.to_pylist(), strict=True) if kept and one}
        )
        for score, subset, view in product(SCORES, ["", *names], VIEWS):
            kept = pc.and_(of_kind, pc.equal(table["view"], view))
            kept = pc.and_(kept, pc.equal(subsets, subset)) if subset else kept
            numbers = _numbers(table.filter(pc.and_(kept, pc.is_valid(table[score]))), score, options)
            if numbers is not None:
                group = {"kind": kind, "pair": table["pair"][0].as_py(), "score": score}
                yield group | {"subset": f"{options.by}={subset}" if subset else "all", "view": view} | numbers


def _numbers(table: pa.Table, score: str, options: ForcedOptions) -> dict[str, Any] | None:
    """Means and effects of one score in one view; None where no event has it in both of its own branches."""
    of_branch: dict[str, dict[str, float]] = {branch: {} for branch in BRANCHES}
    prompts: dict[str, str] = {}
    columns = (table[name].to_pylist() for name in ("event_id", "prompt_id", "branch", score))
    for event, prompt, branch, value in zip(*columns, strict=True):
        of_branch[branch][event], prompts[event] = value, prompt
    own = [event for event in of_branch["y_it"] if event in of_branch["y_pt"]]
    if not own:
        return None
    how: dict[str, Any] = {"weights": options.weights, "draws": options.draws, "seed": options.seed}

    def means(events: Sequence[str], values: Mapping[str, Any]) -> dict[str, Number]:
        if not events:
            return {name: number(None, None) for name in values}
        sample = Sample.of([prompts[event] for event in events], values, **how)
        return {name: sample.mean(name) for name in values}

    it, pt = (np.array([of_branch[branch][event] for event in own]) for branch in BRANCHES[:2])
    found: dict[str, Any] = {"n_events": len(own), "n_prompts": len({prompts[event] for event in own})}
    found |= means(own, {"y_it": it, "y_pt": pt, "effect": it - pt})
    for branch in _ALTERNATIVES:
        events = [event for event in own if event in of_branch[branch]]
        matched = np.array([of_branch[branch][event] for event in events])
        less = np.array([of_branch["y_it"][event] for event in events]) - matched
        found |= means(events, {branch: matched, f"effect_{branch}": less})
    return found


def _classes(options: ForcedOptions) -> TokenClasses:
    return read_token_classes(options.classes) if options.classes else TokenClasses()


def _checker(options: ForcedOptions) -> Checker | None:
    if isinstance(options.checker, Checker):
        return options.checker
    return Checker.read(options.checker) if options.checker else None


ANALYSIS = Forced()
