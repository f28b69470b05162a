"""Adapters: merged as peft merges them into models whole and in parts, or refused by name."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from adapted import KINDS, config_of, make_adapter, plain_model
from conftest import first_quick
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from actcache.cli import main
from actcache.errors import InputError
from actcache.models.checkpoint import Checkpoint
from actcache.models.parts import Frame
from actcache.replay.late_stack import LateStack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.arange(2, 22)[None]
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """``made(kind, arch)``: a base and an adapter on it, each made once."""
    place = tmp_path_factory.mktemp("adapters")
    bases: dict[str, Path] = {}

    def make(kind: str = "lora", arch: str = "llama") -> tuple[Path, Path]:
        base = bases.get(arch) or bases.setdefault(arch, tiny.make_checkpoint(place / arch, arch))
        adapter = place / f"{arch} {kind}"
        return base, adapter if adapter.exists() else make_adapter(adapter, base, config_of(kind, arch))

    return make


@pytest.fixture
def adapter(made, tmp_path) -> Path:
    """A LoRA of one's own."""
    return shutil.copytree(made()[1], tmp_path / "adapter")


def of_peft(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The base under the adapter, as peft runs it."""
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(plain_model(base, dtype), str(adapter)).eval()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: own.detach() for name, own in model.named_parameters(remove_duplicate=False)}


def states_of(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        found = model(IDS, output_hidden_states=True)
    return [*found.hidden_states, found.logits]


def both(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that is loaded, and the weights of peft's own merge."""
    merged = of_peft(base, adapter, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Checkpoint.open("it", f"{base}+{adapter}").load(dtype), weights_of(merged.merge_and_unload())


# ---- the same as peft ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(made) -> Callable[[str], tuple[Checkpoint, dict[str, torch.Tensor], list[torch.Tensor]]]:
    """``merged(kind)``: the base and such an adapter, copies of what is loaded, and what that computes; made once."""

    @functools.cache
    def load(kind: str) -> tuple[Checkpoint, dict[str, torch.Tensor], list[torch.Tensor]]:
        base, adapter = made(kind)
        checkpoint = Checkpoint.open("it", f"{base}+{adapter}")
        model = checkpoint.load(torch.float32)
        return checkpoint, {name: own.clone() for name, own in weights_of(model).items()}, states_of(model)

    return load


@pytest.mark.parametrize("kind", first_quick(KINDS))
def test_an_adapter_is_merged_as_by_peft(kind, made, merged):
    base, adapter = made(kind)
    _, found, ours_of = merged(kind)
    of = of_peft(base, adapter)
    theirs_of = states_of(of)
    expected, before = weights_of(of.merge_and_unload()), weights_of(plain_model(base))
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert any(not torch.equal(found[name], before[name]) for name in found)
    for ours, theirs in zip(ours_of, theirs_of, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_in_bfloat16(kind, made):
    model, expected = both(*made(kind), torch.bfloat16)
    assert all(torch.equal(own, expected[name]) for name, own in weights_of(model).items())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
@pytest.mark.parametrize("kind", ["lora", "whole modules", "biases"])
def test_other_architectures(arch, kind, made):
    model, expected = both(*made(kind, arch))
    assert all(torch.equal(own, expected[name]) for name, own in weights_of(model).items())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_an_adapter_of_a_tied_embedding_changes_the_embedding_alone(arch, made):
    """As peft's own forward has it; its merge would change the head, too."""
    base, adapter = made("embedding", arch)
    model = Checkpoint.open("it", f"{base}+{adapter}").load(torch.float32)
    head, before = (one.get_output_embeddings().weight for one in (model, plain_model(base)))
    assert torch.equal(head, before)
    for ours, theirs in zip(states_of(model), states_of(of_peft(base, adapter)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize("kind", first_quick(KINDS))
def test_late_stacks_and_single_blocks_get_the_same(kind, merged):
    """Also where all that the adapter changes lies upstream. Of blocks, some kinds change the first, the third or the
    last alone."""
    checkpoint, whole, _ = merged(kind)
    for boundary in (1, 3):
        late = LateStack.load(checkpoint, boundary, dtype=torch.float32)
        found = weights_of(late._forwards.model)
        assert len(found) > 5
        assert all(torch.equal(own, whole[name]) for name, own in found.items() if name in whole)
    frame = Frame.load(checkpoint, torch.float32)
    for name, own in weights_of(frame.model).items():
        assert torch.equal(own, whole[name])
    for index in (0, 3, tiny.N_BLOCKS - 1):
        for name, own in weights_of(frame.load_block(index)).items():
            assert torch.equal(own, whole[f"{frame.path}.{index}.{name}"])


def test_a_late_stack_of_base_and_adapter_by_its_name(made):
    base, adapter = made()
    late = LateStack.load(f"{base}+{adapter}", 3)
    whole = weights_of(Checkpoint.open("it", f"{base}+{adapter}").load(torch.float32))
    assert all(torch.equal(own, whole[name]) for name, own in weights_of(late._forwards.model).items() if name in whole)


def test_the_environment_is_left_alone(made, monkeypatch):
    """peft names a compiler there, for an extension of BOFT's; where that cannot be built, the name stays."""
    from peft.tuners.boft import layer

    def load(*args: Any, **options: Any) -> None:
        raise OSError("no nvcc")

    base, adapter = made("boft")
    monkeypatch.setattr("torch.utils.cpp_extension.load", load)
    monkeypatch.setattr(layer, "_FBD_CUDA", None)
    monkeypatch.setenv("CC", "mine")
    before = dict(os.environ)
    Checkpoint.open("x", f"{base}+{adapter}").load(torch.float32)
    assert dict(os.environ) == before


def test_random_numbers_and_warnings_are_left_alone(made, recwarn):
    base, adapter = made()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Checkpoint.open("it", f"{base}+{adapter}").load(torch.float32)
    assert torch.equal(torch.rand(1), expected)
    assert not [one for one in recwarn if "peft" in str(one.filename)]


# ---- memory ----------------------------------------------------------------------------------------------------------


def shared_names(a: torch.nn.Module, b: torch.nn.Module) -> set[str]:
    first, second = weights_of(a), weights_of(b)
    return {name for name in first if first[name].data_ptr() == second[name].data_ptr()}


@pytest.mark.parametrize("adapter_first", [False, True])
def test_what_the_adapter_leaves_alone_is_shared_with_its_base(adapter_first, made):
    base, adapter = made()
    adapted, plain = Checkpoint.open("it", f"{base}+{adapter}"), Checkpoint.open("pt", base)
    models = [one.load(torch.float32) for one in ([adapted, plain] if adapter_first else [plain, adapted])]
    expected = weights_of(models[0]).keys() - adapted.merge.names
    assert shared_names(*models) == expected
    assert len(expected) > 30
    lates = [LateStack.load(one, 3)._forwards.model for one in (plain, adapted)]
    assert {name for name in shared_names(*lates) if "layers.4" in name} == {n for n in expected if "layers.4" in n}
    before = weights_of(plain_model(base))
    assert all(torch.equal(own, before[name]) for name, own in weights_of(models[adapter_first]).items())


def test_two_loads_of_a_folder_are_two_models(made):
    base, adapter = made()
    plain = Checkpoint.open("pt", base)
    first, second = plain.load(torch.float32), plain.load(torch.float32)
    assert not shared_names(first, second)
    with torch.no_grad():
        second.get_parameter("model.norm.weight").fill_(5)
    adapted = Checkpoint.open("it", f"{base}+{adapter}").load(torch.float32)
    assert torch.equal(adapted.get_parameter("model.norm.weight"), first.get_parameter("model.norm.weight"))
    assert not shared_names(Checkpoint.open("it", f"{base}+{adapter}").load(torch.bfloat16), adapted)


_MEASURE = """
import resource, sys, torch
from actcache.models.checkpoint import Checkpoint
base, adapter = sys.argv[1:]
pt = Checkpoint.open("pt", base)
assert "peft" not in sys.modules
it = Checkpoint.open("it", f"{base}+{adapter}")
assert "peft" in sys.modules
models, peaks = [], []
for checkpoint in (pt, it):
    models.append(checkpoint.load(torch.float32))
    [one.sum() for one in models[-1].parameters()]
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(*peaks, sum(one.nbytes for one in models[0].parameters()))
"""


@pytest.mark.slow
def test_an_adapter_takes_little_memory_beside_its_base(tmp_path):
    """In a process of its own: the peak with both is that of one, and of what the adapter changes. It imports peft only
    where an adapter is given."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8}
    base = tiny.make_checkpoint(tmp_path / "base", "llama", dtype=torch.bfloat16, **sizes)
    adapter = make_adapter(tmp_path / "adapter", base, config_of("some blocks"), n_steps=0)
    shown = subprocess.run([sys.executable, "-c", _MEASURE, base, adapter], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    first, second, size = map(int, shown.stdout.split())
    assert size > 100e6
    assert second - first < 0.35 * size


# ---- the fingerprint -------------------------------------------------------------------------------------------------


def change_config(**entries: Any) -> Change:
    def change(adapter: Path) -> None:
        content = json.loads((adapter / CONFIG).read_text()) | entries
        (adapter / CONFIG).write_text(json.dumps(content))

    return change


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Change:
    def rewrite(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS)

    return rewrite


A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


def test_base_and_adapter_are_both_in_the_fingerprint(made, adapter):
    base, _ = made()
    plain = Checkpoint.open("pt", base).fingerprint
    found = Checkpoint.open("it", f"{base}+{adapter}").fingerprint
    assert plain.adapter is None
    assert "adapter" not in plain.to_json()
    assert replace(found, adapter=None) == plain
    assert plain.differs_in(found) == found.differs_in(plain) == "adapter"


@pytest.mark.parametrize(
    ("change", "decides"),
    [
        (change_tensors(lambda tensors: tensors[A].mul_(2)), True),
        (change_config(lora_alpha=9), True),
        (change_config(base_model_name_or_path="else/where", peft_version="0.1", inference_mode=False), False),
        (change_config(target_modules=["v_proj", "q_proj", "down_proj"]), False),
    ],
)
def test_the_fingerprint_is_of_what_decides(change, decides, made, adapter):
    opened = Checkpoint.open("it", f"{made()[0]}+{adapter}")
    before = opened.fingerprint
    change(adapter)
    assert (opened.fingerprint != before) == decides, "a checkpoint that is open notices"
    with pytest.raises(InputError, match="have changed since they were opened"):
        opened.load(torch.float32)


def test_the_tokenizer_of_an_adapter_is_the_checkpoints(made, adapter):
    base, _ = made()
    tiny.write_tokenizer(adapter)
    plain, adapted = Checkpoint.open("pt", base), Checkpoint.open("it", f"{base}+{adapter}")
    assert adapted.fingerprint.tokenizer == plain.fingerprint.tokenizer
    settings = json.loads((adapter / "tokenizer_config.json").read_text())
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    assert Checkpoint.open("it", f"{base}+{adapter}").tokenizer.chat_template == "{{ messages }}"
    assert plain.tokenizer.chat_template is None


# ---- refused ---------------------------------------------------------------------------------------------------------


def write(name: str, data: bytes) -> Change:
    return lambda adapter: (adapter / name).write_bytes(data)


BROKEN: dict[str, tuple[Change, str]] = {
    "no config": (lambda adapter: (adapter / CONFIG).unlink(), "has no adapter_config.json"),
    "no weights": (lambda adapter: (adapter / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "pickled": (
        lambda adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"),
        "holds pickled weights only (adapter_model.bin), which are never loaded",
    ),
    "cut short": (lambda adapter: write(WEIGHTS, (adapter / WEIGHTS).read_bytes()[:-9])(adapter), "no whole safetens"),
    "config a list": (write(CONFIG, b"[]"), "holds a JSON list"),
    "config no text": (write(CONFIG, b"\xff"), "is not JSON"),
    "no kind": (change_config(peft_type=None), "an adapter of kind None is not merged"),
    "unknown kind": (change_config(peft_type="EVIL"), "an adapter of kind 'EVIL' is not merged, but LORA"),
    "kind a list": (change_config(peft_type=["LORA"]), "an adapter of kind ['LORA'] is not merged"),
    "prompts": (change_config(peft_type="PROMPT_TUNING"), "an adapter of kind 'PROMPT_TUNING' is not merged"),
    "an option of later": (change_config(new_thing=True, peft_version="9.0"), "new_thing is unknown to peft"),
    "more layers": (change_config(layer_replication=[[0, 2], [1, 3]]), "layer_replication makes another architecture"),
    "some positions": (change_config(alora_invocation_tokens=[1]), "alora_invocation_tokens applies"),
    "modules of megatron": (change_config(megatron_config={"a": 1}, megatron_core="evil"), "megatron_config asks"),
    "another start": (change_config(init_lora_weights="pissa"), "init_lora_weights 'pissa' changes the base"),
    "a rank that no memory holds": (change_config(r=10**12), "does not fit"),
    "rank a text": (change_config(r="four"), "does not fit"),
    "rank 0": (change_config(r=0), "does not fit"),
    "rank": (change_config(r=8), "is [4, 64], the base and the adapter's config make it [8, 64]"),
    "a target that the base lacks": (change_config(target_modules=["q_proj", "evil_proj"]), "have no place there"),
    "no target that the base has": (change_config(target_modules=["evil_proj"]), "does not fit"),
    "a broken pattern": (change_config(target_modules="(("), "does not fit"),
    "targets a number": (change_config(target_modules=5), "does not fit"),
    "a tensor too few": (change_tensors(lambda tensors: tensors.pop(A)), "lack 1 tensors of its config"),
    "a tensor too many": (change_tensors(lambda t: t.update(evil=torch.ones(1))), "1 of its tensors have no place"),
    "a block that the base lacks": (
        change_tensors(lambda t: t.update({A.replace("layers.1", "layers.7"): t[A].clone()})),
        "1 of its tensors have no place there: model.layers.7.self_attn.q_proj",
    ),
    "a module to save that is not there": (change_config(modules_to_save=["lm_head"]), "its weights lack"),
    "whole numbers": (change_tensors(lambda t: t.update({A: t[A].to(torch.int32)})), "is stored as I32"),
    "quantized numbers": (change_tensors(lambda t: t.update({A: t[A].to(torch.int8)})), "is stored as I8"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_adapter_that_is_not_what_it_has_to_be_is_named(name, made, adapter):
    change, words = BROKEN[name]
    change(adapter)
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        Checkpoint.open("it", f"{made()[0]}+{adapter}")
    assert str(adapter) in str(caught.value)
    assert str(caught.value).startswith("checkpoint it: ")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_size_names_both_bases(made, tmp_path):
    _, adapter = made()
    other = tiny.make_checkpoint(tmp_path / "other", "llama", hidden_size=48)
    with pytest.raises(InputError, match="does not fit") as caught:
        Checkpoint.open("it", f"{other}+{adapter}")
    assert f"(made for {made()[0]}) does not fit {other}" in str(caught.value)


def test_a_base_that_is_known_to_be_another_is_refused(made, adapter, tmp_path):
    """Where its folder, or the Hub's cache, still has the one that the adapter was made for."""
    base, _ = made()
    other = tiny.make_checkpoint(tmp_path / "other", "llama", seed=5)
    with pytest.raises(InputError, match="which has other weights than") as caught:
        Checkpoint.open("it", f"{other}+{adapter}")
    assert f"is of {base}, which" in str(caught.value)
    assert f"give {base}+{adapter}" in str(caught.value)
    for kind in ({"dtype": torch.bfloat16}, {"vocab_size": tiny.VOCAB_SIZE + 8}):  # in a dtype, or a size, of its own
        another = tiny.make_checkpoint(tmp_path / "-".join(kind), "llama", seed=5, **kind)
        with pytest.raises(InputError, match="which has other weights than"):
            Checkpoint.open("it", f"{another}+{adapter}")
    change_config(base_model_name_or_path="some/model")(adapter)
    assert Checkpoint.open("it", f"{other}+{adapter}").left_undone()[0] == (
        f"adapter {adapter} names some/model as its base; it is merged into {other}, where it fits"
    )


def test_a_base_may_be_moved_and_converted(made, adapter, tmp_path):
    base, _ = made()
    moved = shutil.copytree(base, tmp_path / "moved")
    converted = tmp_path / "converted"
    plain_model(base, torch.bfloat16).save_pretrained(converted)
    tiny.write_tokenizer(converted)
    for folder in (moved, converted):
        assert Checkpoint.open("it", f"{folder}+{adapter}").merge is not None
    odd = ("a--b/c", "/" + "long" * 99, "a/" + "long" * 99, "ä/ö", "/dev", "a/b@c", "a\nb")
    for named in (None, 5, "", "gone/away", "/gone/away", "../..", str(adapter), *odd):
        change_config(base_model_name_or_path=named)(adapter)
        assert Checkpoint.open("it", f"{moved}+{adapter}").merge is not None


def test_nothing_that_an_adapter_names_is_asked_for(made, adapter, monkeypatch):
    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    auto = {"base_model_class": "evil", "parent_library": "evil"}
    change_config(base_model_name_or_path="some/model", revision="main", auto_mapping=auto)(adapter)
    tiny.write_tokenizer(adapter)
    for given in (made()[0], f"{made()[0]}+{adapter}"):
        checkpoint = Checkpoint.open("it", given)
        assert checkpoint.fingerprint
        checkpoint.load(torch.float32)
        LateStack.load(checkpoint, 3)


def test_a_model_with_an_adapter_in_its_folder(made, adapter, tmp_path):
    """Neither applied nor left out unasked, whatever is installed."""
    base, _ = made()
    folder = shutil.copytree(base, tmp_path / "both")
    for name in (CONFIG, WEIGHTS):
        shutil.copy(adapter / name, folder)
    with pytest.raises(InputError, match="holds a model and an adapter") as caught:
        Checkpoint.open("it", folder)
    assert f"give {folder}+{folder} to merge it" in str(caught.value)
    merged, expected = (Checkpoint.open("it", one) for one in (f"{folder}+{folder}", f"{base}+{adapter}"))
    assert merged.fingerprint == expected.fingerprint


def test_an_adapter_alone_says_what_is_missing(made, adapter):
    base, _ = made()
    with pytest.raises(InputError, match=re.escape(f"give BASE+ADAPTER, here probably {base}+{adapter}")):
        Checkpoint.open("it", adapter)
    with pytest.raises(InputError, match="it holds a whole model: give it alone"):
        Checkpoint.open("it", f"{base}+{base}")


def test_an_adapter_of_prompts_as_peft_saves_it(made, tmp_path):
    base, _ = made()
    get_peft_model(plain_model(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        str(tmp_path / "prompts")
    )
    with pytest.raises(InputError, match="an adapter of kind 'PROMPT_TUNING' is not merged"):
        Checkpoint.open("it", f"{base}+{tmp_path / 'prompts'}")


# ---- a run -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_a_base_and_its_adapter(made, adapter, tmp_path, monkeypatch, capsys):
    """Captured in one folder, scored from another; a base alone is not what was captured."""
    base, _ = made()
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 6)
    monkeypatch.chdir(tmp_path)
    words = ["--pt", str(base), "--it", f"{base}+adapter", "--prompts", str(prompts), "--out", "RUN", "--max-new", "8"]
    assert main(["capture", *words]) == 0
    assert json.loads(Path("RUN/run.json").read_text())["checkpoints"]["it"] == f"{base}+{adapter}"
    monkeypatch.chdir(base)
    assert main(["grid", str(tmp_path / "RUN")]) == 0
    capsys.readouterr()
    assert main(["grid", str(tmp_path / "RUN"), "--scope", "position", "--checkpoint", f"it={base}"]) == 2
    assert f"checkpoint it at {base} is not the one captured: its adapter is None" in capsys.readouterr().err
