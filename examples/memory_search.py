# SPDX-License-Identifier: Apache-2.0
"""Searches the memory of a running guest for a text, without the guest's help.

    python examples/memory_search.py                            # a guest of a few instructions
    python examples/memory_search.py vmlinux 'Linux version'    # a kernel, a second after it was started

The first needs GNU as and ld (Debian: binutils).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from vmm import Machine
from vmm.testing import tiny_guest

# Decodes seven bytes with a key, so that its kernel file has no such text; then it does nothing, for ever.
SECRET = b"secret!"
GUEST = f"""
    mov esi, offset coded
    mov edi, 0x123456
    mov ecx, {len(SECRET)}
again:
    lodsb
    xor al, 0x5a
    stosb
    loop again
    mov dword ptr [0x200000], 1     # tells the host that it is there
wait:
    jmp wait
coded:
    .byte {", ".join(str(byte ^ 0x5A) for byte in SECRET)}
"""


def addresses(memory: np.ndarray, wanted: bytes) -> Iterator[int]:
    """Where `wanted` is. Each byte narrows down the candidates of the one before."""
    found = np.flatnonzero(memory[: len(memory) - len(wanted) + 1] == wanted[0])
    for index, byte in enumerate(wanted[1:], 1):
        found = found[memory[found + index] == byte]
    return map(int, found)


def main(kernel: str | None = None, text: str = SECRET.decode()) -> None:
    """Start the guest, hold it, and print each address with what is around it."""
    with tempfile.TemporaryDirectory() as directory:
        with Machine(kernel or tiny_guest(directory, GUEST), memory="64M") as vm:
            ram = vm.memory.view()  # numpy, over the guest's own pages
            vm.start()
            if kernel is None:
                while not ram[0x200000]:
                    time.sleep(0.001)
            else:
                time.sleep(1)
            vm.pause()
            for address in addresses(ram, text.encode()):
                around = bytes(ram[address : address + 60]).decode("ascii", "replace").split("\0")[0]
                print(f"{address:#x}: {around.splitlines()[0]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
