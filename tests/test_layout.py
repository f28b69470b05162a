"""The shape of the package: imports point one way, and every verb is documented."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

import actcache
from actcache.cli import build_parser
from actcache.cli.parser import GROUPS
from actcache.native import native

PACKAGE = Path(actcache.__file__).parent
TESTS = Path(__file__).parent
DOCS = PACKAGE.parent / "docs"
# A module imports only from modules to its left, and from folders to the left of its own.
FLOW = {
    "": (
        "errors",
        "counts",
        "canonical",
        "schema",
        "fingerprint",
        "finite",
        "files",
        "cgroups",
        "cpus",
        "room",
        "progress",
        "sealed",
        "native",
        "carried",
        "strict_json",
        "prompt_files",
        "prompts",
        "spill",
    ),
    "store": (
        *("planes", "zarr_codec", "chunks", "far_path", "storage", "patience", "objects", "claims", "shard", "layout"),
        *("commit_record", "rollup", "records"),
        *("segment_data", "segment", "selection", "reader", "writer", "background", "compact", "verify", "export"),
        *("corpus", "rows", "order", "feed"),
    ),
    "models": (
        *("tokens", "quantized", "digests", "checkpoint_files", "origin", "adapters", "shared", "blocks", "text_tower"),
        *("checkpoint", "vocabulary", "templates", "lineup", "prompt_ids"),
        *("probe", "packing", "linear", "readout", "parts"),
        *("regimes", "cost", "backbone", "streamed", "gather", "devices", "fit"),
    ),
    "capture": (
        *(
            "settings",
            "token_class",
            "supports",
            "growth",
            "given",
            "continuations",
            "events",
            "decode",
            "counter",
            "forward",
        ),
        *("forward", "streams", "residency", "search", "asks", "answers", "rerun", "decide", "corpus", "rollouts"),
    ),
    "replay": (
        *("vectors", "operations", "features", "edits", "moves", "forwards", "gradients"),
        *("copies", "swap", "around", "workers", "modes", "batch"),
        *("sizes", "passes", "late_stack", "taken", "streamed_late", "sweep"),
    ),
    "study": (
        *("statistics", "regression", "families", "overlap", "contrasts", "subsets", "left_out"),
        *("results", "scores", "work", "cells", "jobs"),
        *("replay_job", "prefix_job", "size_job", "earlier_job", "window_job", "map_job"),
        *("path_job", "gradient_job", "handoff_job", "forward_job"),
        *("decode_job", "branch_job", "states_job", "continuation_job"),
        *(
            "capture_job",
            "holding",
            "held",
            "engine",
            "runner",
            "part",
            "whole_models",
            "decisions",
            "capture",
            "replies",
        ),
        *("scheduler", "simulated_cluster"),
        *("plan", "reads", "finished", "planned_store", "dealt", "planned_cluster", "run_folder", "lens"),
        *("run", "section", "analysis", "further", "worker", "cluster"),
    ),
    "analyses": (
        *("stability", "averages", "effects_text", "effects", "grid"),
        *(
            "depth",
            "windows",
            "supports",
            "lineage",
            "recipes",
            "controls",
            "commitment",
            "closure",
            "map",
            "path",
            "continuation",
            "forced",
        ),
        *("whole", "across"),
    ),
    "analyses/features": (
        *("before", "crosscoder", "batch_topk", "step", "trainer", "train", "contexts", "cell_step", "ranked", "rank"),
        *("edited", "mediate", "gate", "gate_test", "rescue", "dial", "handoff"),
    ),
    "report": ("visible", "figures", "variants", "sections", "template", "page", "families", "written"),
    "cli": (
        *("terminal", "memory", "parser", "arguments", "runners", "tables", "captured", "timing", "watched"),
        *("analyses", "across", "stability", "corpus", "stages", "study", "stores", "bench", "planned", "plan", "run"),
    ),
    # Last: the package itself imports none of it.
    "testing": (
        *("clock", "faults", "memory", "objects", "schedule", "views", "places", "content", "invariants"),
        "store_schedule",
    ),
}
FOLDERS = list(FLOW)
# What chooses among kinds when it is called: a place of a store, whose kind may need the extra s3; an analysis by name.
# A study of a run ends in its page.
FACTORIES = {("storage", "objects"), ("far_path", "storage"), ("run", "analyses"), ("run", "report")}


def imported(path: Path) -> set[tuple[str, str]]:
    """Folder and module of everything of ours that a file imports anywhere; no module where a folder itself is."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "actcache":
            parts = (node.module or "").split(".")
            names |= {(*parts, alias.name)[1:] for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")[1:]) for alias in node.names if alias.name.startswith("actcache.")}
    found = set()
    for name in names:
        place = "/".join((*name, ""))
        folder = max((one for one in FOLDERS if place.startswith(f"{one}/")), default="", key=len)
        module = place.removeprefix(f"{folder}/").split("/")[0]
        if module in FLOW[folder]:
            found.add((folder, module))
        elif folder:
            found.add((folder, ""))
    return found


def test_every_module_has_a_place_in_the_flow():
    for folder, modules in FLOW.items():
        found = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", "__main__"}
        assert found == set(modules), folder
    assert {str(path.parent.relative_to(PACKAGE)) for path in PACKAGE.glob("*/**/__init__.py")} == set(FOLDERS) - {""}


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        if path.stem.startswith("__"):
            continue  # what a folder gives to others: its own modules
        for of_folder, module in imported(path):
            if {(path.stem, module), (path.stem, of_folder)} & FACTORIES:
                continue
            assert FOLDERS.index(of_folder) <= FOLDERS.index(folder), f"{path} imports {of_folder}/{module}"
            if of_folder == folder and module:
                assert FLOW[folder].index(module) < FLOW[folder].index(path.stem), f"{path} imports {module}"


def test_importing_the_package_does_no_work():
    heavy = ("torch", "transformers", "peft", "huggingface_hub", "zarr", "pyarrow")
    code = f"import sys, actcache; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert actcache.__version__ == version("actcache") == project["version"]
    assert (native("cpu")[0] is None) or native("cpu")[0].version() == actcache.__version__


def test_a_store_is_read_without_transformers():
    code = "import sys, actcache; actcache.open_store; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def verbs() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    found: dict[str, argparse.ArgumentParser] = {}
    for name, parser in action.choices.items():
        steps = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        found |= {name: parser, **{f"{name} {step}": one for one_of in steps for step, one in one_of.choices.items()}}
    for parser in found.values():
        parser.fill()
    return found


@pytest.mark.parametrize("name", verbs())
def test_every_verb_has_help_and_a_place_in_the_docs(name):
    parser = verbs()[name]
    assert parser.description
    for action in parser._actions:
        assert action.help, f"{name} {action.dest}"
    assert f"`actcache {name}" in (DOCS / "running.md").read_text(encoding="utf-8")


def test_the_tree_in_the_docs_names_every_module():
    tree = (DOCS / "code.md").read_text(encoding="utf-8")
    for folder, modules in FLOW.items():
        assert f"{folder.rpartition('/')[2]}/" in tree
        for name in modules if folder not in ("cli", "report") else ():
            assert f"{name}.py" in tree, name


@pytest.mark.parametrize("name", verbs())
def test_help_comes_in_groups_with_an_example(name):
    """Every option is in a group of the help; the example is a command that there is, of this verb."""
    parser = verbs()[name]
    grouped = [action for group in parser._action_groups if group.title in GROUPS for action in group._group_actions]
    assert {id(action) for action in grouped} == {id(action) for action in parser._actions}
    kind, _, example = parser.epilog.partition(": ")
    program, *words = shlex.split(example)
    assert (kind, program) == ("example", "actcache")
    assert shlex.join(words).startswith(name)
    build_parser().parse_args(words)
    assert f"\n  {example}\n" in parser.format_help()


@pytest.mark.parametrize("name", verbs())
def test_help_is_plain(name):
    """Thirty words at most; "per", where "a row an event" would be said."""
    for text in (parser := verbs()[name]).description, *(action.help for action in parser._actions):
        assert len(text.split()) <= 30, text
        assert not re.search(r"\b(one|a|an) \w+ (a|an) \w+\b", text), text
