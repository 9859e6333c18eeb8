# SPDX-License-Identifier: Apache-2.0
"""A page fault handler: brings a guest's memory from a file, page by page, as the guest touches it.

    python uffd_handler.py SOCKET MEMORY_FILE

It waits at SOCKET for one VMM, which is then asked to load a snapshot with ``"mem_backend": {"backend_type": "Uffd",
"backend_path": SOCKET}``, and ends with it. Firecracker and pyvmm speak the same protocol: one message with a JSON
array of regions and a userfaultfd. Nothing but the standard library; Linux 4.11 or later.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import socket
import struct
import sys

UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY = 0xC028AA03
UFFDIO_ZEROPAGE = 0xC020AA04
EVENT_PAGEFAULT = 0x12
EVENT_REMOVE = 0x15
MESSAGE = struct.Struct("<B7xQQQ")  # struct uffd_msg: event, and three words of what it is about
AT_ONCE = 64  # messages that are read before faults are served, and pages that are brought by one fault
MISSING, BROUGHT, REMOVED = range(3)

libc = ctypes.CDLL(None, use_errno=True)


class Range(ctypes.Structure):
    """struct uffdio_range."""

    _fields_ = [("start", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class Copy(ctypes.Structure):
    """struct uffdio_copy; ``done`` is the kernel's answer."""

    _fields_ = [
        ("to", ctypes.c_uint64), ("source", ctypes.c_uint64), ("length", ctypes.c_uint64), ("mode", ctypes.c_uint64),
        ("done", ctypes.c_int64),
    ]  # fmt: skip


class Zero(ctypes.Structure):
    """struct uffdio_zeropage."""

    _fields_ = [("range", Range), ("mode", ctypes.c_uint64), ("done", ctypes.c_int64)]


def ask(fd: int, request: int, argument: ctypes.Structure) -> int:
    """The ioctl; 0, or the number of the error."""
    return ctypes.get_errno() if libc.ioctl(fd, ctypes.c_ulong(request), ctypes.byref(argument)) else 0


class Region:
    """One region of guest RAM: where it is in the VMM and in the file, and what has become of each page."""

    def __init__(self, mapping: dict[str, int], memory: int) -> None:
        self.start = mapping["base_host_virt_addr"]
        self.size = mapping["size"]
        self.page = mapping["page_size"]
        self.source = memory + mapping["offset"]
        self.pages = bytearray(self.size // self.page)


class Handler:
    """Serves one VMM."""

    def __init__(self, uffd: int, regions: list[Region]) -> None:
        self.uffd = uffd
        self.regions = regions
        self.waiting: list[int] = []  # addresses at which somebody waits

    def read(self) -> None:
        """Take what has happened. All of it before any page is brought: until a removal has been read, none can be."""
        for _ in range(AT_ONCE):
            try:
                data = os.read(self.uffd, AT_ONCE * MESSAGE.size)
            except BlockingIOError:
                return
            for event, first, second, _ in MESSAGE.iter_unpack(data):
                if event == EVENT_PAGEFAULT:
                    self.waiting.append(second)
                elif event == EVENT_REMOVE:
                    self.remove(first, second)

    def remove(self, start: int, end: int) -> None:
        """The VMM has given [start, end) back: zeros from here on."""
        for region in self.regions:
            first = max(start, region.start) - region.start
            last = min(end, region.start + region.size) - region.start
            if first < last:
                pages = slice(first // region.page, last // region.page)
                region.pages[pages] = bytes([REMOVED]) * len(region.pages[pages])

    def serve(self) -> None:
        """Bring what is waited for; what cannot be brought yet stays."""
        self.waiting = [address for address in self.waiting if not self.bring(address)]

    def bring(self, address: int) -> bool:
        """False: not now."""
        for region in self.regions:
            if region.start <= address < region.start + region.size:
                return self.bring_page(region, (address - region.start) // region.page)
        sys.exit(f"uffd_handler: a fault at {address:#x}, which is in no region")

    def bring_page(self, region: Region, index: int) -> bool:
        """Likewise; missing pages that follow come with it."""
        start = region.start + index * region.page
        count = 1
        if region.pages[index] == MISSING:
            while count < AT_ONCE and region.pages[index + count : index + count + 1] == b"\0":
                count += 1
            copy = Copy(start, region.source + index * region.page, count * region.page, 0, 0)
            problem = ask(self.uffd, UFFDIO_COPY, copy)
            count = max(copy.done, 0) // region.page
        elif region.pages[index] == REMOVED:
            problem = ask(self.uffd, UFFDIO_ZEROPAGE, Zero(Range(start, region.page), 0, 0))
            count = not problem
        else:  # two have waited for the same page
            problem = errno.EEXIST
        if problem == errno.EEXIST:
            ask(self.uffd, UFFDIO_WAKE, Range(start, region.page))
            count = 1
        elif problem not in (0, errno.EAGAIN, errno.ENOENT, errno.ESRCH):
            sys.exit(f"uffd_handler: a page at {start:#x}: {os.strerror(problem)}")
        region.pages[index : index + count] = bytes([BROUGHT]) * count
        # It is mapped otherwise now, or its process has gone: nobody waits there.
        return bool(count) or problem in (errno.ENOENT, errno.ESRCH)


def receive(vmm: socket.socket, memory: mmap.mmap) -> Handler:
    """The VMM's one message."""
    data, descriptors, _, _ = socket.recv_fds(vmm, 1 << 16, 1)
    if len(descriptors) != 1:
        sys.exit("uffd_handler: the VMM sent no userfaultfd")
    regions = [Region(mapping, ctypes.addressof(ctypes.c_char.from_buffer(memory))) for mapping in json.loads(data)]
    needed = max(mapping["offset"] + mapping["size"] for mapping in json.loads(data))
    if needed > len(memory):
        sys.exit(f"uffd_handler: the file has {len(memory)} bytes, the guest's memory takes {needed}")
    return Handler(descriptors[0], regions)


def main() -> None:
    """Serve one VMM from its first page to its end."""
    if len(sys.argv) != 3:
        sys.exit((__doc__ or "").strip())
    with open(sys.argv[2], "rb") as file:
        # Private, for an address: nothing is written.
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(sys.argv[1] + ".new")
        listener.listen(1)
        os.rename(sys.argv[1] + ".new", sys.argv[1])  # who sees the file can connect
        vmm, _ = listener.accept()
    os.unlink(sys.argv[1])
    handler = receive(vmm, memory)
    poll = select.poll()
    poll.register(handler.uffd, select.POLLIN)
    poll.register(vmm, select.POLLIN)
    while True:
        ready = dict(poll.poll(1 if handler.waiting else None))
        if vmm.fileno() in ready:
            return  # it says no more than once, so this is its end
        handler.read()
        handler.serve()


if __name__ == "__main__":
    main()
