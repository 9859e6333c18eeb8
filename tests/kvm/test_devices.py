# SPDX-License-Identifier: Apache-2.0
"""Drivers in ring 3 of a long-mode guest drive each device on /dev/kvm itself, and check what comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kvm.ring3 import drive
from vmm.config import DriveConfig

DISK = 1 << 20


def make_disk(path: Path) -> Path:
    path.write_bytes(bytes(DISK))
    return path


def pattern(page: int) -> bytes:
    words = ((page * 512 + word + 1) * 0x9E3779B97F4A7C15 % (1 << 64) for word in range(512))
    return b"".join(word.to_bytes(8, "little") for word in words)


@pytest.mark.parametrize("engine", ["Sync", "Async"])
@pytest.mark.parametrize(
    "ring", ["event_idx=1 indirect=1", "event_idx=0 indirect=0", "event_idx=1 indirect=0", "size=4 depth=1 indirect=0"]
)
def test_disk_is_written_flushed_and_read_back(tmp_path: Path, ring: str, engine: str) -> None:
    image = make_disk(tmp_path / "disk")
    drives = (DriveConfig(str(image), drive_id="ring3", io_engine=engine),)
    words, stats = drive("blk", f"test=0 {ring}", drives=drives)
    assert words["id"] == ["ring3"]
    assert stats["virtio-blk0"]["requests"] == 2 * DISK // 4096 + 2
    data = image.read_bytes()
    assert all(data[page * 4096 :][:4096] == pattern(page) for page in range(DISK // 4096))


def test_every_queue_of_a_disk_works(tmp_path: Path) -> None:
    drives = (DriveConfig(str(make_disk(tmp_path / "disk")), queues=4),)
    for queue in range(4):
        drive("blk", f"test=0 queue={queue}", drives=drives)


@pytest.mark.parametrize("event_idx", [0, 1])
def test_interrupt_arrives_when_it_is_wanted_only(tmp_path: Path, event_idx: int) -> None:
    drives = (DriveConfig(str(make_disk(tmp_path / "disk"))),)
    words, _ = drive("blk", f"test=1 event_idx={event_idx}", drives=drives)
    assert words["interrupts"] == words["while polled"] == ["20"]


def test_driver_that_lies_to_one_disk_has_the_other_whole(tmp_path: Path) -> None:
    drives = [DriveConfig(str(make_disk(tmp_path / name))) for name in ("bad", "good")]
    _, stats = drive("blk", "test=2 rounds=8 count=100", drives=drives)
    assert stats["virtio-blk0"]["needs_reset"] == 8
    assert stats["virtio-blk1"]["needs_reset"] == 0
    assert stats["virtio-blk1"]["requests"] == DISK // 4096 + 2 * 8 * 100
