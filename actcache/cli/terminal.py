"""What a person sees on stderr: one line that lives, notes above it, one line for an error. Data goes to stdout."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType

from actcache.progress import PartDone, Progress

_REDRAW_S = 0.25  # of a terminal
_PLAIN_S = 10.0  # between two lines of a stage where stderr is a file or a pipe
_FIRST_PLAIN_S = 1.0  # before the first of them, so that what is refused at once is refused in one line
_TRUST_S = 2.0  # before this much work, its rate says nothing of the rest

_quiet = False
_shown: LiveLine | None = None  # the stage that is under way


def be_quiet(quiet: bool) -> None:
    """Show errors only from now on, or all."""
    global _quiet
    _quiet = quiet


def quiet_libraries() -> None:
    """transformers logs and draws bars; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


class LiveLine:
    """Progress of one stage: a line that is drawn anew on a terminal; plain lines, few of them, elsewhere.

    Use it as a context, and pass it on as ``on_progress``. Rate and time left come of work done within the context
    alone: what was found done counts for neither, nor does the time under :meth:`during`.
    """

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._now: Progress | None = None
        self._during: str | None = None
        self._lock = threading.RLock()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> LiveLine:
        global _shown
        self._lives = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._began_s = time.monotonic()
        self._aside_s = 0.0  # spent under during()
        self._written_s = -float("inf") if self._lives else self._began_s + _FIRST_PLAIN_S - _PLAIN_S
        _shown = self
        if not _quiet:
            self._ticker.start()
        self._update()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _shown
        _shown = None
        self._over.set()
        with self.cleared():
            if (error is None or isinstance(error, PartDone)) and not _quiet:
                print(self._ended(), file=sys.stderr, flush=True)

    def __call__(self, progress: Progress) -> None:
        """Take in how far the stage is."""
        with self._lock:
            self._now = progress
            if not self._lives and progress.done >= progress.total:
                self._written_s = time.monotonic()  # the line of the end comes soon, and says the same
            self._update()

    @contextmanager
    def during(self, doing: str) -> Iterator[None]:
        """Say what is done for the time of the block, whose length tells nothing of the work's rate."""
        start_s = time.monotonic()
        with self._lock:
            self._during = doing
            self._update()
        try:
            yield
        finally:
            with self._lock:
                self._during = None
                self._aside_s += time.monotonic() - start_s

    @contextmanager
    def cleared(self) -> Iterator[None]:
        """The line is off the terminal for the time of the block."""
        with self._lock:
            if self._lives and not _quiet:
                print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            yield

    def _tick(self) -> None:
        while not self._over.wait(_REDRAW_S):
            with self._lock:
                if not self._over.is_set():
                    self._update()

    def _update(self) -> None:
        now_s = time.monotonic()
        if _quiet or now_s - self._written_s < (_REDRAW_S if self._lives else _PLAIN_S):
            return
        self._written_s = now_s
        line = self.line()
        if self._lives:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80
            print(f"\r\x1b[K{line[: columns - 1]}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def line(self) -> str:
        """How far the stage is."""
        elapsed_s = time.monotonic() - self._began_s
        counts = self._counts()
        said = [self._during] if self._during is not None else [] if counts else ["reading what it needs"]
        said += [*counts[:1], clock(elapsed_s)]  # what matters most first: a narrow terminal cuts the end
        if self._during is None and (left_s := self._left_s()) is not None:
            said.append(f"about {clock(left_s)} left")
        return f"{self._stage}: {', '.join([*said, *counts[1:]])}"

    def _ended(self) -> str:
        took = f"took {clock(time.monotonic() - self._began_s)}"
        if round(self._aside_s):  # else the rate and the time do not seem to agree
            took += f", {clock(self._aside_s)} of it loading" + (", which the rate leaves out" if self._rate() else "")
        return f"{self._stage}: {', '.join([*self._counts(), took])}"

    def _counts(self) -> list[str]:
        now = self._now
        if now is None:
            return []
        said = [f"{now.done:,} of {now.total:,} {now.unit}" if now.total else f"no {now.unit} are missing"]
        if now.found:
            said[0] += f" ({now.found:,} of them before)"
        if now.doing and not self._over.is_set():
            said.append(now.doing)
        if now.tokens:
            said.append(f"{now.tokens:,} tokens")
        return [*said, *self._rate()]

    def _rate(self) -> list[str]:
        """What is done per second of work; nothing where too little was done to tell."""
        now, worked_s = self._now, self._worked_s()
        if now is None or worked_s <= _TRUST_S:
            return []
        n, what = (now.tokens, "tokens") if now.tokens else (now.done - now.found, now.unit)
        return [f"{_rounded(n / worked_s)} {what} a second"] if n else []

    def _worked_s(self) -> float:
        return time.monotonic() - self._began_s - self._aside_s

    def _left_s(self) -> float | None:
        """None as long as nothing has been done here from which it could follow."""
        now, worked_s = self._now, self._worked_s()
        if now is None or now.in_rounds or now.done in (now.found, now.total) or worked_s < _TRUST_S:
            return None
        return worked_s / (now.done - now.found) * (now.total - now.done)


def say(line: str) -> None:
    """A note on stderr, above the line of the stage that is under way."""
    if _quiet:
        return
    with nullcontext() if _shown is None else _shown.cleared():
        print(f"actcache: {line}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return printable(" ".join(str(error).split()))


def said_by_system(error: OSError) -> str:
    """What the system refused, and for which path."""
    if error.filename is None or error.strerror is None:
        return one_line(error)
    return printable(f"{error.filename}: {error.strerror}")


def reader_is_gone() -> bool:
    """Whether who read stdout or stderr has gone, as ``head`` does; what is still to be written then goes nowhere."""
    gone = []
    for stream in (sys.stdout, sys.stderr):
        try:
            number = stream.fileno()
        except OSError:  # a stream in memory
            continue
        watched = select.poll()
        watched.register(number, 0)
        gone += [number for _, event in watched.poll(0) if event & select.POLLERR]
    for number in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    return bool(gone)


def printable(text: str) -> str:
    """Text in which a file's name neither steers the terminal nor fails to be written."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def clock(seconds: float) -> str:
    """A time as a clock shows it, 1:05 or 2:00:00."""
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def counted(number: int, what: str) -> str:
    """A number and what it counts, as ``2 boundaries``."""
    plural = {"boundary": "boundaries"}.get(what, f"{what}s")
    return f"{number} {what if number == 1 else plural}"


def amount(name: str, value: float) -> str:
    """A value in the unit that the end of its name tells: bytes, seconds, multiply-adds, or a count."""
    if name.endswith("_bytes"):
        for unit in ("B", "kB", "MB", "GB"):
            if value < 1000:
                return f"{value:.4g} {unit}"
            value /= 1000
        return f"{value:,.4g} TB"
    if name.endswith("_s"):
        if value < 120:
            return f"{value:.1f} s"
        return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"
    if name.endswith("multiply_adds"):
        return f"{value:.3g}" if value else "0"
    return f"{value:,.0f}"
