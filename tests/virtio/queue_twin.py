# SPDX-License-Identifier: Apache-2.0
"""The split virtqueue of ``vmm._fastpath`` once more, to be read: the C one is compared with it, by tests alone.

Single-threaded only: Python has no memory barrier, so a driver that runs at the same time could be missed.
The contract is ``_fastpath.pyi``; the rules are virtio 1.2 §2.7.
"""

from __future__ import annotations

import struct

from vmm.errors import BadChain, GuestMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm._fastpath import GuestRam

_DESC = struct.Struct("<QIHH")  # addr, len, flags, next
_U16 = struct.Struct("<H")
_ELEMENT = struct.Struct("<II")  # id, len
NEXT, WRITE, INDIRECT = 1, 2, 4


class Chain:
    """One request of the driver; its buffers are borrowed until ``add_used``."""

    def __init__(self, head: int) -> None:
        self.head = head
        self.readable: list[memoryview] = []
        self.writable: list[memoryview] = []
        self.returned = False

    @property
    def readable_bytes(self) -> int:
        return sum(map(len, self.readable))

    @property
    def writable_bytes(self) -> int:
        return sum(map(len, self.writable))

    def gather(self, limit: int, start: int = 0) -> bytes:
        copy = bytearray()
        for part in self.readable:
            copy += part[start : start + limit - len(copy)]
            start = max(0, start - len(part))
        return bytes(copy)

    def scatter(self, data: bytes) -> int:
        done = 0
        for part in self.writable:
            piece = data[done : done + len(part)]
            part[: len(piece)] = piece
            done += len(piece)
        return done


class VirtQueue:
    """The device's side of one split virtqueue, single-threaded."""

    def __init__(self, memory: GuestRam, max_size: int, index: int = 0) -> None:
        if not 0 < max_size <= 32768 or max_size & max_size - 1:
            raise ValueError("a queue's maximum size is a power of two up to 32768")
        self.memory = memory
        self.max_size = max_size
        self.index = index
        self.reset()

    def reset(self) -> None:
        self.ready = False
        self.size = self.max_size
        self.desc = self.avail = self.used = 0
        self.last_avail = self.next_used = self._published = 0
        self._event_idx = self._indirect = False

    def enable(self, *, event_idx: bool, indirect: bool, last_avail: int = 0, next_used: int = 0) -> None:
        size = self.size
        if not 0 < size <= self.max_size or size & size - 1:
            problem = f"the queue size {size} is not a power of two up to {self.max_size} (§2.7, §4.2.3.2)"
            raise BadChain(self.index, -1, -1, problem)
        for name, gpa, alignment, length in (
            ("descriptor table", self.desc, 16, 16 * size),
            ("available ring", self.avail, 2, 6 + 2 * size),
            ("used ring", self.used, 4, 6 + 8 * size),
        ):
            if gpa % alignment:
                problem = f"the {name} at {gpa:#x} is not aligned to {alignment} (§2.7)"
                raise BadChain(self.index, -1, -1, problem)
            if not self._in_ram(gpa, length):
                problem = f"the {name} at {gpa:#x} is not inside guest memory (§2.7)"
                raise BadChain(self.index, -1, -1, problem)
        self._size = size
        self._desc, self._avail, self._used = self.desc, self.avail, self.used
        self._event_idx = event_idx
        self._indirect = indirect
        self.last_avail = last_avail
        self.next_used = self._published = next_used
        self.ready = True

    def _in_ram(self, gpa: int, size: int) -> bool:
        try:
            self.memory.slice(gpa, size)
        except GuestMemoryError:
            return False
        return True

    def _read16(self, gpa: int) -> int:
        return int(_U16.unpack(self.memory.read(gpa, 2))[0])

    def _write16(self, gpa: int, value: int) -> None:
        self.memory.write(gpa, _U16.pack(value))

    def pop(self) -> Chain | None:
        if not self.ready:
            raise BadChain(self.index, -1, -1, "the queue is not ready (§4.2.2.2)")
        ahead = (self._read16(self._avail + 2) - self.last_avail) % 65536
        if ahead == 0:
            return None
        if ahead > self._size:
            problem = "avail.idx is further ahead than the queue is long (§2.7.13.3)"
            raise BadChain(self.index, -1, -1, problem)
        chain = self._walk(self._read16(self._avail + 4 + 2 * (self.last_avail % self._size)))
        self.last_avail = (self.last_avail + 1) % 65536
        return chain

    def _walk(self, head: int) -> Chain:
        def broken(rule: str) -> BadChain:
            return BadChain(self.index, head, index, rule)

        index = head
        if head >= self._size:
            raise broken("the head is not below the queue size (§2.7.6)")
        chain = Chain(head)
        table, table_size = self._desc, self._size
        seen = total = 0
        inside_indirect = False
        while True:
            addr, size, flags, following = _DESC.unpack(self.memory.read(table + 16 * index, 16))
            if flags & INDIRECT:
                if not self._indirect:
                    raise broken("INDIRECT without VIRTIO_F_INDIRECT_DESC (§2.7.5.3.1)")
                if inside_indirect:
                    raise broken("INDIRECT inside an indirect table (§2.7.5.3.1)")
                if flags & NEXT:
                    raise broken("INDIRECT together with NEXT (§2.7.5.3.1)")
                if not size or size % 16 or size // 16 > self._size:
                    problem = "the indirect table is empty, not whole descriptors or longer than the queue"
                    raise broken(f"{problem} (§2.7.5.3.1)")
                if not self._in_ram(addr, size):
                    raise broken("the indirect table is not inside guest memory (§2.7.5.3)")
                table, table_size, index = addr, size // 16, 0
                inside_indirect = True
                continue
            seen += 1
            if seen > self._size:
                raise broken("the chain loops or is longer than the queue (§2.7.5.2, §2.7.5.3.1)")
            if not self._in_ram(addr, size):
                raise broken("the buffer is not inside guest memory (§2.7.5)")
            total += size
            if total > 1 << 32:
                raise broken("the chain holds more than 2^32 bytes (§2.7.5.2)")
            if not flags & WRITE and chain.writable:
                raise broken("a device-readable buffer follows a device-writable one (§2.7.4.2)")
            if size:
                (chain.writable if flags & WRITE else chain.readable).append(self.memory.slice(addr, size))
            if not flags & NEXT:
                return chain
            if following >= table_size:
                raise broken("next is not below the size of its table (§2.7.5)")
            index = following

    def add_used(self, chain: Chain, written: int) -> None:
        if not isinstance(written, int):
            raise TypeError(f"written must be a whole number, not {written}: what serves a chain returns it")
        if chain.returned:
            raise ValueError("the chain was returned before")
        if not 0 <= written <= chain.writable_bytes:
            raise ValueError(f"a chain with room for {chain.writable_bytes} bytes cannot have {written} bytes written")
        if not self.ready:
            raise ValueError("the queue is not ready")
        chain.returned = True
        at = self._used + 4 + 8 * (self.next_used % self._size)
        self.memory.write(at, _ELEMENT.pack(chain.head, written))
        self.next_used = (self.next_used + 1) % 65536

    def flush(self) -> bool:
        old, new = self._published, self.next_used
        if new == old:
            return False
        self._write16(self._used + 2, new)
        self._published = new
        if self._event_idx:
            event = self._read16(self._avail + 4 + 2 * self._size)
            return (new - event - 1) % 65536 < (new - old) % 65536
        return not self._read16(self._avail) & 1

    def enable_notify(self) -> bool:
        if not self.ready:
            return False
        if self._event_idx:
            self._write16(self._used + 4 + 8 * self._size, self.last_avail)
        else:
            self._write16(self._used, 0)
        return self._read16(self._avail + 2) != self.last_avail

    def disable_notify(self) -> None:
        if self.ready and not self._event_idx:
            self._write16(self._used, 1)
