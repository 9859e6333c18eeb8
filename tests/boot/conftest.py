# SPDX-License-Identifier: Apache-2.0
"""What the loaders' tests share: guest memory, a kernel file of given bytes, a refusal in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from boot.load import load
from tests.boot.kernel_images import MIB
from vmm.errors import ConfigError
from vmm.memory import GuestMemory

# Writes the kernel file, and says where it is.
KernelFile = Callable[[bytes], str]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(64 * MIB) as ram:
        yield ram


@pytest.fixture
def kernel(tmp_path: Path) -> KernelFile:
    path = tmp_path / "kernel"

    def write(data: bytes) -> str:
        path.write_bytes(data)
        return str(path)

    return write


def refused(memory: GuestMemory, path: str, *, protocol: str = "auto", unpack: str = "auto") -> str:
    with pytest.raises(ConfigError) as error:
        load(memory, path, protocol=protocol, unpack=unpack)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"kernel {path}: ")
    return text
