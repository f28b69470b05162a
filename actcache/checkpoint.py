"""Checkpoint: one model folder, read and fingerprinted. Knows transformers, its configs and tokenizers.

Everything is read from local folders, weights from safetensors only, and no code from a checkpoint folder runs.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from actcache.errors import InputError, UnsupportedModelError
from actcache.tokens import Encoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Keys of config.json that say who wrote the file, not what the model computes.
_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True)
class Checkpoint:
    """One model folder: config.json, ``*.safetensors`` and a tokenizer.

    Raises (from :meth:`open`):
        InputError: the folder or one of these is missing, weights are pickled only, or the architecture is unknown.
    """

    label: str
    path: Path
    config: PretrainedConfig

    @classmethod
    def open(cls, label: str, path: str | Path, *, with_weights: bool = True) -> Checkpoint:
        """Check the folder and read its config; weights are not touched, and need not be there unless told so."""
        path = Path(path)
        if not path.is_dir():
            raise InputError(f"checkpoint {label}: {path} is not a folder; give a local model folder")
        if not (path / "config.json").is_file():
            raise InputError(f"checkpoint {label}: {path} has no config.json")
        if with_weights and not weight_files(path):
            pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
            if pickled:
                raise InputError(
                    f"checkpoint {label}: {path} holds pickled weights only ({pickled[0]}), which are never loaded; "
                    "convert them to safetensors"
                )
            raise InputError(f"checkpoint {label}: {path} holds no *.safetensors weights")
        try:
            config = AutoConfig.from_pretrained(path, **_LOCAL)
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"checkpoint {label}: {path}/config.json: {_first_line(error)}") from error
        return cls(label, path, config)

    @property
    def decoder_config(self) -> PretrainedConfig:
        """The part of the config that is the decoder's: of a model for text and images, that of the text."""
        return self.config.get_text_config(decoder=True)

    @cached_property
    def model_class(self) -> type[PreTrainedModel]:
        """The causal LM class that transformers has for this config."""
        mapping: Any = AutoModelForCausalLM._model_mapping
        if type(self.config) not in mapping:
            raise UnsupportedModelError(f"{self.path}: {self.config.model_type!r} has no causal language model")
        return mapping[type(self.config)]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's own tokenizer, with truncation and padding off."""
        return self.encoder.tokenizer

    @cached_property
    def encoder(self) -> Encoder:
        """What gives the ids of a text by the folder's own tokenizer."""
        try:
            return Encoder.of(AutoTokenizer.from_pretrained(self.path, **_LOCAL))
        except (ValueError, KeyError, OSError) as error:
            raise InputError(f"checkpoint {self.label}: no tokenizer in {self.path}: {_first_line(error)}") from error

    @cached_property
    def attention(self) -> str:
        """Name of the attention implementation that transformers picks for this model here (``sdpa``, ``eager``)."""
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, trust_remote_code=False).config._attn_implementation

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a generation."""
        ids = getattr(self.config, "eos_token_id", None) or self.decoder_config.eos_token_id
        if (self.path / "generation_config.json").is_file():
            ids = GenerationConfig.from_pretrained(self.path, local_files_only=True).eos_token_id or ids
        ids = ids if ids is not None else self.tokenizer.eos_token_id
        return frozenset([ids] if isinstance(ids, int) else ids or [])

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Digests (SHA-256) of weights, config and tokenizer, with the architecture and attention they run under."""
        config = json.loads((self.path / "config.json").read_text())
        config = {key: value for key, value in config.items() if key not in _VOLATILE_KEYS}
        # Earlier versions kept what the tokenizer appends: their stores hold other sequences.
        left_off = {"left_off": ", ".join(map(str, self.encoder.left_off))} if self.encoder.left_off else {}
        return left_off | {
            "architecture": self.config.model_type,
            "weights": digest_weights(self.path),
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "tokenizer": _digest_tokenizer(self.tokenizer),
            "attention": self.attention,
        }

    def load(self, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
        """The whole model, in eval mode."""
        return load_weights(self.model_class, self.path, dtype).to(device)  # type: ignore[arg-type]


def load_weights(model_class: type[PreTrainedModel], path: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load exactly the weights that ``model_class`` has parameters for, from the folder's safetensors.

    Raises:
        InputError: a parameter has no weight in the files (it would be random) or one of another shape.
    """
    load: Any = model_class.from_pretrained  # typed without the report that output_loading_info adds
    model, info = load(path, dtype=dtype, use_safetensors=True, output_loading_info=True, local_files_only=True)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise InputError(f"{path}: {len(missing)} parameters of the model have no weights in the files: {missing[0]}")
    return model.eval().requires_grad_(False)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder: those its index names, else ``model.safetensors``, else all."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = path / "model.safetensors"
    return [single] if single.is_file() else sorted(path.glob("*.safetensors"))


def digest_weights(path: Path) -> str:
    """SHA-256 over the SHA-256 of every weight file, in name order: the bytes decide, not the file dates."""

    def one(file: Path) -> bytes:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(one, weight_files(path)))).hexdigest()


def _digest_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
