"""Errors, and values that are handed between processes: each comes out of a pickle, or a copy, as what it was."""

from __future__ import annotations

import concurrent.futures
import copy
import dataclasses
import functools
import importlib
import multiprocessing
import pickle
import pkgutil
from pathlib import Path

import pytest
import torch

import actcache
from actcache import errors
from actcache.analyses.grid import GridSettings
from actcache.capture.settings import CaptureSettings
from actcache.errors import ActcacheError, IncompatibleError
from actcache.replay.edits import (
    Add,
    Call,
    Edit,
    Interpolate,
    MatchedNorm,
    Project,
    Replace,
    Rows,
    SignedPermutation,
    Variant,
)
from actcache.replay.sweep import read_sweep

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ActcacheError)]
WAYS = [
    *(functools.partial(lambda protocol, one: pickle.loads(pickle.dumps(one, protocol)), p) for p in range(6)),
    copy.copy,
    copy.deepcopy,
]


def make(kind):
    more = {"field": "hidden_size"} if issubclass(kind, IncompatibleError) else {}
    error = kind("what was found, what was expected", **more)
    error.add_note("where it was")
    return error


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_comes_out_as_what_it_was(kind):
    error = make(kind)
    for way in WAYS:
        again = way(error)
        assert type(again) is kind
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


class OfTwoError(ActcacheError):
    """Someone else's, made of more than its message."""

    def __init__(self, found, *, expected):
        super().__init__(f"found {found}, expected {expected}")
        self.expected = expected


def test_so_does_one_that_is_made_of_more_than_its_message():
    error = OfTwoError(1, expected=2)
    for way in WAYS:
        assert (str(way(error)), way(error).expected) == ("found 1, expected 2", 2)


def _fail(name):
    raise make(getattr(errors, name))


@pytest.mark.slow
def test_errors_cross_a_process_boundary():
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        for kind in ERRORS:
            with pytest.raises(kind, match="what was found") as caught:
                pool.submit(_fail, kind.__name__).result(timeout=60)
            assert type(caught.value) is kind


def _double(rows, at):
    return rows * 2


def _values(folder: Path) -> list[object]:
    """Frozen dataclasses that people make themselves."""
    operations = [
        Replace("it"),
        Replace(vector=torch.ones(3)),
        Add(torch.ones(3), 2.0),
        Add({"a": [1, 2, 3]}, per="event"),
        Interpolate("it", 0.5),
        Project(torch.eye(3)[:2], "swap", donor="it"),
        SignedPermutation(1),
        MatchedNorm(2, "it"),
        Call(_double, "double"),
    ]
    variants = [Variant("v", [Edit(one) for one in operations]), Variant("p", (), placebo=True)]
    (folder / "s.toml").write_text(
        '[[variants]]\nname = "v"\nedits = [{ edit = "interpolate", donor = "it", sweep = { weight = [0.5, 1] } }]'
    )
    sweep = read_sweep(folder / "s.toml", 3)
    return [
        *variants,
        sweep,
        Rows(*(torch.zeros(1, dtype=torch.int64) for _ in range(4)), ["a"]),
        CaptureSettings(boundaries=(3,)),
        GridSettings((3,), variants=sweep.variants_at),
        GridSettings((3,), variants=variants),
    ]


def _shown(value: object) -> object:
    """All that a value holds, as text."""
    if isinstance(value, GridSettings) or type(value).__name__ == "Sweep":
        return [_shown(variant) for variant in value.variants_at(3)]
    if isinstance(value, Variant):
        return [value.name, value.placebo, value.digest]
    return repr(value)


def test_settings_and_edits_come_out_as_what_they_were(tmp_path):
    for value in _values(tmp_path):
        for way in WAYS:
            again = way(value)
            assert type(again) is type(value)
            assert _shown(again) == _shown(value)


def test_every_frozen_dataclass_of_the_package_is_made_of_what_can_be_copied():
    """None holds a lock, an open file or a function of its own by default."""
    n_found = 0
    for module in pkgutil.walk_packages(actcache.__path__, "actcache."):
        if module.name.rpartition(".")[2].startswith("_") or module.ispkg:
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.name:
                n_found += 1
                defaults = [
                    field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
                    for field in dataclasses.fields(kind)
                    if field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
                ]
                assert pickle.loads(pickle.dumps(kind)) is kind, name
                pickle.dumps(defaults)
    assert n_found > 20
