# SPDX-License-Identifier: Apache-2.0
"""The balloon against virtio 1.2 §5.5: what is handed back is the host's again; a driver that lies gains nothing."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from virtio import balloon, spec
from virtio.balloon import Balloon
from virtio.testing import Allocator, Buffer, DeviceHost
from vmm._fastpath import GuestRam
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

PAGE = spec.BALLOON_PAGE
INFLATE, DEFLATE, THIRD, FOURTH = range(4)
Host = DeviceHost[Balloon]
Boot = Callable[..., Host]
# The upper half of RAM: the driver's own rings and buffers are below.
FIRST = (2 << 20) // PAGE


@pytest.fixture
def boot(ram: GuestMemory) -> Iterator[Boot]:
    hosts: list[Host] = []

    def boot(*, without: int = 0, **how: Any) -> Host:
        hosts.append(DeviceHost(Balloon(**how), ram, Allocator(0x1000, 1 << 20)))
        ram.write(0, bytes(FIRST * PAGE))  # resident from the start: the driver's buffers change nothing
        ram.write(FIRST * PAGE, b"\x5a" * (ram.size - FIRST * PAGE))
        hosts[-1].driver.bring_up(without=without)
        return hosts[-1]

    yield boot
    for host in hosts:
        host.close()


def resident(ram: GuestMemory) -> int:
    """Bytes of guest RAM that the host has memory for."""
    return sum(os.fstat(region.file.fd).st_blocks * 512 for region in ram.regions if region.file)


def named(host: Host, pages: Sequence[int]) -> Buffer:
    return host.data(struct.pack(f"<{len(pages)}I", *pages))


def alive(host: Host) -> None:
    page = FIRST + 500
    host.ram.write(page * PAGE, b"x" * PAGE)
    assert host.submit(INFLATE, [named(host, [page])]) == 0
    assert host.ram.read(page * PAGE, PAGE) == bytes(PAGE)
    assert not host.broken()


# What a correct driver gets


def test_5_5_4_configuration(boot: Boot) -> None:
    host = boot(amount_mib=3)
    assert host.driver.get(spec.MMIO_DEVICE_ID) == 5
    assert struct.unpack("<4I", host.driver.config(0, 16)) == (768, 0, 0, 0)


@pytest.mark.parametrize(
    ("how", "features", "queues"),
    [
        ({}, 0, 2),
        ({"deflate_on_oom": True}, spec.BALLOON_F_DEFLATE_ON_OOM, 2),
        ({"stats_polling_interval_s": 1}, spec.BALLOON_F_STATS_VQ, 3),
        ({"free_page_reporting": True}, spec.BALLOON_F_PAGE_REPORTING | spec.BALLOON_F_PAGE_POISON, 3),
        ({"stats_polling_interval_s": 9, "free_page_reporting": True, "deflate_on_oom": True}, 0b110110, 4),
    ],
)
def test_5_5_3_what_was_asked_for_is_offered(boot: Boot, how: dict[str, Any], features: int, queues: int) -> None:
    host = boot(**how)
    assert host.driver.offered() & 0xFF == features
    assert len(host.driver.queues) == queues


def test_5_5_6_inflated_pages_are_the_hosts_again_and_come_back_as_zeros(boot: Boot, ram: GuestMemory) -> None:
    host = boot()
    before = resident(ram)
    pages = list(range(FIRST, FIRST + 256))
    assert host.submit(INFLATE, [named(host, pages)]) == 0
    assert resident(ram) == before - 256 * PAGE
    assert ram.read(FIRST * PAGE, 256 * PAGE) == bytes(256 * PAGE)
    assert ram.read((FIRST + 256) * PAGE, PAGE) == b"\x5a" * PAGE
    assert host.device.stats["inflated"] == 256
    assert host.device.stats["bytes_discarded"] == 256 * PAGE
    assert host.submit(DEFLATE, [named(host, pages)]) == 0
    assert host.device.stats["deflated"] == 256
    ram.write(FIRST * PAGE, b"used again")
    assert ram.read(FIRST * PAGE, 10) == b"used again"


def test_5_5_6_the_target_changes_while_the_guest_runs(boot: Boot) -> None:
    host = boot(amount_mib=1)
    generation = host.driver.get(spec.MMIO_CONFIG_GENERATION)
    host.device.set_amount(2)
    assert host.driver.take_interrupt() == spec.INTERRUPT_CONFIG
    assert host.driver.get(spec.MMIO_CONFIG_GENERATION) != generation
    assert host.driver.config(0, 4) == struct.pack("<I", 512)
    assert host.device.amount_mib == 2
    # the driver says how far it came
    host.transport.write(spec.MMIO_CONFIG + 4, memoryview(bytearray(struct.pack("<I", 300))))
    assert host.device.statistics()["actual_pages"] == 300
    host.device.set_amount(0)
    assert struct.unpack("<4I", host.driver.config(0, 16)) == (0, 300, 0, 0)
    assert host.device.statistics() == {
        "target_pages": 0, "actual_pages": 300, "target_mib": 0, "actual_mib": 1
    }  # fmt: skip


def test_a_reset_leaves_the_target_and_empties_the_balloon(boot: Boot) -> None:
    host = boot(amount_mib=1)
    host.transport.write(spec.MMIO_CONFIG + 4, memoryview(bytearray(struct.pack("<I", 256))))
    host.driver.bring_up()
    assert struct.unpack("<4I", host.driver.config(0, 16)) == (256, 0, 0, 0)
    alive(host)


# Statistics


def stat(*pairs: tuple[int, int]) -> bytes:
    return b"".join(spec.BALLOON_STAT.pack(*pair) for pair in pairs)


def tick(host: Host) -> None:
    """As the clock does, at once."""
    host.device._due = True
    os.eventfd_write(host.transport.notify_fds[THIRD], 1)


def give(host: Host, content: bytes) -> int:
    """Make statistics available; the head of their chain, which the device keeps."""
    ring = host.driver.queues[THIRD]
    ring.want_interrupt()
    requests = host.device.stats["requests"]
    head = ring.add([host.data(content)])
    host.driver.kick(THIRD)
    while host.device.stats["requests"] == requests:
        os.sched_yield()
    return head


def test_5_5_6_3_statistics_are_asked_for_again_and_the_latest_are_kept(boot: Boot) -> None:
    host = boot(amount_mib=2, stats_polling_interval_s=3600)
    head = give(host, stat((4, 1 << 40), (0, 7), (5, 2 << 40), (9, 3)))
    tick(host)
    assert host.reap(THIRD, head) == 0
    head = give(host, stat((4, 99)))  # a subset: the others stay as they were
    tick(host)
    host.reap(THIRD, head)
    assert host.device.statistics() == {
        "target_pages": 512, "actual_pages": 0, "target_mib": 2, "actual_mib": 0,
        "swap_in": 7, "free_memory": 99, "total_memory": 2 << 40, "hugetlb_failures": 3,
    }  # fmt: skip
    assert host.device.stats["bad_requests"] == 0


def test_statistics_have_firecrackers_names(boot: Boot) -> None:
    host = boot(stats_polling_interval_s=3600)
    head = give(host, stat(*((tag, tag * 10) for tag in range(16))))
    tick(host)
    host.reap(THIRD, head)
    found = host.device.statistics()
    assert (
        list(found)[4:]
        == (
            "swap_in swap_out major_faults minor_faults free_memory total_memory available_memory disk_caches "
            "hugetlb_allocations hugetlb_failures oom_kill alloc_stall async_scan direct_scan async_reclaim "
            "direct_reclaim"
        ).split()
    )
    assert list(found.values())[4:] == [tag * 10 for tag in range(16)]


def test_the_clock_asks_by_itself_and_its_interval_changes(boot: Boot) -> None:
    host = boot(stats_polling_interval_s=3600)
    head = give(host, stat((4, 1)))
    host.device.set_polling_interval(1)
    host.reap(THIRD, head)
    assert host.device.stats_polling_interval_s == 1


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0), (1, -1), (1, 65536)])
def test_statistics_are_not_turned_on_or_off_later(before: int, after: int) -> None:
    with pytest.raises(ConfigError, match="stats_polling_interval_s"):
        Balloon(stats_polling_interval_s=before).set_polling_interval(after)


@pytest.mark.parametrize("amount", [-1, 1 << 24])
def test_an_amount_that_no_page_count_can_say_is_refused(amount: int) -> None:
    with pytest.raises(ConfigError, match="amount_mib"):
        Balloon(amount)
    with pytest.raises(ConfigError, match="amount_mib"):
        Balloon().set_amount(amount)


def test_unknown_tags_are_ignored_and_what_is_no_statistic_is_counted(boot: Boot) -> None:
    host = boot(stats_polling_interval_s=3600)
    for content in (stat((4, 5), (4000, 1), (16, 1)), stat((4, 6))[:-1], bytes(10 * 300)):
        head = give(host, content)
        tick(host)
        host.reap(THIRD, head)
    assert host.device.statistics()["free_memory"] == 5
    assert len(host.device.statistics()) == 5
    assert host.device.stats["bad_requests"] == 2
    alive(host)


def test_5_5_6_3_1_a_second_buffer_pushes_the_first_one_out(boot: Boot) -> None:
    host = boot(stats_polling_interval_s=3600)
    first = give(host, stat((4, 1)))
    second = give(host, stat((4, 2)))
    host.reap(THIRD, first)
    assert host.device.stats["bad_requests"] == 1
    tick(host)
    host.reap(THIRD, second)
    assert host.device.statistics()["free_memory"] == 2


def test_a_reset_forgets_the_statistics_and_the_buffer(boot: Boot) -> None:
    host = boot(stats_polling_interval_s=3600)
    give(host, stat((4, 1)))
    host.driver.bring_up()
    assert "free_memory" not in host.device.statistics()
    tick(host)  # nothing to return
    head = give(host, stat((4, 2)))
    tick(host)
    host.reap(THIRD, head)
    alive(host)


# Free page reporting


@pytest.mark.parametrize("stats", [0, 3600])
def test_5_5_6_7_reported_pages_are_the_hosts_again(boot: Boot, ram: GuestMemory, stats: int) -> None:
    host = boot(free_page_reporting=True, stats_polling_interval_s=stats)
    before = resident(ram)
    parts = [Buffer(FIRST * PAGE, 64 * PAGE, True), Buffer((FIRST + 100) * PAGE, PAGE, True)]
    assert host.submit(FOURTH if stats else THIRD, parts) == 0
    assert resident(ram) == before - 65 * PAGE
    assert host.device.stats["reported"] == 65
    assert ram.read((FIRST + 64) * PAGE, PAGE) == b"\x5a" * PAGE


def test_queues_are_numbered_by_what_was_negotiated_as_linux_does(boot: Boot, ram: GuestMemory) -> None:
    host = boot(free_page_reporting=True, stats_polling_interval_s=3600, without=spec.BALLOON_F_STATS_VQ)
    before = resident(ram)
    host.submit(THIRD, [Buffer(FIRST * PAGE, PAGE, True)])
    assert resident(ram) == before - PAGE
    # the one that is left over does nothing
    ring = host.driver.queues[FOURTH]
    ring.add([Buffer(FIRST * PAGE + PAGE, PAGE, True)])
    host.driver.set(spec.MMIO_QUEUE_NOTIFY, FOURTH)
    host.submit(INFLATE, [named(host, [FIRST + 2])])
    assert ring.reap() == [] and resident(ram) == before - 2 * PAGE


@pytest.mark.parametrize(("poison", "freed"), [(0, 1), (0xAAAAAAAA, 0), (1 << 24, 0)])
def test_5_5_6_7_2_pages_that_are_to_hold_a_poison_are_left_alone(
    boot: Boot, ram: GuestMemory, poison: int, freed: int
) -> None:
    host = boot(free_page_reporting=True)
    host.driver.negotiate()
    host.transport.write(spec.MMIO_CONFIG + 12, memoryview(bytearray(struct.pack("<I", poison))))
    host.driver.negotiate = lambda *, without=0: host.driver.offered()  # type: ignore[method-assign]
    host.driver.bring_up()
    before = resident(ram)
    host.submit(THIRD, [Buffer(FIRST * PAGE, PAGE, True)])
    assert resident(ram) == before - freed * PAGE
    assert host.device.stats["reported"] == 1
    # §5.5.6.5.1: too late to change it
    host.transport.write(spec.MMIO_CONFIG + 12, memoryview(bytearray(struct.pack("<I", 0 if poison else 1))))
    host.submit(THIRD, [Buffer((FIRST + 1) * PAGE, PAGE, True)])
    assert resident(ram) == before - 2 * freed * PAGE


def test_of_an_unaligned_report_only_whole_pages_go(boot: Boot, ram: GuestMemory) -> None:
    host = boot(free_page_reporting=True)
    before = resident(ram)
    host.submit(THIRD, [Buffer(FIRST * PAGE + 1, 3 * PAGE, True), Buffer((FIRST + 8) * PAGE + 8, 64, True)])
    assert resident(ram) == before - 2 * PAGE
    edges = (FIRST * PAGE, PAGE), ((FIRST + 3) * PAGE, 1), ((FIRST + 8) * PAGE, PAGE)
    assert all(ram.read(gpa, size) == b"\x5a" * size for gpa, size in edges)


def test_a_report_of_readable_pages_frees_nothing(boot: Boot, ram: GuestMemory) -> None:
    host = boot(free_page_reporting=True)
    before = resident(ram)
    host.submit(THIRD, [Buffer(FIRST * PAGE, PAGE), Buffer((FIRST + 1) * PAGE, PAGE, True)])
    host.submit(THIRD, [Buffer(FIRST * PAGE, 0, True)])
    assert resident(ram) == before
    assert host.device.stats["bad_requests"] == 2
    alive(host)


# A driver that lies


def test_pages_outside_ram_are_counted_and_ignored(boot: Boot, ram: GuestMemory) -> None:
    host = boot()
    before = resident(ram)
    end = ram.size // PAGE
    pages = [end, end + 1, 0xFFFF_FFFF, 0xFFFF_FFFE, 3 << 18, end - 1, end - 2, FIRST]
    assert host.submit(INFLATE, [named(host, pages)]) == 0
    assert host.device.stats["bad_pages"] == 5
    assert resident(ram) == before - 3 * PAGE
    assert host.log == []
    alive(host)


def test_the_same_page_a_thousand_times_is_one_page(boot: Boot, ram: GuestMemory) -> None:
    host = boot()
    before = resident(ram)
    host.submit(INFLATE, [named(host, [FIRST] * 1000)])
    assert resident(ram) == before - PAGE
    host.submit(INFLATE, [named(host, [FIRST])])  # and again, while it is in the balloon
    assert resident(ram) == before - PAGE
    alive(host)


@pytest.mark.parametrize("size", [1, 3, 5, 4 * balloon.REQUEST_PAGES_MAX + 4])
@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
def test_a_length_that_is_no_list_of_pages_is_refused(boot: Boot, ram: GuestMemory, queue: int, size: int) -> None:
    host = boot()
    before = resident(ram)
    assert host.submit(queue, [Buffer(FIRST * PAGE, size)]) == 0
    assert host.device.stats["bad_requests"] == 1
    assert resident(ram) == before
    alive(host)


@pytest.mark.parametrize("queue", [INFLATE, DEFLATE])
def test_a_writable_or_empty_list_is_refused_and_not_written(boot: Boot, queue: int) -> None:
    host = boot()
    room = host.room(8)
    assert host.submit(queue, [room]) == 0
    assert host.submit(queue, [named(host, [FIRST]), room]) == 0
    assert host.submit(queue, [Buffer(FIRST * PAGE, 0)]) == 0
    assert host.ram.read(room.addr, 8) == bytes(8)
    assert host.device.stats["bad_requests"] == 3
    alive(host)


def test_a_list_in_pieces_of_any_size_is_one_list(boot: Boot, ram: GuestMemory) -> None:
    host = boot()
    before = resident(ram)
    content = struct.pack("<3I", FIRST, FIRST + 2, FIRST + 4)
    pieces = [host.data(content[:3]), host.data(content[3:4]), host.data(content[4:])]
    host.submit(INFLATE, pieces, indirect=True)
    assert resident(ram) == before - 3 * PAGE


def test_a_driver_that_gives_its_own_rings_away_harms_itself_alone(boot: Boot, ram: GuestMemory) -> None:
    host = boot()
    ring = host.driver.queues[INFLATE]
    own = sorted({address // PAGE for address in (ring.desc, ring.avail, ring.used)})
    ring.add([named(host, own)])
    host.driver.kick(INFLATE)
    while host.device.stats["inflated"] < len(own):
        os.sched_yield()
    host.driver.bring_up()
    alive(host)


def test_a_broken_chain_stops_this_device_until_its_driver_resets_it(boot: Boot, ram: GuestMemory) -> None:
    host = boot(stats_polling_interval_s=3600, free_page_reporting=True)
    for queue in range(4):
        ring = host.driver.queues[queue]
        ring.write_desc(0, ram.size - 8, 16, 0)
        ring.offer(0, [0])
        host.driver.set(spec.MMIO_QUEUE_NOTIFY, queue)
        host.until(host.broken)
        host.driver.bring_up()
    alive(host)


def test_only_actual_and_the_poison_are_the_drivers_to_write(boot: Boot) -> None:
    host = boot(amount_mib=1)
    host.transport.write(spec.MMIO_CONFIG, memoryview(bytearray(b"\xff" * 16)))
    assert struct.unpack("<4I", host.driver.config(0, 16)) == (256, 0xFFFF_FFFF, 0, 0xFFFF_FFFF)
    host.transport.write(spec.MMIO_CONFIG + 3, memoryview(bytearray(b"\0\1")))
    assert struct.unpack("<4I", host.driver.config(0, 16)) == (256, 0xFFFF_FF01, 0, 0xFFFF_FFFF)
    host.transport.write(spec.MMIO_CONFIG + 13, memoryview(bytearray(4)))  # past the end
    assert host.transport.stats["bad_access"] == 1
    assert host.device.statistics()["actual_mib"] == 0xFFFF_FF01 // 256


def test_a_host_without_a_thread_left_stops_this_device_until_its_driver_resets_it(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    host = boot(stats_polling_interval_s=1)
    with monkeypatch.context() as patch:
        patch.setattr(balloon, "spawn", refuse)
        host.driver.bring_up()
    assert host.broken() and "can't start new thread" in host.log[0]
    host.driver.bring_up()
    alive(host)


def test_a_host_that_takes_no_page_back_is_told_of_and_the_guest_goes_on() -> None:
    ram = GuestRam()
    ram.map_region(0, mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))  # no memfd: EINVAL
    host: Host = DeviceHost(Balloon(), ram, Allocator(0x1000, 1 << 20))
    host.driver.bring_up()
    for _ in range(10):
        assert host.submit(INFLATE, [named(host, [FIRST, FIRST + 2])]) == 0
    assert host.device.stats["io_errors"] == 20
    assert len(host.log) == 5  # the 1st, 2nd, 4th, 8th and 16th
    assert not host.broken()
    host.close()
