# SPDX-License-Identifier: Apache-2.0
"""What a VM on /dev/kvm says of itself: metrics of its exits and devices, written at its start and at its end."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kvm.guests import PATIENCE, run
from tests.kvm.ring3 import Ring3
from tests.logs import forget_log
from vmm import Machine, logger
from vmm.config.devices import DriveConfig
from vmm.observe.metrics import Metrics

Guest = Callable[..., Machine]
DISK = 1 << 20


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    (tmp_path / "metrics").touch()
    made = Metrics("kvm")
    made.configure(str(tmp_path / "metrics"))
    return made


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "metrics").read_text().splitlines()]


def test_accesses_of_a_guest_are_counted_by_kind(guest: Guest, metrics: Metrics, tmp_path: Path) -> None:
    vm = guest(
        "mov edi, 0xd0000000; mov al, 123; mov [edi], al; mov al, [edi + 8]; mov dx, 0x64; in al, dx;"
        "mov al, 'x'; mov dx, 0x3f8; out dx, al; out dx, al; mov al, 0xfe; out 0x64, al",
        exit_port=None,
    )
    metrics.attach(vm)
    run(vm)
    first, last = lines(tmp_path)
    assert not any(first["vcpu"][kind] for kind in ("exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write"))
    assert [last["vcpu"][kind] for kind in ("exit_io_in", "exit_io_out", "exit_mmio_read", "exit_mmio_write")] == [
        1, 3, 1, 1
    ]  # fmt: skip
    assert [last["i8042"][name] for name in ("read_count", "write_count", "reset_count")] == [1, 1, 1]
    assert last["uart"]["write_count"] == 2
    assert last["vcpu"]["failures"] == 0


def test_triple_fault_is_a_failure(guest: Guest, metrics: Metrics, tmp_path: Path) -> None:
    vm = guest("lidt [1f]; int3; 1: .word 0; .long 0")
    metrics.attach(vm)
    run(vm)
    assert lines(tmp_path)[-1]["vcpu"]["failures"] == 1


def test_requests_of_a_disk_are_counted(metrics: Metrics, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(DISK))
    drives = (DriveConfig(str(tmp_path / "disk"), id="ring3"),)
    with Ring3("blk", "test=0", drives=drives) as guest:
        metrics.attach(guest.vm)
        guest.start().end()
    block = lines(tmp_path)[-1]["block_ring3"]
    assert (block["read_count"], block["read_bytes"]) == (DISK // 4096, DISK)
    assert (block["write_count"], block["write_bytes"]) == (DISK // 4096, DISK)
    assert block["flush_count"] == 1
    assert 0 < block["queue_event_count"] <= 2 * DISK // 4096 + 2
    assert lines(tmp_path)[-1]["block"] == block


def test_guest_says_when_it_is_up(guest: Guest, tmp_path: Path) -> None:
    """As the same guest did to Firecracker 1.12.1, where 0xd0000000 is the timer's and 0xc0000000 is nobody's."""
    (tmp_path / "log").touch()
    (tmp_path / "disk").write_bytes(bytes(DISK))
    logger.configure(log_path=str(tmp_path / "log"), vmm_id="vm1")
    try:
        vm = guest(
            "mov al, 123; mov edi, 0xc0000000; mov [edi], al; mov edi, 0xd0000000; mov [edi], al; mov eax, [edi];"
            "mov ebx, [edi + 0x1000]; cmp ebx, 0x74726976; setne al; out 0xf4, al",
            boot_timer=True,
            drives=[DriveConfig(str(tmp_path / "disk"))],
        )
        assert run(vm).status == 0, "the timer reads as 0, and the disk's magic value is one window further up"
    finally:
        forget_log()
    text = (tmp_path / "log").read_text()
    line = r".* \[vm1:fc_vcpu 0\] Guest-boot-time = +(\d+) us (\d+) ms, +(\d+) CPU us (\d+) CPU ms\n"
    match = re.match(line, text)
    assert match, text
    wall, wall_ms, cpu, cpu_ms = map(int, match.groups())
    assert 0 < wall < 30_000_000 and wall // 1000 == wall_ms and cpu // 1000 == cpu_ms and cpu > 0


@pytest.mark.parametrize("translate", [0x40, 0])
def test_guest_hears_ctrl_alt_del(guest: Guest, translate: int) -> None:
    """It turns the keyboard on, waits, polling, for Del to go down, and exits with the codes that it saw."""
    delete = 0x53 if translate else 0x71
    vm = guest(
        f"mov al, 0x60; out 0x64, al; mov al, {0x04 | translate}; out 0x60, al; mov dx, 0x3f8; mov al, '!'; out dx, al;"
        "1: in al, 0x64; test al, 1; jz 1b; in al, 0x60; out dx, al; "
        f"cmp al, {delete}; jne 1b; xor al, al; out 0xf4, al"
    )
    seen = bytearray()
    ready = threading.Event()

    def on_console(data: bytes) -> None:
        seen.extend(data)
        ready.set()

    vm.on_console(on_console)
    vm.start()
    assert ready.wait(PATIENCE)
    vm.send_ctrl_alt_del()
    stop = vm.wait(PATIENCE)
    assert stop is not None and stop.status == 0
    assert seen == b"!" + bytes.fromhex("1d38e053" if translate else "1411e071")
