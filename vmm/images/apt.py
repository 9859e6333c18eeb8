# SPDX-License-Identifier: Apache-2.0
"""Debian packages by name: apt chooses, fetches and verifies them; unpacked in the cache, not installed.

The cache is ``$XDG_CACHE_HOME/pyvmm/debs``: a directory ``NAME_VERSION`` per unpacked package, and a file
``NAME.chosen`` that says which one a name meant last time, so that the next use needs no apt, no network.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vmm.images.host import Progress, PullError, cache_root, run, silent, tool

# Debian's own meta packages, which contain no kernel but depend on exactly one that does.
_KERNEL_METAS = ("linux-image-amd64", "linux-image-cloud-amd64", "linux-image-rt-amd64")


class Package(NamedTuple):
    """A Debian package unpacked in the cache."""

    name: str
    version: str
    tree: Path  # what would be installed at /


def package(name: str, *, refresh: bool = False, progress: Progress = silent) -> Package:
    """Return a package unpacked in the cache, fetching apt's candidate version if no version is there.

    A kernel meta package (``linux-image-cloud-amd64``) stands for the kernel it depends on. apt verifies what
    it fetches against the signed Release files of the sources this host trusts. Works as any user.

    :param name: name of a binary package, as apt knows it
    :param refresh: ask apt again, and fetch its candidate if that is another version than the cached one
    :raises PullError: apt is missing, knows no such package, or cannot reach its sources
    """
    check_name(name)
    debs = cache_root() / "debs"
    if not refresh and (cached := _chosen(debs, name)):
        return cached
    debs.mkdir(parents=True, exist_ok=True)
    with _locked(debs / "lock"):
        if not refresh and (cached := _chosen(debs, name)):
            return cached
        real, version, size = _candidate(name)
        tree = debs / f"{real}_{version.replace(':', '%3a')}"
        if not tree.is_dir():
            _fetch(real, version, size, tree, progress)
        _choose(debs, name, Package(real, version, tree))
    return Package(real, version, tree)


def kernel_of(tree: Path) -> tuple[Path, str]:
    """Return the bzImage in an unpacked kernel package, and its version as ``uname -r`` will print it.

    :raises PullError: there is not exactly one kernel in it
    """
    found = sorted(tree.glob("boot/vmlinuz-*"))
    if len(found) != 1:
        raise PullError(f"{tree.name} holds {len(found)} kernels (boot/vmlinuz-*), one is expected")
    return found[0], found[0].name.removeprefix("vmlinuz-")


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a Debian package, before a program takes it for something else.

    Source: Debian Policy Manual 5.6.7; ``:`` is for ``NAME:ARCHITECTURE``.
    :raises PullError: it is not
    """
    if not name or not all(c.isascii() and (c.isalnum() or c in "+-.:") for c in name) or name[0] in "+-.:":
        raise PullError(f"{name!r} is no package name")


def _chosen(debs: Path, name: str) -> Package | None:
    try:
        real, version = (debs / f"{name}.chosen").read_text().split()
    except (OSError, ValueError):
        return None
    tree = debs / f"{real}_{version.replace(':', '%3a')}"
    return Package(real, version, tree) if tree.is_dir() else None


def _choose(debs: Path, name: str, chosen: Package) -> None:
    new = debs / f"{name}.chosen.new"
    new.write_text(f"{chosen.name} {chosen.version}\n")
    new.rename(debs / f"{name}.chosen")


def _candidate(name: str) -> tuple[str, str, int]:
    # -> the real package's name, apt's candidate version of it, the size of its .deb in bytes
    fields = _show(name)
    if name in _KERNEL_METAS:
        # "linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)", perhaps after other dependencies
        kernels = [d.split()[0] for d in fields.get("Depends", "").split(",") if "linux-image-" in d]
        if len(kernels) != 1:
            raise PullError(f"apt's {name} depends on {len(kernels)} kernels, one is expected: name one yourself")
        name, fields = kernels[0], _show(kernels[0])
    return name, fields["Version"], int(fields["Size"])


def _show(name: str) -> dict[str, str]:
    # `show`, unlike `policy`, prints nothing and fails for a package that is known but not to be had
    try:
        text = run(["apt-cache", "--no-all-versions", "show", name])
    except PullError as error:
        if "No packages found" not in str(error):
            raise
        if not _knows_any():
            raise PullError("apt has no package lists: run `apt-get update` as root") from None
        raise PullError(f"apt knows no package {name}: run `apt-get update` as root, or check the name") from None
    fields = {}
    for line in text.split("\n\n")[0].splitlines():
        key, colon, value = line.partition(": ")
        if colon and not line.startswith(" "):
            fields[key] = value
    if "Size" not in fields:  # installed by hand, in no list
        raise PullError(f"no apt source has {name}: run `apt-get update` as root")
    return fields


def _knows_any() -> bool:
    # of what is only installed, and in no package list, apt knows no Size
    try:
        return "\nSize: " in run(["apt-cache", "show", "apt", "dpkg"])
    except PullError:
        return False


def _fetch(name: str, version: str, size: int, tree: Path, progress: Progress) -> None:
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=tree.parent))
    try:
        _download(name, version, f"{name} {version} ({size / 1e6:.1f} MB)", work, progress)
        (deb,) = work.glob("*.deb")
        progress(f"unpacking {name}", None)
        run(["dpkg-deb", "--extract", str(deb), str(work / "tree")])
        (work / "tree").rename(tree)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(name: str, version: str, step: str, work: Path, progress: Progress) -> None:
    status_r, status_w = os.pipe()
    argv = [tool("apt-get"), "download", f"{name}={version}", "--quiet=2"]
    for option in (
        f"APT::Status-Fd={status_w}",
        "APT::Get::AllowUnauthenticated=false",
        "Acquire::Retries=2",
        # as root apt would drop to user _apt, who may not write here, and warn about it
        "APT::Sandbox::User=root",
    ):
        argv += ["-o", option]
    progress(step, 0.0)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(
            argv,
            cwd=work,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            pass_fds=[status_w],
        ) as apt,
    ):
        os.close(status_w)
        with open(status_r, errors="replace") as status:
            for line in status:  # dlstatus:1:45.2:Retrieving file 1 of 1
                parts = line.split(":")
                if parts[0] == "dlstatus":
                    progress(step, float(parts[2]) / 100)
        apt.wait()
        stderr.seek(0)
        said = stderr.read().strip().splitlines()
    if apt.returncode or not list(work.glob("*.deb")):
        raise PullError(f"cannot fetch {name}: {reason(said)}")
    progress(step, 1.0)


def reason(said: Iterable[str]) -> str:
    """Return why apt failed, in one clause, from the lines it wrote to standard error."""
    errors = [line.removeprefix("E: ") for line in said if line.startswith("E: ")] or ["apt does not say why"]
    for error in errors:
        if "Can't find a source" in error or " 404 " in error:
            return "apt's package lists are old: run `apt-get update` as root"
        # Failed to fetch http://.../x.deb  Temporary failure resolving '...'
        if error.startswith("Failed to fetch "):
            return f"is this host offline? apt says: {error.split(maxsplit=4)[-1]}"
    return errors[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
