"""Sweep: which cells to score, written down once: boundaries, scopes, readouts and variants, in TOML or Python.

    boundaries = "all"                     # as --boundary: 18, 0.6, "5,10,20", "all"; of those captured
    scopes = ["prefix", "position"]
    readouts = ["native", "common_it"]
    top1 = false                           # the whole vocabulary's best token for variants too, not only the margin
    kl = false                             # how far each cell's next-token distribution is from the late model's own

    [[variants]]
    name = "towards-it"
    boundaries = [18]                      # only there; everywhere by default
    [[variants.edits]]
    edit = "interpolate"                   # replace, add, interpolate, project, signed_permutation, matched_norm
    donor = "it"
    sweep = { weight = [0.25, 0.5, 0.75] } # one variant a value: towards-it[weight=0.25], ...
    positions = "all"                      # "last" by default

    [[variants]]
    name = "no-mlp"
    [[variants.edits]]
    edit = "replace"
    vector = "zeros"                       # or { file = "x.safetensors", tensor = "name{boundary}" }
    site = "mlp"
    layers = [20, 21]

The Python form is a file that assigns a :class:`Sweep` to ``sweep``; it may use :class:`~actcache.edits.Call`. Knows
edits and files that describe them; knows no models and no stores.
"""

from __future__ import annotations

import functools
import itertools
import math
import runpy
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from actcache.edits import (
    Add,
    Edit,
    Interpolate,
    MatchedNorm,
    Operation,
    Project,
    Replace,
    SignedPermutation,
    Variant,
)
from actcache.errors import InputError

SCOPES = ("prefix", "position")

VariantsAt = Callable[[int], Sequence[Variant]]


@dataclass(frozen=True)
class Sweep:
    """What to score beside the plain grid; None leaves a choice to whoever scores.

    Attributes:
        boundaries: as ``--boundary``, in words.
        scopes: of ``prefix`` and ``position``.
        readouts: of ``native`` and ``common_<label>``.
        variants: the same at every boundary, or a function of the boundary.
        top1: whether variants get their best token of the whole vocabulary too.
        kl: whether cells get KL(own || cell) (see :class:`actcache.grid.GridSettings`).
    """

    boundaries: str | None = None
    scopes: tuple[str, ...] | None = None
    readouts: tuple[str, ...] | None = None
    variants: Sequence[Variant] | VariantsAt = ()
    top1: bool = False
    kl: bool = False

    def variants_at(self, boundary: int) -> tuple[Variant, ...]:
        """The variants to score at a boundary."""
        return tuple(self.variants(boundary) if callable(self.variants) else self.variants)


def read_sweep(path: str | Path, width: int) -> Sweep:
    """Read a description, ``.toml`` or ``.py`` (which is run).

    Args:
        path: of the file; other files that it names are relative to its folder.
        width: D, of vectors that are given by a word.

    Raises:
        InputError: no such file, or what it says is not a sweep: names the key.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a sweep as .toml or .py")
    if path.suffix == ".py":
        found = runpy.run_path(str(path)).get("sweep")
        if not isinstance(found, Sweep):
            raise InputError(f"{path} assigns {type(found).__name__} to 'sweep', expected an actcache.sweep.Sweep")
        return found
    try:
        described = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not TOML: {error}") from error
    try:
        return _Reader(path.parent, width).sweep(described)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


_EDIT_KEYS = {"edit", "positions", "site", "layers", "sweep"}
_OPERATION_KEYS = {
    "replace": {"donor", "vector"},
    "add": {"vector", "scale"},
    "interpolate": {"donor", "weight"},
    "project": {"basis", "how", "mean", "donor"},
    "signed_permutation": {"seed", "donor"},
    "matched_norm": {"seed", "donor"},
}
_NEEDED_KEYS = {
    "replace": set(),
    "add": {"vector"},
    "interpolate": {"donor", "weight"},
    "project": {"basis"},
    "signed_permutation": {"seed"},
    "matched_norm": {"seed"},
}
_NUMBER = (int, float)
_KINDS: dict[str, tuple[Any, str]] = {
    "donor": (str, "a text"),
    "how": (str, "a text"),
    "seed": (int, "a whole number of 63 bits"),
    "scale": (_NUMBER, "a number"),
    "weight": (_NUMBER, "a number"),
}


class _Reader:
    """Turns a parsed description into variants."""

    def __init__(self, folder: Path, width: int) -> None:
        self._folder, self._width = folder, width
        self._tensors: dict[tuple[Path, str, int], torch.Tensor] = {}  # those that many variants share

    def sweep(self, described: dict[str, Any]) -> Sweep:
        _check_keys("the sweep", described, {"boundaries", "scopes", "readouts", "top1", "kl", "variants"})
        boundaries = described.get("boundaries")
        if isinstance(boundaries, list):
            boundaries = ",".join(str(boundary) for boundary in _listed("boundaries", boundaries, int))
        elif boundaries is not None and (isinstance(boundaries, bool) or not isinstance(boundaries, int | float | str)):
            raise InputError(f"boundaries is {boundaries!r}, expected a number, a list of numbers or a text")
        scopes = _names("scopes", described)
        for scope in scopes or ():
            if scope not in SCOPES:
                raise InputError(f"scope {scope!r} is unknown; choose {' or '.join(SCOPES)}")
        written = _listed("variants", described.get("variants", []), dict)
        flags = {name: described.get(name, False) for name in ("top1", "kl")}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise InputError(f"{name} is {value!r}, expected true or false")

        @functools.cache
        def variants_at(boundary: int) -> list[Variant]:
            return [variant for one in written for variant in self._variants(one, boundary)]

        names = [variant.name for one in written for variant in self._variants(one, None)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice or "none" in names:
            raise InputError(f"variant {(twice or ['none'])[0]!r}: the name is taken; each needs its own")
        return Sweep(
            boundaries=None if boundaries is None else str(boundaries),
            scopes=scopes,
            readouts=_names("readouts", described),
            variants=variants_at,
            **flags,
        )

    def _variants(self, one: dict[str, Any], boundary: int | None) -> list[Variant]:
        """All variants of one entry; without a boundary, of all boundaries, to be checked before any is scored."""
        _check_keys("a variant", one, {"name", "boundaries", "edits"})
        name = one.get("name")
        if not isinstance(name, str) or not name:
            raise InputError(f"a variant's name is {name!r}, expected a text")
        if "boundaries" in one:
            only = _listed(f"variant {name!r}: boundaries", one["boundaries"], int)
            if boundary is not None and boundary not in only:
                return []
        edits = _listed(f"variant {name!r}: edits", one.get("edits", []), dict)
        if not edits:
            raise InputError(f"variant {name!r} has no edits")
        choices = []
        for edit in edits:
            swept = edit.get("sweep", {})
            if not isinstance(swept, dict):
                raise InputError(f"variant {name!r}: sweep is {swept!r}, expected a table of lists")
            for key, values in swept.items():
                if not isinstance(values, list) or not values:
                    raise InputError(f"variant {name!r}: sweep.{key} is {values!r}, expected a list of values")
            choices.append([dict(zip(swept, values, strict=True)) for values in itertools.product(*swept.values())])
        variants = []
        for chosen in itertools.product(*choices):
            label = ",".join(f"{key}={value}" for values in chosen for key, value in values.items())
            try:
                made = tuple(self._edit(edit | values, boundary) for edit, values in zip(edits, chosen, strict=True))
            except InputError as error:
                raise InputError(f"variant {name!r}: {error}") from error
            variants.append(Variant(f"{name}[{label}]" if label else name, made))
        return variants

    def _edit(self, given: dict[str, Any], boundary: int | None) -> Edit:
        kind = given.get("edit")
        if not isinstance(kind, str) or kind not in _OPERATION_KEYS:
            raise InputError(f"edit {kind!r} is unknown; choose {', '.join(_OPERATION_KEYS)}")
        _check_keys(f"edit {kind!r}", given, _EDIT_KEYS | _OPERATION_KEYS[kind])
        missing = sorted(_NEEDED_KEYS[kind] - set(given))
        if missing:
            raise InputError(f"edit {kind!r} needs {missing[0]!r}")
        for key, (types, words) in _KINDS.items():
            if key not in given:
                continue
            value = given[key]
            fits = isinstance(value, types) and not isinstance(value, bool)
            if not fits or (types is _NUMBER and not math.isfinite(value)) or (key == "seed" and abs(value) >= 2**63):
                raise InputError(f"edit {kind!r}: {key} is {value!r}, expected {words}")
        place: dict[str, Any] = {key: given[key] for key in ("positions", "site") if key in given}
        if isinstance(place.get("positions"), list):
            place["positions"] = tuple(_listed("positions", place["positions"], int))
        layers = tuple(_listed("layers", given.get("layers", []), int))
        return Edit(self._operation(kind, given, boundary), layers=layers, **place)

    def _operation(self, kind: str, given: dict[str, Any], boundary: int | None) -> Operation:
        donor = given.get("donor")
        if kind == "replace":
            return Replace(donor, self._tensor("vector", given.get("vector"), 1, boundary))
        if kind == "add":
            vector = self._tensor("vector", given["vector"], 1, boundary)
            assert vector is not None
            return Add(vector, float(given.get("scale", 1.0)))
        if kind == "interpolate":
            return Interpolate(given["donor"], float(given["weight"]))
        if kind == "project":
            basis = self._tensor("basis", given["basis"], 2, boundary)
            assert basis is not None
            return Project(basis, given.get("how", "keep"), self._tensor("mean", given.get("mean"), 1, boundary), donor)
        if kind == "signed_permutation":
            return SignedPermutation(given["seed"], donor)
        return MatchedNorm(given["seed"], donor)

    def _tensor(self, key: str, given: Any, ndim: int, boundary: int | None) -> torch.Tensor | None:
        """A tensor of a safetensors file, or zeros; without a boundary, names that depend on it are not looked up."""
        if given is None:
            return None
        if given == "zeros" and ndim == 1:
            return torch.zeros(self._width)
        if (
            not isinstance(given, dict)
            or set(given) != {"file", "tensor"}
            or not all(isinstance(value, str) for value in given.values())
        ):
            raise InputError(f"{key} is {given!r}, expected {{ file = ..., tensor = ... }}{' or zeros' * (ndim == 1)}")
        path, name = self._folder / given["file"], given["tensor"]
        try:
            with safe_open(path, "pt") as tensors:
                names = list(tensors.keys())
                if "{boundary}" in name:
                    if boundary is None:
                        return torch.zeros(self._width) if ndim == 1 else torch.eye(1, self._width)
                    name = name.replace("{boundary}", str(boundary))
                if (path, name, ndim) in self._tensors:
                    return self._tensors[path, name, ndim]
                if name not in names:
                    raise InputError(f"{key}: {path} has no tensor {name!r}; it has {', '.join(names)}")
                found = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{key}: {path} is not a safetensors file: {error}") from error
        if found.ndim != ndim or found.shape[-1] != self._width:
            expected = f"[{self._width}]" if ndim == 1 else f"[k, {self._width}]"
            raise InputError(f"{key}: tensor {name!r} of {path} has shape {list(found.shape)}, expected {expected}")
        self._tensors[path, name, ndim] = found
        return found


def _check_keys(what: str, given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise InputError(f"{what} has a key {unknown[0]!r}; it may have {', '.join(sorted(known))}")


def _names(key: str, described: dict[str, Any]) -> tuple[str, ...] | None:
    if key not in described:
        return None
    names = tuple(dict.fromkeys(_listed(key, described[key], str)))
    if not names:
        raise InputError(f"{key} is [], expected at least one text")
    return names


def _listed(key: str, given: Any, kind: type) -> list[Any]:
    if not isinstance(given, list) or not all(type(value) is kind for value in given):
        words = {dict: "tables", int: "whole numbers", str: "texts"}[kind]
        raise InputError(f"{key} is {given!r}, expected a list of {words}")
    return given
