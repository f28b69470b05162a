"""Planned cluster: what capture and grid take on N workers of a cluster, before anything ran.

Tasks are cut and placed as cluster.py and the scheduler do it, by a clock that jumps. Every worker is of one GPU. Knows
plans; knows no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from actcache.capture.residency import PER_LOAD, TOGETHER
from actcache.study.dealt import Dealt
from actcache.study.scheduler import Task
from actcache.study.simulated_cluster import Simulated
from actcache.study.work import replay_memory

# More tasks for each worker than this are not simulated: what the ends leave unused is less than one in as many.
_MOST_EACH = 100
ROUNDS = 4
"""Tasks of a capture for each worker, at least: the last one's end is not far behind the first one's."""


def segments_together(n_segments: int, shard_prompts: int, n_workers: int, *, apart: bool = False) -> int:
    """How many segments of a capture make a task: as many as one process computes together, if that leaves enough for
    all workers."""
    most = max(1, (PER_LOAD if apart else TOGETHER) // shard_prompts)
    return min(most, max(1, n_segments // (ROUNDS * n_workers)))


@dataclass(frozen=True)
class OnWorkers:
    """What a stage takes of all workers together.

    Attributes:
        name: of it.
        tasks: that are placed.
        time_s: from its beginning to its end; None without a rate.
        gpu_hours: of all workers, whether they are busy or not.
        busy: share of that time in which they are.
        held_bytes: of memory of each worker at most: what it holds, and what a task needs beside.
        read_bytes: over the network, of all: weights by every worker, and rows by every task.
        written_bytes: into the store, or the run.
    """

    name: str
    tasks: int
    time_s: float | None
    gpu_hours: float | None
    busy: float | None
    held_bytes: float
    read_bytes: float
    written_bytes: float


def on_workers(dealt: Dealt, n: int) -> list[OnWorkers]:
    """Of the capture, and of the grid where there is one.

    Args:
        dealt: the plan, for one device.
        n: workers.
    """
    study, rows, segments = dealt.study, dealt.estimated, dealt.n_segments
    size, loads = study.captured.itemsize, dealt.assumed.load_s
    weights = study.n_checkpoints * study.shape.n_parameters * size
    together = segments_together(segments, study.capture.shard_prompts, n, apart=dealt.apart)
    tasks = {"capture": math.ceil(segments / together)}
    held, stored = rows["capture_memory_bytes"], rows["stored_bytes"]
    read = float(weights * min(n, tasks["capture"]))
    found = [_stage("capture", tasks, rows, loads.get("capture", 0.0), n, held, read, stored)]
    if study.work:
        labels, boundaries = list(study.shapes), {one.boundary for one in study.work}
        scopes = {scope for one in study.work for scope in one.scopes}
        tasks = dict.fromkeys(labels, segments * len(boundaries))
        late = dealt.late_weights(min(boundaries))
        one_late = replay_memory(study.work, study.captured, {labels[0]: study.shape}, dealt.assumed.expected)
        heads = (len(labels) - 1) * study.shape.readout_parameters * size
        read = stored / len(study.capture.boundaries) * len(boundaries) * len(labels)
        read += min(n, sum(tasks.values())) * (late + heads)
        final = rows["events"] * len(labels) ** 2 * len(boundaries) * len(scopes) * study.shape.width * size
        load_s = loads.get("grid", 0.0) / len(labels)
        found.append(_stage("grid", tasks, rows, load_s, n, one_late + heads, read, final))
    return found


def _stage(
    name: str,
    tasks: Mapping[str, int],
    rows: Mapping[str, float],
    load_s: float,
    n: int,
    held: float,
    read: float,
    written: float,
) -> OnWorkers:
    """Of tasks by what they need, which are alike."""
    n_tasks, alone_s = sum(tasks.values()), rows.get(f"{name}_s")
    if alone_s is None:
        return OnWorkers(name, n_tasks, None, None, None, held, read, written)
    each_s = max(0.0, alone_s - load_s * len(tasks)) / n_tasks
    time_s = _simulated(tasks, each_s, load_s, n)
    busy = n_tasks * each_s / (n * time_s) if time_s else 1.0
    return OnWorkers(name, n_tasks, time_s, n * time_s / 3600, busy, held, read, written)


def _simulated(tasks: Mapping[str, int], each_s: float, load_s: float, n: int) -> float:
    n_tasks = sum(tasks.values())
    if n_tasks > _MOST_EACH * n:
        return load_s + each_s * (n_tasks / n + 1)
    needed: Sequence[str] = [needs for needs, of in tasks.items() for _ in range(of)]
    one = Simulated({Task(str(number), needs): each_s for number, needs in enumerate(needed)}, n, load_s=load_s)
    one.run()
    return one.now
