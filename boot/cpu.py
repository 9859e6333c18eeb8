# SPDX-License-Identifier: Apache-2.0
"""What a vCPU holds at the guest's first instruction: CPUID, MSRs, segments, page tables, registers."""

from __future__ import annotations

import struct

from boot import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.kvm.abi import kvm_cpuid_entry2, kvm_regs, kvm_segment, kvm_sregs
    from vmm.memory import GuestMemory

# Selectors that the 64-bit Linux boot protocol asks for: __BOOT_CS and __BOOT_DS, then a TSS.
BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20

KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1  # as <asm/kvm.h> spells it

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESERVED = 1 << 1

MSR_IA32_MISC_ENABLE = 0x1A0
MISC_ENABLE_FAST_STRING = 1 << 0
MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ENABLE = 1 << 11
MTRR_WRITE_BACK = 6

# Memory is write-back wherever no MTRR says otherwise, as firmware would leave it.
BOOT_MSRS = {
    MSR_IA32_MISC_ENABLE: MISC_ENABLE_FAST_STRING,
    MSR_MTRR_DEF_TYPE: MTRR_ENABLE | MTRR_WRITE_BACK,
}


def _descriptor(limit: int, access: int, flags: int) -> int:
    # A flat segment from address 0. Source: Intel SDM vol. 3, 3.4.5.
    return limit & 0xFFFF | access << 40 | (limit >> 16) << 48 | flags << 52


_CODE64 = _descriptor(0xFFFFF, 0x9B, 0xA)
_CODE32 = _descriptor(0xFFFFF, 0x9B, 0xC)
_DATA = _descriptor(0xFFFFF, 0x93, 0xC)
_TSS = _descriptor(0x67, 0x8B, 0x0)


def _segment(segment: kvm_segment, selector: int, kind: int, *, long: bool = False, system: bool = False) -> None:
    segment.selector = selector
    segment.base = 0
    segment.limit = 0x67 if system else 0xFFFFFFFF
    segment.type = kind
    segment.present = 1
    segment.s = not system
    segment.g = not system
    segment.l = long
    segment.db = not long and not system


def _tables(memory: GuestMemory, sregs: kvm_sregs, code: int, *, long: bool) -> None:
    memory.write(layout.GDT, struct.pack("<5Q", 0, 0, code, _DATA, _TSS))
    sregs.gdt.base, sregs.gdt.limit = layout.GDT, 5 * 8 - 1
    sregs.idt.base, sregs.idt.limit = layout.IDT, 0
    _segment(sregs.cs, BOOT_CS, 0xB, long=long)
    for name in ("ds", "es", "fs", "gs", "ss"):
        _segment(getattr(sregs, name), BOOT_DS, 0x3)
    _segment(sregs.tr, BOOT_TSS, 0xB, system=True)


def enter_linux64(memory: GuestMemory, sregs: kvm_sregs, regs: kvm_regs, *, entry: int) -> None:
    """Long mode with the first 4 GiB mapped to themselves, `rsi` at the zero page.

    :param memory: gets the GDT and three levels of page tables (0x500 and 0x9000 to 0xefff)
    :param sregs: changed in place
    :param regs: changed in place

    Source: Linux Documentation/arch/x86/boot.rst, "64-bit Boot Protocol".
    """
    _tables(memory, sregs, _CODE64, long=True)
    present_writable = 0x3
    pml4, pdpt, directories = (layout.PAGE_TABLES + i * layout.PAGE for i in range(3))
    memory.write(pml4, struct.pack("<Q", pdpt | present_writable))
    memory.write(pdpt, struct.pack("<4Q", *(directories + i * layout.PAGE | present_writable for i in range(4))))
    huge = 0x80
    memory.write(directories, struct.pack("<2048Q", *range(huge | present_writable, 4 << 30, 2 << 20)))
    sregs.cr3 = pml4
    sregs.cr4 = CR4_PAE
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG
    sregs.efer = EFER_LME | EFER_LMA
    regs.rflags = RFLAGS_RESERVED
    regs.rip = entry
    regs.rsi = layout.ZERO_PAGE
    regs.rsp = regs.rbp = layout.BOOT_STACK


def enter_pvh(memory: GuestMemory, sregs: kvm_sregs, regs: kvm_regs, *, entry: int) -> None:
    """32-bit protected mode, no paging, flat segments, `ebx` at the start info.

    :param memory: gets the GDT (0x500)

    Source: Xen docs/misc/pvh.pandoc; <xen/interface/hvm/start_info.h>.
    """
    _tables(memory, sregs, _CODE32, long=False)
    sregs.cr0 = CR0_PE | CR0_ET
    sregs.cr4 = 0
    sregs.efer = 0
    regs.rflags = RFLAGS_RESERVED
    regs.rip = entry
    regs.rbx = layout.PVH_START_INFO


def shape_cpuid(
    entries: list[kvm_cpuid_entry2], *, index: int, count: int, tsc_deadline: bool, threads: int = 1
) -> None:
    """Turn KVM's supported CPUID into that of vCPU `index` of `count`: one package of cores.

    :param entries: changed in place; other leaves stay as KVM gave them
    :param tsc_deadline: whether KVM's local APIC has the TSC-deadline timer
    :param threads: threads of each core, 1 or 2; `count` is a multiple of it

    Source: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E.
    """
    core_bits = (count - 1).bit_length()
    thread_bits = (threads - 1).bit_length()
    for leaf in (0xB, 0x1F):
        _extended_topology(entries, leaf, index, (thread_bits, threads, 1), (core_bits, count, 2))
    for entry in entries:
        match entry.function:
            case 0x1:
                # APIC id, addressable ids in the package, CLFLUSH of 64 bytes.
                entry.ebx = entry.ebx & 0xFF | 8 << 8 | (min(1 << core_bits, 255) << 16) | (index & 0xFF) << 24
                hypervisor, x2apic, deadline = 1 << 31, 1 << 21, 1 << 24
                entry.ecx = entry.ecx & ~deadline | hypervisor | x2apic | (deadline if tsc_deadline else 0)
                hyperthreading = 1 << 28
                entry.edx = entry.edx | hyperthreading if count > 1 else entry.edx & ~hyperthreading
            case 0x4:
                # Deterministic caches: ids that share this cache, and cores in the package.
                if entry.eax & 0x1F:
                    shared = (1 << core_bits) - 1 if entry.eax >> 5 & 7 >= 3 else threads - 1
                    cores = (1 << core_bits - thread_bits) - 1
                    entry.eax = entry.eax & 0x3FFF | shared << 14 | cores << 26
            case 0x80000001:
                legacy_multicore, topology_extensions = 1 << 1, 1 << 22
                if count > 1 and entry.ecx & topology_extensions:
                    entry.ecx |= legacy_multicore
            case 0x80000008:
                # Cores of the package less one, and the width of the id that names them.
                entry.ecx = (count - 1) & 0xFF | core_bits << 12
            case 0x8000001D:
                if entry.eax & 0x1F:
                    shared = count - 1 if entry.eax >> 5 & 7 >= 3 else threads - 1
                    entry.eax = entry.eax & ~(0xFFF << 14) | (shared & 0xFFF) << 14
            case 0x8000001E:
                entry.eax = index
                entry.ebx = index // threads & 0xFF | threads - 1 << 8  # the core's id, its threads less one
                entry.ecx = 0  # one node


def _extended_topology(
    entries: list[kvm_cpuid_entry2], leaf: int, x2apic_id: int, *levels: tuple[int, int, int]
) -> None:
    # Level 0 threads, level 1 cores, and one that says that there are no more. KVM gives level 0 alone since Linux 6.2,
    # for who runs it to make the others; without them every vCPU is a package of its own.
    found = {entry.index: entry for entry in entries if entry.function == leaf}
    if 0 not in found:
        return
    for number in range(len(levels) + 1):
        if number not in found:
            new = type(found[0])(function=leaf, index=number, flags=KVM_CPUID_FLAG_SIGNIFCANT_INDEX)
            entries.insert(entries.index(found[number - 1]) + 1, new)
            found[number] = new
    for number, entry in found.items():
        entry.edx = x2apic_id
        bits, count, kind = levels[number] if number < len(levels) else (0, 0, 0)
        entry.eax, entry.ebx, entry.ecx = bits, count, kind << 8 | number
