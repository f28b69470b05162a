"""Feeding other analyses: a store's rows as shuffled batches, aligned across checkpoints and boundaries.

For trainers of SAEs, crosscoders and probes. Knows stores; knows no models and no trainer.

**The order.** An epoch is one sequence of batches, through all segments, that depends on (seed, epoch) and the options
alone. Ranks and their workers take turns at it: rank r of w begins with batch r and goes on with every w-th one, and so
do its workers among these. So any number of them feed the same batches, and a position in an epoch is one number: how
many batches of it have been fed. What decides the quality is which rows can meet in a batch:

- ``blocks`` (the default): the order permutes *blocks*, the chosen rows of one stored chunk (256 KiB per array), or
  of less where a lane would hold fewer than 64 of them. It is cut into *rounds* of as many rows as memory holds, and a
  round into *lanes*, whose batches alternate; the rows of a lane are in uniformly random order. So an epoch decodes
  each chunk once, those at a lane's edges twice. Any two rows of the store can meet in a batch. What is left of the
  stored order: a block's rows, neighbours in a text, all come within one lane of a round. So a batch of B rows holds
  about ``B * block_rows * lanes / pool_rows`` of one block. That is at most B / 64, and more than in a uniform
  permutation.
- ``rows``: the order permutes rows: exactly a uniform permutation of them all. Without a second copy of the store on
  disk this has a price: every pool takes rows of nearly every chunk, so an epoch decodes each chunk up to
  ``min(n_pools, rows of a chunk)`` times.

Several processes have a lane of a round each, or some, and decode no chunk that another one needs. Where there are
more of them than lanes, or a number that does not divide theirs, several decode the same lane, and each keeps the rows
of its own batches.

Where all rows fit into one round of one lane, both are the uniform permutation, at the same cost. Memory beside the
pool: 8 bytes a row (``rows``; 16 while it is made) or a block (``blocks``), and 8 a chosen row where not all are
chosen.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from actcache.errors import IncompatibleError, InputError
from actcache.store import Segment, Store, layout
from actcache.store.order import BLOCKS, LANE_BLOCKS, NONE, SHUFFLES, Order, most_lanes
from actcache.store.rows import Ints, Positions, RowPlaces, StoreRows, records_digest
from actcache.store.selection import Events

_ORDER = 2  # of earlier versions, the order depended on ranks and workers


class RowBatch(NamedTuple):
    """Rows of all checkpoints and boundaries asked for.

    Attributes:
        states: ``[B, K, n_boundaries, D]`` in the captured dtype, on the CPU, bit for bit, the caller's own.
        rows: ``[B]`` int64, which rows they are; :meth:`RowFeed.locate` says where those lie.
    """

    states: torch.Tensor
    rows: torch.Tensor


class RowFeed(IterableDataset[RowBatch]):
    """Every chosen row of a store once per epoch, in batches, in an order that (seed, epoch) decide.

    Iterate over it, over :meth:`batches` (which starts worker processes), or give it to a ``DataLoader`` with
    ``batch_size=None`` and any number of workers, forked or spawned. Each process opens the store for itself and has a
    pool of its own. The rows are those of the store as it was when the feed was made, also while it is compacted. A
    store that has grown since is noticed where a state is loaded: make all ranks' feeds of the store as it is then.

    Attributes:
        labels: the K checkpoints, in the order of the batch's axis.
        boundaries: likewise; of another site than ``state``, its blocks.
        site: where the rows were taken.
        chosen: the rows; ``chosen.n_rows`` is N, ``chosen.segments`` the segments' names.
        row_bytes: of one row of a batch, all checkpoints and boundaries.
        pool_rows: rows that one process holds at most, as it does where it is the only one.
        lanes: of a round; so many processes share an epoch and decode nothing twice.
        block_rows: stored rows that a block spans.
    """

    def __init__(
        self,
        store: Store | str | Path,
        *,
        labels: Sequence[str] | None = None,
        boundaries: Sequence[int] | None = None,
        site: str = layout.STATE,
        positions: Positions = "all",
        events: Events = None,
        batch_rows: int = 4096,
        shuffle: bool | str = True,
        seed: int = 0,
        epoch: int = 0,
        memory_bytes: int = 1 << 30,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Choose rows; reads no states.

        Args:
            store: an open store or its path.
            labels: of the checkpoints; None takes all, in lineup order.
            boundaries: None takes all; of other sites than ``state``, the indices of the blocks.
            site: ``state``; ``attention`` or ``mlp`` for what that part of the blocks gives.
            positions: which rows: ``all``, ``train``, ``held_out``, ``event``, a list or a function, as
                :class:`StoreRows` takes them.
            events: takes only rows of positions 0..p of these events, each once, see :class:`Store`; None takes all.
            batch_rows: B; the last batch of an epoch may have fewer.
            shuffle: ``blocks`` (or True), ``rows``, or ``none`` (or False); see the module.
            seed: of the order.
            epoch: the first one; see :meth:`set_epoch`.
            memory_bytes: of the pool of a process that is alone; several share it among them. One batch and some MB
                of compressed chunks come on top.
            drop_last: leave out an incomplete batch, and those that only some ranks would have.
            rank: which of ``world`` processes of a distributed job this is; each feeds every ``world``-th batch.
            world: how many there are. Each batch is the same however many there are.

        Raises:
            InputError: a label, boundary, site, event or option that cannot be, nothing chosen, or memory for less than
                a batch.
            CorruptStoreError: stored offsets, events or token ids are not those committed.
        """
        self.shuffle = (NONE, BLOCKS)[shuffle] if isinstance(shuffle, bool) else shuffle
        if self.shuffle not in SHUFFLES:
            raise InputError(f"shuffle is {shuffle!r}, expected one of {', '.join(SHUFFLES)}, or a bool")
        if batch_rows < 1 or min(seed, epoch) < 0 or not 0 <= rank < world:
            raise InputError(
                f"batch_rows {batch_rows}, seed {seed}, epoch {epoch}, rank {rank}, world {world}: expected at least "
                f"one row per batch, nothing negative, and a rank below world"
            )
        self.batch_rows, self.seed, self.drop_last, self.rank, self.world = batch_rows, seed, drop_last, rank, world
        self.chosen = StoreRows(store, positions, events)
        opened = self.chosen.store
        self.labels = _known("checkpoint", opened.checkpoints, labels)
        self.site = layout.check_site(site)
        self.boundaries = _known(layout.block_of(site), opened.sites.get(site, []), boundaries)
        self.dtype = opened.dtype
        self._row_shape = (len(self.labels), len(self.boundaries), opened.width)
        self.row_bytes = int(np.prod(self._row_shape)) * self.dtype.itemsize
        needed = min(batch_rows, self.chosen.n_rows) * self.row_bytes
        if memory_bytes < needed:
            raise InputError(f"memory_bytes is {memory_bytes}; one batch of {batch_rows} rows needs {needed}")
        # Where nothing is shuffled a batch is a round: so any number of workers keep the stored order.
        self._round_batches = 1 if self.shuffle == NONE else max(1, memory_bytes // self.row_bytes // batch_rows)
        self.pool_rows = min(self._round_batches * batch_rows, self.chosen.n_rows)
        is_of_blocks, chunk_rows = self.shuffle == BLOCKS, self.chosen.chunk_rows
        of_round = -(-self.pool_rows // batch_rows)
        self.lanes = most_lanes(self.pool_rows, of_round, chunk_rows) if is_of_blocks else 1
        self.block_rows = min(chunk_rows, max(1, self.pool_rows // self.lanes // LANE_BLOCKS))
        self._order = self._order_of(self.chosen)
        # In shared memory, so that workers that live through several epochs see it change.
        self._epoch = torch.tensor(epoch).share_memory_()
        # Everything that an epoch's batches depend on, as plain values; not which of them are fed here.
        self._identity = {"order": _ORDER, "store": opened.fingerprint.digest, "rows": self.chosen.digest()}
        names = ["labels", "boundaries", "shuffle", "seed", "batch_rows", "drop_last"]
        names += ["pool_rows", "lanes"] if is_of_blocks else []
        self._identity |= {name: getattr(self, name) for name in names}
        self._identity |= {"site": site, "records": records_digest(opened)}
        self._segments = self.chosen.segment_parts
        self._loaded: dict[str, Any] | None = None
        self._at = _position(epoch)

    def _order_of(self, chosen: StoreRows) -> Order:
        sizes = {"batch_rows": self.batch_rows, "round_batches": self._round_batches, "lanes": self.lanes}
        return Order(chosen.cut(self.block_rows), self.shuffle, self.seed, **sizes)

    def __repr__(self) -> str:
        labels, boundaries = ", ".join(self.labels), ", ".join(map(str, self.boundaries))
        of_site = "" if self.site == layout.STATE else f"{self.site} of blocks "
        return (
            f"<RowFeed: {self.chosen.n_rows} rows of {labels} at {of_site}{boundaries}, batches of {self.batch_rows}, "
            f"shuffle {self.shuffle}, epoch {self.epoch}>"
        )

    def __len__(self) -> int:
        """Batches of an epoch on this rank, whatever the number of workers."""
        return len(range(self.rank, self._n_fed, self.world))

    @property
    def _n_fed(self) -> int:
        """Batches of an epoch that all ranks feed together."""
        if self.drop_last:
            return self.chosen.n_rows // self.batch_rows // self.world * self.world
        return self._order.n_batches

    def locate(self, rows: torch.Tensor | npt.ArrayLike) -> RowPlaces:
        """Segment, sequence, position and token of a batch's rows (InputError: the store has no such row)."""
        return self.chosen.locate(rows)

    # ---- epochs and state ----

    @property
    def epoch(self) -> int:
        """The epoch that the next iteration feeds."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, and so the order, of the next iteration; another than the present one starts at its start.

        Workers see it too, those that outlive an epoch included. Without it every iteration gives the same order.
        """
        if epoch < 0:
            raise InputError(f"epoch {epoch} is negative")
        if epoch != self.epoch:
            self._epoch.fill_(epoch)
            self._loaded, self._at = None, _position(epoch)

    def state_dict(self, *, batches: int | None = None) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on after the last batch handed out: a few plain values.

        Right by itself after iterating over the feed or over :meth:`batches`, and in each worker of torchdata's
        ``StatefulDataLoader``, which asks it there. Where there are several ranks, it is the state of all of them, if
        all have drawn as many batches. A plain ``DataLoader`` with workers tells the feed nothing: then give the
        ``batches`` of this epoch that all ranks together have consumed.
        """
        at = self._at if batches is None else _position(self.epoch, batches)
        return {**at, "segments": dict(self._segments), "feed": dict(self._identity)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration give exactly the batches that were left, bit for bit; reads one round at most again.

        There may be other ranks and workers than before, and another number of them. Only the state of one worker of a
        ``StatefulDataLoader`` is that of a worker with its number, or the iteration raises InputError.
        The workers of a plain ``DataLoader`` begin there in every iteration until :meth:`set_epoch` says another epoch.
        Where a compaction has merged segments since, the order stays that of the state, as of a feed that lives on.

        Raises:
            IncompatibleError: the state is that of a feed of other rows or options, of an earlier version, or of the
                store before it grew; names the first field.
        """
        of_state = state["feed"]
        if of_state.get("order") != _ORDER:
            raise IncompatibleError(
                f"the state is of another version of actcache, whose epochs have another order "
                f"({of_state.get('order', 1)}, here {_ORDER}); begin its epoch {state['epoch']} again",
                field="order",
            )
        segments = state["segments"]
        laid_out = self.chosen.laid_out(segments)
        identity = self._identity | {"rows": laid_out.digest()}
        n_now, n_then = sum(self.chosen.segment_parts.values()), sum(segments.values())
        for field, value in identity.items():
            if of_state.get(field) == value:
                continue
            if field == "rows" and n_now > n_then:
                raise IncompatibleError(
                    f"the store has grown since the state was made, from {n_then} segments to {n_now}, and this feed "
                    "has rows of all: begin an epoch of it anew, or go on with a feed that was made before",
                    field=field,
                )
            raise IncompatibleError(
                f"this feed's {field} is {value!r}, that of the state {of_state.get(field)!r}", field=field
            )
        self._identity, self._segments = identity, dict(segments)
        self._order = self._order_of(laid_out)
        self._at = _position(*(state[name] for name in _position(0)))
        self._loaded = dict(self._at)
        self._epoch.fill_(state["epoch"])

    # ---- batches ----

    def batches(self, workers: int = 0, **options: Any) -> Iterator[RowBatch]:
        """The epoch's batches, read ahead by ``workers`` processes; :meth:`state_dict` counts what is handed out.

        Args:
            workers: 0 reads in this process, when a batch is asked for.
            options: of ``torch.utils.data.DataLoader``, such as ``prefetch_factor`` or ``multiprocessing_context``.
        """
        if not workers:
            yield from self
            return
        if not self.chosen.is_local:  # an object store's client does not live through a fork
            options = {"multiprocessing_context": "spawn"} | options
        first = self._loaded["batches"] if self._loaded else 0
        loader = iter(DataLoader(self, batch_size=None, num_workers=workers, **options))
        self._loaded = None  # the workers have it
        self._at = at = _position(self.epoch, first)
        try:
            for batch in loader:
                at["batches"] = min(at["batches"] + self.world, self._n_fed)
                yield batch
        except Exception as error:
            # Its frames refer to the workers and to itself: they would stay until garbage is collected, which then
            # waits five seconds for each.
            del loader
            raise error.with_traceback(None) from error.__cause__
        at["batches"] = max(first, self._n_fed)

    def __iter__(self) -> Iterator[RowBatch]:
        """This process's share of the epoch's batches: of w workers, the rank's batch t comes from worker ``t % w``.

        Raises:
            InputError: a loaded state is that of one worker, and this is another.
            CorruptStoreError: stored bytes are not those committed; no row is ever left out for it.
        """
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        self._loaded, loaded = None, self._loaded
        at = dict(loaded) if loaded else _position(self.epoch)
        if at["worker"] not in (None, [worker, workers]):
            raise InputError(
                f"the state is that of worker {at['worker'][0]} of {at['worker'][1]}, this is {worker} of {workers}; "
                "the state of the feed itself, or of its batches(), goes with any number"
            )
        if info:
            at["worker"] = [worker, workers]
        self._at = at
        own = range(at["batches"] + self.rank + self.world * worker, self._n_fed, self.world * workers)
        return self._run(at, own[at["drawn"] :])

    def _run(self, at: dict[str, Any], own: range) -> Iterator[RowBatch]:
        """These batches of the epoch."""
        first, pool = at["batches"], None
        dtype = layout.stored_dtype(str(self.dtype).removeprefix("torch."))
        for together in self._order.pools(own):
            rows, places = self._order.draw(at["epoch"], together)
            rows = rows if self.chosen.chosen is None else self.chosen.chosen[rows]
            if pool is None:  # as large as any round: memory that is not written to costs nothing
                pool = np.empty((*self._row_shape[:2], self.pool_rows, self._row_shape[2]), dtype)
            self.chosen.store.reading(partial(self._fill, pool, rows))
            for picked in places:
                states = self._take(pool, picked)
                if at["worker"] is None:
                    at["batches"] = min(at["batches"] + self.world, self._n_fed)
                else:
                    at["drawn"] += 1
                yield RowBatch(states, torch.from_numpy(rows[picked]))
        if at["worker"] is None:
            at["batches"] = max(first, self._n_fed)

    def _fill(self, pool: npt.NDArray[Any], rows: Ints) -> None:
        """Read rows, each lane's in storage order, into the first of the pool's: each chunk once, to its place."""
        segments, firsts = self.chosen.store.segments, self.chosen.firsts
        requests: list[tuple[Segment, str, Ints, Ints, npt.NDArray[Any]]] = []
        for number, lo, hi in _runs(np.searchsorted(firsts, rows, side="right") - 1):
            local = rows[lo:hi] - firsts[number]
            cuts = np.flatnonzero(np.diff(local) != 1) + 1
            starts, lasts = np.append(0, cuts), np.append(cuts, len(local)) - 1
            spans = np.stack([local[starts], local[lasts] + 1], axis=1)
            for (k, label), (j, boundary) in itertools.product(enumerate(self.labels), enumerate(self.boundaries)):
                array = layout.row_path(self.site, label, boundary)
                requests.append((segments[number], array, spans, lo + starts, pool[k, j]))
        # Of a disk, worker processes take in full what it gives; a network's answers are worth waiting for at once.
        alone = self.chosen.is_local and get_worker_info() is not None
        with ThreadPoolExecutor(1 if alone else self.chosen.storage.parallel_reads) as threads:
            tasks = itertools.chain.from_iterable(threads.map(_tasks, requests))
            deque(threads.map(lambda task: task(), tasks), maxlen=0)

    def _take(self, pool: npt.NDArray[Any], picked: Ints) -> torch.Tensor:
        """Rows of the pool ``[K, n_boundaries, P, D]`` as a batch's states, in one copy."""
        n_states, n_rows, width = pool.shape[0] * pool.shape[1], *pool.shape[2:]
        places = picked[:, None] + np.arange(n_states) * n_rows
        states = pool.reshape(-1, width).take(places, axis=0)
        return layout.to_torch(states.reshape(len(picked), *self._row_shape), self.dtype)


class ActivationBuffer(Iterator[torch.Tensor]):
    """An endless iterator over a feed's states, one epoch after another, as SAE and crosscoder trainers draw from.

    It can be the ``data_provider`` of SAELens's ``SAETrainer`` and the ``data`` of dictionary_learning's ``trainSAE``.
    Give the feed ``drop_last=True`` where every batch must have the same size.

    Yields:
        ``[B, K, n_boundaries, D]`` without the axes of one checkpoint or one boundary: ``[B, D]`` for an SAE,
        ``[B, K, D]`` for a crosscoder; with ``flatten``, always ``[B, K * n_boundaries * D]``.
    """

    def __init__(
        self,
        feed: RowFeed,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = torch.float32,
        flatten: bool = False,
        workers: int = 0,
    ) -> None:
        """Draw from ``feed``, beginning where it stands.

        Args:
            feed: whose epoch the buffer advances.
            device: where tensors are wanted.
            dtype: None keeps the captured one.
            flatten: one axis for checkpoints, boundaries and width.
            workers: processes that read ahead.

        Raises:
            InputError: an epoch of the feed has no batch.
        """
        if not len(feed):
            raise InputError(f"no batch in an epoch: {feed.chosen.n_rows} rows, {feed.batch_rows} a batch, drop_last")
        self.feed, self.device, self.dtype, self.flatten, self.workers = feed, device, dtype, flatten, workers
        self._batches = feed.batches(workers)

    def __repr__(self) -> str:
        return f"<ActivationBuffer of {self.feed!r}, on {self.device}>"

    def __next__(self) -> torch.Tensor:
        batch = next(self._batches, None)
        while batch is None:
            self.feed.set_epoch(self.feed.epoch + 1)
            self._batches = self.feed.batches(self.workers)
            batch = next(self._batches, None)
        states = batch.states.to(self.device)
        if self.dtype is not None:
            states = states.to(self.dtype)
        axes = [n for n in states.shape[1:3] if n > 1]
        return states.flatten(1) if self.flatten else states.reshape(len(states), *axes, states.shape[3])

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`RowFeed.state_dict`."""
        return self.feed.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As :meth:`RowFeed.load_state_dict`."""
        self.feed.load_state_dict(state)
        self._batches = self.feed.batches(self.workers)

    @property
    def config(self) -> dict[str, Any]:
        """What the rows are, as plain values; dictionary_learning saves it beside the weights that it trains."""
        return {"activations": "actcache", **self.feed.state_dict()["feed"]}


def _position(epoch: int, batches: int = 0, worker: list[int] | None = None, drawn: int = 0) -> dict[str, Any]:
    """Where an iteration stands: how many batches of the epoch all ranks have fed; of one worker of some, how many they
    had fed when it began, its number, how many workers there are, and how many batches it has drawn."""
    return {"epoch": epoch, "batches": batches, "worker": worker, "drawn": drawn}


def _known(what: str, known: list[Any], asked: Sequence[Any] | None) -> list[Any]:
    given = known if asked is None else list(asked)
    for one in given:
        if isinstance(one, bool | float) or one not in known:  # True is 1, and 2.0 is 2
            raise InputError(f"{what} {one!r} is not in the store; it has {', '.join(map(str, known))}")
    if not given:
        raise InputError(f"no {what} is chosen; the store has {', '.join(map(str, known)) or 'none'}")
    return given


def _tasks(request: tuple[Segment, str, Ints, Ints, npt.NDArray[Any]]) -> list[Callable[[], None]]:
    """The work of reading spans of an array to where they belong."""
    segment, array, spans, at, out = request
    stored, spans, at = segment.request(array, spans, at)
    return list(stored.tasks(spans, at, out))


def _runs(numbers: Ints) -> Iterator[tuple[int, int, int]]:
    """Each run of equal numbers: the number, and where the run starts and stops."""
    cuts = np.flatnonzero(np.diff(numbers)) + 1
    for start, stop in itertools.pairwise([0, *cuts.tolist(), len(numbers)]):
        yield int(numbers[start]), start, stop
