"""Train: a crosscoder of each block's MLP outputs, on the rows of a corpus.

A paired crosscoder per block (arXiv 2605.07284, exp34): one sparse code for the rows of both checkpoints at the same
tokens, by BatchTopK. The defaults are the published ones where a number does not depend on the size: `k` 64, annealed
from 256 over the first twelfth of the steps; Adam at 1e-4, warmed up over a 24th of them; gradients clipped to norm 1;
batches of 512 rows, 24,000 steps; an auxiliary loss of weight 1/32 over at most 1,024 dead features. The width is 32
features per hidden dimension, as for 4,096 of them. What the paper does not say: a feature is dead after 1,000 steps
without being on, and the mean that is subtracted is that of 128 batches.

The weights lie in `RUN/features/crosscoders/bNNN`. A killed training goes on from its last save: on the CPU, with the
same number of threads, to the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from actcache.analyses.features.before import BATCH_BYTES, Before
from actcache.analyses.features.crosscoder import Crosscoder, crosscoder_folder, describe
from actcache.analyses.features.step import SITE, Step, blocks_of, open_corpus, records_of
from actcache.analyses.features.trainer import STATE, Recipe, Trainer, check_same
from actcache.errors import CorruptFileError, InputError
from actcache.files import make_folder, write_atomically
from actcache.progress import OnProgress, Tally, untold
from actcache.sealed import Sealed, parquet_bytes
from actcache.store import Store
from actcache.store.claims import Claims
from actcache.store.corpus import TRAIN
from actcache.store.feed import RowFeed
from actcache.store.storage import open_storage
from actcache.study.analysis import option
from actcache.study.dealt import Outlay
from actcache.study.run_folder import RunFolder
from actcache.study.section import Lines, Section

if TYPE_CHECKING:
    from actcache.study.cells import Finished
    from actcache.study.run import Run

_PER_DIMENSION = 32
_N_PRODUCTS = 6  # per row, with encoder and decoder: once forwards, twice backwards
_N_BYTES = 32  # per value of an encoder: of it and of a decoder, weights, gradients and two moments
_CURVE = 40  # points of a curve in the report, at most


@dataclass(frozen=True)
class TrainOptions:
    """What to train on, and every number of it."""

    corpus: str = option("", "store of the corpus (default: RUN/corpus)")
    blocks: str = option("all", "blocks to train a crosscoder of each: a list, or all that the corpus has")
    labels: str = option("pair", "checkpoints to encode together: the run's pair, all, or a list (default %(default)s)")
    width: int = option(0, "features of a crosscoder (default: 32 per hidden dimension)", type=int)
    k: int = option(64, "features per row, on average (default %(default)s)", type=int)
    k_start: int = option(0, "features per row at the beginning (default: 4 times k)", type=int)
    anneal_steps: int = option(-1, "steps over which k is reached (default: a twelfth of the steps)", type=int)
    steps: int = option(24_000, "steps to train (default %(default)s)", type=int)
    batch: int = option(512, "rows per step (default %(default)s)", type=int)
    learning_rate: float = option(1e-4, "learning rate of Adam (default %(default)s)", type=float)
    warmup_steps: int = option(-1, "steps over which the learning rate grows (default: a 24th of the steps)", type=int)
    clip: float = option(1.0, "norm of the gradient, at most (default %(default)s)", type=float)
    aux_k: int = option(0, "dead features per row that the auxiliary loss takes (default: 1024, an 8th of the width)",
                        type=int)  # fmt: skip
    aux_weight: float = option(1 / 32, "weight of the auxiliary loss (default %(default)s)", type=float)
    dead_steps: int = option(1000, "steps without being on after which a feature is dead (default %(default)s)",
                             type=int)  # fmt: skip
    threshold_batches: int = option(64, "batches that give the threshold of inference (default %(default)s)", type=int)
    mean_batches: int = option(128, "batches that give the mean to subtract (default %(default)s)", type=int)
    init_norm: float = option(0.1, "norm of the decoder rows at the beginning (default %(default)s)", type=float)
    save_steps: int = option(1000, "steps between two saves (default %(default)s)", type=int)
    seed: int = option(0, "seed of the weights and of the order of rows (default %(default)s)", type=int)

    def recipe(self, hidden: int) -> Recipe:
        """All numbers, of rows of this hidden size.

        Raises:
            InputError: one is out of its range.
        """
        width = self.width or _PER_DIMENSION * hidden
        found = Recipe(
            n_features=width,
            k=self.k,
            k_start=self.k_start or min(4 * self.k, width),
            anneal_steps=self.steps // 12 if self.anneal_steps < 0 else self.anneal_steps,
            steps=self.steps,
            learning_rate=self.learning_rate,
            warmup_steps=self.steps // 24 if self.warmup_steps < 0 else self.warmup_steps,
            clip=self.clip,
            aux_k=self.aux_k or max(1, min(1024, width // 8)),
            aux_weight=self.aux_weight,
            dead_steps=self.dead_steps,
            threshold_batches=self.threshold_batches,
            mean_batches=self.mean_batches,
            init_norm=self.init_norm,
            seed=self.seed,
        )
        for name, least in (
            *(("width", 1), ("k", 1), ("steps", 1), ("batch", 2), ("dead_steps", 1), ("threshold_batches", 1)),
            *(("mean_batches", 1), ("save_steps", 1), ("seed", 0), ("aux_weight", 0), ("clip", 0)),
            *(("k_start", 0), ("aux_k", 0)),
        ):
            value = width if name == "width" else getattr(self, name)
            if not value >= least:
                raise InputError(f"{name} is {value}: give {least} or more")
        if self.seed >= 2**63:
            raise InputError(f"seed is {self.seed}: give less than 2**63")
        if not max(found.k, found.k_start) <= width:
            raise InputError(f"k is {found.k}, at first {found.k_start}, of {width} features: give fewer, or a --width")
        if not (self.learning_rate > 0 and self.init_norm > 0 and self.clip > 0):
            raise InputError("learning_rate, init_norm and clip: give numbers above 0")
        return found


class Train(Step[TrainOptions]):
    """Crosscoders of some blocks."""

    name = "features train"
    options = TrainOptions
    needs_less = "a smaller --width or --batch needs less"

    def check(self, store: Store, options: TrainOptions) -> None:
        """The numbers; the corpus is looked at when it is opened."""
        options.recipe(store.width)

    def answer(
        self,
        run: Run,
        options: TrainOptions,
        *,
        on_progress: OnProgress = untold,
        say: Callable[[str], None] = lambda line: None,
    ) -> dict[str, Any]:
        """See :meth:`Analysis.answer`; what is trained already, with the same options, stays as it is."""
        folder, store = run.folder, run.folder.open_store()
        corpus = open_corpus(folder, options.corpus, store)
        recipe = options.recipe(corpus.width)
        blocks, labels = blocks_of(options.blocks, corpus), _labels(options.labels, store, corpus)
        device = run.placement.devices[0]
        size = len(labels) * corpus.width * recipe.n_features
        n_products = _N_PRODUCTS * float(size) * options.batch * recipe.steps * len(blocks)
        say(
            f"{len(blocks)} x {recipe.steps:,} steps of {options.batch:,} rows: {n_products:.3g} multiply-adds; "
            f"weights, gradients and moments take {_N_BYTES * size / 1e9:.3g} GB, the activations of a batch as much "
            f"as {BATCH_BYTES * options.batch * recipe.n_features / 1e9:.3g} GB"
        )
        tally = Tally(recipe.steps * len(blocks), "steps", on_progress)
        for block in blocks:
            feed = RowFeed(
                corpus,
                labels=labels,
                boundaries=[block],
                site=SITE,
                positions=TRAIN,
                batch_rows=options.batch,
                seed=options.seed,
                drop_last=True,
            )
            _train(crosscoder_folder(folder.features, block), feed, recipe, device, options.save_steps, tally)
        trained = {block: describe(crosscoder_folder(folder.features, block)) for block in blocks}
        made_from = self.made_from(folder, store)
        log = [row for one in trained.values() for row in one.made_from["log"]]
        write_atomically(self.table_path(folder), parquet_bytes(pa.Table.from_pylist(log), made_from))
        groups = [_group(one) for one in trained.values()]
        return self.write(folder, options, groups, made_from)

    def planned(self, before: Before, folder: RunFolder, finished: Finished) -> Outlay:
        """Every step of every block."""
        options = self.options()
        recipe = options.recipe(before.store.width)
        memory = float(_N_BYTES) * before.n_values + BATCH_BYTES * options.batch * recipe.n_features
        outlay = before.passes(float(options.batch) * recipe.steps, _N_PRODUCTS, options.batch)
        return replace(outlay, memory_bytes=memory, stored_bytes=len(before.blocks) * float(before.crosscoder_bytes))

    def what_next(self, folder: RunFolder, options: TrainOptions) -> str:
        """The gate."""
        return f"{folder.features / 'crosscoders'} holds them; next: actcache features gate {folder.path}"

    def section(self, groups: Sequence[Mapping[str, Any]]) -> Section:
        """Curves of the variance explained, and where they ended."""
        labels = groups[0]["labels"]
        curves = {
            f"block {group['block']}, {label}": [
                (step, {"mean": value, "low": None, "high": None})
                for step, value in zip(group["curve"]["step"], group["curve"][label], strict=True)
            ]
            for group in groups
            for label in labels
        }
        ends = ", ".join(f"{name} {line[-1][1]['mean']:.1%}" for name, line in curves.items())
        return Section(
            title="Crosscoders of the MLP outputs",
            figures=[
                Lines(
                    "step", "variance explained of a batch that is trained on", curves, None, f"at the end {ends}", True
                )
            ],
            columns=["block", "features", "rows", "steps", "loss", "L0", "dead", "threshold", *map(_explained, labels)],
            rows=[
                [
                    f"{group['block']}",
                    group["n_features"],
                    group["n_rows"],
                    group["steps"],
                    group["loss"],
                    group["l0"],
                    _plain(group["dead"]),
                    group["threshold"],
                    *(_plain(group[f"ve_{label}"]) for label in labels),
                ]
                for group in groups
            ],
            shows=(
                "One sparse code stands for the MLP outputs of the checkpoints at the same tokens. The curves say how "
                "much of a batch's variance it explains while it is trained."
            ),
            does_not_show=(
                "The numbers are of rows that were trained on. 'actcache features gate' says how well the code does on "
                "held-out texts. Another seed gives other features."
            ),
            shares=("dead", *map(_explained, labels)),
        )


def _train(place: Path, feed: RowFeed, recipe: Recipe, device: str, save_every: int, tally: Tally) -> None:
    """Train one block, unless it is trained; one process at a time, as two would remove each other's files."""
    make_folder(place)
    with Claims(open_storage(place)) as claims, claims.alone(STATE):
        trainer = Trainer(feed, recipe, device)
        if _is_whole(place):
            check_same(describe(place).made_from.get("training", {}), trainer.identity, place)
            tally.add(found=recipe.steps)
        else:
            trainer.resume(place)
            tally.add(found=trainer.step)
            crosscoder = trainer.run(place, save_every, tally.add)
            made_from = {"training": trainer.identity, "corpus": records_of(feed.chosen.store), "log": trainer.log}
            crosscoder.save(place, made_from)
        Trainer.remove(place)


def _is_whole(place: Path) -> bool:
    """Whether a crosscoder is there; one that is damaged is trained again, as the error says that names it."""
    try:
        Crosscoder.load(place)
    except (InputError, CorruptFileError):
        return False
    return True


def _labels(given: str, store: Store, corpus: Store) -> list[str]:
    """The branches, in their order."""
    known = corpus.checkpoints
    if given == "all":
        return known
    labels = list(store.fingerprint.event_pairs[0]) if given == "pair" else [one.strip() for one in given.split(",")]
    if missing := [label for label in labels if label not in known]:
        raise InputError(f"the corpus has rows of {', '.join(known)}, not of {missing[0]}: capture it with both")
    if len(set(labels)) < len(labels):
        raise InputError(f"labels is {given!r}: name each checkpoint once")
    return labels


def _group(trained: Sealed) -> dict[str, Any]:
    """The numbers of one crosscoder, of what it says of itself."""
    described, made_from = trained.content, trained.made_from
    log, labels, recipe = made_from["log"], described["labels"], made_from["training"]["recipe"]
    last = log[-1]
    shown = log[:: max(1, len(log) // _CURVE)]
    shown = [*shown, last] if shown[-1] is not last else shown
    curve = {"step": [row["step"] for row in shown]}
    curve |= {label: [row[f"ve_{label}"] for row in shown] for label in labels}
    return {
        "block": described["block"],
        "labels": labels,
        "n_rows": made_from["training"]["n_rows"],
        **{name: recipe[name] for name in ("n_features", "k", "steps")},
        **{name: last[name] for name in ("loss", "aux_loss", "l0", "dead")},
        **{f"ve_{label}": last[f"ve_{label}"] for label in labels},
        "threshold": described["threshold"],
        "curve": curve,
    }


def _explained(label: str) -> str:
    return f"explained of {label}"


def _plain(value: float) -> dict[str, float | None]:
    return {"mean": value, "low": None, "high": None}


ANALYSIS = Train()
