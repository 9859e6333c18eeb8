# SPDX-License-Identifier: Apache-2.0
"""Copies of a machine in their own processes: the side of the calling process.

The first copy starts a fork server (:mod:`vmm.machine.fork_server`). It has imported everything that a machine needs,
and makes each copy's process by fork(2), so that they share its memory. A copy gets guest RAM, disks and state as
descriptors.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading

# Not `socket`: the functions that it has for descriptors are two lines.
from _socket import AF_UNIX, SCM_RIGHTS, SOCK_CLOEXEC, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair
from array import array

import msgspec

from vmm.closing import Closing
from vmm.durable import write_all
from vmm.errors import SnapshotError, VmmError
from vmm.exits import Exit, StopReason
from vmm.machine.snapshot_file import encode
from vmm.memory import MemoryFile
from vmm.signals import LONGEST_POLL
from vmm.unix_socket import file_at, remove_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmm.config.vm import VmConfig
    from vmm.machine.snapshot import Image

DESCRIPTORS_MAX = 253  # SCM_MAX_FD of Linux
_server: socket | None = None
_server_pid = 0  # of the process that has it
_lock = threading.Lock()


class Isolated(Closing):
    """A copy of a machine in a process of its own; a context manager. Its methods are those of ``Machine``.

    :param config: its configuration
    :param image: the image from which it goes on
    :param disks: descriptors that `config` names as ``/proc/self/fd/N``
    :raises SnapshotError: something of it cannot go to another process, by name
    :raises VmmError: the process cannot make the machine; the message says why

    It is behind the seccomp filters of ``pyvmm serve``, and where this process is root's, in mount, network and IPC
    namespaces of its own, without a file but the directory of its vsock sockets. It ends with this process. ``pid`` is
    that of its process.
    """

    def __init__(self, config: VmConfig, image: Image, disks: Iterable[int] = ()) -> None:
        if image.handler:
            raise SnapshotError("memory", "that a page fault handler fills cannot move to another process")
        self.config = config
        self.closed = False
        self._started = self._paused = False
        self._stop: Exit | None = None
        self._lock = threading.RLock()
        self._pidfd = self._end = -1
        self._owed = 1  # answers to come; more than one where a signal's handler ended a wait
        self._made: list[tuple[str, tuple[int, int]]] = []  # the file of its socket
        self._control, theirs = _pair()
        self._end, end = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                _send(config, image, disks, theirs.fileno(), end)
            finally:
                theirs.close()
                os.close(end)
            self.pid = int(self._answer())
            self._pidfd = os.pidfd_open(self.pid)
            if config.vsock is not None:
                path = os.path.abspath(config.vsock.path)
                self._made.append((path, file_at(path)))
        except BaseException:
            self.close()
            raise

    def start(self, *, paused: bool = False) -> None:
        """Let it run.

        :param paused: start as if ``pause`` had been called
        :raises VmmError: the copy was started before, or has ended
        """
        self._ask("start paused" if paused else "start")
        self._started, self._paused = True, paused

    def pause(self) -> None:
        """Hold every vCPU before its next instruction; returns when all are held."""
        self._ask("pause")
        self._paused = True

    def resume(self) -> None:
        """Let it go on; harmless on one that is not paused."""
        self._ask("resume")
        self._paused = False

    def wake(self) -> None:
        """Let one go on that was started paused, by the host's clock as it is now."""
        self._ask("wake")
        self._paused = False

    def stop(self) -> None:
        """End it as if its power were cut; idempotent, from any thread."""
        if not self._has_ended(0):
            try:
                self._ask("stop")
            except VmmError:
                self._has_ended(None)

    def wait(self, timeout: float | None = None) -> Exit | None:
        """Wait until it has ended.

        :param timeout: seconds, or None for as long as it takes
        :returns: how it ended, or None: still running
        :raises VmmError: its process failed or was killed
        """
        if not self._has_ended(timeout):
            return None
        with self._lock:
            if self._stop is None:
                self._stop = self._read_end()
        return self._stop

    @property
    def state(self) -> str:
        """``Not started``, ``Running``, ``Paused`` or ``Stopped``."""
        if self.closed or self._has_ended(0):
            return "Stopped"
        return "Not started" if not self._started else "Paused" if self._paused else "Running"

    def close(self) -> None:
        """End its process, and wait until it is gone; idempotent."""
        self.closed = True
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            _wait_for(self._pidfd, None)
        with self._lock:  # another thread may read them, and its wait ends with the process
            for fd in (self._pidfd, self._end):
                if fd >= 0:
                    os.close(fd)
            self._pidfd = self._end = -1
            self._control.close()
            while self._made:
                remove_file(*self._made.pop())

    def _has_ended(self, timeout: float | None) -> bool:
        return self._stop is not None or self._end < 0 or _wait_for(self._end, timeout)

    def _read_end(self) -> Exit:
        # Once, and whole: a pipe takes so little in one piece.
        data = b"" if self._end < 0 else os.read(self._end, select.PIPE_BUF)
        if not data:
            raise VmmError(f"the copy's process {self.pid} was killed")
        reason, code, detail, failure = msgspec.msgpack.decode(data)
        if failure:
            raise VmmError(failure)
        return Exit(StopReason(reason), code, detail)

    def _ask(self, word: str) -> None:
        with self._lock:
            if self.closed:
                raise VmmError("the copy is closed")
            try:
                self._control.send(word.encode())
            except OSError:
                raise VmmError("the copy has ended") from None
            self._owed += 1
            self._answer()

    def _answer(self) -> str:
        while self._owed:
            try:
                data = self._control.recv(4096).decode()
            except ConnectionResetError:
                data = ""
            if not data:
                raise VmmError("the copy has ended")
            self._owed -= 1
        if data.startswith("!"):
            raise VmmError(data[1:])
        return data


def _wait_for(fd: int, timeout: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout is None else min(max(timeout, 0), LONGEST_POLL) * 1000))


def _pair() -> tuple[socket, socket]:
    ends = socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
    for end in ends:
        end.settimeout(None)  # that of socket.setdefaulttimeout is for the program's own
    return ends


def _send(config: VmConfig, image: Image, disks: Iterable[int], control: int, end: int) -> None:
    """Have the server make the process: a message with the descriptors, whose last one has all else."""
    files: dict[int, int] = {}  # our descriptors, by their index in the message
    for piece in image.memory:
        if piece.file is not None:
            files.setdefault(piece.file.fd, len(files))
    for fd in disks:
        files.setdefault(fd, len(files))
    for net in config.nets:
        if net.fd is not None:
            raise SnapshotError(net.id or "network interface", "is a descriptor of this process: name the tap")
    state = encode(image, bytes(16), config=config)
    pieces = [
        (piece.gpa, piece.size, -1 if piece.file is None else files[piece.file.fd], piece.offset)
        for piece in image.memory
    ]
    names = {f"/proc/self/fd/{fd}": index for fd, index in files.items()}
    drives = [names.get(drive.path, -1) for drive in config.drives]
    order = MemoryFile(os.memfd_create("copy", os.MFD_CLOEXEC))
    write_all(order.fd, msgspec.msgpack.encode((os.getcwd(), state, pieces, drives)))
    descriptors = array("i", [*files, control, end, order.fd])
    message = [b"fork"], [(SOL_SOCKET, SCM_RIGHTS, descriptors)]
    try:
        _server_of_ours().sendmsg(*message)
    except ConnectionError:  # somebody has killed it
        _server_of_ours(anew=True).sendmsg(*message)


def _server_of_ours(*, anew: bool = False) -> socket:
    """The socket of the fork server, which is started if it is not running."""
    global _server, _server_pid
    with _lock:
        if anew or _server is None or _server_pid != os.getpid():
            import subprocess
            import sys

            _server, theirs = _pair()
            _server_pid = os.getpid()
            main = "from vmm.machine.fork_server import main"
            code = f"import sys; sys.path[:] = {sys.path!r}; {main}; main({theirs.fileno()})"
            subprocess.Popen(
                [sys.executable, "-S", "-c", code, *sys.argv[:1]], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            theirs.close()
        return _server
