# SPDX-License-Identifier: Apache-2.0
"""A restore and the size of RAM: from ``Image.load`` to the copy's first exit, with 4 GiB beside 128 MiB.

With shadow paging, as a software KVM has it, KVM allocates and clears 8 bytes for each page of a memory slot: 1 to 3 ms
for 4 GiB, which other waits of KVM may hide. ``pyvmm lab env -C "$PWD" .venv/bin/python -m benches.peers restore``
measures it under kvm_amd, which does not.
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

from benches.peers import common
from benches.peers.common import Row, compare
from benches.peers.snapshots import TICKING, first_exit
from vmm import Image, Machine, undertaker
from vmm.testing import tiny_elf

ROUNDS = 25
SMALL, LARGE = 128, 4096  # MiB


def _saved(directory: Path, guest: Path, mib: int) -> Path:
    path = directory / f"saved{mib}"
    with Machine(kernel=str(guest), memory=mib << 20) as vm:
        vm.start()
        first_exit(vm)
        vm.freeze().save(str(path))
    return path


def _restore(path: Path) -> float:
    undertaker.wait()  # of the copy before
    begun = time.perf_counter()
    with Machine(image=Image.load(str(path))) as vm:
        vm.start()
        first_exit(vm)
        return (time.perf_counter() - begun) * 1e3


def rows() -> list[Row]:
    """The row."""
    common.need_kvm()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        guest = directory / "guest.elf"
        guest.write_bytes(tiny_elf(TICKING))
        saved = {mib: _saved(directory, guest, mib) for mib in (SMALL, LARGE)}
        found = common.in_turn(ROUNDS, large=partial(_restore, saved[LARGE]), small=partial(_restore, saved[SMALL]))
    what = "load of a tiny guest with 4 GiB of RAM to its first exit"
    return [compare(what, "ms", found["large"], found["small"], "with 128 MiB", 1.2)]
