"""Cluster: the jobs of a stage on a Ray cluster, or on one that is started here for the time of a command.

Ray is trusted with nothing but placement. Every job's truth is its file or its segment's commit record, so a worker may
die at any time, and the driver too: the same command goes on. Which worker gets what is scheduler.py's, what a worker
does worker.py's. Knows Ray; knows nothing of what jobs compute.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from actcache.capture.decide import Searched
from actcache.cpus import usable_cpus
from actcache.errors import CheckError, InputError
from actcache.models.devices import AUTO, CPU, CUDA
from actcache.progress import OnProgress, Tally, Told, nobody_told
from actcache.store.far_path import path_at
from actcache.study.capture import CaptureStage
from actcache.study.engine import LateJob, LocalEngine, stacks_of
from actcache.study.holding import ONE, Holding
from actcache.study.planned_cluster import segments_together
from actcache.study.replay_job import ReplayJob
from actcache.study.results import file_name
from actcache.study.runner import Answering, ModelJob, Runner, groups_of
from actcache.study.scheduler import IN_FLIGHT, Scheduler, Task
from actcache.study.worker import Answer, Stage, Worker

T = TypeVar("T")

_WAIT_S = 30.0  # after which it is said that no worker is there
_NAMED = 3  # tasks in quarantine that an error names
_STORE_BYTES = 100 << 20  # of Ray's object store, through which no array goes


@dataclass(frozen=True)
class Shape:
    """What workers are.

    Attributes:
        device: of each, as it sees them.
        n_gpus: of each; several are of one machine.
        n: how many; fewer are there where the cluster has not the room.
        threads: of each on the CPU.
    """

    device: str
    n_gpus: int
    n: int
    threads: int


class Cluster(Runner):
    """Runs jobs by actors, each of which holds what its jobs need."""

    is_elsewhere = True
    worker: type[Worker] = Worker
    """What an actor is."""

    def __init__(
        self,
        run: str | Path,
        holding: Holding,
        *,
        checkpoints: Mapping[str, str] | None = None,
        address: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """For a run; the cluster is looked for when the first job is there.

        Args:
            run: its folder, which every worker sees under this path.
            holding: of the checkpoints; of its devices, each worker has as many.
            checkpoints: where those are that moved, by label.
            address: of a cluster; None for the one that the environment names, or else one of this machine alone.
            workers: how many; None for as many as there are GPUs, or one for each machine without any.
            threads: of each worker on the CPU; None for an equal share.
            say: told, in one line, what a person should know.
        """
        self._run, self._holding, self._checkpoints = str(path_at(run).resolve()), holding, dict(checkpoints or {})
        self._address, self._asked, self._threads, self._say = address, workers, threads, say
        self._n_stages = 0
        self._shape = Shape(CPU, 0, 0, 1)
        self.actors: dict[int, Any] = {}
        self._groups: list[Any] = []
        self._is_own = False
        self._taken: dict[str, Any] | None = None

    # ---- what a stage asks for ----

    def run(
        self, jobs: Sequence[LateJob | ModelJob], engine: LocalEngine, folder: Path, told: Told = nobody_told
    ) -> None:
        """See :class:`Runner`.

        Raises:
            CheckError: some jobs failed again and again; all others are finished.
            InputError: Ray is not there, or no such cluster.
        """
        if not jobs:
            return
        folder.mkdir(parents=True, exist_ok=True)
        late = [job for job in jobs if not isinstance(job, ModelJob)]
        engine.expect(late)
        self.begin()
        stage = Stage(self._n_stages, self._run, self._checkpoints, self._held(), str(folder.resolve()))
        # Their order keeps those together that read the same states.
        groups: list[Sequence[LateJob | ModelJob]] = [[job] for job in jobs]
        if self._holding.stream:
            shared = [job for job in late if isinstance(job, ReplayJob) and not engine.has_kept(job)]
            own = {id(job) for job in shared}
            groups = [[job] for job in jobs if id(job) not in own]
            for label in dict.fromkeys(job.late for job in shared):
                groups += groups_of([job for job in shared if job.late == label], engine)

        def needs(job: LateJob | ModelJob) -> tuple[str, ...]:
            """Nothing, where a job replays nothing."""
            if isinstance(job, ModelJob):
                return (f"all of {job.label}",)
            return () if isinstance(job, ReplayJob) and engine.has_kept(job) else stacks_of(job)

        def sent(group: Sequence[LateJob | ModelJob]) -> tuple[Any, ...]:
            job = group[0]
            first = {label: engine.first[label] for label in needs(job) if label in engine.first}
            kept = engine.finished_of(job) if isinstance(job, ReplayJob) else {}
            return stage, group, first, kept

        tasks = {Task(file_name(group[0].key), needs(group[0])): group for group in groups}
        self.complete("run", tasks, sent, told)

    def capture(
        self,
        stage: CaptureStage,
        names: Sequence[str],
        jobs_of: Callable[[Sequence[str]], Sequence[Any]],
        told: Told,
    ) -> Searched:
        """Capture segments, or rows that they lack (errors as :meth:`run`).

        Args:
            stage: what a worker has to know of the capture.
            names: of segments; as many are computed together as one process does, if that leaves enough for all.
            jobs_of: makes the jobs of some of them, when they are sent.
            told: hears of their units.

        Returns:
            What the searches did.
        """
        if not names:
            return Searched()
        self.begin()
        stage = replace(stage, number=self._n_stages, holding=self._held())
        apart = stage.holding.stream or stage.holding.resident == ONE
        n = segments_together(len(names), stage.settings.shard_prompts, self._shape.n, apart=apart)
        bundles = [names[start : start + n] for start in range(0, len(names), n)]
        tasks = {Task(", ".join(bundle), "capture"): bundle for bundle in bundles}
        answers = self.complete("capture", tasks, lambda bundle: (stage, jobs_of(bundle)), told)
        return Searched(*map(sum, zip(Searched(), *(one.searched for one in answers if one.searched), strict=True)))

    def answer(
        self, analysis: Answering, run: Any, options: Any, on_progress: OnProgress, say: Callable[[str], None]
    ) -> dict[str, Any]:
        """See :class:`Runner`: what has no jobs that could be shared is answered by one worker, whole."""
        if analysis.has_parts:
            return super().answer(analysis, run, options, on_progress, say)
        self.begin()
        stage = Stage(self._n_stages, self._run, self._checkpoints, self._held(), "")
        tally = Tally(1, "analyses", on_progress)
        task = {Task(analysis.name, "all of a run"): (stage, analysis.name, asdict(options))}
        (answer,) = self.complete("answer", task, lambda sent: sent, tally.add)
        for line in answer.said:
            say(line)
        assert answer.content is not None
        return dict(answer.content)

    # ---- tasks ----

    def complete(
        self, method: str, tasks: Mapping[Task, T], sent: Callable[[T], tuple[Any, ...]], told: Told
    ) -> list[Answer]:
        """Run all tasks by a method of the workers, with what ``sent`` makes of each."""
        import ray
        from ray.exceptions import RayActorError, RayError

        scheduler: Scheduler[int] = Scheduler(tasks)
        began_s = time.monotonic()
        coming = {actor.ready.remote(): name for name, actor in self.actors.items()}
        flying: dict[Any, tuple[int, Task]] = {}
        answers: list[Answer] = []

        def leave(name: int, reason: str, *, blamed: bool) -> list[Task]:
            for ref in [ref for ref, (at, _) in flying.items() if at == name]:
                del flying[ref]
            coming[self.actors[name].ready.remote()] = name
            return scheduler.leave(name, reason, blamed=blamed)

        def came(name: int, ref: Any) -> None:
            try:
                ray.get(ref)
            except RayActorError:  # for good: Ray itself begins anew those that died
                self.actors[name] = self._actor()
                coming[self.actors[name].ready.remote()] = name
            else:
                scheduler.join(name)

        def answered(name: int, task: Task, ref: Any) -> list[Task]:
            try:
                answer: Answer = ray.get(ref)
            except RayActorError as error:
                return leave(name, f"its worker died: {_first_line(error)}", blamed=True)
            except RayError as error:  # what was sent, or came back, could not be read
                return scheduler.failed(name, task, _first_line(error))
            if not answer.reason:
                scheduler.done(name, task)
                answers.append(answer)
                doing = f"{scheduler.n_workers} workers alive, {scheduler.n_requeued} requeued"
                told(answer.n, tokens=answer.tokens, doing=doing)
                return []
            given_up = scheduler.failed(name, task, answer.reason)
            if answer.is_lost:
                ray.kill(self.actors[name], no_restart=False)
                given_up += leave(name, answer.reason, blamed=False)
            return given_up

        while not scheduler.is_over:
            for name, task in scheduler.place():
                flying[getattr(self.actors[name], method).remote(*sent(tasks[task]))] = name, task
            done, _ = ray.wait([*flying, *coming], timeout=None if scheduler.n_workers else _WAIT_S)
            if not done:
                self._say(f"no worker is there yet; the cluster has {_said(ray.cluster_resources())}")
            for ref in done:
                if ref in coming:
                    came(coming.pop(ref), ref)
                elif ref in flying:  # else its worker has died meanwhile
                    for task in answered(*flying.pop(ref), ref):
                        self._say(f"{task.name} is given up: {_told_of(task)}")
        self._taken = {
            "workers": self._shape.n,
            "gpus": self._shape.n * self._shape.n_gpus,
            "tasks": len(tasks),
            "elapsed_s": time.monotonic() - began_s,
            "busy_s": scheduler.busy_s,
            "requeued": scheduler.n_requeued,
        }
        if given_up := scheduler.quarantined:
            more = f" and {len(given_up) - _NAMED} more" if len(given_up) > _NAMED else ""
            said = "; ".join(f"{task.name} ({_told_of(task)})" for task in given_up[:_NAMED])
            raise CheckError(
                f"{len(given_up)} of {len(tasks)} jobs failed again and again, all others are finished: {said}{more}; "
                "once the reason is gone, the same command runs what is left"
            )
        return answers

    # ---- workers ----

    def begin(self) -> None:
        """Have workers, and a new stage."""
        self._n_stages += 1
        if self.actors:
            return
        ray = imported(self._address)
        if not ray.is_initialized():
            self._is_own = True
            _connect(ray, self._address)
        self._shape = self._shape_of(ray.cluster_resources(), len(ray.nodes()))
        for name in range(self._shape.n):
            self.actors[name] = self._actor()

    def _shape_of(self, resources: Mapping[str, float], n_machines: int) -> Shape:
        """What workers shall be, on a cluster that has so much."""
        n_there, given = int(resources.get("GPU", 0)), self._holding.device
        device = (CUDA if n_there else CPU) if given == AUTO else given
        if device == CPU:
            n = self._asked or n_machines
            return Shape(CPU, 0, n, self._threads or max(1, usable_cpus() * n_machines // n))
        n_gpus = len(device.split(","))
        if not (n := self._asked or n_there // n_gpus):
            raise InputError(
                f"--device {given}: a worker takes {n_gpus} GPUs, and the cluster has {n_there}; use --device cpu, or "
                "give --workers to wait for machines that are to come"
            )
        seen = ",".join(f"{CUDA}:{index}" for index in range(n_gpus)) if n_gpus > 1 else CUDA
        return Shape(seen, n_gpus, n, self._threads or max(1, int(resources.get("CPU", 1)) // n))

    def _held(self) -> Holding:
        return replace(self._holding, device=self._shape.device)

    def _actor(self) -> Any:
        """A new worker: Ray begins it anew whenever it dies, wherever there is room."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        n_gpus = self._shape.n_gpus
        strategy: Any = "SPREAD"
        if n_gpus > 1:  # of one machine
            self._groups.append(placement_group([{"GPU": n_gpus}], strategy="STRICT_PACK"))
            strategy = PlacementGroupSchedulingStrategy(self._groups[-1])
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": n_gpus, "scheduling_strategy": strategy}
        # No call is made again by Ray but the first: it waits until the worker is there, or there again.
        kind: Any = ray.remote(_actor_class(ray, self.worker))
        return kind.options(**options, max_concurrency=IN_FLIGHT, max_restarts=-1, max_task_retries=0).remote(
            self._shape.threads
        )

    def taken(self) -> dict[str, Any] | None:
        """See :class:`Runner`."""
        taken, self._taken = self._taken, None
        return taken

    def close(self) -> None:
        """End the workers, and the cluster if it was begun here."""
        if not self.actors and not self._is_own:
            return
        import ray
        from ray.util.placement_group import remove_placement_group

        try:
            for actor in self.actors.values():
                ray.kill(actor)
        finally:
            for group in self._groups:
                remove_placement_group(group)
            self.actors, self._groups = {}, []
            if self._is_own:
                self._is_own = False
                ray.shutdown()


def _actor_class(ray: Any, worker: type[Worker]) -> type:
    """A worker as Ray wants it."""
    return type("Actor", (worker,), {"ready": ray.method(max_task_retries=-1)(worker.ready)})


def imported(address: str | None) -> Any:
    """Ray, so that a cluster of this machine alone listens on loopback alone.

    Raises:
        InputError: it is not installed.
    """
    if _address_of(address) is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # else workers wait for whatever else runs here
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'actcache[ray]'") from error
    return ray


def _address_of(address: str | None) -> str | None:
    return address or os.environ.get("RAY_ADDRESS") or None


def _connect(ray: Any, address: str | None) -> None:
    """Connect to a cluster, or begin one.

    Raises:
        InputError: there is none at the address.
    """
    how: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if (found := _address_of(address)) is not None:
        try:
            ray.init(address=found, **how)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--address {found}: no Ray cluster answers: {_first_line(error)}") from error
        return
    ray.init(address="local", include_dashboard=False, object_store_memory=_STORE_BYTES, **how)


def _told_of(task: Task) -> str:
    n = task.failures + task.deaths
    return f"tried {n} times, at last: {task.reason}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _said(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("GPU", "CPU"))
