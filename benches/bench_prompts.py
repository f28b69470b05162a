"""How long a large prompts file takes to start with, and how much memory: each way in a process of its own.

    python benches/bench_prompts.py [--prompts 1000000]

Files are made whose prompts are 30 words long. ``read`` is what a capture does first: one pass that validates every
line and makes the digests of all segments; so are ``csv`` and ``parquet``, of tables with the same rows. ``loads`` is
Python's parser alone, and keeps nothing. ``capture`` is the command for the demo's pair, up to its first job, which is
not run; ``plan`` is all of that command. CPU seconds are those of the process, the start of Python and all imports
among them. Before that, prompts that are read again are compared with those of a list. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from measure import median, print_result

from actcache import prompts as prompts_module
from actcache.prompts import read_prompts

DEMO = Path(prompts_module.__file__).parent / "demo"
WORDS = re.findall(r"\w+", "the baker opened a door to the mill beside the river and asked whether a train would stop")
_TIMED = """
import sys, time
start = time.perf_counter()
{}
seconds = time.perf_counter() - start
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, time.process_time(), int(peak) * 1024, file=sys.stderr)
"""
_READ = "from actcache.prompts import read_prompts\nread_prompts({%s!r})"
_PAIR = "'--pt', {pt!r}, '--it', {it!r}, '--prompts', {path!r}, '--quiet'"
_CAPTURE = f"""
from actcache.cli import main
from actcache.study.capture import LocalCapture
def first(engine, jobs, publish, told):
    next(iter(jobs))
    raise KeyboardInterrupt
LocalCapture.complete = first
assert main(['capture', {_PAIR}, '--out', {{out!r}}]) == 130
"""
WAYS = {
    "loads": "import json\nfor line in open({path!r}): json.loads(line)",
    "read": _READ % "path",
    "csv": _READ % "csv",
    "parquet": _READ % "parquet",
    "capture": _CAPTURE,
    "plan": f"from actcache.cli import main\nassert main(['plan', {_PAIR}, '--rate', '1e10']) == 0",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000, help="of the file (%(default)s)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few seconds' worth, to see that it runs")
    args = parser.parse_args(argv)
    if args.smoke:
        args.prompts, args.repeat = 3_000, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        tables = {kind: str(path.with_suffix(f".{kind}")) for kind in ("csv", "parquet")}
        write(path, args.prompts)
        table = pyarrow.json.read_json(path)
        pyarrow.csv.write_csv(table, tables["csv"])
        pyarrow.parquet.write_table(table, tables["parquet"])
        del table
        check(path)
        names = {"path": str(path), "pt": str(DEMO / "pt"), "it": str(DEMO / "it"), "out": f"{folder}/RUN", **tables}
        found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
        for _ in range(args.repeat):
            for way, code in WAYS.items():
                timed = _TIMED.format(code.format(**names))
                done = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True, check=True)
                found[way].append([float(number) for number in done.stderr.splitlines()[-1].split()])
        ways = {
            way: {
                "seconds": median([seconds for seconds, _, _ in runs]),
                "cpu_seconds": median([seconds for _, seconds, _ in runs]),
                "peak_bytes": max(memory for _, _, memory in runs),
            }
            for way, runs in found.items()
        }
        for way, of in ways.items():
            seconds, of_cpu, peak = of.values()
            print(f"{way:8} {seconds:8.2f} s {of_cpu:8.2f} s of CPU {peak / 1e6:8.0f} MB", file=sys.stderr)
        print_result("prompts", {"n_prompts": args.prompts, "file_bytes": path.stat().st_size, "ways": ways})
    return 0


def write(path: Path, n: int) -> None:
    """A prompts file."""
    with path.open("w") as file:
        for i in range(n):
            words = [WORDS[(i * 7 + k * (1 + i % 5)) % len(WORDS)] for k in range(30)]
            file.write(json.dumps({"id": f"prompt-{i}", "prompt": " ".join(words), "category": "made"}) + "\n")


def check(path: Path) -> None:
    """Exit unless prompts that are read where they are asked for are those of the lines."""
    prompts = read_prompts(path)
    lines = path.read_text().splitlines()
    for start in (0, len(lines) // 2, len(lines) - 64):
        for prompt, line in zip(prompts[start : start + 64], lines[start : start + 64], strict=True):
            if {"id": prompt.id, "prompt": prompt.text, **prompt.carried} != json.loads(line):
                sys.exit(f"{prompt.named} is another than its line; no figures")


if __name__ == "__main__":
    sys.exit(main())
