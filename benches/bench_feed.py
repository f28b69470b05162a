"""Feeding a trainer: rows of all checkpoints in batches, from a store, a plain memmap and a folder of safetensors.

    python benches/bench_feed.py            # --cold drops each reader's files from the page cache before every epoch

Every reader gives batches ``[B, K, D]`` of the same made-up states (normal in each coordinate, so that they compress
about as real ones do), one epoch a timing. Before any timing each has given every row once, bit for bit.

    feed, in order | blocks | rows   RowFeed with shuffle none, blocks, rows; 0 or 2 worker processes
    memmap, in order | random rows   numpy.memmap ``[N, K, D]``: slices, and rows picked by one permutation of them all
    memmap, DataLoader               the same permutation through a torch DataLoader that collates single rows
    safetensors, in order | files    one file per sequence: in order, and files in random order with the rows of some of
                                     them mixed in as much memory as the feed's pool has
    safetensors, random rows         one slice per row, by the permutation; the first batches only

Ceilings of the same run: copying a batch in memory; reading the memmap's file into a buffer; reading the store's arrays
whole, which decodes and checks them; and what two processes of a DataLoader can hand over when they read nothing. The
consumer here only counts: workers pay off where it computes meanwhile. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from measure import print_result
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset, IterableDataset

from actcache.store import SegmentData, StoreWriter, layout, open_store
from actcache.store.feed import RowFeed

LABELS = ("pt", "it")
BOUNDARY = 5
SAMPLED_BATCHES = 2  # where a whole epoch would take minutes
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # states [B, K, D], and which rows they are


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=48_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--sequence-rows", type=int, default=60)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--batch-rows", type=int, default=2048)
    parser.add_argument("--pool-bytes", type=int, default=100_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the reader's files from the page cache first")
    parser.add_argument("--smoke", action="store_true", help="sizes of about a second")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rows, args.width, args.batch_rows, args.pool_bytes, args.repeat = 2000, 64, 200, 200_000, 1
    args.rows -= args.rows % (args.segments * args.sequence_rows)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        states = make_states(args)
        write_all(folder, states, args)
        os.sync()
        readers = make_readers(folder, args)
        check_equal(readers, states, args)
        timings: dict[str, list[float]] = {name: [] for name in readers}
        names = ("copy in memory", "read of the file", "read of the store", "handed over, 2 workers")
        ceilings: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(args.repeat):
            ceilings["copy in memory"].append(copy_rate(states, args.batch_rows))
            ceilings["read of the file"].append(read_rate(folder / "memmap.bin", states[0].nbytes, args.batch_rows))
            ceilings["read of the store"].append(store_rate(folder / "feed"))
            ceilings["handed over, 2 workers"].append(rows_per_s(lambda: iter(handed_over(args))))
            for name, read in readers.items():
                if args.cold:
                    drop_from_cache(folder / name.split(",")[0])
                timings[name].append(rows_per_s(read))
        stored_bytes = sum(file.stat().st_size for file in (folder / "feed").rglob("*") if file.is_file())

    row_bytes = states[0].nbytes
    copy = statistics.median(ceilings["copy in memory"])
    result = {
        "rows": args.rows,
        "row_bytes": row_bytes,
        "batch_rows": args.batch_rows,
        "pool_bytes": args.pool_bytes,
        "cold": args.cold,
        "compression": states.nbytes / stored_bytes,
        "rows_per_s": {name: spread(rates) for name, rates in timings.items()},
        "gb_per_s": {name: statistics.median(rates) * row_bytes / 1e9 for name, rates in timings.items()},
        "ceiling_rows_per_s": {name: spread(rates) for name, rates in ceilings.items()},
        "percent_of_copy": {name: 100 * statistics.median(rates) / copy for name, rates in timings.items()},
        "threads": torch.get_num_threads(),
    }
    print_table(result)
    print_result("feed", result)
    return 0


# ---- the data, three times -------------------------------------------------------------------------------------------


def make_states(args: argparse.Namespace) -> npt.NDArray[np.uint16]:
    """``[N, K, D]`` bfloat16 bits."""
    generator = torch.Generator().manual_seed(0)
    states = torch.empty(args.rows, len(LABELS), args.width, dtype=torch.bfloat16)
    for rows in states.split(4096):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return states.view(torch.uint16).numpy()


def write_all(folder: Path, states: npt.NDArray[np.uint16], args: argparse.Namespace) -> None:
    """The states as a store, a memmap and a folder of safetensors."""
    fingerprint = {
        "checkpoints": {label: {} for label in LABELS},
        "pair": list(LABELS),
        "dtype": "bfloat16",
        "boundaries": [BOUNDARY],
        "row_selection": "prefix",
        "width": args.width,
    }
    writer = StoreWriter(folder / "feed", fingerprint)
    n = args.rows // args.segments
    tensors = torch.from_numpy(states).view(torch.bfloat16)
    for number in range(args.segments):
        of_segment = tensors[number * n : (number + 1) * n]
        writer.append(f"s-{number}", make_segment(of_segment, args.sequence_rows))
    states.tofile(folder / "memmap.bin")
    (folder / "safetensors").mkdir()
    for number, rows in enumerate(tensors.split(args.sequence_rows)):
        kept = {label: rows[:, k].contiguous() for k, label in enumerate(LABELS)}
        save_file(kept, folder / "safetensors" / f"{number:06d}.safetensors")


def make_segment(states: torch.Tensor, sequence_rows: int) -> SegmentData:
    """A segment of sequences of equal length, without events."""
    tables = [
        pa.table({name: layout.empty_column(kind) for name, kind in columns.items()})
        for columns in (layout.EVENT_COLUMNS, layout.EXCLUDED_COLUMNS)
    ]
    return SegmentData(
        token_ids=np.zeros(len(states), np.int32),
        sequence_offsets=np.arange(0, len(states) + 1, sequence_rows, dtype=np.int64),
        states={(label, BOUNDARY): states[:, k] for k, label in enumerate(LABELS)},
        final={label: states[:0, k] for k, label in enumerate(LABELS)},
        events=tables[0],
        excluded=tables[1],
    )


# ---- readers ---------------------------------------------------------------------------------------------------------


def make_readers(folder: Path, args: argparse.Namespace) -> dict[str, Callable[[], Batches]]:
    """What gives an epoch, by name; the word before the comma is where its files lie."""
    shape = (args.rows, len(LABELS), args.width)

    def feed(shuffle: str, workers: int) -> Batches:
        options = {"batch_rows": args.batch_rows, "memory_bytes": args.pool_bytes, "shuffle": shuffle}
        for batch in RowFeed(folder / "feed", **options).batches(workers):
            yield batch.states[:, :, 0], batch.rows

    def memmap(order: torch.Tensor | None) -> Batches:
        states = np.memmap(folder / "memmap.bin", np.uint16, "r", shape=shape)
        for rows in (torch.arange(args.rows) if order is None else order).split(args.batch_rows):
            picked = states[rows[0] : rows[-1] + 1].copy() if order is None else states[rows.numpy()]
            yield torch.from_numpy(picked).view(torch.bfloat16), rows

    def loader(workers: int) -> Batches:
        dataset = MemmapRows(folder / "memmap.bin", shape)
        options: dict[str, Any] = {"batch_size": args.batch_rows, "shuffle": True, "num_workers": workers}
        for states, rows in DataLoader(dataset, **options):
            yield states.view(torch.bfloat16), rows

    def files(shuffle: bool) -> Batches:
        names = sorted((folder / "safetensors").iterdir())
        order = torch.randperm(len(names)) if shuffle else torch.arange(len(names))
        held = max(1, args.pool_bytes // (2 * np.prod(shape[1:]) * args.sequence_rows)) if shuffle else 1
        left, left_rows = torch.empty(0, *shape[1:], dtype=torch.bfloat16), torch.empty(0, dtype=torch.int64)
        for numbers in order.split(int(max(held, -(-args.batch_rows // args.sequence_rows)))):
            pool, of_pool = [left], [left_rows]
            for number in numbers.tolist():
                with safe_open(names[number], "pt") as file:
                    pool.append(torch.stack([file.get_tensor(label) for label in LABELS], dim=1))
                of_pool.append(torch.arange(args.sequence_rows) + number * args.sequence_rows)
            states, rows = torch.cat(pool), torch.cat(of_pool)
            mixed = torch.randperm(len(rows)) if shuffle else torch.arange(len(rows))
            n_full = len(rows) // args.batch_rows * args.batch_rows
            for picked in mixed[:n_full].split(args.batch_rows):
                yield states[picked], rows[picked]
            left, left_rows = states[mixed[n_full:]], rows[mixed[n_full:]]
        if len(left):
            yield left, left_rows

    def slices() -> Batches:
        names = sorted((folder / "safetensors").iterdir())
        for rows in torch.randperm(args.rows).split(args.batch_rows)[:SAMPLED_BATCHES]:
            states = torch.empty(len(rows), *shape[1:], dtype=torch.bfloat16)
            for i, row in enumerate(rows.tolist()):
                number, within = divmod(row, args.sequence_rows)
                with safe_open(names[number], "pt") as file:
                    for k, label in enumerate(LABELS):
                        states[i, k] = file.get_slice(label)[within]
            yield states, rows

    return {
        "feed, in order": lambda: feed("none", 0),
        "feed, in order, 2 workers": lambda: feed("none", 2),
        "feed, blocks": lambda: feed("blocks", 0),
        "feed, blocks, 2 workers": lambda: feed("blocks", 2),
        "feed, rows": lambda: feed("rows", 0),
        "memmap.bin, in order": lambda: memmap(None),
        "memmap.bin, random rows": lambda: memmap(torch.randperm(args.rows)),
        "memmap.bin, DataLoader": lambda: loader(0),
        "memmap.bin, DataLoader, 2 workers": lambda: loader(2),
        "safetensors, in order": lambda: files(False),
        "safetensors, random files": lambda: files(True),
        "safetensors, random rows": slices,
    }


class MemmapRows(Dataset[tuple[torch.Tensor, int]]):
    """Single rows of a memmap, as a map-style dataset gives them."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.states = np.memmap(path, np.uint16, "r", shape=shape)

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(self.states[row].copy()), row


class Ready(IterableDataset[tuple[torch.Tensor, int]]):
    """Batches that cost nothing to make but their memory."""

    def __init__(self, shape: tuple[int, ...], n_batches: int) -> None:
        self.shape, self.n_batches = shape, n_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int]]:
        states = torch.zeros(self.shape, dtype=torch.bfloat16)
        for number in range(self.n_batches):
            yield states.clone(), number


def handed_over(args: argparse.Namespace) -> DataLoader[tuple[torch.Tensor, int]]:
    """As many rows as an epoch has, from two workers."""
    shape = (args.batch_rows, len(LABELS), args.width)
    return DataLoader(Ready(shape, args.rows // args.batch_rows // 2), batch_size=None, num_workers=2)


def check_equal(readers: dict[str, Callable[[], Batches]], states: npt.NDArray[np.uint16], args: Any) -> None:
    """Every reader gives every row once, bit for bit (a sampled one: what it gives); exits otherwise."""
    for name, read in readers.items():
        seen = np.zeros(args.rows, np.int64)
        for batch, rows in read():
            np.add.at(seen, rows.numpy(), 1)
            if not np.array_equal(batch.view(torch.uint16).numpy(), states[rows.numpy()]):
                sys.exit(f"{name}: a batch is not what was written")
        whole = name != "safetensors, random rows"
        if seen.max() != 1 or (whole and seen.min() != 1):
            sys.exit(f"{name}: not every row once")
    print(f"{len(readers)} readers equal: each of {args.rows} rows once, bit for bit")


# ---- time ------------------------------------------------------------------------------------------------------------


def rows_per_s(read: Callable[[], Iterator[tuple[torch.Tensor, Any]]]) -> float:
    """Of one epoch, opening and starting workers included."""
    start, n_rows = time.perf_counter(), 0
    for batch, _ in read():
        n_rows += len(batch)
    return n_rows / (time.perf_counter() - start)


def copy_rate(states: npt.NDArray[np.uint16], batch_rows: int) -> float:
    """Rows per second of copying the states, one batch at a time, to fresh memory."""
    start = time.perf_counter()
    for at in range(0, len(states), batch_rows):
        states[at : at + batch_rows].copy()
    return len(states) / (time.perf_counter() - start)


def read_rate(path: Path, row_bytes: int, batch_rows: int) -> float:
    """Rows per second of reading a file into one buffer."""
    buffer, start, n_bytes = bytearray(batch_rows * row_bytes), time.perf_counter(), 0
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            n_bytes += got
    return n_bytes / row_bytes / (time.perf_counter() - start)


def store_rate(path: Path) -> float:
    """Rows per second of reading the store's arrays one after another, each as a whole."""
    start, n_rows = time.perf_counter(), 0
    for segment in open_store(path).segments:
        for label in LABELS:
            n_rows += len(segment.read(layout.state_path(label, BOUNDARY)))
    return n_rows / len(LABELS) / (time.perf_counter() - start)


def drop_from_cache(path: Path) -> None:
    """Make the next read of these files one of the disk."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def spread(rates: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def print_table(result: dict[str, Any]) -> None:
    """For people."""
    print(
        f"\n{result['rows']} rows of {result['row_bytes']} bytes, batches of {result['batch_rows']}, a pool of "
        f"{result['pool_bytes'] / 1e6:.0f} MB, {'from disk' if result['cold'] else 'page cache warm'}; the store is "
        f"{result['compression']:.2f}x smaller\n\n"
        f"{'':36}{'rows/s':>10}{'least':>10}{'most':>10}{'GB/s':>8}{'of copy':>9}"
    )
    copy = result["ceiling_rows_per_s"]["copy in memory"]["median"]
    for name, rates in (result["rows_per_s"] | result["ceiling_rows_per_s"]).items():
        print(
            f"{name:36}{rates['median']:10.0f}{rates['min']:10.0f}{rates['max']:10.0f}"
            f"{rates['median'] * result['row_bytes'] / 1e9:8.2f}{100 * rates['median'] / copy:8.0f}%"
        )


if __name__ == "__main__":
    sys.exit(main())
