# SPDX-License-Identifier: Apache-2.0
"""Memory that is given back to the host while the guest uses it, on a real /dev/kvm."""

from __future__ import annotations

import os
from collections.abc import Callable

from vmm import Machine

MakeGuest = Callable[..., Machine]
PAGE = 0x200000


def test_a_running_guest_finds_zeros_where_its_page_was_given_back_and_can_use_it_again(guest: MakeGuest) -> None:
    vm = guest(f"""
        mov dword ptr [{PAGE:#x}], 42
    wait:
        pause
        cmp dword ptr [{PAGE:#x}], 0
        jne wait
        mov dword ptr [{PAGE:#x}], 43
        mov al, 7
        mov dx, 0xf4
        out dx, al
    """)
    vm.start()
    while vm.memory.read(PAGE, 1) != b"\x2a":
        os.sched_yield()
    assert vm.memory.discard(vm.memory.slice(PAGE, 4096)) == 4096
    stop = vm.wait(timeout=30)
    assert stop is not None and stop.code == 7
    assert vm.memory.read(PAGE, 4) == b"\x2b\0\0\0"
