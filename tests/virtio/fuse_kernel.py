# SPDX-License-Identifier: Apache-2.0
"""The host kernel's own FUSE client in front of a share: its requests go through the device's real rings.

A process in a mount namespace of its own mounts ``/dev/fuse`` and works on the mount; a thread here carries what its
kernel asks to the device, and the answers back. Linux's client is the same code as a guest's virtio-fs mount has, but
for the transport, DAX and submounts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.virtio import fuse_client as fuse
from tests.virtio.fuse_client import FuseVm
from virtio.testing import Buffer

Result = TypeVar("Result")
ROOT_DIR = Path(__file__).parents[2]
SLOTS = 8
REQUEST = (1 << 20) + 8192  # the largest WRITE with its headers
REPLY = (1 << 20) + 8192
SILENT = (fuse.FORGET, fuse.BATCH_FORGET, fuse.INTERRUPT)
SIZED = (fuse.READ, fuse.READDIR, fuse.READDIRPLUS)
CLONE_NEWNS = 0x20000
MS_REC_PRIVATE = 0x44000
TIMEOUT = 120  # seconds that one call on the mount may take


class Slot(NamedTuple):
    """Guest memory of one request at a time."""

    request: int
    reply: int
    table: int


class KernelVm(FuseVm):
    """A share whose guest is this host's kernel; ``init`` is the kernel's own."""

    RAM = 64 << 20

    def __init__(self, path: Path | str, fuse_fd: int, *, hide: int = 0, **settings: Any) -> None:
        super().__init__(path, init=False, **settings)
        self.hide = hide  # flags of INIT, as if the kernel did not know them
        self.fd = fuse_fd
        size = REQUEST + REPLY + 4096
        self.slots = [
            Slot(at, at + REQUEST, at + REQUEST + REPLY) for at in range(self.base, self.base + SLOTS * size, size)
        ]
        self.busy: list[dict[int, Slot]] = [{} for _ in self.driver.queues]
        self.seen: dict[int, int] = {}  # requests by opcode
        self.turn = 0
        self.over = threading.Event()
        self.failure: BaseException | None = None
        self.bridge = threading.Thread(target=self._carry, daemon=True)

    def close(self) -> None:
        self.over.set()
        if self.bridge.ident is not None:
            self.bridge.join(30)
        os.close(self.fd)  # whoever still waits for an answer gets ENOTCONN
        super().close()

    def _carry(self) -> None:
        assert self.irq is not None
        try:
            while not self.over.is_set():
                wanted = [self.irq.fd, self.fd] if self.slots else [self.irq.fd]
                ready = select.select(wanted, [], [], 0.1)[0]
                if self.irq.fd in ready:
                    self.irq.take()
                while any(self._answered(index) for index in range(len(self.busy))):
                    pass
                if self.fd in ready and self.slots and not self._asked():
                    return
        except BaseException as error:
            self.failure = error
            raise

    def _asked(self) -> bool:
        """Take one request of the kernel's; False: it has unmounted."""
        try:
            data = os.read(self.fd, REQUEST)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.ENOENT, errno.EINTR)
        size, opcode, *_ = fuse.IN_HEADER.unpack_from(data)
        assert size == len(data)
        self.seen[opcode] = self.seen.get(opcode, 0) + 1
        if opcode == fuse.INIT:
            flags = struct.unpack_from("<I", data, 52)[0] & ~self.hide
            data = data[:52] + struct.pack("<I", flags) + data[56:]
        index, room = 0, 0
        if opcode not in SILENT:
            self.turn += 1
            index = 1 + self.turn % (len(self.busy) - 1)
            room = struct.unpack_from("<I", data, 56)[0] if opcode in SIZED else 66000
        slot = self.slots.pop()
        self.ram.write(slot.request, data)
        self.driver.allocator.next = slot.table
        buffers = [Buffer(slot.request, fuse.IN_HEADER.size), Buffer(slot.request + 40, len(data) - 40)]
        if opcode not in SILENT:
            buffers += [Buffer(slot.reply, 16, True), Buffer(slot.reply + 16, room, True)]
        queue = self.driver.queues[index]
        self.busy[index][queue.add_indirect([b for b in buffers if b.size])] = slot
        queue.want_interrupt()
        self.driver.kick(index)
        return True

    def _answered(self, index: int) -> bool:
        """Bring the answers that are there to the kernel; whether there were any."""
        queue = self.driver.queues[index]
        done = queue.reap()
        queue.want_interrupt()
        for head, written in done:
            slot = self.busy[index].pop(head)
            if written:
                reply = self.ram.read(slot.reply, written)
                assert struct.unpack_from("<I", reply)[0] == written
                try:
                    os.write(self.fd, reply)
                except OSError as error:
                    assert error.errno in (errno.ENOENT, errno.ENODEV), (error, self.seen)
            self.slots.append(slot)
        return bool(done)


class KernelMount:
    """A share mounted by this host's kernel at ``path``, which ``call`` alone can see.

    :param mountpoint: an empty directory
    :param options: options of mount(2), beside those that virtiofs has
    :param settings: parameters of :class:`virtio.fs.device.ShareDevice`
    """

    def __init__(self, shared: Path, mountpoint: Path, *, options: str = "", **settings: Any) -> None:
        self.path = mountpoint
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self.vm = KernelVm(shared, fd, **settings)
        self.pipe, theirs = Pipe()
        code = f"from tests.virtio.fuse_kernel import work; work({theirs.fileno()})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT_DIR, pass_fds=(fd, theirs.fileno()), stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.call(_mount, fd, str(mountpoint), options)
        self.vm.bridge.start()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function`, one of a module's own, done where the share is mounted."""
        self.pipe.send((function, arguments))
        assert self.pipe.poll(TIMEOUT), f"{function.__name__} hangs; {self.vm.failure=} {self.vm.seen=}"
        failed, result = self.pipe.recv()
        if failed:
            raise result
        return result  # type: ignore[no-any-return]

    def close(self) -> None:
        self.pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.vm.close()
        self.process.wait(30)
        assert self.vm.failure is None


def work(pipe_fd: int) -> None:
    """Do what the pipe brings, until it is closed."""
    pipe: Connection[Any, Any] = Connection(pipe_fd)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (False, function(*arguments))
        except Exception as error:
            answer = (True, error)
        pipe.send(answer)


def mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    """mount(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        raise OSError(ctypes.get_errno(), f"mount {kind} {data}: {os.strerror(ctypes.get_errno())}")


def _mount(fd: int, target: str, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    mount("none", "/", "none", MS_REC_PRIVATE, "")
    # What fs/fuse/virtio_fs.c sets for its mounts.
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other{options}"
    mount("share", target, "fuse", 0, data)
    os.close(fd)
    os.umask(0o022)


def kernel_mounts(tmp_path: Path) -> Iterator[Callable[..., KernelMount]]:
    """The body of a fixture: makes mounts of ``tmp_path/shared``, and ends them."""
    mounts: list[KernelMount] = []

    def start(**settings: Any) -> KernelMount:
        mountpoint = tmp_path / f"mount{len(mounts)}"
        mountpoint.mkdir()
        mounts.append(KernelMount(settings.pop("shared", tmp_path / "shared"), mountpoint, **settings))
        return mounts[-1]

    yield start
    for one in mounts:
        one.close()
