# SPDX-License-Identifier: Apache-2.0
"""The log: lines in Firecracker's form, to a file or FIFO. A slow reader never blocks the VMM.

    2026-11-23T14:24:07.133634532 [anonymous-instance:fc_api:ERROR:vmm/api/server.py:140] text

The level and the place in the source are optional. Until ``configure`` is called, errors and warnings go to
stderr as ``pyvmm: text``, and all other lines are dropped. This is not the library's ``logging``, because importing
that takes longer than the rest of a launch.

Source: Firecracker 1.12.1 as it runs; its API's Logger object.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from _functools import partial  # type: ignore[import-not-found]  # in no stubs; `functools` imports more

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

OFF, ERROR, WARN, INFO, DEBUG, TRACE = range(6)
LABELS = ("OFF", "ERROR", "WARN", "INFO", "DEBUG", "TRACE")
_LEVELS = {"off": OFF, "error": ERROR, "warn": WARN, "warning": WARN, "info": INFO, "debug": DEBUG, "trace": TRACE}
PIPE_BUF = 4096  # what a pipe that poll(2) calls writable takes without blocking (pipe(7))
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class LineFile:
    """Lines for a reader that may be slow or absent: each comes whole, in order, or is lost; nothing waits.

    :param fd: where to; of somebody else, and perhaps blocking
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._owned = False
        self._rest = b""  # of a line whose beginning is out: it goes before the next
        self._lock = threading.Lock()

    @classmethod
    def open(cls, field: str, path: str) -> LineFile:
        """Open `path`, a file to append to or a FIFO, which is there already.

        :param field: the option it came from, for the message
        :raises ConfigError: `path` cannot be written
        """
        # Reading, too: a FIFO without a reader would refuse to be opened, and then end us with EPIPE.
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_APPEND | os.O_NOCTTY | os.O_CLOEXEC
        try:
            opened = cls(os.open(path, flags))
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(field, path, f"must be an existing, writable file or FIFO: {why}") from None
        opened._owned = True
        return opened

    def put(self, line: bytes) -> int:
        """Write `line`, which ends with its newline; any thread.

        :returns: 0, or the errno for which it is lost
        """
        with self._lock:
            self._rest, failed = self._push(self._rest)
            if failed:
                return failed
            rest, failed = self._push(line)
            if len(rest) == len(line):
                return failed
            self._rest = rest
            return 0

    def _push(self, data: bytes) -> tuple[bytes, int]:
        # What is left, and why.
        while data:
            try:
                if not self._owned and not is_writable(self._fd, 0):
                    raise BlockingIOError(11, "full")
                data = data[os.write(self._fd, data if self._owned else data[:PIPE_BUF]) :]
            except OSError as error:
                return data, error.errno or 5
        return data, 0

    def fileno(self) -> int:
        """The descriptor; borrowed."""
        return self._fd

    def close(self) -> None:
        """Give the descriptor back if it is ours; idempotent."""
        with self._lock:
            if self._owned and self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def is_writable(fd: int, milliseconds: int | None) -> bool:
    """Whether `fd` takes ``PIPE_BUF`` bytes within this time; None: however long it takes."""
    import select

    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(milliseconds))


class _Settings:
    """How lines look and where they go; replaced whole, so that no line is half of one and half of the other."""

    sink: LineFile | None = None
    level = WARN
    show_level = False
    show_log_origin = False
    module = ""
    vmm_id = "anonymous-instance"


_settings = _Settings()
_lock = threading.Lock()
_watchers: list[Callable[[int], None]] = []
_missed = 0
_second = (-1, "")


def parse_level(level: str) -> int:
    """The number of a level's name, in any letters' case.

    :raises ConfigError: an unknown level
    """
    number = _LEVELS.get(level.lower())
    if number is None:
        raise ConfigError("level", level, "must be Off, Error, Warn (or Warning), Info, Debug or Trace")
    return number


def configure(
    *,
    log_path: str | None = None,
    level: str | None = None,
    show_level: bool | None = None,
    show_log_origin: bool | None = None,
    module: str | None = None,
    vmm_id: str | None = None,
) -> None:
    """Set what is given and leave the rest; from the first call on, lines have Firecracker's form, at level Info.

    :param log_path: a file or FIFO that is there; before the first one, lines go to stdout
    :param level: the least important that is logged
    :param show_level: whether a line tells its level
    :param show_log_origin: whether it tells the file and line of the source
    :param module: log only what comes from modules whose names begin so, as ``vmm.api``; ``::`` serves for the dot
    :param vmm_id: id of the VM, in every line
    :raises ConfigError: of `log_path` or `level`; nothing is changed then
    """
    global _settings
    with _lock:
        before, now = _settings, _Settings()
        given = {"show_level": show_level, "show_log_origin": show_log_origin, "module": module, "vmm_id": vmm_id}
        vars(now).update(vars(before) | {name: value for name, value in given.items() if value is not None})
        now.module = now.module.replace("::", ".")
        if level is not None or before.sink is None:
            now.level = INFO if level is None else parse_level(level)
        if log_path is not None or before.sink is None:
            now.sink = LineFile(1) if log_path is None else LineFile.open("log_path", log_path)
        _settings = now
    _tell_watchers()
    if before.sink is not None and before.sink is not now.sink:
        before.sink.close()


def watch(callback: Callable[[int], None]) -> None:
    """Call `callback` with the log's descriptor, or -1, now and at each change: for signal handlers in C."""
    _watchers.append(callback)
    _tell_watchers()


def _tell_watchers() -> None:
    sink = _settings.sink
    for callback in _watchers:
        callback(-1 if sink is None else sink.fileno())


def configured() -> bool:
    """Whether ``configure`` was called: there is a log, apart from stderr."""
    return _settings.sink is not None


def enabled(level: int) -> bool:
    """Whether a line of this level goes anywhere: for a text that is dear to make."""
    return level <= _settings.level


def missed() -> int:
    """Lines lost so far because nobody took them."""
    return _missed


def log(level: int, text: str) -> None:
    """Log one line; any thread, and it never waits for a reader. What cannot be written is counted.

    :param level: ``ERROR`` to ``TRACE``
    """
    settings = _settings
    if level > settings.level:
        return
    if settings.sink is None:
        tell(text)
        return
    origin = ""
    if settings.show_log_origin or settings.module:
        frame = _caller()
        name = frame.f_globals.get("__name__", "") if frame is not None else ""
        if not name.startswith(settings.module):
            return
        if settings.show_log_origin:
            origin = ":-" if frame is None else f":{frame.f_code.co_filename.removeprefix(ROOT)}:{frame.f_lineno}"
    thread = threading.current_thread()
    who = "main" if thread is threading.main_thread() else thread.name
    label = f":{LABELS[level]}" if settings.show_level else ""
    if not text.isprintable():  # a newline in a request would be a line of its own
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    line = f"{_timestamp()} [{settings.vmm_id}:{who}{label}{origin}] {text}\n"
    if settings.sink.put(line.encode(errors="backslashreplace")):
        global _missed
        with _lock:
            _missed += 1


error: Callable[[str], None] = partial(log, ERROR)
warn: Callable[[str], None] = partial(log, WARN)
info: Callable[[str], None] = partial(log, INFO)
debug: Callable[[str], None] = partial(log, DEBUG)


def tell(text: str) -> None:
    """Print a line on stderr, whatever the log is; nothing where nobody listens."""
    try:
        # On a raw terminal the cursor may stand in the middle of a line.
        sys.stderr.write(f"\rpyvmm: {text}\r\n" if sys.stderr.isatty() else f"pyvmm: {text}\n")
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        pass  # stderr is closed, full or none


def _timestamp() -> str:
    global _second
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    known, text = _second
    if known != seconds:
        # By hand: strftime(3) looks at the time zone's file each time, and a jail may have none.
        t = time.localtime(seconds)
        text = f"{t.tm_year}-{t.tm_mon:02}-{t.tm_mday:02}T{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02}"
        _second = seconds, text
    return f"{text}.{nanoseconds:09}"


def _caller() -> FrameType | None:
    # Who had something to say: not this file, nor what holds back repetitions (virtio.device.Warner). None: a thread
    # of C code without Python code beneath.
    frame: FrameType | None = sys._getframe()
    while frame is not None and (frame.f_code.co_filename == __file__ or frame.f_code.co_name == "__call__"):
        frame = frame.f_back
    return frame
