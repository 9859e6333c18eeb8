# SPDX-License-Identifier: Apache-2.0
"""A guest of sixty instructions is the driver of a virtio disk, on a real /dev/kvm."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from boot.layout import VIRTIO_MMIO
from tests.kvm.guests import run
from tests.virtio import blk_driver
from virtio import spec
from vmm import Machine
from vmm.config.devices import DriveConfig
from vmm.kvm import abi

MakeGuest = Callable[..., Machine]

DESC, AVAIL, USED, HEADER, DATA = 0x300000, 0x301000, 0x302000, 0x303000, 0x304000
STATUS = DATA + 512
EXIT = "mov dx, 0xf4\n out dx, al\n"


def store(register: int, value: int) -> str:
    return f"mov dword ptr [ebx + {register:#x}], {value:#x}\n"


# Up to DRIVER_OK by §3.1.1; a device that is not as expected ends the guest with 201, 202, ...
BRING_UP = f"""
    mov ebx, {VIRTIO_MMIO:#x}
    mov al, 201
    cmp dword ptr [ebx], {spec.MMIO_MAGIC:#x}
    jne end
    mov al, 202
    cmp dword ptr [ebx + {spec.MMIO_DEVICE_ID}], {spec.TYPE_BLOCK}
    jne end
    {store(spec.MMIO_STATUS, 0)}
    {store(spec.MMIO_STATUS, 1)}
    {store(spec.MMIO_STATUS, 3)}
    {store(spec.MMIO_DRIVER_FEATURES_SEL, 1)}
    {store(spec.MMIO_DRIVER_FEATURES, 1)}
    {store(spec.MMIO_STATUS, 0xB)}
    mov al, 203
    cmp dword ptr [ebx + {spec.MMIO_STATUS}], 0xB
    jne end
    {store(spec.MMIO_QUEUE_SEL, 0)}
    {store(spec.MMIO_QUEUE_NUM, 8)}
    {store(spec.MMIO_QUEUE_DESC_LOW, DESC)}
    {store(spec.MMIO_QUEUE_DRIVER_LOW, AVAIL)}
    {store(spec.MMIO_QUEUE_DEVICE_LOW, USED)}
    {store(spec.MMIO_QUEUE_READY, 1)}
    {store(spec.MMIO_STATUS, 0xF)}
    mov al, 204
    cmp dword ptr [ebx + {spec.MMIO_STATUS}], 0xF
    jne end
"""
# One request, its used entry awaited, the interrupt's reason looked at and acknowledged.
REQUEST = f"""
    mov word ptr [{AVAIL + 2:#x}], 1
    {store(spec.MMIO_QUEUE_NOTIFY, 0)}
wait:
    pause
    cmp word ptr [{USED + 2:#x}], 1
    jne wait
raised:
    pause
    test dword ptr [ebx + {spec.MMIO_INTERRUPT_STATUS}], {spec.INTERRUPT_USED}
    jz raised
    {store(spec.MMIO_INTERRUPT_ACK, spec.INTERRUPT_USED)}
"""


def place_request(vm: Machine, kind: int, sector: int, data: bytes | None) -> None:
    """Write the request that the guest's code will offer; `data` None: the device fills it."""
    write = spec.DESC_F_WRITE if data is None else 0
    table = spec.DESC.pack(HEADER, 16, spec.DESC_F_NEXT, 1)
    table += spec.DESC.pack(DATA, 512, spec.DESC_F_NEXT | write, 2)
    table += spec.DESC.pack(STATUS, 1, spec.DESC_F_WRITE, 0)
    vm.memory.write(DESC, table)
    vm.memory.write(HEADER, blk_driver.HEADER.pack(kind, 0, sector))
    vm.memory.write(DATA, (data or bytes(512)) + b"\xee")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"".join(bytes([i]) * 512 for i in range(64)))
    return path


def test_guest_reads_a_sector(guest: MakeGuest, image: Path) -> None:
    code = BRING_UP + REQUEST + f"mov al, byte ptr [{DATA + 511:#x}]\nend:\n" + EXIT
    vm = guest(code, drives=(DriveConfig(str(image)),))
    place_request(vm, blk_driver.T_IN, 42, None)
    assert run(vm).code == 42
    assert vm.memory.read(DATA, 513) == bytes([42]) * 512 + b"\0"
    assert struct.unpack("<II", vm.memory.read(USED + 4, 8)) == (0, 513)
    assert vm.virtio[0].device.stats["requests"] == 1
    assert vm.virtio[0].notified == 0, "KVM's ioeventfd takes them"


@pytest.mark.parametrize(
    "options",
    ["", ",engine=sync", ",engine=io_uring", ",direct,queues=3,id=data,cache=unsafe,bps=10M,iops=1000,format=raw"],
)
def test_guest_writes_a_sector(guest: MakeGuest, image: Path, options: str) -> None:
    code = BRING_UP + REQUEST + f"mov al, byte ptr [{STATUS:#x}]\nend:\n" + EXIT
    vm = guest(code, drives=(DriveConfig.parse(f"{image}{options}"),))
    place_request(vm, blk_driver.T_OUT, 7, b"guest-- " * 64)
    assert run(vm).code == blk_driver.S_OK
    assert image.read_bytes()[7 * 512 : 8 * 512] == b"guest-- " * 64


def test_guest_writes_a_sector_of_a_qcow2_image(
    guest: MakeGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LD_PRELOAD", raising=False)  # QEMU's coroutines do not go with the sanitizers
    if not shutil.which("qemu-img") or not shutil.which("qemu-storage-daemon"):
        pytest.skip("LAYER MISSING: qcow2: apt install qemu-utils qemu-system-common")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK) or (os.geteuid() and not shutil.which("fusermount3")):
        pytest.skip("LAYER MISSING: qcow2: no /dev/fuse for this user")
    image, raw = tmp_path / "disk.qcow2", tmp_path / "disk.raw"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    code = BRING_UP + REQUEST + f"mov al, byte ptr [{STATUS:#x}]\nend:\n" + EXIT
    vm = guest(code, drives=(DriveConfig.parse(f"{image},format=qcow2"),))
    (disk,) = vm.blocks.values()
    assert spec.BLK_CONFIG.unpack(disk.config)[-4] == (64 << 10) // 512, "discard_sector_alignment is a cluster"
    place_request(vm, blk_driver.T_OUT, 7, b"guest-- " * 64)
    assert run(vm).code == blk_driver.S_OK
    vm.close()
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    assert raw.read_bytes() == bytes(7 * 512) + b"guest-- " * 64 + bytes((1 << 20) - 8 * 512)


def test_guest_that_breaks_the_ring_lives_and_sees_needs_reset(guest: MakeGuest, image: Path) -> None:
    wait = f"""
        mov word ptr [{AVAIL + 4:#x}], 999
        mov word ptr [{AVAIL + 2:#x}], 1
        {store(spec.MMIO_QUEUE_NOTIFY, 0)}
    broken:
        pause
        mov eax, dword ptr [ebx + {spec.MMIO_STATUS}]
        cmp eax, 0xF
        je broken
    end:
    """
    vm = guest(BRING_UP + wait + EXIT, drives=(DriveConfig(str(image)),))
    assert run(vm).code == 0xF | spec.DEVICE_NEEDS_RESET
    assert vm.virtio[0].device.stats["needs_reset"] == 1


def test_reads_of_registers_cost_no_exit(guest: MakeGuest, image: Path) -> None:
    reads = f"""
        mov ebx, {VIRTIO_MMIO:#x}
        mov ecx, 100
    again:
        mov eax, dword ptr [ebx + {spec.MMIO_INTERRUPT_STATUS}]
        mov eax, dword ptr [ebx + {spec.MMIO_DEVICE_ID}]
        dec ecx
        jnz again
    """
    vm = guest(reads + EXIT, drives=(DriveConfig(str(image)),))
    assert run(vm).code == spec.TYPE_BLOCK
    if vm.kvm.check(abi.KVM_CAP_READONLY_MEM):
        assert vm.mmio.hits(vm.virtio[0]) == 0
