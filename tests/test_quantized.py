"""Quantized checkpoints: dequantized on load, to the numbers of transformers' own loader, or refused by name."""

import json
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, GptOssForCausalLM, Mxfp4Config

from actcache.errors import InputError
from actcache.models import quantized
from actcache.models.checkpoint import Checkpoint
from actcache.models.lineup import Lineup
from actcache.models.parts import Frame
from actcache.models.quantized import Quantization, dequantized
from actcache.replay.late_stack import LateStack

BOUNDARY = 2
WEIGHTS = "model.safetensors"


class Stored:
    """A tensor behind the words of a safetensors slice."""

    def __init__(self, tensor: torch.Tensor, dtype: str) -> None:
        self.tensor, self.dtype = tensor, dtype

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, _: Any) -> torch.Tensor:
        return self.tensor


def quantize(folder: Path, config: dict[str, Any], write: Any) -> Path:
    """Put what `write` makes of each tensor of a folder in its place, and `config` into its config.json."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        tensors |= {key: value.contiguous() for key, value in write(name, tensor).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": config, "dtype": "bfloat16"}))
    return folder


def fp8(name: str, tensor: torch.Tensor, block: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The two-dimensional weights of blocks in 8 bits, with a scale for each block; all others in bfloat16."""
    if tensor.ndim != 2 or ".layers." not in name or not name.endswith("weight"):
        return {name: tensor.bfloat16()}
    n, k = tensor.shape
    tiles = tensor.reshape(n // block[0], block[0], k // block[1], block[1])
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True) / 448
    packed = (tiles / scale).to(torch.float8_e4m3fn).reshape(n, k)
    stem = name.removesuffix("weight")
    return {name: packed, f"{stem}weight_scale_inv": scale[:, 0, :, 0], f"{stem}activation_scale": scale.max()}


def make_fp8(folder: Path, arch: str = "llama", block: tuple[int, int] = (16, 8), seed: int = 0) -> Path:
    """A tiny checkpoint whose blocks are in FP8."""
    tiny.make_checkpoint(folder, arch, seed=seed)
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": list(block)}
    return quantize(folder, config, lambda name, tensor: fp8(name, tensor, block))


def make_mxfp4(folder: Path) -> Path:
    """A tiny GPT-OSS whose experts are in MXFP4."""
    config = families.build("gpt_oss").config
    config.intermediate_size = 64  # in groups of 32
    GptOssForCausalLM(config).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    generator = torch.Generator().manual_seed(0)

    def write(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor.bfloat16()}
        n_experts, n_in, n_out = tensor.shape
        shape = n_experts, n_out, n_in // 32
        return {
            f"{name}_blocks": torch.randint(256, (*shape, 16), dtype=torch.uint8, generator=generator),
            f"{name}_scales": torch.randint(122, 127, shape, dtype=torch.uint8, generator=generator),
        }

    return quantize(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, write)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("quantized")
    return {"fp8": make_fp8(place / "fp8"), "mxfp4": make_mxfp4(place / "mxfp4")}


def of_transformers(folder: Path, method: str, dtype: torch.dtype) -> torch.nn.Module:
    """The checkpoint as transformers' own loader dequantizes it, from the folder."""
    config: Any = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}[method](dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_quantized_checkpoint_is_what_transformers_makes_of_it(folders, method, dtype):
    pytest.importorskip("accelerate", reason="transformers asks for it")
    checkpoint = Checkpoint.open("it", folders[method], dequantize=True)
    own, theirs = checkpoint.load(dtype), of_transformers(folders[method], method, dtype)
    expected = dict(theirs.named_parameters())
    assert dict(own.named_parameters()).keys() == expected.keys()
    for name, parameter in own.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, expected[name]), name
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(own(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["fp8", "mxfp4"])
def test_a_late_stack_and_a_block_alone_have_the_same_numbers(folders, method):
    checkpoint = Checkpoint.open("it", folders[method], dequantize=True)
    whole = dict(checkpoint.load(torch.bfloat16).named_parameters())
    block = Frame.load(checkpoint, torch.bfloat16).load_block(BOUNDARY)
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, whole[f"model.layers.{BOUNDARY}.{name}"]), name
    late = LateStack.load(folders[method], BOUNDARY, dequantize=True)
    assert late.dtype == torch.bfloat16  # the config's
    found = [
        (f"model.layers.{BOUNDARY + index}.{name}", parameter)
        for index, block in enumerate(late.blocks)
        for name, parameter in block.named_parameters()
    ]
    assert found
    for name, parameter in found:
        assert torch.equal(parameter, whole[name]), name


def test_the_fingerprint_says_how_weights_are_quantized(folders, tmp_path):
    plain = tiny.make_checkpoint(tmp_path / "plain", "llama")
    assert Checkpoint.open("pt", plain).fingerprint.quantization is None
    assert "quantization" not in Checkpoint.open("pt", plain, dequantize=True).fingerprint.to_json()
    for method, folder in folders.items():
        checkpoint = Checkpoint.open("it", folder, dequantize=True)
        assert checkpoint.fingerprint.quantization == f"{method}, dequantized in float32"
        assert checkpoint.own_dtype == torch.bfloat16


def test_quantized_weights_are_refused_unless_they_may_be_dequantized(folders, tmp_path):
    plain = tiny.make_checkpoint(tmp_path / "plain", "llama")
    for method, folder in folders.items():
        with pytest.raises(InputError, match=rf"^checkpoint it: .*\({method}\).*give --dequantize"):
            Checkpoint.open("it", folder)
        with pytest.raises(InputError, match="--dequantize"):
            LateStack.load(folder, BOUNDARY)
        with pytest.raises(InputError, match="--dequantize"):
            Lineup.open({"pt": plain, "it": folder})
    assert Lineup.open({"pt": plain, "it": folders["fp8"]}, dequantize=True).labels == ["pt", "it"]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, 4 bits"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes, 8 bits"),
        ("quantization_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization_config", {"quant_method": ["fp8"]}, "by no method"),
        ("quantization_config", "fp8", "by no method"),
        ("quantization", {"bits": 4, "group_size": 64}, "by no method"),
        ("vision_config", {"quantization_config": {"quant_method": "fp8"}}, "fp8"),
    ],
)
def test_other_methods_are_refused_by_name(folders, key, value, said, tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "llama")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    for dequantize in (False, True):
        with pytest.raises(InputError, match=rf"quantized \({said}.*Give the model that they were made from"):
            Checkpoint.open("it", folder, dequantize=dequantize)


def broken(change: Any) -> Any:
    def write(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: value for key, value in change(name, tensor).items() if value is not None}

    return write


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda name, tensor: {} if name.endswith("0.mlp.up_proj.weight_scale_inv") else {name: tensor}, "without its"),
        (
            lambda name, tensor: {name: tensor[:, :3] if name.endswith("0.mlp.up_proj.weight_scale_inv") else tensor},
            r"not one for each block of \[16, 8\]",
        ),
        (
            lambda name, tensor: {} if name.endswith("weight_scale_inv") else {name: tensor.bfloat16()},
            "and none of them is",
        ),
    ],
    ids=["a scale is missing", "a scale of another shape", "nothing is quantized"],
)
def test_damaged_scales_are_named(change, said, tmp_path):
    folder = make_fp8(tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantize(folder, config, broken(change))
    with pytest.raises(InputError, match=said):
        Checkpoint.open("it", folder, dequantize=True).load(torch.float32)


def test_a_block_size_that_is_none_is_named(tmp_path):
    folder = make_fp8(tmp_path)
    quantize(folder, {"quant_method": "fp8", "weight_block_size": [128]}, lambda name, tensor: {name: tensor})
    with pytest.raises(InputError, match=r"weight_block_size is \[128\], expected two sizes"):
        Checkpoint.open("it", folder, dequantize=True)


@given(st.data())
def test_blocks_are_scaled_one_by_one(data):
    n, k = data.draw(st.integers(1, 13)), data.draw(st.integers(1, 13))
    block = data.draw(st.integers(1, 14)), data.draw(st.integers(1, 14))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    weight = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    grid = -(-n // block[0]), -(-k // block[1])
    exponents = data.draw(st.booleans())
    scales = torch.randint(110, 140, grid, dtype=torch.uint8, generator=generator)
    scales = scales if exponents else scales.float() / 100
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    tensors = {
        "a.weight": Stored(weight, "F8_E4M3"),
        "a.weight_scale_inv": Stored(scales, "U8" if exponents else "F32"),
        "a.bias": Stored(torch.zeros(n), "F32"),
    }
    found = dequantized(Path("folder"), tensors, Quantization("fp8", block), dtype)
    assert sorted(found) == ["a.bias", "a.weight"]
    assert found["a.weight"].get_shape() == [n, k]
    value = found["a.weight"][...]
    assert value.dtype == dtype
    for i in range(n):
        for j in range(k):
            scale = scales[i // block[0], j // block[1]].item()
            scale = 2.0 ** (scale - 127) if exponents else scale
            assert value[i, j] == (weight[i, j].float() * torch.tensor(scale)).to(dtype)


def test_large_weights_are_scaled_in_pieces(monkeypatch):
    weight, scales = torch.randn(2, 24, 8).to(torch.float8_e4m3fn), torch.rand(2, 6, 2)
    tensors = {"up.weight": Stored(weight, "F8_E4M3"), "up.weight_scale_inv": Stored(scales, "F32")}
    up = dequantized(Path("folder"), tensors, Quantization("fp8"), torch.float32)["up.weight"]
    whole = up[...]
    monkeypatch.setattr(quantized, "_AT_ONCE", 40)
    assert torch.equal(up[...], whole)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_dequantized_base(folders, tmp_path):
    base = Checkpoint.open("pt", folders["fp8"], dequantize=True).load(torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    checkpoint = Checkpoint.open("it", f"{folders['fp8']}+{tmp_path / 'adapter'}", dequantize=True)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        torch.testing.assert_close(checkpoint.load(torch.float32)(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert checkpoint.fingerprint.quantization == "fp8, dequantized in float32"
    assert checkpoint.fingerprint.adapter
