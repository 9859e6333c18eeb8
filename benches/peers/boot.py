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
from typing import Any

from benches.peers import common
from benches.peers.common import FIRECRACKER_NAME, QEMU_NAME, ROOT, Row, compare
from benches.peers.firecracker import Missing, firecracker
from boot import bzimage, payload
from boot.source import Source
from vmm import lab
from vmm.errors import VmmError
from vmm.images import apt
from vmm.images.cpio import Archive
from vmm.kvm.vm import runs_linux

KERNEL_PACKAGE = "linux-image-cloud-amd64"
ROUNDS = int(os.environ.get("PYVMM_BENCH_ROUNDS", "5"))
ROUND_SECONDS = 180
LEAST = 3  # rounds that a median is worth
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

    :raises Missing: the kernel is packed in a way that cannot be unpacked here
    """
    with Source("kernel", kernel) as source:
        setup = bzimage.parse(source)
        name = payload.compression(source, setup)
        try:
            return b"".join(bytes(chunk) for chunk in payload.chunks(name, source, setup))
        except payload.Unsupported as error:
            raise Missing(f"{kernel}: {name} cannot be unpacked here: {error}") from None


def _prepare(directory: Path) -> None:
    common.need_compiler()
    kernel, _ = apt.kernel_of(apt.package(KERNEL_PACKAGE).tree)
    shutil.copyfile(kernel, directory / "bzImage")
    (directory / "vmlinux").write_bytes(vmlinux(kernel))
    init = directory / "init"
    compiler = ["cc", "-O2", "-static", "-nostdlib", "-fno-stack-protector", "-o", str(init), "-xc", "-"]
    subprocess.run(compiler, input=INIT.encode(), check=True)
    archive = Archive()
    archive.console()
    archive.file("init", init.read_bytes(), 0o755)
    (directory / "initrd").write_bytes(archive.to_bytes())


def _round(directory: Path) -> dict[str, dict[str, Any]]:
    """Run each program once; return what it left, by program."""
    command = [sys.executable, "-m", "benches.peers.boot_inside", str(directory)]
    runs = directory / "runs"
    runs.unlink(missing_ok=True)
    if runs_linux():
        subprocess.run(command, cwd=ROOT, check=False)
    elif lacks := lab.missing():
        raise Missing(f"the lab lacks {'; '.join(lacks)}")
    else:
        # A lab of its own for each round: QEMU with KVM in it has hung the whole emulated machine now and then.
        shell = f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(command)}"
        try:
            lab.run(["sh", "-c", shell], write=[str(directory)], timeout=ROUND_SECONDS, stdin=None, stdout=2)
        except VmmError as error:
            print(f"boot: a round was cut short: {error}", file=sys.stderr)
    lines = runs.read_text().splitlines() if runs.exists() else []
    return {line["program"]: line for line in map(json.loads, lines)}


def rows() -> list[Row | Missing]:
    """Boot time beside QEMU microvm and Firecracker, from the ELF kernel and from the bzImage."""
    common.pyvmm()
    firecracker()  # fetched out here: the lab has no network
    # Not in /tmp, which may be a tmpfs: the kernels are 60 MB.
    with tempfile.TemporaryDirectory(prefix="pyvmm-boot-", dir=os.environ.get("TMPDIR", "/var/tmp")) as name:
        directory = Path(name)
        try:
            _prepare(directory)
        except VmmError as error:
            raise Missing(str(error)) from None
        rounds = [_round(directory) for _ in range(ROUNDS)]
    found: list[Row | Missing] = []
    for name, ours, peer, peer_name, goal in (
        ("boot, vmlinux", "pyvmm", "qemu", QEMU_NAME, 1.0),
        ("boot, vmlinux", "pyvmm", "firecracker", FIRECRACKER_NAME, None),
        ("boot, bzImage", "pyvmm_bzimage", "qemu_bzimage", QEMU_NAME, 1.0),
        ("boot, InstanceStart to init", "pyvmm_api", "firecracker_api", FIRECRACKER_NAME, 1.5),
    ):
        pairs = [(each.get(ours, {}), each.get(peer, {})) for each in rounds]
        whole = [(a["seconds"], b["seconds"]) for a, b in pairs if "seconds" in a and "seconds" in b]
        if len(whole) < LEAST:
            why = [run["missing"] for pair in pairs for run in pair if "missing" in run]
            count = f"{len(whole)} of {ROUNDS} rounds came to their end"
            found.append(Missing(f"{name} beside {peer_name}: {why[0] if why else count}"))
        else:
            mine, theirs = zip(*whole, strict=True)
            found.append(compare(name, "s", mine, theirs, peer_name, goal))
    return found
