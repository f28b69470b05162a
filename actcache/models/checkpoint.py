"""Checkpoint: one model folder, read and fingerprinted. Knows transformers, its configs and tokenizers.

Everything is read from local folders, which origin.py finds. What is read of them is named in checkpoint_files.py.
Transformers is handed the config and the tensors of exactly the files that are digested: it opens no weight file
itself, and runs no code from a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import logging

from actcache.errors import InputError, UnsupportedModelError
from actcache.fingerprint import CheckpointFingerprint
from actcache.models import checkpoint_files as files
from actcache.models.adapters import Adapter, Merge
from actcache.models.origin import Origin, Recorded
from actcache.models.quantized import Quantization, dequantized, find_quantization
from actcache.models.shared import find_shared, hold, take
from actcache.models.text_tower import check_chooses_tokens, text_tower
from actcache.models.tokens import Encoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Keys of config.json that say who wrote the file, not what the model computes.
_VOLATILE_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_LOCAL = {"local_files_only": True, "trust_remote_code": False}

# What the code of an architecture, or of its config, raises where a value is not of the kind that it expects.
_BAD_VALUE = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError),
    *(ValueError, StrictDataclassError),
)

# Tensors that a model may leave unread, beside those that its class in transformers says it may.
_UNREAD = (
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$",  # made of the config
    r"(^|\.)position_ids$",  # 0, 1, 2...
    r"(^|\.)mtp(_\w+)?\.",  # heads for the tokens after the next, which only speculative decoding runs
)


@dataclass(frozen=True)
class Checkpoint:
    """One model folder: config.json, ``model.safetensors`` (or an index and its files) and a tokenizer.

    What was read at :meth:`open` stays as it was; :attr:`fingerprint` and :meth:`load` notice files that have changed.

    Raises (from :meth:`open`):
        InputError: the folder or one of these is missing or damaged; weights are pickled; an adapter is in it; the
            architecture is unknown; the config asks for what is not read (see checkpoint_files.py); weights are
            quantized, by a method that is not dequantized (see quantized.py) or without being asked to.

    Attributes:
        label: in the lineup.
        origin: where it comes from: what the user gave, and the folders that this names.
        config: as transformers has it, of the model that is loaded: a dequantized one's says nothing of its method.
        quantization: how the weights are quantized, and dequantized on load; None of plain ones.
        adapter: what is merged into the weights on load, where one is given.
    """

    label: str
    origin: Origin
    config: PretrainedConfig
    _config_json: dict[str, Any]
    _stamp: dict[str, tuple[int, int, int]]
    quantization: Quantization | None = None
    adapter: Adapter | None = None

    @classmethod
    def open(cls, label: str, given: str | Path, *, with_weights: bool = True, dequantize: bool = False) -> Checkpoint:
        """Check what is given (a folder, an id of the Hub, BASE+ADAPTER) and read its config; weights are not touched,
        and need not be there unless told so.

        Quantized weights are refused unless they may be dequantized: they are other numbers on another device.
        """
        try:
            origin = Origin.find(given, with_weights=with_weights)
            path = origin.base.folder
            on = origin.adapter
            files.check_folder(
                path, origin.base.said, with_weights=with_weights, adapter=None if on is None else on.folder
            )
            adapter = None if on is None else Adapter.open(on, with_weights=with_weights)
            stamp = _stamp(path, adapter, with_weights=with_weights)
            config_json = files.read_config(path)
            quantization = find_quantization(path / files.CONFIG, config_json)
            if quantization is not None and not dequantize:
                raise InputError(
                    f"{path / files.CONFIG} says that the weights are quantized ({quantization.method}): what they "
                    "compute would depend on the device; give --dequantize (dequantize=True) to read them in the "
                    "run's dtype on every device"
                )
            if with_weights:
                files.open_tensors(files.weight_files(path), quantized=quantization is not None)
            if adapter is not None and with_weights:
                adapter.check_base(origin.base)
            config = _as_config(path)
        except InputError as error:
            raise InputError(f"checkpoint {label}: {error}") from error
        checkpoint = cls(label, origin, config, config_json, stamp, quantization, adapter)
        if with_weights:
            _ = checkpoint.merge
        return checkpoint

    @property
    def path(self) -> Path:
        """The folder of the model: of an id its snapshot in the Hub's cache, and with an adapter that of its base."""
        return self.origin.base.folder

    @property
    def given(self) -> str:
        """What the user gave, for messages."""
        return self.origin.given

    @property
    def place(self) -> str:
        """What opens the same checkpoint again from anywhere: absolute folders, ids with their commits."""
        return self.origin.text

    @property
    def decoder_config(self) -> PretrainedConfig:
        """The part of the config that is the decoder's: of a model for text and images, that of the text."""
        return self.config.get_text_config(decoder=True)

    @cached_property
    def model_class(self) -> type[PreTrainedModel]:
        """The causal LM class that transformers has for this config, or the text tower of its class for images and
        text."""
        causal: Any = AutoModelForCausalLM._model_mapping
        with_images: Any = AutoModelForImageTextToText._model_mapping
        kind, name = type(self.config), repr(self.config.model_type)
        if kind not in causal and kind not in with_images:
            raise UnsupportedModelError(f"{self.given}: {name} has no causal language model")
        if getattr(kind, "extra_files", ()):
            raise UnsupportedModelError(f"{self.given}: {name} has weights in files of other names")
        found: type[PreTrainedModel] = causal[kind] if kind in causal else text_tower(with_images[kind])
        with self.named():
            check_chooses_tokens(found, self.config)
        return found

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model as transformers builds it of the config, without weights: on torch's meta device.

        Raises:
            InputError: no model can be built of the config.
            UnsupportedModelError: it has no causal language model.
        """
        model_class: Any = self.model_class
        try:
            with torch.device("meta"):
                if type(self.config) in AutoModelForCausalLM._model_mapping:  # it may want the part for text alone
                    return AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
                return model_class._from_config(self.config)
        except _BAD_VALUE as error:
            raise InputError(
                f"checkpoint {self.label}: {self.path / files.CONFIG} describes no {self.config.model_type} model: "
                f"{files.one_line(error)}"
            ) from error

    @cached_property
    def merge(self) -> Merge | None:
        """What the adapter changes, where one is given: every tensor of it is held against the whole model.

        Raises:
            InputError: it does not fit, as it is of another base.
        """
        if self.adapter is None:
            return None
        skeleton = self.skeleton
        try:
            return Merge.fit(self.adapter, skeleton, self.origin.base.said)
        except InputError as error:
            raise InputError(f"checkpoint {self.label}: {error}") from error

    @property
    def attention(self) -> str:
        """Name of the attention implementation that transformers picks for this model here (``sdpa``, ``eager``)."""
        return self.skeleton.config._attn_implementation

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's own tokenizer, with truncation and padding off."""
        return self.encoder.tokenizer

    @property
    def _tokenizer_folder(self) -> Path:
        """An adapter that comes with a tokenizer was trained on its ids and texts."""
        return (
            self.adapter.folder if self.adapter is not None and files.has_tokenizer(self.adapter.folder) else self.path
        )

    @property
    def encoder(self) -> Encoder:
        """What gives the ids of a text by the checkpoint's own tokenizer: its adapter's, where that has one."""
        return self._encoder[0]

    @cached_property
    def _encoder(self) -> tuple[Encoder, str]:
        """The encoder, and the digest of its tokenizer from before any use, which may change what that would write."""
        try:
            encoder = Encoder.of(_load_tokenizer(self._tokenizer_folder, self.config))
        except InputError as error:
            raise InputError(f"checkpoint {self.label}: {error}") from error
        backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return encoder, files.digest_tokenizer_files(self._tokenizer_folder)
        return encoder, hashlib.sha256(backend.to_str().encode()).hexdigest()

    def left_undone(self) -> list[str]:
        """What a person should know of what is done with it and what is not."""
        doubt = None if self.adapter is None else self.adapter.doubt(self.origin.base)
        return [*([] if doubt is None else [doubt]), *self.encoder.left_undone()]

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """Token ids that end a generation: of the first place that names any.

        Raises:
            InputError: they are no token ids.
        """
        file = self.path / files.GENERATION_CONFIG
        generation = files.read_object(file) if file.exists() else {}
        places = {
            str(file): generation.get("eos_token_id"),
            str(self.path / files.CONFIG): getattr(self.config, "eos_token_id", None),
            f"{self.path / files.CONFIG} (the decoder's)": getattr(self.decoder_config, "eos_token_id", None),
        }
        named = []
        for place, found in places.items():
            ids = found if isinstance(found, list) else [found]
            if found is not None and not all(type(token) is int for token in ids):
                raise InputError(f"checkpoint {self.label}: {place}: eos_token_id is {found!r}, expected token ids")
            named += [] if found is None else [ids]
        if named:
            return frozenset(named[0])
        own = self.tokenizer.eos_token_id
        return frozenset(() if own is None else (own,))

    @property
    def fingerprint(self) -> CheckpointFingerprint:
        """What identifies the checkpoint; made again where a file has changed since."""
        if _stamp(self.path, self.adapter) != self._stamp:
            return Checkpoint.open(
                self.label, Recorded(self.place), dequantize=self.quantization is not None
            ).fingerprint
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> CheckpointFingerprint:
        config = {key: value for key, value in self._config_json.items() if key not in _VOLATILE_KEYS}
        # Earlier versions kept what the tokenizer appends: their stores hold other sequences.
        return CheckpointFingerprint(
            architecture=self.config.model_type,
            weights=files.digest_weights(self.path),
            config=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            tokenizer=self._encoder[1],
            attention=self.attention,
            end_ids=",".join(str(token) for token in sorted(self.end_ids)),
            left_off=", ".join(map(str, self.encoder.left_off)) or None,
            quantization=None if self.quantization is None else self.quantization.said,
            adapter=None if self.adapter is None else self.adapter.digest,
        )

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within this block, what is said against a model made of this folder names the checkpoint and the folder."""
        try:
            yield
        except UnsupportedModelError as error:
            raise type(error)(f"checkpoint {self.label}, {self.given}: {error}") from error

    @cached_property
    def own_dtype(self) -> torch.dtype:
        """The dtype that the folder asks for: of its config, or else of its first plain floating tensor."""
        for config in (self.config, self.decoder_config):
            if (named := getattr(config, "dtype", None)) is not None:
                return getattr(torch, named) if isinstance(named, str) else named
        try:
            weight_files = files.weight_files(self.path)
        except InputError:  # a folder that was opened without its weights
            return torch.float32
        stored = (tensor.get_dtype() for tensor in files.open_tensors(weight_files, quantized=True).values())
        plain = (files.PLAIN_DTYPES[name] for name in stored if name in files.PLAIN_DTYPES)
        return next((dtype for dtype in plain if dtype.is_floating_point), torch.float32)

    def load(self, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
        """The whole model, in eval mode; see :func:`load_weights`."""
        return load_weights(self.model_class, self, dtype).to(device)  # type: ignore[arg-type]


def load_weights(
    model_class: type[PreTrainedModel], checkpoint: Checkpoint, dtype: torch.dtype | None
) -> PreTrainedModel:
    """Fill ``model_class`` from exactly the files that the checkpoint's fingerprint is of.

    Args:
        model_class: the checkpoint's, or one that lacks parts of it and says which tensors it leaves unread for that.
        checkpoint: whose weights.
        dtype: of the parameters; None for the checkpoint's own.

    Raises:
        InputError: a parameter has no weight in the files (it would be random) or one of another shape; a tensor in
            them is not read, so that the model would not be what they hold (an unknown part, the scales of quantized
            weights); a weight is stored as whole numbers, bytes or truth values; or the files changed meanwhile.
    """
    path, merge = checkpoint.path, checkpoint.merge
    dtype = dtype or checkpoint.own_dtype
    changed = frozenset() if merge is None else merge.names
    of = str(path.resolve()), tuple(sorted(files.stamp(path).items())), dtype, model_class.__name__
    shared = find_shared(of, adapted=merge is not None)
    shared = {name: tensor for name, tensor in shared.items() if name not in changed}
    tensors = files.open_tensors(files.weight_files(path), quantized=checkpoint.quantization is not None)
    if checkpoint.quantization is not None:
        tensors = dequantized(path, tensors, checkpoint.quantization, dtype)
    load: Any = model_class.from_pretrained  # typed without the report that output_loading_info adds
    try:
        with _without_bars():
            model, info = load(
                None,
                config=checkpoint.config,
                state_dict={**tensors, **{name: one for name, one in shared.items() if name in tensors and one.is_cpu}},
                dtype=dtype,
                ignore_mismatched_sizes=True,  # to name them
                output_loading_info=True,
                local_files_only=True,
            )
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: its weights make no {model_class.__name__}: {files.one_line(error)}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise InputError(f"{path}: {len(missing)} parameters of the model have no weights in the files: {missing[0]}")
    unread = sorted(name for name in info["unexpected_keys"] if not any(re.search(one, name) for one in _UNREAD))
    if unread:
        raise InputError(
            f"{path}: {len(unread)} tensors of the files are not read by {model_class.__name__}: {unread[0]}; save the "
            "model without them, or with the config that they belong to"
        )
    _check_stored(path, model, tensors)
    take(model, shared)
    if merge is not None:
        merge.apply(model)
    if _stamp(path, checkpoint.adapter) != checkpoint._stamp:
        raise InputError(f"{checkpoint.given}: its files have changed since they were opened; start again")
    hold(of, model, changed=changed, adapted=merge is not None)
    return model.eval().requires_grad_(False)


def _stamp(path: Path, adapter: Adapter | None, *, with_weights: bool = True) -> dict[str, tuple[int, int, int]]:
    """Of everything that is read: the model's folder, and the adapter's."""
    own = files.stamp(path, with_weights=with_weights)
    more = {} if adapter is None else adapter.stamp(with_weights=with_weights)
    return own | {f"adapter/{name}": state for name, state in more.items()}


class _Bars:
    """How many loads are under way, and what their bars were set to before the first of them."""

    lock = threading.Lock()
    n_loads = 0
    shown = of_hub_shown = False


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws a bar for each load, unless one switch of the process is off; afterwards it is as it was."""
    with _Bars.lock:
        if _Bars.n_loads == 0:
            _Bars.shown, _Bars.of_hub_shown = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
            if _Bars.shown:
                logging.disable_progress_bar()
        _Bars.n_loads += 1
    try:
        yield
    finally:
        with _Bars.lock:
            _Bars.n_loads -= 1
            if _Bars.n_loads == 0 and _Bars.shown:
                logging.enable_progress_bar()  # the Hub's, too
                if not _Bars.of_hub_shown:
                    disable_progress_bars()


def _check_stored(path: Path, model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
    """What is not stored in floats is a buffer that is none in the model either (a mask, positions), or is ignored.

    Whatever else there is has become a weight, under its own name or merged with others.
    """
    buffers = [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]
    ignored = [*_UNREAD, *(model._keys_to_ignore_on_load_unexpected or ())]
    for name, tensor in tensors.items():
        if files.stored_dtype(path, name, tensor).is_floating_point or any(re.search(one, name) for one in ignored):
            continue
        # A file may leave out the name of the decoder, or say it where the model does not.
        if not any(f".{one}".endswith(f".{name}") or f".{name}".endswith(f".{one}") for one in buffers):
            raise InputError(
                f"{path}: {name} is stored as {tensor.get_dtype()}, which is a weight only together with its scale; "
                "save the model in bfloat16 or float32"
            )


def _as_config(path: Path) -> PretrainedConfig:
    file = path / files.CONFIG
    try:
        config = AutoConfig.from_pretrained(path, **_LOCAL)
    except _BAD_VALUE as error:
        raise InputError(f"{file}: {files.one_line(error)}") from error
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(f"{file}: dtype is {config.dtype!r}, expected a torch dtype such as bfloat16")
    if hasattr(config, "auto_map"):  # transformers has this architecture itself
        del config.auto_map
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, "quantization_config"):  # the tensors that transformers is handed are plain ones
            del part.quantization_config
    return config


def _load_tokenizer(path: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of the folder's files, of a class of its own.

    Raises:
        InputError: there is none; its config names a class that is no tokenizer, or other files.
    """
    settings = files.read_tokenizer_config(path)
    for name in (settings.get("tokenizer_class"), getattr(config, "tokenizer_class", None)):
        if name is not None and not _is_tokenizer(name):
            raise InputError(f"{path}: its tokenizer_class {name!r} is no tokenizer of transformers")
    # Where earlier versions of transformers follow a path in the config, None makes them look in the folder.
    elsewhere = {key: None for key, value in settings.items() if key.endswith("_file") and isinstance(value, str)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, **_LOCAL, **elsewhere)
    except Exception as error:  # the tokenizers library raises no narrower class
        raise InputError(f"no tokenizer in {path}: {files.one_line(error)}") from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # of no files, by earlier transformers
        raise InputError(f"no tokenizer in {path}: its vocabulary holds special tokens only")
    return tokenizer


def _is_tokenizer(name: Any) -> bool:
    """Whether a class of this name, if transformers has one, is a tokenizer: others run code, or ask to."""
    if not isinstance(name, str):
        return False
    found = [tokenizer_class_from_name(one) for one in (name, name.removesuffix("Fast"), name + "Fast")]
    return all(one is None or (isinstance(one, type) and issubclass(one, PreTrainedTokenizerBase)) for one in found)
