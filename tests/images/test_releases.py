# SPDX-License-Identifier: Apache-2.0
"""What `pyvmm pull` makes of the kernels of Debian 13 and 14, which a private apt fetches; 12 is this host's.

Each release moved something: directories merged below /usr, a kernel in several packages, modules that were built in.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from boot.load import load
from tests.images.test_cpio import read
from vmm.images import apt, guest, rootfs, suites
from vmm.images.host import PullError, silent
from vmm.images.initramfs import build_initramfs
from vmm.memory import GuestMemory


@pytest.fixture(scope="module", params=["trixie", "forky"])
def kernel(request: pytest.FixtureRequest) -> apt.Package:
    """The kernel for virtual machines of that release, in this host's own cache: it is fetched only once."""
    try:
        return apt.package("linux-image-cloud-amd64", suite=request.param)
    except PullError as error:
        pytest.fail(f"LAYER MISSING: Debian {request.param}: {error}")


def test_the_kernel_is_loaded(kernel: apt.Package) -> None:
    path = apt.kernel_of(kernel.tree)[0]
    with GuestMemory(512 << 20) as memory:
        loaded = load(memory, str(path))
    assert loaded.needs_ring0 and loaded.unpacked


def test_the_initramfs_has_what_a_guest_needs(kernel: apt.Package) -> None:
    data = build_initramfs(
        kernel.tree, guest.MODULES, guest.INIT, optional=guest.OPTIONAL_MODULES, on_demand=guest.ON_DEMAND_MODULES
    )
    entries = read(data)
    version = apt.kernel_of(kernel.tree)[1]
    builtin = (apt.modules_root(kernel.tree) / version / "modules.builtin").read_text().replace("-", "_")
    order = entries["lib/modules/order"].data.decode().split()
    there = {name.rpartition("/")[2].removesuffix(".ko").replace("-", "_") for name in entries if name.endswith(".ko")}
    for name in (*guest.MODULES, *guest.ON_DEMAND_MODULES):
        assert name in there or f"/{name}.ko\n" in builtin, name
    assert f"{version}/virtio_mmio.ko" in order


def test_the_root_file_system_is_of_the_hosts_release(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program, archive = tmp_path / "mmdebstrap", tmp_path / "root.tar"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" >words\n')
    program.chmod(0o755)
    monkeypatch.setattr(rootfs, "tool", lambda name: str(program))

    def asked() -> list[str]:
        rootfs._mmdebstrap(archive, (), silent)
        words = (tmp_path / "words").read_text().splitlines()
        return words[words.index(str(archive)) - 1 :]

    main, updates = ["http://m/d/", "trixie", "main"], ["http://m/d/", "trixie-updates", "main"]
    monkeypatch.setattr(suites, "sources", lambda: [updates, main])
    mirrors = ["deb http://m/d/ trixie-updates main", "deb http://m/d/ trixie main"]
    assert asked() == ["trixie", str(archive), *mirrors]
    monkeypatch.setattr(suites, "sources", list)
    assert asked() == ["bookworm", str(archive)]


def test_a_suite_that_is_not_there_is_one_line(cache: Path) -> None:
    with pytest.raises(PullError, match="cannot get the package lists of Debian nosuch: ") as error:
        apt.package("thing", suite="nosuch")
    assert "\n" not in str(error.value)
    with pytest.raises(PullError, match="'-x' is not a package name"):
        apt.package("thing", suite="-x")
