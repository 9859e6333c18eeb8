# SPDX-License-Identifier: Apache-2.0
"""One virtual CPU: its registers, and the handling of each exit that the run loop hands back."""

from __future__ import annotations

import os

from vmm import undertaker
from vmm.errors import KvmError
from vmm.exits import Stop, StopReason
from vmm.kvm import abi
from vmm.kvm._vcpu import KICKED, VcpuLoop
from vmm.kvm.abi import kvm_ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm._bus import Bus
    from vmm.kvm.vm import Vm

# What KVM_INTERNAL_ERROR_EMULATION adds since Linux 5.13: flags in data[0], then the length and bytes it stumbled on.
_EMULATION_HAS_BYTES = 1


class Vcpu:
    """vCPU `index` of a VM; owns its file descriptor. `run` belongs to one thread, the rest to any.

    ``exit_handlers`` has what is done about an exit, by its ``KVM_EXIT_*`` number, on the vCPU's thread; accesses to
    devices are not among them. A handler raises ``vmm.exits.Stop``, or returns, and the guest goes on. An exit without
    a handler ends the VM with ``INTERNAL_ERROR``.

    Registers are readable and writable while the vCPU does not run: before ``Machine.start``, paused, or stopped.
    """

    def __init__(self, vm: Vm, index: int, pio: Bus, mmio: Bus) -> None:
        self.index = index
        self._exits: dict[str, int] = {}
        self.exit_handlers = dict(_HANDLERS)
        self.fd = vm.create_vcpu(index)
        try:
            self._loop: VcpuLoop | None = VcpuLoop(self.fd, vm.vcpu_mmap_size, pio, mmio)
        except KvmError:
            os.close(self.fd)
            raise

    @property
    def has_handlers_of_others(self) -> bool:
        """Whether ``exit_handlers`` has one that is not the VMM's own."""
        return not set(self.exit_handlers.values()) <= set(_HANDLERS.values())

    @property
    def loop(self) -> VcpuLoop:
        """The run loop, for its counters."""
        if self._loop is None:
            raise ValueError(f"vCPU {self.index} is closed")
        return self._loop

    @property
    def exits(self) -> dict[str, int]:
        """Exits so far by kind: ``io_in``, ``io_out``, ``mmio_read``, ``mmio_write``."""
        loop = self._loop  # another thread may close this
        if loop is not None:
            self._exits = loop.accesses
        return self._exits

    @property
    def regs(self) -> abi.kvm_regs:
        """A copy of the general registers; assign to change them."""
        regs = abi.kvm_regs()
        kvm_ioctl(self.fd, abi.KVM_GET_REGS, regs)
        return regs

    @regs.setter
    def regs(self, regs: abi.kvm_regs) -> None:
        kvm_ioctl(self.fd, abi.KVM_SET_REGS, regs)

    @property
    def sregs(self) -> abi.kvm_sregs:
        """A copy of the segment and control registers; assign to change them."""
        sregs = abi.kvm_sregs()
        kvm_ioctl(self.fd, abi.KVM_GET_SREGS, sregs)
        return sregs

    @sregs.setter
    def sregs(self, sregs: abi.kvm_sregs) -> None:
        kvm_ioctl(self.fd, abi.KVM_SET_SREGS, sregs)

    def set_cpuid(self, entries: list[abi.kvm_cpuid_entry2]) -> None:
        """What CPUID answers in the guest; before the first run only."""
        table = abi.cpuid(len(entries))
        table.entries[:] = entries
        kvm_ioctl(self.fd, abi.KVM_SET_CPUID2, table.buffer)

    def set_msrs(self, values: dict[int, int]) -> None:
        """Set model-specific registers, by index.

        :raises KvmError: KVM refused one; ``what`` names it
        """
        done = kvm_ioctl(self.fd, abi.KVM_SET_MSRS, abi.msrs(values).buffer)
        if done < len(values):
            raise KvmError(22, f"KVM_SET_MSRS {list(values)[done]:#x}")

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Model-specific registers, by index.

        :raises KvmError: KVM has no such register; ``what`` names it
        """
        table = abi.msrs(dict.fromkeys(indices, 0))
        done = kvm_ioctl(self.fd, abi.KVM_GET_MSRS, table.buffer)
        if done < len(indices):
            raise KvmError(22, f"KVM_GET_MSRS {indices[done]:#x}")
        return {entry.index: entry.data for entry in table.entries[:done]}

    def run(self) -> None:
        """Run the guest until it is kicked.

        :raises Stop: the guest ended, by a device's word or by an exit that ends it
        :raises KvmError: KVM_RUN failed
        """
        loop = self.loop
        while (reason := loop.run()) != KICKED:
            handler = self.exit_handlers.get(reason)
            if handler is None:
                raise Stop(StopReason.INTERNAL_ERROR, detail=f"vCPU {self.index}: unexpected exit reason {reason}")
            handler(self)

    def _shutdown(self) -> None:
        raise Stop(StopReason.TRIPLE_FAULT, detail=f"vCPU {self.index} at {self.regs.rip:#x}")

    def _fail_entry(self) -> None:
        detail = f"vCPU {self.index}, hardware reason {self.loop.fail_entry_reason:#x}"
        raise Stop(StopReason.FAIL_ENTRY, detail=detail)

    def _internal_error(self) -> None:
        suberror, data = self.loop.internal_error
        text = f"vCPU {self.index}, suberror {suberror}, rip {self.regs.rip:#x}"
        if suberror == abi.KVM_INTERNAL_ERROR_EMULATION and len(data) >= 3 and data[0] & _EMULATION_HAS_BYTES:
            packed = data[1].to_bytes(8, "little") + data[2].to_bytes(8, "little")
            text += f", cannot emulate {packed[1 : 1 + min(packed[0], 15)].hex(' ')}"
        raise Stop(StopReason.INTERNAL_ERROR, detail=text)

    def kick(self) -> None:
        """Make ``run`` return soon; from any thread."""
        loop = self._loop  # another thread may close this
        if loop is not None:
            loop.kick()

    def close(self) -> None:
        """Idempotent; not while the vCPU runs."""
        if self.fd >= 0:
            self._exits = self.exits
            self._loop = None
            undertaker.bury(self.fd)
            self.fd = -1


_HANDLERS: dict[int, Callable[[Vcpu], None]] = {
    abi.KVM_EXIT_SHUTDOWN: Vcpu._shutdown,
    abi.KVM_EXIT_INTERNAL_ERROR: Vcpu._internal_error,
    abi.KVM_EXIT_FAIL_ENTRY: Vcpu._fail_entry,
}
