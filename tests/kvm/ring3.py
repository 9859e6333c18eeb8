# SPDX-License-Identifier: Apache-2.0
"""Guests of tests/kvm/driver: drivers in C, in ring 3 of long mode, which is native where ring 0 is emulated."""

from __future__ import annotations

import functools
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from tests.kvm.guests import PATIENCE, registers
from vmm import Machine
from vmm.exits import StopReason

if TYPE_CHECKING:
    from vmm.config.vm import VmSettings
    from vmm.mmds.store import Mmds

DRIVER = Path(__file__).parent / "driver"
# SSE would need its registers saved, and ring 0 of a software KVM has no SSE at all.
CFLAGS = (
    "-O2", "-g0", "-Wall", "-Wno-unused-function", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pie",
    "-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables", "-mgeneral-regs-only",
    "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments", f"-Wl,-T,{DRIVER / 'guest.lds'}",
)  # fmt: skip


@functools.cache
def _built() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="pyvmm-ring3-")


@functools.cache
def kernel(name: str) -> str:
    """Path of the guest that tests/kvm/driver/`name`.c makes; compiled once in this process, gone with it."""
    path = Path(_built().name, f"{name}.elf")
    subprocess.run(["gcc", *CFLAGS, "-o", path, "start.S", f"{name}.c"], cwd=DRIVER, check=True)
    return str(path)


class Words(dict[str, list[str]]):
    """What a guest said: values by name, of its lines ``name=value``; ``text`` has all of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        for line in text.splitlines():
            name, equals, value = line.partition("=")
            if equals:
                self.setdefault(name, []).append(value)


class Ring3:
    """One run of a driver: ``start()``, then what the host has to do, then ``end()``, which checks its verdict."""

    def __init__(
        self, name: str, cmdline: str = "", /, *, metadata: Mmds | None = None, **settings: Unpack[VmSettings]
    ) -> None:
        settings.setdefault("memory", "32M")
        settings["kernel"], settings["cmdline"] = kernel(name), cmdline
        self.vm = Machine(metadata=metadata, **settings)
        self._output = bytearray()
        self.vm.on_console(self._output.extend)

    def times_of(self, word: bytes) -> list[float]:
        """A list that gets the host's time (perf_counter) of each of the guest's lines with `word` in it."""
        times: list[float] = []

        def look(data: bytes) -> None:
            # Lines come in pieces; _output has this one already.
            found = self._output.count(word, 0, self._output.rfind(b"\n") + 1)
            times.extend([time.perf_counter()] * (found - len(times)))

        self.vm.on_console(look)
        return times

    def start(self) -> Ring3:
        """Let it run."""
        self.vm.start()
        return self

    def end(self) -> Words:
        """Wait for its end, which must be exit status 0."""
        stop = self.vm.wait(PATIENCE)
        text = self._output.decode(errors="replace")
        assert stop is not None, f"no end in {PATIENCE} s, rip {registers(self.vm)}, {self.vm.stats}\n{text}"
        assert (stop.reason, stop.code) == (StopReason.GUEST_EXIT, 0), f"{stop}\n{text}"
        return Words(text)

    def __enter__(self) -> Ring3:
        return self

    def __exit__(self, *failure: object) -> None:
        self.vm.close()


def drive(name: str, cmdline: str = "", /, **settings: Unpack[VmSettings]) -> tuple[Words, dict[str, dict[str, int]]]:
    """Run a driver that needs nothing more of the host: what it said, and the machine's counters."""
    with Ring3(name, cmdline, **settings) as guest:
        return guest.start().end(), guest.vm.stats
