# SPDX-License-Identifier: Apache-2.0
"""The kernel loader: a guest of one instruction, and a large kernel, packed and unpacked on the host."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Protocol

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from boot.load import load
from tests.boot.kernel_images import MIB, bzimage, compress, pvh_elf, vmlinux
from vmm.memory import GuestMemory

METHODS = ("gzip", "lz4", "zstd")


class Loading(Protocol):
    """Measures how long a kernel file takes to load."""

    def __call__(self, image: bytes, size: int, rounds: int, **options: str) -> None: ...


@pytest.fixture(scope="module")
def text() -> bytes:
    """32 MiB that compress about as well as a kernel: to a quarter."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.randrange(2, 12)) for _ in range(4096)]
    return b"".join(chance.choices(words, k=5 << 20))[: 32 * MIB]


@pytest.fixture
def loading(benchmark: BenchmarkFixture, tmp_path: Path) -> Loading:
    def measure(image: bytes, size: int, rounds: int, **options: str) -> None:
        path = tmp_path / "kernel"
        path.write_bytes(image)
        memories: list[GuestMemory] = []

        def fresh() -> tuple[tuple[GuestMemory, Path], dict[str, str]]:
            while memories:
                memories.pop().close()
            memories.append(GuestMemory(size))
            return (memories[-1], path), options

        benchmark.pedantic(load, setup=fresh, rounds=rounds, warmup_rounds=1)
        memories.pop().close()

    return measure


def test_a_guest_of_one_instruction(loading: Loading) -> None:
    loading(pvh_elf(), 128 * MIB, 200)


def test_vmlinux(loading: Loading, text: bytes) -> None:
    loading(vmlinux(text, gap=33 * MIB), 128 * MIB, 5)


def test_bzimage_left_packed(loading: Loading, text: bytes) -> None:
    loading(bzimage(compress("lz4", text), init_size=64 * MIB), 128 * MIB, 5, unpack="never")


@pytest.mark.parametrize("method", METHODS)
def test_bzimage_unpacked(loading: Loading, text: bytes, method: str) -> None:
    image = bzimage(compress(method, vmlinux(text, gap=33 * MIB)), init_size=64 * MIB)
    loading(image, 128 * MIB, 3, unpack="always")
