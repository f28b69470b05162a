"""A paired crosscoder of one block's MLP outputs: one sparse code for the rows of several checkpoints at once.

    f = ReLU(sum over m of (x_m - mean_m) @ encoder_m + b_enc), kept where f * scale > threshold
    x_m is about f @ decoder_m + b_dec_m, with scale = sum over m of |decoder_m|, per feature

m runs over the checkpoints, the *branches*. Knows the frozen tensors and their files; training is ``train.py``'s.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from actcache import sealed
from actcache.canonical import canonical
from actcache.errors import CorruptFileError, InputError
from actcache.files import as_path, fsync, make_folder, write_atomically

WEIGHTS, DESCRIPTION = "weights.safetensors", "crosscoder.json"
_TENSORS = ("encoder", "b_enc", "decoder", "b_dec", "mean")
_ADVICE = "train it again with `actcache features train RUN`"


@dataclass(frozen=True)
class Crosscoder:
    """A trained crosscoder. K branches, width D, F features; all tensors float32, on one device.

    Attributes:
        labels: of the branches: K checkpoints, in the order of all tensors.
        block: whose MLP outputs it describes.
        encoder: ``[K, D, F]``.
        b_enc: ``[F]``.
        decoder: ``[F, K, D]``.
        b_dec: ``[K, D]``, what a row is without any feature.
        mean: ``[K, D]``, subtracted from rows before they are encoded.
        threshold: at inference, a feature is on where ``f * scale`` exceeds it.
        k: how many features it was trained to have on, on average per row.
    """

    labels: tuple[str, ...]
    block: int
    encoder: torch.Tensor
    b_enc: torch.Tensor
    decoder: torch.Tensor
    b_dec: torch.Tensor
    mean: torch.Tensor
    threshold: float
    k: int

    def __post_init__(self) -> None:
        n_labels, width, n_features = self.encoder.shape
        expected = {
            "encoder": (n_labels, width, n_features),
            "b_enc": (n_features,),
            "decoder": (n_features, n_labels, width),
            "b_dec": (n_labels, width),
            "mean": (n_labels, width),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor.shape != shape or tensor.dtype != torch.float32:
                raise InputError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected float32 {shape}")
        if len(self.labels) != n_labels:
            raise InputError(f"there are {len(self.labels)} labels for {n_labels} branches")

    @property
    def width(self) -> int:
        """D."""
        return self.encoder.shape[1]

    @property
    def n_features(self) -> int:
        """F."""
        return self.encoder.shape[2]

    @cached_property
    def scale(self) -> torch.Tensor:
        """``[F]``, what a feature's activation is multiplied by before it is compared: its decoder norms, summed."""
        return decoder_scale(self.decoder)

    def branch(self, label: str) -> int:
        """The number of a checkpoint's branch (InputError: there is none)."""
        if label not in self.labels:
            raise InputError(f"the crosscoder of block {self.block} has branches {', '.join(self.labels)}, not {label}")
        return self.labels.index(label)

    def decoder_of(self, label: str) -> torch.Tensor:
        """``[F, D]``, the decoder rows of one branch."""
        return self.decoder[:, self.branch(label)]

    def raw(self, rows: torch.Tensor) -> torch.Tensor:
        """Activations before any is chosen, ``[n, F]`` float32, of rows ``[n, K, D]`` of any dtype."""
        return raw_activations(rows.float() - self.mean, self.encoder, self.b_enc)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Activations ``[n, F]`` float32 of rows ``[n, K, D]`` of all branches, by the threshold."""
        return self._chosen(self.raw(rows))

    def encode_branch(self, label: str, rows: torch.Tensor) -> torch.Tensor:
        """Activations ``[n, F]`` of rows ``[n, D]`` of one branch: the terms of the others are left out of the sum.

        The threshold is the joint one, so fewer features are on than with all branches, and lower.
        """
        number = self.branch(label)
        centred = rows.float() - self.mean[number]
        return self._chosen(torch.relu(torch.addmm(self.b_enc, centred, self.encoder[number])))

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Rows ``[n, K, D]`` float32 that activations ``[n, F]`` stand for."""
        return reconstructed(features, self.decoder, self.b_dec)

    def to(self, device: str | torch.device) -> Crosscoder:
        """The same on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def _chosen(self, raw: torch.Tensor) -> torch.Tensor:
        return torch.where(raw * self.scale > self.threshold, raw, 0.0)

    # ---- files ----

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that it says, in hex: what a table made with it names."""
        digest = hashlib.sha256(canonical(self._described()))
        for name in _TENSORS:
            tensor: torch.Tensor = getattr(self, name)
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, folder: str | Path, made_from: Mapping[str, Any] | None = None) -> None:
        """Write it into a folder, made where it is missing: the weights, then the file that names them.

        Args:
            folder: whose crosscoder it becomes.
            made_from: what it was trained on, kept in the description.
        """
        folder = as_path(folder)
        make_folder(folder)
        write_tensors(folder / WEIGHTS, {name: getattr(self, name) for name in _TENSORS})
        described = {**self._described(), "digest": self.digest}
        write_atomically(folder / DESCRIPTION, sealed.json_bytes(described, dict(made_from or {})))

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Crosscoder:
        """What :meth:`save` wrote.

        Raises:
            InputError: there is none in this folder.
            CorruptFileError: its bytes are not those written, or its two files are not of one crosscoder.
        """
        from safetensors import SafetensorError

        folder = as_path(folder)
        described: dict[str, Any] = dict(describe(folder).content)
        try:
            tensors = read_tensors(folder / WEIGHTS)
        except FileNotFoundError as error:
            raise InputError(f"{folder} has no {WEIGHTS} beside its {DESCRIPTION}; {_ADVICE}") from error
        except SafetensorError as error:
            raise CorruptFileError(f"{folder / WEIGHTS} is damaged: {error}; {_ADVICE}") from error
        digest = described.pop("digest")
        missing = [name for name in _TENSORS if name not in tensors]
        if missing:
            raise CorruptFileError(f"{folder / WEIGHTS} has no tensor {missing[0]}; {_ADVICE}")
        described["labels"] = tuple(described["labels"])
        found = cls(**(described | {name: tensors[name] for name in _TENSORS}))
        if found.digest != digest:
            raise CorruptFileError(
                f"{folder / WEIGHTS} is damaged: the SHA-256 of its crosscoder is {found.digest[:12]}, "
                f"{DESCRIPTION} says {digest[:12]}; {_ADVICE}"
            )
        return found.to(device)

    def _described(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _TENSORS}
        return {**values, "labels": list(self.labels)}


def describe(folder: Path) -> sealed.Sealed:
    """What the description of the crosscoder in a folder says: labels, block, k, threshold and digest; and what it was
    made from.

    Raises:
        InputError: there is none in this folder.
        CorruptFileError: it is damaged.
    """
    try:
        return sealed.read_json(folder / DESCRIPTION, "a crosscoder", _ADVICE)
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no crosscoder (no {DESCRIPTION}); {_ADVICE}") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """What :func:`write_tensors` wrote.

    Raises:
        SafetensorError: it is damaged.
        FileNotFoundError: there is no such file.
    """
    from safetensors.torch import load, load_file

    return load_file(path) if isinstance(path, Path) else load(path.read_bytes())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file, whole or not at all; on a disk without a second copy of it in memory."""
    from safetensors.torch import save, save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    if not isinstance(path, Path):
        write_atomically(path, save(tensors))
        return
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, draft)
        fsync(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def crosscoder_folder(features: Path, block: int) -> Path:
    """Where a block's crosscoder lies in a run's folder of features."""
    return features / "crosscoders" / f"b{block:03d}"


def decoder_scale(decoder: torch.Tensor) -> torch.Tensor:
    """``[F]``, the norms of each feature's decoder rows ``[F, K, D]``, summed over the branches."""
    return decoder.norm(dim=2).sum(dim=1)


def raw_activations(centred: torch.Tensor, encoder: torch.Tensor, b_enc: torch.Tensor) -> torch.Tensor:
    """``[n, F]``, the ReLU of what the branches of centred rows ``[n, K, D]`` sum to."""
    # Both lie as [K * D] in memory: the sum over branches is within one product.
    return torch.relu(torch.addmm(b_enc, centred.flatten(1), encoder.flatten(0, 1)))


def reconstructed(features: torch.Tensor, decoder: torch.Tensor, b_dec: torch.Tensor) -> torch.Tensor:
    """``[n, K, D]``, the rows that activations ``[n, F]`` stand for."""
    return torch.addmm(b_dec.flatten(), features, decoder.flatten(1)).unflatten(1, b_dec.shape)
