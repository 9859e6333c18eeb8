# SPDX-License-Identifier: Apache-2.0
"""Boot: process start to the first word of the guest's init; same kernel, initrd, command line and memory.

Debian's cloud kernel; in the lab, except on hardware KVM. The lab slows all alike, so that only ratios count.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benches.peers import common
from benches.peers.common import FIRECRACKER_NAME, QEMU_NAME, ROOT, Missing, Row, compare
from boot import bzimage, payload
from boot.source import Source
from vmm import lab
from vmm.errors import VmmError
from vmm.images import apt
from vmm.images.cpio import Archive
from vmm.kvm import runs_linux

KERNEL_PACKAGE = "linux-image-cloud-amd64"
SECONDS = 600
# Says its word and sleeps: what follows is not measured.
INIT = r"""
static long call(long number, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
                     : "rcx", "r11", "memory");
    return result;
}
void _start(void)
{
    call(1, 1, (long)"\n@init@\n", 8, 0);   /* write */
    for (;;) call(34, 0, 0, 0, 0);          /* pause */
}
"""


def vmlinux(kernel: Path) -> bytes:
    """The ELF file inside a bzImage, which is all that Firecracker can load.

    :raises Missing: it is packed in a way that cannot be unpacked here
    """
    with Source("kernel", kernel) as source:
        setup = bzimage.parse(source)
        name = payload.compression(source, setup)
        try:
            # unpack() puts the segments into guest memory; here the file itself is wanted.
            packed = payload._Input(source, setup.payload, setup.payload_length - (0 if name == "gzip" else 4))
            chunks = payload._METHODS[name](packed, source.fail)
            return b"".join(bytes(chunk) for chunk in chunks)
        except (KeyError, payload.Unsupported) as error:
            raise Missing(f"{kernel}: {name} cannot be unpacked here: {error}") from None


def _prepare(directory: Path) -> None:
    if shutil.which("cc") is None:
        raise Missing("cc: apt-get install gcc")
    kernel, _ = apt.kernel_of(apt.package(KERNEL_PACKAGE).tree)
    shutil.copyfile(kernel, directory / "bzImage")
    (directory / "vmlinux").write_bytes(vmlinux(kernel))
    init = directory / "init"
    compiler = ["cc", "-O2", "-static", "-nostdlib", "-fno-stack-protector", "-o", str(init), "-xc", "-"]
    subprocess.run(compiler, input=INIT.encode(), check=True)
    archive = Archive()
    archive.node("dev/console", "c", 5, 1)
    archive.file("init", init.read_bytes(), 0o755)
    (directory / "initrd").write_bytes(archive.to_bytes())


def _run(directory: Path) -> None:
    command = [sys.executable, "-m", "benches.peers.boot_inside", str(directory)]
    if runs_linux():
        subprocess.run(command, cwd=ROOT, check=False)
        return
    if lacks := lab.missing():
        raise Missing(f"the lab lacks {'; '.join(lacks)}")
    shell = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}"
    lab.run(["sh", "-c", shell], write=[str(directory)], timeout=SECONDS, stdin=None, stdout=2)


def rows() -> list[Row | Missing]:
    """Boot time beside QEMU microvm and Firecracker, from the ELF kernel and from the bzImage."""
    common.pyvmm()
    common.firecracker()  # fetched out here: the lab has no network
    # Not in /tmp: the lab has its own.
    with tempfile.TemporaryDirectory(prefix="pyvmm-boot-", dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        directory = Path(name)
        try:
            _prepare(directory)
            _run(directory)
            report = json.loads((directory / "boot.json").read_text())
        except FileNotFoundError:
            raise Missing("nothing came back from where the guests ran") from None
        except VmmError as error:
            raise Missing(str(error)) from None
    found: list[Row | Missing] = []
    for name, ours, peer, peer_name, goal in (
        ("boot, vmlinux", "pyvmm", "qemu", QEMU_NAME, 1.0),
        ("boot, vmlinux", "pyvmm", "firecracker", FIRECRACKER_NAME, None),
        ("boot, bzImage", "pyvmm_bzimage", "qemu_bzimage", QEMU_NAME, 1.0),
    ):
        if lacking := [report["missing"][program] for program in (ours, peer) if program in report["missing"]]:
            found.append(Missing(f"{name} beside {peer_name}: {lacking[0]}"))
        else:
            found.append(compare(name, "s", report["seconds"][ours], report["seconds"][peer], peer_name, goal))
    return found
