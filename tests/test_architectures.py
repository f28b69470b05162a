"""Every decoder family of transformers, tiny and random, against forward hooks; and the table that says how each fared.

The outcomes are examined by the script that writes the table, beside the independent reference.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from torch import nn
from twins import reference

from actcache.capture.forward import forward_and_gather
from actcache.errors import UnsupportedModelError
from actcache.models.backbone import Backbone
from actcache.models.blocks import cut_upstream, find_anatomy, find_site, mixes_tokens, shallow_clone
from actcache.models.probe import probe_late_blocks
from actcache.models.readout import Readout
from actcache.replay.late_stack import LateStack

SCRIPT = Path(__file__).parent.parent / "scripts" / "architecture_table.py"

# Families that must replay exactly, whatever becomes of the others.
REQUIRED = (
    *("llama", "mistral", "qwen2", "qwen3", "olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "falcon, ALiBi", "stablelm", "cohere", "cohere2"),
    *("granite", "starcoder2", "smollm3", "glm4", "nemotron", "exaone4", "mixtral", "qwen3_moe", "olmoe"),
    *("deepseek_v3", "gpt_oss", "mamba", "mamba2", "jamba", "lfm2", "falcon_h1", "nemotron_h", "llama4_text"),
    *("aya_vision", "glm4v", "idefics3", "internvl", "llava", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
)
# Their late blocks read more than the state at the boundary.
READ_MORE = {
    "zamba": "original_hidden_states",
    "zamba2": "original_hidden_states",
    "gemma4_text": "per_layer_input",
    "gemma4_unified_text, shared upstream": "shared_kv_states",
    "glm_moe_dsa, shared upstream": "prev_topk_indices",
    "zaya": "prev_router_hidden_states",
    "inkling2_text": "block_states",
    "gemma3n_text": "not one residual stream",
    "deepseek_v4": "not one residual stream",
    "dory": r"in the order \[2, 3, 2, 3\]",
    "nanochat": "final norm is not called once",
}
FROM_FOLDER = (
    *("bloom", "deepseek_v3", "falcon, ALiBi", "falcon_h1", "gemma3_text", "gpt_neox", "gpt_oss", "jamba", "lfm2"),
    *("llama4_text", "mamba", "mixtral", "opt", "phi3", "qwen3_5_moe_text", "qwen3_moe", "xlstm"),
    *("idefics3", "llava", "qwen2_vl"),
)


def _load_script() -> Any:
    spec = importlib.util.spec_from_file_location("architecture_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


pytestmark = pytest.mark.slow
table = _load_script()
VERSION, STATUSES = table.read_page(table.PAGE.read_text())
SAME_VERSION = transformers.__version__ == VERSION
REPLAYED = [name for name in families.NAMES if STATUSES.get(name) in table.STATUS.values()]


# For tests that leave the model as it is.
built = functools.lru_cache(maxsize=len(REQUIRED))(families.build)


def marked(names: Iterable[str], deep: Callable[[str], bool]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.deep) if deep(name) else name for name in names]


def is_further_tower(name: str) -> bool:
    return name in families.TOWERS and name not in (*REQUIRED, "paligemma", "diffusion_gemma")


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("name", marked(sorted({*families.NAMES, *STATUSES}), is_further_tower))
def test_a_family_replays_exactly_or_is_refused_as_the_table_says(name):
    if name not in families.NAMES:
        assert not SAME_VERSION, f"{table.PAGE.name} has a family that transformers {VERSION} does not: {name}"
        pytest.skip(f"transformers {transformers.__version__} does not know it")
    model = families.build(name)
    outcome = table.examine(name, model, other_head=name in REQUIRED)  # its outcome is the table's alone
    if outcome.status == table.REFUSED:
        assert outcome.note
    else:
        assert outcome.strict_is_exact
        assert outcome.error <= 1e-4
        assert outcome.logits_error <= 1e-4
        assert (outcome.note == "") == (outcome.status == "packed")
        # Otherwise the equalities above would say little.
        assert outcome.earlier_tokens_tell > 1e-3
        assert outcome.sequences_differ > 1e-2
        assert outcome.heads
    if name not in STATUSES:
        assert not SAME_VERSION, f"{name} is not in {table.PAGE.name}; run python scripts/architecture_table.py"
        pytest.skip(f"not in the table, which is of transformers {VERSION}")
    assert outcome.status == STATUSES[name], "run python scripts/architecture_table.py"
    if outcome.status != table.REFUSED:
        check_that_no_own_mixing_of_tokens_is_packed(name, model)
        check_that_sites_are_the_attention_and_the_mlp(name, model)


def check_that_no_own_mixing_of_tokens_is_packed(name, model):
    mixing = [mixes_tokens(block) for block in reference.parts(model).blocks[families.BOUNDARY :]]
    if any(mixing):
        assert STATUSES[name] != "packed"


def check_that_sites_are_the_attention_and_the_mlp(name, model):
    """The last check of a model: it sets weights to zero."""
    sites: list[nn.Module] = []
    outputs: list[torch.Tensor] = []
    refused: list[tuple[nn.Module, str, str]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    for block in reference.parts(model).blocks:
        for site in ("attention", "mlp"):
            try:
                sites.append(find_site(block, site))
            except UnsupportedModelError as error:
                refused.append((block, site, str(error)))
            else:
                sites[-1].register_forward_hook(keep)
    for block, site, reason in refused:
        assert any(words in reason for words in (f"is its {site}; it has ", "residual", "adds up"))
        assert "it has" not in reason or all(child in reason for child, _ in block.named_children())
    ids = torch.arange(3, 8)[None]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        assert len(outputs) == len(sites)
        for output in outputs:
            assert output.shape[-1] == families.WIDTH
            assert output.numel() == ids.numel() * families.WIDTH
            assert output.abs().max() > 0
        # Without weights a part writes nothing; what is left would be the residual stream.
        outputs.clear()
        for module in sites:
            for parameter in module.parameters():
                parameter.zero_()
        model(input_ids=ids, use_cache=False)
        assert max((float(output.abs().max()) for output in outputs), default=0.0) == 0
    if name in ("bloom", "mamba", "mamba2"):
        assert not sites
    elif name in REQUIRED and name not in ("jamba", "lfm2", "nemotron_h"):
        assert not refused


def test_the_table_has_what_it_must():
    assert [name for name in REQUIRED if STATUSES.get(name) in (None, table.REFUSED)] == []
    assert [name for name in READ_MORE if STATUSES.get(name) != table.REFUSED] == []
    types = {families.model_type_of(name) for name, status in STATUSES.items() if status != table.REFUSED}
    assert len(types) >= 40
    text = table.PAGE.read_text()
    for status in (*table.STATUS.values(), table.REFUSED):
        count = list(STATUSES.values()).count(status)
        assert not count or f"{count} {status}" in text


@pytest.mark.parametrize("name", [name for name in REQUIRED if name in families.NAMES])
def test_strict_replay_is_exact_in_bfloat16_too(name):
    model = families.build(name).to(torch.bfloat16)
    if name in ("mamba", "mamba2"):
        with pytest.raises(
            UnsupportedModelError, match=r"residual stream is torch\.float32, its weights are torch\.bf"
        ):
            LateStack.load(model, families.BOUNDARY)
        return
    late = LateStack.load(model, families.BOUNDARY)
    rows, offsets, expected = table.hooked(model, table.LENGTHS)
    assert torch.equal(late.run(rows, offsets, strict=True), expected)
    assert table.STATUS[late.mode] == STATUSES[name]


@pytest.mark.parametrize("name", [name for name in REQUIRED if name in REPLAYED])
def test_all_blocks_are_replayed_from_what_the_embeddings_give(name):
    model = built(name)
    ids = torch.randint(3, 60, (1, 11), generator=torch.Generator().manual_seed(0))
    rows, expected = forward_and_gather(Backbone(model), ids, [0, 11], [("state", 0)], torch.arange(11))
    late = LateStack.load(model, 0)
    assert torch.equal(late.run(rows["state", 0], [0, 11], strict=True)[0], expected[-1])
    twice = late.run(torch.cat([rows["state", 0]] * 2), [0, 11, 22])
    assert (twice - expected[-1]).abs().max() <= 1e-4 * expected.abs().max()
    later = late.at(families.BOUNDARY)
    found, _ = forward_and_gather(Backbone(model), ids, [0, 11], [("state", families.BOUNDARY)], torch.arange(11))
    assert torch.equal(later.run(found["state", families.BOUNDARY], [0, 11], strict=True)[0], expected[-1])


@pytest.mark.parametrize("name", READ_MORE)
def test_late_blocks_that_read_more_than_the_state_are_found_out(name):
    if name not in families.NAMES:
        pytest.skip("not in this transformers")
    model = families.build(name)
    cut = shallow_clone(model, find_anatomy(model).blocks)
    source = cut_upstream(cut, families.BOUNDARY)
    with pytest.raises(UnsupportedModelError, match=READ_MORE[name]):
        probe_late_blocks(cut, families.BOUNDARY, source)


@pytest.mark.usefixtures("three_workers")
@pytest.mark.parametrize("name", marked(REPLAYED, lambda name: name not in REQUIRED))
def test_several_packs_at_once_are_what_they_are_one_by_one(name):
    model = built(name)
    late = LateStack.load(model, families.BOUNDARY)
    rows, offsets, expected = table.hooked(model, (*table.LENGTHS, 5))
    allowed = 1e-4 * float(expected.abs().max())
    max_tokens = max(table.LENGTHS)  # three packs
    first = late.run(rows, offsets, max_tokens=max_tokens)
    assert (first - expected).abs().max() <= allowed
    for _ in range(3):  # a race would show one time or another
        assert torch.equal(late.run(rows, offsets, max_tokens=max_tokens), first)
    assert torch.equal(late.run(rows, offsets, strict=True), expected)


class ShiftsTokens(nn.Module):
    """An MLP that also reads the token before, as convolutions and token shifts do."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], dim=1)
        return self.mlp(hidden + before)


class IgnoresBounds(nn.Module):
    """Stands for attention: every position reads the mean of all positions up to it, over the whole batch row."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        counts = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states.cumsum(dim=1) / counts, None


class ReadsAhead(IgnoresBounds):
    """Every position reads all others."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return hidden_states.mean(dim=1, keepdim=True).expand_as(hidden_states), None


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize(
    ("part", "put", "mode"),
    [
        ("mlp", ShiftsTokens, "padded"),
        ("self_attn", lambda _: IgnoresBounds(), "padded"),
        ("self_attn", lambda _: ReadsAhead(), "single"),
    ],
    ids=["shifts tokens", "ignores bounds", "reads ahead"],
)
def test_a_leak_between_neighbours_is_found_at_load(part, put, mode, block):
    model = families.build("llama")
    assert LateStack.load(model, 2).mode == "packed"
    layer = reference.parts(model).blocks[block]
    setattr(layer, part, put(getattr(layer, part)))
    late = LateStack.load(model, 2)
    assert late.mode == mode
    assert late.not_packable
    rows, offsets, expected = table.hooked(model, table.LENGTHS)
    assert torch.equal(late.run(rows, offsets, strict=True), expected)
    torch.testing.assert_close(late.run(rows, offsets), expected, rtol=1e-4, atol=1e-4)


def test_mixing_of_tokens_is_named():
    def of(name):
        return [mixes_tokens(block) for block in reference.parts(families.build(name)).blocks]

    assert of("llama") == [None] * families.N_BLOCKS
    assert of("lfm2") == ["conv.conv", None] * 2
    assert of("minimax_m3_vl_text") == [None, "self_attn.indexer"] * 2
    assert of("deepseek_v32") == ["self_attn.indexer"] * families.N_BLOCKS


def test_a_head_that_is_more_than_a_product_has_no_readout():
    with pytest.raises(UnsupportedModelError, match="DoryLMHead is more than a matrix product"):
        Readout(families.build("dory"))
    with pytest.raises(UnsupportedModelError, match="no logits from a final state alone"):
        Readout(families.build("gemma4_assistant"))


@pytest.mark.parametrize("name", [name for name in FROM_FOLDER if name in families.NAMES])
def test_a_late_stack_from_a_folder_is_the_one_from_memory(name, tmp_path):
    """Among them families whose files name or cut the weights otherwise, and one that fills buffers after loading."""
    model = families.build(name)
    model.save_pretrained(tmp_path)
    rows, offsets, expected = table.hooked(model, table.LENGTHS)
    late = LateStack.load(tmp_path, families.BOUNDARY)
    assert table.STATUS[late.mode] == STATUSES[name]
    torch.testing.assert_close(late.run(rows, offsets, strict=True), expected, rtol=1e-5, atol=1e-5)


def test_a_model_in_memory_is_not_changed_by_a_cut():
    """Also where the embeddings lie deeper than the blocks."""
    model = families.build("megatron-bert", tie=False)
    before = {name: id(module) for name, module in model.named_modules()}
    LateStack.load(model, families.BOUNDARY)
    assert {name: id(module) for name, module in model.named_modules()} == before
