# SPDX-License-Identifier: Apache-2.0
"""Commands in a sandbox: a handle like subprocess.Popen, and what a command left."""

from __future__ import annotations

import errno
import os
import signal as signals
import struct
import threading
import time

from vmm.closing import Closing
from vmm.errors import ConfigError, line
from vmm.sandbox import channel as wire
from vmm.sandbox import errors
from vmm.sandbox.channel import Deadline, Link, failure
from vmm.sandbox.errors import AgentError, CommandTimeout, SandboxGone

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any

DEFAULT_LIMIT = 16 << 20  # bytes of each stream that are kept
_NOT_PERMITTED = (errno.EACCES, errno.ENOEXEC, errno.EPERM, errno.ETXTBSY, errno.EISDIR)
_MISSING = (errno.ENOENT, errno.ENOTDIR)
NO_DIRECTORY = {
    errno.ENOENT: "does not exist in the guest",
    errno.ENOTDIR: "is not a directory in the guest",
    errno.EACCES: "the command's user may not enter it",
}


class Result:
    """The result of a command.

    :ivar command: the command, as text
    :ivar exit_code: exit status; 128 plus the number of the signal that ended it; 127: not found, 126: not executable
    :ivar signal: the number of the signal that ended it, or None
    :ivar out_of_memory: the guest's kernel killed it because memory ran out
    :ivar stdout_bytes: its output, up to the limit
    :ivar stderr_bytes: likewise
    :ivar truncated: it wrote more than the limit; the rest was discarded
    :ivar duration: seconds from the request to the answer
    """

    __slots__ = (
        "command", "duration", "exit_code", "out_of_memory", "signal", "stderr_bytes", "stdout_bytes", "truncated",
    )  # fmt: skip

    def __init__(self, command: str) -> None:
        self.command = command
        self.exit_code = 0
        self.signal: int | None = None
        self.out_of_memory = False
        self.stdout_bytes = b""
        self.stderr_bytes = b""
        self.truncated = False
        self.duration = 0.0

    @property
    def stdout(self) -> str:
        """``stdout_bytes`` as text; bytes that are not UTF-8 are replaced."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """``stderr_bytes`` as text; bytes that are not UTF-8 are replaced."""
        return self.stderr_bytes.decode(errors="replace")

    @property
    def cause(self) -> str:
        """How it ended, in words."""
        if self.out_of_memory:
            return "killed because the sandbox was out of memory"
        if self.signal is not None:
            return f"killed by {_signal_name(self.signal)}"
        return f"exit status {self.exit_code}"

    def check(self) -> Result:
        """This result, if the status is 0.

        :raises CommandError: the status is not 0; the class says why, for example :class:`vmm.sandbox.CommandKilled`
        """
        if self.out_of_memory:
            raise errors.CommandOutOfMemory(self)
        if self.signal is not None:
            raise errors.CommandKilled(self)
        if self.exit_code:
            kinds = {126: errors.CommandNotExecutable, 127: errors.CommandNotFound}
            raise kinds.get(self.exit_code, errors.CommandError)(self)
        return self

    def __repr__(self) -> str:
        return f"Result({self.command!r}, {self.cause}, stdout={self.stdout[:200]!r}, stderr={self.stderr[:200]!r})"


class Stream:
    """Output of a command as it comes. Made by ``Process``."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._bytes = bytearray()
        self.dropped = 0  # bytes beyond the limit
        self.on_data: Callable[[bytes], object] | None = None

    def _add(self, data: bytes) -> None:
        if self.on_data is not None:
            self.on_data(data)
        room = max(0, self._process.limit - len(self._bytes))
        self._bytes += data[:room]
        self.dropped += max(0, len(data) - room)

    def read(self, size: int = -1, timeout: float | None = None) -> bytes:
        """At most `size` bytes as soon as there are any, or with -1 all until the command ends; empty: it has ended.

        :param timeout: seconds
        :raises CommandTimeout: nothing came in time; the command goes on
        """
        deadline = Deadline(timeout)
        while size and not self._process.ended and (size < 0 or not self._bytes):
            self._process.pump(deadline)
        return self.take(len(self._bytes) if size < 0 else size)

    def readline(self, timeout: float | None = None) -> bytes:
        """The next line with its end, or what is left when the command has ended.

        :raises CommandTimeout: as ``read``
        """
        deadline = Deadline(timeout)
        while (end := self._bytes.find(b"\n")) < 0 and not self._process.ended:
            if len(self._bytes) >= self._process.limit:
                break
            self._process.pump(deadline)
        return self.take(end + 1 if end >= 0 else len(self._bytes))

    def __iter__(self) -> Iterator[bytes]:
        while line_ := self.readline():
            yield line_

    def take(self, size: int = 1 << 62) -> bytes:
        """What has come and was not read, at most `size` bytes; does not wait."""
        taken = bytes(self._bytes[:size])
        del self._bytes[:size]
        return taken


class Input:
    """Standard input of a command. Made by ``Process``."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.closed = self.sent = False  # sent: the agent waits for no more of it

    def write(self, data: bytes | str, timeout: float | None = None) -> None:
        """Write all of `data` to the command's standard input.

        :raises CommandTimeout: the command does not read its standard input
        :raises SandboxGone: the sandbox, or the command, has ended
        """
        if self.closed:
            raise ValueError("standard input is closed")
        for frame in wire.frames(wire.F_STDIN, data):
            self._process.channel.send(Deadline(timeout), self._process.command, frame)

    def close(self) -> None:
        """Close the command's standard input; at a terminal, press the key Ctrl-D. Idempotent."""
        if not self.closed:
            try:
                self._process.channel.send(Deadline(10), self._process.command, CLOSE)
                self.sent = True
            except SandboxGone:
                pass  # the command has ended
            self.closed = True


class Process(Closing):
    """A running command in a sandbox; a context manager, which kills it if it still runs.

    :ivar pid: process id in the guest
    :ivar stdin: ``write`` and ``close``
    :ivar stdout: ``read``, ``readline``, iteration by line. With a terminal all output comes here
    :ivar stderr: likewise

    Both streams share one connection: while you read one, the other is kept, up to `limit` bytes. If you read neither,
    the command stops when its pipes are full.

    Parameters are those of ``Session.exec``, and:

    :param about: what holds where they say nothing else
    :param input: give the command a standard input; otherwise it is empty
    :param quiet: neither wait for its start nor ask for its `pid`
    """

    def __init__(
        self, link: Link, about: Mapping[str, Any], command: str | Sequence[str | os.PathLike[str]], limit: int,
        deadline: Deadline, *, env: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None, terminal: tuple[int, int] | None = None,
        limits: Mapping[str, int | tuple[int, int]] | None = None, keep: bool = False, input: bool = True,
        quiet: bool = False,
    ) -> None:  # fmt: skip
        argv = ["/bin/sh", "-c", command] if isinstance(command, str) else [os.fspath(word) for word in command]
        if not argv or not argv[0]:
            raise ConfigError("command", "", "is empty")
        env = {**about["env"], **(env or {})}
        check_env(env)
        size = None
        if terminal is not None:  # its input ends only with the connection
            rows, columns = terminal
            if not (0 < rows < 65536 and 0 < columns < 65536):
                raise ConfigError("terminal", terminal, "must be rows and columns, 1 to 65535")
            size = f"{rows}x{columns}"
        self._limits = [_limit(name, limit) for name, limit in (limits or {}).items()]
        self._user = about["user"] if user is None else user
        where = cwd or about["cwd"]
        self._cwd = None if where is None else os.fspath(where)
        self.command = line(command if isinstance(command, str) else " ".join(argv))
        self.limit = limit
        self.pid = 0
        self.stop_signal = about.get("stop_signal", signals.SIGTERM)
        self.stdout, self.stderr = Stream(self), Stream(self)
        self.stdin = Input(self)
        self._link = link
        self._result = Result(self.command)
        self._begun = time.monotonic()
        self._pumping = threading.Lock()
        self.stdin.closed = self.stdin.sent = not input
        self._terminal = terminal is not None
        self.ended = False
        self.channel = link.take(deadline, self.command)
        try:
            self.channel.request(
                deadline, self.command, "run", arg=argv, env=[f"{name}={value}" for name, value in env.items()],
                user=self._user, cwd=self._cwd, tty=size, limit=self._limits, keep=keep, nostdin=not input, quiet=quiet,
            )  # fmt: skip
            while not quiet and not self.pid and not self.ended:
                self.pump(deadline)
        except BaseException:
            self.channel.close()
            raise

    def pump(self, deadline: Deadline) -> None:
        """Receive one frame: output for a stream, or the end of the command.

        :raises CommandTimeout: no frame came in time
        :raises SandboxGone: the sandbox has ended
        """
        with deadline.holding(self._pumping, self.command):
            if not self.ended:
                self._receive(deadline)

    def _receive(self, deadline: Deadline) -> None:
        try:
            kind, data = self.channel.read(deadline, self.command)
        except SandboxGone as error:
            self.channel.close()  # nothing more will come, and nobody may call `close`
            raise self._link.explained(error) from None
        match kind:
            case wire.F_STDOUT:
                self.stdout._add(data)
            case wire.F_STDERR:
                self.stderr._add(data)
            case wire.F_STARTED if len(data) == 4 and not self.pid:
                self.pid = struct.unpack("<I", data)[0]
            case wire.F_EXIT if len(data) == 3:
                signalled, code, memory = data
                self._result.exit_code = (128 + code) & 255 if signalled else code
                self._result.signal = code if signalled else None
                self._result.out_of_memory = bool(memory)
                self._end()
            case wire.F_FAILED if not self.pid:
                self._refused(*failure(data))
            case _:
                raise AgentError(f"{self.command}: the guest sent {chr(kind)!r} out of turn")

    def _refused(self, number: int, what: str) -> None:
        if what == "user" and number == errno.EINVAL:
            raise ConfigError("user", self._user, "the guest does not have this user or group")
        if what == "limits" and number == errno.EPERM:
            raise ConfigError("limits", self._limits, "one is more than the guest's kernel allows")
        if self._cwd and what.startswith("cwd="):
            raise ConfigError("cwd", self._cwd, NO_DIRECTORY.get(number, os.strerror(number)))
        self._result.exit_code = 127 if number in _MISSING else 126
        if number not in (*_MISSING, *_NOT_PERMITTED):
            raise OSError(number, f"the guest cannot start it: {os.strerror(number)}", what)
        self.stderr._add(f"{what}: {os.strerror(number)}\n".encode())
        self._end()

    def _end(self) -> None:
        self.ended = True
        self._result.duration = time.monotonic() - self._begun
        if self.stdin.sent and not self._terminal:
            self._link.keep(self.channel)
        else:
            self.channel.close()
        self.channel.free_room()  # this object and its streams refer to each other, so it stays until a collection

    def poll(self) -> int | None:
        """Its exit status if it has ended, else None. Receives output that has arrived."""
        while self._pumping.acquire(blocking=False):  # otherwise another thread receives it
            try:
                if self.ended or not self.channel.readable:
                    break
                self._receive(Deadline(1))
            except CommandTimeout:  # a part of a frame has arrived
                break
            finally:
                self._pumping.release()
        return self._result.exit_code if self.ended else None

    def communicate(self, input: bytes | str | None = None, timeout: float | None = None) -> Result:
        """Send `input`, close the standard input, and return the result.

        :raises CommandTimeout: not done within `timeout` seconds; it was killed, and the error has its output
        :raises SandboxGone: the sandbox has ended
        """
        return self.communicate_until(Deadline(timeout), input)

    def communicate_until(self, deadline: Deadline, input: bytes | str | None = None) -> Result:
        """``communicate``, with a time limit that began before."""
        if input and self.stdin.closed:
            raise ValueError("standard input is closed")
        frames = [*wire.frames(wire.F_STDIN, input or b"")]
        if not self.stdin.closed:  # at once: a command that ends before it leaves no connection to the next
            frames.append(frames.pop() + CLOSE if frames else CLOSE)
        frames.reverse()
        try:
            while not self.ended:
                sends = bool(frames or self.channel.unsent)
                readable, writable = self.channel.wait(deadline, self.command, writable=sends)
                if writable:
                    try:
                        if self.channel.push(frames[-1] if frames else b"") and frames:
                            frames.pop()
                        self.stdin.sent = not frames and not self.channel.unsent
                    except SandboxGone:  # but it may have said something before
                        frames, self.channel.unsent = [], memoryview(b"")
                if readable:
                    self.pump(deadline)
        except CommandTimeout as error:
            self.close()
            raise CommandTimeout(str(error), self._finish()) from None
        except BaseException:
            self.close()
            raise
        self.stdin.closed = True
        return self._finish()

    def wait(self, timeout: float | None = None) -> Result:
        """Wait until it ends, without closing its standard input.

        :param timeout: seconds
        :raises CommandTimeout: the command is still running, and continues
        :raises SandboxGone: the sandbox has ended
        """
        deadline = Deadline(timeout)
        while not self.ended:
            self.pump(deadline)
        return self._finish()

    def _finish(self) -> Result:
        result = self._result
        result.stdout_bytes = bytes(self.stdout._bytes)
        result.stderr_bytes = bytes(self.stderr._bytes)
        result.truncated = bool(self.stdout.dropped or self.stderr.dropped)
        return result

    def send_signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        if self.ended:
            return
        deadline = Deadline(10)
        with self._link.connect(deadline, "signal") as channel:
            channel.request(deadline, "signal", "signal", pid=self.pid, signal=int(number))
            kind, data = channel.read(deadline, "signal")
        if kind == wire.F_FAILED and (number_ := failure(data)[0]) != errno.ESRCH:
            raise OSError(number_, os.strerror(number_))

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signals.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signals.SIGKILL)

    def stop(self, timeout: float = 10) -> Result:
        """Send the image's stop signal (SIGTERM, if it names none), and SIGKILL if it has not ended in time.

        :param timeout: seconds
        :raises SandboxGone: the sandbox has ended
        """
        self.send_signal(self.stop_signal)
        try:
            return self.wait(timeout)
        except CommandTimeout:
            self.kill()
            return self.wait(10)

    def resize(self, rows: int, columns: int) -> None:
        """Set the size of its terminal.

        :raises ConfigError: a number is not in 0 to 65535
        """
        if not (0 <= rows <= 0xFFFF and 0 <= columns <= 0xFFFF):
            raise ConfigError("terminal", f"{rows}x{columns}", "must be 0 to 65535 rows and columns")
        self.channel.send(Deadline(10), self.command, wire.frame(wire.F_WINDOW, struct.pack("<HH", rows, columns)))

    def close(self) -> None:
        """Give up the command, and kill it if it still runs; wakes who waits for it in another thread. Idempotent."""
        self.channel.close()


CLOSE = wire.frame(wire.F_STDIN)


def check_env(env: Mapping[str, str]) -> None:
    """Refuse what cannot be an environment.

    :raises ConfigError: a name or a value that cannot be
    """
    for name, value in env.items():
        if not name or "=" in name or "\0" in name:
            raise ConfigError("env", name, "must be a name, not empty, without = and without a NUL byte")
        if "\0" in value:
            raise ConfigError("env", f"{name}={value}", "must not have a NUL byte")


def _limit(name: str, limit: int | tuple[int, int]) -> str:
    import resource

    known = {key[7:].lower(): getattr(resource, key) for key in dir(resource) if key.startswith("RLIMIT_")}
    if name not in known:
        raise ConfigError("limits", name, f"is not a known limit; allowed: {', '.join(sorted(known))}")
    soft, hard = (limit, limit) if isinstance(limit, int) else limit
    if soft < 0 or hard < soft:
        raise ConfigError("limits", f"{name} {limit}", "must be 0 or more, and the second at least the first")
    return f"{known[name]}:{soft}:{hard}"


def _signal_name(number: int) -> str:
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"
