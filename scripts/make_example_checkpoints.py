"""Make small checkpoints of every kind that can be given, from the pair that the package ships.

::

    OUT/base          the demo's pretrained checkpoint
    OUT/tuned         its tuned descendant, with a chat template
    OUT/adapter       a LoRA adapter on OUT/base, trained for a short while on what OUT/tuned answers
    OUT/base-fp8, OUT/tuned-fp8: both with their blocks' weights in 8 bits
    OUT/base-vl, OUT/tuned-vl: both as the text towers of models for images and text, whose vision is random
    OUT/hub           a cache of the Hugging Face Hub with example/base, example/tuned and example/adapter in it
    OUT/prompts.jsonl the demo's prompts
    OUT/messages.jsonl those of them that are questions, as messages of a chat

Nothing is downloaded: OUT/hub is what a download would leave. Use it by ``HF_HUB_CACHE=OUT/hub HF_HUB_OFFLINE=1``.

Run::

    python scripts/make_example_checkpoints.py --out OUT

Progress goes to stderr.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, pad
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

DEMO = Path(__file__).resolve().parents[1] / "actcache" / "demo"
STEPS, NEW_TOKENS, RATE = 40, 24, 4e-3
BLOCK = 128  # rows and columns under one scale
TEMPLATE = """{% for message in messages %}{% if message['role'] == 'user' %}Question: {{ message['content'] | trim }}
{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] | trim }}
{% else %}{{ message['content'] | trim }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""


def main(argv: Sequence[str] | None = None) -> None:
    """Make all of it in a new folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the adapter's training (default {STEPS})")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True)
    for name, demo in (("base", "pt"), ("tuned", "it")):
        shutil.copytree(DEMO / demo, args.out / name)
        write_fp8(args.out / name, args.out / f"{name}-fp8")
        write_tower(args.out / name, args.out / f"{name}-vl")
    shutil.copy(DEMO / "prompts.jsonl", args.out)
    (args.out / "tuned" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_messages(args.out)
    train_adapter(args.out, args.steps)
    for name in ("base", "tuned", "adapter"):
        add_to_cache(args.out / "hub", f"example/{name}", args.out / name)


def write_fp8(source: Path, folder: Path) -> None:
    """A checkpoint whose blocks have their matrices in 8 bits, with a scale per tile, as DeepSeek's have."""
    shutil.copytree(source, folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors[name] = weight
        if weight.ndim == 2 and ".layers." in name:
            n, k = weight.shape
            padded = pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
            tiles = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
            scales = tiles.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            packed = (tiles / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:n, :k]
            tensors[name] = packed.to(torch.float8_e4m3fn).contiguous()
            tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_tower(source: Path, folder: Path) -> None:
    """A LLaVA whose part for text is this checkpoint, beside a random part for images."""
    text = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
    }
    config = LlavaConfig(
        text_config=text.config,
        vision_config=CLIPVisionConfig(**sizes, num_hidden_layers=2, image_size=28, patch_size=14),
        image_token_index=text.config.vocab_size,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = LlavaForConditionalGeneration(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def write_messages(out: Path) -> None:
    """The questions of the prompts, each as the one message of a chat."""
    lines = []
    for line in (out / "prompts.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)
        if prompt["category"] == "question":
            question = prompt["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
            message = {"role": "user", "content": question}
            lines.append(json.dumps({"id": prompt["id"], "messages": [message], "category": "question"}) + "\n")
    (out / "messages.jsonl").write_text("".join(lines), encoding="utf-8")


def train_adapter(out: Path, n_steps: int) -> None:
    """A LoRA adapter whose base answers more as the tuned checkpoint does."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    prompts = [json.loads(line)["prompt"] for line in (out / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    teacher = AutoModelForCausalLM.from_pretrained(out / "tuned", dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        texts.append((ids.shape[1], teacher.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0]))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE)
    for step in range(n_steps):
        losses = []
        for n_prompt, ids in texts[step % 4 :: 4]:
            logits = adapted(ids[None]).logits[0, n_prompt - 1 : -1]
            losses.append(cross_entropy(logits, ids[n_prompt:]))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step + 1 == n_steps:
            print(f"step {step + 1} of {n_steps}: loss {loss.item():.3f}", file=sys.stderr)
    # The place where it was trained is nobody else's.
    adapted.peft_config["default"].base_model_name_or_path = "example/base"
    adapted.save_pretrained(str(out / "adapter"), save_embedding_layers=False)


def add_to_cache(hub: Path, name: str, folder: Path) -> str:
    """Put a folder into a cache of the Hub as the model ``name``; returns its commit.

    Weights are named by their SHA-256 there, other files as git names them.
    """
    repository = hub / f"models--{name.replace('/', '--')}"
    blobs, files = repository / "blobs", sorted(file for file in folder.iterdir() if file.is_file())
    blobs.mkdir(parents=True, exist_ok=True)
    names = {}
    for file in files:
        data = file.read_bytes()
        weights = file.suffix == ".safetensors"
        sha256, git = hashlib.sha256(data), hashlib.sha1(b"blob %d\0" % len(data) + data)
        names[file.name] = (sha256 if weights else git).hexdigest()
        shutil.copy(file, blobs / names[file.name])
    commit = hashlib.sha1(json.dumps(names, sort_keys=True).encode()).hexdigest()
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name_of_file, blob in names.items():
        (snapshot / name_of_file).symlink_to(Path("../../blobs") / blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return commit


if __name__ == "__main__":
    main()
