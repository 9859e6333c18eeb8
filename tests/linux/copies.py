# SPDX-License-Identifier: Apache-2.0
"""Copies of a stock Linux 6.12 with four CPUs: what each makes of its new generation, its random numbers and its clock.

    python -m tests.linux.copies [COPIES]      # where KVM runs Linux; writes one JSON object

In the lab (`pyvmm lab env -C "$PWD" .venv/bin/python -m tests.linux.copies 50`) a copy takes some seconds, and one may
stand still by the emulator's fault: it counts as `still`, and another is made in its place. A copy's clock is to be
as far ahead of the host's as its parent's.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.linux.kernels import debian
from tests.linux.small_devices import INIT, Guest
from vmm import Machine

SUITE = "trixie"  # of Linux 6.12, the first Debian with a VM generation driver in its cloud kernel
RANDOM = "head -c 16 /dev/urandom | od -A n -t x1 | tr -d ' '"
CLOCK, ASKED = "echo $EPOCHREALTIME", 20
RESEEDED = "dmesg | grep -c 'reseeded due to virtual machine fork'"
SOURCE = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"


class Copy(Guest):
    """The shell of a copy that runs."""

    def __init__(self, vm: Machine) -> None:
        self.take(vm)


def ahead(guest: Guest) -> tuple[float, float]:
    """By how many seconds its clock is ahead of the host's: at least, and at most, by the quickest of its answers."""
    least, most = [], []
    for _ in range(ASKED):
        before = time.time()
        now = float(guest.run(CLOCK))
        least.append(now - time.time())
        most.append(now - before)
    return max(least), min(most)


def look(copies: int, clocksource: str, kernel: str, initrd: str) -> dict[str, Any]:
    """What a guest with this clock source and its copies say."""
    guest = Guest(kernel, initrd, append=f"quiet clocksource={clocksource} tsc=reliable", cpus=4)
    found: dict[str, Any] = {
        "release": guest.run("uname -r"), "cpus": guest.run("nproc"), "source": guest.run(SOURCE),
        "reseeded_before": guest.run(RESEEDED), "still": 0, "copies": [],
    }  # fmt: skip
    try:
        while len(found["copies"]) < copies and found["still"] < copies:
            (vm,) = guest.vm.fork()
            copy = Copy(vm)
            try:
                asked = {"cpus": "nproc", "random": RANDOM, "reseeded": RESEEDED}
                said = {name: copy.run(command) for name, command in asked.items()}
                found["copies"].append({**said, "clock": ahead(copy), "parents": ahead(guest)})
            except TimeoutError:
                found["still"] += 1
            vm.close()
    finally:
        guest.vm.close()
    return found


def main(copies: str = "50") -> int:
    """Print what was found."""
    kernel = debian(SUITE)
    with tempfile.TemporaryDirectory() as directory:
        initrd = Path(directory, "initrd")
        initrd.write_bytes(kernel.initrd((), INIT))
        found = {
            source: look(count, source, kernel.path, str(initrd))
            for source, count in (("kvm-clock", int(copies)), ("tsc", 2))
        }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
