# SPDX-License-Identifier: Apache-2.0
"""ACPI tables of a hardware-reduced machine: no PIC, no PM timer, no SCI; sleep and reset are three ports.

Source: ACPI 6.5 chapter 5 (tables), section 4.8.3 (sleep and reset registers); Linux
arch/x86/kernel/acpi/boot.c.
"""

from __future__ import annotations

import struct

from boot import aml, layout
from boot.board import BY_NAME, PARTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from boot.board import Part
    from vmm.memory import GuestMemory

# devices/power.py has the same registers (tests/devices/test_power.py compares them).
SLEEP_CONTROL, SLEEP_STATUS, RESET = 0, 1, 2
RESET_VALUE = 1
SLEEP_TYPE_S5 = 5
# devices/acpi_events.py is behind the port (tests/devices/test_acpi_events.py compares them).
GENERATION_CHANGED, POWER_BUTTON = 1, 2
_NOTIFY_CHANGED = 0x80  # both devices' own meaning of it: a new value; pressed
RTC_CENTURY = 0x32

_OEM = b"PYVMM "
_CREATOR = b"PYVM"
_HEADER = struct.Struct("<4sIBB6s8sI4sI")

_FADT_LENGTH = 276
_RESET_REG_SUP = 1 << 10
_HW_REDUCED_ACPI = 1 << 20
_HAS_8042, _VGA_NOT_PRESENT = 1 << 1, 1 << 2  # IAPC_BOOT_ARCH; without the former, Linux spares itself the probe


def write(
    memory: GuestMemory,
    *,
    cpus: int,
    virtio: Sequence[tuple[int, int, int]],
    parts: Sequence[Part] = PARTS,
) -> None:
    """Write all tables to guest memory, from the RSDP at ``layout.RSDP`` on.

    :param cpus: processors, at most ``vmm.config.vm.MAX_VCPUS``; processor i has local APIC id i
    :param virtio: address, bytes and interrupt (GSI) of each virtio-mmio window, below 4 GiB
    :param parts: the board's parts that the tables describe; behind ``events`` are the VM generation counter at
        ``layout.VM_GENERATION`` and the power button
    :raises GuestMemoryError: the guest has less than 1 MiB
    """
    end = layout.RSDP + 36

    def place(table: bytes) -> int:
        nonlocal end
        at = (end + 15) & ~15
        end = at + len(table)
        memory.write(at, table)
        return at

    dsdt = place(_table(b"DSDT", 2, _dsdt(cpus, virtio, parts)))
    keyboard = _HAS_8042 if any(part.name == "i8042" for part in parts) else 0
    fadt = place(_table(b"FACP", 6, _fadt(dsdt, _VGA_NOT_PRESENT | keyboard)))
    madt = place(_table(b"APIC", 5, _madt(cpus)))
    xsdt = place(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))
    memory.write(layout.RSDP, _rsdp(xsdt))


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    length = _HEADER.size + len(body)
    header = _HEADER.pack(signature, length, revision, 0, _OEM, b"PYVMM" + signature[:3], 1, _CREATOR, 1)
    table = bytearray(header + body)
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    rsdp = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _io_register(port: int) -> bytes:
    """Return the Generic Address Structure of a one-byte port. Section 5.2.3.2."""
    return struct.pack("<BBBBQ", 1, 8, 0, 1, port)


def _fadt(dsdt: int, boot_arch: int) -> bytes:
    """Return the FADT's body; what hardware-reduced machines have no use for is 0. Section 5.2.9."""
    fadt = bytearray(_FADT_LENGTH)
    fadt[108] = RTC_CENTURY
    struct.pack_into("<H", fadt, 109, boot_arch)
    struct.pack_into("<I", fadt, 112, _RESET_REG_SUP | _HW_REDUCED_ACPI)
    power, _ = BY_NAME["power"].ports[0]
    fadt[116:128] = _io_register(power + RESET)
    fadt[128] = RESET_VALUE
    fadt[131] = 5  # minor version: ACPI 6.5
    struct.pack_into("<Q", fadt, 140, dsdt)
    fadt[244:256] = _io_register(power + SLEEP_CONTROL)
    fadt[256:268] = _io_register(power + SLEEP_STATUS)
    fadt[268:276] = b"PYVMM\0\0\0"
    return bytes(fadt[_HEADER.size :])


def _madt(cpus: int) -> bytes:
    """Return the MADT's body. Section 5.2.12."""
    madt = [struct.pack("<II", layout.LAPIC, 0)]  # flags 0: no 8259s
    madt += [struct.pack("<BBBBI", 0, 8, cpu, cpu, 1) for cpu in range(cpus)]
    madt.append(struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0))
    madt.append(struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1))  # NMI at LINT1 of every processor
    return b"".join(madt)


def _dsdt(cpus: int, virtio: Sequence[tuple[int, int, int]], parts: Sequence[Part]) -> bytes:
    devices = [
        aml.device(f"C{cpu:03X}", aml.name("_HID", aml.string("ACPI0007")), aml.name("_UID", aml.integer(cpu)))
        for cpu in range(cpus)
    ]
    devices += [
        _device(f"V{index:03X}", "LNRO0005", index, [aml.memory32_fixed(base, size), aml.interrupt(gsi)])
        for index, (base, size, gsi) in enumerate(virtio)
    ]
    for part in parts:
        if part.name == "events":
            devices += _event_devices(part)
        elif part.acpi is not None:
            segment, hid, uid = part.acpi
            resources = [aml.io(port, count) for port, count in part.ports]
            resources += [] if part.gsi is None else [aml.interrupt(part.gsi)]
            devices.append(_device(segment, hid, uid, resources))
    s5 = aml.name("_S5", aml.package(aml.integer(SLEEP_TYPE_S5), aml.integer(0), aml.integer(0), aml.integer(0)))
    return aml.scope("\\_SB", *devices) + s5


def _event_devices(part: Part) -> list[bytes]:
    assert part.acpi is not None and part.gsi is not None
    segment, hid, uid = part.acpi
    # Source: Microsoft, "Virtual Machine Generation ID", for the name by which drivers find it.
    counter = aml.string("VM_Gen_Counter")
    address = aml.package(aml.integer(layout.VM_GENERATION), aml.integer(0))
    method = aml.method(
        "_EVT", 1,
        aml.store("EVTS", aml.LOCAL0),  # once: to read it forgets it
        aml.notify_if(aml.LOCAL0, GENERATION_CHANGED, "VGEN", _NOTIFY_CHANGED),
        aml.notify_if(aml.LOCAL0, POWER_BUTTON, "PWRB", _NOTIFY_CHANGED),
    )  # fmt: skip
    port = aml.byte_port("EVTR", "EVTS", part.ports[0][0])
    names = aml.name("_CID", counter), aml.name("_DDN", counter), aml.name("ADDR", address)
    return [
        aml.device("VGEN", aml.name("_HID", aml.string("PYVM0001")), *names),
        aml.device("PWRB", aml.name("_HID", aml.eisa_id("PNP0C0C")), aml.name("_UID", aml.integer(0))),
        _device(segment, hid, uid, [aml.interrupt(part.gsi)], port, method),
    ]


def _device(segment: str, hid: str, uid: int, descriptors: Sequence[bytes], *more: bytes) -> bytes:
    return aml.device(
        segment,
        aml.name("_HID", aml.eisa_id(hid) if hid.startswith("PNP") else aml.string(hid)),
        aml.name("_UID", aml.integer(uid)),
        aml.name("_CRS", aml.resources(*descriptors)),
        *more,
    )
