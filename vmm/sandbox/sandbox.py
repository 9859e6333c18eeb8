# SPDX-License-Identifier: Apache-2.0
"""A sandbox: a VM that runs commands of an image."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
import time

from vmm import threads
from vmm.config.devices import DriveConfig, NetConfig, NetworkPolicy, ShareConfig, VsockConfig
from vmm.config.option import check_call
from vmm.config.vm import VmConfig
from vmm.errors import ConfigError, SnapshotError, line
from vmm.machine.machine import Machine
from vmm.machine.snapshot import Image as Frozen
from vmm.machine.snapshot import child_of
from vmm.machine.snapshot_file import ABOUT, save
from vmm.sandbox import guest
from vmm.sandbox.channel import PROTOCOL, Deadline, Link
from vmm.sandbox.errors import CommandTimeout, SandboxError, SandboxGone
from vmm.sandbox.process import NO_DIRECTORY, check_env
from vmm.sandbox.registry import Place
from vmm.sandbox.session import Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from vmm.exits import Exit
    from vmm.images import Image

    Mount = str | os.PathLike[str] | tuple[str | os.PathLike[str], str]

_CONSOLE_KEPT = 4096  # bytes
_SCRATCH = ("/tmp", "/var/tmp", "/run")


class Sandbox(Session):
    """A VM of an image, up and ready for commands; a context manager.

    :param image: the name of a pulled image, or one of ``vmm.images``
    :param memory: bytes, or a size such as ``"512M"``, at most what the host has; written files are in it, too
    :param cpus: vCPUs
    :param env: environment of every command, added to the image's
    :param cwd: directory of every command, made if it is missing; None: the container image's, or the user's home
        directory
    :param user: user of every command: ``NAME``, ``UID``, ``USER:GROUP``; None: the image's, or root
    :param mounts: directories of the host, by their path in the guest: a path, or ``(path, "ro")``
    :param network: ``"none"``; ``"user"``: by passt, everything that this host reaches but its loopback; a
        :class:`vmm.NetworkPolicy`: by passt, only what it allows
    :param pcap: a file, made anew, that gets every frame of the network, for ``tcpdump -r``; copies are not recorded
    :param timeout: seconds after which the sandbox ends, whatever it is doing; None: no limit
    :param name: name for ``pyvmm exec``, and the guest's hostname; None: a new one
    :param read_only: only /tmp, /var/tmp, /run, the image's volumes and mounts can be written; root of the guest can
        undo it
    :param room: the part of the memory that files may take, as for tmpfs: ``"75%"`` or ``"256M"``
    :param kernel: path of a kernel with all drivers built in; None: the image's
    :param boot_timeout: seconds within which it must be ready
    :raises ConfigError: an invalid value, or an image that was not pulled
    :raises SandboxError: the sandbox did not start; the message has the last lines of its console

    The image is never changed. What the guest writes is in its memory, and gone with it.

    ``machine`` (:class:`vmm.Machine`) is the VM itself, ``files`` (:class:`vmm.sandbox.Files`) its files, ``commands``
    has E2B's names. ``console`` is the end of what the serial port said.
    """

    machine: Machine

    def __init__(
        self,
        image: str | Image = "debian",
        *,
        memory: int | str = "512M",
        cpus: int = 1,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        mounts: Mapping[str, Mount] | None = None,
        network: str | NetworkPolicy = "none",
        pcap: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
        name: str | None = None,
        read_only: bool = False,
        room: str = "75%",
        kernel: str | None = None,
        boot_timeout: float = 60,
    ) -> None:
        check_call("Sandbox", Sandbox.__init__, {**locals(), "mounts": None})
        policy = network if isinstance(network, NetworkPolicy) else None
        if policy is None and network not in ("none", "user"):
            raise ConfigError("network", network, "must be none, user or a NetworkPolicy")
        if pcap is not None and network == "none":
            raise ConfigError("pcap", os.fspath(pcap), "needs a network, such as user")
        if not re.fullmatch(r"[1-9][0-9]{,11}[kKmMgG%]?", room):  # 0 would be no limit
            raise ConfigError("room", room, "must be a size, more than 0, e.g. 75% or 256M")
        if cwd is not None and not cwd.startswith("/"):
            raise ConfigError("cwd", cwd, "must be an absolute path of the guest")
        check_env(env or {})
        found = guest.find_image(image)
        shares = _shares(mounts or {})
        about = guest.commands_of(found.config, env or {}, cwd, user)
        self._begin({"image": found.name, **about}, name, timeout)
        try:
            kernel, initrd = guest.kernel_and_initrd(found, kernel, self._place.path)
            config = VmConfig(
                kernel, initrd=initrd, memory=memory, cpus=cpus,
                cmdline=f"{guest.CMDLINE} pyvmm.layers={len(found.disks)} pyvmm.room={room} pyvmm.name={self.name}",
                drives=[DriveConfig(disk, read_only=True) for disk in found.disks],
                shares=[share for _, share in shares], entropy=True, vsock=VsockConfig(3, self._place.socket),
                nets=[NetConfig(mode="user", policy=policy, pcap=pcap)] if network != "none" else (),
                append=guest.network_words(policy) if network != "none" else "",
            )  # fmt: skip
            # The kernel writes a 64th of its memory before anything runs: of 1000G that took a minute.
            if config.memory > (most := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
                raise ConfigError("memory", memory, f"must be at most {most >> 20}M, the memory of this host")
            self._start(Machine(config))
            self._ready(boot_timeout)
            os.unlink(initrd)
            for path in (found.config.working_dir, *found.config.volumes) if found.config else ():
                self._ask(Deadline(30), "mkdir", path=path, parents=True)
            for path, share in shares:
                self._ask(Deadline(30), "mount", tag=share.tag, path=path, ro=share.read_only)
            if cwd is not None:
                with contextlib.suppress(OSError):  # as of a read-only mount; the check below says what is wrong
                    self.files.make_dir(cwd)
            if read_only:
                self.make_read_only(*_SCRATCH, *(found.config.volumes if found.config else ()))
            if cwd is not None or user is not None:
                self._check_commands(cwd or "/", about["user"])
        except BaseException:
            self.close()
            raise

    def _begin(self, about: dict[str, Any], name: str | None, timeout: float | None) -> None:
        _check_timeout(timeout)
        self._alarm = threading.Condition()  # guards the next two, and tells of changes
        self._closed = False
        self._end: float | None = None  # by time.monotonic(), of its time limit
        self._watched = False
        self._console = bytearray()
        about = {**about, "timeout": timeout}
        self._place = Place(name, {**about, "began": time.time()})
        self.name = self._place.name
        super().__init__(Link(self._place.socket), about)
        self._timeout = timeout

    def _start(self, machine: Machine, port: int = 0) -> None:
        # In a copy, the agent waits already at the other end of a connection on which nothing was under way.
        self.machine = machine
        machine.on_exit(self._ended)
        machine.on_console(self._heard)
        if port and machine.vsock is not None and (stream := machine.vsock.keep(port)) is not None:
            self._link.adopt(stream, port)
        machine.start()

    def _ready(self, boot_timeout: float) -> None:
        if self._timeout is not None:
            self.set_timeout(self._timeout)
        try:
            self._wake(Deadline(boot_timeout))
        except (SandboxGone, CommandTimeout) as error:
            said = self.console.strip().splitlines()[-1:]
            raise SandboxError(
                f"the sandbox did not come up: {error}" + "".join(f": {line(s)}" for s in said)
            ) from None

    def _wake(self, deadline: Deadline) -> None:
        # A copy's driver hears that the connections of before are gone, and may close one that has just begun, too.
        while True:
            try:
                self._ask(deadline, "wake", time=time.time_ns(), name=self.name, random=os.urandom(64).hex())
                return
            except SandboxGone:
                if self._link.why:
                    raise

    def _check_commands(self, cwd: str, user: str | int | None) -> None:
        # What the guest does not have is told now, not by the first command. "/.": whether it can be entered, too.
        try:
            self.files.stat(f"{cwd}/.", user=user)
        except OSError as error:
            why = NO_DIRECTORY.get(error.errno or 0, str(error.strerror))
            raise ConfigError("cwd", cwd, why) from None

    def set_timeout(self, timeout: float | None) -> None:
        """Replace the time limit: end the sandbox in this many seconds from now; None: no limit.

        :raises ConfigError: not more than 0
        :raises SandboxGone: the sandbox has ended
        """
        check_call("Sandbox.set_timeout", Sandbox.set_timeout, locals())
        _check_timeout(timeout)
        self._link.must_run()
        with self._alarm:
            self._timeout = timeout
            self._end = None if timeout is None else time.monotonic() + timeout
            self._alarm.notify()
            if not self._watched and timeout is not None:
                threads.spawn(None, f"time limit of {self.name}", self._limit)
                self._watched = True

    @property
    def time_left(self) -> float | None:
        """Seconds until its time limit; None: no limit."""
        with self._alarm:
            return None if self._end is None else max(0.0, self._end - time.monotonic())

    def _limit(self) -> None:
        with self._alarm:
            while not self._closed:
                left = None if self._end is None else self._end - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._alarm.wait(left if left is None or left < threading.TIMEOUT_MAX else None)
            else:
                return
            why = f"the sandbox has ended: its time limit of {self._timeout:g} s is over"
        self._link.fail(why)
        self.machine.stop()

    def _ended(self, stop: Exit) -> None:
        self._link.fail(f"the sandbox has ended: {stop}")
        self._place.tell(self._link.why)
        # Programs of other processes are connected, too, and `close` may come late or never.
        if (vsock := self.machine.vsock) is not None:
            transport = next(each for each in self.machine.virtio if each.device is vsock)
            with transport.lock:
                transport.reset()
            vsock.listener.close()

    def _heard(self, data: bytes) -> None:
        self._console += data
        del self._console[:-_CONSOLE_KEPT]

    @property
    def console(self) -> str:
        """The last output of the serial port: the kernel's, and the agent's before it was ready."""
        return self._console.decode(errors="replace")

    # The VM

    @property
    def network_counters(self) -> dict[str, int]:
        """Counters by name: frames, bytes, and what a policy allowed and dropped. Empty without a network."""
        return next((net.stats for net in self.machine.nets.values()), {})

    def pause(self) -> None:
        """Hold the guest. Calls wait until ``resume``, or until their time limit.

        :raises SandboxGone: the sandbox has ended
        """
        self._link.must_run()
        self.machine.pause()

    def resume(self) -> None:
        """Let the guest go on.

        :raises SandboxGone: the sandbox has ended
        """
        self._link.must_run()
        self.machine.resume()

    def fork(self, count: int = 1, *, timeout: float | None = None) -> list[Sandbox]:
        """Running copies of this sandbox, which goes on, too. They share its memory copy-on-write.

        :param timeout: seconds after which each copy ends; None: the limit that this one was given
        :raises ConfigError: a negative `count`, or a `timeout` that is not more than 0
        :raises SandboxGone: the sandbox has ended
        :raises SnapshotError: the guest has a file of a mount open that it has removed

        Each copy has its own name, random numbers and clock. Running commands end in a copy, unless they were started
        with `keep`, or are in the background.
        """
        check_call("Sandbox.fork", Sandbox.fork, locals())
        if count < 0:
            raise ConfigError("count", count, "must be 0 or more")
        _check_timeout(timeout)
        self._link.must_run()
        copies: list[Sandbox] = []

        def change(config: VmConfig, number: int) -> VmConfig:
            copy = Sandbox.__new__(Sandbox)
            copy._begin(self._about, None, self._timeout if timeout is None else timeout)
            copies.append(copy)
            return config.replaced(vsock=VsockConfig(3, copy._place.socket))

        try:
            with self._link.resting() as port:
                make = child_of(self.machine, change)
                for number in range(count):
                    machine = make(number)
                    assert isinstance(machine, Machine)  # none is in a process of its own
                    copies[number]._start(machine, port)
            for copy in copies:
                copy._ready(30)
        except BaseException:
            for copy in copies:
                copy.close()
            raise
        return copies

    def make_read_only(self, *writable: str) -> None:
        """Let files be written only in these directories, in mounts and in /dev; root of the guest can undo it.

        :param writable: paths of directories, which are made if they are missing
        :raises SandboxError: the guest's kernel refused it
        """
        self._ask(Deadline(30), "read-only", writable=writable)

    def snapshot(self, directory: str) -> None:
        """Write a snapshot of this sandbox, which goes on. It does not contain the image's disks.

        A snapshot that is in `directory` is replaced in one step.

        :raises ConfigError: `directory` exists and is not a snapshot
        :raises HostError: the snapshot cannot be written; a previous one is unchanged
        :raises SnapshotError: the sandbox cannot be saved
        :raises SandboxGone: the sandbox has ended
        """
        self._link.must_run()
        with self._link.resting() as port:
            frozen = self.machine.freeze()
        about = {**self._about, "timeout": self._timeout, "connection": port, "protocol": PROTOCOL}
        save(frozen, directory, about=json.dumps(about).encode())

    @classmethod
    def restore(
        cls, directory: str, *, name: str | None = None, timeout: float | None = None, record: bool = False
    ) -> Sandbox:
        """A running sandbox, made from a ``snapshot``.

        :param timeout: seconds after which it ends; None: the limit that the original was given
        :param record: note which memory it touches, for ``sandbox.machine.record_touched(directory)``; it is slower
        :raises SnapshotError: this is not a snapshot of a sandbox, or it is damaged
        """
        try:
            with open(os.path.join(directory, ABOUT), encoding="utf-8") as file:
                about = json.load(file)
            _check_timeout(about["timeout"])
            limit = about["timeout"] if timeout is None else timeout
            dict(about["env"]), about["image"], about["cwd"], about["user"]
            port, protocol = int(about.pop("connection", None) or 0), about.pop("protocol", 1)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise SnapshotError(directory, "is not a snapshot of a sandbox") from None
        if protocol != PROTOCOL:
            raise SnapshotError(directory, f"its agent speaks protocol {protocol}, this pyvmm speaks {PROTOCOL}")
        frozen = Frozen.load(directory, record=record)
        sandbox = cls.__new__(cls)
        sandbox._begin(about, name, limit)
        try:
            nets = [net.replaced(pcap=None) for net in frozen.config.nets]
            config = frozen.config.replaced(vsock=VsockConfig(3, sandbox._place.socket), nets=nets)
            sandbox._start(Machine(config, image=frozen), port)
            sandbox._ready(30)
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    @property
    def why(self) -> str:
        """Why it has ended; empty if it has not."""
        return self._link.why

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return not self._link.why

    def close(self) -> None:
        """End it as if its power were cut, and free its resources; idempotent. A forked child ends nothing."""
        if not self._place.is_ours:
            return
        with self._alarm:
            self._closed = True
            self._alarm.notify()
        self._link.fail("the sandbox was closed")
        super().close()
        if "machine" in self.__dict__:
            self.machine.close()
        self._place.close()

    kill = close

    def __repr__(self) -> str:
        return f"Sandbox({self.name!r}, {self._about['image']!r}, {'running' if self.running else self._link.why!r})"


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None and not timeout > 0:  # as it is for what is no number, too
        raise ConfigError("timeout", timeout, "must be more than 0 seconds")


def _shares(mounts: Mapping[str, Mount]) -> list[tuple[str, ShareConfig]]:
    shares = []
    for number, (path, what) in enumerate(mounts.items() if hasattr(mounts, "items") else [("", mounts)]):
        match what:
            case str() | os.PathLike():
                directory, mode = what, "rw"
            case [directory, mode]:
                pass
            case _:
                directory, mode = "", ""
        if mode not in ("rw", "ro") or not isinstance(path, str) or not path.startswith("/"):
            raise ConfigError("mounts", f"{path} {what}", 'must be {"/IN/GUEST": "DIRECTORY" or ("DIRECTORY", "ro")}')
        shares.append((path, ShareConfig(f"mount{number}", directory, read_only=mode == "ro")))
    return shares
