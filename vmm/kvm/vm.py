# SPDX-License-Identifier: Apache-2.0
"""/dev/kvm and one VM on it: capabilities, memory slots, interrupt lines, doorbells."""

from __future__ import annotations

import errno
import fcntl
import os

from vmm import undertaker
from vmm.closing import Closers
from vmm.errors import ConfigError, HostError, KvmError, VmmError
from vmm.kvm import abi
from vmm.kvm.abi import kvm_ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import ClassVar

    from vmm.kvm._state import StateAccess
    from vmm.memory import GuestMemory

# Below 4 GiB, in the hole between RAM and the top: Intel's KVM keeps an identity map (one page) and a task state
# segment (three) there. They are the machine's, not a guest's.
IDENTITY_MAP_ADDRESS = 0xFFFBC000
TSS_ADDRESS = 0xFFFBD000


def _numbers(names: str) -> dict[str, int]:
    return {name: getattr(abi, name) for name in names.split()}


# Without any of these no guest of ours runs. All are older than the oldest kernel we boot (Linux 4.11, 2017).
REQUIRED = _numbers(
    "KVM_CAP_IRQCHIP KVM_CAP_USER_MEMORY KVM_CAP_SET_TSS_ADDR KVM_CAP_EXT_CPUID KVM_CAP_IRQFD KVM_CAP_PIT2 "
    "KVM_CAP_IOEVENTFD KVM_CAP_IMMEDIATE_EXIT"
)
# Used where they are there.
OPTIONAL = _numbers("KVM_CAP_CLOCKSOURCE KVM_CAP_TSC_DEADLINE_TIMER KVM_CAP_SET_IDENTITY_MAP_ADDR")


def software_kvm() -> str | None:
    """The name of the software KVM that /dev/kvm is here, or None where KVM is the hardware's.

    A software KVM emulates the guest's kernel instruction by instruction: tiny guests run, Linux does not get far.
    """
    return "kvm_pvm" if os.path.exists("/sys/module/kvm_pvm") else None


def why_no_linux() -> str | None:
    """Why KVM here brings no Linux that needs ring 0 to its user space, as a clause; None: it does."""
    software = software_kvm()
    return software and f"is a software KVM ({software}), on which Linux does not reach user space"


def runs_linux() -> bool:
    """Whether a stock Linux can run here: KVM is there, permitted, and the hardware's."""
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and software_kvm() is None


class Kvm:
    """An open /dev/kvm; owns its file descriptor.

    :param path: the device, ``/dev/kvm`` unless a test says otherwise
    :raises ConfigError: the device is missing, not permitted, or not KVM; the message says what to do
    """

    _access: ClassVar[dict[str, StateAccess]] = {}
    _shared: ClassVar[dict[str, Kvm]] = {}
    _widened: ClassVar[bool] = False

    @classmethod
    def shared(cls, path: str) -> Kvm:
        """The one that all copies of machines in this process have, opened the first time and not closed."""
        kvm = cls._shared.get(path)
        if kvm is None:
            kvm = cls._shared[path] = cls(path)
        elif not cls._widened:  # the second copy: many may follow
            cls._widened = True
            # A process's first threads make it costly to double the table of descriptors: the kernel waits for RCU each
            # time, 5 to 10 ms. Copies take five each, so it grows once, to what a limit of 1,024 allows.
            try:
                os.close(fcntl.fcntl(kvm.fd, fcntl.F_DUPFD_CLOEXEC, 1023))
            except OSError:
                pass  # the limit is lower
        return kvm

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ConfigError(
                "--kvm", path, "does not exist; load kvm_intel or kvm_amd, or use --lab (an emulated machine)"
            ) from None
        except PermissionError:
            raise ConfigError("--kvm", path, "not permitted; join the group that owns it, often kvm") from None
        except OSError as error:
            raise ConfigError("--kvm", path, f"cannot be opened: {error.strerror}") from None
        except ValueError:
            raise ConfigError("--kvm", path, "must have no NUL in it") from None
        self.path = path
        try:
            version = kvm_ioctl(self.fd, abi.KVM_GET_API_VERSION)
        except KvmError as error:
            self.close()
            raise ConfigError("--kvm", path, f"is not a KVM device ({error.strerror})") from None
        if version != abi.KVM_API_VERSION:
            self.close()
            raise ConfigError(
                "--kvm", path, f"has API version {version}; pyvmm needs {abi.KVM_API_VERSION} (Linux 4.11 or later)"
            )

    def check(self, capability: int) -> int:
        """What ``KVM_CHECK_EXTENSION`` says of one ``KVM_CAP_*``: 0 means no, else yes or a number."""
        return kvm_ioctl(self.fd, abi.KVM_CHECK_EXTENSION, capability)

    def lacking(self, more: Sequence[int] = (), less: Sequence[int] = ()) -> list[str]:
        """Names of the required capabilities that this KVM has not.

        :param more: numbers of further ones that are required
        :param less: numbers of those that are not, after all
        """
        required = {**REQUIRED, **{f"capability {number}": number for number in more}}
        return [name for name, number in required.items() if number not in less and not self.check(number)]

    def max_vcpus(self) -> int:
        """The most vCPUs a VM can have here."""
        return self.check(abi.KVM_CAP_MAX_VCPUS) or self.check(abi.KVM_CAP_NR_VCPUS) or 4

    def supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """The CPUID leaves that KVM can show a guest; the entries are the caller's to change."""
        table = abi.cpuid(256)  # KVM_MAX_CPUID_ENTRIES: more it does not have
        kvm_ioctl(self.fd, abi.KVM_GET_SUPPORTED_CPUID, table.buffer)
        return list(table.entries[: table.header.nent])

    def state_access(self) -> StateAccess:
        """How the state of vCPUs and VMs is read and set here; made once a device path."""
        if self.path not in self._access:
            from vmm.kvm._state import StateAccess

            self._access[self.path] = StateAccess(self.fd)
        return self._access[self.path]

    def create_vm(self) -> Vm:
        """A new VM with no memory, no interrupt controller and no vCPU."""
        for _ in range(10):
            try:
                return Vm(self, kvm_ioctl(self.fd, abi.KVM_CREATE_VM))
            except KvmError as error:
                # A signal during the creation; the kernel gives the half-made VM back.
                if error.errno != errno.EINTR:
                    raise
        raise KvmError(errno.EINTR, "KVM_CREATE_VM")

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def prepare(path: str = "/dev/kvm") -> Vm | None:
    """A VM with its interrupt controllers, for a machine that is still to be configured; None where that fails.

    Memory waits for KVM's readers (2 to 8 ms) where it comes within 8 ms of them; where it comes first, the VM's end
    waits (12 ms). So they are made as early as can be.
    What is wrong with this KVM, the machine finds out and says.
    """
    made = Closers()
    try:
        vm = made.own(made.own(Kvm(path)).create_vm())
        vm.create_irqchip()
    except VmmError:
        made.close()
        return None
    return vm


class Vm:
    """One VM's file descriptor and what hangs on it; made by ``Kvm.create_vm``."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        self.kvm = kvm
        self.fd = fd
        self._has_irqchip = False
        self.slots: dict[int, int] = {}  # memory slots in use, by number: their guest addresses
        self.vcpu_mmap_size = kvm_ioctl(kvm.fd, abi.KVM_GET_VCPU_MMAP_SIZE)

    def create_irqchip(self) -> None:
        """PIC, IOAPIC and local APICs in the kernel. Must come before the first vCPU; idempotent."""
        if self._has_irqchip:
            return
        self._has_irqchip = True
        kvm_ioctl(self.fd, abi.KVM_SET_TSS_ADDR, TSS_ADDRESS)
        # KVM takes the address by pointer, hence a buffer.
        address = bytearray(IDENTITY_MAP_ADDRESS.to_bytes(8, "little"))
        if self.kvm.check(abi.KVM_CAP_SET_IDENTITY_MAP_ADDR):
            kvm_ioctl(self.fd, abi.KVM_SET_IDENTITY_MAP_ADDR, address)
        kvm_ioctl(self.fd, abi.KVM_CREATE_IRQCHIP)

    def create_pit(self, state: bytes | None = None) -> None:
        """The PC's timer and port 0x61 in the kernel. Once; after ``create_irqchip``, also while vCPUs run.

        :param state: a ``struct kvm_pit_state2``; None: as after a reset
        """
        kvm_ioctl(self.fd, abi.KVM_CREATE_PIT2, abi.kvm_pit_config(flags=abi.KVM_PIT_SPEAKER_DUMMY))
        if state is not None:
            kvm_ioctl(self.fd, abi.KVM_SET_PIT2, bytearray(state))

    def map_memory(self, memory: GuestMemory) -> None:
        """Give the guest `memory`, one slot a region. The mappings must outlive the VM."""
        for region in memory.regions:
            self.map_window(region.gpa, region.size, region.address)

    def map_window(self, gpa: int, size: int, address: int, *, read_only: bool = False) -> int:
        """Show the guest [`address`, `address` + `size`) of this process at `gpa`, in a slot of its own.

        Whole pages; the mapping must outlive the slot, and may change meanwhile: KVM follows it. Where it is read-only
        to the guest, writes are MMIO exits as if nothing were there; needs KVM_CAP_READONLY_MEM.

        :returns: the slot's number, for ``unmap_window``
        """
        slot = next(number for number in range(len(self.slots) + 1) if number not in self.slots)
        kvm_ioctl(
            self.fd,
            abi.KVM_SET_USER_MEMORY_REGION,
            abi.kvm_userspace_memory_region(
                slot=slot, guest_phys_addr=gpa, memory_size=size, userspace_addr=address,
                flags=abi.KVM_MEM_READONLY if read_only else 0,
            ),
        )  # fmt: skip
        self.slots[slot] = gpa
        return slot

    def unmap_window(self, slot: int) -> None:
        """Take back what ``map_window`` showed; no vCPU sees it any more when this returns."""
        gpa = self.slots[slot]
        region = abi.kvm_userspace_memory_region(slot=slot, guest_phys_addr=gpa)  # of no size: KVM deletes the slot
        kvm_ioctl(self.fd, abi.KVM_SET_USER_MEMORY_REGION, region)
        del self.slots[slot]

    def irqfd(self, fd: int, gsi: int, *, bind: bool = True) -> None:
        """From now on a write to eventfd `fd` is an edge on interrupt line `gsi`. `fd` is borrowed.

        :param bind: False: no longer
        """
        flags = 0 if bind else abi.KVM_IRQFD_FLAG_DEASSIGN
        kvm_ioctl(self.fd, abi.KVM_IRQFD, abi.kvm_irqfd(fd=fd, gsi=gsi, flags=flags))

    def ioeventfd(self, fd: int, address: int, value: int, *, bind: bool = True) -> None:
        """From now on a guest's 32-bit write of `value` to MMIO `address` signals eventfd `fd`, with no exit.

        :param bind: False: no longer; `fd` is given back
        """
        flags = abi.KVM_IOEVENTFD_FLAG_DATAMATCH | (0 if bind else abi.KVM_IOEVENTFD_FLAG_DEASSIGN)
        kvm_ioctl(
            self.fd,
            abi.KVM_IOEVENTFD,
            abi.kvm_ioeventfd(datamatch=value, addr=address, len=4, fd=fd, flags=flags),
        )

    def create_vcpu(self, index: int) -> int:
        """A new vCPU's file descriptor; its APIC id is `index`."""
        try:
            return kvm_ioctl(self.fd, abi.KVM_CREATE_VCPU, index)
        except KvmError as error:
            raise HostError(error.errno or 0, f"KVM_CREATE_VCPU {index}") from None

    def close(self) -> None:
        """Idempotent. The VM goes soon after its vCPUs' descriptors are closed too: the last close waits for KVM."""
        if self.fd >= 0:
            undertaker.bury(self.fd)
            self.fd = -1
