# SPDX-License-Identifier: Apache-2.0
"""Commands and terminals by E2B's names: ``sandbox.commands`` and ``sandbox.pty``."""

from __future__ import annotations

import codecs
import contextlib
import functools
import threading
from dataclasses import dataclass
from signal import SIGKILL
from typing import NamedTuple

from vmm.sandbox.channel import Deadline
from vmm.sandbox.e2b.errors import CommandExitException, NotFoundException, SandboxException, translated
from vmm.sandbox.process import DEFAULT_LIMIT, Process

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

    from vmm.sandbox.session import Session

    Output = tuple[str | None, str | None, bytes | None]

Stdout = str
Stderr = str
PtyOutput = bytes


@dataclass
class PtySize:
    """How large a terminal is."""

    rows: int
    cols: int


class ProcessInfo(NamedTuple):
    """A command that runs, as it was started."""

    pid: int
    tag: str | None
    cmd: str
    args: list[str]
    envs: dict[str, str]
    cwd: str | None


@dataclass
class CommandResult:
    """What a command left.

    :ivar error: how it ended, in words; None: its status is 0
    :ivar truncated: it wrote more than 16 MiB to one of the streams; the rest was thrown away
    """

    stderr: str
    stdout: str
    exit_code: int
    error: str | None
    truncated: bool = False


class CommandHandle:
    """A command that runs; iteration gives its output: ``(stdout, None, None)``, ``(None, stderr, None)`` or, of a
    terminal, ``(None, None, bytes)``.

    Its output is read by ``wait`` and by iteration alone: until then the command stops when its pipes are full.
    """

    def __init__(self, process: Process, timeout: float | None, *, terminal: bool, info: ProcessInfo) -> None:
        self._process = process
        self._deadline = Deadline(timeout or None)
        self._terminal = terminal
        self.info = info._replace(pid=process.pid)
        self._come: list[Output] = []
        self._text = {id(stream): codecs.getincrementaldecoder("utf-8")("replace") for stream in self._streams}
        for stream in self._streams:
            if said := bytes(stream._bytes):
                self._heard(stream, said)
            stream.on_data = lambda data, stream=stream: self._heard(stream, data)

    @property
    def _streams(self) -> tuple[Any, Any]:
        return self._process.stdout, self._process.stderr

    def _heard(self, stream: Any, data: bytes, *, final: bool = False) -> None:
        if self._terminal:
            self._come.append((None, None, data))
        elif text := self._text[id(stream)].decode(data, final):
            self._come.append((text, None, None) if stream is self._process.stdout else (None, text, None))

    @property
    def pid(self) -> int:
        """Of the guest's."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it was seen to end, or nobody listens to it any more."""
        return self._process.ended or self._process.channel.fileno() < 0

    def __iter__(self) -> Iterator[Output]:
        while True:
            yield from self._taken()
            if self._process.ended:
                for stream in self._streams:
                    if not self._terminal:
                        self._heard(stream, b"", final=True)
                yield from self._taken()
                return
            with translated():
                try:
                    self._process.pump(self._deadline)
                except TimeoutError:
                    with contextlib.suppress(SandboxException):
                        self.kill()
                    self._process.close()
                    raise

    def _taken(self) -> list[Output]:
        come, self._come = self._come, []
        return come

    def wait(
        self, on_pty: Callable[[bytes], object] | None = None, on_stdout: Callable[[str], object] | None = None,
        on_stderr: Callable[[str], object] | None = None,
    ) -> CommandResult:  # fmt: skip
        """Wait until it ends.

        :raises CommandExitException: its status is not 0
        :raises TimeoutException: its time is over; it was killed
        """
        for out, err, pty in self:
            if out is not None and on_stdout is not None:
                on_stdout(out)
            if err is not None and on_stderr is not None:
                on_stderr(err)
            if pty is not None and on_pty is not None:
                on_pty(pty)
        with translated():
            result = self._process.wait()
        if result.exit_code:
            raise CommandExitException(result)
        return CommandResult(result.stderr, result.stdout, 0, None, result.truncated)

    def kill(self) -> bool:
        """Send it SIGKILL; False if it was seen to end before."""
        if self._process.ended:
            return False
        with translated():
            self._process.send_signal(SIGKILL)
        return True

    def send_stdin(self, data: str | bytes, request_timeout: float | None = None) -> None:
        """Give its standard input, or its terminal, all of `data`."""
        with translated():
            self._process.stdin.write(data, request_timeout)

    def close_stdin(self, request_timeout: float | None = None) -> None:
        """Close the command's standard input."""
        with translated():
            self._process.stdin.close()

    def disconnect(self) -> None:
        """Listen to it no more; it goes on."""
        self._process.close()


class _Running:
    # Handles of what was started here, by pid.

    def __init__(self, session: Session) -> None:
        self._session = session
        self._handles: dict[int, CommandHandle] = {}
        self._lock = threading.Lock()

    @functools.cached_property
    def _shell(self) -> str:
        return "/bin/bash" if self._session.files.exists("/bin/bash") else "/bin/sh"

    def _keep(self, handle: CommandHandle) -> CommandHandle:
        with self._lock:
            self._handles = {pid: each for pid, each in self._handles.items() if not each.ended}
            self._handles[handle.pid] = handle
        return handle

    def connect(self, pid: int, timeout: float | None = 60, request_timeout: float | None = None) -> CommandHandle:
        """The handle of a command that was started here.

        :raises NotFoundException: no command has this pid
        """
        try:
            return self._handles[pid]
        except KeyError:
            raise NotFoundException(f"no command that was started here has the pid {pid}") from None

    def kill(self, pid: int, request_timeout: float | None = None) -> bool:
        """Send SIGKILL to a command that was started here; whether it ran."""
        return pid in self._handles and self._runs(self._handles[pid]) and self._handles[pid].kill()

    def _runs(self, handle: CommandHandle) -> bool:
        # Its end may be among the output that nobody has read.
        with translated():
            return not handle.ended and self._session.files.exists(f"/proc/{handle.pid}")

    def send_stdin(self, pid: int, data: str | bytes, request_timeout: float | None = None) -> None:
        """Give a command's standard input all of `data`; it was started with ``stdin=True``."""
        self.connect(pid).send_stdin(data, request_timeout)

    def stream_input(self, pid: int, data: Iterable[str | bytes], *, timeout: float | None = 60) -> None:
        """Likewise of each piece, as it comes."""
        for piece in data:
            self.send_stdin(pid, piece, timeout or None)


class Commands(_Running):
    """Commands: ``sandbox.commands``. A line is one for bash; for /bin/sh in an image without it."""

    def run(
        self,
        cmd: str,
        background: bool | None = None,
        envs: Mapping[str, str] | None = None,
        user: str | None = None,
        cwd: str | None = None,
        on_stdout: Callable[[str], object] | None = None,
        on_stderr: Callable[[str], object] | None = None,
        stdin: bool | None = None,
        timeout: float | None = 60,
        request_timeout: float | None = None,
    ) -> Any:
        """Run a line of a shell's, and return its :class:`CommandResult`; with `background` its :class:`CommandHandle`.

        :param stdin: it has a standard input, for ``send_stdin``
        :param timeout: seconds, after which it is killed; 0 or None: no limit
        :param request_timeout: is not used: `timeout` holds for all
        :raises CommandExitException: its status is not 0
        :raises TimeoutException: its time is over
        """
        handle = self.start(cmd, bool(background), envs, user, cwd, stdin, timeout)
        if background:
            return handle
        try:
            return handle.wait(on_stdout=on_stdout, on_stderr=on_stderr)
        finally:
            handle.disconnect()

    def start(
        self, cmd: str, background: bool, envs: Mapping[str, str] | None, user: str | None, cwd: str | None,
        stdin: bool | None, timeout: float | None,
    ) -> CommandHandle:  # fmt: skip
        """Start it, as ``run`` does; what is not in the background is killed with its handle."""
        with translated():
            words = [self._shell, *(["-l"] if self._shell == "/bin/bash" else []), "-c", cmd]
            process = Process(
                self._session._link, self._session._about, words, DEFAULT_LIMIT, Deadline(timeout or None), env=envs,
                cwd=cwd, user=user, keep=background, input=bool(stdin),
            )  # fmt: skip
        info = ProcessInfo(0, None, words[0], words[1:], dict(envs or {}), cwd)
        return self._keep(CommandHandle(process, timeout, terminal=False, info=info))

    def list(self, request_timeout: float | None = None) -> list[ProcessInfo]:
        """The commands that were started here and run."""
        return [handle.info for handle in list(self._handles.values()) if self._runs(handle)]

    def close_stdin(self, pid: int, request_timeout: float | None = None) -> None:
        """Close a command's standard input."""
        self.connect(pid).close_stdin()


class Pty(_Running):
    """Terminals: ``sandbox.pty``."""

    def create(
        self, size: PtySize, user: str | None = None, cwd: str | None = None, envs: Mapping[str, str] | None = None,
        timeout: float | None = 60, request_timeout: float | None = None,
    ) -> CommandHandle:  # fmt: skip
        """A shell on a terminal of its own.

        :param timeout: seconds, after which it is killed; 0 or None: no limit
        """
        with translated():
            words = [self._shell, "-i", "-l"]
            process = self._session.exec(
                words, env={"TERM": "xterm-256color", **(envs or {})}, cwd=cwd, user=user, keep=True,
                terminal=(size.rows, size.cols), timeout=timeout or None,
            )  # fmt: skip
        info = ProcessInfo(0, None, words[0], words[1:], dict(envs or {}), cwd)
        return self._keep(CommandHandle(process, timeout, terminal=True, info=info))

    def resize(self, pid: int, size: PtySize, request_timeout: float | None = None) -> None:
        """Tell a terminal another size."""
        with translated():
            self.connect(pid)._process.resize(size.rows, size.cols)
