# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vmm.serial_guest import Guest


@pytest.fixture
def guest() -> Iterator[Guest]:
    """A guest at a serial port, which the test plays."""
    guest = Guest()
    yield guest
    guest.close()
