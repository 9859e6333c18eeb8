# SPDX-License-Identifier: Apache-2.0
"""One device in a machine: its position, its transport and its resources. ``detach`` undoes each."""

from __future__ import annotations

from boot import layout
from boot.board import VIRTIO_GSIS
from vmm.closing import Closers
from vmm.errors import ConfigError, VmmError
from vmm.irq import IrqLine
from vmm.kvm import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtio.device import VirtioDevice
    from virtio.fs._dax import Window
    from virtio.mmio import VirtioMmio
    from vmm._bus import Bus
    from vmm.kvm.vm import Vm
    from vmm.memory import GuestMemory


class Attached:
    """A virtio device in a machine, with its resources. ``Machine.attach`` and the machine itself make it.

    :ivar id: the id that ``Machine.detach`` takes
    :ivar name: the ``id`` or ``tag`` of its configuration, or the device's name; ``id`` differs if two share it
    :ivar kind: ``drive``, ``net``, ``share``, ``vsock``, ``entropy``, ``balloon`` or ``console``; ``""``: a device of
        your own
    :ivar device: the device
    :ivar slot: its position, from 0
    :ivar base: guest address of its registers, ``layout.VIRTIO_MMIO_STRIDE`` bytes
    :ivar gsi: its interrupt line
    :ivar configured: whether it is in the machine's configuration
    """

    def __init__(self, kind: str, name: str, device: VirtioDevice, closers: Closers) -> None:
        self.id = self.name = name
        self.kind = kind
        self.device = device
        self.slot = self.base = self.gsi = -1  # until ``Devices.place``
        self.configured = False
        self._transport: VirtioMmio | None = None
        self._closers = closers  # what closes the host's parts that were opened for it, the last one first
        self._undo = Closers()  # what the VM and the bus have of it

    def __repr__(self) -> str:
        return f"Attached({self.id!r}, base={self.base:#x}, gsi={self.gsi})"

    @property
    def transport(self) -> VirtioMmio:
        """Its registers, queues and workers."""
        assert self._transport is not None
        return self._transport

    def refuse_own_threads(self) -> None:
        """:raises VmmError: the calling thread is the device's, which would wait for itself"""
        if self._transport is not None and self._transport.is_here:
            raise VmmError("a device's own thread would wait for itself; let another thread do this")

    @property
    def window(self) -> Window | None:
        """The memory window that the device shows the guest, or None."""
        return getattr(self.device, "window", None)

    def make(self, memory: GuestMemory, window_address: int) -> None:
        """Make its interrupt line and its transport.

        :param window_address: the guest address of its window, if it has one
        :raises OSError: no file descriptor is left
        """
        from virtio.mmio import VirtioMmio

        if (window := self.window) is not None:
            self.device.shm_regions[0] = (window_address, window.size)

        self._line = self._closers.own(IrqLine(self.gsi))
        self._transport = self._closers.own(VirtioMmio(self.device, memory, self._line))

    def map(self, vm: Vm) -> None:
        """Map its window into the guest, and its registers if KVM has read-only memory.

        :raises KvmError: KVM has no memory slot left
        """
        if (window := self.window) is not None:
            gpa, size = self.device.shm_regions[0]
            self._map(vm, gpa, size, window.address, read_only=False)
        if vm.kvm.check(abi.KVM_CAP_READONLY_MEM):
            self._map(vm, self.base, layout.VIRTIO_MMIO_STRIDE, self.transport.page_address, read_only=True)

    def _map(self, vm: Vm, gpa: int, size: int, address: int, *, read_only: bool) -> None:
        slot = vm.map_window(gpa, size, address, read_only=read_only)
        self._undo.append(lambda: vm.unmap_window(slot))

    def bind(self, vm: Vm, bus: Bus) -> None:
        """Connect its registers, interrupt and doorbells to the guest. The VM must have its interrupt controllers.

        :raises ConfigError: another device has its address
        :raises KvmError: KVM has no room left
        """
        from virtio import spec

        transport, line = self.transport, self._line
        bus.add(self.base, layout.VIRTIO_MMIO_STRIDE, transport, self.device.name)
        self._undo.append(lambda: bus.remove(transport))
        vm.irqfd(line.fd, line.gsi)
        self._undo.append(lambda: vm.irqfd(line.fd, line.gsi, bind=False))
        for queue, fd in enumerate(transport.notify_fds):
            self._ring(vm, fd, spec.MMIO_QUEUE_NOTIFY, queue)
        # That a used ring was seen is said at every interrupt, and means nothing to us: KVM takes it. InterruptStatus
        # then goes on saying that rings may have changed; that the configuration was seen comes here.
        self._ring(vm, transport.ack_fd, spec.MMIO_INTERRUPT_ACK, spec.INTERRUPT_USED)

    def _ring(self, vm: Vm, fd: int, register: int, value: int) -> None:
        vm.ioeventfd(fd, self.base + register, value)
        self._undo.append(lambda: vm.ioeventfd(fd, self.base + register, value, bind=False))

    def connect(self, memory: GuestMemory, window_address: int, vm: Vm, bus: Bus) -> None:
        """``make``, ``map`` and ``bind`` it, for a VM that is whole. If one of them fails, nothing of it is left."""
        try:
            self.make(memory, window_address)
            self.map(vm)
            self.bind(vm, bus)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove it from a VM that goes on, and close it. No vCPU may run meanwhile."""
        self._undo.close()
        self.device.shm_regions.pop(0, None)
        self.close()

    def close(self) -> None:
        """Stop its workers and free the machine's resources of it; idempotent. For a VM that has ended."""
        self._closers.close()


class Devices:
    """The virtio devices of a machine.

    :param first: guest address of the first slot
    :param window: guest address from which on there is nothing, for windows

    ``by_id`` has them in the order in which they came. It is replaced and not changed: any thread may read it.
    """

    def __init__(self, first: int, window: int) -> None:
        self.by_id: dict[str, Attached] = {}
        self._first = first
        self._window = window
        self.windows: tuple[Window, ...] = ()  # of those that have one; read by vCPUs' threads

    def place(self, attached: Attached, slot: int | None = None) -> Attached:
        """Give `attached` an id and a slot, for ``add``; returns it.

        :param slot: the one to take if it is free; None: the first that is
        :raises ConfigError: no slot is left, or a device of its kind has its name; it is closed
        """
        taken = {each.slot: each for each in self.by_id.values()}
        try:
            if len(taken) == len(VIRTIO_GSIS):
                raise ConfigError("devices", len(taken) + 1, f"at most {len(VIRTIO_GSIS)} virtio devices fit")
            kind, name = attached.kind, attached.name
            if kind and any((each.kind, each.name) == (kind, name) for each in taken.values()):
                raise ConfigError(kind, name, "is in use; choose another name, or detach that device")
        except ConfigError:
            attached.close()
            raise
        free = [number for number in range(len(VIRTIO_GSIS)) if number not in taken]
        attached.slot = slot = slot if type(slot) is int and slot in free else free[0]
        names = (name, attached.device.name, f"{attached.device.name}.{slot}")
        attached.id = next(each for each in names if each not in self.by_id)
        attached.base = self._first + slot * layout.VIRTIO_MMIO_STRIDE
        attached.gsi = VIRTIO_GSIS[slot]
        return attached

    def add(self, attached: Attached) -> None:
        """It is one of them from here on."""
        self._are({**self.by_id, attached.id: attached})

    def window_address(self, attached: Attached) -> int:
        """Where the window of `attached` fits, if it has one: above RAM and the other windows' lower ones."""
        at = self._window
        if attached.window is not None:
            others = (each.device.shm_regions for each in self.by_id.values() if each is not attached and each.window)
            for start, size in sorted(regions[0] for regions in others if 0 in regions):
                if at + attached.window.size <= start:
                    break
                at = start + size
        return at

    def remove(self, attached: Attached) -> None:
        """Forget it."""
        self._are({id: each for id, each in self.by_id.items() if each is not attached})

    def _are(self, by_id: dict[str, Attached]) -> None:
        self.by_id = by_id
        self.windows = tuple(each.window for each in self.by_id.values() if each.window is not None)

    def named(self, kind: str) -> dict[str, Any]:
        """Devices of `kind` by name."""
        return {each.name: each.device for each in self.by_id.values() if each.kind == kind}

    def refuse_own_threads(self) -> None:
        """:raises VmmError: the calling thread is that of a device"""
        for attached in self.by_id.values():
            attached.refuse_own_threads()

    def close(self) -> None:
        """Close all, the last one first; idempotent. For a VM that has ended."""
        Closers(attached.close for attached in self.by_id.values()).close()
