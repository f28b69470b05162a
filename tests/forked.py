"""Real processes that are there at once: forked from one that has imported what a command needs and done nothing else.

Importing torch and transformers takes seconds in each process that a test starts anew. A ``Process`` has its own argv,
environment, folder, streams and signals, and ends as any other does. Tests of what is imported, of memory and of what
is read when libraries are imported start a new interpreter instead.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

READ_AT_IMPORT = ("OMP_", "MKL_", "HF_", "TORCH", "TRANSFORMERS_", "PYTHON", "ACTCACHE_ENGINE")
_SUBREAPER = 36  # of prctl(2): processes whose parent has ended become this one's children
_Popen = subprocess.Popen  # tests may put Process in its place
_SIZE = 4  # bytes of a number on the channel


class Process(subprocess.Popen):  # type: ignore[type-arg]
    """A ``Popen`` of ``[sys.executable, "-m", MODULE, ...]``, of ``-c CODE``, or of a script.

    It is a new interpreter where forking would not do the same: elsewhere than on Linux, or where what libraries read
    when they are imported is another.
    """

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, *more: Any) -> None:  # type: ignore[override]
        cwd, env = more[2:4]
        pipes = more[7:13]
        program, *words = map(os.fspath, args)
        environment = dict(os.environ if env is None else env)
        if sys.platform != "linux" or program != sys.executable or preexec_fn or not _is_served(environment):
            super()._execute_child(args, executable, preexec_fn, *more)  # type: ignore[misc]
            return
        asked = {"words": words, "cwd": os.fspath(cwd or os.getcwd()), "env": environment}
        message = json.dumps(asked).encode()
        streams = [given if given >= 0 else fd for fd, given in enumerate((pipes[0], pipes[3], pipes[5]))]
        channel, _ = _template()
        socket.send_fds(channel, [len(message).to_bytes(_SIZE, "big")], streams)
        channel.sendall(message)
        self.pid = int.from_bytes(_receive(channel, _SIZE), "big")
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _is_served(environment: dict[str, str]) -> bool:
    """Whether libraries would read the same at their import as they did in the template."""
    had = _template()[1]
    read = [name for name in environment.keys() | had.keys() if name.startswith(READ_AT_IMPORT)]
    return all(environment.get(name) == had.get(name) for name in read)


def run(args: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` with what was written, as text."""
    with Process(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(args, process.returncode, out, err)


@functools.cache
def _template() -> tuple[socket.socket, dict[str, str]]:
    """The way to the process that others are forked from, and the environment in which it imported."""
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
    ours, theirs = socket.socketpair()
    # As the command line does before it loads torch.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    with theirs:
        command = [sys.executable, os.fspath(Path(__file__)), str(theirs.fileno())]
        process = _Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, env=environment)
    atexit.register(process.wait)
    atexit.register(ours.close)  # at which it ends
    return ours, environment


def _receive(channel: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = channel.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _serve(channel: socket.socket) -> None:
    """Fork whatever is asked for, until nobody can ask any more."""
    while True:
        size, streams, _, _ = socket.recv_fds(channel, _SIZE, 3)
        if not size:
            return
        asked = json.loads(_receive(channel, int.from_bytes(size, "big")))
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                for fd in (reading, writing, channel.detach()):
                    os.close(fd)
                _become(asked, streams)
                return
            os.write(writing, pid.to_bytes(_SIZE, "big"))
            os._exit(0)
        # Once the process between has ended, the new one is a child of the one that asked, which can wait for it.
        os.waitpid(between, 0)
        channel.sendall(os.read(reading, _SIZE))
        for fd in (reading, writing, *streams):
            os.close(fd)


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    """Do as ``python WORDS`` does. Whatever it raises ends this process as it would end that one."""
    for fd, given in enumerate(streams):
        os.dup2(given, fd)
        os.close(given)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    what, *words = asked["words"]
    if what == "-m":
        sys.path[0] = asked["cwd"]
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.path[0] = ""
        sys.argv = [what, *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = os.fspath(Path(what).parent)
        sys.argv = [what, *words]
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    import gc
    import importlib
    import pkgutil

    import pyarrow.parquet  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    import actcache
    import actcache.cli

    for module in pkgutil.walk_packages(actcache.__path__, "actcache."):
        if not module.name.endswith(("__main__", "ray")) and ".benches" not in module.name:
            importlib.import_module(module.name)
    gc.freeze()
    threads = {task.joinpath("comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert threads <= {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}, "a thread is lost in a fork"
    _serve(socket.socket(fileno=int(sys.argv[1])))
