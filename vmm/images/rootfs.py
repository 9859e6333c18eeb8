# SPDX-License-Identifier: Apache-2.0
"""Root file systems, each made as a directory tree and turned into an ext4 image with `mke2fs -d`.

An ordinary user makes them too: fakeroot remembers who owns what between unpacking and mke2fs.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from vmm.images import apt, guest, initramfs, suites
from vmm.images.host import FetchError, Progress, PullError, need, run, tool, tried

DEBIAN_SUITE = "bookworm"  # if the host is not a Debian
# Beyond minbase: a network tool, modprobe, ps and free, and busybox, whose poweroff the image's init uses.
DEBIAN_PACKAGES = ("busybox-static", "iproute2", "kmod", "procps")

# How mmdebstrap's messages begin, and how much of its time has gone when they come.
_MMDEBSTRAP_STEPS = {
    "running apt-get update": 0.0,
    "downloading packages": 0.25,
    "extracting archives": 0.35,
    "installing essential": 0.4,
    "installing remaining": 0.7,
    "creating": 0.95,
}
_LIB = "usr/lib/pyvmm"


def check_tools(name: str) -> None:
    """Check that the programs for the image of that name are here, before minutes are spent.

    :raises PullError: a program is missing; the message is one line with the command that installs it
    """
    programs = ["apt-get", "dpkg-deb", "mke2fs"]
    if name == "debian":
        programs += ["mmdebstrap", "depmod", "tar"]
    if os.geteuid():
        programs.append("fakeroot")
        if name == "debian":
            programs.append("newuidmap")
    need(*programs)


def busybox(
    image: Path, size: int, kernel: apt.Package, packages: Sequence[str], work: Path, progress: Progress
) -> None:
    """Make an ext4 image that holds busybox and pyvmm's init."""
    if packages:
        raise PullError("the busybox image takes no packages: pull debian")
    tree = work / "tree"
    binary, applets = initramfs.busybox(progress)
    for directory in ("proc", "sys", "dev", "run", "tmp", "mnt", "var/log", "bin"):
        (tree / directory).mkdir(parents=True)
    (tree / "tmp").chmod(0o1777)
    _write(tree / "bin/busybox", binary, 0o755)
    _write_all(tree, guest.busybox_files("busybox"))
    for applet in applets:
        link = tree / applet
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to("/bin/busybox")
    for path, data in initramfs.module_files(kernel.tree, guest.MODULES, on_demand=guest.ON_DEMAND_MODULES).items():
        _write(tree / path, data)
    (tree / "root").mkdir(mode=0o700)
    (tree / "sbin/init").unlink(missing_ok=True)
    progress("making the root file system", None)
    _finish(work, "true", image, size, "busybox")


def debian(
    image: Path, size: int, kernel: apt.Package, packages: Sequence[str], work: Path, progress: Progress
) -> None:
    """Make an ext4 image that holds a small Debian, the kernel's modules and pyvmm's init."""
    tried(lambda: _mmdebstrap(work / "debian.tar", packages, progress))
    progress("making the root file system", None)
    added = work / "added"
    version = apt.kernel_of(kernel.tree)[1]
    modules = added / "usr/lib/modules"
    modules.mkdir(parents=True)
    run(["cp", "-a", "--", str(apt.modules_root(kernel.tree) / version), str(modules)])
    run(["depmod", "-b", str(added / "usr"), version])
    _write_all(added, guest.session_files("debian"))
    _write(added / "etc/systemd/system/serial-getty@ttyS0.service.d/autologin.conf", guest.AUTOLOGIN.encode())
    (work / "tree").mkdir()
    # devices are left out: not every root may make them, and devtmpfs brings them
    unpack = """
        tar --extract --numeric-owner --exclude='./dev/*' --directory tree --file debian.tar
        cp -a --no-preserve=ownership added/. tree/
    """
    _finish(work, unpack, image, size, "debian")


def _mmdebstrap(archive: Path, packages: Sequence[str], progress: Progress) -> None:
    names = [*DEBIAN_PACKAGES, *packages]
    for name in names:
        apt.check_name(name)
    argv = [tool("mmdebstrap"), "--variant=minbase", f"--include={','.join(names)}"]
    if os.path.exists(suites.KEYRING):
        argv.append(f"--keyring={suites.KEYRING}")
    suite = suites.own() or DEBIAN_SUITE  # this host's, whose kernel it is, too
    # the Debian sources that this host uses, perhaps a mirror nearby; none means mmdebstrap's own default
    mirrors = [f"deb {uri} {name} {part}" for uri, name, part in suites.sources() if name.startswith(suite)]
    argv += [suite, str(archive), *mirrors]
    errors = []
    last = ""
    with subprocess.Popen(
        argv,
        cwd=archive.parent,
        env={**os.environ, "LC_ALL": "C", "TMPDIR": os.environ.get("TMPDIR", "/var/tmp")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as mmdebstrap:
        assert mmdebstrap.stderr is not None
        for line in mmdebstrap.stderr:
            message = line.strip().removeprefix("I: ")
            for step, done in _MMDEBSTRAP_STEPS.items():
                if message.startswith(step):
                    progress(f"debian {suite}: {message.rstrip('.')}", done)
                    last = step
            if message.startswith("E: "):
                errors.append(message)
    if mmdebstrap.returncode:
        fetching = last in tuple(_MMDEBSTRAP_STEPS)[:2]
        raise (FetchError if fetching else PullError)(f"cannot make the Debian root: {apt.reason(errors)}")


def _finish(work: Path, unpack: str, image: Path, size: int, label: str) -> None:
    # one shell under one fakeroot, which forgets owners when it ends
    with open(image, "wb") as file:
        file.truncate(size)
    # tables made now, on a sparse file for nothing, are not left to the guest's ext4lazyinit
    options = "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0"
    script = f"""set -e
        {unpack}
        for program in init poweroff reboot halt; do
            target=poweroff; [ $program = init ] && target=init
            [ -e tree/sbin/$program ] || [ -L tree/sbin/$program ] || ln -s /{_LIB}/$target tree/sbin/$program
        done
        {tool("mke2fs")} -q -F -t ext4 -L {label} -m 0 -E {options} -d tree {shlex.quote(str(image))}
    """
    run([*(["fakeroot", "--"] if os.geteuid() else []), "sh", "-c", script], cwd=work)


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def _write_all(tree: Path, files: Mapping[str, str | bytes]) -> None:
    for path, data in files.items():
        _write(tree / path, *initramfs.contents_of(data))
