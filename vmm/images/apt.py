# SPDX-License-Identifier: Apache-2.0
"""Debian packages by name: apt chooses, fetches and verifies them; unpacked in the cache, not installed.

The cache is ``$XDG_CACHE_HOME/pyvmm/debs``: a directory ``NAME_VERSION`` per unpacked package, and a file
``NAME.chosen`` that says which one a name meant last time, so that the next use needs no apt, no network. For a
package of another suite than this host's it is ``NAME@SUITE.chosen``.
"""

from __future__ import annotations

import email
import hashlib
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from vmm.images import suites
from vmm.images.host import FetchError, Progress, PullError, cache_root, locked, run, silent, tool, tried

# Debian's own meta packages, which contain no kernel but depend on exactly one that does.
_KERNEL_METAS = ("linux-image-amd64", "linux-image-cloud-amd64", "linux-image-rt-amd64")
# From Debian 14 on a kernel's package is empty, and these that it depends on have the files: `(= VERSION)` each.
_KERNEL_PARTS = re.compile(r"(linux-(?:binary|modules|base)-\d\S*) \(= ")
_OFFLINE = "is this host offline?"
_SPOOL = "/var/tmp"  # below it _apt may be let in; not below a home or a TMPDIR of root's


class Package(NamedTuple):
    """A Debian package unpacked in the cache."""

    name: str
    version: str
    tree: Path  # what would be installed at /


class _Offer(NamedTuple):
    """What apt offers under a name."""

    name: str
    version: str
    size: int  # of the .deb, bytes
    sha256: str
    depends: str


def package(name: str, *, suite: str | None = None, refresh: bool = False, progress: Progress = silent) -> Package:
    """Return a package unpacked in the cache, fetching apt's candidate version if no version is there.

    A kernel meta package (``linux-image-cloud-amd64``) stands for the kernel it depends on; a kernel that comes in
    several packages is unpacked as one. apt verifies what it fetches against the signed Release files of the sources
    this host trusts. Works as any user.

    :param name: name of a binary package, as apt knows it
    :param suite: a Debian suite, e.g. ``trixie``, which need not be this host's; None for what this host's sources have
    :param refresh: ask apt again, and fetch its candidate if that is another version than the cached one
    :raises PullError: apt is missing, knows no such package, or cannot reach its sources
    """
    return packages([name], suite=suite, refresh=refresh, progress=progress)[0]


def packages(
    names: Sequence[str], *, suite: str | None = None, refresh: bool = False, progress: Progress = silent
) -> list[Package]:
    """Return each as ``package`` does; the package lists of another suite are fetched only once.

    :raises PullError: as ``package``
    """
    for name in names:
        check_name(name)
    debs = cache_root() / "debs"
    keys = {name: name if suite is None else f"{name}@{suite}" for name in names}

    def known() -> dict[str, Package]:
        found = {} if refresh else {name: _chosen(debs, key) for name, key in keys.items()}
        return {name: cached for name, cached in found.items() if cached}

    if len(found := known()) < len(keys):
        debs.mkdir(parents=True, exist_ok=True)
        with locked(debs / "lock"):
            if len(found := known()) < len(keys):
                with _apt_of(suite, progress) as env:
                    for name in [name for name in keys if name not in found]:
                        found[name] = _get(name, debs, env, progress)
                        _choose(debs, keys[name], found[name])
    return [found[name] for name in names]


def _get(name: str, debs: Path, env: Mapping[str, str], progress: Progress) -> Package:
    offer = _candidate(name, env)
    tree = _tree(debs, offer.name, offer.version)
    if not tree.is_dir():
        parts = _KERNEL_PARTS.findall(offer.depends) if offer.name.startswith("linux-image-") else []
        _fetch([offer, *(_show(part, env) for part in parts)], tree, env, progress)
    return Package(offer.name, offer.version, tree)


def depends(name: str, *, suite: str | None = None) -> list[str]:
    """Names of the packages that a package depends on, the first of each choice.

    :raises PullError: as ``package``
    """
    check_name(name)
    with _apt_of(suite, silent) as env:
        return [part.split()[0].split(":")[0] for part in _show(name, env).depends.split(",") if part.strip()]


def kernel_of(tree: Path) -> tuple[Path, str]:
    """Return the bzImage in an unpacked kernel package, and its version as ``uname -r`` will print it.

    :raises PullError: the tree does not have exactly one kernel
    """
    found = {path: path.name.removeprefix("vmlinuz-") for path in tree.glob("boot/vmlinuz-*")}
    found |= {path: path.parent.name for path in modules_root(tree).glob("*/vmlinuz")}
    if len(found) != 1:
        raise PullError(f"{tree.name} holds {len(found)} kernels (vmlinuz), one is expected")
    return next(iter(found.items()))


def modules_root(tree: Path) -> Path:
    """The directory of an unpacked kernel package that is /lib/modules."""
    return place(tree, "lib/modules")


def place(tree: Path, path: str) -> Path:
    """Where an unpacked package has what is at ``/path``: below /usr, if it is of a Debian with merged directories."""
    merged = tree / "usr" / path
    return merged if merged.exists() else tree / path


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a Debian package, before a program takes it for something else.

    Source: Debian Policy Manual 5.6.7; ``:`` is for ``NAME:ARCHITECTURE``.
    :raises PullError: `name` cannot be one
    """
    if not name or not all(c.isascii() and (c.isalnum() or c in "+-.:") for c in name) or name[0] in "+-.:":
        raise PullError(f"{name!r} is not a package name")


def _apt_of(suite: str | None, progress: Progress) -> AbstractContextManager[dict[str, str]]:
    if suite is None:
        return nullcontext({})
    check_name(suite)
    return suites.apt_of(suite, progress)


def _tree(debs: Path, name: str, version: str) -> Path:
    return debs / f"{name}_{version.replace(':', '%3a')}"


def _chosen(debs: Path, name: str) -> Package | None:
    try:
        real, version = (debs / f"{name}.chosen").read_text().split()
    except (OSError, ValueError):
        return None
    tree = _tree(debs, real, version)
    return Package(real, version, tree) if tree.is_dir() else None


def _choose(debs: Path, name: str, chosen: Package) -> None:
    new = debs / f"{name}.chosen.new"
    new.write_text(f"{chosen.name} {chosen.version}\n")
    new.rename(debs / f"{name}.chosen")


def _candidate(name: str, env: Mapping[str, str]) -> _Offer:
    offer = _show(name, env)
    if name in _KERNEL_METAS:
        # "linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)", perhaps after other dependencies
        kernels = [d.split()[0] for d in offer.depends.split(",") if "linux-image-" in d]
        if len(kernels) != 1:
            raise PullError(f"apt's {name} depends on {len(kernels)} kernels, one is expected: name one yourself")
        offer = _show(kernels[0], env)
    return offer


def _show(name: str, env: Mapping[str, str]) -> _Offer:
    # `show`, unlike `policy`, prints nothing and fails for a package that is known but not to be had
    try:
        text = run(["apt-cache", "--no-all-versions", "show", name], env=env)
    except PullError as error:
        if "No packages found" not in str(error):
            raise
        if not _knows_any(env):
            raise PullError("apt has no package lists: run `apt-get update` as root") from None
        raise PullError(f"apt knows no package {name}: run `apt-get update` as root, or check the name") from None
    fields = email.message_from_string(text)
    if "Size" not in fields:  # installed by hand, in no list
        raise PullError(f"no apt source has {name}: run `apt-get update` as root")
    return _Offer(name, fields["Version"], int(fields["Size"]), fields["SHA256"] or "", fields["Depends"] or "")


def _knows_any(env: Mapping[str, str]) -> bool:
    # of what is only installed, and in no package list, apt knows no Size
    try:
        return "\nSize: " in run(["apt-cache", "show", "apt", "dpkg"], env=env)
    except PullError:
        return False


def _fetch(offers: list[_Offer], tree: Path, env: Mapping[str, str], progress: Progress) -> None:
    for left in tree.parent.glob(".*"):  # by who was killed: the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{offers[0].name}-", dir=tree.parent))
    try:
        for offer in offers:
            with _spool(work) as spool:
                tried(lambda offer=offer, spool=spool: _download(offer, spool, env, progress))  # type: ignore[misc]
                (deb,) = spool.glob("*.deb")
                shutil.copyfile(deb, work / "deb")  # a new file: who has made the other may have it open
                deb.unlink()
            _check(work / "deb", offer)
            progress(f"unpacking {offer.name}", None)
            run(["dpkg-deb", "--extract", str(work / "deb"), str(work / "tree")])
        run(["sync", "--file-system", str(work)])  # after a power failure, too, what has the name is whole
        (work / "tree").rename(tree)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _spool(work: Path) -> Iterator[Path]:
    # As root apt fetches as its user _apt, who needs a directory that it may write, with a way to it.
    try:
        user = pwd.getpwnam("_apt") if os.geteuid() == 0 and os.path.isdir(_SPOOL) else None
    except KeyError:
        user = None
    if user is None:
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="pyvmm-apt-", dir=_SPOOL) as spool:
        os.chown(spool, user.pw_uid, -1)
        yield Path(spool)


def _check(deb: Path, offer: _Offer) -> None:
    # apt has compared them; since then _apt could have written the file, and now it cannot
    with open(deb, "rb") as file:
        if offer.sha256 and hashlib.file_digest(file, "sha256").hexdigest() != offer.sha256:
            raise PullError(f"cannot fetch {offer.name}: Hash Sum mismatch")


def _download(offer: _Offer, spool: Path, env: Mapping[str, str], progress: Progress) -> None:
    step = f"{offer.name} {offer.version} ({offer.size / 1e6:.1f} MB)"
    status_r, status_w = os.pipe()
    argv = [tool("apt-get"), "download", f"{offer.name}={offer.version}", "--quiet=2"]
    for option in (f"APT::Status-Fd={status_w}", "APT::Get::AllowUnauthenticated=false", "Acquire::Retries=2"):
        argv += ["-o", option]
    progress(step, 0.0)
    with (
        tempfile.TemporaryFile("w+", errors="replace") as stderr,
        subprocess.Popen(
            argv,
            cwd=spool,
            env={**os.environ, **env, "LC_ALL": "C"},
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
    if apt.returncode or not list(spool.glob("*.deb")):
        why = reason(said)
        raise (FetchError if _OFFLINE in why else PullError)(f"cannot fetch {offer.name}: {why}")
    progress(step, 1.0)


def reason(said: Iterable[str]) -> str:
    """Return why apt failed, in one clause, from the lines it wrote to standard error."""
    errors = [line.removeprefix("E: ") for line in said if line.startswith("E: ")] or ["apt does not say why"]
    for error in errors:
        if "Can't find a source" in error or " 404 " in error:
            return "apt's package lists are old: run `apt-get update` as root"
        # Failed to fetch http://.../x.deb  Temporary failure resolving '...'
        if error.startswith("Failed to fetch "):
            return f"{_OFFLINE} apt says: {error.split(maxsplit=4)[-1]}"
    return errors[0]
