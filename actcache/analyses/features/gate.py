"""Gate: is each crosscoder good enough to be used?

On rows of the texts that are held out, a crosscoder passes (arXiv 2605.07284, exp34) where three things hold:

- It explains at least 75% of the variance of each checkpoint's rows, with BatchTopK and not by the threshold.
- The features per row are within 10% of `k`.
- The share of alive features lies in [.01, .20].

*Alive* is worded in two ways. The published code counts the features that are on at least once in one batch of 2,048
rows (`code`, the default). The paper words it as the share of rows on which a feature is on, on average (`paper`).
Both are shown.

Where `features mediate` has removed features of these crosscoders, by the ranking that there is, two more things count.
Removing the best 200 must lower the interaction, and removing as many matched random ones must not lower it by more
than .05. Without a set of 200, its largest smaller one counts, and the table says of how many features it is.

BatchTopK has `k` features per row whenever enough are above 0. All later steps use the threshold, so its features per
row are held to the same 10%: `passes` asks for that too, `passes_published` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from actcache.analyses.features.batch_topk import batch_topk
from actcache.analyses.features.before import Before
from actcache.analyses.features.crosscoder import Crosscoder
from actcache.analyses.features.mediate import ANALYSIS as MEDIATE
from actcache.analyses.features.step import SITE, CorpusStep, load_crosscoders, open_corpus, trained_blocks
from actcache.errors import InputError
from actcache.files import write_atomically
from actcache.progress import OnProgress, Tally, untold
from actcache.schema import FIRST_DIVERGENCE
from actcache.sealed import parquet_bytes
from actcache.store import Store
from actcache.store.corpus import HELD_OUT_SHARE, VALIDATION
from actcache.store.feed import RowFeed
from actcache.store.rows import records_digest
from actcache.study.analysis import option
from actcache.study.dealt import Outlay
from actcache.study.run_folder import RunFolder
from actcache.study.section import Bars, Cell, Section
from actcache.study.statistics import DRAWS, SEED, Number, Sample, check_draws

if TYPE_CHECKING:
    from actcache.study.cells import Finished
    from actcache.study.run import Run

RULES = ("code", "paper")
N_REMOVED = 200
MOST_BY_CHANCE = 0.05  # logits of the interaction


@dataclass(frozen=True)
class GateOptions:
    """What a crosscoder must reach."""

    corpus: str = option("", "store of the corpus (default: RUN/corpus)")
    min_explained: float = option(0.75, "variance of each checkpoint to explain, at least (default 0.75)", type=float)
    l0_tolerance: float = option(0.1, "distance of the features per row from k, as a share (default 0.1)", type=float)
    alive: str = option("0.01,0.2", "share of alive features, at least and at most (default %(default)s)")
    alive_rule: str = option("code", "wording of alive: code, on once in a batch; paper, share of rows (default code)")
    batch: int = option(2048, "rows of a batch (default %(default)s)", type=int)
    draws: int = option(DRAWS, "bootstrap draws over texts (default %(default)s)", type=int)
    seed: int = option(SEED, "seed of the order of rows, and of the bootstrap (default %(default)s)", type=int)

    @property
    def alive_range(self) -> tuple[float, float]:
        """The least and the largest share (InputError: not two numbers, in this order)."""
        try:
            low, high = map(float, self.alive.split(","))
        except ValueError as error:
            raise InputError(f"alive is {self.alive!r}, expected two shares such as 0.01,0.2") from error
        if not low <= high:
            raise InputError(f"alive is {self.alive!r}, expected the smaller share first")
        return low, high


class Gate(CorpusStep[GateOptions]):
    """Which crosscoders pass."""

    name = "features gate"
    options = GateOptions
    needs_less = "a smaller --batch needs less"

    def check(self, store: Store, options: GateOptions) -> None:
        """Draws and bounds."""
        check_draws(options.draws, options.seed)
        _ = options.alive_range
        if options.alive_rule not in RULES:
            raise InputError(f"alive_rule is {options.alive_rule!r}, expected one of {', '.join(RULES)}")
        if options.batch < 1:
            raise InputError(f"batch is {options.batch}: give 1 row or more")

    def answer(
        self,
        run: Run,
        options: GateOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`Analysis.answer`."""
        folder, store = run.folder, run.folder.open_store()
        self.check(store, options)
        corpus = open_corpus(folder, options.corpus, store)
        blocks = trained_blocks(folder)
        tally = Tally(len(blocks), "crosscoders", on_progress)
        tables, groups = [], []
        made_from = self.made_with(folder, store, {"corpus": records_digest(corpus)})
        drops = drops_found(folder, store)
        for block in blocks:
            crosscoder = load_crosscoders(folder, [block], run.placement.devices[0])[block]
            table, alive = measured(crosscoder, corpus, options.batch, options.seed)
            tables.append(table)
            groups.append(judged(crosscoder, table, alive, options, drops))
            tally.add(1, doing=f"block {block}")
        write_atomically(self.table_path(folder), parquet_bytes(pa.concat_tables(tables), made_from))
        return self.write(folder, options, groups, made_from)

    def read(self, folder: RunFolder, store: Store) -> dict[str, Any] | None:
        """See :meth:`Analysis.read`; drops that it counts must still be those that are found."""
        content = super().read(folder, store)
        if content is None:
            return None
        counted = [_drops_of(group) for group in content["groups"]]
        return content if not any(counted) or all(of == drops_found(folder, store) for of in counted) else None

    def planned(self, before: Before, folder: RunFolder, finished: Finished) -> Outlay:
        """Held-out rows: read for their mean, encoded and decoded as what is kept of them, and by the threshold."""
        return before.passes(before.n_rows * HELD_OUT_SHARE, 3, self.options().batch, n_read=2)

    def what_next(self, folder: RunFolder, options: GateOptions) -> str:
        """Where it is."""
        return f"{self.path(folder)} holds it; next: actcache features contexts {folder.path}"

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """What each crosscoder reaches, and whether it passes."""
        labels = groups[0]["labels"]
        explained = [f"explained of {label}" for label in labels]
        alive = ["alive (code)", "alive (paper)"]
        k = groups[0].get("drop_k")
        drops = {"drop_top": f"drop of the best {k}", "drop_random": f"drop of {k} random ones"}
        drops = {name: head for name, head in drops.items() if all(name in group for group in groups)}

        def row(group: Mapping[str, Any]) -> list[Cell]:
            failed = ", ".join(group["fails"])
            return [
                f"{group['block']}",
                f"no: {failed}" if failed else "yes",
                "yes" if group["passes_published"] else "no",
                group["n_rows"],
                group["n_prompts"],
                *(group[f"ve_{label}"] for label in labels),
                group["k"],
                group["l0"],
                group["l0_threshold"],
                _plain(group["alive_code"]),
                _plain(group["alive_paper"]),
                *(_plain(group[name]) for name in drops),
            ]

        n_pass = sum(group["passes"] for group in groups)
        bars = {label: [(f"block {one['block']}", one[f"ve_{label}"]) for one in groups] for label in labels}
        least = groups[0]["min_explained"]
        return Section(
            title="The gate of the crosscoders",
            figures=[Bars("variance explained, held-out texts", bars, least, f"{n_pass} of {len(groups)} pass", True)],
            columns=[
                "block",
                "passes",
                "by the published rule",
                "rows",
                "texts",
                *explained,
                "k",
                "L0",
                "L0 by threshold",
                *alive,
                *drops.values(),
            ],
            rows=[row(group) for group in groups],
            shows=(
                f"{n_pass} of {len(groups)} crosscoders pass on texts that none was trained on. A crosscoder that does "
                "not explain the rows of both checkpoints says little about what the block does."
            ),
            does_not_show=(
                "Variance explained says nothing of whether features cause anything, or mean anything. Intervals are "
                "over these texts, of this crosscoder: another seed trains another one."
            ),
            shares=(*explained, *alive),
        )


@torch.no_grad()
def measured(crosscoder: Crosscoder, corpus: Store, batch_rows: int, seed: int) -> tuple[pa.Table, dict[str, float]]:
    """What a crosscoder makes of held-out rows.

    Returns:
        a row per text: of its rows, ``n_rows``, and per label the squared error ``sse_LABEL`` and the squares about the
        mean ``sst_LABEL``; how many features are on, ``n_on`` by BatchTopK and ``n_on_threshold``. And the share of
        features that are on at least once in a batch (``code``, the mean of whole batches), and the mean share of rows
        that a feature is on (``paper``).
    """
    feed = RowFeed(
        corpus,
        labels=crosscoder.labels,
        boundaries=[crosscoder.block],
        site=SITE,
        positions=VALIDATION,
        batch_rows=batch_rows,
        seed=seed,
    )
    device = crosscoder.encoder.device
    texts = corpus.sequences["prompt_id"].to_pylist()
    firsts = np.cumsum([0, *(segment.n_sequences for segment in corpus.segments)])

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in feed:
            places = feed.locate(batch.rows)
            yield batch.states[:, :, 0].to(device).float(), torch.from_numpy(firsts[places.segment] + places.sequence)

    total = torch.zeros(len(crosscoder.labels), crosscoder.width, dtype=torch.float64, device=device)
    for rows, _ in batches():
        total += rows.double().sum(dim=0)
    mean = total / feed.chosen.n_rows
    names = ["n_rows", "n_on", "n_on_threshold"]
    names += [f"{what}_{label}" for what in ("sse", "sst") for label in crosscoder.labels]
    sums = torch.zeros(len(texts), len(names), dtype=torch.float64)
    once, n_on = [], 0.0
    for rows, whose in batches():
        raw = crosscoder.raw(rows)
        kept = batch_topk(raw * crosscoder.scale, crosscoder.k)
        left = (rows - crosscoder.decode(raw * kept)).double().square().sum(dim=2)
        about = (rows.double() - mean).square().sum(dim=2)
        by_threshold = (crosscoder.encode(rows) > 0).sum(dim=1)
        own = torch.column_stack([torch.ones_like(by_threshold), kept.sum(dim=1), by_threshold, left, about])
        sums.index_add_(0, whose, own.double().cpu())
        n_on += float(kept.sum())
        once.append((len(rows), float(kept.any(dim=0).float().mean())))
    whole = [share for n, share in once if n == batch_rows] or [share for _, share in once]
    alive = {
        "code": sum(whole) / len(whole),
        "paper": n_on / feed.chosen.n_rows / crosscoder.n_features,
    }
    counted = sums[:, 0] > 0
    columns = {name: sums[counted, at].numpy() for at, name in enumerate(names)}
    ids = [text for text, known in zip(texts, counted.tolist(), strict=True) if known]
    blocks = pa.array([crosscoder.block] * len(ids), pa.int32())
    return pa.table({"block": blocks, "prompt_id": pa.array(ids, pa.string()), **columns}), alive


def drops_found(folder: RunFolder, store: Store) -> dict[str, float]:
    """Mean drops of the interaction without the best ``k`` features, ``top``, and without matched ``random`` ones.

    They are those of `features mediate`, as long as its numbers are of what there is now: crosscoders, ranking, events.
    Its largest k up to 200 counts; where there is none, nothing is found.
    """
    found = MEDIATE.read(folder, store)
    groups = [one for one in found["groups"] if one["k"] <= N_REMOVED] if found else []
    kinds = [one["kind"] for one in groups]
    kind = FIRST_DIVERGENCE if FIRST_DIVERGENCE in kinds else min(kinds, default="")
    most = max((one["k"] for one in groups), default=0)
    drops = {one["set"]: one["drop"]["mean"] for one in groups if (one["kind"], one["k"]) == (kind, most)}
    known = {name: drops[name] for name in ("top", "random") if drops.get(name) is not None}
    return {"k": most, **known} if known else {}


def _drops_of(group: Mapping[str, Any]) -> dict[str, float]:
    """The drops that a group counts, as :func:`drops_found` gives them."""
    return {name: group[f"drop_{name}"] for name in ("k", "top", "random") if f"drop_{name}" in group}


def judged(
    crosscoder: Crosscoder,
    table: pa.Table,
    alive: Mapping[str, float],
    options: GateOptions,
    drops: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, Any]:
    """One group: what was measured, and what of it fails; ``drops`` as :func:`drops_found` gives them."""
    values = {name: table[name].to_numpy() for name in table.column_names[2:]}
    sample = Sample.of(table["prompt_id"], values, weights="event", draws=options.draws, seed=options.seed)

    def explained_of(label: str) -> Number:
        return sample.number(lambda means: 1 - means[f"sse_{label}"] / means[f"sst_{label}"])

    explained = {f"ve_{label}": explained_of(label) for label in crosscoder.labels}
    l0, by_threshold = (sample.ratio(name, "n_rows") for name in ("n_on", "n_on_threshold"))
    low, high = options.alive_range
    fails = [name for name, one in explained.items() if not (one["mean"] or 0.0) >= options.min_explained]
    fails += [] if _near(l0["mean"], crosscoder.k, options.l0_tolerance) else ["l0"]
    fails += [] if low <= alive[options.alive_rule] <= high else ["alive"]
    fails += ["drop"] if "top" in drops and not drops["top"] > 0 else []
    fails += ["drop_random"] if "random" in drops and not drops["random"] <= MOST_BY_CHANCE else []
    published = not fails
    fails += [] if _near(by_threshold["mean"], crosscoder.k, options.l0_tolerance) else ["l0_threshold"]
    return {
        "block": crosscoder.block,
        "labels": list(crosscoder.labels),
        "n_rows": int(values["n_rows"].sum()),
        "n_prompts": table.num_rows,
        "k": crosscoder.k,
        "min_explained": options.min_explained,
        **explained,
        "l0": l0,
        "l0_threshold": by_threshold,
        **{f"alive_{rule}": share for rule, share in alive.items()},
        "alive_rule": options.alive_rule,
        **{f"drop_{name}": drop for name, drop in drops.items()},
        "passes": not fails,
        "passes_published": published,
        "fails": fails,
    }


def _near(found: float | None, k: int, tolerance: float) -> bool:
    return found is not None and abs(found - k) <= tolerance * k


def _plain(value: float) -> dict[str, float | None]:
    return {"mean": value, "low": None, "high": None}


ANALYSIS = Gate()
