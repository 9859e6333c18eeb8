# SPDX-License-Identifier: Apache-2.0
"""Every ioctl number, constant, structure size and field offset against the host's own <linux/kvm.h>."""

from __future__ import annotations

import ctypes
import importlib.util
from types import ModuleType
from typing import Any

import pytest
from cffi import FFI

from vmm.kvm import abi as kvm_abi

STRUCTS = {
    name: kind
    for name, kind in vars(kvm_abi).items()
    if isinstance(kind, type) and issubclass(kind, ctypes.Structure) and name.startswith("kvm_")
}
CONSTANTS = {name: value for name, value in vars(kvm_abi).items() if name.startswith(("KVM_", "KVMIO"))}
C_NAMES = {1: "uint8_t", 2: "uint16_t", 4: "uint32_t", 8: "uint64_t"}


def _declaration(name: str, kind: Any) -> str:
    length = ""
    if issubclass(kind, ctypes.Array):
        kind, length = kind._type_, f"[{kind._length_}]"
    if issubclass(kind, ctypes.Structure):
        return f"struct {kind.__name__} {name}{length};"
    c_name = "int32_t" if kind is ctypes.c_int32 else C_NAMES[ctypes.sizeof(kind)]
    return f"{c_name} {name}{length};"


@pytest.fixture(scope="session")
def header(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """A cffi module that the C compiler made from the kernel's headers: it refuses a field of another type."""
    ffi = FFI()
    for name, kind in STRUCTS.items():
        # "...;" lets the structure hold more than we name; cffi then takes sizes and offsets from the compiler.
        fields = " ".join(_declaration(field[0], field[1]) for field in kind._fields_)
        ffi.cdef(f"struct {name} {{ {fields} ...; }};")
    for name in CONSTANTS:
        ffi.cdef(f"#define {name} ...")
    # The header's __u64 is a long long; for GCC 14 that is another type than uint64_t.
    ffi.set_source("_kvm_header", "#include <linux/kvm.h>", extra_compile_args=["-Wno-incompatible-pointer-types"])
    directory = tmp_path_factory.mktemp("kvm_header")
    library = ffi.compile(str(directory))
    spec = importlib.util.spec_from_file_location("_kvm_header", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant(header: ModuleType, name: str) -> None:
    assert CONSTANTS[name] == getattr(header.lib, name)


@pytest.mark.parametrize("name", STRUCTS)
def test_struct(header: ModuleType, name: str) -> None:
    kind = STRUCTS[name]
    assert ctypes.sizeof(kind) == header.ffi.sizeof(f"struct {name}")
    for field in kind._fields_:
        assert getattr(kind, field[0]).offset == header.ffi.offsetof(f"struct {name}", field[0]), field[0]


def test_counted_arrays_follow_their_header() -> None:
    table = kvm_abi.msrs({0x10: 1, 0x1A0: 2})
    assert ctypes.sizeof(table.buffer) == 8 + 2 * 16
    assert [(entry.index, entry.data) for entry in table.entries] == [(0x10, 1), (0x1A0, 2)]


def test_registers_print_their_values() -> None:
    regs = kvm_abi.kvm_regs(rip=0x1000, rflags=2)
    assert repr(regs).endswith("rip=0x1000, rflags=0x2)")
    assert "cs=kvm_segment(base=0x0, " in repr(kvm_abi.kvm_sregs())
