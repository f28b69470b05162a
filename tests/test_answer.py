"""What a person reads: effects as words or one table, and every verb says what it wrote and what comes next."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from actcache.analyses.effects_text import described
from actcache.cli import main


def group_of(**settings):
    number = {"mean": 1.25, "low": 1.0, "high": 1.5}
    group = {"kind": "first_divergence", "boundary": 3, "scope": "prefix", "readout": "common_it", "variant": "none"}
    group |= {"pair": "pt,it", "pt": "pt", "it": "it", "subset": "all", "n_events": 24, "n_prompts": 24}
    group |= dict.fromkeys(("late_from_pt", "late_from_it", "interaction"), number)
    return group | {"cells": dict.fromkeys(("pt_pt", "pt_it", "it_pt", "it_it"), number)} | settings


def test_five_boundaries_in_two_scopes_are_one_table():
    groups = [group_of(boundary=b, scope=scope) for b in range(1, 6) for scope in ("prefix", "position")]
    lines = described({"groups": groups})
    assert lines[0] == "24 events of 24 prompts; readout common_it"
    assert lines[4].split("  ")[0:2] == ["boundary", "scope"]
    table = [line.split() for line in lines[5:]]
    assert [row[:2] for row in table] == [[str(g["boundary"]), g["scope"]] for g in groups]
    assert {" ".join(row[2:5]) for row in table} == {"+1.250 [+1.000, +1.500]"}


def test_only_what_varies_is_a_column():
    groups = [group_of(), group_of(variant="pushed[weight=0.5]", n_events=20)]
    head = next(line for line in described({"groups": groups}) if line.startswith("variant"))
    assert head.split()[:2] == ["variant", "events"]
    assert "boundary" not in head
    assert described({"groups": groups[1:]})[0].endswith("variant pushed[weight=0.5]")


def test_few_prompts_and_no_events_are_said():
    number = {"mean": 1.25, "low": None, "high": None}
    few = group_of(n_events=3, n_prompts=3, late_from_pt=number, late_from_it=number, interaction=number)
    for groups in ([few], [few, few | {"boundary": 4}]):
        lines = described({"groups": groups})
        assert lines[-1] == "no interval where an effect is of fewer than 10 prompts"
        assert not any("[" in line for line in lines)
    assert described({"groups": []}) == ["No event in these cells."]


@pytest.fixture
def run(tiny_run, tmp_path, capsys):
    out = shutil.copytree(tiny_run("llama", torch.float32).out, tmp_path / "run")
    capsys.readouterr()
    return out


def test_effects_print_a_table_and_json_on_request(run, capsys):
    assert main(["effects", str(run)]) == 0
    said = capsys.readouterr()
    assert "readout    A: late, from PT" in said.out
    assert "common_pt" in said.out
    assert f"{run / 'effects.json'} holds them; next: actcache report {run}" in said.err
    assert main(["effects", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run / "effects.json").read_text())
    assert main(["effects", str(run / "cells.parquet")]) == 0
    assert "24 events of 24 prompts; boundary 3, scope prefix" in capsys.readouterr().out


@pytest.mark.slow
def test_every_verb_says_what_comes_next(tiny_run, run, tmp_path, capsys):
    words = tiny_run("llama", torch.float32).arguments("capture")
    words[words.index("--out") + 1] = str(tmp_path / "new")
    capsys.readouterr()
    said = {}
    for verb in (words, ["grid", str(run)], ["stability", str(run)]):
        assert main(verb) == 0
        said[verb[0]] = capsys.readouterr().err
    assert f"{tmp_path / 'new' / 'store'} holds them; next: actcache grid {tmp_path / 'new'}" in said["capture"]
    assert f"{run / 'cells.parquet'} holds 288 cells; next: actcache effects {run}" in said["grid"]
    assert f"'actcache effects {run} --stable-only' leaves changed events out" in said["stability"]
