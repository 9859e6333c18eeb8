# SPDX-License-Identifier: Apache-2.0
"""A fuzzer of code that runs in a guest: it finds the input at which a parser crashes, by what each input reached.

    python examples/fuzzer.py [SEED]

The guest asks for an input at a port, parses it, and asks again: one exit an input, and no boot between them. The
host writes inputs straight into the guest's memory and reads there how far the parser came. It needs GNU as and ld
(Debian: binutils).
"""

from __future__ import annotations

import random
import sys
import tempfile
from typing import TYPE_CHECKING

from vmm import Machine, Stop, StopReason
from vmm.testing import tiny_guest

if TYPE_CHECKING:
    import numpy as np

PORT, INPUT, REACHED, SIZE = 0x510, 0x200000, 0x201000, 8
MAGIC = b"BUG!"
# The parser under test. A block that is reached counts in memory, as a compiler's coverage instrumentation does.
PARSER = "".join(
    f"    cmp byte ptr [{INPUT + index}], {byte}\n    jne next\n    inc byte ptr [{REACHED + index}]\n"
    for index, byte in enumerate(MAGIC)
)
GUEST = f"""
    mov edx, {PORT}
next:
    in al, dx                       # the host puts the next input in place
{PARSER}
    ud2                             # the bug: without a handler, a triple fault
"""


class Fuzzer:
    """The bus device that the guest asks for inputs.

    :param ram: the guest's memory
    :param limit: inputs after which it gives up
    """

    def __init__(self, ram: np.ndarray, seed: int, limit: int = 200_000) -> None:
        self.ram = ram
        self.random = random.Random(seed)
        self.limit = limit
        self.corpus = [bytes(SIZE)]
        self.input = b""
        self.inputs = 0
        self.seen = bytes(len(MAGIC))

    def read(self, offset: int, data: memoryview) -> None:
        reached = self.ram[REACHED : REACHED + len(MAGIC)]
        covered = bytes(reached.astype(bool))
        if self.inputs and any(now > before for now, before in zip(covered, self.seen, strict=True)):
            self.seen = covered
            self.corpus.append(self.input)  # it reached what none reached before: go on from it
        if self.inputs == self.limit:
            raise Stop(StopReason.REQUESTED)
        reached[:] = 0
        self.inputs += 1
        self.input = self.mutated(self.random.choice(self.corpus[-2:]))
        self.ram[INPUT : INPUT + SIZE] = list(self.input)

    def write(self, offset: int, data: memoryview) -> None:
        pass

    def mutated(self, parent: bytes) -> bytes:
        """`parent` with one byte changed."""
        changed = bytearray(parent)
        changed[self.random.randrange(SIZE)] = self.random.randrange(256)
        return bytes(changed)


def main(seed: str = "1") -> int:
    """Fuzz until the guest crashes; 0 if it did."""
    with tempfile.TemporaryDirectory() as directory, Machine(tiny_guest(directory, GUEST), memory="16M") as vm:
        fuzzer = Fuzzer(vm.memory.view(), int(seed))
        vm.pio.add(PORT, 1, fuzzer, "fuzzer")
        vm.start()
        ended = vm.wait()
    if ended is None or ended.reason is not StopReason.TRIPLE_FAULT:
        print(f"no crash within {fuzzer.inputs} inputs")
        return 1
    print(f"crash at input {fuzzer.inputs}: {fuzzer.input!r}; {len(fuzzer.corpus) - 1} inputs reached something new")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
