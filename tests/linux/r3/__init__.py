# SPDX-License-Identifier: Apache-2.0
"""r3, a Linux that a software KVM (kvm_pvm) runs natively: Debian's linux-source-6.1 with r3.patch and r3.config.

Built once, in 4 minutes on 2 cores, and kept in the cache directory: ``vmlinux()`` gives its path, and
``python -m tests.linux.r3`` prints it. What it can and cannot do: docs/software-kvm.md. The patch is GPL-2.0-only.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from vmm.images import apt
from vmm.images.host import Progress, PullError, cache_root, need, silent

SOURCE = "linux-source-6.1"
PROGRAMS = ("gcc", "make", "patch", "flex", "bison", "bc", "xz", "tar", "strip")
HERE = Path(__file__).parent
TRIES = 2
# Two thirds of the source's files, which no build for x86 without modules reads; Kconfig and make files stay.
LEFT_OUT = (
    "Documentation/*/*", "arch/[!x]*/*.[chS]", "arch/[!x]*/boot/*", "drivers/gpu/drm/*/*.[ch]", "drivers/media/*.[ch]",
    "drivers/net/*/*.[ch]", "sound/*.[ch]", "tools/perf/*", "tools/testing/*",
)  # fmt: skip
KEPT = 3  # kernels in the cache: other checkouts have other patches
PR_SET_PDEATHSIG = 1
# On the kernel's command line. Without kvmapf: a software KVM takes asynchronous page faults as ordinary ones.
CMDLINE = "console=ttyS0 panic=-1 reboot=k no-kvmapf 8250.nr_uarts=1 random.trust_cpu=1"


def vmlinux(progress: Progress = silent) -> Path:
    """Return r3's vmlinux, built the first time; who comes meanwhile waits for it.

    :raises PullError: a program is missing, or the source cannot be fetched or built, tried ``TRIES`` times
    """
    for attempt in range(TRIES):
        try:
            return _cached(apt.package(SOURCE, progress=progress), progress)
        except PullError as error:
            if attempt + 1 == TRIES:
                raise
            progress(f"r3: {error}; once more", None)
    raise AssertionError


def start() -> subprocess.Popen[bytes]:
    """Begin to build it in a process of its own, which takes only the CPU time that nobody else wants."""
    return subprocess.Popen(
        ["nice", "-n", "19", sys.executable, "-m", __name__], cwd=HERE.parents[2], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _cached(source: apt.Package, progress: Progress) -> Path:
    parts = (source.version, (HERE / "r3.patch").read_bytes(), (HERE / "r3.config").read_bytes())
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
    home = cache_root() / "r3"
    path = home / f"vmlinux-{source.version}-{key}"
    if path.exists():
        return path
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another build is running, waiting for it", None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path
        for left in home.glob(".build-*"):  # by a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=home) as work:
            built = _build(source, Path(work), progress)
            for old in sorted(home.glob("vmlinux-*"), key=lambda old: old.stat().st_mtime)[: 1 - KEPT]:
                old.unlink()
            built.rename(path)
    return path


def _build(source: apt.Package, work: Path, progress: Progress) -> Path:
    need(*PROGRAMS)
    progress(f"unpacking {SOURCE}", None)
    archive = source.tree / "usr/src" / f"{SOURCE}.tar.xz"
    tree = work / "linux"
    tree.mkdir()
    left_out = [f"--exclude={SOURCE}/{pattern}" for pattern in LEFT_OUT]
    unpack = ["tar", "--use-compress-program=xz -T0", "--anchored", *left_out, "--strip-components=1"]
    _run([*unpack, "-xf", str(archive), "-C", str(tree)], work)
    _run(["patch", "--silent", "--strip=1", f"--input={HERE / 'r3.patch'}"], tree)
    progress(f"building r3 of {SOURCE} {source.version} (4 minutes on 2 cores)", None)
    _run(["make", "--silent", "tinyconfig"], tree)
    _run(["scripts/kconfig/merge_config.sh", "-m", ".config", str(HERE / "r3.config")], tree)
    _run(["make", "--silent", "olddefconfig"], tree)
    _run(["make", "--silent", f"-j{os.cpu_count()}", "vmlinux"], tree)
    _run(["strip", "-o", str(work / "vmlinux"), "vmlinux"], tree)
    return work / "vmlinux"


def _end_with_us() -> None:
    # make passes SIGTERM on to what it has started.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _run(argv: list[str], directory: Path) -> None:
    # What it says is kept beside, for who looks why; the error names its last words.
    log = directory / ".log"
    with log.open("wb") as output:
        done = subprocess.run(
            argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C", "KBUILD_BUILD_USER": "pyvmm", "KBUILD_BUILD_HOST": "r3"},
            preexec_fn=_end_with_us,
        )  # fmt: skip
    if done.returncode:
        said = log.read_text(errors="replace").strip().splitlines()
        causes = [line for line in said if not line.startswith("make")] or said or ["it does not say why"]
        errors = [line for line in causes if "rror" in line] or causes[-1:]
        raise PullError(f"r3 was not built: {' '.join(argv[:2])}: {errors[0]}")
