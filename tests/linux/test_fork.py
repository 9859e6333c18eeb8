# SPDX-License-Identifier: Apache-2.0
"""Linux frozen, forked and loaded while it works: nothing is lost, nothing is wrong, and each copy goes its own way.

Here on hardware KVM, or with r3 on a software KVM.
"""

from __future__ import annotations

import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import pytest

from tests.linux import r3
from vmm import DriveConfig, Image, Machine
from vmm.config.devices import VsockConfig
from vmm.images import apt, initramfs
from vmm.images.host import PullError
from vmm.kvm.vm import Kvm, software_kvm
from vmm.lab.image import KERNEL_PACKAGE

if TYPE_CHECKING:
    from vmm.config.vm import VmSettings

pytestmark = pytest.mark.timeout(900)  # the first one may build r3
PATIENCE = 60
MODULES = ("virtio_mmio", "virtio_blk", "ext4", "vmw_vsock_virtio_transport")
# A program that writes files and reads them back from the disk, a timer that must not stop, and a shell.
WORK = """
mount -t ext4 /dev/vda /mnt
(i=0; while true; do
    n=$((i % 6)); dd if=/dev/urandom of=/tmp/new bs=16k count=3 2>/dev/null
    cp /tmp/new /mnt/f$n && sync && echo 3 >/proc/sys/vm/drop_caches
    cmp /tmp/new /mnt/f$n || echo "BAD $i"
    i=$((i + 1)); echo $i >/tmp/next && mv /tmp/next /tmp/written
done) &
(while true; do sleep 0.02; echo x >>/tmp/ticks; done) &
echo 0 >/tmp/written; : >/tmp/ticks; dmesg -c >/dev/null
echo READY
while read -r word; do case $word in
    ask*) echo "told-$word written=$(cat /tmp/written) ticks=$(wc -l </tmp/ticks) date=$(date +%s)." ;;
    log) dmesg | grep -iE 'bug|error|stall|fail|corrupt|lost|hung' | sed 's/^/DMESG /'; echo "end of the log." ;;
    random) echo "random=$(head -c 16 /dev/urandom | od -A n -t x1 | tr -d ' ')." ;;
    rest) kill %1; echo "resting." ;;
    clock)
        cd /sys/devices/system/clocksource/clocksource0
        echo clock=$(adjtimex | sed -n 's/.*tv_u*sec: *//p') by $(cat current_clocksource). ;;
    end) kill %1 %2; sync; umount /mnt; echo "unmounted."; poweroff -f ;;
esac; done
"""


class Guest:
    """A machine, and what its serial port has said."""

    def __init__(self, vm: Machine) -> None:
        self.vm = vm
        self.said = bytearray()
        vm.on_console(self.said.extend)

    def await_(self, pattern: str) -> re.Match[str]:
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.said.decode(errors="replace"))):
            assert time.monotonic() < end, f"{pattern}: {self.said[-2000:].decode(errors='replace')}\n{self._state()}"
            time.sleep(0.002)
        return found

    def _state(self) -> str:
        # What tells a guest that has lost an interrupt from one that gets no processor.
        vm = self.vm
        lines = [f"{vm.state}, exits {vm.vcpus[0].exits}, serial port {vm.serial.save()}"]
        for thread in vm._run._threads:
            stat = Path(f"/proc/self/task/{thread.native_id}/schedstat")
            told = stat.read_text().split() if stat.exists() else "ended"
            lines.append(f"{thread.name}: nanoseconds run, and waited for a processor: {told}")
        pause = threading.Thread(target=vm.pause, daemon=True)
        pause.start()
        pause.join(10)
        if pause.is_alive():
            return "\n".join([*lines, "the vCPU cannot be held"])
        state = vm.kvm.state_access().save_vcpu(vm.vcpus[0].fd)
        lapic = state.pop("lapic")
        lines += [f"rip {vm.vcpus[0].regs.rip:#x}", f"mp_state {state['mp_state'].hex()}"]
        lines += [f"events {state['vcpu_events'].hex()}", f"MSRs {state['msrs']}"]
        lines += [
            f"APIC {at:#x}: {[lapic[i : i + 4][::-1].hex() for i in range(at, at + 0x80, 16)]}"
            for at in range(0, 0x400, 0x80)
        ]
        lines += [chip.hex() for chip in vm.kvm.state_access().save_vm(vm.vm.fd, timer=False)["irqchips"]]
        return "\n".join(lines)

    def ask(self, name: str) -> tuple[int, int, float]:
        """What it has written, how often its timer came, and its date."""
        self.vm.serial.feed(f"ask{name}\n".encode())
        told = self.await_(rf"told-ask{name} written=(\d+) ticks=(\d+) date=(\d+)\.")
        return int(told[1]), int(told[2]), float(told[3])

    def must_go_on(self, name: str, *, writes: bool = True) -> None:
        before = self.ask(f"{name}a")
        end = time.monotonic() + PATIENCE
        for number in range(1000):
            now = self.ask(f"{name}b{number}")
            if now[1] > before[1] and (now[0] > before[0] or not writes):
                assert abs(now[2] - time.time()) < 5, "its clock goes with the host's"
                return
            assert time.monotonic() < end, (before, now)

    def end_well(self) -> None:
        self.vm.serial.feed(b"log\n")
        self.await_(r"end of the log\.\r?\n")
        self.vm.serial.feed(b"end\n")
        stop = self.vm.wait(PATIENCE)
        assert stop is not None and stop.status == 0, (stop, self.said[-1000:])
        said = self.said.decode(errors="replace")
        assert "BAD" not in said and "DMESG" not in said, said[-3000:]


@pytest.fixture
def linux(tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    """Boots the guest above; every machine of the test is closed after it."""
    guests: list[Guest] = []
    try:
        Kvm().close()
        if software_kvm():
            kernel = tree = r3.vmlinux()  # without modules no tree is looked into
            modules: tuple[str, ...] = ()
        else:
            package = apt.package(KERNEL_PACKAGE)
            kernel, tree, modules = apt.kernel_of(package.tree)[0], package.tree, MODULES
        init = initramfs.LOAD_MODULES + "mount -t tmpfs tmp /tmp\n" + WORK
        (tmp_path / "initrd").write_bytes(initramfs.build_initramfs(tree, modules, init))
    except (PullError, ValueError) as error:
        pytest.fail(f"LAYER MISSING: linux: {error}")
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(disk)], check=True)

    def boot(more: str = "", **settings: Unpack[VmSettings]) -> Guest:
        settings |= {
            "kernel": str(kernel), "initrd": str(tmp_path / "initrd"), "cmdline": f"{r3.CMDLINE} quiet {more}",
            "memory": "192M", "drives": [DriveConfig(str(disk))],
        }  # fmt: skip
        vm = Machine(**settings)
        guest = Guest(vm)
        guests.append(guest)
        vm.start()
        guest.await_("READY")
        return guest

    yield boot
    for guest in guests:
        guest.vm.close()


def _fsck(disk: Path) -> None:
    done = subprocess.run(["e2fsck", "-fn", str(disk)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_two_hundred_freezes_under_work_and_a_look_at_some_copies(linux: Callable[..., Guest], tmp_path: Path) -> None:
    guest = linux()
    rng = random.Random(1)
    for number in range(200):
        if number % 40 == 20:
            (child,) = guest.vm.fork()
            copy = Guest(child)
            copy.must_go_on(f"c{number}")
            copy.end_well()
            child.close()
        else:
            guest.vm.freeze()
        time.sleep(rng.random() * 0.01)
    guest.must_go_on("after")
    guest.end_well()
    guest.vm.close()
    _fsck(tmp_path / "disk")


def test_what_was_written_since_is_all_that_changed(linux: Callable[..., Guest], tmp_path: Path) -> None:
    guest = linux(track_dirty_pages=True)
    memory = guest.vm.memory
    guest.vm.freeze()
    taken: list[tuple[int, int]] = []
    before = bytearray()
    marked = set()

    def look() -> None:
        runs, begins_anew = memory.take_written()
        marked.add(begins_anew)
        taken.extend(runs)

    def compare(_: Image) -> None:
        now = memory.read(0, memory.size)
        for gpa, size in taken:
            before[gpa : gpa + size] = now[gpa : gpa + size]
        assert now == before, [
            hex(at) for at in range(0, len(now), 4096) if now[at : at + 4096] != before[at : at + 4096]
        ]
        taken.clear()

    guest.vm._freeze(look, lambda _: before.extend(memory.read(0, memory.size)))
    taken.clear()
    if marked == {False}:
        pytest.skip("this kernel has no marks (before Linux 6.7)")
    for _ in range(25):
        time.sleep(0.01)
        guest.vm._freeze(look, compare)
    guest.end_well()
    guest.vm.close()
    _fsck(tmp_path / "disk")


def test_a_snapshot_on_disk_goes_on_later_with_the_time_right(linux: Callable[..., Guest], tmp_path: Path) -> None:
    guest = linux(vsock=VsockConfig(3, str(tmp_path / "v")))
    guest.must_go_on("first")
    guest.vm.pause()
    guest.vm.freeze().save(str(tmp_path / "image"))
    guest.vm.close()
    time.sleep(6)
    copy = Guest(Machine(image=Image.load(str(tmp_path / "image"))))
    copy.vm.start()
    copy.must_go_on("later")
    copy.end_well()
    copy.vm.close()
    _fsck(tmp_path / "disk")


def test_idle_guests_wake_in_every_copy(linux: Callable[..., Guest]) -> None:
    guest = linux()
    guest.vm.serial.feed(b"rest\n")
    guest.await_("resting")
    for round_ in range(4):
        children = guest.vm.fork(4)
        for number, child in enumerate(children):
            Guest(child).must_go_on(f"i{round_}.{number}", writes=False)
            child.close()
    guest.must_go_on("end", writes=False)


def test_copies_have_random_numbers_of_their_own(linux: Callable[..., Guest], tmp_path: Path) -> None:
    guest = linux()
    guest.vm.serial.feed(b"rest\n")
    guest.await_("resting")
    seen = set()
    for _ in range(50):
        (child,) = guest.vm.fork()
        copy = Guest(child)
        child.serial.feed(b"random\n")
        seen.add(copy.await_(r"random=([0-9a-f]{32})\.")[1])
        child.close()
    assert len(seen) == 50


def _ahead(guest: Guest) -> tuple[float, float]:
    # By how many seconds its clock is ahead of the host's: at least, and at most.
    before, begin = time.time(), len(guest.said)
    guest.vm.serial.feed(b"clock\n")
    told = guest.await_(r"clock=(\d+) (\d+) by (\S+)\.")
    assert told[3] == "kvm-clock"
    now = int(told[1]) + int(told[2]) / 1e6
    del guest.said[begin:]
    return now - time.time(), now - before


def test_copies_have_the_hosts_clock(linux: Callable[..., Guest], tmp_path: Path) -> None:
    # Linux has its date from the RTC, which has whole seconds; from there on it has to go with the host's.
    guest = linux("clocksource=kvm-clock")
    guest.vm.serial.feed(b"rest\n")
    guest.await_("resting")
    least, most = _ahead(guest)

    def must_go_with_it(copy: Machine) -> None:
        now = _ahead(Guest(copy))
        assert now[0] < most + 0.01 and now[1] > least - 0.01

    for child in guest.vm.fork(2):
        must_go_with_it(child)
        child.close()
    guest.vm.pause()
    guest.vm.freeze().save(str(tmp_path / "image"))
    guest.vm.close()
    time.sleep(0.2)
    with Machine(image=Image.load(str(tmp_path / "image"))) as copy:
        copy.start()
        must_go_with_it(copy)
