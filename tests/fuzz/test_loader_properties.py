# SPDX-License-Identifier: Apache-2.0
"""Whatever bytes a kernel file holds, the loaders refuse them in one line or load them where they may.

What is checked of each input is in loader_input.py.
"""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.boot import loader_input
from tests.boot.kernel_images import MIB, bzimage, compress, pvh_elf, vmlinux

GOOD = {
    "pvh": pvh_elf(),
    "pvh32": pvh_elf(bits=32),
    "vmlinux": vmlinux(paddr=2 * MIB),
    **{
        method: bzimage(compress(method, vmlinux(paddr=2 * MIB)), pref_address=2 * MIB, init_size=4 * MIB)
        for method in loader_input.METHODS
    },
}


@pytest.mark.parametrize("name", GOOD)
def test_the_images_that_are_broken_below_load_when_they_are_not(name: str) -> None:
    loaded = loader_input.run(b"\0\0" + GOOD[name])
    assert loaded is not None
    assert loaded.unpacked == (name if name in loader_input.METHODS else "")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_bytes_of_any_kind(data: bytes) -> None:
    loader_input.run(data)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(GOOD)),
    st.integers(0, 255),
    st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
)
def test_good_images_with_some_bytes_overwritten(name: str, flags: int, changes: list[tuple[int, bytes]]) -> None:
    image = bytearray(GOOD[name])
    for at, data in changes:
        at %= len(image)
        image[at : at + len(data)] = data
    loader_input.run(bytes((flags & ~0x30, 0)) + bytes(image))


# Every aligned field of the ELF header, the program headers and the setup header, at each edge.
@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(sorted(GOOD)),
    st.integers(0, 1023),
    st.sampled_from(["<B", "<H", "<I", "<Q"]),
    st.sampled_from(loader_input.EDGES),
)
def test_good_images_with_a_field_at_an_edge(name: str, at: int, form: str, value: int) -> None:
    image = bytearray(GOOD[name])
    size = struct.calcsize(form)
    at = (0x1F1 + at % 0x80 if name in loader_input.METHODS else at) % (len(image) - size)
    struct.pack_into(form, image, at, value & ((1 << 8 * size) - 1))
    loader_input.run(b"\0\0" + bytes(image))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(GOOD)), st.integers(0, 8192))
def test_good_images_cut_short(name: str, size: int) -> None:
    loader_input.run(b"\0\0" + GOOD[name][: size % len(GOOD[name])])


@pytest.mark.parametrize("at", range(16))
def test_the_watcher_sees_what_the_loader_writes(at: int) -> None:
    """The check itself: a stretch on the zero page that is not the loader's own is caught."""
    with loader_input.Watched(loader_input.RAM) as memory:
        memory.write(0x6FF8 + at, b"12345678")
        if at in (0, 8) or at > 8:
            loader_input._check_written(memory, None)
        else:
            with pytest.raises(AssertionError, match=r"written over the (PVH start info|zero page)"):
                loader_input._check_written(memory, None)
