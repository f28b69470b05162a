"""Text towers: models for images and text, given text alone, against the whole model's own forward."""

import json
import re
from pathlib import Path
from typing import Any

import families
import peft
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from twins import reference

from actcache.cli import main
from actcache.errors import InputError, UnsupportedModelError
from actcache.models.backbone import Backbone
from actcache.models.checkpoint import Checkpoint
from actcache.models.probe import check_reads_back, check_text_alone
from actcache.models.streamed import Streamed
from actcache.models.text_tower import placeholders, text_tower
from actcache.replay.late_stack import LateStack

TOWERS = ("aya_vision", "glm4v", "idefics3", "internvl", "llava", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
IDS = [3, 17, 5, 40, 9, 3, 22, 51, 8]
IMAGE = 57


def write(folder: Path, name: str, seed: int = 0) -> Path:
    """A tiny whole model, vision and all, whose decoder knows the tiny tokenizer's ids."""
    model = families.build(name, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    model.resize_token_embeddings(tiny.VOCAB_SIZE, mean_resizing=False)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.weight.data.copy_(torch.randn(part.weight.shape, generator=generator) / families.WIDTH**0.5)
    for config in (model.config, model.config.get_text_config()):
        config.eos_token_id, config.pad_token_id, config.bos_token_id = tiny.EOS_ID, tiny.PAD_ID, None
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


def streamed(checkpoint: Checkpoint, ids: list[int]) -> torch.Tensor:
    """The last block's output [T, D], with one block in memory at a time."""
    model = Streamed(checkpoint, torch.float32)
    state = torch.tensor(ids)
    for _ in model.pass_over():
        state = model.forward([0, len(ids)], state)
    return state


def test_an_adapter_of_the_whole_model_changes_the_tower_as_it_changes_the_whole(tmp_path):
    """peft finds its targets by their names, also among what reads images."""
    base = write(tmp_path / "base", "llava")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(reference.load(base, torch.float32), config)
    adapted.save_pretrained(tmp_path / "adapter")
    assert any("vision_tower" in name for name, _ in adapted.named_parameters() if "lora" in name)
    model = Checkpoint.open("it", f"{base}+{tmp_path / 'adapter'}").load(torch.float32)
    with torch.no_grad():
        expected, plain = (
            one(input_ids=torch.tensor([IDS])).logits for one in (adapted, reference.load(base, torch.float32))
        )
        found = model(input_ids=torch.tensor([IDS])).logits
    assert (found - expected).abs().max() < 1e-4 < (found - plain).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_the_whole_model_given_text_alone(name, tmp_path):
    families.build(name).save_pretrained(tmp_path)
    whole = reference.load(tmp_path, torch.float32)
    checkpoint = Checkpoint.open("it", tmp_path)
    model = checkpoint.load(torch.float32)
    check_text_alone(model)
    check_reads_back(model)
    # No parameter of what reads images, and all others.
    kept = dict(model.named_parameters())
    text = {key: value for key, value in whole.named_parameters() if key in kept}
    assert kept.keys() == text.keys() < dict(whole.named_parameters()).keys()
    assert not any("vis" in key for key in kept)
    assert all(torch.equal(value, text[key]) for key, value in kept.items())
    backbone = Backbone(model)
    final = backbone.forward([0, len(IDS)], input_ids=torch.tensor([IDS]))
    assert torch.equal(final, reference.final_hidden(whole, IDS))
    if backbone.why_not_packable() is None:
        pair = backbone.forward([0, 4, 4 + len(IDS)], input_ids=torch.tensor([[9, 8, 7, 6, *IDS]]))
        torch.testing.assert_close(pair[4:], final, rtol=1e-4, atol=1e-4)
    ids, logits = backbone.readout.top2(final[-1:])
    own = reference.forward(whole, IDS)[-1]
    assert own.argmax() == ids[0, 0]
    torch.testing.assert_close(logits[0], own[ids[0]], rtol=1e-4, atol=1e-4)
    assert torch.equal(streamed(checkpoint, IDS), final)
    late = LateStack.load(tmp_path, 2)
    states = reference.states(whole, IDS, 2)
    assert torch.equal(late.run(states, [0, len(IDS)], strict=True)[0], final[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idefics3", "qwen2_vl"])
def test_a_run_of_a_tower_scores_as_hooks_on_the_whole_model_do(name, tmp_path):
    pt, it = (write(tmp_path / label, name, seed) for label, seed in (("pt", 0), ("it", 1)))
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 4)
    words = ["run", "--pt", pt, "--it", it, "--prompts", prompts, "--out", tmp_path / "run", "--stability", "0"]
    assert main([str(word) for word in [*words, "--max-new", "8", "--strict"]]) == 0
    models = {label: reference.load(folder, torch.float32) for label, folder in (("pt", pt), ("it", it))}
    from actcache import open_store

    store = open_store(tmp_path / "run")
    cells = pq.read_table(tmp_path / "run" / "cells.parquet").to_pylist()
    cells = [cell for cell in cells if cell["readout"] == "native"]
    assert len(cells) == 4 * len(store) > 0
    tokens, offsets = store.token_ids()
    each = tokens.tensor_split(offsets[1:-1])
    sequences = dict(zip(store.events["event_id"].to_pylist(), each, strict=True))
    for cell in cells:
        ids = [int(token) for token in sequences[cell["event_id"]][: cell["position"] + 1]]
        state = reference.states(models[cell["upstream"]], ids, cell["boundary"])
        final = reference.overwritten(models[cell["late"]], ids, cell["boundary"], state)[-1]
        logits = reference.readout(models[cell["late"]], final)
        assert logits[cell["y_it"]] - logits[cell["y_pt"]] == pytest.approx(cell["margin"], abs=1e-4)


def test_a_prompt_with_an_image_is_refused(tmp_path, capsys):
    folder = write(tmp_path / "model", "llava")
    file = folder / "config.json"
    image = Checkpoint.open("it", folder).tokenizer("sea")["input_ids"][-1]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_token_index": image, "image_token_id": image}))
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"id": "a", "prompt": "The sea"}) + "\n")
    words = [
        "capture",
        "--pt",
        folder,
        "--it",
        folder,
        "--prompts",
        tmp_path / "prompts.jsonl",
        "--out",
        tmp_path / "R",
    ]
    assert main([str(word) for word in words]) == 2
    assert re.search(r"'.+' \(\d+\), image_token_i\w+ of the config: prompts are text alone", capsys.readouterr().err)


def test_placeholders_are_those_of_the_config():
    assert placeholders(families.build("llama").config) == {}
    config: Any = families.build("qwen2_vl").config
    assert placeholders(config) == {
        config.image_token_id: "image_token_id",
        config.video_token_id: "video_token_id",
    }


def test_a_model_that_reads_both_ways_is_refused(tmp_path):
    model = families.build("paligemma")
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"checkpoint it, .*reads prompts both ways"):
        _ = Checkpoint.open("it", tmp_path).model_class
    with pytest.raises(UnsupportedModelError, match="depends on the tokens after it"):
        check_reads_back(model)
    model.config.get_text_config().use_bidirectional_attention = False
    with pytest.raises(UnsupportedModelError, match="hands its blocks another position"):
        check_text_alone(model)


def test_a_model_that_does_more_to_text_is_refused():
    model = families.build("llava")
    check_text_alone(model)
    embed = model.model.forward

    def shifted(input_ids, **kwargs):
        return embed(input_ids=input_ids.flip(1), **kwargs)

    model.model.forward = shifted
    with pytest.raises(UnsupportedModelError, match="another state than its decoder does"):
        check_text_alone(model)


def test_the_class_of_a_tower_is_made_once():
    whole = type(families.build("llava"))
    assert text_tower(whole) is text_tower(whole)
    assert text_tower(whole).__name__ == whole.__name__


def test_a_model_of_neither_map_is_named(tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "llama")
    file = folder / "config.json"
    file.write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises((InputError, UnsupportedModelError), match="'vit' has no causal language model"):
        _ = Checkpoint.open("it", folder).model_class
