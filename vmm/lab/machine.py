# SPDX-License-Identifier: Apache-2.0
"""One boot of the lab: QEMU, its ports, and the pumps between them and our own descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vmm.closing import Closing
from vmm.lab.image import LabImage
from vmm.lab.qemu import NAME, Qemu

# TCG's SVM does not intercept XSETBV: with XSAVE, guests' FPU set-up is inconsistent, and Linux 6.18 panics there.
# AVX, and what works on its registers, without XSAVE is what no CPU has, and Linux 7.2 panics there.
CPU = "max,+svm,-xsave,-avx,-avx2,-fma,-f16c,-vaes"
# The machine's CPU 0, which runs no guest. When any CPU restores its FPU (FXRSTOR), QEMU's thread of it also reads and
# writes hflags2 of CPU 0 (cpu_clear_ignne, in 10.0 and later), without a lock. If CPU 0 enters or leaves a guest
# just then, that is undone: it goes on with the guest's page tables, or never takes an interrupt again.
SPARE_CPUS = 1
PORTS = ("in", "out", "err", "control")
# A machine that is not up by then is stuck: the emulated CPUs starved each other. It takes 5 to 10 s.
UP_SECONDS = 90
# An emulated CPU that does nothing at all for as long is lost: an idle Linux wakes each of them every four seconds.
STILL_SECONDS = 30.0
PR_SET_PDEATHSIG = 1


class Died(Exception):
    """The machine ended without the command's exit status."""


class _Pulse:
    """Whether each of the machine's CPUs still runs now and then. One that is lost stays halted, with its interrupts
    pending, and whatever waits for it waits for ever. Seen before CPU 0 was spared (``SPARE_CPUS``).

    :param pid: QEMU's
    """

    def __init__(self, pid: int) -> None:
        self._tasks = Path(f"/proc/{pid}/task")
        self._seen: dict[Path, tuple[str, float]] = {}

    def lost(self) -> str:
        """The name of a CPU that is lost; empty: none."""
        now = time.monotonic()
        try:
            for task in self._tasks.iterdir():
                name = (task / "comm").read_text().strip()
                if name.startswith("CPU "):
                    ran = (task / "schedstat").read_text()
                    if self._seen.get(task, ("", now))[0] != ran:
                        self._seen[task] = ran, now
                    elif now - self._seen[task][1] > STILL_SECONDS:
                        return name
        except OSError:
            pass  # it is ending, or this kernel does not tell
        return ""


class NotUp(Died):
    """It came to nothing before the command was started: to try again is safe."""


def qemu_argv(
    qemu: Qemu, image: LabImage, *, cpu: str, cpus: int, memory: str, job: str, host: str, writable: Sequence[str],
    ports: dict[str, int],
) -> list[str]:  # fmt: skip
    """QEMU's command line.

    :param cpu: its model and features, as for QEMU's -cpu
    :param cpus: CPUs for the command; the machine has one more (``SPARE_CPUS``)
    :param job: directory that says what to run
    :param host: directory that becomes the machine's root, read-only
    :param writable: directories to export writable, as ``w0``, ``w1``, ...
    :param ports: file descriptor of a connected socket for each of ``PORTS``
    """

    def export(tag: str, path: str, options: str) -> list[str]:
        # A comma in a value is written twice.
        return [
            "-fsdev",
            f"local,id={tag},path={path.replace(',', ',,')},security_model=none,multidevs=remap{options}",
            "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
        ]  # fmt: skip

    argv = [
        *qemu.argv, "-name", "pyvmm-lab,debug-threads=on", "-accel", "tcg,thread=multi", "-cpu", cpu,
        "-smp", str(cpus + SPARE_CPUS), "-m", memory, "-M", "q35", "-nodefaults", "-no-user-config", "-display", "none",
        "-no-reboot", "-kernel", image.kernel, "-initrd", image.initramfs, "-append",
        "console=ttyS0 quiet reboot=t panic=-1 mitigations=off random.trust_cpu=on",
        "-serial", f"file:{job}/console", *export("host", host, ",readonly=on"), *export("job", job, ""),
        "-device", "virtio-serial-pci",
    ]  # fmt: skip
    for index, path in enumerate(writable):
        argv += export(f"w{index}", path, "")
    for name, fd in ports.items():
        argv += [
            "-chardev", f"socket,id={name},fd={fd}", "-device", f"virtserialport,chardev={name},name={name}",
        ]  # fmt: skip
    return argv


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Boot(Closing):
    """One boot: ``run`` it, then ``close``. A context manager.

    :param argv: makes QEMU's command line of the ports' descriptors
    :param env: environment of QEMU, added to ours
    :param stdin: descriptor the command reads from, or None
    :param framed: whether input goes in frames (image.py's ``feed``) or as it is, to a terminal
    :param stdout: descriptor for its output
    :param stderr: descriptor for its errors
    """

    def __init__(
        self,
        argv: Callable[[dict[str, int]], list[str]],
        env: Mapping[str, str],
        stdin: int | None,
        stdout: int,
        stderr: int,
        *,
        framed: bool,
    ) -> None:
        pairs = {name: socket.socketpair() for name in PORTS}
        theirs = {name: pair[1].fileno() for name, pair in pairs.items()}
        self._ours = {name: pair[0] for name, pair in pairs.items()}
        self._stdin = stdin
        self._framed = framed
        self._sinks: dict[str, int | None] = {"out": stdout, "err": stderr}
        self._words = b""
        self._status: int | None = None
        self._up = False
        self._interrupts = 0
        self._ended = False
        self._process = subprocess.Popen(
            argv(theirs), env={**os.environ, **env},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            pass_fds=tuple(theirs.values()), start_new_session=True, preexec_fn=_die_with_parent,
        )  # fmt: skip
        for _, their in pairs.values():
            their.close()

    def interrupt(self, *_: object) -> None:
        """Ctrl-C: the first is the command's, the second ends the machine. A signal handler."""
        self._interrupts += 1
        if self._interrupts == 1 and self._up:
            self._signal("INT")
        else:
            self._ended = True
            self._process.kill()

    def _signal(self, name: str) -> None:
        with contextlib.suppress(OSError):  # the machine is gone
            self._ours["control"].send(f"{name}\n".encode())

    def run(self, deadline: float) -> int | None:
        """Pump until the machine is gone.

        :param deadline: ``time.monotonic()`` at which to give up
        :returns: the command's exit status; None: the time is over
        :raises NotUp: the command was never started
        :raises Died: the machine ended under the command, or one of its CPUs stood still
        """
        names = {sock.fileno(): name for name, sock in self._ours.items() if name != "in"}
        pending = b"0\n" if self._stdin is None else b""  # for the command
        up_deadline = time.monotonic() + UP_SECONDS
        pulse = _Pulse(self._process.pid)
        source = self._ours["in"]
        source.setblocking(False)
        while names:
            now = time.monotonic()
            if now >= deadline:
                return None
            if not self._up and now >= up_deadline:
                raise NotUp(f"it was not up after {UP_SECONDS} s")
            if self._up and (cpu := pulse.lost()):
                raise Died(f"its {cpu} has stood still for {STILL_SECONDS:g} s, a fault of the emulation; try again")
            poll = select.poll()
            for fd in names:
                poll.register(fd, select.POLLIN)
            if pending:
                poll.register(source, select.POLLOUT)
            elif self._up and self._stdin is not None:
                poll.register(self._stdin, select.POLLIN)
            wait = min(deadline, deadline if self._up else up_deadline) - now
            for fd, _ in poll.poll(max(1, min(wait, 1.0) * 1000)):
                if fd == self._stdin:
                    data = _read(fd)
                    if not data:
                        self._stdin = None
                    pending = b"%d\n" % len(data) + data if self._framed else data
                elif fd == source.fileno():
                    try:
                        pending = pending[source.send(pending) :]
                    except BlockingIOError:
                        pass
                    except OSError:
                        pending, self._stdin = b"", None
                elif not self._take(names[fd]):
                    del names[fd]
        self._process.wait()
        if self._ended:
            return 128 + signal.SIGINT
        if not self._up:
            raise NotUp(self._last_words())
        if self._status is None:
            raise Died(f"it ended under the command: {self._last_words()}")
        return self._status

    def _take(self, name: str) -> bool:
        # False: the machine has closed that port, by ending.
        try:
            data = self._ours[name].recv(1 << 16)
        except ConnectionResetError:
            return False
        if not data:
            return False
        if name == "control":
            self._words += data
            *words, self._words = self._words.split(b"\n")
            for word in words:
                if word == b"up":
                    self._up = True
                elif word.startswith(b"exit "):
                    self._status = int(word[5:])
            return True
        self._up = True  # the command speaks; that it runs is yet to come, by another port
        sink = self._sinks[name]
        view = memoryview(data)
        while view and sink is not None:
            try:
                view = view[os.write(sink, view) :]
            except BlockingIOError:
                select.select([], [sink], [])
            except OSError:
                # Our reader is gone (`pyvmm lab yes | head`): here the command's next write would tell it.
                self._sinks[name] = sink = None
                self._signal("PIPE")
        return True

    def _last_words(self) -> str:
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        ended = f"QEMU ended with status {self._process.returncode}"
        return re.sub(rf"^\S*{NAME}: ", "", said[-1]) if said else ended

    def close(self) -> None:
        """End the machine, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for sock in self._ours.values():
            sock.close()
        if self._process.stderr is not None:
            self._process.stderr.close()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:
        return b""


def missing() -> list[str]:
    """What the lab needs and this host lacks, a clause each with what to do; empty: ready."""
    lacks = []
    if shutil.which(NAME) is None:
        lacks.append(f"{NAME}: run `apt-get update && apt-get install qemu-system-x86 seabios`")
    if os.geteuid():
        lacks.append("root: only root can read all of this host's files, which the lab shows")
    return lacks


def console_of(job: str) -> str:
    """What the machine's own console said."""
    path = Path(job, "console")
    return path.read_text(errors="replace") if path.exists() else ""
