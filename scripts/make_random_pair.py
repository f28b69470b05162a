"""Make a pair of large checkpoints with random weights, without ever holding one: to see what a machine takes.

Both are of Qwen2's architecture, in bfloat16, 3.1 billion parameters each unless told otherwise, in several safetensors
files. The second is the first with a little noise, so that their greedy texts part after some tokens. The tokenizer is
that of the shipped pair, and so are the prompts to try. Same arguments, same bytes::

    python scripts/make_random_pair.py --out pairs/random-3b
    actcache run --pt pairs/random-3b/pt --it pairs/random-3b/it --prompts actcache/demo/prompts.jsonl --limit 8 \\
        --max-new 8 --stream --strict --stability 0 --out RUN

The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

DEMO = Path(__file__).resolve().parent.parent / "actcache" / "demo" / "pt"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
LABELS = ("pt", "it")

# Blocks write more into the residual stream than the embedding does: a tied head would repeat the last token otherwise.
_EMBEDDING_STD, _BLOCK_GAIN, _LOGIT_STD = 0.2, 1.4, 4.0


def main(argv: Sequence[str] | None = None) -> int:
    """Make both folders. Returns 0, or 2 after one line on stderr when the place is taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; holds pt and it")
    parser.add_argument("--blocks", type=int, default=36, help="L (%(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="D, a multiple of 128 (%(default)s)")
    parser.add_argument("--inner", type=int, default=11008, help="width of the MLPs (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=151936, help="tokens (%(default)s)")
    parser.add_argument("--noise", type=float, default=0.01, help="relative size of what sets the second apart")
    parser.add_argument("--shard-mb", type=int, default=512, help="bytes of a file, in MB (%(default)s)")
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"error: {args.out} is already there; remove it or give another --out", file=sys.stderr)
        return 2
    config = Qwen2Config(
        vocab_size=args.vocabulary,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.width // 128,
        num_key_value_heads=max(1, args.width // 1024),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        dtype="bfloat16",
        architectures=["Qwen2ForCausalLM"],
    )
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    for label in LABELS:
        folder = args.out / label
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        for name in TOKENIZER:
            shutil.copy(DEMO / name, folder / name)
        write(folder, model, args.noise if label == "it" else 0.0, args.shard_mb << 20)
    print(json.dumps({"out": str(args.out), "n_parameters": model.num_parameters()}))
    return 0


def write(folder: Path, model: Qwen2ForCausalLM, noise: float, shard_bytes: int) -> None:
    """The files of one checkpoint: in memory is one file's worth of weights."""
    place: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    n_files = n_bytes = total = 0

    def flush() -> None:
        nonlocal n_files, n_bytes
        n_files += 1
        file = f"model-{n_files:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        place.update(dict.fromkeys(shard, file))
        shard.clear()
        n_bytes = 0

    for name, weight in weights(model, noise):
        if shard and n_bytes + weight.nbytes > shard_bytes:
            flush()
        shard[name] = weight
        n_bytes, total = n_bytes + weight.nbytes, total + weight.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def weights(model: Qwen2ForCausalLM, noise: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Each weight by name: what a tensor holds depends on its name and shape alone."""
    width = model.config.hidden_size
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        shape = parameter.shape
        weight = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            weight.mul_(0.1)
        elif weight.ndim == 1:
            scale = 1.0 if ".layers." in name else _LOGIT_STD / (_EMBEDDING_STD * width**0.5)
            weight.mul_(0.1).add_(1).mul_(scale)
        else:
            weight.mul_(_BLOCK_GAIN / shape[1] ** 0.5 if ".layers." in name else _EMBEDDING_STD)
        if noise:
            weight.add_(torch.randn(shape, generator=generator), alpha=noise * float(weight.square().mean().sqrt()))
        yield name, weight.to(torch.bfloat16)


if __name__ == "__main__":
    raise SystemExit(main())
