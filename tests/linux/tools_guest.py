# SPDX-License-Identifier: Apache-2.0
"""A guest full of tools, for tests and benches: a read-only root of Debian packages, a console to ask.

The guest obeys its console: a line is a shell command, and what answers is its output and ``@done STATUS``. So one
boot does many things, and several guests can be measured in turn, phase by phase. Made once, kept in the cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.linux.kernels import RELOAD, Kernel, debian
from vmm import Machine
from vmm.config.vm import VmConfig
from vmm.images import cache_root
from vmm.images.cpio import Archive
from vmm.images.guest import MODULES, OPTIONAL_MODULES
from vmm.images.host import Progress, PullError, need, run, silent
from vmm.images.initramfs import LOAD_MODULES, add_busybox, module_files

PACKAGES = (
    "bash", "dash", "coreutils", "grep", "sed", "findutils", "gzip", "tar", "diffutils", "mawk", "util-linux", "mount",
    "fio", "iperf3", "gcc", "libc6-dev", "make", "git", "xz-utils", "e2fsprogs", "iputils-ping", "iproute2", "ethtool",
    "stress-ng", "socat", "python3-minimal", "procps", "attr", "busybox-static",
)  # fmt: skip
LABEL = "pyvmm-tools"
CMDLINE = "console=ttyS0 quiet loglevel=1 reboot=k panic=-1 pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
# What can be loaded and unloaded by name.
DEVICE_MODULES = ("virtio_net", "virtio_rng", "virtio_balloon", "virtiofs", "vmw_vsock_virtio_transport", "overlay")
# The root has no maintainer scripts behind it: what those would have made, and nobody needs.
_LINKS = {
    "usr/bin/cc": "gcc",
    "usr/bin/awk": "mawk",
    "usr/lib/modules": "/run/modules",
    **{f"usr/sbin/{name}": "/bin/busybox" for name in ("modprobe", "rmmod", "insmod", "reboot")},
}
_LOADER = "ld-linux-x86-64.so.2"
_ON_THE_HOST = "iperf3"  # wanted at the other end, too
_LEFT_OUT = ("./usr/share/doc", "./usr/share/man", "./usr/share/locale", "./usr/share/info", "./usr/share/lintian")

INIT = (
    LOAD_MODULES
    + rf"""
for file in /sys/bus/virtio/devices/*/modalias; do
    [ -e "$file" ] && read -r alias <"$file" && modprobe -q "$alias"
done
tries=0
until device=$(findfs LABEL={LABEL}); do
    tries=$((tries + 1))
    [ $tries -gt 100 ] && echo "tools: there is no disk with the root file system" && exec reboot -f
    sleep 0.1
done
mount -t ext4 -o ro,noload "$device" /mnt
for dir in tmp run root var; do mount -t tmpfs tmpfs /mnt/$dir; done
mkdir -p /mnt/run/modules /mnt/run/own /mnt/var/tmp
cp -a /lib/modules/. /mnt/run/modules
[ -d /own ] && cp -a /own/. /mnt/run/own
for dir in proc sys; do mount --move /$dir /mnt/$dir; done
mount -t devtmpfs dev /mnt/dev
mkdir -p /mnt/dev/pts /mnt/dev/shm
mount -t devpts devpts /mnt/dev/pts
mount -t tmpfs shm /mnt/dev/shm
umount -l /dev
exec switch_root /mnt /bin/dash -c '
export PATH=/run/own:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
ip link set lo up
cd /root
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo -onlcr -icanon min 1 ixon
for file in /run/own/*.sh; do [ -e "$file" ] && . "$file"; done
echo "@ready"
while IFS= read -r line; do
    eval "$line"
    echo "
@done $?"
done
reboot -f'
"""
)


class ToolsImage(NamedTuple):
    """Paths of the guest's files; the root file system is a disk, to be given read-only."""

    kernel: Path  # bzImage, or r3's vmlinux
    initrd: Path
    rootfs: Path
    iperf3: tuple[str, ...]  # how to run it on this side


# Where the first report of a Linux begins that is in trouble.
_TROUBLE = re.compile(rb"(?<=\] )(?:BUG|Oops|WARNING|Kernel panic|general protection|[a-z -]+: [0-9a-f]{4} \[#1\])")


class GuestFailed(Exception):
    """The guest does not answer, or its VMM ended; carries the end of what it said."""


def tools_image(made: Kernel | None = None, progress: Progress = silent) -> ToolsImage:
    """Return the image, made the first time.

    :param made: its kernel; None: Debian's

    :raises PullError: a program is missing, or a package cannot be fetched
    """
    made = made or debian()
    home = Path(cache_root(), "tools")
    initrd = home / f"{_key(made.version, made.tree is None, INIT, RELOAD)}.cpio"
    rootfs = home / f"root-{_key(PACKAGES, _LINKS, _LEFT_OUT)}.ext4"
    home.mkdir(parents=True, exist_ok=True)
    if not initrd.exists():
        _replace(initrd, _initrd(made.tree))
    if not rootfs.exists():
        _make_root(rootfs, progress)
    here = rootfs.with_suffix(".host")
    iperf3 = (str(here / _LOADER), "--library-path", str(here), str(here / _ON_THE_HOST))
    return ToolsImage(Path(made.path), initrd, rootfs, iperf3)


def initrd_with(image: ToolsImage, place: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write an initrd that also brings `files` to /run/own, which is first in PATH; ``*.sh`` are read at the start.

    :param place: where to write it
    :returns: `place`
    """
    archive = Archive()
    for name, data in files.items():
        archive.file(f"own/{name}", data.encode() if isinstance(data, str) else data, 0o755)
    # The kernel unpacks one archive after the other.
    with place.open("wb") as out, image.initrd.open("rb") as base:
        shutil.copyfileobj(base, out)
        out.write(archive.to_bytes())
    return place


class Asked:
    """A tools guest's console: questions and answers. `_send` and `_more` are a kind of guest's own."""

    name: str

    def __init__(self) -> None:
        self.heard = b""
        self._at = 0

    def _send(self, data: bytes) -> None:
        raise NotImplementedError

    def _more(self, seconds: float) -> None:
        """Wait that long at most for more to be heard; raise GuestFailed where nothing more will come."""
        raise NotImplementedError

    def _why(self, what: str) -> str:
        # A dying kernel says why at first, and much afterwards.
        trouble = _TROUBLE.search(self.heard)
        first = b"" if trouble is None else self.heard[trouble.start() : trouble.start() + 3000] + b"\n...\n"
        return f"{self.name}: {what}\n{(first + self.heard[-1500:]).decode(errors='replace')}"

    def wait_ready(self, seconds: float = 120) -> None:
        """Wait until the guest obeys.

        :raises GuestFailed: the guest does not
        """
        self.until(b"@ready", seconds)

    def ask(self, line: str, seconds: float = 60) -> str:
        """Have the guest run a shell command, and return what it wrote.

        :raises GuestFailed: the command failed, or took longer than `seconds`
        """
        status, said = self.try_(line, seconds)
        if status:
            raise GuestFailed(f"{self.name}: {line}: status {status}: {said[-2000:]}")
        return said

    def try_(self, line: str, seconds: float = 60) -> tuple[int, str]:
        """Do as `ask`, and return the command's status and what it wrote."""
        self.tell(line)
        return self.answer(seconds)

    def tell(self, line: str) -> None:
        """Give the guest a command; `answer` waits for its end."""
        self._send(line.encode() + b"\n")

    def answer(self, seconds: float = 60) -> tuple[int, str]:
        """Wait for the end of the last command; return its status and what it wrote."""
        said = self.until(b"\n@done ", seconds)
        return int(self.until(b"\n", 10)), said.decode(errors="replace").replace("\r\n", "\n").strip("\n")

    def until(self, mark: bytes, seconds: float) -> bytes:
        """Wait for the guest to say `mark`; return what it said before."""
        end = time.monotonic() + seconds
        while (found := self.heard.find(mark, self._at)) < 0:
            left = end - time.monotonic()
            if left <= 0:
                raise GuestFailed(self._why(f"said nothing of {mark!r} for {seconds:g} s"))
            self._more(left)
        said = self.heard[self._at : found]
        self._at = found + len(mark)
        return said


class Guest(Asked):
    """A running VMM with the tools guest in it; a context manager that kills it.

    :param name: what to call it in errors
    :param command: the VMM's, with the guest's console on its standard input and output
    :param helpers: processes that belong to it: their CPU time counts, and they are killed with it
    """

    def __init__(self, name: str, command: Sequence[str], helpers: Sequence[subprocess.Popen[bytes]] = ()) -> None:
        super().__init__()
        self.name = name
        self.command = list(command)
        self.helpers = helpers
        self._stderr = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, bufsize=0
        )

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the VMM and its helpers."""
        for process in (self.process, *self.helpers):
            process.kill()
            process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._stderr):
            if pipe is not None:
                pipe.close()

    def cpu(self) -> float:
        """CPU seconds that the VMM has used up to now, with its helpers, and the kernel's vhost threads for it."""
        ours = {self.process.pid, *(each.pid for each in self.helpers)}
        ticks = 0
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                head, _, tail = entry.read_text().rpartition(")")
            except OSError:
                continue
            pid, _, comm = head.partition(" (")
            fields = tail.split()
            if {int(pid), int(fields[1])} & ours or comm == f"vhost-{self.process.pid}":
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(data)
        except BrokenPipeError:
            raise GuestFailed(self._why("ended")) from None

    def _more(self, seconds: float) -> None:
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], seconds)[0]:
            piece = os.read(self.process.stdout.fileno(), 65536)
            if not piece:
                raise GuestFailed(self._why(f"ended with {self.process.wait()}"))
            self.heard += piece

    def _why(self, what: str) -> str:
        self._stderr.seek(0)
        errors = self._stderr.read()[-1500:].decode(errors="replace")
        return f"{super()._why(f'{what}: {shlex.join(self.command)}')}\n{errors}"


class MachineGuest(Asked):
    """The tools guest in a ``vmm.Machine`` of this process, whose devices can be spoken to; a context manager.

    :param config: the Machine's; the console and the command line are this class's own. Or a copy of such a machine
    """

    def __init__(self, name: str, config: VmConfig | Machine) -> None:
        super().__init__()
        self.name = name
        self._news = threading.Condition()
        if isinstance(config, Machine):
            self.vm = config
        else:
            config.console, config.cmdline = "none", CMDLINE
            self.vm = Machine(config)
        self.vm.on_console(self._hear)
        self.vm.start()

    def __enter__(self) -> MachineGuest:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the machine."""
        self.vm.close()

    def _hear(self, data: bytes) -> None:
        with self._news:
            self.heard += data
            self._news.notify_all()

    def _send(self, data: bytes) -> None:
        self.vm.serial.feed(data)

    def _more(self, seconds: float) -> None:
        with self._news:
            self._news.wait(min(seconds, 0.5))
        if stop := self.vm.wait(0):
            raise GuestFailed(self._why(f"the machine ended: {stop}"))


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_bytes(data)
    new.rename(path)


def _initrd(kernel: Path | None) -> bytes:
    archive = Archive()
    for directory in ("proc", "sys", "dev", "run", "mnt", "tmp", "root", "etc"):
        archive.directory(directory)
    archive.console()
    add_busybox(archive)
    archive.file("init", INIT.encode(), 0o755)
    archive.file("own/reload", RELOAD.encode(), 0o755)
    files = {"lib/modules/order": b""}
    if kernel is not None:
        files = module_files(kernel, MODULES, optional=OPTIONAL_MODULES, on_demand=DEVICE_MODULES)
    for path, data in files.items():
        archive.file(path, data)
    return archive.to_bytes()


def _make_root(image: Path, progress: Progress) -> None:
    need("apt-get", "dpkg-deb", "mke2fs", "tar")
    with tempfile.TemporaryDirectory(prefix=".tools-", dir=image.parent) as name:
        work, tree = Path(name), Path(name, "tree")
        # As usrmerge leaves a system: packages of bookworm still bring files for both names.
        for directory in ("bin", "sbin", "lib", "lib64"):
            (tree / "usr" / directory).mkdir(parents=True)
            (tree / directory).symlink_to(f"usr/{directory}")
        wanted = _with_dependencies()
        progress(f"{len(wanted)} packages for the tools guest", None)
        # As root apt would drop to user _apt, who may not write here, and warn about it.
        run(["apt-get", "download", "--quiet=2", "-o", "APT::Sandbox::User=root", *wanted], cwd=work)
        progress("making the root file system", None)
        tar = ["tar", "--extract", "--keep-directory-symlink", "--no-same-owner", "--directory", str(tree)]
        tar += [f"--exclude={path}" for path in _LEFT_OUT]
        for deb in sorted(work.glob("*.deb")):
            with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as files:
                subprocess.run(tar, stdin=files.stdout, check=True)
            if files.returncode:
                raise PullError(f"cannot unpack {deb.name}")
            deb.unlink()
        for directory in ("proc", "sys", "dev", "run", "tmp", "root", "var", "mnt", "mnt/a", "mnt/b"):
            (tree / directory).mkdir(exist_ok=True)
        (tree / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
        (tree / "etc/group").write_text("root:x:0:\ntty:x:5:\nnogroup:x:65534:\n")
        (tree / "etc/mtab").symlink_to("/proc/self/mounts")
        for link, target in _LINKS.items():
            (tree / link).unlink(missing_ok=True)
            (tree / link).symlink_to(target)
        used = sum(path.lstat().st_size + 4096 for path in tree.rglob("*") if not path.is_symlink())
        new = work / "root.ext4"
        with new.open("wb") as file:
            file.truncate((used * 21 // 20 + (32 << 20)) & -(1 << 20))
        command = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", LABEL]
        run([*command, "-E", "root_owner=0:0,lazy_itable_init=0", "-d", str(tree), str(new)])
        for old in image.parent.glob("root-*"):
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        _for_the_host(tree, image.with_suffix(".host"))
        new.rename(image)


def _for_the_host(tree: Path, place: Path) -> None:
    # The program, its libraries and their loader, in one directory: this host may have others, or none.
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    program = tree / "usr/bin" / _ON_THE_HOST
    listed = run([str(libraries / _LOADER), "--library-path", str(libraries), "--list", str(program)])
    needed = [Path(word) for word in listed.split() if word.startswith(str(libraries))]
    place.mkdir(exist_ok=True)
    for path in (program, libraries / _LOADER, *needed):
        shutil.copy(path, place)


def _with_dependencies() -> list[str]:
    # All that apt would install on a machine that has nothing, as NAME=VERSION.
    options = ("Dir::State::status=/dev/null", "Debug::NoLocking=true", "APT::Install-Recommends=false")
    command = ["apt-get", "--simulate"]
    for option in options:
        command += ["-o", option]
    found = []
    for line in run([*command, "install", *PACKAGES]).splitlines():
        if line.startswith("Inst "):  # Inst NAME (VERSION SOURCE...)
            found.append(f"{line.split()[1]}={line.split()[2].removeprefix('(')}")
    if not found:
        raise PullError("apt knows none of the tools guest's packages: run `apt-get update` as root")
    return found


def probe() -> bytes:
    """Compile probe.c: a static program, for the guest and for the host.

    :raises PullError: there is no C compiler
    """
    need("gcc")
    with tempfile.TemporaryDirectory() as name:
        out = Path(name, "probe")
        source = Path(__file__).with_name("probe.c")
        run(["gcc", "-O2", "-static", "-pthread", "-o", str(out), str(source)])
        return out.read_bytes()
