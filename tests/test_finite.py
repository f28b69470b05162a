"""What is not finite is no state, logit or choice: each place that makes or takes one names what it found."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actcache.capture.forward import Resident
from actcache.capture.residency import AllResident
from actcache.capture.search import SearchLimits, propose
from actcache.cli import main
from actcache.errors import InputError, NotFiniteError
from actcache.finite import are_states, first_no_state, first_not_finite, is_finite
from actcache.models.backbone import Backbone
from actcache.replay.edits import Add, Call, Edit, Replace, Variant
from actcache.replay.late_stack import LateStack

BOUNDARY = 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_value_among_many_is_found(dtype):
    rows = torch.zeros(300, 7, dtype=dtype)
    rows[0, 0] = torch.finfo(dtype).max
    assert is_finite(rows)
    assert first_not_finite(rows) is None
    assert is_finite(rows[:0])
    for value in (float("nan"), float("inf"), -float("inf")):
        for row in (0, 150, 299):
            wrong = rows.clone()
            wrong[row, 3] = value
            assert first_not_finite(wrong) == row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [1, 7, 4096])
def test_a_state_is_no_larger_than_a_norm_can_square(dtype, width):
    """A norm keeps the direction of what passes as a state, also of a row whose values are all as large."""
    most = (torch.finfo(torch.float32).max / width) ** 0.5
    rows = torch.full((3, width), 0.99 * most, dtype=dtype)
    assert are_states(rows)
    assert first_no_state(rows) is None
    assert torch.nn.functional.rms_norm(rows.float(), (width,)).abs().max() > 0.9
    for value in (1.01 * most, -1.01 * most, float("nan"), float("inf"), -float("inf")):
        wrong = rows.clone()
        wrong[1, -1] = value
        assert first_no_state(wrong) == 1
    assert are_states(rows[:0])
    assert is_finite(rows * 2)  # a logit may be


def spoil(folder, name, value=float("nan")):
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[:] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize("strict", [(), ("--strict",)])
@pytest.mark.parametrize(
    ("tensor", "value", "words"),
    [
        ("model.layers.1.mlp.down_proj.weight", float("nan"), "block 1 is the first"),
        ("model.layers.2.mlp.down_proj.weight", 1e38, "block 2 is the first"),
        ("model.layers.1.mlp.down_proj.weight", 1e30, "block 1 is the first"),  # its squares are not
        ("model.layers.4.mlp.down_proj.weight", 1e30, "block 4 is the first"),
        ("lm_head.weight", float("inf"), "not finite"),
    ],
)
def test_a_checkpoint_that_computes_none_is_named(tmp_path, capsys, tensor, value, words, strict):
    pt, it = tiny.make_pair(tmp_path, "llama")
    spoil(it, tensor, value)
    given = ["--pt", pt, "--it", it, "--prompts", tiny.write_prompts(tmp_path / "p.jsonl", 3)]
    assert main(["run", *map(str, given), "--out", str(tmp_path / "run"), "--max-new", "4", *strict]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert "same tokens" not in said.out
    if "block" in words:
        assert "checkpoint it, prompt 'p0" in said.err


def test_a_search_names_checkpoint_and_sequence(tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "llama")
    backbones = [Backbone(AutoModelForCausalLM.from_pretrained(folder).eval()) for _ in range(2)]
    with torch.no_grad():
        backbones[1].blocks[2].mlp.down_proj.weight.fill_(float("nan"))
    checkpoints = AllResident({label: Resident(one) for label, one in zip("ab", backbones, strict=True)})
    limits = SearchLimits(4, frozenset(), None)
    with pytest.raises(NotFiniteError, match=r"checkpoint b, the first: .*block 2 is the first whose output is not"):
        propose(checkpoints, ["a", "b"], [[5, 6], [7, 8, 9]], [0, 0], limits, names=["the first", "the second"])


@pytest.mark.slow
def test_rows_edits_and_blocks_of_a_replay_are_told_apart(tmp_path):
    late = LateStack.load(tiny.make_checkpoint(tmp_path, "llama"), BOUNDARY)
    rows, offsets = torch.randn(7, late.width, generator=torch.Generator().manual_seed(0)), [0, 3, 7]
    wrong = rows.clone()
    wrong[4, 2] = float("inf")
    with pytest.raises(InputError, match=r"the states given: row 4 \(sequence 1, position 1\) .* not finite"):
        late.run(wrong, offsets)
    with pytest.raises(InputError, match="donor 'it': row 4"):
        late.run_variants(rows, offsets, [Variant("none")], donors={"it": wrong})
    far = Variant("far", (Edit(Call(lambda state, at: state * torch.inf, "far")),))
    for strict in (False, True):
        with pytest.raises(InputError, match="'far'"):
            late.run_variants(rows, offsets, [far, Variant("none")], strict=strict)
    with pytest.raises(InputError, match="not finite"):
        Add(torch.full((late.width,), torch.nan))
    for value in (torch.nan, 1e30):
        with torch.no_grad():
            late.blocks[1].mlp.down_proj.weight.fill_(value)
        with pytest.raises(NotFiniteError, match=f"block {BOUNDARY + 1} is the first whose output is not"):
            late.run(rows, offsets)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_norm_hides_what_overflows(tmp_path, dtype):
    late = LateStack.load(tiny.make_checkpoint(tmp_path, "llama"), BOUNDARY, dtype=dtype)
    rows = torch.randn(7, late.width, generator=torch.Generator().manual_seed(0)).to(dtype)
    offsets, ones = [0, 3, 7], torch.ones(late.width)
    with pytest.raises(InputError, match=r"the states given: row 0 .* or whose squares are not"):
        late.run(rows * 1e30, offsets)
    with pytest.raises(InputError, match="donor 'it': row 0"):
        late.run_variants(rows, offsets, [Variant("none")], donors={"it": rows * 1e30})
    with pytest.raises(InputError, match=r"variant 'v': a vector has values that .*, or whose squares are not finite"):
        late.run_variants(rows, offsets, [Variant("v", (Edit(Replace(vector=ones * 1e25)),))])
    for place in ({}, {"positions": (0,)}, {"positions": "all"}, {"site": "mlp", "layers": (4,)}):
        # Alone, and beside another that shares the earlier positions.
        far = Variant("v", (Edit(Add(ones, 1e25), **place),))
        for variants in ([far], [far, Variant("other", (Edit(Add(ones)),))]):
            for strict in (False, True):
                with pytest.raises(
                    InputError, match=r"variant 'v': its edit Add of .* whose squares are not in float32"
                ):
                    late.run_variants(rows, offsets, variants, strict=strict)
    late.run_variants(rows, offsets, [Variant("large", (Edit(Add(ones, 1e15)),))])
    final, pair = late.run(rows, offsets), torch.tensor([[1, 2], [3, 4]])
    final[1] *= 1e30
    for read in (
        lambda: late.readout.top2(final),
        lambda: late.readout.read(final, pair),
        lambda: late.readout.logits(final),
        lambda: late.readout.scores(final, pair),
        lambda: late.readout.compare(final, final[:1], torch.zeros(2, dtype=torch.int64)),
        lambda: late.readout.compare(final[:1], final, torch.zeros(1, dtype=torch.int64)),
    ):
        with pytest.raises(NotFiniteError, match="the final state 1 is not finite, or its squares are not"):
            read()


@pytest.mark.slow
def test_effects_name_the_variants_whose_margins_are_not_finite(tiny_run, tmp_path, capsys):
    run = tiny_run("llama", torch.float32)
    margins = run.cells["margin"].to_pylist()
    margins[0] = float("nan")
    at = run.cells.column_names.index("margin")
    path = tmp_path / "cells.parquet"
    cells = run.cells.set_column(at, "margin", pa.array(margins, pa.float32()))
    pq.write_table(cells.replace_schema_metadata(None), path)
    assert main(["effects", str(path)]) == 2
    assert "1 of" in (said := capsys.readouterr().err)
    assert "of variants none: filter them out" in said
