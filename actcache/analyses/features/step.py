"""Step: one of the steps by which features are trained, checked and used; the crosscoders and the corpus of them all.

A step is an analysis whose files lie in ``RUN/features``. Its numbers are shown as long as the crosscoders are those
that it was made with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from actcache.analyses.features.before import Before
from actcache.analyses.features.crosscoder import Crosscoder, crosscoder_folder, describe
from actcache.capture.settings import parse_sites
from actcache.errors import IncompatibleError, InputError
from actcache.files import make_folder
from actcache.fingerprint import MISSING
from actcache.sealed import Sealed
from actcache.store import Store
from actcache.store.rows import records_digest
from actcache.study.analysis import Analysis, Options
from actcache.study.dealt import Outlay
from actcache.study.run_folder import RunFolder

if TYPE_CHECKING:
    from actcache.study.cells import Finished
    from actcache.study.engine import LateJob

SITE = "mlp"


class Step(Analysis[Options]):
    """One step of the features of a run; its name is ``features STEP``."""

    opt_in = True

    @property
    def step(self) -> str:
        """Its name among the steps."""
        return self.name.rpartition(" ")[2]

    def path(self, folder: RunFolder, options: Options | None = None) -> Path:
        """Where its numbers lie."""
        return folder.features / f"{self.step}.json"

    def table_path(self, folder: RunFolder) -> Path:
        """Where its table lies."""
        return folder.features / f"{self.step}.parquet"

    def made_from(self, folder: RunFolder, store: Store) -> dict[str, Any]:
        """As of every analysis, and the crosscoders."""
        return super().made_from(folder, store) | {"crosscoders": crosscoder_digests(folder)}

    @abstractmethod
    def planned(
        self, before: Before, folder: RunFolder, finished: Finished
    ) -> Mapping[Path, Sequence[LateJob]] | Outlay:
        """What it will take with its default options: its replays, by the folder of their results; or, where its work
        is no jobs, what that takes.

        Args:
            before: what there will be.
            folder: of a run without results, which says how cells are replayed.
            finished: what the folder of its cells will hold.

        Raises:
            InputError: the store to come cannot serve it.
        """

    def write(
        self, folder: RunFolder, options: Options, groups: list[dict[str, Any]], made_from: dict[str, Any]
    ) -> dict[str, Any]:
        """See :meth:`Analysis.write`."""
        make_folder(folder.features)
        return super().write(folder, options, groups, made_from)


class CorpusStep(Step[Options]):
    """A step that reads rows of a corpus, which its option ``corpus`` names."""

    def beside(self, folder: RunFolder, options: Mapping[str, Any]) -> dict[str, str]:
        """What writers committed of the corpus."""
        from actcache.store import open_store

        try:
            return {"corpus": records_digest(open_store(options["corpus"] or folder.corpus))}
        except InputError:  # it is gone
            return {}


def described_crosscoders(folder: RunFolder) -> dict[int, Sealed]:
    """What the crosscoders of a run say of themselves, by block; without their weights."""
    found = (describe(path.parent) for path in folder.features.glob("crosscoders/b*/crosscoder.json"))
    return {one.content["block"]: one for one in sorted(found, key=lambda one: one.content["block"])}


def crosscoder_digests(folder: RunFolder) -> dict[str, str]:
    """What tells the crosscoders of a run from all others, by block."""
    return {str(block): one.content["digest"] for block, one in described_crosscoders(folder).items()}


def load_crosscoders(
    folder: RunFolder, blocks: Sequence[int] = (), device: str | torch.device = "cpu"
) -> dict[int, Crosscoder]:
    """The crosscoders of a run, by block; all of them where no blocks are given.

    Raises:
        InputError: there is none, or none of such a block.
        CorruptFileError: one is damaged.
    """
    known = trained_blocks(folder)
    if missing := [block for block in blocks if block not in known]:
        raise InputError(
            f"{folder.path} has no crosscoder of block {missing[0]}, but of {', '.join(map(str, known))}: "
            f"'actcache features train {folder.path} --blocks {missing[0]}' trains it"
        )
    return {block: Crosscoder.load(crosscoder_folder(folder.features, block), device) for block in blocks or known}


def trained_blocks(folder: RunFolder) -> list[int]:
    """The blocks whose crosscoders a run has (InputError: none)."""
    if known := list(described_crosscoders(folder)):
        return known
    raise InputError(f"{folder.path} has no crosscoders: 'actcache features train {folder.path}' trains them")


def blocks_of(text: str, corpus: Store) -> tuple[int, ...]:
    """``29,30``, or ``all`` whose rows a corpus has.

    Raises:
        InputError: the corpus lacks one, or has rows of no block's MLP.
    """
    stored = corpus.sites.get(SITE, [])
    n_blocks = corpus.fingerprint.n_blocks
    blocks = stored if text == "all" else [block for _, block in parse_sites([f"{SITE}:{text}"], n_blocks)]
    missing = [str(block) for block in blocks if block not in stored]
    if missing or not blocks:
        raise InputError(
            f"{corpus.path} has no MLP rows of block {', '.join(missing) or 'any'}, but of "
            f"{', '.join(map(str, stored)) or 'none'}; "
            f"'actcache capture --corpus TEXTS.jsonl --site {SITE}:BLOCKS' with the same --out adds them"
        )
    return tuple(blocks)


def open_corpus(folder: RunFolder, given: str, store: Store) -> Store:
    """The corpus that features are trained on: of ``RUN/corpus``, or the one that is given.

    Raises:
        InputError: there is none, it has events, or not all texts that were asked for.
        IncompatibleError: it is of other checkpoints than the run.
    """
    from actcache.store import open_store

    place = given or str(folder.corpus)
    capture = f"'actcache capture --corpus TEXTS.jsonl --site {SITE}:BLOCKS --out {given or folder.path}'"
    try:
        corpus = open_store(place)
    except InputError as error:
        raise InputError(f"{place} holds no corpus ({error}); {capture} makes one") from error
    if corpus.fingerprint.dropped is None:
        raise InputError(f"{place} is no corpus of texts, but a store of events; {capture} makes one")
    if corpus.sequences.num_rows < corpus.n_prompts:
        found = f"{corpus.sequences.num_rows:,} of {corpus.n_prompts:,}"
        raise InputError(f"{place} holds {found} texts: give the capture command again until all are captured")
    for label, captured in store.fingerprint.checkpoints.items():
        of_corpus = corpus.fingerprint.checkpoints.get(label)
        if of_corpus is not None and (field := captured.differs_in(of_corpus)) is not None:
            raise IncompatibleError(
                f"{place} is a corpus of another checkpoint {label} than the run's: its {field} is "
                f"{getattr(of_corpus, field, MISSING)}, the run's {getattr(captured, field, MISSING)}",
                field=f"checkpoints.{label}.{field}",
            )
    return corpus


def records_of(corpus: Store) -> dict[str, Any]:
    """What proves that a corpus is the same: its fingerprint, and how many texts and tokens it has."""
    n_tokens = sum(segment.record["n_tokens"] for segment in corpus.segments)
    return {"store": corpus.fingerprint.digest, "n_texts": corpus.sequences.num_rows, "n_tokens": n_tokens}
