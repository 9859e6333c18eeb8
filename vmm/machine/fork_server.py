# SPDX-License-Identifier: Apache-2.0
"""Makes processes for copies of machines. :mod:`vmm.machine.isolated` starts it; it ends with that process."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import threading

# As in vmm.machine.isolated.
from _socket import AF_UNIX, CMSG_LEN, MSG_CMSG_CLOEXEC, SOCK_SEQPACKET, socket
from array import array

import msgspec

from vmm import _uring
from vmm.errors import VmmError, host_problem, line
from vmm.jail import jailer, preload, seccomp
from vmm.machine.isolated import DESCRIPTORS_MAX
from vmm.machine.machine import Machine
from vmm.machine.snapshot_file import decode
from vmm.memory import MemoryFile, Piece

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from vmm.exits import Exit

CLONE_NEWIPC = 0x0800_0000


def main(number: int) -> None:
    """Serve the socket `number` until its other end is closed."""
    for each in (signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):  # a copy that has ended leaves nothing
        signal.signal(each, signal.SIG_IGN)
    preload.preload()
    gc.disable()
    gc.freeze()  # what is here is shared by all copies, as long as nobody writes to it
    server = socket(AF_UNIX, SOCK_SEQPACKET, fileno=number)
    while True:
        data, received, _, _ = server.recvmsg(16, CMSG_LEN(4 * DESCRIPTORS_MAX), MSG_CMSG_CLOEXEC)
        if not data:
            return
        descriptors = array("i")
        for _, _, numbers in received:
            descriptors.frombytes(numbers)
        try:
            is_copy = not os.fork()
        except OSError as error:  # a limit of processes or of memory
            is_copy, control = False, descriptors[-3]
            os.write(control, f"!make a process for the copy: {error.strerror}".encode())
        if is_copy:
            server.close()
            try:
                _be_a_copy(list(descriptors))
            finally:
                os._exit(1)
        for fd in descriptors:
            os.close(fd)


def _be_a_copy(descriptors: list[int]) -> NoReturn:
    *files, control, end, order = descriptors
    try:
        vm = _made(files, order)
    except Exception as error:  # of whatever kind: who asked for the copy hears of it
        os.write(control, f"!{host_problem(error) or line(repr(error))}".encode())
        os._exit(1)

    answering = threading.RLock()  # a guest may end while its start is not answered yet

    def report(stop: Exit) -> None:
        answering.acquire()
        vm.console.close()  # its last words are out
        failure = vm._run.failure
        why = "" if failure is None else line(failure) or type(failure).__name__
        os.write(end, msgspec.msgpack.encode((stop.reason.value, stop.code, line(stop.detail), why)))
        os._exit(0)

    vm.on_exit(report)
    os.write(control, str(os.getpid()).encode())
    words = {
        "start": vm.start, "start paused": lambda: vm.start(paused=True), "pause": vm.pause, "resume": vm.resume,
        "wake": vm.wake, "stop": vm.stop,
    }  # fmt: skip
    while word := os.read(control, 64).decode():
        with answering:
            try:
                words[word]()
            except VmmError as error:
                os.write(control, f"!{error}".encode())
            else:
                os.write(control, b"done")
    os._exit(0)  # who wanted the copy is gone


def _made(files: list[int], order: int) -> Machine:
    with open(order, "rb", buffering=0) as file:
        file.seek(0)
        directory, state, pieces, drives = msgspec.msgpack.decode(file.readall())
    os.chdir(directory)
    image, _ = decode(state, "copy")
    disks = [
        drive if index < 0 else drive.replaced(path=f"/proc/self/fd/{files[index]}")
        for drive, index in zip(image.config.drives, drives, strict=True)
    ]
    image.config = image.config.replaced(drives=disks)
    memory = {index: MemoryFile(files[index]) for index in {piece[2] for piece in pieces} - {-1}}  # one each owns it
    image.memory = [Piece(gpa, size, memory.get(index), offset) for gpa, size, index, offset in pieces]
    _uring.stock(seccomp.RINGS)
    vm = Machine(image=image)
    for index, fd in enumerate(files):
        if index not in memory:
            os.close(fd)  # a disk, which the machine has opened
    if os.geteuid() == 0:
        _enter_jail(image.config.vsock.path if image.config.vsock is not None else None)
    seccomp.enable()
    return vm


def _enter_jail(vsock: str | None) -> None:
    """Be without files, networks and privileges; what the machine has open stays open.

    :param vsock: the path of its socket, whose directory is there as the guest's programs connect to sockets in it
    """
    jailer.call("unshare", jailer.CLONE_NEWNS | jailer.CLONE_NEWNET | CLONE_NEWIPC)
    jailer.mount(None, "/", None, jailer.MS_SLAVE | jailer.MS_REC)
    root = tempfile.gettempdir()
    inside = None
    if vsock is not None:
        inside = os.path.dirname(os.path.abspath(vsock))
        kept = os.open(inside, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    jailer.mount("none", root, "tmpfs", jailer.MS_NOSUID | jailer.MS_NODEV | jailer.MS_NOEXEC, "size=64k,mode=0700")
    if inside is not None:
        os.makedirs(root + inside)
        jailer.mount(f"/proc/self/fd/{kept}", root + inside, None, jailer.MS_BIND)
        os.close(kept)
    os.chdir(root)
    jailer.call("syscall", jailer.SYS_PIVOT_ROOT, b".", b".")
    jailer.call("umount2", b".", jailer.MNT_DETACH)
    os.chdir("/" if inside is None else inside)
    jailer.drop_privileges(os.getuid(), os.getgid())
