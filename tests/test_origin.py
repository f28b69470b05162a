"""Where a checkpoint comes from: folders, ids of the Hub and its cache, bases with adapters."""

from __future__ import annotations

import json
import os
import shutil
import string
import subprocess
import sys
from pathlib import Path

import hub as of_hub
import pytest
import tiny
import torch
from adapted import config_of, make_adapter
from hub import COMMIT
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from actcache.cli import main
from actcache.errors import InputError
from actcache.models.checkpoint import Checkpoint
from actcache.models.origin import Origin, Recorded
from actcache.replay.late_stack import LateStack
from actcache.study.run_folder import RunFolder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny.make_checkpoint(tmp_path_factory.mktemp("base") / "tiny-base", "llama", shards=True)


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return make_adapter(base.parent / "tiny-adapter", base, config_of("lora"))


@pytest.fixture
def served(base, adapter, tmp_path):
    """A Hub with both, and files beside them that nobody should ask for."""
    with of_hub.serving(tmp_path / "cache") as hub:
        for name, folder in (("some/base", base), ("some/adapter", adapter)):
            hub.models[name] = shutil.copytree(folder, tmp_path / "hub" / name)
            for other in ("pytorch_model.bin", "original/model.safetensors", "model.gguf", "evil.py", "train.json"):
                (hub.models[name] / other).parent.mkdir(exist_ok=True)
                (hub.models[name] / other).write_bytes(b"never")
        (hub.models["some/base"] / "consolidated.safetensors").write_bytes(b"never")
        yield hub


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_a_folder_whatever_its_name(base, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("some/base", "a+b", "a@b", "some/base@main", "a+b+c", "some/base+some/adapter"):
        shutil.copytree(base, name)
        origin = Origin.find(name)
        assert (origin.given, origin.base.folder, origin.adapter) == (name, Path(name), None)
        assert origin.text == str(tmp_path / name)
        assert Checkpoint.open("it", name).place == str(tmp_path / name)


def test_base_and_adapter_are_read_at_the_plus(base, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "my+base")
    shutil.copytree(adapter, "my+adapter")
    for asked in ("my+base+my+adapter", Path("my+base+my+adapter"), f"{tmp_path}/my+base+my+adapter"):
        origin = Origin.find(asked)
        assert [one.folder.name for one in (origin.base, origin.adapter)] == ["my+base", "my+adapter"]
        assert origin.text == f"{tmp_path}/my+base+{tmp_path}/my+adapter"
        assert Origin.find(origin.text).text == origin.text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Origin.find("~/my+base+~/my+adapter").text == origin.text
    shutil.copytree(base, "my")
    shutil.copytree(adapter, "base+my+adapter")
    with pytest.raises(InputError, match=r"may be read as my and base.my.adapter or as my.base and my.adapter"):
        Origin.find("my+base+my+adapter")


@given(st.lists(st.text(string.ascii_letters + string.digits + "+@-_.", min_size=1), min_size=2, max_size=2))
def test_what_is_written_down_is_found_again(tmp_path_factory, names):
    place = tmp_path_factory.mktemp("names")
    first, second = (place / f"{number}{name}" for number, name in enumerate(names))
    first.mkdir()
    second.mkdir()
    assert Origin.find(first).base.folder == Path(Origin.find(first).text) == first
    found = Origin.find(f"{first}+{second}")
    assert (found.base.folder, found.adapter.folder) == (first, second)
    assert Origin.find(found.text) == Origin(found.text, found.base, found.adapter)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nothing", "nothing is not a folder; give a local model folder, or an id of the Hub as org/name"),
        ("/no/where", "/no/where is not a folder"),
        ("a/b/c", "a/b/c is not a folder"),
        ("../a/b", "is not a folder"),
        ("some/base@", "some/base@ is not a folder"),
        ("some/base@../../x", "is not a folder"),
        ("nothing+some/adapter", "as BASE+ADAPTER its 'nothing' is neither a folder nor an id"),
        ("some/base+", "as BASE+ADAPTER its '' is neither a folder nor an id"),
        ("+", "as BASE+ADAPTER its '' is neither a folder nor an id"),
        ("a--b/c", "a--b/c is not a folder, and not in the Hub's cache"),
        ("some/base", "some/base is not a folder, and not in the Hub's cache"),
        ("some/base@v1.0", "some/base@v1.0 is not a folder, and not in the Hub's cache"),
        ("some/base+some/adapter", "some/base is not a folder, and not in the Hub's cache"),
    ],
)
def test_what_is_nowhere_is_named(given, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.write_prompts(Path("prompts.jsonl"))
    assert main(["capture", "--pt", given, "--it", given, "--prompts", "prompts.jsonl", "--out", "RUN"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("actcache: checkpoint pt: ")
    assert words in line


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def test_an_id_is_downloaded_once_and_only_what_is_read(served, base):
    found = Checkpoint.open("it", "some/base")
    assert found.place == f"some/base@{COMMIT}"
    read = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    read |= {file.name for file in base.glob("model*")}
    assert {Path(name).name for name in served.files} == read
    assert len(served.files) == len(read)
    assert found.fingerprint == Checkpoint.open("it", base).fingerprint
    model = found.load(torch.float32).state_dict()
    assert all(
        torch.equal(model[name], own)
        for name, own in Checkpoint.open("it", base).load(torch.float32).state_dict().items()
    )
    asked = served.asked
    assert Checkpoint.open("it", f"some/base@{COMMIT}").fingerprint == found.fingerprint
    assert served.asked == asked, "a commit that is in the cache is not asked for"


def test_a_base_and_an_adapter_by_their_ids(served, base, adapter):
    found = Checkpoint.open("it", f"some/base@main+some/adapter@{COMMIT}")
    assert found.place == f"some/base@{COMMIT}+some/adapter@{COMMIT}"
    assert found.fingerprint == Checkpoint.open("it", f"{base}+{adapter}").fingerprint
    assert [name for name in served.files if "adapter/" in name] == [
        "some/adapter/adapter_config.json",
        "some/adapter/adapter_model.safetensors",
    ]
    assert LateStack.load(f"{base}+some/adapter", 3).boundary == 3


def test_a_plan_needs_no_weights(served):
    assert Checkpoint.open("it", "some/base", with_weights=False).encoder
    assert not [name for name in served.files if name.endswith(".safetensors")]
    Checkpoint.open("it", "some/base")
    assert [name for name in served.files if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("some/other", "some/other is not a folder, and not a model of the Hub that you may read"),
        ("some/base@v2", "some/base@v2: the Hub has some/base, and no such revision of it"),
        ("some/adapter", "some/adapter@0123456789abcdef0123456789abcdef01234567 is an adapter alone"),
        ("some/pickled", "some/pickled holds pickled weights only (pytorch_model.bin)"),
        ("some/gguf", "some/gguf holds GGUF weights only (model.gguf)"),
        ("some/base+some/base", "has no adapter_config.json, which an adapter has"),
    ],
)
def test_what_the_hub_has_not_is_named(given, words, served):
    for name, kept in (("some/pickled", "pytorch_model.bin"), ("some/gguf", "model.gguf")):
        served.models[name] = shutil.copytree(served.models["some/base"], served.models["some/base"].parent / kept)
        for file in served.models[name].glob("*model*"):
            if file.name != kept and file.is_file():
                file.unlink()
    with pytest.raises(InputError) as caught:
        Checkpoint.open("it", given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [name for name in served.files if name.endswith((".bin", ".gguf"))]


def test_without_the_hub_the_cache_serves(served, monkeypatch):
    """Whether it is told to, or the Hub is not there."""
    here = Checkpoint.open("it", "some/base").fingerprint
    asked = served.asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Checkpoint.open("it", "some/base").fingerprint == here
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        Checkpoint.open("it", "some/adapter")
    with pytest.raises(InputError, match="some/base@v2 is not a folder, and not in the Hub's cache"):
        Checkpoint.open("it", "some/base@v2")
    assert served.asked == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert Checkpoint.open("it", "some/base").fingerprint == here
    with pytest.raises(InputError, match="some/adapter is not a folder, and the Hub cannot be asked for it"):
        Checkpoint.open("it", "some/adapter")


def test_a_cache_that_lacks_weights_says_so(served, tmp_path, monkeypatch):
    found = Checkpoint.open("it", "some/base")
    sorted(found.path.glob("*.safetensors"))[0].unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"model-00001-of-\d+.safetensors, which is not there"):
        Checkpoint.open("it", "some/base")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert Checkpoint.open("it", f"some/base@{COMMIT}").fingerprint


def test_what_a_record_names_is_never_downloaded(served):
    with pytest.raises(InputError, match=f"give it by --checkpoint LABEL=some/base@{COMMIT}, to download it"):
        Origin.find(Recorded(f"some/base@{COMMIT}"))
    assert served.asked == 0
    Checkpoint.open("it", "some/base")
    asked = served.asked
    assert Checkpoint.open("it", Recorded(f"some/base@{COMMIT}")).fingerprint
    assert served.asked == asked


@pytest.mark.slow
def test_a_run_of_ids(served, tmp_path, monkeypatch, capsys):
    """Its record names commits; it is scored where the Hub is not; what was in the cache may be given again."""
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 6)
    run = tmp_path / "RUN"
    words = ["--pt", "some/base", "--it", "some/base+some/adapter", "--prompts", str(prompts), "--out", str(run)]
    assert main(["capture", *words, "--max-new", "8"]) == 0
    recorded = json.loads((run / "run.json").read_text())["checkpoints"]
    assert recorded == {"pt": f"some/base@{COMMIT}", "it": f"some/base@{COMMIT}+some/adapter@{COMMIT}"}
    assert all(isinstance(place, Recorded) for place in RunFolder(run).record().checkpoints.values())
    asked = served.asked
    assert main(["grid", str(run)]) == 0
    assert served.asked == asked
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert main(["grid", str(run), "--scope", "position"]) == 2
    assert f"some/base@{COMMIT} is not in the Hub's cache any more" in capsys.readouterr().err
    assert served.asked == asked
    again = [f"--checkpoint={label}={place}" for label, place in recorded.items()]
    assert main(["grid", str(run), "--scope", "position", *again]) == 0


@pytest.mark.slow
def test_a_process_of_its_own_downloads(served, tmp_path):
    """Nothing that the command line sets keeps it from the Hub."""
    prompts = tiny.write_prompts(tmp_path / "prompts.jsonl", 2)
    words = ["capture", "--pt", "some/base", "--it", "some/base+some/adapter", "--prompts", prompts, "--max-new", "2"]
    environment = os.environ | {"HF_ENDPOINT": served.address, "HF_HUB_CACHE": str(tmp_path / "cache")}
    del environment["HF_HUB_OFFLINE"]
    code = "import sys; from actcache.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *words, "--out", tmp_path / "RUN"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "cache/models--some--adapter/refs/main").read_text() == COMMIT


@pytest.mark.slow
def test_example_checkpoints_are_of_every_kind(tmp_path, monkeypatch):
    """What docs/checkpoints.md shows."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    import make_example_checkpoints as script

    monkeypatch.setattr(script, "NEW_TOKENS", 2)
    made = tmp_path / "EXAMPLES"
    script.main(["--out", str(made), "--steps", "2"])
    monkeypatch.chdir(made)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made / "hub"))
    found = [
        Checkpoint.open("it", one).fingerprint
        for one in ("base+adapter", "example/base+example/adapter", "base+example/adapter@main", "example/tuned")
    ]
    assert found[0] == found[1] == found[2] != found[3]
    assert found[3] == Checkpoint.open("it", "tuned").fingerprint
