"""How long a store of very many segments takes to open, and how much memory: without the roll-up, and with it.

    python benches/bench_open.py [--segments 100000] [--far 2000]

A store is made whose commit records all differ, as those of so many segments would; one segment in a thousand also has
files, as nothing else of a segment is read when a store opens. ``records`` opens it without the roll-up, ``roll-up``
with it, and ``stale`` with one that is older than a hundredth of the records: each in a process of its own, on a local
disk. Peak memory has the imports, which ``nothing`` shows alone. Then a smaller store on a server of S3 on loopback is
opened, and its requests are counted. First, all ways give the same segments and rows. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from measure import median, print_result, timed

from actcache.canonical import digest_of
from actcache.store import Place, SegmentData, StoreWriter, layout, open_store
from actcache.store.commit_record import encode_record
from actcache.store.records import read_fingerprint
from actcache.store.rollup import write_rollup
from actcache.store.storage import Storage, open_storage

FINGERPRINT: dict[str, Any] = {
    "checkpoints": {"pt": {"weights": "a"}, "it": {"weights": "b"}},
    "pair": ["pt", "it"],
    "dtype": "bfloat16",
    "boundaries": [18, 27],
    "row_selection": "prefix",
    "width": 8,
}
WITH_FILES = 1000  # one segment in so many
_TIMED = """
import sys, time
import torch, pyarrow, actcache.store.reader
cpu, start = time.process_time(), time.perf_counter()
if {path!r}:
    store = actcache.store.reader.open_store({path!r})
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, cpu, int(peak) * 1024)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=100_000, help="on the disk (%(default)s)")
    parser.add_argument("--far", type=int, default=2000, help="segments on the server (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few seconds' worth, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.segments, args.far, args.repeat = 300, 50, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        storage = open_storage(path)
        n_bytes = make(storage, args.segments)
        rollup, kept, stale = path / layout.ROLLUP, Path(folder) / "kept", Path(folder) / "stale"
        plain = content(path)
        roll(storage, kept)
        with unlisted(path, args.segments // 100):
            roll(storage, stale)
        for given in (kept, stale):
            shutil.copyfile(given, rollup)
            if content(path) != plain:
                sys.exit(f"the roll-up {given.name} gives another store; no figures")
        runs: dict[str, list[list[float]]] = {way: [] for way in ("nothing", "records", "roll-up", "stale")}
        for _ in range(args.repeat):
            for way, of in runs.items():
                rollup.unlink(missing_ok=True)
                if way in ("roll-up", "stale"):
                    shutil.copyfile(kept if way == "roll-up" else stale, rollup)
                code = _TIMED.format(path="" if way == "nothing" else str(path))
                done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
                of.append([float(number) for number in done.stdout.split()])
        ways: dict[str, dict[str, Any]] = {
            way: {
                "seconds": median([seconds for seconds, _, _ in of]),
                "cpu_seconds": median([seconds for _, seconds, _ in of]),
                "peak_bytes": max(memory for _, _, memory in of),
            }
            for way, of in runs.items()
        }
        for way, found in ways.items():
            print(
                f"{way:8} {found['seconds']:8.2f} s {found['cpu_seconds']:8.2f} s of CPU "
                f"{found['peak_bytes'] / 1e6:8.0f} MB",
                file=sys.stderr,
            )
        sizes = {"record_bytes": n_bytes, "rollup_bytes": kept.stat().st_size}
    far = on_a_server(args.far)
    for way, found in far.items():
        print(f"far, {way:8} {found['requests']} requests, {found['seconds']:.2f} s", file=sys.stderr)
    print_result("open", {"segments": args.segments, **sizes, "ways": ways, "far_segments": args.far, "far": far})
    return 0


def make(storage: Storage, n: int) -> int:
    """A store of so many segments; how many bytes their records have."""
    writer = StoreWriter(storage, FINGERPRINT)
    rng = random.Random(0)
    n_bytes = 0
    template: dict[str, Any] = {}
    for i in range(n):
        name = f"shard-{i:06d}"
        if i % WITH_FILES == 0:
            writer.append(name, tiny_segment(i))
            template = layout.decode_json(storage.read(layout.commit_key(name)))
            continue
        files = {
            path: [size, None if checksum is None else rng.getrandbits(32)]
            for path, (size, checksum) in template["files"].items()
        }
        prompts = {"all": [digest_of("all")], "of": {name: digest_of(name)}, "n": 64 * n}
        record = {**template, "segment": name, "folder": name, "files": files, "prompts": prompts}
        del record["crc32c"]
        data = encode_record(record)
        n_bytes += len(data)
        if isinstance(root := getattr(storage, "root", None), Path):
            (root / layout.commit_key(name)).write_bytes(data)  # without an fsync each
        else:
            storage.put(layout.commit_key(name), data)
    return n_bytes


def tiny_segment(seed: int) -> SegmentData:
    """Two sequences of three tokens, one event."""
    rng = np.random.default_rng(seed)

    def rows(n: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((n, FINGERPRINT["width"])).astype(np.float32)).bfloat16()

    def table(kinds: dict[str, str], n: int, **given: Any) -> pa.Table:
        empty = {"string": "", "float32": 0.0}
        columns = {
            column: pa.array([given.get(column, empty.get(kind, 0))] * n, layout.empty_column(kind).type)
            for column, kind in kinds.items()
        }
        return pa.table(columns)

    event = {"event_id": f"e{seed}", "prompt_id": f"p{seed}", "pair": "pt,it", "kind": "first_divergence"}
    return SegmentData(
        token_ids=np.arange(6, dtype=np.int32),
        sequence_offsets=np.array([0, 3, 6], np.int64),
        states={(label, b): rows(6) for label in ("pt", "it") for b in (18, 27)},
        final={label: rows(1) for label in ("pt", "it")},
        events=table(layout.EVENT_COLUMNS, 1, **event, position=2, carried="{}"),
        excluded=table(layout.EXCLUDED_COLUMNS, 0),
        sequences=table(layout.SEQUENCE_COLUMNS, 2, prompt_id=f"p{seed}", carried="{}"),
    )


def content(place: Place) -> tuple[Any, ...]:
    """What a store says of its segments, and the rows of those that have files."""
    store = open_store(place)
    with_files = store.segments[::WITH_FILES]
    rows = [segment.read(layout.state_path("it", 27)).tobytes() for segment in with_files]
    return store.n_prompts, [(segment.name, segment.events, segment.parts) for segment in store.segments], rows


def roll(storage: Storage, kept: Path) -> None:
    """Write the roll-up of a store, and take it away."""
    write_rollup(storage, read_fingerprint(storage))
    os.replace(Path(str(storage)) / layout.ROLLUP, kept)


@contextmanager
def unlisted(path: Path, n: int) -> Iterator[None]:
    """While it lasts, the last ``n`` records are elsewhere."""
    elsewhere = path.parent / "elsewhere"
    elsewhere.mkdir()
    records = sorted((path / layout.COMMITS).glob("*.json"))[-n:]
    for record in records:
        os.rename(record, elsewhere / record.name)
    yield
    for record in records:
        os.rename(elsewhere / record.name, record)
    elsewhere.rmdir()


def on_a_server(n: int) -> dict[str, dict[str, Any]]:
    """Requests and seconds of opening a store of ``n`` segments on a server of S3 on loopback."""
    with server() as (url, requests):
        storage = open_storage(url)
        make(storage, n)
        plain = content(url)
        ways: dict[str, dict[str, Any]] = {}
        for way in ("records", "roll-up"):
            if way == "roll-up":
                write_rollup(storage, read_fingerprint(storage))
                if content(url) != plain:
                    sys.exit("the roll-up on the server gives another store; no figures")
            requests.clear()
            seconds, _ = timed(partial(open_store, url))
            ways[way] = {"requests": len(requests), "seconds": seconds}
    return ways


@contextmanager
def server() -> Iterator[tuple[str, list[str]]]:
    """The URL of a bucket, and the requests that its server has met."""
    import boto3
    from moto.moto_server.werkzeug_app import create_backend_app
    from werkzeug.serving import make_server

    served, requests = create_backend_app("s3"), list[str]()

    def counting(environment: Any, start: Any) -> Any:
        requests.append(f"{environment['REQUEST_METHOD']} {environment['PATH_INFO']}")
        return served(environment, start)

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    http = make_server("127.0.0.1", 0, counting, threaded=True)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{http.port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    try:
        with mock.patch.dict(os.environ, environment):
            boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket="bucket")
            yield "s3://bucket/store", requests
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


if __name__ == "__main__":
    sys.exit(main())
