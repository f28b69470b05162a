"""--dtype auto: the checkpoints' own dtype, float32 where they differ, and on a resume that of the run."""

import json

import pytest
import tiny
import torch

from actcache import open_store
from actcache.cli import main
from actcache.models.checkpoint import Checkpoint
from actcache.models.lineup import Lineup

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("dtypes")
    return {dtype: tiny.make_checkpoint(place / str(dtype), "llama", dtype=dtype) for dtype in (BF16, F16, F32)}


@pytest.mark.parametrize(
    ("pt", "it", "dtype", "why"),
    [
        (BF16, BF16, "bfloat16", None),
        (F32, F32, "float32", None),
        (BF16, F32, "float32", "the checkpoints differ (pt bfloat16, it float32); give --dtype to choose"),
        (F16, BF16, "float32", "the checkpoints differ (pt float16, it bfloat16); give --dtype to choose"),
        (F16, F16, "float32", "the checkpoints are in float16, and a run is in float32 or bfloat16"),
    ],
)
def test_the_dtype_is_that_of_all_checkpoints_or_float32(folders, pt, it, dtype, why):
    assert Lineup.open({"pt": folders[pt], "it": folders[it]}).own_dtype() == (dtype, why)


def test_a_config_without_a_dtype_leaves_it_to_the_weights(tmp_path):
    folder = tiny.make_checkpoint(tmp_path, "llama", dtype=BF16)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["dtype"]
    file.write_text(json.dumps(config))
    assert Checkpoint.open("it", folder).own_dtype == BF16
    (folder / "model.safetensors").unlink()
    assert Checkpoint.open("it", folder, with_weights=False).own_dtype == F32


@pytest.mark.slow
def test_a_capture_has_its_checkpoints_dtype_and_a_resume_that_of_the_run(tmp_path, capsys):
    pt, it = tiny.make_pair(tmp_path, "llama", dtype=BF16)
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 2)

    def run(verb, out, *more):
        words = [verb, "--pt", pt, "--it", it, "--prompts", prompts, "--max-new", "4"]
        assert main([str(word) for word in [*words, "--out", tmp_path / out, *more]]) == 0
        return capsys.readouterr()

    run("capture", "own")
    assert open_store(tmp_path / "own").fingerprint.dtype == "bfloat16"
    run("capture", "told", "--dtype", "float32")
    run("capture", "told")
    assert open_store(tmp_path / "told").fingerprint.dtype == "float32"
    assert "bfloat16" in run("plan", "planned", "--rate", "1e9").out.splitlines()[0]
    # Another checkpoint that is stored otherwise: said aloud, in float32.
    tiny.make_checkpoint(tmp_path / "it", "llama", seed=3)
    assert "dtype float32: the checkpoints differ (pt bfloat16, it float32)" in run("capture", "both").err
    assert open_store(tmp_path / "both").fingerprint.dtype == "float32"
