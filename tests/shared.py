"""Fixtures that several test files use: runs of tiny pairs, each made once per session, pages, workers, devices."""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from conftest import BOUNDARY, MAX_NEW
from engines import native_cuda, using
from huggingface_hub import constants
from markupsafe import Markup
from safetensors.torch import save_file
from sweeps import TENSORS

import actcache
from actcache import cli
from actcache.cli import main, stages
from actcache.cli.parser import Parser
from actcache.models.gather import engine
from actcache.replay import modes
from actcache.report import figures

ROOT = Path(__file__).resolve().parents[1]
PICTURES_SEEN_BY = {f"test_{name}" for name in ("demo", "figures", "sections")}
DRAWN = figures._svg
# Credentials for the S3 server: nothing that is written or said may show one.
CANARIES = ("AKIACANARY0ID", "canary0Secret+Key", "canary0Session/Token")


@dataclass(frozen=True)
class TinyRun:
    """One run of the command line over a tiny pair."""

    pt: Path
    it: Path
    prompts: Path
    out: Path
    dtype: torch.dtype

    @property
    def store(self) -> actcache.Store:
        return actcache.open_store(self.out / "store")

    @property
    def cells(self) -> pa.Table:
        return pq.read_table(self.out / "cells.parquet")

    @property
    def effects(self) -> dict[str, Any]:
        return json.loads((self.out / "effects.json").read_text())

    def arguments(self, verb: str = "run") -> list[str]:
        """The command line that made it."""
        given = {"--pt": self.pt, "--it": self.it, "--prompts": self.prompts, "--out": self.out, "--max-new": MAX_NEW}
        words = [str(word) for item in given.items() for word in item]
        return [verb, *words, "--dtype", str(self.dtype).removeprefix("torch.")]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyRun]:
    """``tiny_run(arch, dtype, *more_arguments, change="all", verb="run", **pair)``: run, or hand out the run made
    before; with the verb ``capture``, only its store."""
    runs: dict[Any, TinyRun] = {}

    def run(arch: str, dtype: torch.dtype, *more: str, change: str = "all", verb: str = "run", **pair: Any) -> TinyRun:
        key = (arch, dtype, more, change, verb, tuple(sorted(pair.items())))
        if key not in runs:
            folder = tmp_path_factory.mktemp(f"{arch}-")
            pt, it = tiny.make_pair(folder, arch, dtype=dtype, change=change, boundary=BOUNDARY, **pair)
            made = TinyRun(pt, it, tiny.write_prompts(folder / "prompts.jsonl"), folder / "run", dtype)
            # A page costs as much as half of such a run: those of the first architecture are enough to look at. Files
            # share them, so that they are the same for each.
            bare = mock.patch.object(figures, "_svg", only_described)
            page = bare if arch == "llama" else mock.patch.object(stages, "write_report")
            with page:
                assert main([*made.arguments(verb), *more]) == 0
            runs[key] = made
        return runs[key]

    return run


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """``written(text, name)``: the path of a sweep with these words, beside the tensors that it may name."""
    save_file(TENSORS, tmp_path / "x.safetensors")

    def write(text: str, name: str = "s.toml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def three_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replays on the CPU are shared by three workers, however few their tokens are."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(modes, "TOKENS_OF_A_WORKER", 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["alone", "three workers"])
def workers(request: pytest.FixtureRequest) -> None:
    """A test that uses this one runs twice."""
    if request.param == "three workers":
        request.getfixturevalue("three_workers")


@pytest.fixture(scope="session", autouse=True)
def caches_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What tests, and processes that they start, remember of weight files lies here; the Hub's cache is empty, and the
    Hub is not asked."""
    place = tmp_path_factory.mktemp("caches")
    hub = place / "hub"
    given = {"ACTCACHE_CACHE": str(place / "actcache"), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
    with (
        mock.patch.dict(os.environ, given),
        mock.patch.object(constants, "HF_HUB_CACHE", str(hub)),
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),
    ):
        yield place


def only_described(figure: Any, name: str, alt: str) -> Markup:
    return Markup("<svg><title>{}</title></svg>").format(alt)


@pytest.fixture(scope="module", autouse=True)
def pictures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pages are whole, but for the curves in their pictures where neither the tests of a file look at those nor the
    test, which asks for ``drawn``.

    matplotlib takes as long over them as a tiny run takes.
    """
    seen = request.module.__name__ in PICTURES_SEEN_BY
    with mock.patch.object(figures, "_svg", DRAWN if seen else only_described):
        yield


@pytest.fixture
def drawn() -> Iterator[None]:
    """Pages that this test makes have their pictures whole."""
    with mock.patch.object(figures, "_svg", DRAWN):
        yield


def skip_fsync(handle: int) -> None:
    pass


@pytest.fixture(scope="session", autouse=True)
def no_fsync() -> Iterator[None]:
    """No test cuts the power; the one that sees what is durable when sets its own (test_store_crash.py)."""
    with mock.patch.object(os, "fsync", skip_fsync):
        yield


BUILT = cli.build_parser


@functools.cache
def parser_with(add_run_arguments: Callable[..., None]) -> Parser:
    """Of commands whose runs have these arguments."""
    return BUILT()


def shared_parser() -> Parser:
    return parser_with(stages.add_run_arguments)


@pytest.fixture(scope="session", autouse=True)
def one_parser() -> Iterator[None]:
    """Commands of one process share their parser, which no command changes: making it takes as long as many a command
    over a tiny run."""
    with mock.patch.object(cli, "build_parser", shared_parser):
        yield


def unless_meta(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda tensor, *args, **more: tensor if tensor.is_meta else draw(tensor, *args, **more)


@pytest.fixture(scope="session", autouse=True)
def nothing_drawn_without_memory() -> Iterator[None]:
    """Drawing weights for tensors that hold none gives nothing, and takes a sixth of a tiny model's load."""
    draws = {name: unless_meta(getattr(torch.nn.init, name)) for name in ("kaiming_uniform_", "uniform_", "normal_")}
    with mock.patch.multiple(torch.nn.init, **draws):
        yield


@pytest.fixture(scope="module")
def ptxsim() -> ModuleType:
    """The simulator; skips where it or nvcc is absent."""
    path = Path(os.environ.get("PTXSIM", ROOT.parent / "shared" / "ptxsim")) / "ptxsim.py"
    if not path.exists():
        pytest.skip("ptxsim.py is neither in the folder named by PTXSIM nor in ../shared/ptxsim")
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    spec = importlib.util.spec_from_file_location("ptxsim", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def edited(ptxsim: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """``edited(file, old, new)``: the kernel, compiled from sources in which one thing was changed."""

    def build(file: str, old: str, new: str, kernel: str = "gather_cuda.cu") -> Any:
        folder = tmp_path_factory.mktemp("edited") / "csrc"
        shutil.copytree(ROOT / "csrc", folder)
        text = (folder / file).read_text()
        assert text.count(old) == 1
        (folder / file).write_text(text.replace(old, new))
        return ptxsim.PTX(ptxsim.compile_cu(str(folder / kernel), "sm_80"))

    return build


@pytest.fixture(params=["cuda", "torch"])
def device(request: pytest.FixtureRequest) -> Any:
    """A real CUDA device, served by the kernel and then by torch."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    if request.param == "cuda":
        native_cuda()
    with using(request.param):
        assert engine("cuda") == request.param
        yield torch.device("cuda")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The URL of an empty bucket on a server on loopback, and the environment that leads there."""
    pytest.importorskip("obstore")
    moto = pytest.importorskip("moto.moto_server.werkzeug_app")
    serving = pytest.importorskip("werkzeug.serving")
    # S3 alone: where moto serves everything, it looks at each request for whose it is, for longer than S3 takes.
    server = serving.make_server("127.0.0.1", 0, moto.create_backend_app("s3"), threaded=True)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": CANARIES[0],
        "AWS_SECRET_ACCESS_KEY": CANARIES[1],
        "AWS_SESSION_TOKEN": CANARIES[2],
        "AWS_REGION": "us-east-1",
    }
    with mock.patch.dict(os.environ, environment):
        import boto3

        boto3.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).create_bucket(Bucket="bucket")
        yield "s3://bucket"
    server.shutdown()
    server.server_close()
    thread.join()
