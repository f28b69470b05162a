"""Late stacks whose blocks are in memory one at a time, and one late stack at a time: equal to those that are whole."""

from __future__ import annotations

import pytest
import torch
from tiny import make_checkpoint

from actcache.analyses.grid import GridSettings, run_grid
from actcache.errors import InputError, NotFiniteError
from actcache.models.checkpoint import Checkpoint
from actcache.models.parts import load_readout
from actcache.replay.edits import PLAIN, Add, Edit, Interpolate, Variant
from actcache.replay.late_stack import LateStack
from actcache.replay.moves import Moves
from actcache.replay.streamed_late import StreamedLate

OFFSETS = [0, 13, 20, 40]
POSITIONS = [(0, 12), (0, 5), (1, 6), (2, 19), (1, 6)]


def variants(width):
    ones = torch.ones(width)
    return [
        PLAIN,
        Variant("last", (Edit(Add(ones), positions="last"),)),
        Variant("all", (Edit(Interpolate("it", 0.5)),)),
        Variant("inside", (Edit(Add(ones), site="mlp", layers=(3,)), Edit(Add(ones), site="attention", layers=(4,)))),
        Variant("inside last", (Edit(Add(ones), site="mlp", layers=(4,), positions="last"),)),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_gives_what_the_whole_late_stack_gives(tmp_path, arch):
    checkpoint = Checkpoint.open("a", make_checkpoint(tmp_path, arch))
    whole, streamed = LateStack.load(checkpoint, 0), StreamedLate.open(checkpoint, 0)
    generator = torch.Generator().manual_seed(0)
    rows, donor = (torch.randn(OFFSETS[-1], whole.width, generator=generator) for _ in range(2))
    for boundary, strict in ((2, True), (2, False), (0, True)):
        how = {"positions": POSITIONS, "donors": {"it": donor}, "strict": strict}
        found, expected, seen = [], [], []
        for late, into in ((whole, expected), (streamed, found)):
            moves = Moves()
            into.append(late.at(boundary).run_variants(rows, OFFSETS, variants(whole.width), moves=moves, **how))
            into.append(late.at(boundary).sizes(rows, OFFSETS, positions=POSITIONS, strict=strict))
            seen.append([moves.still(number).tolist() for number in range(len(variants(whole.width)))])
        assert seen[0] == seen[1]
        for one, other in zip(found, expected, strict=True):
            if strict:
                assert torch.equal(one, other)
            else:
                assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)
    assert streamed.mode == whole.mode


def test_batches_of_several_boundaries_share_a_pass(tmp_path):
    checkpoint = Checkpoint.open("a", make_checkpoint(tmp_path, "llama"))
    streamed = StreamedLate.open(checkpoint, 2)
    rows = torch.randn(20, streamed.width)
    batches = [streamed.at(b).prepare(rows, [0, 5, 20], [PLAIN], strict=True) for b in (3, 2, 4)]
    blocks: list[str] = []
    found = [torch.empty(2, streamed.width) for _ in batches]
    for number, (events, _, hidden) in streamed.replay_all(batches, blocks.append):
        found[number][events] = hidden
    assert len(blocks) == 3
    for one, boundary in zip(found, (3, 2, 4), strict=True):
        assert torch.equal(one, LateStack.load(checkpoint, boundary).run(rows, [0, 5, 20], strict=True))
    with pytest.raises(InputError, match="boundary 1 is before 2"):
        streamed.at(1)


def test_what_is_not_finite_is_named_with_its_block(tmp_path):
    streamed = StreamedLate.open(Checkpoint.open("a", make_checkpoint(tmp_path, "llama")), 2)
    rows = torch.full((3, streamed.width), 1e18)
    streamed._streamed.forward = lambda bounds, state: state * 1e30  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match=r"sequence .0. from finite states is not finite.*block 2 is the first"):
        streamed.run(rows, [0, 3], strict=True)


@pytest.mark.slow
def test_a_grid_of_one_late_stack_at_a_time_is_that_of_all(tiny_run, tmp_path, monkeypatch):
    run = tiny_run(
        "llama", torch.float32, "--shard-prompts", "4", "--limit", "8", "--boundary", "2,3", "--stability", "0"
    )
    checkpoints = {"pt": Checkpoint.open("pt", run.pt), "it": Checkpoint.open("it", run.it)}
    ones = torch.ones(32)
    settings = GridSettings(
        (2, 3),
        ("prefix", "position"),
        ("native", "common_it", "common_pt"),
        lambda boundary: (Variant("pushed", (Edit(Add(ones)),)),),
        kl=True,
        strict=True,
    )
    loaded: list[tuple[str, int]] = []
    monkeypatch.setattr("actcache.study.runner.ROWS_AT_ONCE", 100_000)
    monkeypatch.setattr("actcache.spill.IN_MEMORY", 0)
    tables, files = {}, {}
    for way in ("all", "one", "stream"):

        def load(label, boundary, way=way):
            loaded.append((label, boundary))
            make = StreamedLate.open if way == "stream" else LateStack.load
            return make(checkpoints[label], boundary)

        loaded.clear()
        folder = tmp_path / way
        heads: list[str] = []

        def head(label, heads=heads):
            heads.append(label)
            return load_readout(checkpoints[label], None)

        how = {"load_readout": head, "one_at_a_time": way != "all"}
        tables[way] = run_grid(run.store, load, folder, settings, **how)
        files[way] = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert sorted(loaded) == [("it", 2), ("pt", 2)]
        assert sorted(heads) == ([] if way == "all" else ["it", "pt"])
    assert len(files["all"]) > 2
    assert files["all"] == files["one"] == files["stream"]
    assert tables["all"].equals(tables["one"])
    assert tables["all"].equals(tables["stream"])
