"""What placing jobs on workers costs, and how busy it keeps them.

    python benches/bench_scale.py

Jobs here only wait, so that one machine can stand for many:

    overhead    jobs of ten seconds one after another on one worker of a Ray cluster, beside the same in this process;
                and what a job that takes no time takes on Ray
    workers     1 to 8 real workers: seconds of jobs, of all seconds of all workers
    simulated   16 to 64 workers by the same scheduler and a clock that jumps: uneven jobs, two late stacks, a load when
                a worker goes over to another; and the same where workers die

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from measure import print_result, timed

from actcache.progress import nobody_told
from actcache.study.cluster import Cluster
from actcache.study.holding import Holding
from actcache.study.scheduler import Task
from actcache.study.simulated_cluster import Simulated
from actcache.study.worker import Answer, Worker

JOB_S, LOAD_S, BEGIN_S = 10.0, 3.0, 30.0
JOBS_EACH = 40  # of a simulated worker
LIFE_S = 3600.0  # of a machine that may be taken away


class Waiting(Worker):
    """Waits."""

    def wait(self, seconds: float) -> Answer:
        """One job."""
        with self._running:
            time.sleep(seconds)
        return Answer(1)


class WaitingCluster(Cluster):
    """Of such workers."""

    worker = Waiting

    def wait(self, seconds: Sequence[float]) -> float:
        """How long jobs of so many seconds take."""
        tasks = {Task(str(number), "anything"): of for number, of in enumerate(seconds)}
        return timed(lambda: self.complete("wait", tasks, lambda of: (of,), nobody_told))[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="1,2,4,8", help="numbers of real workers")
    parser.add_argument("--jobs", type=int, default=3, help="jobs of ten seconds")
    parser.add_argument("--smoke", action="store_true", help="a size of seconds")
    args = parser.parse_args(argv)
    numbers = [2] if args.smoke else [int(one) for one in args.workers.split(",")]
    job_s = 0.2 if args.smoke else JOB_S
    result: dict[str, Any] = {"simulated": simulated([16] if args.smoke else [16, 32, 64])}
    result |= real(numbers, job_s, args.jobs)
    print_result("scale", result)
    return 0


def real(numbers: Sequence[int], job_s: float, n_jobs: int) -> dict[str, Any]:
    """Of workers that are processes."""
    found: dict[str, Any] = {"workers": {}}
    for n in numbers:
        cluster = WaitingCluster(".", Holding(), workers=n, threads=1)
        cluster.begin()
        import ray  # after the cluster has said where it shall listen

        try:
            ray.get([actor.ready.remote() for actor in cluster.actors.values()])
            if n == min(numbers):
                local_s, _ = timed(partial(wait_here, n_jobs * n, job_s))
                ray_s = cluster.wait([job_s] * n_jobs * n) * n
                empty_s = cluster.wait([0.0] * 200) / 200
                found["overhead"] = {"job_s": job_s, "local_s": local_s, "ray_s": ray_s, "share": ray_s / local_s - 1}
                found["overhead"]["empty_job_s"] = empty_s
                print(f"{n_jobs} jobs of {job_s:g} s: {local_s:.3f} s here, {ray_s:.3f} s on Ray", end="")
                print(f" ({ray_s / local_s - 1:+.2%}); an empty one {1e3 * empty_s:.2f} ms")
            seconds = [job_s / 5] * 8 * n
            share = sum(seconds) / (n * cluster.wait(seconds))
            found["workers"][n] = share
            print(f"{n} workers, {len(seconds)} jobs of {seconds[0]:g} s: {share:.1%} busy", flush=True)
        finally:
            cluster.close()
    return found


def wait_here(n: int, seconds: float) -> None:
    """Jobs in this process."""
    for _ in range(n):
        time.sleep(seconds)


def simulated(numbers: Sequence[int]) -> dict[str, Any]:
    """Of workers that are none."""
    found: dict[str, Any] = {}
    for n in numbers:
        for lives_s in (None, LIFE_S):
            chance = random.Random(n)
            tasks = {
                Task(f"job {number}", f"late {number % 2}"): JOB_S * chance.uniform(0.7, 1.3)
                for number in range(JOBS_EACH * n)
            }
            one = Simulated(tasks, n, load_s=LOAD_S, lives_s=lives_s, begins_s=BEGIN_S)
            scheduler = one.run()
            assert len(one.finished) == len(tasks) == scheduler.n_done
            name = f"{n} workers" + ("" if lives_s is None else f" that live for {lives_s / 3600:g} h")
            found[name] = {"share": one.efficiency, "deaths": one.deaths, "loads": one.loads, "jobs": len(tasks)}
            print(f"{name}, {len(tasks)} jobs: {one.efficiency:.1%} busy, {one.deaths} deaths, {one.loads} loads")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
