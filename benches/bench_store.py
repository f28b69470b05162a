"""Writing and reading states: actcache beside TensorStore, zarrs and zarr-python with the same chunks and codec.

    python benches/bench_store.py                   # --chunks: chunk sizes beside each other, --folder: on which disk

All write the same arrays, those of a store's segments (states normal in each coordinate, bfloat16, so that they
compress about as real ones do; token ids, final states, columns of events), with the same shards, chunks, codec and
checksums, and all make them durable: actcache as part of its commits, the others by an fsync of every file. All read
the same spans, from the page cache: every event of a batch, picked at random through all segments, or each segment's
states whole. What is read is compared bit for bit first.

    zarr-python    arr[lo:hi], an event at a time; the default pipeline
    zarrs          the same through the zarrs pipeline
    TensorStore    all writes, and all reads of a batch, at once, then their results
    actcache       store.states(label, boundary, events)
    with planes    the same with the opt-in codec actcache.bf16_planes: other bytes, the same states

Ceilings of the same run: a copy in memory, and for writing also the disk's rate for one large file with fsync. The last
line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from measure import copy_rate, in_turn, median, print_result, timed

from actcache.files import fsync
from actcache.store import BackgroundWriter, SegmentData, Store, StoreWriter, layout, open_store, shard
from actcache.store.segment_data import arrays_of
from actcache.store.storage import open_storage

BOUNDARY = 5
CHUNK_KIB = (64, 128, 256, 512, 1024)
Words = npt.NDArray[np.uint16]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    parser.add_argument("--segments", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16_384, help="of a segment")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=256, help="events of a random read")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--chunks", action="store_true", help="actcache alone, with chunks of several sizes")
    parser.add_argument(
        "--url", help="with --chunks: a place on an object store, s3://bucket/prefix, instead of a folder"
    )
    parser.add_argument("--smoke", action="store_true", help="sizes of about a second")
    args = parser.parse_args(argv)
    if args.smoke:
        args.segments, args.rows, args.width, args.batch, args.repeat = 2, 512, 64, 8, 1
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        data = Data(args)
        compare = compare_chunks if args.chunks else compare_rivals
        result = compare(Path(scratch), data, args)
    sizes = {name: getattr(args, name) for name in ("segments", "rows", "width", "batch", "repeat")}
    print_result("store_chunks" if args.chunks else "store", sizes | result)
    return 0


class Data:
    """The states of every segment, the events over them, and the batches that are read."""

    def __init__(self, args: argparse.Namespace) -> None:
        rng = np.random.default_rng(0)
        self.words: list[Words] = []
        self.lengths: list[list[int]] = []
        for _ in range(args.segments):
            rows = torch.from_numpy(rng.standard_normal((args.rows, args.width), dtype=np.float32)).bfloat16()
            self.words.append(rows.view(torch.uint16).numpy())
            lengths = rng.integers(20, 61, args.rows // 20)
            lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), args.rows - 60))]
            self.lengths.append([*lengths.tolist(), args.rows - int(lengths.sum())])
        # Event e of segment s reads rows lo:hi: its whole sequence.
        self.spans = [
            (s, int(lo), int(lo) + length)
            for s, lengths in enumerate(self.lengths)
            for lo, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True)
        ]
        self.batches = [rng.permutation(len(self.spans))[: args.batch] for _ in range(args.repeat + 1)]
        self.n_bytes = sum(words.nbytes for words in self.words)
        self.batch_bytes = median([sum(self.span_bytes(e) for e in batch) for batch in self.batches])

    def span_bytes(self, event: int) -> int:
        """Bytes that an event reads."""
        s, lo, hi = self.spans[event]
        return (hi - lo) * self.words[s].shape[1] * 2

    def batch(self, events: npt.NDArray[np.int64]) -> Words:
        """What reading these events must give."""
        return np.concatenate([self.words[s][lo:hi] for s, lo, hi in (self.spans[e] for e in events)])

    def segment(self, s: int) -> SegmentData:
        """Everything of one segment, as a capture would hand it over."""
        lengths = self.lengths[s]
        columns: dict[str, Any] = {
            "event_id": [f"{s}-{i}" for i in range(len(lengths))],
            "prompt_id": [f"{s}-{i}" for i in range(len(lengths))],
            "kind": ["first_divergence"] * len(lengths),
            "pair": ["pt,pt"] * len(lengths),
            "step": [0] * len(lengths),
            "sequence": list(range(len(lengths))),
            "position": [length - 1 for length in lengths],
            "y_pt": [0] * len(lengths),
            "y_it": [1] * len(lengths),
            "carried": ["{}"] * len(lengths),
        }
        types = {name: layout.empty_column(kind).type for name, kind in layout.EVENT_COLUMNS.items()}
        excluded = {name: layout.empty_column(kind) for name, kind in layout.EXCLUDED_COLUMNS.items()}
        rows = torch.from_numpy(self.words[s]).view(torch.bfloat16)
        return SegmentData(
            token_ids=np.zeros(len(rows), np.int32),
            sequence_offsets=np.cumsum([0, *lengths], dtype=np.int64),
            states={("pt", BOUNDARY): rows},
            final={"pt": rows[: len(lengths)]},
            events=pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()}),
            excluded=pa.table(excluded),
        )


# ---- the four ------------------------------------------------------------------------------------------------------


class Actcache:
    """The store itself."""

    codec = "blosc"

    def __init__(self, path: Path | str, data: Data) -> None:
        self.path, self.data = path, data
        self.segments = [data.segment(s) for s in range(len(data.words))]

    def write(self) -> None:
        """All segments, each durable."""
        fingerprint = {
            "checkpoints": {"pt": {}},
            "dtype": "bfloat16",
            "boundaries": [BOUNDARY],
            "row_selection": "prefix",
            "width": self.data.words[0].shape[1],
            "codec": self.codec,
        }
        writer = StoreWriter(self.path, fingerprint)
        with BackgroundWriter(writer) as background:  # as a capture does
            for s, segment in enumerate(self.segments):
                background.append(f"{s:04d}", segment)

    def open(self) -> None:
        """Before reading."""
        self.store: Store = open_store(self.path)

    def read_batch(self, events: npt.NDArray[np.int64]) -> Words:
        """Rows of these events, one after another."""
        return self.store.states("pt", BOUNDARY, events.tolist())[0].view(torch.uint16).numpy()

    def read_all(self) -> list[Words]:
        """Every segment's array, whole."""
        array = layout.state_path("pt", BOUNDARY)
        return [segment.read(array) for segment in self.store.segments]


class Planes(Actcache):
    """The store with the opt-in codec: not the rivals' bytes, but the same states."""

    codec = "actcache.bf16_planes"


class _ZarrArrays(ABC):
    """The arrays of every segment, with the metadata that the store gives them."""

    def __init__(self, path: Path, data: Data, ours: Actcache) -> None:
        self.path, self.data = path, data
        self.arrays: list[tuple[Path, npt.NDArray[Any], dict[str, Any]]] = []
        for stored, segment in zip(ours.store.segments, ours.segments, strict=True):
            for array, content, _ in arrays_of(segment):
                metadata = layout.decode_json(stored.storage.read(f"{stored.folder}/{array}/{layout.ROOT}"))
                self.arrays.append((path / stored.name / array, content, metadata))

    def states(self) -> list[Path]:
        """The folder of each segment's states."""
        return [self.path / f"{s:04d}" / layout.state_path("pt", BOUNDARY) for s in range(len(self.data.words))]

    def write(self) -> None:
        """All arrays, and an fsync of every file."""
        self.write_arrays()
        with ThreadPoolExecutor(8) as pool:  # as many at once as actcache has
            deque(pool.map(fsync, [path for path in self.path.rglob("*") if path.is_file()]), maxlen=0)

    @abstractmethod
    def write_arrays(self) -> None:
        """All arrays, durable or not."""


class ZarrPython(_ZarrArrays):
    """zarr-python, with its own pipeline or that of zarrs."""

    pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def _with_pipeline(self, run: Callable[[], Any]) -> Any:
        import zarr

        with zarr.config.set({"codec_pipeline.path": self.pipeline}):
            return run()

    def write_arrays(self) -> None:
        """Create, and write with one assignment each."""
        for folder, content, metadata in self.arrays:
            self._with_pipeline(partial(self._write, folder, content, metadata))

    def _write(self, folder: Path, content: npt.NDArray[Any], metadata: dict[str, Any]) -> None:
        import zarr
        from zarr.codecs import BloscCodec, Crc32cCodec

        blosc = BloscCodec(typesize=content.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle")
        array = zarr.create_array(
            folder,
            shape=content.shape,
            dtype=content.dtype,
            chunks=tuple(metadata["codecs"][0]["configuration"]["chunk_shape"]),
            shards=tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"]),
            compressors=[blosc, Crc32cCodec()],
            fill_value=0,
        )
        if len(content):
            array[:] = content

    def open(self) -> None:
        """Before reading."""
        import zarr

        self.opened: list[Any] = self._with_pipeline(lambda: [zarr.open_array(f, mode="r") for f in self.states()])

    def read_batch(self, events: npt.NDArray[np.int64]) -> Words:
        """Rows of these events, one after another."""
        spans = [self.data.spans[e] for e in events]
        return self._with_pipeline(lambda: np.concatenate([self.opened[s][lo:hi] for s, lo, hi in spans]))

    def read_all(self) -> list[Words]:
        """Every array, whole."""
        return self._with_pipeline(lambda: [array[:] for array in self.opened])


class Zarrs(ZarrPython):
    """zarr-python's face, the pipeline in Rust."""

    pipeline = "zarrs.ZarrsCodecPipeline"


class TensorStore(_ZarrArrays):
    """TensorStore's zarr3 driver."""

    def _open(self, folder: Path, **options: Any) -> Any:
        import tensorstore

        return tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}, **options
        ).result()

    def write_arrays(self) -> None:
        """Create all and write them at once."""
        writes = [self._write(*given) for given in self.arrays]
        for write in writes:
            write.result()

    def _write(self, folder: Path, content: npt.NDArray[Any], metadata: dict[str, Any]) -> Any:
        import tensorstore

        kept = ("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs")
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {key: metadata[key] for key in kept},
        }
        return tensorstore.open(spec, create=True, delete_existing=True).result().write(content)

    def open(self) -> None:
        """Before reading; as many threads as the machine has, which is also its default."""
        self.opened = [self._open(folder, read=True) for folder in self.states()]

    def read_batch(self, events: npt.NDArray[np.int64]) -> Words:
        """Rows of these events, one after another."""
        spans = [self.data.spans[e] for e in events]
        reads = [self.opened[s][lo:hi].read() for s, lo, hi in spans]
        return np.concatenate([read.result() for read in reads])

    def read_all(self) -> list[Words]:
        """Every array, whole."""
        reads = [array.read() for array in self.opened]
        return [read.result() for read in reads]


# ---- tables --------------------------------------------------------------------------------------------------------


def compare_rivals(scratch: Path, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of all that are installed, and the table."""
    ours = Actcache(scratch / "actcache", data)
    ours.write()
    ours.open()
    readers: dict[str, Any] = {"actcache": ours, "with planes": Planes(scratch / "with planes", data)}
    for name, kind, package in (
        ("TensorStore", TensorStore, "tensorstore"),
        ("zarrs", Zarrs, "zarrs"),
        ("zarr-python", ZarrPython, "zarr"),
    ):
        try:
            __import__(package)
        except ModuleNotFoundError:
            print(f"{name}: not installed (pip install 'actcache[bench]')", file=sys.stderr)
            continue
        readers[name] = kind(scratch / name, data, ours)
    for name, reader in readers.items():
        remove(scratch / name)
        reader.write()
        reader.open()
        check_equal(name, reader, data)
    stored = {name: sum(f.stat().st_size for f in (scratch / name).rglob("*") if f.is_file()) for name in readers}
    print(f"read back bit for bit by all; bytes stored: {stored}", file=sys.stderr)

    rates: dict[str, dict[str, float]] = {name: {} for name in readers}
    spreads: dict[str, dict[str, float]] = {name: {} for name in readers}
    written = in_turn(
        {name: reader.write for name, reader in readers.items()}, args.repeat, lambda name: remove(scratch / name)
    )
    for reader in readers.values():
        reader.open()
    whole = in_turn({name: reader.read_all for name, reader in readers.items()}, args.repeat)
    random = in_turn({name: random_reads(reader, data) for name, reader in readers.items()}, args.repeat)
    for what, seconds, n_bytes in (
        ("write", written, data.n_bytes),
        ("random", random, data.batch_bytes),
        ("sequential", whole, data.n_bytes),
    ):
        for name, times in seconds.items():
            rates[name][what] = n_bytes / median(times)
            spreads[name][what] = (max(times) - min(times)) / median(times)
    ceilings = {"copy": copy_rate(), "disk": disk_rate(scratch, data)}
    print(f"\n{data.n_bytes / 2**20:.0f} MiB of bfloat16 states, {len(data.spans)} events; batches of {args.batch}\n")
    print(f"{'GB/s':14}{'write':>10}{'random':>10}{'sequential':>12}    actcache is faster by")
    for name, rate in rates.items():
        ratios = [f"{rates['actcache'][what] / rate[what]:.2f}x" for what in rate] if name != "actcache" else []
        speeds = f"{rate['write'] / 1e9:10.2f}{rate['random'] / 1e9:10.2f}{rate['sequential'] / 1e9:12.2f}"
        print(f"{name:14}{speeds}    {'   '.join(ratios)}")
    print(f"\nceilings: copy in memory {ceilings['copy'] / 1e9:.2f}, one file with fsync {ceilings['disk'] / 1e9:.2f}")
    percent = {what: 100 * speed / ceilings["copy"] for what, speed in rates["actcache"].items()}
    print("actcache, percent of the copy: " + ", ".join(f"{what} {value:.0f}" for what, value in percent.items()))
    return {"bytes_per_s": rates, "spread": spreads, "ceilings": ceilings, "stored_bytes": stored}


def compare_chunks(scratch: Path, data: Data, args: argparse.Namespace) -> dict[str, Any]:
    """Rates of actcache with chunks of several sizes, and the table."""
    default, found = shard.CHUNK_BYTES, {}
    print(f"{'chunk KiB':>10}{'ratio':>8}{'write':>8}{'random':>8}{'sequential':>12}   GB/s")
    for kib in CHUNK_KIB:
        shard.CHUNK_BYTES = kib * 1024
        ours = Actcache(f"{args.url or scratch}/{kib}", data)
        (times,) = in_turn({str(ours.path): ours.write}, args.repeat, remove_store).values()
        written = median(times)
        ours.open()
        check_equal(f"chunks of {kib} KiB", ours, data)
        seconds = in_turn({"random": random_reads(ours, data), "all": ours.read_all}, args.repeat)
        summary = ours.store.summary()
        found[kib] = {
            "ratio": summary["state_bytes"]["ratio"],
            "write": data.n_bytes / written,
            "random": data.batch_bytes / median(seconds["random"]),
            "sequential": data.n_bytes / median(seconds["all"]),
        }
        of = found[kib]
        speeds = f"{of['write'] / 1e9:8.2f}{of['random'] / 1e9:8.2f}{of['sequential'] / 1e9:12.2f}"
        print(f"{kib:10}{of['ratio']:8.3f}{speeds}")
    shard.CHUNK_BYTES = default
    return {"chunk_kib": found, "default_kib": default // 1024}


def random_reads(reader: Any, data: Data) -> Callable[[], Any]:
    """A call that reads the next batch of events."""
    batches = iter(data.batches)
    return lambda: reader.read_batch(next(batches))


def remove(folder: Path) -> None:
    """What an earlier turn wrote, and what the disk still owes for it."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def remove_store(place: str) -> None:
    """The same of a store anywhere."""
    storage = open_storage(place)
    for key in storage.sizes(""):
        storage.remove(key)
    os.sync()


def check_equal(name: str, reader: Any, data: Data) -> None:
    """Every bit, both ways of reading; exits otherwise."""
    same = all(np.array_equal(a, b) for a, b in zip(reader.read_all(), data.words, strict=True))
    if not same or not np.array_equal(reader.read_batch(data.batches[0]), data.batch(data.batches[0])):
        sys.exit(f"{name} does not read back what was written")


def disk_rate(scratch: Path, data: Data) -> float:
    """Bytes per second of writing all of it to one file, uncompressed, with fsync; best of three."""

    def write() -> None:
        with open(scratch / "plain", "wb") as stream:
            for words in data.words:
                stream.write(words.data)
            stream.flush()
            os.fsync(stream.fileno())

    return data.n_bytes / min(timed(write)[0] for _ in range(3))


if __name__ == "__main__":
    sys.exit(main())
