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
    sweep = { weight = [0.25, 0.5, 0.75] } # one variant per value: towards-it[weight=0.25], ...
    positions = "all"                      # "last" by default

    [[variants]]
    name = "permuted"
    [[variants.edits]]
    edit = "signed_permutation"
    donor = "it"
    positions = "all"
    per = "prompt"                         # one permutation per prompt; by default one for all
    sweep = { seed = [0, 1, 2] }

    [[variants]]
    name = "no-mlp"
    [[variants.edits]]
    edit = "replace"
    vector = "zeros"                      # or { file = "x.safetensors", tensor = "name{boundary}" }, { file = "x.npy" }
    site = "mlp"
    layers = [20, -1]                      # as boundaries: a block, -1 for the last, 0.9 of the depth; or "0.9..-1"

    [[variants]]
    name = "own-direction"
    placebo = false                        # true: that it moves nothing is meant, and no mistake
    [[variants.edits]]
    edit = "add"
    per = "event"                          # a vector of its own for each event, found by the event's id:
    vector = { file = "x.safetensors", tensor = "name/{event}" } # a tensor [D] each, or
    # vector = { file = "x.npy", events = "ids.json" }           # an array [E, D] and a list of E ids

The Python form is a file that assigns a :class:`Sweep` to ``sweep``; it may use
:class:`~actcache.replay.operations.Call`. Knows edits and files that describe them; knows no models and no stores.
"""

from __future__ import annotations

import itertools
import json
import math
import runpy
import tomllib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from actcache.errors import ActcacheError, InputError
from actcache.files import no_file
from actcache.replay.edits import (
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
from actcache.replay.vectors import EventVectors, as_tensor

SCOPES = ("prefix", "position")

VariantsAt = Callable[[int], Sequence[Variant]]

# Variants of one boundary: the cells of a segment's 64 events under so many, crossed and read out three times, are 77
# million rows of a table that is made in memory.
MOST_VARIANTS = 100_000

# Bytes of a variant's name, which every one of its cells repeats.
LONGEST_NAME = 500


@dataclass(frozen=True)
class Sweep:
    """What to score beside the plain grid; None leaves a choice to whoever scores.

    Attributes:
        boundaries: as ``--boundary``, in words.
        scopes: of ``prefix`` and ``position``.
        readouts: of ``native`` and ``common_<label>``.
        variants: the same at every boundary, or a function of the boundary.
        top1: whether variants get their best token of the whole vocabulary too.
        kl: whether cells get KL(own || cell) (see :class:`actcache.analyses.grid.GridSettings`).
    """

    boundaries: str | None = None
    scopes: tuple[str, ...] | None = None
    readouts: tuple[str, ...] | None = None
    variants: Sequence[Variant] | VariantsAt = ()
    top1: bool = False
    kl: bool = False

    def __post_init__(self) -> None:
        if not callable(self.variants):
            object.__setattr__(self, "variants", _checked(self.variants))

    def variants_at(self, boundary: int) -> tuple[Variant, ...]:
        """The variants to score at a boundary (InputError: they are too many, or one's name is too long)."""
        return _checked(self.variants(boundary)) if callable(self.variants) else tuple(self.variants)


def read_sweep(path: str | Path, width: int) -> Sweep:
    """Read a description, ``.toml`` or ``.py`` (which is run).

    Args:
        path: of the file; other files that it names are relative to its folder.
        width: D, of vectors that are given by a word.

    Raises:
        InputError: no such file, or what it says is not a sweep: names the key, or the line of a .py that fails.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{no_file(path, 'file')}; give a sweep as .toml or .py")
    if path.suffix == ".py":
        found = _run(path).get("sweep")
        if not isinstance(found, Sweep):
            raise InputError(
                f"{path} assigns {type(found).__name__} to 'sweep', expected an actcache.replay.sweep.Sweep"
            )
        return found
    try:
        described = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not TOML: {_shown(error)}") from error
    try:
        return _Description(path.parent, width, described).sweep()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _run(path: Path) -> dict[str, Any]:
    """What a .py assigns."""
    try:
        return runpy.run_path(str(path))
    except Exception as error:  # the caller's own code, which may raise anything
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(path)]
        said = f"{type(error).__name__}: {_shown(error)}"
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines.append(error.lineno)
            said = f"{type(error).__name__}: {error.msg}"
        if isinstance(error, ActcacheError):
            said = str(error)
        line = f", line {lines[-1]}" if lines else ""
        raise InputError(f"{path}{line}: {said}") from error


_EDIT_KEYS = {"edit", "positions", "site", "layers", "sweep"}
_OPERATION_KEYS = {
    "replace": {"donor", "vector", "per"},
    "add": {"vector", "scale", "per"},
    "interpolate": {"donor", "weight"},
    "project": {"basis", "how", "mean", "donor"},
    "signed_permutation": {"seed", "donor", "per"},
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
    "per": (str, "a text"),
    "seed": (int, "a whole number of 63 bits"),
    "scale": (_NUMBER, "a number"),
    "weight": (_NUMBER, "a number"),
}


class _Description:
    """A parsed description, and the variants that it means."""

    def __init__(self, folder: Path, width: int, described: dict[str, Any]) -> None:
        self._folder, self._width, self._described = folder, width, described
        self._tensors: dict[tuple[Path, str, str], torch.Tensor | EventVectors] = {}  # those that many variants share
        self._at: dict[int, list[Variant]] = {}
        self._everywhere: dict[int, list[Variant]] = {}  # of entries that are the same at every boundary, by their id

    def sweep(self) -> Sweep:
        described = self._described
        _check_keys("the sweep", described, {"boundaries", "scopes", "readouts", "top1", "kl", "variants"})
        boundaries = described.get("boundaries")
        if isinstance(boundaries, list):
            boundaries = ",".join(str(boundary) for boundary in _listed("boundaries", boundaries, int))
        elif boundaries is not None and (isinstance(boundaries, bool) or not isinstance(boundaries, int | float | str)):
            raise InputError(
                f"boundaries is {_shown(boundaries)}, expected a number, a list of whole numbers or a text"
            )
        scopes = _names("scopes", described)
        for scope in scopes or ():
            if scope not in SCOPES:
                raise InputError(f"scope {_shown(scope)} is unknown; choose {' or '.join(SCOPES)}")
        flags = {name: described.get(name, False) for name in ("top1", "kl")}
        for name, value in flags.items():
            _check_flag(name, value)
        self._check_variants()
        return Sweep(
            boundaries=None if boundaries is None else str(boundaries),
            scopes=scopes,
            readouts=_names("readouts", described),
            variants=self.variants,
            **flags,
        )

    def variants(self, boundary: int) -> list[Variant]:
        """Those of a boundary."""
        if boundary not in self._at:
            self._at[boundary] = [
                v for one in self._described.get("variants", []) for v in self._variants(one, boundary)
            ]
        return self._at[boundary]

    def _check_variants(self) -> None:
        """Before any is scored: how many there are, before any is made; then each, and that no name comes twice."""
        written = _listed("variants", self._described.get("variants", []), dict)
        n_variants = sum(math.prod(len(values) for _, values in _swept(one)) for one in written)
        if n_variants > MOST_VARIANTS:
            raise _too_many(f"{n_variants:,}" if n_variants < 10**15 else "10^15 or more")
        seen = {"none"}
        for one in written:
            variants = self._variants(one, None)
            for variant in variants:
                if variant.name in seen:
                    raise InputError(f"variant {variant.name!r}: the name is taken; each needs its own")
                seen.add(variant.name)
            if "{boundary}" not in str(one):
                self._everywhere[id(one)] = variants

    def _variants(self, one: dict[str, Any], boundary: int | None) -> list[Variant]:
        """All variants of one entry; without a boundary, of all boundaries, to be checked before any is scored."""
        swept, name = _swept(one), one["name"]
        if "boundaries" in one:
            only = _listed(f"variant {name!r}: boundaries", one["boundaries"], int)
            if boundary is not None and boundary not in only:
                return []
        if id(one) in self._everywhere:
            return self._everywhere[id(one)]
        placebo = one.get("placebo", False)
        _check_flag(f"variant {name!r}: placebo", placebo)
        variants = []
        for chosen in itertools.product(*(values for _, values in swept)):
            given = [dict(edit) for edit in one["edits"]]
            for ((number, key), _), value in zip(swept, chosen, strict=True):
                given[number][key] = value
            label = ",".join(f"{key}={value}" for ((_, key), _), value in zip(swept, chosen, strict=True))
            full = f"{name}[{label}]" if label else name
            _check_name(full)
            try:
                made = tuple(self._edit(edit, boundary) for edit in given)
            except InputError as error:
                raise InputError(f"variant {name!r}: {error}") from error
            variants.append(Variant(full, made, placebo))
        return variants

    def _edit(self, given: dict[str, Any], boundary: int | None) -> Edit:
        kind = given.get("edit")
        if not isinstance(kind, str) or kind not in _OPERATION_KEYS:
            raise InputError(f"edit {_shown(kind)} is unknown; choose {', '.join(_OPERATION_KEYS)}")
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
                raise InputError(f"edit {kind!r}: {key} is {_shown(value)}, expected {words}")
        place: dict[str, Any] = {key: given[key] for key in ("positions", "site") if key in given}
        if isinstance(place.get("positions"), list):
            place["positions"] = tuple(_listed("positions", place["positions"], int))
        layers = given.get("layers", [])
        if not isinstance(layers, list):
            raise InputError(f"layers is {_shown(layers)}, expected a list of blocks")
        return Edit(self._operation(kind, given, boundary), layers=tuple(layers), **place)

    def _operation(self, kind: str, given: dict[str, Any], boundary: int | None) -> Operation:
        donor = given.get("donor")
        if kind == "replace":
            return Replace(donor, self._vector(given, boundary))
        if kind == "add":
            return Add(self._vector(given, boundary), given.get("scale", 1.0))
        if kind == "interpolate":
            return Interpolate(given["donor"], given["weight"])
        if kind == "project":
            basis, mean = (self._tensor(key, given.get(key), boundary) for key in ("basis", "mean"))
            return Project(basis, given.get("how", "keep"), mean, donor)
        if kind == "signed_permutation":
            return SignedPermutation(given["seed"], donor, given.get("per"))
        return MatchedNorm(given["seed"], donor)

    def _vector(self, given: dict[str, Any], boundary: int | None) -> torch.Tensor | EventVectors | None:
        """The vector of an edit, or those of its events."""
        if "per" not in given:
            return self._tensor("vector", given.get("vector"), boundary)
        if given["per"] != "event":
            raise InputError(f"per is {_shown(given['per'])}; leave it out, or choose 'event'")
        described: Any = given.get("vector")
        names = isinstance(described, dict) and all(isinstance(value, str) for value in described.values())
        if not names or "file" not in described:
            raise InputError(f"vector is {_shown(described)}, expected {{ file = ..., }} of one vector per event")
        named = "{event}" in described.get("tensor", "")
        if named == ("events" in described):
            raise InputError(
                f"vector is {_shown(described)}: one vector per event is found by its tensor's name, tensor = "
                '"name{event}", or by a list of ids, events = "ids.json"'
            )
        _check_keys("vector", described, {"file", "tensor", "events"})
        place = self._place("vector", described, boundary)
        if place is None:
            return EventVectors(torch.zeros(0, self._width), ())
        path, name = place
        key = path, name, described.get("events", "")
        if key not in self._tensors:
            if named:
                self._tensors[key] = EventVectors.of(_read_named(path, name), None, f"vector: {path}")
            else:
                ids = _read_ids(self._folder / described["events"])
                self._tensors[key] = EventVectors.of(_read_one(path, name, "vector"), ids, f"vector: {path}")
            self._check_shape("vector", place, self._tensors[key].vectors, "[E, D]")  # type: ignore[union-attr]
        return self._tensors[key]

    def _tensor(self, key: str, given: Any, boundary: int | None) -> Any:
        """A tensor of a file, or zeros; without a boundary, names that depend on it are not looked up."""
        ndim = 2 if key == "basis" else 1
        if given is None:
            return None
        if given == "zeros" and ndim == 1:
            return torch.zeros(self._width)
        if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
            raise InputError(f"{key} is {_shown(given)}, {_EXPECTED}{' or zeros' * (ndim == 1)}")
        if set(given) != ({"file"} if given.get("file", "").endswith(".npy") else {"file", "tensor"}):
            raise InputError(f"{key} is {_shown(given)}, {_EXPECTED}{' or zeros' * (ndim == 1)}")
        place = self._place(key, given, boundary)
        if place is None:
            return torch.zeros(self._width) if ndim == 1 else torch.eye(1, self._width)
        if (*place, key) not in self._tensors:
            found = as_tensor(_read_one(*place, key), f"{key}: {_in(place)}")
            self._check_shape(key, place, found, "[D]" if ndim == 1 else "[k, D]")
            self._tensors[(*place, key)] = found
        return self._tensors[(*place, key)]

    def _place(self, key: str, given: dict[str, str], boundary: int | None) -> tuple[Path, str] | None:
        """The file and the tensor in it; None where they depend on a boundary that is not known, of a file that is
        there, if that is known."""
        file, name = given["file"], given.get("tensor", "")
        if boundary is None and "{boundary}" in file:
            return None
        path = self._folder / file.replace("{boundary}", str(boundary))
        if not path.is_file():
            raise InputError(f"{key}: {path} is not a safetensors file or an array: there is no such file")
        if boundary is None and "{boundary}" in name:
            return None
        return path, name.replace("{boundary}", str(boundary))

    def _check_shape(self, key: str, place: tuple[Path, str], found: torch.Tensor, expected: str) -> None:
        if found.ndim != expected.count(",") + 1 or found.shape[-1] != self._width:
            expected = expected.replace("D", str(self._width))
            raise InputError(f"{key}: {_in(place)} has shape {list(found.shape)}, expected {expected}")


_EXPECTED = "expected { file = ..., tensor = ... }"


def _in(place: tuple[Path, str]) -> str:
    path, name = place
    return f"tensor {name!r} of {path}" if name else str(path)


def _read_one(path: Path, name: str, key: str) -> Any:
    """A tensor of a safetensors file, or the array of an .npy file."""
    if path.suffix == ".npy":
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"{key}: {path} is not an array of numbers in NumPy's format: {_shown(error)}") from error
    with _opened(path, key) as tensors:
        names = list(tensors.keys())
        if name not in names:
            raise InputError(f"{key}: {path} has no tensor {name!r}; it has {_cut(', '.join(names))}")
        return tensors.get_tensor(name)


def _read_named(path: Path, pattern: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file whose names are of a pattern, by the event in it."""
    before, _, after = pattern.partition("{event}")
    with _opened(path, "vector") as tensors:
        found = {
            name[len(before) : len(name) - len(after)]: tensors.get_tensor(name)
            for name in tensors.keys()  # noqa: SIM118 (it is no mapping)
            if name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)
        }
    if not found:
        raise InputError(f"vector: {path} has no tensor {pattern!r}")
    return found


@contextmanager
def _opened(path: Path, key: str) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise InputError(f"{key}: {path} is not a safetensors file: {error}") from error


def _read_ids(path: Path) -> list[Any]:
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise InputError(f"events: {path} is not a JSON list of event ids: {_shown(error)}") from error
    if not isinstance(ids, list):
        raise InputError(f"events: {path} holds a {type(ids).__name__}, expected a list of event ids")
    return ids


_Swept = tuple[tuple[int, str], list[Any]]  # the number of the edit and the key that has each of these values in turn


def _swept(one: dict[str, Any]) -> list[_Swept]:
    """What a variant's entry sweeps over; its keys, name and edits are checked on the way."""
    _check_keys("a variant", one, {"name", "boundaries", "edits", "placebo"})
    name = one.get("name")
    if not isinstance(name, str) or not name:
        raise InputError(f"a variant's name is {_shown(name)}, expected a text")
    _check_name(name)
    edits = _listed(f"variant {name!r}: edits", one.get("edits", []), dict)
    if not edits:
        raise InputError(f"variant {name!r} has no edits")
    found: list[_Swept] = []
    for number, edit in enumerate(edits):
        swept = edit.get("sweep", {})
        if not isinstance(swept, dict):
            raise InputError(f"variant {name!r}: sweep is {_shown(swept)}, expected a table of lists")
        for key, values in swept.items():
            if not isinstance(values, list) or not values:
                raise InputError(f"variant {name!r}: sweep.{key} is {_shown(values)}, expected a list of values")
            found.append(((number, key), values))
    return found


def _checked(variants: Iterable[Variant]) -> tuple[Variant, ...]:
    found = tuple(itertools.islice(variants, MOST_VARIANTS + 1))
    if len(found) > MOST_VARIANTS:
        raise _too_many(f"more than {MOST_VARIANTS:,}")
    for variant in found:
        _check_name(variant.name)
    return found


def _too_many(found: str) -> InputError:
    return InputError(
        f"the sweep has {found} variants; at most {MOST_VARIANTS:,} are scored at once, as their cells are one table "
        "in memory: cut it into several sweeps, which one run may score one after the other"
    )


def _check_name(name: str) -> None:
    if len(name.encode()) > LONGEST_NAME:
        raise InputError(
            f"variant {_shown(name)}: its name has {len(name.encode()):,} bytes, at most {LONGEST_NAME} are kept with "
            "every cell; sweep over shorter values, or name variants one by one"
        )


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} is {_shown(value)}, expected true or false")


def _shown(value: Any) -> str:
    """A value of the description, or what a reader says of it, in one line that is not too long."""
    text = " ".join(str(value).split()) if isinstance(value, Exception) else repr(value)
    return _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


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
        raise InputError(f"{key} is {_shown(given)}, expected a list of {words}")
    return given
