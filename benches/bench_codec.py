"""The codec of bf16 planes against what else a store could use: same chunks, one core, one process, words equal first.

    python benches/bench_codec.py --states smollm2_b018.npy smollm2_b029.npy    # uint16 [N, D], bf16 words
    python benches/bench_codec.py --capture pairs/smollm2/pt     # states of a model folder at 0.6 L and L-1
    python benches/bench_codec.py                                # of the demo pair: shows the way, no more

Rivals: Blosc lz4 with bitshuffle (level 5, the store's own codec), Blosc zstd with shuffle and bitshuffle (level 1),
zstd on the words as they are (levels 1 and 3) and behind numcodecs' byte shuffle. (*) marks the library path of the
same idea: the plane of exponents through zstd's entropy stage, matches all but switched off, split and merge not
counted. Ratio, and GB/s of raw words encoded and decoded on one core; the ceiling is memcpy of the same chunks. Medians
of rounds in which every codec has its turn, so that a busy machine is unfair to none. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs.blosc as blosc
import numpy as np
import numpy.typing as npt
from measure import in_turn, median, print_result
from numcodecs import Shuffle, Zstd

import actcache
from actcache import native
from actcache.store import planes

Words = npt.NDArray[np.uint16]
CHUNK_BYTES = 256 * 1024  # as in the store


class Codec(NamedTuple):
    """Encode takes what ``prepare`` made of words [n, D], untimed; decode the coded chunk and the size of the words."""

    name: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any, int], Any]
    prepare: Callable[[Words], Any] = lambda words: words
    bytes_beside: float = 0.0  # stored beside what encode gives, as a share of the words


def blosc_codec(name: str, compressor: bytes, level: int, shuffle: int) -> Codec:
    return Codec(
        name,
        lambda words: blosc.compress(words.reshape(-1), compressor, level, shuffle, 0, 2),
        lambda data, n_bytes: blosc.decompress(data),
    )


def zstd_codec(name: str, level: int, shuffled: bool = False) -> Codec:
    zstd, shuffle = Zstd(level), Shuffle(2)
    if shuffled:
        return Codec(
            name,
            lambda words: zstd.encode(shuffle.encode(words)),
            lambda data, n_bytes: shuffle.decode(zstd.decode(data)),
        )
    return Codec(name, lambda words: zstd.encode(words), lambda data, n_bytes: zstd.decode(data))


def library_planes() -> list[Codec]:
    """The plane of exponents alone, by zstd with a match finder that hardly looks; needs the package ``zstandard``."""
    try:
        import zstandard
    except ImportError:
        return []
    how = zstandard.ZstdCompressionParameters(
        strategy=1, window_log=17, hash_log=6, chain_log=6, search_log=1, min_match=7, target_length=0
    )
    squeeze, expand = zstandard.ZstdCompressor(compression_params=how), zstandard.ZstdDecompressor()
    return [
        Codec(
            "exponents alone by zstd (*)",
            squeeze.compress,
            lambda data, n_bytes: expand.decompress(data),
            lambda words: (words >> 7 & 0xFF).astype(np.uint8),
            0.5,
        )
    ]


def codecs() -> list[Codec]:
    ours = Codec("planes (actcache)", lambda words: planes.encode(words, words.shape[1]), planes.decode)
    flat = Codec("planes, one base", lambda words: planes.encode(words, 1), planes.decode)
    return [
        ours,
        flat,
        *library_planes(),
        blosc_codec("blosc lz4 bitshuffle", b"lz4", 5, blosc.BITSHUFFLE),
        blosc_codec("blosc zstd-1 shuffle", b"zstd", 1, blosc.SHUFFLE),
        blosc_codec("blosc zstd-1 bitshuffle", b"zstd", 1, blosc.BITSHUFFLE),
        zstd_codec("zstd-1 raw", 1),
        zstd_codec("zstd-3 raw", 3),
        zstd_codec("zstd-1 shuffle", 1, shuffled=True),
        zstd_codec("zstd-3 shuffle", 3, shuffled=True),
        Codec("memcpy", lambda words: words.copy(), lambda data, n_bytes: data.copy()),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=Path, nargs="+", default=[], help="uint16 [N, D] .npy files")
    parser.add_argument("--capture", type=Path, nargs="+", default=[], help="model folders to take states of")
    parser.add_argument("--tokens", type=int, default=4096, help="of each model (%(default)s)")
    parser.add_argument("--save", type=Path, help="folder for the captured states, as .npy")
    parser.add_argument("--mib", type=float, default=4, help="of each file that are timed (%(default)s)")
    parser.add_argument("--chunk-kib", type=int, default=CHUNK_BYTES // 1024, help="raw (%(default)s, the store's)")
    parser.add_argument("--repeat", type=int, default=9, help="rounds (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a second's worth, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.mib, args.repeat, args.tokens = 0.25, 2, 128
    blosc.use_threads = False  # one core for each
    blosc.set_nthreads(1)

    sources = {path.stem: np.load(path) for path in args.states}
    models = args.capture
    if not sources and not models:
        models = [Path(actcache.__file__).parent / "demo" / "pt"]
        print(
            "no --states and no --capture: states of the demo pair's small model, which prove nothing about real ones"
        )
    for folder in models:
        sources |= capture(folder, args.tokens)
    if args.save:
        args.save.mkdir(parents=True, exist_ok=True)
        for name, words in sources.items():
            np.save(args.save / f"{name}.npy", words)

    tables = {}
    for name, words in sources.items():
        if words.dtype != np.uint16 or words.ndim != 2:
            sys.exit(f"{name}: {words.dtype} {words.shape}, expected uint16 [N, D]")
        n_rows = max(1, int(args.mib * 2**20) // (2 * words.shape[1]))
        rows = np.ascontiguousarray(words[:n_rows])
        tables[name] = measure_codecs(rows, max(1, args.chunk_kib * 1024 // (2 * words.shape[1])), args.repeat)
        print_table(name, rows, tables[name])
    core, which = native.native("cpu")
    result = {
        "states": tables,
        "chunk_bytes": args.chunk_kib * 1024,
        "repeat": args.repeat,
        "engine": which,
        "isa": None if core is None else ["portable", "avx2", "avx512"][core.isa()],
    }
    print_result("codec", result)
    return 0


def measure_codecs(words: Words, chunk_rows: int, repeat: int) -> dict[str, dict[str, Any]]:
    """Ratio and rates of every codec over the chunks of [N, D] words. Exits where words do not come back."""
    chunks = [words[i : i + chunk_rows] for i in range(0, len(words), chunk_rows)]
    listed = codecs()
    given = {codec.name: [codec.prepare(chunk) for chunk in chunks] for codec in listed}
    coded = {codec.name: [codec.encode(chunk) for chunk in given[codec.name]] for codec in listed}
    runs: dict[str, Callable[[], Any]] = {}
    for codec in listed:
        pairs = list(zip(coded[codec.name], [chunk.nbytes for chunk in chunks], strict=True))
        for (data, n_bytes), words_in in zip(pairs, given[codec.name], strict=True):
            if memoryview(codec.decode(data, n_bytes)).tobytes() != words_in.tobytes():
                sys.exit(f"{codec.name}: other words came back")
        runs[f"{codec.name} encode"] = partial(each, codec.encode, [(words_in,) for words_in in given[codec.name]])
        runs[f"{codec.name} decode"] = partial(each, codec.decode, pairs)
    rates = {name: [words.nbytes / s / 1e9 for s in seconds] for name, seconds in in_turn(runs, repeat).items()}
    table: dict[str, dict[str, Any]] = {}
    for codec in listed:
        n_coded = sum(memoryview(data).nbytes for data in coded[codec.name])
        table[codec.name] = {"ratio": words.nbytes / (n_coded + codec.bytes_beside * words.nbytes)}
        for way in ("encode", "decode"):
            found = rates[f"{codec.name} {way}"]
            table[codec.name] |= {f"{way}_gb_s": median(found), f"{way}_spread": [min(found), max(found)]}
    return table


def each(run: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> None:
    """One chunk after another; what comes of it is dropped at once."""
    for given in arguments:
        run(*given)


def entropy_bits(values: npt.NDArray[np.uint8]) -> float:
    """Of one byte, from the frequencies."""
    p = np.bincount(values.reshape(-1), minlength=256) / values.size
    return float(-(p[p > 0] * np.log2(p[p > 0])).sum())


def print_table(name: str, words: Words, table: dict[str, dict[str, Any]]) -> None:
    """For people."""
    exponents, rests = (words >> 7 & 0xFF).astype(np.uint8), (words >> 8 & 0x80 | words & 0x7F).astype(np.uint8)
    print(
        f"\n{name}: {words.shape[0]} rows of {words.shape[1]}, {words.nbytes / 1e6:.1f} MB; entropy of an exponent "
        f"{entropy_bits(exponents):.2f} bits, of a rest {entropy_bits(rests):.2f} bits\n"
        f"{'':28}{'ratio':>7}  {'encode GB/s':>11} {'(spread)':>13} {'of memcpy':>9}  "
        f"{'decode GB/s':>11} {'(spread)':>13} {'of memcpy':>9}"
    )
    ceiling = table["memcpy"]
    for codec, row in table.items():
        cells = []
        for way in ("encode", "decode"):
            rate, (low, high) = row[f"{way}_gb_s"], row[f"{way}_spread"]
            cells.append(f"{rate:11.2f} {f'{low:.2f}-{high:.2f}':>13} {100 * rate / ceiling[f'{way}_gb_s']:8.0f}%")
        print(f"{codec:28}{row['ratio']:7.4f}  {'  '.join(cells)}")


def capture(folder: Path, n_tokens: int) -> dict[str, Words]:
    """bf16 states of a model at 0.6 L and L-1 over the standard library's docstrings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    n_blocks = model.config.num_hidden_layers
    found: dict[int, list[Words]] = {boundary: [] for boundary in (round(0.6 * n_blocks), n_blocks - 1)}
    done = 0
    for text in docstrings():
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        if not ids.numel():
            continue
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True, logits_to_keep=1).hidden_states
        for boundary, rows in found.items():
            rows.append(states[boundary][0].view(torch.uint16).numpy().copy())
        done += ids.shape[1]
        if done >= n_tokens:
            break
    label = "-".join(folder.resolve().parts[-2:])
    return {f"{label}-b{boundary:03d}": np.concatenate(rows) for boundary, rows in found.items()}


def docstrings() -> Iterator[str]:
    """Text that is on every machine."""
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if len(text) >= 200:
                    yield text


if __name__ == "__main__":
    sys.exit(main())
