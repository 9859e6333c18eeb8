"""Guest memory and the split virtqueue: the contract of the C module and of its Python twin's queue."""

from typing import Self

from typing_extensions import Buffer

from vmm.errors import BadChain

RULES: dict[int, str]
"""By status of the C queue: the rule that a driver broke, with its section of virtio 1.2."""

class GuestRam:
    """The guest's RAM: up to 8 regions; each access lies within one or raises ``GuestMemoryError``."""

    def map_region(self, gpa: int, mapping: Buffer) -> None:
        """Take `mapping`, page aligned and writable, as RAM from `gpa`; in address order."""
    def unmap_all(self) -> None:
        """Forget every region; a mapping goes when its last slice does."""
    def host_address(self, gpa: int, size: int) -> int:
        """Host virtual address of [gpa, gpa + size)."""
    def slice(self, gpa: int, size: int) -> memoryview:
        """A writable memoryview over [gpa, gpa + size), not copied; keeps the mapping alive."""
    def write(self, gpa: int, data: Buffer) -> None:
        """Copy `data` to guest memory at `gpa`."""
    def read(self, gpa: int, size: int) -> bytes:
        """The `size` bytes at `gpa`, copied."""
    def whole_pages(self, part: memoryview) -> tuple[int, int]:
        """(guest address, bytes) of the pages that lie wholly inside `part`, a slice of this RAM.

        :raises ValueError: it is not a slice of this RAM
        """
    def discard(self, part: memoryview) -> int:
        """Give the host the pages back that lie wholly inside `part`: holes in the memfd, which read as zeros.

        :param part: what ``slice`` or a chain gave, of any alignment
        :returns: bytes given back
        :raises ValueError: it is not a slice of this RAM
        :raises OSError: the host refused, as for RAM that is no shared memory

        Without the GIL. Source: Linux madvise(2), MADV_REMOVE.
        """

class Chain:
    """One request of the driver. Its buffers are guest memory, borrowed until ``VirtQueue.add_used``."""

    @property
    def head(self) -> int:
        """Index of its first descriptor, by which the driver knows it."""
    @property
    def readable_bytes(self) -> int:
        """Bytes in ``readable``."""
    @property
    def writable_bytes(self) -> int:
        """Bytes in ``writable``; together at most 2^32."""
    def gather(self, limit: int, start: int = 0) -> bytes:
        """What the driver wrote for the device, from `start` on, copied once: at most `limit` bytes of it.

        Judge ``readable_bytes`` first: a driver can name gigabytes by a few descriptors.
        """
    def scatter(self, data: Buffer) -> int:
        """Copy `data` to where the device may write, from the first byte on; how much of it had room."""
    @property
    def readable(self) -> list[memoryview]:
        """What the driver wrote for the device, in order; no buffer is empty. Made anew by each call."""
    @property
    def writable(self) -> list[memoryview]:
        """Where the device may write, in order; no buffer is empty. Made anew by each call."""

class VirtQueue:
    """The device's side of one split virtqueue (virtio 1.2 §2.7), used by one thread at a time. Its loop::

        while True:
            queue.disable_notify()
            while (chain := queue.pop()) is not None:
                queue.add_used(chain, serve(chain))
                if queue.flush():
                    interrupt()
            if not queue.enable_notify():
                break                       # now wait for the notification

    :param memory: guest RAM that holds the rings and the buffers
    :param max_size: a power of two up to 32768
    :param index: of the queue in its device, for messages
    """

    size: int
    desc: int
    avail: int
    used: int
    def __new__(cls, memory: GuestRam, max_size: int, index: int = 0) -> Self: ...
    @property
    def memory(self) -> GuestRam: ...
    @property
    def index(self) -> int: ...
    @property
    def max_size(self) -> int: ...
    @property
    def ready(self) -> bool:
        """Whether ``enable`` found the set-up good."""
    @property
    def last_avail(self) -> int:
        """Chains taken so far, mod 65536."""
    @property
    def next_used(self) -> int:
        """Chains returned so far, mod 65536."""
    def reset(self) -> None:
        """Not ready, ``size`` is ``max_size``, no addresses."""
    def enable(self, *, event_idx: bool, indirect: bool, last_avail: int = 0, next_used: int = 0) -> None:
        """Judge ``size`` and the guest addresses ``desc``, ``avail`` and ``used``, and make the queue ready.

        :param event_idx: VIRTIO_F_EVENT_IDX was negotiated
        :param indirect: VIRTIO_F_INDIRECT_DESC was negotiated
        :param last_avail: where a restored device goes on
        :param next_used: the same for the used ring
        :raises BadChain: size not a power of two or too large, an address misaligned or outside RAM
        """
    def pop(self) -> Chain | None:
        """The next chain, each descriptor copied once and then judged; None: no more for now.

        :raises BadChain: the driver broke a rule; the queue stays where it is until ``reset``
        """
    def failure(self, status: int) -> BadChain:
        """The exception for what ``queue_pop`` of this queue returned last, a negative status."""
    def add_used(self, chain: Chain, written: int) -> None:
        """Return `chain`, its first `written` writable bytes filled; the driver sees it after ``flush``.

        :raises ValueError: returned before, or `written` above its ``writable_bytes``
        """
    def flush(self) -> bool:
        """Show the driver the chains returned since the last call; True: it wants an interrupt for them."""
    def enable_notify(self) -> bool:
        """Ask the driver for notifications; True: more chains came meanwhile, take them first."""
    def disable_notify(self) -> None:
        """Tell the driver that it need not notify; only a hint."""
