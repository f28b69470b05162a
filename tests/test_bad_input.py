"""Bad input: one clear line on stderr, exit code 2, nothing half-written left behind."""

from __future__ import annotations

import errno
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import MAX_NEW
from safetensors.torch import load_file

import actcache
from actcache import files
from actcache.cli import main
from actcache.store import shard


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    pt, it = tiny.make_pair(folder, "llama")
    return pt, it, tiny.write_prompts(folder / "prompts.jsonl", 6)


@pytest.fixture
def refused(capfd, tmp_path):
    """``refused(words, *arguments)``: the command exits 2 with one line that has these words, and makes nothing."""

    def check(words, *arguments, code=2):
        out = tmp_path / "run"
        before = sorted(tmp_path.rglob("*"))
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        err = capfd.readouterr().err
        said = [line for line in err.splitlines() if line.startswith("actcache: ")]
        assert len(said) == 1, err
        assert words in said[0]
        assert "Traceback" not in err
        assert sorted(tmp_path.rglob("*")) == before
        return out

    return check


def command(pt, it, prompts, out, *more):
    return ["run", "--pt", pt, "--it", it, "--prompts", prompts, "--out", out, "--max-new", MAX_NEW, *more]


def test_prompts_files(pair, refused, tmp_path):
    pt, it, _ = pair
    cases = {
        None: "no such prompts file",
        "": "no prompts in it",
        "nonsense\n": "line 1: not JSON",
        '{"id": "a"}\n': "line 1: no 'prompt'",
        '{"id": "a", "prompt": ""}\n': "line 1: 'prompt' is empty",
        '{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}\n': "line 2: id 'a' is already the id of line 1",
        json.dumps({"id": "long", "prompt": "many " * 200}): "prompt 'long' has",
    }
    path = tmp_path / "prompts.jsonl"
    for text, words in cases.items():
        if text is not None:
            path.write_text(text)
        refused(words, *command(pt, it, path, tmp_path / "run"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"hidden_size": 48}, "differ in hidden_size: 32"),
        ({"num_hidden_layers": 4}, "differ in num_hidden_layers: 5"),
    ],
)
def test_checkpoints_of_other_shapes(pair, refused, tmp_path, overrides, words):
    pt, _, prompts = pair
    other = tiny.make_checkpoint(tmp_path / "other", "llama", **overrides)
    refused(words, *command(pt, other, prompts, tmp_path / "run"))


def test_checkpoints_of_another_architecture(pair, refused, tmp_path):
    pt, _, prompts = pair
    other = tiny.make_checkpoint(tmp_path / "other", "mistral")
    refused("differ in model_type: llama", *command(pt, other, prompts, tmp_path / "run"))


def test_checkpoints_with_another_tokenizer(pair, refused, tmp_path):
    pt, it, prompts = pair
    other = shutil.copytree(it, tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    vocab = text["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(text))
    refused("have different tokenizers: id", *command(pt, other, prompts, tmp_path / "run"))


def test_tokenizers_that_split_a_prompt_differently(pair, refused, tmp_path):
    pt, it, prompts = pair
    other = shutil.copytree(it, tmp_path / "other")
    text = json.loads((other / "tokenizer.json").read_text())
    text["model"]["merges"] = text["model"]["merges"][:-5]
    (other / "tokenizer.json").write_text(json.dumps(text))
    refused("give different ids", *command(pt, other, prompts, tmp_path / "run"))


@pytest.mark.parametrize("boundary", ["5", "-6", "99", "1.0", "x", "1,,2", "3,9"])
def test_boundaries(pair, refused, tmp_path, boundary):
    refused("boundary", *command(*pair, tmp_path / "run"), f"--boundary={boundary}")


@pytest.mark.parametrize(
    ("option", "words"), [("--scope", "scope '' is unknown"), ("--readout", "readout '' is unknown"), ("sweep", "''")]
)
def test_an_empty_choice_is_not_the_default(pair, refused, tmp_path, option, words):
    if option == "sweep":
        (tmp_path / "sweep.toml").write_text('boundaries = ""\n')
        option, value = "--sweep", tmp_path / "sweep.toml"
    else:
        value = ""
    refused(words, *command(*pair, tmp_path / "run"), option, value)


def test_model_folders(pair, refused, tmp_path):
    pt, it, prompts = pair
    out = tmp_path / "run"
    refused("is not a folder", *command(pt, tmp_path / "none", prompts, out))
    bare = shutil.copytree(it, tmp_path / "bare")
    torch.save(load_file(bare / "model.safetensors"), bare / "pytorch_model.bin")
    (bare / "model.safetensors").unlink()
    refused("holds pickled weights only (pytorch_model.bin)", *command(pt, bare, prompts, out))
    (bare / "pytorch_model.bin").unlink()
    refused("holds no *.safetensors weights", *command(pt, bare, prompts, out))
    (bare / "config.json").unlink()
    refused("has no config.json", *command(pt, bare, prompts, out))
    untokenized = shutil.copytree(it, tmp_path / "untokenized")
    for path in untokenized.glob("tokenizer*"):
        path.unlink()
    refused("no tokenizer in", *command(pt, untokenized, prompts, out))


def test_a_weight_that_is_missing_is_never_random(pair, refused, tmp_path):
    from safetensors.torch import save_file

    pt, it, prompts = pair
    other = shutil.copytree(it, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    del weights["model.layers.4.mlp.up_proj.weight"]
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    refused("1 parameters of the model have no weights in the files", *command(pt, other, prompts, tmp_path / "run"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(pair, refused, tmp_path):
    refused("this torch sees no CUDA device", *command(*pair, tmp_path / "run", "--device", "cuda"))


def test_readouts_and_sources(pair, refused, tmp_path):
    out = tmp_path / "run"
    refused("holds no run", "grid", out)
    refused("no such table of cells", "effects", tmp_path / "none.parquet")
    refused("is not a store", "inspect", tmp_path / "none")
    refused("is not a store", "verify", tmp_path)
    refused("give a store", "inspect")
    (tmp_path / "not.parquet").write_text("x")
    refused("is not a Parquet table", "effects", tmp_path / "not.parquet")
    table = tmp_path / "cells.parquet"
    event = {"event_id": "e", "prompt_id": "p", "kind": "first_divergence", "step": 0, "boundary": 1}
    plain = event | {"scope": "prefix", "readout": "native", "variant": "none"}
    margins = {("pt", "pt"): 0.0, ("pt", "it"): 0.0, ("it", "pt"): 0.0, ("it", "it"): 1e308}
    cells = [plain | {"upstream": up, "late": late, "margin": margin} for (up, late), margin in margins.items()]
    pq.write_table(pa.Table.from_pylist(cells), table)
    refused("has margin 1e+308 in the cell upstream it, late it; 1 of 4 values", "effects", table)
    refused("draws=1: an interval of 0.95 needs at least 40 draws", "effects", table, "--draws", 1)


def test_an_output_folder_of_something_else(pair, refused, tmp_path):
    pt, it, prompts = pair
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    refused("is not empty and holds no run", *command(pt, it, prompts, out))
    file = tmp_path / "file"
    file.write_text("x")
    refused("is a file", *command(pt, it, prompts, file))


@pytest.mark.slow
def test_an_output_folder_of_another_run(pair, refused, tmp_path):
    pt, it, prompts = pair
    out = tmp_path / "run"
    assert main([str(word) for word in command(pt, it, prompts, out)]) == 0
    other_prompts = tiny.write_prompts(tmp_path / "other.jsonl", 5)
    other = tiny.make_pair(tmp_path / "other", "llama", seed=1)[1]
    refused("its checkpoints.it.weights is", *command(pt, other, prompts, out))
    refused("its dtype is float32, this run's is bfloat16", *command(pt, it, prompts, out, "--dtype", "bfloat16"))
    refused("the prompts of its segment shard-000000 are not this run's", *command(pt, it, other_prompts, out))
    refused("boundary 2 is not in the store; it has 3", "grid", out, "--boundary", "2")
    refused("readout 'common_xx' is unknown", "grid", out, "--readout", "common_xx")
    refused("is not the one captured: its weights", "grid", out, "--it", other)
    assert main([str(word) for word in command(pt, it, prompts, out)]) == 0, "the run itself still goes on"
    assert main([str(word) for word in command(pt, it, prompts, out, "--boundary", "2")]) == 0, (
        "a store gains boundaries"
    )
    assert actcache.open_store(out).boundaries == [3, 2]


@pytest.mark.slow
def test_a_store_of_event_rows_has_no_grid(pair, refused, tmp_path):
    out = tmp_path / "run"
    words = [str(word) for word in command(*pair, out, "--rows", "divergence")]
    assert main(["capture", *words[1:]]) == 0
    store = actcache.open_store(out / "store")
    rows, offsets = store.states("pt", 3)
    assert offsets.tolist() == list(range(len(store) + 1))
    assert len(rows) == len(store) > 0
    refused("the grid needs prefix rows", "grid", out)
    refused("which needs prefix rows", *command(*pair, tmp_path / "other", "--rows", "divergence"))


def test_a_read_only_place(pair, refused, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(tmp_path / "run"))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    refused("Read-only file system", *command(*pair, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("where", ["record", "segment"])
def test_a_full_disk(pair, refused, tmp_path, monkeypatch, where):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "record":
        monkeypatch.setattr(files, "write_durably", refuse)
    else:
        monkeypatch.setattr(shard, "EncodedArray", refuse)
    refused("No space left on device", *command(*pair, tmp_path / "run"))
    monkeypatch.undo()
    assert main([str(word) for word in command(*pair, tmp_path / "run")]) == 0


def test_usage_errors_exit_2(capfd):
    with pytest.raises(SystemExit) as caught:
        main(["run", "--pt", "x"])
    assert caught.value.code == 2
    assert "required: --out" in capfd.readouterr().err
    assert main(["run", "--pt", "x", "--it", "y", "--out", "run"]) == 2
    assert "required: --prompts, or --support fixed with --events" in capfd.readouterr().err
    assert main(["run", "--pt", "x", "--prompts", "p.jsonl", "--out", "run"]) == 2
    assert "required: --it, or --checkpoint LABEL=DIR" in capfd.readouterr().err
