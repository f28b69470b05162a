"""Make small checkpoints of every kind that can be given, from the pair that the package ships.

::

    OUT/base          the demo's pretrained checkpoint
    OUT/tuned         its tuned descendant, with a chat template
    OUT/adapter       a LoRA adapter on OUT/base, trained for a short while on what OUT/tuned answers
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

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).resolve().parents[1] / "actcache" / "demo"
STEPS, NEW_TOKENS, RATE = 40, 24, 4e-3
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
    shutil.copy(DEMO / "prompts.jsonl", args.out)
    (args.out / "tuned" / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_messages(args.out)
    train_adapter(args.out, args.steps)
    for name in ("base", "tuned", "adapter"):
        add_to_cache(args.out / "hub", f"example/{name}", args.out / name)


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
