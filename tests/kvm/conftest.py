# SPDX-License-Identifier: Apache-2.0
"""The kvm layer: every test here needs /dev/kvm, and says so loudly where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import pytest

from tests.kvm import guests
from vmm import Machine
from vmm.errors import ConfigError
from vmm.kvm.vm import Kvm

if TYPE_CHECKING:
    from vmm.config.vm import VmSettings


@pytest.fixture(autouse=True)
def _kvm() -> None:
    try:
        Kvm().close()
    except ConfigError as error:
        pytest.skip(f"LAYER MISSING: kvm: {error}")


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """Makes a Machine of assembler source: ``guest(source, bits=32, **settings)``; closed after the test."""
    machines: list[Machine] = []

    def make(source: str, bits: int = 32, **settings: Unpack[VmSettings]) -> Machine:
        settings.setdefault("memory", "4M")
        settings["kernel"] = guests.write_guest(tmp_path, source, bits)
        vm = Machine(**settings)
        machines.append(vm)
        return vm

    yield make
    for vm in machines:
        vm.close()
