"""Make pairs of folders that `actcache plan` can plan: configs and a tokenizer, and no weights; and prompts for them.

The sizes are those of public configs: Llama 3.1 8B and Qwen2.5 32B. The tokenizer is that of the shipped pair, so that
prompts have more tokens than with the models' own. Each prompt is eight of the shipped ones, one after another::

    python scripts/make_plan_configs.py --out plans
    actcache plan --pt plans/llama-8b/pt --it plans/llama-8b/it --prompts plans/prompts.jsonl --study \\
        --gpus 8 --device cuda --rate 200TFLOP/s
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

DEMO = Path(__file__).resolve().parent.parent / "actcache" / "demo" / "pt"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
LABELS = ("pt", "it")


def configs() -> dict[str, PretrainedConfig]:
    """The config of each size, by the name of its folder."""
    common: dict[str, Any] = {
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
    }
    common |= {"dtype": "bfloat16", "max_position_embeddings": 131072}
    return {
        "llama-8b": LlamaConfig(
            num_hidden_layers=32,
            hidden_size=4096,
            num_attention_heads=32,
            intermediate_size=14336,
            vocab_size=128256,
            architectures=["LlamaForCausalLM"],
            **common,
        ),
        "qwen-32b": Qwen2Config(
            num_hidden_layers=64,
            hidden_size=5120,
            num_attention_heads=40,
            intermediate_size=27648,
            vocab_size=152064,
            architectures=["Qwen2ForCausalLM"],
            **common,
        ),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folders. Returns 0, or 2 after one line on stderr when the place is taken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make; holds llama-8b and qwen-32b")
    parser.add_argument("--prompts", type=int, default=1000, help="prompts to write (%(default)s)")
    args = parser.parse_args(argv)
    if args.out.exists():
        print(f"error: {args.out} is already there; remove it or give another --out", file=sys.stderr)
        return 2
    for name, config in configs().items():
        for label in LABELS:
            folder = args.out / name / label
            folder.mkdir(parents=True)
            config.save_pretrained(folder)
            for name_of_file in TOKENIZER:
                shutil.copy(DEMO / name_of_file, folder / name_of_file)
    texts = [json.loads(line)["prompt"] for line in (DEMO.parent / "prompts.jsonl").read_text("utf-8").splitlines()]
    with (args.out / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for number in range(args.prompts):
            own = [texts[(number + part * (1 + number // len(texts))) % len(texts)] for part in range(8)]
            file.write(json.dumps({"id": f"p{number}", "prompt": " ".join(own)}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
