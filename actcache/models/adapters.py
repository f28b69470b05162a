"""Adapter: what a PEFT adapter changes in its base, merged by peft itself.

peft is imported when an adapter is given, and by nothing else. It gets the adapter's config and tensors, a model
without weights, and of the base exactly those parameters that the adapter changes: so a model that lacks some of its
blocks gets the same values as the whole. Nothing that an adapter's config names is opened, imported or downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actcache.errors import InputError
from actcache.models import checkpoint_files as files
from actcache.models.digests import digest
from actcache.models.origin import Place, known_folder

# Kinds that change each module by what the adapter holds for it: those whose merge is held against peft's own forward.
KINDS = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA", "LN_TUNING", "MISS")

# What a config may ask for beside its kind's plain merge, and why it is not done.
_REFUSED = {
    "layer_replication": "makes another architecture of the base",
    "alora_invocation_tokens": "applies the adapter to some positions only, which no merge can",
    "megatron_config": "asks for modules of Megatron",
    "loftq_config": "changes the base's weights before the adapter is applied",
    "corda_config": "changes the base's weights before the adapter is applied",
    "lora_ga_config": "changes the base's weights before the adapter is applied",
    **dict.fromkeys(
        ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
        "asks for another kind of LoRA",
    ),
}
_WHO_MADE_IT = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping", "task_type")
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # of init_lora_weights: the base stays as it is
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, read; see :meth:`open`.

    Attributes:
        folder: with adapter_config.json and adapter_model.safetensors.
        place: where it is, for messages.
        content: of adapter_config.json.
    """

    folder: Path
    place: str
    content: dict[str, Any]

    @classmethod
    def open(cls, place: Place, *, with_weights: bool = True) -> Adapter:
        """Read the config of an adapter, and see that its weights are there unless told otherwise.

        Raises:
            InputError: it is no adapter; it is of a kind that is not merged, or asks for what is not done; its weights
                are missing, pickled, damaged or quantized.
        """
        folder = place.folder
        file = folder / files.ADAPTER_CONFIG
        if not file.exists():
            what = "a whole model: give it alone" if (folder / files.CONFIG).exists() else "none: give BASE+ADAPTER"
            raise InputError(f"{folder} has no {files.ADAPTER_CONFIG}, which an adapter has; it holds {what}")
        content = files.read_object(file)
        kind = content.get("peft_type")
        if kind not in KINDS:
            raise InputError(
                f"{file}: an adapter of kind {kind!r} is not merged, but {', '.join(KINDS)}; merge it into its base "
                "where that can be done, save the model whole, and give that folder"
            )
        for key, why in _REFUSED.items():
            if content.get(key):
                raise InputError(f"{file}: {key} {why}; merge the adapter yourself, and give the whole model")
        if isinstance(start := content.get("init_lora_weights"), str) and start not in _PLAIN_STARTS:
            raise InputError(
                f"{file}: init_lora_weights {start!r} changes the base's weights before the adapter is applied; save "
                "it as a plain LoRA (peft's path_initial_model_for_weight_conversion), or merge it yourself"
            )
        adapter = cls(folder, place.said, content)
        if with_weights:
            adapter._check_weights()
        return adapter

    def _check_weights(self) -> None:
        if not self.weights.exists():
            names = sorted(file.name for file in self.folder.iterdir())
            pickled = next((name for name in names if name.endswith((".bin", ".pt", ".pth"))), None)
            if pickled is not None:
                raise InputError(
                    f"{self.folder} holds pickled weights only ({pickled}), which are never loaded; convert them to "
                    "safetensors"
                )
            raise InputError(f"{self.folder} has no {files.ADAPTER_WEIGHTS}; copy or download it again")
        files.check_regular(self.weights)
        for name, tensor in files.open_tensors([self.weights]).items():
            if not files.stored_dtype(self.weights, name, tensor).is_floating_point:
                raise InputError(f"{self.weights}: {name} is stored as {tensor.get_dtype()}, expected floats")

    @property
    def weights(self) -> Path:
        """The file of its tensors."""
        return self.folder / files.ADAPTER_WEIGHTS

    @property
    def base(self) -> str | None:
        """What its config says that it is of, which nothing opens; None where that is nothing that can be read."""
        return files.base_named(self.content)

    def check_base(self, base: Place) -> None:
        """Refuse a base where its config names another one that is here, with other weights.

        A name that differs says nothing by itself: bases are moved, copied and converted.
        """
        found = None if self.base is None or base.text.startswith(f"{self.base}@") else known_folder(self.base)
        if found is not None and (changed := _first_difference(found, base.folder)) is not None:
            raise InputError(
                f"adapter {self.place} is of {self.base}, which has other weights than {base.said} ({changed}); give "
                f"{self.base}+{self.place}, or change base_model_name_or_path in {self.folder / files.ADAPTER_CONFIG} "
                "where that is wrong"
            )

    def doubt(self, base: Place) -> str | None:
        """What a person should know where its config names a base of another name."""
        if self.base is None or self.base.rstrip("/").rpartition("/")[2].lower() == base.name.lower():
            return None
        return f"adapter {self.place} names {self.base} as its base; it is merged into {base.said}, where it fits"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what it changes: its weights, and its config but for who made it."""
        decides = {key: value for key, value in self.content.items() if key not in _WHO_MADE_IT}
        for key, value in decides.items():  # peft saves sets in any order
            if isinstance(value, list) and all(isinstance(one, str) for one in value):
                decides[key] = sorted(value)
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode() + digest(self.weights)).hexdigest()

    def stamp(self, *, with_weights: bool = True) -> dict[str, tuple[int, int, int]]:
        """As of a model's folder; see :func:`actcache.models.checkpoint_files.stamp`."""
        return files.stamp_of([*files.side_files(self.folder), *([self.weights] if with_weights else [])])

    def config(self) -> Any:
        """As peft has it, which gets nothing of it to open.

        Raises:
            InputError: peft does not know what it asks for.
        """
        import peft

        file = self.folder / files.ADAPTER_CONFIG
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.content["peft_type"])]
        known = inspect.signature(kind).parameters
        for key, value in self.content.items():
            if key not in known and key != "runtime_config" and value not in (None, False, "", [], {}):
                raise InputError(
                    f"{file}: {key} is unknown to peft {peft.__version__}; it was made by peft "
                    f"{self.content.get('peft_version', 'of another version')}, which must be installed to merge it"
                )
        given = {key: value for key, value in self.content.items() if key in known and key not in _WHO_MADE_IT}
        if "init_lora_weights" in given:
            given["init_lora_weights"] = True  # replaced by what is stored
        try:
            return kind(**given, inference_mode=True)
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: {files.one_line(error)}") from error


def _first_difference(a: Path, b: Path) -> str | None:
    """A tensor of one name and shape that is another one in two folders; None where there is none, as where one is a
    conversion of the other under other names. A row of each is looked at; of two dtypes, to the rounding of one."""
    try:
        first, second = (files.open_tensors(files.weight_files(folder)) for folder in (a, b))
    except (InputError, OSError):
        return None
    if a.samefile(b):
        return None
    for name, one in first.items():
        other, shape = second.get(name), one.get_shape()
        if other is None or other.get_shape() != shape:
            continue
        part = slice(shape[0] // 2, shape[0] // 2 + 1) if shape else ...
        rows = one[part], other[part]
        if rows[0].dtype == rows[1].dtype:
            same = torch.equal(*rows)
        else:
            rounding = max(torch.finfo(row.dtype).eps if row.is_floating_point() else 0.0 for row in rows)
            one_row, other_row = (row.float() for row in rows)
            same = torch.allclose(one_row, other_row, rtol=rounding, atol=rounding * 1e-3)
        if not same:
            return name
    return None


@dataclass(frozen=True)
class Merge:
    """An adapter that fits a base: what it changes there.

    Attributes:
        adapter: which.
        names: parameters of the base that it changes, by their names in the model.
    """

    adapter: Adapter
    names: frozenset[str]
    _skeleton: PreTrainedModel
    _modules: tuple[str, ...]  # that peft wraps

    @classmethod
    def fit(cls, adapter: Adapter, skeleton: PreTrainedModel, base: str) -> Merge:
        """Hold every tensor of an adapter against the whole model that it is given for.

        Args:
            adapter: the adapter.
            skeleton: the model, on torch's meta device.
            base: what the user gave for it.

        Raises:
            InputError: the adapter is of another base: its targets, ranks or shapes are not there. Names both.
        """
        of = f" (made for {adapter.base})" if adapter.base else ""
        says = f"adapter {adapter.place}{of} does not fit {base}"
        stored = {name: tuple(one.get_shape()) for name, one in files.open_tensors([adapter.weights]).items()}
        own = dict(skeleton.named_parameters(remove_duplicate=False))
        with _contained():
            try:
                wrapped = _wrap(copy.deepcopy(skeleton), adapter, empty=True)
                expected = {name: tuple(one.shape) for name, one in _tensors_of(wrapped).items()}
                for name in sorted(stored.keys() & expected.keys()):
                    if stored[name] != expected[name]:
                        raise InputError(
                            f"{says}: {name} is {list(stored[name])}, the base and the adapter's config make it "
                            f"{list(expected[name])}"
                        )
                empty = {name: torch.empty(shape, device="meta") for name, shape in stored.items()}
                missing, unexpected = _fill(wrapped, empty)
            except InputError:
                raise
            except KeyError as error:
                raise InputError(f"{says}: its weights lack {error.args[0]}") from error
            except Exception as error:  # what peft says of a config and a model has many classes
                raise InputError(f"{says}: {files.one_line(error)}") from error
        # What the skeleton leaves unread, as what reads images, no part of the study computes.
        unread: Any = getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ()
        unexpected = [name for name in unexpected if not any(re.search(one, _plain(name)) for one in unread)]
        if unexpected:
            raise InputError(f"{says}: {len(unexpected)} of its tensors have no place there: {_plain(unexpected[0])}")
        if missing:
            raise InputError(f"{says}: its weights lack {len(missing)} tensors of its config: {_plain(missing[0])}")
        modules = _wrapped_modules(wrapped)
        direct = {name.removeprefix(_PREFIX).replace(".base_layer.", ".") for name in stored}
        inside = tuple(f"{name}." for name in modules)
        names = {name for name in own if name in direct or name.startswith(inside)}
        return cls(adapter, frozenset(names), skeleton, tuple(modules))

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> None:
        """Merge into the model those parameters that it has of :attr:`names`; a model may lack parts of the base."""
        present = {name: own for name in self.names if (own := _own(model, self._skeleton, name)) is not None}
        if not present:
            return
        host = self._host(present)
        uses = Counter(id(own) for _, own in model.named_parameters(remove_duplicate=False))
        for name, own in present.items():
            tied = uses[id(own)] > 1  # the adapter changes it in one place only, as in peft's forward
            _set(host, name, own.data.clone() if tied else own.data)
        try:
            with _contained():
                wrapped = _wrap(host, self.adapter)
                _fill(wrapped, _loaded(self.adapter.weights))
                merged = wrapped.merge_and_unload()
        except Exception as error:  # what peft says of weights has many classes
            raise InputError(f"adapter {self.adapter.place} cannot be merged: {files.one_line(error)}") from error
        for name in present:
            _set(model, name, merged.get_parameter(name).data)

    def _host(self, present: Collection[str]) -> PreTrainedModel:
        """A copy of the skeleton, empty where it has blocks that the model lacks: what peft need not look at. One that
        it wraps stays, as it refuses a model without any."""
        names = [*present, self._modules[0]]
        empty: dict[int, Any] = {}
        for path, module in self._skeleton.named_modules():
            if isinstance(module, nn.ModuleList):
                for index, block in enumerate(module):
                    if not any(name.startswith(f"{path}.{index}.") for name in names):
                        empty[id(block)] = nn.Module()
        return copy.deepcopy(self._skeleton, empty)


def _wrap(model: PreTrainedModel, adapter: Adapter, *, empty: bool = False) -> Any:
    """The model with the adapter around its modules, as ``PeftModel.from_pretrained`` makes it, or without values."""
    import peft

    with torch.random.fork_rng(devices=[]):  # what is drawn is replaced by what is stored
        return peft.PeftModel(model, adapter.config(), autocast_adapter_dtype=True, low_cpu_mem_usage=empty)


def _tensors_of(wrapped: Any) -> dict[str, torch.Tensor]:
    """What peft would store."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(wrapped, save_embedding_layers=False)  # "auto" asks the Hub


def _fill(wrapped: Any, tensors: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
    """Set the adapter's tensors: names of those that are missing, and of those that have no place."""
    from peft import set_peft_model_state_dict
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    result: Any = set_peft_model_state_dict(wrapped, tensors)
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[wrapped.peft_config["default"].peft_type]
    missing = [name for name in result.missing_keys if prefix in name and "default" in name]
    return sorted(missing), sorted(result.unexpected_keys)


def _wrapped_modules(wrapped: Any) -> list[str]:
    """Names of the base's modules that peft has wrapped: first those of the adapter's kind, then those kept whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, bool] = {}
    for name, module in wrapped.base_model.model.named_modules():
        whole = isinstance(module, AuxiliaryTrainingWrapper)
        if (whole or isinstance(module, BaseTunerLayer)) and not any(name.startswith(f"{one}.") for one in found):
            found[name] = whole
    return sorted(found, key=found.__getitem__)


def _own(model: PreTrainedModel, host: PreTrainedModel, name: str) -> nn.Parameter | None:
    """A parameter of the model, where it has this part of the host and no stand-in for it."""
    path, _, last = name.rpartition(".")
    try:
        module, like = model.get_submodule(path), host.get_submodule(path)
    except AttributeError:
        return None
    own = getattr(module, last, None)
    if type(module) is not type(like) or not isinstance(own, nn.Parameter):
        return None
    return None if own.is_meta or own.shape != getattr(like, last).shape else own


def _set(model: PreTrainedModel, name: str, data: torch.Tensor) -> None:
    path, _, last = name.rpartition(".")
    model.get_submodule(path)._parameters[last] = nn.Parameter(data, requires_grad=False)


def _loaded(file: Path) -> dict[str, torch.Tensor]:
    return {name: tensor[...] for name, tensor in files.open_tensors([file]).items()}


def _plain(name: str) -> str:
    """The name of a tensor as adapters store it."""
    return name.replace(".default", "").removeprefix(_PREFIX)


@contextmanager
def _contained() -> Iterator[None]:
    """What peft warns of is either refused here or meant for training. What it puts into the environment goes: it names
    a compiler there, and leaves it where it cannot build an extension."""
    logger = logging.getLogger("peft")
    level, environment = logger.level, dict(os.environ)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
