# SPDX-License-Identifier: Apache-2.0
"""A Linux with virtio-rng, -balloon and -console: what its drivers find, and what the host gets back.

python -m tests.linux.small_devices      # where KVM runs Linux; writes one JSON object
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from tests.linux.kernels import kernel
from virtio.balloon import Balloon
from virtio.console import Console
from virtio.rng import Entropy
from vmm import Machine
from vmm.images import initramfs

MIB = 1 << 20
PATIENCE = 60.0
MODULES = ("virtio_mmio", "virtio_rng", "virtio_balloon", "virtio_console")
# A shell that reads the serial port as a file: neither prompt nor echo.
INIT = initramfs.LOAD_MODULES + "stty -echo -onlcr </dev/ttyS0\nexec setsid sh /dev/ttyS0 >/dev/ttyS0 2>&1\n"
FILL = "dd if=/dev/zero of=/fill bs=1M count=64 2>/dev/null; rm /fill"


class Guest:
    """A running guest and its shell."""

    def __init__(self, kernel: str, initrd: str, *devices: Any, append: str = "quiet", **settings: Any) -> None:
        self.take(
            Machine(
                kernel=kernel, initrd=initrd, memory="192M", console="none", append=append, devices=devices, **settings
            )
        )
        self.vm.start()
        self.run("true")  # what the kernel says, and what was fed before the echo was off

    def take(self, vm: Machine) -> None:
        """Talk to this machine."""
        self.vm = vm
        self._heard = bytearray()
        self._change = threading.Condition()
        vm.on_console(self._hear)

    def _hear(self, data: bytes) -> None:
        with self._change:
            self._heard += data
            self._change.notify_all()

    def run(self, command: str) -> str:
        """What `command` prints."""
        self.vm.serial.feed(f"{{ {command}\n}}; echo '<'end'>'\n".encode())
        with self._change:
            if not self._change.wait_for(lambda: b"<end>\n" in self._heard, PATIENCE):
                raise TimeoutError(f"{command}: only {bytes(self._heard)!r}")
            answer, _, rest = bytes(self._heard).partition(b"<end>\n")
            self._heard[:] = rest
        return answer.decode(errors="replace").strip()

    def resident(self) -> dict[str, int]:
        """Bytes of guest RAM in the host's memory: of the memfds, and mapped into this process."""
        status = Path("/proc/self/status").read_text()
        mapped = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssShmem"))
        blocks = sum(os.fstat(region.file.fd).st_blocks for region in self.vm.memory.regions if region.file)
        return {"memfd": blocks * 512, "mapped": mapped * 1024}


def until(condition: Any) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def small(kernel: str, initrd: str, facts: dict[str, Any]) -> None:
    """Random numbers, a console with a further port, a balloon with statistics; drivers that go and come again."""
    rng, console = Entropy(), Console(["org.pyvmm.test"], cols=91, rows=37)
    balloon = Balloon(deflate_on_oom=True, stats_polling_interval_s=1)
    guest = Guest(kernel, initrd, rng, balloon, console)
    port, agent = console.ports
    try:
        facts["drivers"] = guest.run("for d in /sys/bus/virtio/devices/*/driver; do readlink $d | sed 's|.*/||'; done")
        facts["rng"] = guest.run("cat /sys/class/misc/hw_random/rng_current; head -c 1000 /dev/hwrng | wc -c")
        guest.run("echo from the guest >/dev/hvc0")
        facts["hvc0"] = port.wait_output().decode()
        facts["size"] = guest.run("stty size </dev/hvc0")
        port.feed(b"from the host\n")
        facts["hvc0_read"] = guest.run("head -n 1 /dev/hvc0")
        console.resize(100, 50)
        facts["resized"] = until(lambda: guest.run("stty size </dev/hvc0") == "50 100")
        facts["port"] = guest.run("cat /sys/class/virtio-ports/*/name")
        guest.run("p=$(basename $(dirname $(ls /sys/class/virtio-ports/*/name)))\necho agent >/dev/$p")
        facts["agent"] = agent.wait_output().decode()
        agent.feed(b"orders\n")
        facts["agent_read"] = guest.run("head -n 1 /dev/$p")

        guest.run(FILL)
        before = guest.resident()
        free = "grep MemFree /proc/meminfo | tr -dc 0-9"
        facts["free_before"] = int(guest.run(free))
        start = time.monotonic()
        balloon.set_amount(96)
        facts["inflated"] = until(lambda: balloon.statistics()["actual_pages"] == 96 * 256)
        facts["inflate_seconds"] = round(time.monotonic() - start, 2)
        facts["before"], facts["after"] = before, guest.resident()
        facts["free_after"] = int(guest.run(free))
        facts["statistics_came"] = until(lambda: 0 < balloon.statistics().get("free_memory", 0) < 96 * MIB)
        facts["statistics"] = balloon.statistics()
        balloon.set_amount(0)
        facts["deflated"] = until(lambda: balloon.statistics()["actual_pages"] == 0)
        facts["used_again"] = guest.run(f"{FILL} && echo yes")
        balloon.set_amount(32)
        until(lambda: balloon.statistics()["actual_pages"] == 32 * 256)
        facts["reloaded"] = guest.run("reload virtio_balloon && reload virtio_rng\nhead -c 100 /dev/hwrng | wc -c")
        facts["inflated_after_reload"] = until(lambda: balloon.statistics()["actual_pages"] == 32 * 256)
        facts["stats"] = {"rng": rng.stats, "balloon": balloon.stats, "console": console.stats}
    finally:
        for one in console.ports:
            one.close()
        guest.vm.close()


def reporting(kernel: str, initrd: str, facts: dict[str, Any]) -> None:
    """Memory that the guest has used and freed comes back by itself."""
    balloon = Balloon(free_page_reporting=True)
    guest = Guest(kernel, initrd, balloon)
    try:
        guest.run(FILL)
        before = guest.resident()
        facts["came"] = until(lambda: guest.resident()["memfd"] < before["memfd"] - 40 * MIB)
        facts.update(before=before, after=guest.resident(), stats=balloon.stats)
    finally:
        guest.vm.close()


def _holds(balloon: Balloon, amount_mib: int) -> bool:
    return balloon.statistics()["actual_pages"] == amount_mib << 8


def hungry(kernel: str, initrd: str, facts: dict[str, Any]) -> None:
    """A program that needs what the balloon holds: it gets it, or the kernel kills it."""
    for name, deflate_on_oom in (("deflates", True), ("holds", False)):
        balloon = Balloon(deflate_on_oom=deflate_on_oom, free_page_reporting=False)
        guest = Guest(kernel, initrd, balloon)
        try:
            amount = (int(guest.run("grep MemFree /proc/meminfo | tr -dc 0-9")) >> 10) - 40
            balloon.set_amount(amount)
            inflated = until(partial(_holds, balloon, amount))
            # One buffer of its own, which nothing can reclaim.
            ended = guest.run("dd if=/dev/zero of=/dev/null bs=64M count=1 >/dev/null 2>&1; echo status $?")
            facts[name] = {
                "inflated": inflated, "amount_mib": amount, "actual_mib": balloon.statistics()["actual_pages"] >> 8,
                "ended": ended.splitlines()[-1],
            }  # fmt: skip
        finally:
            guest.vm.close()


def main() -> int:
    made = kernel()
    initrd = Path(os.environ.get("TMPDIR", "/tmp"), "small_devices.cpio")
    initrd.write_bytes(made.initrd(MODULES, INIT))
    facts: dict[str, dict[str, Any]] = {"small": {}, "reporting": {}, "hungry": {}}
    try:
        small(made.path, str(initrd), facts["small"])
        reporting(made.path, str(initrd), facts["reporting"])
        hungry(made.path, str(initrd), facts["hungry"])
    finally:
        json.dump(facts, sys.stdout)  # what was found before it went wrong, too
    return 0


if __name__ == "__main__":
    sys.exit(main())
