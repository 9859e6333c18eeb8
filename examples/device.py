# SPDX-License-Identifier: Apache-2.0
"""A device of one's own: a port at which the guest reads the host's clock.

    python examples/device.py

The guest is six instructions, so that this runs on any /dev/kvm; it needs GNU as and ld (Debian: binutils).
"""

from __future__ import annotations

import tempfile
import time

from vmm import Machine
from vmm.testing import run, tiny_guest

PORT = 0x510
READINGS, COUNT = 0x200000, 1000
GUEST = f"""
    mov edi, {READINGS}             # where the readings go
    mov ecx, {COUNT}
    mov edx, {PORT}
again:
    in eax, dx                      # one reading
    stosd
    loop again
    mov al, 0
    out 0xf4, al                    # the exit port: status 0
"""


class Clock:
    """Nanoseconds since it was made, modulo 2^32, in one 32-bit register. What is written to it is ignored."""

    def __init__(self) -> None:
        self.began = time.monotonic_ns()

    def read(self, offset: int, data: memoryview) -> None:
        now = (time.monotonic_ns() - self.began) & 0xFFFFFFFF
        data[:] = now.to_bytes(4, "little")[: len(data)].ljust(len(data), b"\0")  # a guest may read 1 to 8 bytes

    def write(self, offset: int, data: memoryview) -> None:
        pass


def main() -> None:
    """Run the guest, and print how long one reading takes."""
    with tempfile.TemporaryDirectory() as directory, Machine(tiny_guest(directory, GUEST), memory="16M") as vm:
        vm.pio.add(PORT, 4, Clock(), "clock")
        print("the guest:", run(vm))
        readings = vm.memory.view(READINGS, 4 * COUNT, dtype="<u4").copy()
    steps = (readings[1:] - readings[:-1]) / 1000
    assert (steps >= 0).all()
    print(f"{COUNT} readings; from one to the next {sorted(steps)[COUNT // 2]:.1f} us (median)")


if __name__ == "__main__":
    main()
