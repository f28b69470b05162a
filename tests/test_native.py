"""The native core's face: the stub that type checkers read says what the module has."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import actcache
from actcache.native import native

PACKAGE = Path(actcache.__file__).parent
SOURCE = PACKAGE.parent / "csrc" / "core_module.cpp"
STUB = {
    node.name: [argument.arg for argument in node.args.args]
    for node in ast.parse((PACKAGE / "_core.pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}


def in_the_source() -> dict[str, tuple[list[str], str]]:
    """Of each function that csrc/core_module.cpp defines: the names of its arguments, and its docstring."""
    found = {}
    for definition in re.split(r"module\.def\(", SOURCE.read_text(encoding="utf-8"))[1:]:
        name = re.match(r'\s*"(\w+)"', definition)[1]
        end = definition.rindex('");') + 1
        documented = re.search(r'((?:"(?:[^"\\]|\\.)*"\s*)+)$', definition[:end])[1]
        arguments = re.findall(r'py::arg\("(\w+)"\)', definition[:end])
        found[name] = arguments, "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', documented))
    return found


def test_the_stub_names_the_functions_of_the_source_and_their_arguments():
    assert {name: arguments for name, (arguments, _) in in_the_source().items()} == STUB


def test_every_function_is_documented():
    for name, (_, documented) in in_the_source().items():
        assert re.fullmatch(r"[A-Z].{20,}\.", documented), name


def test_the_module_that_was_built_is_that_of_the_stub():
    core, why_not = native("cpu")
    if core is None:
        pytest.skip(why_not)
    built = {name: value for name, value in vars(core).items() if not name.startswith("_")}
    assert built.keys() == STUB.keys()
    for name, function in built.items():
        head, _, documented = inspect.getdoc(function).partition("\n")
        assert re.findall(r"(\w+): ", head) == STUB[name]
        assert documented.strip() == in_the_source()[name][1]
