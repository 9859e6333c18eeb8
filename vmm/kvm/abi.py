# SPDX-License-Identifier: Apache-2.0
"""KVM's ioctls and structures, under the names of ``<linux/kvm.h>`` and ``<asm/kvm.h>`` and in their layout.

Numbers are derived from the structures, as the header derives them; ``tests/vmm/test_kvm_abi.py`` compares every one
of them, every size and every offset with the host's own headers.
"""

from __future__ import annotations

import fcntl
from _functools import partial  # type: ignore[import-not-found]  # in no stubs; `functools` imports more

from vmm.errors import KvmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import Array, Structure, c_int32, c_uint8, c_uint16, c_uint32, c_uint64, sizeof
    from typing import Any
else:
    # The half of `ctypes` that is in C; the other one costs a launch more than all of this module.
    from _ctypes import Structure, _SimpleCData, sizeof

    c_uint8, c_uint16, c_int32, c_uint32, c_uint64 = (
        type(name, (_SimpleCData,), {"_type_": code})
        for name, code in (("u8", "B"), ("u16", "H"), ("s32", "i"), ("u32", "I"), ("u64", "Q"))
    )

KVMIO = 0xAE
KVM_API_VERSION = 12


class Printed(Structure):
    """A structure that prints its fields: numbers in hexadecimal."""

    def __repr__(self) -> str:
        fields = ((each[0], getattr(self, each[0])) for each in self._fields_ if each[0] != "padding")
        values = (f"{name}={value:#x}" if isinstance(value, int) else f"{name}={value!r}" for name, value in fields)
        return f"{type(self).__name__}({', '.join(values)})"


class kvm_userspace_memory_region(Structure):
    _fields_ = (
        *((name, c_uint32) for name in "slot flags".split()),
        *((name, c_uint64) for name in "guest_phys_addr memory_size userspace_addr".split()),
    )


class kvm_regs(Printed):
    _fields_ = tuple(
        (name, c_uint64) for name in "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()
    )


class kvm_segment(Printed):
    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        *((name, c_uint8) for name in "type present dpl db s l g avl unusable padding".split()),
    )


class kvm_dtable(Printed):
    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class kvm_sregs(Printed):
    _fields_ = (
        *((name, kvm_segment) for name in "cs ds es fs gs ss tr ldt".split()),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in "cr0 cr2 cr3 cr4 cr8 efer apic_base".split()),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class kvm_msr_entry(Structure):
    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class kvm_msrs(Structure):
    """Header of an array of ``kvm_msr_entry``; see ``msrs``."""

    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32))


class kvm_cpuid_entry2(Structure):
    _fields_ = (
        *((name, c_uint32) for name in "function index flags eax ebx ecx edx".split()),
        ("padding", c_uint32 * 3),
    )


class kvm_cpuid2(Structure):
    """Header of an array of ``kvm_cpuid_entry2``; see ``cpuid``."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class kvm_irqfd(Structure):
    _fields_ = (*((name, c_uint32) for name in "fd gsi flags resamplefd".split()), ("pad", c_uint8 * 16))


class kvm_ioeventfd(Structure):
    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


class kvm_pit_config(Structure):
    _fields_ = (("flags", c_uint32), ("pad", c_uint32 * 15))


kvm_pit_state2 = c_uint8 * 112  # which devices/pit.py fills


def _ioc(direction: int, number: int, kind: type | None = None) -> int:
    # Source: <asm-generic/ioctl.h>: 8 bits number, 8 bits type, 14 bits size, 2 bits direction.
    return direction << 30 | (sizeof(kind) if kind else 0) << 16 | KVMIO << 8 | number


_io: Callable[..., int] = partial(_ioc, 0)
_iow: Callable[..., int] = partial(_ioc, 1)
_ior: Callable[..., int] = partial(_ioc, 2)
_iowr: Callable[..., int] = partial(_ioc, 3)

# On /dev/kvm
KVM_GET_API_VERSION = _io(0x00)
KVM_CREATE_VM = _io(0x01)
KVM_CHECK_EXTENSION = _io(0x03)
KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
KVM_GET_SUPPORTED_CPUID = _iowr(0x05, kvm_cpuid2)
# On a VM
KVM_CREATE_VCPU = _io(0x41)
KVM_SET_USER_MEMORY_REGION = _iow(0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR = _io(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, c_uint64)
KVM_CREATE_IRQCHIP = _io(0x60)
KVM_IRQFD = _iow(0x76, kvm_irqfd)
KVM_CREATE_PIT2 = _iow(0x77, kvm_pit_config)
KVM_IOEVENTFD = _iow(0x79, kvm_ioeventfd)
KVM_GET_PIT2 = _ior(0x9F, kvm_pit_state2)
KVM_SET_PIT2 = _iow(0xA0, kvm_pit_state2)
# On a vCPU
KVM_GET_REGS = _ior(0x81, kvm_regs)
KVM_SET_REGS = _iow(0x82, kvm_regs)
KVM_GET_SREGS = _ior(0x83, kvm_sregs)
KVM_SET_SREGS = _iow(0x84, kvm_sregs)
KVM_GET_MSRS = _iowr(0x88, kvm_msrs)
KVM_SET_MSRS = _iow(0x89, kvm_msrs)
KVM_SET_CPUID2 = _iow(0x90, kvm_cpuid2)

KVM_CAP_IRQCHIP = 0
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_CLOCKSOURCE = 8
KVM_CAP_NR_VCPUS = 9
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IMMEDIATE_EXIT = 136

KVM_PIT_SPEAKER_DUMMY = 1
KVM_MEM_READONLY = 2
KVM_IOEVENTFD_FLAG_DATAMATCH = 1
KVM_IOEVENTFD_FLAG_DEASSIGN = 4
KVM_IRQFD_FLAG_DEASSIGN = 1

KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTERNAL_ERROR = 17

KVM_INTERNAL_ERROR_EMULATION = 1

_NAMES = {value: name for name, value in globals().items() if name.startswith("KVM_") and value >> 8 & 0xFF == KVMIO}


def kvm_ioctl(fd: int, request: int, argument: Structure | Array[c_uint8] | bytearray | int = 0) -> int:
    """Do one KVM ioctl.

    :param fd: /dev/kvm, a VM or a vCPU
    :param request: one of the numbers above
    :param argument: a structure that KVM reads or fills, or an unsigned integer
    :returns: what the ioctl returned
    :raises KvmError: the ioctl failed; the message names it
    """
    try:
        if isinstance(argument, int):
            # fcntl.ioctl takes a C int: addresses at and above 2 GiB are handed over as their negative twin.
            argument -= (1 << 32) if argument >= 1 << 31 else 0
        result: int = fcntl.ioctl(fd, request, argument, True)
        return result
    except OSError as error:
        raise KvmError(error.errno or 0, _NAMES.get(request, hex(request))) from None


class _Counted:
    """A KVM structure that is a header and ``count`` entries in one buffer; ``entries`` looks into it."""

    __slots__ = ("buffer", "entries", "header")

    def __init__(self, header: type[Structure], entry: type[Structure], count: int) -> None:
        self.buffer = (c_uint8 * (sizeof(header) + count * sizeof(entry)))()
        self.header: Any = header.from_buffer(self.buffer)
        self.entries: Any = (entry * count).from_buffer(self.buffer, sizeof(header))


def cpuid(count: int) -> _Counted:
    """A ``kvm_cpuid2`` with room for `count` entries, ``header.nent`` set to it."""
    table = _Counted(kvm_cpuid2, kvm_cpuid_entry2, count)
    table.header.nent = count
    return table


def msrs(values: dict[int, int]) -> _Counted:
    """A ``kvm_msrs`` that holds `values`, by index."""
    table = _Counted(kvm_msrs, kvm_msr_entry, len(values))
    table.header.nmsrs = len(values)
    for entry, (index, data) in zip(table.entries, values.items(), strict=True):
        entry.index, entry.data = index, data
    return table
