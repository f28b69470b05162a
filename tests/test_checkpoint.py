"""Checkpoints: what is loaded is what is fingerprinted, and a folder that is not what it has to be is named."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from actcache.errors import ActcacheError, InputError, NotFiniteError
from actcache.models.checkpoint import Checkpoint
from actcache.replay.late_stack import LateStack

BOUNDARY = 3
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("pristine"), "llama")


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def bars():
    """transformers' switch for bars, put back afterwards."""
    was = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    yield logging
    (logging.enable_progress_bar if was[0] else logging.disable_progress_bar)()
    (disable_progress_bars if was[1] else enable_progress_bars)()


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("of_hub", [True, False])
def test_a_load_draws_no_bar_and_leaves_the_switch(folder, bars, capfd, shown, of_hub):
    """Both from one thread and from two at once."""
    (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
    (enable_progress_bars if of_hub else disable_progress_bars)()
    with ThreadPoolExecutor(2) as pool:
        for late in pool.map(lambda _: LateStack.load(folder, BOUNDARY), range(4)):
            assert late.boundary == BOUNDARY
            assert "Loading" not in capfd.readouterr().err
    Checkpoint.open("it", folder).load(torch.float32)
    assert capfd.readouterr().err == ""
    assert (bars.is_progress_bar_enabled(), not are_progress_bars_disabled()) == (shown, of_hub)


def test_a_load_that_fails_leaves_the_switch(folder, bars):
    bars.enable_progress_bar()
    change_tensors(lambda tensors: tensors.pop("model.norm.weight"))(folder)
    with pytest.raises(InputError, match="parameters of the model have no weights"):
        Checkpoint.open("it", folder).load(torch.float32)
    assert bars.is_progress_bar_enabled()


def change_json(name: str, **entries: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(content | entries))

    return change


def config(**entries: Any) -> Change:
    return change_json("config.json", **entries)


def write(name: str, data: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(data)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return rewrite


def cut(folder: Path, n_bytes: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:n_bytes])


def shard(folder: Path, *names: Any, metadata: bool = True) -> None:
    """The weights under other names, with an index that gives each tensor to the next of these."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    of_tensor = {name: names[number % len(names)] for number, name in enumerate(sorted(tensors))}
    for file in {name for name in names if isinstance(name, str) and "/" not in name}:
        save_file({name: tensors[name] for name in tensors if of_tensor[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of_tensor}))


def use(folder: Path) -> None:
    """All that a capture does with a folder, and a replay."""
    checkpoint = Checkpoint.open("it", folder)
    assert checkpoint.fingerprint
    checkpoint.load(torch.float32)
    LateStack.load(folder, BOUNDARY)


# ---- folders that are refused, in one line -------------------------------------------------------------------------

QKV = "model.layers.4.self_attn.q_proj"
BROKEN: dict[str, tuple[Change, str]] = {
    "cut short": (lambda folder: cut(folder, -1000), "no whole safetensors file"),
    "cut within its header": (lambda folder: cut(folder, 100), "no whole safetensors file"),
    "empty": (write(WEIGHTS, b""), "no whole safetensors file"),
    "huge header": (write(WEIGHTS, struct.pack("<Q", 2**60)), "no whole safetensors file"),
    "a text": (write(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "no whole safetensors"),
    "other shapes": (config(intermediate_size=128), "have no weights in the files"),
    "other width": (config(hidden_size=64), "have no weights in the files"),
    "config a number": (write("config.json", b"5"), "holds a JSON int, expected an object"),
    "config no text": (write("config.json", b"\xff\xfe{"), "is not JSON"),
    "config nested": (write("config.json", b"[" * 10**5), "is not JSON"),
    "config without type": (config(model_type=None), "names no model_type"),
    "config of no model": (config(model_type="evil"), "evil"),
    "config of no language model": (config(model_type="vit"), "no causal language model"),
    "hidden_size a text": (config(hidden_size="32"), "config.json"),
    "no blocks": (config(num_hidden_layers=None), "config.json"),
    "heads 0": (config(num_attention_heads=0), "config.json"),
    "unknown activation": (config(hidden_act="evil"), "describes no llama model"),
    "unknown dtype": (config(dtype="evil"), "evil"),
    "unknown rope": (config(rope_parameters={"rope_type": "evil", "rope_theta": 1.0}), "evil"),
    "end a text": (config(eos_token_id="abc"), "abc"),
    "end a fraction": (change_json("generation_config.json", eos_token_id=[0, 1.5]), "expected token ids"),
    "generation config a list": (write("generation_config.json", b"[]"), "holds a JSON list"),
    "tokenizer a list": (write("tokenizer.json", b"[]"), "no tokenizer in"),
    "tokenizer empty": (write("tokenizer.json", b""), "no tokenizer in"),
    "tokenizer config a list": (write("tokenizer_config.json", b"[]"), "holds a JSON list"),
    "broken index": (write(INDEX, b"{"), "is not JSON"),
    "index without map": (write(INDEX, b"{}"), "has no weight_map"),
    "index with an empty map": (write(INDEX, b'{"weight_map": {}}'), "has no weight_map"),
    "index beside other weights": (write(INDEX, b'{"weight_map": {"a": "x.safetensors"}}'), "holds both"),
    "missing shard": (
        lambda folder: (shard(folder, "a.safetensors", "b.safetensors"), (folder / "b.safetensors").unlink()),
        "b.safetensors, which is not there",
    ),
    "a tensor twice": (
        lambda folder: (
            shard(folder, "a.safetensors", "b.safetensors"),
            save_file(load_file(folder / "a.safetensors"), folder / "b.safetensors"),
        ),
        "which another file of the folder holds too",
    ),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantized (gptq)"),
    "bitsandbytes": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "quantized (bitsandbytes, 4 bits)",
    ),
    "quantized part": (
        config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        "(fp8): what they",
    ),
    "mlx": (config(quantization={"bits": 4, "group_size": 64}), "quantization says"),
    "gguf": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model.gguf"),
        "holds GGUF weights only (model.gguf)",
    ),
    "weights of another name": (
        lambda folder: (folder / WEIGHTS).rename(folder / "consolidated.safetensors"),
        "holds weights of another name (consolidated.safetensors)",
    ),
    "adapter beside weights": (
        write("adapter_config.json", b"{}"),
        "holds a model and an adapter (adapter_config.json)",
    ),
    "adapter alone": (
        lambda folder: (
            (folder / "config.json").unlink(),
            (folder / WEIGHTS).rename(folder / "adapter_model.safetensors"),
        ),
        "is an adapter alone (adapter_model.safetensors); give BASE+ADAPTER",
    ),
    "scales": (
        change_tensors(lambda t: t.update({f"{QKV}.weight_scale": torch.ones(1)})),
        f"1 tensors of the files are not read by LlamaForCausalLM: {QKV}.weight_scale",
    ),
    "a bias that is not read": (
        change_tensors(lambda t: t.update({f"{QKV}.bias": torch.ones(32)})),
        f"are not read by LlamaForCausalLM: {QKV}.bias",
    ),
    "LoRA within": (
        change_tensors(lambda t: t.update({f"{QKV}.lora_A.weight": torch.ones(2, 32)})),
        "are not read by LlamaForCausalLM",
    ),
    "a block too many": (config(num_hidden_layers=4), "are not read by LlamaForCausalLM: model.layers.4."),
    "a value head": (change_tensors(lambda t: t.update({"v_head.weight": torch.ones(1, 32)})), "v_head.weight"),
    "float8": (
        change_tensors(lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].to(torch.float8_e4m3fn)})),
        "is stored as F8_E4M3",
    ),
    "int8": (
        change_tensors(lambda t: t.update({f"{QKV}.weight": t[f"{QKV}.weight"].to(torch.int8)})),
        "is stored as I8",
    ),
    **{
        f"whole numbers as {dtype}": (
            change_tensors(lambda t, dtype=dtype: t.update({f"{QKV}.weight": (t[f"{QKV}.weight"] * 100).to(dtype)})),
            f"{QKV}.weight is stored as {stored}, which is a weight only together with its scale",
        )
        for dtype, stored in (
            *((torch.int32, "I32"), (torch.int64, "I64")),
            *((torch.uint8, "U8"), (torch.bool, "BOOL")),
        )
    },
    "other config files": (config(configuration_files=["config.5.0.0.json"]), "configuration_files names other"),
    "other weight files": (config(transformers_weights="../other.safetensors"), "transformers_weights names other"),
    "other tokenizer files": (
        change_json("tokenizer_config.json", fast_tokenizer_files=["../tokenizer.5.0.0.json"]),
        "fast_tokenizer_files",
    ),
    "kernel": (config(attn_implementation="someone/kernel"), "attn_implementation is 'someone/kernel'"),
    "kernel as saved": (config(_attn_implementation="someone/kernel"), "_attn_implementation is 'someone/kernel'"),
    "kernel of a part": (config(attn_implementation={"": "sdpa", "x": "a/b"}), "attn_implementation is 'a/b'"),
    "kernel of experts": (config(experts_implementation="a/b"), "experts_implementation is 'a/b'"),
    "code of a part": (config(vision_config={"auto_map": {"AutoModel": "evil.M"}}), "asks for code of its own"),
    "tokenizer a processor": (change_json("tokenizer_config.json", tokenizer_class="AutoProcessor"), "'AutoProcessor'"),
    "tokenizer a pipeline": (config(tokenizer_class="pipeline"), "'pipeline' is no tokenizer"),
    "tokenizer a number": (change_json("tokenizer_config.json", tokenizer_class=5), "5 is no tokenizer"),
    "index out of the folder": (lambda folder: shard(folder, "../../other.safetensors"), "expected *.safetensors"),
    "index of a device": (lambda folder: shard(folder, "/dev/zero"), "expected *.safetensors files beside it"),
    "index of numbers": (lambda folder: shard(folder, 5), "expected *.safetensors files beside it"),
    "index of a pipe": (
        lambda folder: (
            shard(folder, "/dev/x"),
            os.mkfifo(folder / "a.safetensors"),
            index_of(folder, "a.safetensors"),
        ),
        "is not a regular file",
    ),
    "index of a link to a device": (
        lambda folder: (
            shard(folder, "/dev/x"),
            (folder / "a.safetensors").symlink_to("/dev/zero"),
            index_of(folder, "a.safetensors"),
        ),
        "is not a regular file",
    ),
    "weights a pipe": (lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)), "is not a regular"),
    "generation config a pipe": (lambda folder: replace_by_pipe(folder / "generation_config.json"), "not a regular"),
}


def index_of(folder: Path, name: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))


def replace_by_pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_what_it_has_to_be_is_named(name, folder):
    change, words = BROKEN[name]
    change(folder)
    with pytest.raises(ActcacheError) as caught:
        use(folder)
    assert words in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_model_folder_says_what_it_is(pristine, tmp_path, monkeypatch):
    for path, words in {
        pristine / WEIGHTS: f"give the model folder that it lies in, {pristine}",
        tmp_path / "none": "is not a folder; give a local model folder, or an id",
        Path("someone/model"): "not in the Hub's cache",
    }.items():
        with pytest.raises(InputError, match=r"is not a folder") as caught:
            Checkpoint.open("it", path)
        assert words in str(caught.value)
    shutil.copytree(pristine, tmp_path / "models--a--b/snapshots/0123")
    with pytest.raises(InputError, match="snapshots/0123"):
        Checkpoint.open("it", tmp_path / "models--a--b")


# ---- what is known to be harmless -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.embeddings.position_ids", "mtp.layers.0.weight"]
)
def test_tensors_that_decide_nothing_may_be_unread(name, folder):
    change_tensors(lambda tensors: tensors.update({name: torch.ones(4)}))(folder)
    use(folder)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_and_positions_may_be_whole_numbers(dtype, tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "gpt2")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 8, 8, dtype=dtype) for i in range(6)}
    change_tensors(lambda tensors: tensors.update(masks, **{"transformer.position_ids": torch.arange(8)}))(folder)
    use(folder)


@pytest.mark.parametrize("name", ["model.layers.4.mlp.down_proj.weight", "model.norm.weight"])
def test_a_folder_whose_late_blocks_give_no_numbers_is_named(name, folder):
    change_tensors(lambda tensors: tensors[name].fill_(torch.nan))(folder)
    with pytest.raises(NotFiniteError, match=f"checkpoint late, {folder}: LlamaForCausalLM: its late blocks") as caught:
        use(folder)
    assert ("block 4 is the first whose output is not" in str(caught.value)) == ("layers.4" in name)


def test_links_of_the_hubs_cache_are_followed(folder, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.move(folder, blobs)
    snapshot.mkdir()
    for number, file in enumerate(sorted(blobs.iterdir())):
        (snapshot / file.name).symlink_to(file.rename(blobs / str(number)))
    use(snapshot)


def test_shards_are_the_whole(folder, pristine):
    shard(folder, "a.safetensors", "b.safetensors")
    whole = Checkpoint.open("it", pristine).load(torch.float32).state_dict()
    found = Checkpoint.open("it", folder).load(torch.float32).state_dict()
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", None])
def test_a_late_stack_takes_the_dtype_that_its_folder_asks_for(dtype, folder):
    config(dtype=dtype)(folder)
    assert LateStack.load(folder, BOUNDARY).dtype == (getattr(torch, dtype) if dtype else torch.float32)


def test_a_head_of_its_own_beside_a_config_that_ties_it(tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "llama", tie=False)
    stored = load_file(folder / WEIGHTS)
    config(tie_word_embeddings=True)(folder)
    model = Checkpoint.open("it", folder).load(torch.float32)
    assert torch.equal(model.get_output_embeddings().weight, stored["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, stored["model.embed_tokens.weight"])
    late = LateStack.load(folder, BOUNDARY)
    assert torch.equal(late._forwards.model.get_output_embeddings().weight, stored["lm_head.weight"])


# ---- no code, no network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["AutoProcessor", "AutoModelForImageClassification", "AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_no_code_of_a_folder_runs_nor_is_a_person_asked(file, name, folder, monkeypatch):
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass M: pass\n")
    for which in ("config.json", file):
        change_json(which, auto_map={name: ["evil.M", "evil.M"] if name == "AutoTokenizer" else "evil.M"})(folder)
    change_json("tokenizer_config.json", tokenizer_class=name)(folder)
    asked: list[Any] = []

    def answer(*args: Any) -> str:
        asked.append(args)
        return "y"

    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(InputError):
        use(folder)
    assert not asked
    assert not mark.exists()


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file", "gguf_file", "special_tokens_map_file"])
def test_a_tokenizer_is_made_of_its_folders_files_only(key, folder, pristine, tmp_path):
    other = json.loads((folder / "tokenizer.json").read_text())
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    change_json("tokenizer_config.json", **{key: str(tmp_path / "other.json")})(folder)
    found, own = Checkpoint.open("it", folder), Checkpoint.open("it", pristine)
    assert found.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    assert found.fingerprint.tokenizer == own.fingerprint.tokenizer


# ---- the fingerprint ------------------------------------------------------------------------------------------------

DECIDES: dict[str, tuple[Change, str]] = {
    "weights": (change_tensors(lambda tensors: tensors["model.norm.weight"].mul_(2)), "weights"),
    "config": (config(rms_norm_eps=0.1), "config"),
    "attention": (config(attn_implementation="eager"), "config"),
    "ends of the generation config": (change_json("generation_config.json", eos_token_id=[0, 7]), "end_ids"),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace('"add_prefix_space": false', '"add_prefix_space": true')
        ),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("name", DECIDES)
def test_the_fingerprint_is_of_what_decides(name, folder):
    change, field = DECIDES[name]
    opened = Checkpoint.open("it", folder)
    before = opened.fingerprint
    assert Checkpoint.open("it", folder).fingerprint == before
    change(folder)
    after = Checkpoint.open("it", folder).fingerprint
    assert getattr(after, field) != getattr(before, field)
    assert opened.fingerprint == after, "a checkpoint that is open notices"
    assert before.differs_in(after) in (field, "config")
    with pytest.raises(InputError, match="have changed since they were opened"):
        opened.load(torch.float32)


@pytest.mark.parametrize("asked", [None, "eager", "sdpa"])
def test_the_attention_of_the_fingerprint_is_the_loaded_models(asked, folder):
    config(attn_implementation=asked)(folder)
    opened = Checkpoint.open("it", folder)
    assert opened.load(torch.float32).config._attn_implementation == opened.fingerprint.attention
    late = LateStack.load(folder, BOUNDARY)._forwards
    assert late.model.config._attn_implementation == opened.fingerprint.attention


def test_what_does_not_decide_is_not_in_the_fingerprint(folder):
    opened = Checkpoint.open("it", folder)
    before = opened.fingerprint
    os.utime(folder / WEIGHTS)
    config(_name_or_path="elsewhere", transformers_version="9")(folder)
    assert opened.fingerprint == before == Checkpoint.open("it", folder).fingerprint


def test_a_fingerprint_of_an_earlier_version_has_no_ends(folder):
    opened = Checkpoint.open("it", folder)
    earlier = replace(opened.fingerprint, end_ids=None)
    assert earlier.differs_in(opened.fingerprint) is None
    assert replace(earlier, weights="0" * 64).differs_in(opened.fingerprint) == "weights"


def test_the_digest_of_a_tokenizer_does_not_change_by_use(folder):
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 6, "strategy": "LongestFirst", "stride": 0}
    file.write_text(json.dumps(content))
    used = Checkpoint.open("it", folder)
    used.tokenizer(["a text of more than six tokens", "b"], padding=True, truncation=True, max_length=3)
    assert used.fingerprint == Checkpoint.open("it", folder).fingerprint


@pytest.mark.parametrize(
    ("generation", "of_config", "expected"),
    [
        (None, 0, {0}),
        (0, 5, {0}),
        ([0], 5, {0}),
        ([7, 0], 5, {0, 7}),
        (None, [3, 0], {0, 3}),
        ([], 5, set()),
        (None, None, {tiny.EOS_ID}),
    ],
)
def test_zero_ends_a_generation_like_any_other_id(generation, of_config, expected, folder):
    config(eos_token_id=of_config)(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert Checkpoint.open("it", folder).end_ids == expected
