"""Checkpoint files: which files of a model folder are read, and that each of them is what it has to be.

A folder may come from anywhere. What is not named here is not read: no code, no adapter, no other folder, no network.
What a name leads to must be a regular file (through links too: the Hub's cache is made of them). Knows JSON and
safetensors; knows no models.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from actcache.errors import InputError
from actcache.models.digests import digest
from actcache.models.quantized import DTYPES as QUANTIZED_DTYPES

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
# Configs, and what a tokenizer is made of: word lists, merges, sentencepiece and tiktoken models.
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken")

# How tensors are stored that are weights as they stand. Numbers of other kinds mean something only with their scales.
PLAIN_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool},
}

# Keys of config.json, at any depth, that make transformers read other files than these, other numbers than the stored
# ones, a model of the Hub, or the folder's code.
_REFUSED_KEYS = {
    "configuration_files": "names other config files: make the one that holds config.json, without the key",
    "transformers_weights": "names other weights than model.safetensors: rename those, and remove the key",
    "fusion_config": "asks for parts that are not the architecture's: remove the key",
    "use_pretrained_backbone": "asks for weights of another model: remove the key",
}
_IMPLEMENTATIONS = {
    **dict.fromkeys(("attn_implementation", "_attn_implementation"), ("eager", "sdpa")),
    **dict.fromkeys(("_attn_implementation_internal",), ("eager", "sdpa")),
    **dict.fromkeys(("experts_implementation", "_experts_implementation"), ("eager", "batched_mm", "grouped_mm")),
    **dict.fromkeys(("_experts_implementation_internal",), ("eager", "batched_mm", "grouped_mm")),
}


def check_folder(path: Path, said: str, *, with_weights: bool, adapter: Path | None = None) -> None:
    """Raise InputError unless a model can be read from this folder, or, ``with_weights`` or not, from what it is of.

    An adapter in it is refused, unless it is the folder of the ``adapter`` that is given. ``said`` names the folder.
    """
    if not path.is_dir():
        raise InputError(f"{said} is not a folder; {_way_on(path)}")
    found = next((name for name in ADAPTER_FILES if (path / name).exists()), None)
    whole = (path / CONFIG).is_file() and ((path / _WEIGHTS).exists() or (path / _INDEX).exists())
    if found is not None and not whole:
        base = _base_of_adapter(path)
        of = "" if base is None else f", here probably {base}+{said}"
        raise InputError(f"{said} is an adapter alone ({found}); give BASE+ADAPTER{of}")
    if found is not None and (adapter is None or not adapter.samefile(path)):
        raise InputError(
            f"{said} holds a model and an adapter ({found}), which may be in its weights or not; give {said}+{said} to "
            "merge it, or move the adapter's files away"
        )
    if not (path / CONFIG).is_file():
        raise InputError(f"{said} has no config.json; {_way_on(path)}")
    if with_weights:
        weight_files(path)


def _base_of_adapter(path: Path) -> str | None:
    try:
        return base_named(read_object(path / ADAPTER_CONFIG))
    except (InputError, OSError):
        return None


def base_named(adapter_config: dict[str, Any]) -> str | None:
    """What an adapter's config says that it is of; None where that is nothing that can be read."""
    named = adapter_config.get("base_model_name_or_path")
    return named if isinstance(named, str) and named and named.isprintable() else None


def _way_on(path: Path) -> str:
    if path.is_file():
        return f"give the model folder that it lies in, {path.parent}"
    snapshots = sorted(path.glob("snapshots/*/config.json"))
    if snapshots:
        return f"give the one inside of the Hub's cache, {snapshots[-1].parent}"
    return "give a local model folder, or an id of the Hub as org/name"


def read_object(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object.

    Raises:
        InputError: it is none, or not a regular file.
    """
    check_regular(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a JSON {type(content).__name__}, expected an object")
    return content


def read_config(path: Path) -> dict[str, Any]:
    """config.json, if all that it asks for is the architecture that it describes.

    Raises:
        InputError: it is no JSON object, names no architecture, or asks for what is not read; names the key.
    """
    file = path / CONFIG
    config = read_object(file)
    if not isinstance(config.get("model_type"), str):
        raise InputError(f"{file} names no model_type; it must be the config.json of a causal language model")
    for depth, key, value in _walk(config):
        if value in (None, False, {}):
            continue
        if key in _REFUSED_KEYS:
            raise InputError(f"{file}: {key} {_REFUSED_KEYS[key]}")
        if key == "auto_map" and depth:
            raise InputError(f"{file}: a part of the model asks for code of its own (auto_map), which is never run")
        if key in _IMPLEMENTATIONS:
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and name not in _IMPLEMENTATIONS[key]:
                    allowed = ", ".join(_IMPLEMENTATIONS[key])
                    raise InputError(f"{file}: {key} is {name!r}, expected one of {allowed}; remove the key")
    return config


def _walk(config: Any) -> Iterator[tuple[int, str, Any]]:
    """Depth, key and value of every entry of nested objects and lists."""
    todo = [(0, config)]
    while todo:
        depth, value = todo.pop()
        if isinstance(value, dict):
            yield from ((depth, key, inner) for key, inner in value.items())
            todo += [(depth + 1, inner) for inner in value.values()]
        elif isinstance(value, list):
            todo += [(depth + 1, inner) for inner in value]


def read_tokenizer_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none.

    Raises:
        InputError: it is no JSON object, or names other files than the folder's tokenizer.
    """
    file = path / TOKENIZER_CONFIG
    if not file.exists():
        return {}
    config = read_object(file)
    for key in ("fast_tokenizer_files", "init_inputs"):
        if config.get(key):
            raise InputError(f"{file}: {key} makes a tokenizer of other files than tokenizer.json; remove the key")
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that are a folder's weights, by name: ``model.safetensors``, or those its index names.

    Raises:
        InputError: there are none; there are both, and they are not the same; the index is damaged, or names what is
            not there or not in the folder.
    """
    single, index = path / _WEIGHTS, path / _INDEX
    if index.exists():
        names = indexed_names(index)
        if single.exists() and names != [_WEIGHTS]:
            raise InputError(f"{path} holds both {_WEIGHTS} and {_INDEX}, which names {names[0]}: remove one of them")
        files = [path / name for name in names]
        for file in files:
            if not file.exists():
                raise InputError(f"{index} names {file.name}, which is not there; copy or download it again")
            check_regular(file)
        return files
    if single.exists():
        check_regular(single)
        return [single]
    raise no_weights(str(path), sorted(file.name for file in path.iterdir()))


def no_weights(place: str, names: Sequence[str]) -> InputError:
    """What to say of a place that has files of these names, and none that are read as weights."""
    gguf = "which are not read; save the model as safetensors (transformers reads it by from_pretrained's gguf_file)"
    for endings, kind, way in (
        ((".bin", ".pt", ".pth"), "pickled weights only", "which are never loaded; convert them to safetensors"),
        ((".gguf",), "GGUF weights only", gguf),
        ((".safetensors",), "weights of another name", f"expected {_WEIGHTS} or {_INDEX}; rename or save them again"),
    ):
        if found := sorted(name for name in names if name.endswith(endings)):
            return InputError(f"{place} holds {kind} ({found[0]}), {way}")
    return InputError(f"{place} holds no *.safetensors weights")


def indexed_names(index: Path) -> list[str]:
    """The files beside an index that it names.

    Raises:
        InputError: it names none, or files elsewhere.
    """
    of_tensor = read_object(index).get("weight_map")
    if not isinstance(of_tensor, dict) or not of_tensor:
        raise InputError(f"{index} has no weight_map; copy or download it again")
    for name in of_tensor.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}, expected *.safetensors files beside it")
    return sorted(set(of_tensor.values()))


def check_regular(file: Path) -> None:
    """Raise InputError where this is no file, nor a link to one."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise InputError(f"{file} is not a regular file")


def open_tensors(files: Sequence[Path], *, quantized: bool = False) -> dict[str, Any]:
    """Every tensor of some safetensors files, by name, as slices; no tensor is read until it is asked for.

    Args:
        files: of one folder.
        quantized: whether quantized numbers may be among them.

    Raises:
        InputError: a file is cut short or damaged; two hold a tensor of one name, or one holds quantized numbers.
    """
    tensors: dict[str, Any] = {}
    for file in files:
        try:
            opened = safe_open(file, framework="pt", device="cpu")
            names = list(opened.keys())
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise InputError(
                f"{file} is no whole safetensors file ({one_line(error)}): copy or download it again"
            ) from error
        for name in names:
            if name in tensors:
                raise InputError(f"{file} holds {name}, which another file of the folder holds too; remove one of them")
            tensors[name] = opened.get_slice(name)
            if not (quantized and tensors[name].get_dtype() in QUANTIZED_DTYPES):
                stored_dtype(file, name, tensors[name])
    return tensors


def stored_dtype(file: Path, name: str, tensor: Any) -> torch.dtype:
    """How a tensor is stored.

    Raises:
        InputError: in a way that makes weights only together with their scales.
    """
    found = tensor.get_dtype()
    if found not in PLAIN_DTYPES:
        raise InputError(f"{file}: {name} is stored as {found}, as quantized weights are; save them in bfloat16")
    return PLAIN_DTYPES[found]


def digest_weights(path: Path) -> str:
    """SHA-256 over the SHA-256 of every weight file, in name order: the bytes decide, not the file dates."""
    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b"".join(pool.map(digest, weight_files(path)))).hexdigest()


def digest_tokenizer_files(path: Path) -> str:
    """SHA-256 over names and bytes of what a tokenizer may be made of."""
    files = [file for file in side_files(path) if file.name not in (CONFIG, GENERATION_CONFIG, _INDEX)]
    return hashlib.sha256(b"".join(f"{file.name}\0".encode() + digest(file) for file in files)).hexdigest()


def side_files(path: Path) -> list[Path]:
    """Configs, and what a tokenizer may be made of."""
    return sorted({file for pattern in _SIDE_FILES for file in path.glob(pattern) if file.is_file()})


def has_tokenizer(path: Path) -> bool:
    """Whether a folder, which may be an adapter's, holds what a tokenizer is made of."""
    return any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))


def stamp(path: Path, *, with_weights: bool = True) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and number of every file that is read: equal stamps are taken for equal bytes."""
    return stamp_of({*side_files(path), *(weight_files(path) if with_weights else ())})


def stamp_of(files: Iterable[Path]) -> dict[str, tuple[int, int, int]]:
    """Of these files of one folder."""
    states = {file.name: file.stat() for file in files}
    return {name: (state.st_size, state.st_mtime_ns, state.st_ino) for name, state in states.items()}


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
