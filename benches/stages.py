"""What each stage of a whole ``actcache run`` takes, from files to the report, beside the least that it could take.

A stage is the functions that do its work, timed on whatever thread they are called. Writing, and reading of all but the
first segment, go on beside the rest. What such a function calls of another stage counts as its own.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from measure import Products, Work, Workload, timed
from study import Ours, Study

import actcache
from actcache.capture import answers, forward
from actcache.cli import stages
from actcache.models.readout import Readout
from actcache.store import StoreWriter
from actcache.study.engine import LocalEngine
from actcache.study.replay_job import ReplayJob
from actcache.study.run_folder import RunFolder

STAGES: dict[str, tuple[tuple[Any, str], ...]] = {
    "search": ((answers, "propose"),),
    "capture forward": ((forward, "forward_and_gather"), (Readout, "top2"), (Readout, "scores")),
    "write": ((StoreWriter, "append"),),
    "read": ((LocalEngine, "states"),),
    "replay": ((ReplayJob, "run"),),
    "report": ((stages, "write_report"),),
}


class _Clock(threading.local):
    """Whether this thread is within a stage."""

    is_running = False


@contextmanager
def timing_stages() -> Iterator[dict[str, float]]:
    """Seconds of the stages within this context, by stage."""
    seconds: defaultdict[str, float] = defaultdict(float)
    clock = _Clock()

    def clocked(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **named: Any) -> Any:
            if clock.is_running:
                return function(*args, **named)
            clock.is_running, start = True, time.perf_counter()
            try:
                return function(*args, **named)
            finally:
                clock.is_running = False
                seconds[stage] += time.perf_counter() - start

        return run

    with ExitStack() as stack:
        for stage, functions in STAGES.items():
            for owner, name in functions:
                stack.enter_context(mock.patch.object(owner, name, clocked(stage, getattr(owner, name))))
        yield seconds


def time_stages(
    study: Study, prompts: Path, boundary: int, folder: Path, products: Products, repeat: int
) -> list[Workload]:
    """Runs of everything, each in a fresh folder: a workload for each stage, and one for the whole."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    run = folder / "run"
    for _ in range(repeat):
        shutil.rmtree(run, ignore_errors=True)
        with timing_stages() as seconds:
            whole, _ = timed(
                lambda: actcache.run(
                    checkpoints=study.folders,
                    prompts=prompts,
                    out=run,
                    limit=len(study.prompts),
                    boundary=boundary,
                    dtype=study.dtype,
                    max_new=study.max_new,
                    stability=0,
                    resident="all",
                    quiet=True,
                )
            )
        times["loads"].append(sum(of["load_s"] for of in RunFolder(run).timings().values()))
        for stage in STAGES:
            times[stage].append(seconds[stage])
        times["all"].append(whole)
    limits = _limits(study, RunFolder(run), boundary, products)
    one = {"actcache": 1}
    return [
        Workload.of(f"actcache run: {stage}", "run", {"actcache": took}, one, limits.get(stage), {})
        for stage, took in times.items()
    ]


def _limits(study: Study, run: RunFolder, boundary: int, products: Products) -> dict[str, tuple[float, float]]:
    """Multiply-adds at this machine's rate of them, and bytes at this disk's, each by the median and by the best."""
    store = run.open_store()
    ours = Ours(study, store)
    n_compared = sum(step + 1 for step in store.events["step"].to_pylist())
    forwards = [*ours.forward_work(), Work(study.head, [n_compared], 2)]
    replays = ours.replay_work(boundary, 4)
    products.expect([*forwards, *replays])
    products.sample()
    captured = products.seconds(forwards)
    per_product = [seconds / sum(work.n_products for work in forwards) for seconds in captured]
    searched = run.timings()["capture"]["search_multiply_adds"]
    weights = sum(file.stat().st_size for place in study.folders.values() for file in place.glob("*.safetensors"))
    stored = store.summary()["state_bytes"]["stored"]
    page = run.report.stat().st_size

    def at_disk(n_bytes: int, which: int) -> tuple[float, float]:
        taken = sorted(_through_disk(run.path, n_bytes)[which] for _ in range(3))
        return taken[1], taken[0]

    return {
        # Weights are read by the capture, and their late blocks again; a search's products are as fast as a forward's.
        "loads": at_disk(weights, 1),
        "search": (searched * per_product[0], searched * per_product[1]),
        "capture forward": captured,
        "write": at_disk(stored, 0),
        "read": at_disk(stored, 1),
        "replay": products.seconds(replays),
        "report": at_disk(page, 0),
    }


def _through_disk(folder: Path, n_bytes: int) -> tuple[float, float]:
    """Seconds to write so many bytes durably to one file, and to read them back."""
    path, content = folder / "bytes", os.urandom(n_bytes)

    def write() -> None:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    try:
        return timed(write)[0], timed(path.read_bytes)[0]
    finally:
        path.unlink(missing_ok=True)
