"""Dealt: what each stage and analysis of a study takes of every one of N devices, before anything ran.

Jobs are independent, and dealt evenly: time divides by N, up to the number of jobs. Checkpoints are dealt as
``models.devices`` deals them: with as many devices as checkpoints or more, each holds one. Knows plans and jobs; knows
no analyses and no files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from actcache.models.cost import ModelShape
from actcache.study.engine import LateJob
from actcache.study.plan import Assumptions, Study
from actcache.study.prefix_job import PREFIX
from actcache.study.replay_job import ReplayJob
from actcache.study.states_job import StatesJob
from actcache.study.whole_models import ModelJob
from actcache.study.work import Places, ReplayWork, checks, replay_memory, total


@dataclass(frozen=True)
class Share:
    """What one stage or analysis takes.

    Attributes:
        name: of it.
        multiply_adds: of all devices together.
        jobs: that can be dealt, at most so many devices work at once.
        time_s: where all devices work; None without a rate.
        memory_bytes: of each device at most, with what the host holds for it.
        stored_bytes: of states.
        read_bytes: states and weights, each read once.
    """

    name: str
    multiply_adds: float
    jobs: int
    time_s: float | None
    memory_bytes: float
    stored_bytes: float
    read_bytes: float


@dataclass(frozen=True)
class Outlay:
    """What an analysis takes where its work is no jobs.

    Attributes:
        multiply_adds: of all devices together.
        n_jobs: parts that can be dealt.
        memory_bytes: of a device, beside that of the checkpoints.
        stored_bytes: of rows.
        read_bytes: of rows and weights, checkpoints apart.
        runs_models: whether whole checkpoints run.
    """

    multiply_adds: float
    n_jobs: int
    memory_bytes: float = 0.0
    stored_bytes: float = 0.0
    read_bytes: float = 0.0
    runs_models: bool = False


@dataclass(frozen=True)
class Dealt:
    """A study on N devices.

    Attributes:
        study: what is planned.
        assumed: what configs do not tell.
        estimated: of one device, as :func:`actcache.study.plan.estimate` or ``estimate_apart`` gives it.
        devices: N.
        apart: whether one checkpoint or block is in memory at a time: then there is nothing to deal.
    """

    study: Study
    assumed: Assumptions
    estimated: Mapping[str, float]
    devices: int = 1
    apart: bool = False

    @property
    def n_segments(self) -> int:
        """Segments of the capture."""
        return math.ceil(len(self.study.lengths) / self.study.capture.shard_prompts)

    def stages(self) -> list[Share]:
        """Of capture, the checks of stability where any are asked for, and the grid where there is one."""
        study, size, rows = self.study, self.study.captured.itemsize, self.estimated
        n_jobs, all_weights = (
            self.n_segments * study.n_checkpoints,
            study.n_checkpoints * study.shape.n_parameters * size,
        )
        memory = self._memory("capture_memory_bytes", ())
        products = rows["search_multiply_adds"] + rows["capture_multiply_adds"]
        read = rows.get("capture_read_bytes", all_weights)
        found = [
            self._share("capture", products, n_jobs, rows.get("capture_s"), memory, rows["stored_bytes"], read),
        ]
        if products := rows["stability_multiply_adds"]:
            found.append(self._share("stability", products, n_jobs, rows.get("stability_s"), memory, 0.0, all_weights))
        if study.work:
            products = rows["grid_multiply_adds"] + rows["variants_multiply_adds"]
            boundaries = {one.boundary for one in study.work}
            n_jobs = self.n_segments * len(study.work)
            read = rows["stored_bytes"] / len(study.capture.boundaries) * len(boundaries)
            read += rows.get("grid_read_bytes", study.n_checkpoints * self.late_weights(min(boundaries)))
            memory = self._memory("grid_memory_bytes", study.work)
            found.append(self._share("grid", products, n_jobs, rows.get("grid_s"), memory, 0.0, read))
        return found

    def of_jobs(self, name: str, jobs: Sequence[LateJob | ModelJob], beside: float = 0.0) -> Share:
        """Of the jobs of an analysis, which holds so many bytes beside."""
        study, size = self.study, self.study.captured.itemsize
        late = [job for job in jobs if not isinstance(job, ModelJob)]
        models = [job for job in jobs if isinstance(job, ModelJob)]
        products = sum(n for part, n in total(job.cost(study.shapes) for job in jobs).items() if part != "hooks")
        rows: dict[tuple[str, int, str], float] = {}  # the states of a segment are read by one job after another
        first: dict[str, int] = {}
        for job in late:
            n_rows = float(Places.of(job.lengths, job.sequences).sequences.sum())
            of_job = job.scored if isinstance(job, ReplayJob) else job.upstreams
            rows |= {(job.segment, job.boundary, label): n_rows for label in of_job}
            first[job.late] = min(job.boundary, first.get(job.late, job.boundary))
        row_bytes = study.shape.width * size
        read = sum(rows.values()) * row_bytes / self.assumed.compression + sum(map(self.late_weights, first.values()))
        read += len({job.label for job in models}) * study.shape.n_parameters * size
        states = [job for job in models if isinstance(job, StatesJob)]
        stored = row_bytes * sum(
            len(ids) - first for job in states for ids, first in zip(job.sequences, job.first, strict=True)
        )
        work = [
            job.work if isinstance(job, ReplayJob) else ReplayWork(job.boundary, job.late, (PREFIX,), ())
            for job in late
        ]
        memory = self._memory("grid_memory_bytes", work) if work else 0.0
        if models:
            memory = max(memory, self._memory("capture_memory_bytes", ()))
        rate = self.assumed.rates.get("grid")
        return self._share(name, products, len(jobs), rate and products / rate, memory + beside, stored, read)

    def of_outlay(self, name: str, outlay: Outlay) -> Share:
        """Of what is no jobs."""
        rate, memory, read = self.assumed.rates.get("grid"), outlay.memory_bytes, outlay.read_bytes
        if outlay.runs_models:
            memory += self._memory("capture_memory_bytes", ())
            read += self.study.n_paired * self.study.shape.n_parameters * self.study.captured.itemsize
        time_s = rate and outlay.multiply_adds / rate
        return self._share(name, outlay.multiply_adds, outlay.n_jobs, time_s, memory, outlay.stored_bytes, read)

    def of_checks(self, name: str, samples: Sequence[int | None]) -> Share:
        """Of checks of stability, of so many events in each dtype."""
        study, expected = self.study, self.assumed.expected
        capture = study.captured.cost(study.shapes, expected)
        n_sequences = expected.all_sequences * len(study.lengths)
        (products,) = checks(capture, study.n_checkpoints, samples, n_sequences, study.n_paired).parts.values()
        rate, weights = self.assumed.rates.get("stability"), study.shape.n_parameters * study.captured.itemsize
        n_jobs, memory = self.n_segments * study.n_paired, self._memory("capture_memory_bytes", ())
        return self._share(name, products, n_jobs, rate and products / rate, memory, 0.0, study.n_paired * weights)

    def _share(
        self,
        name: str,
        products: float,
        n_jobs: int,
        time_s: float | None,
        memory: float,
        stored: float,
        read: float,
    ) -> Share:
        """``time_s`` is one device's."""
        time_s = time_s and time_s * math.ceil(n_jobs / self.devices) / n_jobs
        return Share(name, products, n_jobs, time_s, memory, stored, read)

    def late_weights(self, boundary: int) -> float:
        """Bytes of a late stack from a boundary on."""
        shape = self.study.shape
        return (sum(shape.block_parameters[boundary:]) + shape.readout_parameters) * self.study.captured.itemsize

    def _memory(self, name: str, work: Sequence[ReplayWork]) -> float:
        """Of a device that holds its share of the checkpoints."""
        study, expected = self.study, self.assumed.expected
        if self.apart:
            return self.estimated[name]
        n_held = math.ceil(study.n_checkpoints / self.devices)
        held: dict[str, ModelShape] = dict(list(study.shapes.items())[:n_held])
        captured = replace(study.captured, n_paired=min(study.n_paired, n_held))
        return replay_memory(work, captured, held, expected) if work else captured.memory(held, expected)
