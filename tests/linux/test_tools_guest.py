# SPDX-License-Identifier: Apache-2.0
"""What a failure of a tools guest says, without a guest."""

from __future__ import annotations

import pytest

from tests.linux.begun import R3_FAULT
from tests.linux.tools_guest import Asked, GuestFailed


@pytest.mark.parametrize(
    "begin", ["BUG: unable to handle page fault for address: 1", "stack segment: 0000 [#1] PREEMPT", "WARNING: CPU: 0"]
)
def test_a_kernels_first_trouble_is_kept(begin: str) -> None:
    guest = Asked()
    guest.name = "guest"
    guest.heard = (
        f"x\r\n[   68.1] {begin}\r\n[   68.2] RIP: 0010:{R3_FAULT}+0x7a/0x90\r\n".encode() + b"[ 69.0] y\r\n" * 900
    )
    with pytest.raises(GuestFailed, match=begin.partition(":")[0]) as failed:
        guest.until(b"@done", 0)
    assert R3_FAULT in str(failed.value) and len(str(failed.value)) < 5000
