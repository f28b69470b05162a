"""Tune the demo's base into a lineage of four tiny checkpoints, and write the prompts of its study.

The base is the one that the package ships. ``train_demo_pair.py`` trained it, and its made-up world gives the text here
too::

    OUT/base           the base as it is
    OUT/sft            OUT/base tuned for a short while on answers in the tuned style; loss on the answer only
    OUT/dpo            OUT/sft tuned by preferences (DPO): the tuned answer to a prompt over the plain one
    OUT/math           OUT/base trained on sheets of sums that are worked in equations; loss on every token
    OUT/prompts.jsonl  128 raw prompts, 32 of each category, drawn with a seed of their own and not selected by any
                       result

So sft and dpo are stages on one way, and math is a fine-tune for a domain. How long each is tuned was chosen so that
the analyses have something to show: an example, not a finding.

Weights are saved as bfloat16, and each stage starts from saved ones. Everything runs on one CPU thread in float32, so
the same torch build on the same kind of CPU gives the same bytes.

Run::

    python scripts/train_demo_lineage.py --out OUT

Progress goes to stderr; the last line of stdout is one JSON object with sizes, times, held-out losses (mean nats per
token) and how many prompts of each descendant diverge from the base.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import log_softmax, logsigmoid
from train_demo_pair import (
    DEFAULT_OUT,
    MASKED,
    Batch,
    Exchange,
    Row,
    World,
    answer_rows,
    count_divergences,
    held_out_loss,
    make_prompts,
    one_batch,
    optimise,
    pack,
    save,
    text_rows,
    train,
    write_prompts,
)
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from actcache.errors import InputError

PROMPTS_PER_CATEGORY = 32
BETA = 0.1  # of DPO
LIKELIHOOD_WEIGHT = 0.2  # of the preferred answer's own loss, without which both answers may become unlikely


@dataclass(frozen=True)
class Size:
    """How much is trained: steps of each stage, rows or preferences in a step, rows of each held-out text."""

    sft_steps: int
    dpo_steps: int
    math_steps: int
    rows: int
    held_out_rows: int


SFT_PEAK_LR, DPO_PEAK_LR, MATH_PEAK_LR = 5e-4, 5e-4, 1e-3
FULL = Size(sft_steps=60, dpo_steps=60, math_steps=100, rows=12, held_out_rows=24)
SMOKE = Size(sft_steps=2, dpo_steps=2, math_steps=2, rows=2, held_out_rows=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the lineage and its prompts. Returns 0, or 2 after one line on stderr when an argument is unusable."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--base", type=Path, default=DEFAULT_OUT / "pt", help="folder of the base (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the base's world, and of what is drawn (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps only: files that load, and learnt nothing")
    args = parser.parse_args(argv)
    transformers_logging.disable_progress_bar()
    try:
        summary = make_lineage(args.out, args.base, args.seed, SMOKE if args.smoke else FULL)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return 0


def make_lineage(out: Path, base: Path, seed: int, size: Size) -> dict[str, Any]:
    """Write the folder ``out``; return the figures that the last line of stdout shows.

    Raises:
        InputError: ``out`` is already there, or ``base`` is not.
    """
    if out.exists():
        raise InputError(f"{out} is already there; remove it or give another --out")
    if not (base / "config.json").is_file():
        raise InputError(f"{base} is no model folder; give the folder of the demo's base")
    # One thread and one order of summation, so that a second run gives the same bits.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(seed)
    start = time.perf_counter()
    world = World(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    held_out = {
        "text": one_batch(text_rows(world, tokenizer, f"{seed} held-out text"), size.held_out_rows),
        "answers": one_batch(answer_rows(world, tokenizer, f"{seed} held-out answers"), size.held_out_rows),
        "sheets": one_batch(sheet_rows(world, tokenizer, f"{seed} held-out sheets"), size.held_out_rows),
    }
    losses: dict[str, dict[str, float]] = {}

    def keep(model: LlamaForCausalLM, label: str) -> None:
        if label != "base":
            save(model, tokenizer, lineage / label)
        losses[label] = {what: round(held_out_loss(model, batch), 4) for what, batch in held_out.items()}
        print(f"{label}: held-out loss {losses[label]}", file=sys.stderr)

    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside OUT, so that the last step is one rename: OUT is there whole, or not at all.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        lineage = Path(scratch) / "lineage"
        shutil.copytree(base, lineage / "base")
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        specialist = copy.deepcopy(model)
        keep(model, "base")
        train(model, answer_rows(world, tokenizer, f"{seed} sft"), size.sft_steps, size.rows, SFT_PEAK_LR, "sft")
        keep(model, "sft")
        prefer(model, preferences(world, tokenizer, f"{seed} dpo"), size.dpo_steps, size.rows)
        keep(model, "dpo")
        rows = sheet_rows(world, tokenizer, f"{seed} math")
        train(specialist, rows, size.math_steps, size.rows, MATH_PEAK_LR, "math")
        keep(specialist, "math")
        prompts = make_prompts(world, f"{seed} lineage prompts", PROMPTS_PER_CATEGORY)
        write_prompts(lineage / "prompts.jsonl", prompts)
        labels = [label for label in losses if label != "base"]
        divergence = {label: count_divergences(lineage / "base", lineage / label, prompts) for label in labels}
        lineage.rename(out)
    return {
        "out": str(out),
        "seed": seed,
        "n_parameters": model.num_parameters(),
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "held_out_loss": losses,
        "diverged": divergence,
        "elapsed_s": round(time.perf_counter() - start, 1),
    }


def sheet_rows(world: World, tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[Row]:
    """Endless rows of sheets of sums, each worked in an equation; every token counts in the loss."""
    rng = random.Random(seed)

    def pieces() -> Iterator[Row]:
        while True:
            exchanges = [world.arithmetic(rng) for _ in range(rng.randint(2, 5))]
            sheet = "\n".join(exchange.prompt + worked(exchange) for exchange in exchanges)
            ids = [*tokenizer(sheet)["input_ids"], tokenizer.eos_token_id]
            yield ids, ids

    return pack(pieces())


def worked(exchange: Exchange) -> str:
    """The answer as an equation: what a tuned answer gives as its reason. A line of sums goes on as it did."""
    equation = exchange.tuned.partition(" because ")[2]
    return f" {equation}" if equation else exchange.plain


def preferences(world: World, tokenizer: PreTrainedTokenizerFast, seed: str) -> Iterator[Row]:
    """Endless rows, two per prompt: with the tuned answer, then with the plain one. Only answers count."""
    rng = random.Random(seed)
    while True:
        exchange = world.exchange(rng)
        prompt = tokenizer(exchange.prompt)["input_ids"]
        for text in (exchange.tuned, exchange.plain):
            answer = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            yield [*prompt, *answer], [*[MASKED] * len(prompt), *answer]


def prefer(model: LlamaForCausalLM, rows: Iterator[Row], n_steps: int, n_pairs: int) -> None:
    """DPO in place, ``n_pairs`` preferences per step, against the model as it is now."""
    reference = copy.deepcopy(model).eval()

    def loss() -> torch.Tensor:
        batch = padded(list(itertools.islice(rows, 2 * n_pairs)))
        with torch.no_grad():
            before = answer_log_probs(reference, batch)
        now = answer_log_probs(model, batch)
        gained = now - before
        n_preferred = (batch.labels[::2] != MASKED).sum()
        return (
            -logsigmoid(BETA * (gained[::2] - gained[1::2])).mean() - LIKELIHOOD_WEIGHT * now[::2].sum() / n_preferred
        )

    optimise(model, loss, n_steps, DPO_PEAK_LR, "dpo")


def padded(rows: Sequence[Row]) -> Batch:
    """Rows of different lengths, filled at the end, where nothing that counts reads."""
    longest = max(len(ids) for ids, _ in rows)
    ids = [[*ids, *[0] * (longest - len(ids))] for ids, _ in rows]
    labels = [[*labels, *[MASKED] * (longest - len(labels))] for _, labels in rows]
    return Batch(torch.tensor(ids), torch.tensor(labels))


def answer_log_probs(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Log-probability of each row's counted tokens together, float32 ``[rows]``."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    labels = batch.labels[:, 1:]
    of_token = log_softmax(logits, dim=-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (of_token * (labels != MASKED)).sum(dim=1)


if __name__ == "__main__":
    sys.exit(main())
