# SPDX-License-Identifier: Apache-2.0
"""ACPI tables: their bytes where the specification puts them, and what ACPICA's compiler makes of them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from boot import acpi, aml, layout
from boot.board import PARTS, VIRTIO_GSIS
from vmm.config.vm import MAX_VCPUS
from vmm.memory import GuestMemory

Windows = list[tuple[int, int, int]]


def windows(count: int) -> Windows:
    return [(0xD000_0000 + 0x1000 * index, 0x1000, 5 + index) for index in range(count)]


def written(cpus: int = 1, virtio: int = 0, keyboard: bool = False, events: bool = False) -> dict[str, bytes]:
    """Write tables; return each by its signature, found from the RSDP as a kernel does; checksums hold."""
    with GuestMemory(2 << 20) as memory:
        absent = {name for name, there in (("i8042", keyboard), ("events", events)) if not there}
        parts = [part for part in PARTS if part.name not in absent]
        acpi.write(memory, cpus=cpus, virtio=windows(virtio), parts=parts)

        def table(at: int) -> bytes:
            assert layout.RSDP <= at and at % 16 == 0
            data = memory.read(at, struct.unpack("<I", memory.read(at + 4, 4))[0])
            assert at + len(data) <= layout.HIMEM
            assert sum(data) & 0xFF == 0
            assert data[10:28] == b"PYVMM PYVMM" + data[:3] + struct.pack("<I", 1)
            return data

        rsdp = memory.read(layout.RSDP, 36)
        assert sum(rsdp) & 0xFF == 0 and sum(rsdp[:20]) & 0xFF == 0
        xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
        tables = {"RSD PTR ": rsdp, "XSDT": xsdt}
        for (at,) in struct.iter_unpack("<Q", xsdt[36:]):
            tables[memory.read(at, 4).decode()] = table(at)
        dsdt = table(struct.unpack_from("<Q", tables["FACP"], 140)[0])
        return tables | {dsdt[:4].decode(): dsdt}


def test_rsdp_is_revision_2_with_no_rsdt() -> None:
    rsdp = written()["RSD PTR "]
    assert rsdp[:8] == b"RSD PTR " and rsdp[9:16] == b"PYVMM \x02"
    assert struct.unpack_from("<II", rsdp, 16) == (0, 36)


def test_xsdt_lists_fadt_and_madt() -> None:
    assert list(written()) == ["RSD PTR ", "XSDT", "FACP", "APIC", "DSDT"]


def test_fadt_says_hardware_reduced_with_reset_and_sleep_registers() -> None:
    fadt = written()["FACP"]
    assert (len(fadt), fadt[8], fadt[131]) == (276, 6, 5)
    assert struct.unpack_from("<I", fadt, 112)[0] == 1 << 20 | 1 << 10
    assert struct.unpack_from("<H", fadt, 109)[0] == 0x0004, "no VGA, no 8042, no legacy devices"
    assert fadt[108] == 0x32, "the RTC's century"
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0x602, 1), "reset"
    assert struct.unpack_from("<BBBBQ", fadt, 244) == (1, 8, 0, 1, 0x600), "sleep control"
    assert struct.unpack_from("<BBBBQ", fadt, 256) == (1, 8, 0, 1, 0x601), "sleep status"
    assert fadt[268:] == b"PYVMM\0\0\0"
    assert fadt[36:44] == bytes(8), "no FACS, no 32-bit DSDT address"
    assert not any(fadt[46:108]) and not any(fadt[148:244]), "no fixed hardware"


@pytest.mark.parametrize("cpus", [1, 2, 64, 255])
def test_madt_lists_every_cpu(cpus: int) -> None:
    madt = written(cpus)["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 0)
    lapics = b"".join(bytes((0, 8, cpu, cpu, 1, 0, 0, 0)) for cpu in range(cpus))
    ioapic = b"\x01\x0c\x00\x00\x00\x00\xc0\xfe\x00\x00\x00\x00"
    nmi = b"\x04\x06\xff\x00\x00\x01"
    assert madt[44:] == lapics + ioapic + nmi


def test_virtio_device_is_these_bytes() -> None:
    crs = b"\x86\x09\x00\x01\x00\x00\x00\xd0\x00\x10\x00\x00" + b"\x89\x06\x00\x03\x01\x05\x00\x00\x00" + b"\x79\x00"
    body = (
        b"V000" + b"\x08_HID\x0dLNRO0005\0" + b"\x08_UID\x00" + b"\x08_CRS\x11\x1a\x0a\x17" + crs
    )  # fmt: skip
    assert b"\x5b\x82\x3a" + body in written(virtio=1)["DSDT"]
    assert len(body) + 1 == 0x3A


def test_s5_is_sleep_type_5() -> None:
    assert written()["DSDT"].endswith(b"\x08_S5_\x12\x07\x04\x0a\x05\x00\x00\x00")


def test_the_most_of_either_fits() -> None:
    with GuestMemory(2 << 20) as memory:
        acpi.write(memory, cpus=MAX_VCPUS, virtio=windows(len(VIRTIO_GSIS)))
        assert not any(memory.read(layout.HIMEM - 0x10000, 0x10000)), "half of the room is left"


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),
        (4093, "4fff"),
        (4094, "810001"),
        (1048572, "8fffff"),
        (1048573, "c1000001"),
    ],
)
def test_package_length_at_its_borders(size: int, head: str) -> None:
    # A scope's body begins with its name of five bytes here; what is left is the filling.
    if size < 5:
        assert aml._sized(b"", b"") == bytes.fromhex(head)
        return
    encoded = aml.scope("\\_SB", bytes(size - 5))
    assert encoded[: 1 + len(head) // 2] == b"\x10" + bytes.fromhex(head)
    assert encoded[1 + len(head) // 2 :] == b"\\_SB_" + bytes(size - 5)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (255, "0aff"),
        (256, "0b0001"),
        (0xFFFF, "0bffff"),
        (0x10000, "0c00000100"),
        (0x1_0000_0000, "0e0000000001000000"),
    ],
)
def test_integer(value: int, encoded: str) -> None:
    assert aml.integer(value) == bytes.fromhex(encoded)


def test_eisa_id() -> None:
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")
    assert aml.eisa_id("PNP0B00") == bytes.fromhex("0c41d00b00")


@pytest.mark.parametrize(("keyboard", "flags"), [(False, 1 << 2), (True, 1 << 2 | 1 << 1)])
def test_8042_is_spoken_of_where_there_is_a_use_for_it(keyboard: bool, flags: int) -> None:
    tables = written(keyboard=keyboard)
    assert struct.unpack_from("<H", tables["FACP"], 109)[0] == flags
    assert (aml.eisa_id("PNP0303") in tables["DSDT"]) is keyboard


def iasl() -> str:
    program = shutil.which("iasl")
    if program is None:
        pytest.skip("NOT CHECKED against ACPICA: iasl is not installed (package acpica-tools)")
    return program


@pytest.mark.parametrize(
    ("cpus", "virtio", "keyboard", "events"),
    [(1, 0, False, False), (2, 1, True, True), (64, 17, False, True), (255, 64, True, False)],
)
def test_acpica_reads_and_recompiles_every_table(
    cpus: int, virtio: int, keyboard: bool, events: bool, tmp_path: Path
) -> None:
    tables = written(cpus, virtio, keyboard, events)
    for signature in ("XSDT", "FACP", "APIC", "DSDT"):
        source = tmp_path / f"{signature}.dsl"
        (tmp_path / f"{signature}.aml").write_bytes(tables[signature])
        for arguments in (["-d", f"{signature}.aml"], ["-p", f"new-{signature}", source.name]):
            run = subprocess.run([iasl(), *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60)
            output = run.stdout + run.stderr
            assert run.returncode == 0, output
            assert not re.search(r"\b[1-9]\d* (Errors|Warnings|Remarks)|invalid|[Cc]hecksum", output), output
        if signature != "DSDT":  # there the compiler shortens \_SB to _SB
            again = (tmp_path / f"new-{signature}.aml").read_bytes()
            assert again[:9] + again[10:28] == tables[signature][:9] + tables[signature][10:28]
            assert again[36:] == tables[signature][36:], "all but the checksum and the compiler's own name"
    text = (tmp_path / "DSDT.dsl").read_text()
    assert len(re.findall(r'Name \(_HID, "ACPI0007"', text)) == cpus
    assert len(re.findall(r'Name \(_HID, "LNRO0005"', text)) == virtio
    for hid in ('EisaId ("PNP0501")', 'EisaId ("PNP0B00")', '"QEMU0001"'):
        assert text.count(f"Name (_HID, {hid}") == 1
    if events:
        assert re.search(r'Name \(_CID, "VM_Gen_Counter"\).*Package \(0x02\)\s*{\s*0x000DF000,\s*Zero', text, re.S)
        assert re.search(r"OperationRegion \(EVTR, SystemIO, 0x0604, One\)", text)
        body = re.search(r"Method \(_EVT, 1, Serialized\)(.*)", text, re.S)
        assert body is not None
        assert re.findall(r"Notify \((\w+), 0x80\)", body[1]) == ["VGEN", "PWRB"]


def crs(dsdt: bytes) -> list[bytes]:
    """The value of every ``_CRS`` in order: a Buffer whose PkgLength and size are of one byte each."""
    heads = [found.end() for found in re.finditer(rb"\x08_CRS\x11.\x0a", dsdt, re.S)]
    return [dsdt[at + 1 : at + 1 + dsdt[at]] for at in heads]


@pytest.mark.parametrize(
    ("virtio", "keyboard", "events"), [(0, False, False), (1, True, True), (17, False, True), (64, True, False)]
)
def test_acpicas_compiler_makes_the_same_resources(virtio: int, keyboard: bool, events: bool, tmp_path: Path) -> None:
    """Its disassembler does not say what they are since 2026: https://github.com/open-acpica/acpica/issues/1206."""
    interrupt = "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {{ {} }}".format
    port = "IO (Decode16, {0}, {0}, 1, {1})".format
    devices = [f"Memory32Fixed (ReadWrite, {at}, {size}) {interrupt(gsi)}" for at, size, gsi in windows(virtio)]
    devices += [port(0x3F8, 8) + interrupt(4)]
    devices += [port(0x60, 1) + port(0x64, 1) + interrupt(1)] * keyboard
    devices += [port(0x70, 2), port(0x505, 1)] + [interrupt(13)] * events
    text = "".join(
        f'Device (D{number:03}) {{ Name (_HID, "PYVM0002") Name (_CRS, ResourceTemplate () {{ {each} }}) }}\n'
        for number, each in enumerate(devices)
    )
    (tmp_path / "dsdt.dsl").write_text(f'DefinitionBlock ("", "DSDT", 2, "PYVMM", "PYVMMDSD", 1) {{ {text} }}')
    run = subprocess.run([iasl(), "dsdt.dsl"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
    made = crs((tmp_path / "dsdt.aml").read_bytes())
    assert len(made) == len(devices)
    assert crs(written(1, virtio, keyboard, events)["DSDT"]) == made
