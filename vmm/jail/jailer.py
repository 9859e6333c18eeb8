# SPDX-License-Identifier: Apache-2.0
"""The jail around this process: its own root directory, namespaces, cgroups, limits, and no privileges.

Firecracker's jailer copies a static program into the jail and starts it there. An interpreter cannot be copied, so the
order is reversed here: the process imports everything that it will ever need, and then enters the jail.

Source: Firecracker 1.12's docs/jailer.md for names, layout and defaults; Linux pivot_root(2), user_namespaces(7),
capabilities(7), cgroups(7), proc(5).
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys

from vmm.errors import ConfigError, HostError, host_errors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    _T = TypeVar("_T")

CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWPID = 0x0002_0000, 0x4000_0000, 0x2000_0000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_SLAVE = 1, 2, 4, 8, 0x1000, 0x4000, 0x8_0000
MNT_DETACH = 2
PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 28, 38, 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
# SECBIT_NOROOT, SECBIT_NO_CAP_AMBIENT_RAISE, no KEEP_CAPS, no NO_SETUID_FIXUP, all locked: uid 0 is nobody special.
SECURE_BITS = 0xEB
CAPABILITY_VERSION_3 = 0x2008_0522
CAP_DAC_OVERRIDE = 1 << 1
SYS_PIVOT_ROOT = 155
DEFAULT_NO_FILE = 2048
# Directories of the jail, and its devices: path, major, minor.
FOLDERS = ("/", "/dev", "/dev/net", "/run")
DEVICES = (("/dev/net/tun", 10, 200), ("/dev/kvm", 10, 232), ("/dev/urandom", 1, 9))
# Without a fixed number, and not on every host: for memory from a page fault handler.
USERFAULTFD = "/dev/userfaultfd"
CGROUP_ROOT = "/sys/fs/cgroup"


class Jail:
    """What a jail is to be, checked; ``enter`` goes into it.

    :param exec_file: the program's path; its last part names the jail's directory and its pid file
    :param jail_id: 1 to 64 letters, digits and hyphens
    :param chroot_base_dir: directory of all jails
    :param netns: path of a network namespace to be in
    :param cgroups: ``FILE=VALUE``, such as ``cpu.shares=10``
    :param cgroup_version: 1 or 2
    :param parent_cgroup: relative path; the program's name if None
    :param resource_limits: ``fsize=BYTES`` and ``no-file=NUMBER``
    :param daemonize: run in a session of its own; ``report_start`` closes its standard streams, and lets the process
        end that was started
    :param new_pid_ns: run as the first process of a new pid namespace
    :raises ConfigError: something of it cannot be
    """

    def __init__(
        self,
        exec_file: str,
        jail_id: str,
        uid: int,
        gid: int,
        *,
        chroot_base_dir: str = "/srv/jailer",
        netns: str | None = None,
        cgroups: Sequence[str] = (),
        cgroup_version: int = 1,
        parent_cgroup: str | None = None,
        resource_limits: Sequence[str] = (),
        daemonize: bool = False,
        new_pid_ns: bool = False,
    ) -> None:
        self.program = os.path.basename(exec_file)
        self.id = jail_id
        self.uid, self.gid = uid, gid
        self.netns = netns
        self.daemonize, self.new_pid_ns = daemonize, new_pid_ns
        self._word = self._null = -1
        if not os.path.isdir(chroot_base_dir):
            raise ConfigError("--chroot-base-dir", chroot_base_dir, "must be an existing directory")
        self.root = os.path.join(os.path.realpath(chroot_base_dir), self.program, jail_id, "root")
        self.limits = _limits(resource_limits)
        parent = self.program if parent_cgroup is None else parent_cgroup
        if parent.startswith("/") or any(part in ("", ".", "..") for part in parent.split("/")):
            raise ConfigError("--parent-cgroup", parent, "must be a relative path without '.' or '..'")
        if cgroup_version not in (1, 2):
            raise ConfigError("--cgroup-version", cgroup_version, "must be 1 or 2")
        self.cgroups = _Cgroups(cgroup_version, parent, jail_id, cgroups, parent_cgroup is not None)

    def enter(self) -> None:
        """Go into the jail, for good; what this process needs later it has to have imported before.

        With ``daemonize`` or ``new_pid_ns`` the process that returns is a child, and the one that called is gone.

        :raises HostError: the host refuses
        """
        _reach("make the jail", self.root, os.makedirs, self.root, exist_ok=True)
        if self.netns is not None:
            self._join_network(self.netns)
        self._set_limits()
        self.cgroups.enter()
        null = _open(os.devnull, os.O_RDWR) if self.daemonize else -1
        userfaultfd = _device_number(USERFAULTFD)
        self._pivot()
        self._furnish(userfaultfd)
        if self.daemonize:
            self._word = _daemonize(null)
            self._null = null
        self._be_written_down()
        _mount_proc()
        drop_privileges(self.uid, self.gid)

    def report_start(self, status: int = 0) -> None:
        """Tell who started us how the start went, and be without standard streams from here on; once, if daemonized.

        :param status: exit status of the jailer
        """
        if self._word >= 0:
            os.dup2(self._null, 1)
            os.dup2(self._null, 2)
            os.close(self._null)
            os.write(self._word, bytes([status]))
            os.close(self._word)
            self._word = -1

    def _join_network(self, path: str) -> None:
        fd = _open(path, os.O_RDONLY)
        try:
            call("setns", fd, CLONE_NEWNET, path=path)
        finally:
            os.close(fd)

    def _set_limits(self) -> None:
        import resource

        for what, value in self.limits.items():
            limit = {"fsize": resource.RLIMIT_FSIZE, "no-file": resource.RLIMIT_NOFILE}[what]
            most = resource.RLIM_INFINITY if value >> 63 else value
            _reach("setrlimit", what, resource.setrlimit, limit, (most, most))

    def _pivot(self) -> None:
        # What the host mounts below the jail's root later comes in, too: runtimes hot-plug drives so. Nothing goes out.
        call("unshare", CLONE_NEWNS)
        mount(None, "/", None, MS_SLAVE | MS_REC)
        mount(self.root, self.root, None, MS_BIND | MS_REC)
        _reach("chdir", self.root, os.chdir, self.root)
        _reach("make", "old_root", os.mkdir, "old_root", 0o700)
        call("syscall", SYS_PIVOT_ROOT, b".", b"old_root", path=self.root)
        os.chdir("/")
        call("umount2", b"old_root", MNT_DETACH)
        os.rmdir("old_root")
        os.chroot(".")

    def _furnish(self, userfaultfd: int | None) -> None:
        for folder in FOLDERS:
            _reach("make", folder, os.makedirs, folder, exist_ok=True)
            os.chmod(folder, 0o700)
            os.chown(folder, self.uid, self.gid)
        devices = {path: os.makedev(major, minor) for path, major, minor in DEVICES}
        if userfaultfd is not None:
            devices[USERFAULTFD] = userfaultfd
        for path, number in devices.items():
            _reach("mknod", path, os.mknod, path, stat.S_IFCHR | 0o600, number)
            os.chown(path, self.uid, self.gid)

    def _be_written_down(self) -> None:
        # The pid as whoever started us sees it; the file is whole as soon as it is there.
        path = f"/{self.program}.pid"
        new = f"{path}.new"
        file = _open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        pid = os.getpid()
        if self.new_pid_ns:
            call("unshare", CLONE_NEWPID)
            written, writes = os.pipe2(os.O_CLOEXEC)
            pid = os.fork()
            if not pid:
                os.close(writes)
                word = os.read(written, 1)
                os.close(written)
                os.close(file)
                if not word:
                    os._exit(1)
                return
        os.write(file, str(pid).encode())
        os.close(file)
        _reach("make", path, os.link, new, path)
        os.unlink(new)
        if self.new_pid_ns:
            os.write(writes, b"\0")
            os._exit(0)


def close_what_was_inherited() -> None:
    """Close every descriptor but the standard ones, and forget the environment, in /proc/self/environ, too."""
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    strings = ctypes.POINTER(ctypes.c_void_p).in_dll(_libc, "environ")
    index = 0
    while address := strings[index]:
        ctypes.memset(address, 0, len(ctypes.string_at(address)))
        index += 1
    _libc.clearenv()
    os.environ.clear()


def _limits(given: Sequence[str]) -> dict[str, int]:
    limits = {"no-file": DEFAULT_NO_FILE}
    for word in given:
        what, equals, value = word.partition("=")
        if what not in ("fsize", "no-file") or not equals:
            raise ConfigError("--resource-limit", word, "must be fsize=BYTES or no-file=NUMBER")
        if not (value.isascii() and value.isdigit() and len(value) < 21 and int(value) < 1 << 64):
            raise ConfigError("--resource-limit", word, "must be a number below 2^64")
        limits[what] = int(value)
    return limits


class _Cgroups:
    # The cgroups of one jail: <mount point>/<parent>/<id>, in the hierarchy of each controller that is named
    # (version 1) or in the one there is (version 2).
    def __init__(self, version: int, parent: str, jail_id: str, words: Sequence[str], parent_given: bool) -> None:
        self.version = version
        self.parent = parent
        self.id = jail_id
        self.settings: list[tuple[str, str, str]] = []  # hierarchy, file, value
        self.join_parent = ""
        for word in words:
            file, _, value = word.partition("=")
            controller, dot, rest = file.partition(".")
            if not (controller and dot and rest and value) or "/" in file or "=" in value:
                raise ConfigError("--cgroup", word, "must be FILE=VALUE, e.g. cpu.shares=10")
            self.settings.append((_hierarchy(version, controller, word), file, value))
        if version == 2 and parent_given and not words:
            self.join_parent = os.path.join(_hierarchy(2, "", parent), parent)

    def enter(self) -> None:
        if self.join_parent:
            # Firecracker's rule: with a parent and nothing to set, the process joins the parent itself.
            if not os.path.isdir(self.join_parent):
                raise ConfigError("--parent-cgroup", self.parent, f"is not a cgroup below {CGROUP_ROOT}")
            _write(os.path.join(self.join_parent, "cgroup.procs"), str(os.getpid()))
        joined = set()
        for hierarchy, file, value in self.settings:
            path = os.path.join(hierarchy, self.parent, self.id)
            _reach("make cgroup", path, os.makedirs, path, exist_ok=True)
            if self.version == 1:
                _inherit(hierarchy, path, file)
            elif (controller := file.partition(".")[0]) != "cgroup":  # whose files every cgroup has
                self._delegate(hierarchy, controller)
            _write(os.path.join(path, file), value)
            joined.add(path)
        for path in sorted(joined):
            _write(os.path.join(path, "tasks" if self.version == 1 else "cgroup.procs"), str(os.getpid()))

    def _delegate(self, hierarchy: str, controller: str) -> None:
        # Every cgroup above has to hand the controller down.
        path = hierarchy
        for part in ("", *self.parent.split("/")):
            path = os.path.join(path, part)
            _write(os.path.join(path, "cgroup.subtree_control"), f"+{controller}")


def _hierarchy(version: int, controller: str, word: str) -> str:
    with open("/proc/mounts") as mounts:
        for line in mounts:
            _, path, kind, options, *_ = line.split()
            if version == 2 and kind == "cgroup2":
                if controller:
                    with open(os.path.join(path, "cgroup.controllers")) as file:
                        if controller not in ("cgroup", *file.read().split()):
                            raise ConfigError("--cgroup", word, f"controller {controller} is not in {path}")
                return path
            if version == 1 and kind == "cgroup" and controller in options.split(","):
                return path
    where = "cgroup2 is not mounted" if version == 2 else f"controller {controller} is not mounted as cgroup version 1"
    raise ConfigError("--cgroup", word, where)


def _inherit(hierarchy: str, path: str, file: str) -> None:
    # A new cpuset has no CPUs and no memory: it takes its parent's, from the top.
    names = [file] if not file.startswith("cpuset.") else ["cpuset.cpus", "cpuset.mems"]
    for name in names:
        if not os.path.exists(os.path.join(path, name)):
            raise ConfigError("--cgroup", file, f"is not a file of {hierarchy}")
        if not name.startswith("cpuset."):
            continue
        place = hierarchy
        for part in os.path.relpath(path, hierarchy).split("/"):
            with open(os.path.join(place, name)) as file_above:
                above = file_above.read().strip()
            place = os.path.join(place, part)
            with open(os.path.join(place, name)) as own:
                if not own.read().strip():
                    _write(os.path.join(place, name), above)


def _write(path: str, text: str) -> None:
    fd = _open(path, os.O_WRONLY)
    try:
        _reach(f"write {text} to", path, os.write, fd, text.encode())
    finally:
        os.close(fd)


def _device_number(path: str) -> int | None:
    # None: this host has it not.
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_rdev if stat.S_ISCHR(found.st_mode) else None


def _daemonize(null: int) -> int:
    # Twice: after the first we lead no process group, as setsid wants it; after the second we can get no terminal. The
    # process that was started waits for a word of how it went, which goes to what is returned.
    told, word = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(word)
        status = os.read(told, 1)
        os._exit(status[0] if status else 1)
    os.close(told)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.dup2(null, 0)
    return word


def _mount_proc() -> None:
    # A share reaches its files by /proc/self/fd, and no other way is as safe. Of the host's it shows nothing but the
    # jail's own processes: no /proc/sys, and read-only.
    os.makedirs("/proc", exist_ok=True)
    try:
        mount("proc", "/proc", "proc", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "hidepid=ptraceable,subset=pid")
    except HostError as error:
        print(f"pyvmm jailer: no /proc in the jail, so no shares (needs Linux 5.8): {error}", file=sys.stderr)


def drop_privileges(uid: int, gid: int) -> None:
    """Be this user in this group, without capabilities and for good; root keeps CAP_DAC_OVERRIDE.

    :raises HostError: the kernel refused it
    """
    call("prctl", PR_SET_SECUREBITS, SECURE_BITS, 0, 0, 0)
    capability = 0
    while not _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
        capability += 1  # up to the last that this kernel has
    call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    with host_errors(f"become {uid}:{gid}"):
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3)  # and 0: this process
    # A jail of root's opens what root opens: a file of another user's, a FIFO of mode 0, as Kata makes them.
    kept = CAP_DAC_OVERRIDE if uid == 0 else 0
    call("capset", header, (ctypes.c_uint32 * 6)(kept, kept))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


_libc = ctypes.CDLL(None, use_errno=True)


def _open(path: str, flags: int) -> int:
    return _reach("open", path, os.open, path, flags | os.O_CLOEXEC, 0o644)


def _reach(what: str, path: str, do: Callable[..., _T], *arguments: Any, **options: Any) -> _T:
    try:
        return do(*arguments, **options)
    except (OSError, ValueError) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise HostError(number or 22, what, path) from None


def call(name: str, *arguments: object, path: str | None = None) -> None:
    """Call the C library's `name`, which gives a negative number if it fails.

    :param path: the file's path, for the error
    :raises HostError: the function failed
    """
    if getattr(_libc, name)(*arguments) < 0:
        raise HostError(ctypes.get_errno(), "pivot_root" if name == "syscall" else name, path)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """See mount(2).

    :raises HostError: the mount failed
    """
    *words, data = (None if word is None else word.encode() for word in (source, target, kind, options))
    call("mount", *words, ctypes.c_ulong(flags), data, path=target)
