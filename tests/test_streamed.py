"""Checkpoints whose blocks are loaded one at a time: equal to the plain forward, and read block by block."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import families
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import TinyRun
from tiny import N_BLOCKS, make_checkpoint, make_pair, write_prompts, write_tokenizer

import actcache
from actcache.capture.forward import Pack, Resident
from actcache.capture.streams import Streaming, guess
from actcache.cli import main, stages
from actcache.cli.terminal import LiveLine
from actcache.errors import NotFiniteError, UnsupportedModelError
from actcache.models import checkpoint_files
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import Checkpoint
from actcache.models.parts import Frame
from actcache.models.probe import probe_block
from actcache.models.streamed import Streamed
from actcache.replay.streamed_late import StreamedLate
from actcache.study.holding import Holding
from actcache.study.run_folder import RunFolder

FAMILIES = ("llama", "qwen2", "gemma2", "gemma3_text", "gpt_neox", "opt", "phi", "mixtral", "roberta-prelayernorm")


def saved(folder: Path, name: str) -> Checkpoint:
    families.build(name).save_pretrained(folder)
    write_tokenizer(folder)
    return Checkpoint.open("a", folder)


def streamed_forward(streamed: Streamed, bounds: list[int], ids: torch.Tensor) -> torch.Tensor:
    state = ids
    for _ in streamed.pass_over():
        state = streamed.forward(bounds, state)
    return state


@pytest.mark.parametrize("name", FAMILIES)
def test_equals_the_plain_forward(tmp_path, name):
    checkpoint = saved(tmp_path, name)
    backbone = Backbone(checkpoint.load(torch.float32))
    streamed = Streamed(checkpoint, torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (20,), generator=generator)
    for n in (1, 20):
        plain = backbone.forward([0, n], input_ids=ids[None, :n])
        assert torch.equal(streamed_forward(streamed, [0, n], ids[:n]), plain)
    assert (streamed.why_not_packable() is None) == (backbone.why_not_packable() is None)
    if streamed.why_not_packable() is None:
        packed = backbone.forward([0, 13, 20], input_ids=ids[None])
        assert (streamed_forward(streamed, [0, 13, 20], ids) - packed).abs().max() < 1e-4
    assert torch.equal(streamed.readout.top2(plain)[0], backbone.readout.top2(plain)[0])


@pytest.mark.parametrize("name", ["gemma3n_text", "zamba", "zaya"])
def test_what_passes_more_than_the_state_is_refused_by_name(tmp_path, name):
    checkpoint = saved(tmp_path, name)
    with pytest.raises(UnsupportedModelError, match=f"checkpoint a, {tmp_path}"):
        streamed_forward(Streamed(checkpoint, torch.float32), [0, 5], torch.arange(5) + 3)


@pytest.mark.parametrize("tie", [True, False])
def test_a_part_reads_its_own_bytes_only(tmp_path, monkeypatch, tie):
    checkpoint = Checkpoint.open("a", make_checkpoint(tmp_path, "llama", tie=tie, shards=True))
    read: list[str] = []
    own = checkpoint_files.open_tensors

    class Watched:
        def __init__(self, name, tensor):
            self.name, self.tensor = name, tensor

        def __getattr__(self, name):
            return getattr(self.tensor, name)

        def __getitem__(self, index):
            read.append(self.name)
            return self.tensor[index]

    monkeypatch.setattr(
        checkpoint_files,
        "open_tensors",
        lambda files, **how: {name: Watched(name, one) for name, one in own(files, **how).items()},
    )
    names = set(own(checkpoint_files.weight_files(tmp_path)))
    frame = Frame.load(checkpoint, torch.float32)
    assert sorted(read) == sorted(name for name in names if ".layers." not in name)
    for index in (3, 0):
        read.clear()
        frame.load_block(index)
        assert sorted(read) == sorted(name for name in names if f".layers.{index}." in name)
    monkeypatch.undo()
    sizes = frame.block_bytes()
    assert len(sizes) == 5
    assert len(set(sizes)) == 1
    assert sizes[0] == sum(p.nbytes for p in frame.load_block(0).parameters())


def test_a_block_alone_lies_as_far_behind_a_cache_line_as_in_the_whole_model(tmp_path):
    """Some CPUs round the product with a single row by where a weight begins."""
    folder = make_checkpoint(tmp_path, "llama")
    weights = folder / "model.safetensors"
    length = int.from_bytes(weights.read_bytes()[:8], "little")
    header = weights.read_bytes()[8 : 8 + length].rstrip() + b" " * 64  # a longer header moves what follows it
    distances = set()
    for n in (0, 4, 20):
        moved = header[: len(header) - len(header) % 4] + b" " * n
        weights.write_bytes(len(moved).to_bytes(8, "little") + moved + weights.read_bytes()[8 + length :])
        length = len(moved)
        checkpoint = Checkpoint.open("a", folder)
        whole, alone = checkpoint.load(torch.float32), Frame.load(checkpoint, torch.float32).load_block(2)
        for one, other in zip(whole.model.layers[2].parameters(), alone.parameters(), strict=True):
            assert one.data_ptr() % 64 == other.data_ptr() % 64
            assert torch.equal(one, other)
            distances.add(one.data_ptr() % 64)
    assert len(distances) > 1


def test_blocks_stay_no_longer_than_they_run(tmp_path):
    streamed = Streamed(Checkpoint.open("a", make_checkpoint(tmp_path, "llama")), torch.float32)
    told: list[str] = []
    for _ in streamed.pass_over(doing=told.append):
        assert len(streamed.backbone.blocks) == 1
    assert not len(streamed.backbone.blocks)
    assert [words.split(",")[0] for words in told] == [f"block {n} of 5" for n in range(1, 6)]
    assert (
        streamed.n_bytes == sum(p.nbytes for p in Frame.load(streamed.checkpoint, None).load_block(0).parameters()) * 5
    )
    for index in streamed.pass_over(first=2):  # left in the middle
        if index == 3:
            break
    assert not len(streamed.backbone.blocks)
    assert sum(p.numel() for p in streamed.backbone.decoder.parameters()) < 120 * 32 * 2 + 100


def test_packs_go_through_one_block_after_another(tmp_path, monkeypatch):
    checkpoint = saved(tmp_path, "gemma2")
    resident = Resident(Backbone(checkpoint.load(torch.float32)))
    streaming = Streaming("a", Streamed(checkpoint, torch.float32))
    sequences = [list(range(3, 3 + n)) for n in (9, 4, 13, 1)]
    packs = [Pack.of([ids], [range(len(ids))], [[len(ids) - 1, 0]]) for ids in sequences]
    places = [("state", 2), ("mlp", 0), ("attention", 3), ("state", 3)]
    expected = list(resident.run(packs, places))
    for in_memory in (1 << 20, 0):
        monkeypatch.setattr("actcache.spill.IN_MEMORY", in_memory)
        found = list(streaming.run(packs, places))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.final, other.final)
            assert one.rows.keys() == other.rows.keys()
            assert all(torch.equal(one.rows[place], other.rows[place]) for place in places)
    assert list(streaming.run([], places)) == []


def test_a_block_that_gives_no_finite_values_is_named(tmp_path):
    model = families.build("llama")
    model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    streaming = Streaming("a", Streamed(Checkpoint.open("a", tmp_path), torch.float32))
    with pytest.raises(NotFiniteError, match="block 2 is the first"):
        list(streaming.run([Pack.of([[3, 4]], [[0]], [[1]])], []))


def test_what_is_guessed_followed_an_equal_end():
    assert guess([5, 6, 7, 8, 5, 6, 7], 2) == [8, 5]
    assert guess([5, 6, 7, 9, 7], 9) == [9, 7]
    assert guess([5], 4) == [5]
    assert guess([5, 6], 4) == [6]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 9))
def test_a_guess_is_of_the_sequence_and_no_longer_than_asked(ids, n):
    found = guess(ids, n)
    assert 1 <= len(found) <= n
    assert set(found) <= set(ids)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyRun]:
    """``pair(arch)``: what a run of this pair is given, before anything is run."""

    @functools.cache
    def make(arch: str) -> TinyRun:
        folder = tmp_path_factory.mktemp(arch)
        pt, it = make_pair(folder, arch)
        return TinyRun(pt, it, write_prompts(folder / "prompts.jsonl"), folder / "run", torch.float32)

    return make


def captured(run: TinyRun, out: Path, *more: str) -> dict[str, bytes]:
    """The files of a store captured strictly, by name, but what says who wrote it when."""
    words = [*run.arguments("capture"), "--strict", "--shard-prompts", "3", "--limit", "6", "--max-new", "6", *more]
    words += ["--site", "mlp:1"]
    words[words.index("--out") + 1] = str(out)
    assert main(words) == 0
    return {str(path.relative_to(out)): path.read_bytes() for path in (out / "store").rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("way", [("--stream",), ("--resident", "one")], ids=["stream", "one"])
def test_a_capture_in_rounds_is_timed_and_says_no_time_left(pair, tmp_path, capsys, monkeypatch, way):
    run, told = pair("llama"), []
    monkeypatch.setattr(LiveLine, "__call__", lambda self, progress: told.append(progress))
    captured(run, tmp_path / "run", *way)
    assert told[-1].done == told[-1].total == 6
    assert {one.in_rounds for one in told if one.done} == {True}
    if way == ("--stream",):
        assert any(re.match("(pt|it): pass 2, block 5 of 5", one.doing) for one in told)
    timings = RunFolder(tmp_path / "run").timings()["capture"]
    assert timings["elapsed_s"] > timings["load_s"] > 0
    assert timings["n_searches"] >= 6
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["truth"]["capture_s"] == timings["elapsed_s"]
    assert found["untimed"] == {}
    assert ("capture_passes" in found["estimate"]) == (way == ("--stream",))
    assert main(["plan", str(tmp_path / "run")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "gpt2", "phi3"])
def test_a_streamed_capture_has_the_bytes_of_a_plain_one(pair, tmp_path, arch):
    run = pair(arch)
    plain = captured(run, tmp_path / "plain")
    assert captured(run, tmp_path / "streamed", "--stream") == plain
    assert not [path for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("actcache-")]


@pytest.mark.slow
def test_a_streamed_run_is_a_plain_one(pair, tmp_path, monkeypatch):
    run = pair("llama")
    found = {}
    for way in ((), ("--stream",)):
        words = [*run.arguments(), "--strict", "--stability", "0", "--limit", "6", "--max-new", "10", *way]
        words[words.index("--out") + 1] = str(tmp_path / "-".join(("run", *way)))
        with mock.patch.object(stages, "write_report"):
            assert main(words) == 0
        table = pq.read_table(Path(words[words.index("--out") + 1]) / "cells.parquet")
        found[way] = table.replace_schema_metadata()
    assert found[()].equals(found["--stream",])
    out, opened = str(tmp_path / "run---stream"), []
    assert actcache.Run(out).holding == Holding(stream=True)
    assert actcache.Run(out, resident="all").holding == Holding(resident="all")
    own = StreamedLate.open
    monkeypatch.setattr(StreamedLate, "open", lambda *given, **how: opened.append(given) or own(*given, **how))
    assert main(["grid", out, "--scope", "position"]) == 0  # held as in the capture
    assert len(opened) == 2
    assert main(["grid", out, "--scope", "position", "--max-tokens", "300", "--resident", "all"]) == 0
    assert len(opened) == 2


@pytest.mark.slow
def test_a_plan_says_what_a_stream_reads(pair, capsys):
    run = pair("llama")
    words = ["plan", *run.arguments()[1:], "--rate", "1e9", "--json"]
    del words[words.index("--out") : words.index("--out") + 2]
    rows = {}
    for way in ((), ("--stream",), ("--resident", "one")):
        capsys.readouterr()
        assert main([*words, *way]) == 0
        rows[way] = json.loads(capsys.readouterr().out)["estimate"]
    plain, streamed, one = rows.values()
    assert streamed["capture_memory_bytes"] < plain["capture_memory_bytes"]
    assert streamed["search_multiply_adds"] > plain["search_multiply_adds"]
    assert streamed["grid_passes"] == 2
    size = (run.pt / "model.safetensors").stat().st_size
    assert streamed["capture_read_bytes"] == pytest.approx(streamed["capture_passes"] * size, rel=0.1)
    assert one["capture_read_bytes"] == pytest.approx(one["capture_loads"] * size, rel=0.1)
    passes, loads = ({f"{stage}_{how}" for stage in ("capture", "grid")} for how in ("passes", "loads"))
    assert [of.keys() & (passes | loads) for of in (plain, streamed, one)] == [set(), passes, loads]
    words.remove("--json")
    assert main([*words, "--resident", "one"]) == 0
    shown = capsys.readouterr().out
    assert "loads: capture" in shown
    assert "pass" not in shown
    assert main([*words, "--stream"]) == 0
    assert "a pass decides 1 token of each prompt" in capsys.readouterr().out


@pytest.mark.slow
def test_checks_of_stability_stream_too(tiny_run, tmp_path):
    run = tiny_run("llama", torch.float32, "--limit", "12", "--stability", "0")
    tables = []
    for way in ((), ("--stream",)):
        out = shutil.copytree(run.out, tmp_path / "-".join(("run", *way)))
        (out / "stability.parquet").unlink(missing_ok=True)
        with mock.patch("actcache.models.streamed.probe_block", wraps=probe_block) as looked_at:
            assert main(["stability", str(out), "--sample", "float32=3", *way]) == 0
        assert looked_at.call_count == (2 * N_BLOCKS if way else 0), "each block once, for all forwards over it"
        tables.append(pq.read_table(out / "stability.parquet").replace_schema_metadata())
    assert tables[0].equals(tables[1])
