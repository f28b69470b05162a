"""A pass over the blocks of a checkpoint, read one at a time, beside the plain forward and beside the disk.

    python benches/bench_stream.py --checkpoint pairs/random-3b/pt

For several numbers of tokens, in packs of sequences of 32:

    plain      a forward of all packs, all blocks in memory
    warm       a pass over the blocks, their files in the system's cache
    cold       the same, the files out of it
    disk       the files of the checkpoint read from front to back, out of the cache

Outputs are compared bit for bit first, a sequence per forward. With few tokens a pass takes what reading takes; with
many, what the forward takes, as the next block is read while one computes. Without ``--checkpoint`` one is made by
scripts/make_random_pair.py. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import in_turn, print_result

from actcache.capture.forward import Forwarder, Pack, Resident
from actcache.capture.streams import Streaming
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import Checkpoint
from actcache.models.checkpoint_files import weight_files
from actcache.models.streamed import Streamed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
SEQUENCE, PACK = 32, 1024  # tokens


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="folder of a model; by default a random one is made")
    parser.add_argument("--tokens", default="32,1024,8192")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="a size of seconds")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or made(Path(scratch) / "pair", smoke=args.smoke)
        numbers = [32, 64] if args.smoke else [int(one) for one in args.tokens.split(",")]
        result = run(Checkpoint.open("a", folder), numbers, 1 if args.smoke else args.repeat)
    print_result("stream", result)
    return 0


def made(folder: Path, *, smoke: bool) -> Path:
    """A random checkpoint."""
    import make_random_pair

    size = {"--blocks": 4, "--width": 256, "--inner": 512, "--vocabulary": 1000} if smoke else {"--blocks": 12}
    words = [str(word) for item in size.items() for word in item]
    if make_random_pair.main(["--out", str(folder), *words]):
        raise SystemExit(2)
    return folder / "pt"


def run(checkpoint: Checkpoint, numbers: Sequence[int], repeat: int) -> dict[str, Any]:
    """Times by number of tokens."""
    resident = Resident(Backbone(checkpoint.load(checkpoint.own_dtype)))
    streamed = Streamed(checkpoint, None)
    streaming = Streaming("a", streamed)
    files = weight_files(checkpoint.path)
    n_file_bytes = sum(file.stat().st_size for file in files)
    check_equal(resident, streaming)
    before = streamed.n_bytes
    list(streaming.run(packs(SEQUENCE), ()))
    n_block_bytes = streamed.n_bytes - before
    found: dict[str, Any] = {}
    for n_tokens in numbers:
        given = packs(n_tokens)
        ways: dict[str, Callable[[], Any]] = {
            "plain": partial(forward, resident, given),
            "warm": partial(forward, streaming, given),
            "cold": partial(forward, streaming, given),
            "disk": partial(read, files),
        }
        times = in_turn(ways, repeat, lambda name: forget(files if name in ("cold", "disk") else ()))
        found[str(n_tokens)] = median = {name: sorted(of)[len(of) // 2] for name, of in times.items()}
        limit = max(median["plain"], median["disk"] * n_block_bytes / n_file_bytes)
        print(
            f"{n_tokens:6} tokens: plain {median['plain']:.2f} s, warm {median['warm']:.2f} s, cold "
            f"{median['cold']:.2f} s ({n_block_bytes / 1e6 / median['cold']:,.0f} MB/s), the slower of plain and disk "
            f"{limit:.2f} s; disk {n_file_bytes / 1e6 / median['disk']:,.0f} MB/s"
        )
    return {"n_parameters": checkpoint.skeleton.num_parameters(), "block_bytes": n_block_bytes, "passes": found}


def forward(reader: Forwarder, given: Sequence[Pack]) -> None:
    """Run all packs."""
    for _ in reader.run(given, ()):
        pass


def packs(n_tokens: int, pack: int = PACK) -> list[Pack]:
    """Of sequences of random tokens."""
    ids = torch.randint(3, 600, (n_tokens // SEQUENCE, SEQUENCE), generator=torch.Generator().manual_seed(0)).tolist()
    per_pack = max(1, pack // SEQUENCE)
    parts = [ids[start : start + per_pack] for start in range(0, len(ids), per_pack)]
    return [Pack.of(part, [[] for _ in part], [[SEQUENCE - 1] for _ in part]) for part in parts]


def check_equal(resident: Resident, streaming: Streaming) -> None:
    """One sequence per forward: the same bits."""
    given = packs(2 * SEQUENCE, SEQUENCE)
    for one, other in zip(resident.run(given, ()), streaming.run(given, ()), strict=True):
        if not torch.equal(one.final, other.final):
            raise SystemExit("error: a pass over the blocks differs from the plain forward")


def forget(files: Sequence[Path]) -> None:
    """Have the system drop files from its cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: Sequence[Path]) -> None:
    """All of some files."""
    buffer = bytearray(8 << 20)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


if __name__ == "__main__":
    sys.exit(main())
